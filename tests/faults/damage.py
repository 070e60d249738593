"""Ways in which tables, receipts and manifests of a stage become others than they were written.

Each act damages one stage of one round and returns what `fire check` has to name: shards, or the manifest.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from fire_data.overview import MANIFEST
from fire_data.shards import Part, read_receipt, write_parquet

Act = Callable[[Part, str, str, random.Random], set[str]]


def flip_bit(path: Path, rng: random.Random) -> tuple[int, int]:
    """Change one bit of a file; which."""
    data = bytearray(path.read_bytes())
    place, bit = rng.randrange(len(data)), rng.randrange(8)
    data[place] ^= 1 << bit
    path.write_bytes(data)
    return place, bit


def _flip(part: Part, shard: str, other: str, rng: random.Random) -> set[str]:
    flip_bit(part.file(shard), rng)
    return {shard}


def _cut(part: Part, shard: str, other: str, rng: random.Random) -> set[str]:
    data = part.file(shard).read_bytes()
    part.file(shard).write_bytes(data[: rng.randrange(len(data))])
    return {shard}


def _longer(part: Part, shard: str, other: str, rng: random.Random) -> set[str]:
    with part.file(shard).open("ab") as file:
        file.write(b"\0")
    return {shard}


def _gone(part: Part, shard: str, other: str, rng: random.Random) -> set[str]:
    part.file(shard).unlink()
    return {shard}


def _swapped(part: Part, shard: str, other: str, rng: random.Random) -> set[str]:
    _exchange(part.file(shard), part.file(other))
    return {shard, other}


def _copied_over(part: Part, shard: str, other: str, rng: random.Random) -> set[str]:
    shutil.copyfile(part.file(shard), part.file(other))
    return {other}


def _twice(part: Part, shard: str, other: str, rng: random.Random) -> set[str]:
    shutil.copyfile(part.file(shard), part.file("00099"))
    return {"00099"}


def _foreign(part: Part, shard: str, other: str, rng: random.Random) -> set[str]:
    """A whole table with the right fingerprint and other rows, as of another run of the same settings."""
    table = pq.read_table(part.file(shard))
    names = pa.array([f"{rng.getrandbits(128):032x}" for _ in range(table.num_rows)])
    table = table.set_column(table.column_names.index("trajectory_id"), table.schema.field("trajectory_id"), names)
    receipt = read_receipt(part, shard)
    assert receipt is not None
    write_parquet(part.file(shard), table, receipt.fingerprint, shard)
    return {shard}


def _receipt_edited(part: Part, shard: str, other: str, rng: random.Random) -> set[str]:
    path = part.receipt_path(shard)
    value = json.loads(path.read_text())
    path.write_text(json.dumps(value | {"rows": value["rows"] + 1}))
    return {shard}


def _receipt_flipped(part: Part, shard: str, other: str, rng: random.Random) -> set[str]:
    path = part.receipt_path(shard)
    data = bytearray(path.read_bytes())
    data[rng.randrange(data.index(b'"checksum"'))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return {shard}


def _receipt_gone(part: Part, shard: str, other: str, rng: random.Random) -> set[str]:
    part.receipt_path(shard).unlink()
    return {shard}


def _receipts_swapped(part: Part, shard: str, other: str, rng: random.Random) -> set[str]:
    _exchange(part.receipt_path(shard), part.receipt_path(other))
    return {shard, other}


def _both_swapped(part: Part, shard: str, other: str, rng: random.Random) -> set[str]:
    _swapped(part, shard, other, rng)
    return _receipts_swapped(part, shard, other, rng)


def _manifest_edited(part: Part, shard: str, other: str, rng: random.Random) -> set[str]:
    value = json.loads(part.manifest_path.read_text())
    value["shards"][0]["rows"] += 1
    part.manifest_path.write_text(json.dumps(value))
    return {MANIFEST}


def _manifest_flipped(part: Part, shard: str, other: str, rng: random.Random) -> set[str]:
    data = bytearray(part.manifest_path.read_bytes())
    data[rng.randrange(data.rindex(b'"checksum"'))] ^= 1 << rng.randrange(8)
    part.manifest_path.write_bytes(data)
    return {MANIFEST}


def _manifest_gone(part: Part, shard: str, other: str, rng: random.Random) -> set[str]:
    part.manifest_path.unlink()
    return {MANIFEST}


def _exchange(a: Path, b: Path) -> None:
    between = a.with_name("between")
    a.rename(between)
    b.rename(a)
    between.rename(b)


ACTS: dict[str, Act] = {
    "a bit flipped": _flip, "cut": _cut, "a byte longer": _longer, "deleted": _gone, "two swapped": _swapped,
    "one in place of another": _copied_over, "one twice": _twice, "a foreign one": _foreign,
    "a receipt edited": _receipt_edited, "a receipt with a flipped bit": _receipt_flipped,
    "a receipt deleted": _receipt_gone, "two receipts swapped": _receipts_swapped,
    "two swapped with their receipts": _both_swapped, "the manifest edited": _manifest_edited,
    "the manifest with a flipped bit": _manifest_flipped, "the manifest deleted": _manifest_gone,
}  # fmt: skip
