"""A newcomer with a shared run and nothing else: every message names a command that works, or what to fill in."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fire_data.hub.layout import in_words
from fire_data.overview import next_command
from fire_data.run import Run, open_run
from fire_data.session import Session
from fire_data.shards import is_sealed, read_manifest, sealed
from fire_data.stages import Stage, open_stage
from fire_data.steps.refresh import refresh
from tests.hub_server import Caller, Hub, calling

DATA = ("datasets", "me/data")


@pytest.fixture(scope="module")
def run(make_run: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two rounds of a student from a folder."""
    made = make_run(tmp_path_factory.mktemp("shared") / "run")
    with Session(made) as session:
        refresh(session, 2)
    return made


@pytest.fixture
def shared(run: Run, hub: Hub, caller: Caller) -> Hub:
    """A Hub with the run as me/data."""
    done(caller.fire("push", run.root, "me/data"))
    return hub


def done(answer: dict[str, Any]) -> dict[str, Any]:
    """The answer of a command that worked."""
    assert answer["code"] == 0, answer
    return answer


def refused(answer: dict[str, Any], code: int = 2) -> tuple[str, str]:
    """What a command that failed says, and its fix."""
    assert answer["code"] == code, answer
    what, _, fix = answer["err"].partition("fix:")
    return what, fix.strip()


def after(text: str, word: str) -> list[str]:
    """The arguments of the first `fire` command behind a word."""
    line = text.partition(word)[2].splitlines()[0].partition("    #")[0].strip()
    assert line.startswith("fire "), text
    return shlex.split(line)[1:]


def tree(root: Path) -> set[str]:
    """All files of a run but the temporary ones."""
    files = [p.relative_to(root) for p in root.rglob("*") if p.is_file()]
    return {p.as_posix() for p in files if "tmp" not in p.parts}


def test_a_pulled_run_is_looked_at_and_trained_by_the_commands_that_pull_names(
    shared: Hub, caller: Caller, fire: Callable[..., Any], tiny_world: Any, tmp_path: Path
) -> None:
    pulled = done(caller.fire("pull", "me/data", tmp_path / "theirs"))
    looked = fire(*after(pulled["err"], "next: "))
    assert looked.code == 0, looked.err
    assert "tokens are shown without their text" in looked.err
    response = open_run(tmp_path / "theirs").rollouts(1).collect()["response"][0]
    assert response
    assert json.dumps(response)[1:-1].split("\\")[0] in looked.out
    assert "logp T" in looked.out, "the numbers need no tokenizer"
    student, *_ = [line for line in pulled["err"].splitlines() if line.startswith("warning: student.model")]
    command = after(pulled["err"].partition(student)[2], "fix:")
    assert command[:2] == ["train", str(tmp_path / "theirs")]
    trained = fire(*(word.replace("FOLDER", str(tiny_world.student)) for word in command))
    assert trained.code == 0, trained.err
    assert fire(*after(trained.err, "next: ")).code == 0


def test_a_pull_without_a_student_at_hand_still_says_to_weigh(
    shared: Hub, caller: Caller, fire: Callable[..., Any], tmp_path: Path
) -> None:
    given = ("me/data", tmp_path / "theirs", "--stage", "rollouts", "--stage", "scores", "--round", 0)
    assert fire(*after(done(caller.fire("pull", *given))["err"], "next: ")).code == 0
    assert sealed(open_run(tmp_path / "theirs").part("weights", 0)).name == "fire"
    evals = done(caller.fire("pull", "me/data", tmp_path / "evals", "--stage", "evals"))
    assert after(evals["err"], "next: ") == ["status", str(tmp_path / "evals")]


def test_the_card_of_a_students_folder_says_what_to_name_and_that_trains(
    shared: Hub, caller: Caller, run: Run, tiny_world: Any, tmp_path: Path
) -> None:
    card = shared.repos[DATA].tree["README.md"].decode()
    assert str(sealed(run.part("scores", 0)).fields["student"]["weights"]) in card.partition("`FOLDER` is")[2][:300]
    assert "pypi.org" not in card
    words = {"RUN": str(tmp_path / "mine"), "FOLDER": str(tiny_world.student)}
    command = [words.get(w, w) for w in after(card[card.index("fire train RUN") - 2 :], "$ ")]
    trained = done(caller.fire(*command))
    assert done(caller.fire(*after(trained["err"], "next: ")))
    assert open_run(tmp_path / "mine").current_round() == 1


def test_the_card_says_to_train_only_on_what_can_be_trained_on(shared: Hub, caller: Caller, run: Run) -> None:
    done(caller.fire("push", run.root, "me/later", "--round", 1))
    done(caller.fire("push", run.root, "me/evals", "--stage", "evals"))
    for name in ("me/later", "me/evals"):
        card = shared.repos["datasets", name].tree["README.md"].decode()
        assert "fire pull" in card
        assert "fire train" not in card, name
    done(caller.fire("push", run.root, "me/model", "--stage", "checkpoints"))
    assert "pypi.org" not in shared.repos["models", "me/model"].tree["README.md"].decode()


def test_a_round_that_cannot_be_scored_does_not_start(run: Run, fire: Callable[..., Any], tmp_path: Path) -> None:
    root = tmp_path / "mine"
    shutil.copytree(run.root, root)
    before = tree(root)
    answer = fire("run", root, "--rounds", 3, "--set", "teacher=null")
    assert answer.code == 2
    assert "there is no teacher" in answer.err
    gone = fire("run", root, "--rounds", 3, "--set", "eval.prompts=gone.jsonl")
    assert gone.code == 2
    assert tree(root) == before
    assert fire("run", root, "--rounds", 2, "--set", "teacher=null").code == 0, "what is done needs no teacher"


def test_missing_prompts_are_told_before_the_first_evaluation(
    make_run: Callable[..., Run], fire: Callable[..., Any], tmp_path: Path
) -> None:
    root = make_run(tmp_path / "run").root
    answer = fire("run", root, "--set", "prompts.path=gone.jsonl")
    assert answer.code == 2
    assert "gone.jsonl" in answer.err
    assert tree(root) == {"fire.yaml"}


def test_what_was_begun_here_is_set_aside_by_the_command_that_is_named(
    shared: Hub, caller: Caller, run: Run, tmp_path: Path
) -> None:
    root = tmp_path / "mine"
    done(caller.fire("pull", "me/data", root, "--round", 0))
    mine, source = open_run(root), sealed(run.part("rollouts", 1))
    open_stage(Stage(mine.part("rollouts", 1), {**source.fields, "seed": 5}, source.plan))
    what, fix = refused(caller.fire("pull", "me/data", root, "--round", 1))
    assert "rollouts round-001 is another one here than on the Hub: it was begun here and is not finished" in what
    kept = (root / "rollouts/round-000/00000.parquet").stat().st_mtime_ns
    again = done(caller.fire(*shlex.split(fix.partition(" sets it aside")[0])[1:]))
    assert "set aside under" in again["err"]
    assert read_manifest(mine.part("rollouts", 1)) is not None
    assert sealed(mine.part("rollouts", 1)).digest == source.digest
    assert (root / "rollouts/round-000/00000.parquet").stat().st_mtime_ns == kept


def test_another_run_loses_nothing_to_a_pull_that_would_set_aside(
    shared: Hub, caller: Caller, run: Run, make_fake_run: Callable[..., Run], tmp_path: Path
) -> None:
    from fire_data.steps.rollout import rollout

    other = make_fake_run(tmp_path / "other", seed=1)
    rollout(Session(other), 0)
    source = sealed(run.part("scores", 0))
    open_stage(Stage(other.part("scores", 0), {**source.fields, "seed": 5}, source.plan))
    before = tree(other.root)
    assert "rollouts round-000" in refused(caller.fire("pull", "me/data", other.root, "--redo"))[0]
    assert tree(other.root) == before


def test_a_model_is_not_pulled_but_its_use_is_told(shared: Hub, caller: Caller, run: Run, tmp_path: Path) -> None:
    done(caller.fire("push", run.root, "me/model", "--stage", "checkpoints"))
    what, fix = refused(caller.fire("pull", "me/model", tmp_path / "pulled"))
    assert "this is a model, not a dataset" in what
    assert "--student me/model" in fix
    assert "there is no such dataset" in refused(caller.fire("pull", "me/nothing", tmp_path / "pulled"))[0]


def test_a_token_that_may_not_write_is_told_as_that(shared: Hub, run: Run, tmp_path: Path) -> None:
    with calling(shared, tmp_path / "home", token="hf_of_somebody_else") as stranger:
        what, fix = refused(stranger.fire("push", run.root, "me/data"))
    assert "the token has no right to write here, or there is no such dataset" in what
    assert "token that may write" in fix


def test_without_xet_the_way_around_it_is_named(run: Run, hub: Hub, caller: Caller) -> None:
    pytest.importorskip("hf_xet")
    switch = "from huggingface_hub import constants; constants.HF_HUB_DISABLE_XET = {}"
    caller.run(switch.format(False))
    try:
        what, fix = refused(caller.fire("push", run.root, "me/data", "--stage", "rollouts"), 4)
    finally:
        caller.run(switch.format(True))
    assert "xet-write-token" in what
    assert "HF_HUB_DISABLE_XET=1" in fix
    done(caller.fire("push", run.root, "me/data", "--stage", "rollouts"))


def test_many_tables_are_told_in_few_words(shared: Hub, caller: Caller, run: Run, tmp_path: Path) -> None:
    places = [f"{stage} round-{n:03d}" for n in (0, 1, 2, 5, 12) for stage in ("rollouts", "weights/fire")]
    told = in_words(["evals start", *places, "evals round-000"])
    assert told == "evals start and round 0; rollouts rounds 0-2, 5, 12; weights/fire rounds 0-2, 5, 12"
    pulled = done(caller.fire("pull", "me/data", tmp_path / "pulled"))
    assert "evals start and rounds 0-1; rollouts rounds 0-1; scores rounds 0-1" in pulled["out"]
    as_json = json.loads(done(caller.fire("push", run.root, "me/data", "--json"))["out"])
    assert "rollouts round-001" in as_json["tables"]
    wrong, _ = refused(caller.fire("pull", "me/data", tmp_path / "pulled", "--stage", "nothing"))
    assert "scores rounds 0-1" in wrong


def test_training_an_empty_run_names_the_first_stage(
    make_fake_run: Callable[..., Run], fire: Callable[..., Any], tmp_path: Path
) -> None:
    run = make_fake_run(tmp_path / "run")
    answer = fire("train", run.root)
    assert answer.code == 4
    first = after(answer.err, "fix:")
    assert first[0] == shlex.split(next_command(run))[1] == "rollout"
    assert fire(*first).code == 0
    assert is_sealed(run.part("rollouts", 0))
    assert after(fire("train", run.root).err, "fix:")[0] == "score"
