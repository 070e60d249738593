"""What is fuzzed: a reader of bytes, valid examples of them, and a strategy that bends these."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

from hypothesis import strategies as st


class Target(NamedTuple):
    """`run` gives a result or raises a FireError for any bytes. `seeds`: valid ones to start from."""

    run: Callable[[bytes], object]
    seeds: Callable[[], list[bytes]]
    strategy: Callable[[], st.SearchStrategy[bytes]]


@cache
def scratch() -> Path:
    """A folder for the files of all targets, which ends with the process."""
    _HELD.append(tempfile.TemporaryDirectory(prefix="fire-fuzz-", ignore_cleanup_errors=True))
    return Path(_HELD[-1].name)


_HELD: list[tempfile.TemporaryDirectory[str]] = []


def written(name: str, data: bytes) -> Path:
    """A file of the scratch folder with these bytes."""
    path = scratch() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def same(left: object, right: object, what: str) -> None:
    """A bug of ours, not of the input's: AssertionError, which is a finding."""
    assert left == right, f"{what}: {left!r:.300} is not {right!r:.300}"
