"""Filters keep exactly the trajectories their formulas keep, at every scope and at every edge of the data."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import polars as pl
import pytest

import fire_data as fd
from fire_data.schemas.errors import ConfigError
from tests.ragged import Row, check, edge_cases, populations, ragged, rows_of, together

EDGES = edge_cases()
ALL = together(EDGES)  # every edge case, in steps of its own
ROWS = rows_of(ALL)
ALONE = ("one trajectory of one token", "all equal", "ties", "all wrong", "all right", "empty responses")
SCOPES = ("trajectory", "group", "step", "round")


def _mean(values: np.ndarray) -> float:
    return math.fsum(values) / len(values) if len(values) else math.nan


def _kept(frame: pl.DataFrame, rule: str, **params: object) -> list[bool]:
    return fd.weigh(frame, rule, **params).collect()["keep"].to_list()


def test_verified_only_and_failure_only_split_by_the_outcome() -> None:
    right = [row["reward"] > 0.5 for row in ROWS]
    check(ALL, "verified-only", keep=right)
    check(ALL, "failure-only", keep=[not r for r in right])
    check(ALL, "verified-only", outcome="wrong", keep=[not r for r in right])


def test_a_reward_of_one_half_is_not_right() -> None:
    frame = ragged(5, 1, reward=[0.0, 0.25, 0.5, 0.75, 1.0])
    check(frame, "verified-only", keep=[False, False, False, True, True])
    check(frame, "failure-only", keep=[True, True, True, False, False])


def _agrees(row: Row) -> bool:
    return (2 * row["reward"] - 1) * _mean(row["teacher_logprob"] - row["student_logprob"]) >= 0


def test_ra_opd_keeps_what_the_return_and_the_verifier_agree_on() -> None:
    check(ALL, "ra-opd", keep=[bool(_agrees(r)) for r in ROWS])


def test_ra_opd_keeps_a_return_of_zero_whatever_the_verifier_says() -> None:
    swapped = {"student_logprob": [[-1.0, -2.5]] * 2, "teacher_logprob": [[-2.5, -1.0]] * 2}
    check(ragged(2, lengths=[2, 2], reward=[0.0, 1.0], **swapped), "ra-opd", keep=[True, True])


def _gated(rows: list[Row], delta: float, outcome_advantage: str) -> list[bool]:
    keep = [False] * len(rows)
    for members in populations(rows, "group"):
        mean = sum(rows[i]["reward"] for i in members) / len(members)
        for i in members:
            advantage = rows[i]["reward"] - (mean if outcome_advantage == "group" else 0.5)
            student, teacher = (math.fsum(rows[i][f"{who}_logprob"]) for who in ("student", "teacher"))
            likelier, unlikelier = teacher > student + delta, teacher < student - delta
            keep[i] = likelier if advantage > 0 else unlikelier
    return keep


@pytest.mark.parametrize("outcome_advantage", ["reward", "group"])
def test_rg_opd_keeps_what_moves_likelihood_with_the_outcome(outcome_advantage: str) -> None:
    for delta in (0.0, 1.5):
        keep = _gated(ROWS, delta, outcome_advantage)
        check(ALL, "rg-opd", delta=delta, outcome_advantage=outcome_advantage, keep=keep)


def test_rg_opd_compares_with_the_group_unless_told_otherwise() -> None:
    frame = ragged(40, 3, n=4)
    rows = rows_of(frame)
    assert _gated(rows, 0.0, "group") != _gated(rows, 0.0, "reward")
    check(frame, "rg-opd", keep=_gated(rows, 0.0, "group"))


@pytest.mark.parametrize("scope", ["group", "step", "round"])
@pytest.mark.parametrize("case", ["all together", *ALONE])
def test_uni_opd_balance_leaves_as_many_right_as_wrong(case: str, scope: str) -> None:
    frame = EDGES.get(case, ALL)
    keep, rows = _kept(frame, "uni-opd-balance", scope=scope), rows_of(frame)
    for members in populations(rows, scope):
        right, wrong = ([i for i in members if (rows[i]["reward"] > 0.5) is side] for side in (True, False))
        fewer = min(len(right), len(wrong))
        expected = (fewer, fewer) if fewer else (len(right), len(wrong))
        assert (sum(keep[i] for i in right), sum(keep[i] for i in wrong)) == expected
    check(frame, "uni-opd-balance", scope=scope, keep=keep)


def test_uni_opd_balance_balances_groups_by_default_and_depends_on_seed_and_identity_alone() -> None:
    frame = ragged(48, 5, n=8)
    default, groups, steps, again, other = (
        _kept(frame, "uni-opd-balance", **p) for p in ({}, {"scope": "group"}, {"scope": "step"}, {}, {"seed": 1})
    )
    assert default == groups == again
    assert default not in (steps, other)
    renewed = ragged(48, 6, n=8, trajectory_id=frame["trajectory_id"].to_list(), reward=frame["reward"].to_list())
    assert _kept(renewed, "uni-opd-balance") == default
    order = np.random.default_rng(0).permutation(48)
    assert _kept(frame[order.tolist()], "uni-opd-balance") == [default[i] for i in order]


def test_uni_opd_balance_may_remove_every_member_of_the_larger_class() -> None:
    prompts = 60
    frame = ragged(6 * prompts, 7, longest=2, n=6, reward=[1.0, 1.0, 1.0, 1.0, 0.0, 0.0] * prompts)
    keep = _kept(frame, "uni-opd-balance")
    removed = Counter(i % 6 for i, k in enumerate(keep) if not k)
    assert sum(removed.values()) == 2 * prompts
    assert all(15 <= removed[i] <= 45 for i in range(4))  # binomial(60, 1/2): 30 expected, 3.9 the standard deviation


def test_random_drops_in_an_order_of_its_own_and_comes_nearest_to_the_budget() -> None:
    frame, order = ragged(60, 12, longest=30), np.random.default_rng(1).permutation(60)
    lengths = np.array([row["length"] for row in rows_of(frame)])
    kept = {}
    for percentile in (20.0, 50.0, 80.0):
        target = lengths[_kept(frame, "fire", percentile=percentile)].sum()
        keep = kept[percentile] = _kept(frame, "random", match_params={"percentile": percentile})
        assert abs(lengths[keep].sum() - target) <= lengths.max() / 2
        again = _kept(frame[order.tolist()], "random", match_params={"percentile": percentile})
        assert again == [keep[i] for i in order]
    assert sum(kept[20.0]) > sum(kept[50.0]) > sum(kept[80.0]) > 0
    nested = zip(kept[80.0], kept[50.0], kept[20.0], strict=True)
    assert all(hard <= middle <= soft for hard, middle, soft in nested)
    check(ALL, "random", keep=_kept(ALL, "random"))


def test_tgopd_asks_whether_the_teacher_can_do_the_prompt() -> None:
    for least, thirds in ((None, 2), (2 / 3, 2), (1 / 3, 1), (0.5, 2), (1.0, 3), (0.0, 0)):
        keep = [round(3 * row["teacher_pass_rate"]) >= thirds for row in ROWS]
        params = {} if least is None else {"least": least}
        check(ALL, "tgopd", keep=keep, **params)


def test_tgopd_does_not_drop_for_the_rounding_of_a_stored_pass_rate() -> None:
    rates = [0.6, 0.7, 0.8, 0.9]  # of ten tries; in single precision 0.7 and 0.9 lie below 0.7 and 0.9
    frame = ragged(4, n=1, teacher_pass_rate=rates)
    for least in rates:
        check(frame, "tgopd", least=least, keep=[rate >= least for rate in rates])


def _not_too_long(rows: list[Row], percentile: float, longest: int | None, scope: str) -> list[bool]:
    keep = [False] * len(rows)
    for members in populations(rows, scope):
        limit = np.quantile([rows[i]["length"] for i in members], percentile / 100)
        for i in members:
            keep[i] = rows[i]["length"] <= limit and (longest is None or rows[i]["length"] <= longest)
    return [bool(k) for k in keep]


@pytest.mark.parametrize("scope", SCOPES)
def test_length_guard_drops_the_longest_of_its_scope(scope: str) -> None:
    for percentile, longest in ((95.0, None), (60.0, None), (100.0, 4), (50.0, 3)):
        keep = _not_too_long(ROWS, percentile, longest, scope)
        check(ALL, "length-guard", keep=keep, percentile=percentile, longest=longest, scope=scope)


def test_length_guard_drops_above_the_95_percent_quantile_of_the_step_by_default() -> None:
    frame = ragged(60, 8, longest=200)
    for batch in (20, None):
        rows = rows_of(frame)
        keep = [True] * 60
        for members in populations(rows, "step", batch):
            limit = np.quantile([rows[i]["length"] for i in members], 0.95)
            for i in members:
                keep[i] = bool(rows[i]["length"] <= limit)
        assert not all(keep)
        check(frame, "length-guard", batch_size=batch, keep=keep)


def _repeats(ids: np.ndarray, n: int) -> float:
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _looping() -> pl.DataFrame:
    """Responses between no repetition and nothing else, short ones among them."""
    rng = np.random.default_rng(9)
    ids = [[7] * 12, [1, 2, 3] * 6, list(range(20)), [5], [5, 5, 5], [5] * 4, [5] * 5, [1, 2] * 3, [1, 2] * 4]
    ids += [rng.integers(0, k, size).tolist() for k, size in itertools.product((1, 2, 3, 6), (4, 9, 33))]
    return ragged(len(ids), 9, lengths=[len(x) for x in ids], response_ids=ids)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
def test_repetition_guard_counts_repeated_ngrams(n: int) -> None:
    frame = _looping()
    for most in (0.0, 0.25, 0.8):
        keep = [_repeats(row["response_ids"], n) <= most for row in rows_of(frame)]
        check(frame, "repetition-guard", batch_size=4, n=n, most=most, keep=keep)


def test_repetition_guard_looks_at_four_tokens_and_allows_one_half_by_default() -> None:
    for frame in (ALL, _looping()):
        check(frame, "repetition-guard", keep=[_repeats(row["response_ids"], 4) <= 0.5 for row in rows_of(frame)])


def _prompts_above(rows: list[Row], of: str, percentile: float, scope: str) -> list[bool]:
    score = {}
    for members in populations(rows, "group"):
        means = [_mean(rows[i]["teacher_logprob"]) for i in members]
        score[rows[members[0]]["prompt_id"]] = max(means) if of == "best" else float(np.median(means))
    keep = [False] * len(rows)
    for members in populations(rows, scope):
        prompts = dict.fromkeys(rows[i]["prompt_id"] for i in members)
        threshold = np.quantile([score[p] for p in prompts], percentile / 100)
        for i in members:
            keep[i] = bool(score[rows[i]["prompt_id"]] >= threshold)
    return keep


@pytest.mark.parametrize("scope", ["step", "round"])
@pytest.mark.parametrize("of", ["best", "median"])
def test_prompt_gate_drops_whole_prompts_by_their_best_or_median_sample(scope: str, of: str) -> None:
    for percentile in (0.0, 20.0, 62.5, 100.0):
        keep = _prompts_above(ROWS, of, percentile, scope)
        check(ALL, "prompt-gate", keep=keep, of=of, percentile=percentile, scope=scope)
    assert _kept(ALL, "prompt-gate") == _prompts_above(ROWS, "best", 20.0, "step")


@pytest.mark.parametrize("case", ALONE)
def test_quantiles_of_a_degenerate_round(case: str) -> None:
    rows = rows_of(EDGES[case])
    check(EDGES[case], "length-guard", scope="round", keep=_not_too_long(rows, 95.0, None, "round"))
    check(EDGES[case], "prompt-gate", scope="round", keep=_prompts_above(rows, "best", 20.0, "round"))


def test_prompt_gate_counts_a_prompt_once_however_many_samples_it_has() -> None:
    samples = ["a"] * 8 + ["b", "c", "d", "e"]
    means = [-9.0, -8.0, *[-7.0] * 6, -1.0, -2.0, -3.0, -4.0]
    frame = ragged(12, 1, lengths=[2] * 12, prompt_id=samples, teacher_logprob=[[m, m] for m in means])
    check(frame, "prompt-gate", keep=[p != "a" for p in samples])
    check(frame, "prompt-gate", percentile=40.0, keep=[p not in "ae" for p in samples])


@pytest.mark.parametrize(
    ("rule", "params"),
    [
        ("verified-only", {"outcome": "both"}),
        ("rg-opd", {"outcome_advantage": "step"}),
        ("uni-opd-balance", {"scope": "trajectory"}),
        ("prompt-gate", {"scope": "group"}),
        ("prompt-gate", {"of": "worst"}),
        ("prompt-gate", {"percentile": 101.0}),
        ("length-guard", {"percentile": -1.0}),
        ("length-guard", {"longest": -3}),
        ("repetition-guard", {"n": 0}),
        ("repetition-guard", {"most": 1.5}),
        ("tgopd", {"least": 1.5}),
    ],
)
def test_filters_refuse_parameters_that_mean_nothing(rule: str, params: dict) -> None:
    with pytest.raises(ConfigError, match=rule):
        fd.weigh(ragged(8, 1), rule, **params).collect()


@pytest.mark.parametrize("rule", ["verified-only", "ra-opd", "rg-opd", "uni-opd-balance", "tgopd", "prompt-gate"])
def test_a_step_in_which_a_filter_keeps_nothing_has_no_coefficients(rule: str) -> None:
    frame = ragged(8, 2, reward=0.0, teacher_pass_rate=0.0, teacher_logprob=-1.0, student_logprob=-2.0)
    expected = rule in ("uni-opd-balance", "prompt-gate")
    mine = check(frame, rule, batch_size=4, keep=[expected] * 8)
    assert any(c for row in mine["coefficient"].to_list() for c in row) == expected
