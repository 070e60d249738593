"""Polars expressions as formulas for people: `clip(1 - teacher_entropy / max(teacher_limit, 1e-06), 0, 1)`.

An expression knows its own text, and that text is read here: unlike its serialised form it is there for every
expression, Python functions included. What cannot be read is told by None, and the rule's own words take its place,
so another version of Polars can make a formula plainer but never wrong.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl

from fire_data.rules.base import GROUP, KEY, ROW, STEP

_PRECEDENCE = {"or": 1, "and": 2, "==": 4, "!=": 4, "<": 4, "<=": 4, ">": 4, ">=": 4,
               "+": 5, "-": 5, "*": 6, "/": 6, "//": 6, "%": 6, "**": 8}  # fmt: skip
COMPARISONS = ("==", "!=", "<", "<=", ">", ">=")
_CHOICE, _NOT, _NEGATIVE, _ATOM = 0, 3, 7, 9
_WORDS = {"&": "and", "|": "or"}
_SAME = {"strict_cast", "cast", "alias", "sql_to_float"}
_OPERATORS = {"pow": "**", "sql_div": "/", "sql_mul": "*", "sql_rem": "%", "sql_int_div": "//", "sql_add": "+",
              "sql_sub": "-", "sql_gt": ">", "sql_gt_eq": ">=", "sql_lt": "<", "sql_lt_eq": "<="}  # fmt: skip
_FUNCTIONS = {"clip_min": "max", "clip_max": "min", "min_horizontal": "min", "max_horizontal": "max",
              "python_udf": "function"}  # fmt: skip
_NAMES = {KEY: "trajectory_id", ROW: "its trajectory", GROUP: "its prompt", STEP: "its step"}
# One number per row from numbers of that row alone: only there can numbers take the place of names.
_ROWWISE = {"abs", "ceil", "clip", "exp", "fill_nan", "fill_null", "floor", "if", "log", "log1p", "max", "min",
            "negate", "not", "round", "sign", "sqrt", "tanh", "is_null", "is_not_null"}  # fmt: skip


@dataclass(frozen=True)
class Formula:
    """A node: an operator, or a function, of `arguments`; without any, a `column` or a value as text."""

    head: str
    arguments: tuple[Formula, ...] = ()
    kind: str = "call"

    def __str__(self) -> str:
        return _written(self, None)[0]

    def filled(self, values: Mapping[str, Any]) -> str | None:
        """The same with numbers in place of columns; None if it has none, or looks beyond its own row."""
        known = {c for c, v in values.items() if isinstance(v, bool | int | float | str)}
        if not self._columns or not self.rowwise or not self._columns <= known:
            return None
        return _written(self, values)[0]

    def named(self, names: Mapping[Formula, str]) -> Formula:
        """With the parts that have a name replaced by it, as if they were columns."""
        if self in names:
            return Formula(names[self], kind="column")
        return Formula(self.head, tuple(a.named(names) for a in self.arguments), self.kind)

    @property
    def is_truth(self) -> bool:
        """True if it is something that holds or does not."""
        return self.head in (*COMPARISONS, "and", "or", "not")

    @property
    def _columns(self) -> set[str]:
        mine = {self.head} if self.kind == "column" else set()
        return mine.union(*(a._columns for a in self.arguments))

    @property
    def rowwise(self) -> bool:
        """True if each row's value is made from that row alone."""
        several = self.head not in ("max", "min") or len(self.arguments) > 1  # of one, it is that of all rows
        mine = self.kind != "call" or (self.head in _ROWWISE and several)
        return mine and all(a.rowwise for a in self.arguments)


def read(expression: pl.Expr) -> Formula | None:
    """The formula of an expression; None if its text cannot be read."""
    text = _Text(str(expression))
    try:
        made = text.expression()
    except (_Unreadable, RecursionError):
        return None
    return made if text.at == len(text.text) else None


def sides(expression: pl.Expr) -> list[pl.Expr] | None:
    """What the topmost operator or function of an expression is about, in the order of its formula; None if unknown."""
    whole, inner = read(expression), expression.meta.pop()[::-1]
    if whole is not None and inner and read(inner[0]) == whole:  # below a cast, or a window that changes nothing
        return sides(inner[0])
    return inner if whole is not None and [read(e) for e in inner] == list(whole.arguments) else None


def number(value: Any) -> str:
    """A value in a formula."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return f"{value:.4g}" if isinstance(value, float) else repr(value) if isinstance(value, str) else str(value)


class _Unreadable(Exception):
    """The text of an expression is not of the form that is known."""


class _Text:
    """A recursive descent through what Polars prints: `[(col("a")) + (dyn int: 1)].clip([dyn float: 0])`."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def expression(self) -> Formula:
        made = self._first()
        while (name := self._match(r"\.(\w+)\(")) is not None:
            made = _called(name[1], (made, *self._rest()))
        return made

    def _first(self) -> Formula:
        if self._match(r"\[\("):
            left = self.expression()
            operator = self._need(r"\) (\S+) \(")[1]
            right = self.expression()
            self._need(r"\)\]")
            return Formula(_WORDS.get(operator, operator), (left, right), "operator")
        if self._match(r"\.when\("):
            condition = self.expression()
            self._need(r"\)\.then\(")
            then = self.expression()
            self._need(r"\)\.otherwise\(")
            otherwise = self.expression()
            self._need(r"\)")
            return _chosen(condition, then, otherwise)
        if column := self._match(r'col\("((?:[^"]|"(?!\)))*)"\)'):
            return Formula(column[1], kind="column")
        if literal := self._match(r"(?:dyn (?:int|float): )?(-?(?:\d+(?:\.\d+)?(?:e-?\d+)?|inf|NaN))"):
            return Formula(f"{float(literal[1]) + 0.0:g}", kind="value")
        if self._match(r"as_struct\("):
            return Formula("", tuple(_column_of(a) for a in self._rest()))
        if name := self._match(r"([a-z_]+)\("):
            return _called(name[1], self._rest())
        return Formula(self._need(r'"[^"]*"|\w+')[0], kind="value")

    def _rest(self) -> tuple[Formula, ...]:
        """Arguments up to the closing bracket, which Polars writes with or without square ones around them."""
        square = self._match(r"\[(?!\()") or (self.text.startswith("[[(", self.at) and self._match(r"\["))
        end, found = r"\]\)" if square else r"\)", []
        while not self._match(end):
            found.append(self.expression())
            self._match(", ")
        return tuple(found)

    def _match(self, pattern: str) -> re.Match[str] | None:
        found = re.compile(pattern).match(self.text, self.at)
        self.at = found.end() if found else self.at
        return found

    def _need(self, pattern: str) -> re.Match[str]:
        found = self._match(pattern)
        if found is None:
            raise _Unreadable(self.text)
        return found


def _column_of(argument: Formula) -> Formula:
    """A column is written in a struct as a quoted name."""
    quoted = argument.kind == "value" and argument.head.startswith('"')
    return Formula(argument.head.strip('"'), kind="column") if quoted else argument


def _called(name: str, arguments: tuple[Formula, ...]) -> Formula:
    if name in _SAME:
        return arguments[0]
    if len(arguments) == 1 and arguments[0].head == "":  # a function of a struct is one of its fields
        arguments = arguments[0].arguments
    if name in ("all_horizontal", "any_horizontal"):
        made, word = arguments[0], "and" if name.startswith("all") else "or"
        for other in arguments[1:]:
            made = Formula(word, (made, other), "operator")
        return made
    if name == "over" and arguments[0].rowwise:  # a window changes nothing
        return arguments[0]
    if name in _OPERATORS and len(arguments) == 2:
        return Formula(_OPERATORS[name], arguments, "operator")
    return Formula(_FUNCTIONS.get(name, name), arguments)


def _chosen(condition: Formula, then: Formula, otherwise: Formula) -> Formula:
    is_number = Formula("is_not_nan", (then,)), Formula("is_null", (then,))
    if condition == Formula("or", is_number, "operator"):  # how Polars writes fill_nan
        return Formula("fill_nan", (then, otherwise))
    return Formula("if", (condition, then, otherwise))


def _written(node: Formula, values: Mapping[str, Any] | None) -> tuple[str, int]:
    """The text and how tightly it holds together."""
    if node.kind == "column":
        if values is None:
            return _NAMES.get(node.head, node.head), _ATOM
        text = number(values[node.head])
        return text, _NEGATIVE if text.startswith("-") else _ATOM
    if node.kind == "value":
        return node.head, _NEGATIVE if node.head.startswith("-") else _ATOM

    def inside(argument: Formula, least: int) -> str:
        text, tightness = _written(argument, values)
        return text if tightness >= least else f"({text})"

    parts = node.arguments
    if node.kind == "operator":
        mine = _PRECEDENCE[node.head]
        right = inside(parts[1], mine + 1)
        right = f"({right})" if right.startswith("-") and mine > _PRECEDENCE["=="] else right
        return f"{inside(parts[0], mine + (node.head in COMPARISONS))} {node.head} {right}", mine
    if node.head == "if":
        condition, then, otherwise = parts
        return f"{inside(then, 1)} if {inside(condition, 1)} else {inside(otherwise, _CHOICE)}", _CHOICE
    if node.head == "not":
        return f"not {inside(parts[0], _NOT)}", _NOT
    if node.head == "negate":
        return f"-{inside(parts[0], _NEGATIVE)}", _NEGATIVE
    if node.head == "over":
        return f"{inside(parts[0], _ATOM)} over {', '.join(inside(p, 0) for p in parts[1:])}", _NEGATIVE
    return f"{node.head}({', '.join(inside(p, 0) for p in parts)})", _ATOM
