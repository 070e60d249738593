"""The evidence page is what the committed results say, and those are of the committed specifications."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import polars as pl
import pytest

pytest.importorskip("torch")

# After the skip, because the modules need it.
from fire_data.experiment.spec import cells, load_spec

ROOT = Path(__file__).parents[1]


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("evidence", ROOT / "experiments" / "evidence.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


EVIDENCE = _script()
NAMES = EVIDENCE.names()
SEEDS = {"main": 5, "ablations": 3, "ablations-unknown": 3}


def test_the_page_is_what_the_committed_results_say() -> None:
    page = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    assert page == EVIDENCE.page(), "python experiments/evidence.py"


def test_every_figure_is_on_the_page_and_drawn() -> None:
    page = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    charts = EVIDENCE.figures()
    assert charts
    for name, chart in charts.items():
        assert f"(assets/evidence/{name}.svg)" in page
        assert (ROOT / "docs" / "assets" / "evidence" / f"{name}.svg").read_text(encoding="utf-8").startswith("<svg")
        assert chart.to_dict()


@pytest.mark.parametrize("name", NAMES)
def test_results_are_those_of_the_specification(name: str) -> None:
    spec, table, told = EVIDENCE.experiment(name)
    known = {(c.world, c.setting, c.arm, c.seed) for c in cells(spec)}
    there = set(table.filter(pl.col("arm") != "teacher-routed").select("world", "setting", "arm", "seed").iter_rows())
    assert there <= known
    rules = table.group_by("arm").agg(pl.col("rule", "params").unique())
    for arm, (rule,), (params,) in rules.iter_rows():
        if arm in spec.arms:
            given = spec.arms[arm].rule or arm
            assert rule == (given if isinstance(given, str) else json.dumps(given))
            assert json.loads(params) == spec.arms[arm].params
    seeds = {a["seeds"] for a in told["arms"]}
    assert min(seeds) >= SEEDS.get(name, 3)
    assert {(a["world"], a["setting"], a["arm"]) for a in told["arms"]} == {
        (world, setting, arm) for world, settings in spec.worlds.items() for setting in settings for arm in spec.arms
    }
    assert told["cpu_seconds"] > 0


def test_the_committed_experiments_are_listed_with_their_cells() -> None:
    text = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8").partition("## Committed experiments")[2]
    listed: dict[str, int] = {}
    for files, counts in re.findall(r"^\| (`experiments/[^|]*) \|[^|]*\| ([\d, ]+) \|$", text, re.MULTILINE):
        listed |= dict(zip(re.findall(r"experiments/([\w-]+)\.yaml", files), map(int, counts.split(",")), strict=True))
    specs = {p.stem: load_spec(p) for p in (ROOT / "experiments").glob("*.yaml")}
    assert listed == {name: len([*cells(spec)]) for name, spec in specs.items()}
    results = {p.stem for p in (ROOT / "experiments" / "results").iterdir()}
    assert results == {*specs, EVIDENCE.PEERS.stem}, "every experiment has results, and nothing else does"


def test_a_sentence_that_the_results_contradict_is_not_written() -> None:
    told = EVIDENCE.experiment("control").told["claims"][0]
    assert told["verdict"] == "supported"
    assert "p = " in EVIDENCE.sure("control", told["claim"], "supported")
    with pytest.raises(ValueError, match="the results say supported"):
        EVIDENCE.sure("control", told["claim"], "refuted")
