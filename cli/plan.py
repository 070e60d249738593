"""`fire plan`: the coming rounds as a table, what the numbers rest on, what models take, and the first bottleneck."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .errors import guarded, say, visible
from .options import Json, RunArg, Set, open_run
from .progress import size_text
from .terminal import hint, show, show_one


@guarded
def plan(
    run: RunArg,
    rounds: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="rounds in all, as of `fire run`; default: one more than now")
    ] = None,
    speeds: Annotated[
        list[str] | None,
        typer.Option(
            "--tokens-per-s",
            metavar="STAGE=X",
            help="response tokens per second of rollout, score, weigh, train or eval; may be repeated",
        ),
    ] = None,
    length: Annotated[
        float | None, typer.Option(metavar="TOKENS", help="mean length of a response; default: as measured")
    ] = None,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """What the coming rounds would make, skip or refuse, and cost.

    A dry run: loads no model, downloads none, changes nothing. Numbers are
    measured in this run where they can be, else given, else assumed: those have
    a ~, and what they rest on is said below the table.
    """
    from fire_data.overview import next_command
    from fire_data.plan import plan as planned

    opened = open_run(run, overrides)
    found = planned(opened, rounds, speeds=_speeds(speeds or []), length=length)
    if as_json:
        show_one(found, True)
    else:
        show([_line(row) for row in found["stages"]], False)
        typer.echo("")
        for text in _below(found):
            typer.echo(visible(text))
    refused = next((row for row in found["stages"] if row["action"] == "refused"), None)
    if refused is not None:
        say(f"{refused['stage']} of round {refused['round']} would be refused")
    hint(next_command(opened))


def _speeds(given: list[str]) -> dict[str, float]:
    from fire_data.schemas.errors import ConfigError

    found = {}
    for text in given:
        name, _, number = text.partition("=")
        try:
            found[name.strip()] = float(number)
        except ValueError:
            fix = "--tokens-per-s rollout=2500"
            raise ConfigError(f"{text!r} is no throughput", where="--tokens-per-s", fix=fix) from None
    return found


def _line(row: dict[str, Any]) -> dict[str, Any]:
    """A stage in one line: what is left to do and what it costs."""
    busy = row["action"] in ("make", "continue")
    return {
        "round": row["round"],
        "stage": row["stage"],
        "to do": _to_do(row) if busy else row["action"],
        "trajectories": _marked(row["trajectories"], "{:,.0f}") if busy else None,
        "tokens": _marked(row["tokens"], "{:,.0f}") if busy else None,
        "disk": _marked(row["bytes"], "", size_text) if busy else None,
        "time": _marked(row["seconds"], "", _time) if busy else None,
        "GPU-hours": _marked(row["gpu_hours"], "{:.3g}") if busy else None,
        "why": row["why"] or None,
    }


def _to_do(row: dict[str, Any]) -> str:
    if row["steps"] is not None:
        return f"{row['steps']['left']:,} of {row['steps']['planned']:,} steps"
    return f"{row['shards']['to_make']:,} of {row['shards']['planned']:,} shards"


def _below(found: dict[str, Any]) -> list[str]:
    """What the table rests on, line by line."""
    sums, machine = found["totals"], found["machine"]
    size = _sum(sums["bytes"], "of disk", form=size_text)
    written, hours = _sum(sums["tokens"], "response tokens"), _sum(sums["gpu_hours"], "GPU-hours", "{:.3g}")
    free = size_text(machine["disk_free"]["value"])
    lines = [
        f"in all     {written}, {size} ({free} free), {_sum(sums['seconds'], '', form=_time)}, {hours}",
        f"length     {_marked(found['length'], '{:,.1f}')} tokens a response: {_told(found['length'])}",
    ]
    speeds = {row["stage"]: row["tokens_per_s"] for row in found["stages"] if row["tokens"]["value"]}
    for stage, speed in speeds.items():
        lines.append(f"{'tokens/s':<10} {stage}: {_told(speed, '{:,.0f} ')}")
    for model in found["models"]:
        count, held = model["parameters"], model["memory"]
        text = f", {_marked(held, '', size_text)} to run it" if held["value"] else ""
        lines.append(f"{'model':<10} {model['who']} {model['model']}: {_told(count, '{:,.0f} parameters ')}{text}")
    held = found["training"]["memory"]
    on_top = f"{_marked(held, '', size_text)}, activations on top: {_told(held)}"
    lines.append(f"{'training':<10} {on_top if held['value'] else _told(held)}")
    lines.append(f"{'not looked':<10} {found['not_compared']}")
    first = found["bottleneck"]
    return [*lines, f"{'first':<10} bottleneck: {first['what']} ({first['why']}). {first['do']}"]


def _sum(figure: dict[str, Any], unit: str, pattern: str = "{:,.0f}", form: Any = None) -> str:
    """A sum with its unit; where a part of it is not known, that it is at least this."""
    known = _marked(figure, pattern, form)
    least = "at least " if known is not None and "not" in figure["how"] else ""
    return f"{least}{known or 'unknown'} {unit}".strip()


def _told(figure: dict[str, Any], pattern: str = "") -> str:
    """A number, if a pattern is given, with its origin."""
    if figure["value"] is None:
        return f"not known: {figure['how']}"
    return f"{_marked(figure, pattern) if pattern else ''}({figure['origin']}, {figure['how']})"


def _marked(figure: dict[str, Any], pattern: str, form: Any = None) -> str | None:
    """A number for people, with a ~ if it rests on an assumption; None if nobody knows it."""
    if figure["value"] is None:
        return None
    text = form(figure["value"]) if form else pattern.format(figure["value"])
    return f"~{text}" if figure["origin"] == "assumed" and figure["value"] else text


def _time(seconds: float) -> str:
    """Seconds in a unit that suits them."""
    for limit, size, unit in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 86_400:.3g} days"
