"""How large the models of a run are, from the headers of their files: parameters, memory to run and to train them.

A safetensors file begins with the shapes of its tensors, so counting needs no model and no torch. A model that is not
on this machine is not fetched for a plan. Units: parameters, bytes. Activations, the key-value cache and logits come
on top: they depend on the batch (`rollout.rows_in_flight`, `score.tokens_per_batch`, `train.tokens_per_microbatch`).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fire_data.models import here
from fire_data.plan.figures import Figure, derived
from fire_data.run import Run
from fire_data.schemas.config import LoraConfig, ModelConfig
from fire_data.schemas.errors import DataError

WIDTH = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def models(run: Run) -> list[dict[str, Any]]:
    """Student and teachers: parameters, and bytes in memory while they run. A model behind a url is not held here."""
    named = {"student": run.config.student, **run.teachers}
    if run.config.base is not None:
        named["base"] = run.config.base
    found = []
    for who, cfg in named.items():
        count = parameters(cfg, run.root)
        held = derived(_times(count, WIDTH[cfg.dtype]), "bytes", f"parameters in {cfg.dtype}", count)
        if cfg.url is not None:
            held = Figure(0.0, "bytes", "given", "its server holds it")
        found.append({"who": who, "model": cfg.model, "parameters": count, "memory": held})
    return found


def training(run: Run, student: Figure) -> dict[str, Figure]:
    """Bytes of training: in memory (master weights, gradients, two moments), of its state, of one checkpoint.

    With adapters, gradients and moments are theirs alone.
    """
    cfg = run.config.train
    master = 8 if cfg.compute_dtype == "float64" else 4
    trained, frozen = student, 0.0
    if cfg.lora is not None:
        trained, frozen = adapters(run.config.student, cfg.lora, run.root), _times(student, master) or 0.0
    held = f"weights, gradients and two moments of {master} bytes a parameter"
    memory = None if trained.value is None else frozen + 4 * master * trained.value
    return {
        "memory": derived(memory, "bytes", held + (" of the adapters; frozen weights" if cfg.lora else ""), student),
        "state": derived(_times(trained, 3 * master), "bytes", "weights and two moments", trained),
        "checkpoint": derived(_times(student, WIDTH[cfg.export_dtype]), "bytes", f"in {cfg.export_dtype}", student),
    }


def adapters(cfg: ModelConfig, lora: LoraConfig, base: Path) -> Figure:
    """How many numbers a student's adapters have: rank times rows and columns of each matrix, by the files' headers."""
    folder = here(cfg, base)
    shapes = [pair for file in sorted(folder.glob("*.safetensors")) for pair in _shapes(file)] if folder else []
    if not shapes:
        return Figure(None, "parameters", "assumed", f"the weights of {cfg.model} are not on this machine")
    matrices = [(name.removesuffix(".weight"), shape) for name, shape in shapes if len(shape) == 2]
    if lora.targets == "all-linear":
        chosen = [shape for name, shape in matrices if not name.endswith(("lm_head", "embed_tokens"))]
    else:
        chosen = [shape for name, shape in matrices if any(f".{name}".endswith(f".{t}") for t in lora.targets)]
    count = lora.rank * sum(map(sum, chosen))
    return Figure(float(count), "parameters", "measured", f"{len(chosen)} matrices in the headers, at rank {lora.rank}")


def parameters(cfg: ModelConfig, base: Path) -> Figure:
    """How many numbers a model has: counted in its files, else by a formula from config.json, else unknown."""
    try:
        folder = here(cfg, base)
        if folder is None:
            return Figure(None, "parameters", "assumed", f"{cfg.model} is not on this machine")
        if files := sorted(folder.glob("*.safetensors")):
            count = sum(map(_numbers, files))
            return Figure(float(count), "parameters", "measured", f"headers of {len(files)} safetensors file(s)")
        config = json.loads((folder / "config.json").read_bytes())
        return Figure(float(dense(config.get("text_config") or config)), "parameters", "assumed", _FORMULA)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, DataError) as error:
        return Figure(None, "parameters", "assumed", f"the files of {cfg.model} cannot be read: {type(error).__name__}")


_FORMULA = "config.json, if it is a dense decoder with a gated MLP"


def dense(config: dict[str, Any]) -> int:
    """Parameters of a dense decoder with grouped attention and a gated MLP, without biases and norms.

    Raises KeyError if config.json lacks a size.
    """
    width, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim") or width // heads
    attention = 2 * width * head * (heads + (config.get("num_key_value_heads") or heads))
    layer = attention + 3 * width * config["intermediate_size"]
    tied = config.get("tie_word_embeddings", True)
    return int(config["num_hidden_layers"] * layer + (1 if tied else 2) * config["vocab_size"] * width)


def _numbers(file: Path) -> int:
    """The numbers in a safetensors file, by its header."""
    return sum(math.prod(shape) for _, shape in _shapes(file))


def _shapes(file: Path) -> list[tuple[str, list[int]]]:
    with safe_open(file, framework="np") as tensors:
        return [(name, tensors.get_slice(name).get_shape()) for name in tensors.keys()]  # noqa: SIM118 - no dict


def _times(figure: Figure, factor: float) -> float | None:
    return None if figure.value is None else figure.value * factor
