"""A small run of real models, stage by stage, and what of it anybody can see."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fire_data.create import init_run
from fire_data.run import Run, open_run
from fire_data.schemas.manifest import Manifest
from fire_data.session import Session
from fire_data.stages import Reporter
from fire_data.steps.refresh import refresh
from fire_data.steps.rollout import rollout
from fire_data.steps.score import score
from fire_data.steps.train import train
from fire_data.steps.weigh import weigh

STAGES = ("rollout", "score", "weigh", "train")
TABLES = {"rollout": "rollouts", "score": "scores", "weigh": "weights"}


def small_run(root: Path, world: Any, **sections: dict[str, Any]) -> Run:
    """A run of one round: 6 prompts in 3 shards, 2 samples each, 3 optimizer steps."""
    values: dict[str, Any] = {
        "threads": 1,
        "student": {"model": str(world.student)},
        "teacher": {"model": str(world.teacher)},
        "prompts": {"path": str(world.prompts)},
        "rollout": {"n": 2, "prompts_per_round": 6, "prompts_per_shard": 2, "max_new_tokens": 6},
        "weigh": {"rule": "fire"},
        "train": {"batch_size": 4, "lr": 1e-3, "save_every": 2, "export_dtype": "bfloat16"},
    }
    return init_run(root, values | {k: values.get(k, {}) | v for k, v in sections.items()})


def small_world(folder: Path) -> Any:
    """Models and prompts for `small_run`, where no fixture made them."""
    import torch

    from fire_data.worlds.world import Sizes, build_world

    torch.set_num_threads(1)
    sizes = Sizes(hidden=32, heads=2, intermediate=32, batch=8, teacher_steps=12, student_steps=4)
    return build_world(folder, prompts=12, held_out=6, sizes=sizes)


def do(stage: str, run: Run | Path, report: Reporter | None = None, *, redo: bool = False) -> Manifest | None:
    """A stage of round 0, or `run` for two rounds, as the command does it."""
    run = run if isinstance(run, Run) else open_run(run)
    if stage == "weigh":
        return weigh(run, 0, report, redo=redo)
    with Session(run, report) if report is not None else Session(run) as session:
        if stage == "run":
            refresh(session, 2)
            return None
        steps: dict[str, Callable[..., Manifest]] = {"rollout": rollout, "score": score, "train": train}
        return steps[stage](session, 0, redo=redo)


def stages_before(folder: Path, run: Run) -> dict[str, Path]:
    """Copies of a run as it is before each stage and, under "after", behind the last."""
    found = {}
    for stage in (*STAGES, "after"):
        found[stage] = folder / f"before-{stage}"
        shutil.copytree(run.root, found[stage])
        if stage != "after":
            do(stage, run.root)
    return found


def following(stage: str) -> str:
    return (*STAGES, "after")[STAGES.index(stage) + 1]


def visible(root: Path) -> dict[str, bytes]:
    """Every table and every file of a checkpoint, by its path in the run."""
    found = (p for p in root.rglob("*") if p.is_file() and ".fire" not in p.relative_to(root).parts)
    keep = (p for p in found if p.suffix == ".parquet" or "checkpoints" in p.parts)
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(keep)}


def copy(source: Path, target: Path) -> Path:
    """A fresh copy of a run, in place of one that is there."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    return target


def scratch(name: str) -> Path:
    """A new folder for a long test; in memory, where the machine has such a place: a flip writes, and a kill syncs."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix=f"fire-{name}-", dir=memory if os.access(memory, os.W_OK) else None))
