"""The demo on its fixed seed: a weak student learns from the teacher, and what is shown is what the runs hold."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fire_data.demo.curve import write_curve
from fire_data.run import open_run
from fire_data.steps.refresh import round_table


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole demo run, as the command makes it."""
    from fire_data.demo.arms import run_demo
    from fire_data.stages import Silent

    folder = tmp_path_factory.mktemp("demo")
    run_demo(folder, rule="fire", rounds=None, seed=0, report=Silent())
    return folder


def test_student_starts_weak_and_both_arms_learn(finished: Path) -> None:
    tables = {arm: round_table(open_run(finished / arm)) for arm in ("fire", "uniform")}
    start = tables["uniform"][0]["greedy"]
    assert start == tables["fire"][0]["greedy"] <= 0.30
    assert tables["uniform"][-1]["greedy"] >= 0.85
    assert tables["fire"][-1]["greedy"] - start >= 0.40
    assert tables["uniform"][-1]["avg@2"] > tables["uniform"][0]["avg@2"] + 0.3
    assert tables["fire"][-1]["kept"] == pytest.approx(0.8, abs=0.01)
    for table in tables.values():
        assert table[-1]["reverse_kl"] < table[1]["reverse_kl"] / 5


def test_arms_start_from_the_same_rollouts_and_then_differ(finished: Path) -> None:
    fire, uniform = (open_run(finished / arm) for arm in ("fire", "uniform"))
    assert fire.rollouts(0).collect().equals(uniform.rollouts(0).collect())
    ids = [r.rollouts(5).collect()["trajectory_id"].to_list() for r in (fire, uniform)]
    assert ids[0] == ids[1]
    assert fire.rollouts(5).collect()["response"].to_list() != uniform.rollouts(5).collect()["response"].to_list()


def test_the_same_command_again_is_quick_and_tells_the_same(finished: Path, fire: Callable[..., Any]) -> None:
    answer = fire("demo", finished, "--json")
    assert answer.code == 0
    rows = json.loads(answer.out)
    table = round_table(open_run(finished / "fire"))
    assert [r["greedy fire"] for r in rows] == [r["greedy"] for r in table]
    assert "learning.html" in fire("demo", finished).err


def test_page_needs_no_script_and_no_network(finished: Path) -> None:
    page = (finished / "learning.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", page)
    assert "default-src 'none'" in page
    assert page.count("<tr>") == 14
    assert "<svg" in page


def test_page_escapes_the_names_of_arms(tmp_path: Path) -> None:
    row = {"greedy": 0.5, "avg@2": 0.25}
    page = write_curve(tmp_path, {"<b>x</b>": [row, row], "uniform": [row, row]}, "avg@2").read_text(encoding="utf-8")
    assert "<b>" not in page
    assert "&lt;b&gt;x&lt;/b&gt;" in page
