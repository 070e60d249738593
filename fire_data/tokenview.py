"""Runs of tokens for people: decoded so that multi-byte text stays whole, each with the numbers of its tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

import polars as pl

from fire_data.run import Run
from fire_data.schemas.errors import ConfigError, FireError, IncompleteError
from fire_data.schemas.tables import REWARD

_LONGEST_CHARACTER = 8  # tokens; a run of bytes that is no text ends here


class Piece(NamedTuple):
    """Text that one or more consecutive tokens decode to, from `start` to before `stop`."""

    text: str
    start: int
    stop: int


def student_tokenizer(run: Run) -> tuple[Any, str | None]:
    """The student's tokenizer; or None, and why there is none: whoever shows tokens still has their numbers."""
    try:
        from fire_data.models import load_tokenizer

        return load_tokenizer(run.config.student, run.root), None
    except FireError as error:
        return None, error.what
    except ModuleNotFoundError as error:
        return None, f"{error.name} is not installed"


def pieces(tokenizer: Any | None, ids: list[int]) -> list[Piece]:
    """Cut a response into the smallest runs of tokens that decode to whole characters.

    A token is decoded behind its predecessor, so that blanks between words are kept. The texts joined are the decoded
    response with special tokens shown. Without a tokenizer every token is a run of its own that has no text.
    """
    if tokenizer is None:
        return [Piece("", i, i + 1) for i in range(len(ids))]

    def decode(a: int, b: int) -> str:
        return str(tokenizer.decode(ids[a:b], skip_special_tokens=False, clean_up_tokenization_spaces=False))

    found: list[Piece] = []
    before, start = 0, 0
    for stop in range(1, len(ids) + 1):
        text = decode(before, stop)[len(decode(before, start)) :] if start > before else decode(start, stop)
        unfinished = text.endswith("\ufffd") and stop < len(ids) and stop - start < _LONGEST_CHARACTER
        if not unfinished:
            found.append(Piece(text, start, stop))
            before, start = start, stop
    return found


def trajectory(run: Run, round: int, which: str, name: str | None) -> dict[str, Any]:
    """One row of weights (or scores, if there are no weights yet): by trajectory_id, its beginning, or row number.

    Raises ConfigError if there is no such row.
    """
    lf = _best_table(run, round, name).with_row_index("row")
    chosen = lf.filter(pl.col("trajectory_id").str.starts_with(which))
    if which.isdecimal() and len(which) < 8:
        chosen = lf.filter(pl.col("row") == int(which))
    found = chosen.head(2).collect()
    if found.height != 1:
        what = "there is no trajectory" if found.height == 0 else "more than one trajectory begins with"
        total = lf.select(pl.len()).collect().item()
        fix = f"a trajectory_id, or a row from 0 to {total - 1}"
        raise ConfigError(f"{what} {which!r} in round {round}", where=str(run.root), fix=fix)
    return found.row(0, named=True)


def _best_table(run: Run, round: int, name: str | None) -> pl.LazyFrame:
    graded = [REWARD] if REWARD in run.addons(round) else []
    try:
        return run.weights(name, round, graded)
    except IncompleteError:
        if name is not None:
            raise
    try:
        return run.scores(round, graded)
    except IncompleteError:
        return run.rollouts(round)
