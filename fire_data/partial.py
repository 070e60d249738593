"""Some columns of a shard without the others: only their bytes are read, and compared with the digests of its receipt.

A table of scores has about fifty columns, and a reader wants few: to hash and read all of them would cost several times
what it does with them. So the receipt of a wide table has, beside the sha256 of the file, one digest of every column's
pages and one of the footer. The bytes that are hashed are the bytes that are parsed: they are put where they lie in the
file, into memory of its size whose other pages are never touched and so never exist.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

if TYPE_CHECKING:
    from fire_data.schemas.manifest import Receipt

FOOTER = ""  # its key among the digests, which no column has
_END = 8  # a Parquet file ends with the length of its footer, 4 bytes, and "PAR1"
_HEX = 32  # 128 bits of sha256: these are for damage, the file's own digest names it


def column_digests(path: Path) -> dict[str, str]:
    """By column, a digest of its bytes in a Parquet file; under FOOTER, that of what says where they lie."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(size - _END)
        start = _footer(file.read(_END), size)
        digests = {FOOTER: _digest([_bytes(file.fileno(), start, size - start)])}
        parsed = pq.ParquetFile(path)
        for name, ranges in _ranges(parsed).items():
            digests[name] = _digest(_bytes(file.fileno(), *r) for r in ranges)
    return digests


def read_columns(path: Path, receipt: Receipt, columns: list[str], optional: Iterable[str] = ()) -> pa.Table | None:
    """These columns, and those of `optional` that are there; None if one is not there with the bytes of the receipt.

    Raises OSError if the file cannot be read.
    """
    with path.open("rb") as file:
        whole = _with_footer(file.fileno(), receipt)
        if whole is None:
            return None
        parsed = pq.ParquetFile(pa.py_buffer(whole))
        further, ranges = {*optional} - {*columns}, _ranges(parsed)
        wanted = [*dict.fromkeys(columns), *(name for name in parsed.schema_arrow.names if name in further)]
        for name in wanted:
            if name not in ranges or not _matches(file.fileno(), whole, ranges[name], receipt.columns.get(name)):
                return None
    return parsed.read(wanted).select(wanted)


def read_schema(path: Path, receipt: Receipt) -> pa.Schema | None:
    """The columns with their types; None if the footer's bytes are not those of the receipt. Raises as above."""
    with path.open("rb") as file:
        whole = _with_footer(file.fileno(), receipt)
    return None if whole is None else pq.read_schema(pa.py_buffer(whole))


def _with_footer(fd: int, receipt: Receipt) -> memoryview | None:
    """Memory for a file's bytes with its footer in place; None if that is not the one of the receipt."""
    size = os.fstat(fd).st_size
    if size != receipt.bytes or size <= _END:
        return None
    whole = memoryview(mmap.mmap(-1, size))
    if not _fill(fd, whole[size - _END :], size - _END):
        return None
    start = _footer(bytes(whole[size - _END :]), size)
    return whole if _matches(fd, whole, [(start, size - start)], receipt.columns.get(FOOTER)) else None


def _matches(fd: int, whole: memoryview, ranges: Iterable[tuple[int, int]], digest: str | None) -> bool:
    """Read parts of a file into their places. True if they are there and have this digest."""
    parts = []
    for start, length in ranges:
        if not 0 <= start <= start + length <= len(whole):
            return False
        parts.append(whole[start : start + length])
        if not _fill(fd, parts[-1], start):
            return False
    return _digest(parts) == digest


def _ranges(file: pq.ParquetFile) -> dict[str, list[tuple[int, int]]]:
    """By column, where its pages lie: offsets and lengths in bytes, in the order of the file."""
    metadata = file.metadata
    names = sorted(file.schema_arrow.names, key=len, reverse=True)  # a name may be another with a dot and more behind
    paths = [metadata.schema.column(j).path for j in range(metadata.num_columns)]
    columns = [next(n for n in names if path == n or path.startswith(f"{n}.")) for path in paths]
    found: dict[str, list[tuple[int, int]]] = {}
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        for j, name in enumerate(columns):
            chunk = group.column(j)
            start = chunk.data_page_offset
            if chunk.dictionary_page_offset is not None:
                start = min(start, chunk.dictionary_page_offset)
            found.setdefault(name, []).append((start, chunk.total_compressed_size))
    return found


def _footer(end: bytes, size: int) -> int:
    """Where the footer of a file begins, by its last bytes; negative for what is no Parquet file."""
    return size - _END - int.from_bytes(end[:4], "little")


def _digest(parts: Iterable[bytes | memoryview]) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(part)
    return total.hexdigest()[:_HEX]


def _bytes(fd: int, start: int, length: int) -> bytes:
    return os.pread(fd, length, start)


def _fill(fd: int, target: memoryview, start: int) -> bool:
    """Read a part of a file into its place; False if it ends before."""
    done = 0
    while done < len(target):
        count = os.preadv(fd, [target[done:]], start + done)
        if count == 0:
            return False
        done += count
    return True
