"""Weighing: the stage `fire weigh` over a sealed run directory, against a raw copy of the columns involved.

The scores are synthetic. `copy` reads with pyarrow the token columns that the rule reads and writes as many float lists
as weights has, with the same encoding and compression, and does no arithmetic: no receipts, hashes, checksums, fsync,
validation or statistics. So it is a limit, not a peer. Response tokens per second, whole stage.
"""

from __future__ import annotations

import argparse
import atexit
import shutil
import tempfile
from pathlib import Path
from typing import Any

import measure
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fire_data.create import init_run
from fire_data.schemas.manifest import Shard
from fire_data.schemas.tables import FLOATS, SCORES, conform
from fire_data.scoring import summarise
from fire_data.stages import Stage, plan_shards, run_stage
from fire_data.steps.weigh import weigh

SIZES: measure.Sizes = {
    "shards": (4, 2, "shards"),
    "rows": (512, 8, "trajectories of a shard"),
    "length": (512, 16, "mean length of a response, tokens"),
    "rule": ("fire", "fire", "weigh.rule"),
    "batch_size": (64, 4, "train.batch_size"),
    "folder": ("", "", "where the run directory is made; default: a temporary one"),
}
GROUPS = {"stage": ["fire", "copy"]}
READ = ("student_logprob", "student_entropy", "teacher_logprob", "teacher_entropy")
WRITTEN = ("weight", "advantage", "coefficient")


def prepare(group: str, case: str, options: argparse.Namespace) -> measure.Work:
    """A run directory with sealed scores, removed at the end."""
    root = Path(tempfile.mkdtemp(dir=options.folder or None))
    atexit.register(shutil.rmtree, root)
    values: dict[str, Any] = {"student": {"model": "none"}, "weigh": {"rule": options.rule}}
    run = init_run(root / "run", values | {"train": {"batch_size": options.batch_size}})
    plan = plan_shards(options.shards * options.rows, options.rows)
    sealed = run_stage(
        Stage(run.part("scores", 0), {"made": "synthetic"}, plan), lambda s: synthetic(s, options.length)
    )
    tokens = sum(receipt.tokens for receipt in sealed.shards)
    files = [run.part("scores", 0).file(shard.name) for shard in plan]

    def fire() -> None:
        for folder in (run.root, run.root / ".fire" / "receipts", run.root / ".fire" / "manifests"):
            shutil.rmtree(folder / "weights", ignore_errors=True)
        weigh(run, 0)

    def copy() -> None:
        for file in files:
            table = pq.read_table(file, columns=["trajectory_id", *READ])
            table = table.select([0, 1, 2, 3]).rename_columns(["trajectory_id", *WRITTEN])
            floats: Any = [f"{name}.list.element" for name in WRITTEN]
            target = root / file.name
            pq.write_table(
                table, target, compression="zstd", use_dictionary=["trajectory_id"], use_byte_stream_split=floats
            )

    def work() -> measure.Done:
        {"fire": fire, "copy": copy}[case]()
        return measure.Done(tokens)

    return work


def synthetic(shard: Shard, mean_length: int) -> pa.Table:
    """A table of scores with plausible numbers: half to one and a half of the mean length, logprobs of about -1 nat."""
    rng = np.random.default_rng(shard.start)
    rows = shard.stop - shard.start
    lengths = rng.integers(mean_length // 2, mean_length * 3 // 2 + 1, rows)
    offsets = pa.array(np.concatenate([[0], lengths.cumsum()]), pa.int32())
    columns: dict[str, Any] = {}
    for column in SCORES:
        if column.per == "token":
            floats = (rng.exponential(size=lengths.sum()) * (-1 if "logprob" in column.name else 1)).astype(np.float32)
            flat = floats if column.type == FLOATS else rng.integers(1, 1000, lengths.sum())
            columns[column.name] = pa.ListArray.from_arrays(offsets, pa.array(flat, column.type.value_type))
    numbers = [str(i) for i in range(shard.start, shard.stop)]
    columns |= {"trajectory_id": numbers, "prompt_id": numbers, "round": [0] * rows, "sample": [0] * rows}
    columns |= {"prompt_ids": [[1, 2, 3]] * rows, "response": [""] * rows, "finish_reason": ["stop"] * rows}
    return conform(summarise(pa.table(columns)), "scores", "synthetic scores")


if __name__ == "__main__":
    measure.main(__doc__, SIZES, GROUPS, prepare)
