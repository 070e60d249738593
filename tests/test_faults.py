"""Disks that fail, fill up or cannot be written, clocks that jump, anything in any order: nothing is lost or torn."""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests import campaign
from tests.conftest import Answer
from tests.faults import calls, disk, machine
from tests.faults.world import STAGES, copy, following, small_run, stages_before, visible
from tests.hub_server import Caller, Hub


@pytest.fixture(scope="module")
def before(tiny_world: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run before each stage, and after the last."""
    folder = tmp_path_factory.mktemp("faults")
    return stages_before(folder, small_run(folder / "run", tiny_world))


def test_any_failing_call_is_survived_in_every_stage(before: dict[str, Path], tmp_path: Path) -> None:
    """Also of Arrow and safetensors. The campaign goes through more calls, with every fault in every stage."""
    library = disk.build(tmp_path)
    if library is None:
        pytest.skip("there is no compiler for the disk that fails")
    rng = random.Random(0)
    faults = rng.sample(sorted(disk.FAULTS), len(disk.FAULTS))
    jobs = [
        disk.Job(
            str(before[stage]), str(before[following(stage)]), stage, fault, tuple(sorted(rng.sample(range(90), 1)))
        )
        for stage, fault in zip(STAGES * 3, faults, strict=False)
    ]
    found = disk.run(library, jobs, tmp_path)
    assert [text for one in found for text in one.wrong] == []
    assert sum(one.faults for one in found) > 6
    assert any("StorageError" in one.outcomes for one in found)


def test_anything_in_any_order_ends_in_the_same_bytes(
    tiny_world: Any, hub: Hub, caller: Caller, tmp_path: Path
) -> None:
    """The state machine of `tests/faults/machine.py`, a little of it."""
    counts = machine.Counts()
    truth = machine.Truth(tmp_path, tiny_world)
    machine.play(truth, counts, examples=4, steps=15, seed=4, hub=hub, caller=caller)
    assert counts.actions.total() > 30
    assert counts.outcomes["done"] > 10


@contextmanager
def mounted(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own, where this machine allows it."""
    folder.mkdir()
    if shutil.which("mount") is None or subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], capture_output=True
    ).returncode:  # fmt: skip
        pytest.skip("no file system can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("stage", ["rollout", "train"])
def test_a_full_disk_is_told_and_the_same_command_continues(
    before: dict[str, Path], tmp_path: Path, fire: Callable[..., Answer], stage: str
) -> None:
    with mounted(tmp_path / "small", "16m") as small:
        root = copy(before[stage], small / "run")
        left = shutil.disk_usage(small).free
        (small / "ballast").write_bytes(bytes(left - 24_000))
        answer = fire(stage, root)
        assert answer.code == 1
        assert "the disk is full" in answer.err
        assert "continues" in answer.fix
        assert visible(root).items() <= visible(before[following(stage)]).items()
        (small / "ballast").unlink()
        assert fire(stage, root).code == 0
        assert visible(root) == visible(before[following(stage)])


def test_a_read_only_run_is_looked_at_and_not_changed(
    before: dict[str, Path], tmp_path: Path, fire: Callable[..., Answer]
) -> None:
    with mounted(tmp_path / "small", "16m") as small:
        whole, begun = copy(before["after"], small / "whole"), copy(before["score"], small / "begun")
        subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
        for command in ("status", "check", "inspect", "explain", "diagnose"):
            shown = fire(command, whole, *(["0"] if command == "explain" else []))
            assert shown.code == 0, (command, shown.err)
        for stage in STAGES:
            assert fire(stage, whole, "--round", 0).code in (0, 1), stage
        refused = fire("score", begun)
        assert refused.code == 1
        assert "no permission" in refused.err
        assert "writable" in refused.fix


def test_a_process_that_dies_takes_nothing_with_it(before: dict[str, Path], tmp_path: Path) -> None:
    """What a stage still does while it is taken apart must not matter: from the kill on nothing reaches the disk."""
    root, rng = tmp_path / "run", random.Random(0)
    for stage in STAGES:
        copy(before[stage], root)
        for at in sorted(rng.sample(range(60), 3)):
            with pytest.raises(calls.Killed), calls.failing(at, calls.Killed, for_good=True):
                machine.do(stage, root)
            assert visible(root).items() <= visible(before[following(stage)]).items()
        machine.do(stage, root)
        assert visible(root) == visible(before[following(stage)])


def test_the_campaign_counts_and_goes_on(tmp_path: Path) -> None:
    record = campaign.Record(tmp_path / "counts.json")
    record.add("flips", 3, named=2, harmless=1)
    record.went_wrong("silent", "a shard")
    record.save()
    again = campaign.Record(tmp_path / "counts.json")
    again.add("flips", 2, named=2)
    assert (again["flips"], again["silent"], again.value["outcomes"]["flips"]["named"]) == (5, 1, 4)
    assert campaign.main(["--table", "--counts", str(tmp_path / "counts.json")]) == 1, "something went wrong"
    assert "| **silent corruptions** | 1 |" in campaign.table(again)
    assert campaign.main(["--add", "inputs=7", "--counts", str(tmp_path / "counts.json")]) == 1
    assert campaign.Record(tmp_path / "counts.json")["inputs"] == 7
    other = campaign.Record(tmp_path / "other.json")
    other.add("flips", 10, named=9)
    other.add("kills", 1)
    other.save()
    assert campaign.main(["--take", str(tmp_path / "other.json"), "--counts", str(tmp_path / "counts.json")]) == 1
    both = campaign.Record(tmp_path / "counts.json")
    assert (both["flips"], both["kills"], both.value["outcomes"]["flips"]["named"]) == (13, 1, 11)
    assert len(both.value["wrong"]) == 1
