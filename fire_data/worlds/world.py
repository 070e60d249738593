"""Builds the demo's world: a trained teacher, a weak student and the prompts, as ordinary files.

Why a world is built rather than downloaded: the demo has to run offline and in minutes, and on-policy
distillation has to have something to do. The teacher is trained from nothing until it solves the task; the
student is that teacher tuned on corrupted solutions. It has therefore seen every fact but mostly acts on
wrong ones, and still samples right steps now and then. That is needed: on-policy distillation reweights
what the student already samples and teaches no fact that it never samples.

Layout: ``teacher/`` and ``student/`` are Hugging Face folders (Qwen3 architecture, fp32 safetensors,
word-level tokenizer with chat template); ``prompts.jsonl`` and ``held_out.jsonl`` hold one object per line
with ``prompt_id``, ``messages`` and ``answer``; ``world.json`` records what the folder was built from. Each
part is written beside its place and renamed when whole, so that the same call after an interruption
continues with what is missing.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging

from fire_data.schemas.errors import ConfigError
from fire_data.worlds import arithmetic as tasks

Report = Callable[[str, int, int], None]
Example = tuple[str, str]  # problem, response

PAD, END, UNKNOWN, USER, ASSISTANT = "<pad>", "<eos>", "<unk>", "<user>", "<assistant>"
SPECIALS = (PAD, END, UNKNOWN, USER, ASSISTANT)
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ '<user> ' + message['content'] + ' ' }}"
    "{%- elif message['role'] == 'assistant' -%}{{ '<assistant> ' + message['content'] + ' <eos> ' }}"
    "{%- else -%}{{ raise_exception('the demo models know only the roles user and assistant') }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<assistant>' }}{%- endif -%}"
)
IGNORED = -100  # the label that torch's cross-entropy skips


@dataclasses.dataclass(frozen=True)
class World:
    """Where the parts of a built world lie."""

    teacher: Path
    student: Path
    prompts: Path
    held_out: Path


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large and how well trained the models are.

    The defaults are measured: eight of eight seeds gave a teacher that solves all of 256 problems greedily
    and 98 % of them when sampling at temperature 1. Smaller initial weights leave some seeds with a far
    weaker teacher.
    """

    hidden: int = 64
    layers: int = 2
    heads: int = 4
    intermediate: int = 128
    init_std: float = 0.08  # standard deviation of the initial weights
    batch: int = 32  # examples per optimizer step
    teacher_steps: int = 600
    teacher_rate: float = 6e-3  # peak learning rate
    student_steps: int = 100
    student_rate: float = 2e-3
    warm_up: int = 50  # steps of linear warm-up, at most a quarter of all steps; then a cosine to zero
    betas: tuple[float, float] = (0.9, 0.98)
    corruption: tasks.Corruption = dataclasses.field(default_factory=tasks.Corruption)


def build_world(
    folder: Path,
    *,
    seed: int = 0,
    prompts: int = 2048,
    held_out: int = 256,
    sizes: Sizes | None = None,
    report: Report | None = None,
) -> World:
    """Builds what is missing of the world under ``folder`` and says where its parts lie.

    Args:
        folder: made if absent.
        seed: decides every random choice; equal seed, processor type and library versions give equal files.
        prompts: number of training prompts.
        held_out: number of evaluation prompts. None is a training prompt; no model was built on either kind.
        sizes: model and training sizes, for tests and experiments.
        report: called as ``report(what, done, total)`` after each part or optimizer step, for a progress bar.

    Raises:
        ConfigError: ``folder`` holds a world built from other arguments.
    """
    sizes = sizes or Sizes()
    report = report or silent
    world = World(folder / "teacher", folder / "student", folder / "prompts.jsonl", folder / "held_out.jsonl")
    folder.mkdir(parents=True, exist_ok=True)
    counts = {"seed": seed, "prompts": prompts, "held_out": held_out}
    claim(folder / "world.json", counts | dataclasses.asdict(sizes))
    problems = tasks.distinct_problems(stream(seed, "problems"), prompts + held_out)
    _write_prompts(world.prompts, problems[:prompts], "train")
    _write_prompts(world.held_out, problems[prompts:], "held-out")
    report("prompts", 1, 1)
    with one_thread():
        if not world.teacher.exists():
            _build_teacher(world, seed, sizes, frozenset(problems), report)
        if not world.student.exists():
            _build_student(world, seed, sizes, frozenset(problems), report)
    return world


def make_tokenizer(task_words: Sequence[str] = tasks.WORDS) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the words of a task: splits at white space, decodes with single blanks."""
    vocabulary = {word: number for number, word in enumerate((*SPECIALS, *task_words))}
    words = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=words,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        extra_special_tokens=[USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _build_teacher(world: World, seed: int, sizes: Sizes, reserved: frozenset[str], report: Report) -> None:
    tokenizer = make_tokenizer()
    model = new_model(tokenizer, sizes, seed)
    rng = stream(seed, "teacher")

    def draw() -> Example:
        problem = _fresh_problem(rng, reserved)
        return problem, tasks.solution(problem, rng)

    fit(model, tokenizer, draw, sizes, sizes.teacher_steps, sizes.teacher_rate, partial(report, "teacher"))
    save(model, tokenizer, world.teacher)


def _build_student(world: World, seed: int, sizes: Sizes, reserved: frozenset[str], report: Report) -> None:
    tokenizer = make_tokenizer()
    model = load_model(world.teacher)
    rng = stream(seed, "student")

    def draw() -> Example:
        problem = _fresh_problem(rng, reserved)
        return problem, tasks.corrupted_solution(problem, rng, sizes.corruption)

    fit(model, tokenizer, draw, sizes, sizes.student_steps, sizes.student_rate, partial(report, "student"))
    save(model, tokenizer, world.student)


def new_model(tokenizer: PreTrainedTokenizerFast, sizes: Sizes, seed: int) -> Qwen3ForCausalLM:
    """An untrained model over the tokenizer's words. The caller's random state is not ours to move."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(_model_config(tokenizer, sizes))


def load_model(folder: Path) -> Qwen3ForCausalLM:
    """A model that was built before, to be trained on."""
    with _no_progress_bars():
        model: Qwen3ForCausalLM = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model


def _model_config(tokenizer: PreTrainedTokenizerFast, sizes: Sizes) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        head_dim=sizes.hidden // sizes.heads,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=sizes.init_std,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def fit(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    draw: Callable[[], Example],
    sizes: Sizes,
    steps: int,
    rate: float,
    report: Callable[[int, int], None],
) -> None:
    """Next-token cross-entropy on response tokens, in nats per token. No text is seen twice but by chance."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=sizes.betas, weight_decay=0.0)
    warm_up = max(1, min(sizes.warm_up, steps // 4))
    model.train()
    for step in range(steps):
        decay = 0.5 * (1 + math.cos(math.pi * max(0, step - warm_up) / max(1, steps - warm_up)))
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / warm_up, decay)
        ids_B_T, labels_B_T = _batch([draw() for _ in range(sizes.batch)], tokenizer)
        # Padding is on the right and attention is causal: no real token sees it, a mask would only cost time.
        logits_B_T_V = model(input_ids=ids_B_T, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits_B_T_V.flatten(0, 1), labels_B_T[:, 1:].flatten(), ignore_index=IGNORED
        )
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        report(step + 1, steps)


def _batch(examples: list[Example], tokenizer: PreTrainedTokenizerFast) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, both [B, T] of int64, padded on the right; only response tokens have a label."""
    vocabulary = tokenizer.get_vocab()
    rows: list[list[int]] = []
    prompts: list[int] = []
    for problem, response in examples:
        prompt = f"{USER} {problem} {ASSISTANT}"  # what the chat template renders; a test compares the two
        rows.append([vocabulary[word] for word in f"{prompt} {response} {END}".split()])
        prompts.append(len(prompt.split()))
    ids_B_T = torch.full((len(rows), max(map(len, rows))), tokenizer.pad_token_id)
    labels_B_T = torch.full_like(ids_B_T, IGNORED)
    for row, (ids, prompt_length) in enumerate(zip(rows, prompts, strict=True)):
        ids_B_T[row, : len(ids)] = torch.tensor(ids)
        labels_B_T[row, prompt_length : len(ids)] = torch.tensor(ids[prompt_length:])
    return ids_B_T, labels_B_T


def save(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, target: Path, files: Mapping[str, str] | None = None
) -> None:
    """Writes a Hugging Face folder, with further text files, beside ``target``, then renames it: what has that name is
    complete."""
    unfinished = target.with_name(f".{target.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)  # left by an interrupted call
    with _no_progress_bars():
        model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    for name, text in (files or {}).items():
        write_whole(unfinished / name, text)
    os.replace(unfinished, target)


def _write_prompts(target: Path, problems: list[str], prefix: str) -> None:
    lines = (
        json.dumps(
            {
                "prompt_id": f"{prefix}-{number:05d}",
                "messages": [{"role": "user", "content": problem}],
                "answer": tasks.truth(problem),
            }
        )
        for number, problem in enumerate(problems)
    )
    write_whole(target, "\n".join(lines) + "\n")


def claim(record: Path, arguments: dict[str, object]) -> None:
    """Records what the world is built from, or refuses to mix two worlds in one folder."""
    text = json.dumps(arguments, indent=2) + "\n"
    if not record.exists():
        write_whole(record, text)
    elif record.read_text(encoding="utf-8") != text:
        raise ConfigError(
            "this folder holds a demo world built from other arguments",
            where=str(record),
            fix="name another folder, or remove this one",
        )


def write_whole(target: Path, text: str) -> None:
    unfinished = target.with_name(f".{target.name}.partial")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, target)


def _fresh_problem(rng: random.Random, reserved: frozenset[str]) -> str:
    while (problem := tasks.make_problem(rng)) in reserved:
        pass
    return problem


def stream(seed: int, what: str) -> random.Random:
    """An own stream per part: it comes out the same whether or not the others were built in this call."""
    return random.Random(f"fire demo world, {what}, {seed}")


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Loading and saving 80,000 weights needs no bar, and the terminal belongs to the caller."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


@contextmanager
def one_thread() -> Iterator[None]:
    """Matrices this small need no second thread: on busy cores, two that wait for each other took about ten
    times as long. One thread also makes the files independent of the caller's thread count.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def silent(what: str, done: int, total: int) -> None:
    pass
