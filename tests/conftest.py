"""What tests share: no network, one thread, a tiny world of real models, runs on it, and a caller of `fire`."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

os.environ["HF_HUB_OFFLINE"] = "1"  # read by the Hub's client once, when it is imported

from fire_data.run import Run
from fire_data.shards import Part

from .hub_server import Caller, Hub, calling, serving

# How long an example takes is not a promise.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

PROMPTS, HELD_OUT = 12, 6
Values = dict[str, Any]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest begins first: with two workers, the other one does the rest meanwhile."""
    items.sort(key=lambda item: "/vllm_real/" not in item.nodeid)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections to anything but this machine fail."""
    real = socket.socket.connect

    def connect(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"tests have no network, not even to {address}")
        real(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _trackers_stay_here(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What trackers keep beside runs goes to a temporary folder; read by them when they are imported."""
    folder = tmp_path_factory.mktemp("trackers")
    os.environ |= {
        "TRACKIO_DIR": str(folder / "trackio"),
        "WANDB_CONFIG_DIR": str(folder),
        "WANDB_CACHE_DIR": str(folder),
    }


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A `World`: teacher and student of hidden size 32, hardly trained, with 12 prompts and 6 held-out ones."""
    pytest.importorskip("torch").set_num_threads(1)
    from fire_data.worlds.world import Sizes, build_world

    sizes = Sizes(hidden=32, heads=2, intermediate=32, batch=8, teacher_steps=12, student_steps=4)
    return build_world(tmp_path_factory.mktemp("world"), prompts=PROMPTS, held_out=HELD_OUT, sizes=sizes)


@pytest.fixture(scope="session")
def make_run(tiny_world: Any) -> Callable[..., Run]:
    """`make_run(folder, section={field: value}, ...)`: a run on the tiny world, made as `fire init` makes it."""
    from fire_data.create import init_run

    def make(folder: Path, **overrides: Any) -> Run:
        values: Values = {
            "threads": 1,
            "student": {"model": str(tiny_world.student)},
            "teacher": {"model": str(tiny_world.teacher)},
            "prompts": {"path": str(tiny_world.prompts)},
            "rollout": {"n": 2, "prompts_per_round": 6, "prompts_per_shard": 2, "max_new_tokens": 16},
            "weigh": {"rule": "fire"},  # drops trajectories and weighs tokens: more to go wrong than with the default
            "train": {"batch_size": 4, "lr": 1e-3, "export_dtype": "float32"},
            "eval": {"prompts": str(tiny_world.held_out), "n": 2},
        }
        for section, fields in overrides.items():
            merge = isinstance(fields, dict) and isinstance(values.get(section), dict)
            values[section] = values[section] | fields if merge else fields
        return init_run(folder, values)

    return make


@pytest.fixture(scope="session")
def make_scored(tmp_path_factory: pytest.TempPathFactory, make_run: Callable[..., Run]) -> Callable[..., Any]:
    """`make_scored(section={field: value}, ...)(folder, field=value, ...)`: runs whose round 0 waits to be trained.

    They are copies of one whose round is weighed; the sections are its settings, the fields those of `train` in a copy.
    """
    from fire_data.run import open_run
    from fire_data.session import Session
    from fire_data.steps.rollout import rollout
    from fire_data.steps.score import score
    from fire_data.steps.weigh import weigh

    def make(**sections: Any) -> Callable[..., Run]:
        start = make_run(tmp_path_factory.mktemp("scored") / "run", **sections)
        session = Session(start)
        rollout(session, 0)
        score(session, 0)
        weigh(start, 0)

        def copied(folder: Path, **train: Any) -> Run:
            shutil.copytree(start.root, folder)
            return open_run(folder, tuple(f"train.{k}={json.dumps(v)}" for k, v in train.items()))

        return copied

    return make


@pytest.fixture
def make_fake_run(make_run: Callable[..., Run]) -> Callable[..., Run]:
    """As `make_run` with the fake engine: needs the tokenizers but no weights."""

    def make(folder: Path, **overrides: Any) -> Run:
        overrides["rollout"] = {"engine": "fake"} | overrides.get("rollout", {})
        overrides["score"] = {"engine": "fake"} | overrides.get("score", {})
        return make_run(folder, **overrides)

    return make


@dataclass(frozen=True)
class Answer:
    """What a command gave."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def fix(self) -> str:
        """The text after `fix:`; fails if there is none."""
        return self.err.partition("fix:")[2].strip().splitlines()[0]


@pytest.fixture
def fire() -> Callable[..., Answer]:
    """Calls the command line in this process; whatever happens, there must be no traceback."""
    from typer.testing import CliRunner

    from fire_data.cli.app import app

    def call(*arguments: object) -> Answer:
        result = CliRunner(env={"COLUMNS": "200", "FIRE_DEBUG": None}).invoke(app, [str(a) for a in arguments])
        answer = Answer(result.exit_code, result.stdout, result.stderr)
        assert "Traceback" not in result.output
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return answer

    return call


@pytest.fixture(scope="module")
def served() -> Iterator[Hub]:
    """A Hub on the loopback interface."""
    with serving() as hub:
        yield hub


@pytest.fixture
def hub(served: Hub) -> Hub:
    """The Hub with nothing on it."""
    served.fresh()
    return served


@pytest.fixture(scope="module")
def caller(served: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Caller]:
    """Calls the command line in a process that knows this Hub alone."""
    with calling(served, tmp_path_factory.mktemp("home") / "home") as process:
        yield process


def shard_files(part: Part) -> list[Path]:
    """The shards of a stage, in order."""
    return sorted(part.folder.glob("*.parquet"))


def edit_record(path: Path, old: str = "", new: str = "", **changes: Any) -> None:
    """Change text or fields of a receipt or manifest, and leave it as earlier versions wrote them: no checksum."""
    text = path.read_text()
    assert old in text
    value = {k: v for k, v in json.loads(text.replace(old, new) if old else text).items() if k != "checksum"}
    path.write_text(json.dumps(value | changes))


def flip(path: Path, offset: int, bit: int = 0) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)
