"""The application: every command by its name, in the order of the help page."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any

import typer
import typer.main
from typer.core import TyperGroup

from . import evals, experiment, explain, look, plan, report, share, stages, track
from .errors import entry
from .examples import epilog

_UNBROKEN = "\b\n"  # before a paragraph whose lines a help page leaves as they are

_STYLE: dict[str, Any] = {
    "pretty_exceptions_enable": False,
    "rich_markup_mode": None,  # help pages in plain text: importing what draws boxes would double the time to start
    "context_settings": {"help_option_names": ["--help", "-h"]},
}


class Grouped(TyperGroup):
    """The application: its commands are built when one is asked for, and listed in the groups of `PANELS`."""

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        self.commands: Any = _Built()

    def list_commands(self, ctx: Any) -> list[str]:
        """Their names, in the order of the help page."""
        return list(COMMANDS)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write one section per group; names begin in one column."""
        for panel, names in PANELS.items():
            with formatter.section(panel):
                width = max(map(len, COMMANDS))
                formatter.write_dl([(f"{name:<{width}}", _first_line(COMMANDS[name])) for name in names])


class _Built(Mapping[str, Any]):
    """The commands by name. To build all of them takes as long as to import typer, and one is wanted, or none."""

    def __getitem__(self, name: str) -> Any:
        return _build(name)

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


@functools.cache
def _build(name: str) -> Any:
    alone = typer.Typer(add_completion=False, **_STYLE)
    alone.command(name, epilog=f"{_UNBROKEN}{epilog(name)}")(COMMANDS[name])
    return typer.main.get_command(alone)


def _first_line(command: Callable[..., Any]) -> str:
    return (command.__doc__ or "").strip().partition("\n")[0]


app = typer.Typer(
    name="fire",
    help="Offline-first on-policy distillation: roll out, score, weigh, train, with tables in between.",
    epilog=f"{_UNBROKEN}{epilog('')}",
    no_args_is_help=True,
    cls=Grouped,
    **_STYLE,
)

COMMANDS: dict[str, Callable[..., Any]] = {
    "init": stages.init,
    "rollout": stages.rollout,
    "verify": evals.verify,
    "score": stages.score,
    "weigh": stages.weigh,
    "train": stages.train,
    "run": stages.run_rounds,
    "eval": evals.evaluate,
    "plan": plan.plan,
    "status": look.status,
    "check": look.check,
    "inspect": look.inspect,
    "explain": explain.explain,
    "diagnose": look.diagnose,
    "compare": look.compare,
    "report": report.report,
    "rules": look.rules,
    "track": track.track,
    "push": share.push,
    "pull": share.pull,
    "experiment": experiment.experiment,
    "env": look.env,
    "demo": look.demo,
}

# The groups of the help page.
PANELS = {
    "A round": ("init", "rollout", "verify", "score", "weigh", "train", "run", "eval"),
    "Look": ("plan", "status", "check", "inspect", "explain", "diagnose", "compare", "report", "rules", "track"),
    "Share": ("push", "pull"),
    "More": ("experiment", "env", "demo"),
}


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"fire-opd {version('fire-opd')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", metavar="", callback=_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    """Offline-first on-policy distillation: roll out, score, weigh, train, with tables in between."""


def main() -> None:
    """Entry of the script `fire`."""
    entry(app)
