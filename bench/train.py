"""Training: one `train_step`, against the same step written plainly, with the same micro-batches.

`plain` runs the model as it comes: logits of every position of the padded batch, log_softmax, gather, the same loss and
optimizer. Ours applies the head to response positions only, chunk by chunk, and computes the logits of a chunk again in
the backward pass: memory for time. Response tokens per second; loss and gradient norm of both must agree.
"""

from __future__ import annotations

import argparse

import measure
import numpy as np
import torch
from rollout import make_model

from fire_data.loss import surrogate_loss
from fire_data.models import head_of
from fire_data.optim import make_optimizer
from fire_data.packing import flatten, micro_batches, pad, response_index
from fire_data.schemas.config import TrainConfig
from fire_data.training import StepBatch, train_step
from fire_data.vocabulary import Vocabulary

SIZES: measure.Sizes = {
    "rows": (16, 4, "trajectories of the step"),
    "prompt": (64, 8, "longest prompt, tokens"),
    "new": (192, 8, "longest response, tokens"),
    "microbatch": (2048, 32, "train.tokens_per_microbatch"),
    "budget_mb": (64, 1, "train.logits_budget_mb"),
    "hidden": (256, 16, "hidden size"),
    "layers": (4, 1, "layers"),
    "vocabulary": (32768, 256, "vocabulary size"),
    "compute_dtype": ("float32", "float32", "train.compute_dtype of ours; plain stays in float32"),
    "device": ("cpu", "cpu", "cpu or cuda"),
}
GROUPS = {"step": ["fire", "plain"]}


def prepare(group: str, case: str, options: argparse.Namespace) -> measure.Work:
    """A random model and a step of rows of mixed length, half as long to as long as allowed."""
    torch.set_num_threads(options.threads)
    options.dtype = "float32"
    model, rng = make_model(options), np.random.default_rng(0)
    prompts, responses = (
        [rng.integers(0, options.vocabulary, rng.integers(longest // 2, longest + 1)) for _ in range(options.rows)]
        for longest in (options.prompt, options.new)
    )
    tokens = sum(map(len, responses))
    old = [np.full(len(r), -np.log(options.vocabulary)) for r in responses]
    coefficient = [rng.normal(size=len(r)) / tokens for r in responses]
    batch = StepBatch(0, prompts, responses, old, coefficient, tokens)
    cfg = TrainConfig(
        lr=1e-6, tokens_per_microbatch=options.microbatch, logits_budget_mb=options.budget_mb,
        compute_dtype=options.compute_dtype,
    )  # fmt: skip
    optimizer = make_optimizer(model, cfg)
    vocabulary = Vocabulary(options.vocabulary, np.ones(options.vocabulary, dtype=np.bool_))
    head = head_of(model)

    def fire() -> measure.Done:
        found = train_step(model, head, optimizer, batch, cfg, vocabulary, 0)
        return measure.Done(tokens, {name: found[name] for name in ("loss", "grad_norm")})

    def plain() -> measure.Done:
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for group in micro_batches(
            [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)], cfg.tokens_per_microbatch
        ):
            ids_BL, mask_BL = pad([np.concatenate([prompts[i], responses[i]]) for i in group])
            row_T, position_T = response_index([len(prompts[i]) for i in group], [len(responses[i]) for i in group])
            ids_BL = ids_BL.to(options.device)
            logits_BLV = model(input_ids=ids_BL, attention_mask=mask_BL.to(options.device)).logits
            logprob_BLV = logits_BLV[:, :-1].log_softmax(-1)
            now_BL = logprob_BLV.gather(2, ids_BL[:, 1:, None])[:, :, 0]
            old_T, coefficient_T = (
                flatten([x[i] for i in group], torch.float32).to(options.device) for x in (old, coefficient)
            )
            loss = surrogate_loss(now_BL[row_T, position_T], old_T, coefficient_T, cfg.clip)
            loss.backward()
            total += float(loss.detach())
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.max_grad_norm))
        optimizer.step()
        return measure.Done(tokens, {"loss": total, "grad_norm": norm})

    return {"fire": fire, "plain": plain}[case]


if __name__ == "__main__":
    measure.main(__doc__, SIZES, GROUPS, prepare)
