"""Weighing with every rule: the stage over one sealed table, against a raw copy of the columns that rule involves.

The scores are synthetic and made once under `--folder`; a second call with the same sizes takes them up. `copy` reads
with pyarrow the token columns that the rule reads and writes as many float lists as its weights have, as `weigh.py`
describes. Flat memory: compare the MiB of two calls whose `--shards` differ.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import measure
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from weigh import synthetic

from fire_data.create import init_run
from fire_data.rules import RULES, make_rule
from fire_data.run import Run, open_run
from fire_data.schemas.manifest import Shard
from fire_data.schemas.tables import ADDONS, SCORES, addon_of, conform
from fire_data.shards import read_shard, sealed
from fire_data.stages import Stage, plan_shards, run_stage
from fire_data.steps.weigh import weigh

ALL = ",".join(n for n in RULES if n != "expression")
SIZES: measure.Sizes = {
    "shards": (20, 2, "shards"),
    "rows": (2000, 8, "trajectories of a shard"),
    "length": (500, 16, "mean length of a response, tokens"),
    "topk": (4, 2, "most likely tokens in the top-k columns"),
    "batch_size": (64, 4, "train.batch_size"),
    "rules": (ALL, "fire,tip,ta-opd,eopd,exopd", "names, separated by commas"),
    "folder": ("", "", "where the run directory is kept; default: a temporary one"),
}
GROUP = 4  # samples of a prompt


def main() -> None:
    options = measure.parse(__doc__ or "", SIZES)
    kept = bool(options.folder)
    if not options.worker and not kept:
        options.folder = tempfile.mkdtemp()
        sys.argv += ["--folder", options.folder]
    try:
        if not options.worker:
            make_table(options)
        groups = {name: ["fire", "copy"] for name in options.rules.split(",")}
        measure.main(__doc__ or "", SIZES, groups, prepare)
    finally:
        if not options.worker and not kept:
            shutil.rmtree(options.folder)


def make_table(options: argparse.Namespace) -> Run:
    """The run directory with sealed scores and addons; what is there is left as it is."""
    root = Path(options.folder) / f"{options.shards}-{options.rows}-{options.length}-{options.topk}"
    if not (root / "fire.yaml").exists():
        init_run(root, {"student": {"model": "none"}, "train": {"batch_size": options.batch_size},
                        "rollout": {"n": GROUP}})  # fmt: skip
    run = open_run(root)
    plan = plan_shards(options.shards * options.rows, options.rows)
    made = {"made": "synthetic", "rollouts": "synthetic"}
    run_stage(Stage(run.part("scores", 0), made, plan), lambda s: scores(s, options.length))
    for name in ADDONS:
        run_stage(Stage(run.part("addons", 0, name), made, plan), lambda s, n=name: addon(run, s, n, options.topk))
    return run


def scores(shard: Shard, mean_length: int) -> pa.Table:
    """Synthetic scores with rewards, groups of samples and some truncated responses."""
    table = synthetic(shard, mean_length)
    rng = np.random.default_rng(shard.start + 1)
    rows = np.arange(shard.start, shard.stop)
    changed = {
        "prompt_id": [f"p{i // GROUP}" for i in rows],
        "sample": (rows % GROUP).astype(np.int32),
        "reward": rng.integers(0, 2, len(rows)).astype(np.float32),
        "finish_reason": np.where(rng.random(len(rows)) < 0.1, "length", "stop"),
    }
    for name, values in changed.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(values))
    return conform(table, "scores", "synthetic scores")


def addon(run: Run, shard: Shard, name: str, k: int) -> pa.Table:
    """Synthetic columns of an addon, row-aligned with the scores."""
    receipt = next(r for r in sealed(run.part("scores", 0)).shards if r.shard == shard.name)
    table = read_shard(run.part("scores", 0), receipt, ["trajectory_id", "response_ids"])
    offsets = table["response_ids"].combine_chunks().offsets
    tokens = pc.sum(pc.list_value_length(table["response_ids"])).as_py()
    rng = np.random.default_rng(shard.start + 2)
    columns: dict[str, Any] = {"trajectory_id": table["trajectory_id"]}
    for column in ADDONS[name]:
        if column.per != "token":
            columns[column.name] = rng.random(table.num_rows).astype(np.float32)
        elif "topk" not in column.name:
            columns[column.name] = pa.ListArray.from_arrays(
                offsets, pa.array(-rng.exponential(size=tokens), pa.float32())
            )
        else:
            ids = column.name.endswith("ids")
            # Descending logprobs; ids that differ within a token, half of them in both models' lists.
            lists = (
                (np.arange(k) + (k // 2 if "teacher" in column.name else 0))
                if ids
                else -np.cumsum(rng.exponential(size=(tokens, k)), axis=1) - 0.1
            )
            flat = pa.array(np.broadcast_to(lists, (tokens, k)).reshape(-1), pa.int32() if ids else pa.float32())
            inner = pa.ListArray.from_arrays(pa.array(np.arange(0, tokens * k + 1, k, dtype=np.int32)), flat)
            columns[column.name] = pa.ListArray.from_arrays(offsets, inner)
    return conform(pa.table(columns), f"addons/{name}", "synthetic columns")


def prepare(group: str, case: str, options: argparse.Namespace) -> measure.Work:
    """`fire weigh` with the rule `group`, or the copy of its columns."""
    run = make_table(options)
    rule = make_rule(group)
    chosen = open_run(run.root, (f"weigh.rule={group}", f"weigh.name={group}"))
    manifest = sealed(run.part("scores", 0))
    tokens = sum(receipt.tokens for receipt in manifest.shards)
    per_token = {c.name for c in SCORES if c.per == "token"}
    read = [c for c in rule.columns if c in per_token] or ["student_logprob", "teacher_logprob"]
    extra: dict[str, list[str]] = {}
    for column in rule.columns:
        if (name := addon_of(column)) is not None:
            extra.setdefault(name, []).append(column)
    written = 3 + ("mask" in rule.changes) + ("forward KL" in rule.changes)

    def fire() -> None:
        for folder in (run.root, run.root / ".fire" / "receipts", run.root / ".fire" / "manifests"):
            shutil.rmtree(folder / "weights" / group, ignore_errors=True)
        weigh(chosen, 0)

    def copy() -> None:
        for receipt in manifest.shards:
            table = pq.read_table(run.part("scores", 0).file(receipt.shard), columns=["trajectory_id", *read])
            for name, columns in extra.items():
                pq.read_table(run.part("addons", 0, name).file(receipt.shard), columns=columns)
            value = table[next((c for c in read if pa.types.is_floating(table[c].type.value_type)), read[0])]
            names = [f"float{i}" for i in range(written)]
            out = pa.table({"trajectory_id": table["trajectory_id"], **dict.fromkeys(names, value)})
            encoded: Any = [f"{n}.list.element" for n in names]
            pq.write_table(
                out, run.root / "copy.parquet", compression="zstd", use_dictionary=["trajectory_id"],
                use_byte_stream_split=encoded,
            )  # fmt: skip

    def work() -> measure.Done:
        {"fire": fire, "copy": copy}[case]()
        return measure.Done(tokens)

    return work


if __name__ == "__main__":
    main()
