"""Rows that were computed before their shard can be committed: kept aside, checked, and asked for no second time.

A shard is the unit of what is visible. But a model may be needed for all shards before the next one is loaded, and a
server may go away in the middle of a shard: such rows wait here, one small file per shard and model, until the
stage that they belong to is sealed. They are no promise to anybody: a file that is torn, damaged or of another stage is
as good as none. So each ends with a digest of its bytes and of the stage's fingerprint: page checksums cover neither
the names nor the types of columns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fire_data import files
from fire_data.schemas.errors import EngineError, PartialError
from fire_data.shards import Part

_DIGEST = hashlib.sha256().digest_size


@dataclass(frozen=True)
class Kept:
    """The rows kept for a stage that is being made. `fingerprint` is the stage's."""

    part: Part
    fingerprint: str

    @property
    def folder(self) -> Path:
        name = self.part.label.replace("/", "-").replace(" ", "-")
        return self.part.root / ".fire" / "kept" / name

    def read(self, shard: str, name: str) -> pa.Table | None:
        """The rows kept of a shard under a name, in no special order; None if there are none that can be trusted."""
        try:
            data = self._path(shard, name).read_bytes()
        except OSError:
            return None
        body = data[:-_DIGEST]
        return pq.read_table(pa.BufferReader(body)) if self._digest(body) == data[-_DIGEST:] else None

    def write(self, shard: str, name: str, table: pa.Table) -> None:
        """Keep rows, in place of those that were kept under this name. Raises StorageError."""
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", use_dictionary=False)
        body = sink.getvalue().to_pybytes()
        files.replace_bytes(self._path(shard, name), body + self._digest(body), self.part.tmp)

    def clear(self, shard: str | None = None) -> None:
        """Forget everything kept for this stage, or for one shard of it."""
        for path in [self.folder] if shard is None else self.folder.glob(f"{shard}.*"):
            files.remove(path)

    def _path(self, shard: str, name: str) -> Path:
        return self.folder / f"{shard}.{name}.rows"

    def _digest(self, body: bytes) -> bytes:
        return hashlib.sha256(self.fingerprint.encode() + body).digest()

    def completed(
        self, shard: str, name: str, rows: pa.Table, work: Callable[[pa.Table], pa.Table], *, keep: bool = False
    ) -> pa.Table:
        """What `work` gives for `rows`, in their order, asked only for those that are not kept yet.

        Args:
            rows: with a `trajectory_id` that no two share.
            work: rows to a table of as many rows, which may raise PartialError with those that it finished.
            keep: true: keep the whole result; false: only what was finished before an error.

        Returns:
            The columns of `work` with `trajectory_id`.

        Raises EngineError if `work` gives other columns with every call, and what it raises.
        """
        names = rows["trajectory_id"]
        known, rest, calls = self.read(shard, name), rows, 0
        if known is not None:
            known = known.filter(pc.is_in(known["trajectory_id"], value_set=names))
            rest = _without(rows, known)
        while known is None or rest.num_rows:
            if calls == 2:  # what the first call made useless was asked for in the second
                raise EngineError(
                    f"{name} gives other columns with every call", where=f"{self.part.label}, shard {shard}"
                )
            calls += 1
            try:
                made = _named(work(rest), rest["trajectory_id"])
            except PartialError as error:
                if error.done is not None and error.done.num_rows:
                    self.write(shard, name, _joined(known, error.done))
                raise
            known = _joined(known, made)
            rest = _without(rows, known)
        table = _ordered(known, names)
        if keep and calls:
            self.write(shard, name, table)
        return table


def _without(rows: pa.Table, known: pa.Table) -> pa.Table:
    return rows.filter(pc.invert(pc.is_in(rows["trajectory_id"], value_set=known["trajectory_id"])))


def _named(table: pa.Table, names: pa.ChunkedArray) -> pa.Table:
    return table if "trajectory_id" in table.column_names else table.append_column("trajectory_id", names)


def _joined(known: pa.Table | None, made: pa.Table) -> pa.Table:
    """Both, where both have the same columns; an engine that now gives other columns makes the old rows useless."""
    if known is None or set(known.column_names) != set(made.column_names):
        return made
    plain = made.select(known.column_names).replace_schema_metadata(None)
    return pa.concat_tables([known.replace_schema_metadata(None), plain.cast(known.schema.remove_metadata())])


def _ordered(table: pa.Table, names: pa.ChunkedArray) -> pa.Table:
    places = pc.index_in(names, value_set=table["trajectory_id"])
    return table.take(places)
