"""FiRe-OPD, "Filter, then Reweight" (arXiv 2606.02684): drop unlikely trajectories, then weigh each token softly.

Equations 4 to 8 of the paper, every statistic with its own scope, because the published forms differ only there:
`fire` takes all of them over the step, `fire-paper` the mean per trajectory, `fire-released` everything per
trajectory, which is what the released scripts compute and why their filter never drops anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import polars as pl

from fire_data.rules.base import (
    Rule,
    Stats,
    attach,
    floats,
    from_stats,
    grouped,
    grouped_sums,
    plain_advantage,
    scope_keys,
)
from fire_data.schemas.config import Scope
from fire_data.schemas.errors import ConfigError

_SMALLEST_MAXIMUM = 1e-6  # of the reference code: an entropy maximum is clamped to at least this
_SUMMARY = ("length", "teacher_logprob_sum", "teacher_entropy_sum", "student_entropy_sum")
_MORE = ("teacher_entropy_max", "student_entropy_max", "entropy_product_sum")
_MAXIMA = ("teacher_entropy_limit", "student_entropy_limit")


@dataclass(frozen=True)
class Fire(Rule):
    """keep: mean teacher_logprob >= its `percentile` quantile; weight: (1 + a (1 - H_T/max)) (1 + b H_S/max), mean 1.

    Sources: score Eq. 4, confidence Eq. 5, confusion Eq. 6, weight Eq. 7, normalisation Eq. 8 of arXiv 2606.02684.
    Maxima and the mean run over all response tokens of their scope, dropped trajectories included, as in the
    reference code.
    """

    name: ClassVar[str] = "fire"
    paper: ClassVar[str] = "2606.02684"
    belief: ClassVar[str] = (
        "unlikely trajectories teach nothing; tokens teach most where the teacher is sure and the student is not"
    )
    needs: ClassVar[tuple[str, ...]] = ("student_logprob", "teacher_logprob", "student_entropy", "teacher_entropy")

    percentile: float = 20.0
    alpha: float = 1.0
    beta: float = 1.0
    filter_scope: Scope = "step"
    max_scope: Scope = "step"
    mean_scope: Scope = "step"
    by: Literal["teacher"] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.percentile <= 100:
            raise ConfigError(f"percentile must lie between 0 and 100, not {self.percentile}", where="rule fire")
        if self.alpha < 0 or self.beta < 0:
            raise ConfigError("alpha and beta must not be negative", where="rule fire")

    @property
    def uses_groups(self) -> bool:
        return "group" in (self.filter_scope, self.max_scope, self.mean_scope)

    def fit(self, lf: pl.LazyFrame) -> Stats:
        scopes = {"filter": self.filter_scope, "max": self.max_scope, "mean": self.mean_scope}
        frames = self._statistics(self._summary(lf), {})
        return {name: frames[name].to_dicts() for name, scope in scopes.items() if scope in ("step", "round")}

    def apply(self, lf: pl.LazyFrame, stats: Stats) -> pl.LazyFrame:
        frames = self._statistics(self._summary(lf), stats)
        lf = attach(
            lf, frames["filter"].select(*scope_keys(self.filter_scope, self.by), "threshold"), self._keys("filter")
        )
        lf = attach(lf, frames["max"], self._keys("max"))
        lf = attach(lf, frames["mean"].select(*scope_keys(self.mean_scope, self.by), "mean_weight"), self._keys("mean"))
        keep = ((pl.col("length") > 0) & (_score() >= pl.col("threshold"))).fill_null(False)
        reason = (
            pl.when(pl.col("length") == 0)
            .then(pl.lit("empty response"))
            .otherwise(
                pl.lit(f"mean teacher_logprob below the {self.percentile:g} % quantile of its {self.filter_scope}")
            )
        )
        return lf.with_columns(
            keep=keep,
            drop_reason=pl.when(keep).then(None).otherwise(reason),
            weight=self._weight() / pl.col("mean_weight"),
            advantage=plain_advantage(),
        ).drop("threshold", "mean_weight", *_MAXIMA)

    def _weight(self) -> pl.Expr:
        def clipped(fraction: pl.Expr) -> pl.Expr:
            return fraction.list.eval(pl.element().clip(0.0, 1.0))

        confident = clipped(1.0 - floats("teacher_entropy") / pl.col("teacher_entropy_limit"))
        confused = clipped(floats("student_entropy") / pl.col("student_entropy_limit"))
        return (1.0 + self.alpha * confident) * (1.0 + self.beta * confused)

    def _keys(self, statistic: str) -> list[str]:
        scope = {"filter": self.filter_scope, "max": self.max_scope, "mean": self.mean_scope}[statistic]
        return scope_keys(scope, self.by)

    def _summary(self, lf: pl.LazyFrame) -> pl.DataFrame:
        keys = {k for s in ("filter", "max", "mean") for k in self._keys(s)}
        return lf.select(*sorted(keys), *_SUMMARY, *_MORE).collect()

    def _statistics(self, summary: pl.DataFrame, stored: Stats) -> dict[str, pl.DataFrame]:
        """Threshold, maxima and mean weight per population: those in `stored`, the others from `summary`."""
        frames = {name: from_stats(rows, summary.schema) for name, rows in stored.items()}
        if "filter" not in frames:
            scored = summary.filter(pl.col("length") > 0).with_columns(score=_score())
            threshold = pl.col("score").quantile(self.percentile / 100, "linear").alias("threshold")
            frames["filter"] = grouped(scored, self._keys("filter"), threshold, pl.len().alias("trajectories"))
        if "max" not in frames:
            limits = [
                pl.col(f"{who}_entropy_max")
                .max()
                .fill_null(0.0)
                .clip(lower_bound=_SMALLEST_MAXIMUM)
                .alias(f"{who}_entropy_limit")
                for who in ("teacher", "student")
            ]
            frames["max"] = grouped(summary, self._keys("max"), *limits)
        if "mean" not in frames:
            frames["mean"] = self._mean_weights(summary, frames["max"])
        return frames

    def _mean_weights(self, summary: pl.DataFrame, maxima: pl.DataFrame) -> pl.DataFrame:
        """The mean weight per population from per-trajectory sums: no token column is read.

        With 0 <= H <= max the clips of Eq. 5 and 6 do nothing: the product is a sum of 1, H_T, H_S and H_T H_S.
        """
        a, b = self.alpha, self.beta
        teacher = pl.col("teacher_entropy_sum") / pl.col("teacher_entropy_limit")
        student = pl.col("student_entropy_sum") / pl.col("student_entropy_limit")
        both = pl.col("entropy_product_sum") / (pl.col("teacher_entropy_limit") * pl.col("student_entropy_limit"))
        total = (1 + a) * pl.col("length") + (1 + a) * b * student - a * teacher - a * b * both
        frame = attach(summary.lazy(), maxima, self._keys("max")).with_columns(
            weight_sum=total.cast(pl.Float64), tokens=pl.col("length").cast(pl.Float64)
        )
        sums = grouped_sums(frame.collect(), self._keys("mean"), ["weight_sum", "tokens"])
        mean = pl.when(pl.col("tokens") > 0).then(pl.col("weight_sum") / pl.col("tokens")).otherwise(1.0)
        return sums.with_columns(mean_weight=mean).drop("weight_sum")


def _score() -> pl.Expr:
    """The length-normalised teacher logprob of a trajectory (Eq. 4)."""
    return pl.col("teacher_logprob_sum") / pl.col("length")
