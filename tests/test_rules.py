"""Rules compute what their papers say: parity with the reference code, scopes, denominators, controls, expressions."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

import fire_data as fd
from fire_data import prepare, summary, weighing
from fire_data.loss import surrogate_loss
from fire_data.prepare import Weighing
from fire_data.rules import RULES, Expression, describe_rule, make_rule
from fire_data.schemas.errors import ConfigError, DataError

GOLDEN = pl.read_parquet(Path(__file__).parent / "golden" / "fire_reference.parquet")
CASES = GOLDEN["case"].unique(maintain_order=True).to_list()
DENOMINATORS = {"token-mean": "tokens", "seq-mean-token-mean": "sequences"}


def _reference(case: str, rule: str = "fire") -> tuple[pl.DataFrame, pl.DataFrame]:
    frame = GOLDEN.filter(pl.col("case") == case)
    first = frame.row(0, named=True)
    settings = {k: first[k] for k in ("alpha", "beta", "percentile")}
    return frame, fd.weigh(frame, rule, denominator=DENOMINATORS[first["loss_agg"]], **settings).collect()


def _flat(column: pl.Series) -> np.ndarray:
    return np.concatenate([np.asarray(x, dtype=np.float64) for x in column.to_list()])


@pytest.mark.parametrize("case", CASES)
def test_fire_equals_the_papers_code(case: str) -> None:
    frame, mine = _reference(case)
    assert mine["keep"].to_list() == frame["expected_keep"].to_list()
    np.testing.assert_allclose(_flat(mine["weight"]), _flat(frame["expected_weight"]), rtol=1e-5)
    kept = np.repeat(frame["expected_keep"].to_numpy(), frame["student_logprob"].list.len())
    weighted = _flat(mine["weight"]) * _flat(mine["advantage"]) * kept
    np.testing.assert_allclose(weighted, _flat(frame["expected_weighted_advantage"]), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_of_the_coefficients_equal_the_papers_code(case: str) -> None:
    frame, mine = _reference(case)
    now = torch.tensor(_flat(frame["student_logprob_now"]), requires_grad=True)
    old, coefficient = (torch.tensor(_flat(s)) for s in (frame["student_logprob"], mine["coefficient"]))
    loss = surrogate_loss(now, old, coefficient, frame["clip_ratio"][0])
    loss.backward()
    expected = _flat(frame["expected_grad"])
    assert loss.item() == pytest.approx(frame["expected_loss"][0], rel=1e-5)
    np.testing.assert_allclose(now.grad.numpy(), expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("case", CASES[::4])
def test_fire_released_keeps_everything(case: str) -> None:
    _, mine = _reference(case, "fire-released")
    assert mine["keep"].all()


def test_fire_released_drops_nothing_even_at_the_90_percent_quantile() -> None:
    assert fd.weigh(GOLDEN.head(200), "fire-released", percentile=90).collect()["keep"].all()


@pytest.mark.parametrize(("n", "dropped"), [(1, 0), (2, 1), (5, 1), (6, 1), (8, 2), (16, 3), (1024, 205)])
def test_number_dropped_is_that_of_a_linear_quantile(n: int, dropped: int) -> None:
    frame = _random_frame(n, seed=n)
    assert (~fd.weigh(frame, "fire").collect()["keep"]).sum() == dropped


def _random_frame(rows: int, seed: int = 0, longest: int = 9) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest, rows)

    def column(low: float, high: float) -> list[list[float]]:
        return [rng.uniform(low, high, n).tolist() for n in lengths]

    return pl.DataFrame(
        {
            "trajectory_id": [f"t{i}" for i in range(rows)],
            "prompt_id": [f"p{i // 2}" for i in range(rows)],
            "teacher": [("math", "code")[i % 2] for i in range(rows)],
            "finish_reason": [("stop", "length")[i % 3 == 0] for i in range(rows)],
            "reward": rng.integers(0, 2, rows).astype(float),
            "student_logprob": column(-4, 0),
            "teacher_logprob": column(-5, 0),
            "student_entropy": column(0, 2),
            "teacher_entropy": column(0, 1.5),
            "rollout_logprob": column(-4, 0),
        }
    )


def _naive_fire(frame: pl.DataFrame, populations: dict[str, list[list[int]]], p: float, a: float, b: float) -> dict:
    """FiRe by hand with explicit populations (lists of rows) per statistic."""
    rows = frame.to_dicts()
    score = [np.mean(r["teacher_logprob"]) for r in rows]
    keep, weight = [False] * len(rows), [np.array([])] * len(rows)
    limits = [(0.0, 0.0)] * len(rows)
    for members in populations["max"]:
        most = tuple(max(max(rows[i][f"{w}_entropy"]) for i in members) for w in ("teacher", "student"))
        for i in members:
            limits[i] = most
    for i, r in enumerate(rows):
        confident = 1 - np.array(r["teacher_entropy"]) / limits[i][0]
        confused = np.array(r["student_entropy"]) / limits[i][1]
        weight[i] = (1 + a * confident) * (1 + b * confused)
    raw = list(weight)
    for members in populations["mean"]:
        mean = np.concatenate([raw[i] for i in members]).mean()
        for i in members:
            weight[i] = raw[i] / mean
    for members in populations["filter"]:
        threshold = np.quantile([score[i] for i in members], p / 100)
        for i in members:
            keep[i] = bool(score[i] >= threshold)
    return {"keep": keep, "weight": weight}


@pytest.mark.parametrize(
    ("filter_scope", "max_scope", "mean_scope", "by"),
    [(*scopes, None) for scopes in [*itertools.product(("trajectory", "group", "step", "round"), repeat=3)][::5]]
    + [("step", "step", "step", "teacher"), ("round", "step", "trajectory", "teacher")],
)
def test_every_scope_means_its_population(filter_scope: str, max_scope: str, mean_scope: str, by: str | None) -> None:
    frame = _random_frame(24, seed=3)
    keys = {
        "trajectory": list(range(24)),
        "group": [i // 2 for i in range(24)],
        "step": [i // 8 for i in range(24)],
        "round": [0] * 24,
    }

    def populations(scope: str) -> list[list[int]]:
        named = list(zip(keys[scope], frame["teacher"].to_list() if by else [None] * 24, strict=True))
        return [[i for i, x in enumerate(named) if x == key] for key in dict.fromkeys(named)]

    scopes = {"filter": filter_scope, "max": max_scope, "mean": mean_scope}
    expected = _naive_fire(frame, {k: populations(s) for k, s in scopes.items()}, 30, 1.5, 0.5)
    mine = fd.weigh(
        frame,
        "fire",
        batch_size=8,
        percentile=30,
        alpha=1.5,
        beta=0.5,
        by=by,
        **{f"{k}_scope": v for k, v in scopes.items()},
    ).collect()
    assert mine["keep"].to_list() == expected["keep"]
    np.testing.assert_allclose(_flat(mine["weight"]), np.concatenate(expected["weight"]), rtol=1e-6)


def test_scope_sets_all_scopes_of_a_rule() -> None:
    rule = make_rule("fire", scope="round")
    assert (rule.filter_scope, rule.max_scope, rule.mean_scope) == ("round", "round", "round")


@pytest.mark.parametrize("denominator", ["tokens", "all_tokens", "sequences", "constant"])
def test_coefficient_is_weight_times_advantage_over_the_declared_denominator(denominator: str) -> None:
    frame = _random_frame(20, seed=5)
    mine = fd.weigh(frame, "fire", batch_size=7, denominator=denominator, constant=50.0).collect()
    for step in range(3):
        part = mine.filter(pl.col("step") == step)
        lengths, keep = part["student_logprob"].list.len().to_numpy(), part["keep"].to_numpy()
        per_row = {
            "tokens": np.full(len(part), lengths[keep].sum()),
            "all_tokens": np.full(len(part), lengths.sum()),
            "sequences": keep.sum() * lengths,
            "constant": np.full(len(part), 50.0),
        }[denominator]
        for row, kept, divisor in zip(part.iter_rows(named=True), keep, per_row, strict=True):
            expected = np.array(row["weight"]) * np.array(row["advantage"]) * kept / divisor
            np.testing.assert_allclose(row["coefficient"], expected, rtol=1e-5, atol=1e-9)
    assert mine["step"].to_list() == [i // 7 for i in range(20)]


def test_uniform_coefficients_sum_to_the_mean_advantage() -> None:
    mine = fd.weigh(_random_frame(12), "uniform").collect()
    assert _flat(mine["coefficient"]).sum() == pytest.approx(_flat(mine["advantage"]).mean(), rel=1e-5)


def test_random_keeps_as_many_tokens_as_the_matched_rule_within_one_trajectory() -> None:
    frame = _random_frame(60, seed=9, longest=30)
    for seed in range(5):
        fire = fd.weigh(frame, "fire", batch_size=20).collect()
        mine = fd.weigh(frame, "random", batch_size=20, seed=seed).collect()
        longest = frame["student_logprob"].list.len().max()
        for step in range(3):
            kept = [
                f.filter(pl.col("step") == step, pl.col("keep"))["student_logprob"].list.len().sum()
                for f in (fire, mine)
            ]
            assert abs(kept[0] - kept[1]) <= longest
        assert (mine["keep"] != fire["keep"]).any()
        assert set(_flat(mine["weight"])) == {1.0}


def test_random_depends_on_seed_and_trajectory_alone() -> None:
    frame = _random_frame(40, seed=2)
    keep = [fd.weigh(frame, "random", seed=s).collect()["keep"].to_list() for s in (0, 0, 1)]
    assert keep[0] == keep[1] != keep[2]


def test_truncated_policy_drops_cut_trajectories_with_a_reason_and_shrinks_the_denominator() -> None:
    frame = _random_frame(9)
    mine = fd.weigh(frame, "uniform", truncated="drop").collect()
    assert mine["keep"].to_list() == [r == "stop" for r in frame["finish_reason"]]
    assert set(mine.filter(~pl.col("keep"))["drop_reason"]) == {"truncated by max_new_tokens"}
    lengths = mine.filter("keep")["student_logprob"].list.len().sum()
    row = mine.filter("keep").row(0, named=True)
    np.testing.assert_allclose(np.array(row["coefficient"]) * lengths, row["advantage"], rtol=1e-5)


def test_rollout_correction_is_capped_and_enters_the_coefficient() -> None:
    frame = _random_frame(6, seed=1)
    mine = fd.weigh(frame, "uniform", rollout_is_cap=1.5).collect()
    ratio = np.minimum(np.exp(_flat(frame["student_logprob"]) - _flat(frame["rollout_logprob"])), 1.5)
    np.testing.assert_allclose(_flat(mine["rollout_is"]), ratio, rtol=1e-6)
    tokens = len(ratio)
    np.testing.assert_allclose(_flat(mine["coefficient"]), ratio * _flat(mine["advantage"]) / tokens, rtol=1e-5)


def test_expression_weights_tokens_and_keeps_trajectories() -> None:
    frame = _random_frame(10)
    text = "weight = 1 + teacher_entropy; keep = reward > 0.5; token_keep = student_logprob < -1"
    mine = fd.weigh(frame, text).collect()
    assert mine["keep"].to_list() == [r > 0.5 for r in frame["reward"]]
    np.testing.assert_allclose(_flat(mine["weight"]), 1 + _flat(frame["teacher_entropy"]), rtol=1e-6)
    mask = _flat(frame["student_logprob"]) < -1
    kept = np.repeat(mine["keep"].to_numpy(), frame["student_logprob"].list.len())
    advantage = _flat(frame["teacher_logprob"]) - _flat(frame["student_logprob"])
    expected = (1 + _flat(frame["teacher_entropy"])) * advantage * mask * kept / (mask & kept).sum()
    np.testing.assert_allclose(_flat(mine["coefficient"]), expected, rtol=1e-5, atol=1e-9)


def test_expression_aggregates_are_over_its_scope_and_normalisation_gives_mean_one() -> None:
    frame = _random_frame(12, seed=4)
    rule = {"weight": "teacher_entropy / MAX(teacher_entropy)"}
    for scope, groups in (("trajectory", 12), ("step", 3), ("round", 1)):
        mine = fd.weigh(frame, rule, batch_size=4, scope=scope, normalise="none").collect()
        peaks = [x for x in _flat(mine["weight"]) if math.isclose(x, 1.0)]
        assert len(peaks) == groups
    mine = fd.weigh(frame, rule, batch_size=4, normalise="step").collect()
    for step in range(3):
        assert _flat(mine.filter(pl.col("step") == step)["weight"]).mean() == pytest.approx(1.0, rel=1e-6)


def test_expression_takes_polars_expressions_from_python() -> None:
    frame = _random_frame(5)
    rule = Expression(weight=pl.col("student_entropy").clip(0.5, 1.0))
    np.testing.assert_allclose(
        _flat(fd.weigh(frame, rule).collect()["weight"]), np.clip(_flat(frame["student_entropy"]), 0.5, 1.0), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("rule", "params", "message"),
    [
        ("fier", {}, "did you mean .*'fire'"),
        ("fire", {"percentil": 3}, "did you mean 'percentile'"),
        ("fire", {"percentile": 101}, "between 0 and 100"),
        ("fire", {"percentile": "many"}, "percentile"),
        ("weight = 1 +", {}, "not a valid expression"),
        ("weight = nosuch * 2", {}, "unknown column 'nosuch'"),
        ("weight = teacher_entrop", {}, "did you mean 'teacher_entropy'"),
        ("volume = 3", {}, "cannot read"),
    ],
)
def test_wrong_rules_are_refused_with_a_hint(rule: str, params: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fd.weigh(_random_frame(4), rule, **params).collect()


def test_missing_column_names_the_command_that_adds_it() -> None:
    with pytest.raises(ConfigError, match="'teacher_entropy'") as caught:
        fd.weigh(_random_frame(4).drop("teacher_entropy"), "fire")
    assert "fire score" in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
def test_values_that_are_not_finite_never_reach_a_weight(value: float | None) -> None:
    frame = _random_frame(4)
    lists = frame["teacher_logprob"].to_list()
    lists[2][0] = value
    with pytest.raises(DataError, match="not finite") as caught:
        fd.weigh(frame.with_columns(teacher_logprob=pl.Series(lists)), "fire")
    assert "row 2" in str(caught.value)


def test_lists_of_unequal_length_are_refused() -> None:
    frame = _random_frame(4, seed=8)
    lists = frame["teacher_entropy"].to_list()
    lists[1] = [*lists[1], 0.5]
    with pytest.raises(DataError, match="teacher_entropy") as caught:
        fd.weigh(frame.with_columns(teacher_entropy=pl.Series(lists)), "fire")
    assert "row 1" in str(caught.value)


def test_empty_response_is_dropped_and_disturbs_nothing() -> None:
    frame = _random_frame(8, seed=6)
    empty = {c: [] for c in frame.columns if frame.schema[c] == pl.List(pl.Float64)}
    row = frame.row(0, named=True) | empty | {"trajectory_id": "empty"}
    both = pl.concat([frame, pl.DataFrame([row], schema=frame.schema)])
    alone, mine = fd.weigh(frame, "fire").collect(), fd.weigh(both, "fire").collect()
    assert mine["keep"].to_list() == [*alone["keep"].to_list(), False]
    assert mine["drop_reason"][-1] == "empty response"
    assert _flat(mine["coefficient"][:8]).tolist() == _flat(alone["coefficient"]).tolist()
    assert mine["coefficient"][-1].to_list() == []


def test_step_in_which_nothing_is_kept_has_zero_coefficients() -> None:
    frame = _random_frame(8)
    mine = fd.weigh(frame, {"keep": "length < 0"}, batch_size=4).collect()
    assert not mine["keep"].any()
    assert set(_flat(mine["coefficient"])) == {0.0}


@pytest.mark.parametrize("rule", ["fire", "fire-paper", "random", "uniform", "weight = 1 + teacher_entropy"])
def test_weights_do_not_depend_on_how_rows_are_cut_into_shards(rule: str) -> None:
    frame = _random_frame(30, seed=7).with_columns(sample=pl.Series([i % 2 for i in range(30)], dtype=pl.Int32))
    weighing_ = Weighing(make_rule(rule), batch_size=8, samples_per_group=2)
    prepared = prepare.prepare(frame.lazy(), weighing_)
    expected = _weighed(prepare.Pieces(prepared), weighing_)
    for size in (2, 6, 10):
        assert _weighed(prepare.Pieces(prepared, size), weighing_).equals(expected)


def _weighed(table: prepare.Table, weighing_: Weighing) -> pl.DataFrame:
    fitted = weighing.fit(table, weighing_)
    fitted = weighing.Fitted(json.loads(json.dumps(fitted.stats)), json.loads(json.dumps(fitted.steps)))
    return pl.concat([weighing.apply(table, i, weighing_, fitted) for i in range(len(table))])


def test_statistics_are_the_same_bits_every_time() -> None:
    frame = _random_frame(3000, seed=11, longest=40)
    rule = Weighing(make_rule("fire", scope="round"))
    table = prepare.Pieces(prepare.prepare(frame.lazy(), rule), 1000)
    found = {json.dumps(weighing.fit(table, rule).stats) for _ in range(5)}
    assert len(found) == 1


def test_group_rule_refuses_a_batch_that_splits_groups() -> None:
    with pytest.raises(ConfigError, match="splits the 4 samples"):
        Weighing(make_rule("fire", scope="group"), batch_size=6, samples_per_group=4)


def test_summary_reports_effective_sample_size_and_drops() -> None:
    mine = fd.weigh(_random_frame(40, seed=12), "fire").collect()
    stats = summary.merge_summaries([summary.summarise(mine, mine["weight"].list.len())])
    rows = mine.filter("keep")
    weights = _flat(rows["weight"])
    assert stats["n_dropped"] == 40 - len(rows)
    assert stats["effective_sample_share"] == pytest.approx(weights.sum() ** 2 / (weights**2).sum() / len(weights))
    assert stats["mean_weight"] == pytest.approx(weights.mean())
    assert stats["weight_max"] == pytest.approx(weights.max())


@pytest.mark.parametrize("name", sorted(RULES))
def test_every_rule_describes_itself(name: str) -> None:
    described = describe_rule(name)
    assert described["formula"]
    assert described["believes"]
    assert described["scope"]
    assert json.dumps(described, default=str)


def test_explode_gives_one_row_per_token_with_every_number() -> None:
    frame = fd.weigh(_random_frame(6), "fire")
    tokens = fd.explode(frame).collect()
    assert len(tokens) == frame.collect()["weight"].list.len().sum()
    first = tokens.filter(pl.col("trajectory_id") == "t3")
    assert first["position"].to_list() == list(range(len(first)))
    assert first["weight"].to_list() == frame.collect().row(3, named=True)["weight"]


@pytest.mark.parametrize(
    ("match", "policies"),
    [
        ("fire", {"truncated": "drop"}),
        ("fire", {"end_token": "mask"}),
        ("token_keep = student_logprob < -1", {}),
        ("token_keep = student_logprob < -1; keep = reward > 0.5", {"truncated": "drop", "end_token": "mask"}),
    ],
)
def test_random_matches_what_the_other_rule_trains_under_every_policy(match: str, policies: dict) -> None:
    frame = _random_frame(60, seed=13, longest=20)
    other = fd.weigh(frame, match, batch_size=20, **policies).collect()
    mine = fd.weigh(frame, "random", batch_size=20, match=match, **policies).collect()
    for step in range(3):
        trained = [sum(map(len, _active(f.filter(pl.col("step") == step)))) for f in (other, mine)]
        assert abs(trained[0] - trained[1]) <= 20


def _active(frame: pl.DataFrame) -> list[list[float]]:
    """Per kept trajectory the coefficients of the tokens that are not masked."""
    rows = frame.filter("keep").to_dicts()
    masks = [r.get("token_keep") or [True] * len(r["weight"]) for r in rows]
    return [[c for c, m in zip(r["coefficient"], mask, strict=True) if m] for r, mask in zip(rows, masks, strict=True)]


def test_random_needs_what_the_rule_it_matches_needs() -> None:
    with pytest.raises(ConfigError, match="'teacher_entropy'"):
        fd.weigh(_random_frame(4).drop("teacher_entropy"), "random")
    with pytest.raises(ConfigError, match="splits the 4 samples"):
        Weighing(make_rule("random", {"match_params": {"filter_scope": "group"}}), batch_size=6, samples_per_group=4)


def test_end_token_can_be_left_out_of_the_loss() -> None:
    frame = _random_frame(9, seed=14)
    mine = fd.weigh(frame, "uniform", end_token="mask").collect()
    lengths, stopped = frame["student_logprob"].list.len(), frame["finish_reason"] == "stop"
    counted = (lengths - stopped.cast(pl.UInt32)).sum()
    for row, ended in zip(mine.iter_rows(named=True), stopped, strict=True):
        expected = np.array(row["advantage"]) / counted
        expected[-1] *= not ended
        np.testing.assert_allclose(row["coefficient"], expected, rtol=1e-5)


def test_sums_that_a_frame_carries_are_not_trusted_over_its_tokens() -> None:
    frame = _random_frame(10, seed=15)
    stale = frame.with_columns(teacher_logprob_sum=pl.lit(-1.0), length=pl.lit(3), teacher_entropy_max=pl.lit(9.0))
    fresh, mine = fd.weigh(frame, "fire").collect(), fd.weigh(stale, "fire").collect()
    assert mine["keep"].to_list() == fresh["keep"].to_list()
    assert _flat(mine["weight"]).tolist() == _flat(fresh["weight"]).tolist()
    assert mine["length"].to_list() == [3] * 10, "the frame's own columns come back as they were"
    assert set(fresh.columns) - set(frame.columns) == {
        "step", "keep", "drop_reason", "weight", "advantage", "coefficient",
    }  # fmt: skip


@pytest.mark.parametrize("rule", ["weight = LN(teacher_entropy - 100)", "weight = 1 / (student_entropy * 0)"])
def test_an_expression_that_is_not_finite_is_refused(rule: str) -> None:
    with pytest.raises(DataError, match="not finite"):
        fd.weigh(_random_frame(4), rule)


@pytest.mark.parametrize(
    "rule",
    ["keep = teacher_entropy > 0.5", "keep = AVG(teacher_logprob) > -5", "weight = 'a'", "keep = finish_reason + 1",
     "keep = (SELECT 1)", "weight = finish_reason"],
)  # fmt: skip
def test_an_expression_that_cannot_be_computed_says_what_it_sees(rule: str) -> None:
    with pytest.raises(ConfigError) as caught:
        fd.weigh(_random_frame(4), rule).collect()
    assert rule.partition(" =")[0] in str(caught.value)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("weight = MAX(student_entropy) OVER (PARTITION BY prompt_id)", "window of its own"),
        ("keep = reward > 1; keep = reward > 0", "there twice"),
        ("keep = position > 3", "unknown column 'position'"),
        ("weight = LEAST()", "not a valid expression|cannot be computed"),
    ],
)
def test_an_expression_that_would_not_mean_what_it_says_is_refused(rule: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        fd.weigh(_random_frame(4), rule)


def test_a_semicolon_in_quotes_belongs_to_the_expression() -> None:
    frame = _random_frame(9)
    mine = fd.weigh(frame, "keep = finish_reason IN ('stop', 'a;b'); weight = 2").collect()
    assert mine["keep"].to_list() == [r == "stop" for r in frame["finish_reason"]]
    assert set(_flat(mine["weight"])) == {2.0}


def test_what_does_not_count_is_plus_zero() -> None:
    mine = fd.weigh(_random_frame(20, seed=3), "esr", tokens=2).collect()
    coefficients = _flat(mine["coefficient"])
    assert (coefficients == 0).any()
    assert not np.signbit(coefficients[coefficients == 0]).any()


@pytest.mark.parametrize("option", [{"denominator": "token"}, {"truncated": "dropp"}, {"end_token": "x"}])
def test_a_policy_that_does_not_exist_is_refused(option: dict) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(option))} is one of"):
        fd.weigh(_random_frame(4), "uniform", **option)


def test_a_frame_without_rows_is_told() -> None:
    with pytest.raises(DataError, match="no rows"):
        fd.weigh(_random_frame(4).head(0), "uniform")


def test_the_name_expression_alone_is_no_rule() -> None:
    with pytest.raises(ConfigError, match="needs one of"):
        make_rule("expression")
