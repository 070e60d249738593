"""Rules with a second stream: a forward-KL term on the teacher's top-k list, beside the sampled-token advantage.

`fkl_weight` says per token how much of that term it gets; the trainer computes it from the stored list, sum over the
list of q (log q - log p_now), and reads from the rule if the list's probabilities are divided by their sum first
(`fkl_renormalise`). Symbols: s, t = logprob of the sampled token under student and teacher, p = exp(s), q = exp(t),
D = t - s. Logprobs and entropies are in nats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import polars as pl

from fire_data.rules.base import Parts, Rule, RuleEntry, noise, plain_advantage, require


@dataclass(frozen=True)
class Eopd(Rule):
    """forward-KL weight: `coefficient` where teacher_entropy > `threshold`, else 0; D on all tokens as ever.

    Source: EOPD, arXiv 2603.07079: threshold 0.8 nats, coefficient 1, k = 16. Accounts differ on the list's
    probabilities: divided by their sum (a re-implementation's Eq. 7 to 10; `fkl_renormalise` true, the default) or
    taken as they are (a reading of the official code; false). Forks that mask tokens above the threshold instead are
    not this rule.
    """

    name: ClassVar[str] = "eopd"
    paper: ClassVar[str] = "2603.07079"
    belief: ClassVar[str] = "where the teacher sees several good ways on, the student should learn all of them"

    threshold: float = 0.8
    coefficient: float = 1.0
    fkl_renormalise: bool = True

    def __post_init__(self) -> None:
        for parameter, value in (("threshold", self.threshold), ("coefficient", self.coefficient)):
            require(self, 0 <= value < math.inf, f"{parameter} must be a positive number or 0, not {value}")

    def parts(self) -> Parts:
        uncertain = pl.col("teacher_entropy") > self.threshold
        return Parts(fkl_weight=self.coefficient * uncertain.cast(pl.Float64))


@dataclass(frozen=True)
class Aopd(Rule):
    """forward-KL weight: G = 1 where q - p <= `threshold`, else 0; the sampled-token advantage D keeps weight 1 - G.

    A token gets one of the two streams: forward KL where the teacher likes it no better than the student does, the
    policy gradient elsewhere. threshold 0 is the paper's, -1 gives plain distillation almost everywhere, 1 forward KL
    everywhere. Source: AOPD, arXiv 2605.06387.
    """

    name: ClassVar[str] = "aopd"
    paper: ClassVar[str] = "2605.06387"
    belief: ClassVar[str] = "blaming a token does not say what would be better: show the teacher's alternatives there"

    threshold: float = 0.0
    fkl_renormalise: bool = False

    def __post_init__(self) -> None:
        require(self, -1 <= self.threshold <= 1, f"threshold must lie between -1 and 1, not {self.threshold}")

    def parts(self) -> Parts:
        gain = pl.col("teacher_logprob").exp() - pl.col("student_logprob").exp()
        gate = (gain <= self.threshold).cast(pl.Float64)
        return Parts(weight=1.0 - gate, fkl_weight=gate)


@dataclass(frozen=True)
class Tropd(Rule):
    """weight: M, forward-KL weight: 1 - M, where M = 1 with probability min(q / p, 1) = exp(min(D, 0)), else 0.

    M is drawn per token from `seed`, trajectory_id and position alone. Tokens that the teacher likes at least as well
    are always trusted, the others the less the further it disagrees. outliers "mask": tokens with M = 0 are left out
    and there is no second stream. Source: TrOPD, arXiv 2606.01249, list of k = 64; its small forward-KL term on teacher
    prefixes and its clipping variant are not part of this rule.
    """

    name: ClassVar[str] = "tropd"
    paper: ClassVar[str] = "2606.01249"
    belief: ClassVar[str] = "a reward far outside the region both models share is an outlier to be taught otherwise"

    outliers: Literal["forward_kl", "mask"] = "forward_kl"
    fkl_renormalise: bool = False
    seed: int = 0

    def parts(self) -> Parts:
        trusted = noise(self.seed) < plain_advantage().clip(upper_bound=0.0).exp()
        if self.outliers == "mask":
            return Parts(token_keep=trusted)
        return Parts(weight=trusted.cast(pl.Float64), fkl_weight=(~trusted).cast(pl.Float64))


ENTRIES: dict[str, RuleEntry] = {
    "eopd": RuleEntry(Eopd, {}, "forward KL added where the teacher is uncertain"),
    "aopd": RuleEntry(Aopd, {}, "forward KL instead of blame"),
    "tropd": RuleEntry(Tropd, {}, "forward KL on tokens the teacher rejects, by chance"),
}
