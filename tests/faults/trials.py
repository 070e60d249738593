"""Trials: one hostile act on a copy of a run, then all that was promised is asserted. Each returns what happened."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fire_data import models, trainstate
from fire_data.optim import make_optimizer
from fire_data.overview import check
from fire_data.run import Run, open_run
from fire_data.schemas.errors import DamagedError, DataError, FireError, IncompleteError
from fire_data.shards import Part, read_manifest, read_receipt, read_schema, read_shard, sealed, verify_checkpoint
from fire_data.stream import step_batches
from tests.faults.damage import ACTS, flip_bit
from tests.faults.world import STAGES, TABLES, copy, do, visible


def parts(run: Run) -> list[Part]:
    return [run.part(table, 0) for table in TABLES.values()]


def damage(start: Path, root: Path, stage: str, kind: str, rng: random.Random) -> set[str]:
    """A finished stage is damaged: it is named, no reader believes it, its command makes again what is damaged alone.

    Returns what `check` named.
    """
    expected, run = visible(start), open_run(copy(start, root))
    part = run.part(TABLES[stage], 0)
    manifest, truth = sealed(part), Truth(run)
    named = ACTS[kind](part, "00000", "00001", rng)
    before = {p.name: p.stat().st_ino for p in part.folder.iterdir()}
    found = check(run)
    assert {(d["stage"], d["shard"]) for d in found} == {(part.label, shard) for shard in named}
    assert {d["fix"] for d in found} == {part.command}
    assert truth.told_apart(run) == []
    do(stage, root)
    assert visible(root) == expected
    assert check(run) == []
    whole = {f"{shard.name}.parquet" for shard in manifest.plan if shard.name not in named}
    assert {name for name in whole if part.folder.joinpath(name).stat().st_ino != before[name]} == set()
    for later in TABLES:
        do(later, root)
    assert visible(root) == expected, "the stages after it still hold"
    return named


class Truth:
    """What every reader gave before anything was done to a run."""

    def __init__(self, run: Run) -> None:
        self.tables = {name: read(run) for name, read in _READERS.items()}
        self.shards = {(p.label, r.shard): read_shard(p, r) for p in parts(run) for r in sealed(p).shards}

    def told_apart(self, run: Run, names: Iterable[str] | None = None, table: str | None = None) -> list[str]:
        """The readers (of these names, of the shards of this table) that give something else than before, without an
        error. There must be none."""
        wrong = []
        for name in _READERS if names is None else names:
            with contextlib.suppress(DataError, IncompleteError):
                wrong += [] if _same(_READERS[name](run), self.tables[name]) else [name]
        for part in [p for p in parts(run) if table in (None, p.stage)]:
            with contextlib.suppress(DamagedError):
                manifest = read_manifest(part)
                for receipt in manifest.shards if manifest else ():
                    wrong += self.told_apart_shard(part, receipt.shard)
        return wrong

    def told_apart_shard(self, part: Part, shard: str) -> list[str]:
        """As `told_apart`, for the ways in which one shard is read."""
        table, wrong = self.shards[part.label, shard], []
        few = table.column_names[1::3]
        for name, read, wanted in (
            ("whole", lambda r: read_shard(part, r), table),
            ("few columns", lambda r: read_shard(part, r, few), table.select(few)),
            ("schema", lambda r: read_schema(part, r), table.schema),
        ):
            with contextlib.suppress(DamagedError):
                receipt = read_receipt(part, shard)
                if receipt is not None and not read(receipt).equals(wanted):
                    wrong.append(f"{part.label}, {shard}: {name}")
        return wrong


def _trainer(run: Run) -> list[Any]:
    """What the trainer is fed, step by step."""
    (scores, weights) = (run.part(t, 0) for t in ("scores", "weights"))
    batches = step_batches((scores, sealed(scores)), (weights, sealed(weights)), 0, None)
    return [{name: _plain(value) for name, value in vars(batch).items()} for batch in batches]


def _plain(value: Any) -> Any:
    """Arrays as lists, so that batches can be compared."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return [_plain(v) for v in value] if isinstance(value, list) else value


def _checkpoint(run: Run) -> dict[str, bytes]:
    part = run.part("checkpoints", 0)
    verify_checkpoint(part, sealed(part))
    return {p.name: p.read_bytes() for p in part.folder.iterdir()}


def _states(run: Run) -> list[Any]:
    """What training would continue from; a damaged state is as good as none."""
    found = [meta for _, meta in trainstate.whole_states(run.root / ".fire" / "train")]
    if not found:
        raise IncompleteError("there is no state")
    return found


_READERS = {
    "rollouts": lambda run: run.rollouts(0).collect(),
    "scores": lambda run: run.scores(0).collect(),
    "weights": lambda run: run.weights(round=0).collect(),
    "trainer": _trainer,
    "checkpoint": _checkpoint,
    "states": _states,
}


_READ_BY = {
    "rollouts": ("rollouts",),
    "scores": ("scores", "weights", "trainer"),
    "weights": ("weights", "trainer"),
    "checkpoints": ("checkpoint",),
    "train": ("states",),
}


def _same(found: Any, wanted: Any) -> bool:
    return bool(found.equals(wanted)) if hasattr(wanted, "equals") else found == wanted


_RECORDS = ((".fire", "receipts"), (".fire", "manifests"))


class Flips:
    """Bits of any file of a finished run, flipped one at a time, looked at by all who read that file, flipped back."""

    def __init__(self, root: Path) -> None:
        self.run = open_run(root)
        self.truth = Truth(self.run)
        self.files = sorted(p for p in root.rglob("*") if p.is_file() and p.suffix != ".lock" and p.stat().st_size)
        self.model = models.load_model(self.run.config.student, root, dtype="float32")
        self.optimizer = make_optimizer(self.model, self.run.config.train)

    def once(self, path: Path, rng: random.Random) -> str:
        """Flip one bit of a file. Fails unless it is noticed or changes nothing.

        Returns "named" if `check` tells, "refused" for a training state that is not loaded, "setting" for fire.yaml,
        "harmless" where everybody reads the very same: a bit of the word before a checksum, or of a log or cache.
        """
        good, times, inside = path.read_bytes(), path.stat(), path.relative_to(self.run.root)
        place = flip_bit(path, rng)
        try:
            stage = next((p for p in inside.parts if p in _READ_BY), "")
            wrong = self.truth.told_apart(self.run, _READ_BY.get(stage, ()), stage)
            assert wrong == [], f"silent corruption: {inside} {place}: {wrong}"
            if any(Path(d["path"]) == path for d in check(self.run)):
                return "named"
            if stage == "train":
                return self._state(path)
            if inside.name == "fire.yaml":
                return self._settings()
            assert inside.parts[:2] in _RECORDS or inside.name in ("metrics.jsonl", "model-hashes.json"), inside
            return "harmless"
        finally:
            path.write_bytes(good)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    def _state(self, path: Path) -> str:
        """A training state with another byte is not loaded, and the model stays as it is."""
        before = {k: v.clone() for k, v in self.model.state_dict().items()}
        try:
            trainstate.load_state(path.parent, self.model, self.optimizer)
        except DataError:
            assert all(v.equal(before[k]) for k, v in self.model.state_dict().items())
            return "refused"
        assert path.name == trainstate.META, "only blanks of the record may be others"
        return "harmless"

    def _settings(self) -> str:
        """Other settings are refused by what was made with these, or are of no consequence for it."""
        before, other = visible(self.run.root), self.run.root.with_name("settings")
        copy(self.run.root, other)
        for stage in STAGES:
            with contextlib.suppress(FireError):
                do(stage, other)
        assert before.items() <= visible(other).items()
        return "setting"
