"""Counts what rules do on one scored table, shard by shard: what each keeps, where its signal is, how far two agree.

Beside one shard it holds sums, a matrix over pairs of rules, and the largest coefficients of each rule. Coefficients
are those the trainer would execute (nats / denominator); the signal of a set of tokens is its sum of |coefficient|.
Positions count from 0.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from fire_data.diagnose.finding import share
from fire_data.diagnose.measure import HISTORY_COLUMNS, UNLIKELY, history, repeat_ratio
from fire_data.summary import merge_summaries, summarise

COLUMNS = ("length", "student_logprob", "teacher_logprob", *HISTORY_COLUMNS)
"""The columns of a prepared table that `Tally` reads: of several teachers, those that count there."""

HEAD = 0.01  # of the tokens: the share of the signal that these carry says how concentrated it is
TOP = 0.05  # of the tokens: those of two rules are laid over each other
LATE = 0.75  # of the tokens lie before the positions that count as late, unless a position is given
PLACES = ("low-low", "last", "late")
MEANING = {
    "low-low": "p_S <= 0.01 and p_T <= 0.01 (2610.11659)",
    "last": "the token that ended a response",
    "late": "positions beyond the 75 % quantile of positions, or from a given one on",
}
_BLOCK = 1 << 16  # tokens whose coefficients of all rules are in double precision at once

Floats = NDArray[np.float64]


def late_from(lengths: pl.Series) -> int:
    """The first position that is late: the earliest that at least 75 % of the round's tokens lie before."""
    counts = np.bincount(lengths.to_numpy())
    at_position = lengths.len() - counts.cumsum()  # how many trajectories have a token at position 0, 1, ...
    reached = at_position.cumsum()
    return int(np.searchsorted(reached, LATE * reached[-1])) + 1 if reached.size and reached[-1] else 0


class Tally:
    """Sums over the shards of a round for several rules; `tokens` is how many there are in all of them."""

    def __init__(self, rules: Sequence[str], tokens: int, late: int) -> None:
        self.rules, self.tokens, self.late = list(rules), tokens, late
        n = len(self.rules)
        self._seen = 0
        self._lost: set[str] = set()
        self._summaries: list[list[dict[str, float]]] = [[] for _ in rules]
        self._digests = [hashlib.blake2b(digest_size=16) for _ in rules]
        self._largest = [_Largest(math.ceil(TOP * tokens)) for _ in rules]
        self._fkl = np.zeros(n)
        self._rows = _Rows(n)
        self._places = np.zeros(len(PLACES))
        self._signal = np.zeros((n, 2 + len(PLACES)))  # sum |c|, sum of what is positive, sum |c| in each place
        self._squares = np.zeros(n)
        self._moments = _Moments(n)

    def add(self, scores: pl.DataFrame, weights: Iterable[tuple[str, pl.DataFrame]]) -> None:
        """Count one shard: its scores (`COLUMNS`) and rule by rule its weights. A rule left out once is lost."""
        places = _places(scores, self.late)
        keep = np.zeros((len(self.rules), scores.height), dtype=bool)
        coefficients = np.zeros((len(self.rules), places.shape[1]), dtype=np.float32)
        there = set()
        for name, frame in weights:
            i = self.rules.index(name)
            there.add(name)
            keep[i] = frame["keep"].to_numpy()
            coefficients[i] = values = _flat(frame["coefficient"])
            self._summaries[i].append(summarise(frame, scores["length"]))
            self._digests[i].update((values + 0.0).tobytes())  # -0.0 and 0.0 are one
            self._largest[i].add(values, self._seen)
            if "fkl_coefficient" in frame.columns:
                second = _flat(frame["fkl_coefficient"])
                self._fkl[i] += np.count_nonzero(second > 0)
                if second.any():
                    self._digests[i].update(b"second stream" + second.tobytes())
        self._lost |= {*self.rules} - there
        self._rows.add(scores, keep)
        self._places += places.sum(axis=1)
        for start in range(0, places.shape[1], _BLOCK):
            self._add_block(coefficients[:, start : start + _BLOCK], places[:, start : start + _BLOCK])
        self._seen += places.shape[1]

    def _add_block(self, single: NDArray[np.float32], places: NDArray[np.bool_]) -> None:
        values = single.astype(np.float64)
        size = np.abs(values)
        self._signal[:, 0] += size.sum(axis=1)
        self._signal[:, 1] += values.clip(0).sum(axis=1)
        self._signal[:, 2:] += size @ places.T.astype(np.float64)
        self._squares += (values * values).sum(axis=1)
        self._moments.add(values)

    def result(self, shown: Sequence[str] | None = None) -> dict[str, Any]:
        """Every number, JSON-ready; None where there is nothing to divide by. `shown`: these rules, in this order."""
        order = [self.rules.index(n) for n in shown or self.rules if n not in self._lost]
        rows = self._rows
        return {
            "trajectories": rows.count,
            "tokens": self._seen,
            "length": share(rows.length, rows.count),
            "repetition": share(rows.repeat, rows.repeats),
            "right": share(rows.right, rows.right + rows.wrong),
            "places": {
                name: {"meaning": MEANING[name], "tokens": share(float(n), self._seen)}
                | ({"from": self.late} if name == "late" else {})
                for name, n in zip(PLACES, self._places, strict=True)
            },
            "rules": [self._of_rule(i) for i in order],
            "agreement": {"rules": [self.rules[i] for i in order], **self._agreement(order)},
        }

    def same(self, rule: str, other: str) -> bool:
        """True if the coefficients of two rules are equal, bit for bit."""
        i, j = self.rules.index(rule), self.rules.index(other)
        return self._digests[i].digest() == self._digests[j].digest()

    def kept(self, rule: str) -> int:
        """How many trajectories a rule keeps."""
        i = self.rules.index(rule)
        return int(self._rows.both[i, i])

    def _of_rule(self, i: int) -> dict[str, Any]:
        did = merge_summaries(self._summaries[i])
        total, positive, *placed = map(float, self._signal[i])
        rows = self._rows
        return {
            "rule": self.rules[i],
            "kept_trajectories": int(did["kept_trajectories"]),
            "kept_fraction": did["kept_fraction"],
            "kept_tokens": int(did["kept_tokens"]),
            "kept_token_fraction": did["kept_token_fraction"],
            "nonzero_tokens": int(did["nonzero_tokens"]),
            "nonzero_fraction": share(did["nonzero_tokens"], self._seen),
            "mean_weight": did["mean_weight"] if did["kept_tokens"] else None,
            "effective_sample_share": did["effective_sample_share"] if did["kept_tokens"] else None,
            "effective_signal_share": share(total**2, float(self._squares[i]) * self._seen),
            "signal": total,
            "signal_in_top": share(self._largest[i].head(math.ceil(HEAD * self.tokens)), total),
            "signal_positive": share(positive, total),
            "signal_in": {name: share(x, total) for name, x in zip(PLACES, placed, strict=True)},
            "length": share(rows.kept_length[i], rows.both[i, i]),
            "repetition": share(rows.kept_repeat[i], rows.kept_repeats[i]),
            "kept_right": share(rows.kept_right[i], rows.right),
            "kept_wrong": share(rows.kept_wrong[i], rows.wrong),
            "forward_kl_tokens": share(float(self._fkl[i]), self._seen),
        }

    def _agreement(self, order: list[int]) -> dict[str, Any]:
        tokens = {i: self._largest[i].tokens() for i in order}

        def matrix(value: Callable[[int, int], float | None]) -> list[list[float | None]]:
            found = {(i, j): value(i, j) for i in order for j in order if i <= j}
            return [[found[min(i, j), max(i, j)] for j in order] for i in order]

        def kept(i: int, j: int) -> float | None:
            both = self._rows.both
            return share(both[i, j], both[i, i] + both[j, j] - both[i, j])

        def correlation(i: int, j: int) -> float | None:
            same = self._digests[i].digest() == self._digests[j].digest()
            found = self._moments.correlation(i, j)
            return 1.0 if same and found is not None else found

        def top(i: int, j: int) -> float | None:
            common = np.intersect1d(tokens[i], tokens[j], assume_unique=True).size
            return share(common, max(tokens[i].size, tokens[j].size))

        return {"kept": matrix(kept), "correlation": matrix(correlation), "top": matrix(top)}


class _Rows:
    """Sums over trajectories, and over those that each rule keeps."""

    def __init__(self, rules: int) -> None:
        self.count = self.length = self.repeats = self.right = self.wrong = 0
        self.repeat = 0.0
        self.both = np.zeros((rules, rules))  # trajectories that both rules keep
        self.kept_length, self.kept_repeat, self.kept_repeats = np.zeros((3, rules))
        self.kept_right, self.kept_wrong = np.zeros((2, rules))

    def add(self, scores: pl.DataFrame, keep: NDArray[np.bool_]) -> None:
        ratios = history([scores.select(HISTORY_COLUMNS)]).select(repeat_ratio()).to_series()
        repeat, known = ratios.fill_null(0.0).to_numpy(), ratios.is_not_null().to_numpy()
        reward = scores["reward"].cast(pl.Float64)
        right, wrong = ((c.fill_null(False)).to_numpy() for c in (reward > 0.5, reward <= 0.5))
        length = scores["length"].cast(pl.Float64).to_numpy()
        self.count += scores.height
        self.length += int(length.sum())
        self.repeat += float(repeat.sum())
        self.repeats += int(known.sum())
        self.right += int(right.sum())
        self.wrong += int(wrong.sum())
        kept = keep.astype(np.float64)
        self.both += kept @ kept.T
        self.kept_length += kept @ length
        self.kept_repeat += kept @ repeat
        self.kept_repeats += kept @ known
        self.kept_right += kept @ right
        self.kept_wrong += kept @ wrong


class _Moments:
    """Means and co-moments of all rules, merged block by block around their means (Chan, Golub, LeVeque 1983).

    Of equal float32 values the mean in double precision is exact, so that what is constant has variance 0.
    """

    def __init__(self, rules: int) -> None:
        self.n = 0
        self.mean, self.products = np.zeros(rules), np.zeros((rules, rules))

    def add(self, values: Floats) -> None:
        n = values.shape[1]
        mean = values.mean(axis=1)
        centred = values - mean[:, None]
        off = mean - self.mean
        self.products += centred @ centred.T + np.outer(off, off) * (self.n * n / (self.n + n))
        self.mean += off * (n / (self.n + n))
        self.n += n

    def correlation(self, i: int, j: int) -> float | None:
        """Pearson's, over all tokens; None where one of the two is constant."""
        scale = math.sqrt(self.products[i, i]) * math.sqrt(self.products[j, j])
        return min(1.0, max(-1.0, float(self.products[i, j]) / scale)) if scale else None


class _Largest:
    """The `most` tokens of largest |coefficient| other than 0; which of equal ones is decided by a hash of their place.

    A token is one 64-bit key: the bits of its float32 size, which order as the sizes do, over its scrambled number in
    the round. Equal sizes are then drawn alike for all rules, and evenly over the round.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.found: list[NDArray[np.uint64]] = []
        self.least = np.uint64(0)

    def add(self, values: NDArray[np.float32], first: int) -> None:
        """Look at the coefficients of consecutive tokens, the first of which is number `first` of the round."""
        size = np.abs(values).view(np.uint32)
        at = np.flatnonzero(size >= max(np.uint32(1), np.uint32(self.least >> np.uint64(32))))
        number = _scrambled((at + first).astype(np.uint64).astype(np.uint32))
        self.found.append((size[at].astype(np.uint64) << np.uint64(32)) | number)
        if sum(f.size for f in self.found) > 2 * self.most:
            self.keys()

    def keys(self) -> NDArray[np.uint64]:
        every = np.concatenate([np.empty(0, np.uint64), *self.found])
        if every.size > self.most:
            every = np.partition(every, every.size - self.most)[every.size - self.most :].copy()
            self.least = every[0]
        self.found = [every]
        return every

    def tokens(self) -> NDArray[np.uint32]:
        """Who they are: distinct numbers, in no order."""
        return self.keys().astype(np.uint32)

    def head(self, count: int) -> float:
        """The sum of the `count` largest sizes."""
        keys = np.sort(self.keys())[::-1][:count]
        return float((keys >> np.uint64(32)).astype(np.uint32).view(np.float32).sum(dtype=np.float64))


def _scrambled(x: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """A bijection of 32-bit numbers (the finaliser of MurmurHash3): distinct below 2^32 tokens."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    return x ^ (x >> np.uint32(16))


def _places(scores: pl.DataFrame, late: int) -> NDArray[np.bool_]:
    """Which tokens of a shard lie in each of `PLACES`, [place, token]."""
    student, teacher = (_flat(scores[c]) for c in ("student_logprob", "teacher_logprob"))
    length = scores["length"].cast(pl.Int64).to_numpy()
    ends = length.cumsum()
    position = np.arange(student.size) - np.repeat(ends - length, length)
    last = np.zeros(student.size, dtype=bool)
    last[ends[(scores["finish_reason"] == "stop").to_numpy() & (length > 0)] - 1] = True
    return np.stack([(student <= UNLIKELY) & (teacher <= UNLIKELY), last, position >= late])


def _flat(lists: pl.Series) -> NDArray[np.float32]:
    """The elements of a column of lists, one after the other."""
    flat: NDArray[np.float32] = lists.explode(empty_as_null=False).cast(pl.Float32).to_numpy()
    return flat
