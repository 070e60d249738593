"""The tables as pyarrow schemas with units in field metadata, and `conform()`, which names the row and column at fault.

One row per trajectory. Token columns are lists with one element per token of `response_ids`; logprobs and entropies
are in nats, over the full real vocabulary; the top-k columns have a list of k per token. Columns that only some
engines can give are optional: absent, never empty. `FORMAT` is written into every file; newer code reads older formats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .config import ADDED_TEACHER
from .errors import DataError

FORMAT = 1
PRECISION = "precision"  # key of a field's metadata, where its numbers were rounded

_RANK = "1 + tokens strictly more likely"
_TEXT, _I32, _F32, _F64, _BOOL = pa.string(), pa.int32(), pa.float32(), pa.float64(), pa.bool_()
MESSAGES = pa.list_(pa.struct([pa.field("role", _TEXT), pa.field("content", _TEXT)]))
IDS = pa.list_(pa.int32())
FLOATS = pa.list_(pa.float32())
ID_LISTS = pa.list_(IDS)
FLOAT_LISTS = pa.list_(FLOATS)


@dataclass(frozen=True)
class Column:
    """One column: its Arrow type, unit, shape and meaning. `per` is 'row', 'token' (of the response) or 'prompt'."""

    name: str
    type: pa.DataType
    meaning: str
    unit: str = ""
    per: str = "row"
    nullable: bool = False
    optional: bool = False

    @property
    def reducible(self) -> bool:
        """If `score.precision: reduced` rounds it. Not what training and `rollout_is` take ratios of: an error of a
        logprob is one of the probability's exponent."""
        numbers = self.per == "token" and self.unit == "nats" and self.type in (FLOATS, FLOAT_LISTS)
        return numbers and self.name not in ("rollout_logprob", "student_logprob")

    def field(self, more: dict[str, str] | None = None) -> pa.Field:
        shape = {"row": "one per trajectory", "token": "one per response token", "prompt": "one per prompt token"}[
            self.per
        ]
        metadata = {"meaning": self.meaning, "unit": self.unit, "shape": shape, **(more or {})}
        return pa.field(self.name, self.type, nullable=self.nullable, metadata=metadata)


def _row(name: str, type_: pa.DataType, meaning: str, unit: str = "", **kwargs: bool) -> Column:
    return Column(name, type_, meaning, unit, "row", **kwargs)


def _token(name: str, meaning: str, unit: str = "nats", type_: pa.DataType = FLOATS, **kwargs: bool) -> Column:
    return Column(name, type_, meaning, unit, "token", **kwargs)


REWARD = "reward"  # the addon that `fire verify` makes, without a model

_NAMED = _row("trajectory_id", _TEXT, "the row of scores this belongs to")

PROMPTS = (
    _row("prompt_id", _TEXT, "explicit, or a hash of messages and teacher"),
    _row("messages", MESSAGES, "the conversation the student answers", nullable=True),
    _row("prompt", _TEXT, "plain text instead of messages", nullable=True),
    _row("answer", _TEXT, "what a verifier compares with", nullable=True),
    _row("teacher", _TEXT, "route to a teacher", nullable=True),
    _row("extra", _TEXT, "all other fields as JSON", nullable=True),
)

ROLLOUTS = (
    _row("trajectory_id", _TEXT, "hash of seed, round, prompt_id and sample"),
    _row("prompt_id", _TEXT, "prompt of this trajectory"),
    _row("round", _I32, "refresh round", "count from 0"),
    _row("sample", _I32, "sample of the prompt within the round", "count from 0"),
    _row("messages", MESSAGES, "the conversation the student answers", nullable=True),
    Column("prompt_ids", IDS, "the student's prompt", "token id", "prompt"),
    _row("response", _TEXT, "decoded response without special tokens"),
    _token("response_ids", "the response as sampled, end token included", "token id", IDS),
    _row("finish_reason", _TEXT, "stop: the student ended it; length: cut by max_new_tokens"),
    _token("rollout_logprob", "logprob under the distribution sampled from (after temperature, top-p, top-k)"),
    _row("answer", _TEXT, "what a verifier compares with", nullable=True),
    _row("teacher", _TEXT, "route to a teacher", nullable=True),
    _row("reward", _F32, "verifier outcome", "0 to 1", nullable=True),
    _row("extra", _TEXT, "other prompt fields as JSON", nullable=True),
)

SIGNALS = (
    _token("student_logprob", "log p_S of the sampled token"),
    _token("student_entropy", "entropy of p_S"),
    _token("teacher_logprob", "log p_T of the sampled token"),
    _token("teacher_entropy", "entropy of p_T"),
    _token("reverse_kl", "KL(p_S || p_T)", optional=True),
    _token("forward_kl", "KL(p_T || p_S)", optional=True),
    _token("student_max_logprob", "largest log p_S"),
    _token("teacher_max_logprob", "largest log p_T"),
    _token("student_top1_id", "the student's most likely token", "token id", IDS),
    _token("teacher_top1_id", "the teacher's most likely token", "token id", IDS),
    _token("student_rank", "rank of the sampled token under the student", _RANK, IDS, optional=True),
    _token("teacher_rank", "rank of the sampled token under the teacher", _RANK, IDS, optional=True),
    _token(
        "teacher_rank_of_student_top1",
        "rank of the student's top-1 under the teacher",
        _RANK,
        IDS,
        optional=True,
    ),
)
# Both distributions at once: from an engine that holds the logits of both models.
JOINT = ("reverse_kl", "forward_kl", "teacher_rank_of_student_top1")

# The kind of an entropy from some of the tokens: a lower bound. The masses say how much probability those hold.
TOPK_BOUND = "topk-lower-bound"
MASSES = tuple(
    _token(f"{who}_entropy_mass", f"probability of the tokens {who}_entropy is a bound from", "0 to 1", optional=True)
    for who in ("student", "teacher")
)

FLOAT_SIGNALS = tuple(c.name for c in SIGNALS if c.type == FLOATS)

SUMMARIES = (
    _row("length", _I32, "response tokens", "tokens"),
    *(
        _row(f"{name}_sum", _F64, f"sum of {name} over the response", "nats", optional=name in JOINT)
        for name in FLOAT_SIGNALS
    ),
    *(
        _row(f"{name}_max", _F64, f"maximum of {name} over the response", "nats", nullable=True, optional=name in JOINT)
        for name in FLOAT_SIGNALS
    ),
    _row("entropy_product_sum", _F64, "sum of teacher_entropy * student_entropy", "nats squared"),
)

SCORES = (
    *ROLLOUTS,
    *SIGNALS,
    *MASSES,
    Column("teacher_prompt_ids", IDS, "the teacher's prompt when it differs", "token id", "prompt", nullable=True),
    *SUMMARIES,
)

WEIGHTS = (
    _NAMED,
    _row("step", _I32, "optimizer step within the round", "count from 0"),
    _row("keep", _BOOL, "false: dropped by the filter"),
    _row("drop_reason", _TEXT, "why it was dropped", nullable=True),
    _token("weight", "token weight, normalised as the rule says", "factor"),
    _token("advantage", "what the token is rewarded with before weighting"),
    _token("coefficient", "what the trainer executes: weight, advantage, masks and denominator", "nats / denominator"),
    _token("token_keep", "false: token masked by the rule", "", pa.list_(_BOOL), optional=True),
    _token("rollout_is", "min(exp(student_logprob - rollout_logprob), cap)", "factor", optional=True),
    _token(
        "fkl_coefficient",
        "coefficient of the forward-KL term on the teacher's top-k",
        "1 / denominator",
        optional=True,
    ),
)

# Columns added to scores on request, each group in a table of its own, row by row like the scores.
ADDONS: dict[str, tuple[Column, ...]] = {
    "topk": (
        _token("student_topk_ids", "the k most likely tokens of p_S, best first", "token id", ID_LISTS),
        _token("student_topk_logprobs", "their log p_S", "nats", FLOAT_LISTS),
        _token("teacher_topk_ids", "the k most likely tokens of p_T, best first", "token id", ID_LISTS),
        _token("teacher_topk_logprobs", "their log p_T", "nats", FLOAT_LISTS),
        _token("teacher_logprob_on_student_topk", "log p_T of student_topk_ids", "nats", FLOAT_LISTS),
        _token("student_logprob_on_teacher_topk", "log p_S of teacher_topk_ids", "nats", FLOAT_LISTS),
    ),
    "base": (_token("base_logprob", "log p of the sampled token under the reference model"),),
    "pass-rate": (_row("teacher_pass_rate", _F32, "share of the teacher's own answers that are right", "0 to 1"),),
    REWARD: (
        _row("reward", _F32, "verifier outcome, in place of that of the rollouts", "0 to 1", nullable=True),
        _row("extracted", _TEXT, "the answer found in the response", nullable=True),
        _row("verdict", _TEXT, "right, wrong, no answer, timeout, memory or ungraded"),
    ),
}


def addon_columns(name: str) -> tuple[Column, ...] | None:
    """The columns of an addon: a fixed group, or `teacher.NAME`, one teacher of several. None: there is no such."""
    teacher = name.removeprefix(ADDED_TEACHER)
    return _teacher_columns(teacher) if teacher and teacher != name else ADDONS.get(name)


def _teacher_columns(name: str) -> tuple[Column, ...]:
    ids = f"prompt of teacher {name} when it differs from the student's"
    return (
        _token(f"teacher_logprob.{name}", f"log p of the sampled token under teacher {name}"),
        _token(f"teacher_entropy.{name}", f"entropy of teacher {name}"),
        _token(f"teacher_entropy_mass.{name}", "probability of the tokens it is a bound from", "0 to 1", optional=True),
        Column(f"teacher_prompt_ids.{name}", IDS, ids, "token id", "prompt", nullable=True),
    )


EVALS = (
    _row("prompt_id", _TEXT, "held-out prompt"),
    _row("mode", _TEXT, "greedy or sampled"),
    _row("sample", _I32, "sample of the prompt", "count from 0"),
    _row("response", _TEXT, "decoded response"),
    _row("extracted", _TEXT, "the answer found in it", nullable=True),
    _row("vote", _TEXT, "what the answer counts as in a majority vote: numbers by their value", nullable=True),
    _row("answer", _TEXT, "the right answer", nullable=True),
    _row("reward", _F32, "verifier outcome", "0 to 1"),
    _row("verdict", _TEXT, "right, wrong, no answer, timeout or memory", nullable=True),
    _row("length", _I32, "response tokens", "tokens"),
    _row("finish_reason", _TEXT, "stop or length"),
)

# What one model says about given responses, before it is known which model it was.
EVALUATED = (
    _token("logprob", "log p of the sampled token"),
    _token("entropy", "entropy of p"),
    _token("max_logprob", "largest log p"),
    _token("top1_id", "the most likely token", "token id", IDS),
    _token("rank", "rank of the sampled token", _RANK, IDS, optional=True),
    _token("entropy_mass", "probability of the tokens that the entropy is a bound from", "0 to 1", optional=True),
)

TABLES: dict[str, tuple[Column, ...]] = {
    "prompts": PROMPTS,
    "rollouts": ROLLOUTS,
    "scores": SCORES,
    "weights": WEIGHTS,
    "evals": EVALS,
    **{f"addons/{name}": (_NAMED, *columns) for name, columns in ADDONS.items()},
}


def columns_of(table: str) -> tuple[Column, ...]:
    """The columns of a table of `TABLES`, or of the addon of a teacher, `addons/teacher.NAME`."""
    if table in TABLES:
        return TABLES[table]
    return (_NAMED, *(addon_columns(table.removeprefix("addons/")) or ()))


def addon_of(column: str) -> str | None:
    """The addon that holds a column; None for columns of other tables. `added_by` is the command that makes it."""
    teacher = column.partition(".")[2]
    if teacher and any(column == c.name for c in _teacher_columns(teacher)):
        return f"{ADDED_TEACHER}{teacher}"
    return next((name for name, columns in ADDONS.items() if column in [c.name for c in columns]), None)


def added_by(addon: str, run: str) -> str:
    """The command that makes an addon. `run`: the run as the command line takes it, with --round where it matters."""
    return f"fire verify {run}" if addon == REWARD else f"fire score {run} --add {addon}"


def arrow_schema(table: str) -> pa.Schema:
    """The Arrow schema of a table, optional columns included, with unit and shape in the field metadata."""
    fields = [c.field() for c in columns_of(table)]
    return pa.schema(fields, metadata={"fire.table": table, "fire.format": str(FORMAT)})


def conform(data: pa.Table, table: str, where: str, fix: str | None = None) -> pa.Table:
    """Return `data` with exactly the columns, order and types of `table`, or raise DataError naming row and column.

    `fix`: what to do about a number that is not finite.

    Checked: required columns, types, nulls, token columns as long as `response_ids` (or as the first of them, which
    stands for it in tables without), floats that are not finite, and that the lists of a top-k row have one length.
    """
    columns = [c for c in columns_of(table) if c.name in data.column_names or not c.optional]
    twice = [c.name for c in columns if data.column_names.count(c.name) > 1]
    if twice:
        raise DataError(f"column {twice[0]!r} is there twice", where=where)
    missing = [c.name for c in columns if c.name not in data.column_names and not c.nullable]
    if missing:
        raise DataError(f"column {missing[0]!r} is missing; there are: {', '.join(data.column_names)}", where=where)
    arrays = [_column(data, c, where, fix) for c in columns]
    fields = [c.field(_precision(data, c.name)) for c in columns]
    schema = pa.schema(fields, metadata={"fire.table": table, "fire.format": str(FORMAT)})
    result = pa.Table.from_arrays(arrays, schema=schema)
    _check_lengths(result, columns, where)
    return result


def _precision(data: pa.Table, name: str) -> dict[str, str]:
    """What a column's metadata say of numbers that were rounded, which goes where they go."""
    metadata = (data.schema.field(name).metadata or {}) if name in data.column_names else {}
    return {PRECISION: metadata[PRECISION.encode()].decode()} if PRECISION.encode() in metadata else {}


def _column(data: pa.Table, column: Column, where: str, fix: str | None) -> pa.ChunkedArray:
    if column.name not in data.column_names:
        return pa.chunked_array([pa.nulls(data.num_rows, column.type)])
    array = data[column.name]
    if array.type != column.type:
        try:
            array = array.cast(column.type)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            text = f"column {column.name!r} is {array.type}, not {column.type}: {error}"
            raise DataError(text, where=where) from None
    if array.null_count and not column.nullable:
        row = pc.index(pc.is_null(array), True).as_py()
        raise DataError(f"column {column.name!r} has no value", where=f"{where}, row {row}")
    if column.per != "row":
        _check_values(array, column, where, fix)
    elif pa.types.is_floating(array.type):
        bad = pc.fill_null(pc.invert(pc.is_finite(array)), False)
        if pc.any(bad).as_py():
            row = pc.index(bad, True).as_py()
            raise DataError(f"column {column.name!r} holds {array[row].as_py()}", where=f"{where}, row {row}", fix=fix)
    return array


def _check_values(array: pa.ChunkedArray, column: Column, where: str, fix: str | None) -> None:
    """No null and no NaN or infinity inside a list column; the lists in a row of lists of lists have one length."""
    flat = pc.list_flatten(array)
    if flat.null_count == 0 and not pa.types.is_list(flat.type) and all(map(_all_finite, flat.chunks)):
        return
    bad = pc.is_null(flat)
    what = None
    if pa.types.is_list(flat.type):
        bad, what = _bad_lists(array, flat, bad)
    elif pa.types.is_floating(flat.type):
        bad = pc.or_(bad, pc.fill_null(pc.invert(pc.is_finite(flat)), True))
    if pc.any(bad).as_py():
        at = pc.index(bad, True).as_py()
        row = pc.list_parent_indices(array)[at].as_py()
        start = sum(len(x) for x in array.slice(0, row).to_pylist() if x is not None)
        value = what(at) if what else flat[at].as_py()
        text = f"column {column.name!r} holds {value} at token {at - start}"
        raise DataError(text, where=f"{where}, row {row}", fix=fix)


def _all_finite(numbers: pa.Array) -> bool:
    """If there is no NaN or infinity among numbers without nulls: the extremes of numpy are NaN where there is one."""
    if not pa.types.is_floating(numbers.type) or not len(numbers):
        return True
    values = numbers.to_numpy(zero_copy_only=True)
    return bool(np.isfinite(values.min()) and np.isfinite(values.max()))


def _bad_lists(
    array: pa.ChunkedArray, flat: pa.ChunkedArray, bad: pa.ChunkedArray
) -> tuple[pa.ChunkedArray, Callable[[int], object]]:
    """Which of the lists in a column of lists of lists hold no number or are of another length than the row's first."""
    numbers = pc.list_flatten(flat)
    wrong = pc.is_null(numbers)
    if pa.types.is_floating(numbers.type):
        wrong = pc.or_(wrong, pc.fill_null(pc.invert(pc.is_finite(numbers)), True))
    parents = pc.list_parent_indices(flat).filter(wrong)
    mask = np.zeros(len(flat), dtype=np.bool_)
    mask[parents.to_numpy()] = True
    lengths = pc.fill_null(pc.list_value_length(flat), 0).to_numpy()
    counts = pc.fill_null(pc.list_value_length(array), 0).to_numpy()
    starts = np.cumsum(counts) - counts
    first = np.repeat(lengths[starts[counts > 0]], counts[counts > 0])

    def what(at: int) -> object:
        values = flat[at].as_py()
        if values is None or mask[at]:
            return next((v for v in values or [None] if v is None or not math.isfinite(v)), None)
        return f"{len(values)} numbers where the row's first token has {first[at]}"

    return pc.or_(bad, pa.chunked_array([pa.array(mask | (lengths != first))])), what


def _check_lengths(data: pa.Table, columns: list[Column], where: str) -> None:
    per_token = [c.name for c in columns if c.per == "token"]
    if not per_token:
        return
    leader = "response_ids" if "response_ids" in per_token else per_token[0]
    expected = pc.list_value_length(data[leader])
    for name in per_token:
        differs = pc.not_equal(pc.list_value_length(data[name]), expected)
        if pc.any(differs).as_py():
            row = pc.index(differs, True).as_py()
            have, want = pc.list_value_length(data[name])[row].as_py(), expected[row].as_py()
            text = f"column {name!r} has {have} elements where {leader!r} has {want}"
            raise DataError(text, where=f"{where}, row {row}")
