"""Top-k rules against their formulas, with dictionaries for candidate sets and plain loops over tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from fire_data.schemas.errors import ConfigError, IncompleteError
from tests.ragged import Lists, Row, check, edge_cases, normalised, populations, ragged, rows_of

CASES = edge_cases(topk=4) | {
    "lists of one": ragged(8, 41, topk=1),
    "lists of the whole vocabulary": ragged(6, 42, topk=40, longest=5),
    "wide": ragged(10, 43, topk=16, spread=8.0),
}
SCOPES = ("trajectory", "group", "step", "round")
Place = tuple[int, int]
Number = float | Fraction


def _batch_size(case: str, params: dict[str, Any]) -> int | None:
    """One step or steps of four, by turns over the cases and parameters."""
    return (None, 4)[(list(CASES).index(case) + len(params)) % 2]


Candidates = dict[int, float]


def _list(row: Row, t: int, ids: str, values: str) -> Candidates:
    """token id -> logprob of one top-k list."""
    return {int(v): float(x) for v, x in zip(row[ids][t], row[values][t], strict=True)}


def _own(row: Row, t: int) -> tuple[Candidates, Candidates]:
    """Each model's logprobs on its own list."""
    student = _list(row, t, "student_topk_ids", "student_topk_logprobs")
    return student, _list(row, t, "teacher_topk_ids", "teacher_topk_logprobs")


def _share(values: Candidates) -> Candidates:
    total = math.fsum(values.values())
    return {v: x / total for v, x in values.items()}


def _best(rows: list[Row], scores: Mapping[Place, Number], members: list[int], fraction: float) -> set[Place]:
    """The ceil(fraction * N) places with the largest score; ties: earlier position, then smaller trajectory_id."""
    places = [(i, t) for i in members for t in range(rows[i]["length"])]
    places.sort(key=lambda at: (-scores[at], at[1], rows[at[0]]["trajectory_id"]))
    return set(places[: math.ceil(Fraction(str(fraction)) * len(places))])


def _with_one_each(rows: list[Row], kept: set[Place], members: list[int], scores: Mapping[Place, Number]) -> set[Place]:
    """A response without any kept token gets its best one."""
    added = set(kept)
    for i in members:
        if not any(at[0] == i for at in kept):
            added.add(max(((i, t) for t in range(rows[i]["length"])), key=lambda at: (scores[at], -at[1])))
    return added


def _masks(rows: list[Row], kept: set[Place]) -> Lists:
    return [np.array([(i, t) in kept for t in range(row["length"])], dtype=bool) for i, row in enumerate(rows)]


def _geometry(row: Row, t: int, missing: str, floor: float) -> tuple[float, float, float, float, float]:
    """Normalised entropy, divergence over the union and the three compatibilities of one token."""
    student, teacher = _own(row, t)
    crossed_teacher = _list(row, t, "student_topk_ids", "teacher_logprob_on_student_topk")
    crossed_student = _list(row, t, "teacher_topk_ids", "student_logprob_on_teacher_topk")
    k = len(student)
    own = _share({v: math.exp(x) for v, x in student.items()})
    entropy = -sum(p * math.log(p) for p in own.values() if p > 0) / math.log(k) if k > 1 else 0.0
    union = sorted(set(student) | set(teacher))
    p_s = _completed(union, student, crossed_student, missing, floor)
    p_t = _completed(union, teacher, crossed_teacher, missing, floor)
    divergence = sum(p_t[v] * (math.log(p_t[v]) - math.log(p_s[v])) for v in union if p_t[v] > 0)
    mass = min(sum(math.exp(x) for x in crossed_teacher.values()), 1.0)
    shared = len(set(student) & set(teacher)) / k
    return entropy, divergence, mass, shared, sum(math.sqrt(p_t[v] * p_s[v]) for v in union)


def _completed(union: list[int], own: Candidates, crossed: Candidates, missing: str, floor: float) -> Candidates:
    """One model's probabilities over the union of both lists."""
    listed = {v: math.exp(x) for v, x in own.items()}
    if missing == "own_mass":
        shares = _share(listed)
        return {v: max(shares.get(v, 0.0), floor) for v in union}
    return _share(
        {v: listed[v] if v in listed else floor if missing == "floor" else math.exp(crossed[v]) for v in union}
    )


def _unit(values: dict[Place, float], normaliser: str) -> dict[Place, float]:
    """Values of one population brought to [0, 1]; "none" still divides by the largest, as the published code does."""
    ordered = np.array(sorted(values.values()))
    low, high = {
        "quantile": (np.quantile(ordered, 0.05), np.quantile(ordered, 0.95)),
        "minmax": (ordered[0], ordered[-1]),
        "none": (0.0, ordered[-1]),
    }[normaliser]
    if high - low <= 1e-12:
        return dict.fromkeys(values, 0.0)
    return {at: min(max((x - low) / (high - low), 0.0), 1.0) for at, x in values.items()}


def _ta_opd(
    rows: list[Row],
    batch_size: int | None,
    score: str = "teachability",
    compatibility: str = "mass",
    normaliser: str = "quantile",
    keep_fraction: float = 0.05,
    scope: str = "step",
    missing: str = "own_mass",
    floor: float = 1e-12,
) -> Lists:
    raw = {(i, t): _geometry(row, t, missing, floor) for i, row in enumerate(rows) for t in range(row["length"])}
    which = {"mass": 2, "set": 3, "bc": 4}[compatibility]
    formulas: dict[str, Callable[[float, float, float, float], float]] = {
        "teachability": lambda h, d, c, x: d * c,
        "incompatible": lambda h, d, c, x: d * (1 - c),
        "tip": lambda h, d, c, x: 1 - (1 - h) * (1 - d),
        "ca_softor": lambda h, d, c, x: 1 - (1 - h) * (1 - x),
        "split_ca": lambda h, d, c, x: (1 - h) * x,
    }
    kept: set[Place] = set()
    for members in populations(rows, scope, batch_size):
        places = [at for at in raw if at[0] in members]
        h = _unit({at: raw[at][0] for at in places}, normaliser)
        d = _unit({at: raw[at][1] for at in places}, normaliser)
        c = _unit({at: raw[at][which] for at in places}, normaliser)
        x = _unit({at: raw[at][1] * raw[at][which] for at in places}, normaliser)
        scores = {name: {at: of(h[at], d[at], c[at], x[at]) for at in places} for name, of in formulas.items()}
        best = _best(rows, scores[score], members, keep_fraction)
        kept |= _with_one_each(rows, best, members, scores["ca_softor"])
    return _masks(rows, kept)


TA_OPD: list[dict[str, Any]] = [
    {},
    {"keep_fraction": 0.3, "missing": "exact"},
    {"score": "tip", "keep_fraction": 0.2, "normaliser": "minmax", "scope": "round"},
    {"score": "ca_softor", "keep_fraction": 0.4, "compatibility": "set", "scope": "group"},
    {"score": "split_ca", "keep_fraction": 0.3, "compatibility": "bc", "scope": "trajectory", "missing": "exact"},
    {"score": "incompatible", "keep_fraction": 0.25, "normaliser": "none"},
    {"keep_fraction": 0.5, "compatibility": "bc", "missing": "exact", "normaliser": "minmax", "scope": "trajectory"},
    {
        "score": "incompatible",
        "keep_fraction": 0.1,
        "compatibility": "set",
        "missing": "floor",
        "floor": 1e-3,
        "scope": "group",
    },
    {"keep_fraction": 0.3, "missing": "floor", "normaliser": "minmax"},
    {"score": "tip", "keep_fraction": 0.3, "missing": "own_mass", "compatibility": "bc", "floor": 1e-4},
    {"keep_fraction": 1.0},
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("params", TA_OPD, ids=lambda p: "-".join(map(str, p.values())) or "defaults")
def test_ta_opd_keeps_the_most_teachable_tokens_and_one_of_every_response(params: dict[str, Any], case: str) -> None:
    frame, batch_size = CASES[case], _batch_size(case, params)
    expected = _ta_opd(rows_of(frame), batch_size, **params)
    check(frame, "ta-opd", batch_size=batch_size, token_keep=expected, **params)


@pytest.mark.parametrize("score", ["teachability", "tip", "ca_softor", "split_ca", "incompatible"])
@pytest.mark.parametrize("compatibility", ["mass", "set", "bc"])
def test_every_score_of_ta_opd_with_every_compatibility(score: str, compatibility: str) -> None:
    frame = ragged(12, 51, topk=5)
    for missing, normaliser in (("floor", "quantile"), ("own_mass", "minmax"), ("exact", "none")):
        params: dict[str, Any] = {"score": score, "compatibility": compatibility, "keep_fraction": 0.35}
        params |= {"missing": missing, "normaliser": normaliser}
        check(frame, "ta-opd", batch_size=6, token_keep=_ta_opd(rows_of(frame), 6, **params), **params)


def _reliability(row: Row, t: int, missing_logprob: float, clip: float, least: float) -> float:
    """IER: variance of the log ratio over the noise of its score-function estimate with the best baseline."""
    student, teacher = _own(row, t)
    y = int(row["response_ids"][t])
    student = {**student, y: float(row["student_logprob"][t])}
    teacher = {**teacher, y: float(row["teacher_logprob"][t])}
    union = sorted(set(student) | set(teacher))
    log_p, log_q = (_log_share({v: side.get(v, missing_logprob) for v in union}) for side in (student, teacher))
    p = {v: math.exp(log_p[v]) for v in union}
    ratio = {v: min(max(log_p[v] - log_q[v], -clip), clip) for v in union}
    mean = sum(p[v] * ratio[v] for v in union)
    signal = sum(p[v] * (ratio[v] - mean) ** 2 for v in union)
    # p (1/p - 1) is written as 1 - p: the same for every p > 0, and finite where p rounds to 0.
    score = {v: (1.0 if p[v] >= least else p[v] / least) - p[v] for v in union}
    total = sum(score.values())
    baseline = sum(score[v] * ratio[v] for v in union) / total if total > 1e-8 else mean
    noise = max(sum(score[v] * (ratio[v] - baseline) ** 2 for v in union) - signal, 0.0)
    # In single precision, as the lists are stored: sums in another order must not rank equal tokens differently.
    return float(np.float32(signal / max(noise, 1e-8)))


def _log_share(values: Candidates) -> Candidates:
    top = max(values.values())
    total = top + math.log(sum(math.exp(x - top) for x in values.values()))
    return {v: x - total for v, x in values.items()}


def _ranks(values: dict[Place, float]) -> dict[Place, Fraction]:
    """Rank from 0 over N - 1, the average rank for ties; exact, so that equal fused ranks are equal."""
    ordered = sorted(values.values())
    first: dict[float, int] = {}
    for i, x in enumerate(ordered):
        first.setdefault(x, i)
    last = {x: i for i, x in enumerate(ordered)}
    return {at: Fraction(first[x] + last[x], 2 * max(len(ordered) - 1, 1)) for at, x in values.items()}


def _ier(
    rows: list[Row],
    batch_size: int | None,
    combine: str = "or",
    utility: str = "advantage",
    keep_fraction: float = 0.01,
    scope: str = "step",
    missing_logprob: float = -12.0,
    clip: float = 30.0,
    least_probability: float = 0.0,
) -> Lists:
    kept: set[Place] = set()
    for members in populations(rows, scope, batch_size):
        places = [(i, t) for i in members for t in range(rows[i]["length"])]
        r = _ranks({(i, t): _reliability(rows[i], t, missing_logprob, clip, least_probability) for i, t in places})
        gaps = {(i, t): abs(rows[i]["teacher_logprob"][t] - rows[i]["student_logprob"][t]) for i, t in places}
        u = _ranks(gaps if utility == "advantage" else {(i, t): rows[i]["reverse_kl"][t] for i, t in places})
        scores = {at: r[at] + u[at] - r[at] * u[at] if combine == "or" else r[at] * u[at] for at in places}
        kept |= _with_one_each(rows, _best(rows, scores, members, keep_fraction), members, scores)
    return _masks(rows, kept)


IER: list[dict[str, Any]] = [
    {},
    {"combine": "and", "keep_fraction": 0.3},
    {"utility": "reverse_kl", "keep_fraction": 0.2, "scope": "round"},
    {"combine": "and", "utility": "reverse_kl", "keep_fraction": 0.4, "scope": "group"},
    {"keep_fraction": 0.25, "scope": "trajectory"},
    {"keep_fraction": 0.5, "missing_logprob": -4.0},
    {"keep_fraction": 0.5, "clip": 0.5},
    {"keep_fraction": 0.3, "least_probability": 1e-3},
    {"keep_fraction": 1.0},
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("params", IER, ids=lambda p: "-".join(map(str, p.values())) or "defaults")
def test_ier_keeps_useful_tokens_whose_gradient_can_be_trusted(params: dict[str, Any], case: str) -> None:
    frame, batch_size = CASES[case], _batch_size(case, params)
    expected = _ier(rows_of(frame), batch_size, **params)
    check(frame, "ier", batch_size=batch_size, token_keep=expected, **params)


def _prune(
    row: Row, metric: str = "overlap", threshold: float = 0.7, drop: float = 0.01, base: float = 0.5
) -> np.ndarray:
    weights, events = [], 0
    for t in range(row["length"]):
        student, teacher = _own(row, t)
        if metric == "overlap":
            event = len(set(student) & set(teacher)) / len(student) < threshold
        else:
            accepted, mass = set(), 0.0
            for v, x in sorted(teacher.items(), key=lambda item: -item[1]):
                if mass >= threshold:
                    break
                accepted.add(v)
                mass += math.exp(x)
            event = int(row["response_ids"][t]) not in accepted
        events += event
        weights.append(min(max(1 - drop * events, 0.0), 1.0) + base)
    return np.array(weights)


PRUNE: list[dict[str, Any]] = [
    {},
    {"threshold": 0.5, "drop": 0.2},
    {"threshold": 1.0, "drop": 0.3, "base": 0.0},
    {"metric": "top_p", "drop": 0.1},
    {"metric": "top_p", "threshold": 0.999, "drop": 0.4, "base": 0.1},
    {"metric": "top_p", "threshold": 0.3, "drop": 0.02},
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("params", PRUNE, ids=lambda p: "-".join(map(str, p.values())) or "defaults")
def test_prune_opd_trusts_less_after_every_token_on_which_the_models_part(params: dict[str, Any], case: str) -> None:
    frame = CASES[case]
    expected = [_prune(row, **params) for row in rows_of(frame)]
    check(frame, "prune-opd", batch_size=_batch_size(case, params), weight=expected, **params)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("case", ["ordinary", "long and short", "ties", "one trajectory of one token"])
def test_prune_opd_normalised_has_mean_weight_one_in_its_scope(case: str, scope: str) -> None:
    frame = CASES[case]
    rows = rows_of(frame)
    expected = normalised(rows, [_prune(row, drop=0.1) for row in rows], scope, 4)
    check(frame, "prune-opd", batch_size=4, weight=expected, drop=0.1, normalise=scope)


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("ta-opd", {"keep_fraction": 0.0}),
        ("ta-opd", {"score": "quadrant"}),
        ("ta-opd", {"floor": 0.0}),
        ("ier", {"keep_fraction": 1.5}),
        ("ier", {"combine": "xor"}),
        ("prune-opd", {"metric": "mass"}),
        ("prune-opd", {"drop": -0.1}),
    ],
)
def test_parameters_without_meaning_are_refused(name: str, params: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        check(CASES["ordinary"], name, **params)


def test_a_missing_list_names_the_command_that_adds_it() -> None:
    for name in ("ta-opd", "ier", "prune-opd"):
        with pytest.raises(IncompleteError, match="topk") as caught:
            check(CASES["ordinary"].drop("teacher_topk_ids"), name)
        assert "--add" in str(caught.value)
