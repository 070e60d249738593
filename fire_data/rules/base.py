"""What a rule is: parameters, the columns it needs, `fit` for statistics and `apply` for expressions over one table.

Statistics have a declared scope (trajectory, group, step, round). `fit` reads per-trajectory columns of the whole
round and returns plain numbers; `apply` sees one shard, or more if `reads` says so. Sums are correctly rounded
(`math.fsum`), so neither threads nor shard boundaries can change them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import polars as pl

from fire_data.schemas.config import Denominator, Scope

Stats = dict[str, list[dict[str, Any]]]

ROW, GROUP, STEP = "_row", "_group", "step"
_KEYS: dict[Scope, list[str]] = {"trajectory": [ROW], "group": [GROUP], "step": [STEP], "round": []}


@dataclass(frozen=True)
class Rule(ABC):
    """A filter and a weighting. Fields of a subclass are its parameters, validated before any model is loaded."""

    name: ClassVar[str]
    paper: ClassVar[str]
    belief: ClassVar[str]
    needs: ClassVar[tuple[str, ...]]
    goes_stale: ClassVar[bool] = True
    denominator: Denominator = "tokens"

    @property
    def reads(self) -> Literal["shard", "step", "round"]:
        """How many rows `apply` must see together."""
        return "shard"

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns this instance reads: `needs`, and what its parameters add."""
        return self.needs

    @property
    def matched(self) -> Rule | None:
        """Another rule whose kept tokens this one is measured against: `fit` then finds `_target` and `_own`."""
        return None

    @property
    def uses_groups(self) -> bool:
        """True if a statistic is taken over the samples of a prompt: a step must then hold whole groups."""
        return False

    def fit(self, lf: pl.LazyFrame) -> Stats:
        """Statistics over the round as lists of JSON rows, keyed by their scope's columns.

        `lf` has one row per trajectory with the columns of `needs`, the summaries derived from them, and
        `_row`, `_group`, `step`; for a rule that is `matched` to another also `_target` and `_own`: the tokens that
        count under the other rule, and if this one keeps the trajectory.
        """
        return {}

    @abstractmethod
    def apply(self, lf: pl.LazyFrame, stats: Stats) -> pl.LazyFrame:
        """Add `keep`, `drop_reason`, `weight`, `advantage` and, where the rule masks tokens, `token_keep`."""


def scope_keys(scope: Scope, by: str | None = None) -> list[str]:
    """The columns whose equal values form one population of `scope`."""
    return [*_KEYS[scope], *([by] if by else [])]


def ones() -> pl.Expr:
    """A list of 1.0 per response token."""
    return pl.lit(1.0, dtype=pl.Float64).repeat_by(pl.col("length").cast(pl.UInt32))


def plain_advantage() -> pl.Expr:
    """The per-token OPD advantage log p_T - log p_S: the sampled reverse KL with its sign flipped."""
    return floats("teacher_logprob") - floats("student_logprob")


def floats(column: str) -> pl.Expr:
    """A token column in double precision."""
    return pl.col(column).cast(pl.List(pl.Float64))


def grouped(frame: pl.DataFrame, keys: list[str], *aggregates: pl.Expr) -> pl.DataFrame:
    """One row per population, in order of first appearance; one row in all when `keys` is empty."""
    if not keys:
        return frame.select(aggregates)
    return frame.group_by(keys, maintain_order=True).agg(aggregates)


def grouped_sums(frame: pl.DataFrame, keys: list[str], columns: list[str]) -> pl.DataFrame:
    """Correctly rounded sums of float columns per population."""
    aggregates = [pl.col(c) if keys else pl.col(c).implode() for c in columns]
    lists = grouped(frame, keys, *aggregates)
    sums = [pl.Series(c, [math.fsum(x) for x in lists[c].to_list()], dtype=pl.Float64) for c in columns]
    return lists.with_columns(sums)


def attach(lf: pl.LazyFrame, frame: pl.DataFrame, keys: list[str]) -> pl.LazyFrame:
    """Join statistics back to the trajectories of their population, row order kept."""
    if not keys:
        return lf.with_columns(**{c: pl.lit(frame[c][0], dtype=frame.schema[c]) for c in frame.columns})
    return lf.join(frame.lazy(), on=keys, how="left", maintain_order="left", nulls_equal=True)


def from_stats(rows: list[dict[str, Any]], like: pl.Schema) -> pl.DataFrame:
    """Statistics read back from JSON, key columns with the types of the table they are joined to."""
    return pl.DataFrame(rows, schema_overrides={k: v for k, v in like.items() if rows and k in rows[0]})
