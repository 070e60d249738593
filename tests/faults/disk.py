"""A disk that fails: builds `disk.c`, and makes a stage again and again while one call after the other fails.

`run(...)` starts a process in which the library is loaded before libc; that process is this module as a script.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

CHANGES, READS, SYNCS = 1, 2, 4
ONCE, FROM_THEN_ON, SHORT, KILL, SLOW, CLOCK = range(6)
_YEAR = 365 * 86400


@dataclass(frozen=True)
class Fault:
    """What goes wrong: which kinds of calls are counted, and what the n-th of them does.

    `error` is the number of an error, or the seconds by which a clock is set otherwise.
    """

    mode: int = ONCE
    error: int = 0
    kinds: int = CHANGES | READS | SYNCS


FAULTS = {
    "EIO": Fault(ONCE, errno.EIO),
    "EACCES": Fault(ONCE, errno.EACCES),
    "ENOSPC": Fault(ONCE, errno.ENOSPC, CHANGES | SYNCS),
    "full from then on": Fault(FROM_THEN_ON, errno.ENOSPC, CHANGES | SYNCS),
    "read-only from then on": Fault(FROM_THEN_ON, errno.EROFS, CHANGES),
    "dead from then on": Fault(FROM_THEN_ON, errno.EIO),
    "short writes": Fault(SHORT, 0, CHANGES),
    "slow fsync": Fault(SLOW, 0, SYNCS),
    "a clock set back": Fault(CLOCK, -10 * _YEAR),
    "a clock set ahead": Fault(CLOCK, 10 * _YEAR),
}


def build(folder: Path) -> Path | None:
    """The compiled library; None where there is no compiler."""
    compiler, made = shutil.which("cc"), folder / "disk.so"
    if compiler is None or sys.platform != "linux":
        return None
    if not made.exists():
        source = Path(__file__).with_name("disk.c")
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", made, source, "-ldl"], check=True)
    return made


class Disk:
    """The library in this process, which was started with it."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None)
        self._library.disk_disarm.restype = ctypes.c_long

    def arm(self, folder: Path, at: int, fault: Fault) -> None:
        """From now on count calls about files below a folder; at the one of this number, from 0, the fault occurs."""
        place = str(folder).encode()
        self._library.disk_arm(place, ctypes.c_long(at), fault.error, fault.mode, fault.kinds)

    def disarm(self) -> int:
        """Everything works again. Returns how many calls were counted."""
        return int(self._library.disk_disarm())


@dataclass(frozen=True)
class Job:
    """A stage of the run in the folder `start` that is made with a fault at each of `points` in turn, until one is not
    reached; `after` is the run as it is behind the stage if nothing fails."""

    start: str
    after: str
    stage: str
    fault: str
    points: tuple[int, ...]


@dataclass
class Found:
    """What came of a job: faults that occurred, calls counted, what the stage did ("made", or the kind of error), and
    what went wrong: something visible was torn, the same command then gave other files, or an error was none of ours.
    """

    faults: int
    calls: int
    outcomes: dict[str, int]
    wrong: list[str]


def run(library: Path, jobs: Sequence[Job], scratch: Path) -> list[Found]:
    """Do all jobs in a process whose disk fails."""
    script = "from tests.faults.disk import main; main()"
    asked = {"jobs": [asdict(job) for job in jobs], "scratch": str(scratch)}
    done = subprocess.run(
        [sys.executable, "-c", script], input=json.dumps(asked), text=True, capture_output=True,
        env={**os.environ, "LD_PRELOAD": str(library), "HF_HUB_OFFLINE": "1"}, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [Found(**found) for found in json.loads(done.stdout.splitlines()[-1])]


def main() -> None:
    """The process in which the disk fails."""
    import torch

    torch.set_num_threads(1)
    asked = json.load(sys.stdin)
    print(json.dumps([asdict(_done(Job(**job), Path(asked["scratch"]))) for job in asked["jobs"]]))


def _done(job: Job, scratch: Path) -> Found:
    from tests.faults.world import visible

    expected, found, outcomes = visible(Path(job.after)), Found(0, 0, {}, []), Counter[str]()
    for point in job.points:
        outcome, calls = _once(job, scratch / "run-on-a-failing-disk", point, expected, found.wrong)
        found.calls = max(found.calls, calls)
        if calls <= point:
            break
        found.faults += 1
        outcomes[outcome] += 1
    found.outcomes = dict(outcomes)
    return found


def _once(job: Job, root: Path, point: int, expected: dict[str, bytes], wrong: list[str]) -> tuple[str, int]:
    from fire_data.schemas.errors import FireError
    from tests.faults.world import copy, do, visible

    disk, where, outcome = Disk(), f"{job.stage}, {job.fault} at call {point}", "made"
    copy(Path(job.start), root)
    disk.arm(root, point, FAULTS[job.fault])
    try:
        do(job.stage, root)
    except FireError as error:
        outcome = type(error).__name__
    except Exception:  # noqa: BLE001 - whatever it is, it is what this looks for
        outcome = "traceback"
        wrong.append(f"{where}: {traceback.format_exc()}")
    finally:
        calls = disk.disarm()
    torn = [path for path, data in visible(root).items() if expected.get(path) != data]
    wrong += [f"{where}: torn {path}" for path in torn]
    try:
        do(job.stage, root)
    except Exception:  # noqa: BLE001 - the same command must continue
        wrong.append(f"{where}: the same command: {traceback.format_exc()}")
    if visible(root) != expected:
        wrong.append(f"{where}: other files")
    return outcome, calls
