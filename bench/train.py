"""Training: one optimizer step against TRL's `DistillationTrainer`, plain full logits, bare products; memory of runs.

`trl`: an update of TRL 1.16 on the same completions, its own rollouts replaced by ours, with a teacher of the student's
size unless told otherwise: teacher and both heads run in its step, ours reads one number per token. Both in the same
precision, with or without recomputation. Left out where TRL cannot be imported. `step`: the same loss written plainly,
with logits of all positions and the same micro-batches, and ours with packed rows (`train.packing: on`, attention of
the model's default) or recomputed activations; loss and gradient norm must agree. `half`: ours with half of
the coefficients 0 against ours with all; `head half`: the same for the head alone, all positions in one chunk. `head`:
the head alone against its three matrix products without anything else, and against autograd with recomputation.
`lora`: adapters at rank 32 against all weights. `flat`: `fire train` from loading to export over many shards against a
tenth of them, tiny model and fake scores; its memory must be the same.
Lengths are lognormal. Response tokens per second, those without coefficient included.
"""

from __future__ import annotations

import argparse
import atexit
import importlib.util
import json
import multiprocessing
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from fire_data import lora
from fire_data.create import init_run
from fire_data.fused_head import head_backward, token_logprobs
from fire_data.head import LinearHead
from fire_data.loss import surrogate_loss
from fire_data.models import head_of
from fire_data.optim import make_optimizer
from fire_data.packing import flatten, micro_batches, pad, response_index
from fire_data.run import open_run
from fire_data.schemas.config import LoraConfig, TrainConfig
from fire_data.session import Session
from fire_data.shards import sealed
from fire_data.steps.rollout import rollout
from fire_data.steps.score import score
from fire_data.steps.train import train
from fire_data.steps.weigh import weigh
from fire_data.training import StepBatch, train_step
from fire_data.vocabulary import Vocabulary
from fire_data.worlds.world import Sizes, make_tokenizer, new_model, save

SIZES: measure.Sizes = {
    "rows": (16, 4, "trajectories of the step"),
    "prompt": (64, 8, "longest prompt, tokens; the shortest is half of it"),
    "median": (96, 4, "median response, tokens; lognormal with sigma 0.8"),
    "new": (384, 8, "longest response, tokens"),
    "microbatch": (1024, 32, "train.tokens_per_microbatch"),
    "budget_mb": (256, 1, "train.logits_budget_mb"),
    "hidden": (256, 16, "hidden size"),
    "layers": (4, 1, "layers"),
    "teacher_hidden": (0, 0, "hidden size of TRL's teacher; 0: as the student"),
    "teacher_layers": (0, 0, "its layers; 0: as the student"),
    "trl_rows": (4, 2, "TRL's per_device_train_batch_size; the rest of the step is accumulated"),
    "checkpointing": (0, 0, "1: recompute activations, in ours, plain and TRL"),
    "vocabulary": (151936, 256, "vocabulary size"),
    "shards": (100, 10, "`flat`: shards of the longer run; the other has a tenth"),
    "shard_rows": (32, 2, "`flat`: trajectories of a shard, and of a step"),
    "compute_dtype": ("float32", "float32", "float32 or bfloat16, of ours and TRL; plain stays in float32"),
    "device": ("cpu", "cpu", "cpu or cuda"),
}
GROUPS = {
    "trl": ["fire", "trl"],
    "step": ["fire", "packed", "recomputed", "plain"],
    "half": ["half", "all"],
    "lora": ["lora", "all"],
    "head half": ["half", "all"],
    "head": ["fire", "products", "autograd"],
    "flat": ["many", "few"],
}


def prepare(group: str, case: str, options: argparse.Namespace) -> measure.Work:
    """A random model and a step of rows of mixed length."""
    torch.set_num_threads(options.threads)
    if group == "flat":
        return whole_runs(options.shards if case == "many" else options.shards // 10, options)
    batch = make_batch(options, share=0.5 if case == "half" else 1.0)
    if group in ("head", "head half"):
        return head_alone(case, batch, options)
    changes = {"packed": {"packing": "on"}, "recomputed": {"gradient_checkpointing": True}}.get(case, {})
    work = {"trl": trl, "plain": plain, "lora": adapters}.get(case, partial(fire, **changes))(batch, options)
    return work if group == "step" else lambda: measure.Done(work().tokens)  # others compute something else on purpose


def make_model(options: argparse.Namespace, hidden: int, layers: int, seed: int = 0) -> Any:
    """A Qwen3 with random weights from a seed, input and output embeddings tied as in the real ones up to 4B."""
    torch.manual_seed(seed)
    heads = max(1, hidden // 64)
    config = Qwen3Config(
        vocab_size=options.vocabulary, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, head_dim=hidden // heads,
        max_position_embeddings=options.prompt + options.new, tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval().to(options.device)


def make_batch(options: argparse.Namespace, share: float) -> StepBatch:
    """Rows with a coefficient on this share of their tokens."""
    rng = np.random.default_rng(0)
    lengths = np.clip(options.median * np.exp(0.8 * rng.standard_normal(options.rows)), 1, options.new).astype(int)
    prompts = [
        rng.integers(0, options.vocabulary, n)
        for n in rng.integers(options.prompt // 2, options.prompt + 1, options.rows)
    ]
    responses = [rng.integers(0, options.vocabulary, n) for n in lengths]
    old = [np.full(n, -np.log(options.vocabulary)) for n in lengths]
    coefficient = [rng.normal(size=n) / lengths.sum() * (rng.random(n) < share) for n in lengths]
    return StepBatch(0, prompts, responses, old, coefficient, int(lengths.sum()))


def settings(options: argparse.Namespace) -> tuple[TrainConfig, Vocabulary]:
    cfg = TrainConfig(
        lr=1e-6, tokens_per_microbatch=options.microbatch, logits_budget_mb=options.budget_mb,
        compute_dtype=options.compute_dtype, gradient_checkpointing=bool(options.checkpointing),
    )  # fmt: skip
    return cfg, Vocabulary(options.vocabulary, np.ones(options.vocabulary, dtype=np.bool_))


def adapters(batch: StepBatch, options: argparse.Namespace) -> measure.Work:
    """Ours, with adapters on every linear layer but the head."""
    model = make_model(options, options.hidden, options.layers)
    lora.attach(model, LoraConfig(), seed=0)
    return fire(batch, options, model)


def fire(batch: StepBatch, options: argparse.Namespace, model: Any = None, **changes: Any) -> measure.Work:
    """Ours."""
    model, (cfg, vocabulary) = model or make_model(options, options.hidden, options.layers), settings(options)
    cfg = cfg.model_copy(update=changes)
    optimizer, head = make_optimizer(model, cfg), head_of(model)

    def work() -> measure.Done:
        found = train_step(model, head, optimizer, batch, cfg, vocabulary, 0)
        return measure.Done(found["tokens"], {name: found[name] for name in ("loss", "grad_norm")})

    return work


def plain(batch: StepBatch, options: argparse.Namespace) -> measure.Work:
    """The model as it comes: logits of every position of the padded batch, log_softmax, gather."""
    model, (cfg, _) = make_model(options, options.hidden, options.layers), settings(options)
    optimizer = make_optimizer(model, cfg)
    prompts, responses = batch.prompt_ids, batch.response_ids
    lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
    if options.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()  # Qwen3 has no dropout by default

    def work() -> measure.Done:
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for group in micro_batches(lengths, cfg.tokens_per_microbatch):
            ids_BL, mask_BL = pad([np.concatenate([prompts[i], responses[i]]) for i in group])
            row_T, position_T = response_index([len(prompts[i]) for i in group], [len(responses[i]) for i in group])
            ids_BL = ids_BL.to(options.device)
            logits_BLV = model(input_ids=ids_BL, attention_mask=mask_BL.to(options.device), use_cache=False).logits
            logprob_BLV = logits_BLV[:, :-1].log_softmax(-1)
            now_BL = logprob_BLV.gather(2, ids_BL[:, 1:, None])[:, :, 0]
            old_T, coefficient_T = (
                flatten([x[i] for i in group], torch.float32).to(options.device)
                for x in (batch.old_logprob, batch.coefficient)
            )
            loss = surrogate_loss(now_BL[row_T, position_T], old_T, coefficient_T, cfg.clip)
            loss.backward()
            total += float(loss.detach())
            del logits_BLV, logprob_BLV, now_BL, loss
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.max_grad_norm))
        optimizer.step()
        return measure.Done(sum(map(len, responses)), {"loss": total, "grad_norm": norm})

    return work


def trl(batch: StepBatch, options: argparse.Namespace) -> measure.Work:
    """What `DistillationTrainer` does between two updates, but for writing the completions: those are the batch's."""
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [folder for folder in sys.path if folder != here]  # TRL would take bench/vllm.py for vLLM
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast
    from trl import DistillationConfig, DistillationTrainer

    words = Tokenizer(WordLevel({"[PAD]": 0, "[EOS]": 1, "[UNK]": 2}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", eos_token="[EOS]")
    student = make_model(options, options.hidden, options.layers)
    size = options.teacher_hidden or options.hidden, options.teacher_layers or options.layers
    teacher = make_model(options, *size, seed=1)
    accumulate = -(-options.rows // options.trl_rows)
    args = DistillationConfig(
        tempfile.mkdtemp(), learning_rate=1e-6, per_device_train_batch_size=options.trl_rows,
        gradient_accumulation_steps=accumulate, gradient_checkpointing=bool(options.checkpointing),
        bf16=options.compute_dtype == "bfloat16", use_cpu=options.device == "cpu", report_to="none",
        disable_tqdm=True, max_completion_length=options.new, max_grad_norm=1.0,
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": str(i)} for i in range(options.rows)])
    trainer = DistillationTrainer(
        model=student, teacher_model=teacher, args=args, train_dataset=data, processing_class=tokenizer
    )

    def written(prompts: list[str]) -> tuple[Any, ...]:
        columns = ([column[int(p)].tolist() for p in prompts] for column in (batch.prompt_ids, batch.response_ids))
        return (*columns, None, None, None)

    trainer._generate = written
    trainer.current_gradient_accumulation_steps = accumulate
    trainer.create_optimizer()
    model, optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.model_wrapped = model
    inputs = [data[i] for i in range(options.rows)]

    def work() -> measure.Done:
        model.train()
        optimizer.zero_grad()
        for _ in range(accumulate):
            trainer.training_step(model, inputs, None)
        norm = float(trainer.accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm))
        assert 0 < norm < float("inf"), norm
        optimizer.step()
        return measure.Done(sum(map(len, batch.response_ids)))

    return work


def head_alone(case: str, batch: StepBatch, options: argparse.Namespace) -> measure.Work:
    """The head on random hidden states of the step's tokens."""
    torch.manual_seed(0)
    _, vocabulary = settings(options)
    linear = torch.nn.Linear(options.hidden, options.vocabulary, bias=False, device=options.device)
    linear.weight.grad = torch.zeros_like(linear.weight)
    coefficient_T = flatten(batch.coefficient, torch.float32).to(options.device)
    ids_T = flatten(batch.response_ids, torch.int64).to(options.device)
    chosen_T = coefficient_T != 0
    hidden_TD = torch.randn(len(ids_T), options.hidden, device=options.device)[chosen_T]
    ids_TK, used_T = ids_T[chosen_T][:, None], coefficient_T[chosen_T]
    budget = options.budget_mb * 2**20
    weight_VD, head = linear.weight.detach(), LinearHead(linear)

    def ours(budget: int) -> None:
        head_backward(hidden_TD, head, ids_TK, lambda chunk, x: -(used_T[chunk] * x[:, 0]).sum(), vocabulary, budget)

    def products() -> None:
        rows = max(1, budget // (4 * options.vocabulary))
        buffer_TV = hidden_TD.new_empty(rows, options.vocabulary)
        for part_TD in hidden_TD.split(rows):
            logits_TV = torch.mm(part_TD, weight_VD.mT, out=buffer_TV[: len(part_TD)])
            logits_TV @ weight_VD
            linear.weight.grad.addmm_(logits_TV.mT, part_TD)

    def autograd() -> None:
        leaf_TD = hidden_TD.clone().requires_grad_()
        (-(used_T * token_logprobs(leaf_TD, head, ids_TK, vocabulary, budget)[:, 0]).sum()).backward()

    actions: dict[str, Callable[[], None]] = {
        "fire": lambda: ours(budget),
        "half": lambda: ours(1 << 40),
        "all": lambda: ours(1 << 40),
        "products": products,
        "autograd": autograd,
    }

    def work() -> measure.Done:
        actions[case]()
        if options.device != "cpu":
            torch.cuda.synchronize()
        return measure.Done(len(ids_T))

    return work


def whole_runs(shards: int, options: argparse.Namespace) -> measure.Work:
    """`fire train` on a run of so many shards, again and again, each time from the given student."""
    root = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, root)
    # Another process makes the run, so that memory it gave back does not hide what training takes.
    maker = multiprocessing.get_context("spawn").Process(target=make_run, args=(root, shards, options))
    maker.start()
    maker.join()
    assert maker.exitcode == 0
    session = Session(open_run(root / "run"))
    tokens = sum(receipt.tokens for receipt in sealed(session.run.part("weights", 0)).shards)

    def work() -> measure.Done:
        train(session, 0, redo=True)
        return measure.Done(tokens)

    return work


def make_run(root: Path, shards: int, options: argparse.Namespace) -> None:
    """A run up to its weights: an untrained model that is its own teacher, rollouts and scores from the fake engine."""
    tokenizer = make_tokenizer()
    save(new_model(tokenizer, Sizes(), seed=0), tokenizer, root / "model")
    prompts = ({"prompt_id": str(i), "prompt": str(i)} for i in range(shards * options.shard_rows))
    (root / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    model = {"model": str(root / "model")}
    made = {"engine": "fake", "n": 1, "prompts_per_shard": options.shard_rows, "max_new_tokens": options.new}
    trained = {"batch_size": options.shard_rows, "tokens_per_microbatch": options.microbatch, "ratio_tolerance": 100}
    run = init_run(root / "run", {
        "threads": options.threads, "student": model, "teacher": model, "prompts": {"path": "../prompts.jsonl"},
        "rollout": made, "score": {"engine": "fake"}, "weigh": {"rule": "fire"}, "train": trained,
    })  # fmt: skip
    session = Session(run)
    rollout(session, 0)
    score(session, 0)
    weigh(run, 0)


if __name__ == "__main__":
    groups = dict(GROUPS)
    if importlib.util.find_spec("trl") is None:
        del groups["trl"]
        print("train: TRL is not installed here, so the group `trl` is left out", file=sys.stderr)
    measure.main(__doc__, SIZES, groups, prepare)
