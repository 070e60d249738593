"""Rules to compare with: `uniform` is plain on-policy distillation, `random` drops as many tokens as another rule.

A rule that beats `uniform` may only have trained on fewer tokens; `random` at the same token budget tells.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any, ClassVar

import polars as pl

from fire_data.rules.base import STEP, Parts, Rule, RuleEntry, Stats, chance, require


@dataclass(frozen=True)
class Uniform(Rule):
    """Every trajectory kept, every weight 1: the sampled reverse KL of on-policy distillation."""

    name: ClassVar[str] = "uniform"
    paper: ClassVar[str] = "2306.13649"
    belief: ClassVar[str] = "every token of every trajectory is worth the same"

    def parts(self) -> Parts:
        return Parts()


@dataclass(frozen=True)
class Random(Rule):
    """Drop trajectories at random until each step keeps as many tokens as `match` keeps, to within one trajectory.

    The order of dropping is a hash of (seed, trajectory_id): the same on every machine, in every shard.
    """

    name: ClassVar[str] = "random"
    belief: ClassVar[str] = "a filter that helps must beat dropping as many tokens blindly"
    fitted: ClassVar[tuple[str, ...]] = ("below",)

    match: str = "fire"
    match_params: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        require(self, self.match != self.name, "random cannot match itself", "-p match=fire")

    @property
    def matched(self) -> Rule:
        from fire_data.rules import make_rule

        return make_rule(self.match, self.match_params)

    @property
    def uses_groups(self) -> bool:
        return self.matched.uses_groups

    def record(self) -> dict[str, Any]:
        return {**super().record(), "matched": self.matched.record()}

    def fit(self, trajectories: pl.DataFrame) -> Stats:
        ranked = trajectories.select(STEP, "_own", "_target", rank=chance(self.seed))
        return {"below": [self._cut(part) for part in ranked.partition_by(STEP, maintain_order=True)]}

    def parts(self) -> Parts:
        return Parts(keep=chance(self.seed) < pl.col("below"), reason=f"random, matching {self.match}")

    def _cut(self, step: pl.DataFrame) -> dict[str, Any]:
        """The rank below which trajectories are kept, so that their tokens come nearest to the matched rule's."""
        target = int(step["_target"].sum())
        ranked = step.sort("rank")
        bounds = [*ranked["rank"].to_list(), 1.0]
        totals = [0, *itertools.accumulate(ranked["_own"].to_list())]
        nearest = min(range(len(totals)), key=lambda i: (abs(totals[i] - target), i))
        return {STEP: step[STEP][0], "below": bounds[nearest], "tokens": totals[nearest], "matched_tokens": target}


ENTRIES = {
    "uniform": RuleEntry(Uniform, {}, "plain on-policy distillation"),
    "random": RuleEntry(Random, {}, "random drops at the token budget of another rule"),
}
