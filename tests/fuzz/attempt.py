"""One input and what came of it: a result or a documented error within the limits, or a finding."""

from __future__ import annotations

import resource
import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from tests.fuzz.target import Target

SECONDS = 5.0
MEMORY = 2 << 30  # bytes that all inputs of a process together may add to its address space
LONGEST = 20_000  # characters of a message


class TooSlow(BaseException):
    """An input took longer than `SECONDS`."""


def finding(target: Target, data: bytes) -> tuple[str, str] | None:
    """None if `data` is read or refused as documented; else what went wrong and where, and the traceback."""
    from fire_data.schemas.errors import FireError

    try:
        with _limited():
            target.run(data)
    except FireError as error:
        if error.exit_code in (1, 2, 3, 4) and error.what and len(str(error)) <= LONGEST:
            return None
        return f"a message of {len(str(error))} characters: {type(error).__name__}", str(error)[:LONGEST]
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001 - a panic of Polars is no Exception
        ours = [
            f
            for f in traceback.extract_tb(error.__traceback__)
            if "/fire_data/" in f.filename or "/tests/" in f.filename
        ]
        at = f"{ours[-1].filename.rpartition('/')[2]}:{ours[-1].lineno}" if ours else "?"
        return f"{type(error).__name__} at {at}", "".join(traceback.format_exception(error))
    return None


def limit_memory() -> None:
    """This process gets no more than `MEMORY` beyond what it has now: more is a MemoryError, or its end."""
    with open("/proc/self/statm") as f:
        now = int(f.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))


@contextmanager
def _limited() -> Iterator[None]:
    def late(number: int, frame: FrameType | None) -> None:
        raise TooSlow(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL if before is None else before)
