"""Rules to compare with: `uniform` is plain on-policy distillation, `random` drops as many tokens as another rule.

A rule that beats `uniform` may only have trained on fewer tokens; `random` at the same token budget tells.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass, field
from typing import Any, ClassVar

import polars as pl

from fire_data.rules.base import STEP, Rule, Stats, from_stats, ones, plain_advantage
from fire_data.schemas.errors import ConfigError


@dataclass(frozen=True)
class Uniform(Rule):
    """Every trajectory kept, every weight 1: the sampled reverse KL of on-policy distillation."""

    name: ClassVar[str] = "uniform"
    paper: ClassVar[str] = "2306.13649"
    belief: ClassVar[str] = "every token of every trajectory is worth the same"
    needs: ClassVar[tuple[str, ...]] = ("student_logprob", "teacher_logprob")

    def apply(self, lf: pl.LazyFrame, stats: Stats) -> pl.LazyFrame:
        return lf.with_columns(
            keep=pl.lit(True), drop_reason=pl.lit(None, dtype=pl.String), weight=ones(), advantage=plain_advantage()
        )


@dataclass(frozen=True)
class Random(Rule):
    """Drop trajectories at random until each step keeps as many tokens as `match` keeps, to within one trajectory.

    The order of dropping is a hash of (seed, trajectory_id): the same on every machine, in every shard.
    """

    name: ClassVar[str] = "random"
    paper: ClassVar[str] = ""
    belief: ClassVar[str] = "a filter that helps must beat dropping as many tokens blindly"
    needs: ClassVar[tuple[str, ...]] = ("trajectory_id", "student_logprob", "teacher_logprob")
    goes_stale: ClassVar[bool] = False

    match: str = "fire"
    match_params: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.match == self.name:
            raise ConfigError("random cannot match itself", where="rule random", fix="--set weigh.params.match=fire")

    @property
    def matched(self) -> Rule:
        from fire_data.rules import make_rule

        return make_rule(self.match, self.match_params)

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.needs, *self.matched.columns)))

    @property
    def uses_groups(self) -> bool:
        return self.matched.uses_groups

    def fit(self, lf: pl.LazyFrame) -> Stats:
        frame = lf.select(STEP, "trajectory_id", "_own", "_target").collect()
        return {"cut": [self._cut(part) for part in frame.partition_by(STEP, maintain_order=True)]}

    def apply(self, lf: pl.LazyFrame, stats: Stats) -> pl.LazyFrame:
        schema = pl.Schema({STEP: lf.select(STEP).collect_schema()[STEP]})
        cuts = from_stats(stats["cut"], schema).select(STEP, "below")
        ranks = pl.col("trajectory_id").map_elements(self._rank, return_dtype=pl.String)
        keep = ranks < pl.col("below")
        return (
            lf.join(cuts.lazy(), on=STEP, how="left", maintain_order="left")
            .with_columns(keep=keep, weight=ones(), advantage=plain_advantage())
            .with_columns(drop_reason=pl.when("keep").then(None).otherwise(pl.lit(f"random, matching {self.match}")))
            .drop("below")
        )

    def _rank(self, trajectory_id: str) -> str:
        return hashlib.blake2b(f"{self.seed}/{trajectory_id}".encode(), digest_size=16).hexdigest()

    def _cut(self, step: pl.DataFrame) -> dict[str, Any]:
        """The rank below which trajectories are kept, so that their tokens come nearest to the matched rule's."""
        target = int(step["_target"].sum())
        ranked = sorted(zip(map(self._rank, step["trajectory_id"]), step["_own"], strict=True))
        bounds = [*(rank for rank, _ in ranked), "g"]  # "g" lies behind every hex digit
        totals = [0, *itertools.accumulate(tokens for _, tokens in ranked)]
        nearest = min(range(len(totals)), key=lambda i: (abs(totals[i] - target), i))
        return {STEP: step[STEP][0], "below": bounds[nearest], "tokens": totals[nearest], "matched_tokens": target}
