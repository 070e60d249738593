"""How far a mean over prompts could be off: percentile bootstrap over whole prompts, for one model or the gap of two.

The samples of a prompt resemble each other, so prompts are drawn, not samples. All draws are a function of the seed.
An interval says what other prompts of the same kind might have given. It knows only what is in the sample: where all
prompts have the same value it has no width, and with a few dozen prompts it is somewhat too narrow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

REPLICATES = 2000
LEVEL = 0.95


class Interval(NamedTuple):
    """A mean and its 95 % interval, in the unit of the values."""

    mean: float
    low: float
    high: float


class Difference(NamedTuple):
    """Mean of a - b with its 95 % interval. `p`: how often a gap as large shows up where there is none, two-sided."""

    difference: float
    low: float
    high: float
    p: float


def interval(values: Sequence[float], seed: int) -> Interval:
    """The mean of one value per prompt with its interval. `values` must not be empty."""
    drawn = _means(np.asarray(values, np.float64), seed)
    return Interval(float(np.mean(values)), *_middle(drawn))


def paired(a: Sequence[float], b: Sequence[float], seed: int) -> Difference:
    """The gap of two models on the same prompts, in the same order; both are drawn together.

    `p` is twice the share of resampled gaps on the other side of zero (Efron and Tibshirani 1993, chapter 15), never
    below 1 / replicates: an interval that leaves zero out and a `p` below 0.05 say the same.
    """
    gaps = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    drawn = _means(gaps, seed)
    beyond = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    return Difference(float(np.mean(gaps)), *_middle(drawn), min(1.0, 2 * (beyond + 1) / (len(drawn) + 1)))


def _means(values: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    rng = np.random.Generator(np.random.PCG64(seed))
    draws = (rng.integers(0, len(values), len(values)) for _ in range(REPLICATES))
    return np.array([values[drawn].mean() for drawn in draws])


def _middle(drawn: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
