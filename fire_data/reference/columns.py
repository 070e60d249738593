"""The page of all columns of all tables: type, unit, how many per row, and meaning."""

from __future__ import annotations

from fire_data.reference import code, prose, table
from fire_data.schemas.config import ADDED_TEACHER, REDUCED_BITS
from fire_data.schemas.tables import FORMAT, PRECISION, TABLES, Column, columns_of

_INTRODUCTION = f"""# Columns

One row per trajectory. A column *per token* is a list with one element for each token of `response_ids`, end token
included; logprobs and entropies are in nats, over the whole real vocabulary, at temperature 1. Units and shapes are in
the metadata of every Parquet field as well. This is format {FORMAT}; newer code reads older formats.

*Optional* columns are there where an engine can give them, or a rule uses them: absent, never empty. *Nullable* ones
may lack a value in some rows. *Reducible* ones are exact unless the setting `score.precision` is `reduced`: then each
number is the nearest one with {REDUCED_BITS} mantissa bits, off by at most 2^-{REDUCED_BITS + 1} of itself, and the
field's metadata say so (`{PRECISION}`). Sums and maxima per trajectory are always those of the stored numbers.
"""
_ABOUT = {
    "prompts": "What `prompts.path` is read as; only `messages` or `prompt` has to be there.",
    "rollouts": "What the student wrote: `rollouts/round-NNN/`.",
    "scores": "The rollouts with what both models say of every token: `scores/round-NNN/`.",
    "weights": "What a rule decided, row by row like the scores: `weights/NAME/round-NNN/`.",
    "evals": "Answers to held-out prompts: `evals/`.",
    "addons/topk": "Made by `fire score RUN --add topk`.",
    "addons/base": "Made by `fire score RUN --add base`.",
    "addons/pass-rate": "Made by `fire score RUN --add pass-rate`.",
    "addons/reward": "Made by `fire verify RUN`.",
    f"addons/{ADDED_TEACHER}NAME": "One teacher of several, over all rows: `fire score RUN --teachers NAME`.",
}
_PER = {"row": "trajectory", "token": "token", "prompt": "prompt token"}


def page() -> str:
    """Markdown of the page: one table per table."""
    return "\n".join([_INTRODUCTION, *map(_table, [*TABLES, f"addons/{ADDED_TEACHER}NAME"])])


def _table(name: str) -> str:
    shared = {c.name for c in TABLES["rollouts"]} if name == "scores" else set()
    scored = name == "scores" or name.startswith("addons/")
    rows = [_row(c, scored and c.reducible) for c in columns_of(name) if c.name not in shared]
    note = "\n\nAll columns of [rollouts](#rollouts), and:" if shared else ""
    heading = f"## {name}\n\n{_ABOUT.get(name, '')}{note}\n\n"
    return heading + table(("column", "type", "per", "unit", "meaning", ""), rows)


def _row(column: Column, reducible: bool) -> list[str]:
    said = {"optional": column.optional, "nullable": column.nullable, "reducible": reducible}
    marks = [mark for mark, on in said.items() if on]
    kind = str(column.type).replace("element: ", "").replace("item: ", "")
    per, meaning = _PER[column.per], prose(column.meaning)
    return [f"`{column.name}`", code(kind), per, prose(column.unit), meaning, ", ".join(marks)]
