"""Calls by which Python changes or reads the disk, in this process: the n-th of them fails, or is the last one.

`disk` does this for all calls of all libraries, in a process of its own; this needs neither a compiler nor a process.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from fire_data import files


class Killed(BaseException):
    """Stands for kill -9: no handler of the code under test runs, and nothing it does reaches the disk."""


_PLACES: tuple[tuple[Any, str], ...] = (
    (os, "link"), (os, "fsync"), (os, "replace"), (os, "rename"), (os, "open"), (os, "unlink"), (os, "mkdir"),
    (pq, "write_table"), (pq, "read_metadata"), (files, "sha256_file"), (Path, "open"),
)  # fmt: skip
_TRAINING = "fire_data.trainstate"  # only where torch is there
_WRITERS = ("write_table", "save_file")


@contextmanager
def failing(at: int, what: int | Callable[[], BaseException], *, for_good: bool = False) -> Iterator[list[str]]:
    """The call of this number, from 0, raises OSError with this number, or what `what` makes: Killed.

    With `for_good` all later calls raise it too. Yields the names of the calls that were made so far.
    """
    calls: list[str] = []
    lock = threading.Lock()
    places = [*_PLACES, *([(sys.modules[_TRAINING], "save_file")] if _TRAINING in sys.modules else [])]

    def wrap(real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with lock:
                mine = len(calls)
                calls.append(name)
            if mine == at or (for_good and mine > at):
                if mine == at and name in _WRITERS:
                    with open(args[1], "wb") as file:  # a full disk, or a kill, leaves the beginning of the file
                        file.write(b"PAR1 torn")
                raise OSError(what, os.strerror(what)) if isinstance(what, int) else what()
            return real(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for place, name in places:
            patch.setattr(place, name, wrap(getattr(place, name), name))
        yield calls
