"""What a rule is weighed with, and a table made ready for it: teachers, steps, groups, sums; what is missing is told.

A round is a `Table`: shards of frames made by `prepare`, read with the columns that are asked for.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, get_args

import numpy as np
import polars as pl

from fire_data.rules import Rule, Stats
from fire_data.rules.base import GROUP, KEY, ROW, STEP, sources, trajectory_keys
from fire_data.rules.evaluate import check
from fire_data.rules.tokens import flatten
from fire_data.schemas.config import Denominator
from fire_data.schemas.errors import ConfigError, DataError, IncompleteError
from fire_data.schemas.tables import FLOAT_SIGNALS, JOINT, REWARD, SCORES, WEIGHTS, added_by, addon_of
from fire_data.teachers import MADE, ROUTED, Teachers, combine, require_common, require_exact, require_stored

OUTPUT = [c.name for c in WEIGHTS if c.name != "trajectory_id"]


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
    teachers: Teachers = ROUTED
    entropy: str = "exact"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("denominator", self.denominator, (None, *get_args(Denominator))),
            ("truncated", self.truncated, ("keep", "drop")),
            ("end_token", self.end_token, ("keep", "mask")),
            ("entropy", self.entropy, ("exact", "any")),
        ):
            if value not in known:
                choices = [str(k) for k in known if k is not None]
                near = difflib.get_close_matches(str(value), choices, n=1) or choices
                text = f"{name} is one of {', '.join(choices)}, not {value!r}"
                raise ConfigError(text, fix=f"--set weigh.{name}={near[0]}")
        if (self.denominator or self.rule.denominator) == "constant" and self.constant is None:
            raise ConfigError("denominator constant needs a value", fix="--set weigh.constant=1000")
        n = self.samples_per_group
        if self.rule.uses_groups and n and self.batch_size and self.batch_size % n:
            text = f"train.batch_size {self.batch_size} splits the {n} samples of a prompt, which this rule compares"
            raise ConfigError(text, fix=f"--set train.batch_size={max(n, self.batch_size // n * n)}")
        require_common(self.rule, self.teachers)
        require_exact(self.rule, self.teachers, self.entropy, {})

    @property
    def divisor(self) -> Denominator:
        """The denominator in force: the one given, else the rule's own."""
        return self.denominator or self.rule.denominator

    @functools.cached_property
    def policy_columns(self) -> list[str]:
        """Columns that the policies read beside the rule's."""
        cut = "finish_reason" if self.truncated != "keep" or self.end_token != "keep" else None
        return [c for c in (cut, "rollout_logprob" if self.rollout_is_cap is not None else None) if c]

    @functools.cached_property
    def read(self) -> list[str]:
        """Every column of the prepared table that enters the weights."""
        matched = self.rule.matched.columns if self.rule.matched else ()
        plain = ("student_logprob", "teacher_logprob")
        return list(dict.fromkeys((*self.rule.columns, *matched, *plain, *self.policy_columns)))

    @functools.cached_property
    def combined(self) -> list[str]:
        """The stored columns that those of combined teachers are made from."""
        return self.teachers.columns("teacher_entropy" in self.read)

    @functools.cached_property
    def columns(self) -> list[str]:
        """Both of these, what is made last."""
        return list(dict.fromkeys((*self.combined, *self.read)))


class Decided(NamedTuple):
    """The parts of all rows of some shards under a rule, with their row numbers."""

    weighing: Weighing
    stats: Stats
    span: range
    want: set[str]
    parts: pl.DataFrame


class Table(Protocol):
    """A round in shards whose rows are those of `prepare`, in order."""

    last: Decided | None
    """What was last decided about several shards together: the next shard often needs the very same."""

    def __len__(self) -> int: ...

    def rows(self, shard: int) -> tuple[int, int]:
        """The number of the shard's first row in the round, and how many it has."""

    def span(self, shard: int, reads: Literal["step", "round"]) -> range:
        """The shards that hold all rows of the steps, or the round, of a shard."""

    def read(self, shards: range, columns: Sequence[str]) -> pl.DataFrame:
        """These columns of the rows of neighbouring shards."""


class Pieces:
    """A prepared frame as a table: one shard, or shards of `size` trajectories."""

    def __init__(self, prepared: pl.LazyFrame, size: int | None = None) -> None:
        self.lf = prepared
        self.last: Decided | None = None
        self.height = int(prepared.select(pl.len()).collect().item())
        self.size = size or max(1, self.height)

    def __len__(self) -> int:
        return max(1, -(-self.height // self.size))

    def rows(self, shard: int) -> tuple[int, int]:
        return shard * self.size, min(self.size, self.height - shard * self.size)

    def span(self, shard: int, reads: Literal["step", "round"]) -> range:
        if reads == "round":
            return range(len(self))
        steps = self.lf.select(STEP).collect()[STEP]
        mine = steps.slice(*self.rows(shard)).unique()
        rows = steps.is_in(mine.implode()).arg_true()
        return range(int(rows[0]) // self.size, int(rows[-1]) // self.size + 1)

    def read(self, shards: range, columns: Sequence[str]) -> pl.DataFrame:
        first, height = self.rows(shards[0])[0], sum(self.rows(i)[1] for i in shards)
        return self.lf.slice(first, height).select(columns).collect()


def prepare(lf: pl.LazyFrame, weighing: Weighing, first_row: int = 0) -> pl.LazyFrame:
    """Combine teachers, add row number, step, group and missing summary columns."""
    lf = combine(lf, weighing.teachers)
    have = lf.collect_schema().names()
    lf = lf.drop(c for c in OUTPUT if c != STEP and c in have).with_row_index(ROW, offset=first_row)
    if weighing.batch_size is not None:
        lf = lf.with_columns(step=(pl.col(ROW) // weighing.batch_size).cast(pl.Int32))
    elif STEP not in have:
        lf = lf.with_columns(step=pl.lit(0, dtype=pl.Int32))
    if "trajectory_id" not in have:
        lf = lf.with_columns(trajectory_id=pl.col(ROW).cast(pl.String).str.zfill(20))
    lf = lf.with_columns(_group(have, weighing.samples_per_group).alias(GROUP))
    keys = pl.col("trajectory_id").map_batches(lambda s: trajectory_keys(s.to_list()), return_dtype=pl.Int64)
    return _with_summaries(lf.with_columns(keys.alias(KEY)), have)


def stored(columns: Iterable[str], weighing: Weighing, have: Sequence[str]) -> list[str]:
    """Of the columns a table has, those that these of the prepared one are made from, and always its lengths."""
    found = {"length"}
    for column in columns:
        base = {*sources(column)}
        if column == GROUP:
            found |= {"prompt_id", "sample"}
        elif not weighing.teachers.routed and base & {*MADE}:
            found |= {*weighing.teachers.columns(), *base} - {*MADE}
        else:
            found |= {column} if column in have else base
    return [c for c in have if c in found]


def require_columns(prepared: pl.LazyFrame, weighing: Weighing, run: str = "RUN") -> None:
    """Raise ConfigError if a column is missing, or an expression cannot be computed on these columns; IncompleteError
    for a missing column that a command adds.

    `run` is what errors put behind `fire score`.
    """
    schema = prepared.collect_schema()
    have = [c for c in schema.names() if not c.startswith("_")]
    _check_policies(weighing, have)
    require_stored(weighing.teachers, weighing.combined, have, run)
    if weighing.rule.uses_groups and "prompt_id" not in have:
        text = "the rule compares the samples of a prompt and needs the column 'prompt_id'"
        raise ConfigError(text, fix="give each sample of a prompt the same prompt_id")
    for rule in filter(None, (*weighing.rule.components, weighing.rule.matched)):
        check(rule, schema, lambda name: _missing(name, have, run))
    for name in weighing.columns:
        if name not in schema:
            what, fix = _missing(name, have, run) or (f"{name!r}, which is not there", "fire inspect RUN --schema")
            kind = ConfigError if addon_of(name) is None else IncompleteError
            raise kind(f"the rule needs the column {what}", fix=fix)


def _missing(name: str, have: list[str], run: str) -> tuple[str, str] | None:
    """What to say of a column that the table could have but has not, and what adds it."""
    addon = addon_of(name)
    if addon is not None:
        return f"{name!r}, which is not stored yet", added_by(addon, run)
    base = next((s for s in sources(name) if s not in have), name)
    if base not in {c.name for c in SCORES}:
        return None
    near = difflib.get_close_matches(base, have, n=1)
    text = f"{base!r}, which is not there" + (f"; the nearest is {near[0]!r}" if near else "")
    if base in JOINT and {"student_logprob", "teacher_logprob"} <= {*have}:
        text += ": the models were evaluated apart, and it needs the logits of both"
        return text, f"fire score {run} --redo --set score.engine=transformers, and no url for any teacher"
    return text, f"fire score {run}"


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
            added += [floats(name).list.sum().alias(f"{name}_sum")] if f"{name}_sum" not in have else []
            added += [floats(name).list.max().alias(f"{name}_max")] if f"{name}_max" not in have else []
    entropies = {"teacher_entropy", "student_entropy"}
    if entropies <= set(have) and "entropy_product_sum" not in have:
        added.append((floats("teacher_entropy") * floats("student_entropy")).list.sum().alias("entropy_product_sum"))
    return lf.with_columns(added)


def floats(column: str) -> pl.Expr:
    """A token column in double precision."""
    return pl.col(column).cast(pl.List(pl.Float64))


def looked_at(weighing: Weighing) -> list[str]:
    """The columns whose values are checked: all that are needed, but for those that are made from such columns."""
    return [c for c in weighing.columns if weighing.teachers.routed or c not in MADE]


def check_values(frame: pl.DataFrame, weighing: Weighing, run: str = "RUN") -> None:
    """Raise DataError, naming row and column, if a needed column has no value, one that is not finite, or a token
    column is not as long as the others. Looked at are the columns of `looked_at` that are there."""
    for name in (c for c in looked_at(weighing) if c in frame.columns):
        if isinstance(frame.schema[name], pl.List):
            bad = None if _is_sound(frame[name], frame["length"]) else _bad_list(frame.lazy(), name)
        elif frame.schema[name].is_numeric() or frame.schema[name] == pl.Null:
            valued = pl.col(name).cast(pl.Float64).is_finite().fill_null(False)
            bad = next(((row, "has no value") for row in frame.filter(~valued)[ROW].head(1)), None)
        else:
            continue
        if bad is not None:
            addon = addon_of(name)
            fix = f"{added_by(addon, run) if addon else f'fire score {run}'} --redo"
            fix = f"{added_by(REWARD, run)}, for prompts that have an answer each" if name == REWARD else fix
            raise DataError(f"column {name!r} {bad[1]}", where=f"row {bad[0]}", fix=fix)


def _is_sound(lists: pl.Series, lengths: pl.Series) -> bool:
    """If a token column certainly is as it must be: `_bad_list` takes its time to say what is wrong."""
    if lists.null_count() or not (lists.list.len() == lengths).all():
        return False
    flat = flatten(lists)
    if flat.null_count() or not (flat.dtype.is_float() or flat.dtype.is_integer()):
        return False
    numbers = flat.to_numpy()
    return not len(flat) or bool(np.isfinite(numbers.min()) and np.isfinite(numbers.max()))


def _bad_list(lf: pl.LazyFrame, name: str) -> tuple[int, str] | None:
    """The first row in which a token column is not as it must be, and what is wrong with it."""
    inner = lf.collect_schema()[name].inner  # type: ignore[attr-defined]
    wrong = (pl.col(name).is_null() | (pl.col(name).list.len() != pl.col("length"))).fill_null(True)
    finite = pl.element().is_finite().fill_null(False)
    if isinstance(inner, pl.List):
        finite = pl.element().list.eval(finite).list.all() & (pl.element().list.len() > 0)
        sizes = pl.col(name).list.eval(pl.element().list.len().n_unique())
        wrong = wrong | (sizes.list.first() > 1).fill_null(False)
    if inner.is_numeric() or isinstance(inner, pl.List):
        wrong = wrong | ~pl.col(name).list.eval(finite).list.all()
    bad = lf.filter(wrong).select(ROW, "length", n=pl.col(name).list.len()).head(1).collect()
    if not bad.height:
        return None
    row, length, n = bad.row(0)
    if n is not None and n != length:
        return row, f"has {n} elements where others have {length}"
    unequal = ", or lists of unequal length" if isinstance(inner, pl.List) else ""
    return row, f"holds a value that is not finite{unequal}"
