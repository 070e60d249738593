"""The results of an experiment as one table: a row for each cell and round, from sealed manifests alone.

`round` counts rounds trained, so 0 is the given student. Tokens and steps are sums up to there: `rollout_tokens` is
what was written and scored, `trained_tokens` is those of them that the rule keeps, in one pass. Accuracies are null for
rounds without an evaluation. `drift` is the KL estimate, in nats per token, between the student that wrote the round
and the one before the round's last step. `cpu_seconds` are those of one round, its evaluation included.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from fire_data import files, metrics
from fire_data.experiment.cells import cell_folder, found_cell
from fire_data.experiment.spec import ROUTED, TEACHER, Cell, Spec
from fire_data.prompts import read_prompts
from fire_data.run import Run
from fire_data.shards import is_sealed, read_manifest

Json = dict[str, Any]

SCHEMA: dict[str, Any] = {
    "world": pl.String, "setting": pl.String, "arm": pl.String, "rule": pl.String, "params": pl.String,
    "seed": pl.Int32, "round": pl.Int32, "steps": pl.Int64, "rollout_tokens": pl.Int64, "trained_tokens": pl.Int64,
    "greedy": pl.Float64, "sampled": pl.Float64, "retain_greedy": pl.Float64, "retain_sampled": pl.Float64,
    "response_length": pl.Float64, "truncated": pl.Float64, "kept_share": pl.Float64, "reverse_kl": pl.Float64,
    "drift": pl.Float64, "cpu_seconds": pl.Float64, "peak_mb": pl.Float64,
}  # fmt: skip

_WORLDS = "worlds_cpu_seconds"


def collect(spec: Spec, out: Path, cells: Iterable[Cell]) -> pl.DataFrame:
    """What is sealed of these cells; those that were not begun have no rows. Teachers have one row, of round 0."""
    rows: list[Json] = []
    several: dict[tuple[str, str, int], dict[str, Run | None]] = defaultdict(dict)
    for cell in cells:
        run = found_cell(out, cell)
        if run is not None:
            rows += _rows(spec, out, cell, run)
        if cell.route not in (None, TEACHER):
            there = run is not None and is_sealed(run.part("evals", "start", "main"))
            several[cell.world, cell.setting, cell.seed][str(cell.route)] = run if there else None
    for (world, setting, seed), runs in several.items():
        if (all_there := {k: run for k, run in runs.items() if run is not None}).keys() == runs.keys():
            told = {"world": world, "setting": setting, "arm": ROUTED, "seed": seed, "round": 0, **_routed(all_there)}
            rows.append(
                told | {"rule": "uniform", "params": "{}", "steps": 0, "rollout_tokens": 0, "trained_tokens": 0}
            )
    return pl.DataFrame(rows, schema=SCHEMA)


def _routed(runs: dict[str, Run]) -> Json:
    """Accuracies of several teachers, each on the held-out prompts that name it; empty if a prompt names none."""
    found = []
    for route, run in runs.items():
        prompts = read_prompts(run.config.eval.prompts["main"], run.root)  # type: ignore[call-overload, index]
        mine = pl.DataFrame(prompts.select(["prompt_id", "teacher"])).filter(teacher=route)
        seen = run.evals().filter(pl.col("benchmark") == "main", pl.col("round") == -1).collect()
        found.append(seen.join(mine, on="prompt_id", how="semi"))
    means = pl.concat(found).group_by("mode").agg(pl.col("reward").mean())
    return dict(means.iter_rows())


def write(table: pl.DataFrame, path: Path, worlds_cpu_seconds: float) -> None:
    """Write the table as Parquet in place of the one that is there, whole or not at all."""
    sink = pa.BufferOutputStream()
    plain = table.to_arrow().replace_schema_metadata({_WORLDS: repr(worlds_cpu_seconds)})
    pq.write_table(plain, sink, compression="zstd", write_page_checksum=True)
    files.replace_bytes(path, sink.getvalue().to_pybytes(), path.parent / ".tmp")


def read(path: Path) -> tuple[pl.DataFrame, float]:
    """The table of an experiment, and the CPU seconds that building its worlds took."""
    table = pq.read_table(path)
    return pl.DataFrame(table), float((table.schema.metadata or {}).get(_WORLDS.encode(), b"0"))


def _rows(spec: Spec, out: Path, cell: Cell, run: Run) -> Iterator[Json]:
    rule = run.config.weigh.rule
    told: Json = {
        "world": cell.world, "setting": cell.setting, "arm": cell.arm, "seed": cell.seed,
        "rule": rule if isinstance(rule, str) else json.dumps(rule),
        "params": json.dumps(run.config.weigh.params, sort_keys=True),
    }  # fmt: skip
    cost = _cost(cell_folder(out, cell) / "cost.jsonl")
    rollout_tokens = trained_tokens = steps = 0
    for trained in range(spec.rounds + 1):
        number = trained - 1
        row: Json = {"round": trained, **accuracies(run, number if trained else "start"), **cost[trained]}
        if trained:
            if not is_sealed(run.part("checkpoints", number)):
                return
            rollouts, scores, weights, checkpoint = (
                _stats(run, stage, number) for stage in ("rollouts", "scores", "weights", "checkpoints")
            )
            rollout_tokens += rollouts["tokens"]
            trained_tokens += int(weights["kept_tokens"])
            steps = checkpoint["global_step"]
            row |= {
                "response_length": rollouts["mean_length"],
                "truncated": rollouts["truncated_fraction"],
                "kept_share": weights["kept_token_fraction"],
                "reverse_kl": scores.get("reverse_kl"),
                "drift": checkpoint.get("drift_kl_last"),
            }
        elif row.get("greedy") is None and row.get("sampled") is None:
            return
        yield told | row | {"steps": steps, "rollout_tokens": rollout_tokens, "trained_tokens": trained_tokens}


def accuracies(run: Run, number: int | str) -> Json:
    """The columns of an evaluation: `greedy`, `sampled` and both for `retain`, None where there is none."""
    found: Json = {}
    for name, prefix in (("main", ""), ("retain", "retain_")):
        manifest = read_manifest(run.part("evals", number, name))
        stats = manifest.stats if manifest is not None and manifest.sealed else {}
        found[f"{prefix}greedy"] = stats.get("greedy")
        found[f"{prefix}sampled"] = next((v for k, v in stats.items() if k.startswith("avg@")), None)
    return found


def _stats(run: Run, stage: str, number: int) -> Json:
    manifest = read_manifest(run.part(stage, number))
    return manifest.stats if manifest is not None else {}


def _cost(path: Path) -> dict[int, Json]:
    """What a round cost over all attempts, by rounds trained."""
    found: dict[int, Json] = defaultdict(dict)
    for record in metrics.read(path):
        known = found[record["round"]]
        known["cpu_seconds"] = known.get("cpu_seconds", 0.0) + record["cpu_seconds"]
        known["peak_mb"] = max(known.get("peak_mb", 0.0), record["peak_mb"])
    return found
