"""One optimizer step on frozen coefficients, and the check that data and model belong together before the first one.

The trainer knows no rule: a step is rows of ids with one old logprob and one coefficient per response token, for some
rules a second coefficient with the teacher's top-k, and the loss is a plain sum. So micro-batches, their order, their
padding or packing cannot change the step. Master weights are fp32 (fp64 when asked), lower precision is autocast.
Dropout is off: the policy that is trained is the one that was sampled.
Units: logprobs are nats, budgets padded tokens. `_B` sequences, `_L` padded length, `_T` packed response tokens, `_K`
top-k, `_D` hidden.
"""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fire_data import distributed
from fire_data.batch import StepBatch, topk_of
from fire_data.fused_head import Loss, head_backward, token_logprobs
from fire_data.head import Head
from fire_data.loss import (
    add_statistics,
    crossed_bound,
    effective_share,
    forward_kl_loss,
    ratio_statistics,
    surrogate_loss,
)
from fire_data.models import hidden_states
from fire_data.optim import learning_rate
from fire_data.packed import packed_states, packs
from fire_data.packing import flatten, micro_batches, packed_batches, pad, response_index
from fire_data.schemas.config import TrainConfig
from fire_data.schemas.errors import DataError, TrainingError
from fire_data.trainmode import sparse_embedding_gradient, training_mode
from fire_data.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Mask = npt.NDArray[np.bool_]
_Passed = tuple[Tensor, Tensor, Tensor]
"""Hidden states [T, D], with their graph; logprobs [T, K] and the gradient of the states, without."""

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
    *,
    gauge: bool = False,
) -> dict[str, Any]:
    """Do one optimizer step (or skip it, if no token is kept or a number is not finite) and return its metrics.

    With `gauge` a step whose drift, measured before its update, crosses `train.max_drift_kl` or `train.min_ess` is not
    applied: weights and moments are as before, and `stopped_by` in the metrics names the setting.

    A step whose loss or gradient norm is not finite is not applied either: `nonfinite` is true in its metrics, which
    are those of a skipped step, with None for what is not finite. On several processes all skip it or none does.

    Only tokens with a coefficient other than 0, of either stream, can contribute: the head is applied to these alone,
    a row goes through the model up to the last of them, and rows without any (dropped by the filter) not at all.

    Metrics: `loss`, `grad_norm` (before clipping), `lr`, `tokens` (response tokens of the step), `kept_tokens`,
    `trained_tokens` (those with a coefficient), `skipped`, `seconds`, `tokens_per_second` (response tokens of the rows
    with any); and over the trained tokens `ratio_mean_abs` (mean |log r|, nats), `ratio_max`, `drift_kl` (nats per
    token, see `ratio_statistics`), `ess` (a fraction, see `effective_share`) and `clip_fraction` (of those of the first
    stream). The other tokens are not looked at, so these five compare the steps of one run, and runs whose rules mask
    the same share of tokens. With a forward-KL term `loss` includes it and `fkl_loss` is that term. A skipped step has
    None for all that was not computed; a step without a trained token is one of an unmoved policy: `ess` 1, else 0. One
    that was not applied has the five, and nothing of an update.

    Raises:
        DataError: a candidate of the teacher's top-k is no id the student can learn (see `topk_of`).
        TrainingError: the master weights have the wrong dtype.
    """
    started = time.perf_counter()
    _require_master_dtype(model, cfg)
    lr = learning_rate(global_step, cfg)
    metrics = {"lr": lr, "tokens": sum(map(len, batch.response_ids)), "kept_tokens": batch.kept_tokens}
    second = ("fkl_loss",) if batch.fkl_coefficient is not None else ()
    if not batch.kept_tokens:
        metrics["trained_tokens"] = 0
        names = ("loss", "grad_norm", "ratio_mean_abs", "ratio_max", "drift_kl", "ess", "clip_fraction")
        skipped = dict.fromkeys((*names, "tokens_per_second", *second))
        return metrics | skipped | {"skipped": True, "seconds": time.perf_counter() - started}
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    loss, fkl_loss, statistics = _accumulate(model, head, batch, cfg, vocabulary)
    drift = _drift(statistics)
    bound = crossed_bound(drift["drift_kl"], drift["ess"], cfg.max_drift_kl, cfg.min_ess) if gauge else None
    if bound is not None:
        optimizer.zero_grad(set_to_none=True)
        del metrics["lr"]
        stopped = {"trained_tokens": int(statistics["tokens"]), **drift, "stopped_by": bound}
        return metrics | stopped | {"seconds": time.perf_counter() - started}
    norm = distributed.clip_gradient(model.parameters(), cfg.max_grad_norm or math.inf)
    finite = distributed.tell(math.isfinite(loss) and math.isfinite(norm))
    if finite:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - started
    through = sum(len(r) for i, r in enumerate(batch.response_ids) if batch.active(i).any())
    numbers = {"loss": loss, **dict.fromkeys(second, fkl_loss), "grad_norm": norm, **drift}
    return metrics | {
        "trained_tokens": int(statistics["tokens"]),
        **{name: value if math.isfinite(value) else None for name, value in numbers.items()},
        "skipped": not finite,
        **({} if finite else {"nonfinite": True}),
        "seconds": seconds,
        "tokens_per_second": through / seconds,
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
    device, budget = next(model.parameters()).device, cfg.logits_budget_mb * 2**20
    with torch.no_grad(), training_mode(model, checkpointing=False), _autocast(device, cfg):
        packed = packs(model, cfg.packing)
        for group in _groups([_length(batch, i) for i in rows], cfg, packed):
            chosen = {rows[i]: np.ones(len(batch.response_ids[rows[i]]), dtype=np.bool_) for i in group}
            ids_T = np.concatenate([batch.response_ids[i] for i in chosen]).astype(np.int64)
            wanted_T = torch.from_numpy(ids_T).to(device)

            def work(chosen: dict[int, Mask] = chosen, wanted_T: Tensor = wanted_T) -> Tensor:
                return token_logprobs(_hidden(model, batch, chosen, packed), head, wanted_T, vocabulary, budget)

            logprob_T = distributed.run(model, work).cpu().double()
            now |= dict(zip(chosen, torch.split(logprob_T, [len(c) for c in chosen.values()]), strict=True))
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


def packs_rows(model: PreTrainedModel, cfg: TrainConfig) -> bool:
    """Whether rows go through this model packed (see `packed.packs`), asked in the precision of training."""
    with torch.no_grad(), training_mode(model, checkpointing=False), _autocast(next(model.parameters()).device, cfg):
        return packs(model, cfg.packing)


class _Tokens(NamedTuple):
    """What the loss needs of some tokens, packed. The last two belong to the forward-KL stream, if it is there."""

    ids_TK: Tensor
    old_T: Tensor
    coefficient_T: Tensor
    teacher_TK: Tensor | None
    fkl_T: Tensor | None


def _accumulate(
    model: PreTrainedModel, head: Head, batch: StepBatch, cfg: TrainConfig, vocabulary: Vocabulary
) -> tuple[float, float, dict[str, float]]:
    """Leave the step's gradient in `.grad`; return its loss, the forward-KL part of it, and the ratio statistics.

    Of several processes, each computes the gradient of its rows; what is returned is of all.
    """
    rows = _contributing_rows(batch)
    active = {i: batch.active(i) for i in rows}
    losses: list[Tensor] = []
    fkl_losses: list[Tensor] = []
    statistics: list[dict[str, Tensor]] = []
    device, budget = next(model.parameters()).device, cfg.logits_budget_mb * 2**20
    lengths = [_needed(batch, i, active[i]) for i in rows]
    with training_mode(model, checkpointing=cfg.gradient_checkpointing), sparse_embedding_gradient(model):
        packed = packs_rows(model, cfg)
        for group in distributed.own_groups(lengths, partial(_groups, cfg=cfg, packed=packed)):
            chosen = {rows[i]: active[rows[i]] for i in group} or _no_token(batch)
            tokens = _tokens(batch, chosen, vocabulary, device, cfg)

            def loss(chunk: slice, now_TK: Tensor, tokens: _Tokens = tokens) -> Tensor:
                old_T, coefficient_T = tokens.old_T[chunk], tokens.coefficient_T[chunk]
                total = surrogate_loss(now_TK[:, 0], old_T, coefficient_T, cfg.clip, dual_clip=cfg.dual_clip)
                if tokens.teacher_TK is not None and tokens.fkl_T is not None:
                    now_TK, teacher_TK, fkl_T = now_TK[:, 1:], tokens.teacher_TK[chunk], tokens.fkl_T[chunk]
                    fkl = forward_kl_loss(now_TK, teacher_TK, fkl_T, renormalise=bool(batch.fkl_renormalise))
                    fkl_losses.append(fkl.detach())
                    total = total + fkl
                losses.append(total.detach())
                return total

            def work(chosen: dict[int, Mask] = chosen, tokens: _Tokens = tokens, loss: Loss = loss) -> _Passed:
                with _autocast(device, cfg):
                    hidden_TD = _hidden(model, batch, chosen, packed)
                    return hidden_TD, *head_backward(hidden_TD, head, tokens.ids_TK, loss, vocabulary, budget)

            hidden_TD, now_TK, gradient_TD = distributed.run(model, work)
            if hidden_TD.requires_grad:  # not if the head alone is trained
                torch.autograd.backward(hidden_TD, gradient_TD)
            statistics.append(ratio_statistics(now_TK[:, 0], tokens.old_T, tokens.coefficient_T, cfg.clip))
    numbers = {"loss": _total(losses), "fkl_loss": _total(fkl_losses), **add_statistics(statistics)}
    numbers = distributed.totals(numbers, largest=("max_ratio",))
    return numbers.pop("loss"), numbers.pop("fkl_loss"), numbers


def _drift(statistics: dict[str, float]) -> dict[str, float]:
    """How far the policy is from the one that sampled, as the metrics have it, from a step's merged statistics."""
    tokens = max(statistics["tokens"], 1)
    return {
        "ratio_mean_abs": statistics["abs_log_ratio"] / tokens,
        "ratio_max": statistics["max_ratio"],
        "drift_kl": statistics["drift_kl"] / tokens,
        "ess": effective_share(statistics),
        "clip_fraction": statistics["clipped"] / max(statistics["active"], 1),
    }


def _groups(lengths: list[int], cfg: TrainConfig, packed: bool) -> list[list[int]]:
    return (packed_batches if packed else micro_batches)(lengths, cfg.tokens_per_microbatch)


def _hidden(model: PreTrainedModel, batch: StepBatch, chosen: dict[int, Mask], packed: bool) -> Tensor:
    """The hidden states that predict the chosen response tokens of some rows, packed row by row, [T, D].

    Each row goes through the model up to the last state that is needed: what comes later cannot be seen from there.
    """
    rows = [
        np.concatenate([batch.prompt_ids[i], batch.response_ids[i]])[: _needed(batch, i, c)] for i, c in chosen.items()
    ]
    row_T, position_T = response_index([len(batch.prompt_ids[i]) for i in chosen], [len(c) for c in chosen.values()])
    chosen_T = torch.from_numpy(np.concatenate(list(chosen.values())))
    row_T, position_T = row_T[chosen_T], position_T[chosen_T]
    device = next(model.parameters()).device
    if packed:
        start_B = torch.tensor([0, *map(len, rows)]).cumsum(0)
        return packed_states(model, rows)[(start_B[row_T] + position_T).to(device)]
    ids_BL, mask_BL = pad(rows)
    return hidden_states(model, ids_BL.to(device), mask_BL.to(device))[row_T.to(device), position_T.to(device)]


def _tokens(
    batch: StepBatch, chosen: dict[int, Mask], vocabulary: Vocabulary, device: torch.device, cfg: TrainConfig
) -> _Tokens:
    """The chosen tokens of some rows in the order of `_hidden`; candidates only if one of them has a coefficient."""
    dtype = torch.float64 if cfg.compute_dtype == "float64" else torch.float32
    masks, chosen_T = list(chosen.values()), np.concatenate(list(chosen.values()))
    ids, old, coefficient = (
        [np.asarray(column[i])[c] for i, c in zip(chosen, masks, strict=True)]
        for column in (batch.response_ids, batch.old_logprob, batch.coefficient)
    )
    ids_TK = torch.from_numpy(np.concatenate(ids).astype(np.int64))[:, None]
    topk = topk_of(batch, list(chosen), vocabulary)
    teacher_TK = fkl_T = None
    if topk is not None:
        ids_TK = torch.cat([ids_TK, torch.from_numpy(topk.ids_TK[chosen_T])], 1)
        teacher_TK = torch.from_numpy(topk.logprob_TK[chosen_T]).to(dtype).to(device)
        fkl_T = torch.from_numpy(topk.coefficient_T[chosen_T]).to(dtype).to(device)
    old_T, coefficient_T = flatten(old, dtype).to(device), flatten(coefficient, dtype).to(device)
    return _Tokens(ids_TK.to(device), old_T, coefficient_T, teacher_TK, fkl_T)


def _contributing_rows(batch: StepBatch) -> list[int]:
    """Rows with a coefficient other than 0; if there are none, the shortest, so that the gradient exists and is 0."""
    return [i for i, r in enumerate(batch.response_ids) if len(r) and batch.active(i).any()] or list(_no_token(batch))


def _no_token(batch: StepBatch) -> dict[int, Mask]:
    """The shortest row and none of its tokens: what goes through the model where a pass is needed, but no gradient."""
    filled = [i for i, r in enumerate(batch.response_ids) if len(r)]
    row = min(filled, key=lambda i: _length(batch, i))
    return {row: np.zeros(len(batch.response_ids[row]), dtype=np.bool_)}


def _needed(batch: StepBatch, row: int, chosen_T: Mask) -> int:
    """Tokens of the row up to the hidden state that predicts the last chosen token of its response."""
    places = np.flatnonzero(chosen_T)
    return len(batch.prompt_ids[row]) + (int(places[-1]) if len(places) else 0)


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
