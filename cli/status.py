"""`fire status`: what a run is about, and its rounds by stages at a glance."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from .errors import visible
from .options import open_run
from .progress import size_text
from .terminal import hint, show

if TYPE_CHECKING:
    from fire_data.run import Run

_STAGES = ("rollouts", "scores", "addons", "weights", "checkpoints", "evals")


def show_status(root: Path, as_json: bool) -> None:
    """What is done and what is next; as JSON one object per stage."""
    from fire_data import overview

    run = open_run(root)
    rows = overview.status(run)
    if as_json:
        show(rows, True)
    else:
        typer.echo(visible(_about(run)))
        show(_glance(run, rows), False)
    hint(overview.next_command(run))


def _about(run: Run) -> str:
    teachers = ", ".join(cfg.model for cfg in run.teachers.values()) or "no teacher yet"
    trained = run.current_round()
    rounds = f"{trained} round{'s' * (trained != 1)} trained"
    names = dict.fromkeys(run.lineage(n) for n in range(max(1, trained)))
    return f"{run.config.student.model} learns from {teachers}, weights {', '.join(names)}: {rounds}"


def _glance(run: Run, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per round, one cell per stage: `sealed`, `damaged`, how much of it is done, or None."""
    found = []
    for place in dict.fromkeys(r["round"] for r in rows) or [0]:
        mine = [r for r in rows if r["round"] == place]
        cells = {stage: _cell(run, [r for r in mine if r["stage"].split("/")[0] == stage]) for stage in _STAGES}
        tokens, size = sum(r["tokens"] for r in mine if r["stage"] == "rollouts"), sum(r["bytes"] for r in mine)
        sums = {"tokens": f"{tokens:,}" if tokens else None, "size": size_text(size) if size else None}
        found.append({"round": place, **cells, **sums})
    unused = {"addons", "evals"} - {r["stage"].split("/")[0] for r in rows}
    return [{name: cell for name, cell in row.items() if name not in unused} for row in found]


def _cell(run: Run, rows: list[dict[str, Any]]) -> str | None:
    """Of several, weights by different rules say, what is worst."""
    from fire_data.standing import nonfinite_steps, standings

    if not rows:
        return None
    for row in rows:
        if row["state"] == "damaged":
            return "damaged"
    for row in rows:
        if row["state"] == "open" and row["stage"] == "checkpoints":
            done = next(f"{s.done}/{s.total}" for s in standings(run, row["round"]) if s.stage == "checkpoints")
            return done + _skipped(nonfinite_steps(run, row["round"]))
        if row["state"] == "open":
            return f"{row['shards']}/{row['planned']}"
    if rows[0]["stage"] == "checkpoints":
        return "sealed" + _skipped(nonfinite_steps(run, rows[0]["round"]))
    return "sealed" if len(rows) == 1 else f"{len(rows)} sealed"


def _skipped(steps: int | None) -> str:
    """What a training adds to its cell if it had steps that were not finite."""
    return f", {steps} not finite" if steps else ""
