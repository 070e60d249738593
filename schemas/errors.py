"""One tree of errors, each with an exit code, what is wrong, where, and the command that fixes it.

`assert` is for our own bugs; everything a user can cause is one of these.
"""

from __future__ import annotations

from typing import Any

NOT_FINITE = "look for NaN in the models' weights, or use another dtype (student.dtype, teacher.dtype)"
"""What to do where a model gave a number that is not finite."""


def first_line(error: BaseException) -> str:
    """The first line of a message that says something, or else the kind of the error."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip()


class FireError(Exception):
    """Something failed. `what` is the fact, `where` the place (stage, shard, row, column), `fix` a command."""

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.fix = fix

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.fix:
            lines.append(f"  fix:   {self.fix}")
        return "\n".join(lines)


class ConfigError(FireError):
    """The command line, `fire.yaml` or a request is wrong: nothing was changed (exit 2)."""

    exit_code = 2


class FingerprintError(ConfigError):
    """A stage was started with other settings, inputs or models than those it is asked to continue with (exit 2)."""


class DataError(FireError):
    """Prompts, tables, model folders or shards hold something that cannot be used (exit 3)."""

    exit_code = 3


class DamagedError(DataError):
    """Bytes on disk are not the bytes their receipt names (exit 3)."""


class TokenizerError(DataError):
    """Two tokenizers give the same id different bytes, or an id is unknown to a model (exit 3)."""


class IncompleteError(FireError):
    """Work is missing that another command can supply; nothing is lost (exit 4)."""

    exit_code = 4


class EngineError(FireError):
    """A generation or scoring engine failed; finished shards are kept (exit 1)."""


class PartialError(EngineError):
    """An engine gave up on a call. `done`: its finished rows with their `trajectory_id` (an Arrow table), or None."""

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None, done: Any = None) -> None:
        super().__init__(what, where=where, fix=fix)
        self.done = done


class TrainingError(FireError):
    """Training cannot go on: wrong data for this model, or numbers that are not finite (exit 1)."""


class StorageError(FireError):
    """The file system refused: full disk, no permission, I/O error. Finished shards are kept (exit 1)."""
