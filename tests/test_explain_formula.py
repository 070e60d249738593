"""Expressions are written as formulas that mean the same, for every rule and with numbers in place of names."""

from __future__ import annotations

import re

import polars as pl
import pytest

from fire_data.explain.formula import read, sides
from fire_data.rules import RULES, make_rule

NAMES = sorted(set(RULES) - {"expression"})


def _expressions(name: str) -> list[pl.Expr]:
    rule = make_rule(name)
    found = [*rule.parts().expressions().values(), *rule.derived().values(), *rule.terms().values()]
    return found + [e for s in rule.statistics() for e in s.expressions()]


@pytest.mark.parametrize("name", NAMES)
def test_the_expressions_of_every_rule_are_read_as_formulas(name: str) -> None:
    for expression in _expressions(name):
        formula, inner = read(expression), sides(expression)
        assert formula is not None, expression
        assert not re.search(r"dyn|col\(|\[\(|\]", str(formula))
        assert inner is None or [read(e) for e in inner] == list(formula.arguments)


A, B, C = pl.col("a"), pl.col("b"), pl.col("c")


@pytest.mark.parametrize(
    ("expression", "text", "filled"),
    [
        (A - (B - C), "a - (b - c)", "2 - (-3 - 0.5)"),
        ((A - B) - C, "a - b - c", "2 - (-3) - 0.5"),
        ((A + B) * C / (A * B), "(a + b) * c / (a * b)", "(2 + (-3)) * 0.5 / (2 * (-3))"),
        (-((A + B) ** 2), "-(a + b) ** 2", "-(2 + (-3)) ** 2"),
        ((-A) ** 2, "(-a) ** 2", "(-2) ** 2"),
        (B**2, "b ** 2", "(-3) ** 2"),
        (pl.when(A > B).then(C).otherwise(0.0) + 1, "(c if a > b else 0) + 1", "(0.5 if 2 > -3 else 0) + 1"),
        ((A > 0) == (B > 0), "(a > 0) == (b > 0)", "(2 > 0) == (-3 > 0)"),
        (~((A > 1) & (B < 1) | (C >= 1)), "not (a > 1 and b < 1 or c >= 1)", "not (2 > 1 and -3 < 1 or 0.5 >= 1)"),
        (A.clip(0, 1).exp(), "exp(clip(a, 0, 1))", "exp(clip(2, 0, 1))"),
        (A.clip(lower_bound=0).over("_row"), "max(a, 0)", "max(2, 0)"),
        (A.cast(pl.Float64).sum().over("_row"), "sum(a) over its trajectory", None),
        (A / A.max(), "a / max(a)", None),
        (pl.lit(1.5), "1.5", None),
        (pl.col("a)") + pl.col("it's"), "a) + it's", None),
    ],
)
def test_formulas_keep_their_meaning(expression: pl.Expr, text: str, filled: str | None) -> None:
    formula = read(expression)
    assert formula is not None
    assert str(formula) == text
    assert formula.filled({"a": 2.0, "b": -3.0, "c": 0.5}) == filled


def test_what_cannot_be_read_is_no_formula() -> None:
    assert read(pl.col("a").dt.to_string("%Y (")) is None
