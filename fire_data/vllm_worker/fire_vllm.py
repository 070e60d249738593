"""vLLM behind a pair of pipes, and the extension that gives it exact entropies and a vocabulary.

Run as a script by `fire_data.vllm_engine`, with an interpreter that may belong to another environment, so that vLLM
and its pins stay out of the user's own: this file needs vllm, torch and numpy, nothing of fire_data. It feeds vLLM's
engine loop itself, so that the rows of several calls are computed together. It ends when its pipe closes.

`Extension` also works in a server: PYTHONPATH=<this folder> VLLM_USE_V2_MODEL_RUNNER=0 python -m
vllm.entrypoints.openai.api_server --worker-extension-cls fire_vllm.Extension ...  A request with `prompt_logprobs: 2`
then gets, per token, the token itself, the most likely token, and as the last entry the entropy in its `logprob` field,
under the smallest of the ids 0, 1, 2 that is neither of these two (which may be one and the same). The entropy is that
of the model's own output rows: the vocabulary is masked only where `fire_forbid` was called. All other requests are
answered as vLLM answers them.

A message is a JSON header and raw arrays. Units: nats. Legend: `_T` response tokens of a row, `_V` output rows.
"""

from __future__ import annotations

import inspect
import json
import os
import queue
import signal
import struct
import sys
import threading
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import numpy as np

ENTROPY = 2  # prompt_logprobs that asks for the entropy
_CHUNK_BYTES = 256 * 2**20  # bounds the fp32 logits of prompt tokens at a time
_CPU_CHUNK_BYTES = 2**20  # of them, what passes over and over again and should stay in the cache
_LEAVE_SECONDS = 10.0  # for vLLM to put its things away before it is killed
_USED = ("compute_logits", "compute_logprobs", "gather_logprobs")

Arrays = dict[str, Any]


def write_message(stream: BinaryIO, header: dict[str, Any], arrays: Arrays) -> None:
    """One message: lengths, header and arrays. The stream must be flushed by nobody else meanwhile."""
    parts = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    header = header | {"arrays": [[name, a.dtype.str, list(a.shape)] for name, a in parts.items()]}
    text = json.dumps(header).encode()
    stream.write(struct.pack(">Q", len(text)) + text)
    for array in parts.values():
        stream.write(array.data.cast("B") if array.size else b"")
    stream.flush()


def read_message(stream: BinaryIO) -> tuple[dict[str, Any], Arrays] | None:
    """The next message, None when the other side has gone, even in the middle of one."""
    try:
        header = json.loads(_exactly(stream, struct.unpack(">Q", _exactly(stream, 8))[0]))
        arrays: Arrays = {}
        for name, dtype, shape in header.pop("arrays"):
            data = _exactly(stream, int(np.prod(shape)) * np.dtype(dtype).itemsize)
            arrays[name] = np.frombuffer(data, dtype).reshape(shape)
    except EOFError:
        return None
    return header, arrays


def _exactly(stream: BinaryIO, count: int) -> bytes:
    data = stream.read(count)
    if len(data) < count:
        raise EOFError
    return data


def pieces(arrays: Arrays, lengths: str = "lengths") -> Iterator[Any]:
    """The ids of every row of a message."""
    return iter(np.split(arrays["ids"], np.cumsum(arrays[lengths])[:-1]))


class Extension:
    """Methods that vLLM's worker gets on top of its own; importing the module is what installs the entropy."""

    def fire_forbid(self, ids: list[int]) -> None:
        """No probability for these output rows, in sampling and in scoring. Finite, as -inf makes NaN in p log p."""
        import torch

        runner: Any = self.model_runner  # type: ignore[attr-defined]  # of the worker
        model = runner.get_model()
        plain = model.compute_logits
        forbidden = torch.tensor(ids, device=runner.device)

        def compute_logits(*args: Any, **kwargs: Any) -> Any:
            logits = plain(*args, **kwargs)
            return logits if logits is None else logits.index_fill_(-1, forbidden, torch.finfo(logits.dtype).min / 4)

        model.compute_logits = compute_logits

    def fire_load(self, folder: str) -> None:
        """The weights of another folder, in place.

        A matrix that is both embedding and head is loaded as the embedding. Without a GPU the head computes with a
        repacked copy of its own, which vLLM leaves as it was.
        """
        self.reload_weights(weights_path=folder)  # type: ignore[attr-defined]  # of the worker
        runner: Any = self.model_runner  # type: ignore[attr-defined]
        modules = list(runner.get_model().modules())
        uses = Counter(id(p) for module in modules for p in module.parameters(recurse=False))
        for module in modules:
            if hasattr(module, "cpu_linear") and any(uses[id(p)] > 1 for p in module.parameters(recurse=False)):
                module.quant_method.process_weights_after_loading(module)

    def fire_exact(self) -> bool:
        """Whether an entropy has been answered by this worker."""
        return _Runner.served


class _Runner:
    """A model runner as its `_get_prompt_logprobs_dict` sees it: the head is applied when the numbers are taken, a
    chunk of tokens at a time. So memory does not grow with prompts, and the logits are there when they are needed."""

    served = False

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self.model = SimpleNamespace(compute_logits=lambda states, *_: states)
        self.sampler = SimpleNamespace(compute_logprobs=lambda states: states, gather_logprobs=self._gather)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def _gather(self, states: Any, k: int, ids: Any) -> Any:
        """For prompt tokens `ids` [T]: ids [T, k + 1], logprobs [T, k + 1] and ranks [T]."""
        import torch

        head, sampler = self._runner.model.compute_logits, self._runner.sampler
        if k != ENTROPY:
            return sampler.gather_logprobs(sampler.compute_logprobs(head(states)), k, ids)
        _Runner.served = True
        width = 4 * self._runner.model_config.get_vocab_size()
        rows, few = (max(1, size // width) for size in (_CHUNK_BYTES, _CPU_CHUNK_BYTES))
        parts: list[Any] = []
        for states_TD, ids_T in zip(states.split(rows), ids.split(rows), strict=True):
            logits_TV = head(states_TD)
            size = few if logits_TV.is_cpu else rows
            parts += map(entropy_slots, logits_TV.split(size), ids_T.split(size))
        return tuple(torch.cat(columns) for columns in zip(*parts, strict=True))


def entropy_slots(logits_TV: Any, ids_T: Any) -> tuple[Any, Any, Any]:
    """Ids int32 [T, 3] and values [T, 3] of the token, the most likely token and the entropy; ranks [T] of the token.

    Logits are shifted by their maximum m, so that with Z = sum exp(x - m) the entropy is
    log Z - sum exp(x - m) (x - m) / Z, of which no term is large.
    """
    import torch

    top_T1, top1_T1 = logits_TV.max(-1, keepdim=True)
    x_TV = logits_TV.float() - top_T1.float()
    token_T1 = x_TV.gather(1, ids_T[:, None])
    exp_TV = x_TV.exp()
    z_T1 = exp_TV.sum(-1, keepdim=True)
    inside_T1 = torch.linalg.vecdot(exp_TV, x_TV)[:, None] / z_T1
    log_z_T1 = z_T1.log()
    rank_T = 1 + x_TV.gt_(token_T1).sum(-1).int()  # in place and in floats, which are summed many times faster
    two_T2 = torch.cat([ids_T[:, None], top1_T1], 1)
    # The smallest of 0, 1, 2 that is neither of the two.
    free_T3 = torch.stack([(two_T2 != i).all(1) for i in range(3)], 1)
    ids_T3 = torch.cat([two_T2, free_T3.int().argmax(1, keepdim=True)], 1)
    values_T3 = torch.cat([token_T1 - log_z_T1, -log_z_T1, (log_z_T1 - inside_T1).clamp_(min=0)], 1)
    return ids_T3.int(), values_T3, rank_T


def install() -> bool:
    """Put the entropy into vLLM's V1 runner. False: this version computes prompt logprobs in another way."""
    try:
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner  # type: ignore[import-not-found]
    except ImportError:
        return False
    plain: Any = getattr(GPUModelRunner, "_get_prompt_logprobs_dict", None)
    if plain is None or not set(_USED) <= set(inspect.unwrap(plain).__code__.co_names):
        return False

    def prompt_logprobs(runner: Any, *args: Any, **kwargs: Any) -> Any:
        logits_asked = runner.model_config.logprobs_mode.endswith("logits")
        return plain(runner if logits_asked else _Runner(runner), *args, **kwargs)

    GPUModelRunner._get_prompt_logprobs_dict = prompt_logprobs
    return True


def start(header: dict[str, Any], allowed_V: Any) -> tuple[Any, dict[str, Any]]:
    """The engine, and what the other side has to know about it."""
    import torch

    gpu = torch.cuda.is_available()
    if not gpu:
        os.environ.update(TORCHDYNAMO_DISABLE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0")
    length = header["max_model_len"]
    config = json.loads((Path(header["folder"]) / "config.json").read_text(encoding="utf-8"))
    if length - 1 == config.get("text_config", config).get("max_position_embeddings"):
        # Scoring samples one token behind a row and never reads it: no position beyond the model's own is used.
        os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    import vllm  # type: ignore[import-not-found]
    from vllm.platforms import current_platform  # type: ignore[import-not-found]

    arguments = {
        "model": header["folder"],
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "logprobs_mode": "processed_logprobs",
        "max_logprobs": max(20, header["topk"]),
        "worker_extension_cls": "fire_vllm.Extension",
        "max_model_len": length,
        **header["arguments"],
    }
    if not gpu:
        most = header["arguments"].get("max_num_batched_tokens") or max(4096, length)
        arguments |= {"enforce_eager": True, "enable_chunked_prefill": False, "max_num_batched_tokens": most}
        arguments |= {"kv_cache_memory_bytes": header["cpu_kv_cache_bytes"]}
    llm = vllm.LLM(**arguments | header["further"])
    rows = llm.llm_engine.model_config.get_vocab_size()
    allowed = allowed_V[:rows]
    forbidden = [*np.flatnonzero(allowed == 0).tolist(), *range(len(allowed), rows)]
    if forbidden:
        llm.collective_rpc("fire_forbid", args=(forbidden,))
    # Whatever this machine or version cannot do shows here and not in the middle of the work.
    probe = {"prompt_token_ids": [int(np.argmax(allowed_V))] * 3}
    llm.generate([probe], scoring_params(ENTROPY), use_tqdm=False)
    facts = {
        "versions": {"vllm": vllm.__version__, "torch": torch.__version__},
        "device": current_platform.get_device_name() if gpu else "cpu",
        "max_model_len": llm.llm_engine.model_config.max_model_len,
        "rows": rows,
        "forbidden": len(forbidden),
        "exact": any(llm.collective_rpc("fire_exact")),
    }
    llm.reset_prefix_cache()
    return llm.llm_engine, facts


def scoring_params(k: int) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind  # type: ignore[import-not-found]

    return SamplingParams(
        max_tokens=1, temperature=0, prompt_logprobs=k, flat_logprobs=True, detokenize=False, ignore_eos=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )  # fmt: skip


@dataclass
class _Job:
    """One call of the other side: its rows that are not finished yet, and where the responses of its rows start."""

    number: int
    left: int
    starts: Any


class Server:
    """Calls in, finished rows out. Calls of one kind run together; another kind waits until they are done, as does
    everything behind it: new weights must not meet unfinished rows."""

    def __init__(self, engine: Any, out: BinaryIO) -> None:
        self.engine = engine
        self.out = out
        self.waiting: deque[tuple[dict[str, Any], Arrays]] = deque()
        self.running: dict[int, _Job] = {}
        self.kind = ""

    def loop(self, inbox: queue.SimpleQueue[Any]) -> None:
        """Until the inbox gives None."""
        while True:
            while not (inbox.empty() and (self.running or self.waiting)):
                message = inbox.get()
                if message is None:
                    return
                self.waiting.append(message)
            while self.waiting and (not self.running or self.waiting[0][0]["kind"] == self.kind):
                self._begin(*self.waiting.popleft())
            if self.running:
                self._finished(self.engine.step())

    def _begin(self, header: dict[str, Any], arrays: Arrays) -> None:
        self.kind, number = header["kind"], header["job"]
        if self.kind == "load":
            self.engine.collective_rpc("fire_load", args=(header["folder"],))
            self.engine.reset_prefix_cache()
            write_message(self.out, {"job": number, "done": True}, {})
            return
        self.running[number] = _Job(number, len(arrays["lengths"]), arrays.get("starts"))
        for row, (ids, params) in enumerate(zip(pieces(arrays), self._params(header, arrays), strict=True)):
            self.engine.add_request(f"{number}-{row}", {"prompt_token_ids": ids.tolist()}, params)

    def _params(self, header: dict[str, Any], arrays: Arrays) -> Iterator[Any]:
        """The parameters of every row of a call."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        if self.kind == "evaluate":
            yield from [scoring_params(header["k"])] * len(arrays["lengths"])
            return
        for seed in arrays["seeds"].tolist():
            yield SamplingParams(
                **header["sampling"], seed=seed, stop_token_ids=header["stop_ids"], ignore_eos=True, logprobs=0,
                flat_logprobs=True, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY,
            )  # fmt: skip

    def _finished(self, outputs: list[Any]) -> None:
        """Send the rows that are finished, one message per call."""
        by_job: dict[int, list[tuple[int, Any]]] = {}
        for output in outputs:
            if output.finished:
                number, _, row = output.request_id.partition("-")
                by_job.setdefault(int(number), []).append((int(row), output))
        for number, rows in by_job.items():
            job = self.running[number]
            job.left -= len(rows)
            read = _generated if job.starts is None else _evaluated
            parts = [read(row, output, job) for row, output in rows]
            arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            write_message(self.out, {"job": number, "done": not job.left}, arrays)
            if not job.left:
                del self.running[number]


def _generated(row: int, output: Any, _job: _Job) -> Arrays:
    """`ids` int32 [T], `logprob` float32 [T], and how the response ended."""
    answer = output.outputs[0]
    if answer.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended request {output.request_id} with {answer.finish_reason!r}")
    ids = np.array(answer.token_ids, np.int32)
    logprob = np.array(answer.logprobs.logprobs, np.float32)[answer.logprobs.start_indices]
    stopped = np.array([answer.finish_reason == "stop"])
    return {"row": np.array([row]), "lengths": np.array([len(ids)]), "ids": ids, "logprob": logprob, "stopped": stopped}


def _evaluated(row: int, output: Any, job: _Job) -> Arrays:
    """For the response tokens: `slot_ids` int32 and `values` float32 [T, k + 1], `rank` int32 [T]."""
    flat = output.prompt_logprobs
    first = flat.start_indices[job.starts[row]]
    count = len(flat.start_indices) - job.starts[row]
    table = {
        "slot_ids": np.array(flat.token_ids[first:], np.int32).reshape(count, -1),
        "values": np.array(flat.logprobs[first:], np.float32).reshape(count, -1),
        "rank": np.array(flat.ranks[first:], np.int32).reshape(count, -1)[:, 0],
    }
    return {"row": np.array([row]), "lengths": np.array([count]), **table}


def main(read_fd: int, write_fd: int) -> None:
    """Serve the other side until it is gone. This process is expected to lead a group of its own."""
    for fd in (read_fd, write_fd):
        os.set_inheritable(fd, False)
    source, out = os.fdopen(read_fd, "rb"), os.fdopen(write_fd, "wb")
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def listen() -> None:
        """Also while the engine is starting or computing."""
        while (message := read_message(source)) is not None:
            inbox.put(message)
        inbox.put(None)
        _end_soon()

    threading.Thread(target=listen, daemon=True).start()
    first = inbox.get()
    if first is None:
        return
    header, arrays = first
    engine, facts = start(header, arrays["allowed"])
    write_message(out, facts, {})
    Server(engine, out).loop(inbox)
    engine.engine_core.shutdown()
    os._exit(0)


def _end_soon() -> None:
    """Whatever vLLM still waits for, this process and its children do not outlive the one they work for."""
    killer = threading.Timer(_LEAVE_SECONDS, os.killpg, (os.getpid(), signal.SIGKILL))
    killer.daemon = True
    killer.start()


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]), int(sys.argv[2]))
    finally:
        _end_soon()
elif __name__ == "fire_vllm":
    install()
