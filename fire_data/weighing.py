"""From scores to one coefficient per token: run a rule, apply the policies, divide by the step's denominator.

`weigh()` is the Python entry for any frame. `fit` and `apply` are its halves for tables in shards: `fit` goes over all
shards of a round, `apply` makes one of them; what is held is a shard and one row per trajectory.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import polars as pl

from fire_data.rules import Rule, Stats, Uniform, make_rule, own
from fire_data.rules.base import GROUP, KEY, ROW, STEP, Mean, scope_keys, sources, trajectory_keys
from fire_data.rules.evaluate import check, decide, part_columns
from fire_data.rules.statistics import KEYS, exact_sums, fit_statistics, grouped, join_rows, read_rows
from fire_data.schemas.config import Denominator
from fire_data.schemas.errors import ConfigError, DataError
from fire_data.schemas.tables import FLOAT_SIGNALS, SCORES, SUMMARIES, WEIGHTS, addon_of

_OUTPUT = [c.name for c in WEIGHTS if c.name != "trajectory_id"]
_SUMMARIES = {c.name for c in SUMMARIES}
_MEAN = "mean_weight"


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
        for name, value, known in (
            ("denominator", self.denominator, (None, *get_args(Denominator))),
            ("truncated", self.truncated, ("keep", "drop")),
            ("end_token", self.end_token, ("keep", "mask")),
        ):
            if value not in known:
                choices = ", ".join(str(k) for k in known if k is not None)
                raise ConfigError(f"{name} is one of {choices}, not {value!r}", fix=f"--set weigh.{name}={known[-1]}")
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

    @property
    def policy_columns(self) -> list[str]:
        """Columns that the policies read beside the rule's."""
        cut = "finish_reason" if self.truncated != "keep" or self.end_token != "keep" else None
        return [c for c in (cut, "rollout_logprob" if self.rollout_is_cap is not None else None) if c]

    @property
    def columns(self) -> list[str]:
        """Every stored column that enters the weights."""
        matched = self.rule.matched.columns if self.rule.matched else ()
        plain = ("student_logprob", "teacher_logprob")
        return list(dict.fromkeys((*self.rule.columns, *matched, *plain, *self.policy_columns)))


@dataclass(frozen=True)
class Fitted:
    """What `fit` learned from a round: the rule's statistics and each step's denominator, both JSON-ready."""

    stats: Stats
    steps: list[dict[str, Any]]


class Table(Protocol):
    """A round in shards whose rows are those of `prepare`, in order."""

    def __len__(self) -> int: ...

    def rows(self, shard: int) -> tuple[int, int]:
        """The number of the shard's first row in the round, and how many it has."""

    def read(self, shard: int, columns: Sequence[str], reads: Literal["shard", "step", "round"]) -> pl.DataFrame:
        """These columns of the shard's rows, or of all rows that share a step or the round with them."""


class Pieces:
    """A prepared frame as a table: one shard, or shards of `size` trajectories."""

    def __init__(self, prepared: pl.LazyFrame, size: int | None = None) -> None:
        self.lf = prepared
        self.height = int(prepared.select(pl.len()).collect().item())
        self.size = size or max(1, self.height)

    def __len__(self) -> int:
        return max(1, -(-self.height // self.size))

    def rows(self, shard: int) -> tuple[int, int]:
        return shard * self.size, min(self.size, self.height - shard * self.size)

    def read(self, shard: int, columns: Sequence[str], reads: Literal["shard", "step", "round"]) -> pl.DataFrame:
        mine = self.lf.slice(*self.rows(shard))
        if reads == "step":
            mine = self.lf.join(mine.select(STEP).unique(), on=STEP, how="semi", maintain_order="left")
        return (self.lf if reads == "round" else mine).select(columns).collect()


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

    `frame` has one row per trajectory and the token columns the rule needs, as lists in nats; it is read into memory
    (`fire weigh` is for tables that do not fit). `batch_size` is the trajectories per optimizer step; None: the frame's
    own `step` column, else one step. None elsewhere means the rule's own. Further keywords are the rule's parameters
    (`percentile=20`). Raises ConfigError for an unknown rule, parameter or column, DataError for values that are not
    finite, lists of unequal length, or a rule that gives a negative weight.
    """
    made = make_rule(rule, params, scope)
    weighing = Weighing(made, batch_size, denominator, constant, truncated, end_token, rollout_is_cap)
    whole = frame.lazy().collect()
    given = whole.columns
    # Summaries are taken from the token columns as they are now, whatever sums the frame carries.
    fresh = whole.lazy().drop(name for name in given if name in _SUMMARIES and _source(name) in given)
    prepared = prepare(fresh, weighing)
    require_columns(prepared, weighing)
    check_values(prepared, weighing)
    table = Pieces(prepared)
    weights = apply(table, 0, weighing, fit(table, weighing)).drop("trajectory_id")
    kept = [c for c in given if c not in weights.columns]
    return pl.concat([whole.select(kept), weights], how="horizontal").lazy()


def _source(summary: str) -> str:
    """The token column a summary column is computed from."""
    special = {"length": "teacher_logprob", "entropy_product_sum": "teacher_entropy"}
    return special.get(summary) or summary.rpartition("_")[0]


def prepare(lf: pl.LazyFrame, weighing: Weighing, first_row: int = 0) -> pl.LazyFrame:
    """Add row number, step, group and missing summary columns."""
    have = lf.collect_schema().names()
    lf = lf.drop(c for c in _OUTPUT if c != STEP and c in have).with_row_index(ROW, offset=first_row)
    if weighing.batch_size is not None:
        lf = lf.with_columns(step=(pl.col(ROW) // weighing.batch_size).cast(pl.Int32))
    elif STEP not in have:
        lf = lf.with_columns(step=pl.lit(0, dtype=pl.Int32))
    if "trajectory_id" not in have:
        lf = lf.with_columns(trajectory_id=pl.col(ROW).cast(pl.String).str.zfill(20))
    lf = lf.with_columns(_group(have, weighing.samples_per_group).alias(GROUP))
    keys = pl.col("trajectory_id").map_batches(lambda s: trajectory_keys(s.to_list()), return_dtype=pl.Int64)
    return _with_summaries(lf.with_columns(keys.alias(KEY)), have)


def require_columns(prepared: pl.LazyFrame, weighing: Weighing, run: str = "RUN") -> None:
    """Raise ConfigError if a column is missing, or an expression cannot be computed on these columns.

    `run` is what errors put behind `fire score`.
    """
    schema = prepared.collect_schema()
    have = [c for c in schema.names() if not c.startswith("_")]
    _check_policies(weighing, have)
    if weighing.rule.uses_groups and "prompt_id" not in have:
        text = "the rule compares the samples of a prompt and needs the column 'prompt_id'"
        raise ConfigError(text, fix="give each sample of a prompt the same prompt_id")
    for rule in filter(None, (*weighing.rule.components, weighing.rule.matched)):
        check(rule, schema, lambda name: _missing(name, have, run))
    for name in weighing.columns:
        if name not in schema:
            what, fix = _missing(name, have, run) or (f"{name!r}, which is not there", "fire inspect RUN --schema")
            raise ConfigError(f"the rule needs the column {what}", fix=fix)


def _missing(name: str, have: list[str], run: str) -> tuple[str, str] | None:
    """What to say of a column that the table could have but has not, and what adds it."""
    addon = addon_of(name)
    if addon is not None:
        return f"{name!r}, which is not stored yet", f"fire score {run} --add {addon}"
    base = next((s for s in sources(name) if s not in have), name)
    if base not in {c.name for c in SCORES}:
        return None
    near = difflib.get_close_matches(base, have, n=1)
    text = f"{base!r}, which is not there" + (f"; the nearest is {near[0]!r}" if near else "")
    return text, f"fire score {run} adds it"


def _check_policies(weighing: Weighing, have: list[str]) -> None:
    if weighing.rollout_is_cap is not None and "rollout_logprob" not in have:
        raise ConfigError("rollout_is_cap needs the column 'rollout_logprob'", fix="--set weigh.rollout_is_cap=null")
    for policy, value in (("truncated", weighing.truncated), ("end_token", weighing.end_token)):
        if value != "keep" and "finish_reason" not in have:
            raise ConfigError(f"{policy}: {value} needs the column 'finish_reason'", fix=f"--set weigh.{policy}=keep")


def _group(have: list[str], n: int | None) -> pl.Expr:
    if "prompt_id" not in have:
        return pl.col(ROW).cast(pl.String)
    if "sample" not in have or n is None:
        return pl.col("prompt_id").cast(pl.String)
    return pl.concat_str("prompt_id", pl.col("sample") // n, separator="/")


def _with_summaries(lf: pl.LazyFrame, have: list[str]) -> pl.LazyFrame:
    """Per-trajectory length, sums and maxima from the token columns, where the frame does not carry them."""
    if "length" not in have:
        first = next((name for name in (*FLOAT_SIGNALS, "response_ids") if name in have), None)
        if first is None:
            raise ConfigError("there is no token column such as 'teacher_logprob'", fix="fire inspect RUN --schema")
        lf = lf.with_columns(length=pl.col(first).list.len().cast(pl.Int32))
    added = []
    for name in FLOAT_SIGNALS:
        if name in have:
            added += [_floats(name).list.sum().alias(f"{name}_sum")] if f"{name}_sum" not in have else []
            added += [_floats(name).list.max().alias(f"{name}_max")] if f"{name}_max" not in have else []
    entropies = {"teacher_entropy", "student_entropy"}
    if entropies <= set(have) and "entropy_product_sum" not in have:
        added.append((_floats("teacher_entropy") * _floats("student_entropy")).list.sum().alias("entropy_product_sum"))
    return lf.with_columns(added)


def _floats(column: str) -> pl.Expr:
    """A token column in double precision."""
    return pl.col(column).cast(pl.List(pl.Float64))


def check_values(lf: pl.LazyFrame, weighing: Weighing) -> None:
    """Raise DataError, naming row and column, if a needed column has no value, one that is not finite, or a token
    column is not as long as the others."""
    schema = lf.collect_schema()
    for name in weighing.columns:
        type_ = schema[name]
        fix = "rescore: fire score RUN --redo"
        if isinstance(type_, pl.List):
            wrong = (pl.col(name).is_null() | (pl.col(name).list.len() != pl.col("length"))).fill_null(True)
            finite = pl.element().is_finite().fill_null(False)
            if isinstance(type_.inner, pl.List):
                finite = pl.element().list.eval(finite).list.all() & (pl.element().list.len() > 0)
                sizes = pl.col(name).list.eval(pl.element().list.len().n_unique())
                wrong = wrong | (sizes.list.first() > 1).fill_null(False)
            if type_.inner.is_numeric() or isinstance(type_.inner, pl.List):
                wrong = wrong | ~pl.col(name).list.eval(finite).list.all()
            bad = lf.filter(wrong).select(ROW, "length", n=pl.col(name).list.len()).head(1).collect()
            if bad.height:
                row, length, n = bad.row(0)
                what = "holds a value that is not finite"
                if n is not None and n != length:
                    what = f"has {n} elements where others have {length}"
                elif isinstance(type_.inner, pl.List):
                    what = "holds a value that is not finite, or lists of unequal length"
                raise DataError(f"column {name!r} {what}", where=f"row {row}", fix=fix)
        elif type_.is_numeric() or type_ == pl.Null:
            valued = pl.col(name).cast(pl.Float64).is_finite().fill_null(False)
            bad = lf.filter(~valued).select(ROW).head(1).collect()
            if bad.height:
                fix = "set rollout.verifier, then: fire rollout RUN --redo" if name == "reward" else fix
                raise DataError(f"column {name!r} has no value", where=f"row {bad.item()}", fix=fix)


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
        stats[_MEAN] = _means(rows, fitted_mean).to_dicts()
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
    want = ("weight", "advantage", "token_keep", "fkl_weight")
    frame = _decided(table, shard, weighing, fitted.stats, want)
    frame = _normalised(frame, weighing.rule.mean, fitted.stats)
    steps = read_rows(fitted.steps, frame.schema).select(STEP, "tokens", "kept_tokens", "kept_trajectories")
    frame = join_rows(frame, steps.rename({c: f"_{c}" for c in steps.columns if c != STEP}), [STEP])
    masked = [pl.col("token_keep").cast(pl.List(pl.Float64))] if "token_keep" in frame.columns else []
    factors = [pl.col("weight"), pl.col("advantage"), *masked]
    extra: dict[str, pl.Expr] = {}
    if weighing.rollout_is_cap is not None:
        log_ratio = _floats("student_logprob") - _floats("rollout_logprob")
        extra["rollout_is"] = log_ratio.list.eval(pl.element().exp().clip(upper_bound=weighing.rollout_is_cap))
        factors.append(extra["rollout_is"])
    extra["coefficient"] = _divided(factors, weighing)
    if "fkl_weight" in frame.columns:
        extra["fkl_coefficient"] = _divided([pl.col("fkl_weight"), *masked], weighing)
    frame = frame.with_columns(**extra)
    single = [pl.col(c).cast(pl.List(pl.Float32)) for c in ("weight", "advantage", *extra)]
    return frame.with_columns(single).select("trajectory_id", *(c for c in _OUTPUT if c in frame.columns))


def _divided(factors: Sequence[pl.Expr], weighing: Weighing) -> pl.Expr:
    """The product of token factors over the denominator; a dropped token gets +0.0, never -0.0 or a leftover."""
    active = pl.col("keep") & (pl.col("_kept") > 0)
    scale = pl.when(active).then(1.0 / _denominator(weighing)).otherwise(0.0)
    product = factors[0]
    for factor in factors[1:]:
        product = product * factor
    return pl.when(active).then(product * scale).otherwise(pl.col("weight") * 0.0)


def _denominator(weighing: Weighing) -> pl.Expr:
    if weighing.divisor == "tokens":
        return pl.col("_kept_tokens").cast(pl.Float64)
    if weighing.divisor == "all_tokens":
        return pl.col("_tokens").cast(pl.Float64)
    if weighing.divisor == "sequences":
        return pl.col("_kept_trajectories").cast(pl.Float64) * pl.col("_kept").cast(pl.Float64)
    return pl.lit(float(weighing.constant or 0.0))


# --- a rule, its components and the policies --------------------------------------------------------------------


def _labelled(rule: Rule) -> list[tuple[str, Rule]]:
    """The components with the prefix under which their statistics are stored."""
    names = getattr(rule, "names", None)
    return [("", rule)] if names is None else [(f"{n}/", r) for n, r in zip(names, rule.components, strict=True)]


def _fit_statistics(table: Table, rule: Rule) -> Stats:
    def frames(columns: Sequence[str]) -> Iterator[pl.DataFrame]:
        for i in range(len(table)):
            yield table.read(i, list(dict.fromkeys([*KEYS, *columns])), "shard")

    return {f"{p}{k}": v for p, r in _labelled(rule) for k, v in fit_statistics(r, frames).items()}


def _decided(table: Table, shard: int, weighing: Weighing, stats: Stats, want: Iterable[str]) -> pl.DataFrame:
    """The shard's keys with keep, drop_reason, `_kept` and those of `want` that apply, after the policies."""
    rule, want = weighing.rule, set(want)
    plain = {"student_logprob", "teacher_logprob"} if "advantage" in want else set()
    needed = {c for r in rule.components for c in part_columns(r, want)} | set(weighing.policy_columns) | plain
    needed |= {rule.mean.by} if rule.mean and rule.mean.by else set()
    wide = table.read(shard, list(dict.fromkeys([*KEYS, *sorted(needed)])), rule.reads)
    parts = [
        decide(wide, r, {k.removeprefix(p): v for k, v in stats.items() if k.startswith(p)}, want)
        for p, r in _labelled(rule)
    ]
    frame = wide.drop("keep", strict=False).hstack(_merged(parts))
    if "weight" in want and "weight" not in frame.columns:
        frame = frame.with_columns(weight=pl.lit(1.0).repeat_by(pl.col("length").cast(pl.UInt32)))
    if "advantage" in want and "advantage" not in frame.columns:
        frame = frame.with_columns(advantage=_floats("teacher_logprob") - _floats("student_logprob"))
    if rule.reads != "shard":
        first, height = table.rows(shard)
        frame = frame.filter(pl.col(ROW).is_between(first, first + height, closed="left"))
    return _with_policies(frame, weighing)


def _require_local(table: Table, weighing: Weighing, stats: Stats) -> None:
    """Raise ConfigError if a user's rule decides otherwise when fewer rows are there: it aggregates over a shard.

    What the package brings is held to this by tests.
    """
    for prefix, rule in _labelled(weighing.rule):
        if own.is_ours(rule) or rule.reads != "shard":
            continue
        want = [p for p in rule.parts().expressions() if p != "keep"]
        mine = {k.removeprefix(prefix): v for k, v in stats.items() if k.startswith(prefix)}
        columns = list(dict.fromkeys([*KEYS, *part_columns(rule, want)]))
        frame = table.read(0, columns, "shard")
        among = decide(frame, rule, mine, want)
        for own_group in (frame[GROUP] == frame[GROUP][i] for i in (0, -1) if frame.height):
            alone, there = decide(frame.filter(own_group), rule, mine, want), among.filter(own_group)
            different = [c for c in there.columns if not there[c].equals(alone[c], null_equal=True)]
            if different:
                text = f"{different[0]} depends on which rows are read together: it aggregates over the table"
                fix = "declare a Statistic with its scope, or use .over('_row') or .over('_group')"
                raise ConfigError(text, where=f"rule {rule.name}", fix=fix)


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
    weighted = [r for r in weighing.rule.components if "weight" in r.parts().expressions()]
    short = (
        mean is not None and mean.over == "all" and len(weighted) == 1 and weighted[0].parts().weight_sum is not None
    )
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
    return sums.select(*keys, value.alias(_MEAN), n=pl.col("_counted").cast(pl.Int64))


def _normalised(frame: pl.DataFrame, mean: Mean | None, stats: Stats) -> pl.DataFrame:
    if mean is None:
        return frame
    keys = scope_keys(mean.scope, mean.by)
    means = read_rows(stats[_MEAN], frame.schema) if _MEAN in stats else _means(_weight_sums(frame, mean), mean)
    frame = join_rows(frame, means, keys)
    return frame.with_columns(weight=pl.col("weight") / pl.col(_MEAN)).drop(_MEAN)


def _targets(table: Table, weighing: Weighing, matched: Rule) -> pl.DataFrame:
    """For a rule that matches another: per trajectory the tokens that count under that one, and if all were kept."""
    found: dict[str, pl.DataFrame] = {}
    for name, rule in (("_target", matched), ("_own", Uniform())):
        around = dataclasses.replace(weighing, rule=rule)
        stats = _fit_statistics(table, rule)
        if rule.matched is not None:
            stats |= rule.fit(_targets(table, around, rule.matched))
        found[name] = _trajectories(table, around, stats, None).select(pl.col("_kept").alias(name))
    keys = [table.read(i, [STEP, "trajectory_id", KEY], "shard") for i in range(len(table))]
    return pl.concat([pl.concat(keys), *found.values()], how="horizontal")


# --- what a rule did ---------------------------------------------------------------------------------------------


def summarise(weights: pl.DataFrame, lengths: pl.Series) -> dict[str, float]:
    """Sums over weighted rows that can be added shard by shard: what the rule did, in numbers.

    Weight statistics are over kept tokens.
    """
    weight = _floats("weight")
    kept = lengths.cast(pl.Float64)
    if "token_keep" in weights.columns:
        weight = weight * pl.col("token_keep").cast(pl.List(pl.Float64))
        kept = weights["token_keep"].list.sum().cast(pl.Float64)
    frame = weights.select(
        "keep",
        weight_sum=weight.list.sum(),
        weight_squares=(weight * weight).list.sum(),
        weight_max=weight.list.max(),
        nonzero=_floats("coefficient").list.eval(pl.element() != 0).list.sum().cast(pl.Float64),
    ).with_columns(kept.alias("kept"))
    rows = frame.filter("keep")
    sums = exact_sums(rows, [], ["weight_sum", "weight_squares", "kept", "nonzero"]).row(0, named=True)
    return {
        "trajectories": float(frame.height),
        "kept_trajectories": float(rows.height),
        "tokens": float(lengths.sum()),
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
