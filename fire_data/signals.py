"""Exact per-token signals of student and teacher from their hidden states, never holding all logits at once.

Why chunks of whole rows: every quantity here needs a normalised distribution, and [positions, vocabulary] is the
largest tensor of the whole pipeline. The heads are applied to as many positions as the budget allows; the statistics
of such a chunk are taken a few rows at a time, which stay in the processor's cache while they are read again and
again. Softmax in fp32, fp64 for fp64 models. Units: nats. Legend: `_T` positions, `_D` hidden, `_V` vocabulary,
`_R` the rows of one block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.utils.checkpoint import checkpoint

from fire_data.topk import block_candidates
from fire_data.vocabulary import Vocabulary, mask_logits

Head = Callable[[torch.Tensor], torch.Tensor]
_CACHED = 1 << 17  # logits per block and thread on a CPU: six such blocks in fp32 are 3 MiB
_TILE = 1024  # logits per tile in the search for the largest


def token_signals(
    student_hidden_TD: torch.Tensor,
    student_head: Head,
    teacher_hidden_TD: torch.Tensor,
    teacher_head: Head,
    ids_T: torch.Tensor,
    vocabulary: Vocabulary,
    budget_bytes: int,
    *,
    k: int = 0,
    signals: bool = True,
) -> dict[str, torch.Tensor]:
    """All columns of `tables.SIGNALS` for the tokens `ids_T`, each of shape [T], on the student's device.

    With `k`, also those of `ADDONS["topk"]`, each [T, K]; without `signals`, those alone. Both are from the same logits
    and have the same values together as apart.

    Entropies and divergences are over the full real vocabulary and clamped at 0, below which only rounding leads.
    Ranks are 1 + the number of strictly larger logits. Floats are fp32 (fp64 for fp64 models), ids and ranks int64.

    Args:
        student_hidden_TD: the hidden states [T, D] that predict the tokens.
        teacher_hidden_TD: the same of the teacher, [T, D'] on any device.
        budget_bytes: no float tensor [positions, vocabulary] is larger, except that one position always runs.
        k: most likely tokens of each model to return; at most the number of allowed ids.
    """

    def columns(student_TV: torch.Tensor, teacher_TV: torch.Tensor, ids_T: torch.Tensor) -> dict[str, torch.Tensor]:
        found = chunk_signals(student_TV, teacher_TV, ids_T) if signals else {}
        return found | (chunk_candidates(student_TV, teacher_TV, k) if k else {})

    rows = max(_rows(student_head, student_hidden_TD), _rows(teacher_head, teacher_hidden_TD))
    dtype = torch.promote_types(torch.promote_types(student_hidden_TD.dtype, teacher_hidden_TD.dtype), torch.float32)
    parts: list[dict[str, torch.Tensor]] = []
    with torch.no_grad():
        for chunk in _chunks(len(ids_T), rows * dtype.itemsize, budget_bytes):
            student_TV = mask_logits(student_head(student_hidden_TD[chunk]), vocabulary).to(dtype)
            teacher_TV = mask_logits(teacher_head(teacher_hidden_TD[chunk]), vocabulary).to(student_TV)
            parts.append(columns(student_TV, teacher_TV, ids_T[chunk]))
            del student_TV, teacher_TV  # before the next chunk's logits exist
    empty = student_hidden_TD.new_zeros(0, vocabulary.size, dtype=dtype)
    parts = parts or [columns(empty, empty, ids_T)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def model_signals(
    hidden_TD: torch.Tensor, head: Head, ids_T: torch.Tensor, vocabulary: Vocabulary, budget_bytes: int
) -> dict[str, torch.Tensor]:
    """What one model says of the tokens `ids_T`: `logprob`, `entropy`, `max_logprob`, `top1_id`, `rank`, each [T].

    The same numbers as `token_signals` gives of that model, where dtypes agree. Arguments as there.
    """
    dtype = torch.promote_types(hidden_TD.dtype, torch.float32)
    parts: list[dict[str, torch.Tensor]] = []
    with torch.no_grad():
        for chunk in _chunks(len(ids_T), _rows(head, hidden_TD) * dtype.itemsize, budget_bytes):
            logits_TV = mask_logits(head(hidden_TD[chunk]), vocabulary)
            step, blocks = _blocks(logits_TV)
            buffers = [logits_TV.new_empty(step, logits_TV.shape[1]) for _ in range(2)]
            parts += [_block_model(logits_TV[b], ids_T[chunk][b, None], buffers) for b in blocks]
            del logits_TV  # before the next chunk's logits exist
    empty_TV = hidden_TD.new_zeros(0, vocabulary.size, dtype=dtype)
    parts = parts or [_block_model(empty_TV, ids_T[:, None], [empty_TV, empty_TV.clone()])]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def token_logprobs(
    hidden_TD: torch.Tensor, head: Head, ids: torch.Tensor, vocabulary: Vocabulary, budget_bytes: int
) -> torch.Tensor:
    """log p of the tokens `ids`, in nats, fp32 or better; differentiable in hidden states and head.

    The logits of a chunk are recomputed in the backward pass instead of kept, so the budget holds in both.

    Args:
        ids: one id per position, [T], or several, [T, K], for which the head is applied no more often.

    Returns:
        The shape of `ids`.
    """
    dtype = torch.promote_types(hidden_TD.dtype, torch.float32)
    ids_TK = ids[:, None] if ids.ndim == 1 else ids

    def logprobs(part_TD: torch.Tensor, part_ids_TK: torch.Tensor) -> torch.Tensor:
        logits_TV = mask_logits(head(part_TD), vocabulary)
        return logits_TV.gather(1, part_ids_TK) - logits_TV.logsumexp(1, keepdim=True)

    parts = [
        checkpoint(logprobs, hidden_TD[chunk], ids_TK[chunk], use_reentrant=False, preserve_rng_state=False)
        for chunk in _chunks(len(ids_TK), _rows(head, hidden_TD) * dtype.itemsize, budget_bytes)
    ]
    logprob_TK = torch.cat(parts) if parts else hidden_TD.sum(1, keepdim=True).to(dtype).expand(ids_TK.shape)
    return logprob_TK.reshape(ids.shape)


def chunk_signals(student_TV: torch.Tensor, teacher_TV: torch.Tensor, ids_T: torch.Tensor) -> dict[str, torch.Tensor]:
    """`token_signals` of logits that are already masked; both [T, V] of one dtype and device. Changes no argument."""
    step, blocks = _blocks(student_TV)
    buffers = [student_TV.new_empty(step, student_TV.shape[1]) for _ in range(4)]
    parts = [_block_signals(student_TV[b], teacher_TV[b], ids_T[b, None], buffers) for b in blocks]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def chunk_candidates(student_TV: torch.Tensor, teacher_TV: torch.Tensor, k: int) -> dict[str, torch.Tensor]:
    """The columns of `ADDONS["topk"]`, each [T, K], of logits that are already masked. Changes no argument."""
    step, blocks = _blocks(student_TV)
    work_RV = student_TV.new_empty(step, student_TV.shape[1])
    parts = [block_candidates(student_TV[b], teacher_TV[b], k, work_RV[: len(student_TV[b])]) for b in blocks]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _blocks(logits_TV: torch.Tensor) -> tuple[int, list[slice]]:
    """Rows of a block, and the blocks that cover all rows; one empty block if there are none."""
    positions, size = logits_TV.shape
    step = max(1, positions)
    if logits_TV.device.type == "cpu":
        step = min(step, max(1, _CACHED * torch.get_num_threads() // size))
    return step, [slice(i, min(i + step, positions)) for i in range(0, max(1, positions), step)]


def _block_signals(
    student_RV: torch.Tensor, teacher_RV: torch.Tensor, ids_R1: torch.Tensor, buffers: list[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Signals of a few rows; `buffers` are four tensors of at least their shape to work in.

    With s and t the logits minus their maxima and Z the sums of their exponentials:
    H(S) = log Z_S - E_S[s] and KL(S || T) = E_S[s - t] - log Z_S + log Z_T. The difference is taken before the mean,
    so that a small divergence between large logits keeps its digits.
    """
    s_RV, t_RV, p_RV, work_RV = (buffer[: len(ids_R1)] for buffer in buffers)
    student_max_R1, student_top1_R1 = _largest(student_RV)
    teacher_max_R1, teacher_top1_R1 = _largest(teacher_RV)
    ranks = {
        "student_rank": _rank(student_RV, ids_R1, work_RV),
        "teacher_rank": _rank(teacher_RV, ids_R1, work_RV),
        "teacher_rank_of_student_top1": _rank(teacher_RV, student_top1_R1, work_RV),
    }
    torch.sub(student_RV, student_max_R1, out=s_RV)
    torch.sub(teacher_RV, teacher_max_R1, out=t_RV)
    student_id_R, teacher_id_R = s_RV.gather(1, ids_R1)[:, 0], t_RV.gather(1, ids_R1)[:, 0]

    torch.exp(s_RV, out=p_RV)
    student_sum_R = p_RV.sum(1)
    student_mean_R = torch.mul(p_RV, s_RV, out=work_RV).sum(1) / student_sum_R
    s_RV.sub_(t_RV)
    student_gap_R = p_RV.mul_(s_RV).sum(1) / student_sum_R
    torch.exp(t_RV, out=p_RV)
    teacher_sum_R = p_RV.sum(1)
    teacher_mean_R = t_RV.mul_(p_RV).sum(1) / teacher_sum_R
    teacher_gap_R = p_RV.mul_(s_RV).sum(1) / teacher_sum_R

    student_log_R, teacher_log_R = student_sum_R.log(), teacher_sum_R.log()
    return {
        "student_logprob": student_id_R - student_log_R,
        "student_entropy": (student_log_R - student_mean_R).clamp(min=0),
        "teacher_logprob": teacher_id_R - teacher_log_R,
        "teacher_entropy": (teacher_log_R - teacher_mean_R).clamp(min=0),
        "reverse_kl": (student_gap_R - (student_log_R - teacher_log_R)).clamp(min=0),
        "forward_kl": ((student_log_R - teacher_log_R) - teacher_gap_R).clamp(min=0),
        "student_max_logprob": -student_log_R,
        "teacher_max_logprob": -teacher_log_R,
        "student_top1_id": student_top1_R1[:, 0],
        "teacher_top1_id": teacher_top1_R1[:, 0],
        **ranks,
    }


def _block_model(logits_RV: torch.Tensor, ids_R1: torch.Tensor, buffers: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """One model's signals of a few rows, in the steps of `_block_signals`; `buffers` are two tensors to work in."""
    s_RV, p_RV = (buffer[: len(ids_R1)] for buffer in buffers)
    max_R1, top1_R1 = _largest(logits_RV)
    rank_R = _rank(logits_RV, ids_R1, p_RV)
    torch.sub(logits_RV, max_R1, out=s_RV)
    id_R = s_RV.gather(1, ids_R1)[:, 0]
    torch.exp(s_RV, out=p_RV)
    sum_R = p_RV.sum(1)
    log_R, mean_R = sum_R.log(), s_RV.mul_(p_RV).sum(1) / sum_R
    return {
        "logprob": id_R - log_R,
        "entropy": (log_R - mean_R).clamp(min=0),
        "max_logprob": -log_R,
        "top1_id": top1_R1[:, 0],
        "rank": rank_R,
    }


def _largest(logits_RV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest logit and its id (the first among equals), both [R, 1].

    In two steps, tile maxima and then one tile, as a maximum without index is several times faster than one with it.
    """
    size = logits_RV.shape[1]
    if size < 2 * _TILE:
        top = logits_RV.max(1, keepdim=True)
        return top.values, top.indices
    whole = size // _TILE * _TILE
    maxima = logits_RV[:, :whole].view(len(logits_RV), -1, _TILE).amax(2)
    start_R1 = maxima.argmax(1, keepdim=True) * _TILE
    inside_RV = logits_RV.gather(1, start_R1 + torch.arange(_TILE, device=logits_RV.device))
    top = inside_RV.max(1, keepdim=True)
    values, indices = top.values, top.indices + start_R1
    if whole < size:
        rest = logits_RV[:, whole:].max(1, keepdim=True)
        larger = rest.values > values
        values, indices = values.where(~larger, rest.values), indices.where(~larger, rest.indices + whole)
    return values, indices


def _rank(logits_RV: torch.Tensor, ids_R1: torch.Tensor, work_RV: torch.Tensor) -> torch.Tensor:
    """1 + the number of strictly larger logits, [R]. Counted in the dtype of `work_RV`: exact up to 2**24 ids."""
    return torch.gt(logits_RV, logits_RV.gather(1, ids_R1), out=work_RV).sum(1).long() + 1


def _rows(head: Head, hidden_TD: torch.Tensor) -> int:
    """Output rows of a head, asked with no positions, which costs nothing."""
    with torch.no_grad():
        return int(head(hidden_TD[:0]).shape[-1])


def _chunks(positions: int, bytes_per_position: int, budget_bytes: int) -> Iterator[slice]:
    """Slices of nearly equal length that each stay within the budget, or hold one position."""
    most = max(1, budget_bytes // bytes_per_position)
    number = -(-positions // most)
    for i in range(number):
        yield slice(positions * i // number, positions * (i + 1) // number)
