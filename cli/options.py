"""Options and arguments that several commands share, and how a command opens its run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fire_data.run import Run
    from fire_data.schemas.config import RayConfig

RunArg = Annotated[Path, typer.Argument(metavar="RUN", help="the run directory")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a field of fire.yaml")]
Round = Annotated[int | None, typer.Option("--round", min=0, help="default: the first round that is not trained")]
Redo = Annotated[bool, typer.Option("--redo", help="set the stage and all that was made from it aside first")]
Ray = Annotated[bool, typer.Option("--ray", help="place engines on a Ray cluster: ray.address, else one started here")]
Address = Annotated[
    str | None, typer.Option("--ray-address", metavar="HOST:PORT", help="place engines on this Ray cluster")
]
Json = Annotated[bool, typer.Option("--json", help="machine-readable output")]


def open_run(root: Path, overrides: list[str] | None = None) -> Run:
    """The run in a folder, with what --set says."""
    from fire_data.run import open_run as opened

    return opened(root, tuple(overrides or ()))


def cluster(run: Run, ray: bool, address: str | None) -> RayConfig | None:
    """The cluster that is asked for, with the other settings of the section `ray`."""
    if not ray and address is None:
        return None
    return run.config.ray.model_copy(update={"address": address} if address else {})


def round_of(run: Run, chosen: int | None) -> int:
    """The round that is asked for, else the first that is not trained."""
    return run.current_round() if chosen is None else chosen
