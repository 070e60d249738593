"""Shards of a stage: Parquet with page checksums, visible only through a receipt, verified by sha256 on every read.

Layout: `RUN/<stage>/[<name>/]round-000/00000.parquet`, receipts and manifests mirrored under `RUN/.fire/`.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import platform
import shlex
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fire_data import files, partial, records
from fire_data.schemas.errors import DamagedError, DataError, FingerprintError, IncompleteError, StorageError
from fire_data.schemas.manifest import Manifest, Receipt, Shard
from fire_data.schemas.tables import added_by, columns_of, conform

VERBS = {
    "rollouts": "rollout", "scores": "score", "addons": "score", "weights": "weigh", "checkpoints": "train",
    "evals": "eval",
}  # fmt: skip
_BY_COLUMN = ("scores", "addons")  # stages of which readers want few of many columns: receipts have a digest of each
_ZSTD = 1  # bench/storage.py: level 19 saves 4 % and takes 26 times as long
_LOADED = {".json", ".jinja", ".safetensors", ".bin", ".pt", ".model", ".txt", ".py"}  # what loaders of models read
_ROW_GROUP_BYTES = 64 << 20  # the Hub's viewer refuses row groups over 286 MiB


@dataclass(frozen=True)
class Part:
    """One stage of one round of a run, and where its pieces lie. `round` is a number, or a word for evals."""

    root: Path
    stage: str
    round: int | str
    name: str | None = None

    @property
    def label(self) -> str:
        """How messages name it: `weights/fire round-000`."""
        return f"{self._path[0]} {self._path[1]}"

    @property
    def _path(self) -> tuple[str, str]:
        stage = f"{self.stage}/{self.name}" if self.name else self.stage
        return stage, self.round if isinstance(self.round, str) else f"round-{self.round:03d}"

    @property
    def place(self) -> tuple[str, str | None, int]:
        """Stage, name and round as its manifest tells them: a word in place of a round is -1."""
        return self.stage, self.name, self.round if isinstance(self.round, int) else -1

    @property
    def table(self) -> str:
        """The name of its rows' schema for `columns_of`: weights have one schema, each addon has its own."""
        return f"{self.stage}/{self.name}" if self.stage == "addons" else self.stage

    @property
    def folder(self) -> Path:
        return self.root.joinpath(*self._path)

    @property
    def receipts(self) -> Path:
        return self.root.joinpath(".fire", "receipts", *self._path)

    @property
    def manifest_path(self) -> Path:
        stage, round_ = self._path
        return self.root / ".fire" / "manifests" / stage / f"{round_}.json"

    @property
    def tmp(self) -> Path:
        return self.root / ".fire" / "tmp"

    @property
    def orphans(self) -> Path:
        return self.root / ".fire" / "orphans"

    def file(self, shard: str) -> Path:
        return self.folder / f"{shard}.parquet"

    def receipt_path(self, shard: str) -> Path:
        return self.receipts / f"{shard}.json"

    @property
    def lock(self) -> Path:
        """Held for the moment in which any shard of the run is published and receives its receipt."""
        return self.tmp / "publish.lock"

    @property
    def command(self) -> str:
        """The command that makes this stage."""
        place = shlex.quote(str(self.root))
        place += f" --round {self.round}" if isinstance(self.round, int) else f" --{self.round}"
        text = f"fire {VERBS[self.stage]} {place}"
        if self.name is None:
            return text
        if self.stage == "addons":
            return added_by(self.name, place)
        if self.stage == "evals":
            return f"{text} --prompts {self.name}"
        from fire_data.rules import RULES  # imported late: it is only needed for words

        # Weights that are named as their rule are made by it, whatever rule the configuration names.
        known = all(n in RULES and n != "expression" for n in self.name.split("+"))
        option = "rule" if known else "name"
        return f"{text} --{option} {shlex.quote(self.name)}"


def read_manifest(part: Part) -> Manifest | None:
    """The stage's manifest, open or sealed; None if it was never started. Raises DamagedError if it is not that."""
    manifest = records.read(Manifest, part.manifest_path, part.command)
    if manifest is not None and (manifest.stage, manifest.name, manifest.round) != part.place:
        text = f"this is the manifest of {manifest.stage} {manifest.name or ''} round {manifest.round}"
        raise DamagedError(text, where=str(part.manifest_path), fix=part.command)
    return manifest


def read_receipt(part: Part, shard: str) -> Receipt | None:
    """The receipt of a shard; None if there is none. Raises DamagedError if it is not that."""
    path = part.receipt_path(shard)
    receipt = records.read(Receipt, path, part.command)
    if receipt is not None and receipt.shard != shard:
        raise DamagedError(f"this is the receipt of shard {receipt.shard}", where=str(path), fix=part.command)
    return receipt


def is_sealed(part: Part) -> bool:
    """True if the stage is finished, so that later stages accept it."""
    manifest = read_manifest(part)
    return manifest is not None and manifest.sealed


def sealed(part: Part) -> Manifest:
    """The sealed manifest of a stage, or IncompleteError with the command that finishes it.

    Weights of a name that no round has may be a slip of the pen: then it names those that are there.
    """
    manifest = read_manifest(part)
    if manifest is None or not manifest.sealed:
        text, fix = f"{part.label} is {'not started' if manifest is None else 'not finished'}", part.command
        there = started_names(part.root, part.stage)
        if part.stage == "weights" and there and part.name not in there and "--name" in fix:
            near = difflib.get_close_matches(str(part.name), there, n=len(there), cutoff=0.0)
            text = f"there are no weights {part.name!r}; there are: {', '.join(near)}"
            fix = f"one of these; {fix} makes new ones by the run's rule"
        raise IncompleteError(text, where=str(part.folder), fix=fix)
    return manifest


def started_names(root: Path, stage: str) -> list[str]:
    """The folders under `addons/`, `weights/` or `evals/` of a run that were started."""
    folder = root / ".fire" / "manifests" / stage
    return sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []


def write_shard(part: Part, shard: Shard, table: pa.Table, fingerprint: str, started: float) -> Receipt:
    """Commit one shard: temporary file, fsync, re-open and count, publish, receipt. A lost race discards our copy.

    Raises FingerprintError if the stage was set aside meanwhile: what was made for it must not enter another.
    """
    final = part.file(shard.name)
    with files.storage_errors(final):
        scratch = files.temporary(part.tmp, f"{shard.name}.parquet")
        try:
            write_parquet(scratch, table, fingerprint, shard.name)
            files.fsync_file(scratch)
            seconds = time.monotonic() - started
            receipt = _receipt(scratch, part.table, shard.name, table, fingerprint, seconds)
            with files.locked(part.lock):
                require_current(part, fingerprint)
                other = read_receipt(part, shard.name)
                if other is not None and other.fingerprint == fingerprint:
                    return other
                # What is there without a receipt of this stage's is not ours: a writer of a stage set aside, say.
                files.set_aside([final, part.receipt_path(shard.name)], part.orphans)
                if not files.publish(scratch, final):
                    raise StorageError("a file appeared where a shard goes", where=str(final), fix=part.command)
                put_receipt(part, receipt)
        finally:
            scratch.unlink(missing_ok=True)
    return receipt


def put_receipt(part: Part, receipt: Receipt) -> None:
    """Give a shard that is in place its receipt, with digests of its columns where the table is wide.

    Those are in the receipt's file alone: sealed manifests list all receipts, and every command reads them.
    """
    path = part.receipt_path(receipt.shard)
    if not path.exists():
        if part.stage in _BY_COLUMN and not receipt.columns:
            digests = partial.column_digests(part.file(receipt.shard))
            receipt = receipt.model_copy(update={"columns": digests})
        files.create_bytes(path, records.to_bytes(receipt), part.tmp)


def require_current(part: Part, fingerprint: str) -> None:
    """Raise FingerprintError unless the stage that is open or sealed now is the one with this fingerprint."""
    with files.storage_errors(part.manifest_path):
        try:
            found = part.manifest_path.stat()
        except FileNotFoundError:
            found = None
    if found is None or _fingerprint(part, found.st_ino, found.st_mtime_ns, found.st_size) != fingerprint:
        text = f"{part.label} was set aside by another command while this one worked on it"
        raise FingerprintError(text, where=str(part.manifest_path), fix=part.command)


@functools.lru_cache(maxsize=16)
def _fingerprint(part: Part, *_file: int) -> str | None:
    """The fingerprint in a stage's manifest, a file with this inode, time and size: replaced at times, never changed.

    It is asked for with every shard and lists all of them: read each time, a stage would cost the square of its shards.
    """
    manifest = read_manifest(part)
    return manifest.fingerprint if manifest else None


def write_parquet(path: Path, table: pa.Table, fingerprint: str, shard: str = "") -> None:
    """Write a table as all shards are written, with the fingerprint in the footer, and which shard of a stage it is:
    one that lost its receipt must not be taken for another."""
    metadata = {
        **(table.schema.metadata or {}),
        b"fire.fingerprint": fingerprint.encode(),
        b"fire.shard": shard.encode(),
    }
    rows = max(1, min(table.num_rows, table.num_rows * _ROW_GROUP_BYTES // max(1, table.nbytes)))
    settings = parquet_settings(table.schema)
    pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=rows, **settings)


def parquet_settings(schema: pa.Schema) -> dict[str, Any]:
    """How shards are written: page checksums, chunks by content, floats split by byte. `bench/storage.py` has why."""
    return {
        "compression": "zstd",
        "compression_level": _ZSTD,
        "use_dictionary": [f.name for f in schema if pa.types.is_string(f.type)],
        "use_byte_stream_split": [numbers for f in schema if (numbers := _float_lists(f.name, f.type))],
        "write_page_index": True,
        "write_page_checksum": True,
        "use_content_defined_chunking": True,
    }


def _float_lists(name: str, type_: pa.DataType) -> str | None:
    """The Parquet path of the numbers in a column of lists, or lists of lists, of floats; None for other columns."""
    path = name
    while pa.types.is_list(type_):
        path, type_ = f"{path}.list.element", type_.value_type
    return path if path != name and pa.types.is_floating(type_) else None


def _receipt(path: Path, name: str, shard: str, table: pa.Table, fingerprint: str, seconds: float) -> Receipt:
    """The receipt of the file that `table`, of the kind called `name`, was written to."""
    counted = pq.read_metadata(path).num_rows
    if counted != table.num_rows:
        raise OSError(f"re-reading gave {counted} rows instead of {table.num_rows}")
    leader = next((c.name for c in columns_of(name) if c.per == "token"), None)
    return Receipt(
        shard=shard, sha256=files.sha256_file(path), bytes=path.stat().st_size, rows=counted,
        tokens=pc.sum(pc.list_value_length(table[leader])).as_py() or 0 if leader else 0,
        fingerprint=fingerprint, versions=versions(), seconds=round(seconds, 3),
        columns=partial.column_digests(path) if name.partition("/")[0] in _BY_COLUMN else {},
    )  # fmt: skip


@functools.cache
def versions() -> dict[str, str]:
    """Library versions that may change bytes: recorded, never compared."""
    import importlib.metadata as metadata

    found = {"python": platform.python_version()}
    for name in ("fire-opd", "pyarrow", "polars", "torch", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def intact(path: Path, receipt: Receipt) -> bool:
    """True if a file is there with the very bytes of its receipt. Raises StorageError if it cannot be read."""
    with files.storage_errors(path):
        return path.is_file() and path.stat().st_size == receipt.bytes and files.sha256_file(path) == receipt.sha256


def adopt(part: Part, shard: Shard, fingerprint: str) -> Receipt | None:
    """Give a complete shard that lost its writer before the receipt one; set anything else aside.

    Adopted is only what writing its own content again gives byte for byte: checksums cover pages, not the statistics
    beside them, by which readers skip rows.
    """
    path = part.file(shard.name)
    if not path.exists():
        return None
    with files.storage_errors(path), files.locked(part.lock):
        existing = read_receipt(part, shard.name)
        if existing is not None:
            return existing
        table = _parsed(path.read_bytes(), part.table)
        if table is None or not _writes_the_same(part, path, table, fingerprint):
            files.set_aside([path], part.orphans)
            return None
        receipt = _receipt(path, part.table, shard.name, table, fingerprint, 0.0)
        put_receipt(part, receipt)
        return receipt


def _parsed(data: bytes, table: str) -> pa.Table | None:
    """The table in a Parquet file's bytes; None if there is none that conforms to the schema called `table`."""
    try:
        return conform(pq.read_table(pa.BufferReader(data), page_checksum_verification=True), table, "")
    except (pa.ArrowException, OSError, UnicodeDecodeError, DataError):  # a page checksum that differs is an OSError
        return None


def _writes_the_same(part: Part, path: Path, table: pa.Table, fingerprint: str) -> bool:
    scratch = files.temporary(part.tmp, path.name)
    try:
        write_parquet(scratch, table, fingerprint, path.stem)
        return files.sha256_file(scratch) == files.sha256_file(path)
    finally:
        scratch.unlink(missing_ok=True)


def verify_shard(part: Part, receipt: Receipt) -> Path:
    """The path of a shard whose bytes were just compared with its receipt. Raises DamagedError otherwise."""
    return verify_file(part, part.file(receipt.shard), receipt)


def verify_file(part: Part, path: Path, receipt: Receipt) -> Path:
    """As `verify_shard`, for any file of a stage: checkpoints have receipts for theirs too."""
    if not intact(path, receipt):
        what = "a file is missing" if not path.exists() else "a file's bytes are not those of its receipt"
        raise DamagedError(what, where=f"{part.label}, {receipt.shard} ({path})", fix=part.command)
    return path


def verify_checkpoint(part: Part, manifest: Manifest | None) -> None:
    """Raise DamagedError unless the files of a checkpoint are those of its manifest, and there is none beside them that
    would be loaded with them."""
    if manifest is None:
        return
    for receipt in manifest.shards:
        verify_file(part, part.folder / receipt.shard, receipt)
    if found := foreign_files(part, manifest):
        text = f"{found[0].name} is no part of the checkpoint, but would be loaded with it"
        raise DamagedError(text, where=str(found[0]), fix=f"move it out of {part.folder}")


def foreign_files(part: Part, manifest: Manifest) -> list[Path]:
    """Files in a checkpoint's folder that loaders of models look for and that its manifest does not name."""
    ours = {part.folder / receipt.shard for receipt in manifest.shards}
    return sorted(p for p in part.folder.rglob("*") if p.suffix in _LOADED and p not in ours) if ours else []


def read_shard(
    part: Part, receipt: Receipt, columns: list[str] | None = None, *, optional: Iterable[str] = ()
) -> pa.Table:
    """Rows of a shard. The bytes that are hashed are the bytes that are parsed. Raises DamagedError.

    `optional`: columns beside `columns` that are read where they are there. Of a table whose receipt has a digest of
    every column no others are read or compared.
    """
    path = part.file(receipt.shard)
    if columns is not None and (known := _with_columns(part, receipt)):
        with contextlib.suppress(OSError):
            found = partial.read_columns(path, known, columns, optional)
            if found is not None:
                return found
    data = pa.BufferReader(_verified(part, receipt))
    if columns is not None and (further := {*optional}):
        columns = [*columns, *(name for name in pq.read_schema(data).names if name in further)]
    return pq.read_table(data, columns=columns)


def read_schema(part: Part, receipt: Receipt) -> pa.Schema:
    """The columns of a shard with their types. Raises DamagedError."""
    if known := _with_columns(part, receipt):
        with contextlib.suppress(OSError):
            found = partial.read_schema(part.file(receipt.shard), known)
            if found is not None:
                return found
    return pq.read_schema(pa.BufferReader(_verified(part, receipt)))


def _with_columns(part: Part, receipt: Receipt) -> Receipt | None:
    """A receipt with the digests that are in its file, if that is the receipt of the same bytes."""
    if part.stage not in _BY_COLUMN:
        return None
    with contextlib.suppress(DataError, OSError):
        own = read_receipt(part, receipt.shard)
        if own is not None and own.columns and own.sha256 == receipt.sha256:
            return own
    return None


def _verified(part: Part, receipt: Receipt) -> bytes:
    """The bytes of a shard, compared with its receipt."""
    path, data = part.file(receipt.shard), b""
    with files.storage_errors(path), contextlib.suppress(FileNotFoundError, IsADirectoryError, NotADirectoryError):
        data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != receipt.sha256:
        verify_shard(part, receipt)
        raise DamagedError(
            "a shard changed while it was read", where=f"{part.label}, shard {receipt.shard}", fix=part.command
        )
    return data
