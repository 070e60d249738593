"""A step is the same however it is cut, padded, interrupted or exported; wrong data stops it before the optimizer."""

from __future__ import annotations

import copy
import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from fire_data import packing, training, trainstate
from fire_data.models import head_of, hidden_states
from fire_data.optim import learning_rate, make_optimizer
from fire_data.schemas.config import TrainConfig
from fire_data.schemas.errors import DamagedError, DataError, StorageError, TrainingError
from fire_data.training import StepBatch, ratio_check, ratio_tolerance, train_step
from fire_data.trainstate import export_checkpoint, latest_state, load_state, prune_states, save_state
from fire_data.vocabulary import Vocabulary

SIZE = 40
VOCABULARY = Vocabulary(SIZE, np.arange(SIZE) != 7)
ORIGINAL = training.token_logprobs


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _model(seed: int = 0, dtype: torch.dtype = torch.float32, tied: bool = True) -> Any:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=tied, initializer_range=0.3,
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).to(dtype).eval()


def _batch(model: Any, rows: int = 8, seed: int = 0, step: int = 0, noise: float = 0.0) -> StepBatch:
    """Rows of 1 to 12 response tokens, scored by `model` itself with one plain forward per row."""
    random = np.random.default_rng(seed)
    ids = np.flatnonzero(VOCABULARY.allowed)
    prompts = [random.choice(ids, 2 + i % 4) for i in range(rows)]
    responses = [random.choice(ids, 1 + (i * 5) % 12) for i in range(rows)]
    old = [_plain_logprobs(model, p, r) + noise * random.standard_normal(len(r)) for p, r in zip(prompts, responses)]  # noqa: B905
    coefficient = [random.standard_normal(len(r)) / 50 for r in responses]
    return StepBatch(step, prompts, responses, old, coefficient, sum(map(len, responses)))


def _plain_logprobs(model: Any, prompt: np.ndarray, response: np.ndarray) -> np.ndarray:
    ids = torch.tensor(np.concatenate([prompt, response]))[None]
    with torch.no_grad():
        logits = model(ids).logits[0, :, :SIZE]
        logits[:, ~torch.tensor(VOCABULARY.allowed)] = -torch.inf
        logprobs = logits.log_softmax(-1)
    positions = torch.arange(len(prompt) - 1, len(prompt) + len(response) - 1)
    return logprobs[positions, torch.tensor(response)].double().numpy()


def _cfg(**changes: Any) -> TrainConfig:
    return TrainConfig(**{"lr": 1e-3, "device": "cpu", **changes})


def _step(model: Any, optimizer: Any, batch: StepBatch, cfg: TrainConfig, global_step: int = 0) -> dict[str, Any]:
    return train_step(model, head_of(model), optimizer, batch, cfg, VOCABULARY, global_step)


def _gradient(model: Any, batch: StepBatch, cfg: TrainConfig) -> tuple[float, torch.Tensor]:
    """Loss and flat gradient as they reach the optimizer (clipping off)."""
    seen: list[torch.Tensor] = []
    optimizer = make_optimizer(model, cfg)
    optimizer.register_step_pre_hook(lambda *_: seen.append(torch.cat([p.grad.flatten() for p in model.parameters()])))
    metrics = _step(model, optimizer, batch, cfg)
    return metrics["loss"], seen[0]


def _weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _moments(model: Any, optimizer: Any) -> dict[str, torch.Tensor]:
    return {f"{n}.{k}": v.clone() for n, p in model.named_parameters() for k, v in optimizer.state.get(p, {}).items()}


def _same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


# One step, however it is cut


@pytest.mark.parametrize(
    "case", ["alone", "three", "shuffled", "padded", "checkpointed", "numpy or list", "small chunks"]
)
def test_step_does_not_depend_on_how_it_is_cut(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = _cfg(compute_dtype="float64", max_grad_norm=0, tokens_per_microbatch=10_000)
    model = _model(dtype=torch.float64)
    batch = _batch(model, noise=0.3)
    loss, gradient = _gradient(copy.deepcopy(model), batch, cfg)
    lengths = [len(p) + len(r) for p, r in zip(batch.prompt_ids, batch.response_ids, strict=True)]
    if case in ("alone", "three"):
        budget, groups = {"alone": (1, [1] * 8), "three": (3 * max(lengths), [3, 4, 1])}[case]
        assert list(map(len, packing.micro_batches(lengths, budget))) == groups
        cfg = cfg.model_copy(update={"tokens_per_microbatch": budget})
    elif case == "shuffled":
        order = np.random.default_rng(3).permutation(len(lengths))
        columns = ("prompt_ids", "response_ids", "old_logprob", "coefficient")
        batch = replace(batch, **{c: [getattr(batch, c)[i] for i in order] for c in columns})
        cfg = cfg.model_copy(update={"tokens_per_microbatch": 30})
    elif case == "padded":
        monkeypatch.setattr(training, "pad", functools.partial(packing.pad, pad_id=11, multiple=64))
    elif case == "checkpointed":
        cfg = cfg.model_copy(update={"gradient_checkpointing": True})
    elif case == "numpy or list":
        columns = ("prompt_ids", "response_ids", "old_logprob", "coefficient")
        batch = replace(batch, **{c: [x.tolist() for x in getattr(batch, c)] for c in columns})
    else:
        monkeypatch.setattr(
            training, "token_logprobs", lambda h, head, ids, v, _: torch.cat(
                [ORIGINAL(h[i : i + 3], head, ids[i : i + 3], v, 1) for i in range(0, len(ids), 3)]
            )
        )  # fmt: skip
    other_loss, other_gradient = _gradient(copy.deepcopy(model), batch, cfg)
    assert other_loss == pytest.approx(loss, rel=1e-6)
    assert (other_gradient - gradient).norm() <= 1e-6 * gradient.norm()
    assert gradient.norm() > 1e-3
    assert loss != 0


def test_step_equals_the_plain_computation() -> None:
    cfg = _cfg(compute_dtype="float64", max_grad_norm=0, tokens_per_microbatch=40)
    model = _model(dtype=torch.float64)
    batch = _batch(model, noise=0.3)
    plain = copy.deepcopy(model)
    forbidden = ~torch.tensor(VOCABULARY.allowed)
    total = torch.zeros((), dtype=torch.float64)
    for p, r, old, c in zip(batch.prompt_ids, batch.response_ids, batch.old_logprob, batch.coefficient, strict=True):
        logits = plain(torch.tensor(np.concatenate([p, r]))[None]).logits[0, len(p) - 1 : -1, :SIZE]
        logprob = logits.masked_fill(forbidden, -torch.inf).log_softmax(-1)[torch.arange(len(r)), torch.tensor(r)]
        ratio, c_T = (logprob - torch.tensor(old)).exp(), torch.tensor(c)
        total = total + torch.maximum(-c_T * ratio, -c_T * ratio.clamp(0.8, 1.2)).sum()
    total.backward()
    expected = torch.cat([p.grad.flatten() for p in plain.parameters()])
    loss, gradient = _gradient(model, batch, cfg)
    assert loss == pytest.approx(total.item(), rel=1e-9)
    torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-12)


def test_dropped_rows_do_not_reach_the_model_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = _cfg(compute_dtype="float64", max_grad_norm=0)
    model = _model(dtype=torch.float64)
    batch = _batch(model)
    dropped = [1, 4]
    coefficient = [np.zeros(len(c)) if i in dropped else c for i, c in enumerate(batch.coefficient)]
    kept = [i for i in range(8) if i not in dropped]
    columns = ("prompt_ids", "response_ids", "old_logprob")
    alone = StepBatch(0, *([getattr(batch, c)[i] for i in kept] for c in columns), [coefficient[i] for i in kept], 9)
    _, expected = _gradient(copy.deepcopy(model), alone, cfg)
    rows = []
    monkeypatch.setattr(training, "hidden_states", lambda m, i, k: rows.append(len(i)) or hidden_states(m, i, k))
    _, gradient = _gradient(model, replace(batch, coefficient=coefficient), cfg)
    assert sum(rows) == 6
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-15)


def test_micro_batches_hold_every_row_once_within_the_budget() -> None:
    lengths = [*np.random.default_rng(0).integers(1, 60, 200).tolist(), 500]
    groups = packing.micro_batches(lengths, 128)
    assert sorted(i for group in groups for i in group) == list(range(201))
    sizes = [len(group) * max(lengths[i] for i in group) for group in groups]
    assert groups[0] == [200]
    assert max(sizes[1:]) <= 128
    assert len(groups) < 80
    assert groups == packing.micro_batches(lengths, 128)
    assert packing.micro_batches([], 128) == []


def test_hidden_states_are_taken_where_the_response_is_predicted() -> None:
    ids, mask = packing.pad([[5, 6, 7, 8], [9, 4]])
    rows, positions = packing.response_index([2, 1], [2, 1])
    assert ids.tolist() == [[5, 6, 7, 8], [9, 4, 0, 0]]
    assert mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert ids[rows, positions].tolist() == [6, 7, 9]
    assert ids[rows, positions + 1].tolist() == [7, 8, 4]


# Optimizer and schedule


def test_learning_rate_warms_up_then_decays_to_zero_at_the_last_step() -> None:
    cosine = _cfg(lr=1.0, warmup_steps=4, schedule="cosine", total_steps=12)
    assert [learning_rate(s, cosine) for s in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert learning_rate(8, cosine) == pytest.approx(0.5)
    linear = _cfg(lr=1.0, warmup_steps=4, schedule="linear", total_steps=12)
    assert learning_rate(6, linear) == pytest.approx(0.75)
    assert learning_rate(11, linear) == pytest.approx(0.125)
    assert learning_rate(12, linear) == learning_rate(99, cosine) == 0
    assert learning_rate(10**6, _cfg(lr=1.0)) == 1.0
    with pytest.raises(ValueError, match="must be more than warmup_steps"):
        _cfg(lr=1.0, warmup_steps=8, schedule="linear", total_steps=4)


def test_step_uses_the_rate_of_its_global_step() -> None:
    cfg = _cfg(warmup_steps=10, max_grad_norm=0)
    for global_step, rate in ((0, 1e-4), (4, 5e-4)):
        model = _model()
        before = _weights(model)
        metrics = _step(model, make_optimizer(model, cfg), _batch(model), cfg, global_step)
        moved = max(float((v - before[k]).abs().max()) for k, v in model.state_dict().items())
        assert moved == pytest.approx(rate, rel=1e-2)  # the first update of Adam is the rate itself
        assert metrics["lr"] == pytest.approx(rate)


def test_weight_decay_spares_vectors() -> None:
    model = _model()
    optimizer = make_optimizer(model, _cfg(weight_decay=0.1))
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    assert {n for n, p in model.named_parameters() if id(p) not in decayed} == {
        n for n, _ in model.named_parameters() if "norm" in n
    }
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))


def test_gradient_clipping_bounds_the_norm_and_reports_it_before() -> None:
    model = _model()
    batch = _batch(model)
    seen = []
    for limit in (0, 1e-3):
        copied = copy.deepcopy(model)
        optimizer = make_optimizer(copied, _cfg())
        optimizer.register_step_pre_hook(
            lambda *_, m=copied: seen.append(torch.cat([p.grad.flatten() for p in m.parameters()]).norm().item())
        )
        metrics = _step(copied, optimizer, batch, _cfg(max_grad_norm=limit))
        assert metrics["grad_norm"] == pytest.approx(seen[0], rel=1e-5)
    assert seen[0] > 0.01
    assert seen[1] == pytest.approx(1e-3, rel=1e-3)


def test_metrics_of_the_first_step_are_those_of_an_unmoved_policy() -> None:
    model = _model()
    batch = _batch(model)
    optimizer = make_optimizer(model, _cfg())
    first = _step(model, optimizer, batch, _cfg(), 0)
    second = _step(model, optimizer, batch, _cfg(), 1)
    tokens = sum(map(len, batch.response_ids))
    assert first["tokens"] == first["kept_tokens"] == tokens
    assert first["ratio_mean_abs"] < 1e-5
    assert first["ratio_max"] == pytest.approx(1, abs=1e-4)
    assert first["drift_kl"] < 1e-8
    assert first["clip_fraction"] == 0
    assert first["loss"] == pytest.approx(-sum(c.sum() for c in batch.coefficient), rel=1e-4)
    assert second["loss"] < first["loss"]
    assert second["drift_kl"] > 1e-5
    assert second["ratio_mean_abs"] > 1e-3
    assert (first["lr"], first["skipped"]) == (1e-3, False)
    assert json.loads(json.dumps(second, allow_nan=False)) == second


def test_step_without_a_kept_token_is_skipped() -> None:
    model = _model()
    optimizer = make_optimizer(model, _cfg())
    batch = _batch(model)
    _step(model, optimizer, batch, _cfg())
    weights, moments = _weights(model), _moments(model, optimizer)
    empty = replace(batch, coefficient=[np.zeros(len(c)) for c in batch.coefficient], kept_tokens=0)
    metrics = _step(model, optimizer, empty, _cfg(), 1)
    assert metrics["skipped"] is True
    assert metrics["loss"] is None
    assert _same(weights, _weights(model))
    assert _same(moments, _moments(model, optimizer))


def test_step_whose_coefficients_are_all_zero_is_still_a_step() -> None:
    model = _model()
    optimizer = make_optimizer(model, _cfg())
    batch = _batch(model)
    _step(model, optimizer, batch, _cfg())
    weights = _weights(model)
    zero = replace(batch, coefficient=[np.zeros(len(c)) for c in batch.coefficient])
    metrics = _step(model, optimizer, zero, _cfg(), 1)
    assert metrics["skipped"] is False
    assert metrics["grad_norm"] == 0
    assert not _same(weights, _weights(model))  # momentum goes on
    assert {float(s["step"]) for s in optimizer.state.values()} == {2.0}


@pytest.mark.parametrize("wrong", ["coefficient", "old_logprob", "weight"])
def test_numbers_that_are_not_finite_stop_before_the_optimizer(wrong: str) -> None:
    model = _model()
    optimizer = make_optimizer(model, _cfg())
    batch = _batch(model)
    _step(model, optimizer, batch, _cfg())
    if wrong == "weight":
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    else:
        columns = [c.copy() for c in getattr(batch, wrong)]
        columns[3][0] = np.inf if wrong == "coefficient" else np.nan
        batch = replace(batch, **{wrong: columns})
    weights, moments = _weights(model), _moments(model, optimizer)
    with pytest.raises(TrainingError, match="not both finite") as caught:
        _step(model, optimizer, batch, _cfg(), 41)
    assert "global step 41" in str(caught.value)
    assert all(torch.equal(torch.nan_to_num(weights[k]), torch.nan_to_num(v)) for k, v in model.state_dict().items())
    assert _same(moments, _moments(model, optimizer))
    assert all(p.grad is None for p in model.parameters())


def test_rows_that_do_not_fit_together_are_refused() -> None:
    good: dict[str, Any] = {
        "step": 4, "prompt_ids": [[3], [4]], "response_ids": [[5, 6], [8]], "old_logprob": [[-1, -1], [-1]],
        "coefficient": [[0.1, 0], [0]], "kept_tokens": 3,
    }  # fmt: skip
    StepBatch(**good)
    for change, message in [
        ({"coefficient": [[0.1, 0], [0, 0]]}, "coefficient has 2 elements where response_ids has 1\n.*step 4, row 1"),
        ({"old_logprob": [[-1, -1]]}, "old_logprob has 1 rows"),
        ({"prompt_ids": [[3], []]}, "prompt has no token\n.*row 1"),
        ({"kept_tokens": 0}, "no token is kept"),
        ({"kept_tokens": 4}, "4 kept tokens of 3"),
    ]:
        with pytest.raises(DataError, match=message):
            StepBatch(**{**good, **change})


def test_master_weights_in_half_precision_are_refused() -> None:
    model = _model(dtype=torch.bfloat16)
    with pytest.raises(TrainingError, match=r"master weights are torch.bfloat16"):
        _step(model, make_optimizer(model, _cfg()), _batch(_model()), _cfg())


def test_bfloat16_compute_keeps_masters_and_moments_in_single() -> None:
    model = _model()
    batch = _batch(model)
    cfg = _cfg(compute_dtype="bfloat16", max_grad_norm=0)
    _, exact = _gradient(copy.deepcopy(model), batch, cfg.model_copy(update={"compute_dtype": "float32"}))
    before = copy.deepcopy(model)
    _, rounded = _gradient(model, batch, cfg)
    assert rounded.dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not torch.equal(exact, rounded)
    assert torch.cosine_similarity(exact, rounded, dim=0) > 0.98
    assert not _same(_weights(before), _weights(model))


# Dropout and recomputation


def _gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=48, n_embd=32, n_layer=2, n_head=4, n_positions=32))


def _opt() -> Any:
    torch.manual_seed(0)
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=48,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=32,
            word_embed_proj_dim=32,
            dropout=0.4,
            attention_dropout=0.4,
            layerdrop=0.4,
        )
    )


@pytest.mark.parametrize("make", [_gpt2, _opt])
@pytest.mark.parametrize("was_training", [True, False])
def test_dropout_is_off_with_and_without_recomputation(make: Callable[[], Any], was_training: bool) -> None:
    model = make().eval()
    assert max(v for k, v in model.config.to_dict().items() if "drop" in k and isinstance(v, float)) > 0
    batch = _batch(model)
    results = []
    for checkpointing in (False, True):
        copied = copy.deepcopy(model).train(was_training)
        cfg = _cfg(gradient_checkpointing=checkpointing, max_grad_norm=0)
        results.append(_gradient(copied, batch, cfg))
        assert all(module.training is was_training for module in copied.modules())
        assert copied.config.to_dict() == model.config.to_dict()
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-6)
    assert results[0][0] == pytest.approx(-sum(c.sum() for c in batch.coefficient), rel=1e-3)


@pytest.mark.parametrize("make", [_model, _gpt2, _opt])
def test_gradient_checkpointing_really_recomputes(make: Callable[[], Any]) -> None:
    calls = {}
    for checkpointing in (False, True):
        model = make().eval()
        batch = _batch(model)
        layer = next(m for m in model.modules() if type(m).__name__ in ("Qwen3MLP", "GPT2MLP", "OPTAttention"))
        count = []
        layer.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        model_cfg = _cfg(gradient_checkpointing=checkpointing)
        head, optimizer = head_of(model), make_optimizer(model, model_cfg)
        count.clear()
        train_step(model, head, optimizer, batch, model_cfg, VOCABULARY, 0)
        calls[checkpointing] = len(count)
    assert calls == {False: 1, True: 2}


# The ratio check


def _check(model: Any, batch: StepBatch, tolerance: float = 1e-4, **more: Any) -> dict[str, float]:
    return ratio_check(model, head_of(model), batch, _cfg(tokens_per_microbatch=64), VOCABULARY, tolerance, **more)


def test_ratio_check_passes_for_the_model_that_scored() -> None:
    model = _model()
    result = _check(model, _batch(model))
    assert result["ratio_mean_abs"] < 1e-5
    assert result["ratio_mean_abs_shifted"] > 0.5
    assert result["rows"] == 8


@pytest.mark.parametrize("by", [1, -1])
def test_ratio_check_names_a_shifted_column(by: int) -> None:
    model = _model()
    batch = _batch(model)
    with pytest.raises(TrainingError, match="student_logprob is shifted by one token") as caught:
        _check(model, replace(batch, old_logprob=[_shifted(x, by) for x in batch.old_logprob]))
    assert "fire score RUN --round N --redo" in str(caught.value)
    rolled = replace(batch, old_logprob=[np.roll(x, by) for x in batch.old_logprob])
    with pytest.raises(TrainingError):
        _check(model, rolled)


def _shifted(values: np.ndarray, by: int) -> np.ndarray:
    """The column one token late or early, its free end filled with what stands there; single tokens stay."""
    return np.r_[values[:1], values[:-1]] if by > 0 else np.r_[values[1:], values[-1:]]


@pytest.mark.parametrize("by", [1, -1])
def test_ratio_check_finds_a_shift_that_is_within_the_tolerance(by: int) -> None:
    model = _model()
    batch = _batch(model)
    wrong = replace(batch, old_logprob=[_shifted(x, by) for x in batch.old_logprob])
    with pytest.raises(TrainingError, match="shifted by one token"):
        _check(model, wrong, tolerance=100.0)
    assert _check(model, batch, tolerance=100.0)["ratio_mean_abs"] < 1e-5


def test_ratio_check_names_another_model() -> None:
    batch = _batch(_model(seed=1))
    with pytest.raises(TrainingError, match="not of the model to be trained") as caught:
        _check(_model(), batch)
    assert "the tolerance is 0.0001" in str(caught.value)
    assert "--redo" in str(caught.value)


def test_ratio_check_works_on_single_tokens_and_on_flat_columns() -> None:
    model = _model()
    batch = _batch(model)
    columns = ("prompt_ids", "response_ids", "old_logprob", "coefficient")
    single = replace(batch, kept_tokens=1, **{c: [getattr(batch, c)[0]] for c in columns})
    assert np.isnan(_check(model, single)["ratio_mean_abs_shifted"])
    with torch.no_grad():
        model.model.norm.weight.zero_()  # every token equally likely: the shifted column is the column
    result = _check(model, _batch(model))
    assert result["ratio_mean_abs"] == pytest.approx(result["ratio_mean_abs_shifted"])


def test_ratio_check_is_bounded_and_changes_nothing() -> None:
    model = _model()
    weights = _weights(model)
    batch = _batch(model)
    result = _check(model, batch, max_tokens=10)
    assert (result["rows"], result["tokens"]) == (2, 7)
    assert _check(model, batch, max_tokens=1)["rows"] == 1
    assert _same(weights, _weights(model))
    assert all(p.grad is None for p in model.parameters())


def test_ratio_tolerance_follows_the_least_exact_dtype() -> None:
    assert ratio_tolerance(_cfg(), "float32") == 1e-4
    assert ratio_tolerance(_cfg(), "bfloat16", "float32") == 0.03
    assert ratio_tolerance(_cfg(compute_dtype="bfloat16"), "float32") == 0.03
    assert ratio_tolerance(_cfg(ratio_tolerance=0.5), "float32") == 0.5


# Training state


def _train(model: Any, optimizer: Any, steps: range, cfg: TrainConfig) -> None:
    scorer = _model()
    for step in steps:
        _step(model, optimizer, _batch(scorer, seed=step, step=step), cfg, step)


RESUME = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
import test_training as t
torch.set_num_threads(1)
model = t._model(seed=9)
cfg = t._cfg(warmup_steps=5)
optimizer = t.make_optimizer(model, cfg)
root = Path(sys.argv[2])
meta = t.load_state(t.latest_state(root), model, optimizer)
t._train(model, optimizer, range(meta["global_step"], 6), cfg)
t.save_state(root / "6", model, optimizer, {"global_step": 6})
"""


def test_training_resumed_in_a_new_process_is_bitwise_the_same(tmp_path: Path) -> None:
    cfg = _cfg(warmup_steps=5)
    model = _model()
    optimizer = make_optimizer(model, cfg)
    _train(model, optimizer, range(3), cfg)
    save_state(tmp_path / "3", model, optimizer, {"global_step": 3, "round": 0})
    _train(model, optimizer, range(3, 6), cfg)
    command = [sys.executable, "-c", RESUME, str(Path(__file__).parent), str(tmp_path)]
    subprocess.run(command, check=True, timeout=300)
    resumed = _model(seed=2)
    restored = make_optimizer(resumed, cfg)
    assert load_state(tmp_path / "6", resumed, restored) == {"global_step": 6}
    assert _same(_weights(model), _weights(resumed))
    assert _same(_moments(model, optimizer), _moments(resumed, restored))
    assert len(_moments(model, optimizer)) == 3 * len(list(model.parameters()))


def test_export_and_resume_after_each_of_50_steps_change_no_bit(tmp_path: Path) -> None:
    cfg = _cfg(lr=1e-6)
    start = _model()
    plain, optimizer = _model(), None
    optimizer = make_optimizer(plain, cfg)
    _train(plain, optimizer, range(50), cfg)

    model = _model()
    state = make_optimizer(model, cfg)
    for step in range(50):
        _train(model, state, range(step, step + 1), cfg)
        export_checkpoint(tmp_path / f"export-{step}", model, _tokenizer(), "bfloat16")
        save_state(tmp_path / "state" / str(step), model, state, {"global_step": step})
        prune_states(tmp_path / "state", 1)
        model, state = _model(seed=step + 1), None
        state = make_optimizer(model, cfg)
        load_state(latest_state(tmp_path / "state"), model, state)
    assert _same(_weights(plain), _weights(model))
    assert _same(_moments(plain, optimizer), _moments(model, state))
    assert len(list((tmp_path / "state").iterdir())) == 1

    naive = _model(dtype=torch.bfloat16)
    naive_start = _weights(naive)
    naive_optimizer = make_optimizer(naive, cfg)
    for step in range(50):
        batch = _batch(start, seed=step)
        training._accumulate(naive, head_of(naive), batch, cfg, VOCABULARY)
        naive_optimizer.step()
        naive_optimizer.zero_grad()
    assert _moved(naive_start, _weights(naive)) < 0.02
    assert _moved(_weights(start), _weights(plain)) > 0.9


def _moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> float:
    """Share of the numbers that changed."""
    changed = sum(int((before[k] != after[k]).sum()) for k in before)
    return changed / sum(tensor.numel() for tensor in before.values())


@pytest.mark.parametrize("tied", [True, False])
def test_state_keeps_ties_and_stores_a_tied_matrix_once(tmp_path: Path, tied: bool) -> None:
    cfg = _cfg()
    model = _model(tied=tied)
    optimizer = make_optimizer(model, cfg)
    _train(model, optimizer, range(2), cfg)
    save_state(tmp_path / "a", model, optimizer, {"global_step": 2})
    record = json.loads((tmp_path / "a" / "meta.json").read_text())
    assert record["ties"] == ({"lm_head.weight": "model.embed_tokens.weight"} if tied else {})
    other = _model(seed=5, tied=tied)
    restored = make_optimizer(other, cfg)
    load_state(tmp_path / "a", other, restored)
    assert _same(_weights(model), _weights(other))
    assert (other.lm_head.weight is other.model.embed_tokens.weight) is tied
    _train(model, optimizer, range(2, 4), cfg)
    _train(other, restored, range(2, 4), cfg)
    assert _same(_weights(model), _weights(other))
    mismatched = _model(tied=not tied)
    with pytest.raises(DataError, match="differ in"):
        load_state(tmp_path / "a", mismatched, make_optimizer(mismatched, cfg))


def test_state_before_the_first_step_has_no_moments(tmp_path: Path) -> None:
    model = _model()
    save_state(tmp_path / "0", model, make_optimizer(model, _cfg()), {"global_step": 0})
    other = _model(seed=1)
    optimizer = make_optimizer(other, _cfg())
    _train(other, optimizer, range(1), _cfg())
    load_state(tmp_path / "0", other, optimizer)
    assert _same(_weights(model), _weights(other))
    assert not optimizer.state


def test_state_of_another_model_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    model = _model()
    save_state(tmp_path / "0", model, make_optimizer(model, _cfg()), {"global_step": 0})
    double = _model(seed=1, dtype=torch.float64)
    weights = _weights(double)
    with pytest.raises(DataError, match=r"float32 .* and torch.float64"):
        load_state(tmp_path / "0", double, make_optimizer(double, _cfg()))
    assert _same(weights, _weights(double))


@pytest.mark.parametrize("name", ["weights", "exp_avg", "exp_avg_sq", "step", "meta"])
def test_flipped_bit_in_a_state_is_damage_and_nothing_changes(tmp_path: Path, name: str) -> None:
    model = _model()
    optimizer = make_optimizer(model, _cfg())
    _train(model, optimizer, range(1), _cfg())
    save_state(tmp_path / "1", model, optimizer, {"global_step": 1, "note": "abc"})
    path = tmp_path / "1" / (name + (".json" if name == "meta" else ".safetensors"))
    data = bytearray(path.read_bytes())
    data[len(data) - 20 if name != "meta" else data.index(b"abc")] ^= 1
    path.write_bytes(data)
    other = _model(seed=3)
    weights = _weights(other)
    with pytest.raises(DamagedError, match=path.name):
        load_state(tmp_path / "1", other, make_optimizer(other, _cfg()))
    assert _same(weights, _weights(other))


class Killed(BaseException):
    """Stands for kill -9: no handler of the code under test runs."""


def _fail_at(monkeypatch: pytest.MonkeyPatch, at: int, error: BaseException) -> list[str]:
    """Raise at the at-th file-system call of a save; calls before it happen. Returns the names of the calls made."""
    calls: list[str] = []

    def wrap(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            if len(calls) == at + 1:
                raise error
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    for owner, name in [
        (trainstate, "save_file"), (trainstate, "write_bytes"), (trainstate, "sha256_file"), (trainstate, "remove"),
        (Path, "mkdir"), (os, "fsync"), (os, "rename"),
    ]:  # fmt: skip
        wrap(owner, name)
    return calls


@pytest.mark.parametrize("replacing", [False, True])
@pytest.mark.parametrize("kill", [True, False])
def test_save_interrupted_at_any_call_leaves_a_whole_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replacing: bool, kill: bool
) -> None:
    cfg = _cfg()
    model = _model()
    optimizer = make_optimizer(model, cfg)
    _train(model, optimizer, range(1), cfg)
    target = "1" if replacing else "2"
    seen = set()
    for at in range(100):
        root = tmp_path / str(at)
        save_state(root / "1", model, optimizer, {"global_step": 1, "from": "old"})
        with monkeypatch.context() as patch:
            calls = _fail_at(patch, at, Killed() if kill else OSError(28, "No space left on device"))
            try:
                save_state(root / target, model, optimizer, {"global_step": int(target), "from": "new"})
                outcome = "done"
            except Killed:
                outcome = "killed"
            except StorageError as error:
                outcome = "refused" if "disk is full" in str(error) else str(error)
        other = _model(seed=4)
        for visible in root.glob("[!.]*"):
            load_state(visible, other, make_optimizer(other, cfg))
        meta = load_state(latest_state(root), other, make_optimizer(other, cfg))
        assert _same(_weights(model), _weights(other))
        assert meta["from"] == "new" or outcome != "done"
        seen.add((outcome, meta["from"]))
        save_state(root / target, model, optimizer, {"global_step": int(target), "from": "again"})
        prune_states(root, 1)
        assert [p.name for p in root.iterdir()] == [target]
        assert load_state(latest_state(root), other, make_optimizer(other, cfg))["from"] == "again"
        if outcome == "done":
            break
    assert at == len(calls) > 15
    assert {"save_file", "write_bytes", "fsync", "rename", "mkdir"} <= set(calls)
    assert seen >= {("killed" if kill else "refused", "old"), ("done", "new")}


def test_full_disk_inside_safetensors_is_a_storage_error_and_leaves_no_litter(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    model = _model()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(StorageError, match="file system failed"):
            save_state(tmp_path / "0", model, make_optimizer(model, _cfg()), {"global_step": 0})
        with pytest.raises(StorageError, match="file system failed"):
            export_checkpoint(tmp_path / "export", model, _tokenizer(), "float32")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_latest_state_ignores_unfinished_and_incomplete_folders(tmp_path: Path) -> None:
    model = _model()
    optimizer = make_optimizer(model, _cfg())
    assert latest_state(tmp_path / "nowhere") is None
    for step in (9, 10, 2):
        save_state(tmp_path / f"step-{step}", model, optimizer, {"global_step": step})
    assert latest_state(tmp_path) == tmp_path / "step-10"
    (tmp_path / "step-11").mkdir()
    (tmp_path / "step-10").rename(tmp_path / ".step-10.tmp")
    assert latest_state(tmp_path) == tmp_path / "step-9"
    (tmp_path / "step-9" / "weights.safetensors").unlink()
    assert latest_state(tmp_path) == tmp_path / "step-2"
    assert prune_states(tmp_path, 1) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-11", "step-2", "step-9"]


def test_state_set_aside_counts_only_while_it_is_the_only_one(tmp_path: Path) -> None:
    model = _model()
    optimizer = make_optimizer(model, _cfg())
    for step in (1, 2, 3):
        save_state(tmp_path / str(step), model, optimizer, {"global_step": step})
    (tmp_path / "3").rename(tmp_path / "3.replaced")
    assert latest_state(tmp_path) == tmp_path / "3.replaced"
    save_state(tmp_path / "3", model, optimizer, {"global_step": 3})
    shutil.copytree(tmp_path / "2", tmp_path / "3.replaced")
    assert latest_state(tmp_path) == tmp_path / "3"
    (tmp_path / "3.replaced" / "meta.json").unlink()
    assert prune_states(tmp_path, 2) == [tmp_path / "1"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "3"]


def test_equal_states_have_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        model = _model()
        optimizer = make_optimizer(model, _cfg())
        _train(model, optimizer, range(2), _cfg())
        save_state(tmp_path / name, model, optimizer, {"global_step": 2})
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert files == [
        "exp_avg.safetensors",
        "exp_avg_sq.safetensors",
        "meta.json",
        "step.safetensors",
        "weights.safetensors",
    ]
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)


# Export


def _tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(SIZE)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), eos_token="w1")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return tokenizer


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("tied", [True, False])
def test_export_loads_as_exactly_the_cast_weights(tmp_path: Path, dtype: str, tied: bool) -> None:
    model = _model(tied=tied)
    model.generation_config.eos_token_id = [1, 3]
    before, config = _weights(model), model.config.to_dict()
    export_checkpoint(tmp_path / "x", model, _tokenizer(), dtype)
    assert _same(before, _weights(model))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config.to_dict() == {**config, "architectures": ["Qwen3ForCausalLM"]}
    target = getattr(torch, dtype)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    assert _same({k: v.to(target) for k, v in before.items()}, _weights(loaded))
    assert loaded.config.dtype == target
    assert json.loads((tmp_path / "x" / "config.json").read_text())["dtype"] == dtype
    assert loaded.generation_config.eos_token_id == [1, 3]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "x")
    assert tokenizer.chat_template == _tokenizer().chat_template
    assert tokenizer.get_vocab() == _tokenizer().get_vocab()
    assert [p.name for p in (tmp_path / "x").glob("*.bin")] == []


def test_export_does_not_overwrite(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "precious").touch()
    with pytest.raises(StorageError):
        export_checkpoint(tmp_path / "x", _model(), _tokenizer(), "float32")
    assert (tmp_path / "x" / "precious").exists()


def test_export_of_a_weight_beyond_half_range_is_refused(tmp_path: Path) -> None:
    model = _model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = 1e5
    with pytest.raises(TrainingError, match=r"layers.1.mlp.down_proj.weight .* float16"):
        export_checkpoint(tmp_path / "x", model, _tokenizer(), "float16")
    assert not (tmp_path / "x").exists()
