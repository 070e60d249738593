"""One rule and one trajectory: what its filter compared, its statistics, and every step to its weights and masks.

Values are those of the rule's own expressions, evaluated on the table that was weighed with the statistics that were
stored. Nothing here knows a rule.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import polars as pl

from fire_data.explain.formula import COMPARISONS, Formula, number, read, sides
from fire_data.prepare import Table
from fire_data.rules import Rule, Stats, own
from fire_data.rules.base import GROUP, KEY, ROW, STEP, TIES, Statistic
from fire_data.rules.statistics import KEYS, attach, table_columns, without_empty
from fire_data.rules.tokens import token_frame
from fire_data.schemas.config import Scope

_LONGEST = 150  # characters of a formula; beyond, the rule's own words are clearer
_PER_TOKEN = {"weight": pl.Float64, "advantage": pl.Float64, "token_keep": pl.Boolean, "fkl_weight": pl.Float64}
_REDUCED = {"sum": "sum of", "mean": "mean of", "std": "standard deviation of", "min": "smallest", "max": "largest",
            "n_unique": "number of distinct"}  # fmt: skip


class Line(NamedTuple):
    """A number for people: `formula` says how it came about, with numbers filled in where that says more."""

    name: str
    value: Any
    formula: str
    source: str


class Comparison(NamedTuple):
    """A part of a filter, with its sides where it compares two."""

    formula: str
    holds: bool
    left: Any = None
    operator: str | None = None
    right: Any = None


@dataclass(frozen=True)
class Quantity:
    """A number per token, with the text of each."""

    name: str
    values: list[Any]
    text: Callable[[int], str]
    source: str

    def line(self, token: int) -> Line:
        return Line(self.name, self.values[token], self.text(token), self.source)


@dataclass(frozen=True)
class Look:
    """A rule, alone or as a component called `label`, as it sees one trajectory: a row, and its tokens."""

    label: str
    rule: Rule
    paper: str
    stats: Stats
    row: dict[str, Any]
    kept: dict[str, Any]
    tokens: pl.DataFrame
    taken: dict[str, pl.DataFrame]

    def source(self, part: str) -> str:
        equation = self.rule.equations.get(part)
        paper = f"{self.label}, arXiv {self.paper}" if self.paper else f"rule {self.label}"
        return f"{paper}, {equation}" if equation else paper

    def formula(self, part: str, expression: pl.Expr, names: Mapping[Formula, str] | None = None) -> Formula | str:
        """An expression's formula; in the words of the rule where that is too long or cannot be read."""
        made = read(expression)
        made = made.named(names) if made is not None and names else made
        return made if made is not None and len(str(made)) <= _LONGEST else self._words(part)

    def comparisons(self) -> list[Comparison]:
        """What `keep` compares, with the numbers of this trajectory; empty without a filter."""
        keep = self.rule.parts().keep
        if keep is None or not self.row:
            return []
        return [self._comparison(e, f"keep {i}") for i, e in enumerate(_compared(keep))]

    def statistics(self) -> list[Line]:
        """The numbers of populations behind this rule, of the populations that this trajectory is in."""
        if not self.row:  # an empty response is in no population
            return []
        found = [self._statistic(s) for s in self.rule.statistics() if s.name in self.row]
        return found + [self._fitted(name) for name in self.rule.fitted]

    def inputs(self) -> dict[str, Any]:
        """The row's own columns that the rule reads, without statistics and keys."""
        named = [s.name for s in self.rule.statistics()]
        hidden = {*named, *(f"{n}_{x}" for n in named for x in TIES), *self.rule.fitted, *KEYS, KEY}
        return {k: v for k, v in self.row.items() if k not in hidden}

    def signals(self) -> dict[str, list[Any]]:
        """The token columns that the rule reads, those it derives included."""
        there = [c for c in self.tokens.columns if " " not in c and c not in (ROW, "position", *self.row)]
        numbers = [c for c in there if not isinstance(self.tokens.schema[c], pl.List)]
        return {c: self.tokens[c].to_list() for c in numbers}

    def derived(self, name: str) -> str:
        """The formula of a column that the rule derives."""
        return str(self.formula(name, self.rule.derived()[name]))

    def terms(self) -> list[Quantity]:
        return [self._quantity(f"term {n}", n, e, n) for n, e in self.rule.terms().items()]

    def factors(self) -> list[Quantity]:
        """Their product is the rule's weight before it is normalised."""
        formulas = {read(e): n for n, e in self.rule.terms().items()}
        names = {f: n for f, n in formulas.items() if f is not None}
        return [self._quantity(f"factor {n}", n, e, "weight", names) for n, e in self.rule.factors().items()]

    def part(self, name: str) -> Quantity | None:
        """A part per token, if the rule has it."""
        expression = self.rule.parts().expressions().get(name)
        return None if expression is None else self._quantity(f"part {name}", name, expression, name)

    def _quantity(
        self, column: str, name: str, expression: pl.Expr, part: str, names: Mapping[Formula, str] | None = None
    ) -> Quantity:
        made = self.formula(part, expression, names)

        def text(token: int) -> str:
            at = self.tokens.row(token, named=True)
            if isinstance(made, str):
                return made + self._first_compared(part, at)
            return filled_in(made, {**self.row, **at, **{n: at[f"term {n}"] for n in self.rule.terms()}})

        return Quantity(name, self.tokens[column].to_list(), text, self.source(part))

    def _comparison(self, expression: pl.Expr, name: str) -> Comparison:
        formula, holds = str(self.formula("keep", expression)), self.kept[name]
        if f"{name} left" not in self.kept:
            return Comparison(formula, holds)
        return Comparison(formula, holds, self.kept[f"{name} left"], _operator(expression), self.kept[f"{name} right"])

    def _first_compared(self, part: str, at: Mapping[str, Any]) -> str:
        """For a mask that is told in words, the two numbers it turns on; nothing for other parts."""
        expression = self.rule.parts().token_keep
        for i, one in enumerate(_compared(expression) if part == "token_keep" and expression is not None else ()):
            left, right = (at.get(f"{part} {i} {side}") for side in ("left", "right"))
            if left is not None and right is not None:
                return f" Here {number(left)} {_operator(one)} {number(right)}"
        return ""

    def _statistic(self, s: Statistic) -> Line:
        rows = self.taken[s.name].to_dicts() if s.name in self.taken else self.stats[s.name]
        mine = next((r for r in rows if all(r[k] == self.row[k] for k in s.keys)), {"n": 0})
        value = self.row[s.name]
        made, among = self.formula(s.name, s.value), self._population(s, mine["n"])
        about = "scores" if isinstance(made, str) else str(made)
        if s.reduce == "largest":
            text = f"smallest of the {mine['n']} largest {about} of {among}"
            ends = {x: mine.get(f"{s.name}_{x}") for x in TIES}
            last = ", ".join(f"{x} {number(v)}" for x, v in ends.items() if v is not None)
            text += f"; of equal ones those up to {last}" if last else ""
        elif s.reduce == "count":
            text = f"number of {among}"
        elif isinstance(s.at, float | int):
            text = f"{100 * s.at:g} % quantile of {about} over {among}"
        else:
            text = f"{_REDUCED[s.reduce]} {about} over {among}"
        return Line(s.name, None if value is None else float(value), text, self.source(s.name))

    def _population(self, s: Statistic, n: int) -> str:
        """Whom a statistic is about, with their number where `n` is that."""
        of = s.of if s.reduce in ("largest", "count") else f"the {n} {s.of}"
        if s.of == "tokens" and s.reduce in ("min", "max"):  # extremes of trajectories, which are what is counted
            of = "the tokens" if s.scope == "trajectory" else f"the tokens of {n} trajectories"
        by = f", {s.by} {self.row[s.by]}" if s.by else ""
        where = "" if s.where is None else f" where {self.formula(s.name, s.where)}"
        return f"{of} of {place(s.scope, self.row)}{by}{where}"

    def _fitted(self, name: str) -> Line:
        keys = (STEP, GROUP, "teacher")
        mine = next(r for r in self.stats[name] if all(r[k] == self.row[k] for k in keys if k in r))
        beside = ", ".join(f"{k} {number(v)}" for k, v in mine.items() if k not in (*keys, name))
        return Line(name, mine[name], f"{self._words(name)} Found: {beside}", self.source(name))

    def _words(self, part: str) -> str:
        """The docstring's line about a part, or its first."""
        lines = (inspect.getdoc(type(self.rule)) or self.rule.name).splitlines()
        return next((line for line in lines if part in line.partition(":")[0]), lines[0])


def look(table: Table, shard: int, row: int, label: str, rule: Rule, paper: str, stats: Stats) -> Look:
    """Evaluate a rule's expressions on its table, as `decide` does, and take what is about one trajectory.

    `row` is the trajectory's number in the round, `shard` the one that holds it, `stats` the rule's fitted statistics.
    """
    parts, derived, taken = rule.parts(), rule.derived(), dict[str, pl.DataFrame]()
    made = {f"part {n}": e.cast(_PER_TOKEN[n]) for n, e in parts.expressions().items() if n in _PER_TOKEN}
    made |= {f"term {n}": e.cast(pl.Float64) for n, e in rule.terms().items()}
    made |= {f"factor {n}": e.cast(pl.Float64) for n, e in rule.factors().items()}
    rows = {} if parts.keep is None else {"keep": parts.keep.cast(pl.Boolean), **_asked("keep", parts.keep)}
    made |= {} if parts.token_keep is None else _asked("token_keep", parts.token_keep)
    whole = [*made.values(), *rows.values()]
    span = range(shard, shard + 1) if rule.reads == "shard" else table.span(shard, rule.reads)
    columns = dict.fromkeys([*KEYS, *(s.by for s in rule.statistics() if s.by), *table_columns(rule, whole)])
    with own.told(rule, "the rule"):
        frame = without_empty(table.read(span, list(columns)))
        used = {r for e in whole for r in e.meta.root_names()}
        used |= {r for n, e in derived.items() if n in used for r in e.meta.root_names()}
        filled = attach(frame, rule, stats, used, taken)
        mine = filled.with_columns(**rows).filter(pl.col(ROW) == row)
        singles = [c for c in filled.columns if not isinstance(filled.schema[c], pl.List)]
        here = mine.select(singles).to_dicts()[0] if mine.height else {}
        answers = mine.select(list(rows)).to_dicts()[0] if mine.height and rows else {}
        roots = [pl.col(r) for r in used if r in filled.columns or r in derived or r == "position"]
        flat = token_frame(filled, [*made.values(), *roots], derived).with_columns(**made)
    return Look(label, rule, paper, stats, here, answers, flat.filter(pl.col(ROW) == row), taken)


def place(scope: Scope, row: Mapping[str, Any]) -> str:
    """The population of a scope that a row is in."""
    return {"trajectory": "this trajectory", "group": "its prompt", "step": f"step {row[STEP]}", "round": "the round"}[
        scope
    ]


def _asked(part: str, expression: pl.Expr) -> dict[str, pl.Expr]:
    """The comparisons in a filter or a mask, and their sides, as columns."""
    made = {}
    for i, one in enumerate(_compared(expression)):
        made[f"{part} {i}"] = one.cast(pl.Boolean)
        operator, both = _operator(one), sides(one)
        if operator is not None and both is not None:
            made |= {f"{part} {i} left": both[0], f"{part} {i} right": both[1]}
    return made


def _operator(expression: pl.Expr) -> str | None:
    """The operator of a comparison, None for anything else."""
    formula = read(expression)
    return formula.head if formula is not None and formula.head in COMPARISONS else None


def _compared(keep: pl.Expr) -> Iterator[pl.Expr]:
    """The comparisons that a filter joins with and, or, not."""
    formula, inner = read(keep), sides(keep)
    if formula is None or inner is None or formula.head not in ("and", "or", "not", "fill_null"):
        yield keep
        return
    for expression in inner[:1] if formula.head == "fill_null" else inner:
        yield from _compared(expression)


def filled_in(formula: Formula, values: Mapping[str, Any]) -> str:
    """A formula, and the same with numbers."""
    filled = formula.filled(values)
    if filled is None or filled == str(formula):
        return str(formula)
    return f"{formula}{': ' if formula.is_truth else ' = '}{filled}"
