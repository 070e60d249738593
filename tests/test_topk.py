"""The top-k of both models equals a full-logits one, whatever the budget; equals go to the smaller id everywhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from fire_data import scoring
from fire_data.engines import FakeScorer
from fire_data.models import head_of
from fire_data.schemas.tables import ADDONS, EVALUATED, FLOAT_LISTS, IDS, SIGNALS, conform
from fire_data.scoring import TransformersEvaluator, TransformersScorer
from fire_data.signals import chunk_signals, token_signals
from fire_data.topk import best
from fire_data.vocabulary import Vocabulary

from .test_scoring import SIZE, everything, gpt2, plain_logits, qwen, rollouts, vocabulary, within

torch.set_num_threads(1)
TOPK = [c.name for c in ADDONS["topk"]]


def scored(student: Any, teacher: Any, table: pa.Table, k: int = 5, **options: Any) -> dict[str, list[Any]]:
    settings = {"tokens_per_batch": 64, "budget_bytes": 1 << 20, "signals": False} | options
    signals = settings.pop("signals")
    result = TransformersScorer(student, teacher, vocabulary(), **settings).score(table, k=k, signals=signals)
    wanted = (*(SIGNALS if signals else ()), *ADDONS["topk"])
    assert [(f.name, f.type) for f in result.schema] == [(c.name, c.type) for c in wanted]
    return dict(result.to_pydict())


def plain_topk(student_TV: torch.Tensor, teacher_TV: torch.Tensor, k: int) -> dict[str, list[Any]]:
    """The definition, in fp64, from all logits at once."""
    s, t = student_TV.double().log_softmax(1), teacher_TV.double().log_softmax(1)
    students, teachers = s.topk(k, dim=1), t.topk(k, dim=1)
    values = {
        "student_topk_ids": students.indices,
        "student_topk_logprobs": students.values,
        "teacher_topk_ids": teachers.indices,
        "teacher_topk_logprobs": teachers.values,
        "teacher_logprob_on_student_topk": t.gather(1, students.indices),
        "student_logprob_on_teacher_topk": s.gather(1, teachers.indices),
    }
    return {name: value.tolist() for name, value in values.items()}


def assert_close(ours: dict[str, list[Any]], theirs: dict[str, list[Any]]) -> None:
    assert set(ours) == set(theirs) == set(TOPK)
    for name, values in theirs.items():
        for row, (a, b) in enumerate(zip(ours[name], values, strict=True)):
            if name.endswith("_ids"):
                assert a == b, f"{name}, row {row}"
            else:
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=f"{name}, row {row}")


@pytest.mark.parametrize("teacher", [qwen(80, 2, hidden=48), gpt2(53, 2)])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("k", [1, 5, SIZE - 2])
def test_the_topk_equals_that_of_all_logits(teacher: Any, own: bool, k: int) -> None:
    student, table = qwen(64, 1), rollouts(own=own)
    expected: dict[str, list[Any]] = {name: [] for name in TOPK}
    for row in table.to_pylist():
        theirs = row["teacher_prompt_ids"] or row["prompt_ids"]
        logits = (
            plain_logits(student, row["prompt_ids"], row["response_ids"], vocabulary()),
            plain_logits(teacher, theirs, row["response_ids"], vocabulary()),
        )
        for name, values in plain_topk(*logits, k).items():
            expected[name].append(values)
    assert_close(scored(student, teacher, table, k), expected)
    for tokens, budget in ((1, 1), (30, 2000), (10_000, 1 << 30)):
        assert_close(scored(student, teacher, table, k, tokens_per_batch=tokens, budget_bytes=budget), expected)


def test_topk_and_signals_have_the_same_bits_together_as_apart() -> None:
    student, teacher, table = qwen(64, 1).float(), gpt2(53, 2).float(), rollouts(own=True)
    together = scored(student, teacher, table, signals=True)
    assert scored(student, teacher, table) == {name: together[name] for name in TOPK}
    alone = TransformersScorer(student, teacher, vocabulary(), 64, 1 << 20).score(table).to_pydict()
    assert alone == {c.name: together[c.name] for c in SIGNALS}
    firsts = [[ids[0] for ids in row] for row in together["student_topk_ids"]]
    assert firsts == together["student_top1_id"]
    for who in ("student", "teacher"):
        first = [[values[0] for values in row] for row in together[f"{who}_topk_logprobs"]]
        assert first == together[f"{who}_max_logprob"]


def test_a_sampled_token_has_one_logprob_in_all_columns() -> None:
    table = rollouts()
    found = scored(qwen(64, 1), gpt2(53, 2), table, k=20, signals=True)
    seen = 0
    for row, ids in enumerate(table["response_ids"].to_pylist()):
        for at, token in enumerate(ids):
            lists = {name: found[name][row][at] for name in TOPK}
            if token in lists["student_topk_ids"]:
                place, seen = lists["student_topk_ids"].index(token), seen + 1
                assert lists["student_topk_logprobs"][place] == pytest.approx(found["student_logprob"][row][at])
                assert lists["teacher_logprob_on_student_topk"][place] == pytest.approx(
                    found["teacher_logprob"][row][at]
                )
    assert seen > 10


@pytest.mark.parametrize("size", [1, 5, 127, 128, 129, 640, 2600, 5001])
@pytest.mark.parametrize("kind", ["distinct", "ties", "all equal", "low precision"])
def test_the_best_are_those_of_a_stable_sort_so_that_equals_go_to_the_smaller_id(size: int, kind: str) -> None:
    logits_RV = torch.randn(6, size, generator=torch.Generator().manual_seed(size))
    logits_RV = {
        "distinct": logits_RV,
        "ties": (logits_RV * 2).round(),
        "all equal": torch.zeros_like(logits_RV),
        "low precision": logits_RV.bfloat16().float(),
    }[kind]
    for k in {min(k, size) for k in (1, 2, 4, 16, 40)}:
        expected = torch.sort(logits_RV, dim=1, descending=True, stable=True)
        values_RK, ids_RK = best(logits_RV, k)
        assert torch.equal(values_RK, expected.values[:, :k])
        assert torch.equal(ids_RK, expected.indices[:, :k])


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_a_large_vocabulary_in_single_precision_keeps_its_digits(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    student_TV, teacher_TV = (torch.randn(12, 5000, generator=generator) * scale for _ in range(2))
    before = student_TV.clone()
    none = torch.zeros(12, dtype=torch.long)
    found = chunk_signals((student_TV, teacher_TV), none, everything(5000), k=16, signals=False)
    ours = {name: value.tolist() for name, value in found.items()}
    assert_close(ours, plain_topk(student_TV, teacher_TV, 16))
    assert torch.equal(before, student_TV)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_no_logits_exceed_the_budget_for_topk_either(dtype: torch.dtype) -> None:
    student, teacher, budget = qwen(64, 1).to(dtype), gpt2(71, 2).to(dtype), 3000
    student_TD, teacher_TD = torch.randn(45, 32, dtype=dtype), torch.randn(45, 40, dtype=dtype)
    with within(budget, 64, 71, SIZE):
        found = token_signals(
            student_TD, head_of(student), teacher_TD, head_of(teacher), torch.arange(45), vocabulary(), budget,
            k=4, signals=False,
        )  # fmt: skip
    assert {tuple(values.shape) for values in found.values()} == {(45, 4)}


def test_responses_without_tokens_have_empty_lists() -> None:
    table = pa.table({"prompt_ids": pa.array([[1], [2, 3], [4]], IDS), "response_ids": pa.array([[], [5, 6], []], IDS)})
    result = scored(qwen(64, 1), qwen(64, 2), table, k=3)
    assert [[[len(x) for x in v] for v in values] for values in result.values()] == [[[], [3, 3], []]] * len(TOPK)
    assert all(values == [] for values in scored(qwen(64, 1), qwen(64, 2), table.slice(0, 0)).values())
    assert all(values == [[]] for values in scored(qwen(64, 1), qwen(64, 2), table.slice(0, 1)).values())


def test_topk_costs_no_forward_pass_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    plain = scoring.hidden_states
    monkeypatch.setattr(scoring, "hidden_states", lambda *a: calls.append(1) or plain(*a))
    student, teacher, table = qwen(64, 1), qwen(64, 2), rollouts()
    TransformersScorer(student, teacher, vocabulary(), 64, 1 << 20).score(table)
    alone, calls[:] = len(calls), []
    scored(student, teacher, table, signals=True)
    assert len(calls) == alone > 2


def test_reference_logprobs_equal_a_plain_forward_behind_the_students_prompt() -> None:
    model, table = gpt2(53, 4), rollouts(own=True)
    expected = []
    for row in table.to_pylist():
        logprobs = plain_logits(model, row["prompt_ids"], row["response_ids"], vocabulary()).log_softmax(1)
        expected.append(logprobs.gather(1, torch.tensor(row["response_ids"])[:, None])[:, 0].tolist())
    for tokens, budget in ((64, 1 << 20), (1, 1)):
        found = TransformersEvaluator(model, vocabulary(), tokens, budget).evaluate(table)
        expected_columns = [(c.name, c.type) for c in EVALUATED if c.name != "entropy_mass"]
        assert [(f.name, f.type) for f in found.schema] == expected_columns
        for a, b in zip(found["logprob"].to_pylist(), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("k", [1, 4, SIZE - 2])
def test_the_fake_engine_agrees_with_itself(k: int) -> None:
    voc = vocabulary()
    names = [f"t{i}" for i in range(9)]
    table = rollouts().append_column("trajectory_id", pa.array(names))
    found = FakeScorer(voc).score(table, k=k, signals=False)
    assert found.equals(FakeScorer(voc).score(table, k=k).select(TOPK))
    conform(found.append_column("trajectory_id", pa.array(names)), "addons/topk", "x")
    overlap = 0
    for row in found.to_pylist():
        for at in range(len(row["student_topk_ids"])):
            student, teacher = (
                dict(zip(row[f"{w}_topk_ids"][at], row[f"{w}_topk_logprobs"][at], strict=True))
                for w in ("student", "teacher")
            )
            assert len(student) == len(teacher) == k
            assert all(voc.allowed[i] for i in [*student, *teacher])
            for own, other, cross in (
                (student, teacher, row["teacher_logprob_on_student_topk"][at]),
                (teacher, student, row["student_logprob_on_teacher_topk"][at]),
            ):
                assert list(own.values()) == sorted(own.values(), reverse=True)
                assert sum(np.exp(list(own.values()))) <= 1 + 1e-6
                for token, logprob in zip(own, cross, strict=True):
                    overlap += token in other
                    assert logprob == other[token] if token in other else logprob < min(other.values())
    assert overlap
    assert found["student_topk_logprobs"].type == FLOAT_LISTS
    base = FakeScorer(voc).evaluate(table)["logprob"].to_pylist()
    assert [len(x) for x in base] == [len(x) for x in table["response_ids"].to_pylist()]
    assert all(x < 0 for row in base for x in row)


def test_a_forbidden_id_is_never_among_the_best_even_if_all_others_are_wanted() -> None:
    logits_TV, two = torch.tensor([[1.0, 2.0, 3.0]]), Vocabulary(3, np.array([True, True, False]))
    found = chunk_signals((logits_TV, logits_TV), torch.tensor([0]), two, k=2, signals=False)
    assert found["student_topk_ids"].tolist() == found["teacher_topk_ids"].tolist() == [[1, 0]]
    assert found["student_topk_logprobs"].exp().sum().item() == pytest.approx(1.0)
