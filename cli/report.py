"""`fire report`: a round as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .errors import guarded, say
from .options import Json, RunArg, SomeRound, Weights, open_run
from .terminal import Terminal, hint, show_one


@guarded
def report(
    run: RunArg,
    round: SomeRound = None,
    name: Weights = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="WEIGHTS|ROUND", help="side by side with other weights of the round, or another round"),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="default: RUN/report.html")] = None,
    trajectories: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="shown at most; default: 24 long ones, more if they are short"),
    ] = None,
    as_json: Json = False,
) -> None:
    """One HTML page to look at a run, without a network.

    Accuracy and curves per round, the filter, the weights, findings, settings,
    and trajectories with their tokens coloured by any of their numbers.
    """
    from fire_data.report import write_report

    opened = open_run(run)
    with Terminal() as terminal:
        made = write_report(opened, out, round=round, name=name, against=against, limit=trajectories, report=terminal)
    if as_json:
        values = {"path": str(made.path), "bytes": made.bytes, "round": made.round}
        show_one({**values, "trajectories": made.trajectories, "tokens": made.tokens, "of": made.total}, True)
    else:
        say(f"{made.trajectories} of {made.total} trajectories of round {made.round}, {made.bytes / 1e6:.1f} MB")
    hint(made.path)
