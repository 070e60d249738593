"""vLLM: whole stages, `fire rollout` and `fire score`, against bare `LLM.generate` on the same requests and seeds.

The stages do all they do for a user: prompts from a file, tokenizing, shards written, synced and sealed, summaries; the
bare case does nothing but generate. Both start with living engines. `rollout`: 4 samples of every prompt. `score`: the
same rows under student and teacher, here the same weights, each in a process of its own and one after the other; the
bare case asks one engine for them twice. The rows are those of a rollout by the fake engine. Tokens of responses.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import measure

HERE = Path(__file__).resolve()


def _engine_bench() -> Any:
    """The script beside this one, whose name is that of the package it measures."""
    spec = importlib.util.spec_from_file_location("bench_vllm", HERE.with_name("vllm.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ENGINE = _engine_bench()
SIZES: measure.Sizes = {**ENGINE.SIZES, "shard": (16, 1, "prompts per shard")}
GROUPS = {"rollout": ["fire", "bare"], "score": ["fire", "bare"]}
SAMPLES = 4


def prepare(group: str, case: str, options: argparse.Namespace) -> measure.Work:
    """A random model with a tokenizer in a folder, and a run on it; the bare case gets what the run will ask."""
    if Path(sys.prefix).resolve() == ENGINE.PYTHON.parents[1].resolve():
        return bare(group, options)
    folder = tempfile.TemporaryDirectory()
    root = Path(folder.name)
    run = make_run(root, options)
    if case == "fire":
        return stage(group, run, folder)
    (root / "model" / ENGINE.LISTS).write_text(json.dumps(asked(run, options)))
    work: measure.Work = ENGINE.relay(group, root / "model", options, folder)
    return work


def make_run(root: Path, options: argparse.Namespace) -> Any:
    """A run whose rollouts were written by the fake engine, to be scored; its prompts are numbers as words."""
    import numpy as np
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from fire_data.create import init_run
    from fire_data.session import Session
    from fire_data.steps.rollout import rollout

    ENGINE.make_model(root / "model", options)
    names = ["<end>", "<pad>", *(f"w{i}" for i in range(2, options.vocabulary))]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<pad>").save_pretrained(
        root / "model"
    )
    stops = json.loads((root / "model" / ENGINE.LISTS).read_text())["stops"]
    (root / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    rng = np.random.default_rng(0)
    lengths = rng.integers(options.prompt // 2, options.prompt + 1, max(1, options.requests // SAMPLES))
    lines = [{"prompt": " ".join(names[i] for i in rng.integers(2, options.vocabulary, n))} for n in lengths]
    (root / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    model = {"model": str(root / "model"), "dtype": options.dtype}
    values = {
        "threads": options.threads, "student": model, "teacher": model,
        "prompts": {"path": str(root / "prompts.jsonl")},
        "rollout": {"engine": "fake", "n": SAMPLES, "raw": True, "prompts_per_shard": options.shard,
                    "max_prompt_tokens": options.prompt, "max_new_tokens": options.new},
        "vllm": {"python": str(ENGINE.PYTHON), "max_num_seqs": options.seqs},
    }  # fmt: skip
    run = init_run(root / "run", values)
    rollout(Session(run), 0)
    return run


def asked(run: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Prompts, responses and seeds of the trajectories in their order; the ids that end a response."""
    from fire_data.sampling import seed_of
    from fire_data.session import Session

    rows = run.rollouts(0).select("trajectory_id", "prompt_ids", "response_ids").collect()
    assert rows.height <= options.requests
    return {
        "stops": sorted(Session(run).stop_ids),
        "seeds": [seed_of(run.config.seed, name) for name in rows["trajectory_id"]],
        "prompts": rows["prompt_ids"].to_list(),
        "responses": rows["response_ids"].to_list(),
    }


def stage(group: str, run: Any, folder: Any) -> measure.Work:
    """A stage of the run, made anew."""
    import dataclasses

    from fire_data.session import Session
    from fire_data.shards import sealed
    from fire_data.steps.rollout import rollout
    from fire_data.steps.score import score

    config = run.config
    section = getattr(config, group).model_copy(update={"engine": "vllm"})
    session = Session(dataclasses.replace(run, config=config.model_copy(update={group: section})))
    make = {"rollout": rollout, "score": score}[group]
    if group == "rollout":
        shutil.rmtree(run.root / "rollouts")
        shutil.rmtree(run.root / ".fire")

    def work() -> measure.Done:
        assert Path(folder.name).exists()
        manifest = make(session, 0, redo=bool(list(session.run.part(f"{group}s", 0).receipts.glob("*.json"))))
        tokens = sum(r.tokens for r in manifest.shards)
        if group == "score":
            return measure.Done(tokens, {"logprob": manifest.stats["student_logprob"] * tokens})
        logprobs = session.run.rollouts(0).select("rollout_logprob").collect()["rollout_logprob"].explode()
        assert sealed(session.run.part("rollouts", 0)).stats["tokens"] == tokens
        return measure.Done(tokens, {"tokens": tokens, "logprob": float(logprobs.to_numpy().sum(dtype="f8"))})

    return work


def bare(group: str, options: argparse.Namespace) -> measure.Work:
    """What anyone would write with vLLM alone, given token ids and seeds."""
    folder = Path(os.environ["FIRE_BENCH_MODEL"])
    lists = json.loads((folder / ENGINE.LISTS).read_text())
    options.requests = len(lists["prompts"])
    work: measure.Work = ENGINE.bare("generate" if group == "rollout" else "score", folder, options)

    def twice() -> measure.Done:
        work()
        done = work()
        return measure.Done(done.tokens, {"logprob": done.witness["logprob"]})

    return work if group == "rollout" else twice


if __name__ == "__main__":
    if "--help" not in sys.argv and not ENGINE.PYTHON.exists():
        raise SystemExit(f"{ENGINE.PYTHON} is not there: make vllm, or set FIRE_VLLM_PYTHON")
    measure.main(__doc__, SIZES, GROUPS, prepare)
