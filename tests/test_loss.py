"""The loss is the paper's loss, a plain sum, and its gradient at ratio 1 is the weighted policy gradient.

`golden/fire_reference.parquet` holds 40 random batches run through the loss function of the paper's public repository
(float32, every case as one batch); per-token columns are stored as float32, which is exact.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from fire_data.loss import add_statistics, ratio_statistics, surrogate_loss
from fire_data.schemas.errors import DataError

GOLDEN = pl.read_parquet(Path(__file__).parent / "golden" / "fire_reference.parquet")
CASES = GOLDEN["case"].unique(maintain_order=True).to_list()


def _coefficients(case: pl.DataFrame) -> list[np.ndarray]:
    """Weighted advantage, keep and denominator of a case as one coefficient per token."""
    keep = case["expected_keep"].to_numpy()
    lengths = case["expected_weighted_advantage"].list.len().to_numpy()
    if case["loss_agg"][0] == "token-mean":
        denominators = np.full(len(lengths), lengths[keep].sum())
    else:
        denominators = keep.sum() * lengths
    advantages = case["expected_weighted_advantage"].to_list()
    return [np.array(a) * k / d for a, k, d in zip(advantages, keep, denominators, strict=True)]


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_equal_the_papers_code(name: str) -> None:
    case = GOLDEN.filter(pl.col("case") == name)
    coefficient = torch.tensor(np.concatenate(_coefficients(case)))
    now = torch.tensor(np.concatenate(case["student_logprob_now"].to_list()).astype(np.float64), requires_grad=True)
    old = torch.tensor(np.concatenate(case["student_logprob"].to_list()).astype(np.float64))
    loss = surrogate_loss(now, old, coefficient, clip=case["clip_ratio"][0])
    loss.backward()
    expected = np.concatenate(case["expected_grad"].to_list())
    assert loss.item() == pytest.approx(case["expected_loss"][0], rel=1e-5)
    np.testing.assert_allclose(now.grad.numpy(), expected, rtol=1e-5, atol=0)
    assert np.linalg.norm(now.grad.numpy() - expected) <= 1e-5 * np.linalg.norm(expected)


def test_reference_has_all_cases_and_clipped_tokens() -> None:
    assert len(CASES) == 40
    ratio = np.exp(GOLDEN["student_logprob_now"].explode().to_numpy() - GOLDEN["student_logprob"].explode().to_numpy())
    assert (np.abs(ratio - 1) > 0.2).mean() > 0.05


def _tokens(count: int, spread: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    old = -3 * torch.rand(count, generator=generator, dtype=torch.float64)
    now = old + spread * torch.randn(count, generator=generator, dtype=torch.float64)
    coefficient = torch.randn(count, generator=generator, dtype=torch.float64)
    return now.requires_grad_(), old, coefficient


def test_gradient_at_ratio_one_is_the_weighted_policy_gradient() -> None:
    logits = torch.randn(6, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    ids = torch.tensor([3, 1, 4, 1, 5, 9])
    coefficient = torch.tensor([0.7, -1.1, 0.0, 2.0, -0.3, 0.01], dtype=torch.float64)
    logprob = logits.log_softmax(-1)[torch.arange(6), ids]
    surrogate = torch.autograd.grad(surrogate_loss(logprob, logprob.detach(), coefficient), logits, retain_graph=True)
    policy_gradient = torch.autograd.grad(-(coefficient * logprob).sum(), logits)
    torch.testing.assert_close(surrogate[0], policy_gradient[0], rtol=1e-12, atol=0)
    assert surrogate[0].abs().max() > 0.1


def test_loss_is_a_sum_so_any_cut_adds_up() -> None:
    now, old, coefficient = _tokens(100, 0.5)
    whole = surrogate_loss(now, old, coefficient)
    pieces = [slice(0, 1), slice(1, 40), slice(40, 100)]
    cut = torch.stack([surrogate_loss(now[p], old[p], coefficient[p]) for p in pieces]).sum()
    assert cut.item() == pytest.approx(whole.item(), rel=1e-12)


def test_clip_removes_the_gradient_on_the_profitable_side_only() -> None:
    log_ratio = torch.tensor([0.5, -0.5, 0.5, -0.5], dtype=torch.float64, requires_grad=True)
    coefficient = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    surrogate_loss(log_ratio, torch.zeros(4, dtype=torch.float64), coefficient, 0.2).backward()
    expected = torch.tensor([0.0, -math.exp(-0.5), math.exp(0.5), 0.0], dtype=torch.float64)
    torch.testing.assert_close(log_ratio.grad, expected)
    counts = [
        ratio_statistics(x[None], torch.zeros(1), c[None], 0.2)["clipped"].item()
        for x, c in zip(log_ratio, coefficient, strict=True)
    ]
    assert counts == [1, 0, 0, 1]


def test_dual_clip_bounds_the_loss_of_negative_coefficients_only() -> None:
    log_ratio = torch.tensor([2.0, 1.0, 2.0, 0.0], dtype=torch.float64, requires_grad=True)
    coefficient = torch.tensor([-1.0, -1.0, 1.0, 1e-3], dtype=torch.float64)
    old = torch.zeros(4, dtype=torch.float64)
    plain = surrogate_loss(log_ratio, old, coefficient)
    dual = surrogate_loss(log_ratio, old, coefficient, dual_clip=3.0)
    assert plain.item() == pytest.approx(math.exp(2) + math.e - 1.201)
    assert dual.item() == pytest.approx(3.0 + math.e - 1.201)
    dual.backward()
    torch.testing.assert_close(log_ratio.grad, torch.tensor([0.0, math.e, 0.0, -1e-3], dtype=torch.float64))


def test_a_token_with_coefficient_zero_adds_nothing_whatever_it_holds() -> None:
    now = torch.tensor([-1.0, math.nan, -math.inf, 3e38], requires_grad=True)
    old = torch.tensor([-1.2, math.nan, -math.inf, -3e38])
    loss = surrogate_loss(now, old, torch.tensor([1.0, 0.0, 0.0, -0.0]))
    loss.backward()
    assert loss.item() == pytest.approx(-1.2)  # r = e^0.2 > 1.2: clipped
    assert now.grad.tolist() == [0.0, 0.0, 0.0, 0.0]


def test_huge_ratios_stay_finite() -> None:
    now = torch.tensor([0.0, -2000.0], requires_grad=True)
    loss = surrogate_loss(now, torch.tensor([-2000.0, 0.0]), torch.tensor([-1.0, 1.0]))
    loss.backward()
    assert loss.item() == pytest.approx(math.exp(20), rel=1e-5)
    assert torch.isfinite(now.grad).all()


def test_half_precision_logprobs_are_computed_in_single() -> None:
    now = torch.full((4,), -1.0, dtype=torch.bfloat16)
    loss = surrogate_loss(now, now, torch.full((4,), 1e-3))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(-4e-3, rel=1e-6)


def test_columns_of_different_shape_are_refused() -> None:
    with pytest.raises(DataError, match=r"\(3, 1\), \(3,\), \(3,\)"):
        surrogate_loss(torch.zeros(3, 1), torch.zeros(3), torch.zeros(3))


def test_statistics_of_parts_add_up_to_those_of_the_whole() -> None:
    now, old, coefficient = _tokens(60, 0.3)
    coefficient = coefficient * (torch.arange(60) % 4 != 0)
    whole = add_statistics([ratio_statistics(now, old, coefficient, 0.2)])
    parts = [ratio_statistics(now[s], old[s], coefficient[s], 0.2) for s in (slice(0, 7), slice(7, 60))]
    assert add_statistics(parts) == pytest.approx(whole)
    ratio = (now.detach() - old).exp()
    assert whole["tokens"] == 60
    assert whole["active"] == 45
    assert whole["abs_log_ratio"] == pytest.approx((now.detach() - old).abs().sum().item())
    assert whole["max_ratio"] == pytest.approx(ratio.max().item())
    without = surrogate_loss(now, old, coefficient)
    without.backward()
    assert whole["clipped"] == ((now.grad == 0) & (coefficient != 0)).sum().item() > 0


def test_drift_estimates_the_divergence_of_old_from_now() -> None:
    generator = torch.Generator().manual_seed(1)
    old_V = torch.tensor([0.9, 0.05, 0.05], dtype=torch.float64).log()
    now_V = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    ids = torch.multinomial(old_V.exp(), 200_000, replacement=True, generator=generator)
    estimate = ratio_statistics(now_V[ids], old_V[ids], torch.ones(len(ids)))["drift_kl"].item() / len(ids)
    exact = (old_V.exp() * (old_V - now_V)).sum().item()
    reverse = (now_V.exp() * (now_V - old_V)).sum().item()
    assert estimate == pytest.approx(exact, rel=0.02)
    assert abs(exact - reverse) > 0.1 * exact


def test_a_ratio_on_the_clip_range_is_not_clipped() -> None:
    now = torch.tensor([1.5, 0.5], dtype=torch.float64).log()
    found = ratio_statistics(now, torch.zeros(2, dtype=torch.float64), torch.tensor([1.0, -1.0]), clip=0.5)
    assert add_statistics([found])["clipped"] == 0
    assert add_statistics([ratio_statistics(now, torch.zeros(2), torch.tensor([1.0, -1.0]), clip=0.49)])["clipped"] == 2


def test_small_drifts_are_summed_in_double_precision() -> None:
    old = torch.full((1000,), -2.0)
    now = old + 2.0**-12
    x = 2.0**-12
    expected = 1000 * (x**2 / 2 + x**3 / 6)
    assert ratio_statistics(now, old, torch.ones(1000))["drift_kl"].item() == pytest.approx(expected, rel=1e-6)
