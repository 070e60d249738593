"""What people see: progress and notes on stderr, tables or JSON on stdout."""

from __future__ import annotations

import json
import shlex
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any

import typer

from .errors import say, visible, visible_lines
from .progress import Lines, Task, bars, can_draw

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID
    from rich.table import Table

_GAP = 2  # blanks between columns
_NARROW = 16  # cells


class Terminal(AbstractContextManager["Terminal"]):
    """A Reporter on stderr: notes, and how far a stage is, as a bar above which notes scroll, or as a few lines."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        from rich.console import Console

        self.console = Console(stderr=True, markup=False, emoji=False, highlight=False)
        self.clock = clock
        self.task: Task | None = None
        self.lines = Lines(self.note)
        self.bars = bars(self.console, clock) if can_draw(self.console) else None
        self.shown: dict[str, TaskID] = {}
        self.lock = threading.RLock()  # shards that are made in threads load what they need

    def start(self, what: str, total: int, unit: str, done: int = 0) -> None:
        self.task = Task(visible(what), total, unit, done, self.clock())
        if self.bars is None:
            self.lines.started(self.task)
        else:
            self._hide("waiting", "task")
            self._draw("task", self.task.what, total=total, completed=done, of=self.task)

    def advance(self, count: int, tokens: int = 0) -> None:
        if self.task is None:
            return
        self.task.advance(count, tokens, self.clock())
        if self.bars is None:
            self.lines.advanced(self.task)
        else:
            self._hide("waiting")
            self.bars.advance(self.shown["task"], count)

    def busy(self, what: str) -> None:
        if self.bars is None:
            self.note(what)
        else:
            self._hide("waiting")
            self._draw("waiting", visible(what), total=None, of=None)

    def pause(self) -> None:
        """Leave the terminal to another process until the next task."""
        if self.bars is not None:
            self._hide("waiting", "task")
            self.bars.stop()

    def _draw(self, name: str, text: str, **values: Any) -> None:
        assert self.bars is not None
        with self.lock:
            self.shown[name] = self.bars.add_task(text, **values)
            self.bars.start()

    def _hide(self, *names: str) -> None:
        with self.lock:
            for name in names:
                if self.bars is not None and name in self.shown:
                    self.bars.remove_task(self.shown.pop(name))

    def note(self, text: str) -> None:
        self.console.print(visible_lines(text), style="dim", soft_wrap=True)

    def warn(self, text: str) -> None:
        self.console.print(visible_lines(f"warning: {text}"), style="yellow", soft_wrap=True)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bars is not None:
            self.bars.stop()


def hint(*command: object) -> None:
    """The next command, last on stderr, as words to be quoted for the shell or as one finished text."""
    words = [str(word) for word in command]
    say("next: " + (words[0] if len(words) == 1 else shlex.join(words)))


def show(rows: Sequence[dict[str, Any]], as_json: bool, title: str | None = None) -> None:
    """Rows as a table for people or as JSON for machines, on stdout. Nothing is cropped in a narrow terminal."""
    if as_json:
        typer.echo(json.dumps(list(rows), ensure_ascii=False, indent=1, default=str))
        return
    table, needed = as_table(rows)
    console = stdout()
    if title is not None:
        console.print(visible(title), style="italic", soft_wrap=True)
    # What does not fit even so is wrapped by the terminal.
    stdout(width=max(console.width, needed)).print(table)


def as_table(rows: Sequence[dict[str, Any]]) -> tuple[Table, int]:
    """Rows as a table, and the cells that it needs at least for no digit to be lost."""
    from rich.cells import cell_len
    from rich.table import Table

    names = list(dict.fromkeys(k for row in rows for k in row))
    columns = {name: [text(row.get(name)) for row in rows] for name in names}
    numeric = {name for name in names if all(_numeric(row.get(name)) for row in rows)}
    words = {name: max(map(cell_len, name.split()), default=0) for name in names}
    # Text is folded down to this width but no further, so that it stays text.
    narrow = max([_NARROW, *(words[name] for name in names if name not in numeric)])
    table = Table(header_style="bold", box=None, pad_edge=False)
    needed = _GAP * (len(names) - 1)
    for name, cells in columns.items():
        widest = max(map(cell_len, cells), default=0)
        if name in numeric:
            width = max(widest, words[name])
            table.add_column(visible(name), justify="right", width=width)
        else:
            width = min(max(widest, cell_len(name)), narrow)
            table.add_column(visible(name), overflow="fold")
        needed += width
    for i in range(len(rows)):
        table.add_row(*(cells[i] for cells in columns.values()))
    return table, needed


def stdout(**options: Any) -> Console:
    """A rich console that prints texts as they are and leaves a reader that has gone to `errors.guarded`."""
    from rich.console import Console

    class Plain(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    return Plain(markup=False, emoji=False, highlight=False, **options)


def _numeric(value: Any) -> bool:
    """True for numbers, formatted ones included, and for nothing."""
    if isinstance(value, str):
        return value != "" and value.strip("+-.,:0123456789e") == ""
    return value is None or isinstance(value, int | float)


def show_one(values: dict[str, Any], as_json: bool) -> None:
    """One object: `name  value` lines, or JSON."""
    if as_json:
        typer.echo(json.dumps(values, ensure_ascii=False, indent=1, default=str))
        return
    width = max(map(len, values), default=0)
    for name, value in values.items():
        typer.echo(f"{name:<{width}}  {text(value)}")


def text(value: Any) -> str:
    """A value for a cell: four significant digits, a dash for nothing."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(text, value))
    if isinstance(value, dict):
        return ", ".join(f"{visible(str(k))}={text(v)}" for k, v in value.items())
    return visible(str(value))
