"""`fire experiment`: a specification, and after it the tables of what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import guarded, say
from .options import Json
from .terminal import Terminal, hint, show, show_one


@guarded
def experiment(
    spec: Annotated[Path, typer.Argument(metavar="SPEC", help="the specification, a YAML file")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FOLDER", help="default: runs/, with the name of SPEC")
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, metavar="N", help="cells at the same time")] = 1,
    only: Annotated[
        str | None, typer.Option("--only", metavar="CELL", help="WORLD/SETTING/ARM/seed-NNN; * stands for anything")
    ] = None,
    as_json: Json = False,
) -> None:
    """Worlds x settings x arms x seeds as runs: which arm is better?

    The same command goes on where it stopped. Writes results.parquet,
    summary.json and report.md. Exit 1 if a cell failed: the others are done.
    """
    from fire_data.experiment.run import experiment as perform

    folder = out or Path("runs") / spec.stem
    with Terminal() as terminal:
        found = perform(spec, folder, jobs=jobs, only=only, report=terminal)
    if as_json:
        show_one(found, True)
    else:
        _show(found)
    say(f"report: {folder / 'report.md'}")
    if found["failures"]:
        say(f"failed cells: {len(found['failures'])} of {found['cells']}")
        hint("fire", "experiment", spec, "--out", folder)
        raise typer.Exit(1)
    first = next(iter(found["arms"]), None)
    if first is not None:
        place = folder / "cells" / first["world"] / first["setting"] / first["arm"]
        hint("fire", "report", place / f"seed-{found['seeds'][0]:03d}")


def _show(found: dict[str, Any]) -> None:
    from fire_data.experiment.page import arm_row, claim_row, difference_row, teacher_row

    show([arm_row(arm) for arm in found["arms"]], False, "means over seeds after the last round")
    if found["teachers"]:
        typer.echo()
        show([teacher_row(t) for t in found["teachers"]], False, "teachers on the same held-out prompts")
    tested = [difference_row(c) for c in found["comparisons"] if c["metric"] == found["metric"]]
    if tested:
        typer.echo()
        show(tested, False, f"paired differences in {found['metric']} with 95 % intervals")
    if found["claims"]:
        typer.echo()
        show([claim_row(c) for c in found["claims"]], False, "claims")
