"""Rules that train on some of the tokens: the most informative, the first, the most extreme, or random ones.

t and s are the teacher's and the student's log-probability of the sampled token in nats, q = exp t and p = exp s,
D = t - s, N a number of tokens. A masked token is not in the denominator. Among equal scores the earlier position
wins, then the smaller trajectory id.
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
    noise,
    plain_advantage,
    require,
    require_fraction,
    top,
)
from fire_data.schemas.config import Scope

Choice = tuple[tuple[Statistic, ...], pl.Expr]


@dataclass(frozen=True)
class Tip(Rule):
    """token_keep: the ceil(`keep_fraction` N) tokens of `scope` with the largest h + d - h d.

    h and d are the student's entropy and reverse_kl = KL(student || teacher) of the position, scaled to [0, 1] by
    their minimum and maximum over the scope (0 where these are equal): uncertain or mistaken tokens, by a soft OR.
    Source: TIP, arXiv 2604.14084; the selector itself was not released, the paper is the authority.
    """

    name: ClassVar[str] = "tip"
    paper: ClassVar[str] = "2604.14084"
    belief: ClassVar[str] = "a token teaches if the student is unsure of it, or is sure and the teacher disagrees"

    keep_fraction: float = 0.5
    scope: Scope = "step"

    def __post_init__(self) -> None:
        require_fraction(self)

    def statistics(self) -> tuple[Statistic, ...]:
        ends = [
            Statistic(f"{end}_{signal}", pl.col(signal), end, scope=self.scope)
            for signal in ("student_entropy", "reverse_kl")
            for end in ("min", "max")
        ]
        return (*ends, *self._chosen()[0])

    def parts(self) -> Parts:
        return Parts(token_keep=self._chosen()[1])

    def _chosen(self) -> Choice:
        h, d = _scaled("student_entropy"), _scaled("reverse_kl")
        return top("tip", 1.0 - (1.0 - h) * (1.0 - d), self.keep_fraction, self.scope)


@dataclass(frozen=True)
class Dial(Rule):
    """token_keep: the K = max(1, round(`keep_fraction` N)) eligible tokens of each response with the largest score.

    score = |D|^(1 - beta) |q - p|^beta, N the response's eligible tokens, round to even: beta 1 ranks by the change
    of probability, beta 0 by that of log-probability (`reward-top`, which picks tokens both models find improbable).
    The token that ended a response (finish_reason stop) is not eligible unless `last_token` is `eligible`.
    Source: DIAL-OPD, arXiv 2610.11659: L(p, q)^beta |D| with L the logarithmic mean; beta 1 (1.2), 40 % (20 %).
    """

    name: ClassVar[str] = "dial"
    paper: ClassVar[str] = "2610.11659"
    belief: ClassVar[str] = "a token teaches as much as its probability has to move, not its log-probability"

    beta: float = 1.0
    keep_fraction: float = 0.4
    last_token: Literal["never", "eligible"] = "never"

    def __post_init__(self) -> None:
        require(self, 0 <= self.beta <= 2, f"beta must lie between 0 and 2, not {self.beta}")
        require_fraction(self)

    def statistics(self) -> tuple[Statistic, ...]:
        return self._chosen()[0]

    def parts(self) -> Parts:
        return Parts(token_keep=self._chosen()[1])

    def _chosen(self) -> Choice:
        log_change = plain_advantage().abs()
        change = (pl.col("teacher_logprob").exp() - pl.col("student_logprob").exp()).abs()
        score = (log_change ** (1.0 - self.beta) * change**self.beta).fill_nan(0.0)  # beta > 1, D = 0: the limit
        is_end = (pl.col("finish_reason") == "stop") & (pl.col("position") + 1 == pl.col("length"))
        where = ~is_end if self.last_token == "never" else None
        return top("dial", score, self.keep_fraction, "trajectory", rounding="round", least=1, where=where)


@dataclass(frozen=True)
class Prefix(Rule):
    """token_keep: the first `tokens` tokens of a response, and of them those with i / N <= `fraction`, i from 1.

    What is null does not count. A response shorter than 1 / fraction tokens keeps none.
    Sources: ESR, arXiv 2605.27028, the first 100 tokens (50 to 200 do as well); POPD, arXiv 2605.31490, the first
    10 %; also arXiv 2602.15260. The opposite of pw-opsd.
    """

    name: ClassVar[str] = "esr"
    paper: ClassVar[str] = "2605.27028"
    belief: ClassVar[str] = "the beginning decides a response, and later the teacher judges a prefix it did not write"

    tokens: int | None = 100
    fraction: float | None = None

    def __post_init__(self) -> None:
        require(self, self.tokens is not None or self.fraction is not None, "give tokens or fraction, or both")
        require(self, self.tokens is None or self.tokens >= 1, f"tokens must be at least 1, not {self.tokens}")
        if self.fraction is not None:
            require_fraction(self, "fraction")

    def parts(self) -> Parts:
        inside = [] if self.tokens is None else [pl.col("position") < self.tokens]
        inside += [] if self.fraction is None else [(pl.col("position") + 1) / pl.col("length") <= self.fraction]
        return Parts(token_keep=pl.all_horizontal(inside))


@dataclass(frozen=True)
class Sparse(Rule):
    """token_keep: one token of each response, or the tails of the scope, as `select` says.

    rand1tok: a random token; mintok: the one with the highest D; maxtok: with the lowest D (the paper names them by
    the loss -D); minmaxtok: both; pctltail: the ceil(`tail` N) highest and as many lowest D of `scope`.
    Source: Sparse OPD, arXiv 2609.04565; tail 0.05 % at either end.
    """

    name: ClassVar[str] = "sparse-opd"
    paper: ClassVar[str] = "2609.04565"
    belief: ClassVar[str] = "the extreme tokens carry the signal; one or two of a response are enough"

    select: Literal["rand1tok", "mintok", "maxtok", "minmaxtok", "pctltail"] = "minmaxtok"
    tail: float = 0.0005
    scope: Scope = "step"
    seed: int = 0

    def __post_init__(self) -> None:
        require_fraction(self, "tail")

    def statistics(self) -> tuple[Statistic, ...]:
        return tuple(statistic for statistics, _ in self._choices() for statistic in statistics)

    def parts(self) -> Parts:
        return Parts(token_keep=pl.any_horizontal(chosen for _, chosen in self._choices()))

    def _choices(self) -> list[Choice]:
        highest, lowest = plain_advantage(), -plain_advantage()
        if self.select == "pctltail":
            tails = (("highest", highest), ("lowest", lowest))
            return [top(name, score, self.tail, self.scope) for name, score in tails]
        scores = {
            "rand1tok": {"random": noise(self.seed)},
            "mintok": {"highest": highest},
            "maxtok": {"lowest": lowest},
            "minmaxtok": {"highest": highest, "lowest": lowest},
        }[self.select]
        return [top(name, score, 0.0, "trajectory", least=1) for name, score in scores.items()]


@dataclass(frozen=True)
class Reopold(Rule):
    """advantage: max(D, floor); token_keep: D >= floor (phase 1), or student entropy >= its quantile (phase 2).

    floor = log(l) / (1 - l) (`floor` ratio) or log(l / (1 - l)) (logit) with l = `mixture`: -2.56 or -2.20 for 0.1;
    re-implementations differ and no official code was found. Phase 2 keeps the `entropy_fraction` of tokens with the
    largest student entropy: those at or above the 1 - entropy_fraction quantile over `scope`. Rounds from
    `switch_round` on are phase 2, all others `phase`; the paper switches after a third to a half of the training.
    Source: REOPOLD, arXiv 2603.11137; mixture 0.1 to 0.3, entropy_fraction 0.2 (0.5 in one fork).
    """

    name: ClassVar[str] = "reopold"
    paper: ClassVar[str] = "2603.11137"
    belief: ClassVar[str] = "hugely negative advantages are noise; once those are tamed, only forks in the road matter"

    mixture: float = 0.1
    floor: Literal["ratio", "logit"] = "ratio"
    phase: Literal[1, 2] = 1
    switch_round: int | None = None
    entropy_fraction: float = 0.2
    scope: Scope = "step"

    def __post_init__(self) -> None:
        require(self, 0 < self.mixture < 1, f"mixture must lie between 0 and 1, not {self.mixture}")
        require_fraction(self, "entropy_fraction")
        starts = self.switch_round is None or self.switch_round >= 0
        require(self, starts, f"switch_round must not be negative, it is {self.switch_round}")

    def statistics(self) -> tuple[Statistic, ...]:
        if self.phase == 1 and self.switch_round is None:
            return ()
        entropy, at = pl.col("student_entropy"), 1.0 - self.entropy_fraction
        return (Statistic("entropy_limit", entropy, "quantile", scope=self.scope, at=at),)

    def parts(self) -> Parts:
        share = self.mixture
        lowest = math.log(share) / (1 - share) if self.floor == "ratio" else math.log(share / (1 - share))
        above, uncertain = plain_advantage() >= lowest, pl.col("student_entropy") >= pl.col("entropy_limit")
        token_keep = above if self.phase == 1 else uncertain
        if self.phase == 1 and self.switch_round is not None:
            token_keep = pl.when(pl.col("round") >= self.switch_round).then(uncertain).otherwise(above)
        return Parts(advantage=plain_advantage().clip(lower_bound=lowest), token_keep=token_keep)


@dataclass(frozen=True)
class RandomTokens(Rule):
    """token_keep: ceil(`keep_fraction` N) random tokens of `scope`; the draw is a hash of seed, trajectory, position.

    A control: a mask that helps must beat as many random tokens. Masking alone can help (arXiv 2610.11659: random
    40 to 90 % of the tokens beat all of them for a 0.6B student).
    """

    name: ClassVar[str] = "random-tokens"
    paper: ClassVar[str] = ""
    belief: ClassVar[str] = "which tokens are trained on does not matter, only how many"

    keep_fraction: float = 0.5
    scope: Scope = "step"
    seed: int = 0

    def __post_init__(self) -> None:
        require_fraction(self)

    def statistics(self) -> tuple[Statistic, ...]:
        return self._chosen()[0]

    def parts(self) -> Parts:
        return Parts(token_keep=self._chosen()[1])

    def _chosen(self) -> Choice:
        return top("random_tokens", noise(self.seed), self.keep_fraction, self.scope)


def _scaled(signal: str) -> pl.Expr:
    """`signal` from 0 at its minimum to 1 at its maximum, 0 where these are equal."""
    low, high = pl.col(f"min_{signal}"), pl.col(f"max_{signal}")
    return pl.when(high > low).then((pl.col(signal) - low) / (high - low)).otherwise(0.0)


ENTRIES: dict[str, RuleEntry] = {
    "tip": RuleEntry(Tip, {}, "tokens where the student is unsure or disagrees with the teacher"),
    "dial": RuleEntry(Dial, {}, "tokens whose probability has to move most"),
    "reward-top": RuleEntry(Dial, {"beta": 0.0}, "tokens with the largest |advantage|: what dial argues against"),
    "esr": RuleEntry(Prefix, {}, "the first 100 tokens"),
    "popd": RuleEntry(Prefix, {"tokens": None, "fraction": 0.1}, "the first tenth of the response", paper="2605.31490"),
    "sparse-opd": RuleEntry(Sparse, {}, "one or two extreme tokens of each response"),
    "reopold": RuleEntry(Reopold, {}, "advantages bounded below; early the tokens above, late the uncertain ones"),
    "random-tokens": RuleEntry(RandomTokens, {}, "random tokens at a budget: the control for masks"),
}
