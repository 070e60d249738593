"""vLLM: `VllmEngine`, table in and table out, against bare `LLM.generate` on the same requests with the same seeds.

Both run in the interpreter of FIRE_VLLM_PYTHON (else .venv-vllm/bin/python), ours in the process that it starts,
the bare case in this very script. `generate`: every trajectory a request of its own, responses that end by chance, on
average after a quarter of the longest allowed. `score`: the same rows as prompts; the bare case asks for logprobs and
the most likely token, ours gets the exact entropy on top. What is not timed: starting, loading, making the requests.
Response tokens per second.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure

SIZES: measure.Sizes = {
    "requests": (448, 8, "trajectories"),
    "prompt": (64, 8, "longest prompt, tokens"),
    "new": (512, 16, "longest response, tokens"),
    "seqs": (64, 8, "vllm.max_num_seqs"),
    "hidden": (256, 64, "hidden size"),
    "layers": (4, 1, "layers"),
    "vocabulary": (32768, 256, "vocabulary size"),
    "dtype": ("float32", "float32", "of the model"),
}
GROUPS = {"generate": ["fire", "bare"], "score": ["fire", "bare"]}
HERE = Path(__file__).resolve()
PYTHON = Path(os.environ.get("FIRE_VLLM_PYTHON") or HERE.parents[1] / ".venv-vllm/bin/python")
LISTS = "requests.json"  # beside the weights: what both sides are asked


def prepare(group: str, case: str, options: argparse.Namespace) -> measure.Work:
    """A random model in a folder, and its requests: the same for every case."""
    if Path(sys.prefix).resolve() == PYTHON.parents[1].resolve():
        return bare(group, Path(os.environ["FIRE_BENCH_MODEL"]), options)
    folder = tempfile.TemporaryDirectory()
    make_model(Path(folder.name), options)
    work = fire if case == "fire" else relay
    return work(group, Path(folder.name), options, folder)


def make_model(folder: Path, options: argparse.Namespace) -> None:
    """Weights from a fixed seed, nearly flat: a share of ids that stop sets the length."""
    import numpy as np
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging

    from fire_data.sampling import seed_of

    logging.disable_progress_bar()
    torch.manual_seed(0)
    heads = max(1, options.hidden // 64)
    config = Qwen3Config(
        vocab_size=options.vocabulary, hidden_size=options.hidden, intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers, num_attention_heads=heads, num_key_value_heads=heads,
        head_dim=64, max_position_embeddings=options.prompt + options.new,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    rng = np.random.default_rng(0)
    stops = list(range(max(1, options.vocabulary * 4 // options.new)))
    lengths = rng.integers(options.prompt // 2, options.prompt + 1, options.requests)
    prompts = [rng.integers(0, options.vocabulary, n).tolist() for n in lengths]
    new = np.minimum(rng.geometric(4 / options.new, options.requests), options.new)
    responses = [rng.integers(0, options.vocabulary, n).tolist() for n in new]
    seeds = [seed_of(0, f"{i}") for i in range(options.requests)]
    lists = {"stops": stops, "seeds": seeds, "prompts": prompts, "responses": responses}
    (folder / LISTS).write_text(json.dumps(lists))


def fire(group: str, folder: Path, options: argparse.Namespace, keep: Any) -> measure.Work:
    """Ours."""
    import numpy as np
    import pyarrow as pa

    from fire_data.sampling import Sampling
    from fire_data.schemas.config import VllmConfig
    from fire_data.schemas.tables import IDS
    from fire_data.vllm_engine import VllmEngine
    from fire_data.vocabulary import Vocabulary

    lists = json.loads((folder / LISTS).read_text())
    names = [f"{i}" for i in range(options.requests)]
    rows = pa.table({"trajectory_id": names, **{f"{k}_ids": pa.array(lists[f"{k}s"], IDS) for k in TOKENS}})
    engine = VllmEngine(
        folder, dtype=options.dtype, settings=VllmConfig(python=str(PYTHON), max_num_seqs=options.seqs),
        vocabulary=Vocabulary(options.vocabulary, np.ones(options.vocabulary, dtype=np.bool_)),
        stop_ids=frozenset(lists["stops"]), log=folder / "log", threads=options.threads,
        longest=options.prompt + options.new,
    )  # fmt: skip

    def generate() -> measure.Done:
        answer = engine.generate(rows, Sampling(seed=0, max_new_tokens=options.new))
        logprobs = answer["rollout_logprob"].combine_chunks().flatten().to_numpy()
        return measure.Done(len(logprobs), {"tokens": len(logprobs), "logprob": float(logprobs.sum(dtype="f8"))})

    def score() -> measure.Done:
        assert keep is not None  # the folder lives as long as the engine
        answer = engine.evaluate(rows)
        columns = {n: answer[n].combine_chunks().flatten().to_numpy() for n in ("logprob", "max_logprob", "entropy")}
        sums = {name: float(values.sum(dtype="f8")) for name, values in columns.items()}
        return measure.Done(len(columns["logprob"]), sums)

    return {"generate": generate, "score": score}[group]


TOKENS = ("prompt", "response")


def relay(group: str, folder: Path, _options: argparse.Namespace, keep: Any) -> measure.Work:
    """The bare case: this script again under the other interpreter, told when to start by lines as any case is."""
    environment = {**os.environ, "FIRE_BENCH_MODEL": str(folder), "FIRE_VLLM_PYTHON": str(PYTHON)}
    environment |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_USE_V2_MODEL_RUNNER": "0"}
    command = [str(PYTHON), *sys.argv[:1], *sys.argv[1:]]
    with (folder / "bare.log").open("wb") as log:
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment,
            start_new_session=True,  # as ours: a busy Linux shares its cores fairly between sessions, not processes
        )  # fmt: skip

    def work() -> measure.Done:
        assert keep is not None
        answer = measure._ask(child)
        return measure.Done(answer["tokens"], answer["witness"])

    return work


def bare(group: str, folder: Path, options: argparse.Namespace) -> measure.Work:
    """What anyone would write with vLLM alone, given token ids and a seed per request."""
    import torch

    sys.path.remove(str(HERE.parent))  # where this file is called vllm
    gpu = torch.cuda.is_available()
    arguments: dict[str, Any] = {}
    if not gpu:
        os.environ |= {"TORCHDYNAMO_DISABLE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        arguments = {"enforce_eager": True, "enable_chunked_prefill": False, "kv_cache_memory_bytes": 2 * 2**30}
        arguments["max_num_batched_tokens"] = max(4096, options.prompt + options.new + 1)
    os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    from vllm import LLM, SamplingParams

    lists = json.loads((folder / LISTS).read_text())
    llm = LLM(
        str(folder), dtype=options.dtype, max_model_len=options.prompt + options.new + 1, max_num_seqs=options.seqs,
        skip_tokenizer_init=True, generation_config="vllm", logprobs_mode="processed_logprobs", **arguments,
    )  # fmt: skip
    flat: dict[str, Any] = {"flat_logprobs": True, "detokenize": False, "ignore_eos": True}

    def generate() -> measure.Done:
        params = [
            SamplingParams(seed=seed, max_tokens=options.new, logprobs=0, stop_token_ids=lists["stops"], **flat)
            for seed in lists["seeds"]
        ]
        prompts = [{"prompt_token_ids": ids} for ids in lists["prompts"]]
        answers = [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]
        tokens = sum(len(answer.token_ids) for answer in answers)
        return measure.Done(tokens, {"tokens": tokens, "logprob": sum(sum(a.logprobs.logprobs) for a in answers)})

    def score() -> measure.Done:
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1, **flat)
        prompts = [{"prompt_token_ids": a + b} for a, b in zip(lists["prompts"], lists["responses"], strict=True)]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        sums = {"logprob": 0.0, "max_logprob": 0.0}
        for prompt, output in zip(lists["prompts"], outputs, strict=True):
            first = output.prompt_logprobs.start_indices[len(prompt)]
            sums["logprob"] += sum(output.prompt_logprobs.logprobs[first::2])
            sums["max_logprob"] += sum(output.prompt_logprobs.logprobs[first + 1 :: 2])
        return measure.Done(sum(map(len, lists["responses"])), sums)

    cases: dict[str, Callable[[], measure.Done]] = {"generate": generate, "score": score}
    return cases[group]


if __name__ == "__main__":
    if "--help" not in sys.argv and not PYTHON.exists():
        raise SystemExit(f"{PYTHON} is not there: make vllm, or set FIRE_VLLM_PYTHON")
    measure.main(__doc__, SIZES, GROUPS, prepare)
