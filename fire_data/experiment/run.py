"""`fire experiment`: builds worlds, makes cells, writes what they say; the same command continues where it stopped."""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fire_data import files
from fire_data.experiment import table as tables
from fire_data.experiment.cells import build_worlds, make_cell, worlds_cpu_seconds
from fire_data.experiment.page import write_page
from fire_data.experiment.spec import Cell, Spec, cells, load_spec
from fire_data.experiment.summary import summarise
from fire_data.experiment.workers import Job, work_through
from fire_data.schemas.errors import ConfigError
from fire_data.stages import Reporter

Json = dict[str, Any]


def experiment(path: Path, out: Path, *, jobs: int, only: str | None, report: Reporter) -> Json:
    """Make what is missing of an experiment, or of the cells that `only` matches; its summary, with `out`.

    Failures of a cell are in the summary and stop no other. Raises ConfigError for a wrong specification, or if `only`
    matches nothing.
    """
    spec, base = load_spec(path), path.resolve().parent
    every = list(cells(spec))
    chosen = [cell for cell in every if only is None or fnmatch.fnmatch(cell.id, only)]
    if not chosen:
        text = f"no cell is called {only!r}; the first is {every[0].id}"
        raise ConfigError(text, where="--only", fix=f"--only '{every[0].group}/*'")

    def waiting() -> None:
        report.note("another fire experiment works in this folder: waiting for it to end")

    files.make_folder(out)
    with files.locked(out / ".lock", waiting):
        failures = _make(spec, out, base, chosen, jobs, report)
        table = tables.collect(spec, out, every)
        worlds = worlds_cpu_seconds(out, every)
        tables.write(table, out / "results.parquet", worlds)
        summary = summarise(table, spec, failures, worlds)
        files.replace_json(out / "summary.json", summary, out / ".tmp")
        write_page(summary, table, out)
    return summary | {"cells": len(every), "out": str(out)}


def _make(spec: Spec, out: Path, base: Path, chosen: Sequence[Cell], jobs: int, report: Reporter) -> dict[str, str]:
    """The worlds of all seeds, then the cells; what went wrong, by the name of the cell."""
    failed: dict[str, str] = {}
    lost: dict[int, str] = {}

    def built(job: Job, error: str | None) -> None:
        report.advance(1)
        if error is not None:
            lost[job[1]] = error
            report.warn(f"the worlds of seed {job[1]} cannot be built: {error}")

    def made(job: Job, error: str | None) -> None:
        report.advance(1)
        if error is not None:
            failed[job[2].id] = error
            report.warn(f"{job[2].id}: {error}")

    wanted: dict[int, dict[tuple[str, str], None]] = defaultdict(dict)
    for cell in chosen:
        if cell.world not in spec.given:
            wanted[cell.seed][cell.world, cell.setting] = None
    if wanted:
        report.start("worlds", len(wanted), "seeds")
        work_through(build_worlds, [(out, seed, [*groups]) for seed, groups in wanted.items()], jobs, built)
    report.start("cells", len(chosen), "cells")
    work_through(make_cell, [(spec, out, cell, base) for cell in chosen if cell.seed not in lost], jobs, made)
    return failed | {cell.id: f"its world: {lost[cell.seed]}" for cell in chosen if cell.seed in lost}
