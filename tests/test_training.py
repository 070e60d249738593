"""One optimizer step: the same however it is cut, refused when it cannot be right, without dropout."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
)

from fire_data import packing, training
from fire_data.models import head_of, hidden_states
from fire_data.optim import learning_rate, make_optimizer
from fire_data.schemas.errors import DataError, TrainingError
from fire_data.training import StepBatch, train_step
from tests.tinymodels import (
    SIZE,
    VOCABULARY,
    gradient_of,
    moments_of,
    one_step,
    same_tensors,
    step_batch,
    tiny_model,
    train_config,
    weights_of,
    with_budget,
)

# One step, however it is cut


def padded_wider(rows: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """As `packing.pad`, with more padding and another id in it."""
    ids_BL, mask_BL = packing.pad(rows)
    ids_BL = ids_BL.masked_fill(~mask_BL, 11)
    wider = (0, 64 - ids_BL.shape[1])
    return torch.nn.functional.pad(ids_BL, wider, value=11), torch.nn.functional.pad(mask_BL, wider)


@pytest.mark.parametrize(
    "case", ["alone", "a few", "shuffled", "padded", "checkpointed", "numpy or list", "small chunks"]
)
def test_step_does_not_depend_on_how_it_is_cut(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = train_config(compute_dtype="float64", max_grad_norm=0, tokens_per_microbatch=10_000)
    model = tiny_model(dtype=torch.float64)
    batch = step_batch(model, noise=0.3)
    loss, gradient = gradient_of(copy.deepcopy(model), batch, cfg)
    lengths = [len(p) + len(r) for p, r in zip(batch.prompt_ids, batch.response_ids, strict=True)]
    if case in ("alone", "a few"):
        budget, groups = {"alone": (1, 8), "a few": (3 * max(lengths), 6)}[case]
        assert len(packing.micro_batches(lengths, budget)) == groups
        cfg = cfg.model_copy(update={"tokens_per_microbatch": budget})
    elif case == "shuffled":
        order = np.random.default_rng(3).permutation(len(lengths))
        columns = ("prompt_ids", "response_ids", "old_logprob", "coefficient")
        batch = replace(batch, **{c: [getattr(batch, c)[i] for i in order] for c in columns})
        cfg = cfg.model_copy(update={"tokens_per_microbatch": 30})
    elif case == "padded":
        monkeypatch.setattr(training, "pad", padded_wider)
    elif case == "checkpointed":
        cfg = cfg.model_copy(update={"gradient_checkpointing": True})
    elif case == "numpy or list":
        columns = ("prompt_ids", "response_ids", "old_logprob", "coefficient")
        batch = replace(batch, **{c: [x.tolist() for x in getattr(batch, c)] for c in columns})
    else:
        monkeypatch.setattr(training, "head_backward", with_budget(3 * SIZE * 8))
    other_loss, other_gradient = gradient_of(copy.deepcopy(model), batch, cfg)
    assert other_loss == pytest.approx(loss, rel=1e-6)
    assert (other_gradient - gradient).norm() <= 1e-6 * gradient.norm()
    assert gradient.norm() > 1e-3
    assert loss != 0


def test_step_equals_the_plain_computation() -> None:
    cfg = train_config(compute_dtype="float64", max_grad_norm=0, tokens_per_microbatch=40)
    model = tiny_model(dtype=torch.float64)
    batch = step_batch(model, noise=0.3)
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
    loss, gradient = gradient_of(model, batch, cfg)
    assert loss == pytest.approx(total.item(), rel=1e-9)
    torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-12)


def test_dropped_rows_do_not_reach_the_model_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = train_config(compute_dtype="float64", max_grad_norm=0)
    model = tiny_model(dtype=torch.float64)
    batch = step_batch(model)
    dropped = [1, 4]
    coefficient = [np.zeros(len(c)) if i in dropped else c for i, c in enumerate(batch.coefficient)]
    kept = [i for i in range(8) if i not in dropped]
    columns = ("prompt_ids", "response_ids", "old_logprob")
    alone = StepBatch(0, *([getattr(batch, c)[i] for i in kept] for c in columns), [coefficient[i] for i in kept], 9)
    _, expected = gradient_of(copy.deepcopy(model), alone, cfg)
    rows = []
    monkeypatch.setattr(training, "hidden_states", lambda m, i, k: rows.append(len(i)) or hidden_states(m, i, k))
    _, gradient = gradient_of(model, replace(batch, coefficient=coefficient), cfg)
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
    cosine = train_config(lr=1.0, warmup_steps=4, schedule="cosine", total_steps=12)
    assert [learning_rate(s, cosine) for s in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert learning_rate(8, cosine) == pytest.approx(0.5)
    linear = train_config(lr=1.0, warmup_steps=4, schedule="linear", total_steps=12)
    assert learning_rate(6, linear) == pytest.approx(0.75)
    assert learning_rate(11, linear) == pytest.approx(0.125)
    assert learning_rate(12, linear) == learning_rate(99, cosine) == 0
    assert learning_rate(10**6, train_config(lr=1.0)) == 1.0
    with pytest.raises(ValueError, match="must be more than warmup_steps"):
        train_config(lr=1.0, warmup_steps=8, schedule="linear", total_steps=4)


def test_step_uses_the_rate_of_its_global_step() -> None:
    cfg = train_config(warmup_steps=10, max_grad_norm=0)
    for global_step, rate in ((0, 1e-4), (4, 5e-4)):
        model = tiny_model()
        before = weights_of(model)
        metrics = one_step(model, make_optimizer(model, cfg), step_batch(model), cfg, global_step)
        moved = max(float((v - before[k]).abs().max()) for k, v in model.state_dict().items())
        assert moved == pytest.approx(rate, rel=1e-2)  # the first update of Adam is the rate itself
        assert metrics["lr"] == pytest.approx(rate)


def test_weight_decay_spares_vectors() -> None:
    model = tiny_model()
    optimizer = make_optimizer(model, train_config(weight_decay=0.1))
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    assert {n for n, p in model.named_parameters() if id(p) not in decayed} == {
        n for n, _ in model.named_parameters() if "norm" in n
    }
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))


def test_gradient_clipping_bounds_the_norm_and_reports_it_before() -> None:
    model = tiny_model()
    batch = step_batch(model)
    seen = []
    for limit in (0, 1e-3):
        copied = copy.deepcopy(model)
        optimizer = make_optimizer(copied, train_config())
        optimizer.register_step_pre_hook(
            lambda *_, m=copied: seen.append(torch.cat([p.grad.flatten() for p in m.parameters()]).norm().item())
        )
        metrics = one_step(copied, optimizer, batch, train_config(max_grad_norm=limit))
        assert metrics["grad_norm"] == pytest.approx(seen[0], rel=1e-5)
    assert seen[0] > 0.01
    assert seen[1] == pytest.approx(1e-3, rel=1e-3)


def test_metrics_of_the_first_step_are_those_of_an_unmoved_policy() -> None:
    model = tiny_model()
    batch = step_batch(model)
    optimizer = make_optimizer(model, train_config())
    first = one_step(model, optimizer, batch, train_config(), 0)
    second = one_step(model, optimizer, batch, train_config(), 1)
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
    model = tiny_model()
    optimizer = make_optimizer(model, train_config())
    batch = step_batch(model)
    one_step(model, optimizer, batch, train_config())
    weights, moments = weights_of(model), moments_of(model, optimizer)
    empty = replace(batch, coefficient=[np.zeros(len(c)) for c in batch.coefficient], kept_tokens=0)
    metrics = one_step(model, optimizer, empty, train_config(), 1)
    assert metrics["skipped"] is True
    assert metrics["loss"] is None
    assert same_tensors(weights, weights_of(model))
    assert same_tensors(moments, moments_of(model, optimizer))


def test_step_whose_coefficients_are_all_zero_is_still_a_step() -> None:
    model = tiny_model()
    optimizer = make_optimizer(model, train_config())
    batch = step_batch(model)
    one_step(model, optimizer, batch, train_config())
    weights = weights_of(model)
    zero = replace(batch, coefficient=[np.zeros(len(c)) for c in batch.coefficient])
    metrics = one_step(model, optimizer, zero, train_config(), 1)
    assert metrics["skipped"] is False
    assert metrics["grad_norm"] == 0
    assert not same_tensors(weights, weights_of(model))  # momentum goes on
    assert {float(s["step"]) for s in optimizer.state.values()} == {2.0}


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
    model = tiny_model(dtype=torch.bfloat16)
    with pytest.raises(TrainingError, match=r"master weights are torch.bfloat16"):
        one_step(model, make_optimizer(model, train_config()), step_batch(tiny_model()), train_config())


def test_bfloat16_compute_keeps_masters_and_moments_in_single() -> None:
    model = tiny_model()
    batch = step_batch(model)
    cfg = train_config(compute_dtype="bfloat16", max_grad_norm=0)
    _, exact = gradient_of(copy.deepcopy(model), batch, cfg.model_copy(update={"compute_dtype": "float32"}))
    before = copy.deepcopy(model)
    _, rounded = gradient_of(model, batch, cfg)
    assert rounded.dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not torch.equal(exact, rounded)
    assert torch.cosine_similarity(exact, rounded, dim=0) > 0.98
    assert not same_tensors(weights_of(before), weights_of(model))


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
    batch = step_batch(model)
    results = []
    for checkpointing in (False, True):
        copied = copy.deepcopy(model).train(was_training)
        cfg = train_config(gradient_checkpointing=checkpointing, max_grad_norm=0)
        results.append(gradient_of(copied, batch, cfg))
        assert all(module.training is was_training for module in copied.modules())
        assert copied.config.to_dict() == model.config.to_dict()
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-6)
    assert results[0][0] == pytest.approx(-sum(c.sum() for c in batch.coefficient), rel=1e-3)


@pytest.mark.parametrize("make", [tiny_model, _gpt2, _opt])
def test_gradient_checkpointing_really_recomputes(make: Callable[[], Any]) -> None:
    calls = {}
    for checkpointing in (False, True):
        model = make().eval()
        batch = step_batch(model)
        layer = next(m for m in model.modules() if type(m).__name__ in ("Qwen3MLP", "GPT2MLP", "OPTAttention"))
        count = []
        layer.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        model_cfg = train_config(gradient_checkpointing=checkpointing)
        head, optimizer = head_of(model), make_optimizer(model, model_cfg)
        count.clear()
        train_step(model, head, optimizer, batch, model_cfg, VOCABULARY, 0)
        calls[checkpointing] = len(count)
    assert calls == {False: 1, True: 2}
