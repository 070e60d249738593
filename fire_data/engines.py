"""What generates and what scores: two protocols over tables, and a fake engine that needs no model.

The fake engine is deterministic and can be told to fail: for tests of everything around the engines, and dry runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import pyarrow as pa

from fire_data.sampling import Sampling, uniforms
from fire_data.schemas.errors import EngineError
from fire_data.schemas.tables import FLOATS, IDS, SIGNALS
from fire_data.vocabulary import Vocabulary

Progress = Callable[[int], None]


class Generator(Protocol):
    """Writes responses. Requests: `trajectory_id`, `prompt_ids`; answer, in the same order: `response_ids`,
    `rollout_logprob` (nats, under the distribution sampled from), `finish_reason`."""

    def generate(self, requests: pa.Table, sampling: Sampling, progress: Progress | None = None) -> pa.Table: ...


class Scorer(Protocol):
    """Evaluates both models on given responses. Takes rollouts (with `teacher_prompt_ids` where the teacher's prompt
    differs) and returns the columns of `tables.SIGNALS` in the same order."""

    def score(self, rollouts: pa.Table, progress: Progress | None = None) -> pa.Table: ...


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
    """Signals that are finite, of the right shape and a function of the trajectory; they mean nothing."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.log_size = float(np.log(max(2, int(vocabulary.allowed.sum()))))

    def score(self, rollouts: pa.Table, progress: Progress | None = None) -> pa.Table:
        values: dict[str, list[list[float]]] = {c.name: [] for c in SIGNALS}
        names, responses = rollouts["trajectory_id"].to_pylist(), rollouts["response_ids"].to_pylist()
        for name, ids in zip(names, responses, strict=True):
            for k, column in enumerate(SIGNALS):
                if column.type == IDS:
                    values[column.name].append([1 if "rank" in column.name else i for i in ids])
                    continue
                noise = uniforms(k, name, len(ids)) * self.log_size
                exact = np.full(len(ids), -self.log_size) if column.name == "student_logprob" else None
                sign = -1.0 if "logprob" in column.name else 1.0
                values[column.name].append((noise * sign if exact is None else exact).tolist())
            if progress:
                progress(len(ids))
        return pa.table({c.name: pa.array(values[c.name], c.type) for c in SIGNALS})
