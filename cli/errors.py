"""From an exception to words and an exit code: the one table, and the one place that catches everything."""

from __future__ import annotations

import errno
import functools
import os
import sys
import threading
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import typer

from fire_data.schemas.errors import FireError, first_line

P = ParamSpec("P")
R = TypeVar("R")

_HINTS = {
    "MemoryError": (
        "out of memory",
        "smaller score.tokens_per_batch, train.tokens_per_microbatch or rollout.rows_in_flight",
    ),
    "OutOfMemoryError": (
        "out of GPU memory",
        "smaller score.tokens_per_batch, train.tokens_per_microbatch or rollout.rows_in_flight",
    ),
    "ModuleNotFoundError": ("a package is not installed", "pip install 'fire-opd[torch,report]'"),
    "PermissionError": ("no permission", "check the owner of the run folder"),
}

_DISK = (errno.EIO, errno.EROFS, errno.ESTALE, errno.ENODEV)  # of models and other files that are not the run's


def guarded(command: Callable[P, R]) -> Callable[P, R]:
    """A command that ends in an exit code and a message, never in a traceback (FIRE_DEBUG=1 shows it)."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.TyperException, SystemExit):
            raise
        except KeyboardInterrupt:
            say("interrupted; the same command continues")
            if any(t.name.startswith("lane ") for t in threading.enumerate()):
                # Shards that are still computed would crash the interpreter while it takes itself apart.
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(130)
            raise typer.Exit(130) from None
        except BrokenPipeError:
            # Who reads our output has left; Python must not complain about it when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except FireError as error:
            _debug(error)
            say(f"error: {error}")
            raise typer.Exit(error.exit_code) from None
        except BaseException as error:  # noqa: BLE001 - the outermost layer: no traceback and exit 1, for panics of Rust too
            _debug(error)
            _explain(error)
            raise typer.Exit(1) from None

    return run


def entry(app: Callable[[], object]) -> None:
    """Call the whole application: also help and usage, printed before any command starts, leave no traceback."""
    try:
        app()
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # who reads our output has left
            raise SystemExit(0) from None
        raise
    except OSError as error:
        _debug(error)
        _explain(error)
        raise SystemExit(1) from None


def _explain(error: BaseException) -> None:
    what, fix = _HINTS.get(type(error).__name__, ("internal error", "FIRE_DEBUG=1 shows where; please report it"))
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        what, fix = "the disk is full", "free some space where the output goes, then the same command"
    elif isinstance(error, OSError) and error.errno in _DISK:
        what, fix = "the file system failed", "look at the disk or the mount, then the same command continues"
    kind, line = type(error).__name__, first_line(error)
    say(f"error: {what}: {line if line == kind else f'{kind}: {line}'}\n  fix:   {fix}")


def say(text: str) -> None:
    """Lines for people, on stderr."""
    typer.echo(visible_lines(text), err=True)


def visible(text: str) -> str:
    """Control characters as their escapes: no response, prompt or file name can steer the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def visible_lines(text: str) -> str:
    """As `visible`, with the line breaks kept."""
    return "\n".join(map(visible, text.split("\n")))


def _debug(error: Any) -> None:
    if os.environ.get("FIRE_DEBUG") == "1":
        raise error
