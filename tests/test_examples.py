"""The examples run as they are, at their smallest size; the notebook's numbers are those of the run it shows."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from fire_data.run import Run, open_run
from fire_data.session import Session
from fire_data.shards import sealed
from fire_data.steps.rollout import rollout
from fire_data.steps.score import score
from fire_data.steps.weigh import weigh
from tests.hub_server import calling, serving

EXAMPLES = Path(__file__).parents[1] / "examples"


def script(name: str, *arguments: object) -> str:
    """What a script prints; fails with its errors."""
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


@pytest.fixture(scope="module")
def weighed(tmp_path_factory: pytest.TempPathFactory, make_run: Callable[..., Run]) -> Run:
    """A run with the weights of its first round."""
    folder = tmp_path_factory.mktemp("examples") / "run"
    run = make_run(folder, rollout={"verifier": "exact", "n": 4}, train={"batch_size": 8})
    with Session(run) as session:
        rollout(session, 0)
        score(session, 0)
    weigh(run, 0)
    return run


def test_every_cell_of_the_tour_runs_and_shows_the_numbers_of_the_run(
    weighed: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("marimo")
    pytest.importorskip("altair")
    monkeypatch.setattr(sys, "argv", ["tour.py", "--run", str(weighed.root)])
    outputs, found = runpy.run_path(str(EXAMPLES / "tour.py"))["app"].run()
    stats = sealed(weighed.part("weights", 0)).stats
    filtered = dict(found["filtered"].select("keep", "trajectories").iter_rows())
    assert filtered == {True: stats["kept_trajectories"], False: stats["trajectories"] - stats["kept_trajectories"]}
    means = dict(found["filtered"].select("keep", "teacher_mean").iter_rows())
    assert means[True] > means[False]
    assert found["tokens"].height == stats["tokens"]
    assert found["tokens"].filter(~pl.col("keep"))["coefficient"].abs().max() == 0
    capped = found["surprised"]["weight"].explode()
    assert 0 <= capped.min() < 1 < capped.max() <= 4
    assert [r["rule"] for r in found["compared"]["rules"]] == ["uniform", "fire", "fire-released", "tip", "random"]
    assert any("your-name/your-dataset" in o.text for o in outputs if hasattr(o, "text"))


def test_the_tour_is_a_valid_notebook() -> None:
    pytest.importorskip("marimo")
    command = [sys.executable, "-m", "marimo", "check", "--strict", str(EXAMPLES / "tour.py")]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr


def test_the_rule_in_a_file_works_on_the_command_line_and_is_the_tours(weighed: Run, fire: Callable[..., Any]) -> None:
    file = EXAMPLES / "write_a_rule.py"
    answer = fire("weigh", weighed.root, "--round", 0, "--rule", f"{file}:Surprise", "-p", "cap=4", "--json")
    assert answer.code == 0, answer.err
    mine = weighed.weights("surprise", round=0).select("weight").collect()["weight"].explode()
    assert 0 <= mine.min() < 1 < mine.max() <= 4
    assert fire("weigh", weighed.root, "--round", 0, "--rule", f"{file}:Surprise", "-p", "cap=0").code == 2
    shared = [line for line in file.read_text().splitlines() if line.startswith("        return ")]
    tour = (EXAMPLES / "tour.py").read_text()
    assert len(shared) == 2
    assert [line for line in shared if line not in tour] == []


def test_rules_are_compared_with_the_first(weighed: Run) -> None:
    lines = script("compare_rules.py", weighed.root, "uniform", "fire", "fire-weights").splitlines()
    rows = {
        cells[1]: list(map(float, cells[2:5])) for line in lines[3:] if (cells := line.replace(" ", "").split("|"))[1:]
    }
    assert list(rows) == ["uniform", "fire", "fire-weights"]
    assert rows["uniform"][0] == rows["fire-weights"][0] > rows["fire"][0] > 0.5
    assert rows["uniform"][2] == 1 > rows["fire-weights"][2] > rows["fire"][2] > 0


def test_prompts_of_a_trl_dataset_become_prompts_of_a_run(tmp_path: Path, fire: Callable[..., Any]) -> None:
    user, assistant = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
    rows = [{"prompt": [user], "solution": "4", "level": 1}, {"prompt": [user, assistant], "solution": "4", "level": 2}]
    pl.DataFrame(rows).write_parquet(tmp_path / "train.parquet")
    script("from_trl.py", tmp_path / "train.parquet", tmp_path / "prompts.jsonl", "--answer", "solution")
    made = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    assert made == [{"level": n, "messages": [user], "answer": "4"} for n in (1, 2)]
    (tmp_path / "text.jsonl").write_text(json.dumps({"prompt": "2 + 2?", "completion": "4"}) + "\n")
    script("from_trl.py", tmp_path / "text.jsonl", tmp_path / "plain.jsonl")
    assert json.loads((tmp_path / "plain.jsonl").read_text()) == {"prompt": "2 + 2?"}
    from fire_data.prompts import read_prompts

    assert read_prompts("prompts.jsonl", tmp_path, need_answer=True).num_rows == 2
    assert read_prompts("plain.jsonl", tmp_path)["prompt"].to_pylist() == ["2 + 2?"]


def test_a_student_is_trained_on_a_shared_dataset_by_another_rule(weighed: Run, tmp_path: Path) -> None:
    student = (weighed.root / weighed.config.student.model).resolve()
    words = ["train_shared.py", "user/shared", str(tmp_path / "run"), "--student", str(student), "--rule", "tip"]
    with serving() as hub, calling(hub, tmp_path / "home") as caller:
        assert caller.fire("push", weighed.root, "user/shared")["code"] == 0
        caller.run(
            f"import runpy, sys; sys.argv = {words}; runpy.run_path({str(EXAMPLES / words[0])!r}, None, '__main__')"
        )
    made = open_run(tmp_path / "run")
    assert sealed(made.part("checkpoints", 0)).recorded["weights"] == "tip"
    assert (
        sealed(made.part("weights", 0, "tip")).stats["kept_tokens"]
        < sealed(made.part("weights", 0, "fire")).stats["tokens"]
    )


def test_every_rule_can_be_trained_on_the_demo_world_and_the_results_become_a_table(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    command = [sys.executable, str(EXAMPLES / "train_rules.py"), "--smoke", "--folder", str(tmp_path)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert answer.returncode == 0, answer.stderr
    rows = [json.loads(line) for line in answer.stdout.splitlines()]
    assert [r["rule"] for r in rows] == ["uniform", "tip"]
    assert rows[0]["kept_tokens"] == 1 > rows[1]["kept_tokens"] > 0.4
    assert "| `tip` | 0.50 |" in answer.stderr
    again = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    same = [json.loads(line) for line in again.stdout.splitlines()]
    assert [r["sampled"] for r in same] == [r["sampled"] for r in rows], "what is finished is taken up"
