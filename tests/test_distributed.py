"""Any number of processes trains the same model: curves, resuming on another number, ends that leave nothing behind."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fire_data import distributed, metrics
from fire_data.models import head_of
from fire_data.optim import make_optimizer
from fire_data.run import Run
from fire_data.schemas.errors import DataError
from fire_data.session import Session
from fire_data.shards import sealed
from fire_data.steps.rollout import rollout
from fire_data.steps.score import score
from fire_data.steps.train import train
from fire_data.steps.weigh import weigh
from fire_data.training import ratio_check, train_step
from fire_data.trainstate import load_state, save_state
from tests.tinymodels import VOCABULARY, spoilt, step_batch, tiny_model, train_config

STEPS, HALF = 20, 10
MakeRun = Callable[..., Run]


# Several processes, each a fork of a server that has imported everything but started no thread.


def _member(rank: int, size: int, port: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {name: str(value) for name, value in place.items()} | {"GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    distributed._GRACE_S = 0.1
    with distributed.member("cpu"):
        work(*arguments)


def on(size: int, work: Callable[..., None], *arguments: Any) -> list[int]:
    """Exit codes of `work` on several processes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "transformers.models.qwen3.modeling_qwen3", "torch.distributed.fsdp"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [context.Process(target=_member, args=(r, size, port, work, arguments)) for r in range(size)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    codes = [child.exitcode for child in children]
    for child in children:
        child.kill()
    assert None not in codes, "a process hangs"
    return [int(code or 0) for code in codes]


def steps(
    folder: Path, first: int, last: int, tied: bool, state: Path | None = None, bad: Sequence[int] = (), **settings: Any
) -> None:
    """Train from a state, or from the start; leave the losses, and a state every `HALF` steps, in a folder.

    `bad`: steps whose last row, which one process has, is not finite.
    """
    cfg = train_config(compute_dtype="float64", tokens_per_microbatch=24, **settings)
    model, scorer = tiny_model(dtype=torch.float64, tied=tied), tiny_model(dtype=torch.float64, tied=tied)
    head = head_of(model)
    distributed.shard(model, "cpu")
    optimizer = make_optimizer(model, cfg)
    if state is not None:
        assert load_state(state, model, optimizer)["global_step"] == first
    records = []
    for step in range(first, last):
        batch = step_batch(scorer, rows=1 + step % 9, seed=step, step=step)  # of one row, one process has nothing
        batch = spoilt(batch, row=-1) if step in bad else batch
        if step == 0:
            ratio_check(model, head, batch, cfg, VOCABULARY, 1e-4)
        records.append(train_step(model, head, optimizer, batch, cfg, VOCABULARY, step))
        if (step + 1) % HALF == 0:
            save_state(folder / str(step + 1), model, optimizer, {"global_step": step + 1})
    if distributed.first():
        (folder / f"{first}.json").write_text(json.dumps(records))


def curve(folder: Path, first: int = 0) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = json.loads((folder / f"{first}.json").read_text())
    timed = ("seconds", "tokens_per_second")
    return [{k: v for k, v in r.items() if k not in timed and v is not None} for r in records]


def same(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    assert len(one) == len(other) > 0
    for left, right in zip(one, other, strict=True):
        assert left == pytest.approx(right, rel=1e-6, abs=1e-12)


def whole(state: Path) -> dict[str, torch.Tensor]:
    """The weights of a state, whatever the number of its files, put together by the offsets that stand in them."""
    pieces: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for path in sorted(state.glob("weights*.safetensors")):
        with safe_open(path, "pt") as file:
            places = json.loads((file.metadata() or {}).get("DCP_SHARDING_INFO", "{}"))
            for name in file.keys():  # noqa: SIM118
                start = places[name]["saved_offsets"][0] if places else 0
                pieces.setdefault(name, []).append((start, file.get_tensor(name)))
    return {name: torch.cat([t for _, t in sorted(found, key=lambda p: p[0])]) for name, found in pieces.items()}


def same_weights(one: Path, other: Path) -> None:
    left, right = whole(one), whole(other)
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(("tied", "checkpointing"), [(True, False), (False, True)])
def test_two_processes_train_as_one_and_so_does_changing_their_number(
    tmp_path: Path, tied: bool, checkpointing: bool
) -> None:
    one, two, fewer, more = (tmp_path / name for name in ("one", "two", "fewer", "more"))
    for folder in (one, two, fewer, more):
        folder.mkdir()
    steps(one, 0, STEPS, tied)
    settings = {"gradient_checkpointing": checkpointing}
    assert on(2, _steps_with, two, 0, STEPS, tied, None, settings) == [0, 0]
    steps(fewer, HALF, STEPS, tied, two / str(HALF))
    assert on(2, _steps_with, more, HALF, STEPS, tied, one / str(HALF), settings) == [0, 0]
    same(curve(one), curve(two))
    same(curve(one)[HALF:], curve(fewer, HALF))
    same(curve(one)[HALF:], curve(more, HALF))
    for folder in (two, fewer, more):
        same_weights(one / str(STEPS), folder / str(STEPS))
    kinds = ("exp_avg", "exp_avg_sq", "weights")
    files = {p.name: p.stat().st_size for p in (two / str(STEPS)).glob("*.safetensors")}
    assert set(files) >= {f"{kind}-{place:05d}-of-00002.safetensors" for kind in kinds for place in (1, 2)}
    for kind in kinds:  # each holds half, and no number is in both
        alone = (one / str(STEPS) / f"{kind}.safetensors").stat().st_size
        assert 0.4 * alone < files[f"{kind}-00001-of-00002.safetensors"] < 0.6 * alone + 4096


def _steps_with(folder: Path, first: int, last: int, tied: bool, state: Path | None, settings: dict[str, Any]) -> None:
    steps(folder, first, last, tied, state, **settings)


def _steps_of(run: Run) -> list[dict[str, Any]]:
    timed = ("seconds", "tokens_per_second")
    return [{k: v for k, v in r.items() if k not in timed} for r in metrics.read(run.root / "metrics.jsonl")]


# What goes wrong.


def test_two_processes_skip_the_steps_that_are_not_finite_on_one_of_them(tmp_path: Path) -> None:
    one, two, bad = tmp_path / "one", tmp_path / "two", (0, 3, 4)
    for folder in (one, two):
        folder.mkdir()
    steps(one, 0, HALF, True, bad=bad)
    assert on(2, _steps_with, two, 0, HALF, True, None, {"bad": bad}) == [0, 0]
    assert [r["skipped"] for r in curve(two)] == [step in bad for step in range(HALF)]
    same(curve(one), curve(two))
    same_weights(one / str(HALF), two / str(HALF))


def _fail(last: int) -> None:
    if distributed.rank() == last:
        raise DataError("this one has bad rows", fix="none")
    at_once = distributed._lost
    distributed._lost = lambda error: time.sleep(0.5) or at_once(error)  # the other one is slow to ask what was said
    distributed.wait()


@pytest.mark.parametrize("last", [0, 1])
def test_an_error_on_one_process_ends_the_others_with_its_exit_code(last: int) -> None:
    codes = on(2, _fail, last)
    assert codes[last] == 1  # a traceback, as the command line is not there to turn it into words
    assert codes[1 - last] == 3


def _vanish() -> None:
    if distributed.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    distributed.wait()


def test_a_killed_process_ends_the_others_who_say_so() -> None:
    assert on(2, _vanish) == [1, -9]  # IncompleteError, without the command line


def _leave_a_child(pid: Path) -> None:
    if os.fork() == 0:
        distributed._end_with_the_parent()
        pid.write_text(str(os.getpid()))
        time.sleep(60)
        os._exit(0)
    while not (pid.exists() and pid.read_text()):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere nothing tells them")
def test_a_killed_launcher_takes_its_processes_along(tmp_path: Path) -> None:
    assert on(1, _leave_a_child, tmp_path / "pid") == [-9]
    status = Path(f"/proc/{(tmp_path / 'pid').read_text()}/status")
    until = time.monotonic() + 10
    while status.exists() and "\tZ" not in status.read_text():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_rows_are_dealt_by_their_lengths_alone_and_evenly() -> None:
    lengths = [int(n) for n in np.random.default_rng(0).lognormal(5, 1, 200)]
    for parts in (1, 2, 3, 8):
        held = distributed.shares(lengths, parts)
        assert sorted(row for rows in held for row in rows) == list(range(len(lengths)))
        tokens = [sum(lengths[row] for row in rows) for rows in held]
        assert max(tokens) - min(tokens) <= max(lengths)
        assert max(tokens) < 1.05 * sum(lengths) / parts
        assert held == distributed.shares(list(lengths), parts)
    assert distributed.shares([], 2) == [[], []]
    assert distributed.shares([5, 5, 5], 1) == [[0, 1, 2]]


# The commands.


def _command(*arguments: object, module: tuple[str, ...] = ("fire_data.cli",)) -> list[str]:
    return [sys.executable, "-m", *module, *map(str, arguments)]


def _environment() -> dict[str, str]:
    given = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return given | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "FIRE_DEBUG": ""}


def _fire(*arguments: object, module: tuple[str, ...] = ("fire_data.cli",)) -> subprocess.CompletedProcess[str]:
    command = _command(*arguments, module=module)
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=_environment())


def _weighed(run: Run) -> Run:
    session = Session(run)
    rollout(session, 0)
    score(session, 0)
    weigh(run, 0)
    return run


def _children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _stopped(root: Path, end: Callable[[int], None]) -> subprocess.CompletedProcess[str]:
    """`fire train --launch 2`, ended by `end(its pid)` when the next state is there."""
    begun = set((root / ".fire" / "train").glob("step-*"))
    child = subprocess.Popen(
        _command("train", root, "--launch", 2), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=_environment(),
    )  # fmt: skip
    until = time.monotonic() + 90
    while set((root / ".fire" / "train").glob("step-*")) <= begun:
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)
    workers = _children(child.pid)
    end(child.pid)
    out, err = child.communicate(timeout=60)
    assert len(workers) >= 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers), "a worker is left"
    return subprocess.CompletedProcess(child.args, child.returncode, out, err)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the workers in /proc")
def test_killed_and_interrupted_runs_on_two_processes_resume_and_end_as_one(make_run: MakeRun, tmp_path: Path) -> None:
    settings = {"compute_dtype": "float64", "epochs": 12, "lr": 1e-4, "save_every": 1, "export_dtype": "float32"}
    alone = _weighed(make_run(tmp_path / "alone", train=settings))
    run = _weighed(make_run(tmp_path / "run", train=settings))
    train(Session(alone), 0)

    killed = _stopped(run.root, lambda pid: os.kill(_children(pid)[-1], signal.SIGKILL))
    assert killed.returncode == 4
    assert "SIGKILL" in killed.stderr
    interrupted = _stopped(run.root, lambda pid: os.kill(pid, signal.SIGINT))
    assert interrupted.returncode == 130
    for ended, said in ((killed, "error:"), (interrupted, "interrupted")):
        assert ended.stderr.count(said) == 1
        assert "Traceback" not in ended.stderr
        assert ended.stdout == ""
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fire_data.cli")
    finished = _fire("train", run.root, "--json", module=torchrun)
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout)["round"] == 0
    assert finished.stderr.count("next:") == 1

    same(_steps_of(alone), _steps_of(run))
    manifests = [sealed(r.part("checkpoints", 0)) for r in (alone, run)]
    assert manifests[0].fingerprint == manifests[1].fingerprint
    assert [m.recorded["processes"] for m in manifests] == [1, 2]
    exported = [load_file(r.root / "checkpoints" / "round-000" / "model.safetensors") for r in (alone, run)]
    for name, tensor in exported[0].items():
        torch.testing.assert_close(tensor, exported[1][name], rtol=1e-6, atol=1e-9)
    (state,) = (run.root / ".fire" / "train").glob("step-*")
    assert len(list(state.glob("weights-*-of-00002.safetensors"))) == 2


def test_an_error_of_all_processes_is_told_once_and_a_round_is_trained_on_two(
    make_run: MakeRun, tmp_path: Path, fire: Callable[..., Any], capfd: pytest.CaptureFixture[str]
) -> None:
    assert fire("train", tmp_path / "nowhere", "--launch", 2).code == 2
    run = _weighed(make_run(tmp_path / "run", eval={"prompts": None}))
    assert fire("train", run.root, "--launch", 2, "--set", "train.ratio_tolerance=1e-30").code == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("error:") == 1
    assert "the tolerance is 1e-30" in err
    assert "Traceback" not in err
    done = fire("run", run.root, "--rounds", 1, "--launch", 2, "--json")
    assert [row["round"] for row in done.json] == ["start", 0]
    assert sealed(run.part("checkpoints", 0)).recorded["processes"] == 2
    assert capfd.readouterr().out == ""
