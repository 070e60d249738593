"""`fire diagnose`: the findings as a table, the worst first, then why each that is not fine matters and what to do."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import typer

from .errors import visible
from .terminal import Terminal, hint, show, show_one

if TYPE_CHECKING:
    from fire_data.run import Run


def show_diagnosis(run: Run, round: int | None, name: str | None, as_json: bool) -> None:
    """Measure a round (default: the last that is scored) and show what was found."""
    from fire_data.diagnose import LEVELS
    from fire_data.overview import next_command
    from fire_data.steps.diagnose import diagnose_round, last_scored

    number = last_scored(run) if round is None else round
    with Terminal() as terminal:
        found = diagnose_round(run, number, name, terminal)
    counts = {level: sum(f.level == level for f in found) for level in LEVELS}
    if as_json:
        show_one({"round": number, "levels": counts, "findings": [dataclasses.asdict(f) for f in found]}, True)
    else:
        found = sorted(found, key=lambda f: LEVELS.index(f.level))
        show([{"level": f.level, "finding": f.name, "measured": f.measured} for f in found], False, f"round {number}")
        for finding in (f for f in found if f.level != "ok"):
            typer.echo(f"\n{finding.name} ({finding.level})")
            typer.echo(visible(f"  why  {finding.why}"))
            typer.echo(visible(f"  do   {finding.do}"))
    hint(next_command(run))
