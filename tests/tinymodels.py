"""A tiny Qwen3, batches for it, and the tensors of a training state: what the tests of training share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    Qwen3Config,
    Qwen3ForCausalLM,
)

from fire_data import training
from fire_data.models import head_of
from fire_data.optim import make_optimizer
from fire_data.schemas.config import TrainConfig
from fire_data.training import StepBatch, train_step
from fire_data.trainstate import whole_states
from fire_data.vocabulary import Vocabulary

SIZE = 40
VOCABULARY = Vocabulary(SIZE, np.arange(SIZE) != 7)
ORIGINAL = training.head_backward


def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float32, tied: bool = True) -> Any:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=tied, initializer_range=0.3,
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).to(dtype).eval()


def step_batch(model: Any, rows: int = 8, seed: int = 0, step: int = 0, noise: float = 0.0) -> StepBatch:
    """Rows of 1 to 12 response tokens, scored by `model` itself with one plain forward per row."""
    random = np.random.default_rng(seed)
    ids = np.flatnonzero(VOCABULARY.allowed)
    prompts = [random.choice(ids, 2 + i % 4) for i in range(rows)]
    responses = [random.choice(ids, 1 + (i * 5) % 12) for i in range(rows)]
    old = [plain_logprobs(model, p, r) + noise * random.standard_normal(len(r)) for p, r in zip(prompts, responses)]  # noqa: B905
    coefficient = [random.standard_normal(len(r)) / 50 for r in responses]
    return StepBatch(step, prompts, responses, old, coefficient, sum(map(len, responses)))


def spoilt(batch: StepBatch, column: str = "coefficient", value: float = np.inf, row: int = 0) -> StepBatch:
    """The step with one number that is not finite."""
    columns = [np.array(c, dtype=np.float64) for c in getattr(batch, column)]
    columns[row][0] = value
    return replace(batch, **{column: columns})


def plain_logprobs(model: Any, prompt: np.ndarray, response: np.ndarray) -> np.ndarray:
    ids = torch.tensor(np.concatenate([prompt, response]))[None]
    with torch.no_grad():
        logits = model(ids).logits[0, :, :SIZE]
        logits[:, ~torch.tensor(VOCABULARY.allowed)] = -torch.inf
        logprobs = logits.log_softmax(-1)
    positions = torch.arange(len(prompt) - 1, len(prompt) + len(response) - 1)
    return logprobs[positions, torch.tensor(response)].double().numpy()


def train_config(**changes: Any) -> TrainConfig:
    return TrainConfig(**{"lr": 1e-3, "device": "cpu", **changes})


def one_step(model: Any, optimizer: Any, batch: StepBatch, cfg: TrainConfig, global_step: int = 0) -> dict[str, Any]:
    return train_step(model, head_of(model), optimizer, batch, cfg, VOCABULARY, global_step)


def gradient_of(model: Any, batch: StepBatch, cfg: TrainConfig) -> tuple[float, torch.Tensor]:
    """Loss and flat gradient as they reach the optimizer (clipping off)."""
    seen: list[torch.Tensor] = []
    optimizer = make_optimizer(model, cfg)
    optimizer.register_step_pre_hook(lambda *_: seen.append(torch.cat([p.grad.flatten() for p in model.parameters()])))
    metrics = one_step(model, optimizer, batch, cfg)
    return metrics["loss"], seen[0]


def with_budget(budget: int) -> Any:
    """`training.head_backward` with another budget in bytes, whatever the configuration says."""
    return lambda *arguments: ORIGINAL(*arguments[:-1], budget)


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def moments_of(model: Any, optimizer: Any) -> dict[str, torch.Tensor]:
    return {f"{n}.{k}": v.clone() for n, p in model.named_parameters() for k, v in optimizer.state.get(p, {}).items()}


def same_tensors(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def latest_state(root: Path) -> Path | None:
    """The state that training continues from."""
    states = whole_states(root)
    return states[0][0] if states else None
