"""The rows of one optimizer step, checked: ids, old logprobs, coefficients, and the teacher's top-k where it is used.

Plain arrays and no model: what a step is can be read, cut and compared without one. The top-k columns are there only
for rules with a forward-KL term and are looked at only where its coefficient is not 0, so that dropped tokens may hold
anything.
Units: logprobs are nats. `_T` packed response tokens, `_K` top-k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fire_data.packing import Row
from fire_data.schemas.errors import DataError
from fire_data.vocabulary import Vocabulary

Values = Sequence[float] | npt.NDArray[np.floating]
Lists = Sequence[Sequence[float]] | npt.NDArray[Any]
"""One list of k numbers per response token, [T, K]."""

_REWEIGH, _RESCORE = "fire weigh RUN", "fire score RUN --round N --add topk --redo"


class TopK(NamedTuple):
    """The second stream of some rows, packed. Where `coefficient_T` is 0 the others are 0 too."""

    ids_TK: npt.NDArray[np.int64]
    logprob_TK: npt.NDArray[np.float64]
    coefficient_T: npt.NDArray[np.float64]


@dataclass(frozen=True)
class StepBatch:
    """The rows of one optimizer step. Per row: prompt and response ids, and one number per response token.

    `kept_tokens` counts the tokens that filter and masks kept in the step; 0 means there is nothing to learn from it.
    A rule with a forward-KL term adds, all four together, `fkl_coefficient` (one number per response token), the
    teacher's `topk_ids` and `topk_logprob` (k numbers per response token, nats, full vocabulary) and `fkl_renormalise`.

    Raises DataError naming the row: columns of different length, an empty prompt (nothing would predict the first
    token), coefficients although no token is kept, or top-k lists that are not [tokens, k] with one k in the step.
    """

    step: int
    prompt_ids: Sequence[Row]
    response_ids: Sequence[Row]
    old_logprob: Sequence[Values]
    coefficient: Sequence[Values]
    kept_tokens: int
    fkl_coefficient: Sequence[Values] | None = None
    topk_ids: Sequence[Lists] | None = None
    topk_logprob: Sequence[Lists] | None = None
    fkl_renormalise: bool | None = None

    def __post_init__(self) -> None:
        columns = {"old_logprob": self.old_logprob, "coefficient": self.coefficient}
        if self.fkl_coefficient is not None:
            columns["fkl_coefficient"] = self.fkl_coefficient
        rows = len(self.response_ids)
        for name, column in {"prompt_ids": self.prompt_ids, **columns}.items():
            if len(column) != rows:
                raise DataError(f"{name} has {len(column)} rows where response_ids has {rows}", where=self.where())
        for i, response in enumerate(self.response_ids):
            for name, column in columns.items():
                if len(column[i]) != len(response):
                    text = f"{name} has {len(column[i])} elements where response_ids has {len(response)}"
                    raise DataError(text, where=self.where(i))
            if not len(self.prompt_ids[i]):
                raise DataError("the prompt has no token", where=self.where(i), fix="rollout.raw needs non-empty text")
        total = sum(map(len, self.response_ids))
        if not 0 <= self.kept_tokens <= total:
            raise DataError(f"{self.kept_tokens} kept tokens of {total}", where=self.where(), fix=_REWEIGH)
        if not self.kept_tokens and any(self.active(i).any() for i in range(rows)):
            raise DataError("no token is kept, yet coefficients differ from 0", where=self.where(), fix=_REWEIGH)
        self._check_topk()

    def active(self, row: int) -> npt.NDArray[np.bool_]:
        """Which response tokens of the row have a coefficient, of either stream, other than 0: [T]."""
        first: npt.NDArray[np.bool_] = np.asarray(self.coefficient[row]) != 0
        return first if self.fkl_coefficient is None else first | (np.asarray(self.fkl_coefficient[row]) != 0)

    def where(self, row: int | None = None, token: int | None = None) -> str:
        """The place an error names."""
        parts = [f"step {self.step}", *(f"{k} {n}" for k, n in (("row", row), ("token", token)) if n is not None)]
        return ", ".join(parts)

    def _check_topk(self) -> None:
        names = ("fkl_coefficient", "topk_ids", "topk_logprob", "fkl_renormalise")
        lacking = [name for name in names if getattr(self, name) is None]
        if lacking:
            if len(lacking) < len(names):
                text = f"a forward-KL term needs {', '.join(lacking)} as well"
                raise DataError(text, where=self.where(), fix=_REWEIGH)
            return
        k = None
        for name in names[1:3]:
            column = getattr(self, name)
            if len(column) != len(self.response_ids):
                text = f"{name} has {len(column)} rows where response_ids has {len(self.response_ids)}"
                raise DataError(text, where=self.where(), fix=_RESCORE)
            for i, response in enumerate(self.response_ids):
                if len(column[i]) != len(response):
                    text = f"{name} has {len(column[i])} elements where response_ids has {len(response)}"
                    raise DataError(text, where=self.where(i), fix=_RESCORE)
                for t, size in enumerate(_sizes(column[i])):
                    k = size if k is None else k
                    if size != k or not size:
                        text = f"{name} has {size} candidates, not {k or 'at least 1'} as the step's first token"
                        raise DataError(text, where=self.where(i, t), fix=_RESCORE)


def topk_of(batch: StepBatch, rows: Sequence[int], vocabulary: Vocabulary) -> TopK | None:
    """The second stream of these rows, one row after another; None if it is not there or all its coefficients are 0.

    Raises:
        DataError: where the coefficient is not 0, a candidate lies outside the vocabulary, or is an id that the student
            cannot give any probability (one of the models lacks it) although the teacher gave it some.
    """
    if batch.fkl_coefficient is None or batch.topk_ids is None or batch.topk_logprob is None:
        return None
    coefficients = [np.asarray(batch.fkl_coefficient[i], np.float64) for i in rows]
    if not any(np.any(c) for c in coefficients):
        return None
    k = next(len(x[0]) for x in batch.topk_ids if len(x))
    ids, logprobs = [], []
    for i, coefficient_T in zip(rows, coefficients, strict=True):
        used_T1 = (coefficient_T != 0)[:, None]
        ids_TK = np.where(used_T1, np.asarray(batch.topk_ids[i], np.int64).reshape(-1, k), 0)
        logprob_TK = np.where(used_T1, np.asarray(batch.topk_logprob[i], np.float64).reshape(-1, k), 0.0)
        outside_TK = (ids_TK < 0) | (ids_TK >= vocabulary.size)
        _refuse(batch, i, ids_TK, outside_TK, f"which is outside the vocabulary of {vocabulary.size}")
        likely_TK = used_T1 & (np.exp(logprob_TK) > 0)
        _refuse(batch, i, ids_TK, likely_TK & ~vocabulary.allowed[ids_TK], "which not every model of the run has")
        ids.append(ids_TK)
        logprobs.append(logprob_TK)
    return TopK(np.concatenate(ids), np.concatenate(logprobs), np.concatenate(coefficients))


def _refuse(batch: StepBatch, row: int, ids_TK: npt.NDArray[Any], wrong_TK: npt.NDArray[np.bool_], why: str) -> None:
    if wrong_TK.any():
        token, place = (int(x) for x in np.argwhere(wrong_TK)[0])
        text = f"candidate {place} of the teacher's top-k is id {ids_TK[token, place]}, {why}"
        raise DataError(text, where=batch.where(row, token), fix=_RESCORE)


def _sizes(lists: Lists) -> Sequence[int]:
    """The number of candidates of every token; at once for an array."""
    if isinstance(lists, np.ndarray) and lists.ndim == 2:
        return [lists.shape[1]] * min(1, len(lists))
    return [len(x) for x in lists]
