"""The losses as plain sums over tokens: clipped surrogate, forward KL on the teacher's top-k; ratio statistics.

Every coefficient already contains weight, advantage, masks and the denominator of the mean. So the loss of a step is
a sum over its tokens, and cutting the step into micro-batches or padding its rows cannot change it or its gradient.
Units: logprobs and log ratios are nats; a coefficient is nats over the denominator, of the forward KL a factor over it.
Legend: `_T` tokens, `_K` the teacher's top-k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fire_data.schemas.errors import DataError

LOG_RATIO_BOUND = 20.0
"""|log r| is clamped here before exp(), in nats: exp(20) = 4.9e8 is far outside any clip range and still finite."""


def surrogate_loss(
    logprob: Tensor, old_logprob: Tensor, coefficient: Tensor, clip: float = 0.2, *, dual_clip: float | None = None
) -> Tensor:
    """L = Σ_t max(−c_t r_t, −c_t clip(r_t, 1−ε, 1+ε)) with r_t = exp(clamp(logprob − old_logprob, ±20)).

    PPO's clipped objective (Schulman et al. 2017, arXiv 1707.06347, eq. 7), summed instead of averaged. At r = 1 its
    gradient is that of −Σ c_t logprob_t, the weighted policy gradient. Beyond ±20 nats the gradient is 0.

    With `dual_clip` = d > 1 (Ye et al. 2020, arXiv 1912.09729, eq. 5) a token with c_t < 0 contributes
    min(max(−c_t r_t, −c_t clip(r_t, 1−ε, 1+ε)), −c_t d): its loss stops growing, with gradient 0, once r_t > d.

    A token with coefficient 0 contributes 0 to loss and gradient whatever its logprobs are: padding may hold anything.

    Args:
        logprob: log-probability of each token under the policy being trained, any shape; carries the gradient.
        old_logprob: the same under the policy that wrote the tokens (`student_logprob`), same shape.
        coefficient: what the trainer executes, same shape.
        clip: ε, half width of the clip range.
        dual_clip: d, or None for off.

    Returns:
        Scalar in fp32 or better.

    Raises:
        DataError: the shapes differ.
    """
    _same_shape(logprob, old_logprob, coefficient)
    wide = torch.promote_types(torch.promote_types(logprob.dtype, coefficient.dtype), torch.float32)
    coefficient = coefficient.to(wide)
    log_ratio = torch.where(coefficient == 0, 0.0, logprob.to(wide) - old_logprob.to(wide))
    ratio = log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
    loss = torch.maximum(-coefficient * ratio, -coefficient * ratio.clamp(1 - clip, 1 + clip))
    if dual_clip is not None:
        loss = torch.where(coefficient < 0, torch.minimum(loss, -coefficient * dual_clip), loss)
    return loss.sum()


def forward_kl_loss(
    logprob_TK: Tensor, teacher_logprob_TK: Tensor, coefficient_T: Tensor, *, renormalise: bool
) -> Tensor:
    """L = Σ_t f_t Σ_{v in teacher top-k} q_t(v) (log q_t(v) − log p_t(v)), summed as it is: the mean is in f_t.

    The second stream of EOPD (arXiv 2603.07079), AOPD (2605.06387) and TrOPD (2606.01249). p is the student's
    distribution over the full vocabulary. Both forms leave out the tail of the teacher's distribution, so both are
    biased estimates of KL(q || p). With Q the teacher's mass on its top-k and q' = q / Q:

    * `renormalise`: the terms are KL(q' || p), a divergence, at least 0.
    * otherwise they are Q KL(q' || p) + Q log Q: no divergence, as low as Q log Q < 0, so the value says nothing by
      itself. The gradient is Q times that of the other form: tokens whose top-k holds little mass count for less.

    Either is smallest where the student has all its mass on the top-k, in proportion to q, not where it equals the
    teacher.

    A token with coefficient 0 contributes 0 to loss and gradient whatever its logprobs are: padding may hold anything.
    A candidate to which the teacher gives probability 0 contributes 0 as well.

    Args:
        logprob_TK: log p_t(v) of the candidates under the policy being trained, [T, K]; carries the gradient.
        teacher_logprob_TK: log q_t(v), full vocabulary, [T, K].
        coefficient_T: f_t, what the trainer executes, [T].
        renormalise: divide q by its sum over the candidates.

    Returns:
        Scalar in fp32 or better.

    Raises:
        DataError: the shapes do not fit together.
    """
    shapes = [tuple(x.shape) for x in (logprob_TK, teacher_logprob_TK, coefficient_T)]
    if len(shapes[0]) != 2 or shapes[0] != shapes[1] or shapes[0][:1] != shapes[2]:
        text = f"logprob, teacher_logprob and coefficient have shapes {shapes[0]}, {shapes[1]}, {shapes[2]}"
        raise DataError(text, where="forward KL loss", fix="give [T, K], [T, K] and [T]")
    wide = torch.promote_types(torch.promote_types(logprob_TK.dtype, coefficient_T.dtype), torch.float32)
    coefficient_T1 = coefficient_T.to(wide)[:, None]
    teacher_TK = torch.where(coefficient_T1 == 0, 0.0, teacher_logprob_TK.to(wide))
    if renormalise:
        teacher_TK = teacher_TK.log_softmax(1)
    q_TK = teacher_TK.exp()
    gap_TK = torch.where((coefficient_T1 == 0) | (q_TK == 0), 0.0, teacher_TK - logprob_TK.to(wide))
    return (coefficient_T1 * q_TK * gap_TK).sum()


@torch.no_grad()
def ratio_statistics(logprob: Tensor, old_logprob: Tensor, coefficient: Tensor, clip: float = 0.2) -> dict[str, Tensor]:
    """Sums over tokens that describe how far the policy has moved, so that micro-batches add up (`add_statistics`).

    Returns scalars, on the device of `logprob`:
        tokens: number of tokens.
        active: tokens with a coefficient other than 0.
        abs_log_ratio: Σ |log r|.
        drift_kl: Σ (r − 1 − log r), the sampled estimator of KL(old || now) on tokens drawn from the old policy
            (E_old[r] = 1, so E_old[r − 1 − log r] = E_old[−log r]; no term is negative). "k3" of Schulman 2020,
            http://joschu.net/blog/kl-approx.html. An estimate from the sampled tokens, not the exact KL.
        ratio, ratio_squares: Σ r and Σ r², see `effective_share`.
        clipped: active tokens whose gradient the clip range removes: c > 0 and r > 1+ε, or c < 0 and r < 1−ε.
        max_ratio: the largest r (0 without tokens). The one entry that merges by maximum.

    Raises:
        DataError: the shapes differ.
    """
    _same_shape(logprob, old_logprob, coefficient)
    # log r is a difference of nearly equal numbers, and r - 1 - log r one of nearly equal small ones: sum in fp64.
    wide = torch.float32 if logprob.device.type == "mps" else torch.float64
    log_ratio = logprob.detach().to(wide) - old_logprob.to(wide)
    bounded = log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    ratio = bounded.exp()
    clipped = ((coefficient > 0) & (ratio > 1 + clip)) | ((coefficient < 0) & (ratio < 1 - clip))
    return {
        "tokens": torch.tensor(logprob.numel(), device=logprob.device),
        "active": (coefficient != 0).sum(),
        "abs_log_ratio": log_ratio.abs().sum(),
        "drift_kl": (torch.expm1(bounded) - bounded).sum(),
        "ratio": ratio.sum(),
        "ratio_squares": ratio.square().sum(),
        "clipped": clipped.sum(),
        "max_ratio": ratio.max() if ratio.numel() else ratio.sum(),
    }


def add_statistics(parts: list[dict[str, Tensor]]) -> dict[str, float]:
    """Merge the statistics of micro-batches into numbers: sums, except `max_ratio`, which is their maximum."""
    merged: dict[str, float] = {}
    for key in parts[0] if parts else ():
        values = torch.stack([part[key] for part in parts]).cpu()
        merged[key] = float(values.max() if key == "max_ratio" else values.sum())
    return merged


def effective_share(statistics: dict[str, float]) -> float:
    """Effective sample size of the ratios as a fraction of the tokens: (Σ r)² / (n Σ r²), from merged statistics.

    1 if all ratios are equal, 1/n if one token carries all (Kish 1965); 1 without tokens. Unlike `drift_kl` it sees a
    few tokens with a large ratio.
    """
    tokens = statistics.get("tokens", 0.0)
    return statistics["ratio"] ** 2 / (tokens * statistics["ratio_squares"]) if tokens else 1.0


def crossed_bound(drift_kl: float, ess: float, max_drift_kl: float | None, min_ess: float | None) -> str | None:
    """The setting whose bound a step's drift crosses, `max_drift_kl` or `min_ess`; None if none does."""
    if max_drift_kl is not None and drift_kl > max_drift_kl:
        return "max_drift_kl"
    return "min_ess" if min_ess is not None and ess < min_ess else None


def _same_shape(logprob: Tensor, old_logprob: Tensor, coefficient: Tensor) -> None:
    shapes = [tuple(x.shape) for x in (logprob, old_logprob, coefficient)]
    if len(set(shapes)) != 1:
        text = f"logprob, old_logprob and coefficient have shapes {shapes[0]}, {shapes[1]}, {shapes[2]}"
        raise DataError(text, where="surrogate loss", fix="give one number of each per token")
