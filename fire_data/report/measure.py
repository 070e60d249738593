"""What the plots of a round are made of: one narrow row per trajectory, and counts of tokens in bins.

`Tally` takes the rows of a round shard by shard and forgets the tokens: memory does not grow with their number.
Units: nats; positions are parts of a response.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

COLUMNS = (
    "prompt_id", "sample", "teacher", "reward", "finish_reason", "length", "response_ids", "teacher_logprob_sum",
    "student_entropy", "teacher_entropy", "keep", "drop_reason", "weight", "advantage", "coefficient",
)  # fmt: skip
"""The columns that `Tally.add` reads, where they are there."""

PARTS = 20  # of a response, by relative position
_FINE = 0.02  # square root of nats: width of a bin of the plane while it is counted; most entropies are near 0
_BINS = 256  # of these along one side, up to 26 nats; the last takes what is beyond
_CELLS = 32  # most cells along one side of the plane that is shown
_CURVE = 200  # points of the concentration curve
RIGHT = 0.5  # reward from which an answer counts as correct


@dataclass(frozen=True)
class Plane:
    """Kept tokens by the entropies of both models: `tokens` and `mean_weight`, [teacher cell, student cell].

    `edges` of the cells of either model in nats; they are equally spaced in the square root.
    """

    edges: tuple[np.ndarray, np.ndarray]
    tokens: np.ndarray
    mean_weight: np.ndarray


class Tally:
    """Adds up shards of rows; `add` in any number of calls, then `rows`, `plane`, `concentration`, `positions`."""

    def __init__(self) -> None:
        self._rows: list[pl.DataFrame] = []
        self._plane = np.zeros((2, _BINS * _BINS))
        # By the upper half of a float32's bits: its exponent and 7 bits of its fraction, in order of size.
        self._sizes = np.zeros((2, 1 << 15))
        self._squares = 0.0
        self._parts = np.zeros((3, PARTS))

    def add(self, frame: pl.DataFrame, shard: int) -> None:
        """Count the rows of a shard: `COLUMNS`, as far as they are there."""
        frame = frame if "length" in frame.columns else frame.with_columns(length=pl.col("response_ids").list.len())
        there = set(frame.columns)
        self._rows.append(_narrow(frame, shard))
        frame = frame.filter(pl.col("length") > 0)
        if not {"weight", "coefficient", "student_entropy", "teacher_entropy"} <= there or not frame.height:
            return
        kept = np.repeat(frame["keep"].to_numpy(), frame["length"].to_numpy())
        weight, sizes = _flat(frame, "weight"), np.abs(_flat(frame, "coefficient"))
        bins = [
            np.minimum(np.sqrt(_flat(frame, f"{who}_entropy")) / _FINE, _BINS - 1) for who in ("teacher", "student")
        ]
        places = (bins[0].astype(np.int64) * _BINS + bins[1].astype(np.int64))[kept]
        self._plane[0] += np.bincount(places, minlength=_BINS * _BINS)
        self._plane[1] += np.bincount(places, weight[kept], minlength=_BINS * _BINS)
        keys = sizes.astype(np.float32).view(np.uint32) >> 16
        self._sizes[0] += np.bincount(keys, minlength=1 << 15)
        self._sizes[1] += np.bincount(keys, sizes, minlength=1 << 15)
        self._squares += float(np.square(sizes, dtype=np.float64).sum())
        parts = _relative(frame["length"].to_numpy())
        self._parts[0] += np.bincount(parts, minlength=PARTS)
        self._parts[1] += np.bincount(parts, weight * kept, minlength=PARTS)
        self._parts[2] += np.bincount(parts, sizes, minlength=PARTS)

    @property
    def rows(self) -> pl.DataFrame:
        """One row per trajectory: where it lies, who wrote and judged it, and the numbers that it is sorted by."""
        return pl.concat(self._rows, how="diagonal_relaxed") if self._rows else pl.DataFrame()

    @property
    def plane(self) -> Plane | None:
        """The plane up to the largest entropies, in at most 32 cells a side; None without kept tokens."""
        tokens, weight = self._plane.reshape(2, _BINS, _BINS)
        if not tokens.sum():
            return None
        sides = [_side(tokens.sum(axis=1)), _side(tokens.sum(axis=0))]
        coarse = [_coarse(x, *sides) for x in (tokens, weight)]
        edges = [np.square(np.arange(cells + 1) * (step * _FINE)) for step, cells in sides]
        mean = np.divide(coarse[1], coarse[0], out=np.full_like(coarse[0], np.nan), where=coarse[0] > 0)
        return Plane((edges[0], edges[1]), coarse[0], mean)

    def concentration(self) -> list[dict[str, float]]:
        """Share of sum |coefficient| that the largest share of all response tokens holds; empty without signal."""
        counts, mass = (x[::-1] for x in self._sizes)
        if not mass.sum():
            return []
        used = counts > 0
        tokens = np.concatenate([[0.0], np.cumsum(counts[used])]) / counts.sum()
        held = np.concatenate([[0.0], np.cumsum(mass[used])]) / mass.sum()
        at = np.linspace(0.0, 1.0, _CURVE + 1)
        at = np.unique(np.concatenate([at, [0.001, 0.002]]))
        return [{"tokens": float(x), "mass": float(y)} for x, y in zip(at, np.interp(at, tokens, held), strict=True)]

    @property
    def effective_signal_share(self) -> float | None:
        """As `fire compare` has it: (sum |c|)^2 / (N sum c^2), over all tokens; None without any signal."""
        tokens, mass = self._sizes.sum(axis=1)
        return float(mass**2 / self._squares / tokens) if self._squares else None

    def positions(self) -> list[dict[str, float]]:
        """By twentieths of the response: mean weight (0 where dropped) and mean |coefficient|, each over its mean."""
        tokens, weight, size = self._parts
        if not weight.sum() or not size.sum():
            return []
        means = [x / np.maximum(tokens, 1) / (x.sum() / tokens.sum()) for x in (weight, size)]
        return [
            {"part": (i + 0.5) / PARTS, "weight": float(means[0][i]), "coefficient": float(means[1][i])}
            for i in range(PARTS)
            if tokens[i]
        ]


def _narrow(frame: pl.DataFrame, shard: int) -> pl.DataFrame:
    columns: dict[str, Any] = {}
    if "teacher_logprob_sum" in frame.columns:
        length = pl.col("length")
        columns["mean_teacher_logprob"] = pl.col("teacher_logprob_sum") / pl.when(length > 0).then(length)
    if "weight" in frame.columns:
        columns |= {"weight_max": pl.col("weight").list.max(), "advantage_min": pl.col("advantage").list.min()}
    facts = (
        "trajectory_id",
        "prompt_id",
        "sample",
        "teacher",
        "reward",
        "finish_reason",
        "length",
        "keep",
        "drop_reason",
    )
    kept = [c for c in facts if c in frame.columns]
    return frame.select(*kept, **columns).with_row_index("row").with_columns(shard=pl.lit(shard))


def _flat(frame: pl.DataFrame, column: str) -> np.ndarray:
    values: np.ndarray = frame[column].explode().to_numpy()
    return values


def _relative(lengths: np.ndarray) -> np.ndarray:
    """For every token the twentieth of its response that it lies in."""
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
    position = np.arange(int(lengths.sum())) - starts
    parts: np.ndarray = position * PARTS // np.repeat(lengths, lengths)
    return parts


def _side(tokens: np.ndarray) -> tuple[int, int]:
    """How many fine bins make a cell, and how many cells there are, for a side with these counts: the last is empty."""
    used = int(np.flatnonzero(tokens)[-1]) + 1
    step = -(-used // (_CELLS - 1))
    return step, -(-used // step) + 1


def _coarse(fine: np.ndarray, teacher: tuple[int, int], student: tuple[int, int]) -> np.ndarray:
    made = np.zeros((teacher[1], student[1]))
    used = fine[: teacher[0] * teacher[1], : student[0] * student[1]]
    x, y = np.arange(used.shape[0]) // teacher[0], np.arange(used.shape[1]) // student[0]
    np.add.at(made, (x[:, None], y[None, :]), used)
    return made


def outcome(rewards: Iterable[float | None]) -> list[str]:
    """Correct, wrong or unknown for every reward."""
    return ["unknown" if r is None else "correct" if r >= RIGHT else "wrong" for r in rewards]
