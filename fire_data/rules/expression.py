"""A rule written as expressions: `keep` per trajectory, `weight`, `advantage` and `token_keep` per token.

On the command line and in `fire.yaml` an expression is Polars SQL (`pl.sql_expr`), so that text from a file can
compute but never execute code; from Python it may be any `pl.Expr`. Aggregates are taken over `scope`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import polars as pl
from polars.exceptions import PanicException, PolarsError

from fire_data.rules.base import Parts, RuleEntry, WeightRule, scope_keys
from fire_data.schemas.config import RULE_PARTS, Scope
from fire_data.schemas.errors import ConfigError


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
        where, fix = f"rule expression, {value!r}", "see: fire rules expression"
        try:
            made = value if value is None or isinstance(value, pl.Expr) else pl.sql_expr(str(value))
        except (PolarsError, PanicException, TypeError, ValueError) as error:
            raise ConfigError(f"{part} is not a valid expression: {error}", where=where, fix=fix) from None
        if made is not None and ".over(" in str(made):
            text = f"{part} has a window of its own; aggregates are over `scope`"
            raise ConfigError(text, where=where, fix="-p scope=group, or a class in a file")
        return made


ENTRIES = {"expression": RuleEntry(Expression, {}, "keep, weight, advantage, token_keep as expressions")}
