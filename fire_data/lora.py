"""LoRA: a pair of small trained matrices beside each frozen one; merged for everyone else, kept apart for training.

Why masters stay fp32 although they are frozen: scoring, training and merging then see the same numbers, the ratio check
holds as it does for all weights, and an exported weight is rounded once, from the fp32 sum W + (alpha / rank) B A. B
begins at 0, so the policy of the first step is exactly the given student's. A begins at random, a function of the seed.
Hu et al. 2021, arXiv 2106.09685, eq. 3; the layers are those of the package peft, put into the model in place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fire_data.files import write_bytes
from fire_data.schemas.config import LoraConfig
from fire_data.schemas.errors import ConfigError, FingerprintError
from fire_data.schemas.manifest import differences

_NAME = "default"
_WHERE = "train.lora.targets"


def require_peft() -> Any:
    """The package. Raises ConfigError with the command that installs it."""
    try:
        import peft
    except ModuleNotFoundError:
        raise ConfigError("peft is not installed", where="train.lora", fix="pip install 'fire-opd[lora]'") from None
    return peft


def attach(model: Any, cfg: LoraConfig, seed: int, base: str | None = None, revision: str | None = None) -> None:
    """Put adapters into the model and freeze all else. Its logits stay exactly what they are: B is 0.

    Args:
        seed: A is a function of it, the same on every device.
        base, revision: what the adapter's files call the model that they belong to.

    Raises:
        ConfigError: peft is missing, a target names no linear layer, or it is a head that is also the embedding.
    """
    peft = require_peft()
    names = _checked(model, cfg.targets) if isinstance(cfg.targets, tuple) else cfg.targets
    alpha = int(cfg.alpha) if cfg.alpha == int(cfg.alpha) else cfg.alpha  # readers of adapter_config.json expect an int
    config = peft.LoraConfig(
        r=cfg.rank, lora_alpha=alpha, target_modules=names, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM",
        base_model_name_or_path=base, revision=revision,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # peft draws on the CPU, then moves
        try:
            peft.inject_adapter_in_model(config, model, _NAME)
        except ValueError as error:
            text = f"adapters cannot be put there: {str(error).splitlines()[0]}"
            raise ConfigError(text, where=_WHERE, fix=f"--set {_WHERE}=all-linear") from None


def _checked(model: Any, targets: tuple[str, ...]) -> list[str]:
    """The targets, each of which names a linear layer; peft itself asks only that one of them does."""
    from transformers.pytorch_utils import Conv1D

    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    for target in targets:
        found = [m for name, m in linear.items() if name == target or name.endswith(f".{target}")]
        if not found:
            there = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            text = f"no linear layer of the student is called {target!r}; there are: {there}"
            raise ConfigError(text, where=_WHERE, fix=f"--set {_WHERE}=all-linear")
        if any(m is head for m in found) and head.weight is table.weight:
            text = f"{target} is the student's embedding as well: an adapter would change one of them and part them"
            raise ConfigError(text, where=_WHERE, fix=f"leave {target} out, or --set {_WHERE}=all-linear")
    return list(targets)


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict under the names that it has without adapters, and without these. Nothing is copied or detached."""
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if f".{_NAME}." not in name or ".lora_" not in name
    }


def additions(model: nn.Module) -> dict[str, Callable[[], Tensor]]:
    """Of each matrix with an adapter: its name without, and a function that computes what the adapter adds to it."""
    layers: list[tuple[str, Any]] = list(model.named_modules())
    return {
        f"{name}.weight": partial(m.get_delta_weight, _NAME) for name, m in layers if hasattr(m, "get_delta_weight")
    }


def save_adapter(model: Any, folder: Path) -> None:
    """Write the adapter in peft's own format, in the precision it is trained in, into a new folder.

    `PeftModel.from_pretrained(student, folder)` gives the trained student. Equal adapters have equal bytes. Nothing is
    synced. Without adapters nothing is written.
    """
    if _NAME not in getattr(model, "peft_config", {}):
        return
    peft = require_peft()
    # Without embeddings: with them peft would ask the Hub whether the student's vocabulary has changed.
    found = peft.get_peft_model_state_dict(model, adapter_name=_NAME, save_embedding_layers=False)
    folder.mkdir()
    tensors = {f"base_model.model.{name}": t.detach().cpu().contiguous() for name, t in found.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {**model.peft_config[_NAME].to_dict(), "inference_mode": True}
    config = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    write_bytes(folder / "adapter_config.json", (json.dumps(config, indent=1, sort_keys=True) + "\n").encode())


def require_same(
    found: Mapping[str, Any] | None, wanted: Mapping[str, Any] | None, where: str, checkpoint: Path
) -> None:
    """Raise FingerprintError if a training state is of other adapters, of another student, or of all weights.

    Args:
        found, wanted: settings and student of the adapters, in the state and now; None for training of all weights.
        checkpoint: what was exported from the state: another run may start from it.
    """
    if found == wanted:
        return
    if found is None or wanted is None:
        kinds = ["all weights" if each is None else "adapters" for each in (found, wanted)]
        text = f"the rounds before trained {kinds[0]}, train.lora now asks for {kinds[1]}"
    else:
        text = "the rounds before trained other adapters: " + "; ".join(differences(dict(found), dict(wanted)))
    fix = f"set it back in fire.yaml; or train the result anew: fire init RUN2 --student {checkpoint}"
    raise FingerprintError(text, where=where, fix=fix)
