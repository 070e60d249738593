"""Ends a stage's process at random moments, or at its n-th call to the disk, until one run of it ends by itself."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path

from tests.faults import disk
from tests.faults.world import copy, do

PRELOAD = [__name__, "torch", "transformers.models.qwen3.modeling_qwen3", "fire_data.scoring"]
SIGNALS = (signal.SIGKILL, signal.SIGTERM)


def work(root: str, stage: str, at: int | None) -> None:
    """A stage, as the command does it, in a process of its own; `at`: it is killed at its n-th call to the disk."""
    import torch

    torch.set_num_threads(1)
    if at is not None:
        disk.Disk().arm(Path(root), at, disk.Fault(disk.KILL, 0, disk.CHANGES | disk.SYNCS))
    do(stage, Path(root))


@contextmanager
def loaded_before(library: Path | None) -> Iterator[None]:
    """Processes that are spawned in here have the failing disk, if there is one: the server they come from has."""
    if library is None:
        yield
        return
    forkserver._forkserver._stop()  # type: ignore[attr-defined]
    os.environ["LD_PRELOAD"] = str(library)
    try:
        multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)
        forkserver.ensure_running()
        yield
    finally:
        del os.environ["LD_PRELOAD"]
        forkserver._forkserver._stop()  # type: ignore[attr-defined]


def spawn(root: Path, stage: str, at: int | None = None) -> multiprocessing.process.BaseProcess:
    """A child forked from a server that has imported everything but started no thread."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    child = context.Process(target=work, args=(str(root), stage, at))
    child.start()
    return child


def finish(root: Path, stage: str) -> None:
    child = spawn(root, stage)
    child.join()
    assert child.exitcode == 0


def kill_until_finished(
    start: Path, victim: Path, stage: str, kills: int, longest: float, rng: random.Random, calls: int = 0
) -> Counter[str]:
    """Copy a run, then end the stage's process, at most `kills` times, until it ends by itself or is let finish.

    Args:
        longest: seconds within which the process is ended; how, is drawn too.
        calls: about how many calls to the disk the stage makes, where `loaded_before`: then it is ended at one of them.

    Returns how many kills landed, by kind.
    """
    copy(start, victim)
    landed: Counter[str] = Counter()
    while landed.total() < kills:
        child = spawn(victim, stage, rng.randrange(calls) if calls else None)
        how = rng.choice(SIGNALS)
        child.join(None if calls else rng.uniform(0.0, longest))
        if child.exitcode is None:
            os.kill(child.pid or 0, how)
            child.join()
        if child.exitcode == 0:
            return landed
        assert -(child.exitcode or 0) in SIGNALS, f"{stage} ended with {child.exitcode}"
        landed["at a call to the disk" if calls else how.name] += 1
    finish(victim, stage)
    return landed
