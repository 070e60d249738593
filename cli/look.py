"""The commands that look: where a run stands, what is in it, what rules would do; and the demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import completion
from .errors import guarded, say
from .options import Json, RunArg, Set, SomeRound, Weights, carried, flag, open_run
from .progress import size_text
from .terminal import Terminal, hint, show, show_one


@guarded
def status(
    run: RunArg,
    watch: Annotated[bool, flag("--watch", help="look again and again while another process works on the run")] = False,
    every: Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help="of --watch: how often")] = 2.0,
    rounds: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="of --watch: until N rounds are trained; default: one more than now"),
    ] = None,
    as_json: Json = False,
) -> None:
    """What is done, how far the rest is, and what is next.

    --watch adds tokens per second and the time left of each stage. It may be
    started before the run is there, ends with 0 when the rounds are trained,
    and with 130 by Ctrl-C. With --json it prints a line for every change.
    """
    if watch:
        from .watch import watch_status

        watch_status(run, every, rounds, as_json)
    else:
        from .status import show_status

        show_status(run, as_json)


@guarded
def check(run: RunArg, as_json: Json = False) -> None:
    """Compare every finished file with its receipt.

    Reads every byte. Exit 3 if a file differs or is missing, with the command
    that makes it again.
    """
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
    hint(overview.next_command(opened))


@guarded
def inspect(
    run: RunArg,
    which: Annotated[
        str, typer.Argument(metavar="TRAJECTORY", help="row number or beginning of a trajectory_id")
    ] = "0",
    round: SomeRound = None,
    name: Weights = None,
    schema: Annotated[bool, flag("--schema", help="the columns of every table with units")] = False,
    as_json: Json = False,
) -> None:
    """One trajectory, its tokens coloured by weight.

    Under the text a table of its tokens: weight, coefficient and advantage,
    log probabilities and entropies of student (S) and teacher (T) in nats, and
    the rank of the token for the teacher.
    """
    from fire_data.shards import is_sealed

    from .inspect import show_schema, show_trajectory

    if schema:
        show_schema(as_json)
        return
    opened = open_run(run)
    number = opened.last_round() if round is None else round
    show_trajectory(opened, number, which, name, as_json)
    if is_sealed(opened.part("weights", number, name)):
        chosen = [] if name is None else ["--name", name]
        hint("fire", "explain", run, which, "--round", number, *chosen)


@guarded
def diagnose(
    run: RunArg,
    round: SomeRound = None,
    name: Weights = None,
    as_json: Json = False,
) -> None:
    """Does FiRe's premise hold here, and what looks ill?

    Reads the scores; no model is loaded. Every finding says what was measured,
    why it matters and what to do.
    """
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
            autocompletion=completion.rules,
        ),
    ] = None,
    round: SomeRound = None,
    late: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help="the first position that counts as late; default: by the 75 % quantile"),
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="draw it as .svg or .png")] = None,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Several rules on the same scores, side by side.

    What each keeps, how its weights are spread, where its signal is, and how
    far the rules agree. No model is loaded and no weights are written.
    """
    from .compare import show_comparison

    opened = open_run(run, overrides)
    show_comparison(opened, round, rules, late, plot, as_json, carried(opened, overrides))


@guarded
def rules(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME", help="one rule in full: a name, a+b, or file.py:Class", autocompletion=completion.rules
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """All rules, or one with formula, parameters and source."""
    from .rules import show_rule, show_rules

    if name is not None:
        show_rule(name, as_json)
        return
    show_rules(as_json)
    hint("fire rules NAME")


@guarded
def env(as_json: Json = False) -> None:
    """Versions and hardware, to paste into a bug report.

    Keys and tokens are left out, whatever they are called; home folders and
    user names are hidden.
    """
    from fire_data.environment import environment

    found = environment()
    show_one(found if as_json else _for_people(found), as_json)


def _for_people(found: dict[str, Any]) -> dict[str, Any]:
    """Facts in the same order, one package a line, sizes with units, and what is missing in one line."""
    lines: dict[str, Any] = {}
    for name, value in found.items():
        if name == "packages":
            lines |= {package: version for package, version in value.items() if version}
            lines["not installed"] = [package for package, version in value.items() if not version] or None
        elif name == "devices":
            lines[name] = [", ".join(size_text(v) if k == "memory_bytes" else v for k, v in d.items()) for d in value]
        elif name == "variables":
            lines |= value
        else:
            lines[name.removesuffix("_bytes")] = size_text(value) if name.endswith("_bytes") and value else value
    return {name: value for name, value in lines.items() if value is not None}


@guarded
def demo(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="where the small world and its runs go")],
    rule: Annotated[
        str,
        typer.Option(metavar="RULE", help="the rule to run beside uniform", autocompletion=completion.rules),
    ] = "fire",
    rounds: Annotated[int | None, typer.Option(min=1, metavar="N", help="rounds of each arm; default: 12")] = None,
    seed: Annotated[
        int, typer.Option(min=0, metavar="N", help="of the world, the sampling and the order of prompts")
    ] = 0,
    as_json: Json = False,
) -> None:
    """The whole loop on a small world, in minutes on a CPU.

    Makes a task, a teacher and a weak student, distils by the rule and, from
    the same student and seed, by `uniform`, and draws both learning curves. It
    leaves two ordinary runs to look at.
    """
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
