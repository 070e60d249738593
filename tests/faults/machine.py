"""A run directory as a state machine: any order of commands, crashes and damage, and what must hold after each.

Hypothesis chooses the actions. Runs that nobody disturbed, one for each configuration, are the truth: a receipt names
the fingerprint of what it belongs to, and by that the very bytes that have to be behind it.
"""

from __future__ import annotations

import contextlib
import errno
import random
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import hypothesis
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from fire_data.overview import check, parts
from fire_data.run import Run, open_run
from fire_data.schemas.errors import DamagedError, DataError, FingerprintError, FireError, IncompleteError
from fire_data.shards import Part, is_sealed, read_manifest, read_receipt, read_shard, sealed
from fire_data.stages import Silent
from fire_data.steps import weigh as weigh_step
from tests.faults.calls import Killed, failing
from tests.faults.damage import ACTS
from tests.faults.world import STAGES, TABLES, copy, do, small_run, visible
from tests.hub_server import Caller, Hub

_WAYS = [(t, p) for t in ("1.0", "0.7") for p in ("20", "40")]
CONFIGURATIONS = [(f"rollout.temperature={t}", f"weigh.params={{percentile: {p}}}") for t, p in _WAYS]
_NEXT = "next"  # the first stage that is not sealed: else most commands would only say what is missing
_STAGE, _TABLE = st.sampled_from((_NEXT, _NEXT, _NEXT, *STAGES)), st.sampled_from((_NEXT, *TABLES))
_CONTINUES = 4  # commands until a damaged run is whole: each stage may have to be mended before the next


@dataclass
class Truth:
    """What undisturbed runs hold: files by configuration, tables and shards' bytes by fingerprint."""

    folder: Path
    world: Any
    files: list[dict[str, bytes]] = field(default_factory=list)
    shards: dict[str, dict[str, bytes]] = field(default_factory=dict)
    tables: dict[tuple[str, str], pa.Table] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.empty = small_run(self.folder / "empty", self.world, rollout=_ROLLOUT).root
        for number, overrides in enumerate(CONFIGURATIONS):
            root = copy(self.empty, self.folder / f"whole-{number}")
            for stage in STAGES:
                do(stage, open_run(root, overrides))
            self.files.append(visible(root))
            for part in parts(open_run(root)):
                self._learn(part)

    def _learn(self, part: Part) -> None:
        manifest, tables = sealed(part), part.stage != "checkpoints"
        files = {r.shard: part.file(r.shard) if tables else part.folder / r.shard for r in manifest.shards}
        self.shards[manifest.fingerprint] = {shard: path.read_bytes() for shard, path in files.items()}
        for receipt in manifest.shards if tables else ():
            self.tables[manifest.fingerprint, receipt.shard] = read_shard(part, receipt)


_ROLLOUT = {"prompts_per_round": 4, "max_new_tokens": 4}  # two shards


@dataclass
class Counts:
    """What a machine did and met, over all its runs."""

    actions: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)


def play(
    truth: Truth, counts: Counts, *, examples: int, steps: int, seed: int, hub: Hub | None = None,
    caller: Caller | None = None, shrink: bool = False,
) -> None:  # fmt: skip
    """Let Hypothesis play so many runs of at most so many actions each; fails with one that goes wrong, the shortest
    that it finds if told to `shrink`, which takes its time."""
    machine = type("Run", (RunDirectory,), {"truth": truth, "counts": counts, "hub": hub, "caller": caller})
    options = settings(
        max_examples=examples, stateful_step_count=steps, deadline=None, database=None, print_blob=False,
        suppress_health_check=list(HealthCheck), report_multiple_bugs=False,
        phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weigh_step, "_LANES", 1)  # of two threads, which one makes the n-th call is not the same twice
        run_state_machine_as_test(hypothesis.seed(seed)(machine), settings=options)


class Interrupted(Silent):
    """Ctrl-C when a stage has begun, or after so many of its shards or steps."""

    def __init__(self, after: int) -> None:
        self.left = after

    def start(self, what: str, total: int, unit: str, done: int = 0) -> None:
        self._count()

    def advance(self, count: int, tokens: int = 0) -> None:
        self._count()

    def _count(self) -> None:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1


class Company(Silent):
    """Somebody else does the same stage from beginning to end, when this one has looked what there is to do."""

    def __init__(self, root: Path, stage: str, overrides: tuple[str, ...]) -> None:
        self.left, self.other = 1, (stage, root, overrides)

    def start(self, what: str, total: int, unit: str, done: int = 0) -> None:
        if self.left:
            self.left = 0
            stage, root, overrides = self.other
            do(stage, open_run(root, overrides))


class RunDirectory(RuleBasedStateMachine):
    """Class attributes are set by who runs it."""

    truth: ClassVar[Truth]
    counts: ClassVar[Counts]
    hub: ClassVar[Hub | None] = None
    caller: ClassVar[Caller | None] = None

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir=self.truth.folder))
        self.root = self.folder / "run"
        self.chosen, self.pushed = 0, False
        if self.hub is not None:
            self.hub.fresh()

    @initialize(start=st.sampled_from(("empty", "whole-0")))
    def begin(self, start: str) -> None:
        copy(self.truth.folder / start, self.root)

    # Commands

    @property
    def run(self) -> Run:
        return open_run(self.root, CONFIGURATIONS[self.chosen])

    def command(self, stage: str, report: Silent | None = None, *, redo: bool = False) -> str:
        """A stage's command: it works, or says in words why not. Returns "done" or the kind of error."""
        try:
            manifest = do(stage, self.run, report, redo=redo)
        except FireError as error:
            assert error.what
            assert error.fix or isinstance(error, DamagedError), error
            self.counts.outcomes[type(error).__name__] += 1
            return type(error).__name__
        assert manifest is not None
        assert manifest.sealed
        files = self.truth.shards[manifest.fingerprint]
        assert {r.shard: r.bytes for r in manifest.shards} == {shard: len(data) for shard, data in files.items()}
        self.counts.outcomes["done"] += 1
        return "done"

    def named(self, stage: str) -> str:
        """The stage that is meant."""
        with contextlib.suppress(DamagedError):
            places = {**TABLES, "train": "checkpoints"}
            left = [s for s in STAGES if stage == _NEXT and not is_sealed(self.run.part(places[s], 0))]
            return left[0] if left else stage if stage != _NEXT else STAGES[0]
        return STAGES[0] if stage == _NEXT else stage

    @rule(stage=_STAGE)
    def resume_and_seal(self, stage: str) -> None:
        self.counts.actions["resume and seal"] += 1
        self.command(self.named(stage))

    @rule(stage=_STAGE, after=st.integers(0, 2))
    def plan_or_finish_shards(self, stage: str, after: int) -> None:
        self.counts.actions["plan" if after == 0 else "finish shard"] += 1
        with contextlib.suppress(KeyboardInterrupt):
            self.command(self.named(stage), Interrupted(after))

    @rule(stage=_STAGE, at=st.integers(0, 120))
    def crash(self, stage: str, at: int) -> None:
        self.counts.actions["crash"] += 1
        stage = self.named(stage)
        with contextlib.suppress(Killed), failing(at, Killed, for_good=True):
            self.command(stage)

    @rule(stage=_STAGE, at=st.integers(0, 120), number=st.sampled_from([errno.ENOSPC, errno.EIO, errno.EACCES]))
    def disk_failure(self, stage: str, at: int, number: int) -> None:
        self.counts.actions["disk failure"] += 1
        stage = self.named(stage)
        with failing(at, number):
            self.command(stage)

    @rule(stage=_TABLE)
    def duplicate_worker(self, stage: str) -> None:
        self.counts.actions["duplicate worker"] += 1
        stage = self.named(stage)
        self.command(stage, Company(self.root, stage, CONFIGURATIONS[self.chosen]))

    @rule(stage=_STAGE)
    def do_it_anew(self, stage: str) -> None:
        self.counts.actions["redo"] += 1
        self.command(self.named(stage), redo=True)

    @rule(chosen=st.sampled_from(range(len(CONFIGURATIONS))))
    def change_configuration(self, chosen: int) -> None:
        self.counts.actions["change configuration"] += 1
        self.chosen = chosen

    # Damage

    @rule(stage=_TABLE, kind=st.sampled_from(sorted(ACTS)), seed=st.integers(0, 9999))
    def damage(self, stage: str, kind: str, seed: int) -> None:
        part = self.run.part(TABLES.get(self.named(stage), "scores"), 0)
        with contextlib.suppress(DamagedError):
            manifest = read_manifest(part)
            if manifest is None or not manifest.sealed:
                return
            shards = [s.name for s in manifest.plan]
            if all(d["stage"] != part.label for d in check(self.run)):
                self.counts.actions[kind] += 1
                ACTS[kind](part, *random.Random(seed).sample(shards, 2), random.Random(seed))

    # Sharing

    @precondition(lambda self: self.caller is not None and (self.root / "rollouts").exists())
    @rule()
    def push(self) -> None:
        assert self.caller is not None
        self.counts.actions["push"] += 1
        answer = self.caller.fire("push", self.root, "me/data")
        assert answer["code"] in (0, 2, 3), answer
        self.pushed |= answer["code"] == 0

    @precondition(lambda self: self.pushed)
    @rule()
    def pull(self) -> None:
        assert self.caller is not None
        self.counts.actions["pull"] += 1
        pulled = self.folder / "pulled"
        answer = self.caller.fire("pull", "me/data", pulled)
        assert answer["code"] == 0, answer
        assert check(open_run(pulled)) == []
        self._holds(open_run(pulled))
        shutil.rmtree(pulled, ignore_errors=True)

    # What holds after each

    @invariant()
    def what_is_visible_is_true(self) -> None:
        self._holds(self.run)

    def _holds(self, run: Run) -> None:
        """Every shard a reader gets is the true one; what is not true is refused, and named by `check`."""
        named = {(d["stage"], d["shard"]) for d in check(run)}
        for table in TABLES.values():
            part = run.part(table, 0, "fire" if table == "weights" else None)
            try:
                manifest = read_manifest(part)
            except DamagedError:
                assert (part.label, "manifest") in named
                continue
            if manifest is not None:
                for shard in manifest.plan:
                    self._shard_holds(part, shard.name, named)
        for read in (run.rollouts, run.scores, run.weights):
            with contextlib.suppress(DataError, IncompleteError, FingerprintError):
                read(round=0).collect()

    def _shard_holds(self, part: Part, shard: str, named: set[tuple[str, str]]) -> None:
        try:
            receipt = read_receipt(part, shard)
            if receipt is None:
                return
            table = read_shard(part, receipt)
            truth = self.truth.tables[receipt.fingerprint, shard]
            assert table.equals(truth), f"{part.label}, shard {shard} is another one than it was"
            few = truth.column_names[::4]
            assert read_shard(part, receipt, few).equals(truth.select(few))
        except DamagedError:
            assert (part.label, shard) in named

    def teardown(self) -> None:
        """Whatever happened, the commands end in the same bytes as if nothing had."""
        try:
            for _ in range(_CONTINUES):
                done = [self._finished(stage) for stage in STAGES]
                if all(done):
                    break
            assert all(done), "the commands do not come to an end"
            assert visible(self.root) == self.truth.files[self.chosen]
            assert check(self.run) == []
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _finished(self, stage: str) -> bool:
        """The command, and what its message says to do where other settings, or a lost manifest, are in the way."""
        outcome = self.command(stage)
        if outcome in ("FingerprintError", "DamagedError"):
            outcome = self.command(stage, redo=True)
        return outcome == "done"
