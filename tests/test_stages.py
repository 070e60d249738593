"""Stages: the same command continues or does nothing, another configuration is refused by name, damage stays local."""

from __future__ import annotations

import json
import multiprocessing
import shlex
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fire_data.run import Run, open_run
from fire_data.schemas.errors import EngineError
from fire_data.session import Session
from fire_data.shards import read_manifest, read_receipt
from fire_data.stages import Silent
from fire_data.steps.rollout import rollout

from .conftest import PROMPTS, Answer, edit_record, flip, shard_files

Fire = Callable[..., Answer]
MakeRun = Callable[..., Run]


@pytest.fixture
def scored(tmp_path: Path, make_fake_run: MakeRun, fire: Fire) -> Run:
    """A run of the fake engine up to weights: 3 shards of 2 prompts, 2 samples each, 3 steps of 4."""
    run = make_fake_run(tmp_path / "run", weigh={"params": {"percentile": 40}})
    for stage in ("rollout", "score", "weigh"):
        assert fire(stage, run.root).code == 0
    return run


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory: pytest.TempPathFactory, tiny_world: Any) -> Path:
    """A run of the real engines with two rounds, made once."""
    from fire_data.create import init_run
    from fire_data.steps.refresh import refresh

    values = {
        "threads": 1, "student": {"model": str(tiny_world.student)}, "teacher": {"model": str(tiny_world.teacher)},
        "prompts": {"path": str(tiny_world.prompts)}, "eval": {"prompts": str(tiny_world.held_out), "n": 1},
        "rollout": {"n": 2, "prompts_per_round": 4, "prompts_per_shard": 2, "max_new_tokens": 8},
        "weigh": {"rule": "fire"},
        "train": {"batch_size": 4, "lr": 1e-3, "export_dtype": "float32", "keep_states": "all"},
    }  # fmt: skip
    run = init_run(tmp_path_factory.mktemp("trained") / "run", values)
    refresh(Session(run), 2)
    return run.root


@pytest.fixture
def trained(tmp_path: Path, trained_once: Path) -> Run:
    """A copy of that run."""
    shutil.copytree(trained_once, tmp_path / "run")
    return open_run(tmp_path / "run")


def snapshot(root: Path) -> dict[str, int]:
    """When every file of a run but locks last changed."""
    found = (p for p in root.rglob("*") if p.is_file() and p.suffix != ".lock")
    return {str(p.relative_to(root)): p.stat().st_mtime_ns for p in found}


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*.parquet") if ".fire" not in p.parts}


def differing(answer: Answer) -> set[str]:
    """The fields that an exit 2 names as changed."""
    listed = answer.err.partition("other settings: ")[2].partition("\n")[0]
    return {item.partition(": ")[0] for item in listed.split("; ")}


def test_each_stage_ends_with_the_command_of_the_next(tmp_path: Path, make_run: MakeRun, fire: Fire) -> None:
    root = make_run(tmp_path / "run").root
    command = f"fire rollout {root}"
    for verb in ("rollout", "score", "weigh", "train"):
        assert shlex.split(command)[:3] == ["fire", verb, str(root)]
        answer = fire(*shlex.split(command)[1:])
        assert answer.code == 0, answer.err
        assert answer.out.startswith(("round", "rule")), "the numbers go to stdout"
        command = answer.err.strip().splitlines()[-1].removeprefix("next: ")
    assert command == f"fire run {root} --rounds 2"
    assert sum(1 for _ in (root / "checkpoints" / "round-000").glob("*.safetensors")) == 1


@pytest.mark.parametrize(
    ("stage", "options", "fields"),
    [
        ("rollout", ["--set", "rollout.temperature=0.5"], {"rollout.temperature"}),
        ("rollout", ["--set", "seed=9", "--set", "rollout.n=3"], {"seed", "rollout.n"}),
        ("rollout", ["--set", "student.dtype=bfloat16"], {"student.dtype"}),
        ("rollout", ["--set", "rollout.verifier=exact"], {"rollout.verifier", "verify"}),
        ("rollout", ["--set", "rollout.raw=true"], {"rollout.raw", "template"}),
        ("rollout", ["--set", "student.chat_template_kwargs={a: 1}"], {"template"}),
        ("score", ["--set", "teacher.dtype=float64"], {"teachers.teacher.dtype"}),
        ("score", ["--set", "score.teacher_prompt=own"], {"score.teacher_prompt", "teachers.teacher.template"}),
        ("weigh", ["-p", "percentile=20"], {"rule.percentile"}),
        ("weigh", ["--scope", "round"], {"rule.filter_scope", "rule.max_scope", "rule.mean_scope"}),
        ("weigh", ["--denominator", "sequences"], {"denominator"}),
        ("weigh", ["--set", "train.batch_size=6"], {"batch_size"}),
        ("weigh", ["--set", "weigh.truncated=drop"], {"truncated"}),
        ("weigh", ["--rule", "uniform", "--name", "fire"], set()),
    ],
)
def test_another_configuration_is_refused_with_exactly_the_fields_that_differ(
    scored: Run, fire: Fire, stage: str, options: list[str], fields: set[str]
) -> None:
    before = snapshot(scored.root)
    answer = fire(stage, scored.root, "--round", 0, *options)
    assert answer.code == 2
    if fields:
        assert differing(answer) == fields
    assert "--redo" in answer.fix
    assert answer.out == ""
    assert snapshot(scored.root) == before, "nothing was changed"


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        (["train.lr=0.1"], {"train.lr"}),
        (["train.epochs=2", "train.clip=0.1"], {"train.epochs", "train.clip"}),
        (["train.export_dtype=bfloat16"], {"train.export_dtype"}),
    ],
)
def test_training_with_other_settings_on_a_finished_round_is_refused(
    trained: Run, fire: Fire, options: list[str], fields: set[str]
) -> None:
    answer = fire("train", trained.root, "--round", 0, *(x for o in options for x in ("--set", o)))
    assert answer.code == 2
    assert differing(answer) == fields


def test_training_other_weights_onto_a_checkpoint_is_refused(trained: Run, fire: Fire) -> None:
    assert fire("weigh", trained.root, "--round", 0, "--rule", "uniform").code == 0
    answer = fire("train", trained.root, "--round", 0, "--set", "train.weights=uniform")
    assert answer.code == 2
    assert {"weights", "inputs.weights"} == differing(answer)


def test_performance_fields_and_paths_change_nothing(scored: Run, fire: Fire) -> None:
    before = snapshot(scored.root)
    speed = ["rollout.rows_in_flight=3", "score.tokens_per_batch=64", "student.device=cpu", "train.save_every=1"]
    options = [x for s in speed for x in ("--set", s)]
    copied = scored.root.parent / "copy.jsonl"
    shutil.copy(scored.config.prompts.path, copied)
    lines = copied.read_text().splitlines()
    copied.write_text("\n".join(lines[::-1]) + "\n")  # the order of the file does not matter either
    for stage in ("rollout", "score", "weigh"):
        assert fire(stage, scored.root, *options, "--set", f"prompts.path={copied}").code == 0
    assert snapshot(scored.root) == before


def test_a_finished_stage_is_left_alone_and_names_the_next(scored: Run, fire: Fire) -> None:
    before = snapshot(scored.root)
    for stage, following in (("rollout", "score"), ("score", "weigh"), ("weigh", "train")):
        answer = fire(stage, scored.root)
        assert answer.code == 0
        assert answer.err.strip().splitlines()[-1] == f"next: fire {following} {scored.root}"
    assert snapshot(scored.root) == before


def test_a_finished_run_is_left_alone(trained: Run, fire: Fire) -> None:
    before = snapshot(trained.root)
    answer = fire("run", trained.root, "--rounds", 2, "--json")
    assert answer.code == 0, answer.err
    assert [row["round"] for row in answer.json] == ["start", 0, 1]
    assert fire("train", trained.root, "--round", 0).code == 0
    assert snapshot(trained.root) == before


@pytest.mark.parametrize("stage", ["rollouts", "scores", "weights"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "no receipt", "neither"])
def test_a_damaged_shard_is_made_again_alone_with_the_same_bytes(
    scored: Run, fire: Fire, stage: str, damage: str
) -> None:
    part = scored.part(stage, 0)
    before, times, manifest = contents(scored.root), snapshot(scored.root), part.manifest_path.read_text()
    path = part.file("00001")
    if damage == "flip":
        flip(path, path.stat().st_size // 3)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage in ("gone", "neither"):
        path.unlink()
    if damage in ("no receipt", "neither"):
        part.receipt_path("00001").unlink()
    if damage not in ("no receipt", "neither"):
        check = fire("check", scored.root, "--json")
        assert check.code == 3
        assert [(d["shard"], d["path"]) for d in check.json] == [("00001", str(path))]
    answer = fire(*shlex.split(part.command)[1:])
    assert answer.code == 0, answer.err
    assert contents(scored.root) == before
    changed = {k for k, v in snapshot(scored.root).items() if times.get(k) != v and "orphans" not in k}
    mine = {str(path.relative_to(scored.root)), str(part.receipt_path("00001").relative_to(scored.root))}
    assert changed <= mine | {str(part.manifest_path.relative_to(scored.root))}
    assert json.loads(manifest)["fingerprint"] == json.loads(part.manifest_path.read_text())["fingerprint"]
    assert fire("check", scored.root).code == 0
    for later in ("score", "weigh"):
        assert fire(later, scored.root).code == 0, "the stages after it still hold"
    assert contents(scored.root) == before


def test_a_finished_stage_says_that_there_is_nothing_to_do(trained: Run, fire: Fire) -> None:
    for stage, label in (
        ("rollout", "rollouts"),
        ("score", "scores"),
        ("weigh", "weights/fire"),
        ("train", "checkpoints"),
    ):
        answer = fire(stage, trained.root, "--round", 0)
        assert answer.code == 0
        assert f"{label} round-000 was finished before: nothing to do" in answer.err


def test_a_damaged_checkpoint_is_exported_again_with_the_same_bytes(trained: Run, fire: Fire) -> None:
    part = trained.part("checkpoints", 1)
    weights = next(part.folder.glob("*.safetensors"))
    before, state = weights.read_bytes(), read_manifest(part)
    flip(weights, len(before) // 2)
    assert fire("eval", trained.root, "--round", 1, "--redo").code == 3
    answer = fire("check", trained.root)
    assert answer.code == 3
    assert f"next: {part.command}" in answer.err
    assert fire(*shlex.split(part.command)[1:]).code == 0
    assert weights.read_bytes() == before
    after = read_manifest(part)
    assert after is not None
    assert state is not None
    assert after.digest == state.digest
    assert fire("eval", trained.root, "--round", 1).code == 0


@pytest.mark.parametrize(("stage", "later"), [("rollouts", "score"), ("scores", "weigh"), ("scores", "train")])
def test_a_stage_refuses_damaged_input_with_the_command_that_mends_it(
    tmp_path: Path, make_run: MakeRun, fire: Fire, stage: str, later: str
) -> None:
    run = make_run(tmp_path / "run")
    for verb in ("rollout", "score", "weigh")[: {"score": 1, "weigh": 2, "train": 3}[later]]:
        assert fire(verb, run.root).code == 0
    path = run.part(stage, 0).file("00002")
    flip(path, path.stat().st_size // 2)
    answer = fire(later, run.root)
    assert answer.code == 3
    assert "bytes are not those of its receipt" in answer.err or "changed while" in answer.err
    assert "00002" in answer.err
    assert answer.fix == run.part(stage, 0).command
    assert fire(*shlex.split(answer.fix)[1:]).code == 0
    assert fire(later, run.root).code == 0


def test_every_fix_of_an_incomplete_run_leads_on_to_the_goal(tmp_path: Path, make_run: MakeRun, fire: Fire) -> None:
    """`fire train` on a fresh run, then only what the messages say."""
    root = make_run(tmp_path / "a run").root
    goal, taken = ["train", str(root)], []
    while (answer := fire(*goal)).code == 4:
        for _ in range(5):
            step = shlex.split(answer.fix)
            answer = fire(*step[1:])
            taken.append(step[1])
            if answer.code != 4:
                break
        assert answer.code == 0, answer.err
    assert answer.code == 0, answer.err
    assert sorted(set(taken)) == ["rollout", "score", "weigh"]


def test_a_stage_that_is_started_but_not_sealed_is_no_input(scored: Run, fire: Fire) -> None:
    part = scored.part("rollouts", 0)
    edit_record(part.manifest_path, state="open", shards=[])
    answer = fire("score", scored.root)
    assert answer.code == 4
    assert "rollouts round-000 is not finished" in answer.err
    assert answer.fix == f"fire rollout {scored.root} --round 0"


def set_aside(answer: Answer) -> set[str]:
    """The stages that a command says it moved."""
    (line,) = (x for x in answer.err.splitlines() if x.startswith("set aside"))
    return set(line.partition(": ")[2].split(", "))


def test_redo_that_cannot_work_moves_nothing(trained: Run, fire: Fire) -> None:
    before = contents(trained.root)
    for command in (
        ("weigh", "--rule", "fire", "-p", "alfa=3"),
        ("weigh", "--rule", "weight = nosuch", "--name", "fire"),
        ("weigh", "--rule", "keep = teacher_entropy > 0.5", "--name", "fire"),
        ("rollout", "--set", "student.model=nope"),
        ("rollout", "--set", "prompts.path=nope.jsonl"),
        ("score", "--set", "teacher.model=./nope"),
    ):
        verb, *options = command
        answer = fire(verb, trained.root, "--round", 0, "--redo", *options)
        assert answer.code in (2, 3), answer.err
        assert contents(trained.root) == before
        assert fire("check", trained.root).code == 0


def test_redo_sets_aside_the_stage_and_what_depends_on_it_and_nothing_else(scored: Run, fire: Fire) -> None:
    assert fire("weigh", scored.root, "--rule", "uniform").code == 0
    before = contents(scored.root)
    answer = fire("weigh", scored.root, "--redo", "-p", "percentile=10")
    assert answer.code == 0
    assert set_aside(answer) == {"weights/fire round-000"}
    after = contents(scored.root)
    assert after.keys() == before.keys()
    assert {k for k in after if after[k] != before[k]} <= {k for k in after if k.startswith("weights/fire/")}
    answer = fire("score", scored.root, "--redo")
    assert set_aside(answer) == {"scores round-000", "weights/fire round-000", "weights/uniform round-000"}
    assert {k.partition("/")[0] for k in contents(scored.root)} == {"rollouts", "scores"}
    kept = list((scored.root / ".fire" / "orphans").rglob("*.parquet"))
    assert len(kept) == 12, "three shards of two weights, again of one, and of scores: moved, not deleted"


def test_redo_of_a_round_keeps_the_rounds_before_it(trained: Run, fire: Fire) -> None:
    before = contents(trained.root)
    checkpoint = next(trained.part("checkpoints", 1).folder.glob("*.safetensors")).read_bytes()
    answer = fire("score", trained.root, "--round", 1, "--redo")
    assert answer.code == 0, answer.err
    assert not [k for k in before.keys() - contents(trained.root).keys() if "round-000" in k]
    assert "checkpoints round-001" in answer.err
    assert "evals round-001" in answer.err
    assert "round-000" not in answer.err
    assert not trained.part("checkpoints", 1).folder.exists()
    assert fire("run", trained.root, "--rounds", 2).code == 0
    assert contents(trained.root) == before
    assert next(trained.part("checkpoints", 1).folder.glob("*.safetensors")).read_bytes() == checkpoint


def test_redo_of_a_round_sets_aside_the_rounds_after_it(trained: Run, fire: Fire) -> None:
    before = contents(trained.root)
    answer = fire("weigh", trained.root, "--round", 0, "--redo")
    assert answer.code == 0, answer.err
    assert set_aside(answer) == {
        "weights/fire round-000", "checkpoints round-000", "evals round-000", "rollouts round-001",
        "scores round-001", "weights/fire round-001", "checkpoints round-001", "evals round-001",
    }  # fmt: skip
    left = {k.partition("/")[0] for k in contents(trained.root) if "round-001" in k}
    assert left == set()
    assert list((trained.root / ".fire" / "train").glob("step-*")) == []
    assert fire("run", trained.root, "--rounds", 2).code == 0
    assert contents(trained.root) == before


def test_redo_refuses_before_moving_anything_if_the_round_could_not_start_again(trained: Run, fire: Fire) -> None:
    for state in (trained.root / ".fire" / "train").glob("*-round-000"):
        shutil.rmtree(state)  # what train.keep_states: last does
    before = snapshot(trained.root)
    answer = fire("train", trained.root, "--round", 1, "--redo")
    assert answer.code == 2
    assert "training state at the end of round 0 is gone" in answer.err
    assert snapshot(trained.root) == before


def test_an_evaluation_with_other_settings_is_refused_and_redone_alone(trained: Run, fire: Fire) -> None:
    before = contents(trained.root)
    for which in (["--start"], ["--round", "0"]):
        answer = fire("eval", trained.root, *which, "--set", "eval.n=2")
        assert answer.code == 2
        assert differing(answer) == {"eval.n"}
        answer = fire("eval", trained.root, *which, "--set", "eval.n=2", "--redo", "--json")
        assert answer.code == 0, answer.err
        assert answer.json["round"] == ("start" if which == ["--start"] else 0)
        assert "avg@2" in answer.json
    after = contents(trained.root)
    changed = {k for k in before if after.get(k) != before[k]}
    assert changed == {"evals/start/00000.parquet", "evals/round-000/00000.parquet"}


def test_a_comparison_is_redone_by_the_command_its_own_message_gives(scored: Run, fire: Fire) -> None:
    assert fire("weigh", scored.root, "--rule", "uniform").code == 0
    part = scored.part("weights", 0, "uniform")
    part.file("00000").write_bytes(b"")
    answer = fire("check", scored.root, "--json")
    assert answer.json[0]["fix"] == f"fire weigh {scored.root} --round 0 --rule uniform"
    assert fire(*shlex.split(answer.json[0]["fix"])[1:]).code == 0
    assert fire("check", scored.root).code == 0


def test_status_says_what_is_done_and_what_is_next(tmp_path: Path, make_fake_run: MakeRun, fire: Fire) -> None:
    run = make_fake_run(tmp_path / "run")
    empty = fire("status", run.root, "--json")
    assert (empty.code, empty.json) == (0, [])
    assert empty.err.strip() == f"next: fire rollout {run.root}"
    fire("rollout", run.root)
    answer = fire("status", run.root, "--json")
    (row,) = answer.json
    assert {k: row[k] for k in ("stage", "round", "state", "shards", "planned", "rows")} == {
        "stage": "rollouts", "round": 0, "state": "sealed", "shards": 3, "planned": 3, "rows": 12,
    }  # fmt: skip
    lengths = run.rollouts(0).collect()["response_ids"].list.len()
    assert row["tokens"] == lengths.sum()
    assert row["bytes"] == sum(p.stat().st_size for p in shard_files(run.part("rollouts", 0)))
    assert answer.err.strip() == f"next: fire score {run.root}"
    people = fire("status", run.root)
    assert "rollouts" in people.out
    assert "sealed" in people.out
    assert fire("weigh", run.root).code == 4


def test_check_lists_unreadable_receipts_and_missing_files(scored: Run, fire: Fire) -> None:
    good = fire("check", scored.root, "--json")
    assert (good.code, good.json) == (0, [])
    edit_record(scored.part("rollouts", 0).manifest_path, state="open", shards=[])
    scored.part("rollouts", 0).receipt_path("00000").write_text("{")
    scored.part("scores", 0).file("00001").unlink()
    answer = fire("check", scored.root, "--json")
    assert answer.code == 3
    assert [(d["stage"], d["shard"]) for d in answer.json] == [
        ("rollouts round-000", "00000"), ("scores round-000", "00001"),
    ]  # fmt: skip
    assert "not readable" in answer.json[0]["what"]
    assert answer.json[1]["what"] == "is missing"
    assert "damaged files: 2" in answer.err
    assert f"next: fire rollout {scored.root} --round 0" in answer.err


def test_inspect_shows_one_trajectory_for_people_and_for_machines(scored: Run, fire: Fire) -> None:
    weights = scored.weights().collect()
    row = fire("inspect", scored.root, "3", "--json").json
    assert row["trajectory_id"] == weights["trajectory_id"][3]
    assert row["coefficient"] == weights["coefficient"][3].to_list()
    by_name = fire("inspect", scored.root, weights["trajectory_id"][3][:12], "--json").json
    assert by_name["trajectory_id"] == row["trajectory_id"]
    people = fire("inspect", scored.root, 3)
    assert people.code == 0
    assert row["trajectory_id"] in people.out
    assert "user:" in people.out
    assert f"{row['teacher_logprob'][0]:.3f}" in people.out
    for which in ("99", "zz", "²"):
        answer = fire("inspect", scored.root, which)
        assert answer.code == 2
        assert "from 0 to 11" in answer.fix
    schema = fire("inspect", scored.root, "--schema", "--json").json
    assert {"table", "column", "type", "unit", "per", "meaning"} == set(schema[0])


def test_inspect_shows_what_there_is(tmp_path: Path, make_fake_run: MakeRun, fire: Fire) -> None:
    run = make_fake_run(tmp_path / "run")
    assert fire("inspect", run.root).code == 4
    fire("rollout", run.root)
    assert "teacher_logprob" not in fire("inspect", run.root, "--json").json
    assert fire("inspect", run.root).code == 0
    fire("score", run.root)
    row = fire("inspect", run.root, "--json").json
    assert "teacher_logprob" in row
    assert "weight" not in row
    assert fire("inspect", run.root, "--name", "fire").code == 4


def test_a_response_cannot_steer_the_terminal(tmp_path: Path, make_fake_run: MakeRun, fire: Fire) -> None:
    prompts = tmp_path / "p.jsonl"
    evil = "\x1b]0;title\x07 [bold red]x[/bold red] \x9b2J \u202e"
    prompts.write_text(json.dumps({"prompt": evil, "answer": evil, "prompt_id": evil}) + "\n")
    run = make_fake_run(tmp_path / "run", prompts={"path": str(prompts)}, rollout={"prompts_per_round": 1})
    for stage in ("rollout", "score", "weigh", "inspect"):
        answer = fire(stage, run.root)
        assert answer.code == 0, answer.err
        assert not set("\x1b\x07\x9b\u202e") & set(answer.out + answer.err)
    assert "[bold red]" in answer.out


def test_the_python_door_gives_the_same_tables_as_the_files(scored: Run) -> None:
    assert scored.rollouts().collect().height == 12
    assert scored.scores(0).collect().equals(scored.scores().collect())
    weights = scored.weights("fire", round=0).collect()
    assert weights["trajectory_id"].equals(scored.scores().collect()["trajectory_id"])
    assert weights["step"].to_list() == [0] * 4 + [1] * 4 + [2] * 4
    assert {"coefficient", "teacher_logprob", "response"} <= set(weights.columns)


def test_weights_about_other_trajectories_are_refused(scored: Run, fire: Fire) -> None:
    """As when scores were put back from another run behind the receipts."""
    from fire_data.schemas.errors import DataError

    for where in (scored.part("weights", 0).folder, scored.part("weights", 0).receipts):
        a, b = sorted(where.iterdir())[:2]
        a.rename(where / "x")
        b.rename(a)
        (where / "x").rename(b)
    path = scored.part("weights", 0).manifest_path
    shards = json.loads(path.read_text())["shards"]
    names = [s["shard"] for s in shards]
    shards[:2] = [{**s, "shard": n} for s, n in zip(shards[1::-1], names, strict=False)]
    edit_record(path, shards=shards)
    with pytest.raises(DataError, match="about different trajectories"):
        scored.weights().collect()


class Slow(Silent):
    """A reporter by which a test meets two processes."""

    def __init__(self, barrier: Any) -> None:
        self.barrier = barrier

    def start(self, what: str, total: int, unit: str, done: int = 0) -> None:
        if what.startswith("rollouts"):
            self.barrier.wait(30)


def _together(root: str, barrier: Any, answers: Any) -> None:
    manifest = rollout(Session(open_run(root), Slow(barrier)), 0)
    answers.put([r.sha256 for r in manifest.shards])


def test_two_processes_on_one_stage_give_one_complete_result(
    tmp_path: Path, make_fake_run: MakeRun, fire: Fire
) -> None:
    alone, run = make_fake_run(tmp_path / "alone"), make_fake_run(tmp_path / "run")
    fire("rollout", alone.root)
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(2), context.Queue()
    workers = [context.Process(target=_together, args=(str(run.root), barrier, answers)) for _ in range(2)]
    for worker in workers:
        worker.start()
    first, second = (answers.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join(30)
        assert worker.exitcode == 0
    assert first == second
    assert contents(run.root) == contents(alone.root)
    assert fire("check", run.root).code == 0
    assert [p for p in (run.root / ".fire" / "tmp").iterdir() if p.suffix != ".lock"] == []


def test_a_second_trainer_says_so_and_waits_for_the_first(trained: Run) -> None:
    from fire_data import files
    from fire_data.steps.train import train

    waiting, done = threading.Event(), threading.Event()

    class Listening(Silent):
        def note(self, text: str) -> None:
            if "another command trains this run" in text:
                waiting.set()

    def second() -> None:
        if train(Session(trained, Listening()), 0).sealed:
            done.set()

    thread = threading.Thread(target=second)
    with files.locked(trained.part("checkpoints", 0).tmp / "train.lock"):
        thread.start()
        assert waiting.wait(60)
        assert not done.is_set()
    thread.join(60)
    assert done.is_set()


def test_an_engine_that_fails_keeps_finished_shards_and_the_same_command_continues(
    tmp_path: Path, make_fake_run: MakeRun, fire: Fire, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fire_data.engines import FakeGenerator
    from fire_data.steps import rollout as step

    alone, run = make_fake_run(tmp_path / "alone"), make_fake_run(tmp_path / "run")
    fire("rollout", alone.root)
    real = step.make_generator
    made: list[FakeGenerator] = []

    def failing(session: Session, round: int) -> Any:
        engine = real(session, round)
        assert isinstance(engine, FakeGenerator)
        engine.fail_after = None if made else 9
        made.append(engine)
        return engine

    monkeypatch.setattr(step, "make_generator", failing)
    answer = fire("rollout", run.root)
    assert answer.code == 1
    assert "the fake engine failed as told" in answer.err
    assert len(shard_files(run.part("rollouts", 0))) == 2
    assert fire("status", run.root, "--json").json[0]["state"] == "open"
    assert fire("score", run.root).code == 4
    assert fire("rollout", run.root).code == 0
    assert [engine.written for engine in made] == [9, 4], "only the missing shard was made"
    assert contents(run.root) == contents(alone.root)
    with pytest.raises(EngineError):
        FakeGenerator.generate(failing_now(run), requests(), sampling())


def failing_now(run: Run) -> Any:
    from fire_data.engines import FakeGenerator

    session = Session(run)
    return FakeGenerator(session.vocabulary, session.stop_ids, fail_after=0)


def requests() -> Any:
    import pyarrow as pa

    return pa.table({"trajectory_id": ["a"], "prompt_ids": [[1]]})


def sampling() -> Any:
    from fire_data.sampling import Sampling

    return Sampling(0)


def test_rounds_wrap_around_the_prompts_with_new_sample_numbers(
    tmp_path: Path, make_fake_run: MakeRun, fire: Fire
) -> None:
    run = make_fake_run(tmp_path / "run", rollout={"prompts_per_round": PROMPTS + 3})
    assert fire("rollout", run.root).code == 0
    table = run.rollouts(0).collect()
    assert table.height == 2 * (PROMPTS + 3)
    assert table["trajectory_id"].n_unique() == table.height
    assert table.select("prompt_id", "sample").n_unique() == table.height
    assert sorted(table.group_by("prompt_id").len()["len"].to_list()) == [2] * (PROMPTS - 3) + [4] * 3


def test_a_second_arm_shares_trajectories_by_hard_link_and_only_those(scored: Run, fire: Fire) -> None:
    root = scored.root.parent / "second"
    answer = fire("init", root, "--from", scored.root, "--rule", "uniform")
    assert answer.code == 0, answer.err
    second = open_run(root)
    assert second.config.weigh.rule == "uniform"
    assert second.config.weigh.params == {}
    for stage in ("rollouts", "scores"):
        for mine, theirs in zip(shard_files(second.part(stage, 0)), shard_files(scored.part(stage, 0)), strict=True):
            assert mine.samefile(theirs)
    assert not (root / "weights").exists()
    before = snapshot(scored.root)
    for stage in ("rollout", "score", "weigh", "check"):
        assert fire(stage, root).code == 0
    flip(second.part("rollouts", 0).file("00000"), 500)  # the same bytes for both: both notice
    assert fire("check", scored.root).code == 3
    assert fire("rollout", root).code == 0
    assert fire("rollout", scored.root).code == 0
    assert fire("check", scored.root).code == 0
    assert before.keys() <= snapshot(scored.root).keys()


def test_a_second_arm_with_another_student_shares_nothing(scored: Run, fire: Fire, tiny_world: Any) -> None:
    root = scored.root.parent / "second"
    assert fire("init", root, "--from", scored.root, "--student", tiny_world.teacher).code == 0
    assert not (root / "rollouts").exists()
    assert fire("rollout", root).code == 0


def test_a_run_reached_through_a_symbolic_link_finds_its_models(
    tmp_path: Path, tiny_world: Any, fire: Fire, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / "disk" / "a" / "b"
    deep.mkdir(parents=True)
    (tmp_path / "runs").symlink_to(deep)
    monkeypatch.chdir(tiny_world.student.parent)
    options = ["--student", "student", "--teacher", "teacher", "--prompts", "prompts.jsonl"]
    assert fire("init", tmp_path / "runs" / "one", *options).code == 0
    assert fire("rollout", tmp_path / "runs" / "one", "--set", "rollout.engine=fake").code == 0
    assert not Path(open_run(deep / "one").config.student.model).is_absolute()


def test_a_receipt_is_created_once_and_never_changed(scored: Run, fire: Fire) -> None:
    part = scored.part("rollouts", 0)
    before = read_receipt(part, "00000")
    assert fire("rollout", scored.root).code == 0
    assert read_receipt(part, "00000") == before
