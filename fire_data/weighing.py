"""From scores to one coefficient per token: run a rule, apply the policies, divide by the step's denominator.

The trainer executes these coefficients as a plain sum, so how rows are later split into micro-batches, packed, padded
or spread over GPUs cannot change the loss. Coefficients are computed in double precision and stored as float32.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl

from fire_data.rules import Expression, Rule, Stats, Uniform, make_rule
from fire_data.rules.base import GROUP, ROW, STEP, attach, floats, from_stats, grouped, grouped_sums
from fire_data.schemas.config import Denominator
from fire_data.schemas.errors import ConfigError, DataError
from fire_data.schemas.tables import FLOAT_SIGNALS, SUMMARIES, WEIGHTS

_OUTPUT = {c.name for c in WEIGHTS} - {"trajectory_id"}
_SUMMARIES = {c.name for c in SUMMARIES}


@dataclass(frozen=True)
class Weighing:
    """A rule with everything around it that enters the coefficient."""

    rule: Rule
    batch_size: int | None = None
    denominator: Denominator | None = None
    constant: float | None = None
    truncated: str = "keep"
    end_token: str = "keep"
    rollout_is_cap: float | None = None
    samples_per_group: int | None = None

    def __post_init__(self) -> None:
        if (self.denominator or self.rule.denominator) == "constant" and self.constant is None:
            raise ConfigError("denominator constant needs a value", fix="--set weigh.constant=1000")
        n = self.samples_per_group
        if self.rule.uses_groups and n and self.batch_size and self.batch_size % n:
            text = f"train.batch_size {self.batch_size} splits the {n} samples of a prompt, which this rule compares"
            raise ConfigError(text, fix=f"--set train.batch_size={max(n, self.batch_size // n * n)}")

    @property
    def divisor(self) -> Denominator:
        """The denominator in force: the one given, else the rule's own."""
        return self.denominator or self.rule.denominator


@dataclass(frozen=True)
class Fitted:
    """What `fit` learned from a round: the rule's statistics and each step's denominator, both JSON-ready."""

    stats: Stats
    steps: list[dict[str, Any]]


def weigh(
    frame: pl.DataFrame | pl.LazyFrame,
    rule: str | Mapping[str, Any] | Rule = "fire",
    *,
    batch_size: int | None = None,
    scope: str | None = None,
    denominator: Denominator | None = None,
    constant: float | None = None,
    truncated: str = "keep",
    end_token: str = "keep",
    rollout_is_cap: float | None = None,
    **params: Any,
) -> pl.LazyFrame:
    """The frame plus the columns of the weights table: step, keep, drop_reason, weight, advantage, coefficient.

    `frame` has one row per trajectory and the token columns the rule needs, as lists in nats. `batch_size` is the
    trajectories per optimizer step; None: the frame's own `step` column, else one step. None elsewhere means the
    rule's own. Further keywords are the rule's parameters (`percentile=20`). Raises ConfigError for an unknown rule,
    parameter or column, DataError for values that are not finite or lists of unequal length.
    """
    made = make_rule(rule, params, scope)
    weighing = Weighing(made, batch_size, denominator, constant, truncated, end_token, rollout_is_cap)
    given = frame.lazy().collect_schema().names()
    # Summaries are taken from the token columns as they are now, whatever sums the frame carries.
    stale = {name: f"_given_{name}" for name in given if name in _SUMMARIES and _source(name) in given}
    lf = prepare(frame.lazy().rename(stale), weighing)
    check_values(lf, weighing)
    lf = apply(lf, weighing, fit(lf, weighing))
    added = [c for c in lf.collect_schema().names() if c in _OUTPUT]
    lf = lf.select(*(pl.col(stale.get(c, c)).alias(c) for c in given if c not in added), *added)
    if isinstance(weighing.rule, Expression):
        _check_made(lf)
    return lf


def _source(summary: str) -> str:
    """The token column a summary column is computed from."""
    special = {"length": "teacher_logprob", "entropy_product_sum": "teacher_entropy"}
    return special.get(summary) or summary.rpartition("_")[0]


def _check_made(lf: pl.LazyFrame) -> None:
    """An expression can divide by zero or take the logarithm of less: what it makes must be finite."""
    for name in ("weight", "advantage", "coefficient"):
        finite = pl.col(name).list.eval(pl.element().is_finite().fill_null(False)).list.all()
        bad = lf.select(row=pl.int_range(pl.len()), fine=finite).filter(~pl.col("fine")).head(1).collect()
        if bad.height:
            text = f"the expression gives a {name} that is not finite"
            raise DataError(text, where=f"row {bad['row'][0]}", fix="fire rules expression")


def prepare(lf: pl.LazyFrame, weighing: Weighing, first_row: int = 0) -> pl.LazyFrame:
    """Add row number, step, group and missing summary columns; check that every needed column is there."""
    have = lf.collect_schema().names()
    for name in weighing.rule.columns:
        if name not in have:
            near = difflib.get_close_matches(name, have, n=1)
            hint = f"; the nearest is {near[0]!r}" if near else ""
            raise ConfigError(
                f"the rule needs the column {name!r}, which is not there{hint}", fix="fire score RUN adds it"
            )
    if weighing.rollout_is_cap is not None and "rollout_logprob" not in have:
        raise ConfigError("rollout_is_cap needs the column 'rollout_logprob'", fix="--set weigh.rollout_is_cap=null")
    clash = sorted((_OUTPUT - {STEP}) & set(have))
    lf = lf.drop(clash).with_row_index(ROW, offset=first_row)
    if weighing.batch_size is not None:
        lf = lf.with_columns(step=(pl.col(ROW) // weighing.batch_size).cast(pl.Int32))
    elif STEP not in have:
        lf = lf.with_columns(step=pl.lit(0, dtype=pl.Int32))
    lf = lf.with_columns(_group(have, weighing.samples_per_group).alias(GROUP))
    return _with_summaries(lf, have)


def _group(have: list[str], n: int | None) -> pl.Expr:
    if "prompt_id" not in have:
        return pl.col(ROW).cast(pl.String)
    if "sample" not in have or n is None:
        return pl.col("prompt_id").cast(pl.String)
    return pl.concat_str("prompt_id", pl.col("sample") // n, separator="/")


def _with_summaries(lf: pl.LazyFrame, have: list[str]) -> pl.LazyFrame:
    """Per-trajectory length, sums and maxima from the token columns, where the frame does not carry them."""
    if "length" not in have:
        first = next(name for name in FLOAT_SIGNALS if name in have)
        lf = lf.with_columns(length=pl.col(first).list.len().cast(pl.Int32))
    added = []
    for name in FLOAT_SIGNALS:
        if name in have:
            added += [floats(name).list.sum().alias(f"{name}_sum")] if f"{name}_sum" not in have else []
            added += [floats(name).list.max().alias(f"{name}_max")] if f"{name}_max" not in have else []
    entropies = {"teacher_entropy", "student_entropy"}
    if entropies <= set(have) and "entropy_product_sum" not in have:
        added.append((floats("teacher_entropy") * floats("student_entropy")).list.sum().alias("entropy_product_sum"))
    return lf.with_columns(added)


def check_values(lf: pl.LazyFrame, weighing: Weighing) -> None:
    """Raise DataError, naming row and column, if a needed token column is not finite or not as long as the others."""
    schema = lf.collect_schema()
    columns = [c for c in weighing.rule.columns if isinstance(schema[c], pl.List) and schema[c].inner.is_numeric()]  # type: ignore[attr-defined]
    for name in columns:
        finite = pl.col(name).list.eval(pl.element().is_finite().fill_null(False)).list.all()
        wrong = (~finite | pl.col(name).is_null() | (pl.col(name).list.len() != pl.col("length"))).fill_null(True)
        bad = lf.filter(wrong).select(ROW, "length", n=pl.col(name).list.len()).head(1).collect()
        if bad.height:
            row, length, n = bad.row(0)
            what = (
                f"has {n} elements where others have {length}"
                if n is not None and n != length
                else "holds a value that is not finite"
            )
            raise DataError(f"column {name!r} {what}", where=f"row {row}", fix="rescore: fire score RUN --redo")


def fit(lf: pl.LazyFrame, weighing: Weighing) -> Fitted:
    """Statistics and denominators of a whole round (`lf` from `prepare`), reading only the columns they depend on."""
    stats = weighing.rule.fit(_with_target(lf, weighing))
    kept = _decide(lf, weighing, stats)
    frame = kept.select(STEP, "length", "keep", "_kept").collect()
    totals = grouped(
        frame.with_columns(pl.col("length", "_kept").cast(pl.Int64)),
        [STEP],
        pl.len().alias("trajectories"),
        pl.col("length").sum().alias("tokens"),
        (pl.col("keep") & (pl.col("_kept") > 0)).sum().alias("kept_trajectories"),
        pl.col("_kept").sum().alias("kept_tokens"),
    )
    return Fitted(stats, totals.sort(STEP).to_dicts())


def _with_target(lf: pl.LazyFrame, weighing: Weighing) -> pl.LazyFrame:
    """For a rule that matches another: how many tokens count under that one, and if everything were kept."""
    other = weighing.rule.matched
    if other is None:
        return lf
    for name, rule in (("_target", other), ("_own", Uniform())):
        around = dataclasses.replace(weighing, rule=rule)
        counted = _decide(lf, around, rule.fit(_with_target(lf, around))).select(ROW, pl.col("_kept").alias(name))
        lf = lf.join(counted, on=ROW, how="left", maintain_order="left")
    return lf


def apply(lf: pl.LazyFrame, weighing: Weighing, fitted: Fitted) -> pl.LazyFrame:
    """Add the columns of the weights table to a prepared frame."""
    schema = lf.collect_schema()
    steps = from_stats(fitted.steps, schema).select(STEP, "tokens", "kept_tokens", "kept_trajectories")
    steps = steps.rename({c: f"_{c}" for c in steps.columns if c != STEP})
    lf = attach(_decide(lf, weighing, fitted.stats), steps, [STEP])
    factors = floats("weight") * floats("advantage")
    extra = {}
    if "token_keep" in lf.collect_schema().names():
        factors = factors * floats("token_keep")
    if weighing.rollout_is_cap is not None:
        log_ratio = floats("student_logprob") - floats("rollout_logprob")
        extra["rollout_is"] = log_ratio.list.eval(pl.element().exp().clip(upper_bound=weighing.rollout_is_cap))
        factors = factors * extra["rollout_is"]
    active = pl.col("keep") & (pl.col("_kept") > 0)
    scale = pl.when(active).then(1.0 / _denominator(weighing)).otherwise(0.0)
    # A dropped token gets +0.0, never -0.0 or a leftover of its weight.
    coefficient = pl.when(active).then(factors * scale).otherwise(floats("weight") * 0.0)
    lf = lf.with_columns(coefficient=coefficient, **extra)
    single = [pl.col(c).cast(pl.List(pl.Float32)) for c in ("weight", "advantage", "coefficient", *extra)]
    return lf.with_columns(single).drop("_kept", "_tokens", "_kept_tokens", "_kept_trajectories")


def _denominator(weighing: Weighing) -> pl.Expr:
    if weighing.divisor == "tokens":
        return pl.col("_kept_tokens").cast(pl.Float64)
    if weighing.divisor == "all_tokens":
        return pl.col("_tokens").cast(pl.Float64)
    if weighing.divisor == "sequences":
        return pl.col("_kept_trajectories").cast(pl.Float64) * pl.col("_kept").cast(pl.Float64)
    return pl.lit(float(weighing.constant or 0.0))


def _decide(lf: pl.LazyFrame, weighing: Weighing, stats: Stats) -> pl.LazyFrame:
    """The rule's own columns, the policies, and `_kept`: how many tokens of a trajectory count."""
    lf = weighing.rule.apply(lf, stats)
    names = lf.collect_schema().names()
    for policy, standard in (("truncated", weighing.truncated), ("end_token", weighing.end_token)):
        if standard != "keep" and "finish_reason" not in names:
            raise ConfigError(
                f"{policy}: {standard} needs the column 'finish_reason'", fix=f"--set weigh.{policy}=keep"
            )
    if weighing.truncated == "drop":
        cut = pl.col("finish_reason") == "length"
        reason = pl.when(pl.col("keep") & cut).then(pl.lit("truncated by max_new_tokens"))
        lf = lf.with_columns(drop_reason=reason.otherwise(pl.col("drop_reason")), keep=pl.col("keep") & ~cut)
    if weighing.end_token == "mask":
        ended = (pl.col("finish_reason") == "stop").cast(pl.UInt32)
        length = pl.col("length").cast(pl.UInt32)
        inner = pl.concat_list(pl.lit(True).repeat_by(length - ended), pl.lit(False).repeat_by(ended))
        masked = (floats("token_keep") * inner.cast(pl.List(pl.Float64))) if "token_keep" in names else inner
        lf = lf.with_columns(token_keep=masked.cast(pl.List(pl.Boolean)))
        names = [*names, "token_keep"]
    tokens = (
        pl.col("token_keep").list.sum().cast(pl.Int64) if "token_keep" in names else pl.col("length").cast(pl.Int64)
    )
    return lf.with_columns(_kept=pl.when("keep").then(tokens).otherwise(0))


def summarise(lf: pl.LazyFrame) -> dict[str, float]:
    """Sums over weighted rows that can be added shard by shard: what the rule did, in numbers.

    Needs length, keep, drop_reason, weight and coefficient. Weight statistics are over kept tokens.
    """
    weight = floats("weight")
    if "token_keep" in lf.collect_schema().names():
        weight = weight * floats("token_keep")
    frame = lf.select(
        "keep",
        length=pl.col("length").cast(pl.Float64),
        weight_sum=weight.list.sum(),
        weight_squares=(weight * weight).list.sum(),
        weight_max=weight.list.max(),
        kept=(
            pl.col("token_keep").list.sum() if "token_keep" in lf.collect_schema().names() else pl.col("length")
        ).cast(pl.Float64),
        nonzero=floats("coefficient").list.eval(pl.element() != 0).list.sum().cast(pl.Float64),
    ).collect()
    rows = frame.filter("keep")
    sums = grouped_sums(rows, [], ["weight_sum", "weight_squares", "kept", "nonzero"]).row(0, named=True)
    return {
        "trajectories": float(frame.height),
        "kept_trajectories": float(rows.height),
        "tokens": float(frame["length"].sum()),
        "kept_tokens": sums["kept"],
        "nonzero_tokens": sums["nonzero"],
        "weight_sum": sums["weight_sum"],
        "weight_squares": sums["weight_squares"],
        "weight_max": float(rows["weight_max"].max() or 0.0),  # type: ignore[arg-type]
    }


def merge_summaries(parts: list[dict[str, float]]) -> dict[str, float]:
    """Add the summaries of all shards, in shard order, and derive fractions, mean weight and effective sample size.

    Effective sample size (Kish) is (sum w)^2 / sum w^2 over kept tokens, reported as a share of them.
    """
    total = {k: max(p[k] for p in parts) if k == "weight_max" else sum(p[k] for p in parts) for k in parts[0]}
    kept, squares = total["kept_tokens"], total["weight_squares"]
    return {
        **total,
        "n_dropped": total["trajectories"] - total["kept_trajectories"],
        "kept_fraction": total["kept_trajectories"] / total["trajectories"] if total["trajectories"] else 0.0,
        "kept_token_fraction": kept / total["tokens"] if total["tokens"] else 0.0,
        "mean_weight": total["weight_sum"] / kept if kept else 0.0,
        "effective_sample_share": total["weight_sum"] ** 2 / squares / kept if squares and kept else 0.0,
    }
