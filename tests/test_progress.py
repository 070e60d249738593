"""How far a stage is reaches people in time and in few words: bars, logs, `fire status` and its live view."""

from __future__ import annotations

import functools
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fire_data import metrics
from fire_data.cli import watch
from fire_data.cli.progress import Lines, Task, clock_text, size_text
from fire_data.cli.terminal import Terminal
from fire_data.run import Run, open_run
from fire_data.schemas.manifest import Receipt
from fire_data.session import Session
from fire_data.shards import read_manifest, sealed
from fire_data.stages import Silent
from fire_data.standing import standings
from fire_data.steps.rollout import rollout
from fire_data.steps.score import score
from fire_data.steps.train import train
from fire_data.steps.weigh import weigh
from tests.conftest import Answer

MakeRun = Callable[..., Run]
Fire = Callable[..., Answer]


class Clock:
    """Time that passes only when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminals(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_what_was_there_before_makes_nothing_look_fast() -> None:
    task = Task("rollouts", total=40, unit="prompts", done=20, began=100.0)
    assert (task.rate, task.left(105.0)) == (None, None)
    task.advance(5, 1000, 110.0)
    assert task.rate == 100.0
    assert task.left(110.0) == 30.0, "15 prompts at 2 seconds each"
    assert task.left(114.0) == 26.0, "it counts down between two counts"
    assert task.left(500.0) == 0.0
    assert (task.count, task.pace(110.0)) == ("25/40 prompts", ["100 tok/s", "0:00:30 left"])
    task.advance(15, 0, 120.0)
    assert (task.ended, task.left(120.0)) == (True, None)
    assert Task("push", 12_000_000, "bytes", 3_456_000, 0.0).count == "3.5 MB/12 MB"


def test_times_and_sizes_in_words() -> None:
    assert [clock_text(s) for s in (0, 59.6, 3599, 3661, 360000)] == [
        "0:00:00",
        "0:01:00",
        "0:59:59",
        "1:01:01",
        "100:00:00",
    ]
    assert [size_text(n) for n in (0, 999, 1000, 9_949, 9_951, 999_600, 2.5e9, 7e12)] == [
        "0 B", "999 B", "1.0 kB", "9.9 kB", "10 kB", "1.0 MB", "2.5 GB", "7000 GB",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("count", "seconds", "most"), [(10_000, 36_000, 130), (10_000, 60, 4), (20, 7_200, 22), (3, 1, 1)]
)
def test_a_log_gets_few_lines_however_many_shards(count: int, seconds: float, most: int) -> None:
    told: list[str] = []
    lines, task = Lines(told.append), Task("scores round-000", count, "prompts", 0, 0.0)
    lines.started(task)
    for i in range(count):
        task.advance(1, 50, seconds * (i + 1) / count)
        lines.advanced(task)
    assert told[0] == f"scores round-000: {count:,} prompts"
    assert len(told) <= most
    if seconds > 2:
        took = clock_text(seconds)
        rate = f"{50 * count / seconds:,.0f}"
        assert (
            told[-1]
            == f"scores round-000: {count:,}/{count:,} prompts, {50 * count:,} tokens, {rate} tok/s, {took} in all"
        )
    if seconds > 300:
        assert len(told) >= seconds / 3600 + 2, "but it shows signs of life"
        assert all("tok/s" in line and line.endswith(" left") for line in told[1:-1])


def test_lines_of_a_log_go_to_stderr_alone(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Terminal(clock) as terminal:
        terminal.advance(1)  # before anything was started
        terminal.busy("loading student")
        terminal.start("scores \x1b[2J", 4, "prompts", 1)
        clock.now += 31
        terminal.advance(1, 620)
        terminal.busy("loading teacher")
        clock.now += 31
        terminal.advance(2, 620)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "loading student",
        r"scores \x1b[2J: 1/4 prompts",
        r"scores \x1b[2J: 2/4 prompts, 20 tok/s, 0:01:02 left",
        "loading teacher",
        r"scores \x1b[2J: 4/4 prompts, 1,240 tokens, 20 tok/s, 0:01:02 in all",
    ]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What is written to stderr, of some width, while a stage goes on and under some environment variables."""

    def draw(terminal: bool = True, width: int = 100, **variables: str) -> str:
        stream = Terminals() if terminal else io.StringIO()
        for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in {"TERM": "xterm-256color", "COLUMNS": str(width), **variables}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "stderr", stream)
        clock = Clock()
        with Terminal(clock) as shown:
            shown.start("scores round-000", 40, "prompts", 20)
            clock.now += 10
            shown.advance(5, 12_340)
            shown.warn("look out")
            if shown.bars is not None:
                shown.bars.refresh()
        return stream.getvalue()

    return draw


def test_a_terminal_gets_a_bar_with_tokens_per_second_and_time_left(drawn: Callable[..., str]) -> None:
    text = drawn()
    assert "25/40 prompts 1,234 tok/s 0:00:30 left" in text
    assert "━" in text
    assert "\x1b[33m" in text, "a warning is yellow"


def test_a_model_loaded_in_the_middle_of_a_stage_is_seen_and_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream := Terminals())
    monkeypatch.setenv("TERM", "xterm")
    with Terminal(Clock()) as shown:
        shown.start("scores round-000", 4, "prompts")
        shown.busy("loading teacher")
        assert shown.bars is not None
        shown.bars.refresh()
        assert "loading teacher" in stream.getvalue()
        shown.advance(3)
        stream.truncate(0)
        shown.bars.refresh()
        assert "3/4 prompts" in stream.getvalue()
        assert "loading teacher" not in stream.getvalue()


def test_a_narrow_terminal_keeps_the_time_left(drawn: Callable[..., str]) -> None:
    text = drawn(width=50)
    assert "25/40 prompts 0:00:30 left" in text
    assert "━" not in text


@pytest.mark.parametrize(
    ("variables", "terminal"),
    [({"TERM": "dumb"}, True), ({"FORCE_COLOR": "1"}, False), ({"TTY_COMPATIBLE": "1"}, False), ({}, False)],
)
def test_what_cannot_be_drawn_over_gets_lines(
    drawn: Callable[..., str], variables: dict[str, str], terminal: bool
) -> None:
    text = drawn(terminal, **variables)
    assert "━" not in text
    assert "\r" not in text
    assert [part for part in ("scores round-000: 20/40 prompts", "warning: look out") if part not in text] == []
    assert ("\x1b[" in text) == ("FORCE_COLOR" in variables or "TTY_COMPATIBLE" in variables)


def test_no_color_means_none(drawn: Callable[..., str]) -> None:
    text = drawn(NO_COLOR="1")
    assert "25/40 prompts" in text
    codes = [part.partition("m")[0] for part in text.split("\x1b[")[1:]]
    assert not [c for c in codes if (c[:1] in "34" and c[1:2].isdigit()) or c[:1] == "9"], codes


class Counted(Silent):
    """Remembers what was begun, and the counts and tokens of it."""

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []

    def start(self, what: str, total: int, unit: str, done: int = 0) -> None:
        self.told.append({"what": what, "total": total, "unit": unit, "done": done, "tokens": 0})

    def advance(self, count: int, tokens: int = 0) -> None:
        self.told[-1]["done"] += count
        self.told[-1]["tokens"] += tokens

    def of(self, what: str) -> dict[str, Any]:
        (found,) = [t for t in self.told if t["what"] == what]
        return found


def test_every_stage_tells_its_tokens(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run(tmp_path / "run")
    counted = Counted()
    session = Session(run, counted)
    rollout(session, 0)
    score(session, 0)
    weigh(run, 0, counted)
    train(session, 0)
    tokens = sum(r.tokens for r in sealed(run.part("rollouts", 0)).shards)
    whole = {"total": 6, "unit": "prompts", "done": 6, "tokens": tokens}
    for what in ("rollouts round-000", "scores round-000", "weights/fire round-000"):
        assert counted.of(what) == {"what": what, **whole}
    trained = counted.of("train round-000")
    assert (trained["done"], trained["total"], trained["unit"]) == (3, 3, "steps")
    assert trained["tokens"] == sum(r["tokens"] for r in metrics.read(run.root / "metrics.jsonl"))


def test_what_was_done_before_is_told_as_such(tmp_path: Path, make_fake_run: MakeRun) -> None:
    run = make_fake_run(tmp_path / "run")
    rollout(Session(run), 0)
    part = run.part("rollouts", 0)
    opened(run, "rollouts", 1)
    counted = Counted()
    rollout(Session(run, counted), 0)
    made = sum(r.tokens for r in sealed(part).shards[1:])
    assert counted.of("rollouts round-000")["tokens"] == made
    assert counted.of("rollouts round-000")["done"] == 6


def test_a_sweep_of_one_of_several_teachers_counts_its_own_tokens(
    tmp_path: Path, tiny_world: Any, make_run: MakeRun
) -> None:
    prompts = [json.loads(line) for line in Path(tiny_world.prompts).read_text().splitlines()]
    routed = tmp_path / "routed.jsonl"
    routed.write_text("\n".join(json.dumps(p | {"teacher": "ab"[i % 2]}) for i, p in enumerate(prompts)))
    teachers = {name: {"model": str(tiny_world.teacher)} for name in "ab"}
    run = make_run(tmp_path / "run", teacher=None, teachers=teachers, prompts={"path": str(routed)})
    counted = Counted()
    rollout(Session(run), 0)
    score(Session(run, counted), 0)
    lengths = run.rollouts(0).select("teacher", "response_ids").collect()
    for name in "ab":
        own = sum(len(ids) for teacher, ids in lengths.rows() if teacher == name)
        assert counted.of(f"rollouts round-000: {name}")["tokens"] == own > 0


def opened(run: Run, stage: str, keep: int, round: int = 0) -> list[Receipt]:
    """Make a sealed stage look as it did when only so many shards were there; the receipts that are gone."""
    part = run.part(stage, round)
    manifest = read_manifest(part)
    assert manifest is not None
    part.manifest_path.write_text(manifest.model_copy(update={"state": "open", "shards": ()}).model_dump_json())
    for receipt in manifest.shards[keep:]:
        part.receipt_path(receipt.shard).unlink()
        part.file(receipt.shard).unlink()
    return list(manifest.shards[keep:])


def facts(run: Run, round: int = 0, seen: Any = None) -> dict[str, tuple[str, int, int, int]]:
    return {s.stage: (s.state, s.done, s.total, s.tokens) for s in standings(run, round, seen)}


def test_the_standing_of_a_round_is_counted_from_receipts_and_metrics(
    tmp_path: Path, make_run: MakeRun, fire: Fire
) -> None:
    run = make_run(tmp_path / "run", score={"add": ["base"]})
    nothing = ("-", 0, 0, 0)
    stages = ["rollouts", "scores", "addons/base", "weights/fire", "checkpoints", "evals"]
    assert facts(run) == dict.fromkeys(stages, nothing)
    session = Session(run)
    rollout(session, 0)
    made = sealed(run.part("rollouts", 0)).shards
    opened(run, "rollouts", 2)
    assert facts(run)["rollouts"] == ("open", 2, 3, made[0].tokens + made[1].tokens)
    rollout(session, 0)
    score(session, 0)
    weigh(run, 0)
    tokens = sum(r.tokens for r in made)
    assert facts(run)["weights/fire"] == ("sealed", 3, 3, tokens)
    assert facts(run)["addons/base"][:3] == ("sealed", 3, 3)
    train(session, 0)
    assert facts(run)["checkpoints"] == ("sealed", 3, 3, tokens)
    part = run.part("checkpoints", 0)
    manifest = sealed(part)
    part.manifest_path.write_text(manifest.model_copy(update={"state": "open", "shards": ()}).model_dump_json())
    log = run.root / "metrics.jsonl"
    lines = log.read_text().splitlines()
    log.write_text("\n".join(lines[:2]) + '\n{"torn": ')
    assert facts(run)["checkpoints"] == ("open", 2, 3, sum(json.loads(line)["tokens"] for line in lines[:2]))
    assert " 2/3 " in fire("status", run.root).out


def test_a_receipt_is_read_once_and_again_only_when_it_was_replaced(
    tmp_path: Path, make_fake_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_fake_run(tmp_path / "run")
    rollout(Session(run), 0)
    opened(run, "rollouts", 2)
    seen: Any = {}
    before = facts(run, seen=seen)
    read: list[str] = []
    from fire_data import standing

    real = standing.read_receipt
    monkeypatch.setattr(standing, "read_receipt", lambda part, shard: (read.append(shard), real(part, shard))[1])
    assert facts(run, seen=seen) == before
    assert read == []
    path = run.part("rollouts", 0).receipt_path("00001")
    receipt = json.loads(path.read_text())
    del receipt["checksum"]
    path.unlink()
    path.write_text(json.dumps(receipt | {"tokens": receipt["tokens"] + 7}))
    assert facts(run, seen=seen)["rollouts"][3] == before["rollouts"][3] + 7
    assert read == ["00001"]


def test_what_cannot_be_read_or_vanishes_is_told_and_stops_nobody(tmp_path: Path, make_fake_run: MakeRun) -> None:
    run = make_fake_run(tmp_path / "run", score={"add": ["base"]})
    run = Run(run.root, run.config.model_copy(update={"weigh": run.config.weigh.model_copy(update={"rule": "none"})}))
    rollout(Session(run), 0)
    run.part("rollouts", 0).manifest_path.write_text("{")
    assert facts(run)["rollouts"][0] == "damaged"
    assert "addons/base" in facts(run)
    run.part("rollouts", 0).manifest_path.unlink()
    assert facts(run)["rollouts"][0] == "-"


def test_status_shows_rounds_by_stages_at_a_glance(tmp_path: Path, make_run: MakeRun, fire: Fire) -> None:
    run = make_run(tmp_path / "run")
    begun = fire("status", run.root)
    lines = begun.out.splitlines()
    teacher = run.config.teacher.model if run.config.teacher else ""
    assert lines[0] == f"{run.config.student.model} learns from {teacher}, weights fire: 0 rounds trained"
    assert lines[1].split() == ["round", "rollouts", "scores", "weights", "checkpoints", "tokens", "size"]
    assert lines[2].split() == ["0", "-", "-", "-", "-", "-", "-"]
    assert begun.err.strip() == f"next: fire rollout {run.root}"
    assert fire("run", run.root).code == 0
    fire("weigh", run.root, "--round", 0, "--rule", "uniform")
    fire("rollout", run.root)
    opened(run, "rollouts", 1, round=1)
    table = [line.split() for line in fire("status", run.root).out.splitlines()[1:]]
    tokens = f"{sum(r.tokens for r in sealed(run.part('rollouts', 0)).shards):,}"
    assert table[0] == ["round", "rollouts", "scores", "weights", "checkpoints", "evals", "tokens", "size"]
    assert table[1][:6] == ["start", "-", "-", "-", "-", "sealed"]
    assert table[2][:8] == ["0", "sealed", "sealed", "2", "sealed", "sealed", "sealed", tokens]
    assert table[3][:6] == ["1", "1/3", "-", "-", "-", "-"]
    next(iter(run.part("scores", 0).folder.glob("*.parquet"))).unlink()
    assert "damaged" in fire("status", run.root).out


def script(*acts: Callable[[], object]) -> tuple[Clock, Callable[[float], None]]:
    """A clock, and a way to wait during which, one wait after the other, something happens."""
    clock, todo = Clock(), iter(acts)

    def wait(seconds: float) -> None:
        clock.now += seconds
        next(todo)()

    return clock, wait


def shards_back(run: Run, stage: str, receipts: list[Receipt], files: dict[str, bytes]) -> Iterator[None]:
    part = run.part(stage, 0)
    for receipt in receipts:
        part.file(receipt.shard).write_bytes(files[receipt.shard])
        part.receipt_path(receipt.shard).write_text(receipt.model_dump_json())
        yield


def test_watching_tells_every_change_and_ends_when_the_round_is_trained(
    tmp_path: Path, make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "run"
    elsewhere = make_run(tmp_path / "elsewhere")
    session = Session(elsewhere)
    rollout(session, 0)
    files = {p.stem: p.read_bytes() for p in elsewhere.part("rollouts", 0).folder.glob("*")}
    gone = opened(elsewhere, "rollouts", 1)
    run = Run(root, elsewhere.config)
    back = shards_back(run, "rollouts", gone, files)

    def rest() -> None:
        there = open_run(root)
        rollout(Session(there), 0)
        score(Session(there), 0)
        weigh(there, 0)
        train(Session(there), 0)

    clock, wait = script(
        lambda: None, lambda: elsewhere.root.rename(root), lambda: next(back), lambda: None, lambda: next(back), rest
    )
    watch.watch_status(root, 10.0, None, False, clock=clock, wait=wait)
    out, err = capsys.readouterr()
    lines = out.splitlines()
    counts = [r.tokens for r in sealed(run.part("rollouts", 0)).shards]
    assert lines[:2] == [
        f"waiting for {root / 'fire.yaml'}",
        f"round 0 rollouts: open, 1/3 shards, {counts[0]:,} tokens",
    ]
    rate = counts[1] / 10
    assert lines[2] == (
        f"round 0 rollouts: open, 2/3 shards, {sum(counts[:2]):,} tokens, {rate:,.0f} tok/s, 0:00:10 left"
    )
    assert lines[3].startswith(f"round 0 rollouts: open, 3/3 shards, {sum(counts):,} tokens")
    assert lines[4].startswith("round 0 rollouts: sealed, 3/3 shards")
    assert [line.split(",")[0] for line in lines[5:]] == [
        "round 0 scores: sealed", "round 0 weights/fire: sealed", "round 0 checkpoints: sealed",
    ]  # fmt: skip
    assert err.splitlines()[-1].startswith("next: fire ")


def test_watching_as_json_prints_one_object_per_change(
    tmp_path: Path, make_fake_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_fake_run(tmp_path / "run")
    clock, wait = script(
        lambda: None, lambda: rollout(Session(run), 0), lambda: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        watch.watch_status(run.root, 2.0, 5, True, clock=clock, wait=wait)
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["round"], first["rounds"]) == (0, 5)
    assert [s["state"] for s in first["stages"]] == ["-"] * 5
    assert second["stages"][0] == {
        "stage": "rollouts", "state": "sealed", "done": 3, "total": 3, "unit": "shards",
        "tokens": sum(r.tokens for r in sealed(run.part("rollouts", 0)).shards),
        "tokens_per_second": None, "seconds_left": None,
    }  # fmt: skip


def test_watching_a_terminal_draws_one_table_and_ctrl_c_is_130(
    tmp_path: Path, make_fake_run: MakeRun, fire: Fire, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_fake_run(tmp_path / "run")

    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(watch, "watch_status", functools.partial(watch.watch_status, wait=interrupted))
    monkeypatch.setattr(watch, "can_draw", lambda _: True)
    answer = fire("status", run.root, "--watch")
    assert answer.code == 130
    assert f"{run.root}: round 0, until 1 trained" in answer.out
    assert "checkpoints" in answer.out
