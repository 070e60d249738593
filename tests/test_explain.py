"""Whatever made a coefficient, its factors are shown, and multiplied they are what is stored."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from typer.testing import CliRunner

from fire_data.cli.app import app
from fire_data.explain import Explanation, explain
from fire_data.rules import RULES, make_rule
from fire_data.run import Run, open_run
from fire_data.schemas.errors import DataError, FingerprintError
from fire_data.schemas.manifest import Shard
from fire_data.schemas.tables import conform
from fire_data.scoring import summarise
from fire_data.session import Session
from fire_data.shards import Part, sealed
from fire_data.stages import Stage, run_stage, set_stage_aside
from fire_data.steps.columns import add_columns
from fire_data.steps.rollout import rollout
from fire_data.steps.score import score
from fire_data.steps.weigh import weigh
from fire_data.tokenview import Piece
from tests.ragged import ragged

from .conftest import Answer, edit_record

MakeRun = Callable[..., Run]
Fire = Callable[..., Answer]

NAMES = sorted(set(RULES) - {"expression"})
ADDED = ("topk", "base", "pass-rate")
LENGTHS = (7, 3, 1, 9, 0, 4, 12, 2, 5, 5, 1, 8, 6, 3, 2, 10)
ROWS = len(LENGTHS)
FEW = (0, 3, 4, 6)  # one that was cut off, an empty response, and the longest


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, make_run: MakeRun) -> Run:
    """A run of the fake engine whose sealed scores, addons included, are those of a ragged table of real numbers."""
    more = {"rollout": {"engine": "fake", "prompts_per_round": 8}, "score": {"engine": "fake", "topk": 3}}
    run = make_run(tmp_path_factory.mktemp("explained") / "run", **more)
    session = Session(run)
    rollout(session, 0)
    score(session, 0)
    for name in ADDED:
        add_columns(session, 0, name)
    table = ragged(ROWS, seed=5, lengths=LENGTHS, topk=3).drop("trajectory_id", "prompt_id", "sample", "teacher")
    finish = pl.Series("finish_reason", ["length" if i % 5 == 3 else "stop" for i in range(ROWS)])
    for part in (run.part("scores", 0), *(run.part("addons", 0, name) for name in ADDED)):
        _refill(part, table.with_columns(finish))
    return run


def _refill(part: Part, table: pl.DataFrame) -> None:
    """Seal a stage again with these columns in place of its own."""
    manifest = sealed(part)
    old = pl.concat([pl.read_parquet(part.file(r.shard)) for r in manifest.shards])
    new = old.with_columns(table[c] for c in table.columns if c in old.columns)
    if part.stage == "scores":
        new = new.drop("length", *(c for c in new.columns if c.endswith(("_sum", "_max"))))
    data = new.to_arrow(compat_level=pl.CompatLevel.oldest())
    data = summarise(data) if part.stage == "scores" else data
    starts = np.cumsum([0, *(r.rows for r in manifest.shards)]).tolist()
    rows = {r.shard: data.slice(start, r.rows) for start, r in zip(starts, manifest.shards, strict=False)}
    set_stage_aside(part)

    def make(shard: Shard) -> pa.Table:
        return conform(rows[shard.name], part.table, "a test")

    run_stage(Stage(part, manifest.fields, manifest.plan, manifest.recorded), make, lambda _: manifest.stats)


def weighed(run: Run, rule: str, name: str, *overrides: str, **params: Any) -> Run:
    """The run with weights called `name`, made by this rule and no other."""
    set_stage_aside(run.part("weights", 0, name))
    values = (f"weigh.rule={json.dumps(rule)}", f"weigh.name={name}", f"weigh.params={json.dumps(params)}", *overrides)
    changed = open_run(run.root, values)
    weigh(changed, 0)
    return changed


def explained(run: Run, name: str, rows: Iterable[int] = range(8)) -> list[Explanation]:
    """Trajectories explained by the run as its file has it; multiplied, the lines of each are what is stored."""
    plain, rows = open_run(run.root), list(rows)
    stored = plain.weights(name, 0).collect()
    found = [explain(plain, 0, str(row), name) for row in rows]
    for one, i in zip(found, rows, strict=True):
        row, shown = stored.row(i, named=True), one.as_dict()
        assert json.loads(json.dumps(shown, allow_nan=False)) == shown
        assert len(shown["tokens"]) == row["length"]
        for token, weight, coefficient in zip(shown["tokens"], row["weight"], row["coefficient"], strict=True):
            assert token["factors"][0]["name"] == "weight"
            assert token["coefficient"] == coefficient
            _require_product(token["factors"], coefficient)
            _require_product(token["weight_factors"] or token["factors"][:1], weight)
            if "fkl_coefficient" in row:
                _require_product(token["fkl_factors"], row["fkl_coefficient"][token["position"]])
            said = [line for part in ("inputs", "terms", "weight_factors", "factors") for line in token[part]]
            assert all(line["source"] and line["formula"] for line in said)
        assert one.facts["keep"] == row["keep"] == all(v.keep for v in one.verdicts)
        if not row["keep"]:
            assert row["drop_reason"] == next(v.reason for v in one.verdicts if not v.keep)
    return found


def _require_product(lines: list[dict[str, Any]], stored: float) -> None:
    assert math.prod(line["value"] for line in lines) == pytest.approx(stored, rel=1e-6, abs=1e-37)


# Products


@pytest.mark.parametrize("name", NAMES)
def test_factors_multiply_to_the_stored_coefficient_for_every_rule(scored: Run, name: str) -> None:
    found = explained(weighed(scored, name, name), name, FEW)
    assert len(found[2]) == 0
    assert [v.reason for v in found[2].verdicts] == ["empty response"]
    assert bool(found[0].fkl_factors) == ("forward KL" in make_rule(name).changes)


COMPOSED: dict[str, dict[str, Any]] = {
    "fire+dial+tanh": {},
    "fire-paper+paced": {"normalise": "round", "normalise_over": "kept"},
    "verified-only+prune-opd+eopd": {},
    "soft-filter+fire-weights+random-tokens": {"normalise": "group"},
    "uni-opd-balance+iw-opd": {"normalise": "trajectory", "normalise_over": "kept"},
}


@pytest.mark.parametrize("rule", COMPOSED)
def test_factors_of_composed_rules_multiply_to_the_stored_coefficient(scored: Run, rule: str) -> None:
    found = explained(weighed(scored, rule, "composed", **COMPOSED[rule]), "composed")
    for one in found:
        filters = {v.by for v in one.verdicts} - {"empty response"}
        assert filters <= {f"rule {name}" for name in rule.split("+")}
        names = [line.name for line in one.token(0).weight_factors] if one.ids else []
        assert len(names) == len(set(names))


POLICIES = [
    ("fire", ("weigh.denominator=all_tokens", "weigh.truncated=drop", "train.batch_size=null")),
    ("fire", ("weigh.denominator=sequences", "weigh.end_token=mask", "weigh.rollout_is_cap=1.5", "weigh.scope=group")),
    ("fire-paper", ("weigh.denominator=constant", "weigh.constant=37", "weigh.scope=round", "train.batch_size=6")),
    ("tip", ("weigh.end_token=mask", "weigh.denominator=sequences", "weigh.rollout_is_cap=5", "train.batch_size=2")),
    ("aopd", ("weigh.end_token=mask", "weigh.truncated=drop", "weigh.rollout_is_cap=2")),
    ("keep = length > 6; weight = 1 + student_entropy * AVG(teacher_entropy); token_keep = position <> 1", ()),
    ("keep = AVG(length) < 1; advantage = teacher_logprob / 2", ("weigh.scope=step", "weigh.denominator=sequences")),
    ("weight = 1 + MAX(student_entropy)", ("weigh.scope=round",)),
    ("ier", ("weigh.params.keep_fraction=0.3", "train.batch_size=null")),
    ("weight = position", ("weigh.truncated=drop", "weigh.end_token=mask", "train.batch_size=2")),
]


@pytest.mark.parametrize(("rule", "overrides"), POLICIES)
def test_factors_multiply_under_every_policy(scored: Run, rule: str, overrides: tuple[str, ...]) -> None:
    masks, drops = "weigh.end_token=mask" in overrides, "weigh.truncated=drop" in overrides
    for one in explained(weighed(scored, rule, "policy", *overrides), "policy"):
        cut = drops and one.facts["finish_reason"] == "length"
        assert any(v.by == "truncated" and not v.keep for v in one.verdicts) == cut
        if one.ids:
            last = {line.name: line.value for line in one.token(len(one) - 1).factors}
            assert last.get("end_token") == (float(one.facts["finish_reason"] == "length") if masks else None)
            assert ("rollout_is" in last) == any("rollout_is_cap" in o for o in overrides)


def test_what_is_normalised_over_is_one_factor_with_its_population(scored: Run) -> None:
    for over in ("all", "kept"):
        for scope, rows in {"trajectory": [0], "group": [0, 1], "step": range(4), "round": range(ROWS)}.items():
            run = weighed(scored, "verified-only+iw-opd", "mean", normalise=scope, normalise_over=over)
            keep = run.weights("mean", 0).collect()["keep"]
            (one,) = explained(run, "mean", [0])
            line = one.token(0).weight_factors[-1]
            counted = sum(LENGTHS[i] for i in rows if over == "all" or keep[i])
            assert line.name == "1 / mean weight"
            assert f" {counted} {'kept ' if over == 'kept' else ''}tokens" in line.formula


@pytest.mark.parametrize("name", NAMES)
def test_named_factors_multiply_to_the_weight(name: str) -> None:
    rule = make_rule(name)
    weight, factors = rule.parts().weight, rule.factors()
    assert bool(factors) == (weight is not None)
    if weight is not None and len(factors) > 1:
        rng = np.random.default_rng(0)
        roots = {r for e in (weight, *factors.values()) for r in e.meta.root_names()}
        frame = pl.DataFrame({r: rng.uniform(0.1, 2, 50) for r in roots})
        products = frame.select(math.prod(factors.values())).to_series()
        np.testing.assert_allclose(products, frame.select(weight).to_series(), rtol=1e-15)


# Words and numbers


def test_fire_is_explained_by_the_numbers_of_its_paper(scored: Run) -> None:
    run = weighed(scored, "fire", "fire", percentile=40)
    step = run.weights("fire", 0).collect().slice(4, 4).filter(pl.col("length") > 0)
    row = step.row(1, named=True)
    (one,) = explained(run, "fire", [6])
    token = one.token(5)
    lines = {line.name: line for line in (*token.inputs, *token.terms, *token.weight_factors, *one.statistics)}
    limits = {who: max(max(x) for x in step[f"{who}_entropy"]) for who in ("teacher", "student")}
    confidence = 1 - row["teacher_entropy"][5] / limits["teacher"]
    confusion = row["student_entropy"][5] / limits["student"]
    means = [np.mean(x) for x in step["teacher_logprob"].to_list()]
    expected = {
        "student_logprob": row["student_logprob"][5],
        "teacher_confidence": confidence,
        "student_confusion": confusion,
        "1 + alpha * teacher_confidence": 1 + confidence,
        "1 + beta * student_confusion": 1 + confusion,
        "teacher_limit": limits["teacher"],
        "threshold": np.quantile(means, 0.4),
    }
    assert {name: lines[name].value for name in expected} == pytest.approx(expected, rel=1e-7)
    assert lines["threshold"].formula == (
        "40 % quantile of teacher_logprob_sum / length over the 3 trajectories of step 1"
    )
    assert lines["threshold"].source == "fire, arXiv 2606.02684, Eq. 4"
    assert lines["1 + beta * student_confusion"].formula == f"1 + 1 * student_confusion = 1 + 1 * {confusion:.4g}"
    advantage = next(line for line in token.factors if line.name == "advantage")
    given = f"{row['teacher_logprob'][5]:.4g} - ({row['student_logprob'][5]:.4g})"
    assert advantage.formula == f"teacher_logprob - student_logprob = {given}"
    kept = sum(x for x, keep in zip(step["length"], step["keep"], strict=True) if keep)
    assert one.denominator == ("denominator", kept, "kept tokens of step 1", "weigh.denominator: tokens")


def test_a_filter_is_explained_by_what_it_compared(scored: Run) -> None:
    run = weighed(scored, "fire+rg-opd", "filters")
    verdicts = [one.verdicts for one in explained(run, "filters") if one.ids]
    for fire, gate in verdicts:
        (compared,) = fire.comparisons
        assert compared.formula == "teacher_logprob_sum / length >= threshold"
        assert fire.keep == compared.holds == (compared.left >= compared.right)
        better, gains, _, loses = gate.comparisons
        assert gate.keep == (better.holds and gains.holds) or (not better.holds and loses.holds)
        for one in gate.comparisons:
            assert one.holds == (one.left > one.right if one.operator == ">" else one.left < one.right)
    assert {v.keep for both in verdicts for v in both} == {True, False}


@pytest.mark.parametrize(
    ("rule", "name", "words"),
    [
        ("tip", "max_reverse_kl", "largest reverse_kl over the tokens of 3 trajectories of step 1"),
        ("tip", "tip", "smallest of the 9 largest scores of tokens of step 1; of equal ones those up to position"),
        (
            "z-score",
            "advantage_std",
            "standard deviation of teacher_logprob - student_logprob over the 18 tokens of step 1",
        ),
        ("paced", "pass_rate", "mean of reward over the 2 trajectories of its prompt"),
        ("uni-opd-balance", "wrong_count", "number of trajectories of its prompt where not reward > 0.5"),
        (
            "cut-at-surprise",
            "first_surprise",
            "smallest position over the tokens of this trajectory where teacher_logprob <",
        ),
        ("fire-robust", "student_limit", "99 % quantile of student_entropy over the 18 tokens of step 1"),
        ("random", "below", "Drop trajectories at random until each step keeps as many tokens as `match` keeps, to"),
    ],
)
def test_a_statistic_says_whom_it_is_about(scored: Run, rule: str, name: str, words: str) -> None:
    (one,) = explained(weighed(scored, rule, "statistic"), "statistic", [6])
    line = next(line for line in one.statistics if line.name == name)
    assert line.formula.startswith(words)
    assert isinstance(line.value, float)


OWN = '''from dataclasses import dataclass
import polars as pl
from fire_data.rules import Parts, Rule, Statistic

@dataclass(frozen=True)
class Sharp(Rule):
    """weight: 1 + gain H_S / its largest value in the step."""
    gain: float = 1.0

    def statistics(self):
        return (Statistic("highest", pl.col("student_entropy"), "max"),)

    def parts(self):
        return Parts(weight=1 + self.gain * pl.col("student_entropy") / pl.col("highest"))
'''


def test_a_rule_of_ones_own_is_explained_by_the_code_that_made_the_weights(
    scored: Run, tmp_path: Path, fire: Fire
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(OWN)
    root, named = scored.root, f"weigh.rule={file}:Sharp"
    weighed(scored, f"{file}:Sharp", "mine", gain=3.0)
    one = explain(open_run(root, (named,)), 0, "0", "mine")
    token = one.token(0).as_dict()
    assert token["weight_factors"][0]["formula"].startswith("1 + 3 * student_entropy / highest = 1 + 3 * ")
    _require_product(token["factors"], token["coefficient"])
    answer = fire("explain", root, "0", "--name", "mine")
    assert answer.code == 2
    assert answer.fix == f"fire explain {root} ... --name mine --set weigh.rule=FILE.py:Class"
    assert fire("explain", root, "0", "--name", "mine", "--set", named).code == 0
    file.write_text(OWN.replace("1 + self.gain", "2 + self.gain"))
    with pytest.raises(FingerprintError, match=r"code\.sharp"):
        explain(open_run(root, (named,)), 0, "0", "mine")


def test_combined_teachers_are_explained_with_the_columns_they_are_made_from(
    tmp_path: Path, make_fake_run: MakeRun, tiny_world: Any
) -> None:
    teachers = {name: {"model": str(tiny_world.teacher)} for name in ("math", "code")}
    run = make_fake_run(tmp_path / "run", teachers=teachers)
    session = Session(run)
    rollout(session, 0)
    score(session, 0)
    for name in run.addon_names:
        if name.startswith("teacher."):
            add_columns(session, 0, name)
    for how in ("average", "confident", "token", "math"):
        values = (f"weigh.teacher={how}", f"weigh.name={how}", "weigh.entropy=any")
        weigh(open_run(run.root, values), 0)
        (one,) = explained(run, how, [2])
        lines = {line.name: line for line in one.token(0).inputs}
        assert lines["teacher_logprob"].source == f"weigh.teacher: {how}"
        assert lines["teacher_logprob.math"].source == "addons/teacher.math"
        assert ("only a lower bound" in lines["teacher_entropy"].formula) == (how == "average")


def test_rewards_are_those_that_the_weights_were_made_from(scored: Run) -> None:
    part, like = scored.part("addons", 0, "reward"), scored.part("addons", 0, "pass-rate")
    set_stage_aside(part)
    weighed(scored, "opdvr", "before")
    (before,) = explained(scored, "before", [0])
    given = {"reward": 1 - pl.col("reward"), "verdict": pl.lit("right")}
    rewards = scored.scores(0).select("trajectory_id", **given).collect().to_arrow()
    manifest = sealed(like)
    first = dict(zip((r.shard for r in manifest.shards), range(0, ROWS, 4), strict=True))

    def make(shard: Shard) -> pa.Table:
        return conform(rewards.slice(first[shard.name], 4), part.table, "a test")

    run_stage(Stage(part, manifest.fields, manifest.plan, {}), make, lambda _: {})
    with pytest.raises(FingerprintError, match=r"addons: .*reward"):
        explain(scored, 0, "0", "before")
    weighed(scored, "opdvr", "after")
    (after,) = explained(scored, "after", [0])
    set_stage_aside(part)
    (old,), (new,) = before.inputs, after.inputs
    assert [(line.name, line.source) for line in (old, new)] == [("reward", "scores"), ("reward", "addons/reward")]
    assert old.value == 1 - new.value


# What cannot be explained


def test_weights_that_are_not_what_their_rule_gives_are_an_error(scored: Run, fire: Fire) -> None:
    run = weighed(scored, "fire", "fire")
    part = run.part("weights", 0, "fire")
    lists = run.weights("fire", 0).collect()["coefficient"].to_list()
    lists[6] = [c * (1 + 3e-6) for c in lists[6]]
    _refill(part, pl.DataFrame({"coefficient": pl.Series(lists, dtype=pl.List(pl.Float32))}))
    answer = fire("explain", run.root, "6")
    assert answer.code == 3
    assert answer.fix == f"fire weigh {run.root} --round 0 --rule fire --redo"
    changed = next(i for i, c in enumerate(lists[6]) if c)
    with pytest.raises(DataError, match=f"coefficient of token {changed}: the factors give"):
        explain(run, 0, "6", "fire")
    explained(run, "fire", [0])


def test_only_sealed_weights_of_the_scores_that_are_there_are_explained(scored: Run, fire: Fire) -> None:
    answer = fire("explain", scored.root, "0", "--name", "fire-robust+esr")
    assert answer.code == 4
    assert answer.fix == f"fire weigh {scored.root} --round 0 --rule fire-robust+esr"
    part = weighed(scored, "clip", "clip").part("weights", 0)
    edit_record(part.manifest_path, sealed(scored.part("scores", 0)).digest, "0")
    with pytest.raises(FingerprintError, match="scores: "):
        explain(scored, 0, "0", "clip")


# The command


@pytest.fixture
def plain(scored: Run) -> Run:
    """The run with the weights that it trains."""
    return weighed(scored, "fire", "fire")


@pytest.mark.parametrize("token", ["7", "x", "-1"])
def test_a_token_that_is_not_there_is_told(plain: Run, fire: Fire, token: str) -> None:
    answer = fire("explain", plain.root, "0", "--", token)
    assert answer.code == 2
    assert answer.fix == "a position from 0 to 6, max or min"
    assert fire("explain", plain.root, "4", "max").fix == "the response is empty"


def test_the_command_shows_what_its_json_holds(plain: Run, fire: Fire) -> None:
    row = plain.weights("fire", 0).collect().row(6, named=True)
    whole = fire("explain", plain.root, row["trajectory_id"][:12], "--json")
    assert whole.code == 0, whole.err
    assert [t["coefficient"] for t in whole.json["tokens"]] == row["coefficient"]
    ends = [fire("explain", plain.root, "6", which, "--json").json["tokens"][0] for which in ("max", "min")]
    assert [t["coefficient"] for t in ends] == [max(row["coefficient"]), min(row["coefficient"])]
    shown = fire("explain", plain.root, "6", str(ends[0]["position"]))
    assert shown.code == 0, shown.err
    for line in (*ends[0]["inputs"], *ends[0]["terms"], *ends[0]["factors"], *whole.json["statistics"]):
        assert re.search(rf"{re.escape(line['name'])} +{re.escape(format(line['value'], '.4g'))}  ", shown.out)
        assert line["source"] in shown.out
    overview = fire("explain", plain.root, "6")
    strongest = max(range(len(row["coefficient"])), key=lambda i: abs(row["coefficient"][i]))
    assert f"{row['coefficient'][strongest]:+.3e}" in overview.out
    assert overview.err.splitlines()[-1] == f"next: fire explain {plain.root} 6 {strongest}"


def test_nothing_is_cropped_in_a_narrow_terminal(plain: Run, fire: Fire) -> None:
    token = fire("explain", plain.root, "6", "0", "--json").json["tokens"][0]
    shown = CliRunner(env={"COLUMNS": "20"}).invoke(app, ["explain", str(plain.root), "6", "0"]).stdout
    for line in (*token["weight_factors"], *token["factors"]):
        assert re.search(rf"{re.escape(line['name'])} +{re.escape(format(line['value'], '.4g'))} ", shown)


def test_a_dropped_trajectory_says_which_filter_dropped_it(scored: Run, fire: Fire) -> None:
    weighed(scored, "uniform+length-guard", "guarded", longest=8)
    shown = fire("explain", scored.root, "6", "--name", "guarded")
    assert shown.code == 0, shown.err
    assert "decision       dropped: longer than the guard allows" in shown.out
    assert "length <= 8: 12 <= 8" in shown.out
    assert shown.err.splitlines()[-1] == f"next: fire inspect {scored.root} 6 --name guarded"


def test_the_largest_of_a_dropped_trajectory_is_what_it_would_have_been(scored: Run, fire: Fire) -> None:
    weighed(scored, "tip+length-guard", "dropped", longest=8)
    stored = scored.weights("dropped", 0).collect().row(6, named=True)
    assert not any(stored["coefficient"])
    would = np.array(stored["weight"]) * np.array(stored["advantage"])
    one = explain(scored, 0, "6", "dropped")
    assert (one.position("max"), one.position("min")) == (would.argmax(), would.argmin())
    assert would.argmax() != 0
    shown = fire("explain", scored.root, "6", "max", "--name", "dropped")
    assert f"token       {would.argmax()} of 12" in shown.out
    assert "largest weight * advantage: every coefficient is 0" in shown.out
    told = fire("explain", scored.root, "6", "min", "--name", "dropped", "--json").json
    assert told["ranked_by"] == "weight * advantage"
    assert told["tokens"][0]["position"] == would.argmin()


def test_the_largest_of_a_kept_trajectory_is_its_largest_coefficient(plain: Run, fire: Fire) -> None:
    stored = plain.weights(round=0).collect().row(6, named=True)
    shown = fire("explain", plain.root, "6", "max")
    assert f"token       {np.argmax(stored['coefficient'])} of" in shown.out
    assert re.search("chosen +largest coefficient\n", shown.out)


def test_a_tokenizer_that_does_not_load_leaves_the_numbers(plain: Run, fire: Fire, tmp_path: Path) -> None:
    answer = fire("explain", plain.root, "6", "0", "--set", f"student.model={tmp_path}")
    assert answer.code == 0
    assert "without their text" in answer.err
    assert "= coefficient" in answer.out


def test_hostile_text_of_a_token_stays_text(plain: Run, fire: Fire, monkeypatch: pytest.MonkeyPatch) -> None:
    def hostile(_: object, ids: list[int]) -> list[Piece]:
        return [Piece("\x1b[31m\u202e[bold]", i, i + 1) for i in range(len(ids))]

    monkeypatch.setattr("fire_data.tokenview.pieces", hostile)
    for arguments in (("6",), ("6", "0")):
        answer = fire("explain", plain.root, *arguments)
        assert answer.code == 0, answer.err
        assert "x1b[31m" in answer.out
        assert "[bold]" in answer.out
        assert not {"\x1b", "\u202e"} & {*answer.out}
