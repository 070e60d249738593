"""Which rows go through the model together, how they are padded or packed, and where responses are predicted.

Scores belong to tokens and the loss is a sum over them, so grouping is free. Padded rows go together by length, so
little is padded; packed rows, one after the other without padding, so that few groups are needed and all are of similar
size. Grouping depends only on the lengths and the budget, never on time or memory, so a step can be repeated exactly.
Units: lengths and budgets are tokens. `_B` sequences, `_L` padded or packed length, `_T` response tokens, packed.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

GROUP_COST = 1 / 32
"""What running the model once more costs beside its tokens, as a share of the token budget."""

Row = Sequence[int] | npt.NDArray[np.integer]


def micro_batches(lengths: Sequence[int], tokens_per_microbatch: int) -> list[list[int]]:
    """Group row indices so that rows × longest row stays within the budget; a longer row goes alone.

    Every row is in exactly one group and groups are runs of the rows by length, longest first, so what does not fit in
    memory fails at once. Ties keep the order of the rows. Among all such groupings it is the one that computes the
    fewest tokens, padding included, a group itself counting as many as `GROUP_COST` of the budget: filling every group
    to the brim would pad more, a group per length would run the model on too little at a time.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    group_cost = tokens_per_microbatch * GROUP_COST
    best = [0.0] + [math.inf] * len(order)  # by number of rows grouped, and where the last of these groups starts
    starts = [0] * len(best)
    for start, row in enumerate(order):
        fitting = max(1, tokens_per_microbatch // max(1, lengths[row]))
        for end in range(start + 1, min(start + fitting, len(order)) + 1):
            cost = best[start] + group_cost + (end - start) * lengths[row]
            if cost < best[end]:
                best[end], starts[end] = cost, start
    groups: list[list[int]] = []
    end = len(order)
    while end:
        groups.append(order[starts[end] : end])
        end = starts[end]
    return groups[::-1]


def packed_batches(lengths: Sequence[int], tokens_per_microbatch: int) -> list[list[int]]:
    """Group row indices so that the tokens of a group stay within the budget; a longer row goes alone.

    Every row is in exactly one group. Rows go, longest first, to the group with the fewest tokens, of as many groups as
    all tokens need, and to a new one where that would be too much.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    groups: list[list[int]] = [[] for _ in range(max(1, -(-sum(lengths) // tokens_per_microbatch)))]
    smallest = [(0, number) for number in range(len(groups))]  # a heap of (tokens, group)
    for row in order:
        tokens, number = smallest[0]
        if tokens and tokens + lengths[row] > tokens_per_microbatch:
            groups.append([row])
            heapq.heappush(smallest, (lengths[row], len(groups) - 1))
        else:
            groups[number].append(row)
            heapq.heapreplace(smallest, (tokens + lengths[row], number))
    return [group for group in groups if group]


def lay(rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Rows of ids one after the other as `ids_BL` int64, with positions that start anew in every row: both [1, L]."""
    ids_L = _join([np.asarray(row) for row in rows], np.int64)
    position_L = _join([np.arange(len(row)) for row in rows], np.int64)
    return torch.from_numpy(ids_L)[None], torch.from_numpy(position_L)[None]


def pad(rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Rows of ids to `ids_BL` int64 and `mask_BL` bool (true at real tokens), padded on the right.

    In the padding stands id 0: causal attention never reads it from a real position.
    """
    width = max((len(row) for row in rows), default=0)
    ids_BL = np.zeros((len(rows), width), dtype=np.int64)
    mask_BL = np.zeros((len(rows), width), dtype=np.bool_)
    for i, row in enumerate(rows):
        ids_BL[i, : len(row)] = row
        mask_BL[i, : len(row)] = True
    return torch.from_numpy(ids_BL), torch.from_numpy(mask_BL)


def response_index(prompt_lengths: Sequence[int], response_lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """`(row_T, position_T)`: where in a right-padded [B, L] batch each response token is predicted, row by row.

    Token t of the response stands at position p + t (p prompt tokens) and is predicted by the hidden state one before.
    """
    rows = [np.full(n, i, dtype=np.int64) for i, n in enumerate(response_lengths)]
    positions = [np.arange(p - 1, p - 1 + n) for p, n in zip(prompt_lengths, response_lengths, strict=True)]
    return torch.from_numpy(_join(rows, np.int64)), torch.from_numpy(_join(positions, np.int64))


def flatten(rows: Sequence[Sequence[float] | npt.NDArray[np.generic]], dtype: torch.dtype) -> Tensor:
    """The values of all rows one after another as `x_T`."""
    return torch.from_numpy(_join([np.asarray(row) for row in rows], np.float64)).to(dtype)


def _join(rows: Sequence[npt.NDArray[Any]], dtype: type[np.generic]) -> npt.NDArray[Any]:
    return np.concatenate([np.zeros(0, dtype), *rows]).astype(dtype, copy=False)
