"""Token masks keep exactly the tokens their formulas keep: budgets, ties, scopes and the edges of the data."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

import fire_data as fd
from fire_data.schemas.errors import ConfigError
from tests.ragged import Lists, Row, check, edge_cases, populations, ragged, rows_of, together

EDGES = edge_cases()
ALL = together(EDGES)  # every edge case, in steps of its own
ROWS = rows_of(ALL)
ALONE = ("one trajectory of one token", "all equal", "ties", "certain", "student agrees with the teacher")
SCOPES = ("trajectory", "group", "step", "round")


def _advantage(row: Row) -> np.ndarray:
    return row["teacher_logprob"] - row["student_logprob"]


def _masks(rows: list[Row]) -> Lists:
    return [np.zeros(row["length"], dtype=bool) for row in rows]


def _share(fraction: float, n: int) -> Fraction:
    """fraction * n without the rounding of floating point."""
    return Fraction(str(fraction)) * n


def _mark_best(masks: Lists, rows: list[Row], tokens: list[tuple[float, int, int]], count: int) -> None:
    """Mark the `count` (score, row, position) of largest score; ties: earlier position, then smaller trajectory_id."""
    ranked = sorted(tokens, key=lambda x: (-x[0], x[2], rows[x[1]]["trajectory_id"]))
    for _, i, t in ranked[:count]:
        masks[i][t] = True


def _tip(rows: list[Row], fraction: float, scope: str) -> Lists:
    masks = _masks(rows)
    for members in populations(rows, scope):
        bounds = {}
        for name in ("student_entropy", "reverse_kl"):
            values = [x for i in members for x in rows[i][name]]
            bounds[name] = (min(values), max(values))

        def scaled(name: str, i: int, t: int, bounds: dict = bounds) -> float:
            low, high = bounds[name]
            return (rows[i][name][t] - low) / (high - low) if high > low else 0.0

        tokens = []
        for i in members:
            for t in range(rows[i]["length"]):
                h, d = scaled("student_entropy", i, t), scaled("reverse_kl", i, t)
                tokens.append((1 - (1 - h) * (1 - d), i, t))
        _mark_best(masks, rows, tokens, math.ceil(_share(fraction, len(tokens))))
    return masks


@pytest.mark.parametrize("scope", SCOPES)
def test_tip_keeps_uncertain_or_divergent_tokens(scope: str) -> None:
    for fraction in (0.5, 0.07, 1.0):
        check(ALL, "tip", keep_fraction=fraction, scope=scope, token_keep=_tip(ROWS, fraction, scope))


def test_tip_keeps_half_of_the_step_by_default() -> None:
    frame = ragged(16, 21, longest=20)
    masks = [mask for start in range(0, 16, 4) for mask in _tip(rows_of(frame[start : start + 4]), 0.5, "round")]
    check(frame, "tip", batch_size=4, token_keep=masks)


@pytest.mark.parametrize("flat", ["student_entropy", "reverse_kl"])
def test_tip_goes_by_the_other_signal_where_one_is_the_same_everywhere(flat: str) -> None:
    frame = ragged(8, 30, **{flat: 0.5})
    rows = rows_of(frame)
    other = "reverse_kl" if flat == "student_entropy" else "student_entropy"
    middle = np.sort(np.concatenate([row[other] for row in rows]))[::-1]
    least = middle[math.ceil(len(middle) / 2) - 1]
    check(frame, "tip", token_keep=[row[other] >= least for row in rows])


def _dial(rows: list[Row], beta: float, fraction: float, last_token: str = "never") -> Lists:
    masks = _masks(rows)
    for i, row in enumerate(rows):
        p, q, gap = np.exp(row["student_logprob"]), np.exp(row["teacher_logprob"]), np.abs(_advantage(row))
        tokens = []
        for t in range(row["length"]):
            last = t == row["length"] - 1 and row["finish_reason"] == "stop"
            if last and last_token == "never":
                continue
            # L(p, q)^beta |D| with L = (q - p) / D; both are 0 where the models agree.
            score = float(gap[t] ** (1 - beta) * abs(q[t] - p[t]) ** beta) if gap[t] else 0.0
            tokens.append((score, i, t))
        _mark_best(masks, rows, tokens, max(1, round(_share(fraction, len(tokens)))))
    return masks


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 1.2])
def test_dial_keeps_the_largest_probability_gaps_of_each_response(beta: float) -> None:
    for last_token, fraction in (("never", 0.4), ("eligible", 0.1), ("eligible", 0.25), ("never", 1.0)):
        masks = _dial(ROWS, beta, fraction, last_token)
        check(ALL, "dial", beta=beta, keep_fraction=fraction, last_token=last_token, token_keep=masks)


def test_dial_and_reward_top_as_published() -> None:
    check(ALL, "dial", token_keep=_dial(ROWS, 1.0, 0.4))
    check(ALL, "reward-top", token_keep=_dial(ROWS, 0.0, 0.4))


@pytest.mark.parametrize("beta", [0.0, 1.0, 1.2])
def test_dial_takes_tokens_on_which_the_models_agree_last(beta: float) -> None:
    student, teacher = [-1.0, -2.0, -0.5, -3.0, -0.1], [-1.0, -2.5, -0.5, -2.0, -0.1]
    frame = ragged(1, lengths=[5], student_logprob=[student], teacher_logprob=[teacher], finish_reason="length")
    check(frame, "dial", beta=beta, token_keep=[[False, True, False, True, False]])


def test_dial_rounds_half_to_even() -> None:
    frame = ragged(6, 22, lengths=[5, 15, 25, 1, 2, 3], finish_reason="length")
    mine = check(frame, "dial", keep_fraction=0.1, token_keep=_dial(rows_of(frame), 1.0, 0.1))
    assert [sum(x) for x in mine["token_keep"].to_list()] == [1, 2, 2, 1, 1, 1]


def test_a_response_of_one_last_token_leaves_dial_nothing() -> None:
    frame = ragged(3, 23, n=1, lengths=[1, 1, 4], finish_reason=["stop", "length", "stop"])
    for divisor in ("tokens", "sequences"):
        mine = check(frame, "dial", token_keep=_dial(rows_of(frame), 1.0, 0.4), denominator=divisor, divisor=divisor)
        assert [sum(x) for x in mine["token_keep"].to_list()] == [0, 1, 1]


def _prefix(row: Row, tokens: int | None, fraction: float | None) -> list[bool]:
    return [
        (tokens is None or t < tokens)
        and (fraction is None or Fraction(t + 1, row["length"]) <= Fraction(str(fraction)))
        for t in range(row["length"])
    ]


def test_prefix_rules_keep_the_first_tokens_or_the_first_share() -> None:
    check(ALL, "esr", token_keep=[_prefix(r, 100, None) for r in ROWS])
    check(ALL, "popd", token_keep=[_prefix(r, None, 0.1) for r in ROWS])
    for tokens, fraction in ((3, None), (None, 0.5), (4, 0.6), (2, 1.0), (None, 1.0)):
        masks = [_prefix(r, tokens, fraction) for r in ROWS]
        check(ALL, "esr", tokens=tokens, fraction=fraction, token_keep=masks)


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.7, 0.9])
def test_a_share_that_ends_on_a_token_includes_it(fraction: float) -> None:
    frame = ragged(4, 24, lengths=[10, 20, 50, 100])
    mine = check(frame, "popd", fraction=fraction, token_keep=[_prefix(r, None, fraction) for r in rows_of(frame)])
    assert [sum(x) for x in mine["token_keep"].to_list()] == [round(fraction * n) for n in (10, 20, 50, 100)]


def _extremes(rows: list[Row], highest: bool, lowest: bool) -> Lists:
    masks = _masks(rows)
    for i, row in enumerate(rows):
        values = _advantage(row).tolist()
        if highest and values:
            masks[i][values.index(max(values))] = True
        if lowest and values:
            masks[i][values.index(min(values))] = True
    return masks


def test_sparse_opd_keeps_the_extreme_tokens_of_each_response() -> None:
    check(ALL, "sparse-opd", token_keep=_extremes(ROWS, True, True))
    for select, sides in (("mintok", (True, False)), ("maxtok", (False, True)), ("minmaxtok", (True, True))):
        check(ALL, "sparse-opd", select=select, token_keep=_extremes(ROWS, *sides))


def _tails(rows: list[Row], tail: float, scope: str) -> Lists:
    masks = _masks(rows)
    for members in populations(rows, scope):
        for sign in (1.0, -1.0):
            tokens = [(sign * x, i, t) for i in members for t, x in enumerate(_advantage(rows[i]).tolist())]
            _mark_best(masks, rows, tokens, math.ceil(_share(tail, len(tokens))))
    return masks


@pytest.mark.parametrize("scope", SCOPES)
def test_sparse_opd_tail_keeps_both_ends_of_its_scope(scope: str) -> None:
    for tail in (0.0005, 0.1, 0.3, 0.5):
        check(ALL, "sparse-opd", select="pctltail", tail=tail, scope=scope, token_keep=_tails(ROWS, tail, scope))
    check(ALL, "sparse-opd", select="pctltail", token_keep=_tails(ROWS, 0.0005, "step"))


def _floor(mixture: float, form: str) -> float:
    return math.log(mixture) / (1 - mixture) if form == "ratio" else math.log(mixture / (1 - mixture))


def _reopold(rows: list[Row], floor: float, phases: list[int], fraction: float, scope: str) -> tuple[Lists, Lists]:
    masks = _masks(rows)
    advantage = [np.maximum(_advantage(row), floor) for row in rows]
    for members in populations(rows, scope):
        least = np.quantile(
            [x for i in members for x in rows[i]["student_entropy"]], float(1 - Fraction(str(fraction)))
        )
        for i in members:
            masks[i] = _advantage(rows[i]) >= floor if phases[i] == 1 else rows[i]["student_entropy"] >= least
    return masks, advantage


@pytest.mark.parametrize("form", ["ratio", "logit"])
def test_reopold_floors_the_reward_and_drops_what_lies_below(form: str) -> None:
    for mixture in (0.1, 0.3):
        masks, advantage = _reopold(ROWS, _floor(mixture, form), [1] * len(ROWS), 0.2, "step")
        check(ALL, "reopold", mixture=mixture, floor=form, token_keep=masks, advantage=advantage)


@pytest.mark.parametrize("scope", SCOPES)
def test_reopold_in_its_second_phase_keeps_uncertain_tokens(scope: str) -> None:
    for fraction in (0.2, 0.5, 1.0):
        masks, advantage = _reopold(ROWS, _floor(0.1, "ratio"), [2] * len(ROWS), fraction, scope)
        params = {"phase": 2, "entropy_fraction": fraction, "scope": scope}
        check(ALL, "reopold", token_keep=masks, advantage=advantage, **params)


@pytest.mark.parametrize("case", ALONE)
def test_budgets_of_a_degenerate_round(case: str) -> None:
    frame, rows = EDGES[case], rows_of(EDGES[case])
    check(frame, "tip", scope="round", token_keep=_tip(rows, 0.5, "round"))
    check(frame, "sparse-opd", select="pctltail", scope="round", token_keep=_tails(rows, 0.0005, "round"))
    masks, advantage = _reopold(rows, _floor(0.1, "ratio"), [2] * len(rows), 0.2, "round")
    check(frame, "reopold", phase=2, scope="round", token_keep=masks, advantage=advantage)


def test_reopold_as_published_and_its_switch_between_phases() -> None:
    frame = ragged(12, 25, longest=30, round=[0, 0, 0, 0, 3, 3, 3, 3, 4, 4, 7, 7])
    rows = rows_of(frame)
    masks, advantage = _reopold(rows, _floor(0.1, "ratio"), [1] * 12, 0.2, "step")
    check(frame, "reopold", token_keep=masks, advantage=advantage)
    for switch, first in ((4, 8), (0, 0), (8, 12)):
        phases = [1] * first + [2] * (12 - first)
        masks, advantage = _reopold(rows, _floor(0.1, "ratio"), phases, 0.2, "step")
        check(frame, "reopold", switch_round=switch, token_keep=masks, advantage=advantage)
    with pytest.raises(ConfigError, match="round"):
        fd.weigh(frame.drop("round"), "reopold", switch_round=4).collect()


def _kept(frame: object, rule: str, **params: object) -> list[list[bool]]:
    return fd.weigh(frame, rule, **params).collect()["token_keep"].to_list()  # type: ignore[arg-type]


@pytest.mark.parametrize("scope", SCOPES)
def test_random_tokens_keep_exactly_their_budget(scope: str) -> None:
    for fraction in (0.5, 0.07, 1.0):
        params = {"keep_fraction": fraction, "scope": scope, "seed": 3}
        mine = _kept(ALL, "random-tokens", **params)
        for members in populations(ROWS, scope):
            kept, tokens = (sum(f(mine[i]) for i in members) for f in (sum, len))
            assert kept == math.ceil(_share(fraction, tokens))
        check(ALL, "random-tokens", token_keep=mine, **params)


@pytest.mark.parametrize("scope", ["trajectory", "step"])
def test_a_budget_is_not_rounded_up_for_the_error_of_floating_point(scope: str) -> None:
    frame = ragged(1, 31, lengths=[100], bank=20)  # 0.07 * 100 is 7.000000000000001
    for fraction, number in ((0.07, 7), (0.14, 14), (0.29, 29), (0.281, 29)):
        assert sum(_kept(frame, "random-tokens", keep_fraction=fraction, scope=scope)[0]) == number


def test_sparse_opd_keeps_one_random_token_of_each_response() -> None:
    mine = _kept(ALL, "sparse-opd", select="rand1tok")
    assert [sum(x) for x in mine] == [int(row["length"] > 0) for row in ROWS]
    check(ALL, "sparse-opd", select="rand1tok", token_keep=mine)


RANDOM = [
    ("random-tokens", {}),
    ("random-tokens", {"scope": "trajectory", "keep_fraction": 0.3}),
    ("sparse-opd", {"select": "rand1tok"}),
]


@pytest.mark.parametrize(("rule", "params"), RANDOM)
def test_random_masks_depend_on_seed_and_identity_alone(rule: str, params: dict) -> None:
    frame = ragged(24, 26, longest=30)
    first = _kept(frame, rule, batch_size=8, **params)
    assert first == _kept(frame, rule, batch_size=8, seed=0, **params)
    assert first != _kept(frame, rule, batch_size=8, seed=1, **params)
    order = [*range(7, -1, -1), *range(15, 7, -1), *range(23, 15, -1)]
    assert _kept(frame[order], rule, batch_size=8, **params) == [first[i] for i in order]
    lengths = frame["student_logprob"].list.len().to_list()
    renewed = ragged(24, 27, lengths=lengths, trajectory_id=frame["trajectory_id"].to_list())
    assert _kept(renewed, rule, batch_size=8, **params) == first


@pytest.mark.parametrize(("rule", "params"), RANDOM[1:])
def test_random_masks_of_a_response_do_not_depend_on_its_neighbours(rule: str, params: dict) -> None:
    frame = ragged(24, 28, longest=30)
    whole = _kept(frame, rule, batch_size=8, **params)
    assert [_kept(frame[i : i + 1], rule, **params)[0] for i in range(24)] == whole


def test_random_masks_reach_every_position_equally() -> None:
    frame = ragged(500, 29, lengths=[4] * 500)
    one = Counter(x.index(True) for x in _kept(frame, "sparse-opd", select="rand1tok"))
    half = Counter(t for x in _kept(frame, "random-tokens") for t, k in enumerate(x) if k)
    assert all(abs(one[t] - 125) < 40 for t in range(4))  # 9.7 is the standard deviation
    assert all(abs(half[t] - 250) < 45 for t in range(4))
    assert sum(half.values()) == 1000


@pytest.mark.parametrize(
    ("rule", "params"),
    [
        ("tip", {"keep_fraction": 1.5}),
        ("tip", {"keep_fraction": -0.1}),
        ("dial", {"keep_fraction": 2.0}),
        ("dial", {"last_token": "always"}),
        ("esr", {"tokens": None}),
        ("esr", {"tokens": -1}),
        ("popd", {"fraction": 1.5}),
        ("sparse-opd", {"tail": 1.5}),
        ("sparse-opd", {"select": "first"}),
        ("reopold", {"mixture": 0.0}),
        ("reopold", {"mixture": 1.0}),
        ("reopold", {"phase": 3}),
        ("reopold", {"entropy_fraction": 1.2}),
        ("random-tokens", {"keep_fraction": 1.01}),
    ],
)
def test_masks_refuse_parameters_that_mean_nothing(rule: str, params: dict) -> None:
    with pytest.raises(ConfigError):
        fd.weigh(ragged(8, 1), rule, **params).collect()
