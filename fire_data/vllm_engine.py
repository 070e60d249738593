"""Generates and evaluates with vLLM in a process of its own, whose interpreter may belong to another environment.

Why a process: vLLM pins its own torch and transformers, holds the GPU as long as it lives and ends with the process
that imported it when it crashes. So it gets a virtual environment of its own if the user likes, all its memory is back
when the engine is closed, and a crash is an error with the last lines of its log. Tables go in and out through a pair
of pipes; calls of several threads are computed together and answered row by row, so that what is finished when the
process dies is not lost. Units: nats, tokens. Legend: `_T` response tokens of a row.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fire_data.engines import Progress, tail_bound
from fire_data.sampling import Sampling, seed_of
from fire_data.schemas.config import VllmConfig
from fire_data.schemas.errors import NOT_FINITE, ConfigError, DataError, EngineError, PartialError, TokenizerError
from fire_data.schemas.tables import EVALUATED, FLOATS, IDS, TOPK_BOUND
from fire_data.vllm_process import Process
from fire_data.vllm_worker import fire_vllm
from fire_data.vocabulary import Vocabulary

_COLDEST = 0.01  # vLLM draws at this temperature where it is told a lower one
# Fields of a config.json that may differ between exports of one model.
_VARIES = {"transformers_version", "dtype", "torch_dtype", "use_cache", "_name_or_path"}

Parts = dict[int, dict[str, Any]]


class VllmEngine:
    """Generator and Evaluator on a local folder of weights. May be called from several threads at once.

    Args:
        folder: model in Hugging Face format with safetensors.
        dtype: of weights and matmuls, always passed: vLLM would choose another one than the folder's.
        vocabulary: ids that share the probability; no other can be sampled, and scores are over these alone.
        stop_ids: ids that end a response; nothing else does.
        log: file that gets what vLLM prints, appended.
        threads: CPU threads; None: torch's default.
        longest: prompt and response together, in tokens, of the longest row that will be asked for.
        device: auto, cpu, cuda, or cuda:1, the first of `settings.tensor_parallel_size` GPUs.
        entropy_topk: tokens listed for the lower bound of the entropy where the exact one cannot be had.
        exact: false: the lower bound even so, to compare with servers that can do no better.

    Raises:
        ConfigError: there is no such interpreter, or it has no vLLM.
        TokenizerError: the model has fewer output rows than the vocabulary has ids.
        EngineError: vLLM did not start.
    """

    def __init__(
        self, folder: Path, *, dtype: str, settings: VllmConfig, vocabulary: Vocabulary, stop_ids: frozenset[int],
        log: Path, threads: int | None, longest: int, device: str = "auto", entropy_topk: int = 20, exact: bool = True,
    ) -> None:  # fmt: skip
        self.weights = _weights(folder)
        self.topk = min(max(entropy_topk, fire_vllm.ENTROPY + 1), int(vocabulary.allowed.sum()))
        self.stop_ids = sorted(i for i in stop_ids if i < vocabulary.size and vocabulary.allowed[i])
        header = {
            "folder": str(folder),
            "max_model_len": settings.max_model_len or longest + 1,
            "topk": self.topk,
            "cpu_kv_cache_bytes": int(settings.cpu_kv_cache_gb * 2**30),
            "arguments": _arguments(settings, dtype),
            "further": settings.args,
        }
        gpus = visible_gpus(device, settings.tensor_parallel_size, os.environ.get("CUDA_VISIBLE_DEVICES"))
        self._process = Process(settings.python or sys.executable, log, threads, gpus)
        try:
            self._process.send(header, {"allowed": vocabulary.allowed})
            self.facts = self._process.first(settings.start_timeout)
            if self.facts["rows"] < vocabulary.size:
                text = f"the model has {self.facts['rows']} output rows, the vocabulary ids up to {vocabulary.size - 1}"
                raise TokenizerError(text, where=str(folder), fix="use the tokenizer that belongs to the model")
        except BaseException:
            self._process.close(kill=True)
            raise
        self.holds_gpu = self.facts["device"] != "cpu" and not settings.keep
        self.exact = exact and self.facts["exact"]
        self.longest = self.facts["max_model_len"]
        self.entropy_kind = "exact" if self.exact else TOPK_BOUND

    @property
    def pid(self) -> int:
        """The process that holds the model."""
        return self._process.pid

    def generate(self, requests: pa.Table, sampling: Sampling, progress: Progress | None = None) -> pa.Table:
        """Answer requests {trajectory_id, prompt_ids} in their order: `response_ids`, `rollout_logprob` (under the
        distribution sampled from; greedy: under the full one at temperature 1) and `finish_reason` (stop, length).

        Every trajectory has a seed of its own, a function of `sampling.seed` and its id: it does not depend on what it
        is computed with but through float rounding.

        Raises:
            DataError: a prompt is empty, has an id the model lacks, or leaves no room for `max_new_tokens`.
            ConfigError: a temperature that vLLM would silently raise.
            PartialError, EngineError: the process died.
        """
        if not sampling.greedy and sampling.temperature < _COLDEST:
            fix = f"use a temperature of at least {_COLDEST}, or greedy"
            raise ConfigError(f"vLLM does not sample at temperature {sampling.temperature}", where="sampling", fix=fix)
        names = requests["trajectory_id"].to_pylist()
        ids, lengths = _flat(requests["prompt_ids"])
        room = self.longest - sampling.max_new_tokens
        text = f"prompt tokens and {sampling.max_new_tokens} new ones exceed the {self.longest} of the engine"
        self._check(names, "prompt_ids", ids, lengths, room, text)
        _refuse(lengths == 0, names, "prompt_ids", "the prompt has no tokens")
        drawn = {
            "temperature": 0.0 if sampling.greedy else sampling.temperature,
            "top_p": 1.0 if sampling.greedy else sampling.top_p,
            "top_k": 0 if sampling.greedy else sampling.top_k,
            "max_tokens": sampling.max_new_tokens,
        }
        header = {"kind": "generate", "sampling": drawn, "stop_ids": self.stop_ids}
        seeds = np.array([seed_of(sampling.seed, name) for name in names], np.int64)
        arrays = {"ids": ids, "lengths": lengths, "seeds": seeds}
        return self._rows(header, arrays, names, list(range(len(names))), progress, _responses)

    def evaluate(self, rows: pa.Table, progress: Progress | None = None) -> pa.Table:
        """The columns of `tables.EVALUATED` for rows {trajectory_id, prompt_ids, response_ids}, in their order;
        `entropy_mass` only where the entropy is a bound. An empty response gives empty lists.

        Raises:
            DataError: a row has response but no prompt tokens, an id the model lacks, or is too long.
            PartialError, EngineError: the process died, or gave numbers that are not finite.
        """
        names = rows["trajectory_id"].to_pylist()
        (prompts, starts), (responses, counts) = _flat(rows["prompt_ids"]), _flat(rows["response_ids"])
        self._check(names, "prompt_ids", prompts, starts, None, "")
        self._check(names, "response_ids", responses, counts, None, "")
        asked = np.flatnonzero(counts)
        text = "there is no prompt token to predict the first response token from"
        _refuse((starts == 0) & (counts > 0), names, "prompt_ids", text, "remove this prompt, or use a chat template")
        lengths = starts + counts
        text = f"tokens of prompt and response exceed the {self.longest - 1} that the engine scores"
        _refuse(lengths * (counts > 0) > self.longest - 1, names, "response_ids", text, _LONGER, lengths)
        pairs = zip(_split(prompts, starts), _split(responses, counts), strict=True)
        whole = [part for i, pair in enumerate(pairs) if counts[i] for part in pair]
        ids = np.concatenate(whole) if whole else np.zeros(0, np.int32)
        header = {"kind": "evaluate", "k": fire_vllm.ENTROPY if self.exact else self.topk}
        arrays = {"ids": ids, "lengths": lengths[asked], "starts": starts[asked]}
        build = _exact_signals if self.exact else _bound_signals
        if progress and len(asked) < len(names):
            progress(len(names) - len(asked))
        return self._rows(header, arrays, names, asked.tolist(), progress, build)

    def load(self, folder: Path) -> None:
        """Weights of another folder into the living engine, whose caches are emptied. Waits for running calls.

        Raises DataError, and keeps the weights, for a folder without whole safetensors files or of another model:
        a new engine loads those.
        """
        weights = _weights(folder)
        _require_same(self.weights, weights, folder)
        for _ in self._process.ask({"kind": "load", "folder": str(folder)}, {}):
            pass

    def close(self) -> None:
        """End the process: all its memory is back when this returns."""
        self._process.close()

    def _rows(
        self, header: dict[str, Any], arrays: dict[str, Any], names: Sequence[str], asked: list[int],
        progress: Progress | None, build: Callable[[Parts, Sequence[int]], dict[str, pa.Array]],
    ) -> pa.Table:  # fmt: skip
        """Ask for the rows `asked` (all others are empty) and build a table of all from what comes back."""
        found: Parts = {}
        try:
            for answer in self._process.ask(header, arrays) if asked else ():
                fresh = _by_row(answer)
                found |= {asked[row]: part for row, part in fresh.items()}
                if progress:
                    progress(len(fresh))
        except EngineError as error:
            if not found:
                raise
            kept = sorted(found)
            done = pa.table({"trajectory_id": [names[i] for i in kept], **build(found, kept)})
            raise PartialError(error.what, where=error.where, fix=error.fix, done=done) from None
        return pa.table(build(found, range(len(names))))

    def _check(self, names: Sequence[str], column: str, ids: Any, lengths: Any, limit: int | None, text: str) -> None:
        """Raise DataError for the first row with an id that the model lacks, or longer than `limit`."""
        known = self.facts["rows"]
        bad = (ids < 0) | (ids >= known)
        if bad.any():
            row = int(np.searchsorted(np.cumsum(lengths), int(np.argmax(bad)), side="right"))
            wrong = np.arange(len(lengths)) == row
            _refuse(wrong, names, column, f"token id {ids[bad][0]} is not among the model's {known}")
        if limit is not None:
            _refuse(lengths > limit, names, column, text, _LONGER, lengths)


_LONGER = "raise vllm.max_model_len, or lower rollout.max_new_tokens or rollout.max_prompt_tokens"


def visible_gpus(device: str, count: int, visible: str | None) -> str | None:
    """CUDA_VISIBLE_DEVICES for a process on `count` GPUs from `device` on; None: as it is.

    `visible`: that of this process, within which a device is counted.
    """
    kind, _, index = device.partition(":")
    if kind == "cpu":
        return ""
    if not index:
        return None
    first = int(index)
    names = visible.split(",") if visible else [str(i) for i in range(first + count)]
    if first + count > len(names):
        text = f"device {device} with {count} GPUs, and CUDA_VISIBLE_DEVICES names {len(names)}"
        raise ConfigError(text, fix="set the model's device or vllm.tensor_parallel_size")
    return ",".join(names[first : first + count])


def _arguments(settings: VllmConfig, dtype: str) -> dict[str, Any]:
    """Arguments of `vllm.LLM`; those that are None are left to vLLM."""
    given = {
        "dtype": dtype,
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "enforce_eager": settings.enforce_eager,
    }
    return {name: value for name, value in given.items() if value is not None}


def _flat(column: pa.ChunkedArray) -> tuple[Any, Any]:
    """A list column as its values int32 and the length of every row int64."""
    values = pc.list_flatten(column).to_numpy().astype(np.int32, copy=False)
    return values, pc.list_value_length(column).to_numpy().astype(np.int64)


def _split(values: Any, lengths: Any) -> list[Any]:
    return np.split(values, np.cumsum(lengths)[:-1]) if len(lengths) else []


def _refuse(
    wrong: Any, names: Sequence[str], column: str, text: str, fix: str | None = None, lengths: Any = None
) -> None:
    """Raise DataError naming the first row that is wrong."""
    if not wrong.any():
        return
    row = int(np.argmax(wrong))
    where = f"row {row} (trajectory {names[row]}), column {column!r}"
    raise DataError(text if lengths is None else f"{lengths[row]} {text}", where=where, fix=fix)


def _by_row(answer: dict[str, Any]) -> Parts:
    """An answer's arrays cut into rows: `stopped` has one element per row, the others are per token."""
    names = answer.keys() - {"row", "lengths"}
    cut = {n: answer[n] if n == "stopped" else _split(answer[n], answer["lengths"]) for n in names}
    return {row: {name: parts[i] for name, parts in cut.items()} for i, row in enumerate(answer["row"].tolist())}


def _joined(found: Parts, rows: Sequence[int], name: str, empty: Any) -> Any:
    """One array of all tokens of `rows`, row after row."""
    return np.concatenate([found[row][name] for row in rows if row in found] or [empty])


def _lists(values_T: Any, found: Parts, rows: Sequence[int], type_: pa.DataType, name: str) -> pa.ListArray:
    """`values_T` cut into the rows that `name` was cut into; a row that was not asked for is empty."""
    lengths = [len(found[row][name]) if row in found else 0 for row in rows]
    values = pa.array(values_T, type_.value_type)
    return pa.ListArray.from_arrays(np.cumsum([0, *lengths], dtype=np.int32), values, type=type_)


def _responses(found: Parts, rows: Sequence[int]) -> dict[str, pa.Array]:
    ids, logprobs = (_joined(found, rows, name, np.zeros(0)) for name in ("ids", "logprob"))
    _require_finite(logprobs)
    reasons = ["stop" if found[row]["stopped"] else "length" for row in rows]
    return {
        "response_ids": _lists(ids.astype(np.int32), found, rows, IDS, "ids"),
        "rollout_logprob": _lists(logprobs.astype(np.float32), found, rows, FLOATS, "ids"),
        "finish_reason": pa.array(reasons, pa.string()),
    }


def _slots(found: Parts, rows: Sequence[int]) -> tuple[Any, Any, Any]:
    """Ids and values [T, k + 1] of the token itself and of those listed beside it, and the token's rank [T]."""
    ids = _joined(found, rows, "slot_ids", np.zeros((0, 3)))
    values = _joined(found, rows, "values", np.zeros((0, 3), np.float32))
    _require_finite(values)
    return ids, values, _joined(found, rows, "rank", np.zeros(0))


def _exact_signals(found: Parts, rows: Sequence[int]) -> dict[str, pa.Array]:
    """Slots: token, most likely token, entropy."""
    ids, values, rank = _slots(found, rows)
    signals = {"logprob": values[:, 0], "entropy": values[:, 2], "max_logprob": values[:, 1]}
    return _columns(signals | {"top1_id": ids[:, 1], "rank": rank}, found, rows)


def _bound_signals(found: Parts, rows: Sequence[int]) -> dict[str, pa.Array]:
    """Slots: token, then the top-k, of which the token may be one."""
    ids, values, rank = _slots(found, rows)
    wide = values.astype(np.float64)
    among = (ids[:, 1:] == ids[:, :1]).any(1)
    wide[:, 0] = np.where(among, -np.inf, wide[:, 0])
    bound, mass = tail_bound(wide, wide[:, -1])
    signals = {"logprob": values[:, 0], "entropy": bound, "max_logprob": values[:, 1], "top1_id": ids[:, 1]}
    return _columns(signals | {"rank": rank, "entropy_mass": mass}, found, rows)


def _columns(signals: dict[str, Any], found: Parts, rows: Sequence[int]) -> dict[str, pa.Array]:
    columns = [c for c in EVALUATED if c.name in signals]
    types = {FLOATS: np.float32, IDS: np.int32}
    return {c.name: _lists(signals[c.name].astype(types[c.type]), found, rows, c.type, "rank") for c in columns}


def _require_finite(values: Any) -> None:
    if not np.isfinite(values).all():
        raise EngineError("vLLM gave logprobs that are not finite", fix=NOT_FINITE)


@dataclass(frozen=True)
class Weights:
    """A model folder: its config.json, and the shape of every tensor in its safetensors files."""

    config: dict[str, Any]
    shapes: dict[str, list[int]]


def _weights(folder: Path) -> Weights:
    """Read a model folder. Raises DataError for one without safetensors, or with a file that is not whole.

    vLLM would take a wrong path for a Hub id.
    """
    fix = "give the folder of a model that save_pretrained wrote"
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise DataError("there are no safetensors files", where=str(folder), fix=fix)
    shapes: dict[str, list[int]] = {}
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        for file in files:
            with file.open("rb") as stream:
                size = int.from_bytes(stream.read(8), "little")
                tensors = json.loads(stream.read(size))
            tensors.pop("__metadata__", None)
            end = max((t["data_offsets"][1] for t in tensors.values()), default=0)
            if file.stat().st_size != 8 + size + end:
                raise DataError("a safetensors file is not whole", where=str(file), fix=fix)
            shapes |= {name: tensor["shape"] for name, tensor in tensors.items()}
    except (OSError, ValueError, KeyError, MemoryError) as error:
        raise DataError(f"the model cannot be read: {error}", where=str(folder), fix=fix) from None
    return Weights(config, shapes)


def _require_same(old: Weights, new: Weights, folder: Path) -> None:
    """Raise DataError unless the new weights replace all of the old ones: vLLM would keep what it does not find."""
    both = [k for k in old.config.keys() & new.config.keys() if k not in _VARIES and not k.endswith("_token_id")]
    wrong = sorted(k for k in both if old.config[k] != new.config[k])
    tied = {"lm_head.weight"} if new.config.get("tie_word_embeddings") else set()
    wrong += sorted(k for k in old.shapes.keys() - tied if new.shapes.get(k) != old.shapes[k])
    if wrong:
        text = f"these are weights of another model: {wrong[0]} differs ({len(wrong)} differences)"
        raise DataError(text, where=str(folder), fix="start a new engine for this model")
