"""The chosen trajectories for the page's browser: texts cut to a length, runs of tokens, and every number per token.

Numbers are rounded to six significant digits, in the units of the tables.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from fire_data.harmless import shown
from fire_data.report.measure import outcome
from fire_data.report.sample import TOKENS
from fire_data.report.tables import Tables
from fire_data.report.text import joined
from fire_data.run import Run
from fire_data.schemas.config import TEACHER
from fire_data.schemas.tables import MASSES, ROLLOUTS, SIGNALS, WEIGHTS, Column
from fire_data.tokenview import pieces, student_tokenizer

PROMPT_CHARACTERS, ANSWER_CHARACTERS, PIECE_CHARACTERS, NAME_CHARACTERS = 4_000, 400, 200, 80
_BEYOND = 8  # tokens decoded after the last shown one, so that a character is not cut
_CLIP = 0.02  # share of tokens beyond the ends of a colour scale

_MAPPED: dict[str, tuple[str, str]] = {
    "weight": ("weight", "up"),
    "coefficient": ("coefficient", "signed"),
    "advantage": ("advantage", "signed"),
    "student_logprob": ("student logprob", "down"),
    "teacher_logprob": ("teacher logprob", "down"),
    "student_entropy": ("student entropy", "up"),
    "teacher_entropy": ("teacher entropy", "up"),
    "reverse_kl": ("reverse KL", "up"),
    "forward_kl": ("forward KL", "up"),
}
"""Signals of the heat map: their label, and whether colour grows with the value, its fall, or either sign."""

_NUMBERS: dict[str, Column] = {
    c.name: c for c in (*WEIGHTS, *SIGNALS, *MASSES, *ROLLOUTS) if c.per == "token" and c.name != "response_ids"
}
_ORDER = (*_MAPPED, *(name for name in _NUMBERS if name not in _MAPPED))
_WEIGHTS = tuple(c.name for c in WEIGHTS if c.per == "token")
_FACTS = (
    "prompt_id", "round", "sample", "messages", "prompt_ids", "response_ids", "finish_reason", "answer", "teacher",
    "reward", "extracted", "verdict",
)  # fmt: skip
COLUMNS = (*_FACTS, "step", "keep", "drop_reason", *_NUMBERS)


@dataclass
class Words:
    """Turns ids into runs of text. Without a tokenizer ids stand for themselves, and `note` says why."""

    tokenizer: Any = None
    note: str | None = None

    def cut(self, ids: list[int], count: int) -> list[tuple[str, int]]:
        """The first `count` tokens as runs: their text and how many tokens they are."""
        if self.tokenizer is None:
            return [(f"⟨{i}⟩", 1) for i in ids[:count]]
        found = joined([p for p in pieces(self.tokenizer, ids[: count + _BEYOND]) if p.start < count])
        return [(shown(p.text, PIECE_CHARACTERS), min(p.stop, count) - p.start) for p in found if p.start < count]

    def text(self, ids: list[int]) -> str:
        """The text of a prompt's first tokens."""
        return "".join(text for text, _ in self.cut(ids, PROMPT_CHARACTERS))


def load_words(run: Run) -> Words:
    """The student's tokenizer, or the reason why there is none."""
    tokenizer, missing = student_tokenizer(run)
    if missing is not None:
        return Words(note=f"The tokenizer cannot be loaded, so tokens are shown as their ids: {shown(missing)}")
    return Words(tokenizer)


@dataclass
class Scales:
    """Values of the tokens shown, by signal, for the ends of the colour scales."""

    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, columns: dict[str, list[Any]]) -> None:
        for name in _MAPPED:
            self.values.setdefault(name, []).extend(columns.get(name, ()))

    def signals(self) -> list[dict[str, Any]]:
        """Every signal that is there, with the ends of its scale: 2 % of the tokens shown lie beyond them."""
        return [self._signal(name, values) for name, values in self.values.items() if values]

    def _signal(self, name: str, values: list[float]) -> dict[str, Any]:
        label, way = _MAPPED[name]
        series = pl.Series(values, dtype=pl.Float64)
        if way == "signed":
            high = float(series.abs().quantile(1 - _CLIP, "linear") or 0.0) or float(series.abs().max() or 0.0)  # type: ignore[arg-type]
            low = -high
        else:
            low, high = (float(series.quantile(q, "linear") or 0.0) for q in (_CLIP / 2, 1 - _CLIP / 2))
            high = 0.0 if way == "down" else high
        return {"key": name, "label": label, "way": way, "low": _six(low), "high": _six(high)}


def numbers() -> list[dict[str, str]]:
    """Name, unit and meaning of every number a token can have, in the order in which they are shown."""
    return [{"key": n, "unit": _NUMBERS[n].unit, "meaning": _NUMBERS[n].meaning} for n in _ORDER]


def read(tables: Tables, chosen: pl.DataFrame, words: Words, scales: Scales) -> dict[str, dict[str, Any]]:
    """The chosen rows (`shard`, `row`, `trajectory_id`) of a round by their trajectory_id."""
    found: dict[str, dict[str, Any]] = {}
    for row in _rows(tables, chosen, COLUMNS):
        made = _trajectory(row, words)
        scales.add(made["columns"])
        found[row["trajectory_id"]] = made
    return found


def read_weights(tables: Tables, chosen: pl.DataFrame, scales: Scales) -> dict[str, dict[str, Any]]:
    """What other weights of the same round say about the chosen rows: only what differs between the two."""
    found: dict[str, dict[str, Any]] = {}
    for row in _rows(tables, chosen, ("step", "keep", "drop_reason", *_WEIGHTS)):
        columns = _numbers(row, TOKENS)
        scales.add(columns)
        found[row["trajectory_id"]] = {"facts": _fate(row), "columns": columns}
    return found


def _rows(tables: Tables, chosen: pl.DataFrame, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    for (shard,), part in chosen.sort("shard", "row").group_by("shard", maintain_order=True):
        frame = tables.read(int(str(shard)), columns)
        yield from frame[part["row"].to_list()].iter_rows(named=True)


def _trajectory(row: dict[str, Any], words: Words) -> dict[str, Any]:
    ids = row["response_ids"]
    prompt, cut = _prompt(row["messages"] or [{"role": "prompt", "content": words.text(row["prompt_ids"])}])
    facts = {
        "id": shown(row["trajectory_id"], NAME_CHARACTERS),
        "prompt_id": shown(row["prompt_id"], NAME_CHARACTERS),
        "round": row["round"],
        "sample": row["sample"],
        "teacher": shown(row["teacher"] or TEACHER, NAME_CHARACTERS),
        "outcome": outcome([row["reward"]])[0],
        "reward": None if row["reward"] is None else _six(row["reward"]),
        "answer": None if row["answer"] is None else shown(row["answer"], ANSWER_CHARACTERS),
        "extracted": None if row.get("extracted") is None else shown(row["extracted"], ANSWER_CHARACTERS),
        "verdict": row.get("verdict"),
        "finish": row["finish_reason"],
        "length": len(ids),
        **_fate(row),
    }
    return {
        "facts": facts,
        "prompt": prompt,
        "prompt_cut": cut,
        "ids": ids[:TOKENS],
        "pieces": words.cut(ids, TOKENS),
        "columns": _numbers(row, TOKENS),
    }


def _fate(row: dict[str, Any]) -> dict[str, Any]:
    if row.get("keep") is None:
        return {}
    reason = row["drop_reason"]
    return {"step": row["step"], "keep": row["keep"], "reason": None if reason is None else shown(reason, 400)}


def _prompt(messages: list[dict[str, str]]) -> tuple[list[tuple[str, str]], bool]:
    """Role and text of the messages up to a number of characters, and whether something is left out."""
    left = PROMPT_CHARACTERS
    found: list[tuple[str, str]] = []
    for message in messages:
        if left <= 0:
            return found, True
        found.append((shown(message["role"], NAME_CHARACTERS), shown(message["content"], left)))
        left -= len(message["content"])
    return found, left < 0


def _numbers(row: dict[str, Any], count: int) -> dict[str, list[Any]]:
    return {name: [_six(v) for v in row[name][:count]] for name in _ORDER if row.get(name) is not None}


def _six(value: float | bool) -> float | int:
    if isinstance(value, bool | int):
        return int(value)
    rounded = float(f"{value:.6g}")
    return int(rounded) if math.isfinite(rounded) and rounded == int(rounded) else rounded
