"""Optimizer steps streamed from the sealed shards of scores, weights and the teacher's top-k, zipped row by row.

The top-k is read for weights that have a forward-KL term, and for no others. Held in memory: the rows of the current
step, one shard, and one shard read ahead.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fire_data.batch import StepBatch
from fire_data.schemas.errors import DataError
from fire_data.schemas.manifest import Manifest
from fire_data.shards import Part, read_shard

Sealed = tuple[Part, Manifest]

_SCORES = ["prompt_ids", "response_ids", "student_logprob"]
_WEIGHTS = ["step", "keep", "coefficient"]
_TOPK = ["teacher_topk_ids", "teacher_topk_logprobs"]


def step_batches(
    scores: Sealed, weights: Sealed, first_step: int = 0, topk: Sealed | None = None
) -> Iterator[StepBatch]:
    """The round's steps from `first_step` on, in order; shards that lie wholly before it are not read.

    Args:
        topk: the addon with the teacher's top-k, for weights with a forward-KL term (`fkl_renormalise` in `fields`).

    Raises DamagedError for a damaged shard, DataError if the tables are not about the same trajectories, or if weights
    have a forward-KL term by their manifest or by their columns alone.
    """
    pending: list[pa.Table] = []
    renormalise = weights[1].fields.get("fkl_renormalise")
    assert (renormalise is None) == (topk is None)
    for table in _zipped(scores, weights, topk, _first_shard(weights[1], first_step)):
        steps = np.asarray(table["step"])
        edges = np.flatnonzero(np.diff(steps)) + 1
        for a, b in zip([0, *edges], [*edges, len(steps)], strict=True):
            piece = table.slice(int(a), int(b - a))
            if pending and pending[0]["step"][0] != piece["step"][0]:
                yield from _batch(pending, first_step, renormalise)
                pending = []
            pending.append(piece)
    if pending:
        yield from _batch(pending, first_step, renormalise)


def _first_shard(weights: Manifest, first_step: int) -> int:
    """The shard that holds the first row of a step."""
    row = first_step * (weights.fields["batch_size"] or 0)
    for i, receipt in enumerate(weights.shards):
        if row < receipt.rows:
            return i
        row -= receipt.rows
    return len(weights.shards)


def _zipped(scores: Sealed, weights: Sealed, topk: Sealed | None, first: int) -> Iterator[pa.Table]:
    if topk is not None and [r.rows for r in topk[1].shards] != [r.rows for r in scores[1].shards]:
        raise DataError("addons and scores are about different trajectories", where=topk[0].label, fix=_redo(topk))

    def load(i: int) -> pa.Table:
        table = read_shard(scores[0], scores[1].shards[i], ["trajectory_id", *_SCORES])
        right = read_shard(weights[0], weights[1].shards[i])
        table = _beside(table, right, [*_WEIGHTS, *_optional(weights, right.column_names, i)], weights, i)
        if topk is not None:
            right = read_shard(topk[0], topk[1].shards[i], ["trajectory_id", *_TOPK])
            table = _beside(table, right, _TOPK, topk, i)
        return table

    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(load, first) if first < len(weights[1].shards) else None
        for i in range(first, len(weights[1].shards)):
            assert ahead is not None
            table = ahead.result()
            ahead = pool.submit(load, i + 1) if i + 1 < len(weights[1].shards) else None
            yield table


def _beside(table: pa.Table, right: pa.Table, columns: list[str], source: Sealed, i: int) -> pa.Table:
    """`table` with columns of another table of the same shard. Raises DataError if the rows are other trajectories."""
    if not table["trajectory_id"].equals(right["trajectory_id"]):
        where = f"{source[0].label}, shard {source[1].shards[i].shard}"
        raise DataError(
            f"{source[0].stage} and scores are about different trajectories", where=where, fix=_redo(source)
        )
    for name in columns:
        table = table.append_column(name, right[name])
    return table


def _optional(weights: Sealed, names: list[str], i: int) -> list[str]:
    """The optional columns of weights that are executed. Raises DataError if a forward-KL term is only half there."""
    column, field = "fkl_coefficient" in names, weights[1].fields.get("fkl_renormalise") is not None
    if column != field:
        has, lacks = ("a column fkl_coefficient", "fkl_renormalise in the manifest")[:: 1 if column else -1]
        where = f"{weights[0].label}, shard {weights[1].shards[i].shard}"
        raise DataError(f"the forward-KL term has {has}, but not {lacks}", where=where, fix=_redo(weights))
    return [c for c in ("token_keep", "fkl_coefficient") if c in names]


def _redo(source: Sealed) -> str:
    return f"{source[0].command} --redo"


def _batch(pieces: list[pa.Table], first_step: int, renormalise: bool | None) -> Iterator[StepBatch]:
    table = pa.concat_tables(pieces)
    step = table["step"][0].as_py()
    if step < first_step:
        return
    keep = table["keep"]
    if "token_keep" in table.column_names:
        counts = [int(x.sum()) for x in _arrays(table["token_keep"])]
    else:
        counts = pc.list_value_length(table["response_ids"]).to_pylist()
    kept = sum(n for n, k in zip(counts, keep.to_pylist(), strict=True) if k)
    second: dict[str, Any] = {}
    if renormalise is not None:
        ids, logprobs = (_lists(table[name], name, f"step {step}") for name in _TOPK)
        second = {"fkl_coefficient": _arrays(table["fkl_coefficient"]), "fkl_renormalise": renormalise}
        second |= {"topk_ids": ids, "topk_logprob": logprobs}
    yield StepBatch(
        step=step,
        prompt_ids=_arrays(table["prompt_ids"]),
        response_ids=_arrays(table["response_ids"]),
        old_logprob=_arrays(table["student_logprob"]),
        coefficient=_arrays(table["coefficient"]),
        kept_tokens=kept,
        **second,
    )


def _arrays(column: pa.ChunkedArray) -> list[Any]:
    """The rows of a list column as numpy arrays."""
    array = column.combine_chunks()
    return _cut(array, array.flatten().to_numpy(zero_copy_only=False))


def _lists(column: pa.ChunkedArray, name: str, where: str) -> list[Any]:
    """The rows of a column with one list per token as numpy arrays [T, K]. Raises DataError for lists of unequal k."""
    array = column.combine_chunks()
    tokens = array.flatten()
    sizes = np.asarray(pc.list_value_length(tokens))
    if (sizes != sizes[:1]).any():
        text = f"{name} has lists of {sizes.min()} to {sizes.max()} candidates where one number is expected"
        raise DataError(text, where=where, fix="fire score RUN --round N --add topk --redo")
    values = tokens.flatten().to_numpy(zero_copy_only=False)
    return _cut(array, values.reshape(len(sizes), sizes[0] if len(sizes) else 1))


def _cut(array: pa.ListArray, values: Any) -> list[Any]:
    """The flat values of a list array, row by row."""
    offsets = array.offsets.to_numpy() - array.offsets[0].as_py()
    return [values[a:b] for a, b in itertools.pairwise(offsets)]
