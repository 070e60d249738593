"""The application: every command by its name, in the order of the help page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from . import evals, experiment, explain, look, plan, report, share, stages, track
from .errors import entry
from .examples import epilog

_UNBROKEN = "\b\n"  # before a paragraph whose lines a help page leaves as they are


class Grouped(TyperGroup):
    """The application with its commands listed in the groups of `PANELS`."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write one section per group; names begin in one column."""
        for panel, names in PANELS.items():
            with formatter.section(panel):
                width = max(map(len, COMMANDS))
                formatter.write_dl([(f"{name:<{width}}", self.commands[name].get_short_help_str(79)) for name in names])


app = typer.Typer(
    name="fire",
    help="Offline-first on-policy distillation: roll out, score, weigh, train, with tables in between.",
    epilog=f"{_UNBROKEN}{epilog('')}",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # help pages in plain text: importing what draws boxes would double the time to start
    cls=Grouped,
    context_settings={"help_option_names": ["--help", "-h"]},  # commands inherit it
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


for _name, _command in COMMANDS.items():
    app.command(_name, epilog=f"{_UNBROKEN}{epilog(_name)}")(_command)


def main() -> None:
    """Entry of the script `fire`."""
    entry(app)
