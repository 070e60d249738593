"""Advantage transforms: the number a token is rewarded with, in place of the plain log p_T - log p_S.

They differ in what they do with the tails: rare tokens give the plain advantage its largest values, and a few of them
can outweigh a step. Symbols in the formulas: s, t, b = logprob of the sampled token under student, teacher and base;
D = t - s, the plain advantage; R = verifier reward, right where R > 0.5. Logprobs and advantages are in nats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import polars as pl

from fire_data.rules.base import (
    ROW,
    Parts,
    Rule,
    RuleEntry,
    Statistic,
    mean_advantage,
    plain_advantage,
    require,
    right,
)
from fire_data.schemas.config import Scope


@dataclass(frozen=True)
class ExOpd(Rule):
    """advantage: l (t - b) - (s - b), l = `extrapolation`; b is the base model's logprob of the token.

    l = 1 is the plain advantage, l > 1 goes beyond the teacher in the direction that leads from base to teacher. The
    base is whatever `base_logprob` was scored with: the student's start (the paper's default), or the teacher before
    its reinforcement learning ("reward correction"). Source: G-OPD, arXiv 2602.12125, and its code; ExOPD is l = 1.25.
    """

    name: ClassVar[str] = "exopd"
    paper: ClassVar[str] = "2602.12125"
    belief: ClassVar[str] = "what training taught the teacher is worth more of, so the student may go past it"

    extrapolation: float = 1.25

    def __post_init__(self) -> None:
        _positive(self, "extrapolation", or_zero=True)

    def parts(self) -> Parts:
        student, teacher, base = (pl.col(f"{who}_logprob") for who in ("student", "teacher", "base"))
        return Parts(advantage=self.extrapolation * (teacher - base) - (student - base))


@dataclass(frozen=True)
class PowerOpd(Rule):
    """advantage: q^a - p^a = exp(a t) - exp(a s), a = `alpha`; between -1 and 1.

    a = 1 is p_T - p_S, a = 0.5 the difference of square roots. The published code's configuration says a = 0.1, the
    script it recommends a = 5, the default here; the sweep goes to 500. Source: arXiv 2606.17199.
    """

    name: ClassVar[str] = "poweropd"
    paper: ClassVar[str] = "2606.17199"
    belief: ClassVar[str] = "a disagreement matters by the probability that moves, so rare tokens must not dominate"

    alpha: float = 5.0

    def __post_init__(self) -> None:
        _positive(self, "alpha")

    def parts(self) -> Parts:
        teacher, student = ((self.alpha * pl.col(f"{who}_logprob")).exp() for who in ("teacher", "student"))
        return Parts(advantage=teacher - student)


@dataclass(frozen=True)
class Clip(Rule):
    """advantage: D limited to [-bound, bound], nats.

    A baseline of arXiv 2606.17199: its code has 5, the default here; the best of its grid was 1.
    """

    name: ClassVar[str] = "clip"
    paper: ClassVar[str] = "2606.17199"
    belief: ClassVar[str] = "beyond some point a larger disagreement is an outlier, not a stronger lesson"

    bound: float = 5.0

    def __post_init__(self) -> None:
        _positive(self, "bound")

    def parts(self) -> Parts:
        return Parts(advantage=plain_advantage().clip(-self.bound, self.bound))


@dataclass(frozen=True)
class Tanh(Rule):
    """advantage: tanh(D / scale), between -1 and 1.

    Not multiplied by the scale again: small advantages shrink to D / scale. A baseline of arXiv 2606.17199, scale 5.
    """

    name: ClassVar[str] = "tanh"
    paper: ClassVar[str] = "2606.17199"
    belief: ClassVar[str] = "disagreement saturates: beyond some nats, more of it teaches little more"

    scale: float = 5.0

    def __post_init__(self) -> None:
        _positive(self, "scale")

    def parts(self) -> Parts:
        return Parts(advantage=(plain_advantage() / self.scale).tanh())


@dataclass(frozen=True)
class ZScore(Rule):
    """advantage: (D - mean) / max(std, eps); mean and population standard deviation over the tokens of `scope`.

    Subtracting the mean turns half of the tokens into rewards even where the teacher likes none of them. A baseline of
    arXiv 2606.17199, there over the batch.
    """

    name: ClassVar[str] = "z-score"
    paper: ClassVar[str] = "2606.17199"
    belief: ClassVar[str] = "only how a token compares with the others of its batch matters"

    scope: Scope = "step"
    eps: float = 1e-8

    def __post_init__(self) -> None:
        _positive(self, "eps")

    def statistics(self) -> tuple[Statistic, ...]:
        return (
            Statistic("advantage_mean", plain_advantage(), "mean", self.scope),
            Statistic("advantage_std", plain_advantage(), "std", self.scope),
        )

    def parts(self) -> Parts:
        spread = pl.col("advantage_std").clip(lower_bound=self.eps)
        return Parts(advantage=(plain_advantage() - pl.col("advantage_mean")) / spread)


@dataclass(frozen=True)
class SoftLog(Rule):
    """advantage: sign(D) log(1 + |D|). Source: arXiv 2607.13399, which also has `clip`."""

    name: ClassVar[str] = "soft-log"
    paper: ClassVar[str] = "2607.13399"
    belief: ClassVar[str] = "large disagreements are worth more than small ones, but not in proportion"

    def parts(self) -> Parts:
        return Parts(advantage=plain_advantage().sign() * plain_advantage().abs().log1p())


@dataclass(frozen=True)
class Sign(Rule):
    """advantage: scale sign(D), with sign(0) = 0.

    Source: arXiv 2609.08341, which finds the sign alone about as good as D; its scale, from the total variation
    between the models, is not part of this rule.
    """

    name: ClassVar[str] = "sign"
    paper: ClassVar[str] = "2609.08341"
    belief: ClassVar[str] = "the direction of the disagreement is the lesson, its size is noise"

    scale: float = 1.0

    def __post_init__(self) -> None:
        _positive(self, "scale")

    def parts(self) -> Parts:
        return Parts(advantage=self.scale * plain_advantage().sign())


@dataclass(frozen=True)
class Opdvr(Rule):
    """advantage: max(D, 0) in right trajectories, min(D, 0) in wrong ones.

    The teacher may only praise what the verifier accepts and only blame what it rejects; about half of the tokens are
    left with 0. Source: OPDVR, arXiv 2608.24696.
    """

    name: ClassVar[str] = "opdvr"
    paper: ClassVar[str] = "2608.24696"
    belief: ClassVar[str] = "the teacher is to be believed only where it agrees with the verifier"

    def parts(self) -> Parts:
        praise, blame = plain_advantage().clip(lower_bound=0.0), plain_advantage().clip(upper_bound=0.0)
        return Parts(advantage=pl.when(right()).then(praise).otherwise(blame))


@dataclass(frozen=True)
class SgOpd(Rule):
    """advantage: `agree` D where the sign of D agrees with the verifier, `disagree` D elsewhere.

    They agree where D > 0 in a right trajectory or D < 0 in a wrong one. Source: SG-OPD, arXiv 2606.09304; it has
    agree = 1.8 and 0 < disagree <= 1 (one appendix says 1, the default here). Its staged teacher sampling is not part
    of this rule.
    """

    name: ClassVar[str] = "sg-opd"
    paper: ClassVar[str] = "2606.09304"
    belief: ClassVar[str] = "a lesson that teacher and verifier share deserves a larger step"

    agree: float = 1.8
    disagree: float = 1.0

    def __post_init__(self) -> None:
        _positive(self, "agree", or_zero=True)
        _positive(self, "disagree", or_zero=True)

    def parts(self) -> Parts:
        agrees = (plain_advantage() > 0) == right()
        factor = pl.when(agrees).then(self.agree).otherwise(self.disagree)
        return Parts(advantage=plain_advantage() * factor)


@dataclass(frozen=True)
class VOpd(Rule):
    """advantage: D + KL(p_S || p_T) at the token's position.

    D has the mean -KL under the student, so this is D without its baseline: 0 on average at every position, whatever
    the token drawn. KL is the exact full-vocabulary one. Source: vOPD, arXiv 2605.07865.
    """

    name: ClassVar[str] = "vopd"
    paper: ClassVar[str] = "2605.07865"
    belief: ClassVar[str] = "a token is good or bad compared with what the student would have said on average"

    def parts(self) -> Parts:
        return Parts(advantage=plain_advantage() + pl.col("reverse_kl"))


@dataclass(frozen=True)
class UniOpd(Rule):
    """advantage: D + shift in right and D - shift in wrong trajectories, so that right ones score `margin` higher.

    m = mean of D over a trajectory. gap = mean m of the right minus mean m of the wrong ones of `scope` (mode "minmax":
    smallest of the right minus largest of the wrong); what lacks to the margin is max(0, margin - gap). Direction
    "both" gives each side half of it, "correct_up" all to the right ones, "incorrect_down" all to the wrong ones. A
    population with one kind only stays as it is. Source: Uni-OPD, arXiv 2605.03677, and its code, margin 0.4 nats; its
    other half, balancing by removal, is the rule uni-opd-balance.
    """

    name: ClassVar[str] = "uni-opd"
    paper: ClassVar[str] = "2605.03677"
    belief: ClassVar[str] = "the teacher's signal must rank right answers above wrong ones before it may be followed"

    margin: float = 0.4
    mode: Literal["mean", "minmax"] = "mean"
    direction: Literal["both", "correct_up", "incorrect_down"] = "both"
    scope: Literal["group", "step", "round"] = "group"

    def __post_init__(self) -> None:
        _positive(self, "margin", or_zero=True)

    def statistics(self) -> tuple[Statistic, ...]:
        of_right, of_wrong = ("mean", "mean") if self.mode == "mean" else ("min", "max")
        m = mean_advantage()
        return (
            Statistic("score_right", m, of_right, self.scope, of="trajectories", where=right()),  # type: ignore[arg-type]
            Statistic("score_wrong", m, of_wrong, self.scope, of="trajectories", where=~right()),  # type: ignore[arg-type]
        )

    def parts(self) -> Parts:
        gap = pl.col("score_right") - pl.col("score_wrong")
        lacking = (self.margin - gap).clip(lower_bound=0.0).fill_null(0.0)
        up, down = {"both": (0.5, 0.5), "correct_up": (1.0, 0.0), "incorrect_down": (0.0, 1.0)}[self.direction]
        return Parts(advantage=plain_advantage() + pl.when(right()).then(up * lacking).otherwise(-down * lacking))


@dataclass(frozen=True)
class LgrProxy(Rule):
    """advantage: D + gain exp(largest teacher logprob at the NEXT token), 0 for the last token: an offline proxy.

    The published rule, LGR (arXiv 2605.30833), compares how sure the teacher is after the sampled token with how sure
    it would be after the student's other candidates: gain (conf(sampled) - mean conf(candidates)). That needs teacher
    passes over unsampled text; a table of scores has the first term only, as a public fork computes it (gain 0.1).
    """

    name: ClassVar[str] = "lgr"
    paper: ClassVar[str] = "2605.30833"
    belief: ClassVar[str] = "a token is good if the teacher knows how to go on from it"

    gain: float = 0.1

    def __post_init__(self) -> None:
        _positive(self, "gain", or_zero=True)

    def parts(self) -> Parts:
        confidence = pl.col("teacher_max_logprob").shift(-1).over(ROW).exp().fill_null(0.0)
        return Parts(advantage=plain_advantage() + self.gain * confidence)


@dataclass(frozen=True)
class ConstantNegative(Rule):
    """advantage: -value for every token. A control, no method: the teacher is not asked.

    What improves under it improves without a teacher, by lowering the probability of whatever was sampled. Source of
    the control: arXiv 2608.31046.
    """

    name: ClassVar[str] = "constant-negative"
    paper: ClassVar[str] = "2608.31046"
    belief: ClassVar[str] = "none: it shows how much of a gain needs no teacher"

    value: float = 1.0

    def __post_init__(self) -> None:
        _positive(self, "value")

    def parts(self) -> Parts:
        return Parts(advantage=pl.lit(-self.value))


def _positive(rule: Rule, parameter: str, *, or_zero: bool = False) -> None:
    value = getattr(rule, parameter)
    holds = 0 < value < math.inf or (or_zero and value == 0)
    require(rule, holds, f"{parameter} must be a positive number{' or 0' if or_zero else ''}, not {value}")


ENTRIES: dict[str, RuleEntry] = {
    "exopd": RuleEntry(ExOpd, {}, "past the teacher, in the direction away from a base model"),
    "poweropd": RuleEntry(PowerOpd, {}, "difference of powered probabilities instead of logs"),
    "clip": RuleEntry(Clip, {}, "plain advantage, limited"),
    "tanh": RuleEntry(Tanh, {}, "plain advantage, saturating"),
    "z-score": RuleEntry(ZScore, {}, "plain advantage, standardised over its scope"),
    "soft-log": RuleEntry(SoftLog, {}, "plain advantage, growing like a logarithm"),
    "sign": RuleEntry(Sign, {}, "direction of the advantage only"),
    "opdvr": RuleEntry(Opdvr, {}, "praise only in right, blame only in wrong answers"),
    "sg-opd": RuleEntry(SgOpd, {}, "larger steps where teacher and verifier agree"),
    "vopd": RuleEntry(VOpd, {}, "advantage over the student's average token"),
    "uni-opd": RuleEntry(UniOpd, {}, "right answers lifted above wrong ones by a margin"),
    "lgr": RuleEntry(LgrProxy, {}, "bonus where the teacher is sure how to go on (offline proxy)"),
    "constant-negative": RuleEntry(ConstantNegative, {}, "control: every sampled token made less likely"),
}
