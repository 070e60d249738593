"""The k most likely tokens of student and teacher, and what each model thinks of the other's.

Ties are common in low precision and must not depend on the device, so equal logits go to the smaller id. The k best
ids lie in the k tiles with the best maxima: only those are searched, which costs a third of searching all. Logprobs are
over the full real vocabulary, not renormalised. Units: nats. Legend: `_T` positions, `_V` vocabulary, `_R` the rows of
one block, `_K` the k best, `_C` candidates.
"""

from __future__ import annotations

import torch

_TILE = 128  # ids whose maximum stands for them


def best(logits_RV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest logits of every row and their ids, both [R, K], in descending order, ties to the smaller id."""
    rows, size = logits_RV.shape
    tiles = size // _TILE
    if tiles <= k:
        ids_RK = _places(logits_RV, k)
    else:
        whole, device = tiles * _TILE, logits_RV.device
        tiles_RK = _places(logits_RV[:, :whole].view(rows, tiles, _TILE).amax(2), k)
        inside_RC = (tiles_RK[:, :, None] * _TILE + torch.arange(_TILE, device=device)).view(rows, k * _TILE)
        rest_RC = torch.arange(whole, size, device=device).expand(rows, -1)  # less than a tile: always searched
        ids_RC = torch.cat([inside_RC, rest_RC], 1)
        ids_RK = ids_RC.gather(1, _places(logits_RV.gather(1, ids_RC), k))
    found = torch.sort(logits_RV.gather(1, ids_RK), dim=1, descending=True, stable=True)
    return found.values, ids_RK.gather(1, found.indices)


def _places(values_RC: torch.Tensor, k: int) -> torch.Tensor:
    """Where the k largest of every row stand, [R, K] ascending; of equals, the first ones.

    A selection takes any of equals; where that matters, the slower stable sort decides.
    """
    top = values_RC.topk(k, dim=1, sorted=True)
    places_RK = top.indices
    if bool(((values_RC >= top.values[:, -1:]).sum(1) > k).any()):
        places_RK = torch.sort(values_RC, dim=1, descending=True, stable=True).indices[:, :k]
    return places_RK.sort(1).values


def block_candidates(
    student_RV: torch.Tensor, teacher_RV: torch.Tensor, k: int, work_RV: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The columns of `ADDONS["topk"]`, each [R, K], from masked logits of one dtype and device.

    Args:
        k: at most the number of allowed ids.
        work_RV: a tensor of the logits' shape to work in.
    """
    student_RK, student_ids_RK = best(student_RV, k)
    teacher_RK, teacher_ids_RK = best(teacher_RV, k)
    student_R1 = _normaliser(student_RV, student_RK[:, :1], work_RV)
    teacher_R1 = _normaliser(teacher_RV, teacher_RK[:, :1], work_RV)

    def logprobs(logits_RK: torch.Tensor, max_R1: torch.Tensor, log_R1: torch.Tensor) -> torch.Tensor:
        return (logits_RK - max_R1) - log_R1

    return {
        "student_topk_ids": student_ids_RK.int(),
        "student_topk_logprobs": logprobs(student_RK, student_RK[:, :1], student_R1),
        "teacher_topk_ids": teacher_ids_RK.int(),
        "teacher_topk_logprobs": logprobs(teacher_RK, teacher_RK[:, :1], teacher_R1),
        "teacher_logprob_on_student_topk": logprobs(
            teacher_RV.gather(1, student_ids_RK), teacher_RK[:, :1], teacher_R1
        ),
        "student_logprob_on_teacher_topk": logprobs(
            student_RV.gather(1, teacher_ids_RK), student_RK[:, :1], student_R1
        ),
    }


def _normaliser(logits_RV: torch.Tensor, max_R1: torch.Tensor, work_RV: torch.Tensor) -> torch.Tensor:
    """log of the sum of exp(logit - max), [R, 1]."""
    torch.sub(logits_RV, max_R1, out=work_RV)
    return torch.exp(work_RV, out=work_RV).sum(1, keepdim=True).log()
