"""Between one list per trajectory and one flat row per token: where expressions per token are evaluated."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import polars as pl
import pyarrow as pa

from fire_data.rules.base import ROW


def token_frame(
    frame: pl.DataFrame, expressions: Iterable[pl.Expr], derived: dict[str, pl.Expr] | None = None
) -> pl.DataFrame:
    """One row per token with the columns that `expressions` use: lists as numbers, the others repeated, `position`.

    Those of `derived` that they use are computed once; what only these needed is left out.
    """
    asked = dict.fromkeys(r for e in expressions for r in e.meta.root_names())
    made = {n: e for n, e in (derived or {}).items() if n in asked}
    roots = dict.fromkeys([*asked, *(r for e in made.values() for r in e.meta.root_names())])
    chosen = [c for c in roots if c in frame.columns and c not in (ROW, "position")]
    lists = [c for c in chosen if isinstance(frame.schema[c], pl.List)]
    position = pl.int_ranges(pl.col("length").cast(pl.Int64)).alias("position")
    columns = [pl.col(c) for c in chosen if c != "length"]
    flat = frame.select(ROW, "length", *columns, position).explode("position", *lists)
    flat = flat.with_columns(pl.col(pl.Float32).cast(pl.Float64), pl.col(ROW).set_sorted())
    if not made:
        return flat
    return flat.with_columns(**made).drop(c for c in lists if c not in asked)


def fold(values: pl.Series, lengths: pl.Series) -> pl.Series:
    """A flat column as one list per trajectory."""
    offsets = np.concatenate([[0], lengths.cast(pl.Int64).to_numpy().cumsum()])
    made = pl.from_arrow(pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), values.rechunk().to_arrow()))
    assert isinstance(made, pl.Series)
    return made.rename(values.name)
