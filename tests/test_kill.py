"""Kill -9 at random moments of every stage: the same command finishes with the same bytes as without the kill."""

from __future__ import annotations

import multiprocessing
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fire_data.run import Run, open_run
from fire_data.session import Session
from fire_data.steps.refresh import refresh
from fire_data.steps.rollout import rollout
from fire_data.steps.score import score
from fire_data.steps.train import train
from fire_data.steps.weigh import weigh

KILLS = 20
STAGES = ("rollout", "score", "weigh", "train")


def work(root: str, stage: str) -> None:
    """One stage, as the command does it, in a process of its own."""
    import torch

    torch.set_num_threads(1)
    run = open_run(root)
    session = Session(run)
    stages: dict[str, Callable[[], object]] = {
        "rollout": lambda: rollout(session, 0),
        "score": lambda: score(session, 0),
        "weigh": lambda: weigh(run, 0),
        "train": lambda: train(session, 0),
        "run": lambda: refresh(session, 2),
    }
    stages[stage]()


def _spawn(root: Path, stage: str) -> multiprocessing.process.BaseProcess:
    """A child forked from a server that has imported everything but started no thread."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch", "transformers.models.qwen3.modeling_qwen3", "fire_data.scoring"])
    child = context.Process(target=work, args=(str(root), stage))
    child.start()
    return child


def _snapshot(root: Path) -> dict[str, bytes]:
    """Every visible table and checkpoint file."""
    visible = (p for p in root.rglob("*") if p.is_file() and ".fire" not in p.relative_to(root).parts)
    keep = (p for p in visible if p.suffix == ".parquet" or "checkpoints" in p.parts)
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(keep)}


def _finish(root: Path, stage: str) -> None:
    child = _spawn(root, stage)
    child.join()
    assert child.exitcode == 0


def _kill_until_finished(start: Path, victim: Path, stage: str, kills: int, longest: float, rng: random.Random) -> int:
    """Copy, then kill the stage's process at random moments, at most `kills` times, until one run ends by itself."""
    shutil.rmtree(victim, ignore_errors=True)
    shutil.copytree(start, victim)
    landed = 0
    while landed < kills:
        child = _spawn(victim, stage)
        child.join(rng.uniform(0.0, longest))
        if child.exitcode is not None:
            assert child.exitcode == 0
            return landed
        child.kill()
        child.join()
        landed += 1
    _finish(victim, stage)
    return landed


@pytest.fixture(scope="module")
def stages_before(tmp_path_factory: pytest.TempPathFactory, make_run: Callable[..., Run]) -> dict[str, Path]:
    """The run directory as it is before each stage, and after the last."""
    root = tmp_path_factory.mktemp("kill") / "run"
    make_run(
        root,
        rollout={"prompts_per_round": 12, "prompts_per_shard": 2, "n": 2, "max_new_tokens": 12},
        train={"batch_size": 4, "epochs": 2, "save_every": 2, "export_dtype": "bfloat16"},
    )
    found = {}
    for stage in (*STAGES, "after"):
        found[stage] = root.with_name(f"before-{stage}")
        shutil.copytree(root, found[stage])
        if stage != "after":
            _finish(root, stage)
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_stage_ends_in_the_same_bytes(stage: str, stages_before: dict[str, Path], tmp_path: Path) -> None:
    following = (*STAGES, "after")[STAGES.index(stage) + 1]
    expected = _snapshot(stages_before[following])
    rng = random.Random(stage)
    landed, longest = 0, 1.0
    while landed < KILLS:
        fresh = _kill_until_finished(
            stages_before[stage], tmp_path / "run", stage, min(4, KILLS - landed), longest, rng
        )
        found = _snapshot(tmp_path / "run")
        assert found.keys() == expected.keys()
        assert [k for k in found if found[k] != expected[k]] == []
        landed += fresh
        longest *= 1.0 if fresh else 0.5
    leftovers = [p for p in (tmp_path / "run" / ".fire" / "tmp").iterdir() if p.suffix != ".lock"]
    assert len(leftovers) <= 1


def test_killed_rounds_end_in_the_same_bytes(stages_before: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(stages_before["rollout"], tmp_path / "whole")
    _finish(tmp_path / "whole", "run")
    rng = random.Random(0)
    landed = _kill_until_finished(stages_before["rollout"], tmp_path / "run", "run", 10, 1.5, rng)
    _finish(tmp_path / "run", "run")
    assert landed > 0
    found, expected = _snapshot(tmp_path / "run"), _snapshot(tmp_path / "whole")
    assert found.keys() == expected.keys()
    assert [k for k in found if found[k] != expected[k]] == []
    steps = [r["global_step"] for r in _metrics(tmp_path / "run")]
    assert steps == [r["global_step"] for r in _metrics(tmp_path / "whole")] == sorted(set(steps))


def _metrics(root: Path) -> list[dict[str, int]]:
    from fire_data import metrics

    return metrics.read(root / "metrics.jsonl")
