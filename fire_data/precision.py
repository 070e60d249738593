"""Numbers with fewer bits for tables of scores: `score.precision: reduced`, with the bound of its error.

A float32 stays a float32, so nothing changes for readers: its last bits are 0. Stored split by byte, one byte of each
number is then always 0 and another one mostly, and both all but vanish when they are compressed. Rounding is to
the nearest number of so many bits, so sums of many have no bias, the order of two numbers never turns, and rounding
again changes nothing. Why not float16: it has as many bits but nothing between 0 and 6e-8, where logprobs of sure
tokens are, and readers of Parquet that do not know the type see bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fire_data.schemas.config import REDUCED_BITS
from fire_data.schemas.manifest import Manifest
from fire_data.schemas.tables import PRECISION, columns_of

ERROR = 2.0 ** -(REDUCED_BITS + 1)
"""The largest relative error of a rounded number; of those below 1e-38, which have fewer bits, the absolute one is
below 1e-41."""
_MANTISSA = 23


def bits_of(manifest: Manifest) -> int | None:
    """The mantissa bits of what a stage's table had rounded; None where it is exact."""
    precision = (manifest.fields.get("score") or {}).get("precision")
    return precision["mantissa_bits"] if precision else None


def reduced(data: pa.Table, table: str, bits: int = REDUCED_BITS) -> pa.Table:
    """The columns of `data` that may be are rounded and say so in their metadata, the others are as they were.

    `table`: its name for `columns_of`. Missing values and infinities are left to `conform`.
    """
    for column in columns_of(table):
        if not column.reducible or column.name not in data.column_names:
            continue
        place, values = data.column_names.index(column.name), data[column.name].cast(column.type)
        chunks = pa.chunked_array([_rounded(chunk, bits) for chunk in values.chunks], column.type)
        data = data.set_column(place, column.field({PRECISION: said(bits)}), chunks)
    return data


def said(bits: int) -> str:
    """What the metadata of rounded columns say."""
    return f"rounded to {bits} mantissa bits, relative error at most 2^-{bits + 1}"


def _rounded(array: pa.Array, bits: int) -> pa.Array:
    if array.null_count:
        return array
    if pa.types.is_list(array.type):
        return pa.ListArray.from_arrays(array.offsets, _rounded(array.values, bits), type=array.type)
    return pa.array(round_to(array.to_numpy(zero_copy_only=True), bits))


def round_to(values: NDArray[np.float32], bits: int) -> NDArray[np.float32]:
    """The nearest numbers whose mantissa has so many bits, ties to the even one; of any shape.

    Infinities, and what has no number of so few bits between it and them, stay as they are.
    """
    drop = _MANTISSA - bits
    raw: NDArray[Any] = values.view(np.uint32)
    last = (raw >> drop) & 1
    nearest = ((raw + ((1 << (drop - 1)) - 1) + last) >> drop << drop).view(np.float32)
    return np.where(np.isfinite(nearest) & np.isfinite(values), nearest, values)
