"""Between one list per trajectory and one flat row per token: where expressions per token are evaluated.

The numbers of a list column lie one after the other in memory, so going to rows and back copies none of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

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
    lengths = frame["length"].cast(pl.Int64).to_numpy()
    columns = [_repeated(frame[ROW], lengths).set_sorted()]
    columns += [flatten(frame[c]) if c in lists else _repeated(frame[c], lengths) for c in chosen]
    if "position" in roots:
        first = np.repeat(lengths.cumsum() - lengths, lengths)
        columns.append(pl.Series("position", np.arange(len(columns[0]), dtype=np.int64) - first))
    flat = pl.DataFrame(columns).with_columns(pl.col(pl.Float32).cast(pl.Float64))
    if not made:
        return flat
    return flat.with_columns(**made).drop(c for c in lists if c not in asked)


def _repeated(values: pl.Series, lengths: np.ndarray[Any, Any]) -> pl.Series:
    """Every value once for each token of its trajectory."""
    if values.dtype.is_numeric() and not values.null_count():
        return pl.Series(values.name, np.repeat(values.to_numpy(), lengths))
    return values.gather(np.repeat(np.arange(len(values), dtype=np.uint32), lengths))


def flatten(lists: pl.Series) -> pl.Series:
    """The elements of a list column, one row each."""
    values = pl.from_arrow(lists.rechunk().to_arrow().flatten())
    assert isinstance(values, pl.Series)
    return values.rename(lists.name)


def fold(values: pl.Series, lengths: pl.Series) -> pl.Series:
    """A flat column as one list per trajectory."""
    offsets = np.concatenate([[0], lengths.cast(pl.Int64).to_numpy().cumsum()])
    made = pl.from_arrow(pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), values.rechunk().to_arrow()))
    assert isinstance(made, pl.Series)
    return made.rename(values.name)
