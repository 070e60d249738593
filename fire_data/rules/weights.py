"""Rules that weigh tokens or trajectories softly: by position, by prefix, by agreement or by how hard the prompt is.

t and s are the teacher's and the student's log-probability of the sampled token in nats, D = t - s, N the length of
the response in tokens. Weights are factors; unless `normalise` says otherwise they are used as published, so a mean
weight other than 1 also changes the effective learning rate.
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
    WeightRule,
    mean_of,
    plain_advantage,
    require,
    right,
)
from fire_data.schemas.config import Denominator

_SMALLEST = 1e-6  # of what is divided by: Polars multiplies by the reciprocal, and 0 times infinity is no number
Softmax = tuple[tuple[Statistic, ...], pl.Expr]


@dataclass(frozen=True)
class IwOpd(WeightRule):
    """weight: 1 + (w_max - 1) clip(1 - F, 0, 1), F = (sum of d over the prefix) / (sum of d over the response + eps).

    d = |D|, or D with `absolute` false. F falls on the tokens before this one (`prefix` before: the official code) or
    up to and including it (through: TRL, which bounds the total from below by eps instead of adding it).
    Source: IW-OPD, arXiv 2606.22600; w_max 1.5 in both codes, no normalisation: the mean weight lies in [1, w_max].
    """

    name: ClassVar[str] = "iw-opd"
    paper: ClassVar[str] = "2606.22600"
    belief: ClassVar[str] = "the more the models have already disagreed, the less the rest of the response can teach"

    w_max: float = 1.5
    absolute: bool = True
    prefix: Literal["before", "through"] = "before"
    eps: float = 1e-8

    def __post_init__(self) -> None:
        require(self, 1 <= self.w_max < math.inf, f"w_max must be finite and at least 1, not {self.w_max}")
        require(self, 0 < self.eps < math.inf, f"eps must be positive and finite, not {self.eps}")

    def parts(self) -> Parts:
        d = plain_advantage().abs() if self.absolute else plain_advantage()
        through = d.cum_sum().over(ROW)
        prefix = through if self.prefix == "through" else through - d
        share = (prefix / (d.sum().over(ROW) + self.eps)).fill_nan(0.0)  # signed d may sum to -eps
        return Parts(weight=1.0 + (self.w_max - 1.0) * (1.0 - share).clip(0.0, 1.0))


@dataclass(frozen=True)
class PwOpsd(WeightRule):
    """weight: w_min + (1 - w_min) sigmoid((f - tau) / width), f = (i - 1/2) / N for the i-th token, i from 1.

    Source: PW-OPSD, arXiv 2605.21606, and its code; there the loss is a clipped forward KL against a teacher with
    privileged information, averaged per response and then over responses (so the denominator is `sequences`); here the
    advantage is D.
    It points the opposite way to iw-opd, esr and popd, which trust the beginning of a response.
    """

    name: ClassVar[str] = "pw-opsd"
    paper: ClassVar[str] = "2605.21606"
    belief: ClassVar[str] = "the beginning of a response is style; what the teacher knows better comes later"

    w_min: float = 0.25
    tau: float = 0.30
    width: float = 0.10
    denominator: Denominator = "sequences"

    def __post_init__(self) -> None:
        require(self, 0 <= self.w_min <= 1, f"w_min must lie between 0 and 1, not {self.w_min}")
        require(self, math.isfinite(self.tau), f"tau must be finite, not {self.tau}")
        inside = _SMALLEST <= self.width < math.inf
        require(self, inside, f"width must be finite and at least {_SMALLEST:g}, not {self.width}")

    def parts(self) -> Parts:
        where = (pl.col("position") + 0.5) / pl.col("length")
        sigmoid = 1.0 / (1.0 + (-(where - self.tau) / self.width).exp())
        return Parts(weight=self.w_min + (1.0 - self.w_min) * sigmoid)


@dataclass(frozen=True)
class SelecTkd(WeightRule):
    """weight: 1 if the student's most likely token is among the teacher's `top` most likely ones, else `beta`.

    Source: SelecTKD, arXiv 2510.24021: verification by the teacher's top 5, beta 0.01, and a mean over all tokens.
    The paper's experiments are off-policy. Tokens that tie in the teacher's ranking share the better rank.
    """

    name: ClassVar[str] = "selectkd"
    paper: ClassVar[str] = "2510.24021"
    belief: ClassVar[str] = "a student whose best guess would surprise the teacher cannot follow it there yet"

    top: int = 5
    beta: float = 0.01

    def __post_init__(self) -> None:
        require(self, self.top >= 1, f"top must be at least 1, not {self.top}")
        require(self, 0 <= self.beta < math.inf, f"beta must be finite and not negative, it is {self.beta}")

    def parts(self) -> Parts:
        accepted = pl.col("teacher_rank_of_student_top1") <= self.top
        return Parts(weight=pl.when(accepted).then(1.0).otherwise(self.beta))


@dataclass(frozen=True)
class ScopeOpd(Rule):
    """weight: n softmax(sign m / temperature) over the n trajectories of the prompt with the same outcome.

    Right trajectories: m = mean s, advantage the constant `mle` (maximum likelihood of the student's own answers).
    Wrong trajectories: m = mean t, advantage D. The mean weight of a branch is 1; an only trajectory has weight 1.
    `form` sets the signs (right, wrong): paper (-, +), so unlikely right answers and wrong ones the teacher finds
    plausible count more; scripts (+, +), the flags of the released scripts; code (+, -), the function's defaults.
    Source: SCOPE, arXiv 2604.10688, and its released code, whose flags mean the opposite of their comment.
    """

    name: ClassVar[str] = "scope"
    paper: ClassVar[str] = "2604.10688"
    belief: ClassVar[str] = "right answers need practice, the rare ones most; wrong ones a teacher, where it is sure"

    temperature: float = 1.0
    form: Literal["paper", "scripts", "code"] = "paper"
    mle: float = 1.0

    def __post_init__(self) -> None:
        inside = _SMALLEST <= self.temperature < math.inf
        require(self, inside, f"temperature must be finite and at least {_SMALLEST:g}, not {self.temperature}")
        require(self, math.isfinite(self.mle), f"mle must be finite, not {self.mle}")

    def statistics(self) -> tuple[Statistic, ...]:
        (likelihood, _), (distillation, _) = self._branches()
        return (*likelihood, *distillation)

    def parts(self) -> Parts:
        (_, likelihood), (_, distillation) = self._branches()
        return Parts(
            weight=pl.when(right()).then(likelihood).otherwise(distillation),
            advantage=pl.when(right()).then(self.mle).otherwise(plain_advantage()),
        )

    def _branches(self) -> tuple[Softmax, Softmax]:
        of_right, of_wrong = {"paper": (-1.0, 1.0), "scripts": (1.0, 1.0), "code": (1.0, -1.0)}[self.form]
        student, teacher = of_right * mean_of("student_logprob"), of_wrong * mean_of("teacher_logprob")
        return (
            _softmax("right", student, self.temperature, right()),
            _softmax("wrong", teacher, self.temperature, ~right()),
        )


@dataclass(frozen=True)
class Paced(WeightRule):
    """weight: p^alpha (1 - p)^beta, p the mean reward of the prompt's samples (the student's pass rate), in [0, 1].

    A prompt that is always or never solved has weight 0. Source: PACED, arXiv 2603.11178, alpha = beta = 1.
    """

    name: ClassVar[str] = "paced"
    paper: ClassVar[str] = "2603.11178"
    belief: ClassVar[str] = "a prompt teaches most while the student solves it sometimes"

    alpha: float = 1.0
    beta: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("alpha", self.alpha), ("beta", self.beta)):
            require(self, 0 <= value < math.inf, f"{name} must be finite and not negative, it is {value}")

    def statistics(self) -> tuple[Statistic, ...]:
        reward = pl.col("reward").cast(pl.Float64)
        return (Statistic("pass_rate", reward, "mean", scope="group", of="trajectories"),)

    def parts(self) -> Parts:
        p = pl.col("pass_rate").clip(0.0, 1.0)
        weight = p**self.alpha * (1.0 - p) ** self.beta
        return Parts(weight=weight, weight_sum=weight * pl.col("length"))


def _softmax(name: str, score: pl.Expr, temperature: float, where: pl.Expr) -> Softmax:
    """n softmax(score / temperature) over the trajectories of a prompt that are `where`: exp(score - max) by its mean.

    With the statistics it needs; the mean of exponentials whose largest is 1 neither overflows nor vanishes.
    """
    exponential = ((score - pl.col(f"{name}_highest")) / temperature).exp()
    statistics = (
        Statistic(f"{name}_highest", score, "max", scope="group", of="trajectories", where=where),
        Statistic(f"{name}_exponential", exponential, "mean", scope="group", of="trajectories", where=where),
    )
    return statistics, exponential / pl.col(f"{name}_exponential")


ENTRIES: dict[str, RuleEntry] = {
    "iw-opd": RuleEntry(IwOpd, {}, "less weight the more the models have already disagreed"),
    "pw-opsd": RuleEntry(PwOpsd, {}, "more weight after the first third of the response"),
    "selectkd": RuleEntry(SelecTkd, {}, "full weight where the teacher accepts the student's best guess"),
    "scope": RuleEntry(ScopeOpd, {}, "likelihood of right answers, distillation of wrong ones, both weighed"),
    "paced": RuleEntry(Paced, {}, "prompts of middling difficulty count most"),
}
