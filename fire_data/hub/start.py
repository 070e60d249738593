"""`fire train RUN --from hf://datasets/user/name`: a run made of a shared dataset and the student that is here.

Only the student that wrote the rollouts may be trained on them. That is asked before anything is downloaded or made.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from fire_data import models
from fire_data.hub.client import address
from fire_data.hub.layout import CONFIG
from fire_data.hub.pull import look, take
from fire_data.hub.redact import is_place
from fire_data.run import Run, open_run
from fire_data.schemas.config import ModelConfig
from fire_data.schemas.errors import ConfigError, FingerprintError
from fire_data.schemas.manifest import Manifest
from fire_data.stages import Reporter


def start_from(root: Path, source: str, student: str | None, round: int | None, report: Reporter) -> int:
    """Make a run of a shared dataset's tables, ready for training; continue or confirm one that is there.

    Args:
        source: hf://datasets/user/name, or with a branch, tag or commit, hf://datasets/user/name@revision.
        student: a folder or Hub id; None: the one that the dataset names, if it is on the Hub.
        round: whose tables are pulled; None: the first that was scored. Later ones are about later students.

    Returns:
        The round.

    Raises:
        ConfigError: the dataset does not name a student that others have, or the run there has another.
        FingerprintError: the student is not the one that wrote the rollouts.
        As `pull`.
    """
    repo, revision = address(source)
    command = shlex.join(["fire", "train", str(root), "--from", source])
    shared = look(repo, root, revision)
    scored = sorted(number for number, stage, _ in shared.stages if stage == "scores" and round in (None, number))
    if not scored:
        raise ConfigError("there are no scores to train on", where=source, fix="a dataset with scores and weights")
    if (root / CONFIG).exists():
        _require_named(open_run(root), student)
    elif student is None and is_place(shared.settings["student"]["model"]):
        name = shared.settings["student"]["model"].removeprefix("./")
        text = f"the dataset's student is {name!r}, a folder of its author"
        raise ConfigError(text, where=source, fix=f"{command} --student FOLDER_OR_HUB_ID")
    else:
        settings = shared.settings["student"]
        settings |= {} if student is None else {"model": _named(student, root), "revision": None}
        _require_writer(ModelConfig(**settings), student, root, shared.stages[scored[0], "scores", ""], command)
    take(shared, root, scored[:1], None, report)
    return scored[0]


def _named(student: str, root: Path) -> str:
    """A student named here, as fire.yaml names it: local folders relative to the run."""
    local = Path(student).expanduser()
    if not local.exists() or local.is_absolute():
        return student
    return os.path.relpath(local.resolve(), root.resolve())


def _require_named(run: Run, student: str | None) -> None:
    """Raise ConfigError if the run's own settings name another student: they are edited by hand, not by us."""
    there = run.config.student.model
    if student is None or student == there:
        return
    if (run.root / Path(there).expanduser()).resolve() != Path(student).expanduser().resolve():
        text = f"fire.yaml names another student: {there}"
        raise ConfigError(text, where=str(run.root / CONFIG), fix="edit it, or leave --student out")


def _require_writer(cfg: ModelConfig, student: str | None, root: Path, scores: Manifest, command: str) -> None:
    """Raise FingerprintError unless the student is the one under which the round to be trained was scored."""
    wanted = (scores.fields.get("student") or {}).get("weights")
    if str(wanted).startswith("checkpoint:"):
        text = f"round {scores.round} was written by a checkpoint, which is not part of the dataset"
        raise ConfigError(text, where=command, fix=f"train from round 0 on: {command} --round 0")
    if student is not None and Path(student).expanduser().exists():
        cfg = cfg.model_copy(
            update={"model": str(Path(student).expanduser().resolve())}
        )  # the run may not be there yet
    found = models.model_fingerprint(cfg, root)
    if found != wanted:
        text = (
            f"{student or cfg.model} is not the student that wrote the rollouts: {found[:60]}, not {str(wanted)[:60]}"
        )
        raise FingerprintError(text, where=command, fix="--student with that very model, Hub id or folder")
