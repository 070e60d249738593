"""`fire track`: give a tracker all that a run has, afterwards."""

from __future__ import annotations

from typing import Annotated

import typer

from . import completion
from .errors import guarded
from .options import Json, RunArg, open_run
from .terminal import Terminal, show_one


@guarded
def track(
    run: RunArg,
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="NAME",
            help="trackio, wandb or tensorboard; default: train.tracker",
            autocompletion=completion.trackers,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Give an experiment tracker all that a run has.

    Optimizer steps, rounds and evaluations, from metrics.jsonl and the tables.
    What it had of this run before is replaced. Nothing leaves this machine
    unless the tracker was told so.
    """
    from fire_data.steps.track import track as step

    opened = open_run(run)
    with Terminal() as terminal:
        given = step(opened, to, terminal)
    show_one(given, as_json)
