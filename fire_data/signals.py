"""Exact per-token signals of student and teacher from their hidden states, never holding all logits at once.

Why chunks of whole rows: every quantity here needs a normalised distribution, and [positions, vocabulary] is the
largest tensor of the whole pipeline. The heads are applied to as many positions as the budget allows, in the models'
dtype; `row_sums` then reads every logit once. Softmax in fp32, fp64 for fp64 models. Units: nats. Legend: `_M` models,
`_T` positions, `_D` hidden, `_V` vocabulary, `_K` the k best.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fire_data.head import Head, chunks, head_rows, only_weight
from fire_data.rowsums import row_sums
from fire_data.topk import candidates
from fire_data.vocabulary import Vocabulary, require_rows


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
    rows = max(head_rows(head, hidden_TD) for head, hidden_TD in zip(heads, states, strict=True))
    parts = []
    with torch.no_grad():
        slices = chunks(len(ids_T), rows * dtype.itemsize, budget_bytes) or [slice(0, 0)]
        most = max(chunk.stop - chunk.start for chunk in slices)
        rooms = [_room(head, hidden_TD, most) for head, hidden_TD in zip(heads, states, strict=True)]
        for chunk in slices:
            given = zip(heads, states, rooms, strict=True)
            logits = [_logits(head, hidden_TD[chunk], room_TV) for head, hidden_TD, room_TV in given]
            logits = [x_TV.to(logits[0].device) for x_TV in logits]
            parts.append(chunk_signals(logits, ids_T[chunk], vocabulary, k, signals))
            del logits  # before the next chunk's logits exist
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _room(head: Head, hidden_TD: torch.Tensor, positions: int) -> torch.Tensor | None:
    """Memory for the logits of so many positions, to be used again, for heads that can write into it.

    On a CPU the system hands out new memory page by page, cleared: with small models that takes a fifth of the time.
    """
    weight_VD = only_weight(head)
    if weight_VD is None or hidden_TD.device.type != "cpu":
        return None
    return hidden_TD.new_empty(positions, len(weight_VD))


def _logits(head: Head, hidden_TD: torch.Tensor, room_TV: torch.Tensor | None) -> torch.Tensor:
    weight_VD = only_weight(head)
    if room_TV is None or weight_VD is None:
        return head(hidden_TD)
    return torch.mm(hidden_TD, weight_VD.t(), out=room_TV[: len(hidden_TD)])
