"""Writes responses with a transformers model: continuous batching over its own KV cache, one noise number per token.

Finished rows leave the batch at once and waiting prompts take their place, so a few long responses do not hold up the
rest. Rows are left-padded to one common cache length; a row's padding never changes while the batch does not, so one
number per row says its mask and its positions. A prompt sampled n times is read once. Which rows run together depends
on the request table and `rows_in_flight` alone, and a sample depends on it up to float rounding only.

Caches that keep a window or a running state instead of all keys cannot take in rows of another length: those models
run in waves, the next group starting when the last row of the one before has finished.

Units: logprobs in nats, lengths in tokens. Suffixes: _B sequences, _L padded length, _V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from fire_data.kvcache import RoomyLayer, roomy, take
from fire_data.sampling import Sampling, sample_tokens, uniforms
from fire_data.schemas.errors import DataError, EngineError
from fire_data.schemas.tables import FLOATS, IDS
from fire_data.vocabulary import Vocabulary, mask_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Waiting prompts enter when this share of the rows is free: each entry costs a forward of its own.
_REFILL_SHARE = 1 / 4
# Bounds the activations of one prefill, in padded tokens.
_PREFILL_TOKENS = 16384
_SHORTER = "shorter prompts, or a lower rollout.max_new_tokens (of an evaluation, eval.max_new_tokens)"
# Eager attention takes its softmax in fp32, where the mask of a padded fp64 row overflows.
_NOT_FINITE = (
    "in float64 use dtype float32 or attention sdpa, or prompts of equal length; otherwise look for NaN in the weights"
)


@dataclass(frozen=True)
class Sample:
    """One response: `ids` int32 [n] with its end token, `logprobs` float64 [n] in nats, `finish_reason` stop|length."""

    ids: np.ndarray
    logprobs: np.ndarray
    finish_reason: str


@dataclass
class _Rows:
    """Rows that share one cache of length `width`. Row b's first `pad_B[b]` cache columns are padding.

    `request_B` indexes the requests, `slot_B` the buffers, `count_B` is tokens written so far, `last_B` the newest of
    them, which is not in the cache yet.
    """

    cache: DynamicCache
    width: int
    last_B: Tensor
    pad_B: np.ndarray
    request_B: np.ndarray
    slot_B: np.ndarray
    count_B: np.ndarray
    pad_B1: Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        self.pad_B1 = _on_device(self.pad_B, self.last_B.device)


@dataclass
class _Buffers:
    """Host memory of the rows in flight, by slot: noise [S, N] in, ids and logprobs [S, N] out."""

    noise: np.ndarray
    ids: np.ndarray
    logprobs: np.ndarray
    free: list[int]

    @classmethod
    def of(cls, slots: int, tokens: int) -> _Buffers:
        shape = (slots, tokens)
        free = list(range(slots))
        return cls(np.empty(shape), np.empty(shape, dtype=np.int32), np.empty(shape), free)


def admit(waiting: int, running: int, capacity: int, mergeable: bool) -> int:
    """How many waiting prompts enter now. An empty batch fills up; a running one refills in groups, waves never."""
    free = capacity - running
    if running == 0:
        return min(waiting, capacity)
    if mergeable and (waiting <= free or free >= _REFILL_SHARE * capacity):
        return min(waiting, free)
    return 0


class TransformersGenerator:
    """Generator on an in-memory transformers model; `stop_ids` outside of the vocabulary can never be sampled."""

    def __init__(
        self, model: PreTrainedModel, vocabulary: Vocabulary, stop_ids: frozenset[int], rows_in_flight: int
    ) -> None:
        self.model = model
        self.vocabulary = vocabulary
        self.rows_in_flight = rows_in_flight
        self.stops_V = np.isin(np.arange(vocabulary.size), sorted(stop_ids))
        accepted = inspect.signature(model.forward).parameters
        if "past_key_values" not in accepted:
            raise EngineError(f"{type(model).__name__} takes no past_key_values: generating needs a KV cache")
        self._takes_positions = "position_ids" in accepted
        self._last_only: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

    @property
    def can_stop(self) -> bool:
        """Whether any stop token can be sampled; if not, every response is as long as `max_new_tokens`."""
        return bool((self.stops_V & self.vocabulary.allowed).any())

    def generate(
        self, requests: pa.Table, sampling: Sampling, progress: Callable[[int], None] | None = None
    ) -> pa.Table:
        """Answer requests {trajectory_id: string, prompt_ids: list<int32>} in their order.

        Returns `response_ids` list<int32> (end token included), `rollout_logprob` list<float32> (nats, under the
        distribution sampled from) and `finish_reason` (stop|length). `progress(k)` is told of k finished rows.
        Raises DataError naming the row when a prompt is empty, has an id the model lacks or leaves no room for
        `max_new_tokens`, EngineError when logits are not finite.
        """
        prompts = [np.asarray(ids, dtype=np.int64) for ids in requests["prompt_ids"].to_pylist()]
        samples = self.samples(requests["trajectory_id"].to_pylist(), prompts, sampling, progress)
        columns = {
            "response_ids": pa.array([s.ids for s in samples], type=IDS),
            "rollout_logprob": pa.array([s.logprobs.astype(np.float32) for s in samples], type=FLOATS),
            "finish_reason": pa.array([s.finish_reason for s in samples], type=pa.string()),
        }
        return pa.table(columns)

    def samples(
        self,
        trajectory_ids: Sequence[str],
        prompts: Sequence[np.ndarray],
        sampling: Sampling,
        progress: Callable[[int], None] | None = None,
    ) -> list[Sample]:
        """As `generate`, on arrays, with logprobs as precise as the model's logits."""
        self._check(trajectory_ids, prompts, sampling.max_new_tokens)
        was_training = self.model.training
        self.model.train(False)
        try:
            with torch.inference_mode():
                run = _Run(self, trajectory_ids, prompts, sampling, progress or (lambda _finished: None))
                return run.finish_all()
        finally:
            self.model.train(was_training)

    def _check(self, trajectory_ids: Sequence[str], prompts: Sequence[np.ndarray], new_tokens: int) -> None:
        limit = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        known = self.model.get_input_embeddings().num_embeddings
        for row, (name, prompt) in enumerate(zip(trajectory_ids, prompts, strict=True)):
            where = f"requests, row {row} (trajectory {name}), column 'prompt_ids'"
            if len(prompt) == 0:
                raise DataError("the prompt has no tokens", where=where)
            if prompt.min() < 0 or prompt.max() >= known:
                bad = prompt[(prompt < 0) | (prompt >= known)][0]
                raise DataError(f"token id {bad} is not among the model's {known}", where=where)
            if limit is not None and len(prompt) + new_tokens > limit:
                text = f"{len(prompt)} prompt tokens and {new_tokens} new ones exceed the model's {limit} positions"
                raise DataError(text, where=where, fix=_SHORTER)

    def forward(self, ids_BL: Tensor, pad_B1: Tensor | None, cache: DynamicCache, width: int) -> Tensor:
        """Logits [B, V] after the last of `ids_BL`, whose tokens are the last columns of a cache of `width` columns.

        `pad_B1` is None when no row is padded: without a mask, attention can use its fastest kernels.
        """
        columns_L = torch.arange(width, device=ids_BL.device)
        kwargs: dict[str, Any] = {"attention_mask": None} if pad_B1 is None else {"attention_mask": columns_L >= pad_B1}
        if self._takes_positions:
            positions_L = columns_L[width - ids_BL.shape[1] :]
            positions_BL = positions_L.expand_as(ids_BL) if pad_B1 is None else (positions_L - pad_B1).clamp_(min=0)
            kwargs["position_ids"] = positions_BL
        answer = self.model(input_ids=ids_BL, past_key_values=cache, use_cache=True, **self._last_only, **kwargs)
        logits_BV: Tensor = answer.logits[:, -1]
        return logits_BV


class _Run:
    """One call of `samples`: the rows in flight, their buffers and the finished samples."""

    def __init__(
        self,
        engine: TransformersGenerator,
        trajectory_ids: Sequence[str],
        prompts: Sequence[np.ndarray],
        sampling: Sampling,
        progress: Callable[[int], None],
    ) -> None:
        self.engine = engine
        self.trajectory_ids = trajectory_ids
        self.prompts = prompts
        self.sampling = sampling
        self.progress = progress
        self.device = engine.model.device
        self.capacity = min(engine.rows_in_flight, len(prompts))
        self.buffers = _Buffers.of(self.capacity, sampling.max_new_tokens)
        self.done: dict[int, Sample] = {}
        self.mergeable = all(type(layer) is DynamicLayer for layer in self._new_cache().layers)

    def finish_all(self) -> list[Sample]:
        """All samples in request order. Longest prompts go first: prefills are of like length, memory peaks early."""
        waiting = sorted(range(len(self.prompts)), key=lambda i: -len(self.prompts[i]))
        rows: _Rows | None = None
        while waiting or rows is not None:
            entering = admit(len(waiting), 0 if rows is None else len(rows.pad_B), self.capacity, self.mergeable)
            for group in self._groups(waiting[:entering]):
                fresh = self._settle(*self._prefill(group))
                rows = self._join(rows, fresh) if fresh else rows
            del waiting[:entering]
            if rows is not None:
                rows = self._settle(rows, self._decode(rows))
        return [self.done[i] for i in range(len(self.prompts))]

    def _new_cache(self) -> DynamicCache:
        return DynamicCache(config=self.engine.model.config)

    def _groups(self, requests: list[int]) -> list[list[int]]:
        """Cut into prefills of bounded size; a wave cannot be cut, its rows have to start together."""
        groups: list[list[int]] = []
        tokens = 0
        for request in requests:
            prompt = self.prompts[request]
            cost = 0 if groups and np.array_equal(prompt, self.prompts[groups[-1][-1]]) else len(prompt)
            if groups and (tokens + cost <= _PREFILL_TOKENS or not self.mergeable):
                groups[-1].append(request)
                tokens += cost
            else:
                groups.append([request])
                tokens = len(prompt)
        return groups

    def _prefill(self, requests: list[int]) -> tuple[_Rows, Tensor]:
        """Read the prompts of `requests`, equal ones once: rows yet to draw their first token, and its logits."""
        index: dict[bytes, int] = {}
        prompt_B = np.array([index.setdefault(self.prompts[i].tobytes(), len(index)) for i in requests])
        distinct = [np.frombuffer(key, dtype=np.int64) for key in index]
        width = max(len(prompt) for prompt in distinct)
        pads = np.array([width - len(prompt) for prompt in distinct])
        ids_BL = np.zeros((len(distinct), width), dtype=np.int64)
        for row, prompt in enumerate(distinct):
            ids_BL[row, pads[row] :] = prompt
        cache = self._new_cache()
        pad_B1 = _on_device(pads, self.device)
        logits_BV = self.engine.forward(torch.as_tensor(ids_BL, device=self.device), pad_B1, cache, width)
        if len(distinct) < len(requests):
            index_B = torch.as_tensor(prompt_B, device=self.device)
            take(cache, index_B)
            logits_BV = logits_BV[index_B]
        slots = np.array([self.buffers.free.pop() for _ in requests])
        for slot, request in zip(slots, requests, strict=True):
            name = self.trajectory_ids[request]
            self.buffers.noise[slot] = uniforms(self.sampling.seed, name, self.sampling.max_new_tokens)
        none_yet = torch.zeros(len(requests), dtype=torch.int64, device=self.device)
        rows = _Rows(cache, width, none_yet, pads[prompt_B], np.array(requests), slots, np.zeros_like(slots))
        return rows, logits_BV

    def _decode(self, rows: _Rows) -> Tensor:
        rows.width += 1
        return self.engine.forward(rows.last_B.unsqueeze(1), rows.pad_B1, rows.cache, rows.width)

    def _settle(self, rows: _Rows, logits_BV: Tensor) -> _Rows | None:
        """Draw one token per row, write it down, let finished rows go. None when no row is left."""
        if logits_BV.device.type == "mps":  # has no float64
            logits_BV = logits_BV.cpu()
        logits_BV = mask_logits(logits_BV, self.engine.vocabulary)
        noise_B = torch.as_tensor(self.buffers.noise[rows.slot_B, rows.count_B]).to(logits_BV.device)
        ids_B, logprob_B = sample_tokens(logits_BV, noise_B, self.sampling)
        ids, logprobs = torch.stack([ids_B.double(), logprob_B.double()]).cpu().numpy()
        if not np.isfinite(logprobs.sum()):
            name = self.trajectory_ids[rows.request_B[np.argmin(np.isfinite(logprobs))]]
            raise EngineError("the model's logits are not finite", where=f"rollout, trajectory {name}", fix=_NOT_FINITE)
        ids = ids.astype(np.int64)
        self.buffers.ids[rows.slot_B, rows.count_B] = ids
        self.buffers.logprobs[rows.slot_B, rows.count_B] = logprobs
        rows.count_B += 1
        rows.last_B = ids_B.to(self.device)
        stopped_B = self.engine.stops_V[ids]
        finished_B = stopped_B | (rows.count_B == self.sampling.max_new_tokens)
        if not finished_B.any():
            return rows
        for row in np.flatnonzero(finished_B):
            self._file(rows, int(row), "stop" if stopped_B[row] else "length")
        self.progress(int(finished_B.sum()))
        return None if finished_B.all() else self._keep(rows, np.flatnonzero(~finished_B))

    def _file(self, rows: _Rows, row: int, finish_reason: str) -> None:
        slot, count = int(rows.slot_B[row]), rows.count_B[row]
        ids, logprobs = self.buffers.ids[slot, :count].copy(), self.buffers.logprobs[slot, :count].copy()
        self.done[int(rows.request_B[row])] = Sample(ids, logprobs, finish_reason)
        self.buffers.free.append(slot)

    def _keep(self, rows: _Rows, left_B: np.ndarray) -> _Rows:
        """Only the rows `left_B`, without the padding that all of them share. The last rows fill the gaps."""
        keep_B = np.arange(len(left_B))
        gaps, movers = np.setdiff1d(keep_B, left_B), left_B[left_B >= len(left_B)]
        keep_B[gaps] = movers
        pad_B, crop = rows.pad_B[keep_B], 0
        index_B = torch.as_tensor(keep_B, device=self.device)
        if isinstance(rows.cache.layers[0], RoomyLayer):
            crop = int(pad_B.min())
            to, source = torch.as_tensor(gaps, device=self.device), torch.as_tensor(movers, device=self.device)
            for layer in roomy(rows.cache):
                layer.keep(len(keep_B), to, source, crop)
        else:
            take(rows.cache, index_B)
        host = (rows.request_B[keep_B], rows.slot_B[keep_B], rows.count_B[keep_B])
        return _Rows(rows.cache, rows.width - crop, rows.last_B[index_B], pad_B - crop, *host)

    def _join(self, rows: _Rows | None, fresh: _Rows) -> _Rows:
        if not self.mergeable:
            return fresh
        if rows is None:
            cache = self._new_cache()
            cache.layers = [RoomyLayer() for _ in cache.layers]  # type: ignore[no-untyped-call]
            rows = _Rows(cache, 0, fresh.last_B[:0], *(fresh.pad_B[:0] for _ in range(4)))
        fresh_layers: list[Any] = fresh.cache.layers
        for layer, other in zip(roomy(rows.cache), fresh_layers, strict=True):
            layer.absorb(other.keys, other.values)
        width = max(rows.width, fresh.width)
        pad_B = np.concatenate([rows.pad_B + width - rows.width, fresh.pad_B + width - fresh.width])
        pairs = ((rows.request_B, fresh.request_B), (rows.slot_B, fresh.slot_B), (rows.count_B, fresh.count_B))
        host = [np.concatenate(pair) for pair in pairs]
        return _Rows(rows.cache, width, torch.cat([rows.last_B, fresh.last_B]), pad_B, *host)


def _on_device(pad_B: np.ndarray, device: torch.device) -> Tensor | None:
    return torch.as_tensor(pad_B, device=device).unsqueeze(1) if pad_B.any() else None
