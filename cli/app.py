"""The application: every command by its name, in the order of the help page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from . import evals, explain, look, plan, report, share, stages, track
from .errors import entry
from .examples import epilog

app = typer.Typer(
    name="fire",
    help="Offline-first on-policy distillation: roll out, score, weigh, train, with tables in between.",
    epilog=epilog(""),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
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
    "env": look.env,
    "demo": look.demo,
}

# The groups of the help page.
PANELS = {
    "A round": ("init", "rollout", "verify", "score", "weigh", "train", "run", "eval"),
    "Look": ("plan", "status", "check", "inspect", "explain", "diagnose", "compare", "report", "rules", "track"),
    "Share": ("push", "pull"),
    "More": ("env", "demo"),
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
    _panel = next(panel for panel, names in PANELS.items() if _name in names)
    app.command(_name, epilog=epilog(_name), rich_help_panel=_panel)(_command)


def main() -> None:
    """Entry of the script `fire`."""
    entry(app)
