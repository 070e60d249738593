"""What people see: progress and notes on stderr, tables or JSON on stdout."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import typer

from .errors import say


class Terminal(AbstractContextManager["Terminal"]):
    """A Reporter that draws one progress bar a stage on stderr and prints notes above it."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self.console = Console(stderr=True)
        columns = (
            TextColumn("{task.description:<28}"),
            BarColumn(24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
        )
        self.progress = Progress(*columns, TimeElapsedColumn(), console=self.console, transient=True)
        self.task: Any = None

    def start(self, what: str, total: int, unit: str) -> None:
        if self.task is None:
            self.progress.start()
        else:
            self.progress.remove_task(self.task)
        self.task = self.progress.add_task(what, total=total, unit=unit)

    def advance(self, count: int) -> None:
        if self.task is not None:
            self.progress.advance(self.task, count)

    def note(self, text: str) -> None:
        self.console.print(text, style="dim", markup=False, highlight=False)

    def warn(self, text: str) -> None:
        self.console.print(f"warning: {text}", style="yellow", markup=False, highlight=False)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.task is not None:
            self.progress.stop()


def hint(*command: object) -> None:
    """The next command, last on stderr, as words to be quoted for the shell or as one finished text."""
    words = [str(word) for word in command]
    say("next: " + (words[0] if len(words) == 1 else shlex.join(words)))


def show(rows: Sequence[dict[str, Any]], as_json: bool, title: str | None = None) -> None:
    """Rows as a table for people or as JSON for machines, on stdout."""
    if as_json:
        typer.echo(json.dumps(list(rows), ensure_ascii=False, indent=1, default=str))
        return
    from rich.console import Console
    from rich.table import Table

    names = list(dict.fromkeys(k for row in rows for k in row))
    table = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for name in names:
        numeric = all(_numeric(row.get(name)) for row in rows)
        widest = max((len(text(row.get(name))) for row in rows), default=0) if numeric else None
        table.add_column(name, justify="right" if numeric else "left", overflow="fold", min_width=widest)
    for row in rows:
        table.add_row(*(text(row.get(n)) for n in names))
    Console(soft_wrap=False).print(table, markup=False)


def _numeric(value: Any) -> bool:
    """True for numbers, formatted ones included, and for nothing."""
    if isinstance(value, str):
        return value != "" and value.strip("+-.0123456789e") == ""
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
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{k}={text(v)}" for k, v in value.items())
    return visible(str(value))


def visible(text: str) -> str:
    """Control characters as their escapes: no response, prompt or file name can steer the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
