"""`--launch N`: a command that starts itself as N processes, and which of these shows what."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from .terminal import Terminal

if TYPE_CHECKING:
    from fire_data.run import Run
    from fire_data.session import Session


@contextmanager
def one_voice() -> Iterator[None]:
    """Of several processes on a machine, the first tells of an error that all of them meet before they can talk."""
    from fire_data.schemas.errors import FireError

    try:
        yield
    except FireError as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            raise typer.Exit(error.exit_code) from None
        raise


@contextmanager
def alone_or_member(run: Run) -> Iterator[Terminal | None]:
    """Join the processes that train together, if there are others. The first one has a terminal."""
    from fire_data.distributed import first, member

    with member(run.config.train.device):
        if first():
            with Terminal() as terminal:
                yield terminal
        else:
            yield None


def speaks() -> bool:
    """Whether this process shows the result and the next command."""
    return os.environ.get("RANK", "0") == "0" and os.environ.get("FIRE_LAUNCHED") != "quiet"


def launched() -> list[str]:
    """The option by which this process was started, for the next command."""
    return ["--launch", os.environ["WORLD_SIZE"]] if "FIRE_LAUNCHED" in os.environ else []


def refuse_members() -> None:
    """Raise ConfigError in one of several processes: only training is for them."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ:
        from fire_data.schemas.errors import ConfigError

        with one_voice():
            raise ConfigError("only `fire train` runs under torchrun", fix="the same command with --launch N instead")


def train_on(
    processes: int,
    run: Run,
    round: int,
    overrides: Sequence[str] | None,
    *flags: str,
    quiet: bool = False,
) -> None:
    """`fire train` on several processes of this machine; when they have ended, raise Exit if one failed."""
    from fire_data.launch import launch

    settings = [word for setting in overrides or () for word in ("--set", setting)]
    arguments = ["train", run.root, "--round", round, *flags, *settings]
    try:
        code = launch(arguments, processes, run.config.train.device, quiet=quiet)
    finally:
        if sys.stderr.isatty():
            sys.stderr.write("\x1b[?25h")  # a process that was ended while it drew a bar had hidden the cursor
    if code:
        raise typer.Exit(code)


def trainer(processes: int, overrides: Sequence[str] | None, terminal: Terminal) -> Callable[[Session, int], None]:
    """What `refresh` trains a round with: several processes, which have the terminal meanwhile."""

    def train(session: Session, round: int) -> None:
        terminal.pause()
        train_on(processes, session.run, round, overrides, quiet=True)

    return train
