"""Which rows go through the model together, how they are padded, and where their response tokens are predicted.

Scores belong to tokens and the loss is a sum over them, so grouping is free: rows of similar length go together and
little is padded. Grouping depends only on the lengths and the budget, never on time or memory, so a step can be
repeated exactly.
Units: lengths and budgets are tokens. `_B` sequences, `_L` padded length, `_T` response tokens, packed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Row = Sequence[int] | npt.NDArray[np.integer]


def micro_batches(lengths: Sequence[int], tokens_per_microbatch: int) -> list[list[int]]:
    """Group row indices so that rows × longest row stays within the budget; a longer row goes alone.

    Every row is in exactly one group. Longest rows come first, so what does not fit in memory fails at once. Ties keep
    the order of the rows.
    """
    groups: list[list[int]] = []
    longest = 0
    for row in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if groups and (len(groups[-1]) + 1) * longest <= tokens_per_microbatch:
            groups[-1].append(row)
        else:
            groups.append([row])
            longest = lengths[row]
    return groups


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
