"""Draws tokens by inverse CDF from noise that belongs to (seed, trajectory, position), never to a batch.

One uniform number per token is all the randomness there is, and it is a pure function of the seed, the trajectory
and the position. So a sample does not depend on its neighbours, on the order of work or on how often the work was
interrupted: only on the logits. Everything is float64 inside, because a float32 cumulative sum over 150,000 tokens
is off by more than the probability of a rare one.

Units: logprobs in nats, temperature a divisor of logits, positions count response tokens from 0.
Suffixes: _B sequences, _V vocabulary.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fire_data.schemas.errors import ConfigError

# Bounds the float64 work arrays, a handful of which live at once. Rows are independent: it changes no result.
_CHUNK_BYTES = 32 * 1024 * 1024


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. `top_p=1`, `top_k=0` and `temperature=1` change nothing; `greedy` ignores all three."""

    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 1024
    greedy: bool = False

    def __post_init__(self) -> None:
        bounds = {
            "temperature": (0.0 < self.temperature < float("inf"), "above 0 and finite"),
            "top_p": (0.0 < self.top_p <= 1.0, "above 0 and at most 1"),
            "top_k": (self.top_k >= 0, "0 (off) or more"),
            "max_new_tokens": (self.max_new_tokens >= 1, "1 or more"),
        }
        for name, (good, allowed) in bounds.items():
            if not good:
                raise ConfigError(f"{name} is {getattr(self, name)}, allowed: {allowed}", where="sampling")


def uniforms(seed: int, trajectory_id: str, count: int) -> np.ndarray:
    """Noise of the first `count` positions of a trajectory: float64 [count], strictly inside (0, 1).

    Position t's number depends on (seed, trajectory_id, t) only, so a longer count has the shorter one as its prefix.
    Counter-based generator Philox-4x64 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) whose
    128-bit key is BLAKE2b of seed and trajectory_id; 52 bits a number, centred in their cell: never 0, never 1.
    """
    digest = hashlib.blake2b(f"{seed}\0{trajectory_id}".encode(), digest_size=16).digest()
    raw = np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(count)
    noise: np.ndarray = ((raw >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    return noise


def seed_of(seed: int, trajectory_id: str, attempt: int = 0) -> int:
    """63 bits for engines with noise of their own, the same whenever and wherever a trajectory is asked for."""
    digest = hashlib.blake2b(f"{seed}\0{trajectory_id}\0{attempt}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def processed_logprobs(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """Log of the distribution sampled from: float64 [B, V], normalised, -inf outside of top-k and top-p.

    Temperature first, then top-k, then top-p of what top-k left, renormalised. Top-p keeps the smallest set of most
    likely tokens whose probability reaches `top_p` (Holtzman et al., arXiv 1904.09751, section 3.1). A tie at the edge
    of top-k is kept whole, as in transformers and vLLM; one at the edge of top-p goes to the lower ids.
    """
    scaled_BV = logits_BV.double()
    if sampling.temperature != 1.0:
        scaled_BV = scaled_BV / sampling.temperature
    logprobs_BV = torch.log_softmax(scaled_BV, dim=-1)
    cut = False
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        edge_B1 = logprobs_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logprobs_BV = logprobs_BV.masked_fill(logprobs_BV < edge_B1, float("-inf"))
        cut = True
    if sampling.top_p < 1.0:
        ranked_BV, order_BV = logprobs_BV.sort(dim=-1, descending=True, stable=True)
        ranked_BV = ranked_BV.softmax(dim=-1)
        before_BV = ranked_BV.cumsum(dim=-1) - ranked_BV
        outside_BV = (before_BV >= sampling.top_p).scatter(1, order_BV, before_BV >= sampling.top_p)
        logprobs_BV = logprobs_BV.masked_fill(outside_BV, float("-inf"))
        cut = True
    return torch.log_softmax(logprobs_BV, dim=-1) if cut else logprobs_BV


def sample_tokens(logits_BV: Tensor, uniforms_B: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Draw one token per row: ids int64 [B] and their logprob [B] in nats (float32, or float64 for float64 logits).

    `logits_BV` are already masked to the vocabulary; `uniforms_B` is float64 in (0, 1), unused when greedy. The token
    is the first whose cumulative probability exceeds the uniform, so a token of probability zero is never drawn. The
    logprob is under the distribution drawn from (`processed_logprobs`). Greedy takes the largest logit, of equals the
    lowest id; its logprob is under the full distribution at temperature 1, as no other says more than "certain".
    A row of logits that are not finite gives a logprob that is not finite: callers check.
    """
    rows = max(1, _CHUNK_BYTES // (8 * logits_BV.shape[-1]))
    pick = _pick_greedy if sampling.greedy else _pick_sampled
    dtype = torch.promote_types(logits_BV.dtype, torch.float32)
    chunks = zip(torch.split(logits_BV, rows), torch.split(uniforms_B, rows), strict=True)
    parts = [pick(chunk_BV, chunk_B, sampling) for chunk_BV, chunk_B in chunks]
    ids_B, logprob_B = parts[0] if len(parts) == 1 else (torch.cat(both) for both in zip(*parts, strict=True))
    return ids_B, logprob_B.to(dtype)


def _pick_greedy(logits_BV: Tensor, _uniforms_B: Tensor, _sampling: Sampling) -> tuple[Tensor, Tensor]:
    ids_B1 = logits_BV.argmax(dim=-1, keepdim=True)
    logprob_B1 = logits_BV.double().log_softmax(dim=-1).gather(1, ids_B1)
    return ids_B1.squeeze(1), logprob_B1.squeeze(1)


def _pick_sampled(logits_BV: Tensor, uniforms_B: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    logprobs_BV = processed_logprobs(logits_BV, sampling)
    probs_BV = logprobs_BV.exp()
    cdf_BV = probs_BV.cumsum(dim=-1)
    # Scaling the uniform by the last value normalises the sum, and u < 1 then lies strictly below that value.
    target_B1 = uniforms_B.unsqueeze(1) * cdf_BV[:, -1:]
    ids_B1 = torch.searchsorted(cdf_BV, target_B1, right=True).clamp_(max=logits_BV.shape[-1] - 1)
    # A parallel scan on a GPU may step by one rounding error where the probability is zero.
    impossible_B1 = probs_BV.gather(1, ids_B1) == 0
    ids_B1 = torch.where(impossible_B1, logprobs_BV.argmax(dim=-1, keepdim=True), ids_B1)
    return ids_B1.squeeze(1), logprobs_BV.gather(1, ids_B1).squeeze(1)
