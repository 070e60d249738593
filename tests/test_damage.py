"""Damage of every kind: it is named, no reader believes it, and its stage makes again what is damaged and no more."""

from __future__ import annotations

import random
import shlex
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fire_data.run import open_run
from fire_data.shards import sealed
from tests.conftest import Answer
from tests.faults import trials
from tests.faults.damage import ACTS
from tests.faults.world import TABLES, copy, small_run, stages_before, visible


@pytest.fixture(scope="module")
def finished(tiny_world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one round."""
    folder = tmp_path_factory.mktemp("damage")
    return stages_before(folder, small_run(folder / "run", tiny_world))["after"]


@pytest.mark.parametrize(("place", "kind"), list(enumerate(ACTS)))
def test_damage_is_named_refused_and_mended_alone(finished: Path, tmp_path: Path, place: int, kind: str) -> None:
    """The campaign does every kind to every stage."""
    stage = list(TABLES)[place % len(TABLES)]
    assert trials.damage(finished, tmp_path / "run", stage, kind, random.Random(kind))


def test_check_names_a_damaged_shard_and_the_command_that_mends_it(
    finished: Path, tmp_path: Path, fire: Callable[..., Answer]
) -> None:
    run = open_run(copy(finished, tmp_path / "run"))
    part = run.part("scores", 0)
    ACTS["two swapped with their receipts"](part, "00000", "00002", random.Random(0))
    answer = fire("check", run.root, "--json")
    assert answer.code == 3
    assert {(d["stage"], d["shard"]) for d in answer.json} == {(part.label, "00000"), (part.label, "00002")}
    assert fire(*shlex.split(answer.json[0]["fix"])[1:]).code == 0
    assert fire("check", run.root).code == 0
    assert visible(run.root) == visible(finished)


def test_a_flipped_bit_of_any_file_reaches_nobody(finished: Path, tmp_path: Path) -> None:
    flips, rng = trials.Flips(copy(finished, tmp_path / "run")), random.Random(0)
    found = Counter(flips.once(path, rng) for path in flips.files for _ in range(2))
    assert found["named"] > found["refused"] > 0
    assert found["harmless"] < 0.2 * found.total(), found


def test_a_file_put_beside_a_checkpoint_is_not_loaded_with_it(
    finished: Path, tmp_path: Path, fire: Callable[..., Answer]
) -> None:
    run = open_run(copy(finished, tmp_path / "run"))
    part = run.part("checkpoints", 0)
    (part.folder / "adapter_config.json").write_text("{}")
    (part.folder / "notes.md").write_text("mine")
    answer = fire("check", run.root, "--json")
    assert [d["path"] for d in answer.json] == [str(part.folder / "adapter_config.json")]
    refused = fire("rollout", run.root, "--round", 1)
    assert refused.code == 3
    assert "adapter_config.json is no part of the checkpoint" in refused.err
    (part.folder / "adapter_config.json").unlink()
    assert fire("check", run.root).code == 0
    assert sealed(part).sealed
