"""Set operations on two models' top-k lists per token, as numpy kernels that Polars expressions call.

Both models' lists of a token form a union of at most 2k candidates. Exploding and joining them would make 2k rows per
token; here they lie side by side, and k comparisons of whole columns find what the lists share. Tokens are the last
axis, so that every operation, sums over candidates included, runs over thousands of neighbouring numbers.

Suffixes: `_T` tokens, `_K` places of a top-k list, `_C` candidates of a union. Logprobs are in nats; minus infinity
stands for "not in this model's list".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

from fire_data.schemas.errors import DataError

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]

LISTS = ("student_topk_ids", "student_topk_logprobs", "teacher_topk_ids", "teacher_topk_logprobs")
CROSS = ("student_logprob_on_teacher_topk", "teacher_logprob_on_student_topk")
SAMPLED = ("response_ids", "student_logprob", "teacher_logprob")
Missing = Literal["floor", "own_mass", "exact"]

_TOKENS_AT_ONCE = 4096  # the arrays of one chunk stay in the processor's cache
_NOWHERE = -1e300  # its exponential is 0, and the difference of two is a number
_TINY = 1e-8  # smaller denominators of the influence ratio, as in its published code


class Union(NamedTuple):
    """Candidates of both lists without repetition: logprobs [C, T] of both models, and which places count [C, T]."""

    student_CT: Floats
    teacher_CT: Floats
    present_CT: Mask


def per_token(kernel: Callable[..., npt.NDArray[Any]], *columns: str) -> pl.Expr:
    """A float per token from `kernel`, called with one array per column: [T] of plain columns, [k, T] of lists.

    The kernel sees a few thousand tokens at a time and must treat each for itself. Raises DataError if the lists of a
    column differ in length.
    """

    def of_series(tokens: pl.Series) -> pl.Series:
        arrays = [_array(tokens.struct.field(name)) for name in columns]
        result_T = np.empty(len(tokens))
        for start in range(0, len(tokens), _TOKENS_AT_ONCE):
            chunk = slice(start, start + _TOKENS_AT_ONCE)
            result_T[chunk] = kernel(*(_tokens_last(array[chunk]) for array in arrays))
        return pl.Series(result_T)

    return pl.struct(columns).map_batches(of_series, return_dtype=pl.Float64, is_elementwise=True)


def _array(column: pl.Series) -> npt.NDArray[Any]:
    """A column as numpy: [T], or [T, k] from lists of k."""
    if not isinstance(column.dtype, pl.List):
        return column.to_numpy()
    if not len(column):
        return np.empty((0, 0))
    k = column.list.len().unique().sort().to_list()
    if len(k) > 1 or k == [0]:
        text = f"column {column.name!r} has lists of {k[0]} to {k[-1]} candidates; all must have as many, at least one"
        raise DataError(text, fix="fire score RUN --add topk --redo")
    return column.explode().to_numpy().reshape(len(column), -1)


def _tokens_last(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.ascontiguousarray(array.T, dtype=np.float64 if array.dtype.kind == "f" else None)


def found(ids_KT: Ids, list_ids_KT: Ids, list_logprobs_KT: Floats) -> Floats:
    """The logprob that each of `ids` has in the other list of its token, minus infinity where that lacks it; [K, T]."""
    place_KT = np.zeros(ids_KT.shape, dtype=np.int16)  # 0: not found, else 1 + place in the other list
    for place, other_T in enumerate(list_ids_KT, start=1):
        np.maximum(place_KT, (ids_KT == other_T) * np.int16(place), out=place_KT)
    absent_1T = np.full((1, ids_KT.shape[1]), -np.inf)
    return np.take_along_axis(np.concatenate([absent_1T, list_logprobs_KT]), place_KT, axis=0)


def union(student_ids_KT: Ids, student_KT: Floats, teacher_ids_KT: Ids, teacher_KT: Floats) -> Union:
    """The student's list, then what only the teacher's has: C = 2k, each model's logprobs from its own list alone."""
    student_there_KT = found(teacher_ids_KT, student_ids_KT, student_KT)
    return Union(
        np.concatenate([student_KT, student_there_KT]),
        np.concatenate([found(student_ids_KT, teacher_ids_KT, teacher_KT), teacher_KT]),
        np.concatenate([np.ones(student_KT.shape, dtype=np.bool_), np.isneginf(student_there_KT)]),
    )


def renormalised(logprobs_CT: Floats, present_CT: Mask) -> Floats:
    """Logprobs whose probabilities over the present candidates sum to 1; the others have probability 0, finite logs."""
    values_CT = np.where(present_CT, logprobs_CT, _NOWHERE)
    values_CT -= values_CT.max(axis=0)
    values_CT -= np.log(total(np.exp(values_CT)))
    return values_CT


def total(values_CT: Floats) -> Floats:
    """The sum over candidates, [T], in their order: left to itself, numpy adds up a lone token's in another one."""
    sums_T: Floats = values_CT.cumsum(axis=0)[-1] if values_CT.shape[1] == 1 else values_CT.sum(axis=0)
    return sums_T


def expected(logprobs_CT: Floats, values_CT: Floats) -> Floats:
    """The mean of `values` under the probabilities exp(logprobs), [T]."""
    return total(np.exp(logprobs_CT) * values_CT)


def models(missing: Missing, floor: float, lists: tuple[Any, ...]) -> tuple[Floats, Floats]:
    """Student's and teacher's logprobs over the union of their lists, [C, T] each; see `TaOpd` for `missing`."""
    student_CT, teacher_CT, present_CT = union(*lists[:4])
    if missing == "exact":
        _, student_KT, _, teacher_KT, student_on_teacher_KT, teacher_on_student_KT = lists
        student_CT = np.concatenate([student_KT, student_on_teacher_KT])
        teacher_CT = np.concatenate([teacher_on_student_KT, teacher_KT])

    def completed(logprobs_CT: Floats) -> Floats:
        absent_CT, least = np.isneginf(logprobs_CT), math.log(floor)
        if missing != "own_mass":
            return renormalised(np.where(absent_CT, least, logprobs_CT), present_CT)
        own_CT = renormalised(logprobs_CT, present_CT & ~absent_CT)
        return np.where(present_CT, np.maximum(own_CT, least), _NOWHERE)

    return completed(student_CT), completed(teacher_CT)


def entropy(student_KT: Floats) -> Floats:
    """Entropy of the student's renormalised list as a share of its largest value, log k; [T]."""
    logprobs_KT = renormalised(student_KT, np.ones(student_KT.shape, dtype=np.bool_))
    return -expected(logprobs_KT, logprobs_KT) / math.log(max(len(student_KT), 2))


def divergence(missing: Missing, floor: float, *lists: Any) -> Floats:
    """KL(teacher || student) over the union of the lists, nats, [T]."""
    student_CT, teacher_CT = models(missing, floor, lists)
    return expected(teacher_CT, teacher_CT - student_CT)


def affinity(missing: Missing, floor: float, *lists: Any) -> Floats:
    """The Bhattacharyya coefficient over the union of the lists: 1 for equal models, 0 for disjoint ones; [T]."""
    student_CT, teacher_CT = models(missing, floor, lists)
    return total(np.exp((student_CT + teacher_CT) / 2))


def mass(teacher_on_student_KT: Floats) -> Floats:
    """The teacher's probability of the student's whole list, [T]."""
    return total(np.exp(teacher_on_student_KT)).clip(0.0, 1.0)


def overlap(student_ids_KT: Ids, teacher_ids_KT: Ids) -> Floats:
    """The share of the student's k candidates that the teacher's list holds too, [T]."""
    shared_T = np.zeros(student_ids_KT.shape[1])
    for other_T in teacher_ids_KT:
        shared_T += (student_ids_KT == other_T).any(axis=0)
    return shared_T / len(student_ids_KT)


def influence_ratio(missing: float, clip: float, least: float, *columns: Any) -> Floats:
    """Signal over noise of the reverse-KL gradient at a token, [T]; see `Ier`. Columns: LISTS, then SAMPLED."""
    lists, (sampled_T, *sampled_logprobs_T) = columns[:4], columns[4:]
    *models_CT, in_lists_CT = union(*lists)
    # The sampled token has a row of its own, with its own logprobs: its places in the lists do not count.
    in_lists_CT &= np.concatenate([lists[0], lists[2]]) != sampled_T
    present_CT = np.vstack([in_lists_CT, np.ones(len(sampled_T), dtype=np.bool_)])
    student_CT, teacher_CT = (
        renormalised(np.vstack([np.where(np.isneginf(model_CT), missing, model_CT), logprob_T]), present_CT)
        for model_CT, logprob_T in zip(models_CT, sampled_logprobs_T, strict=True)
    )
    c_CT = (student_CT - teacher_CT).clip(-clip, clip)
    p_CT = np.exp(student_CT)
    mean_T = total(p_CT * c_CT)
    signal_T = total(p_CT * (c_CT - mean_T) ** 2)
    reach_CT = np.minimum(p_CT / least, 1.0) if least > 0 else 1.0
    pl_CT = np.where(present_CT, reach_CT - p_CT, 0.0)  # p L with L = 1 / max(p, least) - 1, finite for p = 0
    pl_T = total(pl_CT)
    some_T = pl_T > _TINY  # otherwise there is one candidate and nothing to learn
    baseline_T = np.where(some_T, total(pl_CT * c_CT) / np.where(some_T, pl_T, 1.0), mean_T)
    noise_T = total(pl_CT * (c_CT - baseline_T) ** 2) - signal_T
    return signal_T / np.maximum(noise_T, _TINY)


def rejected(threshold: float, teacher_ids_KT: Ids, teacher_KT: Floats, sampled_T: Ids) -> Floats:
    """1 where the sampled token is not in the shortest head of the teacher's list that holds `threshold`, else 0; [T].

    A list that holds less counts as a whole.
    """
    up_to_KT = np.exp(teacher_KT).cumsum(axis=0)
    in_head_KT = np.vstack([np.ones(len(sampled_T), dtype=np.bool_), up_to_KT[:-1] < threshold])
    accepted_T: Mask = ((teacher_ids_KT == sampled_T) & in_head_KT).any(axis=0)
    return (~accepted_T).astype(np.float64)
