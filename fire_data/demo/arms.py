"""`fire demo`: the small world, then two arms from the same student and seed: the chosen rule and plain OPD.

The stages are the functions behind the commands, so what the demo leaves is two ordinary run directories.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fire_data.create import fork_run, init_run
from fire_data.demo.curve import write_curve
from fire_data.run import Run, open_run
from fire_data.session import Session
from fire_data.stages import Reporter
from fire_data.steps.refresh import refresh
from fire_data.steps.rounds import round_table
from fire_data.worlds.arithmetic import ANSWER_PATTERN
from fire_data.worlds.world import World, build_world

ROUNDS = 12
SAMPLED = "avg@2"
SETTINGS: dict[str, dict[str, Any]] = {
    "rollout": {"n": 4, "prompts_per_round": 64, "max_new_tokens": 48, "verifier": "exact", "rows_in_flight": 128},
    "train": {"lr": 5e-4, "batch_size": 64, "export_dtype": "float32"},
    "eval": {"n": 2},
    "verify": {"pattern": ANSWER_PATTERN},
}


@dataclass(frozen=True)
class DemoResult:
    """Both arms' rounds side by side, where the curve and the chosen rule's run are, and where the time went."""

    table: list[dict[str, Any]]
    page: Path
    run: Path
    timing: dict[str, float]

    @property
    def seconds(self) -> float:
        return sum(self.timing.values())


def run_demo(folder: Path, *, rule: str, rounds: int | None, seed: int, report: Reporter) -> DemoResult:
    """Make the world, run both arms, write `learning.html`. The same call continues after a kill."""
    clock = time.monotonic()
    timing: dict[str, float] = {}

    def lap(name: str) -> None:
        nonlocal clock
        timing[name] = time.monotonic() - clock
        clock = time.monotonic()

    world = build_world(folder / "world", seed=seed, report=_Progress(report))
    lap("world")
    arms = list(dict.fromkeys([rule, "uniform"]))
    runs: dict[str, Run] = {}
    for arm in arms:
        runs[arm] = _arm(folder, arm, world, seed, runs.get(arms[0]))
        report.note(f"arm {arm}: {rounds or ROUNDS} rounds in {runs[arm].root}")
        refresh(Session(runs[arm], report), rounds or ROUNDS)
        lap(arm)
    tables = {arm: round_table(run) for arm, run in runs.items()}
    page = write_curve(folder, tables, SAMPLED)
    lap("plots")
    return DemoResult(side_by_side(tables), page, runs[rule].root, timing)


def side_by_side(tables: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row per round with the numbers of every arm: accuracy greedy and at temperature 1, kept share, KL."""
    columns = {"greedy": "greedy", "T=1": SAMPLED, "kept": "kept", "KL": "reverse_kl"}
    rounds = max(map(len, tables.values()))
    rows = []
    for i in range(rounds):
        row: dict[str, Any] = {"round": next(iter(tables.values()))[i]["round"]}
        for title, key in columns.items():
            row |= {f"{title} {arm}": t[i].get(key) if i < len(t) else None for arm, t in tables.items()}
        rows.append(row)
    return rows


def _arm(folder: Path, rule: str, world: World, seed: int, first: Run | None) -> Run:
    """The run of an arm: opened if it is there, else new, else sharing round 0 with the first arm."""
    root = folder / rule
    if (root / "fire.yaml").exists():
        return open_run(root)
    if first is not None:
        return fork_run(first, root, {"weigh": {"rule": rule, "params": {}}})
    values: dict[str, Any] = {
        **SETTINGS,
        "seed": seed,
        "threads": 1,
        "student": {"model": str(world.student)},
        "teacher": {"model": str(world.teacher)},
        "prompts": {"path": str(world.prompts)},
        "eval": {**SETTINGS["eval"], "prompts": str(world.held_out)},
        "weigh": {"rule": rule},
    }
    return init_run(root, values)


class _Progress:
    """The world's progress callback on top of a Reporter."""

    def __init__(self, report: Reporter) -> None:
        self.report, self.what, self.done = report, "", 0

    def __call__(self, what: str, done: int, total: int) -> None:
        if what != self.what:
            self.report.start(what, total, "steps")
            self.what, self.done = what, 0
        self.report.advance(done - self.done)
        self.done = done
