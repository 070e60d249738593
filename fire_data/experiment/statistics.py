"""What a handful of paired seeds can say: t intervals, exact sign-flip tests, Holm's correction, curves over tokens.

Differences are taken seed by seed. Intervals are Student's t on them, not a percentile bootstrap: resampling five pairs
gives intervals that hold the truth four times in five where they promise nineteen in twenty (`tests/test_statistics.py`
measures both). A t interval is right for normal differences and, measured there, near enough for skewed ones.

Beside every p of the t test stands that of the exact sign-flip test, which assumes only that a difference is as likely
as its negative if there is no effect. With n seeds it cannot be below 2 / 2^n (0.0625 for five), so it alone can never
call five seeds significant: it is there to say when the t test leans on normality.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
_EXACT = 16  # pairs up to which all sign patterns are counted
_DRAWS = 20_000
_SLACK = 1e-12  # differences of accuracies are sums of roundings


class Paired(NamedTuple):
    """Mean difference of n pairs with its 95 % interval; p of the t test and of the sign-flip test, both two-sided."""

    n: int
    mean: float
    low: float
    high: float
    p: float
    p_flip: float
    better: int

    @property
    def least_p(self) -> float:
        """The smallest p that the sign-flip test can reach with so many pairs."""
        return least_p(self.n)


def paired(differences: Sequence[float], level: float = LEVEL) -> Paired:
    """A sample of differences, one for each seed. With one pair the interval is everything and p is 1.

    Differences without any spread tell nothing of how they would vary: the interval has no width then, and p is that of
    the sign-flip test.
    """
    d = np.asarray(differences, np.float64)
    n, mean = len(d), float(d.mean())
    flip, better = sign_flip(d), int((d > _SLACK).sum())
    if n == 1:
        return Paired(1, mean, -math.inf, math.inf, 1.0, flip, better)
    error = float(d.std(ddof=1)) / math.sqrt(n)
    if error <= _SLACK:
        return Paired(n, mean, mean, mean, flip, flip, better)
    half = t_quantile(1 - level, n - 1) * error
    return Paired(n, mean, mean - half, mean + half, t_p(mean / error, n - 1), flip, better)


def within(differences: Sequence[float], margin: float) -> float:
    """p of two one-sided t tests: small if the mean difference lies between -margin and margin (Schuirmann 1987).

    Runs that do not differ at all are the same computation: 0.
    """
    d = np.asarray(differences, np.float64)
    if len(d) and not d.any():
        return 0.0
    if len(d) < 2:
        return 1.0
    mean, error = float(d.mean()), float(d.std(ddof=1)) / math.sqrt(len(d))
    if error <= _SLACK:
        return least_p(len(d)) if abs(mean) < margin else 1.0
    return max(one_sided_p((mean + margin) / error, len(d) - 1), one_sided_p((margin - mean) / error, len(d) - 1))


def least_p(n: int) -> float:
    """The smallest two-sided p of a sign-flip test on n pairs."""
    return 2.0 / 2.0**n if n > 1 else 1.0


def pairs_needed(comparisons: int, alpha: float = 1 - LEVEL) -> int:
    """Pairs with which a sign-flip test could pass the strictest step of Holm's correction."""
    return math.ceil(1 + math.log2(comparisons / alpha))


def sign_flip(d: NDArray[np.float64]) -> float:
    """Two-sided p: the share of sign patterns whose mean is at least as far from zero. Exact up to 16 pairs."""
    n = len(d)
    if n <= _EXACT:
        signs = 1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    else:
        rng = np.random.Generator(np.random.PCG64(0))
        signs = 1.0 - 2.0 * rng.integers(0, 2, (_DRAWS, n))
        signs[0] = 1.0  # what was seen is one of the patterns
    return float((np.abs(signs @ d) >= abs(d.sum()) - _SLACK * n).mean())


def holm(values: Sequence[float]) -> list[float]:
    """p values corrected for their number, in their order: the chance of any false claim stays below alpha (Holm)."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    corrected, most = [0.0] * len(values), 0.0
    for rank, i in enumerate(order):
        most = max(most, min(1.0, (len(values) - rank) * values[i]))
        corrected[i] = most
    return corrected


def t_p(t: float, df: int) -> float:
    """Two-sided p of Student's t with whole degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(abs(t) / math.sqrt(df))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = df % 2 == 1
    total, term = 0.0, cosine if odd else 1.0
    for j in range(1, df // 2 + 1):
        total += term
        term *= cosine**2 * ((2 * j) / (2 * j + 1) if odd else (2 * j - 1) / (2 * j))
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return min(1.0, max(0.0, 1.0 - inside))


def one_sided_p(t: float, df: int) -> float:
    """p for a mean above zero."""
    half = t_p(t, df) / 2
    return half if t > 0 else 1 - half


def t_quantile(alpha: float, df: int) -> float:
    """The t whose two-sided p is alpha."""
    low, high = 0.0, 1.0
    while t_p(high, df) > alpha:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if t_p(middle, df) > alpha else (low, middle)
    return high


def at(tokens: Sequence[float], values: Sequence[float], budget: float) -> float:
    """A curve's value at a number of tokens, straight between its points."""
    return float(np.interp(budget, tokens, values))


def area(tokens: Sequence[float], values: Sequence[float], budget: float) -> float:
    """A curve's mean up to a number of tokens: the area under it divided by them."""
    inside = [(t, v) for t, v in zip(tokens, values, strict=True) if t < budget]
    x, y = (np.array([*(p[i] for p in inside), end]) for i, end in enumerate((budget, at(tokens, values, budget))))
    return float(((y[1:] + y[:-1]) / 2 * np.diff(x)).sum() / (budget - tokens[0])) if len(x) > 1 else float(y[-1])


def reached(amounts: Sequence[float], values: Sequence[float], target: float) -> float | None:
    """How much was spent when a curve first came to the target, straight between points; None if it never did."""
    for i, value in enumerate(values):
        if value >= target:
            if i == 0:
                return float(amounts[0])
            share = (target - values[i - 1]) / (value - values[i - 1])
            return float(amounts[i - 1] + share * (amounts[i] - amounts[i - 1]))
    return None


def median_reached(values: Sequence[float | None]) -> dict[str, Any]:
    """The median over seeds where those that never came there count as infinite; how many did."""
    there = sorted(v for v in values if v is not None)
    padded = [*there, *[math.inf] * (len(values) - len(there))]
    middle = (padded[(len(padded) - 1) // 2] + padded[len(padded) // 2]) / 2
    return {"median": middle if math.isfinite(middle) else None, "seeds": len(there), "of": len(values)}
