"""The k most likely tokens of student and teacher, and what each model thinks of the other's.

Ties are common in low precision and must not depend on the device, so equal logits go to the smaller id. The k best
ids lie in the k groups with the best maxima: only those are searched, which costs a third of searching all. Logprobs
are over the full real vocabulary, not renormalised. Units: nats. Legend: `_M` models, `_T` positions, `_V` vocabulary,
`_R` the rows of one block, `_K` the k best, `_N` groups, `_C` candidates.
"""

from __future__ import annotations

import torch

GROUP = 128  # ids whose maximum stands for them


def best(logits_RV: torch.Tensor, k: int, maxima_RN: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest logits of every row and their ids, both [R, K], in descending order, ties to the smaller id.

    `maxima_RN`: the largest logits of every whole group, where they are known.
    """
    rows, size = logits_RV.shape
    groups = size // GROUP
    if groups <= k:
        ids_RK = _places(logits_RV, k)
    else:
        whole, device = groups * GROUP, logits_RV.device
        if maxima_RN is None:
            maxima_RN = logits_RV[:, :whole].view(rows, groups, GROUP).amax(2)
        groups_RK = _places(maxima_RN, k)
        inside_RC = (groups_RK[:, :, None] * GROUP + torch.arange(GROUP, device=device)).view(rows, k * GROUP)
        rest_RC = torch.arange(whole, size, device=device).expand(rows, -1)  # less than a group: always searched
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


def candidates(found: dict[str, torch.Tensor], log_MT: torch.Tensor) -> dict[str, torch.Tensor]:
    """The columns of `ADDONS["topk"]`, each [T, K].

    Args:
        found: `row_sums` of student and teacher.
        log_MT: the logs of its `sum`.
    """
    own_MTK, other_MTK = found["best"] - log_MT[..., None], found["other"] - log_MT.flip(0)[..., None]
    ids_MTK = found["best_ids"].int()
    return {
        "student_topk_ids": ids_MTK[0],
        "student_topk_logprobs": own_MTK[0],
        "teacher_topk_ids": ids_MTK[1],
        "teacher_topk_logprobs": own_MTK[1],
        "teacher_logprob_on_student_topk": other_MTK[0],
        "student_logprob_on_teacher_topk": other_MTK[1],
    }
