"""Weights are those of their formulas at every edge of the data, and divided by exactly the mean that was declared."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import polars as pl
import pytest

import fire_data as fd
from fire_data.schemas.errors import ConfigError
from tests.ragged import Lists, Row, check, edge_cases, normalised, populations, ragged, rows_of, together

ALL = together(edge_cases())  # every edge case, in steps of its own
ROWS = rows_of(ALL)
SCOPES = ("none", "trajectory", "group", "step", "round")


def _advantage(row: Row) -> np.ndarray:
    return row["teacher_logprob"] - row["student_logprob"]


def _clip(x: float) -> float:
    return min(max(x, 0.0), 1.0)


def _iw_opd(row: Row, w_max: float = 1.5, absolute: bool = True, prefix: str = "before") -> list[float]:
    d = [abs(x) if absolute else x for x in _advantage(row).tolist()]
    total, before, weights = math.fsum(d) + 1e-8, 0.0, []
    for x in d:
        through = before + x
        weights.append(1 + (w_max - 1) * _clip(1 - (through if prefix == "through" else before) / total))
        before = through
    return weights


def test_iw_opd_weighs_by_the_disagreement_that_is_left() -> None:
    check(ALL, "iw-opd", weight=[_iw_opd(r) for r in ROWS])
    for prefix in ("before", "through"):
        for absolute in (True, False):
            params = {"w_max": 3.0, "prefix": prefix, "absolute": absolute}
            check(ALL, "iw-opd", weight=[_iw_opd(r, **params) for r in ROWS], **params)


def test_iw_opd_by_hand() -> None:
    gaps = {"student_logprob": [[-1.0, -3.0, -1.0, -1.0]], "teacher_logprob": [[-2.0, -1.0, -1.0, -2.0]]}
    frame = ragged(1, lengths=[4], **gaps)
    check(frame, "iw-opd", weight=[[1.5, 1.375, 1.125, 1.125]])
    check(frame, "iw-opd", prefix="through", weight=[[1.375, 1.125, 1.125, 1.0]])


def test_iw_opd_eps_only_matters_where_the_models_agree() -> None:
    frame = ragged(2, lengths=[2, 2], student_logprob=[[-1.0, -1.0]] * 2, teacher_logprob=[[-1.0, -1.0], [-2.0, -2.0]])
    check(frame, "iw-opd", eps=2.0, weight=[[1.5, 1.5], [1.5, 1.375]])


def _pw_opsd(row: Row, w_min: float = 0.25, tau: float = 0.3, width: float = 0.1) -> list[float]:
    shares = [(index - 0.5) / row["length"] for index in range(1, row["length"] + 1)]
    return [w_min + (1 - w_min) / (1 + math.exp(-(f - tau) / width)) for f in shares]


def test_pw_opsd_weighs_by_position_and_counts_sequences() -> None:
    check(ALL, "pw-opsd", divisor="sequences", weight=[_pw_opsd(r) for r in ROWS])
    params = {"w_min": 0.5, "tau": 0.8, "width": 0.03}
    check(ALL, "pw-opsd", denominator="tokens", weight=[_pw_opsd(r, **params) for r in ROWS], **params)


def test_selectkd_trusts_tokens_where_the_teacher_accepts_the_students_guess() -> None:
    for params in ({}, {"top": 1, "beta": 0.0}, {"top": 2, "beta": 0.3}, {"top": 40}):
        top, beta = params.get("top", 5), params.get("beta", 0.01)
        weight = [[1.0 if x <= top else beta for x in r["teacher_rank_of_student_top1"]] for r in ROWS]
        check(ALL, "selectkd", weight=weight, **params)


def _scope(rows: list[Row], form: str, temperature: float, mle: float) -> tuple[Lists, Lists]:
    signs = {"paper": (-1, 1), "scripts": (1, 1), "code": (1, -1)}[form]
    weight, advantage = [np.ones(r["length"]) for r in rows], [_advantage(r) for r in rows]
    for members in populations(rows, "group"):
        for right, sign, column in ((True, signs[0], "student_logprob"), (False, signs[1], "teacher_logprob")):
            branch = [i for i in members if (rows[i]["reward"] > 0.5) is right]
            scores = [sign * math.fsum(rows[i][column]) / rows[i]["length"] / temperature for i in branch]
            total = math.fsum(math.exp(x - max(scores)) for x in scores)
            for i, x in zip(branch, scores, strict=True):
                weight[i] = np.full(rows[i]["length"], len(branch) * math.exp(x - max(scores)) / total)
                if right:
                    advantage[i] = np.full(rows[i]["length"], mle)
    return weight, advantage


@pytest.mark.parametrize("form", ["paper", "scripts", "code"])
def test_scope_opd_weighs_each_outcome_within_its_prompt(form: str) -> None:
    for temperature, mle in ((1.0, 1.0), (0.05, 0.5), (8.0, 1.0)):
        weight, advantage = _scope(ROWS, form, temperature, mle)
        params = {"form": form, "temperature": temperature, "mle": mle}
        check(ALL, "scope", weight=weight, advantage=advantage, **params)


def test_scope_opd_as_published_has_mean_weight_one_per_branch() -> None:
    frame = ragged(64, 31, n=8)
    rows = rows_of(frame)
    weight, advantage = _scope(rows, "paper", 1.0, 1.0)
    mine = check(frame, "scope", batch_size=16, weight=weight, advantage=advantage)
    first = mine.with_columns(first=pl.col("weight").list.first())
    means = first.group_by("prompt_id", pl.col("reward") > 0.5).agg(pl.col("first").mean())["first"]
    assert len(means) == 16
    np.testing.assert_allclose(means.to_numpy(), 1.0, rtol=1e-6)


def _paced(rows: list[Row], alpha: float = 1.0, beta: float = 1.0) -> Lists:
    weight = [np.ones(r["length"]) for r in rows]
    for members in populations(rows, "group"):
        p = sum(rows[i]["reward"] for i in members) / len(members)
        for i in members:
            weight[i] = np.full(rows[i]["length"], p**alpha * (1 - p) ** beta)
    return weight


def test_paced_prefers_prompts_solved_sometimes() -> None:
    check(ALL, "paced", weight=_paced(ROWS))
    for alpha, beta in ((2.0, 0.5), (0.0, 1.0), (1.0, 0.0)):
        check(ALL, "paced", alpha=alpha, beta=beta, weight=_paced(ROWS, alpha, beta))


def test_paced_by_hand() -> None:
    frame = ragged(8, n=4, lengths=[1] * 8, reward=[1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    check(frame, "paced", weight=[[0.1875]] * 4 + [[0.0]] * 4)


RAW: dict[str, Callable[[list[Row]], Lists]] = {
    "iw-opd": lambda rows: [np.array(_iw_opd(r)) for r in rows],
    "pw-opsd": lambda rows: [np.array(_pw_opsd(r)) for r in rows],
    "selectkd": lambda rows: [np.where(r["teacher_rank_of_student_top1"] <= 5, 1.0, 0.01) for r in rows],
    "paced": _paced,
}


@pytest.mark.parametrize("rule", RAW)
@pytest.mark.parametrize("scope", SCOPES)
def test_weights_are_divided_by_their_mean_over_the_declared_population(rule: str, scope: str) -> None:
    """Where all weights are 0, as those of paced for a prompt that is always solved, they stay 0."""
    divisor = "sequences" if rule == "pw-opsd" else "tokens"
    check(ALL, rule, normalise=scope, divisor=divisor, weight=normalised(ROWS, RAW[rule](ROWS), scope))
    frame = ragged(20, 32, n=4)
    rows = rows_of(frame)
    weight = normalised(rows, RAW[rule](rows), scope, 8)
    check(frame, rule, batch_size=8, normalise=scope, divisor=divisor, weight=weight)


@pytest.mark.parametrize("scope", SCOPES[1:])
def test_the_mean_is_over_kept_tokens_if_asked(scope: str) -> None:
    keep = [row["length"] > 0 and row["reward"] > 0.5 and row["finish_reason"] == "stop" for row in ROWS]
    masks = [np.arange(row["length"]) < 3 for row in ROWS]
    counted = [m & k for m, k in zip(masks, keep, strict=True)]
    weight = normalised(ROWS, RAW["iw-opd"](ROWS), scope, kept=counted)
    params = {"normalise": scope, "normalise_over": "kept", "tokens": 3, "truncated": "drop"}
    check(ALL, "verified-only+iw-opd+esr", keep=keep, token_keep=masks, weight=weight, **params)


@pytest.mark.parametrize(
    ("rule", "params"),
    [
        ("iw-opd", {"w_max": 0.5}),
        ("iw-opd", {"eps": 0.0}),
        ("iw-opd", {"prefix": "after"}),
        ("iw-opd", {"normalise": "batch"}),
        ("pw-opsd", {"w_min": -0.1}),
        ("pw-opsd", {"width": 0.0}),
        ("selectkd", {"top": 0}),
        ("selectkd", {"beta": -1.0}),
        ("scope", {"temperature": 0.0}),
        ("scope", {"form": "published"}),
        ("paced", {"alpha": -1.0}),
        ("paced", {"beta": math.inf}),
    ],
)
def test_weights_refuse_parameters_that_mean_nothing(rule: str, params: dict) -> None:
    with pytest.raises(ConfigError):
        fd.weigh(ragged(8, 1), rule, **params).collect()
