"""avg@k, pass@k and maj@k against counting by hand, and intervals that hold what they promise."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fire_data.verify.bootstrap import REPLICATES, interval, paired
from fire_data.verify.estimates import maj_at_k, mean, pass_at_k, per_prompt

VOTES = st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=8)


@given(st.lists(st.booleans(), min_size=1, max_size=9), st.data())
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(right: list[bool], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(right)))
    draws = list(itertools.combinations(right, k))
    assert pass_at_k(len(right), sum(right), k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)


@pytest.mark.parametrize(
    ("n", "c", "k"), [(200, 3, 10), (100, 50, 1), (64, 1, 64), (10, 0, 5), (10, 10, 1), (16, 12, 8)]
)
def test_pass_at_k_is_the_closed_formula(n: int, c: int, k: int) -> None:
    product = 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1)) if n - c >= k else 1.0
    assert pass_at_k(n, c, k) == pytest.approx(product, abs=1e-12)


def majority(drawn: tuple[int, ...], votes: list[str | None], rewards: list[float]) -> float:
    """The expected reward of one draw's majority, by counting."""
    counts = {v: [i for i in drawn if votes[i] == v] for v in {votes[i] for i in drawn} - {None}}
    if not counts:
        return 0.0
    most = max(map(len, counts.values()))
    winners = [v for v, mine in counts.items() if len(mine) == most]
    # An answer's reward is the mean over all that gave it, drawn or not.
    worth = [sum(r for v, r in zip(votes, rewards, strict=True) if v == w) / votes.count(w) for w in winners]
    return sum(worth) / len(winners)


@settings(max_examples=150)
@given(VOTES, st.data())
def test_maj_at_k_is_the_mean_over_all_draws(votes: list[str | None], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(votes)))
    values = data.draw(st.lists(st.sampled_from([0.0, 1.0, 0.5]), min_size=len(votes), max_size=len(votes)))
    draws = list(itertools.combinations(range(len(votes)), k))
    expected = sum(majority(d, votes, values) for d in draws) / len(draws)
    assert maj_at_k(votes, values, k) == pytest.approx(expected, abs=1e-12)


def test_a_tie_counts_by_its_chances_and_silence_does_not_win() -> None:
    assert maj_at_k(["a", "b"], [1.0, 0.0], 2) == 0.5
    assert maj_at_k([None, None, "a"], [0.0, 0.0, 1.0], 3) == 1.0
    assert maj_at_k([None, None], [0.0, 0.0], 2) == 0.0
    assert maj_at_k(["a"] * 40 + ["b"] * 24, [1.0] * 40 + [0.0] * 24, 64) == 1.0


def test_maj_at_k_of_many_different_answers_is_quick() -> None:
    votes: list[str | None] = [f"{i}" for i in range(60)] + ["right"] * 4
    assert 0.5 < maj_at_k(votes, [0.0] * 60 + [1.0] * 4, 32) < 1.0


def rows(**prompts: list[tuple[str, float]]) -> list[dict[str, Any]]:
    return [
        {"prompt_id": p, "mode": "sampled", "reward": r, "vote": v, "extracted": v}
        for p, mine in prompts.items()
        for v, r in mine
    ]


def test_metrics_are_per_prompt_and_maj_is_there_for_n() -> None:
    table = rows(p=[("x", 1.0), ("x", 1.0), ("y", 0.0)], q=[("y", 0.0), ("z", 0.0), ("x", 1.0)])
    table.append({"prompt_id": "p", "mode": "greedy", "reward": 1.0, "vote": "x", "extracted": "x"})
    found = per_prompt(table, (1, 2))
    assert list(found) == ["greedy", "avg@3", "pass@1", "pass@2", "maj@2", "maj@3"]
    assert found["greedy"] == {"p": 1.0}
    assert found["avg@3"] == {"p": pytest.approx(2 / 3), "q": pytest.approx(1 / 3)}
    assert found["pass@2"] == {"p": 1.0, "q": pytest.approx(2 / 3)}
    assert found["maj@3"] == {"p": 1.0, "q": pytest.approx(1 / 3)}


def test_without_votes_there_is_no_majority() -> None:
    table = [{**row, "vote": None, "extracted": "code"} for row in rows(p=[("x", 1.0), ("x", 0.0)])]
    assert list(per_prompt(table, (1,))) == ["avg@2", "pass@1"]
    # Evaluations made before votes were stored vote by what was extracted.
    old = [{k: v for k, v in row.items() if k != "vote"} for row in table]
    assert "maj@2" in per_prompt(old, (1,))


def test_the_mean_is_rounded_once() -> None:
    assert mean([0.1] * 10) == 0.1
    assert mean([]) is None


# --- intervals ----------------------------------------------------------------------------------------------------


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(7)
    trials, prompts, truth, held = 200, 120, 0.3, 0
    for trial in range(trials):
        # Correlated within prompts: each has a rate of its own, of which 4 samples are seen.
        rates = rng.beta(0.6, 1.4, prompts)
        values = rng.binomial(4, rates) / 4
        found = interval(values.tolist(), trial)
        assert found.low <= found.mean <= found.high
        held += found.low <= truth <= found.high
    assert 0.90 <= held / trials <= 0.985


def test_intervals_are_a_function_of_the_seed() -> None:
    values = [float(i % 3 == 0) for i in range(40)]
    assert interval(values, 3) == interval(values, 3)
    assert interval(values, 3) != interval(values, 4)
    assert interval([1.0] * 9, 0) == (1.0, 1.0, 1.0)


def test_a_planted_gap_is_found_and_pairing_is_what_finds_it() -> None:
    rng = np.random.default_rng(1)
    hard = rng.random(300)  # how hard a prompt is, for both
    b = (hard < 0.5).astype(float)
    a = np.where(rng.random(300) < 0.08, 1.0, b)  # better on a few prompts, worse on none
    found = paired(a.tolist(), b.tolist(), 0)
    assert found.low > 0
    assert found.p <= 2 / (REPLICATES + 1) * 1.001
    alone = interval(a.tolist(), 0), interval(b.tolist(), 0)
    assert alone[0].low < alone[1].high  # side by side one could not tell
    back = paired(b.tolist(), a.tolist(), 0)
    assert back.difference == -found.difference


def test_where_there_is_no_gap_it_is_rarely_claimed() -> None:
    rng = np.random.default_rng(2)
    trials, claimed = 200, 0
    for trial in range(trials):
        rates = rng.random(100)
        a, b = (rng.binomial(4, rates) / 4 for _ in range(2))
        found = paired(a.tolist(), b.tolist(), trial)
        claimed += found.p < 0.05
        assert (found.p < 0.05) == (found.low > 0 or found.high < 0) or 0.04 < found.p < 0.06
    assert claimed / trials <= 0.10
    assert claimed > 0  # it is a test of 5 %, not one that never speaks


def test_the_same_values_have_no_gap() -> None:
    assert paired([0.0, 1.0, 1.0], [0.0, 1.0, 1.0], 0) == (0.0, 0.0, 0.0, 1.0)
