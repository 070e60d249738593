"""Advantage rules against their formulas, written as plain loops over trajectories and tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl
import pytest

import fire_data as fd
from fire_data.schemas.errors import ConfigError, DataError
from tests.ragged import Lists, Row, check, edge_cases, populations, ragged, rows_of

CASES = edge_cases()
SCOPES = ("trajectory", "group", "step", "round")
BATCHES = (4, None)
Token = Callable[[Row, int], float]


def _gap(row: Row, t: int) -> float:
    return float(row["teacher_logprob"][t] - row["student_logprob"][t])


def _each(rows: list[Row], of: Token) -> Lists:
    return [np.array([of(row, t) for t in range(row["length"])]) for row in rows]


def exopd(extrapolation: float = 1.25) -> Token:
    def of(row: Row, t: int) -> float:
        student, teacher, base = (float(row[f"{x}_logprob"][t]) for x in ("student", "teacher", "base"))
        return extrapolation * (teacher - base) - (student - base)

    return of


def poweropd(alpha: float = 5.0) -> Token:
    def of(row: Row, t: int) -> float:
        return math.exp(row["teacher_logprob"][t]) ** alpha - math.exp(row["student_logprob"][t]) ** alpha

    return of


def clip(bound: float = 5.0) -> Token:
    return lambda row, t: min(max(_gap(row, t), -bound), bound)


def tanh(scale: float = 5.0) -> Token:
    return lambda row, t: math.tanh(_gap(row, t) / scale)


def soft_log() -> Token:
    return lambda row, t: math.copysign(math.log(1 + abs(_gap(row, t))), _gap(row, t))


def sign(scale: float = 1.0) -> Token:
    return lambda row, t: scale * ((_gap(row, t) > 0) - (_gap(row, t) < 0))


def opdvr() -> Token:
    return lambda row, t: max(_gap(row, t), 0.0) if row["reward"] == 1 else min(_gap(row, t), 0.0)


def sg_opd(agree: float = 1.8, disagree: float = 1.0) -> Token:
    def of(row: Row, t: int) -> float:
        gap = _gap(row, t)
        verdict = 1 if row["reward"] == 1 else -1
        return gap * (agree if gap * verdict > 0 else disagree)

    return of


def vopd() -> Token:
    return lambda row, t: _gap(row, t) + float(row["reverse_kl"][t])


def lgr(gain: float = 0.1) -> Token:
    def of(row: Row, t: int) -> float:
        after = row["teacher_max_logprob"][t + 1 :]
        return _gap(row, t) + (gain * math.exp(after[0]) if len(after) else 0.0)

    return of


def constant_negative(value: float = 1.0) -> Token:
    return lambda row, t: -value


FORMULAS: dict[str, tuple[Callable[..., Token], list[dict[str, Any]]]] = {
    "exopd": (exopd, [{}, {"extrapolation": 1.0}, {"extrapolation": 3.5}]),
    "poweropd": (poweropd, [{}, {"alpha": 0.1}, {"alpha": 1.0}, {"alpha": 50.0}]),
    "clip": (clip, [{}, {"bound": 1.0}]),
    "tanh": (tanh, [{}, {"scale": 0.5}]),
    "soft-log": (soft_log, [{}]),
    "sign": (sign, [{}, {"scale": 0.5}]),
    "opdvr": (opdvr, [{}]),
    "sg-opd": (sg_opd, [{}, {"agree": 3.0, "disagree": 0.25}]),
    "vopd": (vopd, [{}]),
    "lgr": (lgr, [{}, {"gain": 2.0}]),
    "constant-negative": (constant_negative, [{}, {"value": 0.25}]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", FORMULAS)
def test_advantage_of_every_token_is_the_papers_formula(name: str, case: str) -> None:
    formula, choices = FORMULAS[name]
    frame = CASES[case]
    for i, params in enumerate(choices):
        expected = _each(rows_of(frame), formula(**params))
        check(frame, name, batch_size=BATCHES[i % 2], advantage=expected, **params)


def _z_scores(rows: list[Row], scope: str, batch_size: int | None, eps: float = 1e-8) -> Lists:
    found = _each(rows, _gap)
    for members in populations(rows, scope, batch_size):
        values = [x for i in members for x in found[i]]
        mean = math.fsum(values) / len(values)
        spread = math.sqrt(math.fsum((x - mean) ** 2 for x in values) / len(values))
        for i in members:
            found[i] = np.array([(x - mean) / max(spread, eps) for x in found[i]])
    return found


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("case", CASES)
def test_z_scores_are_over_the_tokens_of_their_scope(case: str, scope: str) -> None:
    frame = CASES[case]
    for batch_size, params in ((4, {}), (None, {"eps": 2.0}), (None, {})):
        expected = _z_scores(rows_of(frame), scope, batch_size, **params)
        check(frame, "z-score", batch_size=batch_size, advantage=expected, scope=scope, **params)


def test_z_scores_are_over_the_step_unless_told() -> None:
    frame = CASES["ordinary"]
    check(frame, "z-score", batch_size=8, advantage=_z_scores(rows_of(frame), "step", 8))


def _shifts(
    rows: list[Row],
    scope: str,
    batch_size: int | None,
    margin: float = 0.4,
    mode: str = "mean",
    direction: str = "both",
) -> list[float]:
    """What Uni-OPD adds to every token of each trajectory."""
    shifts = [0.0] * len(rows)
    for members in populations(rows, scope, batch_size):
        means = {i: sum(_gap(rows[i], t) for t in range(rows[i]["length"])) / rows[i]["length"] for i in members}
        right = [means[i] for i in members if rows[i]["reward"] == 1]
        wrong = [means[i] for i in members if rows[i]["reward"] == 0]
        if not right or not wrong:
            continue
        gap = sum(right) / len(right) - sum(wrong) / len(wrong) if mode == "mean" else min(right) - max(wrong)
        missing = max(0.0, margin - gap)
        up, down = {"both": (0.5, 0.5), "correct_up": (1.0, 0.0), "incorrect_down": (0.0, 1.0)}[direction]
        for i in members:
            shifts[i] = up * missing if rows[i]["reward"] == 1 else -down * missing
    return shifts


@pytest.mark.parametrize("scope", SCOPES[1:])
@pytest.mark.parametrize("case", CASES)
def test_uni_opd_moves_right_and_wrong_apart_until_the_margin_is_there(case: str, scope: str) -> None:
    frame = CASES[case]
    rows = rows_of(frame)
    choices: list[dict[str, Any]] = [{}, {"margin": 3.0, "mode": "minmax"}]
    choices += [{"direction": d, "mode": m} for d in ("correct_up", "incorrect_down") for m in ("mean", "minmax")]
    for i, params in enumerate(choices):
        shifts = _shifts(rows, scope, BATCHES[i % 2], **params)
        expected = [gaps + shift for gaps, shift in zip(_each(rows, _gap), shifts, strict=True)]
        check(frame, "uni-opd", batch_size=BATCHES[i % 2], advantage=expected, scope=scope, **params)


def test_uni_opd_leaves_a_margin_that_is_there_alone_and_reaches_one_that_is_not() -> None:
    frame = ragged(8, seed=3, reward=[1.0, 0.0] * 4)
    assert any(_shifts(rows_of(frame), "group", None, 0.4)), "the data has prompts without the margin"
    assert not all(_shifts(rows_of(frame), "group", None, 0.4)), "and prompts with it"
    mine = check(
        frame,
        "uni-opd",
        advantage=[
            g + s for g, s in zip(_each(rows_of(frame), _gap), _shifts(rows_of(frame), "group", None), strict=True)
        ],
    )
    means = [float(np.mean(x)) for x in mine["advantage"].to_list()]
    assert min(a - b for a, b in zip(means[::2], means[1::2], strict=True)) == pytest.approx(0.4, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("tanh", {"scale": 0.0}),
        ("clip", {"bound": -1.0}),
        ("z-score", {"scope": "batch"}),
        ("z-score", {"eps": 0.0}),
        ("uni-opd", {"mode": "median"}),
        ("uni-opd", {"direction": "up"}),
        ("poweropd", {"alpha": 0.0}),
    ],
)
def test_parameters_without_meaning_are_refused(name: str, params: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        check(CASES["ordinary"], name, **params)
    assert name in str(caught.value) or next(iter(params)) in str(caught.value)


@pytest.mark.parametrize("name", ["opdvr", "sg-opd", "uni-opd"])
def test_an_answer_without_a_verdict_is_not_taken_for_a_wrong_one(name: str) -> None:
    frame = CASES["ordinary"]
    rewards = frame["reward"].to_list()
    for missing in (pl.Series([None, *rewards[1:]], dtype=pl.Float32), pl.Series([None] * len(rewards))):
        with pytest.raises(DataError, match="reward"):
            fd.weigh(frame.with_columns(reward=missing), name)
