"""The second stream, a forward KL on the teacher's top-k: the plain formula however the step is cut, only if asked."""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from fire_data import metrics, packing, training
from fire_data.batch import StepBatch
from fire_data.fused_head import token_logprobs
from fire_data.loss import forward_kl_loss
from fire_data.models import head_of, hidden_states
from fire_data.optim import make_optimizer
from fire_data.run import Run, open_run
from fire_data.schemas.errors import DataError, FingerprintError, IncompleteError
from fire_data.schemas.manifest import Manifest, Shard
from fire_data.schemas.tables import ADDONS, FLOAT_LISTS, ID_LISTS, conform
from fire_data.session import Session
from fire_data.shards import read_shard, sealed
from fire_data.stages import Stage, run_stage, set_stage_aside
from fire_data.steps.rollout import rollout
from fire_data.steps.score import score
from fire_data.steps.train import train
from fire_data.stream import step_batches
from tests.test_scoring import LargestTensor
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
    with_budget,
)

Columns = dict[str, Any]
K = 5
COLUMNS = ("prompt_ids", "response_ids", "old_logprob", "coefficient", "fkl_coefficient", "topk_ids", "topk_logprob")
FORBIDDEN = ~torch.tensor(VOCABULARY.allowed)


def plain_distribution(model: Any, prompt: Any, response: Any) -> torch.Tensor:
    """log p of every real id at every response token, [T, V], with gradient."""
    logits = model(torch.tensor(np.concatenate([prompt, response]))[None]).logits[0, len(prompt) - 1 : -1, :SIZE]
    return logits.masked_fill(FORBIDDEN, -torch.inf).log_softmax(-1)


def with_topk(batch: StepBatch, renormalise: bool = True, seed: int = 3) -> StepBatch:
    """The batch with the top-k of another model and, on two tokens of three, a coefficient of the second stream."""
    teacher = tiny_model(seed=1, dtype=torch.float64)
    random = np.random.default_rng(seed)
    coefficients, ids, logprobs = [], [], []
    for prompt, response in zip(batch.prompt_ids, batch.response_ids, strict=True):
        with torch.no_grad():
            top = plain_distribution(teacher, prompt, response).topk(K)
        coefficients.append(random.random(len(response)) / 20 * (random.random(len(response)) < 2 / 3))
        ids.append(top.indices.numpy())
        logprobs.append(top.values.numpy())
    return replace(
        batch, fkl_coefficient=coefficients, topk_ids=ids, topk_logprob=logprobs, fkl_renormalise=renormalise
    )


def exact(**changes: Any) -> Any:
    return train_config(**{"compute_dtype": "float64", "max_grad_norm": 0, "tokens_per_microbatch": 10_000} | changes)


@pytest.fixture
def model() -> Any:
    return tiny_model(dtype=torch.float64)


@pytest.fixture
def batch(model: Any) -> StepBatch:
    return with_topk(step_batch(model, noise=0.3))


# The loss


def some_tokens() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Student logits [6, 11], the teacher's top 4 of them as ids and logprobs, in double precision."""
    generator = torch.Generator().manual_seed(0)
    student_TV = torch.randn(6, 11, dtype=torch.float64, generator=generator, requires_grad=True)
    top = (2 * torch.randn(6, 11, dtype=torch.float64, generator=generator)).log_softmax(1).topk(4)
    return student_TV, top.indices, top.values


def test_the_two_forms_are_a_divergence_and_that_times_the_mass() -> None:
    student_TV, ids_TK, teacher_TK = some_tokens()
    coefficient_T = torch.linspace(0.2, 1.2, 6, dtype=torch.float64)
    logprob_TK = student_TV.log_softmax(1).gather(1, ids_TK)
    mass_T = teacher_TK.exp().sum(1)
    share_TK = teacher_TK.exp() / mass_T[:, None]
    divergence_T = (share_TK * (share_TK.log() - logprob_TK)).sum(1)
    renormalised = forward_kl_loss(logprob_TK, teacher_TK, coefficient_T, renormalise=True)
    as_they_are = forward_kl_loss(logprob_TK, teacher_TK, coefficient_T, renormalise=False)
    assert divergence_T.min() > 0
    assert mass_T.max() < 0.999
    torch.testing.assert_close(renormalised, (coefficient_T * divergence_T).sum())
    torch.testing.assert_close(as_they_are, (coefficient_T * mass_T * (divergence_T + mass_T.log())).sum())
    one, other = (torch.autograd.grad(x, student_TV, retain_graph=True)[0] for x in (renormalised, as_they_are))
    torch.testing.assert_close(other, mass_T[:, None] * one, rtol=1e-10, atol=1e-15)
    expected = coefficient_T[:, None] * student_TV.softmax(1).scatter_add(1, ids_TK, -share_TK)
    torch.testing.assert_close(one, expected, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("renormalise", [True, False])
def test_a_token_with_coefficient_zero_adds_exactly_nothing(renormalise: bool) -> None:
    garbage = [torch.nan, torch.inf, -torch.inf, -1e30]
    now = torch.tensor([[-1.0, -2.0, -1e30, -4.0], garbage, garbage], requires_grad=True)
    teacher = torch.tensor([[-0.5, -1.5, -1e30, -torch.inf], garbage, garbage[::-1]])
    alone = forward_kl_loss(now[:1, :2], teacher[:1, :2], torch.ones(1), renormalise=renormalise)
    loss = forward_kl_loss(now, teacher, torch.tensor([1.0, 0.0, -0.0]), renormalise=renormalise)
    loss.backward()
    assert loss.item() == alone.item()
    assert now.grad.isfinite().all()
    assert now.grad[0, :2].abs().min() > 0.1
    assert not now.grad[0, 2:].any()
    assert not now.grad[1:].any()


def test_the_sum_may_be_cut_anywhere_and_is_taken_in_single_precision_at_least() -> None:
    student_TV, ids_TK, teacher_TK = some_tokens()
    logprob_TK, ones = student_TV.log_softmax(1).gather(1, ids_TK), torch.ones(6, dtype=torch.float64)
    whole = forward_kl_loss(logprob_TK, teacher_TK, ones, renormalise=False)
    cut = sum(
        forward_kl_loss(logprob_TK[s], teacher_TK[s], ones[s], renormalise=False) for s in (slice(2), slice(2, 6))
    )
    torch.testing.assert_close(cut, whole, rtol=1e-12, atol=0)
    rounded = forward_kl_loss(logprob_TK.bfloat16(), teacher_TK.bfloat16(), ones.bfloat16(), renormalise=True)
    assert rounded.dtype == torch.float32
    assert forward_kl_loss(logprob_TK[:0], teacher_TK[:0], ones[:0], renormalise=True) == 0


def test_shapes_that_do_not_fit_are_refused() -> None:
    two = (3, 2)
    for now, teacher, coefficient in [(two, two, two), (two, two, (1,)), (two, (3, 1), (3,)), ((3,), (3,), (3,))]:
        with pytest.raises(DataError, match=re.escape(f"have shapes {now}, {teacher}, {coefficient}")):
            forward_kl_loss(torch.zeros(now), torch.zeros(teacher), torch.zeros(coefficient), renormalise=True)


# Logprobs of several ids per position


@pytest.mark.parametrize("budget", [1, 2000, 1 << 30])
def test_logprobs_of_several_ids_equal_the_plain_ones_for_one_pass_over_the_head(model: Any, budget: int) -> None:
    hidden_TD = torch.randn(5, 32, dtype=torch.float64, requires_grad=True)
    ids_TK = torch.tensor([[1, 6, 1], [8, 39, 0], [3, 3, 3], [5, 4, 2], [9, 8, 0]])
    factor_TK = torch.linspace(-1, 2, 15, dtype=torch.float64).reshape(5, 3)
    calls: list[int] = []

    def head(x_TD: torch.Tensor) -> torch.Tensor:
        calls.append(len(x_TD))
        return head_of(model)(x_TD)

    def gradients(logprob_TK: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad((factor_TK * logprob_TK).sum(), [hidden_TD, model.lm_head.weight])

    plain = model.lm_head(hidden_TD)[:, :SIZE].masked_fill(FORBIDDEN, -torch.inf).log_softmax(1).gather(1, ids_TK)
    ours = token_logprobs(hidden_TD, head, ids_TK, VOCABULARY, budget)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(ours), gradients(plain), rtol=1e-12, atol=1e-12)
    assert sum(calls) == 2 * 5  # forward, and again in the backward pass
    single = token_logprobs(hidden_TD, head, ids_TK[:, 0], VOCABULARY, budget)
    assert torch.equal(single, ours[:, 0])
    assert token_logprobs(hidden_TD[:0], head, ids_TK[:0], VOCABULARY, budget).shape == (0, 3)


# The step


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("mixed", [True, False])
def test_step_equals_the_plain_computation(model: Any, batch: StepBatch, renormalise: bool, mixed: bool) -> None:
    batch = replace(batch, fkl_renormalise=renormalise)
    if not mixed:
        batch = replace(batch, coefficient=[np.zeros(len(c)) for c in batch.coefficient])
    plain = copy.deepcopy(model)
    surrogate, fkl = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for p, r, old, c, f, ids, logprob in zip(*(getattr(batch, name) for name in COLUMNS), strict=True):
        now_TV = plain_distribution(plain, p, r)
        q_TK = torch.tensor(logprob).exp()
        q_TK = q_TK / q_TK.sum(1, keepdim=True) if renormalise else q_TK
        terms_TK = q_TK * (q_TK.log() - now_TV.gather(1, torch.tensor(ids)))
        fkl = fkl + (torch.tensor(f) * terms_TK.sum(1)).sum()
        ratio, c_T = (now_TV[torch.arange(len(r)), torch.tensor(r)] - torch.tensor(old)).exp(), torch.tensor(c)
        surrogate = surrogate + torch.maximum(-c_T * ratio, -c_T * ratio.clamp(0.8, 1.2)).sum()
    (surrogate + fkl).backward()
    expected = torch.cat([p.grad.flatten() for p in plain.parameters()])
    cfg = exact(tokens_per_microbatch=40)
    loss, gradient = gradient_of(copy.deepcopy(model), batch, cfg)
    assert loss == pytest.approx((surrogate + fkl).item(), rel=1e-9)
    torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-12)
    found = one_step(model, make_optimizer(model, cfg), batch, cfg)
    assert found["fkl_loss"] == pytest.approx(fkl.item(), rel=1e-9)
    assert abs(found["fkl_loss"]) > 0.1
    assert (found["loss"] == found["fkl_loss"]) is not mixed


def padded_wider(rows: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    ids_BL, mask_BL = packing.pad(rows)
    wider = (0, 64 - ids_BL.shape[1])
    ids_BL = torch.nn.functional.pad(ids_BL.masked_fill(~mask_BL, 11), wider, value=11)
    return ids_BL, torch.nn.functional.pad(mask_BL, wider)


@pytest.mark.parametrize("case", ["alone", "a few", "shuffled", "padded", "checkpointed", "lists", "small chunks"])
@pytest.mark.parametrize("renormalise", [True, False])
def test_step_does_not_depend_on_how_it_is_cut(
    model: Any, batch: StepBatch, case: str, renormalise: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, batch = exact(), replace(batch, fkl_renormalise=renormalise)
    loss, gradient = gradient_of(copy.deepcopy(model), batch, cfg)
    lengths = [len(p) + len(r) for p, r in zip(batch.prompt_ids, batch.response_ids, strict=True)]
    if case in ("alone", "a few"):
        budget, groups = {"alone": (1, 8), "a few": (3 * max(lengths), 6)}[case]
        assert len(packing.micro_batches(lengths, budget)) == groups
        cfg = exact(tokens_per_microbatch=budget)
    elif case == "shuffled":
        order = np.random.default_rng(3).permutation(len(lengths))
        batch = replace(batch, **{c: [getattr(batch, c)[i] for i in order] for c in COLUMNS})
        cfg = exact(tokens_per_microbatch=30)
    elif case == "padded":
        monkeypatch.setattr(training, "pad", padded_wider)
    elif case == "checkpointed":
        cfg = exact(gradient_checkpointing=True)
    elif case == "lists":
        batch = replace(batch, **{c: [x.tolist() for x in getattr(batch, c)] for c in COLUMNS})
    else:
        monkeypatch.setattr(training, "head_backward", with_budget(3 * SIZE * 8))
    other_loss, other_gradient = gradient_of(copy.deepcopy(model), batch, cfg)
    assert other_loss == pytest.approx(loss, rel=1e-6)
    assert (other_gradient - gradient).norm() <= 1e-6 * gradient.norm()
    assert gradient.norm() > 1e-3


@pytest.mark.parametrize("renormalise", [True, False])
def test_candidates_of_tokens_without_coefficient_may_hold_anything(
    model: Any, batch: StepBatch, renormalise: bool
) -> None:
    cfg, batch = exact(tokens_per_microbatch=40), replace(batch, fkl_renormalise=renormalise)
    unused = [np.asarray(f) == 0 for f in batch.fkl_coefficient or ()]
    assert sum(u.sum() for u in unused) > 5
    ids, logprobs = (copy.deepcopy(c) for c in (batch.topk_ids, batch.topk_logprob))
    for i, u in enumerate(unused):
        ids[i][u] = np.array([10**9, -1, SIZE, 7, 0])
        logprobs[i][u] = np.array([np.nan, np.inf, -1e30, 4.0, -np.inf])
    expected = gradient_of(copy.deepcopy(model), batch, cfg)
    loss, gradient = gradient_of(copy.deepcopy(model), replace(batch, topk_ids=ids, topk_logprob=logprobs), cfg)
    assert loss == expected[0]
    assert torch.equal(gradient, expected[1])


def test_a_stream_of_zeros_changes_nothing_and_asks_the_head_for_no_candidate(
    model: Any, batch: StepBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths: list[int] = []
    monkeypatch.setattr(training, "head_backward", lambda *x: widths.append(x[2].shape[1]) or ORIGINAL(*x))
    cfg, without = exact(tokens_per_microbatch=1), step_batch(model, noise=0.3)
    zeros = replace(batch, fkl_coefficient=[np.zeros(len(c)) for c in batch.coefficient])
    expected = gradient_of(copy.deepcopy(model), without, cfg)
    loss, gradient = gradient_of(copy.deepcopy(model), zeros, cfg)
    assert loss == expected[0]
    assert torch.equal(gradient, expected[1])
    assert set(widths) == {1}
    found = [one_step(m, make_optimizer(m, cfg), b, cfg) for m, b in ((copy.deepcopy(model), without), (model, zeros))]
    assert found[1].keys() - found[0].keys() == {"fkl_loss"}
    assert found[1]["fkl_loss"] == 0
    widths.clear()
    one_row = replace(batch, fkl_coefficient=[c * (i == 4) for i, c in enumerate(batch.fkl_coefficient or ())])
    gradient_of(model, one_row, cfg)
    assert sorted(widths) == [1] * 7 + [1 + K]


def test_rows_of_either_stream_go_through_the_model_and_no_others(
    model: Any, batch: StepBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = {0, 2, 3}, {3, 6}
    coefficient = [c * (i in first) for i, c in enumerate(batch.coefficient)]
    fkl = [np.full(len(c), 0.01 * (i in second)) for i, c in enumerate(batch.coefficient)]
    batch, cfg = replace(batch, coefficient=coefficient, fkl_coefficient=fkl), exact()
    kept = sorted(first | second)
    alone = replace(batch, kept_tokens=1, **{c: [getattr(batch, c)[i] for i in kept] for c in COLUMNS})
    _, expected = gradient_of(copy.deepcopy(model), alone, cfg)
    rows: list[int] = []
    monkeypatch.setattr(training, "hidden_states", lambda m, i, k: rows.append(len(i)) or hidden_states(m, i, k))
    _, gradient = gradient_of(model, batch, cfg)
    assert sum(rows) == 4
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("renormalise", [True, False])
def test_the_second_stream_alone_brings_the_student_to_the_teacher(renormalise: bool) -> None:
    model = tiny_model()
    batch = with_topk(step_batch(model), renormalise)
    zeros = [np.zeros(len(c)) for c in batch.coefficient]
    tokens = sum(map(len, batch.response_ids))
    batch = replace(batch, coefficient=zeros, fkl_coefficient=[np.full(len(c), 1 / tokens) for c in zeros])
    optimizer, cfg = make_optimizer(model, train_config()), train_config()
    found = [one_step(model, optimizer, batch, cfg, step) for step in range(4)]
    losses = [f["fkl_loss"] for f in found]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] - losses[-1] > 0.02
    assert all(f["loss"] == f["fkl_loss"] for f in found)
    assert found[-1]["clip_fraction"] == 0


def test_bfloat16_compute_keeps_the_direction(batch: StepBatch) -> None:
    model = tiny_model()
    single = exact(compute_dtype="float32")
    _, plain = gradient_of(copy.deepcopy(model), batch, single)
    loss, rounded = gradient_of(model, batch, exact(compute_dtype="bfloat16"))
    assert np.isfinite(loss)
    assert rounded.dtype == torch.float32
    assert torch.cosine_similarity(plain, rounded, dim=0) > 0.98


def test_no_logits_of_a_step_exceed_the_budget(batch: StepBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    config, budget = tiny_model().config, 3000
    config.intermediate_size = 20  # so that only logits are as wide as the vocabulary
    model = type(tiny_model())(config).double()
    rows = tuple(model.lm_head.weight.shape)
    monkeypatch.setattr(training, "head_backward", with_budget(budget))
    with LargestTensor({SIZE, rows[0]}, weights={rows, rows[::-1], (rows[1], SIZE)}) as seen:
        training._accumulate(model, head_of(model), batch, exact(), VOCABULARY)
    assert budget / 3 < seen.bytes <= budget
    assert model.lm_head.weight.grad.abs().max() > 0


def test_a_step_without_a_kept_token_is_skipped_in_both_streams(batch: StepBatch) -> None:
    zeros = [np.zeros(len(c)) for c in batch.coefficient]
    model = tiny_model()
    weights = weights_of(model)
    empty = replace(batch, coefficient=zeros, fkl_coefficient=zeros, kept_tokens=0)
    found = one_step(model, make_optimizer(model, train_config()), empty, train_config())
    assert found["skipped"] is True
    assert found["fkl_loss"] is None
    assert all(torch.equal(weights[name], x) for name, x in model.state_dict().items())


# What is refused


def test_candidates_the_student_cannot_learn_are_refused_by_row_and_token(model: Any, batch: StepBatch) -> None:
    ones = replace(batch, fkl_coefficient=[np.ones(len(c)) for c in batch.coefficient])
    for wrong, message in ((SIZE, "outside the vocabulary of 40"), (-1, "outside"), (7, "not every model")):
        ids = copy.deepcopy(ones.topk_ids)
        ids[3][2, 1] = wrong
        with pytest.raises(DataError, match=message) as caught:
            gradient_of(copy.deepcopy(model), replace(ones, topk_ids=ids), exact(tokens_per_microbatch=1))
        assert f"is id {wrong}," in caught.value.what
        assert caught.value.where == "step 0, row 3, token 2"
        assert "--add topk" in str(caught.value.fix)
    logprobs = copy.deepcopy(ones.topk_logprob)
    logprobs[3][2, 1] = -1e30  # an id no model can give and that the teacher gives no probability fills the list
    loss, gradient = gradient_of(model, replace(ones, topk_ids=ids, topk_logprob=logprobs), exact())
    assert np.isfinite(loss)
    assert gradient.isfinite().all()


def test_rows_that_do_not_fit_together_are_refused() -> None:
    good: dict[str, Any] = {
        "step": 4, "prompt_ids": [[3], [4]], "response_ids": [[5, 6], [8]], "old_logprob": [[-1, -1], [-1]],
        "coefficient": [[0, 0], [0]], "kept_tokens": 3, "fkl_coefficient": [[0.1, 0], [0]],
        "topk_ids": [[[1, 2], [3, 4]], [[5, 6]]], "topk_logprob": [[[-1, -2], [-1, -2]], [[-1, -2]]],
        "fkl_renormalise": False,
    }  # fmt: skip
    StepBatch(**good)
    for change, message in [
        ({"fkl_coefficient": [[0.1, 0], [0, 0]]}, "fkl_coefficient has 2 elements where response_ids has 1\n.*row 1"),
        ({"fkl_coefficient": [[0.1, 0]]}, "fkl_coefficient has 1 rows"),
        ({"topk_ids": [[[1, 2], [3, 4]]]}, "topk_ids has 1 rows"),
        ({"topk_ids": [[[1, 2]], [[5, 6]]]}, "topk_ids has 1 elements where response_ids has 2\n.*row 0"),
        ({"topk_logprob": [[[-1, -2], [-1]], [[-1, -2]]]}, "topk_logprob has 1 candidates, not 2.*\n.*row 0, token 1"),
        ({"topk_ids": [np.ones((2, 3)), np.ones((1, 3))]}, "topk_logprob has 2 candidates, not 3"),
        ({"topk_ids": [[[], []], [[]]]}, "has 0 candidates"),
        ({"topk_ids": None}, "needs topk_ids as well"),
        ({"fkl_renormalise": None}, "needs fkl_renormalise as well"),
        ({"fkl_coefficient": None}, "needs fkl_coefficient as well"),
        ({"kept_tokens": 0}, "no token is kept"),
    ]:
        with pytest.raises(DataError, match=message):
            StepBatch(**{**good, **change})


# Through a run directory: three shards of four rows, three steps of at most five


@pytest.fixture(scope="module")
def scored_once(tmp_path_factory: pytest.TempPathFactory, make_run: Callable[..., Run]) -> Path:
    """A run with sealed scores of real models, which trains weights made by hand."""
    run = make_run(tmp_path_factory.mktemp("scored") / "run", train={"weights": "handmade", "batch_size": 5})
    rollout(Session(run), 0)
    score(Session(run), 0)
    return run.root


@pytest.fixture
def scored(tmp_path: Path, scored_once: Path) -> Run:
    shutil.copytree(scored_once, tmp_path / "run")
    return open_run(tmp_path / "run")


def make_beside(run: Run, stage: str, fields: Columns, columns: Callable[[int, pa.Table], Columns]) -> Manifest:
    """A sealed stage beside the scores; `columns` makes those of a shard from its first row and the scores there."""
    part, scores_part = run.part(stage, 0, "topk" if stage == "addons" else None), run.part("scores", 0)
    scores = sealed(scores_part)
    receipts = {r.shard: r for r in scores.shards}

    def make(shard: Shard) -> pa.Table:
        table = read_shard(scores_part, receipts[shard.name])
        made = pa.table({"trajectory_id": table["trajectory_id"], **columns(shard.start, table)})
        return conform(made, "addons/topk" if stage == "addons" else stage, "a test")

    plan = tuple(Shard(name=name, start=4 * i, stop=4 * i + 4) for i, name in enumerate(receipts))
    steps = [{"step": i, "kept_tokens": 1} for i in range(3)]
    return run_stage(
        Stage(part, {**scores.fields, "scores": scores.digest, **fields}, plan), make, lambda _: {"steps": steps}
    )


def make_weights(run: Run, renormalise: bool | None, column: bool) -> Manifest:
    """Weights as a rule writes them, with or without a coefficient of the second stream."""

    def columns(start: int, table: pa.Table) -> Columns:
        random, lengths = np.random.default_rng(start), lengths_of(table)
        ones = [[1.0] * n for n in lengths]
        made: Columns = {"step": [i // 5 for i in range(start, start + 4)], "keep": [True] * 4}
        made |= {"drop_reason": pa.nulls(4, pa.string()), "weight": ones, "advantage": ones}
        made["coefficient"] = [list(random.standard_normal(n) / 50) for n in lengths]
        fkl = [list(random.random(n) / 20 * (random.random(n) < 0.5)) for n in lengths]
        return made | ({"fkl_coefficient": fkl} if column else {})

    return make_beside(run, "weights", {"batch_size": 5, "fkl_renormalise": renormalise}, columns)


def make_topk(
    run: Run, fields: Columns | None = None, seed: int = 0, change: Callable[[Columns], Columns] = lambda made: made
) -> Manifest:
    """A top-k addon with any ids of the vocabulary and probabilities that sum to 0.9."""
    allowed = np.flatnonzero(Session(run).vocabulary.allowed)

    def columns(start: int, table: pa.Table) -> Columns:
        random, lengths = np.random.default_rng([seed, start]), lengths_of(table)
        ids = [[list(random.choice(allowed, K, replace=False)) for _ in range(n)] for n in lengths]
        logprobs = [np.log(0.9 * np.sort(random.dirichlet(np.ones(K), n))[:, ::-1]).tolist() for n in lengths]
        both = {"ids": pa.array(ids, ID_LISTS), "logprobs": pa.array(logprobs, FLOAT_LISTS)}
        return change({c.name: both["ids" if c.type == ID_LISTS else "logprobs"] for c in ADDONS["topk"]})

    return make_beside(run, "addons", {"seed": seed, **(fields or {})}, columns)


def lengths_of(table: pa.Table) -> list[int]:
    return [len(x) for x in table["response_ids"].to_pylist()]


def streamed(run: Run, first_step: int = 0) -> list[StepBatch]:
    parts = run.part("scores", 0), run.part("weights", 0), run.part("addons", 0, "topk")
    scores, weights, topk = ((part, sealed(part)) for part in parts)
    return list(step_batches(scores, weights, first_step, topk))


@pytest.mark.parametrize("renormalise", [True, False])
def test_a_round_is_trained_with_the_top_k_of_its_own_tokens(scored: Run, renormalise: bool) -> None:
    make_weights(scored, renormalise, column=True)
    topk = make_topk(scored)
    session = Session(scored)
    student = copy.deepcopy(session.student(0)).double()
    manifest = train(session, 0)
    assert manifest.fields["inputs"]["topk"] == topk.digest
    log = metrics.read(scored.root / "metrics.jsonl")
    assert [r["step"] for r in log] == [0, 1, 2]
    assert manifest.stats["fkl_loss_last"] == log[-1]["fkl_loss"]

    tables = [pa.concat_tables(read_shard(p, r) for r in sealed(p).shards) for p in parts_of(scored)]
    rows = zip(*(tables[i][name].to_pylist()[:5] for i, names in enumerate(READ) for name in names), strict=True)
    forbidden, size = ~torch.tensor(session.vocabulary.allowed), session.vocabulary.size
    fkl = surrogate = 0.0
    for prompt, response, coefficient, fkl_coefficient, ids, logprobs in rows:
        with torch.no_grad():
            logits = student(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1, :size]
        now_TV = logits.masked_fill(forbidden, -torch.inf).log_softmax(-1)
        q_TK = torch.tensor(logprobs).double().exp() / (0.9 if renormalise else 1.0)
        terms_T = (q_TK * (q_TK.log() - now_TV.gather(1, torch.tensor(ids)))).sum(1)
        fkl += float((torch.tensor(fkl_coefficient) * terms_T).sum())
        surrogate -= sum(coefficient)
    assert log[0]["fkl_loss"] == pytest.approx(fkl, rel=1e-4)
    assert log[0]["loss"] == pytest.approx(fkl + surrogate, rel=1e-4)
    assert abs(fkl) > 1


READ = (
    ("prompt_ids", "response_ids"),
    ("coefficient", "fkl_coefficient"),
    ("teacher_topk_ids", "teacher_topk_logprobs"),
)


def parts_of(run: Run) -> list[Any]:
    return [run.part("scores", 0), run.part("weights", 0), run.part("addons", 0, "topk")]


def test_weights_without_a_second_stream_read_no_top_k(scored: Run) -> None:
    make_weights(scored, None, column=False)
    make_topk(scored)
    for path in scored.part("addons", 0, "topk").folder.iterdir():
        path.unlink()
    manifest = train(Session(scored), 0)
    assert manifest.fields["inputs"].keys() == {"scores", "weights"}
    assert not [key for record in metrics.read(scored.root / "metrics.jsonl") for key in record if "fkl" in key]
    assert not [key for key in manifest.stats if "fkl" in key]


def test_steps_from_the_middle_are_the_steps_of_the_whole(scored: Run) -> None:
    make_weights(scored, True, column=True)
    make_topk(scored)
    whole = streamed(scored)
    assert [len(b.response_ids) for b in whole] == [5, 5, 2]
    for first in (1, 2):
        for mine, theirs in zip(streamed(scored, first), whole[first:], strict=True):
            for name in COLUMNS:
                pairs = zip(getattr(mine, name), getattr(theirs, name), strict=True)
                assert all(np.array_equal(a, b) for a, b in pairs), name
    assert {x.shape[1] for b in whole for x in b.topk_ids or ()} == {K}


def test_a_missing_top_k_names_the_command_that_adds_it(scored: Run) -> None:
    make_weights(scored, True, column=True)
    with pytest.raises(IncompleteError, match="forward-KL term on the teacher's top-k") as caught:
        train(Session(scored), 0)
    assert caught.value.fix == f"fire score {scored.root} --round 0 --add topk"


def test_another_top_k_under_a_trained_checkpoint_is_refused(scored: Run) -> None:
    make_weights(scored, True, column=True)
    make_topk(scored)
    train(Session(scored), 0)
    set_stage_aside(scored.part("addons", 0, "topk"))
    make_topk(scored, seed=1)
    with pytest.raises(FingerprintError, match=r"inputs\.topk"):
        train(Session(scored), 0)


def test_the_top_k_of_another_teacher_is_refused(scored: Run) -> None:
    make_weights(scored, True, column=True)
    mine = sealed(scored.part("scores", 0)).fields["teachers"]["teacher"]
    make_topk(scored, {"teachers": {"teacher": {**mine, "weights": "others"}}})
    with pytest.raises(FingerprintError, match=r"teacher\.weights: .* -> \"others\"") as caught:
        train(Session(scored), 0)
    assert caught.value.fix == f"fire score {scored.root} --round 0 --add topk --redo"


def test_a_top_k_about_other_trajectories_is_refused(scored: Run) -> None:
    make_weights(scored, True, column=True)
    ids = read_shard(scored.part("scores", 0), sealed(scored.part("scores", 0)).shards[0])["trajectory_id"]
    make_topk(scored, change=lambda made: made | {"trajectory_id": ids.take([1, 0, 2, 3])})
    with pytest.raises(DataError, match="addons and scores are about different trajectories"):
        train(Session(scored), 0)


@pytest.mark.parametrize("renormalise", [True, None])
def test_a_second_stream_that_is_half_there_is_refused(scored: Run, renormalise: bool | None) -> None:
    make_weights(scored, renormalise, column=renormalise is None)
    make_topk(scored)
    with pytest.raises(DataError, match="fkl_renormalise in the manifest") as caught:
        train(Session(scored), 0)
    assert "shard 00000" in str(caught.value.where)
