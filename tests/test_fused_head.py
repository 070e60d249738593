"""The head's loss and gradient in one pass over the logits equal those of plain full logits, and touch no more."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from fire_data import packing, training
from fire_data.fused_head import head_backward
from fire_data.head import LinearHead, plain_linear
from fire_data.loss import surrogate_loss
from fire_data.models import hidden_states
from fire_data.optim import make_optimizer
from fire_data.vocabulary import Vocabulary
from tests.tinymodels import (
    ORIGINAL,
    SIZE,
    VOCABULARY,
    gradient_of,
    one_step,
    step_batch,
    tiny_model,
    train_config,
    weights_of,
)

T, D, V = 11, 8, 48


def matrix(bias: bool, dtype: torch.dtype = torch.float64) -> nn.Linear:
    torch.manual_seed(1)
    linear = nn.Linear(D, V, bias=bias, dtype=dtype)
    return linear.requires_grad_(True)


def inputs(k: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, ids, old logprobs near the new ones, coefficients; the ids hold repeats and a forbidden one."""
    torch.manual_seed(2)
    hidden_TD, ids_TK = 3 * torch.randn(T, D, dtype=dtype), torch.randint(0, SIZE, (T, k))
    ids_TK[3] = ids_TK[2]
    ids_TK[ids_TK == 7] = 8
    if k > 1:
        ids_TK[4, 1] = 7
    return hidden_TD, ids_TK, -2 - torch.rand(T, k, dtype=dtype), torch.randn(T, k, dtype=dtype)


def plain(head: Callable[[Tensor], Tensor], vocabulary: Vocabulary, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, logprobs and the gradient of the states by autograd over full logits; that of the head is in `.grad`."""
    hidden_TD, ids_TK, old_TK, coefficient_TK = inputs(k)
    hidden_TD.requires_grad_()
    logits_TV = head(hidden_TD)[:, : vocabulary.size].masked_fill(~torch.from_numpy(vocabulary.allowed), -1e300)
    logprob_TK = logits_TV.log_softmax(1).gather(1, ids_TK)
    loss = surrogate_loss(logprob_TK, old_TK, coefficient_TK, dual_clip=3.0)
    loss.backward()
    assert hidden_TD.grad is not None
    return loss.detach(), logprob_TK.detach(), hidden_TD.grad


@pytest.mark.parametrize("linear", [True, False], ids=["one pass", "autograd"])
@pytest.mark.parametrize("budget", [1, 3 * SIZE * 8, 1 << 30])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"bias": True},
        {"factor": 0.3, "divisor": 2.0},
        {"cap": 2.5},
        {"bias": True, "factor": 1.7, "cap": 3.0},
        {"whole": True},
    ],
)
def test_loss_and_gradients_equal_those_of_full_logits(kind: dict[str, Any], k: int, budget: int, linear: bool) -> None:
    kind = dict(kind)
    vocabulary = Vocabulary(V, np.ones(V, dtype=np.bool_)) if kind.pop("whole", False) else VOCABULARY
    expected = matrix(kind.pop("bias", False))
    ours = copy.deepcopy(expected)
    loss, logprob_TK, gradient_TD = plain(LinearHead(expected, **kind), vocabulary, k)
    head = LinearHead(ours, **kind)
    hidden_TD, ids_TK, old_TK, coefficient_TK = inputs(k)
    parts: list[Tensor] = []

    def part(chunk: slice, now_TK: Tensor) -> Tensor:
        parts.append(surrogate_loss(now_TK, old_TK[chunk], coefficient_TK[chunk], dual_clip=3.0))
        return parts[-1]

    other: Callable[[Tensor], Tensor] = head if linear else lambda x: head(x)
    now_TK, found_TD = head_backward(hidden_TD, other, ids_TK, part, vocabulary, budget)
    reached = ids_TK != 7  # plain masks with another number
    torch.testing.assert_close(now_TK[reached], logprob_TK[reached], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.stack(parts).sum(), loss, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found_TD, gradient_TD, rtol=1e-10, atol=1e-12)
    for mine, theirs in zip(ours.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-12)
        assert theirs.grad.abs().max() > 0.01
    assert len(parts) == {1: T, 3 * SIZE * 8: 4, 1 << 30: 1}[budget] or vocabulary.size != SIZE or not linear


class NewTensors(TorchDispatchMode):
    """Counts results of at least so many elements that lie in none of the known places."""

    def __init__(self, elements: int, *known: Tensor) -> None:
        super().__init__()
        self.elements, self.known, self.found = elements, {x.untyped_storage().data_ptr() for x in known}, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_iter(result):
            if isinstance(x, Tensor) and x.numel() >= self.elements:
                self.found += x.untyped_storage().data_ptr() not in self.known
        return result


@pytest.mark.parametrize("linear", [True, False], ids=["one pass", "autograd"])
def test_the_gradient_of_the_head_is_added_where_it_lies_without_a_second_one(linear: bool) -> None:
    weight, (hidden_TD, ids_TK, _, _) = matrix(False), inputs(1)
    head: Callable[[Tensor], Tensor] = LinearHead(weight)
    weight.weight.grad = torch.ones_like(weight.weight)
    place = weight.weight.grad.data_ptr()
    with NewTensors(SIZE * D, weight.weight, weight.weight.grad) as made:
        other = head if linear else lambda x: head(x)
        head_backward(hidden_TD, other, ids_TK, lambda _, x: x.sum(), VOCABULARY, 3 * SIZE * 8)
    assert weight.weight.grad.data_ptr() == place
    assert not torch.equal(weight.weight.grad, torch.ones_like(weight.weight))
    assert (made.found == 0) is linear


def test_single_and_half_precision_stay_near_and_accumulate_in_single() -> None:
    exact = matrix(True)
    _, logprob_TK, gradient_TD = plain(LinearHead(exact), VOCABULARY, 1)
    for compute, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.03)):
        linear = copy.deepcopy(exact).float()
        linear.zero_grad()
        hidden_TD, ids_TK, old_TK, coefficient_TK = inputs(1)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=compute == torch.bfloat16):
            now_TK, found_TD = head_backward(
                hidden_TD.float(), LinearHead(linear), ids_TK,
                lambda s, x, o=old_TK, c=coefficient_TK: surrogate_loss(x, o[s].float(), c[s].float(), dual_clip=3.0),
                VOCABULARY, 1 << 20,
            )  # fmt: skip
        assert now_TK.dtype == found_TD.dtype == linear.weight.grad.dtype == torch.float32
        assert (now_TK - logprob_TK).abs().max() < tolerance
        for mine, theirs in ((found_TD, gradient_TD), (linear.weight.grad, exact.weight.grad)):
            assert (mine - theirs).norm() < 2 * tolerance * theirs.norm()


def test_only_a_plain_matrix_is_taken_the_fast_way() -> None:
    class Adapter(nn.Linear):
        pass

    assert plain_linear(LinearHead(matrix(True))) is not None
    assert plain_linear(lambda x: x) is None
    assert plain_linear(LinearHead(Adapter(D, V))) is None
    hooked = matrix(False)
    hooked.register_forward_hook(lambda *_: None)
    assert plain_linear(LinearHead(hooked)) is None


def test_a_frozen_head_passes_its_gradient_on_and_gets_none() -> None:
    linear, (hidden_TD, ids_TK, _, _) = matrix(True).requires_grad_(False), inputs(1)
    _, found_TD = head_backward(hidden_TD, LinearHead(linear), ids_TK, lambda _, x: x.sum(), VOCABULARY, 1 << 20)
    assert found_TD.abs().max() > 0.01
    assert linear.weight.grad is None
    assert linear.bias.grad is None


# In the step


@pytest.mark.parametrize("tied", [True, False])
def test_embedding_gradients_in_place_are_those_of_autograd(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = train_config(compute_dtype="float64", max_grad_norm=0, tokens_per_microbatch=30)
    model = tiny_model(dtype=torch.float64, tied=tied)
    batch = step_batch(model, noise=0.3)
    loss, gradient = gradient_of(copy.deepcopy(model), batch, cfg)
    monkeypatch.setattr(training, "sparse_embedding_gradient", lambda _: nullcontext())
    other_loss, other = gradient_of(copy.deepcopy(model), batch, cfg)
    assert loss == other_loss
    torch.testing.assert_close(gradient, other, rtol=1e-12, atol=1e-15)
    assert model.get_input_embeddings().sparse is False


def test_head_and_model_see_only_what_a_coefficient_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = train_config(compute_dtype="float64", max_grad_norm=0, tokens_per_microbatch=1)
    model = tiny_model(dtype=torch.float64)
    batch = step_batch(model, noise=0.3)
    random = np.random.default_rng(5)
    keep = [(random.random(len(c)) < 0.5) & (np.arange(len(c)) < 6) for c in batch.coefficient]
    masked = replace(batch, coefficient=[c * k for c, k in zip(batch.coefficient, keep, strict=True)])
    _, expected = _full_rows(copy.deepcopy(model), masked, cfg, monkeypatch)
    positions, widths = [], []
    monkeypatch.setattr(training, "head_backward", lambda *x: positions.append(len(x[2])) or ORIGINAL(*x))
    monkeypatch.setattr(training, "hidden_states", lambda m, i, k: widths.append(i.shape[1]) or hidden_states(m, i, k))
    _, gradient = gradient_of(copy.deepcopy(model), masked, cfg)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-14)
    assert sum(positions) == sum(k.sum() for k in keep)
    last = [len(p) + np.flatnonzero(k)[-1] for p, k in zip(batch.prompt_ids, keep, strict=True) if k.any()]
    assert sorted(widths) == sorted(last)


def test_tokens_without_coefficient_enter_no_statistic_and_may_hold_anything() -> None:
    cfg, model = train_config(max_grad_norm=0), tiny_model()
    batch = step_batch(model, noise=0.3)
    zero = [np.arange(len(c)) % 2 == 1 for c in batch.coefficient]
    coefficient = [np.where(z, 0.0, c) for c, z in zip(batch.coefficient, zero, strict=True)]
    garbage = [np.where(z, np.nan, o) for o, z in zip(batch.old_logprob, zero, strict=True)]
    found = [
        one_step(m, make_optimizer(m, cfg), b, cfg)
        for m, b in (
            (copy.deepcopy(model), replace(batch, coefficient=coefficient)),
            (model, replace(batch, coefficient=coefficient, old_logprob=garbage)),
        )
    ]
    for name in ("loss", "grad_norm", "ratio_mean_abs", "ratio_max", "drift_kl", "clip_fraction", "trained_tokens"):
        assert found[0][name] == found[1][name]
    looked_at = np.concatenate([~z for z in zero])
    assert found[0]["trained_tokens"] == looked_at.sum() < found[0]["tokens"]
    assert found[0]["ratio_mean_abs"] == pytest.approx(0.3 * np.sqrt(2 / np.pi), rel=0.3)


def test_a_step_of_zeros_moves_by_momentum_alone_also_in_an_untied_head() -> None:
    cfg, model = train_config(), tiny_model(tied=False)
    optimizer, batch = make_optimizer(model, cfg), step_batch(model)
    one_step(model, optimizer, batch, cfg)
    before = weights_of(model)
    zero = replace(batch, coefficient=[np.zeros(len(c)) for c in batch.coefficient])
    metrics = one_step(model, optimizer, zero, cfg, 1)
    assert metrics["grad_norm"] == metrics["ratio_mean_abs"] == metrics["trained_tokens"] == 0
    assert all(not torch.equal(before[n], w) for n, w in model.state_dict().items() if n != "lm_head.bias")


# Packing


def test_rows_are_grouped_at_the_least_cost_of_all_runs_by_length() -> None:
    random = np.random.default_rng(0)
    for _ in range(40):
        lengths = np.maximum(1, random.lognormal(3, 1, random.integers(1, 9))).astype(int).tolist()
        budget = int(random.integers(1, 200))
        cost = budget * packing.GROUP_COST

        def price(groups: list[list[int]], lengths: list[int] = lengths, cost: float = cost) -> float:
            return sum(cost + len(g) * max(lengths[i] for i in g) for g in groups)

        order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
        possible = [cut for cut in _runs(order) if all(len(g) == 1 or len(g) * lengths[g[0]] <= budget for g in cut)]
        assert price(packing.micro_batches(lengths, budget)) == pytest.approx(min(map(price, possible)))


def test_lognormal_lengths_are_padded_by_less_than_a_tenth() -> None:
    random = np.random.default_rng(0)
    for _ in range(10):
        lengths = np.maximum(1, random.lognormal(np.log(400), 0.8, 64)).astype(int).tolist()
        groups = packing.micro_batches(lengths, 8192)
        padded = sum(len(g) * max(lengths[i] for i in g) for g in groups)
        assert padded < 1.1 * sum(lengths)


def _runs(order: list[int]) -> list[list[list[int]]]:
    """Every way to cut a list into consecutive, non-empty parts."""
    if not order:
        return [[]]
    return [[order[:i], *rest] for i in range(1, len(order) + 1) for rest in _runs(order[i:])]


def _full_rows(model: Any, batch: Any, cfg: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[float, Tensor]:
    """The same gradient with whole rows going through the model."""
    with monkeypatch.context() as patch:
        whole = lambda b, row, _: len(b.prompt_ids[row]) + len(b.response_ids[row])  # noqa: E731
        patch.setattr(training, "_needed", whole)
        return gradient_of(model, batch, cfg)
