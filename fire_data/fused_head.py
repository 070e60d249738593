"""The output head in training: logprobs, the loss and its gradient from one pass over the logits of a few positions.

Why one pass: the coefficients are known before the model runs, so the derivative of the loss follows from a chunk's
logprobs at once. Its logits become probabilities in place, enter the two products of the backward pass, and are
overwritten by the next chunk: nothing is kept, nothing computed twice, and the gradient of the output matrix is added
to `.grad` where it lies. That takes three matrix products per position, the least there are; the same through autograd
takes four, and a second matrix of the size of the head for every micro-batch.
Units: logprobs are nats. `_T` positions, `_D` hidden, `_V` vocabulary, `_K` ids per position, `_R` rows of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fire_data.head import Head, LinearHead, chunks, head_rows, plain_linear
from fire_data.vocabulary import Vocabulary, mask_logits

Loss = Callable[[slice, Tensor], Tensor]
"""From a slice of the positions and their logprobs, [t, K], to their part of the loss, a scalar."""

_CACHED = 1 << 17  # logits per block and thread on a CPU: what is read again and again stays in the cache
_TILE = 8192  # ids per product in 16 bits, whose results are added up in fp32


def head_backward(
    hidden_TD: Tensor, head: Head, ids_TK: Tensor, loss: Loss, vocabulary: Vocabulary, budget_bytes: int
) -> tuple[Tensor, Tensor]:
    """Add the gradient of Σ `loss` over chunks of positions to the head's `.grad`; return logprobs and the rest of it.

    A plain `nn.Linear` behind a `LinearHead` takes the fast way; any other head goes through autograd chunk by chunk.
    Both compute products in the dtype of autocast where it is on, sums and softmax in fp32 or better.

    Args:
        hidden_TD: the hidden states that predict the tokens; their graph is not entered.
        ids_TK: ids whose logprobs the loss needs, [T, K].
        loss: of a chunk's logprobs, differentiable in them; called once per chunk, in order.
        budget_bytes: no float tensor [positions, vocabulary] is larger, except that one position always runs. Below
            64 positions the products are slow: the output matrix is read for each chunk.

    Returns:
        `logprob_TK`, without gradient, and the gradient with respect to `hidden_TD`, for its own backward pass.

    Raises:
        TokenizerError: the head has fewer rows than the vocabulary has ids.
    """
    states_TD, linear = hidden_TD.detach(), plain_linear(head)
    wide = torch.promote_types(states_TD.dtype, torch.float32)
    rows = head_rows(head, states_TD)
    mask_logits(states_TD.new_zeros(0, rows), vocabulary)  # is the head wide enough?
    width = rows if linear is None else vocabulary.size
    slices = chunks(len(ids_TK), width * wide.itemsize, budget_bytes)
    found = [(states_TD.new_zeros(ids_TK.shape, dtype=wide)[:0], states_TD[:0])]
    if not slices:
        nothing = head(states_TD[:0]).sum()
        if nothing.requires_grad:
            torch.autograd.backward(nothing)  # the gradient of nothing is 0, not missing
    elif linear is None:
        found += [_through_autograd(states_TD[s], head, ids_TK[s], partial(loss, s), vocabulary) for s in slices]
    else:
        longest = max(s.stop - s.start for s in slices)
        buffer_TV, compute = states_TD.new_empty(longest, width, dtype=wide), _compute_dtype(states_TD)
        assert isinstance(head, LinearHead)
        with torch.autocast(states_TD.device.type, enabled=False):
            for s in slices:
                part_TD, p_TV = states_TD[s].to(compute), buffer_TV[: s.stop - s.start]
                found.append(_in_one_pass(part_TD, head, linear, ids_TK[s], partial(loss, s), vocabulary, p_TV))
    logprobs, gradients = zip(*found, strict=True)
    return torch.cat(logprobs), torch.cat(gradients).to(states_TD.dtype)


def token_logprobs(hidden_TD: Tensor, head: Head, ids: Tensor, vocabulary: Vocabulary, budget_bytes: int) -> Tensor:
    """log p of the tokens `ids`, in nats, fp32 or better; differentiable in hidden states and head.

    For any use of the logprobs, not only a loss that is known beforehand. The logits of a chunk are recomputed in the
    backward pass instead of kept, so the budget holds in both.

    Args:
        ids: one id per position, [T], or several, [T, K], for which the head is applied no more often.

    Returns:
        The shape of `ids`.
    """
    dtype = torch.promote_types(hidden_TD.dtype, torch.float32)
    ids_TK = ids[:, None] if ids.ndim == 1 else ids
    parts = [
        checkpoint(
            _logprobs, hidden_TD[chunk], head, ids_TK[chunk], vocabulary, use_reentrant=False, preserve_rng_state=False
        )
        for chunk in chunks(len(ids_TK), head_rows(head, hidden_TD) * dtype.itemsize, budget_bytes)
    ]
    logprob_TK = torch.cat(parts) if parts else hidden_TD.sum(1, keepdim=True).to(dtype).expand(ids_TK.shape)
    return logprob_TK.reshape(ids.shape)


def _logprobs(part_TD: Tensor, head: Head, ids_TK: Tensor, vocabulary: Vocabulary) -> Tensor:
    logits_TV = mask_logits(head(part_TD), vocabulary)
    return logits_TV.gather(1, ids_TK) - logits_TV.logsumexp(1, keepdim=True)


def _through_autograd(
    states_TD: Tensor, head: Head, ids_TK: Tensor, loss: Callable[[Tensor], Tensor], vocabulary: Vocabulary
) -> tuple[Tensor, Tensor]:
    """A chunk of a head of any kind: logprobs and the gradient of the states. Its graph ends with it."""
    leaf_TD = states_TD.clone().requires_grad_()
    now_TK = _logprobs(leaf_TD, head, ids_TK, vocabulary)
    torch.autograd.backward(loss(now_TK))
    return now_TK.detach(), torch.zeros_like(states_TD) if leaf_TD.grad is None else leaf_TD.grad


def _in_one_pass(
    states_TD: Tensor,
    head: LinearHead,
    linear: nn.Linear,
    ids_TK: Tensor,
    loss: Callable[[Tensor], Tensor],
    vocabulary: Vocabulary,
    p_TV: Tensor,
) -> tuple[Tensor, Tensor]:
    """The same for a linear head, its logits in `p_TV`; products are computed in the dtype of the states.

    With g_k the derivative of the loss by the logprob of the k-th id, that by the logit of v is Σ_k g_k (1[v = id_k] −
    p_v). The second term is −Σ_k g_k / Z times exp(logit − max), one number per position: it scales the small factor of
    each product, not the logits. The first touches K rows of the output matrix.
    """
    weight_VD = linear.weight.detach()[: vocabulary.size]
    _product(states_TD, weight_VD, p_TV)
    if linear.bias is not None:
        p_TV.add_(linear.bias.detach()[: vocabulary.size])
    logprob_TK, total_T1, slope_TK = _exponentials(p_TV, ids_TK, head, vocabulary)
    leaf_TK = logprob_TK.clone().requires_grad_()
    (gain_TK,) = torch.autograd.grad(loss(leaf_TK), leaf_TK)
    scale = head.factor / head.divisor
    share_T1, chosen_TK = -scale * gain_TK.sum(1, keepdim=True) / total_T1, scale * gain_TK * slope_TK
    gradient_TD = _back(p_TV, weight_VD, states_TD.dtype).mul_(share_T1)
    gradient_TD += torch.einsum("tk,tkd->td", chosen_TK, weight_VD[ids_TK].to(chosen_TK))
    wide_TD = states_TD.to(p_TV.dtype)
    if linear.weight.requires_grad:
        grad_VD = _grad(linear.weight)[: vocabulary.size]
        _add_outer(grad_VD, p_TV, share_T1 * wide_TD, states_TD.dtype)
        terms_TKD = chosen_TK[:, :, None] * wide_TD[:, None]
        grad_VD.index_add_(0, ids_TK.flatten(), terms_TKD.flatten(0, 1).to(grad_VD.dtype))
    if linear.bias is not None and linear.bias.requires_grad:
        grad_V = _grad(linear.bias)[: vocabulary.size]
        grad_V.add_((p_TV.mT @ share_T1)[:, 0])
        grad_V.index_add_(0, ids_TK.flatten(), chosen_TK.flatten().to(grad_V.dtype))
    return logprob_TK, gradient_TD


def _exponentials(
    logits_TV: Tensor, ids_TK: Tensor, head: LinearHead, vocabulary: Vocabulary
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn products into exp(logit − max) in place; return logprobs [T, K], sums [T, 1] and slopes at the ids [T, K].

    With soft-capping the result is multiplied by the slope of tanh, as the derivative wants it; the sums are without.
    The slope at an id is 1 without capping and 0 for a forbidden one.
    """
    forbidden_F = torch.from_numpy(np.flatnonzero(~vocabulary.allowed)).to(logits_TV.device)
    lowest, scale = torch.finfo(logits_TV.dtype).min / 4, head.factor / head.divisor
    step = max(1, len(logits_TV))
    if logits_TV.device.type == "cpu":
        step = max(1, min(step, _CACHED * torch.get_num_threads() // logits_TV.shape[1]))
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for x_RV, ids_RK in zip(torch.split(logits_TV, step), torch.split(ids_TK, step), strict=True):
        slope_RV = None
        if scale != 1.0:
            x_RV.mul_(scale)
        if head.cap:
            x_RV.div_(head.cap).tanh_()
            slope_RV = x_RV.square().neg_().add_(1)
            x_RV.mul_(head.cap)
        if len(forbidden_F):
            x_RV.index_fill_(1, forbidden_F, lowest)
        value_RK, largest_R1 = x_RV.gather(1, ids_RK), x_RV.amax(1, keepdim=True)
        x_RV.sub_(largest_R1).exp_()
        total_R1 = x_RV.sum(1, keepdim=True)
        slope_RK = torch.ones_like(value_RK)
        if slope_RV is not None:
            slope_RK = slope_RV.gather(1, ids_RK)
            x_RV.mul_(slope_RV)
        parts.append((value_RK - largest_R1 - total_R1.log(), total_R1, slope_RK.masked_fill(value_RK == lowest, 0)))
    logprob, total, slope = (torch.cat(column) for column in zip(*parts, strict=True))
    return logprob, total, slope


def _grad(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _compute_dtype(states: Tensor) -> torch.dtype:
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype


def _tiles(size: int, compute: torch.dtype, wide: torch.dtype) -> Iterator[slice]:
    """The whole vocabulary at once, or in tiles where results in 16 bits go into a wider tensor."""
    step = size if compute == wide else _TILE
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def _product(states_TD: Tensor, weight_VD: Tensor, out_TV: Tensor) -> None:
    """`states @ weight.T` into `out_TV`, computed in the dtype of the states."""
    for v in _tiles(len(weight_VD), states_TD.dtype, out_TV.dtype):
        if states_TD.dtype == out_TV.dtype == weight_VD.dtype:
            torch.mm(states_TD, weight_VD[v].mT, out=out_TV)
        else:
            out_TV[:, v] = states_TD @ weight_VD[v].to(states_TD.dtype).mT


def _back(p_TV: Tensor, weight_VD: Tensor, compute: torch.dtype) -> Tensor:
    """`p @ weight` in the dtype of `p_TV`, each product computed in `compute`."""
    total_TD = p_TV.new_zeros(len(p_TV), weight_VD.shape[1])
    for v in _tiles(len(weight_VD), compute, p_TV.dtype):
        total_TD += p_TV[:, v].to(compute) @ weight_VD[v].to(compute)
    return total_TD


def _add_outer(grad_VD: Tensor, p_TV: Tensor, factor_TD: Tensor, compute: torch.dtype) -> None:
    """`grad += p.T @ factor` in place, each product computed in `compute`."""
    for v in _tiles(len(grad_VD), compute, p_TV.dtype):
        if compute == grad_VD.dtype == p_TV.dtype:
            grad_VD[v].addmm_(p_TV[:, v].mT, factor_TD)
        else:
            grad_VD[v].add_(p_TV[:, v].to(compute).mT @ factor_TD.to(compute))
