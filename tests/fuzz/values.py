"""Strategies of bytes that are nearly right: JSON, YAML and Parquet with something in them replaced, moved or torn."""

from __future__ import annotations

import copy
import io
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

_NUMBERS = [0, 1, -1, 2**31, 2**63, -(2**63) - 1, 10**40, 0.0, -0.0, 1e308, 1e-320, float("nan"), float("inf")]
_TEXTS = [
    "", " ", "null", "nan", "..", "../../x", "/etc/passwd", "C:\\x", "~", "\x00", "\x1b[2J", "\u202e", "\ud800",
    "é" * 9, "token_id:1", "token_id:x", "5", "-1", "00000", "round-000", "{{ 1 }}", "<script>", "a" * 300, "x.py:f",
    "a=b", "+", "fire", "hf://datasets/a/b/c.jsonl", "!!python/object/apply:os.system [x]", "9" * 5000,
]  # fmt: skip

scalars = (
    st.none()
    | st.booleans()
    | st.sampled_from(_NUMBERS)
    | st.sampled_from(_TEXTS)
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
)
junk = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_TEXTS) | st.text(max_size=3), inner),
    max_leaves=6,
)


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to everything inside a JSON value."""
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path, *[p for key, value in inner for p in places(value, (*path, key))]]


@st.composite
def bent(draw: st.DrawFn, documents: list[Any]) -> Any:
    """One of these JSON values with up to three of its parts replaced, left out, renamed or repeated."""
    made = copy.deepcopy(draw(st.sampled_from(documents)))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(made)))
        if not path:
            made = draw(junk) if draw(st.integers(0, 9)) == 0 else made
            continue
        holder = made
        for key in path[:-1]:
            holder = holder[key]
        how = draw(st.sampled_from(["replace", "replace", "replace", "drop", "rename", "repeat"]))
        if how == "replace":
            holder[path[-1]] = draw(junk)
        elif how == "drop":
            del holder[path[-1]]
        elif isinstance(holder, list):
            holder[path[-1] : path[-1]] = [copy.deepcopy(holder[path[-1]])] * draw(st.sampled_from([1, 2, 50]))
        else:
            holder[draw(st.sampled_from(_TEXTS) | st.text(max_size=4))] = holder.pop(path[-1])
    return made


def as_json(value: Any) -> bytes:
    """JSON as Python writes it: NaN, half surrogates and all."""
    return json.dumps(value).encode()


@st.composite
def torn(draw: st.DrawFn, whole: bytes) -> bytes:
    """Bytes with a few of them changed, or with an end, a beginning or a middle missing."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(0, 3))):
        if data:
            data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    start = draw(st.integers(0, len(data)))
    if draw(st.booleans()):
        del data[start : draw(st.integers(start, len(data)))]
    return bytes(data)


def sources(documents: list[Any]) -> st.SearchStrategy[bytes]:
    """JSON near to one of these documents, whole or torn."""
    return bent(documents).map(as_json).flatmap(lambda data: st.just(data) | torn(data))


# --- Parquet ----------------------------------------------------------------------------------------------------

_LEAVES = [
    pa.int8(), pa.int32(), pa.int64(), pa.uint64(), pa.float16(), pa.float32(), pa.float64(), pa.bool_(), pa.string(),
    pa.large_string(), pa.binary(), pa.binary(3), pa.null(), pa.date32(), pa.timestamp("ns", tz="UTC"),
    pa.timestamp("us"), pa.duration("s"), pa.decimal128(38, 5), pa.time64("ns"),
]  # fmt: skip
types = st.recursive(
    st.sampled_from(_LEAVES) | st.just(pa.dictionary(pa.int32(), pa.string())),
    lambda inner: (
        inner.map(pa.list_)
        | inner.map(pa.large_list)
        | inner.map(lambda t: pa.list_(t, 2))
        | st.tuples(inner, inner).map(lambda ts: pa.struct([("role", ts[0]), ("content", ts[1])]))
        | inner.map(lambda t: pa.map_(pa.string(), t))
    ),
    max_leaves=3,
)


@st.composite
def columns(draw: st.DrawFn, rows: int) -> pa.Array:
    """A column of any type: of that type's own zeros, of nulls, or of odd values where they fit."""
    kind = draw(types)
    value = draw(st.none() | scalars | st.lists(scalars, max_size=2) | st.just([{"role": "user", "content": "x"}]))
    for values in ([value] * rows, [draw(st.none() | scalars) for _ in range(rows)]):
        try:
            return pa.array(values, kind)
        except (pa.ArrowException, TypeError, ValueError, OverflowError, AttributeError, ArithmeticError):
            continue
    return pa.nulls(rows, kind)


@st.composite
def tables(draw: st.DrawFn, valid: pa.Table) -> bytes:
    """A Parquet file: a valid table with up to three columns replaced, cast, renamed, repeated or left out."""
    table = valid.slice(0, draw(st.integers(0, valid.num_rows)))
    for _ in range(draw(st.integers(1, 3))):
        if not table.num_columns:
            break
        at = draw(st.integers(0, table.num_columns - 1))
        name = table.column_names[at]
        how = draw(st.sampled_from(["replace", "cast", "rename", "repeat", "drop", "nulls"]))
        if how == "drop":
            table = table.remove_column(at)
        elif how == "repeat":
            table = table.append_column(name, table.column(at))
        elif how == "rename":
            other = draw(st.sampled_from([*valid.column_names, *_TEXTS[:12]]))
            names = [other if i == at else n for i, n in enumerate(table.column_names)]
            table = table.rename_columns([n.encode("utf-8", "replace").decode() for n in names])
        elif how == "nulls":
            table = table.set_column(at, name, pa.nulls(table.num_rows, table.column(at).type))
        elif how == "cast":
            try:
                table = table.set_column(at, name, table.column(at).cast(draw(types)))
            except pa.ArrowException:
                continue
        else:
            table = table.set_column(at, name, draw(columns(table.num_rows)))
    sink = io.BytesIO()
    try:
        pq.write_table(table, sink, write_page_checksum=True)
    except (pa.ArrowException, OverflowError):  # there are types that Parquet does not have
        pq.write_table(valid, sink, write_page_checksum=True)
    data = sink.getvalue()
    return draw(torn(data)) if draw(st.integers(0, 3)) == 0 else data
