"""`fire pull`: the tables of a dataset on the Hub into a run directory, compared with their receipts byte by byte.

Everything is read at one commit. A file becomes visible in the run as a stage's own files do: whole, with its receipt,
and the stage when all of it is there. Nothing of a repository is executed, and none of its texts becomes a path.
"""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fire_data import files, records
from fire_data.hub.client import Repository, free_space
from fire_data.hub.layout import (
    CONFIG,
    INDEX,
    Stages,
    files_of,
    local_stages,
    part_of,
    read_index,
    require_same_run,
    select,
)
from fire_data.hub.push import LARGEST_INDEX
from fire_data.hub.redact import shared_config, shared_manifest
from fire_data.overview import parts, start_over
from fire_data.run import Run, open_run
from fire_data.schemas.config import parse_config, parse_yaml, render_config
from fire_data.schemas.errors import (
    ConfigError,
    DamagedError,
    DataError,
    FingerprintError,
    FireError,
    IncompleteError,
)
from fire_data.schemas.manifest import Receipt
from fire_data.schemas.tables import conform
from fire_data.shards import Part, intact, put_receipt, read_manifest, read_receipt
from fire_data.stages import Reporter, Silent

_LARGEST_CONFIG = 1 << 20  # bytes
_LARGEST_GROUP = 2 << 30  # bytes of one row group in memory; `fire` writes 64 MiB
_PUSH_AGAIN = "its author repeats: fire push RUN {repo}"


@dataclass(frozen=True)
class Shared:
    """What a repository says of itself at one commit: its manifests, and settings that are safe to take over."""

    hub: Repository
    commit: str
    stages: Stages
    settings: dict[str, Any]


def pull(
    repo: str,
    root: Path,
    *,
    rounds: Sequence[int] | None = None,
    stages: Sequence[str] | None = None,
    revision: str | None = None,
    redo: bool = False,
    report: Reporter | None = None,
) -> dict[str, Any]:
    """Make the tables of a shared run a run directory here; continue, complete, mend or confirm one that is there.

    Args:
        repo: user/name.
        root: a new or empty folder, or a run that the repository is of. Its fire.yaml, if there is one, stays.
        rounds, stages: as for `push`; None: all.
        revision: branch, tag or commit.
        redo: set stages aside that were begun here and not finished, and that the repository has.

    Returns:
        What was pulled: `repository`, `commit`, `tables`, `files` downloaded and their `bytes`.

    Raises:
        ConfigError: no such repository, round or stage.
        FingerprintError: the folder holds another run.
        DataError: an index, settings or a table that cannot be used, or is not what its receipt says.
        IncompleteError: the push was not finished, or the network failed; the same call continues.
    """
    return take(look(repo, root, revision), root, rounds, stages, report or Silent(), redo=redo)


def look(repo: str, root: Path, revision: str | None) -> Shared:
    """What is shared there, for a run in `root`; nothing is made here. Raises as `pull`."""
    hub = Repository(repo, "dataset", revision)
    if root.exists() and not root.is_dir():
        raise ConfigError("this is a file, not a folder", where=str(root), fix="another folder")
    try:
        commit = hub.head().commit
    except ConfigError:
        if _is_model(repo):
            fix = f"as a student: fire init RUN --student {repo} --teacher MODEL --prompts FILE"
            raise ConfigError("this is a model, not a dataset", where=f"hf://{repo}", fix=fix) from None
        raise
    stages, settings = _texts(hub, commit)
    return Shared(hub, commit, stages, _settings(settings, root, stages, hub))


def take(
    shared: Shared,
    root: Path,
    rounds: Sequence[int] | None,
    stages: Sequence[str] | None,
    report: Reporter,
    *,
    redo: bool = False,
) -> dict[str, Any]:
    """Download what is asked for and is not there yet. Arguments, result and errors as of `pull`."""
    hub, commit = shared.hub, shared.commit
    chosen = select(shared.stages, rounds, stages, hub.where)
    wanted = {path: receipt for m in chosen for path, receipt in files_of(m).items()}
    _require_there(hub, wanted, commit)
    free_space(root, sum(r.bytes for path, r in wanted.items() if not (root / path).exists()))
    run = _opened(root, shared, redo, report)
    report.start("pull", sum(r.bytes for r in wanted.values()), "bytes")
    done: list[int] = []
    with files.locked(run.root / ".fire" / "tmp" / "pull.lock", lambda: report.note("another command pulls: waiting")):
        for manifest in chosen:
            part = part_of(run.root, manifest)
            for path, receipt in files_of(manifest).items():
                done += [receipt.bytes] if _take(hub, path, commit, part, receipt) else []
                report.advance(receipt.bytes)
            mine = records.to_bytes(shared_manifest(manifest, run.root))
            files.create_bytes(part.manifest_path, mine, part.tmp)
        files.remove(_scratch(run.root))
    return {
        "repository": hub.where,
        "commit": commit,
        "tables": [part_of(Path(), m).label for m in chosen],
        "files": len(done),
        "bytes": sum(done),
    }


def _is_model(repo: str) -> bool:
    try:
        return Repository(repo, "model").exists()
    except FireError:  # what is wrong with the dataset is to be told, not this
        return False


def _texts(hub: Repository, commit: str) -> tuple[Stages, str]:
    """The index and the settings of a repository. Raises IncompleteError for a push that was not finished."""
    there = hub.entries([INDEX, CONFIG], commit)
    for path in (INDEX, CONFIG):
        if path not in there:
            text = f"there is no {path}: it was not made by `fire push`, or the push was not finished"
            raise IncompleteError(text, where=hub.where, fix=_PUSH_AGAIN.format(repo=hub.id))
    with tempfile.TemporaryDirectory() as folder:
        index = hub.read(INDEX, there[INDEX], commit, Path(folder), LARGEST_INDEX)
        settings = hub.read(CONFIG, there[CONFIG], commit, Path(folder), _LARGEST_CONFIG)
    return read_index(index, f"{hub.where}/{INDEX}"), settings.decode("utf-8", "replace")


def _settings(text: str, root: Path, index: Stages, hub: Repository) -> dict[str, Any]:
    """The values for a new fire.yaml, without anything that would run code or name a place."""
    where = f"{hub.where}/{CONFIG}"
    try:
        values = parse_yaml(text, CONFIG, where)
        config = parse_config(values if isinstance(values, dict) else {}, where)
        return shared_config(config, root, index.values())
    except ConfigError as error:
        fix = "pip install --upgrade fire-opd, or ask its author to push the run again"
        raise DataError(f"the settings cannot be used: {error.what}", where=where, fix=fix) from None


def _require_there(hub: Repository, wanted: dict[str, Receipt], commit: str) -> None:
    """Raise, before anything is downloaded, if files that the index names are absent or others."""
    there = hub.entries(list(wanted), commit)
    absent = [path for path in wanted if path not in there]
    if absent:
        text = f"{len(absent)} of {len(wanted)} files that the index names are not there, the first is {absent[0]}"
        raise IncompleteError(text, where=hub.where, fix=_PUSH_AGAIN.format(repo=hub.id))
    other = [path for path, r in wanted.items() if not there[path].holds(r.bytes, r.sha256)]
    if other:
        raise _other(hub, other[0])


def _other(hub: Repository, path: str) -> DamagedError:
    text = f"{path} is not the file that the index names"
    return DamagedError(text, where=hub.where, fix="--revision COMMIT names one at which it was whole; tell its author")


def _opened(root: Path, shared: Shared, redo: bool, report: Reporter) -> Run:
    """The run to pull into: the one that is there if it is the same, or a new one with the shared settings."""
    target, fix = root / CONFIG, f"fire pull {shared.hub.id} ANOTHER_FOLDER"
    if not target.exists():
        if root.is_dir() and any(p.name != ".fire" for p in root.iterdir()):
            raise ConfigError("the folder is not empty and is no run", where=str(root), fix=fix)
        files.create_bytes(target, render_config(shared.settings).encode(), root / ".fire" / "tmp")
    run = open_run(root)
    mine, damaged = _local(run)
    begun = [key for key, m in mine.items() if not m.sealed and key in shared.stages]
    require_same_run({k: m for k, m in mine.items() if k not in begun}, shared.stages, where=str(root), fix=fix)
    if damaged and not mine.keys() & shared.stages.keys():
        text = f"the manifest of {damaged[0].label} is damaged, and nothing else tells that this is the same run"
        raise DamagedError(text, where=str(damaged[0].manifest_path), fix=fix)
    for part in [p for p in damaged if p.place in _places(shared.stages)]:
        report.warn(f"the manifest of {part.label} is damaged and is taken from the Hub")
        files.set_aside([part.manifest_path], part.orphans)
    for key in begun:
        part = part_of(root, mine[key])
        if not redo:
            at = ["--revision", shared.hub.revision] if shared.hub.revision else []
            again = shlex.join(["fire", "pull", shared.hub.id, str(root), *at, "--redo"])
            text = f"{part.label} is another one here than on the Hub: it was begun here and is not finished"
            raise FingerprintError(text, where=str(root), fix=f"{again} sets it aside first; or {fix}")
        start_over(run, part.stage, part.round, report, part.name)
    return run


def _local(run: Run) -> tuple[Stages, list[Part]]:
    """The manifests of a run's tables, and the stages of which it is damaged."""
    damaged = []
    for part in parts(run):
        try:
            read_manifest(part)
        except DamagedError:
            damaged.append(part)
    whole = [part for part in parts(run) if part not in damaged and part.stage != "checkpoints"]
    return local_stages(run, whole), damaged


def _places(stages: Stages) -> set[tuple[str, str | None, int]]:
    return {(m.stage, m.name, m.round) for m in stages.values()}


def _scratch(root: Path) -> Path:
    """Where downloads wait; a broken one continues there."""
    return root / ".fire" / "pull"


def _take(hub: Repository, path: str, commit: str, part: Part, receipt: Receipt) -> bool:
    """Bring one shard into the run. False if it was there, whole. One that was damaged is set aside first."""
    final = part.file(receipt.shard)
    if intact(final, receipt):
        try:
            read_receipt(part, receipt.shard)
        except DamagedError:
            files.set_aside([part.receipt_path(receipt.shard)], part.orphans)
        put_receipt(part, receipt)
        return False
    scratch = _scratch(part.root)
    loaded = hub.download(path, commit, scratch)
    try:
        if not intact(loaded, receipt):
            raise _other(hub, path)
        _examine(loaded, part, receipt)
    except (pa.ArrowException, OSError, UnicodeDecodeError, DataError) as error:  # the last but one: names of columns
        files.remove(scratch)  # else the client would take it for good the next time
        if isinstance(error, DamagedError):
            raise
        what = error.what if isinstance(error, DataError) else str(error).splitlines()[0]
        text = f"{path} is no table of {part.stage}: {what}"
        raise DataError(text, where=hub.where, fix="ask its author to push the run again") from None
    with files.storage_errors(final), files.locked(part.lock):
        files.fsync_file(loaded)
        files.set_aside([final, part.receipt_path(receipt.shard)], part.orphans)
        files.publish(loaded, final)
        put_receipt(part, receipt)
    loaded.unlink(missing_ok=True)
    return True


def _examine(file: Path, part: Part, receipt: Receipt) -> None:
    """Raise unless a file is a table of its stage with the rows of its receipt; row group by row group."""
    with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
        if parquet.metadata.num_rows != receipt.rows:
            raise DataError(f"it has {parquet.metadata.num_rows} rows, its receipt says {receipt.rows}")
        for i in range(parquet.num_row_groups):
            group = parquet.metadata.row_group(i)
            # Run lengths make a billion equal numbers a few bytes: in memory each takes 8, or 16 as text.
            values = sum(group.column(j).num_values for j in range(group.num_columns))
            if max(group.total_byte_size, 8 * values) > _LARGEST_GROUP:
                raise DataError(f"row group {i} has more than {_LARGEST_GROUP:,} bytes")
            conform(parquet.read_row_group(i), part.table, f"row group {i}")
