"""Exact per-token signals of student and teacher from their hidden states, never holding all logits at once.

Why chunks of whole rows: every quantity here needs a normalised distribution, and [positions, vocabulary] is the
largest tensor of the whole pipeline. The heads are applied to as many positions as the budget allows, in the models'
dtype; `row_sums` then reads every logit once. Softmax in fp32, fp64 for fp64 models. Units: nats. Legend: `_M` models,
`_T` positions, `_D` hidden, `_V` vocabulary, `_K` the k best.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint

from fire_data.rowsums import row_sums
from fire_data.topk import candidates
from fire_data.vocabulary import Vocabulary, mask_logits, require_rows

Head = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class MatrixHead:
    """A head that is a matrix and nothing else, so that logits can be written into memory that is used again.

    On a CPU the system hands out new memory page by page, cleared: with small models that takes a fifth of the time.
    """

    matrix: torch.nn.Linear  # without bias

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.matrix(states)
        return logits


def is_plain(matrix: torch.nn.Module) -> bool:
    """Whether logits are the states times the weight, and nothing wraps it: then the weight may lie elsewhere."""
    wrapped = matrix._forward_hooks or matrix._forward_pre_hooks or "forward" in vars(matrix)
    return type(matrix) is torch.nn.Linear and matrix.bias is None and not wrapped


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
    states = student_hidden_TD, teacher_hidden_TD
    return _signals(states, (student_head, teacher_head), ids_T, vocabulary, budget_bytes, k, signals)


def model_signals(
    hidden_TD: torch.Tensor, head: Head, ids_T: torch.Tensor, vocabulary: Vocabulary, budget_bytes: int
) -> dict[str, torch.Tensor]:
    """What one model says of the tokens `ids_T`: `logprob`, `entropy`, `max_logprob`, `top1_id`, `rank`, each [T].

    The same numbers as `token_signals` gives of that model, where dtypes agree. Arguments as there.
    """
    return _signals((hidden_TD,), (head,), ids_T, vocabulary, budget_bytes, 0, True)


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


def chunk_signals(
    logits: Sequence[torch.Tensor], ids_T: torch.Tensor, vocabulary: Vocabulary, k: int = 0, signals: bool = True
) -> dict[str, torch.Tensor]:
    """`model_signals` of one model's logits, [T, V] of any float dtype and not masked, or `token_signals` of two.

    Changes no argument.
    """
    dtype = torch.float32
    for logits_TV in logits:
        require_rows(logits_TV.shape[1], vocabulary)
        dtype = torch.promote_types(dtype, logits_TV.dtype)
    found = row_sums(logits, ids_T if signals else None, vocabulary, dtype, k)
    log_MT = found["sum"].log()
    columns: dict[str, torch.Tensor] = {}
    if signals:
        models = [_of_model(found, log_MT, m) for m in range(len(logits))]
        columns = models[0] if len(models) == 1 else _of_both(found, log_MT, *models)
    return columns | (candidates(found, log_MT) if k else {})


def _of_model(found: dict[str, torch.Tensor], log_MT: torch.Tensor, m: int) -> dict[str, torch.Tensor]:
    """With x the logits minus their maximum and Z the sum of their exponentials: H = log Z - E[x]."""
    return {
        "logprob": found["x"][m] - log_MT[m],
        "entropy": (log_MT[m] - found["dot"][m] / found["sum"][m]).clamp(min=0),
        "max_logprob": -log_MT[m],
        "top1_id": found["top"][m],
        "rank": found["larger"][m].long() + 1,
    }


def _of_both(
    found: dict[str, torch.Tensor],
    log_MT: torch.Tensor,
    student: dict[str, torch.Tensor],
    teacher: dict[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """KL(S || T) = E_S[s - t] - log Z_S + log Z_T, with s and t the two x of `_of_model`."""
    student_gap_T, teacher_gap_T = found["gap"] / found["sum"]
    log_ratio_T = log_MT[0] - log_MT[1]
    return {
        **{f"student_{name}": values for name, values in student.items()},
        **{f"teacher_{name}": values for name, values in teacher.items()},
        "reverse_kl": (student_gap_T - log_ratio_T).clamp(min=0),
        "forward_kl": (log_ratio_T - teacher_gap_T).clamp(min=0),
        "teacher_rank_of_student_top1": found["cross"][0].long() + 1,
    }


def _signals(
    states: Sequence[torch.Tensor],
    heads: Sequence[Head],
    ids_T: torch.Tensor,
    vocabulary: Vocabulary,
    budget_bytes: int,
    k: int,
    signals: bool,
) -> dict[str, torch.Tensor]:
    """`chunk_signals`, chunk by chunk within the budget, of one or two models' hidden states [T, D]."""
    dtype = torch.float32
    for hidden_TD in states:
        dtype = torch.promote_types(dtype, hidden_TD.dtype)
    rows = max(_rows(head, hidden_TD) for head, hidden_TD in zip(heads, states, strict=True))
    parts = []
    with torch.no_grad():
        chunks = _chunks(len(ids_T), rows * dtype.itemsize, budget_bytes) or [slice(0, 0)]
        most = max(chunk.stop - chunk.start for chunk in chunks)
        rooms = [_room(head, hidden_TD, most) for head, hidden_TD in zip(heads, states, strict=True)]
        for chunk in chunks:
            given = zip(heads, states, rooms, strict=True)
            logits = [_logits(head, hidden_TD[chunk], room_TV) for head, hidden_TD, room_TV in given]
            logits = [x_TV.to(logits[0].device) for x_TV in logits]
            parts.append(chunk_signals(logits, ids_T[chunk], vocabulary, k, signals))
            del logits  # before the next chunk's logits exist
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _room(head: Head, hidden_TD: torch.Tensor, positions: int) -> torch.Tensor | None:
    """Memory for the logits of so many positions, for heads that can use it."""
    if not isinstance(head, MatrixHead) or hidden_TD.device.type != "cpu":
        return None
    return hidden_TD.new_empty(positions, head.matrix.out_features)


def _logits(head: Head, hidden_TD: torch.Tensor, room_TV: torch.Tensor | None) -> torch.Tensor:
    if room_TV is None or not isinstance(head, MatrixHead):
        return head(hidden_TD)
    return torch.mm(hidden_TD, head.matrix.weight.t(), out=room_TV[: len(hidden_TD)])


def _rows(head: Head, hidden_TD: torch.Tensor) -> int:
    """Output rows of a head, asked with no positions, which costs nothing."""
    with torch.no_grad():
        return int(head(hidden_TD[:0]).shape[-1])


def _chunks(positions: int, bytes_per_position: int, budget_bytes: int) -> list[slice]:
    """Slices of nearly equal length that each stay within the budget, or hold one position."""
    most = max(1, budget_bytes // bytes_per_position)
    number = -(-positions // most)
    return [slice(positions * i // number, positions * (i + 1) // number) for i in range(number)]
