"""A push or a pull that breaks off anywhere is continued by the same command, and nobody ever sees half of one."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from fire_data.overview import check, parts
from fire_data.run import Run, open_run
from fire_data.session import Session
from fire_data.shards import is_sealed
from fire_data.steps.rollout import rollout
from fire_data.steps.score import score
from fire_data.steps.weigh import weigh
from tests.hub_server import Caller, Hub, calling

DATA = ("datasets", "me/data")


@pytest.fixture(scope="module")
def run(make_run: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One round of one shard, from the fake engine."""
    rows = {"engine": "fake", "prompts_per_round": 2, "prompts_per_shard": 2}
    made = make_run(tmp_path_factory.mktemp("faults") / "run", rollout=rows, score={"engine": "fake"})
    with Session(made) as session:
        rollout(session, 0)
        score(session, 0)
    weigh(made, 0)
    return made


def contents(root: Path) -> dict[str, bytes]:
    """All files of a run, but for what is temporary and for times."""
    files = [p for p in root.rglob("*") if p.is_file() and "tmp" not in p.relative_to(root).parts]
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in files}


def is_whole(root: Path) -> bool:
    """True if a pulled run has everything; fails if it shows a stage that it has not."""
    if not (root / "fire.yaml").exists():
        return False
    run = open_run(root)
    assert check(run) == []
    return {p.stage for p in parts(run) if is_sealed(p)} == {"rollouts", "scores", "weights"}


def test_a_push_that_breaks_at_any_call_is_continued_and_never_half_seen(
    run: Run, hub: Hub, caller: Caller, tmp_path: Path
) -> None:
    assert caller.call("push", run.root, "me/data")["code"] == 0
    calls, wanted = len(hub.calls), hub.repos[DATA].tree
    assert calls > 15
    refused = 0
    for number in range(1, calls + 1):
        for takes_effect in (False, True):
            hub.fresh()
            hub.break_from(number, takes_effect)
            broken = caller.call("push", run.root, "me/data")
            assert broken["code"] == 4 or (number == calls and broken["code"] == 0), (number, broken)
            hub.mend()
            pulled = tmp_path / f"{number}-{takes_effect}"
            answer = caller.call("pull", pulled, "me/data")
            if answer["code"]:
                assert answer["code"] in (2, 4), answer  # no repository yet, or no index
                assert not pulled.exists()
                refused += 1
            else:
                assert is_whole(pulled)
            assert caller.call("push", run.root, "me/data")["code"] == 0
            assert hub.repos[DATA].tree == wanted, (number, takes_effect)
    assert refused >= 2 * calls - 4, "nothing can be pulled before the index is there"


def test_a_pull_that_breaks_at_any_call_is_continued_and_never_half_seen(
    run: Run, hub: Hub, caller: Caller, tmp_path: Path
) -> None:
    assert caller.call("push", run.root, "me/data")["code"] == 0
    hub.mend()
    assert caller.call("pull", tmp_path / "whole", "me/data")["code"] == 0
    calls, wanted = len(hub.calls), contents(tmp_path / "whole")
    for number in range(1, calls + 1):
        pulled = tmp_path / str(number)
        hub.break_from(number, takes_effect=False)
        broken = caller.call("pull", pulled, "me/data")
        assert broken["code"] == 4, (number, broken)
        assert "continues" in broken["err"]
        assert not is_whole(pulled)
        hub.mend()
        assert caller.call("pull", pulled, "me/data")["code"] == 0
        assert contents(pulled) == wanted, number


@pytest.mark.parametrize(("what", "call"), [("push", 9), ("pull", 9)])
def test_a_process_that_is_killed_leaves_nothing_in_the_way(
    run: Run, hub: Hub, caller: Caller, tmp_path: Path, what: str, call: int
) -> None:
    if what == "pull":
        assert caller.call("push", run.root, "me/data")["code"] == 0
        hub.mend()
    arguments = ["push", run.root, "me/data"] if what == "push" else ["pull", "me/data", tmp_path / "pulled"]
    with calling(hub, tmp_path / "home") as victim:
        hub.at_call = call, lambda: os.kill(victim.process.pid, signal.SIGKILL)
        with pytest.raises(AssertionError):  # it gave no answer
            victim.fire(*arguments)
    assert len(hub.calls) >= call
    hub.mend()
    assert caller.fire(*arguments)["code"] == 0
    assert caller.call("pull", tmp_path / "pulled", "me/data")["code"] == 0
    assert is_whole(tmp_path / "pulled")


def test_two_pushes_at_a_time_do_not_mix(run: Run, hub: Hub, caller: Caller) -> None:
    """The index is put on top of the very commit that was looked at: who comes second is told, and repeats."""
    assert caller.fire("push", run.root, "me/data", "--stage", "rollouts")["code"] == 0
    repo = hub.repos[DATA]
    hub.mend()
    hub.at_call = 6, lambda: setattr(repo, "tree", {**repo.tree, "LICENSE": b"added on the page meanwhile"})
    second = caller.call("push", run.root, "me/data")
    assert second["code"] == 4
    assert "meanwhile" in second["err"]
    hub.mend()
    assert caller.call("push", run.root, "me/data")["code"] == 0
    assert repo.tree["LICENSE"] == b"added on the page meanwhile"
    assert "weights/fire/round-000/00000.parquet" in repo.tree
