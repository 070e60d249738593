"""What paired seeds are said to show: right by hand, honest by simulation, and silent where there is nothing."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from fire_data.experiment.statistics import (
    area,
    at,
    holm,
    least_p,
    median_reached,
    paired,
    pairs_needed,
    reached,
    sign_flip,
    t_p,
    t_quantile,
    within,
)
from fire_data.verify.bootstrap import interval

NORMAL, SKEWED, COARSE, HEAVY = "normal", "skewed", "coarse", "heavy"


def drawn(kind: str, effect: float, samples: int, n: int, seed: int = 0) -> np.ndarray:
    """Differences with mean `effect`: normal with sd 1, exponential, rounded as accuracies of few prompts are, or those
    of two exponentials, with heavy tails on both sides."""
    rng = np.random.default_rng(seed)
    if kind == HEAVY:
        return rng.exponential(1.0, (samples, n)) - rng.exponential(1.0, (samples, n)) + effect
    if kind == SKEWED:
        return rng.exponential(1.0, (samples, n)) - 1.0 + effect
    noise = rng.standard_normal((samples, n))
    return np.round(noise * 2) / 2 + effect if kind == COARSE else noise + effect


def test_students_t_is_that_of_scipy() -> None:
    for df, t in itertools.product(range(1, 31), (0.0, 0.1, 0.7, 2.0, 4.5, 20.0)):
        assert t_p(t, df) == pytest.approx(2 * stats.t.sf(t, df), abs=1e-12)
    for df, alpha in itertools.product((1, 2, 4, 9, 30), (0.5, 0.05, 0.001)):
        assert t_quantile(alpha, df) == pytest.approx(stats.t.ppf(1 - alpha / 2, df), rel=1e-6)


def test_a_paired_result_is_that_of_scipy_and_its_interval_leaves_zero_out_when_p_is_small() -> None:
    rng = np.random.default_rng(1)
    for n in (2, 5, 8):
        d = rng.normal(0.4, 1.0, n)
        found, theirs = paired(d), stats.ttest_1samp(d, 0.0)
        assert found.p == pytest.approx(theirs.pvalue, rel=1e-9)
        low, high = theirs.confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((low, high))
        assert (found.low > 0 or found.high < 0) == (found.p < 0.05)
        assert found.better == int((d > 0).sum())


def test_sign_flips_are_counted_exactly_and_have_the_least_p_that_is_told() -> None:
    d = np.array([0.3, -0.1, 0.2, 0.4, 0.05])
    patterns = [abs(np.dot(s, d)) for s in itertools.product((1, -1), repeat=5)]
    assert sign_flip(d) == pytest.approx(np.mean([p >= abs(d.sum()) - 1e-12 for p in patterns]))
    for n in range(2, 9):
        assert sign_flip(np.arange(1.0, n + 1)) == least_p(n) == 2 / 2**n
    assert least_p(5) > 0.05, "five seeds can never be significant by signs alone"
    assert least_p(pairs_needed(28)) * 28 <= 0.05 < least_p(pairs_needed(28) - 1) * 28
    many = np.random.default_rng(0).normal(1.0, 0.2, 30)
    assert sign_flip(many) < 0.001


def test_one_pair_and_pairs_without_spread_claim_nothing_that_is_not_there() -> None:
    one = paired([0.3])
    assert (one.p, one.low, one.high) == (1.0, -math.inf, math.inf)
    same = paired([0.0] * 5)
    assert (same.mean, same.low, same.high, same.p) == (0.0, 0.0, 0.0, 1.0)
    assert paired([0.1] * 5).p == least_p(5)
    assert within([0.0] * 5, 0.01) == 0.0
    assert within([0.1] * 5, 0.05) == 1.0


@pytest.mark.parametrize(("kind", "n", "least"), [
    (NORMAL, 3, 0.94), (NORMAL, 5, 0.94), (NORMAL, 8, 0.94), (COARSE, 5, 0.93), (SKEWED, 5, 0.86), (SKEWED, 8, 0.89),
])  # fmt: skip
def test_intervals_hold_the_truth_as_often_as_they_say_or_nearly_so_where_differences_are_skewed(
    kind: str, n: int, least: float
) -> None:
    covered = [r.low <= 0.3 <= r.high for d in drawn(kind, 0.3, 1500, n) for r in [paired(d)]]
    assert least <= np.mean(covered) <= 0.97


def test_a_percentile_bootstrap_of_five_pairs_would_be_too_narrow() -> None:
    covered = [i.low <= 0.3 <= i.high for d in drawn(NORMAL, 0.3, 200, 5) for i in [interval(list(d), 0)]]
    assert np.mean(covered) < 0.90


@pytest.mark.parametrize("kind", [NORMAL, COARSE, HEAVY])
def test_a_family_without_effects_has_a_false_claim_no_more_often_than_it_says(kind: str) -> None:
    """Nine comparisons with five seeds, all null: arms that are alike differ as much to one side as to the other."""
    families = drawn(kind, 0.0, 9 * 400, 5).reshape(400, 9, 5)
    claimed = [min(holm([paired(d).p for d in family])) < 0.05 for family in families]
    uncorrected = [min(paired(d).p for d in family) < 0.05 for family in families]
    assert np.mean(claimed) < 0.08
    assert np.mean(uncorrected) > 0.2, "without a correction every third family claims something"
    assert not any(min(holm([paired(d).p_flip for d in family])) < 0.05 for family in families)


def test_arms_with_equal_means_and_skewed_differences_are_where_the_t_test_claims_too_much() -> None:
    """Written down because the documentation says so: nine comparisons, five seeds, exponential differences."""
    families = drawn(SKEWED, 0.0, 9 * 200, 5).reshape(200, 9, 5)
    assert 0.15 < np.mean([min(holm([paired(d).p for d in family])) < 0.05 for family in families]) < 0.4


def test_a_planted_effect_is_found_and_a_larger_one_more_often() -> None:
    """One effect among nine comparisons, five seeds: half of the noise's sd, four and eight times it."""
    found = []
    for effect in (0.5, 4.0, 8.0):
        families = drawn(NORMAL, 0.0, 9 * 300, 5, seed=2).reshape(300, 9, 5)
        families[:, 0] += effect
        found.append(np.mean([holm([paired(d).p for d in family])[0] < 0.05 for family in families]))
    assert found[0] < 0.1
    assert 0.6 < found[1] < found[2]
    assert found[2] > 0.95


def test_equivalence_is_claimed_for_arms_that_are_close_and_not_for_those_that_are_not() -> None:
    close = [within(d * 0.01, 0.03) < 0.05 for d in drawn(NORMAL, 0.0, 400, 5)]
    at_the_margin = [within(d * 0.01 + 0.03, 0.03) < 0.05 for d in drawn(NORMAL, 0.0, 1000, 5)]
    assert np.mean(close) > 0.9
    assert np.mean(at_the_margin) < 0.07


def test_holm_is_what_it_is_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_curves_are_read_straight_between_their_points() -> None:
    tokens, values = [0.0, 100.0, 300.0], [0.0, 0.5, 0.9]
    assert at(tokens, values, 200.0) == pytest.approx(0.7)
    assert area(tokens, values, 300.0) == pytest.approx((25 + 140) / 300)
    assert area(tokens, values, 200.0) == pytest.approx((25 + 60) / 200)
    assert reached(tokens, values, 0.7) == pytest.approx(200.0)
    assert reached(tokens, values, 0.95) is None
    assert reached(tokens, [0.8, 0.9, 0.9], 0.7) == 0.0
    assert median_reached([10.0, None, 30.0]) == {"median": 30.0, "seeds": 2, "of": 3}
    assert median_reached([10.0, None, None])["median"] is None
