"""`fire inspect`: one trajectory in the terminal, tokens coloured by weight, numbers under them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from .errors import say, visible
from .terminal import show, show_one, stdout

if TYPE_CHECKING:
    from fire_data.run import Run
    from fire_data.tokenview import Piece

_NUMBERS = {
    "weight": ("weight", "{:.3f}"),
    "coef": ("coefficient", "{:+.1e}"),
    "adv": ("advantage", "{:+.3f}"),
    "logp S": ("student_logprob", "{:.3f}"),
    "logp T": ("teacher_logprob", "{:.3f}"),
    "H S": ("student_entropy", "{:.3f}"),
    "H T": ("teacher_entropy", "{:.3f}"),
    "rank": ("teacher_rank", "{:d}"),
}
_FACTS: tuple[str, ...] = ("trajectory_id", "prompt_id", "round", "sample", "step", "finish_reason")
_FACTS += ("answer", "reward", "keep", "drop_reason", "length")
# Cividis, dark to light: the order is read from the brightness, so it does not need colour vision.
_SHADES: tuple[str, ...] = (
    "white on #00204c",
    "white on #31446b",
    "white on #666970",
    "black on #958f78",
    "black on #cbba69",
)
_SHADES += ("black on #ffe945",)


def show_schema(as_json: bool) -> None:
    """The columns of every table with type, unit and meaning."""
    from fire_data.schemas.tables import TABLES

    rows = [
        {"table": table, "column": c.name, "type": str(c.type), "unit": c.unit, "per": c.per, "meaning": c.meaning}
        for table, columns in TABLES.items()
        for c in columns
    ]
    show(rows, as_json)


def show_trajectory(run: Run, round: int, which: str, name: str | None, as_json: bool) -> None:
    """One trajectory: facts, the coloured response, and a table of its tokens."""
    from fire_data.tokenview import pieces, student_tokenizer, trajectory

    row = trajectory(run, round, which, name)
    if as_json:
        show_one(row, True)
        return
    show_one({k: row[k] for k in _FACTS if k in row}, False)
    for message in row["messages"] or []:
        typer.echo(visible(f"{message['role']}: {message['content']}"))
    tokenizer, missing = student_tokenizer(run)
    found = pieces(tokenizer, row["response_ids"])
    if missing is None:
        _coloured(found, row.get("weight") or [])
    else:
        say(f"tokens are shown without their text: {missing}")
        typer.echo(visible(row["response"]))
    columns = {title: spec for title, spec in _NUMBERS.items() if spec[0] in row}
    rows = []
    for piece in found:
        for i in range(piece.start, piece.stop):
            # Tokens that only together make characters share one text, shown with the first of them.
            values = {t: form.format(row[c][i]) for t, (c, form) in columns.items()}
            rows.append(
                {"": i, "token": piece.text if i == piece.start else "", "id": row["response_ids"][i], **values}
            )
    show(rows, False)


def _coloured(found: list[Piece], weights: list[float]) -> None:
    """The response with a background that brightens with the weight; a legend gives the ends of the scale."""
    from rich.text import Text

    low, high = min(weights, default=0.0), max(weights, default=0.0)
    line = Text()
    for piece in found:
        value = max(weights[piece.start : piece.stop], default=low)
        shade = int((value - low) / (high - low) * (len(_SHADES) - 1)) if high > low else 0
        line.append(visible(piece.text), style=_SHADES[shade] if weights else "")
    console = stdout()
    console.print(line, soft_wrap=True)
    if weights:
        legend = Text(f"weight {low:.3g} ")
        for style in _SHADES:
            legend.append("  ", style=style)
        console.print(legend.append(f" {high:.3g}"), soft_wrap=True)
