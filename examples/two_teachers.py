"""Two teachers, each right in one task alone: routed training against either teacher, as tables of accuracy per task.

Not about speed: it shows what a route is worth, and what a teacher does to a student where it is wrong. Arms of a seed
share the student, the prompts and the sampling noise, so differences are taken seed by seed. An arm is an ordinary run
directory under `--folder`: the same command continues after an interruption. `fire_data.worlds.two_domains` says what
the two kinds of teachers are; the tables and all numbers are written to `tables.md` and `results.json`.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import polars as pl

from fire_data.create import init_run
from fire_data.demo.arms import ROUNDS, SETTINGS
from fire_data.run import Run, open_run
from fire_data.session import Session
from fire_data.shards import read_shard, sealed
from fire_data.steps.evaluate import evaluate
from fire_data.steps.refresh import refresh
from fire_data.worlds.two_domains import ANSWER_PATTERN, DOMAINS, TwoSizes, build_two_domains
from fire_data.worlds.world import write_whole

KINDS = ("alone", "tuned")
COMBINED = ("average", "confident", "token")  # of both teachers, for those who have no route
ARMS = ("routed", *DOMAINS, *(f"{name}-own" for name in DOMAINS), *COMBINED)
SIGNALS = ("teacher_logprob", "teacher_entropy", "reverse_kl")
UNION = "union"  # of the prompts of both tasks
REFERENCE = "both"  # one teacher that is right everywhere
MODELS = ("student", *(f"{kind}-{name}" for kind in KINDS for name in DOMAINS), REFERENCE)
TINY = TwoSizes(hidden=16, heads=2, intermediate=16, batch=4, teacher_steps=2, both_steps=2, student_steps=2,
                tuned_steps=2)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/two-teachers"), help="where the runs go")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds, from 0")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="refresh rounds per arm")
    parser.add_argument("--arms", help="names separated by commas, such as tuned/routed; default: all")
    parser.add_argument("--workers", type=int, default=1, help="arms trained at once, one thread each")
    parser.add_argument("--smoke", action="store_true", help="one seed, one round, tiny models: is the script alive?")
    options = parser.parse_args()
    names = [f"{kind}/{arm}" for kind in KINDS for arm in ARMS] + [REFERENCE]
    if options.arms:
        names = options.arms.split(",")
    if options.smoke:
        options.seeds, options.rounds = 1, 1
    worlds = [(options.folder, seed, options.smoke) for seed in range(options.seeds)]
    tasks = [(options.folder, name, seed, options.rounds) for seed in range(options.seeds) for name in names]
    measures = [(options.folder, name, seed) for seed in range(options.seeds) for name in MODELS]
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(options.workers) as pool:
        built = list(pool.map(_world, *zip(*worlds, strict=True)))
        models = list(pool.map(_measure, *zip(*measures, strict=True)))
        for row in pool.map(_arm, *zip(*tasks, strict=True)):
            rows.append(row)
            print(json.dumps(row), flush=True)
    text = "\n\n".join(tables(models, rows, names))
    hours = sum(r["cpu_seconds"] for r in [*built, *models, *rows]) / 3600
    text += f"\n\n{options.seeds} seeds, {options.rounds} rounds, {len(names)} arms, {hours:.2f} CPU hours in all.\n"
    write_whole(options.folder / "results.json", json.dumps({"models": models, "arms": rows}, indent=1) + "\n")
    write_whole(options.folder / "tables.md", text)
    print(text, file=sys.stderr)


def _once(result: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` found and the CPU seconds it took (of the last try), read again where it was written before."""
    if not result.exists():
        started = time.process_time()
        row = {**make(), "cpu_seconds": round(time.process_time() - started, 1)}
        write_whole(result, json.dumps(row) + "\n")
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return found


def _world(folder: Path, seed: int, smoke: bool) -> dict[str, Any]:
    """Builds the world of a seed, with a prompts file for each task beside that of both."""
    place = folder / f"world-{seed}"

    def make() -> dict[str, Any]:
        size: dict[str, Any] = {"prompts": 128, "held_out": 8, "sizes": TINY} if smoke else {}
        world = build_two_domains(place, seed=seed, **size)
        lines = world.prompts.read_text(encoding="utf-8").splitlines(keepends=True)
        for name in DOMAINS:
            write_whole(_prompts(place, name), "".join(x for x in lines if json.loads(x)["teacher"] == name))
        return {"world": str(place)}

    return _once(folder / f"world-{seed}.json", make)


def _prompts(world: Path, name: str | None) -> Path:
    """The prompts of one task, or of both."""
    return world / (f"prompts-{name}.jsonl" if name else "prompts.jsonl")


def _arm(folder: Path, name: str, seed: int, rounds: int) -> dict[str, Any]:
    """Train one arm with one seed, or take up where it was left; its accuracy after the last round."""
    root, world = folder / f"seed-{seed}" / name, (folder / f"world-{seed}").resolve()

    def make() -> dict[str, Any]:
        run = _open(root, seed, world, {"student": {"model": str(world / "student")}, **_teaching(world, name)})
        with Session(run) as session:
            refresh(session, rounds)
        return {"arm": name, "seed": seed, **_accuracy(root, world, rounds - 1), **_signals(run)}

    return _once(root.with_name(f"{root.name}-{rounds}.json"), make)


def _teaching(world: Path, name: str) -> dict[str, Any]:
    """What is particular to an arm in `fire.yaml`: its teacher or teachers, its prompts, how teachers are combined."""
    kind, _, arm = name.partition("/")
    if name == REFERENCE:
        return {"teacher": {"model": str(world / REFERENCE)}}
    task, _, own = arm.partition("-")
    if task in DOMAINS:
        prompts = {"path": str(_prompts(world, task if own else None))}
        return {"teacher": {"model": str(world / f"{kind}-{task}")}, "prompts": prompts}
    teachers = {task: {"model": str(world / f"{kind}-{task}")} for task in DOMAINS}
    return {"teachers": teachers, "weigh": {"teacher": arm}}


def _open(root: Path, seed: int, world: Path, values: dict[str, Any]) -> Run:
    if not (root / "fire.yaml").exists():
        common = {
            **SETTINGS,
            "seed": seed,
            "threads": 1,
            "prompts": {"path": str(_prompts(world, None))},
            "verify": {"pattern": ANSWER_PATTERN},
            "eval": {"n": 4},
        }
        weigh = {"rule": "uniform", **values.get("weigh", {})}
        init_run(root, {**common, **values, "weigh": weigh})
    return open_run(root)


def _measure(folder: Path, name: str, seed: int) -> dict[str, Any]:
    """The accuracy of a model of the world itself, as if it were a student before training."""
    root, world = folder / f"seed-{seed}" / "models" / name, (folder / f"world-{seed}").resolve()

    def make() -> dict[str, Any]:
        _open(root, seed, world, {"student": {"model": str(world / name)}})
        return {"model": name, "seed": seed, **_accuracy(root, world, None)}

    return _once(root.with_name(f"{name}.json"), make)


def _accuracy(root: Path, world: Path, number: int | None) -> dict[str, float]:
    """Greedy and temperature-1 accuracy on the held-out prompts of each task and of both, as `union T=1`."""
    # Evaluated once, at the end: with eval.prompts in fire.yaml `fire run` would do it after every round.
    run = open_run(root, (f"eval.prompts={world / 'held_out.jsonl'}",))
    with Session(run) as session:
        evaluate(session, number)
    part = run.part("evals", "start" if number is None else number)
    frame = pl.concat([pl.DataFrame(pl.from_arrow(read_shard(part, r))) for r in sealed(part).shards])
    found = {}
    for name in (*DOMAINS, UNION):
        mine = frame if name == UNION else frame.filter(pl.col("prompt_id").str.starts_with(f"{name}-"))
        for mode, title in (("greedy", "greedy"), ("sampled", "T=1")):
            found[f"{name} {title}"] = statistics.fmean(mine.filter(pl.col("mode") == mode)["reward"])
    return found


def _signals(run: Run) -> dict[str, float]:
    """What the teacher said of the student's first rollouts of each task, in nats per token: is it lost there?"""
    task = pl.col("prompt_id").str.split("-").list.first().alias("task")
    sums = pl.col("length", *(f"{c}_sum" for c in SIGNALS)).sum()
    frame = run.scores(0).group_by(task).agg(sums).sort("task").collect()
    return {
        f"{row['task']} {c}": row[f"{c}_sum"] / row["length"] for row in frame.iter_rows(named=True) for c in SIGNALS
    }


def tables(models: list[dict[str, Any]], rows: list[dict[str, Any]], names: list[str]) -> list[str]:
    """Markdown: the models before training, the teachers on the student's words, the arms, and paired differences."""
    scores = [f"{task} {mode}" for task in (*DOMAINS, UNION) for mode in ("greedy", "T=1")]
    start = [{**m, "arm": "student"} for m in models if m["model"] == "student"]
    found = [_markdown(["model", *scores], _means(models, "model", MODELS, scores))]
    alone = [n for n in names if n == REFERENCE or n.partition("/")[2] in DOMAINS]
    heads = [f"{task} {c}" for task in DOMAINS for c in SIGNALS]
    found.append(_markdown(["teacher on the student's text", *heads], _means(rows, "arm", alone, heads)))
    found.append(_markdown(["arm", *scores], _means([*start, *rows], "arm", ("student", *names), scores)))
    lines = []
    for kind in KINDS:
        first = f"{kind}/routed"
        for other in [n for n in names if first in names and n != first and n.startswith((f"{kind}/", REFERENCE))]:
            cells = [_gap(rows, first, other, f"{UNION} {mode}") for mode in ("greedy", "T=1")]
            lines.append([f"{first} against {other}", *(cell for pair in cells for cell in pair)])
    heads = ["paired difference on the union", "greedy (se)", "seeds better", "T=1 (se)", "seeds better"]
    return [*found, _markdown(heads, lines)]


def _means(rows: list[dict[str, Any]], key: str, names: Iterable[str], columns: list[str]) -> list[list[str]]:
    """Mean and standard error over seeds of each column, a line per name."""
    lines = []
    for name in names:
        mine = [r for r in rows if r[key] == name]
        lines.append([f"`{name}`", *(_mean([r[c] for r in mine], ".3f") for c in columns)])
    return lines


def _gap(rows: list[dict[str, Any]], first: str, other: str, column: str) -> tuple[str, str]:
    """First minus other, seed by seed."""
    by_seed = {name: {r["seed"]: r[column] for r in rows if r["arm"] == name} for name in (first, other)}
    gaps = [by_seed[first][seed] - by_seed[other][seed] for seed in by_seed[first]]
    return _mean(gaps, "+.3f"), f"{sum(g > 0 for g in gaps)}/{len(gaps)}"


def _mean(values: list[float], form: str) -> str:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):{form}} ({error:.3f})"


def _markdown(heads: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [heads, ["---"] * len(heads), *lines])


if __name__ == "__main__":
    main()
