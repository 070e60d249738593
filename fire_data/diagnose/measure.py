"""Reduces scored trajectories to the small tables that findings are made from, shard by shard.

`measure` looks at each token once and keeps one row per trajectory, one per tenth of the response, one per window of
64 tokens and a row of totals; of the tokens themselves it keeps the advantage (for exact quantiles) and counts of
entropies by thousandths of a nat. `merge` adds those of several shards. Units: nats, positions count from 0.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import polars as pl

from fire_data.schemas.tables import SIGNALS

ROW = "_row"
TENTHS = 10  # parts of a response by relative position
WINDOW = 64  # tokens in which agreement and repetition are compared (2606.09471)
GRAM = 4  # tokens of the n-grams by which repetition is counted, as in the repetition guard
TAIL_BYTES, LEAST_TAIL_BYTES = 2048, 256  # of the response's end; zlib says nothing about less
UNLIKELY = math.log(0.01)  # a token is improbable below: DIAL-OPD 2610.11659, section 3.3
OPEN = 1.0  # nats: a token with more entropy is an open choice, EOPD 2603.07079
UNSURE = -0.001  # nats: a student logprob below says that the student was not certain
TOLERANCE = 1e-3  # nats by which exact relations may be missed: float32 sums over a vocabulary
LAGS = (-1, 0, 1)
PAIRS = {"rollout": "rollout_logprob", "teacher": "teacher_logprob"}  # compared with student_logprob at each lag
MODELS = ("student", "teacher")

_FACTS = ("trajectory_id", "prompt_id", "teacher", "reward", "finish_reason")
_TOKENS = ("response_ids", "rollout_logprob", *(c.name for c in SIGNALS))
_FLOATS = ("rollout_logprob", *(c.name for c in SIGNALS if not c.name.endswith(("_id", "_rank", "_top1"))))
TOPK = ("student_topk_ids", "teacher_topk_ids")
COLUMNS = (*_FACTS, "response", "teacher_prompt_ids", *_TOKENS)
"""The columns of scores that `measure` reads."""

_SUMMED = ("student_logprob", "teacher_logprob", "student_entropy", "teacher_entropy", "reverse_kl")
_BY_POSITION = ("student_entropy", "teacher_entropy", "teacher_max_logprob", "reverse_kl")
_PRIME = 0x9E3779B97F4A7C15  # odd and large: the ids of an n-gram are folded into one 64-bit number


@dataclass(frozen=True)
class Measured:
    """What is known of a round: tables by trajectory, by tenth, by window, by token, and totals in one row."""

    rows: pl.DataFrame
    tenths: pl.DataFrame
    windows: pl.DataFrame
    tokens: pl.DataFrame
    entropies: pl.DataFrame
    totals: dict[str, float]


def measure(frame: pl.DataFrame, tokens_at_once: int = 500_000, rounding: float = 0.0) -> Measured:
    """Reduce rows of scores, some tokens at a time: `COLUMNS`, less what engines could not tell; `keep` and top-k ids
    where known. What needs a column that is not there is not in the result.

    `rounding`: the relative error of stored numbers, which may break an exact relation by as much.
    """
    return merge([_measure(part, rounding) for part in _parts(frame, tokens_at_once)])


def merge(parts: Sequence[Measured]) -> Measured:
    """The measurements of several shards, in order, as one."""
    first, windows = 0, []
    for part in parts:
        windows.append(part.windows.with_columns(pl.col(ROW) + first))
        first += part.rows.height
    tenths = pl.concat([p.tenths for p in parts], how="diagonal")
    entropies = pl.concat([p.entropies for p in parts])
    totals = parts[0].totals
    for part in parts[1:]:
        totals = {k: max(v, part.totals[k]) if k.endswith("_max") else v + part.totals[k] for k, v in totals.items()}
    return Measured(
        pl.concat([p.rows for p in parts], how="diagonal_relaxed"),
        tenths.group_by("tenth", maintain_order=True).sum().sort("tenth"),
        pl.concat(windows),
        pl.concat([p.tokens for p in parts], rechunk=True),  # quantiles of one chunk are ten times as fast
        entropies.group_by("entropy").sum().sort("entropy"),
        totals,
    )


def history(frames: Iterable[pl.DataFrame]) -> pl.DataFrame:
    """The rows by which rounds are compared, from `HISTORY_COLUMNS` alone."""
    return pl.concat([_rows(part, _explode(part, ("response_ids", "student_entropy"))) for part in frames])


HISTORY_COLUMNS = ("reward", "finish_reason", "response_ids", "student_entropy")


def repeat_ratio() -> pl.Expr:
    """Share of a trajectory's n-grams that occurred in it before; null where it is shorter than an n-gram."""
    return 1 - pl.col("distinct") / pl.when(pl.col("grams") > 0).then(pl.col("grams"))


def mean_of(name: str) -> pl.Expr:
    """Per-trajectory mean of a summed signal; null for an empty response."""
    return pl.col(f"{name}_sum") / pl.when(pl.col("length") > 0).then(pl.col("length"))


def _parts(frame: pl.DataFrame, limit: int) -> Iterator[pl.DataFrame]:
    """Consecutive rows of at most `limit` tokens, at least one row each; an empty frame is one part."""
    start = tokens = 0
    for i, length in enumerate(frame["response_ids"].list.len().to_list()):
        if i > start and tokens + length > limit:
            yield frame[start:i]
            start, tokens = i, 0
        tokens += length
    yield frame[start:]


def _explode(frame: pl.DataFrame, columns: Sequence[str]) -> pl.DataFrame:
    """One row per token with its trajectory, position, length, and the n-gram that starts there."""
    length = pl.col("response_ids").list.len().cast(pl.Int64)
    tokens = (
        frame.with_row_index(ROW)
        .filter(length > 0)
        .select(ROW, *columns, length=length, position=pl.int_ranges(length))
        .explode(*columns, "position")
    )
    identity = pl.col("response_ids").cast(pl.UInt64)
    gram = identity
    for k in range(1, GRAM):
        gram = gram * pl.lit(_PRIME, dtype=pl.UInt64) + identity.shift(-k)
    # An n-gram that would reach into the next trajectory is none.
    return tokens.with_columns(gram=pl.when(pl.col("position") + GRAM <= pl.col("length")).then(gram))


def _rows(frame: pl.DataFrame, tokens: pl.DataFrame, *more: pl.Expr) -> pl.DataFrame:
    """One row per trajectory, empty ones included: its facts, and what its tokens add up to."""
    entropy = pl.col("student_entropy").cast(pl.Float64)
    reduced = tokens.group_by(ROW, maintain_order=True).agg(
        *more,
        grams=pl.col("gram").count().cast(pl.Int64),
        distinct=pl.col("gram").drop_nulls().n_unique().cast(pl.Int64),
        entropy_sum=entropy.sum(),
        entropy_open=(entropy > OPEN).sum().cast(pl.Int64),
    )
    kept = [c for c in (*_FACTS, "keep") if c in frame.columns]
    facts = frame.with_row_index(ROW).select(ROW, *kept, length=pl.col("response_ids").list.len().cast(pl.Int64))
    counts = ("grams", "distinct", "entropy_open", "entropy_sum")
    return (
        facts.with_columns(pl.col("reward").cast(pl.Float32))
        .join(reduced, on=ROW, how="left", maintain_order="left")
        .with_columns(pl.col(counts).fill_null(0))
        .drop(ROW)
    )


def _measure(frame: pl.DataFrame, rounding: float) -> Measured:
    topk = [c for c in TOPK if c in frame.columns]
    tokens = _explode(frame, (*(c for c in _TOKENS if c in frame.columns), *topk))
    tokens = tokens.with_columns(pl.col(c).cast(pl.Float64) for c in _FLOATS if c in frame.columns)
    tokens = tokens.with_columns(
        advantage=pl.col("teacher_logprob") - pl.col("student_logprob"),
        tenth=(pl.col("position") * TENTHS // pl.col("length")).cast(pl.UInt8),
    )
    advantage = pl.col("advantage")
    rows = _rows(
        frame,
        tokens,
        *(pl.col(c).sum().alias(f"{c}_sum") for c in _SUMMED if c in frame.columns),
        (advantage > 0).sum().cast(pl.Int64).alias("positive"),
        (advantage < 0).sum().cast(pl.Int64).alias("negative"),
        advantage.first().alias("first_advantage"),
        advantage.last().alias("last_advantage"),
        pl.col("teacher_logprob").last().alias("last_teacher_logprob"),
        pl.col("response_ids").last().alias("last_id"),
    )
    return Measured(
        rows.with_columns(
            tail_ratio=pl.Series([_tail_ratio(t) for t in frame["response"]], dtype=pl.Float64),
            own_prompt=frame["teacher_prompt_ids"].is_not_null(),
        ),
        _by_tenth(tokens, bool(topk)),
        _by_window(tokens),
        tokens.select(pl.col("advantage").cast(pl.Float32), "tenth"),
        tokens.group_by(entropy=(pl.col("student_entropy") * 1000).round().cast(pl.Int32)).agg(
            tokens=pl.len().cast(pl.Int64)
        ),
        _totals(tokens, rounding),
    )


def _tail_ratio(text: str | None) -> float | None:
    """Compressed by uncompressed bytes of a response's end: near 0 if it repeats itself."""
    tail = (text or "").encode("utf-8", "surrogatepass")[-TAIL_BYTES:]
    return len(zlib.compress(tail)) / len(tail) if len(tail) >= LEAST_TAIL_BYTES else None


def _by_tenth(tokens: pl.DataFrame, topk: bool) -> pl.DataFrame:
    sums = [pl.col(c).sum() for c in _BY_POSITION if c in tokens.columns]
    if topk:
        mine, theirs = map(pl.col, TOPK)
        sums.append((mine.list.set_intersection(theirs).list.len() / mine.list.len()).sum().alias("overlap"))
    count = pl.len().cast(pl.Int64).alias("tokens")
    return tokens.group_by("tenth").agg(count, pl.col("advantage").abs().sum(), *sums).sort("tenth")


def _by_window(tokens: pl.DataFrame) -> pl.DataFrame:
    """Mean reverse KL and repeat ratio of every whole window, by trajectory and position."""
    whole = tokens.filter(pl.col("position") < pl.col("length") // WINDOW * WINDOW)
    gram = pl.col("gram").drop_nulls()
    known = "reverse_kl" in tokens.columns
    return whole.group_by(ROW, window=pl.col("position") // WINDOW, maintain_order=True).agg(
        reverse_kl=pl.col("reverse_kl").mean() if known else pl.lit(None, dtype=pl.Float64),
        repeat=1 - gram.n_unique() / gram.len(),
    )


def _totals(tokens: pl.DataFrame, rounding: float) -> dict[str, float]:
    """Sums over tokens, and maxima named *_max, as plain numbers; 0 where there is no token."""
    inner = pl.col("position") > 0  # tokens that have a neighbour before them
    lagged = {k: e for lag in LAGS for k, e in _lagged(lag).items()}
    sums = tokens.select(
        pl.len().alias("tokens"),
        inner.sum().alias("inner"),
        *(e.sum().alias(k) for k, e in (_plain_sums() | breaches(rounding)).items() if _known(e, tokens)),
        *(e.filter(inner).sum().alias(k) for k, e in lagged.items() if _known(e, tokens)),
    )
    maxima = tokens.select(
        drift_max=(pl.col("student_logprob") - pl.col("rollout_logprob")).abs().max(),
        student_entropy_max=pl.col("student_entropy").max(),
        teacher_entropy_max=pl.col("teacher_entropy").max(),
    )
    return {k: float(v or 0.0) for part in (sums, maxima) for k, v in part.row(0, named=True).items()}


def _known(expression: pl.Expr, tokens: pl.DataFrame) -> bool:
    return {*expression.meta.root_names()} <= {*tokens.columns}


def _plain_sums() -> dict[str, pl.Expr]:
    advantage, entropy = pl.col("advantage"), pl.col("student_entropy")
    drift = pl.col("rollout_logprob") - pl.col("student_logprob")
    low = (pl.col("student_logprob") <= UNLIKELY) & (pl.col("teacher_logprob") <= UNLIKELY)
    unsure = pl.col("student_logprob") < UNSURE
    sums = {
        "drift": drift,
        "drift_abs": drift.abs(),
        "drift_entropy": drift * entropy,
        "entropy": entropy,
        "entropy_squares": entropy * entropy,
        "entropy_gap_abs": (pl.col("teacher_entropy") - entropy).abs(),
        "advantage_abs": advantage.abs(),
        "low": low,
        "low_abs": advantage.abs() * low,
        "zero": advantage == 0,
        "unsure": unsure,
        "zero_unsure": (advantage == 0) & unsure,
        "teacher_rank_100": pl.col("teacher_rank") > 100,
    }
    for who in MODELS:
        sums[f"{who}_logprob"] = pl.col(f"{who}_logprob")
        sums[f"{who}_entropy"] = pl.col(f"{who}_entropy")
        sums[f"{who}_open"] = pl.col(f"{who}_entropy") > OPEN
        sums[f"{who}_first"] = pl.col(f"{who}_rank") == 1
        # Different logits may give the same float32 logprob, but hardly ever.
        sums[f"{who}_tied"] = (pl.col(f"{who}_rank") > 1) & (pl.col(f"{who}_logprob") >= pl.col(f"{who}_max_logprob"))
    return sums


def breaches(rounding: float = 0.0) -> dict[str, pl.Expr]:
    """Relations that hold for every token whatever the models are, as the tokens that break them."""
    found: dict[str, pl.Expr] = {}
    for who in MODELS:
        logprob, most, entropy = (pl.col(f"{who}_{c}") for c in ("logprob", "max_logprob", "entropy"))
        first, chosen = pl.col(f"{who}_rank") == 1, pl.col(f"{who}_top1_id") == pl.col("response_ids")
        missed = TOLERANCE + 2 * rounding * most.abs()
        found |= {
            f"{who}_logprob <= {who}_max_logprob <= 0": (logprob > most + missed) | (most > TOLERANCE),
            f"{who}_rank 1 has {who}_max_logprob": first & (logprob < most - missed),
            f"{who}_top1_id sampled has {who}_rank 1": chosen & ~first,
            # Shannon's entropy is at least the min-entropy.
            f"{who}_entropy >= -{who}_max_logprob": entropy < -most - missed,
        }
    same = pl.col("student_top1_id") == pl.col("response_ids")
    found |= {f"{name} >= 0": pl.col(name) < -TOLERANCE for name in ("reverse_kl", "forward_kl")}
    found["teacher_rank_of_student_top1 is teacher_rank where student_top1_id was sampled"] = same & (
        pl.col("teacher_rank_of_student_top1") != pl.col("teacher_rank")
    )
    return found


def _lagged(lag: int) -> dict[str, pl.Expr]:
    """What a shift by one token shows in: student against other columns `lag` tokens earlier, and signals against ids.

    Over inner tokens, so that every lag compares as many pairs.
    """

    def pair(ours: pl.Expr, theirs: pl.Expr) -> tuple[pl.Expr, pl.Expr]:
        return ours.shift(1) if lag < 0 else ours, theirs.shift(1) if lag > 0 else theirs

    found: dict[str, pl.Expr] = {}
    for name, column in PAIRS.items():
        x, y = pair(pl.col("student_logprob"), pl.col(column))
        moments = {"x": x, "y": y, "xx": x * x, "yy": y * y, "xy": x * y, "off": (x - y).abs()}
        found |= {f"lag{lag}:{name}:{k}": e for k, e in moments.items()}
    for who in MODELS:
        top, ids = pair(pl.col(f"{who}_top1_id"), pl.col("response_ids"))
        rank, _ = pair(pl.col(f"{who}_rank"), pl.col("response_ids"))
        found[f"lag{lag}:{who}:differs"] = (top == ids) != (rank == 1)
    return found
