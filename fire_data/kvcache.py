"""A KV cache whose rows come and go in place, and how rows of a cache are taken.

Why own: transformers' layer copies all it holds whenever a column is added or a row leaves; generation does both all
the time. Units: rows are sequences, columns are tokens. Shapes: keys and values are [rows, heads, columns, head size].
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer


class RoomyLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values as the window [:rows, :, start:end] of a larger room, which changes in place.

    A step writes one column, a leaving row is overwritten by the last one, newcomers are written below; the plain
    layer copies all it holds in each of these cases. Cells outside of a row's own tokens hold leftovers or zeros:
    they are masked, so only their being finite matters.
    """

    room: tuple[Tensor, ...] = ()
    rows = start = end = 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append columns to the present rows; returns the keys and values [rows, H, end - start, D] of the window."""
        if self.end + key_states.shape[2] > self.room[0].shape[2]:
            self._rebuild(self.room, self.rows, left=0, right=key_states.shape[2])
        for room, states in zip(self.room, (key_states, value_states), strict=True):
            room[: self.rows, :, self.end : self.end + states.shape[2]] = states
        self.end += key_states.shape[2]
        return self._show()

    def keep(self, rows: int, gaps: Tensor, movers: Tensor, crop: int) -> None:
        """Copy rows `movers` over rows `gaps`, keep the first `rows` and drop `crop` columns on the left."""
        for room in self.room if len(gaps) else ():
            room[gaps, :, self.start : self.end] = room[movers, :, self.start : self.end]
        self.rows, self.start = rows, self.start + crop
        self._show()

    def absorb(self, keys: Tensor, values: Tensor) -> None:
        """Add rows below, aligned on the right; the window becomes as wide as the wider of both."""
        rows, width = self.rows + keys.shape[0], max(keys.shape[2], self.end - self.start)
        if not self.room or rows > self.room[0].shape[0] or width > self.end:
            self._rebuild(self.room or (keys, values), rows, left=width - (self.end - self.start), right=0)
        for room, states in zip(self.room, (keys, values), strict=True):
            room[self.rows : rows, :, self.end - states.shape[2] : self.end] = states
        self.rows, self.start = rows, self.end - width
        self._show()

    def _rebuild(self, like: tuple[Tensor, ...], rows: int, left: int, right: int) -> None:
        """Move to a new room of `rows`, with `left` and `right` columns around the window and a quarter to grow."""
        width = self.end - self.start
        columns = left + width + right
        room = tuple(t.new_zeros(rows, t.shape[1], columns + max(32, columns // 4), t.shape[3]) for t in like)
        for new, old in zip(room, self.room, strict=False):
            new[: self.rows, :, left : left + width] = old[: self.rows, :, self.start : self.end]
        self.room, self.start, self.end = room, left, left + width

    def _show(self) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (room[: self.rows, :, self.start : self.end] for room in self.room)
        self.is_initialized = True
        return self.keys, self.values


def roomy(cache: DynamicCache) -> list[RoomyLayer]:
    """The layers of a cache that is known to hold these."""
    return cast(list[RoomyLayer], cache.layers)


def take(cache: DynamicCache, index_B: Tensor) -> None:
    """Keep the cache rows `index_B`, repeats allowed. Beam search's method is the one that every kind of layer has."""
    cache.reorder_cache(cast(torch.LongTensor, index_B))
