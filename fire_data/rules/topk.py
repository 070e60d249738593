"""Rules on both models' top-k lists: which tokens a budget is spent on, or how far a response can be trusted.

Symbols: S_k, T_k = the student's and the teacher's list at a token; p, q = their probabilities; y = the sampled token,
s, t its logprobs and D = t - s. The lists are the columns of `fire score RUN --add topk`: true full-vocabulary logprobs
in nats, sorted descending. What is computed inside one token's lists is in `fire_data.rules.candidates`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import polars as pl

from fire_data.rules import candidates
from fire_data.rules.base import (
    GROUP,
    ROW,
    STEP,
    Parts,
    Rule,
    RuleEntry,
    Statistic,
    WeightRule,
    plain_advantage,
    require,
    require_fraction,
    top,
)
from fire_data.rules.candidates import CROSS, LISTS, SAMPLED, Missing, per_token
from fire_data.schemas.config import Scope


@dataclass(frozen=True)
class TaOpd(Rule):
    """mask: the ceil(keep_fraction N) of the scope's N tokens with the best `score`, and at least one per response.

    H = entropy of S_k, renormalised, / log k. D = KL(q || p) over S_k and T_k together. C = how well the student
    reaches the teacher: "mass", the teacher's probability of S_k; "set", the share of S_k in T_k; "bc", the sum of
    sqrt(p q) over both lists. X = D C. z' = (z - low) / (high - low), clipped to [0, 1], with bounds over the scope:
    its 5 % and 95 % quantiles ("quantile"), its extremes ("minmax"), or 0 and its maximum ("none", as the published
    code has it); equal bounds give 0. Scores: teachability D' C'; incompatible D' (1 - C'); tip H' + D' - H' D';
    ca_softor H' + X' - H' X'; split_ca (1 - H') X'. A response without a chosen token keeps its best by ca_softor, the
    earliest of equals.

    What one list lacks of the other: `missing` "floor" gives it the probability `floor`, then renormalises over both
    lists; "own_mass" divides each list by its own sum, then raises whatever is below `floor` to it, as the published
    code does; "exact" takes each model's logprobs on the other's list. They differ where a list holds little mass.
    Source: arXiv 2605.26844 and its code, k = 16.
    """

    name: ClassVar[str] = "ta-opd"
    paper: ClassVar[str] = "2605.26844"
    belief: ClassVar[str] = "a token teaches where the models disagree and the teacher's choice is within reach"

    score: Literal["teachability", "tip", "ca_softor", "split_ca", "incompatible"] = "teachability"
    compatibility: Literal["mass", "set", "bc"] = "mass"
    normaliser: Literal["quantile", "minmax", "none"] = "quantile"
    keep_fraction: float = 0.05
    scope: Scope = "step"
    missing: Missing = "own_mass"
    floor: float = 1e-12

    def __post_init__(self) -> None:
        require_fraction(self)
        require_fraction(self, "floor")

    def derived(self) -> dict[str, pl.Expr]:
        lists = (*LISTS, *(CROSS if self.missing == "exact" else ()))
        compatibility = {
            "mass": per_token(candidates.mass, "teacher_logprob_on_student_topk"),
            "set": per_token(candidates.overlap, "student_topk_ids", "teacher_topk_ids"),
            "bc": per_token(partial(candidates.affinity, self.missing, self.floor), *lists),
        }
        return {
            "ta_entropy": per_token(candidates.entropy, "student_topk_logprobs"),
            "ta_divergence": per_token(partial(candidates.divergence, self.missing, self.floor), *lists),
            "ta_compatibility": compatibility[self.compatibility],
        }

    def statistics(self) -> tuple[Statistic, ...]:
        scores = self._scores()
        used = {root for name in (self.score, "ca_softor") for root in scores[name].meta.root_names()}
        bounds = (s for name, z in self._signals().items() for s in _bounds(name, z, self.normaliser, self.scope))
        return (*(s for s in bounds if s.name in used), *self._top()[0])

    def parts(self) -> Parts:
        chosen = self._top()[1]
        best = pl.col("position") == self._scores()["ca_softor"].arg_max().over(ROW)
        return Parts(token_keep=chosen | (best & ~chosen.any().over(ROW)))

    def _top(self) -> tuple[tuple[Statistic, ...], pl.Expr]:
        return top("ta_score", self._scores()[self.score], self.keep_fraction, self.scope)

    def _scores(self) -> dict[str, pl.Expr]:
        h, d, c, x = (_rescaled(name, z, self.normaliser) for name, z in self._signals().items())
        return {
            "teachability": d * c,
            "incompatible": d * (1.0 - c),
            "tip": _either(h, d),
            "ca_softor": _either(h, x),
            "split_ca": (1.0 - h) * x,
        }

    def _signals(self) -> dict[str, pl.Expr]:
        signals = {name: pl.col(name) for name in ("ta_entropy", "ta_divergence", "ta_compatibility")}
        return {**signals, "ta_reachable": signals["ta_divergence"] * signals["ta_compatibility"]}


def _bounds(name: str, z: pl.Expr, normaliser: str, scope: Scope) -> list[Statistic]:
    """The statistics that `_rescaled` uses."""
    if normaliser == "quantile":
        return [Statistic(f"{name}_{end}", z, "quantile", scope, at=at) for end, at in (("low", 0.05), ("high", 0.95))]
    return [Statistic(f"{name}_low", z, "min", scope), Statistic(f"{name}_high", z, "max", scope)]


def _rescaled(name: str, z: pl.Expr, normaliser: str) -> pl.Expr:
    """`z` between its bounds, in [0, 1]."""
    low = pl.lit(0.0) if normaliser == "none" else pl.col(f"{name}_low")
    width = pl.col(f"{name}_high") - low
    return pl.when(width > _SAME).then(((z - low) / width).clip(0.0, 1.0)).otherwise(0.0)


def _either(a: pl.Expr, b: pl.Expr) -> pl.Expr:
    """The soft or, a + b - a b, in the form that is exactly 1 where one of them is: rounding must not break ties."""
    return 1.0 - (1.0 - a) * (1.0 - b)


_SAME = 1e-12  # bounds no further apart than this are equal


@dataclass(frozen=True)
class Ier(Rule):
    """mask: the ceil(keep_fraction N) tokens of the scope with the best fused rank, and the best of every response.

    IER is the signal-to-noise ratio of the reverse-KL gradient at a token. Over S_k, T_k and y together (y with its own
    logprobs, otherwise `missing_logprob` where a list lacks a candidate; both sides renormalised): c = log p - log q,
    clipped to +-clip; L = 1/p - 1; b = E_p[c L] / E_p[L]; signal = Var_p(c); noise = max(E_p[(c - b)^2 L] - signal, 0);
    IER = signal / max(noise, 1e-8). r = rank of IER in the scope, u = rank of the utility, |D| or the full reverse_kl;
    ranks count from 0, ties (of IER in single precision) share their mean, divided by N - 1. combine "or": r + u - r u,
    "and": r u; ties go to the earlier position, then to the smaller trajectory_id.

    The published code has L = 1/max(p, 1e-8) - 1: `least_probability` 1e-8, which quiets candidates the student all but
    excludes. It ranks IER alone, without sharing, and has other utilities. Source: arXiv 2609.24432, budget 0.1 to 1 %.
    """

    name: ClassVar[str] = "ier"
    paper: ClassVar[str] = "2609.24432"
    belief: ClassVar[str] = "few tokens have a gradient with more signal than sampling noise: spend the budget there"

    combine: Literal["or", "and"] = "or"
    utility: Literal["advantage", "reverse_kl"] = "advantage"
    keep_fraction: float = 0.01
    scope: Scope = "step"
    missing_logprob: float = -12.0
    clip: float = 30.0
    least_probability: float = 0.0

    def __post_init__(self) -> None:
        require_fraction(self)
        missing, clip, least = self.missing_logprob, self.clip, self.least_probability
        require(self, -math.inf < missing < 0, f"missing_logprob must be a negative number, not {missing}")
        require(self, 0 < clip < math.inf, f"clip must be a positive number, not {clip}")
        require(self, 0 <= least < 1, f"least_probability must be at least 0 and below 1, not {least}")

    def derived(self) -> dict[str, pl.Expr]:
        ratio = partial(candidates.influence_ratio, self.missing_logprob, self.clip, self.least_probability)
        # In single precision, as the lists are: tokens that are alike tie, whatever the order their sums were taken in.
        return {"ier": per_token(ratio, *LISTS, *SAMPLED).cast(pl.Float32)}

    @property
    def reads(self) -> Literal["shard", "step", "round"]:
        return self.scope if self.scope == "step" or self.scope == "round" else "shard"

    def parts(self) -> Parts:
        utility = plain_advantage().abs() if self.utility == "advantage" else pl.col("reverse_kl")
        token = pl.struct("ier", "position", "trajectory_id", ROW, utility=utility)
        chosen = token.map_batches(self._chosen, return_dtype=pl.Boolean)
        key = {"trajectory": ROW, "group": GROUP, "step": STEP, "round": None}[self.scope]
        return Parts(token_keep=chosen.over(key) if key else chosen)

    def _chosen(self, population: pl.Series) -> pl.Series:
        """True for the chosen tokens of one population."""
        tokens = population.struct.unnest().with_row_index("at")
        # Ranks not yet divided by N - 1: products of whole and half numbers are exact, so that equals are equal.
        last = tokens.height - 1
        r, u = (pl.col(z).rank("average") - 1.0 for z in ("ier", "utility"))
        cost = (last - r) * (last - u) if self.combine == "or" else -r * u
        order = tokens.with_columns(cost=cost).sort("cost", "position", "trajectory_id").with_row_index("place")
        best = pl.col("place") == pl.col("place").min().over(ROW)
        number = math.ceil(self.keep_fraction * tokens.height - _SLACK)
        return order.with_columns(chosen=(pl.col("place") < number) | best).sort("at")["chosen"]


_SLACK = 1e-9  # 0.07 * 100 is 7.000000000000001: its ceiling is 7


@dataclass(frozen=True)
class PruneOpd(WeightRule):
    """weight: base + clip(1 - drop E, 0, 1), E = events up to and including the token: it can only fall.

    Metric "overlap": an event is a token with |S_k and T_k| / k < threshold. "top_p": one whose y is not in the
    shortest head of T_k that holds probability `threshold` (all of T_k if it holds less). Defaults are those of the
    scripts in a fork of the authors' code, k = 16; its functions have threshold 0.9, drop 0.02, base 0. Shortening the
    responses themselves as weights reach 0 is not part of this rule. Source: Prune-OPD, arXiv 2605.07804.
    """

    name: ClassVar[str] = "prune-opd"
    paper: ClassVar[str] = "2605.07804"
    belief: ClassVar[str] = "every place where the models part makes the teacher a worse guide for all that follows"

    metric: Literal["overlap", "top_p"] = "overlap"
    threshold: float = 0.7
    drop: float = 0.01
    base: float = 0.5

    def __post_init__(self) -> None:
        require_fraction(self, "threshold")
        for parameter, value in (("drop", self.drop), ("base", self.base)):
            require(self, 0 <= value < math.inf, f"{parameter} must be a positive number or 0, not {value}")

    def parts(self) -> Parts:
        if self.metric == "overlap":
            event = per_token(candidates.overlap, "student_topk_ids", "teacher_topk_ids") < self.threshold
        else:
            event = per_token(partial(candidates.rejected, self.threshold), *LISTS[2:], "response_ids") > 0
        events = event.cast(pl.Float64).cum_sum().over(ROW)
        return Parts(weight=self.base + (1.0 - self.drop * events).clip(0.0, 1.0))


ENTRIES: dict[str, RuleEntry] = {
    "ta-opd": RuleEntry(TaOpd, {}, "5 % of the tokens: disagreement within the student's reach"),
    "ier": RuleEntry(Ier, {}, "1 % of the tokens: gradients with most signal per noise"),
    "prune-opd": RuleEntry(PruneOpd, {}, "weights that fall with every token the models part at"),
}
