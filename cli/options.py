"""Options and arguments that several commands share, and how a command opens its run."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import completion

if TYPE_CHECKING:
    from fire_data.run import Run
    from fire_data.schemas.config import RayConfig


def flag(*names: str, help: str) -> Any:
    """An option that takes no value, and so shows none in the help page."""
    return typer.Option(*names, metavar="", help=help)


RunArg = Annotated[Path, typer.Argument(metavar="RUN", help="the run directory", autocompletion=completion.runs)]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="override a field of fire.yaml, rollout.n=8 say; may be repeated",
        autocompletion=completion.settings,
    ),
]
Round = Annotated[
    int | None,
    typer.Option(
        "--round",
        min=0,
        metavar="N",
        help="default: the first that is not trained yet",
        autocompletion=completion.rounds,
    ),
]
SomeRound = Annotated[
    int | None,
    typer.Option(
        "--round", min=0, metavar="N", help="default: the last that can be looked at", autocompletion=completion.rounds
    ),
]
Rule = Annotated[
    str | None, typer.Option("--rule", metavar="RULE", help="a name from `fire rules`", autocompletion=completion.rules)
]
Weights = Annotated[
    str | None,
    typer.Option(
        "--name",
        metavar="NAME",
        help="folder under weights/; default: those that are trained",
        autocompletion=completion.weights,
    ),
]
TrackerName = Annotated[
    str | None,
    typer.Option(
        "--tracker",
        metavar="NAME",
        help="trackio, wandb or tensorboard follows, as train.tracker says",
        autocompletion=completion.trackers,
    ),
]
Redo = Annotated[bool, flag("--redo", help="set the stage and all that was made from it aside first")]
Launch = Annotated[
    int,
    typer.Option("--launch", min=1, metavar="N", help="train on N processes here: a GPU each, or all on the CPU"),
]
Ray = Annotated[bool, flag("--ray", help="place engines on a Ray cluster: ray.address, else one started here")]
Address = Annotated[
    str | None, typer.Option("--ray-address", metavar="HOST:PORT", help="place engines on this Ray cluster")
]
Json = Annotated[bool, flag("--json", help="JSON on stdout instead of a table")]


def open_run(root: Path, overrides: list[str] | None = None) -> Run:
    """The run in a folder, with what --set says. Where there is none, the ConfigError names the nearest."""
    from fire_data.run import open_run as opened
    from fire_data.schemas.errors import ConfigError

    try:
        return opened(root, tuple(overrides or ()))
    except ConfigError as error:
        near = None if (root / "fire.yaml").is_file() else _nearest(root)
        if near is None:
            raise
        fix = f"{near} instead of {root}, or: {error.fix}"
        raise ConfigError(f"{error.what}; did you mean {near}?", where=error.where, fix=fix) from None


def _nearest(root: Path) -> str | None:
    """The run that a path leads into, or one near it whose name is much like it."""
    around = next((str(p) for p in root.parents if (p / "fire.yaml").is_file()), None)
    there = {Path(run).name: run for run in completion.runs(f"{root.parent}/")}
    return around or next((there[name] for name in difflib.get_close_matches(root.name, there, n=1)), None)


def with_tracker(overrides: list[str] | None, name: str | None) -> list[str]:
    """What --set says, with what --tracker says of it."""
    return [*(overrides or []), *([f"train.tracker={name}"] if name is not None else [])]


def cluster(run: Run, ray: bool, address: str | None) -> RayConfig | None:
    """The cluster that is asked for, with the other settings of the section `ray`."""
    if not ray and address is None:
        return None
    return run.config.ray.model_copy(update={"address": address} if address else {})


def round_of(run: Run, chosen: int | None) -> int:
    """The round that is asked for, else the first that is not trained."""
    return run.current_round() if chosen is None else chosen


def carried(
    run: Run,
    overrides: list[str] | None = None,
    *,
    round: int | None = None,
    ray: bool = False,
    address: str | None = None,
) -> list[str]:
    """What was given to a command and the next one needs too: settings, cluster, a round that is not the current."""
    return [
        *(["--round", str(round)] if round not in (None, run.current_round()) else []),
        *(["--ray-address", address] if address is not None else ["--ray"] if ray else []),
        *(word for setting in overrides or () for word in ("--set", setting)),
    ]


def chosen(before: Run, after: Run) -> list[str]:
    """What a command changed of the section `weigh`, as --set takes it."""
    old, new = (run.config.weigh.model_dump(mode="json") for run in (before, after))
    changed = {key: value for key, value in new.items() if value != old[key]}
    return [f"weigh.{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in changed.items()]
