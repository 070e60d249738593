"""Run one stage of one round: open or resume its plan, make what is missing, seal. The same command continues.

The plan and the fingerprint are fixed when a stage starts. A different fingerprint later is an error that names the
fields; `redo` sets the stage, and all that was made from it, aside first.

Shards do not depend on each other, so several may be made at a time, each in a thread (a lane): engines that wait for
a server or a cluster are then kept busy. Bytes do not depend on the number of lanes. Times are in seconds.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pyarrow as pa

from fire_data import files, records
from fire_data.kept import Kept
from fire_data.schemas.errors import DamagedError, DataError, FingerprintError
from fire_data.schemas.manifest import Manifest, Receipt, Shard, differences, digest
from fire_data.shards import Part, adopt, intact, read_manifest, read_receipt, require_current, write_shard

_LOOK_S = 1.0  # how often running shards are looked at
_SLOW_RATIO, _SLOW_S, _SLOW_KNOWN = 3.0, 60.0, 3  # slow: longer than 3 medians of at least 3 shards, and a minute
_R = TypeVar("_R")


class Reporter(Protocol):
    """Where a stage tells how far it is.

    `unit` is what `total` and `count` are counted in: prompts, shards, steps, bytes. `done` of them were there before.
    `tokens` went through the stage meanwhile; 0 where nobody counts them. `busy` is for what has no parts to be counted
    and may come up in the middle of a stage: a model that is loaded, a server that is asked.
    """

    def start(self, what: str, total: int, unit: str, done: int = 0) -> None: ...
    def advance(self, count: int, tokens: int = 0) -> None: ...
    def busy(self, what: str) -> None: ...
    def note(self, text: str) -> None: ...
    def warn(self, text: str) -> None: ...


class Silent:
    """A Reporter that says nothing."""

    def start(self, what: str, total: int, unit: str, done: int = 0) -> None: ...
    def advance(self, count: int, tokens: int = 0) -> None: ...
    def busy(self, what: str) -> None: ...
    def note(self, text: str) -> None: ...
    def warn(self, text: str) -> None: ...


@dataclass(frozen=True)
class Stage:
    """What is to be made: where, from which result-changing fields, in which shards."""

    part: Part
    fields: dict[str, Any]
    plan: tuple[Shard, ...]
    recorded: dict[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        return digest(self.fields)


@dataclass
class Lane:
    """A shard that is being worked on. An engine that has it worked on elsewhere says where, for messages."""

    shard: Shard
    label: str
    started: float
    place: str | None = None

    def __str__(self) -> str:
        """How messages name it: `rollouts round-000, shard 00003`."""
        return f"{self.label}, shard {self.shard.name}" if self.label else f"shard {self.shard.name}"


LANE: ContextVar[Lane | None] = ContextVar("LANE", default=None)  # the lane of the calling thread


def plan_shards(units: int, per_shard: int) -> tuple[Shard, ...]:
    """Shards of `per_shard` consecutive units, the last one shorter; an empty stage has no shard."""
    starts = range(0, units, per_shard)
    return tuple(Shard(name=f"{i:05d}", start=a, stop=min(a + per_shard, units)) for i, a in enumerate(starts))


def open_stage(stage: Stage) -> Manifest:
    """The manifest to work under: the existing one, or a new one. Raises FingerprintError if fields differ."""
    part = stage.part
    fresh = Manifest(
        stage=part.stage, name=part.name, round=part.round if isinstance(part.round, int) else -1,
        fingerprint=stage.fingerprint, fields=stage.fields, plan=stage.plan, recorded=stage.recorded,
    )  # fmt: skip
    found = _found(stage)
    if found is None and files.create_bytes(part.manifest_path, records.to_bytes(fresh), part.tmp):
        return fresh
    found = found or read_manifest(part)
    if found is None:
        raise FingerprintError(
            f"{part.label} was set aside by another command", where=str(part.folder), fix=part.command
        )
    if found.fingerprint != stage.fingerprint and _untouched(part, found):
        with files.locked(part.lock):
            if _untouched(part, found):
                files.replace_bytes(part.manifest_path, records.to_bytes(fresh), part.tmp)
                return fresh
    if found.fingerprint != stage.fingerprint:
        changed = differences(found.fields, stage.fields)
        text = f"{part.label} was started with other settings: " + "; ".join(changed or ["the recorded fields"])
        fix = "set them back, or the same command with --redo makes it anew"
        fix += "; --name OTHER keeps both" if part.stage == "weights" else ""
        raise FingerprintError(text, where=str(part.manifest_path), fix=fix)
    return found


def _found(stage: Stage) -> Manifest | None:
    """The manifest that is there. A damaged one is set aside if this very stage can be seen to have made the rest.

    Raises DamagedError if it cannot: there may be other settings behind it.
    """
    part = stage.part
    try:
        return read_manifest(part)
    except DamagedError:
        with files.locked(part.lock):
            try:
                return read_manifest(part)  # another process may have mended it since
            except DamagedError as error:
                if not _ours(stage):
                    raise DamagedError(error.what, where=error.where, fix=f"{part.command} --redo") from None
                files.set_aside([part.manifest_path], part.orphans)
    return None


def _ours(stage: Stage) -> bool:
    """True if nothing was made, or all receipts are of this stage; a checkpoint is exported again from its state."""
    part = stage.part
    if not part.folder.exists() or (part.stage == "checkpoints" and any(_states(part))):
        return True
    receipts = [r for shard in stage.plan if (r := _readable(part, shard)) is not None]
    return bool(receipts) and all(r.fingerprint == stage.fingerprint for r in receipts)


def _states(part: Part) -> Iterator[Path]:
    """The folders of training states of a round."""
    return (part.root / ".fire" / "train").glob(f"step-*-round-{part.round:03d}*")


def _untouched(part: Part, manifest: Manifest) -> bool:
    """True if a stage was begun and failed before it made anything: another attempt is not a change of settings."""
    made = [*part.receipts.glob("*"), *part.folder.glob("*")]
    return not manifest.sealed and not made and not (part.stage == "checkpoints" and any(_states(part)))


def finished(part: Part) -> str:
    """What is told where there is nothing to do."""
    return f"{part.label} was finished before: nothing to do"


def run_stage(
    stage: Stage,
    make: Callable[[Shard], pa.Table],
    finish: Callable[[list[Receipt]], dict[str, Any]] | None = None,
    report: Reporter | None = None,
    *,
    lanes: int = 1,
    before: Callable[[list[Shard]], None] | None = None,
) -> Manifest:
    """Make every shard that is missing or damaged, then seal the stage. A finished, intact stage is left as it is.

    Args:
        make: returns one conforming table per shard; called by several threads at once if `lanes` is more than 1.
        finish: turns the receipts into the manifest's `stats`.
        lanes: how many shards are made at the same time, see `each_shard`.
        before: called once, in the calling thread, with the shards that have to be made, if there are any.
    """
    part, report = stage.part, report or Silent()
    files.remove_leftovers(part.tmp)
    manifest = open_stage(stage)
    _set_strangers_aside(part, manifest, report)
    receipts = {shard.name: _existing(part, shard, manifest, report) for shard in manifest.plan}
    if manifest.sealed and [r.sha256 if r else None for r in receipts.values()] == [r.sha256 for r in manifest.shards]:
        report.note(finished(part))
        return manifest
    missing = [shard for shard in manifest.plan if receipts[shard.name] is None]
    if before and missing:
        before(missing)
    prompts, left = (sum(s.stop - s.start for s in shards) for shards in (manifest.plan, missing))
    report.start(part.label, prompts, "prompts", prompts - left)

    def commit(shard: Shard) -> Receipt:
        started = time.monotonic()
        return write_shard(part, shard, make(shard), manifest.fingerprint, started)

    made = each_shard(missing, commit, lambda r: r.tokens, lanes=lanes, report=report, label=part.label)
    receipts |= {shard.name: receipt for shard, receipt in zip(missing, made, strict=True)}
    done = [r for shard in manifest.plan if (r := receipts[shard.name]) is not None]
    return seal(part, manifest, done, finish(done) if finish else {}, stage.recorded)


def each_shard(
    shards: Sequence[Shard],
    work: Callable[[Shard], _R],
    tokens: Callable[[_R], int] = lambda _: 0,
    *,
    lanes: int = 1,
    report: Reporter | None = None,
    label: str = "",
    clock: Callable[[], float] = time.monotonic,
) -> list[_R]:
    """What `work` gives for every shard, in the order of `shards`, which is also the order in which they are started.

    With `lanes` > 1 up to that many are worked on at the same time, each in a thread; with 1 all in the calling
    thread. The first exception is raised when the shards that were running have ended; none is started after it.
    An interrupt is raised at once: threads that still run end with the process. `report` is told of every shard's
    prompts and, by what `tokens` says of a result, of its tokens, and of shards that take much longer than the others,
    from the calling thread only.
    """
    report = report or Silent()
    if lanes <= 1 or len(shards) <= 1:
        results = []
        for shard in shards:
            results.append(_in_lane(Lane(shard, label, clock()), work))
            report.advance(shard.stop - shard.start, tokens(results[-1]))
        return results
    futures: list[Future[_R]] = []
    running: dict[Future[_R], Lane] = {}
    seconds: list[float] = []
    slow: set[str] = set()
    failure: BaseException | None = None
    while True:
        while failure is None and len(running) < lanes and len(futures) < len(shards):
            future: Future[_R] = Future()
            running[future] = lane = Lane(shards[len(futures)], label, clock())
            futures.append(future)
            # A daemon: nothing waits for it when the command is interrupted.
            threading.Thread(target=_settle, args=(future, lane, work), name=f"lane {lane}", daemon=True).start()
        if not running:
            break
        for future in wait(running, _LOOK_S, FIRST_COMPLETED).done:
            lane = running.pop(future)
            if (error := future.exception()) is not None:
                failure = failure or error
                continue
            seconds.append(clock() - lane.started)
            report.advance(lane.shard.stop - lane.shard.start, tokens(future.result()))
        _tell_slow(running.values(), seconds, slow, clock(), report)
    if failure is not None:
        raise failure
    return [future.result() for future in futures]


def _settle(future: Future[_R], lane: Lane, work: Callable[[Shard], _R]) -> None:
    try:
        future.set_result(_in_lane(lane, work))
    except BaseException as error:  # noqa: BLE001 - whatever it is, the calling thread raises it
        future.set_exception(error)


def _in_lane(lane: Lane, work: Callable[[Shard], _R]) -> _R:
    token = LANE.set(lane)
    try:
        return work(lane.shard)
    finally:
        LANE.reset(token)


def _tell_slow(running: Iterable[Lane], seconds: list[float], told: set[str], now: float, report: Reporter) -> None:
    """Warn once of every running shard that takes much longer than those that ended, which took `seconds`."""
    late = [lane for lane in running if now - lane.started >= _SLOW_S and lane.shard.name not in told]
    if len(seconds) < _SLOW_KNOWN or not late:
        return
    usual = statistics.median(seconds)
    for lane in late:
        age = now - lane.started
        if age > _SLOW_RATIO * usual:
            told.add(lane.shard.name)
            place = f" on {lane.place}" if lane.place else ""
            report.warn(
                f"{lane} has been running{place} for {age:.0f} s; half of the others took {usual:.0f} s or less"
            )


def seal(
    part: Part, manifest: Manifest, receipts: list[Receipt], stats: dict[str, Any], recorded: dict[str, Any]
) -> Manifest:
    """Replace the open manifest by the sealed one: from now on later stages accept this one."""
    shards = tuple(r.model_copy(update={"columns": {}}) for r in receipts)  # those are in the receipts' files
    values = {"state": "sealed", "shards": shards, "stats": stats, "recorded": recorded}
    finished = manifest.model_copy(update=values)
    with files.locked(part.lock):
        require_current(part, manifest.fingerprint)
        files.replace_bytes(part.manifest_path, records.to_bytes(finished), part.tmp)
    return finished


def strangers(part: Part, manifest: Manifest) -> list[Path]:
    """Parquet files in a stage's folder that are no shards of its plan: who reads the folder would read them too."""
    planned = {shard.name for shard in manifest.plan}
    return sorted(p for p in part.folder.glob("*.parquet") if p.stem not in planned)


def _set_strangers_aside(part: Part, manifest: Manifest, report: Reporter) -> None:
    if strangers(part, manifest):
        with files.locked(part.lock):
            require_current(part, manifest.fingerprint)
            found = strangers(part, manifest)
            report.warn(f"{part.label}: set aside what is no shard of it: {', '.join(p.name for p in found)}")
            files.set_aside(found, part.orphans)


def _existing(part: Part, shard: Shard, manifest: Manifest, report: Reporter) -> Receipt | None:
    """The receipt of a shard that needs no work; a damaged shard or foreign receipt is set aside."""
    receipt = _holds(part, shard, manifest)
    if receipt is not None:
        return receipt
    if part.receipt_path(shard.name).exists():
        with files.locked(part.lock):
            # Looked at again under the lock: another process may have made it whole since.
            receipt = _holds(part, shard, manifest)
            if receipt is not None:
                return receipt
            if _readable(part, shard) is None:
                report.warn(f"{part.label}: the receipt of shard {shard.name} cannot be read")
                files.set_aside([part.receipt_path(shard.name)], part.orphans)
            else:
                report.warn(f"{part.label}: shard {shard.name} is damaged or missing and is made again")
                # The file goes first: a receipt without its file is damage, a file without receipt could be adopted.
                files.set_aside([part.file(shard.name), part.receipt_path(shard.name)], part.orphans)
    return adopt(part, shard, manifest.fingerprint)


def _readable(part: Part, shard: Shard) -> Receipt | None:
    try:
        return read_receipt(part, shard.name)
    except DataError:
        return None


def _holds(part: Part, shard: Shard, manifest: Manifest) -> Receipt | None:
    """The receipt of a shard that is there and whole; None for any other state."""
    receipt = _readable(part, shard)
    ours = receipt is not None and (receipt.shard, receipt.fingerprint) == (shard.name, manifest.fingerprint)
    return receipt if ours and receipt and intact(part.file(shard.name), receipt) else None


def set_stage_aside(part: Part) -> None:
    """Move a stage's manifest, receipts, shards and kept rows to the orphans, the manifest first: half-removed is not
    sealed."""
    with files.locked(part.lock):
        files.set_aside([part.manifest_path, part.receipts, part.folder, Kept(part, "").folder], part.orphans)
