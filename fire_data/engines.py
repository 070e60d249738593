"""What generates and what scores: protocols over tables, and a fake engine that needs no model.

The fake engine is deterministic and can be told to fail: for tests of everything around the engines, and dry runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from fire_data.sampling import Sampling, uniforms
from fire_data.schemas.errors import EngineError
from fire_data.schemas.tables import ADDONS, EVALUATED, FLOATS, IDS, SIGNALS
from fire_data.vocabulary import Vocabulary

Progress = Callable[[int], None]


class Generator(Protocol):
    """Writes responses. Requests: `trajectory_id`, `prompt_ids`; answer, in the same order: `response_ids`,
    `rollout_logprob` (nats, under the distribution sampled from), `finish_reason`."""

    def generate(self, requests: pa.Table, sampling: Sampling, progress: Progress | None = None) -> pa.Table: ...


class Scorer(Protocol):
    """Evaluates both models on given responses. Takes rollouts (with `teacher_prompt_ids` where the teacher's prompt
    differs) and returns the columns of `tables.SIGNALS` in the same order. With `k` also those of `ADDONS["topk"]`,
    k per token, from the same pass; without `signals` those alone."""

    def score(
        self, rollouts: pa.Table, progress: Progress | None = None, *, k: int = 0, signals: bool = True
    ) -> pa.Table: ...


class Evaluator(Protocol):
    """Evaluates one model on given responses. Rows: `trajectory_id`, `prompt_ids`, `response_ids`; answer, in the same
    order: the columns of `tables.EVALUATED`, without `rank` where the engine cannot tell it and with `entropy_mass`
    where `entropy_kind` is not "exact" but "topk-lower-bound"."""

    @property
    def entropy_kind(self) -> str: ...

    def evaluate(self, rows: pa.Table, progress: Progress | None = None) -> pa.Table: ...


class Engine(Generator, Evaluator, Protocol):
    """One model in a process of its own, or behind a url. Several threads may ask it at the same time."""

    @property
    def holds_gpu(self) -> bool:
        """True if `close` gives memory of an accelerator back that others here may need."""

    def close(self) -> None: ...


def tail_bound(listed: Any, smallest: Any) -> tuple[Any, Any]:
    """Lower bound of an entropy in nats, and the probability it was computed from, arrays of the same shape.

    The tokens that are not listed share the rest r of the probability, and none of them has more than the least likely
    of the top-k, so that they add at least -r log(min p): H >= -sum_listed p log p - r log(min p).

    Args:
        listed: logprobs of the listed tokens, [..., K]: the top-k, and the sampled token where it is not one of them;
            -inf where there is none.
        smallest: logprob of the least likely of the top-k, [...]; -inf where fewer than k tokens have any probability.
    """
    p = np.exp(listed)
    mass = np.minimum(p.sum(-1), 1.0)
    inside = -(p * np.where(p > 0, listed, 0.0)).sum(-1)
    rest = np.where(np.isneginf(smallest), 0.0, smallest)  # then what the list lacks is rounding
    return np.maximum(inside - (1.0 - mass) * rest, 0.0), mass


class FakeGenerator:
    """Responses drawn from a hash of the trajectory. After `fail_after` rows in all it raises EngineError."""

    def __init__(self, vocabulary: Vocabulary, stop_ids: frozenset[int], fail_after: int | None = None) -> None:
        self.ids = np.flatnonzero(vocabulary.allowed)
        self.stops = [i for i in sorted(stop_ids) if i in set(self.ids.tolist())]
        self.fail_after = fail_after
        self.written = 0

    def generate(self, requests: pa.Table, sampling: Sampling, progress: Progress | None = None) -> pa.Table:
        responses, logprobs, reasons = [], [], []
        for row, name in enumerate(requests["trajectory_id"].to_pylist()):
            if self.fail_after is not None and self.written >= self.fail_after:
                raise EngineError("the fake engine failed as told", where=f"row {row}")
            self.written += 1
            noise = uniforms(sampling.seed, name, sampling.max_new_tokens + 1)
            length = 1 + int(noise[0] * sampling.max_new_tokens)
            ids = self.ids[(noise[1 : 1 + length] * len(self.ids)).astype(int)].tolist()
            stopped = bool(self.stops) and length < sampling.max_new_tokens
            if stopped:
                ids[-1] = self.stops[0]
            responses.append(ids)
            logprobs.append([-float(np.log(len(self.ids)))] * length)
            reasons.append("stop" if stopped else "length")
            if progress:
                progress(1)
        columns = {"response_ids": pa.array(responses, IDS), "rollout_logprob": pa.array(logprobs, FLOATS)}
        return pa.table({**columns, "finish_reason": pa.array(reasons, pa.string())})


class FakeScorer:
    """Signals that are finite, of the right shape and a function of the trajectory; they mean nothing.

    Scorer and Evaluator. Its top-k are sorted, differ in part between the models, and the logprobs on the other's ids
    agree with the own ones where an id is in both.
    """

    entropy_kind = "exact"

    def __init__(self, vocabulary: Vocabulary, who: str = "") -> None:
        self.ids = np.flatnonzero(vocabulary.allowed)
        self.log_size = float(np.log(max(2, len(self.ids))))
        self.who = who

    def score(
        self, rollouts: pa.Table, progress: Progress | None = None, *, k: int = 0, signals: bool = True
    ) -> pa.Table:
        columns = self._signals(rollouts) if signals else {}
        columns |= self._topk(rollouts, k) if k else {}
        if progress:
            progress(rollouts.num_rows)
        return pa.table(columns)

    def evaluate(self, rows: pa.Table, progress: Progress | None = None) -> pa.Table:
        """The teacher's signals, but for another noise: `who` tells one fake model from another."""
        signals = self._signals(rows)
        if progress:
            progress(rows.num_rows)
        return pa.table({c.name: signals[f"teacher_{c.name}"] for c in EVALUATED if c.name != "entropy_mass"})

    def _signals(self, rollouts: pa.Table) -> dict[str, pa.Array]:
        values: dict[str, list[list[float]]] = {c.name: [] for c in SIGNALS}
        for name, ids in _responses(rollouts):
            for k, column in enumerate(SIGNALS):
                if column.type == IDS:
                    values[column.name].append([1 if "rank" in column.name else i for i in ids])
                    continue
                noise = uniforms(k, f"{name}{self.who}", len(ids)) * self.log_size
                exact = np.full(len(ids), -self.log_size) if column.name == "student_logprob" else None
                sign = -1.0 if "logprob" in column.name else 1.0
                values[column.name].append((noise * sign if exact is None else exact).tolist())
        return {c.name: pa.array(values[c.name], c.type) for c in SIGNALS}

    def _topk(self, rollouts: pa.Table, k: int) -> dict[str, pa.Array]:
        """Both models go round the ids from a start of their own, each id less likely than the one before it."""
        values: dict[str, list[list[list[float]]]] = {c.name: [] for c in ADDONS["topk"]}
        size = len(self.ids)
        for name, ids in _responses(rollouts):
            noise = uniforms(-1, name, 2 * len(ids))
            teacher = (noise[: len(ids)] * size).astype(int)[:, None]
            student = (teacher + (noise[len(ids) :] * k).astype(int)[:, None]) % size
            steps = np.arange(k)[None]

            def logprob(start: Any, at: Any) -> Any:
                """Half of what is left for every id on the way, the same for all beyond the k-th."""
                return -np.log(2.0) * (1 + np.minimum((at - start) % size, k))

            for who, start in (("student", student), ("teacher", teacher)):
                values[f"{who}_topk_ids"].append(self.ids[(start + steps) % size].tolist())
                values[f"{who}_topk_logprobs"].append(logprob(start, start + steps).tolist())
            values["teacher_logprob_on_student_topk"].append(logprob(teacher, student + steps).tolist())
            values["student_logprob_on_teacher_topk"].append(logprob(student, teacher + steps).tolist())
        return {c.name: pa.array(values[c.name], c.type) for c in ADDONS["topk"]}


def _responses(rollouts: pa.Table) -> list[tuple[str, list[int]]]:
    """Name and response of every row."""
    return list(zip(rollouts["trajectory_id"].to_pylist(), rollouts["response_ids"].to_pylist(), strict=True))
