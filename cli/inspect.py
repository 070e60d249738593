"""`fire inspect`: one trajectory in the terminal, tokens coloured by weight, numbers under them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from .terminal import show, show_one

if TYPE_CHECKING:
    from fire_data.run import Run
    from fire_data.tokenview import Piece

_NUMBERS = (
    "weight",
    "coefficient",
    "advantage",
    "student_logprob",
    "teacher_logprob",
    "student_entropy",
    "teacher_entropy",
)
_FACTS = (
    "trajectory_id",
    "prompt_id",
    "round",
    "sample",
    "step",
    "finish_reason",
    "answer",
    "reward",
    "keep",
    "drop_reason",
    "length",
)
_SHADES = (
    "on grey11",
    "on grey23",
    "on grey35",
    "on dark_green",
    "on green4",
    "on yellow4",
    "on dark_orange3",
    "on red3",
)


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
    from fire_data.models import load_tokenizer
    from fire_data.tokenview import pieces, trajectory

    row = trajectory(run, round, which, name)
    if as_json:
        show_one(row, True)
        return
    show_one({k: row[k] for k in _FACTS if k in row}, False)
    found = pieces(load_tokenizer(run.config.student, run.root), row["response_ids"])
    typer.echo("prompt    " + " | ".join(f"{m['role']}: {m['content']}" for m in row["messages"] or []))
    _coloured(found, row)
    columns = [c for c in _NUMBERS if c in row]
    rows = [
        {
            "position": p.start,
            "token": _visible(p.text),
            "id": row["response_ids"][p.start],
            **{c: row[c][p.start] for c in columns},
        }
        for p in found
    ]
    show(rows, False)


def _coloured(found: list[Piece], row: dict[str, Any]) -> None:
    """The response with a background that grows with the weight; a legend gives the ends of the scale."""
    from rich.console import Console
    from rich.text import Text

    weights = row.get("weight") or [0.0] * len(row["response_ids"])
    low, high = min(weights, default=0.0), max(weights, default=0.0)
    line = Text()
    for piece in found:
        value = max(weights[piece.start : piece.stop])
        shade = int((value - low) / (high - low) * (len(_SHADES) - 1)) if high > low else 0
        line.append(_visible(piece.text), style=f"white {_SHADES[shade]}")
    console = Console()
    console.print(line, soft_wrap=True)
    legend = Text(f"weight {low:.3g} ")
    for style in _SHADES:
        legend.append("  ", style=style)
    console.print(legend.append(f" {high:.3g}"))


def _visible(text: str) -> str:
    """Control characters as their escapes: a response cannot steer the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
