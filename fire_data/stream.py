"""Optimizer steps streamed from the sealed shards of scores and weights, zipped row by row.

Held in memory: the rows of the current step, one shard, and one shard read ahead.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fire_data.schemas.errors import DataError
from fire_data.schemas.manifest import Manifest
from fire_data.shards import Part, read_shard
from fire_data.training import StepBatch

_SCORES = ["trajectory_id", "prompt_ids", "response_ids", "student_logprob"]
_WEIGHTS = ["trajectory_id", "step", "keep", "coefficient"]


def step_batches(
    scores: tuple[Part, Manifest], weights: tuple[Part, Manifest], first_step: int = 0
) -> Iterator[StepBatch]:
    """The round's steps from `first_step` on, in order; shards that lie wholly before it are not read.

    Raises DamagedError for a damaged shard, DataError if the two tables are not about the same trajectories.
    """
    pending: list[pa.Table] = []
    for table in _zipped(scores, weights, _first_shard(weights[1], first_step)):
        steps = np.asarray(table["step"])
        edges = np.flatnonzero(np.diff(steps)) + 1
        for a, b in zip([0, *edges], [*edges, len(steps)], strict=True):
            piece = table.slice(int(a), int(b - a))
            if pending and pending[0]["step"][0] != piece["step"][0]:
                yield from _batch(pending, first_step)
                pending = []
            pending.append(piece)
    if pending:
        yield from _batch(pending, first_step)


def _first_shard(weights: Manifest, first_step: int) -> int:
    """The shard that holds the first row of a step."""
    row = first_step * (weights.fields["batch_size"] or 0)
    for i, receipt in enumerate(weights.shards):
        if row < receipt.rows:
            return i
        row -= receipt.rows
    return len(weights.shards)


def _zipped(scores: tuple[Part, Manifest], weights: tuple[Part, Manifest], first: int) -> Iterator[pa.Table]:
    def load(i: int) -> pa.Table:
        left = read_shard(scores[0], scores[1].shards[i], _SCORES)
        right = read_shard(weights[0], weights[1].shards[i])
        if not left["trajectory_id"].equals(right["trajectory_id"]):
            where = f"{weights[0].label}, shard {weights[1].shards[i].shard}"
            raise DataError("weights and scores are about different trajectories", where=where, fix=weights[0].command)
        columns = [*_WEIGHTS[1:], *(c for c in ("token_keep",) if c in right.column_names)]
        for name in columns:
            left = left.append_column(name, right[name])
        return left

    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(load, first) if first < len(weights[1].shards) else None
        for i in range(first, len(weights[1].shards)):
            assert ahead is not None
            table = ahead.result()
            ahead = pool.submit(load, i + 1) if i + 1 < len(weights[1].shards) else None
            yield table


def _batch(pieces: list[pa.Table], first_step: int) -> Iterator[StepBatch]:
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
    yield StepBatch(
        step=step,
        prompt_ids=_arrays(table["prompt_ids"]),
        response_ids=_arrays(table["response_ids"]),
        old_logprob=_arrays(table["student_logprob"]),
        coefficient=_arrays(table["coefficient"]),
        kept_tokens=kept,
    )


def _arrays(column: pa.ChunkedArray) -> list[Any]:
    """The rows of a list column as numpy arrays."""
    array = column.combine_chunks()
    offsets = array.offsets.to_numpy() - array.offsets[0].as_py()
    values = array.flatten().to_numpy(zero_copy_only=False)
    return [values[a:b] for a, b in itertools.pairwise(offsets)]
