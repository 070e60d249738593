"""The learning rate as a function of the global step, and AdamW on the master weights.

The rate is computed from the step, not kept by a scheduler object: resuming at step k needs no scheduler state.
Units: a step is one optimizer step, counted on across rounds.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from fire_data.schemas.config import TrainConfig


def learning_rate(global_step: int, cfg: TrainConfig) -> float:
    """The rate of the step with this index (from 0).

    Warm-up is linear, from lr/warmup_steps at step 0 to lr at step warmup_steps − 1. After it: constant, or linear or
    half a cosine (Loshchilov & Hutter 2017, arXiv 1608.03983, eq. 5) from lr at step warmup_steps to 0 at step
    total_steps, and 0 beyond.
    """
    if global_step < cfg.warmup_steps:
        return cfg.lr * (global_step + 1) / cfg.warmup_steps
    if cfg.schedule == "constant" or cfg.total_steps is None:
        return cfg.lr
    if global_step >= cfg.total_steps:
        return 0.0
    done = (global_step - cfg.warmup_steps) / (cfg.total_steps - cfg.warmup_steps)
    return cfg.lr * (1 - done if cfg.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2)


def make_optimizer(model: nn.Module, cfg: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) over the trainable parameters, in their own dtype.

    Decay applies to matrices and embeddings, not to vectors (norm gains, biases). On a CPU one fused pass updates a
    parameter; elsewhere the plain loop does, whose temporaries are those of one parameter and not of the model.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=cfg.lr,
        betas=cfg.betas,
        eps=cfg.eps,
        foreach=False,
        fused=all(p.device.type == "cpu" for p in parameters),
    )
