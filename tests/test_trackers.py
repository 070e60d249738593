"""Trackers hold exactly what metrics.jsonl and the tables have: live, afterwards, after a kill; and nothing secret."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import struct
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from fire_data import metrics, trackers, trainstate
from fire_data.run import Run, open_run
from fire_data.schemas.errors import ConfigError, FireError
from fire_data.session import Session
from fire_data.shards import is_sealed, sealed
from fire_data.stages import Silent
from fire_data.steps.refresh import refresh
from fire_data.steps.track import records, track
from fire_data.steps.train import train
from tests.conftest import Answer

Fire = Callable[..., Answer]
Curves = dict[str, list[tuple[int, float]]]

SECRET = "hf_" + "abcdefghijklmnopqrstuvwxyz"


class Warned(Silent):
    """Keeps the warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


# What each tracker holds, read back from where it wrote


def _tensorboard(run: Run) -> Curves:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = event_accumulator.EventAccumulator(str(run.root / "tensorboard"), {"scalars": 0})
    found.Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def _trackio(run: Run) -> Curves:
    storage = pytest.importorskip("trackio.sqlite_storage").SQLiteStorage
    curves: Curves = {}
    for row in storage.get_logs("fire", f"{run.root.name}-{_id(run)}"):
        for name, value in row.items():
            if name not in ("step", "timestamp"):
                curves.setdefault(name, []).append((row["step"], value))
    return curves


def _wandb(run: Run) -> Curves:
    curves: Curves = {}
    for record in _wandb_records(run):
        if record.WhichOneof("record_type") == "history":
            row = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            assert row["global_step"] == row["_step"]
            for name in row.keys() - {"global_step", "_step", "_runtime", "_timestamp"}:
                curves.setdefault(name, []).append((row["_step"], row[name]))
    return curves


def _wandb_records(run: Run) -> Iterator[Any]:
    """The records of the one offline run: a log of blocks of 32 KiB, as LevelDB writes it, of protobuf messages."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # the process that writes has then ended, as after a command

    (folder,) = (run.root / "wandb").glob(f"offline-run-*-{_id(run)}")
    data = next(folder.glob("*.wandb")).read_bytes()
    place, whole = 7, b""  # after the file's own header
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


READ: dict[str, Callable[[Run], Curves]] = {"tensorboard": _tensorboard, "trackio": _trackio, "wandb": _wandb}


def _id(run: Run) -> str:
    return trackers.id_path(run.root).read_text(encoding="utf-8")


def _written(run: Run, name: str) -> bytes:
    """Every byte a tracker wrote."""
    if name == "trackio":
        root = Path(os.environ["TRACKIO_DIR"])
        return b"".join(p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file())
    if name == "wandb":
        _wandb(run)
    folder = run.root / name
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.suffix != ".log"]
    return b"".join(p.read_bytes() for p in files)


def _expected(run: Run) -> Curves:
    curves: Curves = {}
    for _, step, numbers in records(run):
        for name, value in numbers.items():
            curves.setdefault(name, []).append((step, pytest.approx(value, rel=1e-6)))
    return curves


@pytest.fixture(scope="module")
def scored(make_scored: Callable[..., Any]) -> Callable[..., Run]:
    """`scored(folder, tracker=name, ...)`: a run whose round 0 has weights and waits to be trained in 6 steps."""
    made: Callable[..., Run] = make_scored(train={"batch_size": 2}, eval={"prompts": None})
    return made


@pytest.fixture(params=READ)
def tracker(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(str(request.param))
    return str(request.param)


def test_a_tracker_has_every_round_step_and_evaluation_once(
    make_run: Callable[..., Run], tmp_path: Path, tracker: str
) -> None:
    run = make_run(tmp_path / "run", train={"tracker": tracker})
    report = Warned()
    with Session(run, report) as session:
        refresh(session, 2)
    found = READ[tracker](run)
    assert found == _expected(run)
    lines = metrics.read(run.root / "metrics.jsonl")
    assert [s for s, _ in found["train/loss"]] == [r["global_step"] for r in lines] == list(range(6))
    assert [v for _, v in found["train/learning_rate"]] == pytest.approx([r["lr"] for r in lines])
    assert [v for _, v in found["train/approx_kl"]] == pytest.approx([r["drift_kl"] for r in lines])
    assert [s for s, _ in found["eval/greedy"]] == [0, 3, 6]
    assert [s for s, _ in found["weigh/kept_fraction"]] == [s for s, _ in found["rollout/mean_length"]] == [0, 3]
    assert not [text for text in report.warnings if "tracker" in text]


def test_following_and_sending_afterwards_are_the_same(
    scored: Callable[..., Run], tmp_path: Path, tracker: str, fire: Fire
) -> None:
    live, later = scored(tmp_path / "live", tracker=tracker), scored(tmp_path / "later")
    for run in (live, later):
        with Session(run) as session:
            train(session, 0)
    answer = fire("track", later.root, "--to", tracker, "--json")
    assert answer.code == 0
    assert answer.json["steps"] == 6
    untimed = {"train/seconds", "train/tokens_per_second"}
    found, expected = READ[tracker](later), READ[tracker](live)
    assert found.keys() == expected.keys()
    assert all(found[k] == expected[k] for k in found.keys() - untimed)
    fire("track", later.root, "--to", tracker)  # twice is once
    assert READ[tracker](later) == found


def _train_until_the_second_state(root: str, tracker: str) -> None:
    """Training in a process of its own that ends as if killed, when it is about to save for the second time."""
    saved = []
    original = trainstate.save_state

    def killed(folder: Path, *arguments: Any) -> None:
        saved.append(folder)
        if len(saved) == 2:
            os._exit(9)
        original(folder, *arguments)

    trainstate.save_state = killed
    os.environ.pop("WANDB_SERVICE", None)  # of the process that tests run in
    train(Session(open_run(root, (f"train.tracker={tracker}", "train.save_every=2"))), 0)


def test_a_kill_loses_and_repeats_no_step(scored: Callable[..., Run], tmp_path: Path, tracker: str) -> None:
    run = scored(tmp_path / "run", tracker=tracker, save_every=2)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers.models.qwen3.modeling_qwen3", "fire_data.scoring"])
    child = context.Process(target=_train_until_the_second_state, args=(str(run.root), tracker))
    child.start()
    child.join()
    assert child.exitcode == 9
    assert len(metrics.read(run.root / "metrics.jsonl")) == 4  # two of them are not in a state
    with Session(run) as session:
        train(session, 0)
    found = READ[tracker](run)
    assert found == _expected(run)
    assert [step for step, _ in found["train/loss"]] == list(range(6))


def test_nothing_secret_is_told_and_nobody_is_called(
    make_run: Callable[..., Run], tmp_path: Path, tracker: str, monkeypatch: pytest.MonkeyPatch, tiny_world: Any
) -> None:
    called = []
    connect = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", lambda s, a: (called.append(a), connect(s, a))[1])
    monkeypatch.setenv("MY_KEY", "not-to-be-seen-anywhere")
    run = make_run(
        tmp_path / "run",
        eval={"prompts": None},
        train={"tracker": tracker},
        weigh={"rule": f"weight = 1; keep = length > 0 or '{SECRET}' = ''"},
        teacher={"model": str(tiny_world.teacher), "api_key_env": "MY_KEY"},
    )
    with Session(run) as session:
        refresh(session, 1)
    text = _written(run, tracker)
    for private in (
        SECRET,
        "not-to-be-seen-anywhere",
        "MY_KEY",
        str(tiny_world.student),
        str(tiny_world.student.parent),
    ):
        assert private.encode() not in text, private
    assert sealed(run.part("checkpoints", 0)).fingerprint.encode() in text
    assert b"weight = 1; keep = length > 0" in text
    outside = [a for a in called if isinstance(a, tuple) and a[0] not in ("127.0.0.1", "::1", "localhost")]
    assert outside == []


def test_training_anew_is_a_new_run_for_a_tracker(scored: Callable[..., Run], tmp_path: Path, tracker: str) -> None:
    run = scored(tmp_path / "run", tracker=tracker)
    with Session(run) as session:
        train(session, 0)
    first, before = _id(run), READ[tracker](run)
    anew = open_run(run.root, (f"train.tracker={tracker}", "train.lr=0.01"))
    with Session(anew) as session:
        train(session, 0, redo=True)
    assert _id(run) != first
    assert READ[tracker](anew) == _expected(anew)
    assert READ[tracker](anew)["train/learning_rate"] != before["train/learning_rate"]


@pytest.mark.parametrize("when", ["open", "log", "close"])
def test_a_tracker_that_fails_is_told_of_once_and_stops_nothing(
    scored: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    def fails(*_: object) -> Any:
        raise OSError(28, "No space left on device")

    def opened(*_: object) -> trackers.Tracker:
        nothing: Callable[..., None] = lambda *_: None  # noqa: E731
        return trackers.Tracker(fails if when == "log" else nothing, fails if when == "close" else nothing, "")

    plain = scored(tmp_path / "plain")
    expected = train(Session(plain), 0).digest
    run = scored(tmp_path / "run", tracker="tensorboard")
    monkeypatch.setattr(trackers, "open_tracker", fails if when == "open" else opened)
    report = Warned()
    with Session(run, report) as session:
        assert train(session, 0).digest == expected
    (warning,) = report.warnings
    assert "No space left on device" in warning
    assert f"fire track {run.root} --to tensorboard" in warning
    if when != "close":
        with pytest.raises(FireError, match="nothing was given to tensorboard"):
            track(run, "tensorboard", report)


def test_a_tracker_that_is_not_installed_is_told_before_anything_is_made(
    make_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", train={"tracker": "wandb"})
    version = metadata.version

    def without(name: str) -> str:
        if name == "wandb":
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", without)
    for act in (lambda: refresh(Session(run), 1), lambda: train(Session(run), 0), lambda: track(run, None, Silent())):
        with pytest.raises(ConfigError, match="the tracker wandb is not installed") as caught:
            act()
        assert "pip install 'fire-opd[wandb]'" in str(caught.value.fix)
        assert "train.tracker" in str(caught.value.where)
    assert not is_sealed(run.part("rollouts", 0))
    assert not (run.root / "rollouts").exists()


def test_commands_take_a_tracker_and_it_is_no_setting_of_the_result(
    scored: Callable[..., Run], tmp_path: Path, fire: Fire
) -> None:
    pytest.importorskip("tensorboard")
    run = scored(tmp_path / "run")
    answer = fire("train", run.root, "--tracker", "tensorboard", "--json")
    assert answer.code == 0
    assert answer.json["steps"] == 6  # stdout is data, whatever a tracker says
    assert len(_tensorboard(run)["train/loss"]) == 6
    assert fire("train", run.root, "--round", 0).code == 0  # the same checkpoint without it
    assert fire("train", run.root, "--tracker", "mlflow").code == 2
    answer = fire("track", run.root)
    assert answer.code == 2
    assert answer.fix == f"fire track {run.root} --to {trackers.NAMES[0]}"
