"""A rule written as expressions: `keep` per trajectory, `weight`, `advantage` and `token_keep` per token.

On the command line and in `fire.yaml` an expression is Polars SQL (`pl.sql_expr`), so that text from a file can
compute but never execute code; from Python it may be any `pl.Expr`. Aggregates are taken over `scope`.

Text may come from others, with a shared run. Polars reads the tables of a query inside an expression, files and
addresses included, while it parses. So no text with the words of a query gets there, wherever they stand in it: what is
a quotation to us need not be one to another parser. Of functions on text only those are taken that cannot make it long.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import polars as pl
from polars.exceptions import PanicException, PolarsError

from fire_data.rules.base import Parts, RuleEntry, WeightRule, scope_keys
from fire_data.schemas.config import RULE_PARTS, Scope
from fire_data.schemas.errors import ConfigError

_QUERY = re.compile(r"\b(select|from|table|values|with)\b", re.IGNORECASE)
_LONGEST = 4000  # characters; Polars takes quadratic time, and recurses for every term until the stack is full
_SHORT = frozenset({
    "Contains", "CountMatches", "EndsWith", "Extract", "Find", "Head", "LenBytes", "LenChars", "Lowercase", "Slice",
    "StartsWith", "StripChars", "StripCharsEnd", "StripCharsStart", "StripPrefix", "StripSuffix", "Tail", "Uppercase",
})  # fmt: skip
"""The functions on text, as Polars calls them, whose result is no longer than what they are given."""


@dataclass(frozen=True)
class Expression(WeightRule):
    """`keep` per trajectory, `weight`, `advantage`, `token_keep` per token; absent: keep, 1, log p_T - log p_S, all.

    Text is Polars SQL (`CASE WHEN`, `ABS`, `LEAST`, `AVG` ...), from Python also any `pl.Expr`. `keep` sees one row per
    trajectory: `length`, `finish_reason`, `reward`, and `<signal>_sum` and `<signal>_max` of every float signal, as in
    `teacher_logprob_sum / length > -2`. The others see one row per token: the signals as numbers, `position` from 0,
    trajectory columns repeated. Aggregates are over `scope`; `normalise` divides weights by their mean. All columns:
    `fire inspect RUN --schema`.
    """

    name: ClassVar[str] = "expression"
    belief: ClassVar[str] = "whatever you write"

    keep: Any = None
    weight: Any = None
    advantage: Any = None
    token_keep: Any = None
    scope: Scope = "trajectory"

    def __post_init__(self) -> None:
        self.parts()

    @property
    def reads(self) -> Literal["shard", "step", "round"]:
        return self.scope if self.scope in ("step", "round") else "shard"  # type: ignore[return-value]

    def parts(self) -> Parts:
        keys = scope_keys(self.scope)
        found = {p: e.over(keys) if keys else e for p in RULE_PARTS if (e := self._expression(p)) is not None}
        return Parts(reason=f"keep: {self.keep}", **found)

    def _expression(self, part: str) -> pl.Expr | None:
        value = getattr(self, part)
        where = f"rule expression, {value!r:.200}"
        made = value if value is None or isinstance(value, pl.Expr) else _parsed(str(value), part, where)
        if made is not None and ".over(" in str(made):
            text = f"{part} has a window of its own; aggregates are over `scope`"
            raise ConfigError(text, where=where, fix="-p scope=group, or a class in a file")
        return made


def _parsed(text: str, part: str, where: str) -> pl.Expr:
    """The expression that a text is. Raises ConfigError for what is none, and for what could do more than compute."""
    fix = "see: fire rules expression"
    if len(text) > _LONGEST:
        what = f"{part} has {len(text):,} characters, more than {_LONGEST:,}"
        raise ConfigError(what, where=where, fix="a class in a file")
    if (query := _QUERY.search(text)) is not None:
        what = f"{part} holds {query[0]!r}: an expression reads the columns of this table, and no other table"
        raise ConfigError(what, where=where, fix=fix)
    try:
        made = pl.sql_expr(text)
        uses = next((name for name in _text_functions(made) if name not in _SHORT), None)
    except (PolarsError, PanicException, TypeError, ValueError) as error:
        raise ConfigError(f"{part} is not a valid expression: {error}", where=where, fix=fix) from None
    except RecursionError:
        raise ConfigError(f"{part} has too many terms", where=where, fix="a class in a file") from None
    if uses is not None:
        raise ConfigError(f"{part} uses {uses}, a function on text that no rule needs", where=where, fix=fix)
    return made


def _text_functions(expression: pl.Expr) -> Iterator[str]:
    """The functions on text in an expression, by their names in Polars."""
    pending = [json.loads(expression.meta.serialize(format="json"))]
    while pending:
        node = pending.pop()
        if isinstance(node, dict) and (found := node.get("StringExpr")) is not None:
            yield found if isinstance(found, str) else next(iter(found))
        pending += node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()


ENTRIES = {"expression": RuleEntry(Expression, {}, "keep, weight, advantage, token_keep as expressions")}
