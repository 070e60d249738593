"""Promises of the sampler: noise belongs to the position, draws follow the processed distribution, nothing else."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from scipy import stats

from fire_data.sampling import Sampling, processed_logprobs, sample_tokens, seed_of, uniforms
from fire_data.schemas.errors import ConfigError

DRAWS = 20_000


def noise(count: int, name: str = "draws") -> torch.Tensor:
    return torch.from_numpy(uniforms(5, name, count))


def test_noise_depends_only_on_seed_trajectory_and_position() -> None:
    long = uniforms(7, "a", 100)
    assert np.array_equal(long[:10], uniforms(7, "a", 10))
    assert np.array_equal(long, uniforms(7, "a", 100))
    for other in (uniforms(8, "a", 100), uniforms(7, "b", 100), uniforms(71, "", 100)):
        assert not np.isin(other, long).any()


def test_seeds_for_engines_with_their_own_noise_are_63_bits_of_seed_trajectory_and_attempt() -> None:
    seeds = {seed_of(s, name, draw) for s in range(50) for name in ("a", "b", "ab", "1a") for draw in (0, 1)}
    assert len(seeds) == 400
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62
    assert seed_of(5, "x", 0) == 2124313369951190493


def test_noise_never_changes_between_versions() -> None:
    digest = hashlib.sha256(uniforms(0, "trajectory", 1000).tobytes()).hexdigest()
    assert digest == "5e0d0d3ad22e49285d0159e2279b90ee6dda91b6b19cc73b8e18314dfbf0cddc"


def test_noise_is_uniform_and_strictly_inside_the_unit_interval() -> None:
    values = np.concatenate([uniforms(3, str(i), 1000) for i in range(50)])
    assert values.dtype == np.float64
    assert values.min() > 0
    assert values.max() < 1
    assert stats.kstest(values, "uniform").pvalue > 1e-4
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.02


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1),
        Sampling(1, temperature=0.5),
        Sampling(1, temperature=1.7, top_k=7),
        Sampling(1, top_p=0.8),
        Sampling(1, temperature=1.5, top_k=9, top_p=0.9),
    ],
    ids=["plain", "temperature", "top_k", "top_p", "all"],
)
def test_draws_follow_the_processed_distribution(sampling: Sampling) -> None:
    logits_V = 2 * torch.randn(30, generator=torch.Generator().manual_seed(0))
    ids_B, logprob_B = sample_tokens(logits_V.expand(DRAWS, -1), noise(DRAWS), sampling)
    expected_V = by_hand(logits_V.double().numpy(), sampling)
    counts_V = np.bincount(ids_B.numpy(), minlength=30)
    assert counts_V[expected_V == 0].sum() == 0
    inside = expected_V > 0
    assert inside.sum() > 3
    assert stats.chisquare(counts_V[inside], expected_V[inside] * DRAWS).pvalue > 1e-4
    assert logprob_B.dtype == torch.float32
    np.testing.assert_allclose(logprob_B.numpy(), np.log(expected_V[ids_B.numpy()]), atol=1e-6)


def by_hand(logits_V: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The processed distribution, one token at a time."""
    weight_V = np.exp(logits_V / sampling.temperature)
    ranked = sorted(range(len(logits_V)), key=lambda v: -weight_V[v])
    ranked = ranked[: sampling.top_k or None]
    total, mass, kept = sum(weight_V[v] for v in ranked), 0.0, []
    for v in ranked:
        kept.append(v)
        mass += weight_V[v] / total
        if mass >= sampling.top_p:
            break
    probs_V = np.zeros_like(weight_V)
    probs_V[kept] = weight_V[kept] / weight_V[kept].sum()
    return probs_V


def test_processed_distribution_equals_transformers_own() -> None:
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits_BV = 3 * torch.randn(50, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(0.7), TopKLogitsWarper(12), TopPLogitsWarper(0.9)])
    theirs_BV = warpers(torch.zeros(50, 1, dtype=torch.int64), logits_BV).log_softmax(dim=-1)
    ours_BV = processed_logprobs(logits_BV, Sampling(0, temperature=0.7, top_k=12, top_p=0.9))
    torch.testing.assert_close(ours_BV, theirs_BV)


def test_tiny_top_p_is_greedy_even_between_equals() -> None:
    logits_BV = torch.tensor([[1.0, 3.0, 3.0, 0.0], [5.0, 5.0, 5.0, 5.0]])
    ids_B, logprob_B = sample_tokens(logits_BV, torch.tensor([0.999, 0.999]), Sampling(0, top_p=1e-300))
    assert ids_B.tolist() == [1, 0]
    assert logprob_B.tolist() == [0.0, 0.0]


def test_zero_probability_is_never_drawn_even_at_the_ends_of_the_noise() -> None:
    floor = torch.finfo(torch.float32).min / 4
    logits_BV = torch.tensor([[floor, 0.0, floor, 0.0, floor]]).expand(4, -1)
    ends_B = torch.tensor([2.0**-53, 0.5 - 2.0**-53, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    for temperature in (1.0, 0.01, 100.0):
        ids_B, logprob_B = sample_tokens(logits_BV, ends_B, Sampling(0, temperature=temperature))
        assert ids_B.tolist() == [1, 1, 3, 3]
        np.testing.assert_allclose(logprob_B.numpy(), np.log(0.5), atol=1e-7)


def test_rare_tokens_of_a_large_vocabulary_keep_their_probability() -> None:
    logits_BV = torch.zeros(1, 150_000)
    targets = np.array([0, 1, 74_999, 149_998, 149_999])
    noise_B = torch.from_numpy((targets + 0.5) / 150_000)
    ids_B, _ = sample_tokens(logits_BV.expand(5, -1), noise_B, Sampling(0))
    assert ids_B.tolist() == targets.tolist()


def test_chunking_rows_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits_BV = torch.randn(17, 30, generator=torch.Generator().manual_seed(2))
    sampling = Sampling(0, top_p=0.9, top_k=11)
    whole = sample_tokens(logits_BV, noise(17), sampling)
    monkeypatch.setattr("fire_data.sampling._CHUNK_BYTES", 8 * 30 * 4)
    chunked = sample_tokens(logits_BV, noise(17), sampling)
    assert torch.equal(whole[0], chunked[0])
    assert torch.equal(whole[1], chunked[1])


def test_greedy_takes_the_lowest_of_equals_and_reports_the_full_distribution() -> None:
    logits_BV = torch.tensor([[0.0, 2.0, 2.0], [1.0, 0.0, -1.0]])
    ids_B, logprob_B = sample_tokens(logits_BV, noise(2), Sampling(0, greedy=True, temperature=0.1, top_k=1))
    assert ids_B.tolist() == [1, 0]
    torch.testing.assert_close(logprob_B, logits_BV.log_softmax(-1).gather(1, ids_B[:, None])[:, 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_logprobs_are_float32_or_better(dtype: torch.dtype) -> None:
    _, logprob_B = sample_tokens(torch.zeros(3, 8, dtype=dtype), noise(3), Sampling(0))
    assert logprob_B.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize(
    "wrong", [{"temperature": 0.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_k": -1}, {"max_new_tokens": 0}]
)
def test_impossible_settings_are_named(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Sampling(0, **wrong)  # type: ignore[arg-type]
