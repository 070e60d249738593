"""Weighing: the stage `fire weigh` over a sealed run directory, against a raw copy of the columns involved.

The scores are synthetic: one shard is made, and the others are its rows under names of their own. `copy` reads with
pyarrow the token columns that the rule reads and writes as many float lists as weights has, with the settings that all
shards are written with, and does no arithmetic: no receipts, hashes, fsync, validation or statistics. So it is a limit,
not a peer. `copy of both` reads and writes as many columns as those together. `duckdb` is what one would write instead:
rule `fire` as two queries, the fit over all shards and the weights of one shard after the other, with equal
coefficients but no receipts, hashes or checks of what is read. Left out where DuckDB is not installed (extra `bench`),
and for other rules. Response tokens per second, whole stage.

With `--threads 1` a case may use one core only, so that making two shards at a time gains nothing; with 2, two.
Peak memory is that of the first repetition in a process of its own, on top of what was there when it began.
`--tokens 10,100` measures one size after the other, over as many shards as those millions of tokens need. The scores
are made once for all cases, take about 75 bytes a token of disk, and are removed at the end unless `--keep 1`.
"""

from __future__ import annotations

import argparse
import atexit
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fire_data.create import init_run
from fire_data.run import Run, open_run
from fire_data.schemas.manifest import Shard
from fire_data.schemas.tables import SCORES, conform
from fire_data.scoring import summarise
from fire_data.shards import is_sealed, sealed, write_parquet
from fire_data.stages import Stage, plan_shards, run_stage
from fire_data.steps.weigh import weigh

SIZES: measure.Sizes = {
    "tokens": ("10", "0", "millions of response tokens, about, separated by commas; 0: as many as --shards gives"),
    "shards": (4, 2, "shards, where --tokens is 0"),
    "rows": (2048, 8, "trajectories of a shard"),
    "length": (512, 16, "mean length of a response, tokens"),
    "rule": ("fire", "fire", "weigh.rule"),
    "batch_size": (64, 4, "train.batch_size"),
    "folder": ("", "", "where the scores are made; default: a temporary folder"),
    "keep": (0, 0, "1: leave the scores in --folder, and use what is there"),
}
DUCKDB = importlib.util.find_spec("duckdb") is not None
CASES = ["fire", "copy", "copy of both", *(["duckdb"] if DUCKDB else [])]
READ = ("student_logprob", "student_entropy", "teacher_logprob", "teacher_entropy")
WRITTEN = ("weight", "advantage", "coefficient")
MORE = ("reverse_kl", "forward_kl", "student_max_logprob")  # as many as are written


def main() -> None:
    """Make the scores, in a process that is not measured, and measure."""
    groups = _asked()
    if "--worker" in sys.argv:
        measure.main(__doc__ or "", SIZES, groups, prepare)
        return
    options = measure.parse(__doc__ or "", SIZES, groups)
    folder = Path(options.folder or tempfile.mkdtemp())
    sys.argv += ["--folder", str(folder)]  # for the workers
    made = [folder / group for group in options.only or groups]
    try:
        for place in made:
            scored(options, place)
        measure.main(__doc__ or "", SIZES, groups, prepare)
    finally:
        for place in made if not options.keep else ():
            shutil.rmtree(place, ignore_errors=True)
        if not options.folder:
            shutil.rmtree(folder)


def _asked() -> dict[str, list[str]]:
    """The groups, called after the millions of tokens they have, with their cases."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--tokens")
    parser.add_argument("--rule", default="fire")
    parser.add_argument("--smoke", action="store_true")
    given, _ = parser.parse_known_args()
    cases = [case for case in CASES if case != "duckdb" or given.rule == "fire"]
    return {f"{count} million": cases for count in (given.tokens or SIZES["tokens"][given.smoke]).split(",")}


def prepare(group: str, case: str, options: argparse.Namespace) -> measure.Work:
    """One case over the scores that were made for its group."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    pa.set_cpu_count(options.threads)
    run = scored(options, Path(options.folder) / group)
    source = sealed(run.part("scores", 0))
    tokens = sum(receipt.tokens for receipt in source.shards)
    files = [run.part("scores", 0).file(receipt.shard) for receipt in source.shards]
    copies = Path(tempfile.mkdtemp(dir=run.root))
    atexit.register(shutil.rmtree, copies, ignore_errors=True)

    def fire() -> None:
        for folder in (run.root, run.root / ".fire" / "receipts", run.root / ".fire" / "manifests"):
            shutil.rmtree(folder / "weights", ignore_errors=True)
        weigh(run, 0)

    def copy() -> None:
        for file in files:
            table = pq.read_table(file, columns=["trajectory_id", *READ])
            table = table.select([0, 1, 2, 3]).rename_columns(["trajectory_id", *WRITTEN])
            write_parquet(copies / file.name, table, "")

    def both() -> None:
        for file in files:
            table = pq.read_table(file, columns=["trajectory_id", *READ, *MORE])
            write_parquet(copies / file.name, table, "")

    def sql() -> None:
        duckdb_weights(files, copies, options)

    def work() -> measure.Done:
        {"fire": fire, "copy": copy, "copy of both": both, "duckdb": sql}[case]()
        made = {"fire": run.part("weights", 0, options.rule).folder, "duckdb": copies}.get(case)
        return measure.Done(tokens, witness(made) if made else {})

    return work


def witness(folder: Path) -> dict[str, float]:
    """The size of the coefficients, and the share of trajectories that is kept, of the first shard."""
    table = pq.read_table(sorted(folder.glob("*.parquet"))[0], columns=["keep", "coefficient"])
    coefficients = table["coefficient"].combine_chunks().flatten().to_numpy()
    kept = table["keep"].to_numpy().mean()
    return {"size": float(np.abs(coefficients, dtype=np.float64).mean()), "kept": float(kept)}


FIT = """
CREATE TEMP TABLE fitted AS
WITH named AS (
  SELECT (row_number() OVER () - 1) // {size} AS step, teacher_logprob_sum / length AS score, length,
    teacher_entropy_max AS t_max, student_entropy_max AS s_max,
    teacher_entropy_sum AS t, student_entropy_sum AS s, entropy_product_sum AS both_
  FROM read_parquet({files})
), limits AS (
  SELECT step, quantile_cont(score, 0.2) AS threshold, max(t_max) AS t_limit, max(s_max) AS s_limit
  FROM named GROUP BY step
)
SELECT step, threshold, t_limit, s_limit,
  sum(2 * length + 2 * s / s_limit - t / t_limit - both_ / (t_limit * s_limit)) / sum(length) AS mean,
  coalesce(sum(length) FILTER (score >= threshold), 0) AS counted
FROM named JOIN limits USING (step) GROUP BY ALL
"""
WEIGH = """
COPY (
  SELECT trajectory_id, step, keep, CASE WHEN keep THEN NULL ELSE 'below the quantile' END AS drop_reason,
    list_transform(tokens, x -> x.w) AS weight, list_transform(tokens, x -> x.a) AS advantage,
    list_transform(tokens, x -> CASE WHEN keep THEN (x.w * x.a / counted)::FLOAT ELSE 0 END) AS coefficient
  FROM (
    SELECT trajectory_id, step, teacher_logprob_sum / length >= threshold AS keep, counted,
      list_transform(list_zip(teacher_entropy, student_entropy, teacher_logprob, student_logprob), x -> {{
        'w': ((2 - x[1] / t_limit) * (1 + x[2] / s_limit) / mean)::FLOAT, 'a': x[3] - x[4]
      }}) AS tokens
    FROM (SELECT *, ({first} + file_row_number) // {size} AS step FROM read_parquet('{file}', file_row_number = true))
    JOIN fitted USING (step)
  )
) TO '{target}' (FORMAT parquet, COMPRESSION zstd, COMPRESSION_LEVEL 1)
"""


def duckdb_weights(files: list[Path], target: Path, options: argparse.Namespace) -> None:
    """Rule `fire` with its defaults, in SQL; the folder gets one file per shard."""
    duckdb: Any = importlib.import_module("duckdb")
    with duckdb.connect(config={"threads": options.threads, "preserve_insertion_order": True}) as database:
        database.execute(FIT.format(size=options.batch_size, files=[str(f) for f in files]))
        first = 0
        for file in files:
            place = {"first": first, "size": options.batch_size, "file": file, "target": target / file.name}
            database.execute(WEIGH.format(**place))
            first += options.rows


def scored(options: argparse.Namespace, folder: Path) -> Run:
    """The run directory, made unless it is there whole."""
    settings = (f"weigh.rule={options.rule}", f"train.batch_size={options.batch_size}")
    if (folder / "run").exists() and is_sealed((run := open_run(folder / "run", settings)).part("scores", 0)):
        return run
    shutil.rmtree(folder / "run", ignore_errors=True)
    values: dict[str, Any] = {"student": {"model": "none"}, "weigh": {"rule": options.rule}}
    run = init_run(folder / "run", values | {"train": {"batch_size": options.batch_size}})
    first = synthetic(Shard(name="00000", start=0, stop=options.rows), options.length)
    millions = float(folder.name.partition(" ")[0])
    shards = max(1, round(millions * 1e6 / options.rows / options.length)) if millions else options.shards

    def make(shard: Shard) -> pa.Table:
        names = pa.array([str(i) for i in range(shard.start, shard.stop)])
        table = first
        for column in ("trajectory_id", "prompt_id"):
            place = table.schema.get_field_index(column)
            table = table.set_column(place, table.schema.field(place), names)
        return table

    run_stage(
        Stage(run.part("scores", 0), {"made": "synthetic"}, plan_shards(shards * options.rows, options.rows)), make
    )
    return run


Numbers = Callable[[str, int, np.random.Generator], np.ndarray[Any, Any]]


def simple(name: str, count: int, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Numbers for a token column: logprobs of about -1 nat, ids and ranks below 1,000."""
    if name.endswith(("_id", "_ids", "rank", "_top1")):
        return rng.integers(1, 1000, count)
    return (rng.exponential(size=count) * (-1 if "logprob" in name else 1)).astype(np.float32)


def synthetic(shard: Shard, mean_length: int, numbers: Numbers = simple) -> pa.Table:
    """A table of scores with responses of half to one and a half of the mean length."""
    rng = np.random.default_rng(shard.start)
    rows = shard.stop - shard.start
    lengths = rng.integers(mean_length // 2, mean_length * 3 // 2 + 1, rows)
    offsets = pa.array(np.concatenate([[0], lengths.cumsum()]), pa.int32())
    columns: dict[str, Any] = {}
    for column in SCORES:
        if column.per == "token" and not column.name.endswith("_mass"):  # of an engine that has exact entropies
            flat = numbers(column.name, int(lengths.sum()), rng)
            columns[column.name] = pa.ListArray.from_arrays(offsets, pa.array(flat, column.type.value_type))
    numbers = [str(i) for i in range(shard.start, shard.stop)]
    columns |= {"trajectory_id": numbers, "prompt_id": numbers, "round": [0] * rows, "sample": [0] * rows}
    columns |= {"prompt_ids": [[1, 2, 3]] * rows, "response": [""] * rows, "finish_reason": ["stop"] * rows}
    return conform(summarise(pa.table(columns)), "scores", "synthetic scores")


if __name__ == "__main__":
    main()
