"""One optimizer step on frozen coefficients, and the check that data and model belong together before the first one.

The trainer knows no rule: a step is rows of ids with one old logprob and one coefficient per response token, for some
rules a second coefficient with the teacher's top-k, and the loss is a plain sum. So micro-batches, their order and
their padding cannot change the step. Master weights are fp32 (fp64 when asked), lower precision is autocast. Dropout is
off: the policy that is trained is the one that was sampled.
Units: logprobs are nats, budgets padded tokens. `_B` sequences, `_L` padded length, `_T` packed response tokens, `_K`
top-k, `_D` hidden.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fire_data.batch import StepBatch, topk_of
from fire_data.loss import add_statistics, forward_kl_loss, ratio_statistics, surrogate_loss
from fire_data.models import hidden_states
from fire_data.optim import learning_rate
from fire_data.packing import flatten, micro_batches, pad, response_index
from fire_data.schemas.config import TrainConfig
from fire_data.schemas.errors import ConfigError, DataError, TrainingError
from fire_data.signals import token_logprobs
from fire_data.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Head = Callable[[Tensor], Tensor]

EXACT_TOLERANCE = 1e-4
"""Mean |log r| in nats that two fp32 computations of the same logprobs stay below."""
ROUNDED_TOLERANCE = 0.03
"""The same when weights or activations were rounded to 16 bits somewhere between scoring and training."""
CHECK_TOKENS = 4096
"""Response tokens that `ratio_check` looks at; it always takes at least one row."""


def train_step(
    model: PreTrainedModel,
    head: Head,
    optimizer: torch.optim.Optimizer,
    batch: StepBatch,
    cfg: TrainConfig,
    vocabulary: Vocabulary,
    global_step: int,
) -> dict[str, Any]:
    """Do one optimizer step (or skip it, if no token is kept) and return its metrics.

    Rows whose coefficients are all 0 (dropped by the filter) cannot contribute and do not go through the model.

    Metrics: `loss`, `grad_norm` (before clipping), `lr`, `tokens` (response tokens of the step), `kept_tokens`,
    `skipped`, `seconds`, `tokens_per_second` (response tokens that went through the model); and over those tokens
    `ratio_mean_abs` (mean |log r|, nats), `ratio_max`, `drift_kl` (nats per token, see `ratio_statistics`) and
    `clip_fraction` (of the tokens with a coefficient). With a forward-KL term `loss` includes it and `fkl_loss` is that
    term. A skipped step has None for all that was not computed.

    Raises:
        DataError: a candidate of the teacher's top-k is no id the student can learn (see `topk_of`).
        TrainingError: the master weights have the wrong dtype, or loss or gradient norm is not finite; the optimizer
            was not called and weights and moments are as before.
    """
    started = time.perf_counter()
    _require_master_dtype(model, cfg)
    lr = learning_rate(global_step, cfg)
    metrics = {"lr": lr, "tokens": sum(map(len, batch.response_ids)), "kept_tokens": batch.kept_tokens}
    second = ("fkl_loss",) if batch.fkl_coefficient is not None else ()
    if not batch.kept_tokens:
        names = ("loss", "grad_norm", "ratio_mean_abs", "ratio_max", "drift_kl", "clip_fraction", "tokens_per_second")
        skipped = dict.fromkeys((*names, *second))
        return metrics | skipped | {"skipped": True, "seconds": time.perf_counter() - started}
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    loss, fkl_loss, statistics = _accumulate(model, head, batch, cfg, vocabulary)
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = float(nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm or math.inf))
    if not (math.isfinite(loss) and math.isfinite(norm)):
        optimizer.zero_grad(set_to_none=True)
        raise TrainingError(
            f"loss {loss} and gradient norm {norm} are not both finite; the weights were not changed",
            where=f"global step {global_step} (step {batch.step} of its round)",
            fix="look at the step's scores and coefficients (fire inspect RUN), lower train.lr, or train in float32",
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - started
    tokens = statistics["tokens"]
    return metrics | {
        "loss": loss,
        **dict.fromkeys(second, fkl_loss),
        "grad_norm": norm,
        "ratio_mean_abs": statistics["abs_log_ratio"] / max(tokens, 1),
        "ratio_max": statistics["max_ratio"],
        "drift_kl": statistics["drift_kl"] / max(tokens, 1),
        "clip_fraction": statistics["clipped"] / max(statistics["active"], 1),
        "skipped": False,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
    }


def ratio_check(
    model: PreTrainedModel,
    head: Head,
    batch: StepBatch,
    cfg: TrainConfig,
    vocabulary: Vocabulary,
    tolerance: float,
    max_tokens: int = CHECK_TOKENS,
) -> dict[str, float]:
    """Compare this model's logprobs with the scored ones on the first rows of a round's first step.

    Before any step the ratio must be 1: mean |log r| within `tolerance` (see `ratio_tolerance`), and smaller than when
    the scored column is shifted by one token either way. The first fails for another model or another vocabulary, the
    second for misaligned columns, even where these are so flat that they pass the first.

    The shifted comparison looks at the inner tokens of rows with two or more; with single-token responses only, it says
    nothing and is left out (NaN). It is also not held against columns so flat that shifted and unshifted agree within
    the tolerance to a factor of two (a nearly deterministic model): noise decides there.

    Args:
        tolerance: largest mean |log r|, nats.
        max_tokens: rows are taken in order until their responses have this many tokens, at least one row.

    Returns:
        `ratio_mean_abs` and `ratio_mean_abs_shifted` in nats, `tokens` and `rows` that were looked at.

    Raises:
        TrainingError: which of the two failed, with the numbers.
    """
    rows = _first_rows(batch, max_tokens)
    now: dict[int, Tensor] = {}
    with torch.no_grad(), _training_mode(model, checkpointing=False):
        for group in micro_batches([_length(batch, i) for i in rows], cfg.tokens_per_microbatch):
            members = [rows[i] for i in group]
            lengths = [len(batch.response_ids[i]) for i in members]
            logprob_T, _ = _logprobs(model, head, batch, members, cfg, vocabulary)
            now |= dict(zip(members, torch.split(logprob_T.cpu().double(), lengths), strict=True))
    old = {i: torch.as_tensor(np.asarray(batch.old_logprob[i], dtype=np.float64)) for i in rows}
    direct = _mean([(now[i] - old[i]).abs() for i in rows])
    shifts = [  # per direction: shifted and unshifted over the same tokens
        (_mean([(now[i][1:] - old[i][:-1]).abs() for i in rows]), _mean([(now[i] - old[i])[1:].abs() for i in rows])),
        (_mean([(now[i][:-1] - old[i][1:]).abs() for i in rows]), _mean([(now[i] - old[i])[:-1].abs() for i in rows])),
    ]
    shifted = min(s for s, _ in shifts)
    where = f"the first {len(rows)} rows of step {batch.step}"
    fix = "rescore with this checkpoint: fire score RUN --round N --redo"
    numbers = f"mean |log ratio| is {direct:.3g} nats, with the column shifted by one token {shifted:.3g}"
    if (not direct <= tolerance and shifted <= tolerance) or any(_misaligned(s, d, tolerance) for s, d in shifts):
        raise TrainingError(f"student_logprob is shifted by one token: {numbers}", where=where, fix=fix)
    if not direct <= tolerance:
        text = f"student_logprob is not of the model to be trained: {numbers}; the tolerance is {tolerance:g}"
        raise TrainingError(text, where=where, fix=fix)
    tokens = sum(len(now[i]) for i in rows)
    return {
        "ratio_mean_abs": direct,
        "ratio_mean_abs_shifted": shifted,
        "tokens": float(tokens),
        "rows": float(len(rows)),
    }


def ratio_tolerance(cfg: TrainConfig, *dtypes: str) -> float:
    """The tolerance of `ratio_check`: `train.ratio_tolerance`, or by the dtypes that scored, exported and train.

    Args:
        dtypes: of the checkpoint's weights and of the scoring forward pass; `train.compute_dtype` is always included.
    """
    if cfg.ratio_tolerance is not None:
        return cfg.ratio_tolerance
    rounded = {"bfloat16", "float16"} & {cfg.compute_dtype, *dtypes}
    return ROUNDED_TOLERANCE if rounded else EXACT_TOLERANCE


def _accumulate(
    model: PreTrainedModel, head: Head, batch: StepBatch, cfg: TrainConfig, vocabulary: Vocabulary
) -> tuple[float, float, dict[str, float]]:
    """Leave the step's gradient in `.grad`; return its loss, the forward-KL part of it, and the ratio statistics."""
    rows = _contributing_rows(batch)
    losses: list[Tensor] = []
    fkl_losses: list[Tensor] = []
    statistics: list[dict[str, Tensor]] = []
    with _training_mode(model, checkpointing=cfg.gradient_checkpointing):
        for group in micro_batches([_length(batch, i) for i in rows], cfg.tokens_per_microbatch):
            members = [rows[i] for i in group]
            topk = topk_of(batch, members, vocabulary)
            candidates_TK = None if topk is None else torch.from_numpy(topk.ids_TK)
            now_T, now_TK = _logprobs(model, head, batch, members, cfg, vocabulary, candidates_TK)
            old_T = flatten([batch.old_logprob[i] for i in members], now_T.dtype).to(now_T.device)
            coefficient_T = flatten([batch.coefficient[i] for i in members], now_T.dtype).to(now_T.device)
            loss = surrogate_loss(now_T, old_T, coefficient_T, cfg.clip, dual_clip=cfg.dual_clip)
            if topk is not None:
                teacher_TK, fkl_T = (
                    torch.from_numpy(x).to(now_TK.dtype).to(now_TK.device)
                    for x in (topk.logprob_TK, topk.coefficient_T)
                )
                fkl_loss = forward_kl_loss(now_TK, teacher_TK, fkl_T, renormalise=bool(batch.fkl_renormalise))
                fkl_losses.append(fkl_loss.detach())
                loss = loss + fkl_loss
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
            statistics.append(ratio_statistics(now_T, old_T, coefficient_T, cfg.clip))
    return _total(losses), _total(fkl_losses), add_statistics(statistics)


def _logprobs(
    model: PreTrainedModel,
    head: Head,
    batch: StepBatch,
    rows: list[int],
    cfg: TrainConfig,
    vocabulary: Vocabulary,
    candidates_TK: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Logprob of every response token of these rows, packed row by row, and of the candidates in its place, [T, K].

    The head sees response positions only, each once. Without candidates K is 0.
    """
    device = next(model.parameters()).device
    prompts, responses = [batch.prompt_ids[i] for i in rows], [batch.response_ids[i] for i in rows]
    ids_BL, mask_BL = pad([np.concatenate([p, r]) for p, r in zip(prompts, responses, strict=True)])
    row_T, position_T = response_index([len(p) for p in prompts], [len(r) for r in responses])
    wanted_TK = ids_BL[row_T, position_T + 1][:, None]
    if candidates_TK is not None:
        wanted_TK = torch.cat([wanted_TK, candidates_TK], 1)
    ids_BL, mask_BL, row_T, position_T, wanted_TK = (
        x.to(device) for x in (ids_BL, mask_BL, row_T, position_T, wanted_TK)
    )
    with _autocast(device, cfg):
        hidden_TD = hidden_states(model, ids_BL, mask_BL)[row_T, position_T]
        logprob_TK = token_logprobs(hidden_TD, head, wanted_TK, vocabulary, cfg.logits_budget_mb * 2**20)
    return logprob_TK[:, 0], logprob_TK[:, 1:]


def _contributing_rows(batch: StepBatch) -> list[int]:
    """Rows with a coefficient other than 0; if there are none, the shortest, so that the gradient exists and is 0."""
    filled = [i for i, r in enumerate(batch.response_ids) if len(r)]
    return [i for i in filled if batch.contributes(i)] or [min(filled, key=lambda i: _length(batch, i))]


def _first_rows(batch: StepBatch, max_tokens: int) -> list[int]:
    rows: list[int] = []
    tokens = 0
    for i, response in enumerate(batch.response_ids):
        if rows and tokens + len(response) > max_tokens:
            break
        if len(response):
            rows.append(i)
            tokens += len(response)
    if not rows:
        raise DataError("no row has a response token", where=f"step {batch.step}")
    return rows


def _misaligned(shifted: float, unshifted: float, tolerance: float) -> bool:
    """Whether columns within the tolerance still fit better when shifted, by more than noise on flat columns."""
    return unshifted <= tolerance and shifted < unshifted / 2


def _length(batch: StepBatch, row: int) -> int:
    return len(batch.prompt_ids[row]) + len(batch.response_ids[row])


def _total(parts: list[Tensor]) -> float:
    return float(torch.stack(parts).cpu().double().sum()) if parts else 0.0


def _mean(parts: list[Tensor]) -> float:
    values = torch.cat(parts)
    return float(values.mean()) if len(values) else math.nan


def _autocast(device: torch.device, cfg: TrainConfig) -> AbstractContextManager[None]:
    if cfg.compute_dtype != "bfloat16":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def _require_master_dtype(model: PreTrainedModel, cfg: TrainConfig) -> None:
    wanted = torch.float64 if cfg.compute_dtype == "float64" else torch.float32
    found = {p.dtype for p in model.parameters() if p.dtype != wanted}
    if found:
        text = f"master weights are {', '.join(map(str, found))}; training with {cfg.compute_dtype} needs {wanted}"
        raise TrainingError(text, fix=f"load the model in {wanted}")


@contextmanager
def _training_mode(model: PreTrainedModel, *, checkpointing: bool) -> Iterator[None]:
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
