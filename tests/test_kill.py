"""Killed at random moments of every stage: the same command finishes with the same bytes as without the kill."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fire_data import metrics
from fire_data.run import Run
from tests.faults import disk, kills
from tests.faults.world import STAGES, copy, following, stages_before, visible

KILLS = 12  # of each stage; as many again, in all, at calls to the disk


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory, make_run: Callable[..., Run]) -> dict[str, Path]:
    """The run directory as it is before each stage, and after the last."""
    folder = tmp_path_factory.mktemp("kill")
    run = make_run(
        folder / "run",
        rollout={"prompts_per_round": 12, "prompts_per_shard": 2, "n": 2, "max_new_tokens": 12},
        train={"batch_size": 4, "epochs": 2, "save_every": 2, "export_dtype": "bfloat16"},
    )
    return stages_before(folder, run)


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_stage_ends_in_the_same_bytes(stage: str, before: dict[str, Path], tmp_path: Path) -> None:
    expected, rng = visible(before[following(stage)]), random.Random(stage)
    landed, longest = 0, 1.0
    while landed < KILLS:
        fresh = kills.kill_until_finished(
            before[stage], tmp_path / "run", stage, min(4, KILLS - landed), longest, rng
        ).total()
        assert visible(tmp_path / "run") == expected
        landed += fresh
        longest *= 1.0 if fresh else 0.5
    leftovers = [p for p in (tmp_path / "run" / ".fire" / "tmp").iterdir() if p.suffix != ".lock"]
    assert len(leftovers) <= 1


def test_a_stage_killed_at_a_call_to_the_disk_ends_in_the_same_bytes(before: dict[str, Path], tmp_path: Path) -> None:
    """Also while a checkpoint or a training state is written: every call that changes the disk is a moment to die."""
    library = disk.build(tmp_path)
    if library is None:
        pytest.skip("there is no compiler for the disk that fails")
    rng, landed = random.Random(0), 0
    with kills.loaded_before(library):
        for stage in STAGES:
            landed += kills.kill_until_finished(before[stage], tmp_path / "run", stage, 5, 0.0, rng, calls=80).total()
            assert visible(tmp_path / "run") == visible(before[following(stage)])
    assert landed > 6


def test_killed_rounds_end_in_the_same_bytes(before: dict[str, Path], tmp_path: Path) -> None:
    whole = copy(before["rollout"], tmp_path / "whole")
    kills.finish(whole, "run")
    landed = kills.kill_until_finished(before["rollout"], tmp_path / "run", "run", 10, 1.5, random.Random(0))
    kills.finish(tmp_path / "run", "run")
    assert landed.total() > 0
    assert visible(tmp_path / "run") == visible(whole)
    steps = [r["global_step"] for r in _metrics(tmp_path / "run")]
    assert steps == [r["global_step"] for r in _metrics(whole)] == sorted(set(steps))


def _metrics(root: Path) -> list[dict[str, Any]]:
    return metrics.read(root / "metrics.jsonl")
