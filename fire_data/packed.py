"""Runs rows through a model one after the other without padding, where a check says that it keeps them apart.

Attention can be told where a row begins: kernels for rows of any length by the bounds, others by a mask that
transformers builds from positions that start anew. What else mixes tokens along a row (state-space and linear-attention
layers, convolutions) would carry one row over into the next, and a model may ignore its positions. So no list of
architectures decides but a pair of rows, run once. A short pair shows it: within a row all distances are as alone.

A mask costs time and memory with the square of all tokens of a micro-batch, where padded rows cost theirs alone, so
rows are packed by default only where there is no mask.
Legend: `_L` tokens of all rows, `_D` hidden.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from fire_data import distributed
from fire_data.models import body_of
from fire_data.packing import Row, lay

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FIRST, _SECOND = 12, 8  # tokens of the two rows
_APART: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()


def wanted(model: PreTrainedModel, packing: str) -> bool:
    """What `train.packing` asks for, whether or not the model can: `auto` is for attention over rows of any length."""
    return packing == "on" or (packing == "auto" and _variable_length(body_of(model)))


def packs(model: PreTrainedModel, packing: str) -> bool:
    """Whether rows are to be packed: `train.packing` asks for it, and the model keeps packed rows apart.

    The model is asked once, in the precision of the first call.
    """
    if not wanted(model, packing):
        return False
    if model not in _APART:
        _APART[model] = distributed.run(model, lambda: _keeps_apart(model))
    return _APART[model]


def packed_states(model: PreTrainedModel, rows: Sequence[Row]) -> torch.Tensor:
    """Last hidden states [L, D] of rows laid one after the other, after the final norm and before the head."""
    body, device = body_of(model), next(model.parameters()).device
    ids_BL, position_BL = lay(rows)
    extra: dict[str, Any] = {}
    if _variable_length(body) and _takes(body, None):
        # The bounds could be read from the positions as well, but every layer would wait for the device to do so.
        starts = torch.tensor([0, *map(len, rows)], device=device).cumsum(0, dtype=torch.int32)
        longest = max(map(len, rows))
        extra = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}
    output = body(input_ids=ids_BL.to(device), position_ids=position_BL.to(device), use_cache=False, **extra)
    states_LD: torch.Tensor = output.last_hidden_state[0]
    return states_LD


def _keeps_apart(model: PreTrainedModel) -> bool:
    """Whether a row after another one has the states it has alone, and the same ones whatever the other one is."""
    if not _takes(body_of(model), "position_ids"):
        return False
    ids = torch.randint(
        model.config.get_text_config().vocab_size, (2 * _FIRST + _SECOND,), generator=torch.Generator().manual_seed(0)
    ).numpy()
    second = ids[-_SECOND:]
    with torch.no_grad():
        alone_LD = packed_states(model, [second])
        after_LD, other_LD = (packed_states(model, [ids[i : i + _FIRST], second])[_FIRST:] for i in (0, _FIRST))
    # Norms and softmaxes are fp32 or less in any model. Alone, kernels cut the sums in another way; the two pairs only
    # differ by what the second row must not see, but for experts whose sums hold other numbers of tokens.
    eps = max(torch.finfo(after_LD.dtype).eps, torch.finfo(torch.float32).eps)
    return _distance(after_LD, alone_LD) <= eps**0.5 and _distance(after_LD, other_LD) <= min(64 * eps, 0.02)


def _distance(left_LD: torch.Tensor, right_LD: torch.Tensor) -> float:
    """The largest relative difference of a token's states."""
    left_LD, right_LD = left_LD.double(), right_LD.double()
    return float(((left_LD - right_LD).norm(dim=1) / right_LD.norm(dim=1)).max())


def _variable_length(body: Any) -> bool:
    return "flash" in (body.config._attn_implementation or "")


def _takes(body: Any, name: str | None) -> bool:
    """Whether the body has a parameter of this name, or, without a name, takes any."""
    parameters = inspect.signature(body.forward).parameters
    return name in parameters if name else any(p.kind is p.VAR_KEYWORD for p in parameters.values())
