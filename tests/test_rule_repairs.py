"""Repairs of FiRe, and FiRe with other normalisers, compute what they say at every scope and edge of the data."""

from __future__ import annotations

import math

import numpy as np
import pytest

import fire_data as fd
from fire_data.schemas.errors import ConfigError
from tests.ragged import Lists, Row, check, edge_cases, normalised, populations, ragged, rows_of, together

EDGES = edge_cases()
ALL = together(EDGES)  # every edge case, in steps of its own
ROWS = rows_of(ALL)
ALONE = ("one trajectory of one token", "all equal", "ties", "certain", "empty responses")
SCOPES = ("trajectory", "group", "step", "round")


def _scores(rows: list[Row]) -> list[float]:
    return [math.fsum(row["teacher_logprob"]) / max(row["length"], 1) for row in rows]


def _thresholds(rows: list[Row], percentile: float, scope: str, by: str | None = None) -> list[float]:
    """FiRe's threshold for each row: the linear quantile of the mean teacher logprobs of its population."""
    scores, limit = _scores(rows), [math.nan] * len(rows)
    for members in populations(rows, scope, by=by):
        ranked = sorted(scores[i] for i in members)
        at = percentile / 100 * (len(ranked) - 1)
        low, high = ranked[math.floor(at)], ranked[math.ceil(at)]
        for i in members:
            limit[i] = low + (at - math.floor(at)) * (high - low)
    return limit


def _corrections(rows: list[Row], percentile: float, scope: str, by: str | None = None, lost: int = 1) -> Lists:
    masks = []
    limits = _thresholds(rows, percentile, scope, by)
    for row, score, limit in zip(rows, _scores(rows), limits, strict=True):
        gap = row["teacher_logprob"] - row["student_logprob"]
        masks.append(np.array([not (score < limit and d * lost > 0) for d in gap], dtype=bool))
    return masks


@pytest.mark.parametrize("scope", SCOPES)
def test_keep_corrections_takes_praise_from_unlikely_trajectories(scope: str) -> None:
    for percentile, by in ((20.0, None), (60.0, None), (100.0, "teacher"), (0.0, None)):
        masks = _corrections(ROWS, percentile, scope, by)
        check(ALL, "keep-corrections", percentile=percentile, scope=scope, by=by, token_keep=masks)


def test_its_control_takes_blame_from_unlikely_trajectories_instead() -> None:
    masks = _corrections(ROWS, 60.0, "step", lost=-1)
    assert not all(map(np.array_equal, masks, _corrections(ROWS, 60.0, "step")))
    check(ALL, "keep-corrections", percentile=60.0, loses="discouraged", token_keep=masks)


def test_keep_corrections_spares_what_fire_keeps_and_every_correction_of_the_rest() -> None:
    frame = ragged(40, 41)
    rows = rows_of(frame)
    mine = check(frame, "keep-corrections", batch_size=20, token_keep=_whole(rows, 20))
    kept = fd.weigh(frame, "fire", batch_size=20).collect()["keep"].to_list()
    assert [all(m) for m, k in zip(mine["token_keep"].to_list(), kept, strict=True) if k] == [True] * sum(kept)
    assert not all(all(m) for m in mine["token_keep"].to_list())


def _whole(rows: list[Row], batch: int) -> Lists:
    """The default masks: the 20 % quantile of each step."""
    masks = []
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        limit = np.quantile(_scores(part), 0.2)
        for row, score in zip(part, _scores(part), strict=True):
            masks.append(~((score < limit) & (row["teacher_logprob"] > row["student_logprob"])))
    return masks


def _cut(row: Row, probability: float) -> list[bool]:
    keep, open_ = [], True
    for t in row["teacher_logprob"]:
        keep.append(open_)
        open_ = open_ and t >= math.log(probability)
    return keep


def test_cut_at_surprise_ends_with_the_first_token_the_teacher_finds_absurd() -> None:
    check(ALL, "cut-at-surprise", token_keep=[_cut(r, 0.01) for r in ROWS])
    for probability in (0.1, 0.5, 1e-30, 1.0):
        check(ALL, "cut-at-surprise", probability=probability, token_keep=[_cut(r, probability) for r in ROWS])


def test_cut_at_surprise_keeps_the_surprise_itself_and_a_response_without_one() -> None:
    teacher = [[-1.0, -5.0, -1.0, -6.0], [-1.0, -4.6, -1.0, -1.0], [-9.0, -1.0, -1.0, -1.0]]
    frame = ragged(3, n=1, lengths=[4] * 3, teacher_logprob=teacher)
    masks = [[True, True, False, False], [True] * 4, [True, False, False, False]]  # log 0.01 is -4.605
    check(frame, "cut-at-surprise", token_keep=masks)


def _soft(rows: list[Row], percentile: float, width: float, scope: str) -> Lists:
    scores, limits, values = _scores(rows), _thresholds(rows, percentile, scope), [0.0] * len(rows)
    for members in populations(rows, scope):
        spread = float(np.std([scores[i] for i in members]))
        for i in members:
            z = (scores[i] - limits[i]) / (width * spread) if spread > 1e-12 else 0.0
            values[i] = 1 / (1 + math.exp(-z))
    return [np.full(row["length"], value) for row, value in zip(rows, values, strict=True)]


@pytest.mark.parametrize("scope", SCOPES)
def test_soft_filter_weighs_trajectories_by_their_score(scope: str) -> None:
    for percentile, width, normalise in ((20.0, 0.5, "none"), (50.0, 0.1, "step"), (20.0, 2.0, scope)):
        weight = normalised(ROWS, _soft(ROWS, percentile, width, scope), normalise)
        params = {"percentile": percentile, "width": width, "scope": scope, "normalise": normalise}
        check(ALL, "soft-filter", weight=weight, **params)


def test_soft_filter_has_mean_one_per_step_by_default() -> None:
    check(ALL, "soft-filter", weight=normalised(ROWS, _soft(ROWS, 20.0, 0.5, "step"), "step"))


def test_soft_filter_tells_scores_apart_that_differ_little() -> None:
    """Scores near -80 that differ in the eighth digit: their spread must not drown in rounding."""
    frame = ragged(9, lengths=[3] * 9, teacher_logprob=[[-80.0, -80.0, -80.0 + 8e-6 * i] for i in range(9)])
    rows = rows_of(frame)
    weight = normalised(rows, _soft(rows, 20.0, 0.5, "round"), "round")
    check(frame, "soft-filter", scope="round", normalise="round", weight=weight)


def _fire(
    rows: list[Row],
    normaliser: str,
    normaliser_percentile: float = 99.0,
    vocabulary_size: int = 40,
    alpha: float = 1.0,
    beta: float = 1.0,
    max_scope: str = "step",
    mean_scope: str = "step",
) -> Lists:
    weight = [np.ones(row["length"]) for row in rows]
    for members in populations(rows, max_scope):
        limit = {}
        for who in ("teacher", "student"):
            values = sorted(x for i in members for x in rows[i][f"{who}_entropy"])
            limit[who] = {
                "max": max(values),
                "percentile": float(np.quantile(values, normaliser_percentile / 100)),
                "log_vocabulary": math.log(vocabulary_size),
            }[normaliser]
            limit[who] = max(limit[who], 1e-6)
        for i in members:
            for t in range(rows[i]["length"]):
                sure = min(max(1 - rows[i]["teacher_entropy"][t] / limit["teacher"], 0.0), 1.0)
                unsure = min(max(rows[i]["student_entropy"][t] / limit["student"], 0.0), 1.0)
                weight[i][t] = (1 + alpha * sure) * (1 + beta * unsure)
    return normalised(rows, weight, mean_scope)


def _above(rows: list[Row], percentile: float, scope: str = "step") -> list[bool]:
    limits = _thresholds(rows, percentile, scope)
    return [bool(s >= x) for s, x in zip(_scores(rows), limits, strict=True)]


NORMALISERS = [
    {"normaliser": "max"},
    {"normaliser": "percentile"},
    {"normaliser": "percentile", "normaliser_percentile": 50.0},
    {"normaliser": "log_vocabulary", "vocabulary_size": 40},
    {"normaliser": "log_vocabulary", "vocabulary_size": 3},
]


@pytest.mark.parametrize("normaliser", NORMALISERS, ids=lambda p: "-".join(map(str, p.values())))
def test_fire_divides_entropies_by_the_declared_normaliser(normaliser: dict) -> None:
    for max_scope, mean_scope in (
        ("trajectory", "step"),
        ("group", "round"),
        ("step", "trajectory"),
        ("round", "group"),
    ):
        weight = _fire(ROWS, **normaliser, alpha=1.5, beta=0.5, max_scope=max_scope, mean_scope=mean_scope)
        params = {"alpha": 1.5, "beta": 0.5, "max_scope": max_scope, "mean_scope": mean_scope, **normaliser}
        check(ALL, "fire", keep=_above(ROWS, 20.0), weight=weight, **params)


def test_fire_and_its_presets() -> None:
    everything, above = [row["length"] > 0 for row in ROWS], _above(ROWS, 20.0)
    ones, weight = [np.ones(row["length"]) for row in ROWS], _fire(ROWS, "max")
    released = _fire(ROWS, "max", max_scope="trajectory", mean_scope="trajectory")
    check(ALL, "fire", keep=above, weight=weight)
    check(ALL, "fire-paper", keep=above, weight=_fire(ROWS, "max", mean_scope="trajectory"))
    check(ALL, "fire-released", keep=everything, weight=released, divisor="sequences")
    check(ALL, "fire-robust", keep=above, weight=_fire(ROWS, "percentile"))
    check(ALL, "fire-filter", keep=above, weight=ones)
    check(ALL, "fire-weights", keep=everything, weight=weight)


@pytest.mark.parametrize("case", ALONE)
def test_statistics_of_a_degenerate_round(case: str) -> None:
    frame, rows = EDGES[case], rows_of(EDGES[case])
    check(frame, "fire", scope="round", keep=_above(rows, 20.0), weight=_fire(rows, "max"))
    check(frame, "keep-corrections", scope="round", token_keep=_corrections(rows, 20.0, "round"))
    weight = normalised(rows, _soft(rows, 20.0, 0.5, "round"), "round")
    check(frame, "soft-filter", scope="round", normalise="round", weight=weight)


def test_uniform_is_the_plain_advantage() -> None:
    for denominator in ("tokens", "all_tokens", "sequences"):
        check(ALL, "uniform", denominator=denominator, divisor=denominator)


@pytest.mark.parametrize(
    ("rule", "params"),
    [
        ("keep-corrections", {"percentile": 120.0}),
        ("keep-corrections", {"by": "prompt_id"}),
        ("keep-corrections", {"loses": "all"}),
        ("cut-at-surprise", {"probability": 0.0}),
        ("cut-at-surprise", {"probability": 1.5}),
        ("soft-filter", {"width": 0.0}),
        ("soft-filter", {"percentile": -1.0}),
        ("fire", {"normaliser": "mean"}),
        ("fire", {"normaliser": "log_vocabulary"}),
        ("fire", {"normaliser": "log_vocabulary", "vocabulary_size": 1}),
        ("fire", {"normaliser": "percentile", "normaliser_percentile": 101.0}),
    ],
)
def test_repairs_refuse_parameters_that_mean_nothing(rule: str, params: dict) -> None:
    with pytest.raises(ConfigError):
        fd.weigh(ragged(8, 1), rule, **params).collect()
