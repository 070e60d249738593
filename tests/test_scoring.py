"""Scores equal a plain full-logits forward, whatever the batches, padding and memory budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from fire_data import scoring
from fire_data.fused_head import token_logprobs
from fire_data.models import head_of
from fire_data.schemas.errors import DataError, TokenizerError
from fire_data.schemas.tables import FLOAT_SIGNALS, FLOATS, IDS, SIGNALS, SUMMARIES
from fire_data.scoring import TransformersScorer, summarise
from fire_data.signals import chunk_signals, token_signals
from fire_data.vocabulary import Vocabulary

torch.set_num_threads(1)
SIZE = 50  # ids of the tokenizer; the models have more rows
FORBIDDEN = [7, 31]


def vocabulary() -> Vocabulary:
    allowed = np.ones(SIZE, dtype=np.bool_)
    allowed[FORBIDDEN] = False
    return Vocabulary(SIZE, allowed)


def everything(size: int) -> Vocabulary:
    return Vocabulary(size, np.ones(size, dtype=np.bool_))


def qwen(rows: int, seed: int, hidden: int = 32) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=rows,
        hidden_size=hidden,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.3,
    )
    return Qwen3ForCausalLM(config).double().eval()


def gpt2(rows: int, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=rows, n_embd=40, n_layer=2, n_head=4, initializer_range=0.3, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config).double().eval()


def rollouts(number: int = 9, own: bool = False) -> pa.Table:
    """Random ids of many lengths; `own`: every other row has another prompt for the teacher."""
    rng = np.random.default_rng(3)
    ids = [i for i in range(SIZE) if i not in FORBIDDEN]

    def draw(low: int, high: int) -> list[int]:
        return rng.choice(ids, rng.integers(low, high)).tolist()

    columns = {
        "prompt_ids": [draw(1, 9) for _ in range(number)],
        "response_ids": [draw(1, 14) for _ in range(number)],
        "teacher_prompt_ids": [draw(1, 12) if own and i % 2 else None for i in range(number)],
    }
    return pa.table({name: pa.array(values, IDS) for name, values in columns.items()})


def plain_logits(model: PreTrainedModel, prompt: list[int], response: list[int], voc: Vocabulary) -> torch.Tensor:
    """Logits [T, V] that predict the response, from one unpadded full forward; forbidden ids at -inf."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1, : voc.size]
    return logits.double().masked_fill(~torch.from_numpy(voc.allowed), -math.inf)


def plain_signals(student_TV: torch.Tensor, teacher_TV: torch.Tensor, ids_T: torch.Tensor) -> dict[str, list[float]]:
    """The definitions, in fp64, one at a time."""
    s, t = student_TV.double().log_softmax(1), teacher_TV.double().log_softmax(1)

    def mean(of: torch.Tensor, under: torch.Tensor) -> torch.Tensor:
        return torch.where(under > -math.inf, under.exp() * of, 0.0).nan_to_num().sum(1)

    def rank(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return (logits > logits.gather(1, ids[:, None])).sum(1) + 1

    pick = ids_T[:, None]
    values = {
        "student_logprob": s.gather(1, pick)[:, 0],
        "student_entropy": mean(-s, s),
        "teacher_logprob": t.gather(1, pick)[:, 0],
        "teacher_entropy": mean(-t, t),
        "reverse_kl": mean(s - t, s),
        "forward_kl": mean(t - s, t),
        "student_max_logprob": s.amax(1),
        "teacher_max_logprob": t.amax(1),
        "student_top1_id": s.argmax(1),
        "teacher_top1_id": t.argmax(1),
        "student_rank": rank(student_TV, ids_T),
        "teacher_rank": rank(teacher_TV, ids_T),
        "teacher_rank_of_student_top1": rank(teacher_TV, student_TV.argmax(1)),
    }
    return {name: value.tolist() for name, value in values.items()}


def scored(student: PreTrainedModel, teacher: PreTrainedModel, table: pa.Table, **kwargs: Any) -> dict[str, list[Any]]:
    settings = {"tokens_per_batch": 64, "budget_bytes": 1 << 20} | kwargs
    result = TransformersScorer(student, teacher, vocabulary(), **settings).score(table)
    assert result.schema.names == [c.name for c in SIGNALS]
    assert [f.type for f in result.schema] == [c.type for c in SIGNALS]
    return dict(result.to_pydict())


def assert_close(ours: dict[str, list[Any]], theirs: dict[str, list[Any]], tolerance: float = 1e-5) -> None:
    assert set(ours) == set(theirs) == {c.name for c in SIGNALS}
    for name, values in theirs.items():
        for row, (a, b) in enumerate(zip(ours[name], values, strict=True)):
            if name in FLOAT_SIGNALS:
                np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=f"{name}, row {row}")
            else:
                assert a == b, f"{name}, row {row}"


@pytest.mark.parametrize("make_teacher", [lambda: qwen(80, 2, hidden=48), lambda: gpt2(53, 2)])
@pytest.mark.parametrize("own", [False, True])
def test_scores_equal_a_plain_full_forward(make_teacher: Callable[[], PreTrainedModel], own: bool) -> None:
    student, teacher, table = qwen(64, 1), make_teacher(), rollouts(own=own)
    expected: dict[str, list[Any]] = {c.name: [] for c in SIGNALS}
    for row in table.to_pylist():
        prompt, response = row["prompt_ids"], row["response_ids"]
        theirs = row["teacher_prompt_ids"] or prompt
        logits = (
            plain_logits(student, prompt, response, vocabulary()),
            plain_logits(teacher, theirs, response, vocabulary()),
        )
        for name, values in plain_signals(*logits, torch.tensor(response)).items():
            expected[name].append(values)
    assert_close(scored(student, teacher, table), expected)
    assert max(max(row) for row in expected["student_rank"]) > 10
    assert max(max(row) for row in expected["reverse_kl"]) > 0.1


def test_batches_and_budget_do_not_change_scores() -> None:
    student, teacher, table = qwen(64, 1), qwen(80, 2), rollouts(own=True)
    expected = scored(student, teacher, table)
    for tokens, budget in ((1, 1), (30, 2000), (10_000, 1 << 30)):
        assert_close(scored(student, teacher, table, tokens_per_batch=tokens, budget_bytes=budget), expected, 1e-6)


def test_rows_come_back_in_their_order_and_progress_adds_up() -> None:
    student, teacher, table = qwen(64, 1), qwen(64, 2), rollouts()
    order = [4, 0, 8, 2, 6, 1, 7, 3, 5]
    expected = {name: [values[i] for i in order] for name, values in scored(student, teacher, table).items()}
    assert_close(scored(student, teacher, table.take(order)), expected, 1e-6)
    calls: list[int] = []
    TransformersScorer(student, teacher, vocabulary(), 30, 1 << 20).score(table, calls.append)
    assert sum(calls) == len(table)
    assert len(calls) > 3


def test_empty_responses_give_empty_lists() -> None:
    table = pa.table({"prompt_ids": pa.array([[1], [2, 3], [4]], IDS), "response_ids": pa.array([[], [5, 6], []], IDS)})
    result = scored(qwen(64, 1), qwen(64, 2), table)
    assert [[len(v) for v in values] for values in result.values()] == [[0, 2, 0]] * len(SIGNALS)
    nothing = scored(qwen(64, 1), qwen(64, 2), table.slice(0, 0))
    assert all(values == [] for values in nothing.values())


def test_a_response_without_a_prompt_is_refused() -> None:
    table = pa.table({"prompt_ids": pa.array([[1], []], IDS), "response_ids": pa.array([[2], [5, 6]], IDS)})
    with pytest.raises(DataError, match="no prompt token") as caught:
        scored(qwen(64, 1), qwen(64, 2), table)
    assert caught.value.where == "row 1"


def test_a_vocabulary_beyond_the_model_is_refused() -> None:
    table = pa.table({"prompt_ids": pa.array([[1]], IDS), "response_ids": pa.array([[2, 3]], IDS)})
    with pytest.raises(TokenizerError, match="40 output rows"):
        scored(qwen(64, 1), qwen(40, 2), table)


def test_a_model_scored_by_itself_has_no_divergence() -> None:
    model = qwen(64, 1).float()
    result = scored(model, model, rollouts())
    assert result["reverse_kl"] == result["forward_kl"] == [[0.0] * len(r) for r in result["student_rank"]]
    assert result["student_logprob"] == result["teacher_logprob"]
    assert result["student_entropy"] == result["teacher_entropy"]
    assert result["student_rank"] == result["teacher_rank"]
    assert all(rank == 1 for row in result["teacher_rank_of_student_top1"] for rank in row)


def test_padded_and_forbidden_rows_have_no_influence() -> None:
    student, teacher, table = qwen(64, 1), qwen(64, 2), rollouts()
    before = scored(student, teacher, table)
    with torch.no_grad():
        for model in (student, teacher):
            model.lm_head.weight[SIZE:] *= 100
            model.lm_head.weight[FORBIDDEN] *= 100
    assert scored(student, teacher, table) == before


def test_batches_hold_the_token_budget_and_ignore_the_order_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    table, seen = rollouts(12), []
    plain = scoring.hidden_states

    def spy(model: Any, ids_BL: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
        seen.append(ids_BL.tolist())
        return plain(model, ids_BL, mask_BL)

    monkeypatch.setattr(scoring, "hidden_states", spy)
    model = qwen(64, 1)
    before = scored(model, model, table, tokens_per_batch=40)
    batches, seen[:] = seen[:], []
    assert len(batches) > 4
    assert all(len(ids) == 1 or len(ids) * len(ids[0]) <= 40 for ids in batches)
    order = np.random.default_rng(0).permutation(12)
    after = scored(model, model, table.take(pa.array(order)), tokens_per_batch=40)
    assert seen == batches
    assert after == {name: [values[i] for i in order] for name, values in before.items()}


@pytest.mark.parametrize(("size", "scale"), [(60, 1.0), (60, 80.0), (5000, 3.0), (5000, 20.0)])
def test_signals_in_single_precision_keep_their_digits(size: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    student_TV = (torch.randn(12, size, generator=generator) * scale).clamp(-80, 80)
    teacher_TV = (torch.randn(12, size, generator=generator) * scale).clamp(-80, 80)
    teacher_TV[3] = student_TV[3]
    teacher_TV[4] = student_TV[4] + 1e-3 * torch.randn(size, generator=generator)
    student_TV[5] = -80.0
    student_TV[5, 9] = 80.0  # all other probabilities underflow
    student_TV[6], teacher_TV[6] = 2.0, -3.0  # uniform
    ids_T = torch.randint(0, size, (12,), generator=generator)
    before = student_TV.clone()
    found = chunk_signals((student_TV, teacher_TV), ids_T, everything(size))
    ours = {name: [value.tolist()] for name, value in found.items()}
    theirs = {name: [values] for name, values in plain_signals(student_TV, teacher_TV, ids_T).items()}
    assert_close(ours, theirs)
    assert torch.equal(before, student_TV)
    assert min(min(ours[n][0]) for n in ("student_entropy", "reverse_kl", "forward_kl")) >= 0


def test_equal_logits_share_a_rank_and_the_first_is_top() -> None:
    logits = torch.zeros(2, 3000)
    logits[0, [5, 2900]] = 1.0
    logits[1, 2999] = 1.0
    result = chunk_signals((logits, logits), torch.tensor([2900, 0]), everything(3000))
    assert result["student_top1_id"].tolist() == [5, 2999]
    assert result["student_rank"].tolist() == [1, 2]


class LargestTensor(TorchDispatchMode):
    """Remembers the largest float tensor with a vocabulary-sized last dimension that any operation returned, in bytes.

    `weights` are the shapes of transposed output matrices, which are no logits.
    """

    def __init__(self, rows: set[int], weights: set[tuple[int, ...]]) -> None:
        super().__init__()
        self.rows, self.weights, self.bytes = rows, weights, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_iter(result):
            if not isinstance(x, torch.Tensor) or not x.is_floating_point() or tuple(x.shape) in self.weights:
                continue
            if x.ndim and x.shape[-1] in self.rows:
                self.bytes = max(self.bytes, x.numel() * x.element_size())
        return result


@contextmanager
def within(budget: int, *rows: int) -> Iterator[None]:
    with LargestTensor(set(rows), weights={(32, 64), (40, 71)}) as seen:
        yield
    assert budget / 3 < seen.bytes <= budget


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_no_logits_exceed_the_budget(dtype: torch.dtype) -> None:
    student, teacher, voc = qwen(64, 1).to(dtype), gpt2(71, 2).to(dtype), vocabulary()
    heads, ids_T, budget = (head_of(student), head_of(teacher)), torch.arange(45), 3000
    student_TD, teacher_TD = torch.randn(45, 32, dtype=dtype), torch.randn(45, 40, dtype=dtype)
    with within(budget, 64, 71, SIZE):
        token_signals(student_TD, heads[0], teacher_TD, heads[1], ids_T, voc, budget)
    student_TD.requires_grad_()
    with within(budget, 64, SIZE):
        logprobs = token_logprobs(student_TD, heads[0], ids_T, voc, budget)
        logprobs.sum().backward()
    assert student_TD.grad is not None
    assert logprobs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("budget", [1, 2000, 1 << 30])
def test_logprobs_and_their_gradient_equal_the_plain_ones(budget: int) -> None:
    model, voc = qwen(64, 1), vocabulary()
    ids_T, coefficient_T = torch.tensor([1, 6, 8, 49, 3]), torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0], dtype=torch.float64)
    hidden_TD = torch.randn(5, 32, dtype=torch.float64, requires_grad=True)
    weight = model.lm_head.weight

    def gradients(logprob_T: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad((coefficient_T * logprob_T).sum(), [hidden_TD, weight])

    logits = model.lm_head(hidden_TD)[:, :SIZE].masked_fill(~torch.from_numpy(voc.allowed), -math.inf)
    plain = logits.log_softmax(1)[torch.arange(5), ids_T]
    ours = token_logprobs(hidden_TD, head_of(model), ids_T, voc, budget)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(ours), gradients(plain), rtol=1e-12, atol=1e-12)


def test_no_logits_are_kept_for_the_backward_pass() -> None:
    head, kept = head_of(qwen(64, 1)), []
    hidden_TD = torch.randn(5, 32, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        token_logprobs(hidden_TD, head, torch.arange(5), vocabulary(), 1 << 20)
        assert not [shape for shape in kept if len(shape) == 2 and shape[-1] in (SIZE, 64) and shape[0] == 5]
        head(hidden_TD).logsumexp(1)
        assert (5, 64) in kept


def test_logprobs_of_no_tokens_are_empty_and_differentiable() -> None:
    hidden_TD = torch.zeros(0, 32, dtype=torch.float64, requires_grad=True)
    none = torch.zeros(0, dtype=torch.long)
    logprobs = token_logprobs(hidden_TD, head_of(qwen(64, 1)), none, vocabulary(), 1000)
    logprobs.sum().backward()
    assert logprobs.shape == (0,)


def test_summaries_are_sums_and_maxima_of_the_columns() -> None:
    rows = [[-1.5, -0.25, -3.0], [], [-0.1]]
    columns = {
        name: pa.array([[x * (i + 1) for x in row] for row in rows], FLOATS) for i, name in enumerate(FLOAT_SIGNALS)
    }
    table = pa.table({"response_ids": pa.array([[1, 2, 3], [], [4]], IDS), **columns})
    result = summarise(table)
    assert result.column_names == [*table.column_names, *(c.name for c in SUMMARIES)]
    assert [result.schema.field(c.name).type for c in SUMMARIES] == [c.type for c in SUMMARIES]
    assert result["length"].to_pylist() == [3, 0, 1]
    for name in FLOAT_SIGNALS:
        exact = [[float(x) for x in row] for row in table[name].to_pylist()]
        assert result[f"{name}_sum"].to_pylist() == [math.fsum(row) for row in exact]
        assert result[f"{name}_max"].to_pylist() == [max(row, default=None) for row in exact]
    products = [
        math.fsum(a * b for a, b in zip(t, s, strict=True))
        for t, s in zip(table["teacher_entropy"].to_pylist(), table["student_entropy"].to_pylist(), strict=True)
    ]
    assert result["entropy_product_sum"].to_pylist() == products
    sliced = summarise(pa.concat_tables([table.slice(2), table.slice(0, 1)]))
    assert sliced["student_logprob_sum"].to_pylist() == [result["student_logprob_sum"][i].as_py() for i in (2, 0)]
