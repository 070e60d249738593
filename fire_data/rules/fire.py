"""FiRe-OPD, "Filter, then Reweight" (arXiv 2606.02684): drop unlikely trajectories, then weigh each token softly.

Equations 4 to 8 of the paper, every statistic with its own scope, because the published forms differ only there:
`fire` takes all of them over the step, `fire-paper` the mean per trajectory, `fire-released` everything per
trajectory, which is what the released scripts compute and why their filter never drops anything.
"""

from __future__ import annotations

import functools
import math
import operator
from dataclasses import dataclass
from typing import ClassVar, Literal

import polars as pl

from fire_data.rules.base import Mean, Parts, Rule, RuleEntry, Statistic, mean_of, require, require_percentile
from fire_data.schemas.config import Scope

_SMALLEST_LIMIT = 1e-6  # of the reference code: what an entropy is divided by is at least this


@dataclass(frozen=True)
class Fire(Rule):
    """keep: mean teacher_logprob >= its `percentile` quantile; weight: (1 + a (1 - H_T/max)) (1 + b H_S/max), mean 1.

    Sources: score Eq. 4, confidence Eq. 5, confusion Eq. 6, weight Eq. 7, normalisation Eq. 8 of arXiv 2606.02684.
    Maxima and the mean run over all response tokens of their scope, dropped trajectories included, as in the
    reference code; the paper takes the mean per trajectory (`mean_scope`). `normaliser` replaces the maxima, which one
    token can set, by the `normaliser_percentile` of the entropies or by the log of `vocabulary_size`: not published.
    """

    name: ClassVar[str] = "fire"
    paper: ClassVar[str] = "2606.02684"
    belief: ClassVar[str] = (
        "unlikely trajectories teach nothing; tokens teach most where the teacher is sure and the student is not"
    )

    equations: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("keep", "threshold"), "Eq. 4"),
        **dict.fromkeys(("teacher_confidence", "teacher_limit"), "Eq. 5"),
        **dict.fromkeys(("student_confusion", "student_limit"), "Eq. 6"),
        "weight": "Eq. 7",
        "mean": "Eq. 8",
    }

    percentile: float = 20.0
    alpha: float = 1.0
    beta: float = 1.0
    filter_scope: Scope = "step"
    max_scope: Scope = "step"
    mean_scope: Scope = "step"
    by: Literal["teacher"] | None = None
    normaliser: Literal["max", "percentile", "log_vocabulary"] = "max"
    normaliser_percentile: float = 99.0
    vocabulary_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("percentile", "normaliser_percentile"):
            require_percentile(self, name)
        require(self, self.alpha >= 0 and self.beta >= 0, "alpha and beta must not be negative")
        sized = self.normaliser != "log_vocabulary" or (self.vocabulary_size or 0) > 1
        fix = "-p vocabulary_size=151936, the vocabulary of the models"
        require(self, sized, "normaliser log_vocabulary needs vocabulary_size", fix)

    @property
    def mean(self) -> Mean | None:
        return Mean(self.mean_scope, "all", self.by) if self.alpha or self.beta else None

    def statistics(self) -> tuple[Statistic, ...]:
        score = Statistic(
            "threshold", mean_of("teacher_logprob"), "quantile", self.filter_scope, "trajectories",
            at=self.percentile / 100, by=self.by,
        )  # fmt: skip
        limits = tuple(self._limit(who) for who in ("teacher", "student")) if self.alpha or self.beta else ()
        filtering = (score,) if self.percentile > 0 else ()
        return filtering + (limits if self.normaliser != "log_vocabulary" else ())

    def parts(self) -> Parts:
        weighs = self.alpha or self.beta
        return Parts(
            keep=mean_of("teacher_logprob") >= pl.col("threshold") if self.percentile > 0 else None,
            reason=f"mean teacher_logprob below the {self.percentile:g} % quantile of its {self.filter_scope}",
            weight=functools.reduce(operator.mul, self.factors().values()) if weighs else None,
            weight_sum=self._weight_sum() if weighs and self.normaliser == "max" else None,
        )

    def terms(self) -> dict[str, pl.Expr]:
        if not (self.alpha or self.beta):
            return {}
        return {
            "teacher_confidence": _within_1(1.0 - self._divided("teacher", "teacher_entropy")),
            "student_confusion": _within_1(self._divided("student", "student_entropy")),
        }

    def factors(self) -> dict[str, pl.Expr]:
        gains = zip(("alpha", "beta"), (self.alpha, self.beta), self.terms().items(), strict=False)
        return {f"1 + {gain} * {name}": 1.0 + value * term for gain, value, (name, term) in gains}

    def _limit(self, who: str) -> Statistic:
        name = f"{who}_limit"
        if self.normaliser == "max":
            highest = pl.col(f"{who}_entropy_max")
            return Statistic(name, highest, "max", self.max_scope, "trajectories", by=self.by)
        at = self.normaliser_percentile / 100
        return Statistic(name, pl.col(f"{who}_entropy"), "quantile", self.max_scope, at=at, by=self.by)

    def _divided(self, who: str, entropy: str) -> pl.Expr:
        if self.normaliser == "log_vocabulary":
            return pl.col(entropy) / math.log(self.vocabulary_size or 2)
        return pl.col(entropy) / _limit(who)

    def _weight_sum(self) -> pl.Expr:
        """The sum of the weights from per-trajectory sums.

        With 0 <= H <= max the clips of Eq. 5 and 6 do nothing: the product is a sum of 1, H_T, H_S and H_T H_S.
        """
        a, b = self.alpha, self.beta
        teacher = self._divided("teacher", "teacher_entropy_sum")
        student = self._divided("student", "student_entropy_sum")
        both = self._divided("teacher", "entropy_product_sum") / _limit("student")
        return (1 + a) * pl.col("length") + (1 + a) * b * student - a * teacher - a * b * both


def _limit(who: str) -> pl.Expr:
    return pl.max_horizontal(pl.col(f"{who}_limit"), _SMALLEST_LIMIT)


def _within_1(value: pl.Expr) -> pl.Expr:
    """Between 0 and 1; `clip` takes Polars three times as long."""
    return pl.max_horizontal(pl.min_horizontal(value, 1.0), 0.0)


_ALL_STEP = {"filter_scope": "step", "max_scope": "step", "mean_scope": "step", "denominator": "tokens"}
_PAPER = {"filter_scope": "step", "max_scope": "step", "mean_scope": "trajectory", "denominator": "tokens"}
_RELEASED = {
    "filter_scope": "trajectory",
    "max_scope": "trajectory",
    "mean_scope": "trajectory",
    "denominator": "sequences",
}
ENTRIES = {
    "fire": RuleEntry(Fire, _ALL_STEP, "every statistic over the step: the reference function given the whole batch"),
    "fire-paper": RuleEntry(Fire, _PAPER, "as printed: filter and maxima over the step, mean weight per trajectory"),
    "fire-released": RuleEntry(Fire, _RELEASED, "what the released scripts compute: the filter is inert"),
    "fire-filter": RuleEntry(Fire, {**_ALL_STEP, "alpha": 0.0, "beta": 0.0}, "the filter of fire alone"),
    "fire-weights": RuleEntry(Fire, {**_ALL_STEP, "percentile": 0.0}, "the weights of fire alone"),
    "fire-robust": RuleEntry(Fire, {**_ALL_STEP, "normaliser": "percentile"}, "fire with the 99 % quantile as maximum"),
}
