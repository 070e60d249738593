"""The comparison's numbers are those counted by hand from the weights; what cannot be computed is told, not fatal."""

from __future__ import annotations

import itertools
import math
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import fire_data as fd
from fire_data import weighing
from fire_data.compare import COLUMNS, DEFAULT, PLACES, Asked, Tally, late_from, parse_rules, plot
from fire_data.prepare import Pieces, Weighing, prepare
from fire_data.rules import make_rule
from fire_data.run import Run
from fire_data.schemas.errors import ConfigError
from fire_data.steps.compare import compare, write_plot

from .conftest import Answer, flip, shard_files
from .ragged import ragged

Fire = Callable[..., Answer]
MakeRun = Callable[..., Run]

BATCH = 8
RULES = ("uniform", "fire", "random", "tip", "verified-only", "constant-negative", "sign", "ier", "eopd", "repeat")
SPECS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in RULES},
    "few": ("tip", {"keep_fraction": 0.01}),
    "repeat": ("repetition-guard", {"n": 1, "most": 0.4}),
    "fire again": ("fire", {"percentile": 20.0}),
}


def scored(rows: int = 40, **options: Any) -> pl.DataFrame:
    return ragged(rows, 5, longest=40, n=4, topk=4, **options)


def tallied(frame: pl.DataFrame, names: Sequence[str], size: int | None = None, late: int | None = None) -> Tally:
    """The tally over shards of `size` trajectories."""
    lengths = frame["student_logprob"].list.len()
    tally = Tally(names, int(lengths.sum()), late_from(lengths) if late is None else late)
    works = {n: Weighing(make_rule(*SPECS[n]), BATCH) for n in names}
    tables = {n: Pieces(prepare(frame.lazy(), w), size) for n, w in works.items()}
    fitted = {n: weighing.fit(tables[n], w) for n, w in works.items()}
    for i in range(len(tables[names[0]])):
        shard = tables[names[0]].read(range(i, i + 1), COLUMNS)
        tally.add(shard, ((n, weighing.apply(tables[n], i, works[n], fitted[n])) for n in names))
    return tally


def flat(column: pl.Series) -> np.ndarray:
    return np.array([x for row in column.to_list() for x in row], dtype=np.float64)


def repetition(ids: Sequence[int]) -> float | None:
    grams = Counter(tuple(ids[i : i + 4]) for i in range(len(ids) - 3))
    return 1 - len(grams) / grams.total() if grams else None


def ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def by_hand(frame: pl.DataFrame, name: str, late: int) -> dict[str, Any]:
    """The numbers of a rule from `fd.weigh` on the whole table, with plain numpy."""
    rule, params = SPECS[name]
    weighed = fd.weigh(frame, rule, batch_size=BATCH, **params).collect()
    length = frame["response_ids"].list.len().to_numpy()
    n = int(length.sum())
    keep = weighed["keep"].to_numpy()
    mask = flat(weighed["token_keep"]) if "token_keep" in weighed.columns else np.ones(n)
    counted = (np.repeat(keep, length) * mask).astype(bool)
    c, w = flat(weighed["coefficient"]), flat(weighed["weight"])[counted]
    size, total = np.abs(c), float(np.abs(c).sum())
    position = np.concatenate([np.arange(x) for x in length])
    stopped = np.repeat((frame["finish_reason"] == "stop").to_numpy(), length)
    unlikely = [flat(frame[f"{who}_logprob"]) <= math.log(0.01) for who in ("student", "teacher")]
    places = {"low-low": unlikely[0] & unlikely[1]}
    places["last"] = stopped & (position == np.repeat(length - 1, length))
    places["late"] = position >= late
    kept_repeats = [
        r for ids, k in zip(frame["response_ids"], keep, strict=True) if k and (r := repetition(ids)) is not None
    ]
    right = frame["reward"].to_numpy() > 0.5
    fkl = flat(weighed["fkl_coefficient"]) if "fkl_coefficient" in weighed.columns else np.zeros(n)
    return {
        "rule": name,
        "kept_trajectories": int(keep.sum()),
        "kept_fraction": keep.mean(),
        "kept_tokens": int(counted.sum()),
        "kept_token_fraction": counted.mean(),
        "nonzero_tokens": int((c != 0).sum()),
        "nonzero_fraction": (c != 0).mean(),
        "mean_weight": w.mean(),
        "effective_sample_share": w.sum() ** 2 / (w**2).sum() / w.size,
        "effective_signal_share": ratio(total**2, float((c**2).sum() * n)),
        "signal": total,
        "signal_in_top": ratio(np.sort(size)[::-1][: math.ceil(0.01 * n)].sum(), total),
        "signal_positive": ratio(c[c > 0].sum(), total),
        "signal_in": {k: ratio(size[at].sum(), total) for k, at in places.items()},
        "length": length[keep].mean(),
        "repetition": np.mean(kept_repeats),
        "kept_right": keep[right].mean(),
        "kept_wrong": keep[~right].mean(),
        "forward_kl_tokens": (fkl > 0).mean(),
    }


def approx(value: Any) -> Any:
    return value if isinstance(value, str) or value is None else pytest.approx(value, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("name", [*RULES, "fire again"])
def test_the_numbers_of_a_rule_are_those_counted_by_hand(name: str) -> None:
    frame = scored(spread=4.0)
    (found,) = tallied(frame, [name], size=7).result()["rules"]
    expected = by_hand(frame, name, late_from(frame["response_ids"].list.len()))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        same = {k: approx(v) for k, v in value.items()} if isinstance(value, dict) else approx(value)
        assert found[key] == same, key


def test_the_numbers_of_the_table_are_those_counted_by_hand() -> None:
    frame = scored(spread=4.0)
    found = tallied(frame, ["uniform"], size=9).result()
    length = frame["response_ids"].list.len()
    repeats = [r for ids in frame["response_ids"] if (r := repetition(ids)) is not None]
    assert (found["trajectories"], found["tokens"]) == (frame.height, length.sum())
    assert found["length"] == approx(length.mean())
    assert found["repetition"] == approx(np.mean(repeats))
    assert found["right"] == approx((frame["reward"] > 0.5).mean())
    ended = (frame["finish_reason"] == "stop").sum()
    assert found["places"]["last"]["tokens"] == approx(ended / length.sum())


def test_agreement_is_that_counted_by_hand() -> None:
    frame, names = scored(spread=4.0), ["uniform", "fire", "random", "tip", "verified-only", "few"]
    found = tallied(frame, names, size=7).result()["agreement"]
    assert found["rules"] == names
    weighed = {n: fd.weigh(frame, SPECS[n][0], batch_size=BATCH, **SPECS[n][1]).collect() for n in names}
    keep = {n: w["keep"].to_numpy() for n, w in weighed.items()}
    c = {n: flat(w["coefficient"]) for n, w in weighed.items()}
    most = math.ceil(0.05 * c["fire"].size)
    top = {n: {int(i) for i in np.argsort(-np.abs(x))[:most] if x[i]} for n, x in c.items()}
    for (i, a), (j, b) in itertools.product(enumerate(names), repeat=2):
        assert found["kept"][i][j] == approx((keep[a] & keep[b]).sum() / (keep[a] | keep[b]).sum())
        assert found["correlation"][i][j] == pytest.approx(np.corrcoef(c[a], c[b])[0, 1], abs=1e-9)
        assert found["top"][i][j] == approx(len(top[a] & top[b]) / max(len(top[a]), len(top[b])))


def test_the_comparison_does_not_depend_on_the_size_of_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = scored(spread=4.0)

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, list):
            return [plain(v) for v in value]
        return float(f"{value:.9g}") if isinstance(value, float) else value

    whole = plain(tallied(frame, RULES).result())
    for size in (1, 7, 16):
        assert plain(tallied(frame, RULES, size=size).result()) == whole, size
    monkeypatch.setattr("fire_data.compare.tally._BLOCK", 50)
    assert plain(tallied(frame, RULES, size=16).result()) == whole


def test_equal_rules_agree_wholly_and_are_known_to_be_equal() -> None:
    names = ["fire", "fire again", *(n for n in RULES if n not in ("fire", "constant-negative"))]
    tally = tallied(scored(), names, size=6)
    found = tally.result()
    assert tally.same("fire", "fire again")
    assert not tally.same("fire", "uniform")
    for measure in ("kept", "correlation", "top"):
        assert [found["agreement"][measure][i][j] for i in (0, 1) for j in (0, 1)] == [1.0] * 4
    assert all(found["agreement"]["correlation"][i][i] == 1.0 for i in range(len(names)))
    one, other = ({**r, "rule": ""} for r in found["rules"][:2])
    assert one == other


def test_a_second_stream_makes_another_rule_of_equal_coefficients() -> None:
    tally = tallied(scored(spread=4.0), ["uniform", "eopd"], size=6)
    plain, second = tally.result()["rules"]
    assert (plain["signal"], plain["forward_kl_tokens"]) == (second["signal"], 0)
    assert second["forward_kl_tokens"] > 0
    assert not tally.same("uniform", "eopd")


def test_a_constant_coefficient_correlates_with_nothing_and_shares_its_largest_tokens_by_chance() -> None:
    frame = ragged(400, 3, lengths=[40] * 400, bank=50)
    tally = tallied(frame.with_columns(step=pl.lit(0)), ["uniform", "constant-negative"], size=90)
    found = tally.result()["agreement"]
    assert found["correlation"][1] == [None, None]
    assert found["top"][0][1] == pytest.approx(0.05, abs=0.03)
    assert found["top"][1][1] == 1.0


def test_a_rule_that_falls_out_leaves_the_others_as_they_are() -> None:
    frame = scored()
    whole = tallied(frame, ["uniform", "fire", "sign"], size=10)
    expected = whole.result(["uniform", "sign"])
    names = ["uniform", "fire", "sign"]
    part = Tally(names, int(frame["response_ids"].list.len().sum()), whole.late)
    works = {n: Weighing(make_rule(n), BATCH) for n in names}
    table = Pieces(prepare(frame.lazy(), works["fire"]), 10)
    for i in range(len(table)):
        present = [n for n in names if n != "fire" or i == 0]
        weights = [(n, weighing.apply(table, i, works[n], weighing.fit(table, works[n]))) for n in present]
        part.add(table.read(range(i, i + 1), COLUMNS), weights)
    assert part.result() == expected


def test_tables_without_tokens_rewards_or_signal_have_no_numbers_where_there_are_none() -> None:
    silent = ragged(8, 1, student_logprob=-0.5, teacher_logprob=-0.5, reward=None, finish_reason="length")
    found = tallied(silent, ["uniform", "fire"]).result()
    assert found["right"] is None
    for told in found["rules"]:
        assert told["signal"] == 0
        for key in ("effective_signal_share", "signal_in_top", "signal_positive", "kept_right", "kept_wrong"):
            assert told[key] is None
        assert told["signal_in"] == dict.fromkeys(PLACES)
    assert found["agreement"]["top"] == [[None, None]] * 2
    empty = tallied(ragged(4, 1, lengths=[0, 0, 0, 0]), ["uniform", "fire"]).result()
    assert empty["tokens"] == 0
    assert empty["rules"][0]["kept_fraction"] == 0
    assert empty["places"]["late"]["tokens"] is None


@pytest.mark.parametrize(
    ("lengths", "late"), [([4, 4], 3), ([1], 1), ([10], 8), ([1, 1, 1, 100], 75), ([0, 8], 6), ([0], 0)]
)
def test_late_positions_are_those_after_three_quarters_of_the_tokens(lengths: list[int], late: int) -> None:
    assert late_from(pl.Series(lengths, dtype=pl.Int32)) == late


# --- what is asked for ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "rule", "params", "options"),
    [
        ("fire", "fire", {}, ()),
        (" fire[ percentile = 30 ] ", "fire", {"percentile": 30}, ("percentile=30",)),
        ("a[x=1,y=[1, 2]]", "a", {"x": 1, "y": [1, 2]}, ("x=1", "y=[1, 2]")),
        ("a[x='1,2']", "a", {"x": "1,2"}, ("x='1,2'",)),
        ("a[x=null,y=true,z=none]", "a", {"x": None, "y": True, "z": "none"}, ("x=null", "y=true", "z=none")),
        ("a+b", "a+b", {}, ()),
        ("a[p=1]+b[p=2]", "a+b", {"a.p": 1, "b.p": 2}, ("a.p=1", "b.p=2")),
        ("a+b[a.p=1,normalise=none]", "a+b", {"a.p": 1, "normalise": "none"}, ("a.p=1", "normalise=none")),
        ("./a/x+y.py:Sharp[p=1e+2]", "./a/x+y.py:Sharp", {"p": "1e+2"}, ("p=1e+2",)),
        ("weight = teacher_entropy.clip(0, 1); keep = length > 3", None, {}, ()),
    ],
)
def test_a_rule_is_read_with_its_parameters(
    text: str, rule: str | None, params: dict[str, Any] | None, options: tuple[str, ...]
) -> None:
    before, asked, after = parse_rules(f"uniform,{text}, random")
    assert (before, after) == (Asked("uniform", "uniform"), Asked("random", "random"))
    assert asked.rule == (text if rule is None else rule)
    assert asked.options == options
    assert asked.label == " ".join(text.split())
    if params is not None:
        assert asked.params == params


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "there is no name"),
        ("fire,,uniform", "no name beside a comma"),
        ("fire,", "no name beside a comma"),
        ("fire[percentile=30", "']' is missing"),
        ("fire]percentile=30[", "']' closes nothing"),
        ("fire[percentile=30)", "')' closes nothing"),
        ("fire[percentile='30]", "is missing at the end"),
        ("fire[percentile]", "'percentile' is no parameter"),
        ("fire[=30]", "'=30' is no parameter"),
        ("fire[percentile=]", "'percentile=' is no parameter"),
        ("fire[]", "is no parameter"),
        ("fire[percentile=30]x", "'x' follows the brackets"),
        ("fire[percentile=30,percentile=40]", "'percentile' is there twice"),
        ("fire,uniform,fire", "'fire' is there twice"),
        ("fire[percentile={]", "closes nothing"),
        ("fire[percentile=a: b: c]", "not valid YAML"),
    ],
)
def test_what_cannot_be_read_says_so(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)) as raised:
        parse_rules(text)
    assert raised.value.fix


# --- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fake(make_run: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose first round was rolled out and scored by the fake engine, in three shards."""
    from fire_data.session import Session
    from fire_data.stages import Silent
    from fire_data.steps.rollout import rollout
    from fire_data.steps.score import score

    sections: dict[str, Any] = {"rollout": {"engine": "fake", "verifier": "exact"}, "score": {"engine": "fake"}}
    run = make_run(tmp_path_factory.mktemp("compare") / "run", **sections)
    session = Session(run, Silent())
    rollout(session, 0)
    score(session, 0)
    return run


def by_rule(found: dict[str, Any]) -> dict[str, Any]:
    return {r["rule"]: r for r in found["rules"]}


def test_the_command_compares_the_default_rules_and_writes_nothing(fake: Run, fire: Fire) -> None:
    before = sorted(fake.root.rglob("*"))
    answer = fire("compare", fake.root, "--json")
    assert answer.code == 0, answer.err
    assert list(by_rule(answer.json)) == DEFAULT.split(",") == answer.json["agreement"]["rules"]
    assert answer.json["round"] == 0
    assert answer.json["not_computable"] == []
    assert sorted(fake.root.rglob("*")) == before
    assert answer.err.strip().splitlines()[-1] == f"next: fire weigh {fake.root} --round 0 --rule fire"
    assert answer.json["next"] == f"fire weigh {fake.root} --round 0 --rule fire"


def test_five_rules_fit_a_terminal_of_120_columns(fake: Run, fire: Fire) -> None:
    answer = fire("compare", fake.root)
    assert answer.code == 0
    assert max(len(line.rstrip()) for line in answer.out.splitlines()) <= 120
    for name in DEFAULT.split(","):
        assert name in answer.out
    assert "inert: its filter drops nothing (fire-released)" in answer.out


def test_inert_stale_and_equal_rules_are_flagged(fake: Run) -> None:
    rules = "fire,fire-released,fire-filter,fire[percentile=20.0],uniform,failure-only"
    told = by_rule(compare(fake, 0, rules))
    assert ",".join(told) == rules
    assert told["fire-released"]["flags"]["inert"] == "its filter drops nothing"
    assert {k: sorted(t["flags"]) for k, t in told.items()} == {
        "fire": ["stale"],
        "fire-released": ["inert", "stale"],
        "fire-filter": [],
        "fire[percentile=20.0]": ["same", "stale"],
        "uniform": [],
        "failure-only": ["inert"],
    }
    assert told["failure-only"]["flags"]["inert"] == "every coefficient is that of uniform, bit for bit"
    assert "that of fire, bit" in told["fire[percentile=20.0]"]["flags"]["same"]


def test_a_missing_column_is_told_with_its_command_and_does_not_stop_the_others(fake: Run, fire: Fire) -> None:
    answer = fire("compare", fake.root, "--rules", "exopd,fire,ta-opd,verified-only,uniform", "--json")
    assert answer.code == 0
    assert list(by_rule(answer.json)) == ["fire", "verified-only", "uniform"]
    without = fire("compare", fake.root, "--rules", "fire,verified-only,uniform", "--json").json
    assert {**answer.json, "not_computable": []} == without
    lost = {lost["rule"]: lost for lost in answer.json["not_computable"]}
    assert list(lost) == ["exopd", "ta-opd"]
    assert "'base_logprob'" in lost["exopd"]["why"]
    assert lost["exopd"]["fix"].startswith(f"fire score {fake.root}")
    assert lost["exopd"]["fix"].endswith("--add base")
    assert "--add topk" in lost["ta-opd"]["fix"]
    shown = fire("compare", fake.root, "--rules", "exopd,uniform,fire")
    assert "exopd cannot be computed" in shown.out
    assert lost["exopd"]["fix"] in shown.out
    alone = fire("compare", fake.root, "--rules", "exopd")
    assert alone.code == 4
    assert alone.fix == lost["exopd"]["fix"]


def test_a_rule_that_fails_on_a_later_shard_is_told_and_the_others_are_as_without_it(fake: Run, tmp_path: Path) -> None:
    identity = fake.scores(0).select("trajectory_id").collect()["trajectory_id"][-1]
    file = tmp_path / "bad.py"
    file.write_text(
        "from dataclasses import dataclass\nimport polars as pl\nfrom fire_data.rules import Parts, Rule\n"
        "@dataclass(frozen=True)\nclass Bad(Rule):\n    def parts(self):\n"
        f"        return Parts(weight=pl.when(pl.col('trajectory_id') == {identity!r}).then(-1.0).otherwise(1.0))\n"
    )
    found = compare(fake, 0, f"fire,{file}:Bad,random")
    (lost,) = found["not_computable"]
    assert lost["rule"] == f"{file}:Bad"
    assert "weight is negative" in lost["why"]
    without = compare(fake, 0, "fire,random")
    assert (found["rules"], found["agreement"]) == (without["rules"], without["agreement"])


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ("fire,unifrom", "did you mean 'uniform'"),
        ("fire[percentil=3]", "did you mean 'percentile'"),
        ("fire[percentile=much]", "percentile"),
        ("fire[percentile=30", "']' is missing"),
        ("nowhere.py:Rule,fire", "cannot be read"),
    ],
)
def test_a_rule_that_does_not_exist_ends_the_comparison(fake: Run, fire: Fire, rules: str, words: str) -> None:
    answer = fire("compare", fake.root, "--rules", rules)
    assert answer.code == 2
    assert words in answer.err
    assert answer.out == ""
    assert answer.fix


def test_the_policies_of_the_configuration_hold_for_every_rule(fake: Run, fire: Fire) -> None:
    options = ("--set", "weigh.truncated=drop", "--set", "weigh.denominator=all_tokens")
    answer = fire("compare", fake.root, "--rules", "tip,uniform", "--json", *options)
    scores = fake.scores(0).select("finish_reason", "length").collect()
    stopped = scores.filter(pl.col("finish_reason") == "stop")
    assert 0 < stopped.height < scores.height
    told = by_rule(answer.json)
    assert told["uniform"]["kept_trajectories"] == told["tip"]["kept_trajectories"] == stopped.height
    assert {t["denominator"] for t in told.values()} == {"all_tokens"}
    assert answer.json["policies"]["truncated"] == "drop"
    assert "inert" not in told["uniform"]["flags"]
    assert answer.json["next"].endswith("--rule tip --denominator all_tokens")


def test_the_runs_own_rule_has_the_parameters_it_has_there(fake: Run, fire: Fire) -> None:
    own = ("--set", "weigh.params.percentile=60")
    told = by_rule(fire("compare", fake.root, "--rules", "fire,fire-filter,fire[alpha=2]", "--json", *own).json)
    assert told["fire"]["parameters"]["percentile"] == 60
    assert (told["fire[alpha=2]"]["parameters"]["percentile"], told["fire[alpha=2]"]["parameters"]["alpha"]) == (60, 2)
    assert told["fire-filter"]["parameters"]["percentile"] == 20


@pytest.mark.parametrize(
    "rules", ["uniform,fire[percentile=30]", "tip+fire-filter[percentile=50]", "uniform,fire-released,sign"]
)
def test_the_next_command_makes_the_weights_that_were_compared(
    make_fake_run: MakeRun, tmp_path: Path, fire: Fire, rules: str
) -> None:
    run = make_fake_run(tmp_path / "a run")
    assert fire("rollout", run.root).code == fire("score", run.root).code == fire("weigh", run.root).code == 0
    found = fire("compare", run.root, "--rules", rules, "--json").json
    words = shlex.split(found["next"])
    assert words[:2] == ["fire", "weigh"]
    answer = fire(*words[1:], "--json")
    assert answer.code == 0, answer.err
    told = by_rule(found)[rules.split(",")[-1]]
    for key in ("kept_trajectories", "kept_tokens", "nonzero_tokens", "effective_sample_share"):
        assert answer.json[key] == told[key]


def test_late_positions_can_be_declared(fake: Run, fire: Fire) -> None:
    found = fire("compare", fake.root, "--rules", "uniform", "--late", 0, "--json").json
    assert found["places"]["late"]["from"] == 0
    assert found["places"]["late"]["tokens"] == 1
    assert found["rules"][0]["signal_in"]["late"] == pytest.approx(1)


def test_a_run_without_scores_says_what_to_do(make_fake_run: MakeRun, tmp_path: Path, fire: Fire) -> None:
    run = make_fake_run(tmp_path / "run")
    answer = fire("compare", run.root)
    assert answer.code == 4
    assert answer.fix == f"fire score {run.root} --round 0"


def test_damaged_scores_are_not_compared(make_fake_run: MakeRun, tmp_path: Path, fire: Fire) -> None:
    run = make_fake_run(tmp_path / "run")
    assert fire("rollout", run.root).code == fire("score", run.root).code == 0
    flip(shard_files(run.part("scores", 0))[1], 4000)
    answer = fire("compare", run.root)
    assert answer.code == 3
    assert answer.out == ""


def test_the_comparison_loads_no_model(fake: Run) -> None:
    script = (
        f"import sys; sys.argv = {['fire', 'compare', str(fake.root), '--json']!r}\n"
        "from fire_data.cli import main\n"
        "try: main()\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "print('LOADED', sorted({'torch', 'transformers', 'scipy', 'altair'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.rpartition("LOADED ")[2].strip() == "[]"


# --- the figure ----------------------------------------------------------------------------------------------------


def test_the_figure_names_every_rule(fake: Run, fire: Fire, tmp_path: Path) -> None:
    target = tmp_path / "plots" / "rules.svg"
    answer = fire("compare", fake.root, "--plot", target)
    assert answer.code == 0, answer.err
    assert f"plot: {target}" in answer.err
    drawn = target.read_text(encoding="utf-8")
    assert drawn.startswith("<svg")
    assert "<script" not in drawn
    for name in DEFAULT.split(","):
        assert f">{name}<" in drawn
    assert fire("compare", fake.root, "--plot", target.with_suffix(".png")).code == 0
    assert target.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_rules_without_any_signal_are_drawn(tmp_path: Path) -> None:
    silent = ragged(8, 1, student_logprob=-0.5, teacher_logprob=-0.5)
    found = tallied(silent, ["uniform", "fire"]).result()
    for told in found["rules"]:
        told["flags"] = {}
    assert plot.svg({"round": 0, **found}).startswith("<svg")


def test_another_suffix_or_a_missing_package_is_told_before_anything_is_computed(
    fake: Run, fire: Fire, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = fire("compare", fake.root, "--plot", tmp_path / "rules.pdf")
    assert answer.code == 2
    assert answer.fix == f"--plot {tmp_path / 'rules.svg'}"
    with pytest.raises(ConfigError, match=r"is \.svg or \.png"):
        write_plot({}, tmp_path / "rules.pdf")
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    answer = fire("compare", fake.root, "--plot", tmp_path / "rules.svg")
    assert answer.code == 2
    assert answer.fix == "pip install 'fire-opd[report]'"
    assert answer.out == ""
    assert not (tmp_path / "rules.svg").exists()


def test_names_beside_forty_points_do_not_overlap() -> None:
    rng = np.random.default_rng(0)
    points = [(500.0, float(y)) for y in rng.uniform(300, 500, 25)]
    points += [(float(x), float(y)) for x, y in rng.uniform(0, 600, (15, 2))]
    names = [f"rule-{'x' * int(rng.integers(0, 14))}" for _ in points]
    places = zip(plot.beside(points, names, 640, 640), names, strict=True)
    boxes = [plot._box(*at, len(name) * plot._LETTER / 2) for at, name in places]
    for a, b in itertools.combinations(boxes, 2):
        assert plot._overlap(a, b) == 0
    for x0, y0, x1, y1 in boxes:
        assert 0 <= x0 <= x1 <= 640
        assert 0 <= y0 <= y1 <= 640
        assert not any(x0 < x < x1 and y0 < y < y1 for x, y in points)
