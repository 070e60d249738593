"""Rules that keep or drop whole trajectories: by their outcome, the teacher's verdict, their length or repetition.

What a filter keeps has weight 1 and the advantage D = t - s of plain on-policy distillation, where t and s are the
teacher's and the student's log-probability of the sampled token in nats, R is the verifier's reward of the
trajectory and a trajectory with R > 1/2 is right. A quantile interpolates linearly, and a score equal to it is kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import polars as pl

from fire_data.rules.base import (
    GROUP,
    Parts,
    Rule,
    RuleEntry,
    Statistic,
    chance,
    mean_advantage,
    mean_of,
    require,
    require_percentile,
    right,
    top,
)
from fire_data.schemas.config import Scope

_SLACK = 1e-6  # teacher_pass_rate is stored in single precision: 2/3 there is a little more or less than 2/3 here


@dataclass(frozen=True)
class Verified(Rule):
    """keep: the verifier found the trajectory right (`outcome` wrong: found it wrong).

    Source: the subsets most papers with a verifier compare to; no formula of its own.
    """

    name: ClassVar[str] = "verified-only"
    paper: ClassVar[str] = ""
    belief: ClassVar[str] = "only trajectories of one outcome are worth the teacher's corrections"

    outcome: Literal["right", "wrong"] = "right"

    def parts(self) -> Parts:
        keep = right() if self.outcome == "right" else ~right()
        return Parts(keep=keep, reason=f"the answer is not {self.outcome}")


@dataclass(frozen=True)
class Agreement(Rule):
    """keep: (2 R - 1) G >= 0, where G is the mean of D over the trajectory.

    Teacher and verifier must not contradict each other: a right trajectory the teacher likes less than the student
    does, and a wrong one it likes more, are dropped. Over the student's own samples D is -KL(student || teacher) in
    expectation, so G is usually negative and most right trajectories may go: look at what is kept by outcome.
    Source: RA-OPD, arXiv 2608.27960; that G is the mean and not the sum is inferred from "length-normalised return"
    (the sign, and so the rule, is the same).
    """

    name: ClassVar[str] = "ra-opd"
    paper: ClassVar[str] = "2608.27960"
    belief: ClassVar[str] = "a teacher that contradicts the verifier about a whole trajectory is wrong about its tokens"

    def parts(self) -> Parts:
        verdict = 2.0 * pl.col("reward").cast(pl.Float64) - 1.0
        return Parts(keep=verdict * mean_advantage() >= 0, reason="teacher and verifier disagree on the trajectory")


@dataclass(frozen=True)
class Gate(Rule):
    """keep: (A > 0 and L_T > L_S + delta) or (A <= 0 and L_T < L_S - delta).

    L_T and L_S are the sums of t and s over the trajectory, A its outcome advantage: R minus the mean reward of the
    samples of its prompt (`outcome_advantage` group), or R - 1/2 (reward). In a prompt with equal rewards A = 0 under
    `group`, so even its right trajectories stay only where the teacher finds them less likely.
    Source: RG-OPD, arXiv 2607.04037, Eq. 2. The paper's loss adds a top-50 reverse KL with a tail; here the advantage
    is D.
    """

    name: ClassVar[str] = "rg-opd"
    paper: ClassVar[str] = "2607.04037"
    belief: ClassVar[str] = "the teacher may push a trajectory only in the direction in which the reward pushes it"

    delta: float = 0.0
    outcome_advantage: Literal["reward", "group"] = "group"

    def __post_init__(self) -> None:
        require(self, math.isfinite(self.delta), f"delta must be finite, not {self.delta}")

    def statistics(self) -> tuple[Statistic, ...]:
        if self.outcome_advantage == "reward":
            return ()
        reward = pl.col("reward").cast(pl.Float64)
        return (Statistic("mean_reward", reward, "mean", scope="group", of="trajectories"),)

    def parts(self) -> Parts:
        baseline = pl.lit(0.5) if self.outcome_advantage == "reward" else pl.col("mean_reward")
        better = pl.col("reward").cast(pl.Float64) > baseline
        gain = pl.col("teacher_logprob_sum") - pl.col("student_logprob_sum")
        keep = (better & (gain > self.delta)) | (~better & (gain < -self.delta))
        return Parts(keep=keep, reason="the teacher pushes against the outcome of the trajectory")


@dataclass(frozen=True)
class Balance(Rule):
    """keep: as many right as wrong trajectories, min(#right, #wrong) of each, drawn at random from the larger class.

    The draw depends on `seed` and the trajectory id alone. A population without right or without wrong trajectories
    is left alone. Source: the online balancing of Uni-OPD, arXiv 2605.03677; its margin shift is the rule `uni-opd`.
    The released code balances within the prompt or over the batch (`scope` group or step).
    """

    name: ClassVar[str] = "uni-opd-balance"
    paper: ClassVar[str] = "2605.03677"
    belief: ClassVar[str] = "neither outcome should outnumber the other in what the student learns from"

    scope: Literal["group", "step", "round"] = "group"
    seed: int = 0

    def statistics(self) -> tuple[Statistic, ...]:
        one, fewer = pl.lit(1), pl.min_horizontal("right_count", "wrong_count")
        return (
            Statistic("right_count", one, "count", scope=self.scope, of="trajectories", where=right()),
            Statistic("wrong_count", one, "count", scope=self.scope, of="trajectories", where=~right()),
            Statistic("fewer_count", fewer, "max", scope=self.scope, of="trajectories"),
            *self._drawn("drawn_right", right())[0],
            *self._drawn("drawn_wrong", ~right())[0],
        )

    def parts(self) -> Parts:
        drawn = self._drawn("drawn_right", right())[1] | self._drawn("drawn_wrong", ~right())[1]
        return Parts(keep=(pl.col("fewer_count") == 0) | drawn, reason="random removal from the larger class")

    def _drawn(self, name: str, where: pl.Expr) -> tuple[tuple[Statistic, ...], pl.Expr]:
        return top(name, chance(self.seed), "fewer_count", self.scope, of="trajectories", where=where)


@dataclass(frozen=True)
class TeacherGate(Rule):
    """keep: the teacher's own pass rate on the prompt >= `least`.

    Source: TGOPD, arXiv 2609.02998, gate 1[q_T >= 2/3] with q_T the share of three teacher answers that are right.
    The paper trains the other prompts with GRPO or masks them; here they are masked, which by its account is about
    nine tenths of the gain.
    """

    name: ClassVar[str] = "tgopd"
    paper: ClassVar[str] = "2609.02998"
    belief: ClassVar[str] = "a teacher that cannot solve the prompt cannot correct answers to it"

    least: float = 2 / 3

    def __post_init__(self) -> None:
        require(self, 0 <= self.least <= 1, f"least must lie between 0 and 1, not {self.least}")

    def parts(self) -> Parts:
        solved = pl.col("teacher_pass_rate").cast(pl.Float64) >= self.least - _SLACK
        return Parts(keep=solved, reason=f"the teacher solves the prompt in less than {self.least:.3g} of its tries")


@dataclass(frozen=True)
class LengthGuard(Rule):
    """keep: length <= the `percentile` quantile of the lengths in `scope`, and length <= `longest` where given.

    Lengths are in tokens. With percentile 100 only `longest` counts. Not published as a rule: a guard against length
    inflation (arXiv 2604.08527, 2607.13399).
    """

    name: ClassVar[str] = "length-guard"
    paper: ClassVar[str] = ""
    belief: ClassVar[str] = "the longest answers are mostly rambling, and outvote the others token by token"

    percentile: float = 95.0
    longest: int | None = None
    scope: Scope = "step"

    def __post_init__(self) -> None:
        require_percentile(self)
        require(self, self.longest is None or self.longest >= 1, f"longest must be at least 1, not {self.longest}")

    def statistics(self) -> tuple[Statistic, ...]:
        if self.percentile == 100:
            return ()
        length, at = pl.col("length").cast(pl.Float64), self.percentile / 100
        return (Statistic("length_limit", length, "quantile", scope=self.scope, of="trajectories", at=at),)

    def parts(self) -> Parts:
        limits = [] if self.percentile == 100 else [pl.col("length_limit")]
        limits += [] if self.longest is None else [pl.lit(self.longest)]
        keep = pl.all_horizontal(pl.col("length") <= limit for limit in limits) if limits else None
        return Parts(keep=keep, reason="longer than the guard allows")


@dataclass(frozen=True)
class RepetitionGuard(Rule):
    """keep: 1 - distinct / all <= `most`, counted over the n-grams of the response's token ids.

    A response of N >= n tokens has N - n + 1 n-grams; a shorter one has ratio 0. Not published as a rule: the usual
    measure of degenerate repetition (rep-n, arXiv 1908.04319).
    """

    name: ClassVar[str] = "repetition-guard"
    paper: ClassVar[str] = ""
    belief: ClassVar[str] = "a looping answer is likely under any model, so the teacher's approval of it means nothing"

    n: int = 4
    most: float = 0.5

    def __post_init__(self) -> None:
        require(self, self.n >= 1, f"n must be at least 1, not {self.n}")
        require(self, 0 <= self.most <= 1, f"most must lie between 0 and 1, not {self.most}")

    def statistics(self) -> tuple[Statistic, ...]:
        ngram = pl.struct(pl.col("response_ids").shift(-k).alias(f"token_{k}") for k in range(self.n)).hash(seed=0)
        complete = pl.col("position") + self.n <= pl.col("length")
        return (Statistic("distinct_ngrams", ngram, "n_unique", scope="trajectory", where=complete),)

    def parts(self) -> Parts:
        ngrams = pl.col("length") - self.n + 1
        repeated = (ngrams - pl.col("distinct_ngrams")) / ngrams
        keep = (ngrams < 1) | (repeated <= self.most)
        return Parts(keep=keep, reason=f"more than {self.most:g} of its {self.n}-grams are repetitions")


@dataclass(frozen=True)
class PromptScore(Rule):
    """keep: prompt score >= its `percentile` quantile over the prompts of `scope`; all samples of a prompt go together.

    The score of a prompt is the best or the median (`of`) of its samples' mean t. If all samples of a prompt are
    unlikely the teacher does not know it; if some are, those samples went astray, and their corrections are kept.
    A repair of FiRe's filter, which scores each sample alone; not published.
    """

    name: ClassVar[str] = "prompt-gate"
    paper: ClassVar[str] = ""
    belief: ClassVar[str] = "if all samples score low the teacher is ignorant, if some do they derailed"

    of: Literal["best", "median"] = "best"
    percentile: float = 20.0
    scope: Literal["step", "round"] = "step"

    def __post_init__(self) -> None:
        require_percentile(self)

    def statistics(self) -> tuple[Statistic, ...]:
        score, at = mean_of("teacher_logprob"), self.percentile / 100
        once = pl.int_range(pl.len()).over(GROUP) == 0
        best = Statistic("prompt_score", score, "max", scope="group", of="trajectories")
        median = Statistic("prompt_score", score, "quantile", scope="group", of="trajectories", at=0.5)
        limit = pl.col("prompt_score")
        return (
            best if self.of == "best" else median,
            Statistic("prompt_limit", limit, "quantile", scope=self.scope, of="trajectories", at=at, where=once),
        )

    def parts(self) -> Parts:
        reason = f"{self.of} mean teacher_logprob of the prompt below the {self.percentile:g} % quantile of prompts"
        return Parts(keep=pl.col("prompt_score") >= pl.col("prompt_limit"), reason=reason)


ENTRIES: dict[str, RuleEntry] = {
    "verified-only": RuleEntry(Verified, {"outcome": "right"}, "right trajectories only"),
    "failure-only": RuleEntry(Verified, {"outcome": "wrong"}, "wrong trajectories only"),
    "ra-opd": RuleEntry(Agreement, {}, "drops where teacher and verifier disagree on the trajectory"),
    "rg-opd": RuleEntry(Gate, {}, "drops where the teacher pushes against the outcome advantage"),
    "uni-opd-balance": RuleEntry(Balance, {}, "as many right as wrong trajectories"),
    "tgopd": RuleEntry(TeacherGate, {}, "drops prompts the teacher fails"),
    "length-guard": RuleEntry(LengthGuard, {}, "drops the longest trajectories"),
    "repetition-guard": RuleEntry(RepetitionGuard, {}, "drops trajectories that repeat their n-grams"),
    "prompt-gate": RuleEntry(PromptScore, {}, "FiRe's filter on prompts instead of trajectories"),
}
