"""What a rule is: parameters, statistics over declared populations, and expressions per trajectory and per token.

A rule says what it wants as Polars expressions (`Parts`) and which numbers of a population they need (`Statistic`).
Everything around it is done once for all rules: reading shards, fitting, joining, folding, normalising, masks,
denominators and checks. Columns, scopes and staleness are read off the expressions, so they cannot be declared wrongly.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import numpy as np
import polars as pl

from fire_data.schemas.config import Denominator, Normalise, Scope
from fire_data.schemas.errors import ConfigError
from fire_data.schemas.tables import FLOAT_SIGNALS

Stats = dict[str, list[dict[str, Any]]]
Reduce = Literal["sum", "mean", "std", "min", "max", "count", "quantile", "n_unique", "largest"]

ROW, GROUP, STEP, KEY = "_row", "_group", "step", "_key"
RESERVED = frozenset({ROW, GROUP, STEP, KEY, "position", "length"})
_KEYS: dict[Scope, list[str]] = {"trajectory": [ROW], "group": [GROUP], "step": [STEP], "round": []}
_TEACHER_ONLY = frozenset({
    "teacher_logprob", "teacher_entropy", "teacher_max_logprob", "teacher_top1_id", "teacher_rank", "teacher_topk_ids",
    "teacher_topk_logprobs", "teacher_pass_rate", "reward", "answer", "teacher", "finish_reason", "response_ids",
    "trajectory_id", "prompt_id", "round", "sample",
})  # fmt: skip


_SECOND_STREAM = ("teacher_topk_ids", "teacher_topk_logprobs")  # what the trainer reads for it


@dataclass(frozen=True)
class Parts:
    """What a rule decides. None: nothing to say (keep all, weight 1, advantage log p_T - log p_S, no mask).

    `keep` and `weight_sum` are expressions over one row per trajectory, the others over one row per response token.
    """

    keep: pl.Expr | None = None
    reason: str = "dropped by the rule"
    weight: pl.Expr | None = None
    advantage: pl.Expr | None = None
    token_keep: pl.Expr | None = None
    fkl_weight: pl.Expr | None = None
    """Weight of the forward-KL term on the teacher's top-k, before the denominator."""
    weight_sum: pl.Expr | None = None
    """The sum of `weight` over a trajectory's tokens, if summary columns give it: normalising then reads no token."""

    def expressions(self) -> dict[str, pl.Expr]:
        """The parts that are there, by name."""
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "reason"}
        return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class Statistic:
    """One number per population of `scope`, called `name` in the expressions that use it.

    `value` is an expression over tokens or trajectories; only rows where `where` is true count. "std" is that of the
    population, "quantile" interpolates linearly at `at` in [0, 1], "largest" is made by `top`. An empty population has
    sum and count 0 and null otherwise. `by` partitions further by a column of the trajectories.
    """

    name: str
    value: pl.Expr
    reduce: Reduce
    scope: Scope = "step"
    of: Literal["tokens", "trajectories"] = "tokens"
    at: float | str | None = None
    where: pl.Expr | None = None
    by: str | None = None
    rounding: Literal["ceil", "round"] = "ceil"
    least: int = 0

    def __post_init__(self) -> None:
        known = {"reduce": get_args(Reduce), "scope": get_args(Scope), "of": ("tokens", "trajectories")}
        for name, choices in known.items():
            if getattr(self, name) not in choices:
                text = f"{name} of a statistic is one of {', '.join(choices)}, not {getattr(self, name)!r}"
                raise ConfigError(text, where=f"statistic {self.name}", fix="correct the rule's statistics()")
        if self.reduce == "quantile" and not (isinstance(self.at, int | float) and 0 <= self.at <= 1):
            text = f"a quantile needs `at` between 0 and 1, not {self.at!r}"
            raise ConfigError(text, where=f"statistic {self.name}", fix="Statistic(..., at=0.5)")

    @property
    def keys(self) -> list[str]:
        return scope_keys(self.scope, self.by)

    def expressions(self) -> list[pl.Expr]:
        return [self.value] if self.where is None else [self.value, self.where]


class Mean(NamedTuple):
    """What weights are divided by: their mean over all or over the kept tokens of a scope."""

    scope: Scope
    over: Literal["all", "kept"] = "all"
    by: str | None = None


@dataclass(frozen=True)
class Rule(ABC):
    """A filter, weighting, mask or advantage. Fields of a subclass are its parameters, validated before any use.

    The docstring of a subclass is the formula that `fire rules NAME` shows.
    """

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    belief: ClassVar[str] = ""
    fitted: ClassVar[tuple[str, ...]] = ()
    """What `fit` gives beside the statistics."""
    equations: ClassVar[dict[str, str]] = {}
    """Where in the paper a part, a term or the mean stands: {"keep": "Eq. 4"}. For people, as are `terms`."""
    denominator: Denominator = "tokens"

    @abstractmethod
    def parts(self) -> Parts:
        """What this rule decides, as expressions."""

    def statistics(self) -> tuple[Statistic, ...]:
        """The numbers its expressions need; one may use those before it."""
        return ()

    @functools.cached_property
    def said(self) -> Parts:
        """`parts()`, asked once."""
        return self.parts()

    @functools.cached_property
    def declared(self) -> tuple[Statistic, ...]:
        """`statistics()`, asked once."""
        return self.statistics()

    def derived(self) -> dict[str, pl.Expr]:
        """Token columns made from token columns, for what is costly and used more than once."""
        return {}

    def terms(self) -> dict[str, pl.Expr]:
        """What the weight is made of and the paper has a name for, per token: `fire explain` shows each."""
        return {}

    def factors(self) -> dict[str, pl.Expr]:
        """The factors whose product is the weight, by name; none if there is no weight."""
        weight = self.parts().weight
        return {} if weight is None else {"weight": weight}

    @property
    def mean(self) -> Mean | None:
        """What the weights are divided by; None: left as they are."""
        return None

    @property
    def reads(self) -> Literal["shard", "step", "round"]:
        """How many rows must be seen together. More than a shard only for aggregates that cannot be declared."""
        return "shard"

    @property
    def matched(self) -> Rule | None:
        """Another rule whose kept tokens this one is measured against: `fit` then finds `_target` and `_own`."""
        return None

    def fit(self, trajectories: pl.DataFrame) -> Stats:
        """For a rule that is `matched` to another: numbers that no `Statistic` gives, as rows with their keys."""
        return {}

    @property
    def components(self) -> tuple[Rule, ...]:
        """The rules this one is composed of: itself, unless it was written with `+`."""
        return (self,)

    @property
    def fkl_renormalises(self) -> bool:
        """If the teacher's top-k probabilities of the second stream are divided by their sum."""
        return bool(getattr(self, "fkl_renormalise", False))

    @property
    def columns(self) -> tuple[str, ...]:
        """The stored columns this instance reads."""
        used: dict[str, None] = {}
        for expression in self._expressions():
            for root in expression.meta.root_names():
                used.update(dict.fromkeys(sources(root)))
        own = {*self.fitted, *self.derived(), *(s.name for s in self.statistics())} | {
            f"{s.name}_{x}" for s in self.statistics() for x in TIES
        }
        by = [s.by for s in self.statistics() if s.by] + ([self.mean.by] if self.mean and self.mean.by else [])
        second = _SECOND_STREAM if self.parts().fkl_weight is not None else ()
        found = [c for c in (*used, *by, *second) if c not in own and c not in RESERVED]
        return tuple(dict.fromkeys(found))

    @property
    def changes(self) -> tuple[str, ...]:
        """What this instance changes, in the words of `fire rules`."""
        words = {"keep": "filter", "weight": "weight", "token_keep": "mask", "advantage": "advantage"}
        words["fkl_weight"] = "forward KL"
        return tuple(words[p] for p in self.parts().expressions() if p in words)

    @property
    def scopes(self) -> tuple[str, ...]:
        """The populations of its statistics, the narrowest first."""
        found: set[str] = {s.scope for s in self.statistics()} | ({self.mean.scope} if self.mean else set())
        found |= {self.reads} - {"shard"}
        roots = {r for e in self._expressions() for r in e.meta.root_names()}
        found |= {scope for scope, keys in (("trajectory", ROW), ("group", GROUP)) if keys in roots}
        return tuple(scope for scope in _KEYS if scope in found)

    @property
    def goes_stale(self) -> bool:
        """True if its decisions (other than the plain advantage) depend on the student, which training changes."""
        return any(c not in _TEACHER_ONLY for c in self._decided_by())

    @property
    def uses_groups(self) -> bool:
        """True if a statistic is taken over the samples of a prompt: a step must then hold whole groups."""
        return "group" in self.scopes

    def record(self) -> dict[str, Any]:
        """The rule for a manifest: JSON-ready, equal for equal results."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"name": self.name, **{k: str(v) if isinstance(v, pl.Expr) else v for k, v in values.items()}}

    def _expressions(self) -> list[pl.Expr]:
        parts = self.parts().expressions()
        plain = [] if "advantage" in parts else [plain_advantage()]
        return [*parts.values(), *plain, *self._behind()]

    def _behind(self) -> list[pl.Expr]:
        return [*self.derived().values(), *(e for s in self.statistics() for e in s.expressions())]

    def _decided_by(self) -> set[str]:
        parts = [*self.parts().expressions().values(), *self._behind()]
        used = {c for e in parts for r in e.meta.root_names() for c in sources(r)}
        return used & {*self.columns, *FLOAT_SIGNALS}


@dataclass(frozen=True)
class WeightRule(Rule):
    """A rule whose weights may be divided by their mean over a population."""

    normalise: Normalise = "none"
    normalise_over: Literal["all", "kept"] = "all"

    @property
    def mean(self) -> Mean | None:
        return None if self.normalise == "none" else Mean(self.normalise, self.normalise_over)


class RuleEntry(NamedTuple):
    """A name users can give: a class, the parameters this name presets, and what it does in a few words."""

    cls: type[Rule]
    preset: dict[str, Any]
    what: str
    paper: str | None = None
    """Of the preset, where it is another than the class's."""


TIES = ("position", "id")  # how ties at the edge of `top` are broken


def require(rule: Rule, holds: bool, otherwise: str, fix: str | None = None) -> None:
    """Raise ConfigError saying `otherwise` of a rule unless a condition on its parameters holds."""
    if not holds:
        raise ConfigError(otherwise, where=f"rule {rule.name}", fix=fix or f"fire rules {rule.name}")


def require_percentile(rule: Rule, name: str = "percentile") -> None:
    """Raise ConfigError unless a parameter lies between 0 and 100."""
    value = getattr(rule, name)
    require(rule, 0 <= value <= 100, f"{name} must lie between 0 and 100, not {value}")


def require_fraction(rule: Rule, name: str = "keep_fraction") -> None:
    """Raise ConfigError unless a parameter lies above 0 and at most at 1."""
    value = getattr(rule, name)
    require(rule, 0 < value <= 1, f"{name} must lie above 0 and at most at 1, not {value}")


def scope_keys(scope: Scope, by: str | None = None) -> list[str]:
    """The columns whose equal values form one population of `scope`."""
    return [*_KEYS[scope], *([by] if by else [])]


def sources(column: str) -> tuple[str, ...]:
    """The stored columns behind a column of the frames: summaries come from token columns."""
    if column == "entropy_product_sum":
        return ("teacher_entropy", "student_entropy")
    if column == KEY:
        return ("trajectory_id",)
    base = column.removesuffix("_sum").removesuffix("_max")
    return (base,) if base in FLOAT_SIGNALS and column not in FLOAT_SIGNALS else (column,)


def plain_advantage() -> pl.Expr:
    """The per-token OPD advantage log p_T - log p_S: the sampled reverse KL with its sign flipped."""
    return pl.col("teacher_logprob") - pl.col("student_logprob")


def mean_of(signal: str) -> pl.Expr:
    """A trajectory's mean of a float signal over its tokens."""
    return pl.col(f"{signal}_sum") / pl.col("length")


def mean_advantage() -> pl.Expr:
    """A trajectory's mean of the plain advantage."""
    return mean_of("teacher_logprob") - mean_of("student_logprob")


def right() -> pl.Expr:
    """True for trajectories that the verifier accepted."""
    return pl.col("reward") > 0.5


def chance(seed: int) -> pl.Expr:
    """Uniform in [0, 1) per trajectory: a function of `seed` and trajectory_id alone."""
    return pl.col(KEY).map_batches(
        lambda keys: _uniform(keys.to_numpy(), seed), return_dtype=pl.Float64, is_elementwise=True
    )


def noise(seed: int) -> pl.Expr:
    """Uniform in [0, 1) per token: a function of `seed`, trajectory_id and position alone."""

    def draw(columns: pl.Series) -> pl.Series:
        keys, positions = (columns.struct.field(c).to_numpy().astype(np.uint64) for c in (KEY, "position"))
        return _uniform(keys ^ _mixed(positions + np.uint64(1)), seed)

    return pl.struct(KEY, "position").map_batches(draw, return_dtype=pl.Float64, is_elementwise=True)


def trajectory_keys(names: list[str]) -> pl.Series:
    """63 bits of a hash per trajectory_id: what `chance` and `noise` are made from."""
    digests = [hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest() for name in names]
    return pl.Series(KEY, [int.from_bytes(d, "little") >> 1 for d in digests], dtype=pl.Int64)


def _uniform(keys: np.ndarray[Any, Any], seed: int) -> pl.Series:
    start = np.array([seed % 2**64], np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    mixed = _mixed(keys.astype(np.uint64) ^ _mixed(start))
    return pl.Series((mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def _mixed(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray[Any, Any] = x ^ (x >> np.uint64(31))
    return mixed


def top(
    name: str,
    score: pl.Expr,
    fraction: float | str,
    scope: Scope,
    *,
    rounding: Literal["ceil", "round"] = "ceil",
    least: int = 0,
    where: pl.Expr | None = None,
    of: Literal["tokens", "trajectories"] = "tokens",
) -> tuple[tuple[Statistic, ...], pl.Expr]:
    """The statistics to declare, and the expression that is true for the largest `score` of each population.

    Taken are `fraction` of the N rows where `where` holds (rounded up, or half to even), at least `least`, at most N;
    a text is the name of an earlier statistic that holds their number. Ties go to the earlier position, then to the
    smaller trajectory_id, so that neither shards nor the order of rows matter.
    """
    if scope == "trajectory" and of == "tokens" and not isinstance(fraction, str):
        eligible = pl.len().over(ROW) if where is None else where.cast(pl.Float64).sum().over(ROW)
        number = (fraction * eligible).cast(pl.Float64)
        number = (number - _ROUNDING_SLACK).ceil() if rounding == "ceil" else number.round(mode="half_to_even")
        scored = score if where is None else pl.when(where).then(score)
        rank = scored.rank("ordinal", descending=True).over(ROW)
        return (), (rank <= number.clip(lower_bound=least)).fill_null(False)
    made = Statistic(name, score, "largest", scope, of, fraction, where, None, rounding, least)
    position, identity = (pl.col(f"{name}_{x}") for x in TIES)
    here = pl.col("position") if of == "tokens" else pl.lit(0, dtype=pl.Int64)
    first = (here < position) | ((here == position) & (pl.col("trajectory_id") <= identity))
    chosen = (score > pl.col(name)) | ((score == pl.col(name)) & first)
    return (made,), (chosen if where is None else chosen & where).fill_null(False)


_ROUNDING_SLACK = 1e-9  # 0.07 * 100 is 7.000000000000001: its ceiling is 7


def number_of(statistic: Statistic, population: int, given: float | None) -> int:
    """How many rows `top` takes of a population."""
    if given is not None:
        wanted = int(given)
    else:
        exact = float(statistic.at or 0.0) * population
        wanted = int(np.ceil(exact - _ROUNDING_SLACK)) if statistic.rounding == "ceil" else int(np.rint(exact))
    return min(max(wanted, statistic.least), population)
