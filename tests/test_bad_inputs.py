"""Bad inputs: each has its exit code, says what is wrong and where, and what to do; never a traceback.

`fire` (conftest) fails on any traceback and any exception that is not an exit.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fire_data.cli import stages
from fire_data.run import Run
from fire_data.schemas.manifest import Shard
from fire_data.shards import is_sealed, read_manifest, read_receipt, read_shard, write_shard

from .conftest import Answer, flip

Fire = Callable[..., Answer]
MakeRun = Callable[..., Run]


def expect(answer: Answer, code: int, *words: str) -> Answer:
    """Exit code, an error on stderr with every word, nothing on stdout, and a fix one can act on."""
    assert answer.code == code, answer.err
    assert "error: " in answer.err
    for word in words:
        assert word in answer.err, answer.err
    assert answer.out == ""
    assert answer.fix
    return answer


def prompts(folder: Path, *rows: Any) -> dict[str, str]:
    """The configuration section of a prompts file with these lines."""
    path = folder / "p.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return {"path": str(path)}


def copy_model(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([""], ["no prompt in the file"]),
        ([*[{"prompt": "1"}] * 16, '{"prompt": '], ["not valid JSON", "line 17"]),
        ([{"prompt": "1"}, {"ask": "2"}], ["none of `messages`, `prompt`", "line 2"]),
        ([{"messages": []}], ["at least one message", "line 1"]),
        ([{"prompt": "1", "prompt_id": "a"}, {"prompt": "2", "prompt_id": "a"}], ["'a' is given twice", "line 2"]),
    ],
)
def test_prompts_that_cannot_be_used(
    tmp_path: Path, make_fake_run: MakeRun, fire: Fire, rows: list[Any], words: list[str]
) -> None:
    run = make_fake_run(tmp_path / "run", prompts=prompts(tmp_path, *rows))
    expect(fire("rollout", run.root), 3, *words)
    assert not (run.root / "rollouts").exists()


def test_a_prompts_file_that_is_not_there(tmp_path: Path, make_fake_run: MakeRun, fire: Fire) -> None:
    run = make_fake_run(tmp_path / "run", prompts={"path": "nowhere.jsonl"})
    answer = expect(fire("rollout", run.root), 2, "does not exist", str(run.root / "nowhere.jsonl"))
    assert "--set prompts.path=" in answer.fix
    expect(fire("rollout", run.root, "--set", f"prompts.path={tmp_path}"), 2, "is a folder")


def test_a_hub_data_set_without_network(tmp_path: Path, make_fake_run: MakeRun, fire: Fire) -> None:
    run = make_fake_run(tmp_path / "run", prompts={"path": "hf://datasets/some/thing/p.jsonl"})
    expect(fire("rollout", run.root), 3, "the Hub did not give the prompts")


def test_a_prompt_without_the_answer_that_the_verifier_needs(
    tmp_path: Path, make_fake_run: MakeRun, fire: Fire
) -> None:
    rows = prompts(tmp_path, {"prompt": "1 + 1", "answer": 2}, {"prompt": "1 + 2"})
    run = make_fake_run(tmp_path / "run", prompts=rows, rollout={"verifier": "exact"}, eval={"prompts": rows["path"]})
    answer = expect(fire("rollout", run.root), 3, "no `answer`", "line 2")
    assert "rollout.verifier=none" in answer.fix
    assert fire("rollout", run.root, "--set", "rollout.verifier=none").code == 0
    expect(fire("eval", run.root), 3, "no `answer`", "line 2")


def test_a_prompt_that_the_chat_template_refuses(tmp_path: Path, make_fake_run: MakeRun, fire: Fire) -> None:
    bad = {"messages": [{"role": "tool", "content": "1"}], "prompt_id": "the bad one", "answer": "1"}
    rows = prompts(tmp_path, {"prompt": "1", "answer": "1"}, bad)
    settings = {"prompts": rows, "eval": {"prompts": rows["path"]}, "rollout": {"prompts_per_round": 2}}
    run = make_fake_run(tmp_path / "run", **settings)
    for command in ("rollout", "eval"):
        expect(fire(command, run.root), 3, "refuses the messages (roles: tool)", "'the bad one'")


def test_a_prompt_longer_than_the_limit(tmp_path: Path, make_fake_run: MakeRun, fire: Fire) -> None:
    long = {"prompt": "1 + " * 30 + "1", "prompt_id": "long one"}
    rows = prompts(tmp_path, {"prompt": "1"}, long)
    settings = {"prompts": rows, "rollout": {"max_prompt_tokens": 20, "prompts_per_round": 2}}
    run = make_fake_run(tmp_path / "run", **settings)
    answer = expect(fire("rollout", run.root), 3, "'long one' has", "the limit is 20", "1 prompts are too long")
    options = [o for o in shlex.split(answer.fix.replace(",", " ")) if "=" in o]
    assert len(options) == 2
    for i, option in enumerate(options):  # both ways out are ways out
        other = make_fake_run(tmp_path / f"run-{i}", **settings)
        assert fire("rollout", other.root, "--set", option).code == 0
        manifest = read_manifest(other.part("rollouts", 0))
        assert manifest is not None
        assert manifest.recorded["skipped_prompts"] == i
        assert other.rollouts().collect().height == 2 * (2 - i)
    none = fire("rollout", run.root, "--set", "rollout.max_prompt_tokens=1", "--set", "rollout.long_prompts=skip")
    expect(none, 3, "no prompt has at most 1 tokens")


def poisoned(run: Run, column: str, value: float) -> None:
    """Scores with one wrong number in row 3, token 0, whose bytes and receipt are in order: an engine's fault."""
    part = run.part("scores", 0)
    manifest = read_manifest(part)
    receipt = read_receipt(part, "00000")
    assert manifest is not None
    assert receipt is not None
    table = read_shard(part, receipt)
    rows = table[column].to_pylist()
    rows[3][0] = value
    at = table.column_names.index(column)
    table = table.set_column(at, table.schema.field(column), pa.array(rows, table.schema.field(column).type))
    part.file("00000").unlink()
    part.receipt_path("00000").unlink()
    new = write_shard(part, Shard(name="00000", start=0, stop=2), table, manifest.fingerprint, 0.0)
    record = manifest.model_copy(update={"shards": (new, *manifest.shards[1:])})
    part.manifest_path.write_text(record.model_dump_json())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_logprob_that_is_no_number(tmp_path: Path, make_fake_run: MakeRun, fire: Fire, value: float) -> None:
    run = make_fake_run(tmp_path / "run")
    assert fire("rollout", run.root).code == 0
    assert fire("score", run.root).code == 0
    poisoned(run, "teacher_logprob", value)
    assert fire("check", run.root).code == 0, "its bytes are in order"
    answer = expect(fire("weigh", run.root), 3, "'teacher_logprob'", "row 3")
    assert "score" in answer.fix
    part = run.part("weights", 0, run.config.weights_name)
    assert not part.file("00000").exists(), "the wrong number reached no weight"
    assert not is_sealed(part), "and there is nothing to train on"
    assert fire("train", run.root).code == 4


def test_an_engine_that_returns_no_number_is_stopped_before_it_is_written(
    tmp_path: Path, make_fake_run: MakeRun, fire: Fire, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fire_data.engines import FakeScorer

    run = make_fake_run(tmp_path / "run")
    assert fire("rollout", run.root).code == 0
    real = FakeScorer.score

    def score(self: FakeScorer, rollouts: pa.Table, progress: Any = None, **columns: Any) -> pa.Table:
        table = real(self, rollouts, progress, **columns)
        rows = table["teacher_entropy"].to_pylist()
        rows[1][0] = np.nan
        at = table.column_names.index("teacher_entropy")
        return table.set_column(at, "teacher_entropy", pa.array(rows, table["teacher_entropy"].type))

    monkeypatch.setattr(FakeScorer, "score", score)
    answer = fire("score", run.root)
    assert answer.code == 3
    assert "'teacher_entropy' holds nan at token 0" in answer.err
    assert "scores round-000, shard 00000, row 1" in answer.err
    assert not list((run.root / "scores").rglob("*.parquet"))


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "gone"])
def test_a_damaged_shard(tmp_path: Path, make_fake_run: MakeRun, fire: Fire, damage: str) -> None:
    run = make_fake_run(tmp_path / "run")
    assert fire("rollout", run.root).code == 0
    path = run.part("rollouts", 0).file("00001")
    if damage == "flip":
        flip(path, path.stat().st_size // 2)
    elif damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-100] if damage == "cut" else b"")
    answer = expect(fire("score", run.root), 3, "00001", str(path))
    assert answer.fix == f"fire rollout {run.root} --round 0"
    for reader in (["inspect", run.root], ["inspect", run.root, "--json"]):
        expect(fire(*reader), 3, "00001")


def test_tokenizers_that_mean_different_bytes_by_one_id(
    tmp_path: Path, make_run: MakeRun, fire: Fire, tiny_world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fire_data import models

    teacher = copy_model(tiny_world.teacher, tmp_path / "teacher")
    path = teacher / "tokenizer.json"
    tree = json.loads(path.read_text())
    words = tree["model"]["vocab"]
    words["3"], words["4"] = words["4"], words["3"]
    path.write_text(json.dumps(tree))
    run = make_run(tmp_path / "run", teacher={"model": str(teacher)})
    monkeypatch.setattr(models, "load_model", lambda *a, **k: pytest.fail("weights must not be loaded"))
    expect(fire("rollout", run.root), 3, str(teacher))


def test_a_teacher_that_became_another_after_the_rollouts(
    tmp_path: Path, make_fake_run: MakeRun, fire: Fire, tiny_world: Any
) -> None:
    teacher = copy_model(tiny_world.teacher, tmp_path / "teacher")
    run = make_fake_run(tmp_path / "run", teacher={"model": str(teacher)})
    assert fire("rollout", run.root).code == 0
    assert fire("score", run.root).code == 0
    flip(teacher / "model.safetensors", -5)
    expect(fire("score", run.root), 2, "teacher.weights")


def test_a_student_that_became_another_after_the_rollouts(
    tmp_path: Path, make_fake_run: MakeRun, fire: Fire, tiny_world: Any
) -> None:
    student = copy_model(tiny_world.student, tmp_path / "student")
    run = make_fake_run(tmp_path / "run", student={"model": str(student)})
    assert fire("rollout", run.root).code == 0
    flip(student / "model.safetensors", -5)
    answer = expect(fire("score", run.root), 2, "written by another student")
    assert answer.fix == f"fire rollout {run.root} --round 0 --redo"


def test_a_model_folder_without_weights(tmp_path: Path, make_run: MakeRun, fire: Fire, tiny_world: Any) -> None:
    student = copy_model(tiny_world.student, tmp_path / "student")
    (student / "model.safetensors").unlink()
    run = make_run(tmp_path / "run", student={"model": str(student)})
    expect(fire("rollout", run.root), 3, "safetensors", str(student))
    assert fire("rollout", run.root, "--set", "rollout.engine=fake").code in (0, 2), "the fake engine needs none"


@pytest.mark.parametrize("missing", ["tokenizer.json", "config.json", "model.safetensors"])
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_model_folder_that_lacks_a_file(
    tmp_path: Path, make_run: MakeRun, fire: Fire, tiny_world: Any, who: str, missing: str
) -> None:
    folder = copy_model(getattr(tiny_world, who), tmp_path / who)
    (folder / missing).unlink()
    run = make_run(tmp_path / "run", **{who: {"model": str(folder)}})
    answer = fire("rollout", run.root)
    if answer.code == 0:  # the teacher's weights are not needed before `score`
        answer = fire("score", run.root)
    expect(answer, 3, missing.partition(".")[0] if missing == "config.json" else missing.partition(".")[2], str(folder))


def test_a_model_folder_that_is_not_there(tmp_path: Path, make_run: MakeRun, fire: Fire) -> None:
    for name in ("./nowhere", str(tmp_path / "nowhere")):
        root = make_run(tmp_path / f"run{len(name)}", student={"model": name}).root
        expect(fire("rollout", root), 3, "no such model folder")
    root = make_run(tmp_path / "hub", student={"model": "someone/nothing"}).root
    expect(fire("rollout", root), 3, "someone/nothing")


def test_a_base_student_without_template_and_without_raw(
    tmp_path: Path, make_fake_run: MakeRun, fire: Fire, tiny_world: Any
) -> None:
    student = copy_model(tiny_world.student, tmp_path / "student")
    for path in student.glob("*.jinja"):
        path.unlink()
    config = json.loads((student / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (student / "tokenizer_config.json").write_text(json.dumps(config))
    run = make_fake_run(tmp_path / "run", student={"model": str(student)})
    answer = expect(fire("rollout", run.root), 2, "no chat template")
    assert "rollout.raw" in answer.fix
    assert fire("rollout", run.root, "--set", "rollout.raw=true").code == 0


def test_a_base_teacher_without_template_scores_the_students_prompt(
    tmp_path: Path, make_fake_run: MakeRun, fire: Fire, tiny_world: Any
) -> None:
    teacher = copy_model(tiny_world.teacher, tmp_path / "teacher")
    for path in teacher.glob("*.jinja"):
        path.unlink()
    run = make_fake_run(tmp_path / "run", teacher={"model": str(teacher)})
    assert fire("rollout", run.root).code == 0
    assert fire("score", run.root).code == 0
    expect(fire("score", run.root, "--redo", "--set", "score.teacher_prompt=own"), 2, "no chat template")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rule", "fier"], ["'fier'", "'fire'"]),
        (["--rule", "weight = techer_entropy"], ["techer_entropy"]),
        (["--rule", "weight = teacher_entropy +"], ["weight"]),
        (["--rule", "wait = 1"], ["wait"]),
        (["-p", "percentil=3"], ["'percentil'", "'percentile'"]),
        (["-p", "percentile=many"], ["percentile", "many"]),
        (["-p", "percentile"], ["key=value"]),
        (["-p", "percentile=["], ["not valid YAML"]),
        (["--scope", "everything"], ["weigh.scope", "everything"]),
        (["--denominator", "words"], ["weigh.denominator"]),
        (["--denominator", "constant"], ["needs a value"]),
        (["--name", "../../escape"], ["weigh.name"]),
        (["--name", "a/b"], ["weigh.name"]),
        (["--set", "weigh.rule={weight: nosuch}"], ["nosuch"]),
    ],
)
def test_rules_that_are_none(
    tmp_path: Path, make_fake_run: MakeRun, fire: Fire, options: list[str], words: list[str]
) -> None:
    run = make_fake_run(tmp_path / "run", weigh={"params": {}})
    assert fire("rollout", run.root).code == 0
    assert fire("score", run.root).code == 0
    expect(fire("weigh", run.root, *options), 2, *words)
    assert not (run.root / "weights").exists()


def test_an_unknown_rule_is_refused_by_fire_rules_too(fire: Fire) -> None:
    expect(fire("rules", "unifrom"), 2, "'unifrom'", "'uniform'")


def test_a_full_disk(tmp_path: Path, make_fake_run: MakeRun, fire: Fire, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_fake_run(tmp_path / "run")
    real, calls = pq.write_table, []

    def full(table: pa.Table, where: Path, **kwargs: Any) -> None:
        calls.append(where)
        if len(calls) == 2:
            where.write_bytes(b"PAR1 and no more")
            raise OSError(errno.ENOSPC, "Error writing bytes to file", str(where))
        real(table, where, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", full)
        answer = expect(fire("rollout", run.root), 1, "the disk is full")
    assert "the same command again continues" in answer.fix
    assert len(list((run.root / "rollouts").rglob("*"))) == 2, "the finished shard in its folder, and nothing else"
    assert fire("rollout", run.root).code == 0


def test_a_disk_that_is_full_from_the_first_byte(
    tmp_path: Path, make_fake_run: MakeRun, fire: Fire, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_fake_run(tmp_path / "run")

    def full(self: Path, *args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", full)
        expect(fire("rollout", run.root), 1, "the disk is full")
        expect(fire("init", tmp_path / "new", "--student", "x"), 1, "the disk is full")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(tmp_path: Path, make_fake_run: MakeRun, fire: Fire) -> None:
    run = make_fake_run(tmp_path / "run")
    run.root.chmod(0o500)
    expect(fire("rollout", run.root), 1, "no permission")


def test_an_interrupted_stage_is_130_and_continues(
    tmp_path: Path, make_fake_run: MakeRun, fire: Fire, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fire_data.engines import FakeGenerator

    run = make_fake_run(tmp_path / "run")
    real, calls = FakeGenerator.generate, []

    def interrupted(self: FakeGenerator, *args: Any) -> pa.Table:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(FakeGenerator, "generate", interrupted)
    answer = fire("rollout", run.root)
    assert answer.code == 130
    assert "interrupted; the same command continues" in answer.err
    assert len(list((run.root / "rollouts").rglob("*.parquet"))) == 1
    assert fire("rollout", run.root).code == 0
    assert len(calls) == 4, "the shard that was finished is not made again"


def test_control_c_on_the_real_command_is_130_without_a_traceback(tmp_path: Path, make_fake_run: MakeRun) -> None:
    run = make_fake_run(tmp_path / "run")
    script = (
        "import os, signal, sys\n"
        "from fire_data.engines import FakeGenerator\n"
        "FakeGenerator.generate = lambda *a: os.kill(os.getpid(), signal.SIGINT)\n"
        "from fire_data.cli import main\n"
        "sys.argv = ['fire', 'rollout', sys.argv[1]]; main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, run.root], capture_output=True, text=True, timeout=60, check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert done.returncode == 130
    assert "the same command continues" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("student: {model: m}\nrolout: {n: 2}\n", ["'rolout'", "'rollout'"]),
        ("student: {model: m}\nrollout: {samples: 2}\n", ["'rollout.samples'"]),
        ("student: {model: m}\nrollout: {n: -2}\n", ["'rollout.n'", "-2"]),
        ("rollout: {n: 2}\n", ["'student'", "missing"]),
        ("{{{{", ["not valid YAML"]),
        ("\x00", ["not valid YAML"]),
        ("", ["must hold keys and values"]),
        ("a: &a [1]\nb: &b [*a, *a]\n" + "".join(
            f"x{i}: &x{i} [{', '.join([f'*x{i - 1}' if i else '*b'] * 9)}]\n" for i in range(9)
        ), ["too large"]),
    ],
)  # fmt: skip
def test_configurations_that_are_none(tmp_path: Path, fire: Fire, text: str, words: list[str]) -> None:
    (tmp_path / "fire.yaml").write_text(text)
    for command in ("status", "rollout", "train", "check", "inspect"):
        expect(fire(command, tmp_path), 2, *words, str(tmp_path / "fire.yaml"))


def test_a_folder_that_is_no_run(tmp_path: Path, fire: Fire) -> None:
    commands = ["rollout", "score", "weigh", "train", "run", "eval", "status", "check", "inspect"]
    for command in commands:
        answer = expect(fire(command, tmp_path), 2, "there is no fire.yaml")
        assert answer.fix.startswith(f"fire init {tmp_path}")
    (tmp_path / "file").write_text("x")
    expect(fire("status", tmp_path / "file"), 2, "cannot be read")
    expect(fire("init", tmp_path / "file", "--student", "m"), 2, "a file, not a folder")
    assert not (tmp_path / ".fire").exists()


@pytest.mark.parametrize("override", ["rollout.n", "=1", "rollout..n=1", "rollout.n=[", "rollout.m=1", "seed=x"])
def test_a_wrong_set_option(tmp_path: Path, make_fake_run: MakeRun, fire: Fire, override: str) -> None:
    run = make_fake_run(tmp_path / "run")
    expect(fire("rollout", run.root, "--set", override), 2)


@pytest.mark.parametrize(
    "arguments", [["rolout", "x"], ["rollout"], ["rollout", "x", "--rounds", "1"], ["rollout", "x", "--round", "-1"],
                  ["run", "x", "--rounds", "0"], ["rollout", "x", "--round", "one"]]
)  # fmt: skip
def test_a_wrong_command_line_is_2(fire: Fire, arguments: list[str]) -> None:
    answer = fire(*arguments)
    assert answer.code == 2
    assert answer.out == ""


def test_init_does_not_replace_a_configuration(tmp_path: Path, make_fake_run: MakeRun, fire: Fire) -> None:
    run = make_fake_run(tmp_path / "run")
    before = (run.root / "fire.yaml").read_bytes()
    expect(fire("init", run.root, "--student", "other"), 2, "there is a fire.yaml already")
    expect(fire("init", tmp_path / "new"), 2, "needs a student")
    expect(fire("init", tmp_path / "new", "--from", tmp_path / "nothing"), 2, "there is no fire.yaml")
    assert (run.root / "fire.yaml").read_bytes() == before
    assert not (tmp_path / "new").exists()


def test_init_without_teacher_makes_a_run_that_can_roll_out(tmp_path: Path, fire: Fire, tiny_world: Any) -> None:
    options = ["--student", tiny_world.student, "--prompts", tiny_world.prompts]
    assert fire("init", tmp_path / "run", *options).code == 0
    assert fire("rollout", tmp_path / "run", "--set", "rollout.engine=fake").code == 0
    answer = expect(fire("score", tmp_path / "run"), 2, "there is no teacher")
    assert "teacher.model" in answer.fix


def test_a_regular_expression_that_is_none(tmp_path: Path, make_fake_run: MakeRun, fire: Fire) -> None:
    run = make_fake_run(tmp_path / "run", verify={"pattern": "("}, rollout={"verifier": "exact"})
    expect(fire("rollout", run.root), 2, "not a regular expression")


def test_a_round_that_is_not_there_yet(tmp_path: Path, make_fake_run: MakeRun, fire: Fire) -> None:
    run = make_fake_run(tmp_path / "run")
    answer = expect(fire("rollout", run.root, "--round", 1), 4, "checkpoints round-000")
    assert answer.fix == f"fire train {run.root} --round 0"
    expect(fire("eval", run.root, "--round", 3), 4)
    expect(fire("inspect", run.root, "--round", 7), 4)


def test_an_error_nobody_thought_of_is_one_line_and_1(
    tmp_path: Path, make_fake_run: MakeRun, fire: Fire, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_fake_run(tmp_path / "run")

    def broken(*args: Any) -> None:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(stages, "round_of", broken)
    answer = expect(fire("rollout", run.root), 1, "internal error: RuntimeError: first line")
    assert "second line" not in answer.err
    assert "FIRE_DEBUG=1" in answer.fix
    monkeypatch.setattr(stages, "round_of", lambda *a: (_ for _ in ()).throw(MemoryError()))
    answer = expect(fire("rollout", run.root), 1, "out of memory")
    assert "tokens_per_batch" in answer.fix


def test_a_panic_of_a_library_is_one_line_and_1(
    tmp_path: Path, make_fake_run: MakeRun, fire: Fire, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_fake_run(tmp_path / "run")

    def panic(*args: Any) -> None:
        raise pl.exceptions.PanicException("index out of bounds")

    assert not issubclass(pl.exceptions.PanicException, Exception)
    monkeypatch.setattr(stages, "round_of", panic)
    expect(fire("rollout", run.root), 1, "internal error: PanicException: index out of bounds")


def test_a_manifest_of_nothing_is_no_manifest_and_its_own_stage_mends_it(
    tmp_path: Path, make_fake_run: MakeRun, fire: Fire
) -> None:
    run = make_fake_run(tmp_path / "run")
    assert fire("rollout", run.root).code == 0
    for text in ("null", '{"stats": {"x": NaN}}', '"\\ud800"'):
        run.part("rollouts", 0).manifest_path.write_text(text)
        for command in ("status", "score"):
            expect(fire(command, run.root), 3, "the manifest is not readable")
        assert fire("check", run.root).code == 3
        assert fire("rollout", run.root).code == 0
        assert fire("check", run.root).code == 0


def test_scores_without_rows_are_told(tmp_path: Path, make_fake_run: MakeRun, fire: Fire) -> None:
    run = make_fake_run(tmp_path / "run")
    assert fire("rollout", run.root).code == 0
    assert fire("score", run.root).code == 0
    part = run.part("scores", 0)
    manifest = read_manifest(part)
    assert manifest is not None
    receipts = []
    for old in manifest.shards:
        table = read_shard(part, old).slice(0, 0)
        part.file(old.shard).unlink()
        part.receipt_path(old.shard).unlink()
        receipts.append(write_shard(part, Shard(name=old.shard, start=0, stop=0), table, manifest.fingerprint, 0.0))
    part.manifest_path.write_text(manifest.model_copy(update={"shards": tuple(receipts)}).model_dump_json())
    expect(fire("weigh", run.root), 3, "the scores have no rows")


def test_a_reader_that_leaves_is_no_error(tmp_path: Path, make_fake_run: MakeRun) -> None:
    run = make_fake_run(tmp_path / "run")
    script = "from fire_data.cli import main; main()"
    command = f"{sys.executable} -c {shlex.quote(script)} inspect {shlex.quote(str(run.root))} --schema | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


def piped(arguments: str, to: str) -> subprocess.CompletedProcess[str]:
    script = "from fire_data.cli.errors import entry; from fire_data.cli.app import app; entry(app)"
    command = f"set -o pipefail; {sys.executable} -c {shlex.quote(script)} {arguments} {to}"
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("arguments", ["rules", "rules fire", "rules --json", "init --help"])
def test_output_that_cannot_be_written_is_1_and_output_that_nobody_reads_is_0(arguments: str) -> None:
    done = piped(arguments, "> /dev/full")
    assert done.returncode == 1
    assert "error: the disk is full" in done.stderr
    assert "fix:" in done.stderr
    unread = piped(arguments, "| (exec <&-; sleep 3)")
    assert (unread.returncode, unread.stderr) == (0, "")
    for answer in (done, unread):
        assert "Traceback" not in answer.stderr
        assert "Exception" not in answer.stderr


def test_scores_that_were_replaced_after_weighing_do_not_train(
    tmp_path: Path, make_fake_run: MakeRun, fire: Fire
) -> None:
    run = make_fake_run(tmp_path / "run")
    for stage in ("rollout", "score", "weigh"):
        assert fire(stage, run.root).code == 0
    poisoned(run, "teacher_logprob", -1.0)
    answer = expect(fire("train", run.root), 2, "made from other scores")
    assert answer.fix.endswith("--redo")
    assert isinstance(run.scores().collect(), pl.DataFrame)
