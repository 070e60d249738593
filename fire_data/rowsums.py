"""The sums over the vocabulary that all signals are made of; each logit is read from memory once, then from cache.

Why rows are kept whole: a rank needs the token's own logit and the student's most likely token, which are known only
after a whole row. Why blocks: a dozen passes over each row are made, so a few rows are copied (which also
converts and masks them) and worked on in tiles that stay in a core's cache, both models in one operation. Those are too
small to be spread over threads, which would wait for each other after each of them: threads take rows instead.
Units: nats. Legend: `_M` models, `_T` positions, `_R` rows of a block, `_V` vocabulary, `_C` columns of a tile, `_N`
groups of columns, `_K` the k best.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from fire_data.topk import GROUP, best
from fire_data.vocabulary import Vocabulary, lowest

_BLOCK = 1 << 21  # logits of a block on a CPU: 8 MiB in fp32
_TILE = 1 << 17  # logits of a tile on a CPU: four such tensors fit into a core's cache
_DEVICE_BLOCK = 1 << 24  # logits of a block elsewhere, in one tile: 64 MiB in fp32
_SUMS = ("sum", "dot", "gap", "larger", "cross")


class _Tile(NamedTuple):
    """Views of a block's columns and of room to work in; one tile after the other uses the same room."""

    columns: slice
    x_MRC: torch.Tensor
    grouped_MRNC: torch.Tensor  # the same, in groups of columns
    maxima_MRN: torch.Tensor
    p_MRC: torch.Tensor
    work_MRC: torch.Tensor
    gap_RC: torch.Tensor
    sums: dict[str, torch.Tensor]  # [M, R] each


class _Room(NamedTuple):
    x_MRV: torch.Tensor
    maxima_MRN: torch.Tensor
    tiles: list[_Tile]
    sums_JMRS: torch.Tensor  # of J tiles, in the order of _SUMS
    places_G: torch.Tensor  # 0, 1, 2, ... in a group


def row_sums(
    logits: Sequence[torch.Tensor],
    ids_T: torch.Tensor | None,
    vocabulary: Vocabulary,
    dtype: torch.dtype,
    k: int = 0,
) -> dict[str, torch.Tensor]:
    """What the signals of each row are made of. x is the logit minus the largest one of its row. Changes no argument.

    Args:
        logits: of one or two models, each [T, V] of any float dtype, not masked, on one device; columns beyond
            `vocabulary.size` are ignored.
        ids_T: one id per row; None if only the normaliser and the best are wanted.
        dtype: of everything computed.
        k: how many of the largest to find, at most the number of allowed ids.

    Returns:
        [M, T]: `sum` of exp(x) over the allowed ids, `top`, the id of the largest logit. With ids: `x` of the id, the
        sums `dot` of exp(x) x, `gap` of exp(x) times the difference of the two models' x (0 if there is one model),
        `larger`, the number of strictly larger logits than the id's, and `cross`, the same for the id that is the first
        model's top. [M, T, K] if k: `best_ids`, `best` x in descending order, `other`: x of the other model there.
    """
    models, positions, device = len(logits), len(logits[0]), logits[0].device
    width = -(-vocabulary.size // GROUP) * GROUP
    excluded = torch.arange(vocabulary.size, width, device=device)
    mask_V = vocabulary.mask(device)
    if mask_V is not None:
        excluded = torch.cat([(~mask_V).nonzero()[:, 0], excluded])
    rows, columns = _shape(models, positions, width, device)
    blocks = max(1, -(-positions // rows))
    threads = min(torch.get_num_threads() if device.type == "cpu" else 1, blocks)

    def span(number: int, careful: bool) -> list[dict[str, torch.Tensor]]:
        """The blocks of one thread: where a block begins does not depend on the number of threads."""
        parts: list[dict[str, torch.Tensor]] = []
        with torch.inference_mode():
            room = _room(models, min(rows, positions), width, columns, dtype, device)
            for block in range(blocks * number // threads, blocks * (number + 1) // threads):
                cut = slice(block * rows, min((block + 1) * rows, positions))
                if cut.stop - cut.start != room.x_MRV.shape[1]:
                    room = _room(models, cut.stop - cut.start, width, columns, dtype, device)
                _load(room, [x_TV[cut, : vocabulary.size] for x_TV in logits], excluded)
                parts.append(_block(room, None if ids_T is None else ids_T[cut], k, careful))
        return parts

    def whole(careful: bool) -> dict[str, torch.Tensor]:
        if threads == 1:
            parts = span(0, careful)
        else:
            before = torch.get_num_threads()
            try:
                # The number is each thread's own: their operations are not spread over more of them.
                with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                    parts = [part for some in pool.map(lambda i: span(i, careful), range(threads)) for part in some]
            finally:
                torch.set_num_threads(before)
        together = {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}
        return together | dict(zip(_SUMS, together.pop("sums").unbind(2), strict=True))

    found = whole(False)
    exact = ids_T is None or bool((found["dot"] + found["gap"]).isfinite().all())
    if not exact or (k and not bool((found["best"] > lowest(dtype)).all())):
        found = whole(True)  # some logits are -inf, which costs more
    return found


def _shape(models: int, positions: int, width: int, device: torch.device) -> tuple[int, int]:
    """Rows of a block and columns of a tile, the latter whole groups."""
    if device.type != "cpu":
        return max(1, min(positions, _DEVICE_BLOCK // (models * max(1, width)))), width
    rows = max(1, min(positions, _BLOCK // (models * max(1, width)), _TILE // (models * GROUP)))
    groups = width // GROUP
    tiles = max(1, -(-groups // max(1, _TILE // (models * rows * GROUP))))
    return rows, max(1, -(-groups // tiles)) * GROUP


def _room(models: int, rows: int, width: int, columns: int, dtype: torch.dtype, device: torch.device) -> _Room:
    """Memory for one block, cut into tiles once: the cutting would cost as much as the work on a tile."""
    x_MRV, p_MRC, work_MRC = (
        torch.empty(models, rows, size, dtype=dtype, device=device) for size in (width, columns, columns)
    )
    gap_RC, maxima_MRN = x_MRV.new_empty(rows, columns), x_MRV.new_empty(models, rows, width // GROUP)
    grouped_MRNC = x_MRV.view(models, rows, width // GROUP, GROUP)
    starts = range(0, width, columns)
    sums_JMRS = x_MRV.new_zeros(len(starts), models, rows, len(_SUMS))
    tiles = []
    for j, start in enumerate(starts):
        size = min(columns, width - start)
        cut, groups = slice(start, start + size), slice(start // GROUP, (start + size) // GROUP)
        x, grouped, maxima = x_MRV[..., cut], grouped_MRNC[:, :, groups], maxima_MRN[..., groups]
        p, work, gap = p_MRC[..., :size], work_MRC[..., :size], gap_RC[..., :size]
        sums = dict(zip(_SUMS, sums_JMRS[j].unbind(2), strict=True))
        tiles.append(_Tile(cut, x, grouped, maxima, p, work, gap, sums))
    return _Room(x_MRV, maxima_MRN, tiles, sums_JMRS, torch.arange(GROUP, device=device))


def _load(room: _Room, logits: Sequence[torch.Tensor], excluded: torch.Tensor) -> None:
    """Copy rows [R, V] of every model, exclude forbidden ids and padding, and find the largest of every group."""
    for tile in room.tiles:
        for x_RC, logits_RV in zip(tile.x_MRC, logits, strict=True):
            source_RC = logits_RV[:, tile.columns]
            x_RC[:, : source_RC.shape[1]].copy_(source_RC)
    room.x_MRV.index_fill_(2, excluded, 2 * lowest(room.x_MRV.dtype))  # finite, and below `lowest`, see `_best`
    for tile in room.tiles:
        torch.amax(tile.grouped_MRNC, 3, out=tile.maxima_MRN)


def _block(room: _Room, ids_R: torch.Tensor | None, k: int, careful: bool) -> dict[str, torch.Tensor]:
    """`row_sums` of the rows in the room, which are shifted on the way. `careful`: some of them are -inf.

    The two models' x are subtracted before the mean, so that a small divergence between large logits keeps its digits.
    """
    x_MRV = room.x_MRV
    models, rows, _ = x_MRV.shape
    max_MR1, top_MR1 = _largest(room)
    found = {"top": top_MR1[..., 0]}
    if k:
        found |= _best(x_MRV, room.maxima_MRN, max_MR1, k, careful)
    if ids_R is not None:
        id_MR1 = x_MRV.gather(2, ids_R[None, :, None].expand(models, rows, 1))
        found["x"] = (id_MR1 - max_MR1)[..., 0]
        own_MR1, cross_R1 = id_MR1, x_MRV[-1].gather(1, top_MR1[0])
        if careful:  # nothing counts as larger than an impossible token but what is possible
            own_MR1, cross_R1 = (z.clamp(min=lowest(x_MRV.dtype)) for z in (own_MR1, cross_R1))
    for tile in room.tiles:
        x, p, work, gap, sums = tile.x_MRC, tile.p_MRC, tile.work_MRC, tile.gap_RC, tile.sums
        if ids_R is not None:
            torch.sum(torch.gt(x, own_MR1, out=work), 2, out=sums["larger"])
        if ids_R is not None and models == 2:
            torch.sum(torch.gt(x[1], cross_R1, out=gap), 1, out=sums["cross"][0])
        torch.sum(torch.exp(x.sub_(max_MR1), out=p), 2, out=sums["sum"])
        if ids_R is not None:
            torch.sum(_product(p, x, work, careful), 2, out=sums["dot"])
        if ids_R is not None and models == 2:
            torch.sub(x[0], x[1], out=gap)
            torch.sum(_product(p, gap, work, careful), 2, out=sums["gap"])
    return found | {"sums": room.sums_JMRS.sum(0)}


def _product(p_MRC: torch.Tensor, by: torch.Tensor, out: torch.Tensor, careful: bool) -> torch.Tensor:
    """p times something; 0 times infinity is 0 if there is infinity."""
    product = torch.mul(p_MRC, by, out=out)
    return product.nan_to_num_(nan=0.0, posinf=torch.inf, neginf=-torch.inf) if careful else product


def _largest(room: _Room) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest logit and its id (the first among equals), both [M, R, 1]: the best group, then the best in it."""
    start_MR1 = room.maxima_MRN.argmax(2, keepdim=True).mul_(GROUP)
    inside_MRC = room.x_MRV.gather(2, start_MR1 + room.places_G)
    place_MR1 = inside_MRC.argmax(2, keepdim=True)
    return inside_MRC.gather(2, place_MR1), start_MR1.add_(place_MR1)


def _best(
    x_MRV: torch.Tensor, maxima_MRN: torch.Tensor, max_MR1: torch.Tensor, k: int, careful: bool
) -> dict[str, torch.Tensor]:
    if careful:  # an allowed id that is impossible comes before a forbidden one
        ids = [best(x_RV.clamp(min=lowest(x_RV.dtype)), k)[1] for x_RV in x_MRV]
    else:
        ids = [best(x_RV, k, maxima_RN)[1] for x_RV, maxima_RN in zip(x_MRV, maxima_MRN, strict=True)]
    ids_MRK = torch.stack(ids)
    own_MRK, other_MRK = (z_MRV.gather(2, ids_MRK) for z_MRV in (x_MRV, x_MRV.flip(0)))
    return {"best_ids": ids_MRK, "best": own_MRK - max_MR1, "other": other_MRK - max_MR1.flip(0)}
