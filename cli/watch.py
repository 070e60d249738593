"""`fire status --watch`: how far a round is and how fast, looked up again and again while another process works on it.

It ends with 0 when its goal is reached; Ctrl-C ends it with 130, as it ends every command.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from .errors import visible
from .options import open_run
from .progress import Task, can_draw, clock_text
from .terminal import as_table, hint, stdout

if TYPE_CHECKING:
    from fire_data.standing import Seen, Standing

Look = dict[str, Any]
"""What one look showed, JSON-ready: the round, how many are the goal, and the stages of that round."""


def watch_status(
    root: Path,
    every: float,
    rounds: int | None,
    as_json: bool,
    *,
    clock: Callable[[], float] = time.monotonic,
    wait: Callable[[float], None] = time.sleep,
) -> None:
    """Look every so many seconds until `rounds` rounds are trained, by default the one that is being made.

    The run may come later. A terminal shows one table that changes; anything else gets a line, or a JSON object, for
    every change.
    """
    from fire_data.overview import next_command

    looks = _looks(root, every, rounds, clock, wait)
    if as_json:
        for look, _ in _changes(looks):
            typer.echo(json.dumps(look, ensure_ascii=False))
    elif can_draw(stdout()):
        _draw(root, looks)
    else:
        for look, changed in _changes(looks):
            told = [_line(look["round"], s) for s in changed if s["state"] != "-"]
            for line in told if look["stages"] else [_title(root, look)]:
                typer.echo(visible(line))
    hint(next_command(open_run(root)))


def _looks(
    root: Path, every: float, rounds: int | None, clock: Callable[[], float], wait: Callable[[float], None]
) -> Iterator[Look]:
    """What is there, every so many seconds, until the goal is reached; no round and no stage while there is no run."""
    from fire_data.standing import standings

    paces = _Paces(clock)
    seen: Seen = {}
    while True:
        if not (root / "fire.yaml").is_file():
            yield {"round": None, "rounds": rounds, "stages": []}
        else:
            run = open_run(root)
            number = run.current_round()
            rounds = rounds or number + 1
            shown = min(number, rounds - 1)
            stages = [paces.timed(shown, stage) for stage in standings(run, shown, seen)]
            yield {"round": shown, "rounds": rounds, "stages": stages}
            if number >= rounds:
                return
        wait(every)


def _changes(looks: Iterable[Look]) -> Iterator[tuple[Look, list[dict[str, Any]]]]:
    """The first look, and those that differ from the one before, with the stages in which they do."""
    before: dict[str, Any] | None = None
    for look in looks:
        now = {s["stage"]: (look["round"], s["state"], s["done"]) for s in look["stages"]}
        if now != before:
            yield look, [s for s in look["stages"] if now[s["stage"]] != (before or {}).get(s["stage"])]
        before = now


def _draw(root: Path, looks: Iterable[Look]) -> None:
    from rich.console import Group
    from rich.live import Live

    console = stdout()
    with Live(console=console, auto_refresh=False) as live:
        for look in looks:
            table, _ = as_table([_row(s) for s in look["stages"]])
            live.update(Group(visible(_title(root, look)), table), refresh=True)


def _title(root: Path, look: Look) -> str:
    if look["round"] is None:
        return f"waiting for {root / 'fire.yaml'}"
    return f"{root}: round {look['round']}, until {look['rounds']} trained"


def _row(stage: dict[str, Any]) -> dict[str, Any]:
    rate, left = stage["tokens_per_second"], stage["seconds_left"]
    return {
        "stage": stage["stage"],
        "state": stage["state"],
        "done": f"{stage['done']}/{stage['total']} {stage['unit']}" if stage["total"] else None,
        "tokens": f"{stage['tokens']:,}" if stage["tokens"] else None,
        "tok/s": None if rate is None else f"{rate:,.0f}",
        "left": None if left is None else clock_text(left),
    }


def _line(round: int, stage: dict[str, Any]) -> str:
    row = _row(stage)
    units = {"tokens": " tokens", "tok/s": " tok/s", "left": " left"}
    known = [f"{row[name]}{unit}" for name, unit in units.items() if row[name] is not None]
    return ", ".join([f"round {round} {row['stage']}: {row['state']}", *([row["done"]] if row["done"] else []), *known])


class _Paces:
    """Remembers when each stage was first seen, and how far it was then."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.tasks: dict[tuple[int, str], tuple[Task, int]] = {}

    def timed(self, round: int, now: Standing) -> dict[str, Any]:
        """A stage with tokens per second and seconds left, JSON-ready; None until it has moved under our eyes."""
        moment, key = self.clock(), (round, now.stage)
        task, tokens = self.tasks.get(key, (None, 0))
        if task is None or now.done < task.done or now.total != task.total:  # new, begun by now, or begun anew
            task, tokens = Task(now.stage, now.total, now.unit, now.done, moment), now.tokens
            self.tasks[key] = task, tokens
        if now.done > task.done:
            task.advance(now.done - task.done, now.tokens - tokens - task.tokens, moment)
        return dataclasses.asdict(now) | {"tokens_per_second": task.rate, "seconds_left": task.left(moment)}
