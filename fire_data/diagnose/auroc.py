"""How well a score separates right from wrong answers: the area under the ROC curve, with a bootstrap over prompts.

The samples of a prompt resemble each other, so an interval that resamples trajectories is too narrow: whole prompts
are drawn instead (cluster bootstrap, percentile interval). The draws are a function of the seed alone. No unit: the
area is the chance that a random right answer scores above a random wrong one, ties counting one half.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import polars as pl
import pyarrow as pa

REPLICATES = 1000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A percentile interval and how many resamples it rests on; those with one class only are left out."""

    low: float
    high: float
    replicates: int
    prompts: int


def auroc(score: pl.Series, right: pl.Series) -> float | None:
    """Area under the ROC curve of `score` for the Boolean `right`; None if all answers are right, or all wrong."""
    order = _Order(score, right)
    return order.area(pl.Series([1], dtype=pl.Int64).new_from_index(0, len(score)))


def auroc_within(score: pl.Series, right: pl.Series, prompt: pl.Series) -> tuple[float | None, int]:
    """The same over pairs of one prompt's samples, and the number of such pairs: difficulty is the same for both."""
    frame = pl.DataFrame({"score": score, "right": right, "prompt": prompt}).with_row_index("i")
    good, bad = frame.filter("right"), frame.filter(~pl.col("right"))
    pairs = good.join(bad, on="prompt", suffix="_bad")
    won, tied = (int(x.sum()) for x in (pairs["score"] > pairs["score_bad"], pairs["score"] == pairs["score_bad"]))
    return ((won + tied / 2) / pairs.height if pairs.height else None), pairs.height


def auroc_interval(
    score: pl.Series, right: pl.Series, prompt: pl.Series, seed: int, replicates: int = REPLICATES
) -> Interval | None:
    """95 % interval of `auroc` by resampling prompts with replacement; None with fewer than two prompts or classes."""
    number = prompt.rank("dense").cast(pl.Int64) - 1
    prompts = prompt.n_unique()
    if prompts < 2:
        return None
    order = _Order(score, right)
    areas = []
    for replicate in range(replicates):
        counts = _draws(seed, replicate, prompts)
        area = order.area(counts.gather(number))
        if area is not None:
            areas.append(area)
    if not areas:
        return None
    tail = (1 - LEVEL) / 2
    low, high = (pl.Series(areas).quantile(q, "linear") for q in (tail, 1 - tail))
    return Interval(float(low or 0.0), float(high or 0.0), len(areas), prompts)


def _draws(seed: int, replicate: int, prompts: int) -> pl.Series:
    """How often each prompt is drawn in a resample of as many prompts as there are."""
    data = hashlib.shake_256(f"auroc {seed} {replicate}".encode()).digest(8 * prompts)
    words = pl.Series(pa.Array.from_buffers(pa.uint64(), prompts, [None, pa.py_buffer(data)]))
    drawn = pl.DataFrame({"prompt": words % prompts}).group_by("prompt").len()
    counts = pl.Series([0], dtype=pl.Int64).new_from_index(0, prompts)
    return counts.scatter(drawn["prompt"].cast(pl.UInt32), drawn["len"].cast(pl.Int64))


class _Order:
    """Trajectories sorted by score with the ends of each run of ties: then a weighted area takes cumulative sums."""

    def __init__(self, score: pl.Series, right: pl.Series) -> None:
        self.by_score = score.arg_sort()
        ordered = score.gather(self.by_score)
        self.first = ordered.rank("min").cast(pl.UInt32) - 1
        self.last = ordered.rank("max").cast(pl.UInt32) - 1
        self.right = right.gather(self.by_score).cast(pl.Int64)

    def area(self, weight: pl.Series) -> float | None:
        """The area when trajectory i counts `weight[i]` times (Int64), in whole numbers until the last division."""
        weight = weight.gather(self.by_score)
        good, bad = weight * self.right, weight * (1 - self.right)
        total = int(good.sum()) * int(bad.sum())
        if not total:
            return None
        upto = bad.cum_sum()
        below = (upto - bad).gather(self.first)
        return float((good * (below + upto.gather(self.last))).sum()) / (2 * total)
