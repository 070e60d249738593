"""The commands that look: where a run stands, what is in it, what rules would do; and the demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .errors import guarded, say
from .options import Json, RunArg, Set, open_run
from .terminal import Terminal, hint, show, show_one


@guarded
def status(run: RunArg, as_json: Json = False) -> None:
    """Which stages of which rounds are done."""
    from fire_data import overview

    opened = open_run(run)
    rows = overview.status(opened)
    if rows or as_json:
        show(rows, as_json)
    hint(overview.next_command(opened))


@guarded
def check(run: RunArg, as_json: Json = False) -> None:
    """Compare every finished file with its receipt; exit 3 if one differs."""
    from fire_data import overview

    opened = open_run(run)
    damage = overview.check(opened)
    if damage or as_json:
        show(damage, as_json)
    if damage:
        say(f"damaged files: {len(damage)}")
        hint(damage[0]["fix"])
        raise typer.Exit(3)
    say("every file is as its receipt says")


@guarded
def inspect(
    run: RunArg,
    which: Annotated[
        str, typer.Argument(metavar="TRAJECTORY", help="row number or beginning of a trajectory_id")
    ] = "0",
    round: Annotated[int | None, typer.Option("--round", min=0, help="default: the last with rollouts")] = None,
    name: Annotated[str | None, typer.Option(help="folder under weights/")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="the columns of every table with units")] = False,
    as_json: Json = False,
) -> None:
    """Show one trajectory with its tokens coloured by weight and the numbers under them."""
    from .inspect import show_schema, show_trajectory

    if schema:
        show_schema(as_json)
        return
    opened = open_run(run)
    show_trajectory(opened, opened.last_round() if round is None else round, which, name, as_json)


@guarded
def diagnose(
    run: RunArg,
    round: Annotated[int | None, typer.Option("--round", min=0, help="default: the last with scores")] = None,
    name: Annotated[str | None, typer.Option(metavar="WEIGHTS", help="folder under weights/")] = None,
    as_json: Json = False,
) -> None:
    """Check FiRe's premise and known pathologies on the scores; no model is loaded."""
    from .diagnose import show_diagnosis

    show_diagnosis(open_run(run), round, name, as_json)


@guarded
def compare(
    run: RunArg,
    rules: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help="names, a+b or file.py:Class, each with parameters in square brackets; default: fire and controls",
        ),
    ] = None,
    round: Annotated[int | None, typer.Option("--round", min=0, help="default: the last with scores")] = None,
    late: Annotated[
        int | None, typer.Option(min=0, help="the first position that counts as late; default: by the 75 % quantile")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="draw it as .svg or .png")] = None,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Compare rules on one scored table: what each keeps, where its signal is, how far they agree."""
    from .compare import show_comparison

    show_comparison(open_run(run, overrides), round, rules, late, plot, as_json)


@guarded
def rules(
    name: Annotated[str | None, typer.Argument(help="one rule in full: a name, a+b, or file.py:Class")] = None,
    as_json: Json = False,
) -> None:
    """List the rules, or show one with formula, parameters and source."""
    from .rules import show_rule, show_rules

    if name is not None:
        show_rule(name, as_json)
        return
    show_rules(as_json)
    hint("fire rules NAME")


@guarded
def env(as_json: Json = False) -> None:
    """Versions, devices and threads: what to paste into a bug report."""
    from fire_data.environment import environment

    show_one(environment(), as_json)


@guarded
def demo(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="where the small world and its runs go")],
    rule: Annotated[str, typer.Option(help="the rule to run beside uniform")] = "fire",
    rounds: Annotated[int | None, typer.Option(min=1, help="refresh rounds of each arm")] = None,
    seed: Annotated[int, typer.Option(min=0, help="of the world, the sampling and the order of prompts")] = 0,
    as_json: Json = False,
) -> None:
    """Make a small world, a teacher and a weak student, and distil: the whole loop in minutes on a CPU."""
    from fire_data.demo.arms import run_demo

    with Terminal() as terminal:
        result = run_demo(folder, rule=rule, rounds=rounds, seed=seed, report=terminal)
    if as_json:
        show(result.table, True)
    else:
        show(result.table, False, title=f"student of {folder}")
        say(f"learning curve: {result.page}")
        say(
            f"the demo took {result.seconds:.0f} s in all: "
            + ", ".join(f"{k} {v:.0f} s" for k, v in result.timing.items())
        )
    hint("fire", "inspect", result.run)
