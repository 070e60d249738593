"""Experiments: cells are ordinary runs, made once however often killed; equal arms are equal and harmful ones worse."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import polars as pl
import pytest
import yaml

pytest.importorskip("torch")

# After the skip, because the modules need it.
from fire_data import metrics
from fire_data.experiment import summary as summaries
from fire_data.experiment import table as tables
from fire_data.experiment.cells import evaluations, make_cell
from fire_data.experiment.page import markdown
from fire_data.experiment.run import experiment
from fire_data.experiment.spec import Spec, cells, load_spec
from fire_data.experiment.table import SCHEMA, collect
from fire_data.experiment.workers import work_through
from fire_data.run import open_run
from fire_data.schemas.errors import ConfigError
from fire_data.shards import is_sealed
from fire_data.stages import Silent

ROOT = Path(__file__).parents[1]


def written(folder: Path, world: Any, **changes: Any) -> Path:
    """A specification of a tiny matrix on the models of the tests' world."""
    values: dict[str, Any] = {
        "worlds": {"tiny": ["single"]},
        "given": {
            "tiny": {
                "student": {"model": str(world.student)},
                "teachers": {"single": {"teacher": {"model": str(world.teacher)}}},
                "prompts": str(world.prompts), "main": str(world.held_out), "retain": str(world.held_out),
            }
        },
        "seeds": 2,
        "rounds": 2,
        "evaluate_every": 1,
        "config": {
            "threads": 1,
            "rollout": {"n": 2, "prompts_per_round": 4, "max_new_tokens": 12},
            "train": {"batch_size": 4, "lr": 1e-3, "export_dtype": "float32"},
            "eval": {"n": 2},
        },
        "arms": {"uniform": None, "same": {"rule": "uniform"}, "random": {"params": {"match": "fire"}}},
    }  # fmt: skip
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(values | changes))
    return path


@pytest.fixture(scope="module")
def finished(tiny_world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a specification and, under `out`, its experiment."""
    folder = tmp_path_factory.mktemp("experiment")
    told = experiment(written(folder, tiny_world), folder / "out", jobs=1, only=None, report=Silent())
    assert told["failures"] == {}
    (folder / "told.json").write_text(json.dumps(told))
    return folder


def files_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Every sealed thing with its inode and time of change."""
    return {
        str(p.relative_to(folder)): (p.stat().st_ino, p.stat().st_mtime_ns)
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.suffix in (".parquet", ".safetensors", ".jsonl")
    }


def test_a_cell_is_an_ordinary_run(finished: Path, fire: Callable[..., Any]) -> None:
    run = finished / "out" / "cells" / "tiny" / "single" / "random" / "seed-001"
    assert open_run(run).config.weigh.rule == "random"
    assert open_run(run).config.seed == 1
    assert fire("check", run).code == 0
    assert fire("status", run).code == 0
    assert fire("inspect", run, "0").code == 0
    assert fire("report", run).code == 0


def test_the_table_has_a_row_per_cell_and_round_with_what_the_manifests_say(finished: Path) -> None:
    table, worlds = tables.read(finished / "out" / "results.parquet")
    assert worlds == 0, "its world was there"
    assert table.schema == pl.Schema(SCHEMA)
    assert table.height == 3 * 2 * 3
    cell = table.filter(arm="random", seed=1).sort("round")
    run = open_run(finished / "out" / "cells" / "tiny" / "single" / "random" / "seed-001")
    tokens = [sum(map(len, run.rollouts(n).collect()["response_ids"])) for n in range(2)]
    assert cell["rollout_tokens"].to_list() == [0, tokens[0], sum(tokens)]
    assert cell["steps"].to_list() == [0, 2, 4]
    assert 0 < cell["kept_share"][1] < 1
    assert cell["trained_tokens"][2] < cell["rollout_tokens"][2]
    greedy = run.evals().collect().filter(benchmark="main", mode="greedy", round=1)["reward"].mean()
    assert cell["greedy"][2] == pytest.approx(greedy)
    assert cell["cpu_seconds"].min() > 0
    assert cell["peak_mb"].min() > 50


def test_two_arms_of_the_same_rule_are_exactly_equal_and_nothing_is_claimed(finished: Path) -> None:
    table = pl.read_parquet(finished / "out" / "results.parquet")
    own = ["arm", "cpu_seconds", "peak_mb"]
    assert table.filter(arm="uniform").drop(own).equals(table.filter(arm="same").drop(own))
    told = json.loads((finished / "told.json").read_text())
    found = [c for c in told["comparisons"] if (c["arm"], c["against"]) == ("same", "uniform")]
    assert {c["metric"] for c in found} == {"sampled", "greedy", "area", "retain"}
    assert all((c["mean"], c["low"], c["high"]) == (0, 0, 0) for c in found)
    assert all(c["p_holm"] == 1 for c in found if "p" in c)


def test_the_same_command_again_makes_nothing_and_tells_the_same(finished: Path, fire: Callable[..., Any]) -> None:
    before = files_of(finished / "out" / "cells")
    answer = fire("experiment", finished / "spec.yaml", "--out", finished / "out", "--json")
    assert answer.code == 0
    assert files_of(finished / "out" / "cells") == before
    assert json.loads(answer.out) == json.loads((finished / "told.json").read_text())


def test_the_report_has_its_figures_and_every_arm(finished: Path) -> None:
    text = (finished / "out" / "report.md").read_text(encoding="utf-8")
    for arm in ("uniform", "same", "random"):
        assert f"| tiny/single | {arm} | 2 |" in text
    assert "it cannot be below 0.5 before correction" in text
    for figure in ("curves-tiny-single.svg", "differences.svg"):
        assert f"]({figure})" in text
        assert ElementTree.parse(finished / "out" / figure).getroot().tag.endswith("svg")


def test_a_killed_experiment_goes_on_where_it_was_and_ends_as_if_it_had_not_been(
    finished: Path, tiny_world: Any, tmp_path: Path
) -> None:
    """Killed after the first round of some cell, with two workers, which must not go on behind the next one's back."""
    spec, out = written(tmp_path, tiny_world), tmp_path / "out"
    command = [sys.executable, "-c", "from fire_data.cli import main; main()", "experiment", str(spec)]
    command += ["--out", str(out), "--jobs", "2"]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not sealed_checkpoints(out) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    with pytest.raises(ProcessLookupError):  # the group is empty: its workers have ended
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.05)
    sealed = sealed_checkpoints(out)
    assert 0 < len(sealed) < 12
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    again = sealed_checkpoints(out)
    assert len(again) == 12
    assert {k: again[k] for k in sealed} == sealed
    own = ["cpu_seconds", "peak_mb"]
    theirs = pl.read_parquet(finished / "out" / "results.parquet").drop(own)
    assert pl.read_parquet(out / "results.parquet").drop(own).equals(theirs)


def sealed_checkpoints(out: Path) -> dict[Path, tuple[int, int]]:
    """The weights of every finished round with inode and time of change."""
    runs = [open_run(p.parent) for p in (out / "cells").rglob("fire.yaml")]
    parts = [run.part("checkpoints", number) for run in runs for number in range(2)]
    found = [part.folder / "model.safetensors" for part in parts if is_sealed(part)]
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


def test_a_cell_that_fails_is_told_and_stops_no_other(
    tiny_world: Any, tmp_path: Path, fire: Callable[..., Any]
) -> None:
    gone = {"rule": "uniform", "config": {"verify": {"kind": "nowhere.py:f"}}}
    spec = written(tmp_path, tiny_world, rounds=1, seeds=[0], arms={"gone": gone, "uniform": None})
    answer = fire("experiment", spec, "--out", tmp_path / "out", "--json")
    told = json.loads(answer.out)
    assert answer.code == 1
    assert list(told["failures"]) == ["tiny/single/gone/seed-000"]
    assert "nowhere.py" in told["failures"]["tiny/single/gone/seed-000"]
    assert {a["arm"] for a in told["arms"]} == {"uniform"}
    assert "## Failed cells" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")


def test_a_cell_made_from_other_settings_is_not_continued(tiny_world: Any, tmp_path: Path) -> None:
    path = written(tmp_path, tiny_world, rounds=1)
    first = load_spec(path)
    cell = next(cells(first))
    make_cell(first, tmp_path / "out", cell, tmp_path)
    more = load_spec(written(tmp_path, tiny_world, rounds=2))
    make_cell(more, tmp_path / "out", cell, tmp_path)  # more rounds of the same are no other settings
    changed = written(tmp_path, tiny_world, config={"threads": 1, "rollout": {"n": 4}})
    with pytest.raises(ConfigError, match="made from other settings"):
        make_cell(load_spec(changed), tmp_path / "out", cell, tmp_path)


def test_teachers_are_evaluated_each_alone_and_all_together_where_prompts_are_routed(
    tiny_world: Any, tmp_path: Path, fire: Callable[..., Any]
) -> None:
    """Two teachers, one of which is the student: together they are right where the one that is asked is right."""
    held_out = tmp_path / "routed.jsonl"
    lines = [json.loads(line) for line in tiny_world.held_out.read_text().splitlines()]
    held_out.write_text("".join(json.dumps(x | {"teacher": "ab"[i % 2]}) + "\n" for i, x in enumerate(lines)))
    given = {
        "student": {"model": str(tiny_world.student)},
        "teachers": {
            "multi": {"a": {"model": str(tiny_world.teacher)}, "b": {"model": str(tiny_world.student)}},
            "alone": {"teacher": {"model": str(tiny_world.teacher)}},
        },
        "prompts": str(held_out), "main": str(held_out), "retain": str(held_out),
    }  # fmt: skip
    claim = {"arm": "uniform", "world": "tiny", "setting": "multi", "against_setting": "alone", "holds": "better"}
    spec = written(
        tmp_path, tiny_world, worlds={"tiny": ["multi", "alone"]}, given={"tiny": given}, seeds=[3], rounds=1,
        arms={"uniform": None}, teachers=True, claims=[claim],
    )  # fmt: skip
    answer = fire("experiment", spec, "--out", tmp_path / "out", "--json")
    assert answer.code == 0, answer.err
    told = {(t["setting"], t["arm"]): t for t in json.loads(answer.out)["teachers"]}
    assert [*told] == [
        ("multi", "teacher-a"),
        ("multi", "teacher-b"),
        ("alone", "teacher"),
        ("multi", "teacher-routed"),
    ]
    rewards = {}
    for route in "ab":
        run = open_run(tmp_path / "out" / "cells" / "tiny" / "multi" / f"teacher-{route}" / "seed-003")
        seen = run.evals().filter(benchmark="main", mode="greedy").collect()
        rewards[route] = dict(zip(seen["prompt_id"], seen["reward"], strict=True))
    routed = [rewards["ab"[i % 2]][x["prompt_id"]] for i, x in enumerate(lines)]
    assert told["multi", "teacher-routed"]["greedy"] == pytest.approx(np.mean(routed))
    assert told["multi", "teacher-a"]["greedy"] == pytest.approx(np.mean([*rewards["a"].values()]))
    assert told["multi", "teacher-a"]["greedy"] == told["alone", "teacher"]["greedy"]
    (claimed,) = json.loads(answer.out)["claims"]
    assert claimed["n"] == 1
    assert "uniform/alone in tiny/multi" in claimed["claim"]
    assert "## Teachers" in (tmp_path / "out" / "report.md").read_text()


def test_rounds_evaluated_later_are_the_same_cell(finished: Path) -> None:
    spec, out = load_spec(finished / "spec.yaml"), finished / "later"
    cell = next(cells(spec))
    make_cell(spec, out, cell, finished, held_out=False)
    assert not (out / "cells" / cell.id / "evals").exists()
    training = {r["round"] for r in metrics.read(out / "cells" / cell.id / "cost.jsonl")}
    make_cell(spec, out, cell, finished)
    own = ["cpu_seconds", "peak_mb"]
    known = pl.read_parquet(finished / "out" / "results.parquet").filter(arm=cell.arm, seed=cell.seed)
    assert collect(spec, out, [cell]).drop(own).equals(known.drop(own))
    assert training == {1, 2}


def fail(how: str) -> None:
    if how == "raise":
        raise ValueError("raised")
    if how == "die":
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("lanes", [1, 2])
def test_jobs_that_fail_or_die_cost_themselves_alone(lanes: int) -> None:
    jobs = [("fine",), ("raise",), ("fine",), *([("die",)] if lanes > 1 else []), ("fine",)]
    told: list[tuple[str, str | None]] = []
    work_through(fail, jobs, lanes, lambda job, error: told.append((job[0], error)))
    assert len(told) == len(jobs)
    assert {(how, error is None) for how, error in told} == {(how, how == "fine") for (how,) in jobs}
    assert all("raised" in str(e) for how, e in told if how == "raise")
    assert all("-9" in str(e) for how, e in told if how == "die")


@pytest.mark.parametrize(("changes", "words"), [
    ({"worlds": {"chian": ["single"]}, "given": {}}, "did you mean 'chain'"),
    ({"worlds": {"tiny": ["strong"]}}, "'tiny' has no setting 'strong'; it has: single"),
    ({"arms": {"fier": None}}, "arm fier in tiny/single"),
    ({"arms": {"fire": {"params": {"percentil": 3}}}}, "percentil"),
    ({"arms": {"uniform": {"config": {"train": {"lrr": 1}}}}}, "did you mean 'lr'"),
    ({"rounds": 0}, "rounds"),
    ({"round": 3}, "unknown key 'round'"),
    ({"seeds": [1, 1]}, "each once"),
    ({"seeds": 10**12}, "more than 10000"),
    ({"claims": [{"arm": "fire", "holds": "better", "world": "tiny"}]}, "'fire', which is no arm"),
    ({"arms": {"teacher-x": {"rule": "uniform"}}}, "that of a teacher's own evaluation"),
    ({"claims": [{"arm": "same", "holds": "better", "world": "tiny", "against_setting": "multi"}]}, "tiny/multi"),
])  # fmt: skip
def test_what_is_wrong_with_a_specification_is_told_before_anything_is_made(
    tiny_world: Any, tmp_path: Path, fire: Callable[..., Any], changes: dict[str, Any], words: str
) -> None:
    answer = fire("experiment", written(tmp_path, tiny_world, **changes), "--out", tmp_path / "out")
    assert answer.code == 2
    assert words in answer.err
    assert not (tmp_path / "out").exists()


def test_only_some_cells_are_made_if_asked_for(tiny_world: Any, tmp_path: Path, fire: Callable[..., Any]) -> None:
    spec = written(tmp_path, tiny_world, rounds=1)
    assert fire("experiment", spec, "--out", tmp_path / "out", "--only", "*/random/seed-000").code == 0
    assert [p.parent.name for p in (tmp_path / "out").rglob("fire.yaml")] == ["seed-000"]
    assert fire("experiment", spec, "--out", tmp_path / "out", "--only", "nothing").code == 2


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_committed_specification_is_sound(path: Path) -> None:
    spec = load_spec(path)
    assert spec.about
    assert {"uniform"} <= {*spec.arms}
    assert evaluations(spec)[-1] == spec.rounds


# What the summary says of tables with a known effect.


def synthetic(effects: dict[str, float], *, seeds: int, noise: float, seed: int = 0) -> tuple[pl.DataFrame, Spec]:
    """A table of arms whose final accuracy differs from uniform's by an effect, with noise by pair and by seed."""
    rng = np.random.default_rng(seed)
    level = rng.normal(0.6, 0.1, seeds)  # seeds are far apart, arms of a seed are not
    rows = []
    for arm, effect in effects.items():
        for s in range(seeds):
            last = level[s] + effect + (rng.normal(0.0, noise) if arm != "uniform" else 0.0)
            for number, value in ((0, 0.2), (10, last)):
                rows.append({
                    "world": "chain", "setting": "single", "arm": arm, "rule": arm, "params": "{}", "seed": s,
                    "round": number, "steps": number, "rollout_tokens": number * 1000,
                    "trained_tokens": number * 1000, "greedy": value, "sampled": value, "retain_greedy": 1.0,
                    "retain_sampled": 1.0, "response_length": 30.0, "truncated": 0.0, "kept_share": 1.0,
                    "cpu_seconds": 1.0, "peak_mb": 1.0,
                })  # fmt: skip
    names = {arm: {"rule": "uniform"} for arm in effects}
    claims = [{"arm": "bad", "holds": "worse", "world": "chain"}] if "bad" in effects else []
    spec = Spec.model_validate({
        "worlds": {"chain": ["single"]}, "arms": names, "seeds": seeds, "rounds": 10, "against": ["uniform"],
        "claims": claims,
    })  # fmt: skip
    return pl.DataFrame(rows, schema=SCHEMA), spec


def test_a_planted_effect_is_found_through_the_seeds_own_spread_and_its_neighbours_are_left_alone() -> None:
    """Seeds differ by 0.1, pairs by 0.02: what pairing is for."""
    found = []
    for seed in range(60):
        table, spec = synthetic(
            {"uniform": 0.0, "bad": -0.1, "null": 0.0, "other": 0.0}, seeds=5, noise=0.02, seed=seed
        )
        told = summaries.summarise(table, spec)
        by = {c["arm"]: c for c in told["comparisons"] if c["metric"] == "sampled"}
        found.append([by[arm]["p_holm"] < 0.05 for arm in ("bad", "null", "other")])
        assert told["claims"][0]["verdict"] in ("supported", "undecided")
    power, *false = np.mean(found, axis=0)
    assert power > 0.9
    assert max(false) < 0.07


def test_a_claim_that_is_the_wrong_way_round_is_refuted_and_one_without_data_undecided() -> None:
    table, spec = synthetic({"uniform": 0.0, "bad": 0.3}, seeds=5, noise=0.01)
    assert summaries.summarise(table, spec)["claims"][0]["verdict"] == "refuted"
    empty = summaries.summarise(table.filter(pl.col("arm") != "bad"), spec)
    assert empty["claims"][0]["verdict"] == "undecided"
    assert "no pairs" in markdown(empty)


def test_arms_are_compared_at_the_tokens_that_both_have() -> None:
    """One arm writes twice as much: at half of its tokens it is half way up."""
    table, spec = synthetic({"uniform": 0.0, "bad": 0.0}, seeds=2, noise=0.0)
    doubled = pl.when(pl.col("arm") == "bad").then(pl.col("rollout_tokens") * 2).otherwise("rollout_tokens")
    told = summaries.summarise(table.with_columns(rollout_tokens=doubled), spec)
    (c,) = (c for c in told["comparisons"] if c["metric"] == "sampled")
    curves = summaries.curves_of(table, 10)[("chain", "single", "uniform")]
    assert c["differences"] == pytest.approx({s: (0.2 - curve["sampled"][-1]) / 2 for s, curve in curves.items()})


def test_a_cell_that_has_not_come_to_the_end_is_in_no_comparison() -> None:
    table, spec = synthetic({"uniform": 0.0, "bad": 0.0}, seeds=3, noise=0.01)
    cut = table.filter(~((pl.col("arm") == "bad") & (pl.col("seed") == 2) & (pl.col("round") == 10)))
    told = summaries.summarise(cut, spec)
    assert {c["n"] for c in told["comparisons"]} == {2}


# A world in which there is something to learn and to lose, in seconds.


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A teacher that adds one to three digits, and a student that stopped learning it half way."""
    from types import SimpleNamespace

    from fire_data.worlds import successor
    from fire_data.worlds.world import Sizes, fit, make_tokenizer, new_model, one_thread, save, stream

    folder = tmp_path_factory.mktemp("learnt")
    tokenizer, sizes = make_tokenizer(successor.WORDS), Sizes(hidden=32, heads=2, intermediate=64)
    with pytest.MonkeyPatch.context() as patch, one_thread():
        patch.setattr(successor, "LENGTH", 3)
        for name, steps in (("teacher", 150), ("student", 60)):
            model, rng = new_model(tokenizer, sizes, 0), stream(0, name)

            def draw(rng: Any = rng) -> tuple[str, str]:
                problem = successor.make_problem(rng)
                return problem, successor.solution(problem, rng)

            fit(model, tokenizer, draw, sizes, steps, 6e-3, lambda *_: None)
            save(model, tokenizer, folder / name)
        rng = stream(1, "prompts")
        for name in ("prompts", "held_out"):
            problems = [successor.make_problem(rng) for _ in range(64)]
            told = [{"prompt": p, "answer": successor.truth(p), "prompt_id": str(i)} for i, p in enumerate(problems)]
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))
    return SimpleNamespace(
        student=folder / "student", teacher=folder / "teacher", prompts=folder / "prompts.jsonl",
        held_out=folder / "held_out.jsonl",
    )  # fmt: skip


def test_a_rule_that_is_known_to_harm_is_found_worse_on_real_runs(learnt: Any, tmp_path: Path) -> None:
    spec = written(
        tmp_path, learnt, seeds=3, rounds=8, evaluate_every=8, against=["uniform"],
        arms={"uniform": None, "same": {"rule": "uniform"}, "constant-negative": None, "imitation": {
            "rule": {"advantage": "1"}, "config": {"rollout": {"writer": "teacher"}}
        }},
        claims=[
            {"arm": "constant-negative", "holds": "worse", "world": "tiny"},
            {"arm": "same", "holds": "worse", "world": "tiny"},
        ],
        config={
            "threads": 1, "eval": {"n": 2}, "verify": {"pattern": r"#\s*([^#]*?)\s*$"},
            "rollout": {"n": 4, "prompts_per_round": 32, "max_new_tokens": 8},
            "train": {"batch_size": 32, "lr": 1e-3, "export_dtype": "float32"},
        },
    )  # fmt: skip
    told = experiment(spec, tmp_path / "out", jobs=1, only=None, report=Silent())
    assert told["failures"] == {}
    arms = {a["arm"]: a for a in told["arms"]}
    assert arms["uniform"]["sampled"] > arms["uniform"]["start"] + 0.05
    assert arms["imitation"]["sampled"] > arms["uniform"]["start"] + 0.05
    assert arms["constant-negative"]["sampled"] < arms["uniform"]["start"]
    assert [c["verdict"] for c in told["claims"]] == ["supported", "undecided"]
    run = open_run(tmp_path / "out" / "cells" / "tiny" / "single" / "imitation" / "seed-000")
    texts = run.rollouts(0).collect()
    right = texts.select((pl.col("response").str.extract(r"# (.*)$") == pl.col("answer")).mean()).item()
    assert right > 0.85, "the teacher wrote them"
