"""The state of a model while it is trained: no dropout, recomputation only if asked, embedding gradients in place.

Dropout is off because the policy that is trained is the one that was sampled. transformers couples recomputation to
training mode, and training mode to dropout; here they are apart. Everything is undone at the end of each block.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from fire_data.schemas.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def sparse_embedding_gradient(model: PreTrainedModel) -> Iterator[None]:
    """The gradient of the embedding comes as the rows that were used, and is added to `.grad` in place.

    Otherwise autograd makes a matrix of the size of the vocabulary, nearly all zeros, for every micro-batch. Only where
    the table is a plain one on a device with sparse sums; elsewhere nothing changes.
    """
    table: Any = cast(Any, model).get_input_embeddings()
    weight = getattr(table, "weight", None)
    usable = isinstance(table, nn.Embedding) and not table.sparse and not table.scale_grad_by_freq
    if not (usable and type(weight) is nn.Parameter and weight.requires_grad and weight.device.type in ("cpu", "cuda")):
        yield
        return
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    table.sparse = True
    try:
        yield
    finally:
        table.sparse = False


@contextmanager
def training_mode(model: PreTrainedModel, *, checkpointing: bool) -> Iterator[None]:
    """Evaluation mode, hence no dropout; with `checkpointing` only the modules that recompute are in training mode.

    transformers recomputes activations only in modules that are in training mode. Some of them also apply dropout
    themselves, with a probability read from an attribute or the configuration: those are 0 until the end of the block.
    """
    was_training = {module: module.training for module in model.modules()}
    model.eval()  # type: ignore[no-untyped-call]
    changed: list[tuple[object, str, float]] = []
    try:
        if checkpointing:
            recomputed = _checkpointed_modules(model)
            configs = [m.config for m in (model, *recomputed) if hasattr(m, "config")]
            for owner in (*recomputed, *configs):
                for name, value in list(vars(owner).items()):
                    if "drop" in name and isinstance(value, float) and value:
                        changed.append((owner, name, value))
                        setattr(owner, name, 0.0)
            for module in recomputed:
                module.training = True
        yield
    finally:
        for holder, name, value in changed:
            setattr(holder, name, value)
        for each, training in was_training.items():
            each.training = training


def use_attention(model: PreTrainedModel, name: str) -> None:
    """Compute attention with an implementation that transformers knows by this name, from now on.

    Raises ConfigError: its package is not installed, or the model or the device does not take it.
    """
    try:
        model.set_attn_implementation(name)
    except (ImportError, ValueError, OSError) as error:
        text = f"attention {name} cannot be used: {str(error).strip().splitlines()[0]}"
        raise ConfigError(text, where="train.attention", fix="--set train.attention=sdpa") from None


def _checkpointed_modules(model: PreTrainedModel) -> list[nn.Module]:
    modules = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    if modules:
        return modules
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise ConfigError(str(error), where="train.gradient_checkpointing", fix="set it to false") from None
    return [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
