"""Experiment trackers, each as two functions: log numbers at a step, close. Nothing leaves the machine by itself.

A tracker is given its run from the beginning every time it is opened, and what it held of that run before is replaced.
So there is nothing to resume: after a kill, or a step that was done twice, it holds what it is given and nothing else.
Only a run that wandb already has on its server cannot be replaced; it goes on after the last step that is there.

wandb is offline unless WANDB_MODE says otherwise, and sends no error reports unless WANDB_ERROR_REPORTING does; trackio
writes to its folder on this machine unless TRACKIO_SPACE_ID or TRACKIO_SERVER_URL names another place.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, NamedTuple, get_args

from fire_data import files
from fire_data.schemas.config import Tracker as Name
from fire_data.schemas.errors import ConfigError

PROJECT = "fire"
"""What trackers call the place where runs lie beside each other."""

NAMES: tuple[str, ...] = get_args(Name)


class Tracker(NamedTuple):
    """An open tracker. Steps never decrease; several calls may be about the same one."""

    log: Callable[[int, dict[str, float]], None]
    close: Callable[[], None]
    where: str


def require(name: str | None) -> None:
    """Raise ConfigError, before anything is computed, if a tracker is unknown or its package not installed."""
    if name is None:
        return
    if name not in NAMES:
        raise ConfigError(f"there is no tracker {name!r}; there are: {', '.join(NAMES)}", where="train.tracker")
    try:
        metadata.version(name)  # a folder of this name is where a tracker writes
    except metadata.PackageNotFoundError:
        fix = f"pip install 'fire-opd[{name}]', or --set train.tracker=null"
        raise ConfigError(f"the tracker {name} is not installed", where=f"train.tracker: {name}", fix=fix) from None


def id_path(root: Path) -> Path:
    """Where the id lies that trackers know a run by."""
    return root / ".fire" / "tracker-id"


def open_tracker(name: str, root: Path, run: str, id: str, config: dict[str, Any]) -> Tracker:
    """Begin a run in a tracker, in place of what it had of this run.

    Args:
        root: the run directory; wandb (unless WANDB_DIR is set) and tensorboard write below it.
        run: what the run is called.
        id: 8 letters or digits that no other run has.
        config: JSON-ready, without anything that should not be seen by others.

    Raises whatever the tracker does.
    """
    makers = {"trackio": _trackio, "wandb": _wandb, "tensorboard": _tensorboard}
    # What they say on stdout would end in the middle of our tables.
    with contextlib.redirect_stdout(sys.stderr):
        return makers[name](root, run, id, config)


def _tensorboard(root: Path, run: str, id: str, config: dict[str, Any]) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    folder = root / "tensorboard"
    for old in folder.glob("events.out.tfevents.*"):
        files.remove(old)
    # A TensorBoard that shows the folder forgets by `purge_step` what it read from the files that are gone.
    writer: Any = SummaryWriter(str(folder), purge_step=0, flush_secs=5)
    text = json.dumps({"run": run, "id": id, **config}, indent=1, ensure_ascii=False)
    writer.add_text("config", f"```json\n{text}\n```", 0)

    def log(step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return Tracker(log, writer.close, f"tensorboard --logdir {folder}")


def _trackio(root: Path, run: str, id: str, config: dict[str, Any]) -> Tracker:
    trackio: Any = import_module("trackio")
    name = f"{run}-{id}"  # trackio knows runs by name
    with contextlib.suppress(ValueError):  # no such project yet
        for old in trackio.Api().runs(PROJECT):
            if old.name == name:
                old.delete()
    opened = trackio.init(PROJECT, name=name, config=config, embed=False, auto_log_gpu=False, auto_log_cpu=False)

    def log(step: int, values: dict[str, float]) -> None:
        opened.log(values, step=step)

    def close() -> None:
        with contextlib.redirect_stdout(sys.stderr):
            if trackio.context_vars.current_run.get() is opened:
                trackio.finish()  # type: ignore[no-untyped-call]  # else it would be finished, and say so on stdout, again at the end of the process
            else:
                opened.finish()

    return Tracker(log, close, f"trackio show --project {PROJECT}")


def _wandb(root: Path, run: str, id: str, config: dict[str, Any]) -> Tracker:
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read when it is imported
    wandb: Any = import_module("wandb")
    mode = os.environ.get("WANDB_MODE") or "offline"
    above = Path(os.environ.get("WANDB_DIR") or root)
    for old in (above / "wandb").glob(f"offline-run-*-{id}"):
        files.remove(old)
    opened = wandb.init(
        project=os.environ.get("WANDB_PROJECT") or PROJECT,
        id=id,
        name=run,
        dir=str(above),
        config=config,
        mode=mode,
        resume=None if mode in ("offline", "dryrun") else "allow",
        reinit="create_new",
        # No output of ours, source, command line, machine or installed packages: what is logged is all there is.
        settings=wandb.Settings(
            console="off",
            silent=True,
            disable_git=True,
            disable_code=True,
            save_code=False,
            x_disable_meta=True,
            x_disable_stats=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
        ),
    )
    opened.define_metric("global_step", hidden=True)
    opened.define_metric("*", step_metric="global_step")
    first = opened.starting_step  # 0, but for a run that the server had before

    def log(step: int, values: dict[str, float]) -> None:
        if step >= first:
            opened.log({**values, "global_step": step}, step=step)

    folder = Path(opened.dir).parent
    where = f"wandb sync {folder}" if opened.offline else str(opened.url)
    return Tracker(log, opened.finish, where)
