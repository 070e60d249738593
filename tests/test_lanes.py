"""Lanes: several shards of a stage at the same time change neither its bytes nor what is kept when something fails."""

from __future__ import annotations

import contextlib
import itertools
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest

from fire_data import files, stages
from fire_data.run import Run, open_run
from fire_data.schemas.errors import EngineError
from fire_data.schemas.manifest import Receipt, Shard, digest
from fire_data.schemas.tables import conform
from fire_data.session import Session
from fire_data.shards import Part, read_manifest, read_receipt, write_shard
from fire_data.stages import LANE, Lane, Silent, Stage, each_shard, open_stage, plan_shards, run_stage
from fire_data.steps.columns import add_columns
from fire_data.steps.rollout import rollout
from fire_data.steps.score import score
from fire_data.steps.weigh import ScoredRound, weigh

from .conftest import shard_files

WAIT = 30  # seconds after which something that never comes is given up
Make = Callable[[Shard], pa.Table]
MINE = """
from dataclasses import dataclass
import polars as pl
from fire_data.rules import Parts, Rule

@dataclass(frozen=True)
class Mine(Rule):
    def parts(self):
        return Parts(weight=1 + pl.col("student_entropy"))
"""


def rollouts(shard: Shard, salt: str = "") -> pa.Table:
    """One row per unit of a shard."""
    units = list(range(shard.start, shard.stop))
    data = {
        "trajectory_id": [f"{salt}{i:032x}" for i in units],
        "prompt_id": [f"prompt {i}" for i in units],
        "round": [0] * len(units),
        "sample": [0] * len(units),
        "messages": [[{"role": "user", "content": f"say {i}"}] for i in units],
        "prompt_ids": [[1, 2, 3] for _ in units],
        "response": ["text" for _ in units],
        "response_ids": [[i % 7, 1] for i in units],
        "finish_reason": ["stop" for _ in units],
        "rollout_logprob": [[-0.25 * i, -1.0] for i in units],
    }
    return conform(pa.table(data), "rollouts", "test")


def stage(root: Path, shards: int = 6) -> Stage:
    return Stage(Part(root, "rollouts", 0), {"seed": 0}, plan_shards(2 * shards, 2))


def made(part: Part) -> list[str]:
    """Names of the shards that have a receipt."""
    return sorted(p.stem for p in part.receipts.glob("*.json"))


class Listener(Silent):
    """A Reporter that remembers, with the thread in which it was told."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.warnings: list[str] = []
        self.threads: set[threading.Thread] = set()

    def advance(self, count: int, tokens: int = 0) -> None:
        self.threads.add(threading.current_thread())
        self.rows.append(count)

    def warn(self, text: str) -> None:
        self.threads.add(threading.current_thread())
        self.warnings.append(text)


def test_one_lane_is_the_calling_thread(tmp_path: Path) -> None:
    seen = set()

    def make(shard: Shard) -> pa.Table:
        seen.add((threading.current_thread(), threading.active_count()))
        return rollouts(shard)

    before = threading.active_count()
    run_stage(stage(tmp_path), make)
    assert seen == {(threading.current_thread(), before)}


def test_as_many_shards_as_lanes_are_made_at_once_and_no_more() -> None:
    barrier, lock = threading.Barrier(3), threading.Lock()
    busy, most = 0, 0

    def work(shard: Shard) -> str:
        nonlocal busy, most
        with lock:
            busy += 1
            most = max(most, busy)
        barrier.wait(WAIT)  # breaks unless three are here at the same time
        with lock:
            busy -= 1
        barrier.wait(WAIT)
        return shard.name

    shards = plan_shards(12, 1)
    assert each_shard(shards, work, lanes=3) == [s.name for s in shards]
    assert most == 3


def test_shards_start_in_the_order_of_the_plan() -> None:
    shards = plan_shards(8, 1)
    gates = {s.name: threading.Event() for s in shards}
    started: list[str] = []

    def work(shard: Shard) -> None:
        started.append(shard.name)
        if shard.name == "00000":  # one lane is held by the first shard, the other makes all that follow
            assert gates["00007"].wait(WAIT)
        gates[shard.name].set()

    each_shard(shards, work, lanes=2)
    assert sorted(started[:2]) == ["00000", "00001"]
    assert [n for n in started if n != "00000"] == [s.name for s in shards[1:]]


@pytest.mark.parametrize("lanes", [2, 3, 10])
def test_bytes_and_manifest_do_not_depend_on_lanes(tmp_path: Path, lanes: int) -> None:
    alone = run_stage(stage(tmp_path / "alone"), rollouts)
    ended = {s.name: threading.Event() for s in alone.plan}

    def backwards(shard: Shard) -> pa.Table:
        """Of the shards made together the last one ends first."""
        follower = f"{int(shard.name) + 1:05d}"
        if (int(shard.name) + 1) % lanes and follower in ended:
            assert ended[follower].wait(WAIT)
        ended[shard.name].set()
        return rollouts(shard)

    report = Listener()
    together = run_stage(stage(tmp_path / "together"), backwards, report=report, lanes=lanes)
    assert [(r.shard, r.sha256) for r in together.shards] == [(r.shard, r.sha256) for r in alone.shards]
    left, right = (shard_files(Part(tmp_path / name, "rollouts", 0)) for name in ("alone", "together"))
    assert [p.read_bytes() for p in left] == [p.read_bytes() for p in right]
    assert sum(report.rows) == 12
    assert report.threads == {threading.current_thread()}


def test_the_first_error_keeps_what_is_running_and_starts_nothing_more(tmp_path: Path) -> None:
    failing: list[threading.Thread] = []
    failed, tried = threading.Event(), Counter[str]()

    def make(shard: Shard) -> pa.Table:
        tried[shard.name] += 1
        if shard.name == "00001":
            failing.append(threading.current_thread())
            failed.set()
            raise EngineError("no more", where="00001", fix="again")
        if shard.name == "00000":
            assert failed.wait(WAIT)
            failing[0].join(WAIT)  # the error is known before this shard ends
        return rollouts(shard)

    work = stage(tmp_path)
    with pytest.raises(EngineError) as caught:
        run_stage(work, make, lanes=2)
    assert (caught.value.what, caught.value.where, caught.value.fix) == ("no more", "00001", "again")
    assert made(work.part) == ["00000"]
    assert tried == {"00000": 1, "00001": 1}

    def again(shard: Shard) -> pa.Table:
        tried[shard.name] += 1
        return rollouts(shard)

    manifest = run_stage(work, again, lanes=2)
    assert tried == {"00000": 1, "00001": 2, "00002": 1, "00003": 1, "00004": 1, "00005": 1}
    alone = run_stage(stage(tmp_path / "alone"), rollouts)
    assert [r.sha256 for r in manifest.shards] == [r.sha256 for r in alone.shards]


def test_no_shard_is_made_twice_whatever_the_lanes(tmp_path: Path) -> None:
    tried, work = Counter[str](), stage(tmp_path, shards=40)

    def make(shard: Shard) -> pa.Table:
        tried[shard.name] += 1
        return rollouts(shard)

    manifest = run_stage(work, make, lanes=8)
    assert tried == {s.name: 1 for s in manifest.plan}
    assert len(made(work.part)) == 40
    assert [p for p in work.part.tmp.iterdir() if p.suffix != ".lock"] == []


def test_before_is_told_once_what_is_missing(tmp_path: Path) -> None:
    work, told = stage(tmp_path), list[list[str]]()

    def before(missing: list[Shard]) -> None:
        assert threading.current_thread() is threading.main_thread()
        told.append([s.name for s in missing])

    run_stage(work, rollouts, lanes=2, before=before)
    assert told == [["00000", "00001", "00002", "00003", "00004", "00005"]]
    run_stage(work, rollouts, lanes=2, before=before)
    assert len(told) == 1, "nothing is missing from a finished stage"
    work.part.file("00003").unlink()
    work.part.file("00001").unlink()
    run_stage(work, rollouts, before=before)
    assert told[1:] == [["00001", "00003"]]


def test_before_is_not_called_where_only_the_seal_is_missing(tmp_path: Path) -> None:
    work, told = stage(tmp_path), list[list[Shard]]()

    def finish(_: list[Receipt]) -> dict[str, object]:
        raise EngineError("not now")

    with pytest.raises(EngineError):
        run_stage(work, rollouts, finish)
    assert run_stage(work, rollouts, before=told.append).sealed
    assert told == []


def test_an_interrupt_is_raised_while_shards_still_run() -> None:
    release, running = threading.Event(), threading.Barrier(2)
    main = threading.main_thread().ident
    assert main is not None

    def work(shard: Shard) -> None:
        running.wait(WAIT)
        if shard.name == "00001":
            signal.pthread_kill(main, signal.SIGINT)
        assert release.wait(WAIT)

    with pytest.raises(KeyboardInterrupt):
        each_shard(plan_shards(4, 1), work, lanes=2)
    assert not release.is_set()
    release.set()


def test_an_interrupted_process_ends_though_shards_still_run() -> None:
    script = (
        "import os, signal, threading\n"
        "from fire_data.stages import each_shard, plan_shards\n"
        "running = threading.Barrier(2)\n"
        "def work(shard):\n"
        "    if running.wait(30) == 0: os.kill(os.getpid(), signal.SIGINT)\n"
        "    threading.Event().wait()\n"
        "try: each_shard(plan_shards(4, 1), work, lanes=2)\n"
        "except KeyboardInterrupt: raise SystemExit(130)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=WAIT, check=False)
    assert (done.returncode, done.stderr) == (130, "")


def test_a_shard_that_takes_much_longer_is_named_once_while_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "_LOOK_S", 0.001)
    looks, enough = itertools.count(), threading.Event()

    def clock() -> float:
        """Ten seconds pass between two looks."""
        look = next(looks)
        if look == 60:
            enough.set()
        return 10.0 * look

    def work(shard: Shard) -> None:
        if shard.name == "00001":
            lane = LANE.get()
            assert lane is not None
            lane.place = "node 7"
            assert enough.wait(WAIT)

    report = Listener()
    each_shard(plan_shards(6, 1), work, lanes=2, report=report, label="scores round-000", clock=clock)
    assert len(report.warnings) == 1
    assert report.warnings[0].startswith("scores round-000, shard 00001 has been running on node 7 for ")
    assert report.threads == {threading.current_thread()}


@pytest.mark.parametrize(
    ("age", "seconds", "slow"),
    [
        (61.0, [20.0, 20.0, 20.0], True),
        (61.0, [20.0, 20.0], False),  # too few to compare with
        (60.0, [1.0, 1.0, 1.0], True),
        (59.0, [1.0, 1.0, 1.0], False),  # not worth a word yet
        (90.0, [30.0, 30.0, 30.0], False),
        (91.0, [1.0, 30.0, 500.0], True),  # the median, not the mean
    ],
)
def test_slow_is_three_medians_and_a_minute(age: float, seconds: list[float], slow: bool) -> None:
    report, lane = Listener(), Lane(plan_shards(1, 1)[0], "rollouts round-000", started=100.0)
    stages._tell_slow([lane], seconds, set(), 100.0 + age, report)
    assert bool(report.warnings) == slow
    assert all("rollouts round-000, shard 00000" in text for text in report.warnings)


@pytest.mark.parametrize("lanes", [1, 3])
def test_work_knows_its_shard(lanes: int) -> None:
    def work(shard: Shard) -> bool:
        lane = LANE.get()
        return lane is not None and lane.shard is shard and str(lane) == f"scores round-001, shard {shard.name}"

    assert all(each_shard(plan_shards(5, 1), work, lanes=lanes, label="scores round-001"))
    assert LANE.get() is None


def test_a_lock_excludes_threads_of_the_same_process(tmp_path: Path) -> None:
    path, blocked, inside = tmp_path / "lock", threading.Event(), list[str]()

    def second() -> None:
        with files.locked(path, waiting=blocked.set):
            inside.append("second")

    thread = threading.Thread(target=second, daemon=True)
    with files.locked(path):
        thread.start()
        assert blocked.wait(WAIT)
        inside.append("first")
    thread.join(WAIT)
    assert inside == ["first", "second"]


def test_of_two_threads_that_write_a_shard_one_wins_and_both_return_its_receipt(tmp_path: Path) -> None:
    work = stage(tmp_path, shards=1)
    open_stage(work)
    barrier = threading.Barrier(4)

    def write(lane: Shard) -> Receipt:
        table = rollouts(work.plan[0], salt=lane.name)
        barrier.wait(WAIT)
        return write_shard(work.part, work.plan[0], table, digest({"seed": 0}), 0.0)

    receipts = each_shard(plan_shards(4, 1), write, lanes=4)
    assert len({r.sha256 for r in receipts}) == 1
    assert read_receipt(work.part, "00000") == receipts[0]
    assert [p.name for p in work.part.folder.iterdir()] == ["00000.parquet"]
    manifest = read_manifest(work.part)
    assert manifest is not None
    assert not manifest.sealed


@pytest.fixture
def scored(tmp_path: Path, make_fake_run: Callable[..., Run]) -> Run:
    """A run of the fake engine up to its scores: 3 shards."""
    run = make_fake_run(tmp_path / "run")
    rollout(Session(run), 0)
    score(Session(run), 0)
    return run


def company(monkeypatch: pytest.MonkeyPatch, wait: Callable[[], object]) -> list[int]:
    """How many shards were being weighed whenever one was, itself included."""
    inside, found, weighted = [0], [], ScoredRound.weighted

    def watched(work: ScoredRound, shard: str) -> pl.DataFrame:
        inside[0] += 1
        found.append(inside[0])
        wait()
        try:
            return weighted(work, shard)
        finally:
            inside[0] -= 1

    monkeypatch.setattr(ScoredRound, "weighted", watched)
    return found


def test_weighing_computes_two_shards_at_a_time(scored: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    both, first = threading.Barrier(2), itertools.count()
    company(monkeypatch, lambda: both.wait(WAIT) if next(first) < 2 else None)  # a barrier that breaks raises
    assert len(weigh(scored, 0).shards) == 3


@pytest.mark.parametrize("rule", ["mine.py", "ier"])
def test_rules_that_shards_share_or_that_a_user_wrote_see_one_shard_at_a_time(
    scored: Run, monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    if rule == "ier":
        add_columns(Session(scored), 0, "topk")
    (scored.root / "mine.py").write_text(MINE)
    both = threading.Barrier(2)

    def wait() -> None:
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.3)  # nobody comes

    found = company(monkeypatch, wait)
    weigh(open_run(scored.root, (f"weigh.rule={rule}", "weigh.name=one", "train.batch_size=4")), 0)
    assert found == [1, 1, 1]


@pytest.mark.parametrize("rule", ["fire", "fire-released", "tip"])
def test_weights_do_not_depend_on_lanes(scored: Run, monkeypatch: pytest.MonkeyPatch, rule: str) -> None:
    sums = []
    for lanes in (1, 2, 3):
        monkeypatch.setattr("fire_data.steps.weigh._LANES", lanes)
        made = weigh(open_run(scored.root, (f"weigh.rule={rule}", f"weigh.name=by-{lanes}")), 0)
        sums.append(([r.sha256 for r in made.shards], made.stats))
    assert sums[0] == sums[1] == sums[2]
