"""Repairs of FiRe's filter that keep what corrects the student: tested in toy worlds, none of them published.

FiRe drops a trajectory whose mean t is low. Such a trajectory may have derailed, and then its negative advantages are
the cure; or the teacher does not know the prompt, and then they are poison. Each repair here drops less than the
trajectory. t and s are the teacher's and the student's log-probability of the sampled token in nats, D = t - s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import polars as pl

from fire_data.rules.base import (
    Parts,
    Rule,
    RuleEntry,
    Statistic,
    WeightRule,
    mean_of,
    plain_advantage,
    require,
    require_percentile,
)
from fire_data.schemas.config import Normalise, Scope


@dataclass(frozen=True)
class KeepCorrections(Rule):
    """token_keep: not (D > 0 and mean t of the trajectory < its `percentile` quantile in `scope`).

    What FiRe would drop loses only the tokens the teacher encourages; the tokens it discourages stay. `loses:
    discouraged` is the control of the belief: those with D < 0 go instead, and the encouraged ones stay. Not published.
    """

    name: ClassVar[str] = "keep-corrections"
    paper: ClassVar[str] = ""
    belief: ClassVar[str] = "in a derailed trajectory the teacher's discouragement is the lesson, its praise is noise"

    percentile: float = 20.0
    loses: Literal["encouraged", "discouraged"] = "encouraged"
    scope: Scope = "step"
    by: Literal["teacher"] | None = None

    def __post_init__(self) -> None:
        require_percentile(self)

    def statistics(self) -> tuple[Statistic, ...]:
        return (_score_limit(self.percentile, self.scope, self.by),)

    def parts(self) -> Parts:
        low = mean_of("teacher_logprob") < pl.col("score_limit")
        lost = plain_advantage() > 0 if self.loses == "encouraged" else plain_advantage() < 0
        return Parts(token_keep=~(low & lost))


@dataclass(frozen=True)
class CutAtSurprise(Rule):
    """token_keep: every token up to and including the first one with t < log(`probability`).

    The surprise itself is kept: its negative advantage is what tells the student not to go there. Not published.
    """

    name: ClassVar[str] = "cut-at-surprise"
    paper: ClassVar[str] = ""
    belief: ClassVar[str] = "after a token the teacher would hardly ever write, it judges a text it does not know"

    probability: float = 0.01

    def __post_init__(self) -> None:
        inside = 0 < self.probability <= 1
        require(self, inside, f"probability must lie above 0 and at most at 1, not {self.probability}")

    def statistics(self) -> tuple[Statistic, ...]:
        surprise = pl.col("teacher_logprob") < math.log(self.probability)
        return (Statistic("first_surprise", pl.col("position"), "min", scope="trajectory", where=surprise),)

    def parts(self) -> Parts:
        return Parts(token_keep=pl.col("position") <= pl.col("first_surprise").fill_null(pl.col("length")))


@dataclass(frozen=True)
class SoftFilter(WeightRule):
    """weight: sigmoid((score - threshold) / (`width` std)), one value per trajectory.

    score is the trajectory's mean t, threshold its `percentile` quantile in `scope` (FiRe's), std the population
    standard deviation of the scores there; equal scores have equal weights. Divided by its mean (`normalise`).
    `width` towards 0 is FiRe's filter. Not published.
    """

    name: ClassVar[str] = "soft-filter"
    paper: ClassVar[str] = ""
    belief: ClassVar[str] = "unlikely trajectories teach less, but no threshold separates them from the others"

    percentile: float = 20.0
    width: float = 0.5
    scope: Scope = "step"
    normalise: Normalise = "step"

    def __post_init__(self) -> None:
        require_percentile(self)
        require(self, 0 < self.width < math.inf, f"width must be positive and finite, not {self.width}")

    def statistics(self) -> tuple[Statistic, ...]:
        spread = Statistic("score_std", mean_of("teacher_logprob"), "std", scope=self.scope, of="trajectories")
        return (_score_limit(self.percentile, self.scope), spread)

    def parts(self) -> Parts:
        above, unit = mean_of("teacher_logprob") - pl.col("score_limit"), self.width * pl.col("score_std")
        weight = 1.0 / (1.0 + (-pl.when(unit > 0).then(above / unit).otherwise(0.0)).exp())
        return Parts(weight=weight, weight_sum=weight * pl.col("length"))


def _score_limit(percentile: float, scope: Scope, by: Literal["teacher"] | None = None) -> Statistic:
    """FiRe's threshold: the quantile of the trajectories' mean teacher_logprob."""
    score, at = mean_of("teacher_logprob"), percentile / 100
    return Statistic("score_limit", score, "quantile", scope=scope, of="trajectories", at=at, by=by)


ENTRIES: dict[str, RuleEntry] = {
    "keep-corrections": RuleEntry(KeepCorrections, {}, "low trajectories lose only their encouraged tokens"),
    "cut-at-surprise": RuleEntry(CutAtSurprise, {}, "nothing after the first token the teacher finds absurd"),
    "soft-filter": RuleEntry(SoftFilter, {}, "FiRe's filter as a smooth trajectory weight"),
}
