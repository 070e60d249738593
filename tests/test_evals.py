"""`fire eval`: benchmarks as people have them, numbers that the tables give again, and honest comparisons."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from fire_data.create import fork_run
from fire_data.files import sha256_file
from fire_data.prompts import read_prompts
from fire_data.run import Run, open_run
from fire_data.schemas.errors import ConfigError, DataError
from fire_data.session import Session
from fire_data.shards import sealed
from fire_data.steps.benchmarks import benchmarks
from fire_data.steps.evaluate import evaluate, measured
from fire_data.steps.rounds import round_table
from fire_data.steps.versus import versus
from fire_data.verify.bootstrap import interval, paired
from fire_data.verify.estimates import per_prompt

from .conftest import Answer, shard_files

Fire = Callable[..., Answer]
MakeRun = Callable[..., Run]
# Right and wrong in a mix that depends on model and prompt, whatever untrained models write.
MIXED = "def grade(response, answer, extra):\n    return (len(response) + len(answer or '')) % 2\n"
LAST_LETTER = r"(\w)\W*$"


def lines(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def run(tmp_path: Path, make_fake_run: MakeRun) -> Run:
    return make_fake_run(tmp_path / "run", verify={"pattern": LAST_LETTER}, eval={"n": 3, "k": [1, 2]})


@pytest.fixture
def graded(tmp_path: Path, make_fake_run: MakeRun) -> Run:
    """As `run`, with a grader of its own, and evaluated before training."""
    (tmp_path / "grader.py").write_text(MIXED)
    made = make_fake_run(tmp_path / "graded", verify={"kind": str(tmp_path / "grader.py:grade"), "workers": 1})
    evaluate(Session(made), None)
    return made


# --- benchmarks ---------------------------------------------------------------------------------------------------


WORKED = "She has 3 + 4 = <<3+4=7>>7.\n#### 7"
BOXED = r"\boxed{1}, or rather $x = \boxed{\frac{1}{2}}$."


@pytest.mark.parametrize(
    ("row", "prompt", "answer", "extra"),
    [
        ({"problem": "1+1?", "answer": "2", "level": 3}, "1+1?", "2", {"level": 3}),
        ({"question": "1+1?", "answer": 2}, "1+1?", "2", None),
        ({"prompt": "1+1?", "question": "kept", "answer": "2"}, "1+1?", "2", {"question": "kept"}),
        ({"question": "How many?", "answer": WORKED}, "How many?", "7", {"worked_answer": WORKED}),
        ({"question": "How?", "answer": "#### 1,200\n"}, "How?", "1,200", {"worked_answer": "#### 1,200\n"}),
        ({"question": "How?", "answer": "a #### inside of a line"}, "How?", "a #### inside of a line", None),
        ({"problem": "x?", "solution": BOXED}, "x?", r"\frac{1}{2}", {"solution": BOXED}),
        ({"problem": "x?", "solution": BOXED, "answer": "3"}, "x?", "3", {"solution": BOXED}),
        ({"problem": "x?", "solution": "no box"}, "x?", None, {"solution": "no box"}),
    ],
)
def test_benchmarks_are_read_as_they_are(
    tmp_path: Path, row: dict[str, Any], prompt: str, answer: str | None, extra: dict[str, Any] | None
) -> None:
    (read,) = read_prompts(str(lines(tmp_path / "b.jsonl", row)), tmp_path).to_pylist()
    assert (read["prompt"], read["messages"], read["answer"]) == (prompt, None, answer)
    assert (json.loads(read["extra"]) if read["extra"] else None) == extra


def test_a_benchmark_line_without_an_answer_is_named(tmp_path: Path, run: Run, fire: Fire) -> None:
    file = lines(tmp_path / "b.jsonl", {"problem": "x", "answer": "1"}, {"problem": "y", "solution": "no box"})
    answer = fire("eval", run.root, "--prompts", file)
    assert answer.code == 3
    assert "line 2" in answer.err
    assert r"no `solution` with a \boxed{} one" in answer.err


def test_several_benchmarks_have_an_evaluation_each_and_one_more_leaves_the_others_alone(
    tmp_path: Path, run: Run, fire: Fire
) -> None:
    first = lines(tmp_path / "first.jsonl", {"problem": "1", "answer": "1"}, {"problem": "2", "answer": "2"})
    second = lines(tmp_path / "second.jsonl", {"question": "3", "answer": "3"})
    answer = fire("eval", run.root, "--prompts", f"{first},{second}", "--json")
    assert answer.json["round"] == "start"
    assert {name: stats["prompts"] for name, stats in answer.json["benchmarks"].items()} == {"first": 2, "second": 1}
    files = {name: shard_files(run.part("evals", "start", name)) for name in ("first", "second")}
    before = {p: p.stat().st_mtime_ns for paths in files.values() for p in paths}
    assert fire("eval", run.root).code == 0  # that of fire.yaml, which has no name
    assert {p: p.stat().st_mtime_ns for p in before} == before
    frame = run.evals().collect()
    assert frame.group_by("benchmark").agg(pl.col("prompt_id").n_unique()).sort("benchmark").rows() == [
        (None, 6), ("first", 2), ("second", 1),
    ]  # fmt: skip
    # A name that was evaluated before stands for its file, also in the command that repairs a shard.
    part = run.part("evals", "start", "first")
    assert part.command == f"fire eval {run.root} --start --prompts first"
    files["first"][0].unlink()
    assert fire("check", run.root).code == 3
    assert fire(*part.command.split()[1:]).code == 0
    assert fire("check", run.root).code == 0


def test_benchmarks_of_the_configuration_have_the_names_given_there(
    tmp_path: Path, make_fake_run: MakeRun, fire: Fire
) -> None:
    for name in ("a", "b"):
        lines(tmp_path / f"{name}.jsonl", {"problem": name, "answer": "1"})
    named = {"easy": str(tmp_path / "a.jsonl"), "hard": str(tmp_path / "b.jsonl")}
    run = make_fake_run(tmp_path / "run", eval={"prompts": named, "n": 1})
    assert open_run(run.root).config.eval.prompts is not None
    assert fire("eval", run.root).code == 0
    assert run.names("evals") == ["easy", "hard"]
    (row,) = round_table(run)
    assert {"easy greedy", "hard greedy", "easy avg@1", "hard avg@1"} <= row.keys()
    assert set(benchmarks(run, "hard")) == {"hard"}
    arm = tmp_path / "deeper" / "arm"
    assert fire("init", arm, "--from", run.root, "--rule", "uniform").code == 0
    assert "there is no" not in fire("init", tmp_path / "deeper" / "arm2", "--from", run.root).err
    assert fire("eval", arm).code == 0


@pytest.mark.parametrize("name", ["start", "round-1", "a/b", ""])
def test_names_that_rounds_have_are_no_names_of_benchmarks(tmp_path: Path, make_fake_run: MakeRun, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be the name of a benchmark"):
        make_fake_run(tmp_path / "run", eval={"prompts": {name: "x.jsonl"}})


def test_what_is_no_benchmark_is_refused(tmp_path: Path, run: Run, fire: Fire) -> None:
    answer = fire("eval", run.root, "--prompts", "gsm8k")
    assert answer.code == 2
    assert "neither a file nor a benchmark 'gsm8k'" in answer.err
    (tmp_path / "x").mkdir()
    one = lines(tmp_path / "b.jsonl", {"problem": "1", "answer": "1"})
    two = lines(tmp_path / "x" / "b.jsonl", {"problem": "2", "answer": "1"})
    answer = fire("eval", run.root, "--prompts", f"{one},{two}")
    assert answer.code == 2
    assert "two benchmarks are called b" in answer.err


# --- numbers ------------------------------------------------------------------------------------------------------


def test_every_number_can_be_recomputed_from_the_table(run: Run, fire: Fire) -> None:
    stats = fire("eval", run.root, "--json").json
    rows = run.evals().collect()
    assert set(rows["verdict"]) <= {"right", "wrong", "no answer"}
    values = per_prompt(rows.to_dicts(), (1, 2))
    assert list(values) == ["greedy", "avg@3", "pass@1", "pass@2", "maj@2", "maj@3"]
    for name, by_prompt in values.items():
        assert stats[name] == pytest.approx(math.fsum(by_prompt.values()) / 6)
        found = interval(list(by_prompt.values()), run.config.seed)
        assert stats["intervals"][name] == [found.low, found.high]
    sampled = rows.filter(pl.col("mode") == "sampled")
    assert stats["avg@3"] == pytest.approx(sampled["reward"].mean())
    assert sum(stats["verdicts"].values()) == rows.height
    shown = fire("eval", run.root)
    assert "maj@3" in shown.out
    assert "verdicts: " in shown.out


def test_code_and_own_graders_need_no_answer(tmp_path: Path, make_fake_run: MakeRun, fire: Fire) -> None:
    (tmp_path / "grader.py").write_text(MIXED)
    file = lines(tmp_path / "b.jsonl", {"problem": "1", "tests": ["assert True"]})
    run = make_fake_run(tmp_path / "run", eval={"prompts": str(file)}, verify={"workers": 1})
    for kind in ("code", f"{tmp_path / 'grader.py'}:grade"):
        answer = fire("eval", run.root, "--set", f"verify.kind={kind}", "--json", "--redo")
        assert answer.code == 0, answer.err
        assert "avg@2" in answer.json
        assert not any(name.startswith("maj@") for name in answer.json)
    answer = fire("eval", run.root, "--set", "verify.kind=math", "--redo")
    assert answer.code == 3
    assert "no `answer`" in answer.err


def test_another_verifier_is_another_evaluation(run: Run, fire: Fire) -> None:
    assert fire("eval", run.root).code == 0
    answer = fire("eval", run.root, "--set", "verify.kind=choice")
    assert answer.code == 3
    assert "none of the letters A to E" in answer.err
    answer = fire("eval", run.root, "--set", "verify.timeout_s=3")
    assert answer.code == 2
    assert "verify.timeout_s" in answer.err
    assert fire("eval", run.root, "--set", "verify.workers=1").code == 0


def test_evaluations_made_before_there_were_votes_are_read(graded: Run) -> None:
    part = graded.part("evals", "start")
    file = shard_files(part)[0]
    pl.read_parquet(file).drop("vote", "verdict").write_parquet(file)
    receipt = sealed(part).shards[0]
    digest = sha256_file(file)
    old = receipt.model_copy(update={"sha256": digest, "bytes": file.stat().st_size})
    assert "greedy" in measured(part, [old], (1,))


# --- comparisons --------------------------------------------------------------------------------------------------


def other(run: Run, folder: Path, **settings: str) -> Run:
    """The same student in another run with another seed, evaluated before training."""
    made = fork_run(run, folder, {"seed": 9})
    evaluate(Session(open_run(folder, tuple(f"{k}={v}" for k, v in settings.items()))), None)
    return made


def test_what_a_comparison_lacks_is_told_before_anything_is_evaluated(
    tmp_path: Path, make_fake_run: MakeRun, fire: Fire
) -> None:
    run = make_fake_run(tmp_path / "run")
    answer = fire("eval", run.root, "--start", "--against", "0")
    assert answer.code == 4
    assert answer.fix == f"fire eval {run.root} --round 0"
    assert not run.evaluations()
    assert fire("eval", run.root, "--round", 0, "--start").code == 2


def test_whole_responses_that_never_equal_the_answer_are_doubted(
    tmp_path: Path, make_fake_run: MakeRun, fire: Fire
) -> None:
    run = make_fake_run(tmp_path / "run")
    assert "verify.pattern is null" in fire("eval", run.root).err
    assert "verify.pattern" not in fire("eval", run.root, "--redo", "--set", "verify.pattern=(.*)").err


def test_an_evaluation_against_itself_has_no_gap(graded: Run, fire: Fire) -> None:
    answer = fire("eval", graded.root, "--against", "start", "--json")
    (pair,) = answer.json["against"]
    assert pair["notes"] == []
    assert {row["metric"] for row in pair["metrics"]} >= {"greedy", "avg@2", "pass@1"}
    for row in pair["metrics"]:
        assert (row["difference"], row["low"], row["high"], row["p"]) == (0, 0, 0, 1)
        assert row["prompts"] == 6


def test_two_runs_are_compared_prompt_by_prompt(graded: Run, tmp_path: Path, fire: Fire) -> None:
    theirs = other(graded, tmp_path / "theirs")
    answer = fire("eval", graded.root, "--against", f"{theirs.root}:start", "--json")
    (pair,) = answer.json["against"]
    mine, yours = (per_prompt(r.evals().collect().to_dicts(), (1,))["avg@2"] for r in (graded, open_run(theirs.root)))
    assert mine != yours
    found = paired(list(mine.values()), [yours[p] for p in mine], graded.config.seed)
    row = next(row for row in pair["metrics"] if row["metric"] == "avg@2")
    assert [row[k] for k in ("difference", "low", "high", "p")] == list(found)
    assert any("seed: 9 -> 0" in note for note in pair["notes"])
    whole = fire("eval", graded.root, "--against", theirs.root, "--json").json["against"]
    assert whole == [pair]  # the last evaluation of a run stands for it
    shown = fire("eval", graded.root, "--against", theirs.root)
    assert "difference" in shown.out
    assert "seed" in shown.err


def test_other_prompts_are_said_and_only_common_ones_compared(graded: Run, tmp_path: Path, fire: Fire) -> None:
    held_out = Path(str(graded.config.eval.prompts))
    held_out = held_out if held_out.is_absolute() else graded.root / held_out
    rows = [json.loads(line) for line in held_out.read_text().splitlines()]
    ids = graded.evals().collect()["prompt_id"].unique(maintain_order=True).to_list()
    named = [{**row, "prompt_id": i} for row, i in zip(rows, ids, strict=True)]
    changed = [*named[:3], {**named[3], "answer": "another"}]
    theirs = other(graded, tmp_path / "theirs", **{"eval.prompts": str(lines(tmp_path / "few.jsonl", *changed))})
    (pair,) = fire("eval", graded.root, "--against", f"{theirs.root}:start", "--json").json["against"]
    assert all(row["prompts"] == 3 for row in pair["metrics"])
    (note,) = [n for n in pair["notes"] if "prompts differ" in n]
    assert "6 in" in note
    assert "4 in" in note
    assert "compared are the 3 with the same prompt_id and answer" in note


def test_evaluations_without_a_common_prompt_are_not_compared(graded: Run, tmp_path: Path, fire: Fire) -> None:
    file = lines(tmp_path / "else.jsonl", {"prompt": "something else", "answer": "1"})
    theirs = other(graded, tmp_path / "theirs", **{"eval.prompts": str(file)})
    answer = fire("eval", graded.root, "--against", f"{theirs.root}:start")
    assert answer.code == 3
    assert "no prompt in common" in answer.err
    with pytest.raises(DataError, match="in common"):
        versus(graded.part("evals", "start"), theirs.part("evals", "start"), (1,), 0)


def test_what_is_not_evaluated_yet_cannot_be_compared(graded: Run, tmp_path: Path, fire: Fire) -> None:
    answer = fire("eval", graded.root, "--against", "7")
    assert answer.code == 4
    assert answer.fix == f"fire eval {graded.root} --round 7"
    assert fire("eval", graded.root, "--against", str(tmp_path / "nowhere")).code == 2


def test_only_shared_metrics_are_compared(graded: Run, tmp_path: Path, fire: Fire) -> None:
    theirs = other(graded, tmp_path / "theirs", **{"eval.n": "3"})
    (pair,) = fire("eval", graded.root, "--against", f"{theirs.root}:start", "--json").json["against"]
    assert [row["metric"] for row in pair["metrics"]] == ["greedy", "pass@1"]
    assert any("avg@2" in note and "avg@3" in note for note in pair["notes"])
