"""Which trajectories a report shows: the most extreme of the round, then in turn from every stratum. No chance in it.

A stratum is kept or dropped, correct or wrong, by which teacher, and short, middle or long. Within a stratum rows come
in the order of `trajectory_id`, which is a hash: as good as drawn at random, and the same every time.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import polars as pl

from fire_data.report.measure import outcome
from fire_data.schemas.config import TEACHER

ORDERS: dict[str, tuple[str, bool]] = {
    "longest": ("length", True),
    "most surprising to the teacher": ("mean_teacher_logprob", False),
    "largest weight": ("weight_max", True),
    "most negative advantage": ("advantage_min", False),
}
"""How trajectories can be sorted: the column, and whether the largest comes first."""

TOKENS = 1_500  # of one trajectory, the first
FEW, MANY = 24, 120  # trajectories: shown however long, and at most however short
_ALL_TOKENS = FEW * TOKENS  # up to which short trajectories are added
_EXTREME = 2  # of each order


@dataclass(frozen=True)
class Sample:
    """The chosen rows in the order of choice, how many there are of how many, and how they were chosen."""

    rows: pl.DataFrame
    total: int
    strata: int
    how: str


def choose(rows: pl.DataFrame, limit: int | None = None, paired: Collection[tuple[str, int]] | None = None) -> Sample:
    """Choose from one row per trajectory, as `measure.Tally` makes them.

    Args:
        limit: trajectories; None: 24, or more while their shown tokens are no more than those of 24 long ones.
        paired: prompts and samples that another round has too: only those are chosen from, if there are any.
    """
    total = rows.height
    rows = _with_strata(rows).sort("trajectory_id")
    among = ""
    if paired is not None:
        both = rows.filter([pair in paired for pair in rows.select("prompt_id", "sample").iter_rows()])
        among = f" among the {both.height:,} that both rounds have" if both.height else ""
        rows = both if both.height else rows
    first = _extremes(rows)
    turns = rows.with_columns(turn=pl.int_range(pl.len()).over("stratum")).sort("turn", "stratum", maintain_order=True)
    order = list(dict.fromkeys([*first, *turns["trajectory_id"].to_list()]))
    lengths = dict(zip(rows["trajectory_id"], rows["length"].clip(upper_bound=TOKENS), strict=True))
    count = min(len(order), limit if limit is not None else _fitting([lengths[i] for i in order]))
    place = {name: i for i, name in enumerate(order[:count])}
    chosen = rows.filter(pl.col("trajectory_id").is_in(list(place)))
    chosen = chosen.with_columns(place=pl.col("trajectory_id").replace_strict(place, return_dtype=pl.Int64))
    strata = rows["stratum"].n_unique()
    how = f"all of them{among}" if count == rows.height else _how(strata, among)
    return Sample(chosen.sort("place").drop("place"), total, strata, how)


def _how(strata: int, among: str) -> str:
    return (
        f"the {_EXTREME} most extreme of the round in each sort order, then in turn from {strata} strata{among} "
        "(kept or dropped × correct or wrong × teacher × short, middle or long), in each by trajectory_id, a hash"
    )


def _with_strata(rows: pl.DataFrame) -> pl.DataFrame:
    kept = rows["keep"].to_list() if "keep" in rows.columns else [None] * rows.height
    fate = ["unweighed" if k is None else "kept" if k else "dropped" for k in kept]
    low, high = (rows["length"].quantile(q, "lower") or 0 for q in (1 / 3, 2 / 3))
    length = pl.col("length")
    size = pl.when(length <= low).then(pl.lit("short")).when(length <= high).then(pl.lit("middle"))
    parts = pl.Series("fate", fate, pl.String), pl.Series("outcome", outcome(rows["reward"]), pl.String)
    rows = rows.with_columns(*parts, size=size.otherwise(pl.lit("long")), teacher=pl.col("teacher").fill_null(TEACHER))
    return rows.with_columns(stratum=pl.concat_str("fate", "outcome", "teacher", "size", separator=" × "))


def _extremes(rows: pl.DataFrame) -> list[str]:
    found: list[str] = []
    for column, largest in ORDERS.values():
        if column in rows.columns:
            told = rows.drop_nulls(column).sort(column, "trajectory_id", descending=[largest, False])
            found += told["trajectory_id"].head(_EXTREME).to_list()
    return found


def _fitting(lengths: list[int]) -> int:
    total = 0
    for count, length in enumerate(lengths[:MANY]):
        total += length
        if count >= FEW and total > _ALL_TOKENS:
            return count
    return min(len(lengths), MANY)
