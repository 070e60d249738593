"""The loop over rounds: masters carry training, exports do not disturb them, arms share a start."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from safetensors.torch import load_file

import fire_data as fd
from fire_data import metrics
from fire_data.create import fork_run
from fire_data.overview import check, status
from fire_data.run import Run
from fire_data.schemas.errors import ConfigError, DataError, FingerprintError, IncompleteError, TrainingError
from fire_data.schemas.manifest import Manifest, Shard
from fire_data.schemas.tables import conform
from fire_data.session import Session
from fire_data.shards import read_shard, sealed
from fire_data.stages import Stage, run_stage, set_stage_aside
from fire_data.steps.evaluate import evaluate
from fire_data.steps.refresh import refresh
from fire_data.steps.rollout import rollout
from fire_data.steps.rounds import round_table
from fire_data.steps.score import score
from fire_data.steps.train import train
from fire_data.steps.weigh import weigh
from tests.tinymodels import latest_state

MakeRun = Callable[..., Run]


def _state(run: Run) -> dict[str, torch.Tensor]:
    """All tensors of the newest training state: masters and moments."""
    folder = latest_state(run.root / ".fire" / "train")
    assert folder is not None
    return {f"{p.stem}/{k}": v for p in folder.glob("*.safetensors") for k, v in load_file(p).items()}


def _up_to_weights(run: Run) -> Session:
    session = Session(run)
    rollout(session, 0)
    score(session, 0)
    weigh(run, 0)
    return session


def _same_tables_again(session: Session, round_: int) -> None:
    """Give a later round the very tables of round 0, as if the student had written and been scored the same."""
    run = session.run
    student = session.student_fields(round_)
    made: dict[str, Manifest] = {}
    for stage in ("rollouts", "scores", "weights"):
        source_part = run.part(stage, 0)
        source = sealed(source_part)
        inputs = {"scores": made["scores"].digest} if stage == "weights" else {}
        fields = {**source.fields, **({"student": student} if "student" in source.fields else {}), **inputs}

        def copy(shard: Shard, part: Any = source_part, manifest: Manifest = source) -> Any:
            return read_shard(part, next(r for r in manifest.shards if r.shard == shard.name))

        copied = Stage(run.part(stage, round_), fields, source.plan)
        made[stage] = run_stage(copied, copy, lambda _, manifest=source: manifest.stats)


def test_50_rounds_with_bf16_export_move_the_masters_exactly_as_50_fp32_steps(
    make_run: MakeRun, tmp_path: Path
) -> None:
    settings = {"batch_size": None, "lr": 1e-6}
    rounds = make_run(tmp_path / "rounds", train={**settings, "export_dtype": "bfloat16"})
    session = _up_to_weights(rounds)
    train(session, 0)
    for number in range(1, 50):
        _same_tables_again(session, number)
        train(session, number)
    steps = make_run(tmp_path / "steps", train={**settings, "export_dtype": "float32", "epochs": 50})
    train(_up_to_weights(steps), 0)
    mine, expected = _state(rounds), _state(steps)
    assert mine.keys() == expected.keys()
    assert all(torch.equal(mine[k], expected[k]) for k in mine)
    assert [r["global_step"] for r in metrics.read(rounds.root / "metrics.jsonl")] == list(range(50))


def test_rounds_in_one_process_equal_the_commands_one_by_one(make_run: MakeRun, tmp_path: Path) -> None:
    together = make_run(tmp_path / "together")
    refresh(Session(together), 2)
    apart = make_run(tmp_path / "apart")
    for number in range(2):
        rollout(Session(apart), number)
        score(Session(apart), number)
        weigh(apart, number)
        train(Session(apart), number)
    for stage in ("rollouts", "scores", "weights", "checkpoints"):
        for number in range(2):
            assert sealed(together.part(stage, number)).digest == sealed(apart.part(stage, number)).digest


def test_finished_rounds_are_left_alone_and_rounds_is_a_total(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    refresh(Session(run), 2)
    files = {p: p.stat().st_mtime_ns for p in run.root.rglob("*") if p.is_file() and p.name != "publish.lock"}
    table = refresh(Session(run), 2)
    assert {p: p.stat().st_mtime_ns for p in files} == files
    assert [row["round"] for row in table] == ["start", 0, 1]
    assert len(refresh(Session(run), 3)) == 4


def test_round_table_has_accuracy_kept_fraction_and_kl(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rollout={"verifier": "exact"}, verify={"pattern": r"#\s*(\S+)\s*$"})
    refresh(Session(run), 1)
    start, row = round_table(run)
    assert 0 <= start["greedy"] <= 1
    assert 0 <= start["avg@2"] <= 1
    assert row["reverse_kl"] > 0
    assert 0.5 < row["kept"] < 1
    assert row["reward"] == run.rollouts(0).select(pl.col("reward").mean()).collect().item()
    assert run.evals().collect()["round"].unique().sort().to_list() == [-1, 0]


def test_student_writes_with_the_checkpoint_of_the_round_before(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", train={"lr": 5e-2})
    refresh(Session(run), 2)
    scores = run.scores(1).collect()
    drift = pl.col("student_logprob").list.explode() - pl.col("rollout_logprob").list.explode()
    assert scores.select(drift.abs().max()).item() < 1e-4
    assert sealed(run.part("scores", 1)).fields["student"] != sealed(run.part("scores", 0)).fields["student"]


def test_second_arm_shares_round_0_by_hard_link(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    refresh(Session(run), 1)
    arm = fork_run(run, tmp_path / "arm", {"weigh": {"rule": "uniform"}})
    for stage in ("rollouts", "scores"):
        for receipt in sealed(run.part(stage, 0)).shards:
            ours, theirs = (r.part(stage, 0).file(receipt.shard) for r in (run, arm))
            assert ours.stat().st_ino == theirs.stat().st_ino
    refresh(Session(arm), 1)
    assert arm.weights(round=0).select(pl.col("keep").all()).collect().item()
    assert sealed(arm.part("checkpoints", 0)).digest != sealed(run.part("checkpoints", 0)).digest


def test_training_other_weights_onto_a_checkpoint_is_refused(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    session = _up_to_weights(run)
    train(session, 0)
    other = fd.open_run(run.root, ("weigh.rule=uniform",))
    weigh(other, 0)
    with pytest.raises(FingerprintError, match="weights"):
        train(Session(other), 0)


def test_a_trained_round_is_about_the_weights_it_was_trained_on(
    make_run: MakeRun, tmp_path: Path, fire: Callable[..., Any]
) -> None:
    run = make_run(tmp_path / "run")
    _up_to_weights(run)
    for command in (
        ["weigh", run.root, "--rule", "uniform", "--name", "plain"],
        ["train", run.root, "--set", "train.weights=plain"],
    ):
        assert fire(*command).code == 0
    later = fd.open_run(run.root)
    assert later.config.trained_weights == "fire"
    plain = later.weights("plain", 0).collect()
    assert later.weights(round=0).collect().equals(plain)
    assert not plain["coefficient"].equals(later.weights("fire", 0).collect()["coefficient"])
    assert ", weights plain: 1 round trained" in fire("status", run.root).out
    shown = fire("inspect", run.root, 0, "--round", 0, "--json").json
    assert shown["coefficient"] == plain["coefficient"][0].to_list()
    assert later.part("weights", 1).name == "fire", "what comes next is as configured"


def test_a_round_cannot_start_without_the_state_before_it(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    refresh(Session(run), 1)
    session = Session(run)
    rollout(session, 1)
    score(session, 1)
    weigh(run, 1)
    for folder in (run.root / ".fire" / "train").iterdir():
        folder.rename(tmp_path / folder.name)
    with pytest.raises(IncompleteError, match="round 1 cannot start"):
        train(session, 1)


def test_shifted_columns_are_caught_before_the_first_step(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    session = Session(run)
    rollout(session, 0)
    score(session, 0)
    part = run.part("scores", 0)
    honest = sealed(part)
    tables = {r.shard: pl.from_arrow(read_shard(part, r)) for r in honest.shards}
    set_stage_aside(part)

    def shifted(shard: Shard) -> Any:
        rolled = [[*x[1:], x[0]] for x in tables[shard.name]["student_logprob"].to_list()]
        column = pl.Series("student_logprob", rolled, dtype=pl.List(pl.Float32))
        return conform(tables[shard.name].with_columns(column).to_arrow(), "scores", "a test")

    run_stage(Stage(part, honest.fields, honest.plan), shifted)
    weigh(run, 0)
    with pytest.raises(TrainingError, match="shifted by one token"):
        train(session, 0)
    assert metrics.read(run.root / "metrics.jsonl") == []


def test_weights_of_other_parameters_than_the_configurations_are_not_trained(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    session = Session(run)
    rollout(session, 0)
    score(session, 0)
    weigh(fd.open_run(run.root, ("weigh.params={percentile: 50}",)), 0)
    with pytest.raises(FingerprintError, match=r"rule\.percentile: 50.* -> 20"):
        train(session, 0)
    changed = fd.open_run(run.root, ("weigh.params={percentile: 50}",))
    assert train(Session(changed), 0).sealed


def test_settings_may_change_between_rounds(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", train={"export_dtype": "bfloat16"})
    refresh(Session(run), 1)
    changes = ("rollout.max_new_tokens=12", "eval.n=1", "train.export_dtype=float32", "weigh.rule=uniform")
    later = fd.open_run(run.root, changes)
    table = refresh(Session(later), 2)
    assert [row["round"] for row in table] == ["start", 0, 1]
    assert [row["kept"] for row in table[1:]] == [pytest.approx(0.75, abs=0.1), 1.0]


def test_an_old_checkpoint_is_exported_again_where_its_state_is_kept(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", train={"keep_states": "all"})
    refresh(Session(run), 2)
    log = (run.root / "metrics.jsonl").read_bytes()
    path = run.part("checkpoints", 0).folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert train(Session(run), 0).sealed
    assert path.read_bytes() == whole
    assert (run.root / "metrics.jsonl").read_bytes() == log


def test_missing_weights_of_the_teacher_are_found_before_the_rollouts(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    teacher = tmp_path / "teacher"
    assert run.config.teacher is not None
    shutil.copytree(run.root / run.config.teacher.model, teacher)
    (teacher / "model.safetensors").unlink()
    with pytest.raises(DataError, match="safetensors"):
        rollout(Session(fd.open_run(run.root, (f"teacher.model={teacher}",))), 0)
    assert not run.part("rollouts", 0).folder.exists()


def test_a_resumed_evaluation_keeps_the_order_of_its_prompts(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    evaluate(Session(run), None)
    lines = (run.root / str(run.config.eval.prompts)).read_text().splitlines(keepends=True)
    (tmp_path / "reversed.jsonl").write_text("".join(reversed(lines)))
    with pytest.raises(FingerprintError, match="prompts"):
        evaluate(Session(fd.open_run(run.root, (f"eval.prompts={tmp_path / 'reversed.jsonl'}",))), None)


def test_an_attempt_that_made_nothing_does_not_hold_its_settings(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    too_long = fd.open_run(run.root, ("rollout.max_new_tokens=100000",))
    with pytest.raises(DataError, match="positions"):
        rollout(Session(too_long), 0)
    assert rollout(Session(run), 0).sealed
    with pytest.raises(FingerprintError, match="max_new_tokens"):
        rollout(Session(fd.open_run(run.root, ("rollout.max_new_tokens=17",))), 0)


def test_swapped_shards_with_their_receipts_are_made_again(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    session = Session(run)
    rollout(session, 0)
    part = run.part("rollouts", 0)
    honest = {p: p.read_bytes() for p in part.folder.iterdir()}
    for path in (part.file, part.receipt_path):
        one, other = path("00000"), path("00001")
        a, b = one.read_bytes(), other.read_bytes()
        one.write_bytes(b)
        other.write_bytes(a)
    assert rollout(Session(run), 0).sealed
    assert {p: p.read_bytes() for p in part.folder.iterdir()} == honest
    assert score(session, 0).sealed


def test_redo_without_the_state_before_it_moves_nothing(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    refresh(Session(run), 2)
    shutil.rmtree(run.root / ".fire" / "train")
    with pytest.raises(ConfigError, match="cannot be trained again"):
        train(Session(run), 1, redo=True)
    assert sealed(run.part("checkpoints", 1)).sealed


def test_redo_of_a_rule_without_finite_numbers_moves_nothing(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    refresh(Session(run), 1)
    broken = fd.open_run(run.root, ("weigh.rule={weight: 1 / (student_entropy * 0)}", "weigh.name=fire"))
    with pytest.raises(DataError, match="not finite"):
        weigh(broken, 0, redo=True)
    assert sealed(run.part("checkpoints", 0)).sealed
    assert run.weights("fire", 0).collect().height


def test_redo_of_the_weights_a_checkpoint_was_made_from_sets_it_aside_whatever_is_configured_now(
    make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run")
    refresh(Session(run), 1)
    other = fd.open_run(run.root, ("weigh.rule=uniform", "weigh.name=fire", "train.weights=uniform"))
    weigh(other, 0, redo=True)
    assert not run.part("checkpoints", 0).manifest_path.exists()


def test_a_rule_that_cannot_be_is_told_before_a_rollout(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with pytest.raises(ConfigError, match="did you mean"):
        refresh(Session(fd.open_run(run.root, ("weigh.rule=fier",))), 1)
    assert not run.part("rollouts", 0).manifest_path.exists()
    with pytest.raises(ConfigError, match="did you mean"):
        make_run(tmp_path / "other", weigh={"rule": "fier"})
    assert not (tmp_path / "other" / "fire.yaml").exists()


def test_a_run_makes_the_columns_its_rule_reads(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", weigh={"rule": "eopd"}, score={"topk": 4})
    refresh(Session(run), 2)
    assert [run.addons(n) for n in (0, 1)] == [("topk",), ("topk",)]
    assert sealed(run.part("checkpoints", 1)).stats["fkl_loss_last"] is not None


def test_status_sees_a_file_that_is_gone_and_check_knows_what_cannot_be_made(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    refresh(Session(run), 2)
    (run.part("checkpoints", 0).folder / "model.safetensors").unlink()
    states = {(row["stage"], row["round"]): row["state"] for row in status(run)}
    assert states[("checkpoints", 0)] == "damaged"
    assert states[("checkpoints", 1)] == "sealed"
    (damage,) = check(run)
    assert damage["fix"].startswith("copy the file back")
