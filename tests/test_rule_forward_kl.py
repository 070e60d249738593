"""Rules with a second stream: the gate of every token, the first stream beside it, and TrOPD's seeded coin."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import polars as pl
import pytest

import fire_data as fd
from fire_data.rules import make_rule
from fire_data.schemas.errors import IncompleteError
from tests.ragged import Lists, Row, check, edge_cases, ragged, rows_of

CASES = edge_cases(topk=4)
BATCHES = (None, 4)


def _each(rows: list[Row], of: Any) -> Lists:
    return [np.array([of(row, t) for t in range(row["length"])], dtype=float) for row in rows]


@pytest.mark.parametrize("case", CASES)
def test_eopd_adds_forward_kl_where_the_teacher_is_uncertain(case: str) -> None:
    frame = CASES[case]
    for batch_size in BATCHES:
        for params in ({}, {"threshold": 0.2}, {"threshold": 2.0, "coefficient": 0.25}):
            threshold, coefficient = params.get("threshold", 0.8), params.get("coefficient", 1.0)

            def gate(row: Row, t: int, threshold: float = threshold, coefficient: float = coefficient) -> float:
                return coefficient if row["teacher_entropy"][t] > threshold else 0.0

            check(frame, "eopd", batch_size=batch_size, fkl_weight=_each(rows_of(frame), gate), **params)


@pytest.mark.parametrize("case", CASES)
def test_aopd_sends_every_token_to_one_of_the_two_streams(case: str) -> None:
    frame = CASES[case]
    for batch_size in BATCHES:
        for params in ({}, {"threshold": 0.3}, {"threshold": -1.0}, {"threshold": 1.0}):
            threshold = params.get("threshold", 0.0)

            def gate(row: Row, t: int, threshold: float = threshold) -> float:
                return float(math.exp(row["teacher_logprob"][t]) - math.exp(row["student_logprob"][t]) <= threshold)

            second = _each(rows_of(frame), gate)
            first = [1.0 - x for x in second]
            check(frame, "aopd", batch_size=batch_size, weight=first, fkl_weight=second, **params)


def test_aopd_at_its_ends_is_one_stream_alone() -> None:
    frame = CASES["ordinary"]
    for threshold, silent in ((-1.0, "fkl_coefficient"), (1.0, "coefficient")):
        mine = fd.weigh(frame, "aopd", threshold=threshold).collect()
        assert {x for row in mine[silent].to_list() for x in row} == {0.0}
        other = {"coefficient", "fkl_coefficient"} - {silent}
        assert any(x for row in mine[other.pop()].to_list() for x in row)


def _coins(frame: pl.DataFrame, seed: int, steps: int = 20) -> Lists:
    """TrOPD's noise of every token to 2**-steps, found by halving: masks at chosen values of min(q/p, 1)."""
    rows = rows_of(frame)
    low = [np.zeros(row["length"]) for row in rows]
    for step in range(1, steps + 1):
        middle = [x + 0.5**step for x in low]
        probe = frame.with_columns(
            student_logprob=pl.Series([[0.0] * row["length"] for row in rows], dtype=pl.List(pl.Float64)),
            teacher_logprob=pl.Series([np.log(x).tolist() for x in middle], dtype=pl.List(pl.Float64)),
        )
        mask = fd.weigh(probe, "tropd", outliers="mask", seed=seed).collect()["token_keep"].to_list()
        low = [np.where(m, x, mid) if len(x) else x for m, x, mid in zip(mask, low, middle, strict=True)]
    return [x + 0.5 ** (steps + 1) for x in low]


@pytest.mark.parametrize("seed", [0, 7])
def test_tropd_follows_one_coin_per_token_that_only_the_seed_and_the_place_decide(seed: int) -> None:
    frame = ragged(24, seed=31, topk=4, longest=12)
    rows = rows_of(frame)
    coins = _coins(frame, seed)
    chance = _each(rows, lambda row, t: math.exp(min(row["teacher_logprob"][t] - row["student_logprob"][t], 0.0)))
    clear = np.concatenate([abs(u - p) > 1e-5 for u, p in zip(coins, chance, strict=True)])
    assert clear.all(), "no token of this table is too close to call"
    trusted = [(u < p).astype(float) for u, p in zip(coins, chance, strict=True)]
    assert 0 < np.concatenate(trusted).mean() < 1
    for batch_size in BATCHES:
        check(
            frame,
            "tropd",
            batch_size=batch_size,
            weight=trusted,
            fkl_weight=[1 - m for m in trusted],
            seed=seed,
        )
        check(frame, "tropd", batch_size=batch_size, token_keep=trusted, outliers="mask", seed=seed)


def test_tropds_coins_are_uniform_and_differ_between_seeds_tokens_and_trajectories() -> None:
    frame = ragged(60, seed=5, topk=2, longest=30, bank=1)
    first, second = (np.concatenate(_coins(frame, seed, steps=10)) for seed in (0, 1))
    n = len(first)
    for coins in (first, second):
        assert abs(coins.mean() - 0.5) < 4 / math.sqrt(12 * n)
        assert abs((coins < 0.1).mean() - 0.1) < 4 * math.sqrt(0.09 / n)
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / math.sqrt(n)
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 4 / math.sqrt(n)


@pytest.mark.parametrize("case", CASES)
def test_tropd_always_trusts_tokens_the_teacher_likes_at_least_as_much(case: str) -> None:
    frame = CASES[case]
    for batch_size in BATCHES:
        mine = fd.weigh(frame, "tropd", batch_size=batch_size).collect()
        masked = fd.weigh(frame, "tropd", batch_size=batch_size, outliers="mask").collect()
        first = [np.asarray(w, dtype=float) for w in mine["weight"].to_list()]
        for row, weight in zip(rows_of(frame), first, strict=True):
            liked = row["teacher_logprob"] >= row["student_logprob"]
            assert set(weight[liked]) <= {1.0}
            assert set(weight) <= {0.0, 1.0}
            assert not weight[row["teacher_logprob"] - row["student_logprob"] < -36.0].any()
        alive = [i for i, k in enumerate(masked["keep"]) if k]
        assert [masked["token_keep"][i].to_list() for i in alive] == [first[i].astype(bool).tolist() for i in alive]
        assert "fkl_coefficient" not in masked.columns or not masked["fkl_coefficient"].explode().any()
        check(frame, "tropd", batch_size=batch_size, weight=first, fkl_weight=[1 - w for w in first])


def test_whether_the_second_stream_is_renormalised_is_the_rules_own_and_can_be_chosen() -> None:
    defaults = {name: make_rule(name).fkl_renormalise for name in ("eopd", "aopd", "tropd")}
    assert defaults == {"eopd": True, "aopd": False, "tropd": False}
    assert make_rule("eopd", {"fkl_renormalise": False}).fkl_renormalise is False


def test_a_second_stream_needs_the_teachers_list_and_names_what_adds_it() -> None:
    for name in ("eopd", "aopd", "tropd"):
        for column in ("teacher_topk_ids", "teacher_topk_logprobs"):
            with pytest.raises(IncompleteError, match=column) as caught:
                fd.weigh(CASES["ordinary"].drop(column), name)
            assert "--add topk" in str(caught.value)
    bare = ragged(8, seed=1)
    assert fd.weigh(bare, "tropd", outliers="mask").collect().height == 8
