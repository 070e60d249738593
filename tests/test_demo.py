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
from fire_data.steps.rounds import round_table
from tests.browser import chromium, opened


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
    assert "default-src 'none'; style-src 'sha256-" in page
    assert page.count("<svg") == 2


def test_table_and_curves_count_the_same_rounds_from_the_start(finished: Path) -> None:
    page = (finished / "learning.html").read_text(encoding="utf-8")
    rows = re.findall(r'<th scope="row">(\d+)</th><td>(.*?)</td>', page)
    table = round_table(open_run(finished / "fire"))
    assert rows == [(str(n), f"{r['greedy']:.1%}") for n, r in enumerate(table)]
    for svg in re.findall(r"<svg.*?</svg>", page):
        assert {"rounds trained", "0", str(len(table) - 1)} <= {*re.findall(r"<text[^>]*>([^<]+)</text>", svg)}


def test_page_escapes_the_names_of_arms(tmp_path: Path) -> None:
    row = {"greedy": 0.5, "avg@2": 0.25}
    tables = {"<b>x\x07</b>": [row, row], "uniform": [row]}
    page = write_curve(tmp_path, tables, "avg@2").read_text(encoding="utf-8")
    assert "<b>" not in page
    assert page.count(r"&lt;b&gt;x\x07&lt;/b&gt;") == 4, "two legends, two columns"
    assert "<td>–</td>" in page


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_is_readable_on_a_phone_in_both_themes(tmp_path: Path, scheme: str) -> None:
    pytest.importorskip("playwright")
    row = {"greedy": 0.5, "avg@2": 0.25}
    page = write_curve(tmp_path, {"fire": [row] * 13, "uniform": [row] * 13}, "avg@2")
    with chromium() as browser, opened(browser, page, width=390, color_scheme=scheme) as found:
        assert found.page.evaluate("document.documentElement.scrollWidth") <= 390
        assert found.page.evaluate("document.querySelector('table').getBoundingClientRect().right") <= 390
        assert min(found.all("svg text", "(e) => e.getBoundingClientRect().height")) >= 11
        widths = found.all("svg", "(e) => [e.getBoundingClientRect().width, e.viewBox.baseVal.width]")
        assert all(drawn == pytest.approx(meant, abs=1) for drawn, meant in widths), "not scaled down"
        right = max(found.all("svg text", "(e) => e.getBoundingClientRect().right"))
        assert right <= 390
        ink, paper = found.page.evaluate("[getComputedStyle(document.querySelector('svg text')).fill, "
                                         "getComputedStyle(document.body).backgroundColor]")  # fmt: skip
        brightness = [sum(map(int, re.findall(r"\d+", c)[:3])) for c in (ink, paper)]
        assert (brightness[0] > brightness[1] + 150) if scheme == "dark" else (brightness[1] > brightness[0] + 150)
