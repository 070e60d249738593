"""Where a run's files lie in a Hub repository, and which names found there are accepted.

Tables keep their places, so that `scores/**/*.parquet` is one table. The index holds the sealed manifests of all of
them and is replaced in one commit. Text from the Hub never becomes a path: names are checked, then paths are made from
them here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, TypeAlias

from pydantic import ValidationError
from pydantic_core import from_json

from fire_data.overview import parts
from fire_data.run import Run
from fire_data.schemas.config import WeighConfig, is_benchmark
from fire_data.schemas.errors import ConfigError, DataError, FingerprintError, first_line
from fire_data.schemas.manifest import ADAPTER, Manifest, Receipt, differences, digest, problem
from fire_data.schemas.tables import FORMAT, addon_columns
from fire_data.shards import Part, read_manifest

INDEX, CARD, CONFIG = "fire/manifest.json", "README.md", "fire.yaml"
FLAT, CHECKPOINTS = "flat", "checkpoints"
TABLES = ("rollouts", "scores", "addons", "weights", "evals")
START = -1  # the round of the evaluation before training
TAG = "fire-opd"  # in the metadata of every card

_ORDER = (*TABLES, FLAT, CHECKPOINTS)
_NAMED = ("addons", "weights", FLAT)
_SHARD = re.compile(r"[0-9]{5,9}")
_CHECKPOINT_FILE = re.compile(rf"({ADAPTER}/)?[A-Za-z0-9][A-Za-z0-9._-]{{0,199}}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LAST_ROUND = 999_999

Key: TypeAlias = tuple[int, str, str]  # round, stage, name
Stages: TypeAlias = dict[Key, Manifest]


def key_of(manifest: Manifest) -> Key:
    return manifest.round, manifest.stage, manifest.name or ""


def part_of(root: Path, manifest: Manifest) -> Part:
    """Where a stage lies in the run `root`."""
    return Part(root, manifest.stage, "start" if manifest.round == START else manifest.round, manifest.name)


def files_of(manifest: Manifest) -> dict[str, Receipt]:
    """The files of a stage by their path in the repository; those of a checkpoint lie at its top."""
    if manifest.stage == CHECKPOINTS:
        return {receipt.shard: receipt for receipt in manifest.shards}
    part = part_of(Path(), manifest)
    return {part.file(receipt.shard).as_posix(): receipt for receipt in manifest.shards}


def local_stages(run: Run, among: Iterable[Part] | None = None) -> Stages:
    """The manifests of a run, or of some parts of it, open or sealed."""
    found = [m for part in (parts(run) if among is None else among) if (m := read_manifest(part)) is not None]
    return {key_of(m): m for m in found}


def ordered(stages: Iterable[Manifest]) -> list[Manifest]:
    """By round, and in it in the order in which stages are made."""
    return sorted(stages, key=lambda m: (m.round, _ORDER.index(m.stage), m.name or ""))


def select(stages: Stages, rounds: Sequence[int] | None, names: Sequence[str] | None, where: str) -> list[Manifest]:
    """The sealed tables of these rounds and stages (`weights` or `weights/fire`); None: all.

    Raises ConfigError for a round or a stage of which there is nothing.
    """
    there = [m for m in ordered(stages.values()) if m.sealed and m.stage in TABLES]
    for number in rounds or ():
        if all(m.round != number for m in there):
            raise _nothing(f"of round {number}", there, where)
    for name in names or ():
        if all(name not in _called(m) for m in there):
            raise _nothing(f"of stage {name!r}", there, where)
    wanted = None if rounds is None else {*rounds, *([START] if 0 in rounds else [])}
    chosen = [
        m
        for m in there
        if (wanted is None or m.round in wanted) and (names is None or any(n in _called(m) for n in names))
    ]
    if not chosen:
        raise _nothing("to share" if rounds is None and names is None else "of these rounds and stages", there, where)
    return chosen


def _called(manifest: Manifest) -> tuple[str, ...]:
    return (manifest.stage, f"{manifest.stage}/{manifest.name}") if manifest.name else (manifest.stage,)


def _nothing(what: str, there: list[Manifest], where: str) -> ConfigError:
    found = in_words(part_of(Path(), m).label for m in there) or "none"
    fix = "name rounds and stages that are there" if there else "fire status RUN says what is left to do"
    return ConfigError(f"there is no sealed table {what}; there are: {found}", where=where, fix=fix)


def in_words(labels: Iterable[str]) -> str:
    """Stages of rounds in few words, stage by stage: `evals start and rounds 0-3; scores rounds 0, 4-9`."""
    places: dict[str, list[str]] = {}
    for label in labels:
        stage, _, place = label.rpartition(" ")
        places.setdefault(stage, []).append(place)
    return "; ".join(f"{stage} {_places(found)}" for stage, found in places.items())


def _places(found: Sequence[str]) -> str:
    numbers = sorted({int(p.removeprefix("round-")) for p in found if p != "start"})
    # In a row of numbers one after the other, number and place differ by the same.
    rows = [[n for _, n in row] for _, row in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])]
    told = ", ".join(str(row[0]) if len(row) == 1 else f"{row[0]}-{row[-1]}" for row in rows)
    rounds = [f"round{'s' * (len(numbers) > 1)} {told}"] if numbers else []
    return " and ".join([*(["start"] if "start" in found else []), *rounds])


def require_same_run(mine: Stages, theirs: Stages, *, where: str, fix: str) -> None:
    """Raise FingerprintError unless both are of one run: what both have is equal, and they have something in common."""
    if not mine or not theirs:
        return
    both = ordered(mine[key] for key in mine.keys() & theirs.keys())
    for manifest in both:
        other = theirs[key_of(manifest)]
        if (manifest.fingerprint, manifest.digest) == (other.fingerprint, other.digest):
            continue
        label = part_of(Path(), manifest).label
        changed = "; ".join(differences(other.fields, manifest.fields)) or "other rows from the same settings"
        raise FingerprintError(f"{label} is another one here than on the Hub: {changed}", where=where, fix=fix)
    if not both:
        raise FingerprintError("the run and the repository have no stage in common", where=where, fix=fix)


def write_index(stages: Iterable[Manifest]) -> bytes:
    """The index of a repository."""
    value = {"format": FORMAT, "stages": [m.model_dump(mode="json") for m in ordered(stages)]}
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def read_index(data: bytes, where: str) -> Stages:
    """The sealed manifests in an index. Raises DataError for one that is not from `fire push`, or was changed."""
    try:
        value = from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise _refused(f"it is not JSON: {error}", where) from None
    if not isinstance(value, dict) or not isinstance(value.get("stages"), list):
        raise _refused("it names no stages", where)
    found = value.get("format")
    if isinstance(found, int) and found > FORMAT:
        text = f"format {found} is newer than this version reads ({FORMAT})"
        raise DataError(text, where=where, fix="pip install --upgrade fire-opd")
    manifests = [_manifest(stage, where) for stage in value["stages"]]
    stages = {key_of(m): m for m in manifests}
    if len(stages) < len(manifests):
        raise _refused("a stage is named twice", where)
    return stages


def _manifest(value: Any, where: str) -> Manifest:
    try:
        manifest = Manifest.model_validate(value)
        wrong = _wrong(manifest)
    except (ValueError, RecursionError) as error:
        told = problem(error) if isinstance(error, ValidationError) else first_line(error)
        raise _refused(f"it holds something that is no manifest: {told}", where) from None
    if wrong:
        raise _refused(f"{manifest.stage!r} of round {manifest.round}: {wrong}", where)
    return manifest


def _wrong(manifest: Manifest) -> str | None:
    """What forbids to take a manifest from the Hub for one of ours; None if nothing does."""
    if manifest.stage not in _ORDER:
        return "there is no such stage"
    if not (START if manifest.stage == "evals" else 0) <= manifest.round <= _LAST_ROUND:
        return "there is no such round"
    named = manifest.stage == "evals" or (manifest.name is not None) == (manifest.stage in _NAMED)
    if not named or not _is_name(manifest):
        return f"{manifest.name!r} is no name"
    if not manifest.sealed:
        return "it is not finished"
    digest([manifest.stats, manifest.recorded])  # ValueError for a number that cannot be written again: 1e999
    if manifest.fingerprint != digest(manifest.fields):
        return "its fingerprint is not that of its fields"
    shards = [receipt.shard for receipt in manifest.shards]
    checkpoint = manifest.stage == CHECKPOINTS
    if shards != sorted(set(shards)) or not (checkpoint or shards == [s.name for s in manifest.plan]):
        return "its shards are not those of its plan"
    for receipt in manifest.shards:
        if not (_CHECKPOINT_FILE if checkpoint else _SHARD).fullmatch(receipt.shard):
            return f"{receipt.shard!r} is no name of a shard"
        if not _SHA256.fullmatch(receipt.sha256) or min(receipt.bytes, receipt.rows, receipt.tokens) < 0:
            return f"the receipt of {receipt.shard} is not one"
        if receipt.fingerprint != manifest.fingerprint:
            return f"shard {receipt.shard} is of another stage"
    return None


def _is_name(manifest: Manifest) -> bool:
    """True for a name that may be a folder under `weights/` or `addons/`."""
    if manifest.name is None:
        return True
    try:
        WeighConfig(name=manifest.name)
    except ValidationError:
        return False
    if manifest.stage == "evals":
        return is_benchmark(manifest.name)
    return manifest.stage != "addons" or addon_columns(manifest.name) is not None


def _refused(what: str, where: str) -> DataError:
    return DataError(f"the index cannot be used: {what}", where=where, fix="ask its author to push the run again")


def by_stage(stages: Iterable[Manifest]) -> Mapping[tuple[str, str], list[Manifest]]:
    """All rounds of each table, by stage and name."""
    found: dict[tuple[str, str], list[Manifest]] = {}
    for manifest in sorted(stages, key=lambda m: (_ORDER.index(m.stage), m.name or "", m.round)):
        found.setdefault((manifest.stage, manifest.name or ""), []).append(manifest)
    return found
