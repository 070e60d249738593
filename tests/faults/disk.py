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
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

CHANGES, READS, SYNCS = 1, 2, 4
ONCE, FROM_THEN_ON, SHORT, KILL, SLOW = range(5)


@dataclass(frozen=True)
class Fault:
    """What goes wrong: which kinds of calls are counted, and what the n-th of them does."""

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

    def jump(self, seconds: int) -> None:
        """The time of day is another one."""
        self._library.disk_jump(seconds)


def run(
    library: Path, start: Path, after: Path, stage: str, fault: str, points: Iterable[int], scratch: Path
) -> dict[str, Any]:
    """Make `stage` of the run `start` with `fault` at each of these calls in turn, until one is not reached.

    Returns how many faults occurred, what the stage did ("made", or the kind of error), and what went wrong: "torn"
    (something visible is none of the files of `after`), "other" (the same command then gave other files), "traceback".
    """
    script = "from tests.faults.disk import main; main()"
    asked = {"start": str(start), "after": str(after), "stage": stage, "fault": fault, "points": list(points)}
    done = subprocess.run(
        [sys.executable, "-c", script], input=json.dumps(asked | {"scratch": str(scratch)}), text=True,
        capture_output=True, env={**os.environ, "LD_PRELOAD": str(library), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@dataclass
class Found:
    """What `run` returns."""

    faults: int
    calls: int
    outcomes: dict[str, int]
    wrong: list[str]


def main() -> None:
    """The process in which the disk fails."""
    import torch

    from tests.faults.world import visible

    torch.set_num_threads(1)
    asked = json.load(sys.stdin)
    expected = visible(Path(asked["after"]))
    found, outcomes = Found(0, 0, {}, []), Counter[str]()
    for point in asked["points"]:
        outcome, calls = _once(asked, point, expected, found.wrong)
        found.calls = max(found.calls, calls)
        if calls <= point:
            break
        found.faults += 1
        outcomes[outcome] += 1
    found.outcomes = dict(outcomes)
    print(json.dumps(asdict(found)))


def _once(asked: dict[str, Any], point: int, expected: dict[str, bytes], wrong: list[str]) -> tuple[str, int]:
    from fire_data.schemas.errors import FireError
    from tests.faults.world import copy, do, visible

    root, stage, fault, disk = Path(asked["scratch"]) / "run", asked["stage"], FAULTS[asked["fault"]], Disk()
    copy(Path(asked["start"]), root)
    where, outcome = f"{stage}, {asked['fault']} at call {point}", "made"
    disk.arm(root, point, fault)
    try:
        do(stage, root)
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
        do(stage, root)
    except Exception:  # noqa: BLE001 - the same command must continue
        wrong.append(f"{where}: the same command: {traceback.format_exc()}")
    if visible(root) != expected:
        wrong.append(f"{where}: other files")
    return outcome, calls
