"""The application: every command by its name, in the order of the help page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from . import look, stages
from .errors import entry

app = typer.Typer(
    name="fire",
    help="Offline-first on-policy distillation: roll out, score, weigh, train, with tables in between.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

COMMANDS: dict[str, Callable[..., Any]] = {
    "init": stages.init,
    "rollout": stages.rollout,
    "score": stages.score,
    "weigh": stages.weigh,
    "train": stages.train,
    "run": stages.run_rounds,
    "eval": stages.evaluate,
    "status": look.status,
    "check": look.check,
    "inspect": look.inspect,
    "diagnose": look.diagnose,
    "compare": look.compare,
    "rules": look.rules,
    "env": look.env,
    "demo": look.demo,
}


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"fire-opd {version('fire-opd')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    """Offline-first on-policy distillation: roll out, score, weigh, train, with tables in between."""


for _name, _command in COMMANDS.items():
    app.command(_name)(_command)


def main() -> None:
    """Entry of the script `fire`."""
    entry(app)
