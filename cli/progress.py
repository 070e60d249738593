"""How far a stage is: what is done, how fast, how long it still takes, as one text for bars, plain lines and watchers.

A terminal gets a bar that moves. Anything else, a log for example, gets few lines: one at the start, one now and then,
one at the end of what took longer than a moment. Times are in seconds of the caller's clock.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

# A line of a log is due when both a while has passed and a tenth is done, or when nothing was said for long.
_WHILE_S, _LONG_S, _SHARE = 30.0, 300.0, 0.1
_MOMENT_S = 2.0  # what ends sooner has told all with its first line
_NARROW = 80  # cells; below them there is no room for a bar


@dataclass
class Task:
    """Something with a known end, and when it was counted. What was `done` at the start does not make it look fast."""

    what: str
    total: int
    unit: str
    done: int
    began: float
    tokens: int = 0
    before: int = field(init=False)
    last: float = field(init=False)

    def __post_init__(self) -> None:
        self.before, self.last = self.done, self.began

    def advance(self, count: int, tokens: int, now: float) -> None:
        self.done += count
        self.tokens += tokens
        self.last = now

    @property
    def ended(self) -> bool:
        return self.done >= self.total

    @property
    def rate(self) -> float | None:
        """Tokens per second up to the last count; None while there are none."""
        return self.tokens / (self.last - self.began) if self.tokens > 0 and self.last > self.began else None

    def left(self, now: float) -> float | None:
        """Seconds until the end at the pace so far; None while there is no pace, and at the end."""
        made = self.done - self.before
        if made <= 0 or self.ended:
            return None
        return max(0.0, (self.total - self.done) * (self.last - self.began) / made - (now - self.last))

    @property
    def whole(self) -> str:
        """`40 prompts`."""
        return size_text(self.total) if self.unit == "bytes" else f"{self.total:,} {self.unit}"

    @property
    def count(self) -> str:
        """`12/40 prompts`."""
        return f"{size_text(self.done) if self.unit == 'bytes' else f'{self.done:,}'}/{self.whole}"

    def pace(self, now: float) -> list[str]:
        """`1,234 tok/s` and `0:03:10 left`, as far as they are known."""
        left = self.left(now)
        return [
            *([f"{self.rate:,.0f} tok/s"] if self.rate is not None else []),
            *([f"{clock_text(left)} left"] if left is not None else []),
        ]


def clock_text(seconds: float) -> str:
    """Hours, minutes and seconds."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def size_text(count: float) -> str:
    """Bytes with a unit: `812 B`, `1.4 GB`; a thousand of one are one of the next."""
    units = ["B", "kB", "MB", "GB"]
    while count >= 999.5 and len(units) > 1:
        count /= 1000
        units.pop(0)
    return f"{count:.0f} {units[0]}" if count >= 9.95 or units[0] == "B" else f"{count:.1f} {units[0]}"


class Lines:
    """Says of a task, by `echo`, what a log should hold."""

    def __init__(self, echo: Callable[[str], None]) -> None:
        self.echo = echo
        self.said: tuple[float, int] = (0.0, 0)

    def started(self, task: Task) -> None:
        self._say(f"{task.what}: {task.count if task.done else task.whole}", task)

    def advanced(self, task: Task) -> None:
        """To be called after every count."""
        now = task.last
        if task.ended:
            if now - task.began >= _MOMENT_S:
                tokens = [f"{task.tokens:,} tokens"] if task.tokens else []
                rate = [f"{task.rate:,.0f} tok/s"] if task.rate is not None else []
                took = f"{clock_text(now - task.began)} in all"
                self._say(f"{task.what}: " + ", ".join([task.count, *tokens, *rate, took]), task)
            return
        then, done = self.said
        if now - then >= (_WHILE_S if task.done - done >= _SHARE * task.total else _LONG_S):
            self._say(f"{task.what}: " + ", ".join([task.count, *task.pace(now)]), task)

    def _say(self, text: str, task: Task) -> None:
        self.said = (task.last, task.done)
        self.echo(text)


def can_draw(console: Console) -> bool:
    """Whether lines that were printed can be drawn over: not in a file, a pipe or a dumb terminal, coloured or not."""
    return console.is_interactive and not console.is_dumb_terminal and console.file.isatty()


def bars(console: Console, clock: Callable[[], float]) -> Progress:
    """Lines that are drawn again and again, for tasks given as the field `of`; without bars where there is no room."""
    from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
    from rich.progress import Task as Shown
    from rich.text import Text

    class Told(ProgressColumn):
        def __init__(self, text: Callable[[Task], str]) -> None:
            super().__init__()
            self.text = text

        def render(self, shown: Shown) -> Text:
            task: Task | None = shown.fields["of"]
            return Text("" if task is None else self.text(task), no_wrap=True)

    wide = console.width >= _NARROW

    def pace(task: Task) -> str:
        known = task.pace(clock()) or [clock_text(clock() - task.began)]
        return " ".join(known if wide else known[-1:])

    columns = (TextColumn("{task.description}", markup=False), *([BarColumn(24)] if wide else []))
    return Progress(*columns, Told(lambda task: task.count), Told(pace), console=console, transient=True)
