"""A rule written as expressions: `keep` per trajectory, `weight`, `advantage` and `token_keep` per token.

On the command line and in `fire.yaml` an expression is Polars SQL (`pl.sql_expr`), so that text from a file can
compute but never execute code; from Python it may be any `pl.Expr`. Aggregates are taken over `scope`.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import polars as pl
from polars.exceptions import PolarsError

from fire_data.rules.base import (
    ROW,
    Rule,
    Stats,
    attach,
    floats,
    from_stats,
    grouped_sums,
    ones,
    plain_advantage,
    scope_keys,
)
from fire_data.schemas.config import Normalise, Scope
from fire_data.schemas.errors import ConfigError
from fire_data.schemas.tables import FLOAT_SIGNALS

PARTS = ("keep", "weight", "advantage", "token_keep")


@dataclass(frozen=True)
class Expression(Rule):
    """`keep` per trajectory, `weight`, `advantage`, `token_keep` per token; absent: keep, 1, log p_T - log p_S, all.

    Text is Polars SQL (`CASE WHEN`, `ABS`, `LEAST`, `AVG` ...), from Python also any `pl.Expr`. `keep` sees one row per
    trajectory: `length`, `finish_reason`, `reward`, and `<signal>_sum` and `<signal>_max` of every float signal, as in
    `teacher_logprob_sum / length > -2`. The others see one row per token: the signals as numbers, trajectory columns
    repeated. Aggregates are over `scope`; `normalise` divides weights by their mean. All columns:
    `fire inspect RUN --schema`.
    """

    name: ClassVar[str] = "expression"
    paper: ClassVar[str] = ""
    belief: ClassVar[str] = "whatever you write"
    needs: ClassVar[tuple[str, ...]] = ("student_logprob", "teacher_logprob")

    keep: Any = None
    weight: Any = None
    advantage: Any = None
    token_keep: Any = None
    scope: Scope = "trajectory"
    normalise: Normalise = "none"

    def __post_init__(self) -> None:
        for part in PARTS:
            self._expression(part)

    @property
    def columns(self) -> tuple[str, ...]:
        used = (e.meta.root_names() for part in PARTS if (e := self._expression(part)) is not None)
        signals = [name for names in used for name in names if name in FLOAT_SIGNALS]
        return tuple(dict.fromkeys((*self.needs, *signals)))

    @property
    def reads(self) -> Literal["shard", "step", "round"]:
        return self.scope if self.scope == "step" or self.scope == "round" else "shard"

    @property
    def uses_groups(self) -> bool:
        return self.scope == "group"

    def fit(self, lf: pl.LazyFrame) -> Stats:
        if self.weight is None or self.normalise == "none":
            return {}
        keys = scope_keys(self.normalise)
        weights = self._tokens(lf, ("weight",))
        sums = pl.col("weight").cast(pl.List(pl.Float64)).list.sum().alias("weight_sum")
        frame = weights.select(*dict.fromkeys([ROW, *keys]), sums, tokens=pl.col("length").cast(pl.Float64)).collect()
        means = grouped_sums(frame, keys, ["weight_sum", "tokens"])
        mean = pl.when(pl.col("tokens") > 0).then(pl.col("weight_sum") / pl.col("tokens")).otherwise(1.0)
        return {"mean": means.select(*keys, mean_weight=mean, tokens="tokens").to_dicts()}

    def apply(self, lf: pl.LazyFrame, stats: Stats) -> pl.LazyFrame:
        lf = lf.with_columns(weight=ones(), advantage=plain_advantage(), **self._keep(lf))
        lf = self._tokens(lf, ("weight", "advantage", "token_keep"))
        if self.weight is not None and self.normalise != "none":
            keys = scope_keys(self.normalise)
            means = from_stats(stats["mean"], lf.collect_schema()).select(*keys, "mean_weight")
            lf = (
                attach(lf, means, keys)
                .with_columns(weight=floats("weight") / pl.col("mean_weight"))
                .drop("mean_weight")
            )
        reason = pl.lit(f"keep: {self.keep}")
        return lf.with_columns(drop_reason=pl.when("keep").then(None).otherwise(reason))

    def _keep(self, lf: pl.LazyFrame) -> dict[str, pl.Expr]:
        expression = self._expression("keep")
        if expression is None:
            return {"keep": pl.lit(True)}
        self._check("keep", expression, lf)
        keys = scope_keys(self.scope)
        scoped = expression.over(keys) if keys else expression
        return {"keep": scoped.cast(pl.Boolean).fill_null(False)}

    def _tokens(self, lf: pl.LazyFrame, parts: tuple[str, ...]) -> pl.LazyFrame:
        """Evaluate token expressions on the exploded table and fold the results back to one list per trajectory."""
        wanted = {p: e for p in parts if (e := self._expression(p)) is not None}
        if not wanted:
            return lf
        schema = lf.collect_schema()
        used = set()
        for part, expression in wanted.items():
            self._check(part, expression, lf)
            used |= set(expression.meta.root_names())
        lists = [c for c in sorted(used) if isinstance(schema[c], pl.List)] or ["teacher_logprob"]
        keys = scope_keys(self.scope)
        plain = sorted((used | {ROW, *keys}) - set(lists))
        scoped = {p: (e.over(keys) if keys else e) for p, e in wanted.items()}
        types = {p: pl.Boolean if p == "token_keep" else pl.Float64 for p in wanted}
        folded = (
            lf.filter(pl.col("length") > 0)
            .select(*plain, *lists)
            .explode(lists)
            .select(ROW, **{p: e.cast(types[p]) for p, e in scoped.items()})
            .group_by(ROW, maintain_order=True)
            .agg(list(wanted))
        )
        empty = [pl.col(p).fill_null(pl.lit([], dtype=pl.List(types[p]))) for p in wanted]
        rest = lf.drop([p for p in wanted if p in schema])
        return rest.join(folded, on=ROW, how="left", maintain_order="left").with_columns(empty)

    def _expression(self, part: str) -> pl.Expr | None:
        value = getattr(self, part)
        if value is None or isinstance(value, pl.Expr):
            return value
        try:
            return pl.sql_expr(str(value))
        except (PolarsError, TypeError, ValueError) as error:
            text = f"{part} is not a valid expression: {error}"
            raise ConfigError(text, where=f"rule expression, {value!r}", fix="see: fire rules expression") from None

    def _check(self, part: str, expression: pl.Expr, lf: pl.LazyFrame) -> None:
        """Raise ConfigError if an expression names an unknown column or cannot be computed on these types."""
        where = f"rule expression, {part} = {getattr(self, part)}"
        schema = lf.collect_schema()
        for name in expression.meta.root_names():
            if name not in schema:
                near = difflib.get_close_matches(name, schema.names(), n=1)
                hint = f", did you mean {near[0]!r}?" if near else ""
                text = f"{part} uses the unknown column {name!r}{hint}"
                raise ConfigError(text, where=where, fix="fire inspect RUN --schema")
        per_token = part != "keep"
        types = {n: t.inner if per_token and isinstance(t, pl.List) else t for n, t in schema.items()}
        try:
            made = pl.DataFrame(schema=types).select(expression).dtypes[0]  # type: ignore[arg-type]
            if not (made.is_numeric() or made in (pl.Boolean, pl.Null)):
                raise PolarsError(f"it gives {made}, not numbers")
        except PolarsError as error:
            unit = "token, signals are numbers" if per_token else "trajectory, signals are lists: use _sum or _max"
            text = f"{part} cannot be computed: {str(error).splitlines()[0]} ({part} is evaluated once per {unit})"
            raise ConfigError(text, where=where, fix="fire rules expression") from None
