"""From scores to one coefficient per token: run a rule, apply the policies, divide by the step's denominator.

`weigh()` is the Python entry for any frame. `fit` and `apply` are its halves for tables in shards: `fit` goes over all
shards of a round, `apply` makes one of them; what is held is a shard and one row per trajectory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import DTypeLike, NDArray

from fire_data.coefficient import blocks, multiply
from fire_data.prepare import (
    OUTPUT,
    Decided,
    Pieces,
    Table,
    Weighing,
    check_values,
    looked_at,
    prepare,
    require_columns,
)
from fire_data.rules import Composite, Rule, Stats, Uniform, make_rule, own
from fire_data.rules.base import GROUP, KEY, ROW, STEP, Mean, scope_keys
from fire_data.rules.evaluate import LARGEST, decide, part_columns
from fire_data.rules.statistics import KEYS, exact_sums, fit_statistics, grouped, join_rows, read_rows
from fire_data.rules.tokens import flatten, fold
from fire_data.schemas.config import Denominator
from fire_data.schemas.errors import ConfigError, DataError
from fire_data.schemas.tables import SUMMARIES
from fire_data.teachers import frame_bounds, in_columns, require_exact

_SUMMARIES = {c.name for c in SUMMARIES}
MEAN = "_mean_weight"


@dataclass(frozen=True)
class Fitted:
    """What `fit` learned from a round: the rule's statistics and each step's denominator, both JSON-ready."""

    stats: Stats
    steps: list[dict[str, Any]]


def weigh(
    frame: pl.DataFrame | pl.LazyFrame,
    rule: str | Mapping[str, Any] | Rule = "uniform",
    *,
    batch_size: int | None = None,
    scope: str | None = None,
    denominator: Denominator | None = None,
    constant: float | None = None,
    truncated: str = "keep",
    end_token: str = "keep",
    rollout_is_cap: float | None = None,
    teacher: str = "routed",
    entropy: str = "exact",
    **params: Any,
) -> pl.LazyFrame:
    """The frame plus the columns of the weights table: step, keep, drop_reason, weight, advantage, coefficient.

    `frame` has one row per trajectory and the token columns the rule needs, as lists in nats; it is read into memory
    (`fire weigh` is for tables that do not fit). `batch_size` is the trajectories per optimizer step; None: the frame's
    own `step` column, else one step. None elsewhere means the rule's own. Further keywords are the rule's parameters
    (`percentile=20`). `teacher`: which one counts, of several given as columns `teacher_logprob.NAME` and
    `teacher_entropy.NAME`: routed (the plain columns), average, confident (per trajectory), token (per token), a name;
    the frame returned keeps its own columns. `entropy`: "any" lets a rule read entropies that are lower bounds: those
    that come with a mass (`teacher_entropy_mass`), and that of an average.

    Raises ConfigError for an unknown rule, parameter, column or teacher, or entropies that are not exact; DataError for
    values that are not finite, lists of unequal length, or a rule that gives a negative weight.
    """
    made = make_rule(rule, params, scope)
    whole = frame.lazy().collect()
    given = whole.columns
    around = (batch_size, denominator, constant, truncated, end_token, rollout_is_cap, None)
    weighing = Weighing(made, *around, in_columns(given, teacher), entropy)
    if not whole.height:
        raise DataError("the frame has no rows", fix="give one row per trajectory")
    require_exact(made, weighing.teachers, entropy, frame_bounds(whole))
    # Summaries are taken from the token columns as they are now, whatever sums the frame carries.
    fresh = whole.lazy().drop(name for name in given if name in _SUMMARIES and _source(name) in given)
    prepared = prepare(fresh, weighing)
    require_columns(prepared, weighing)
    check_values(prepared.select(ROW, "length", *looked_at(weighing)).collect(), weighing)
    table = Pieces(prepared)
    weights = apply(table, 0, weighing, fit(table, weighing)).drop("trajectory_id")
    kept = [c for c in given if c not in weights.columns]
    return pl.concat([whole.select(kept), weights], how="horizontal").lazy()


def _source(summary: str) -> str:
    """The token column a summary column is computed from."""
    special = {"length": "teacher_logprob", "entropy_product_sum": "teacher_entropy"}
    return special.get(summary) or summary.rpartition("_")[0]


def fit(table: Table, weighing: Weighing) -> Fitted:
    """Statistics and denominators of a whole round, reading only the columns they depend on."""
    stats = _fit_statistics(table, weighing.rule)
    if weighing.rule.matched is not None:
        stats |= weighing.rule.fit(_targets(table, weighing, weighing.rule.matched))
    _require_local(table, weighing, stats)
    mean = weighing.rule.mean
    fitted_mean = mean if mean and mean.scope in ("step", "round") else None
    rows = _trajectories(table, weighing, stats, fitted_mean)
    if fitted_mean:
        stats[MEAN] = _means(rows, fitted_mean).to_dicts()
    totals = grouped(
        rows,
        [STEP],
        pl.len().alias("trajectories"),
        pl.col("length").sum().alias("tokens"),
        (pl.col("keep") & (pl.col("_kept") > 0)).sum().alias("kept_trajectories"),
        pl.col("_kept").sum().alias("kept_tokens"),
    )
    return Fitted(stats, totals.sort(STEP).to_dicts())


def apply(table: Table, shard: int, weighing: Weighing, fitted: Fitted) -> pl.DataFrame:
    """The rows of a shard of the weights table, in order, with its optional columns where they are used."""
    frame = _multiplied(table, shard, weighing, fitted, np.float32)
    return frame.select("trajectory_id", *(c for c in OUTPUT if c in frame.columns))


def factored(table: Table, shard: int, weighing: Weighing, fitted: Fitted) -> pl.DataFrame:
    """What `apply` rounds, in double precision, beside the scalars in it: `_kept` (the trajectory's tokens that count),
    `_denominator`, and `_mean_weight` where weights were divided by one."""
    return _multiplied(table, shard, weighing, fitted, np.float64)


def _multiplied(table: Table, shard: int, weighing: Weighing, fitted: Fitted, precision: DTypeLike) -> pl.DataFrame:
    """The rows of a shard with the scalars of `factored`; the token columns multiplied in double precision."""
    want = ("weight", "advantage", "token_keep", "fkl_weight")
    frame = _decided(table, shard, weighing, fitted.stats, want)
    frame = _with_means(frame, weighing.rule.mean, fitted.stats)
    steps = read_rows(fitted.steps, frame.schema).select(STEP, "tokens", "kept_tokens", "kept_trajectories")
    frame = join_rows(frame, steps.rename({c: f"_{c}" for c in steps.columns if c != STEP}), [STEP])
    frame = frame.with_columns(_denominator=_denominator(weighing))
    active = pl.col("keep") & (pl.col("_kept") > 0)
    scale = frame.select(pl.when(active).then(1.0 / pl.col("_denominator")).otherwise(0.0)).to_series()
    rows = {"scale": scale.to_numpy()} | ({"mean": frame[MEAN].to_numpy()} if MEAN in frame.columns else {})
    ratio = ("student_logprob", "rollout_logprob") if weighing.rollout_is_cap is not None else ()
    names = [n for n in (*want, *ratio) if n in frame.columns]
    tokens = {n: flatten(frame[n]).to_numpy() for n in names}
    made: dict[str, NDArray[Any]] = {}
    for part, repeated in blocks(frame["length"].cast(pl.Int64).to_numpy(), rows):
        found = multiply({n: v[part] for n, v in tokens.items()} | repeated, weighing.rollout_is_cap)
        for name, values_T in found.items():
            checked = name.endswith("coefficient") and len(values_T)
            if checked and not max(values_T.max(), -values_T.min()) <= LARGEST:
                raise _not_finite(frame, name, part.start + int((~(np.abs(values_T) <= LARGEST)).argmax()), weighing)
            if name not in made:
                made[name] = np.empty(len(tokens["weight"]), dtype=precision)
            made[name][part] = values_T
    return frame.with_columns(fold(pl.Series(n, values_T), frame["length"]) for n, values_T in made.items())


def _not_finite(frame: pl.DataFrame, name: str, token: int, weighing: Weighing) -> DataError:
    """A product of finite factors may still be more than single precision holds."""
    ends = frame["length"].cast(pl.Int64).cum_sum()
    row = int((ends <= token).sum())
    where = f"row {frame[ROW][row]}, trajectory {frame['trajectory_id'][row]}"
    return DataError(
        f"{name} is not finite", where=where, fix=f"smaller weights or advantages: {own.remedy(weighing.rule)}"
    )


def _denominator(weighing: Weighing) -> pl.Expr:
    if weighing.divisor == "tokens":
        return pl.col("_kept_tokens").cast(pl.Float64)
    if weighing.divisor == "all_tokens":
        return pl.col("_tokens").cast(pl.Float64)
    if weighing.divisor == "sequences":
        return pl.col("_kept_trajectories").cast(pl.Float64) * pl.col("_kept").cast(pl.Float64)
    return pl.lit(float(weighing.constant or 0.0))


# --- a rule, its components and the policies --------------------------------------------------------------------


def labelled(rule: Rule) -> list[tuple[str, Rule]]:
    """The components with the prefix under which their statistics are stored."""
    if not isinstance(rule, Composite):
        return [("", rule)]
    return [(f"{n}/", r) for n, r in zip(rule.names, rule.rules, strict=True)]


def _fit_statistics(table: Table, rule: Rule) -> Stats:
    def frames(columns: Sequence[str]) -> Iterator[pl.DataFrame]:
        for i in range(len(table)):
            yield table.read(range(i, i + 1), list(dict.fromkeys([*KEYS, *columns])))

    stats: Stats = {}
    for prefix, component in labelled(rule):
        with own.told(component, "a statistic"):
            stats |= {f"{prefix}{k}": v for k, v in fit_statistics(component, frames).items()}
    return stats


def _decided(table: Table, shard: int, weighing: Weighing, stats: Stats, want: Iterable[str]) -> pl.DataFrame:
    """The shard's keys with keep, drop_reason, `_kept` and those of `want` that apply, after the policies."""
    rule, want = weighing.rule, set(want)
    plain = {"student_logprob", "teacher_logprob"} if "advantage" in want else set()
    needed = {c for r in rule.components for c in part_columns(r, want)} | set(weighing.policy_columns) | plain
    needed |= {rule.mean.by} if rule.mean and rule.mean.by else set()
    columns = list(dict.fromkeys([*KEYS, *sorted(needed)]))
    frame = table.read(range(shard, shard + 1), columns)
    if rule.reads == "shard":
        parts = _parts(frame, rule, stats, want)
    else:
        first, height = table.rows(shard)
        wide = _wide_parts(table, table.span(shard, rule.reads), columns, weighing, stats, want)
        parts = wide.filter(pl.col(ROW).is_between(first, first + height, closed="left")).drop(ROW)
    frame = frame.hstack(parts)
    if "weight" in want and "weight" not in frame.columns:
        frame = frame.with_columns(weight=pl.lit(1.0).repeat_by(pl.col("length").cast(pl.UInt32)))
    if "advantage" in want and "advantage" not in frame.columns:
        teacher_T, student_T = (flatten(frame[f"{who}_logprob"]).to_numpy() for who in ("teacher", "student"))
        plain_T = np.subtract(teacher_T, student_T, dtype=np.float64)
        frame = frame.with_columns(fold(pl.Series("advantage", plain_T), frame["length"]))
    return _with_policies(frame, weighing)


def _parts(frame: pl.DataFrame, rule: Rule, stats: Stats, want: set[str]) -> pl.DataFrame:
    """What the components of a rule decide about these rows, together."""
    return _merged([
        decide(frame, r, {k.removeprefix(p): v for k, v in stats.items() if k.startswith(p)}, want)
        for p, r in labelled(rule)
    ])  # fmt: skip


def _wide_parts(
    table: Table, span: range, columns: Sequence[str], weighing: Weighing, stats: Stats, want: set[str]
) -> pl.DataFrame:
    """The parts of all rows of these shards. The last ones are kept: the next shard often needs the very same."""
    last = table.last
    known = last is not None and last.weighing is weighing and last.stats is stats
    if last is None or not known or (last.span, last.want) != (span, want):
        wide = table.read(span, columns)
        parts = _parts(wide, weighing.rule, stats, want).with_columns(wide[ROW])
        last = table.last = Decided(weighing, stats, span, want, parts)
    return last.parts


_LOOKED_AT = 32  # prompts of the first shard


def _require_local(table: Table, weighing: Weighing, stats: Stats) -> None:
    """Raise ConfigError if a user's rule decides otherwise when fewer rows are there: it aggregates over a shard.

    What the package brings is held to this by tests.
    """
    for prefix, rule in labelled(weighing.rule):
        if own.is_ours(rule) or rule.reads != "shard":
            continue
        want = [p for p in rule.said.expressions() if p != "keep"]
        mine = {k.removeprefix(prefix): v for k, v in stats.items() if k.startswith(prefix)}
        columns = list(dict.fromkeys([*KEYS, *part_columns(rule, want)]))
        frame = table.read(range(1), columns)
        among, groups = decide(frame, rule, mine, want), frame[GROUP].unique(maintain_order=True)
        for group in groups.gather_every(max(1, len(groups) // _LOOKED_AT)):
            chosen = frame[GROUP] == group
            alone, there = decide(frame.filter(chosen), rule, mine, want), among.filter(chosen)
            different = [c for c in there.columns if not there[c].equals(alone[c], null_equal=True)]
            if different:
                text = f"{different[0]} depends on which rows are read together: it aggregates over the table"
                raise ConfigError(text, where=f"rule {rule.name}", fix=own.SCOPED)


def _merged(parts: list[pl.DataFrame]) -> pl.DataFrame:
    """Components together: filters and masks AND, the first reason to drop, weights multiplied."""
    made = parts[0]
    for other in parts[1:]:
        theirs = other.rename({c: f"_{c}" for c in other.columns})
        both = made.hstack(theirs)
        combined = {"keep": pl.col("keep") & pl.col("_keep"), "drop_reason": pl.coalesce("drop_reason", "_drop_reason")}
        for name in other.columns:
            if name not in made.columns:
                combined[name] = pl.col(f"_{name}")
            elif name in ("weight", "weight_sum"):
                combined[name] = pl.col(name) * pl.col(f"_{name}")
            elif name == "token_keep":
                mine, other_mask = (pl.col(c).cast(pl.List(pl.Int8)) for c in (name, f"_{name}"))
                combined[name] = (mine * other_mask).cast(pl.List(pl.Boolean))
        made = both.with_columns(**combined).drop(theirs.columns)
    return made


def _with_policies(frame: pl.DataFrame, weighing: Weighing) -> pl.DataFrame:
    """What is left out whatever the rule says, and `_kept`: how many tokens of a trajectory count."""
    if weighing.truncated == "drop":
        cut = pl.col("finish_reason") == "length"
        reason = pl.when(pl.col("keep") & cut).then(pl.lit("truncated by max_new_tokens"))
        frame = frame.with_columns(drop_reason=reason.otherwise(pl.col("drop_reason")), keep=pl.col("keep") & ~cut)
    if weighing.end_token == "mask":
        ended = ((pl.col("finish_reason") == "stop") & (pl.col("length") > 0)).cast(pl.UInt32)
        length = pl.col("length").cast(pl.UInt32)
        inner = pl.concat_list(pl.lit(1, pl.Int8).repeat_by(length - ended), pl.lit(0, pl.Int8).repeat_by(ended))
        mask = inner * pl.col("token_keep").cast(pl.List(pl.Int8)) if "token_keep" in frame.columns else inner
        frame = frame.with_columns(token_keep=mask.cast(pl.List(pl.Boolean)))
    counted = pl.col("token_keep").list.sum() if "token_keep" in frame.columns else pl.col("length")
    return frame.with_columns(_kept=pl.when("keep").then(counted.cast(pl.Int64)).otherwise(0))


def _trajectories(table: Table, weighing: Weighing, stats: Stats, mean: Mean | None) -> pl.DataFrame:
    """One row per trajectory of the round: what counts of it and, for `mean`, the sum of its weights."""
    weighted = [r for r in weighing.rule.components if "weight" in r.said.expressions()]
    short = mean is not None and mean.over == "all" and len(weighted) == 1 and weighted[0].said.weight_sum is not None
    want = ["token_keep", *([] if mean is None else ["weight_sum"] if short else ["weight"])]
    rows = []
    for i in range(len(table)):
        frame = _decided(table, i, weighing, stats, want).with_columns(pl.col("length").cast(pl.Int64))
        if mean is not None and not short:
            frame = _weight_sums(frame, mean)
        columns = [ROW, STEP, "length", "keep", "_kept", *([] if mean is None else ["weight_sum", "_counted"])]
        if short:
            frame = frame.with_columns(_counted=pl.col("length").cast(pl.Float64))
        by = [mean.by] if mean and mean.by else []
        rows.append(frame.select(*columns, *by))
    return pl.concat(rows)


def _weight_sums(frame: pl.DataFrame, mean: Mean) -> pl.DataFrame:
    """Per trajectory `weight_sum` and `_counted` over the tokens that the mean is about."""
    weight, counted = pl.col("weight"), pl.col("length").cast(pl.Float64)
    if mean.over == "kept":
        if "token_keep" in frame.columns:
            weight = weight * pl.col("token_keep").cast(pl.List(pl.Float64))
        kept = pl.col("keep").cast(pl.Float64)
        return frame.with_columns(weight_sum=weight.list.sum() * kept, _counted=pl.col("_kept").cast(pl.Float64))
    return frame.with_columns(weight_sum=weight.list.sum(), _counted=counted)


def _means(rows: pl.DataFrame, mean: Mean) -> pl.DataFrame:
    """The mean weight per population; 1 where there is no weight to divide by."""
    keys = scope_keys(mean.scope, mean.by)
    sums = exact_sums(rows, keys, ["weight_sum", "_counted"])
    value = pl.when(pl.col("weight_sum") > 0).then(pl.col("weight_sum") / pl.col("_counted")).otherwise(1.0)
    return sums.select(*keys, value.alias(MEAN), n=pl.col("_counted").cast(pl.Int64))


def _with_means(frame: pl.DataFrame, mean: Mean | None, stats: Stats) -> pl.DataFrame:
    """The frame with the mean weight that its weights are to be divided by, if they are."""
    if mean is None:
        return frame
    keys = scope_keys(mean.scope, mean.by)
    means = read_rows(stats[MEAN], frame.schema) if MEAN in stats else _means(_weight_sums(frame, mean), mean)
    return join_rows(frame, means, keys)


def _targets(table: Table, weighing: Weighing, matched: Rule) -> pl.DataFrame:
    """For a rule that matches another: per trajectory the tokens that count under that one, and if all were kept."""
    found: dict[str, pl.DataFrame] = {}
    for name, rule in (("_target", matched), ("_own", Uniform())):
        around = dataclasses.replace(weighing, rule=rule)
        stats = _fit_statistics(table, rule)
        if rule.matched is not None:
            stats |= rule.fit(_targets(table, around, rule.matched))
        found[name] = _trajectories(table, around, stats, None).select(pl.col("_kept").alias(name))
    keys = [table.read(range(i, i + 1), [STEP, "trajectory_id", KEY]) for i in range(len(table))]
    return pl.concat([pl.concat(keys), *found.values()], how="horizontal")
