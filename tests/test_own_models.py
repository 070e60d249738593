"""Other people's models: byte-level tokenizers, padded vocabularies, other end tokens and templates, base models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from fire_data.run import open_run
from fire_data.shards import sealed
from fire_data.tokenview import pieces

TEXTS = [
    "Wie heißt die Hauptstadt von Österreich?",
    "Explain gravity to a child.",
    "数字を三つ挙げて 🦊🔥",
    "What is 17 * 23? 🤔",
]
STUDENT_TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}<|assistant|>"
TEACHER_TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}[assistant] "


def _tokenizer(eos: str, template: str | None) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on a few sentences; the special tokens are the same, their roles are not."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    raw.train_from_iterator(TEXTS * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=eos, pad_token="<|endoftext|>")
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `student` (Llama, 384 output rows), `base` (the same, no template) and `teacher` (Qwen3, 448 rows)."""
    root = tmp_path_factory.mktemp("pair")
    torch.manual_seed(5)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    student = LlamaForCausalLM(LlamaConfig(vocab_size=384, num_key_value_heads=1, eos_token_id=0, **shape))
    teacher = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=448, num_key_value_heads=2, head_dim=16, eos_token_id=1, tie_word_embeddings=True, **shape
        )
    )
    for name, model, eos, template in (
        ("student", student, "<|endoftext|>", STUDENT_TEMPLATE),
        ("base", student, "<|endoftext|>", None),
        ("teacher", teacher, "<|end|>", TEACHER_TEMPLATE),
    ):
        model.save_pretrained(root / name)
        _tokenizer(eos, template).save_pretrained(root / name)
    lines = [{"messages": [{"role": "user", "content": t}], "answer": "391", "level": i} for i, t in enumerate(TEXTS)]
    (root / "prompts.jsonl").write_text("".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines))
    return root


SMALL = ("rollout.n=2", "rollout.max_new_tokens=12", "train.batch_size=4", "train.lr=1e-3", "threads=1")


def _settings(*more: str) -> list[str]:
    return [x for setting in (*SMALL, *more) for x in ("--set", setting)]


def _init(fire: Callable[..., Any], pair: Path, run: Path, student: str = "student", *more: str) -> None:
    models_ = ("--student", pair / student, "--teacher", pair / "teacher", "--prompts", pair / "prompts.jsonl")
    assert fire("init", run, *models_, *more).code == 0


def test_commands_work_on_models_of_other_families(fire: Callable[..., Any], pair: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    _init(fire, pair, run, "student", "--held-out", pair / "prompts.jsonl")
    own = _settings("score.teacher_prompt=own", "eval.n=1")
    assert fire("rollout", run, *own).code == 0
    scored = fire("score", run, *own, "--json")
    assert scored.code == 0
    assert scored.json["rollout_drift"] < 1e-4
    assert fire("weigh", run, *own).code == 0
    trained = fire("train", run, *own, "--json")
    assert trained.code == 0, trained.err
    assert trained.json["ratio_check"] < 1e-4
    evaluated = fire("eval", run, *own, "--json")
    assert evaluated.json["greedy"] == 0.0
    assert fire("run", run, "--rounds", "2", *own).code == 0
    assert fire("check", run).code == 0
    opened = open_run(run)
    scores = opened.scores(0).collect()
    theirs, ours = scores["teacher_prompt_ids"].to_list(), scores["prompt_ids"].to_list()
    assert all(t is not None and t != o for t, o in zip(theirs, ours, strict=True))
    assert max(x for ids in scores["response_ids"].to_list() for x in ids) < 320
    assert json.loads(scores["extra"][0])["level"] in range(4)


def test_other_end_tokens_and_templates_are_warned_about_and_measured(
    fire: Callable[..., Any], pair: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    _init(fire, pair, run)
    assert fire("rollout", run, *_settings("rollout.max_new_tokens=400")).code == 0
    answer = fire("score", run, *_settings("rollout.max_new_tokens=400"))
    assert answer.code == 0
    assert "eos" in answer.err
    assert "different chat templates" in answer.err
    manifest = sealed(open_run(run).part("scores", 0))
    assert "eos" in json.dumps(manifest.recorded["tokenizers"])
    ended = open_run(run).scores(0).collect().filter(finish_reason="stop")
    assert len(ended)
    expected = ended["teacher_logprob"].list.last() - ended["student_logprob"].list.last()
    assert manifest.stats["last_token_advantage"] == pytest.approx(expected.mean(), rel=1e-5)


def test_base_model_needs_raw_to_be_asked_for(fire: Callable[..., Any], pair: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    _init(fire, pair, run, "base")
    refused = fire("rollout", run, *_settings())
    assert refused.code == 2
    assert "rollout.raw" in refused.fix
    assert fire("rollout", run, *_settings("rollout.raw=true")).code == 0
    rollouts = open_run(run).rollouts(0).collect()
    tokenizer = _tokenizer("<|endoftext|>", None)
    prompts = {tokenizer.decode(ids) for ids in rollouts["prompt_ids"].to_list()}
    assert prompts == set(TEXTS)


def test_a_teacher_may_be_added_after_the_rollouts(fire: Callable[..., Any], pair: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert fire("init", run, "--student", pair / "student", "--prompts", pair / "prompts.jsonl").code == 0
    assert fire("rollout", run, *_settings()).code == 0
    without = fire("score", run, *_settings())
    assert without.code == 2
    assert "teacher" in without.err
    assert fire("score", run, *_settings(f"teacher.model={pair / 'teacher'}")).code == 0


def test_bytes_of_one_character_are_shown_as_one_piece() -> None:
    tokenizer = _tokenizer("<|endoftext|>", None)
    text = "Öß 🦊 数字\u200d👩‍🚀 end"
    ids = tokenizer(text)["input_ids"]
    found = pieces(tokenizer, ids)
    assert "".join(p.text for p in found) == text
    assert [i for p in found for i in range(p.start, p.stop)] == list(range(len(ids)))
    assert not any("\ufffd" in p.text for p in found)
    assert len(found) < len(ids)


def test_inspect_shows_text_whole_and_escapes_what_steers_a_terminal(
    fire: Callable[..., Any], pair: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    _init(fire, pair, run)
    (pair / "evil.jsonl").write_text(json.dumps({"prompt": "fox 🦊 \x1b[31mred\x07"}) + "\n")
    settings = _settings(f"prompts.path={pair / 'evil.jsonl'}")
    assert fire("rollout", run, *settings).code == 0
    shown = fire("inspect", run)
    assert shown.code == 0
    assert "fox 🦊" in shown.out
    assert "\x1b[31m" not in shown.out
    assert "\x07" not in shown.out


def test_an_inert_filter_says_so(fire: Callable[..., Any], pair: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    _init(fire, pair, run)
    for command in ("rollout", "score"):
        assert fire(command, run, *_settings()).code == 0
    inert = fire("weigh", run, "--rule", "fire-released", *_settings())
    assert "dropped nothing" in inert.err
    active = fire("weigh", run, "--rule", "fire", *_settings("train.batch_size=8"), "--json")
    assert "dropped nothing" not in active.err
    assert active.json["n_dropped"] > 0
    assert 0 < active.json["effective_sample_share"] <= 1
