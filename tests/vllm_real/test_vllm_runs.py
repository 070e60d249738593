"""Whole runs on a real vLLM: rounds with one living process, and a teacher whose server is killed in the middle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("httpx")

from fire_data import http_engine  # noqa: E402
from fire_data.create import init_run  # noqa: E402
from fire_data.http_engine import HttpEngine  # noqa: E402
from fire_data.run import Run, open_run  # noqa: E402
from fire_data.session import Session  # noqa: E402
from fire_data.shards import read_manifest, sealed  # noqa: E402
from fire_data.steps.refresh import refresh  # noqa: E402
from fire_data.steps.rollout import rollout  # noqa: E402
from fire_data.steps.score import score  # noqa: E402
from fire_data.vllm_engine import VllmEngine  # noqa: E402
from fire_data.worlds.world import Sizes, build_world  # noqa: E402

from .test_vllm_server import Server  # noqa: E402


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The demo's world, hardly trained. Heads of 32: vLLM's attention on CPU knows no smaller ones."""
    torch.set_num_threads(1)
    sizes = Sizes(hidden=64, heads=2, intermediate=32, batch=8, teacher_steps=12, student_steps=4)
    return build_world(tmp_path_factory.mktemp("world"), prompts=12, held_out=6, sizes=sizes)


def make(world: Any, folder: Path, python: str, **sections: dict[str, Any]) -> Run:
    rollouts = {"n": 2, "prompts_per_round": 8, "prompts_per_shard": 2, "max_prompt_tokens": 40, "max_new_tokens": 16}
    values: dict[str, Any] = {
        "threads": 1, "student": {"model": str(world.student)}, "teacher": {"model": str(world.teacher)},
        "prompts": {"path": str(world.prompts)}, "rollout": rollouts,
        "weigh": {"rule": "fire"},  # reads entropies
        "train": {"batch_size": 8, "lr": 1e-2, "export_dtype": "float32"},
        "vllm": {"python": python, "cpu_kv_cache_gb": 0.1}, "http": {"deadline": 2.0},
    }  # fmt: skip
    for name, fields in sections.items():
        values[name] = values.get(name, {}) | fields
    return init_run(folder, values)


def column(run: Run, name: str, round: int = 0) -> Any:
    return run.scores(round).select(name).collect()[name].explode().to_numpy()


def test_rounds_on_vllm_use_one_process_for_the_student_and_agree_with_transformers(
    world: Any, vllm_python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, loaded = [], []
    start, load = VllmEngine.__init__, VllmEngine.load
    monkeypatch.setattr(VllmEngine, "__init__", lambda self, *a, **k: started.append(a) or start(self, *a, **k))
    monkeypatch.setattr(VllmEngine, "load", lambda self, folder: loaded.append(folder.name) or load(self, folder))
    run = make(world, tmp_path / "run", vllm_python, rollout={"engine": "vllm"})
    with Session(run) as session:
        refresh(session, 3)
    assert len(started) == 1
    assert loaded == ["round-000", "round-001"], "new weights in the living process, once a round"
    for number in range(3):
        # Scored by transformers with the weights of that round: sampled by the same ones, over the same ids.
        assert sealed(run.part("scores", number)).stats["rollout_drift_max"] < 1e-4
        off = np.abs(column(run, "student_logprob", number) - column(run, "rollout_logprob", number))
        assert off.max() < 1e-4
    moved = [float(np.mean(column(run, "student_entropy", n))) for n in range(3)]
    assert len({round(m, 4) for m in moved}) == 3, "the student has changed"
    again = make(world, tmp_path / "apart", vllm_python, rollout={"engine": "vllm"}, score={"engine": "vllm"})
    with Session(again) as session:
        rollout(session, 0)
        score(session, 0)
    assert run.rollouts(0).collect().equals(again.rollouts(0).collect()), "the same requests, seeds and weights"
    for name in ("student_logprob", "teacher_logprob", "student_entropy", "teacher_entropy", "teacher_max_logprob"):
        assert np.abs(column(run, name) - column(again, name)).max() < 1e-4, name
    assert sealed(again.part("scores", 0)).recorded["entropy_kind"] == {"student": "exact", "teacher": "exact"}


def test_a_teachers_server_that_dies_costs_what_was_in_flight_and_nothing_else(
    world: Any, vllm_python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fire: Callable[..., Any]
) -> None:
    run = make(world, tmp_path / "run", vllm_python)
    with Session(run) as session:
        rollout(session, 0)
        score(session, 0)
    server = Server(vllm_python, world.teacher, tmp_path / "log")
    try:
        server.require()
        remote = ("teacher.url=" + server.url, "teacher.served_name=tiny", "http.concurrency=1", "weigh.entropy=any")
        options = [x for o in remote for x in ("--set", o)]
        asked: list[str] = []
        evaluate, read = HttpEngine.evaluate, http_engine.read_scores
        answers: list[int] = []

        def spy(self: HttpEngine, rows: Any, progress: Any = None) -> Any:
            asked.extend(rows["trajectory_id"].to_pylist())
            return evaluate(self, rows, progress)

        def counting(*arguments: Any) -> Any:
            answers.append(1)
            if len(answers) == 7:
                server.kill()
            return read(*arguments)

        monkeypatch.setattr(HttpEngine, "evaluate", spy)
        monkeypatch.setattr(http_engine, "read_scores", counting)
        cut = fire("score", run.root, "--redo", *options)
        assert cut.code == 1
        assert server.url in cut.err
        manifest = read_manifest(run.part("scores", 0))
        assert manifest is not None
        assert not manifest.sealed
        first, asked[:] = list(asked), []
        answered = len(answers)
        server.start()
        server.wait()
        done = fire("score", run.root, *options)
        assert done.code == 0, done.err
    finally:
        server.kill()
    every = run.rollouts(0).collect()["trajectory_id"].to_list()
    assert sorted(set(first) | set(asked)) == sorted(every), "nothing is lost"
    assert len(asked) == len(every) - 7, "what was answered is not asked for again"
    assert len(answers) - answered == len(asked)
    remote_run, local = open_run(run.root, remote), make(world, tmp_path / "local", vllm_python)
    with Session(local) as session:
        rollout(session, 0)
        score(session, 0)
    for name in ("teacher_logprob", "teacher_max_logprob", "student_logprob"):
        assert np.abs(column(remote_run, name) - column(local, name)).max() < 1e-4, name
    exact, bound, mass = (
        column(r, c)
        for r, c in ((local, "teacher_entropy"), (remote_run, "teacher_entropy"), (remote_run, "teacher_entropy_mass"))
    )
    assert (bound <= exact + 1e-4).all()
    assert (mass < 1).any()
    kinds = sealed(remote_run.part("scores", 0)).recorded["entropy_kind"]
    assert kinds == {"student": "exact", "teacher": "topk-lower-bound"}
    refused = fire("weigh", run.root, *[x for o in remote[:2] for x in ("--set", o)])
    assert refused.code == 2
    assert "weigh.entropy=any" in refused.err
    assert fire("weigh", run.root, *options).code == 0
