"""Signals equal their definitions over all logits, whatever the block, tile, thread, precision, ties or infinities."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fire_data import rowsums
from fire_data.head import LinearHead
from fire_data.signals import chunk_signals, model_signals, token_signals
from fire_data.vocabulary import Vocabulary

torch.set_num_threads(1)
Signals = dict[str, torch.Tensor]


def plain(logits: tuple[torch.Tensor, torch.Tensor], ids_T: torch.Tensor, vocabulary: Vocabulary, k: int) -> Signals:
    """The definitions in fp64 on whole rows; 0 log 0 = 0, and an impossible token of the other model costs infinity."""
    forbidden = ~torch.from_numpy(vocabulary.allowed)
    x, y = (z[:, : vocabulary.size].double().masked_fill(forbidden, -math.inf) for z in logits)
    pick = ids_T[:, None]

    def mean(p: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
        return torch.where(p > 0, p * of, 0.0).sum(1)

    def rank(z: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return (z > z.gather(1, ids)).sum(1) + 1

    found: Signals = {"teacher_rank_of_student_top1": rank(y, x.argmax(1, keepdim=True))}
    logs = x.log_softmax(1), y.log_softmax(1)
    for who, z, log_TV, other_TV in (("student", x, *logs), ("teacher", y, *logs[::-1])):
        best = log_TV.sort(dim=1, descending=True, stable=True).indices[:, :k]
        found |= {
            f"{who}_logprob": log_TV.gather(1, pick)[:, 0],
            f"{who}_entropy": mean(log_TV.exp(), -log_TV),
            f"{who}_max_logprob": log_TV.amax(1),
            f"{who}_top1_id": z.argmax(1),
            f"{who}_rank": rank(z, pick),
            f"{who}_topk_ids": best,
            f"{who}_topk_logprobs": log_TV.gather(1, best),
            ("teacher_logprob_on_student_topk", "student_logprob_on_teacher_topk")[who == "teacher"]: other_TV.gather(
                1, best
            ),
            ("reverse_kl", "forward_kl")[who == "teacher"]: mean(log_TV.exp(), log_TV - other_TV),
        }
    return found


def assert_same(ours: Signals, theirs: Signals, tolerance: float) -> None:
    assert set(ours) == set(theirs)
    for name, expected in theirs.items():
        if expected.is_floating_point():
            np.testing.assert_allclose(ours[name].double(), expected.double(), tolerance, tolerance, err_msg=name)
        else:
            assert ours[name].tolist() == expected.tolist(), name


@st.composite
def cases(draw: Any) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor, Vocabulary, int]:
    """Logits of two models with rows beyond the vocabulary, forbidden ids, ties, and tokens that cannot be."""
    size, positions = draw(st.sampled_from([1, 2, 5, 127, 128, 129, 300, 1100])), draw(st.integers(0, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    allowed = torch.rand(size, generator=generator) >= draw(st.sampled_from([0.0, 0.02, 0.7]))
    allowed[draw(st.integers(0, size - 1))] = True
    places = allowed.nonzero()[:, 0]
    ids_T = places[torch.randint(len(places), (positions,), generator=generator)]
    logits = []
    # Not where a probability underflows in fp32 but not in fp64: a divergence is infinite in one of them only.
    impossible = draw(st.booleans())
    for _ in range(2):
        z_TV = torch.randn(positions, size + draw(st.integers(0, 140)), generator=generator, dtype=torch.float64)
        z_TV *= draw(st.sampled_from([0.0, 0.1, 3.0, 6.0 if impossible else 1000.0]))
        if draw(st.booleans()):
            z_TV = z_TV.round()
        z_TV += draw(st.sampled_from([0.0, -1e4, 1e4]))
        if impossible and draw(st.booleans()):  # of some tokens, but never of all
            z_TV[:, torch.rand(z_TV.shape[1], generator=generator) < 0.2] = -math.inf
            z_TV[:, places[-1]] = 0.0
        logits.append(z_TV.to(draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))))
    vocabulary = Vocabulary(size, allowed.numpy())
    return (logits[0], logits[1]), ids_T, vocabulary, draw(st.integers(0, min(3, len(places))))


@settings(max_examples=150)
@given(cases())
def test_signals_equal_their_definitions_on_whole_rows(
    case: tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor, Vocabulary, int],
) -> None:
    logits, ids_T, vocabulary, k = case
    before = [z_TV.clone() for z_TV in logits]
    ours, theirs = chunk_signals(logits, ids_T, vocabulary, k), plain(logits, ids_T, vocabulary, k)
    double = any(z_TV.dtype == torch.float64 for z_TV in logits)
    if k == 0:
        theirs = {name: values for name, values in theirs.items() if "topk" not in name}
    assert_same(ours, theirs, 1e-10 if double else 1e-5)
    assert {x.dtype for x in ours.values() if x.is_floating_point()} == {torch.float64 if double else torch.float32}
    assert all(torch.equal(a, b) for a, b in zip(before, logits, strict=True))
    for who, z_TV in zip(("student", "teacher"), logits, strict=True):
        alone = chunk_signals((z_TV.to(torch.float64 if double else torch.float32),), ids_T, vocabulary)
        for name, values in alone.items():
            expected = theirs[f"{who}_{name}"].double()
            np.testing.assert_allclose(values.double(), expected, 1e-5, 1e-5, err_msg=f"{who}_{name} alone")


def random_case(positions: int = 40, size: int = 3000) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    student_TV, teacher_TV = (torch.randn(positions, size, generator=generator) * 3 for _ in range(2))
    return (student_TV, teacher_TV), torch.randint(size, (positions,), generator=generator)


def everything(size: int) -> Vocabulary:
    return Vocabulary(size, np.ones(size, dtype=np.bool_))


@pytest.mark.parametrize(("block", "tile"), [(1, 1), (1 << 13, 1 << 10), (1 << 15, 1 << 12), (1 << 30, 1 << 30)])
def test_blocks_and_tiles_change_nothing_but_the_last_digits(
    monkeypatch: pytest.MonkeyPatch, block: int, tile: int
) -> None:
    logits, ids_T = random_case()
    expected = chunk_signals(logits, ids_T, everything(3000), k=4)
    monkeypatch.setattr(rowsums, "_BLOCK", block)
    monkeypatch.setattr(rowsums, "_TILE", tile)
    assert_same(chunk_signals(logits, ids_T, everything(3000), k=4), expected, 2e-6)


def test_what_a_gpu_does_in_one_tile_has_the_same_values(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, ids_T = random_case()
    expected = chunk_signals(logits, ids_T, everything(3000), k=4)
    monkeypatch.setattr(rowsums, "_shape", lambda models, positions, width, device: (7, width))
    assert_same(chunk_signals(logits, ids_T, everything(3000), k=4), expected, 2e-6)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    yield torch.set_num_threads
    torch.set_num_threads(1)


@pytest.mark.parametrize("positions", [1, 7, 40])
def test_repetition_changes_no_bit_and_threads_only_the_last_digits(
    positions: int, threads: Callable[[int], None]
) -> None:
    logits, ids_T = random_case(positions, size=60_000)
    expected = chunk_signals(logits, ids_T, everything(60_000), k=4)
    for number in (1, 2, 3):
        threads(number)
        runs = [chunk_signals(logits, ids_T, everything(60_000), k=4) for _ in range(3)]
        assert_same(runs[0], expected, 2e-6)
        for name, values in runs[0].items():
            assert all(torch.equal(values, run[name]) for run in runs[1:]), name


def test_a_failure_in_one_of_several_threads_is_raised(threads: Callable[[int], None]) -> None:
    logits, ids_T = random_case(40, size=60_000)
    ids_T[-1] = 10**9
    threads(2)
    with pytest.raises(RuntimeError, match="index"):
        chunk_signals(logits, ids_T, everything(60_000))


def test_the_nearest_larger_number_counts_as_larger_and_an_equal_one_does_not() -> None:
    logits_TV = torch.full((3, 500), 30.0)
    logits_TV[1, 17] = torch.nextafter(torch.tensor(30.0), torch.tensor(31.0))
    logits_TV[2, [3, 400]] = torch.nextafter(torch.tensor(30.0), torch.tensor(0.0))
    found = chunk_signals((logits_TV, logits_TV), torch.tensor([9, 9, 400]), everything(500))
    assert found["student_rank"].tolist() == found["teacher_rank"].tolist() == [1, 2, 499]
    assert found["student_top1_id"].tolist() == [0, 17, 0]


def test_a_rank_is_exact_for_a_token_from_any_place_of_the_vocabulary() -> None:
    hidden_TD = torch.randn(300, 24, generator=torch.Generator().manual_seed(0))
    weight_VD = torch.randn(5000, 24, generator=torch.Generator().manual_seed(1))
    weight_VD[2500:] = weight_VD[:2500]  # every token has a twin with the same logit
    ids_T = torch.arange(300) * 16
    found = model_signals(hidden_TD, lambda h: h @ weight_VD.T, ids_T, everything(5000), 1 << 30)
    logits_TV = hidden_TD @ weight_VD.T
    expected_T = (logits_TV > logits_TV.gather(1, ids_T[:, None])).sum(1) + 1
    assert found["rank"].tolist() == expected_T.tolist()
    assert (expected_T % 2 == 1).all(), "twins never stand between"
    assert (found["top1_id"] < 2500).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_logits_in_memory_that_is_used_again_give_the_same_signals(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    states = [torch.randn(23, d, generator=generator).to(dtype) for d in (16, 24)]
    heads = [LinearHead(torch.nn.Linear(d, n, bias=False, dtype=dtype)) for d, n in ((16, 700), (24, 650))]
    ids_T, voc = torch.arange(23) * 28, everything(640)
    for budget in (1, 5 * 700 * 8, 1 << 30):  # chunks of one, of a few with a shorter last one, and all at once
        ours = token_signals(states[0], heads[0], states[1], heads[1], ids_T, voc, budget, k=3)
        plain_heads = [lambda x, h=h: h(x) for h in heads]
        expected = token_signals(states[0], plain_heads[0], states[1], plain_heads[1], ids_T, voc, budget, k=3)
        assert_same(ours, expected, 1e-12 if dtype == torch.float64 else 2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_low_precision_get_a_softmax_in_single_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    states = torch.randn(20, 16).to(dtype), torch.randn(20, 24).to(dtype)
    weights = (torch.randn(900, 16) * 0.7).to(dtype), (torch.randn(950, 24) * 0.7).to(dtype)
    ids_T, voc = torch.randint(890, (20,)), everything(890)
    heads = [lambda h, w=w: h @ w.T for w in weights]
    logits = heads[0](states[0]), heads[1](states[1])
    for budget in (1, 1 << 14, 1 << 30):
        ours = token_signals(states[0], heads[0], states[1], heads[1], ids_T, voc, budget)
        if budget == 1 << 30:
            expected = {n: v for n, v in plain(logits, ids_T, voc, 0).items() if "topk" not in n}
            assert_same(ours, expected, 1e-5)
        assert ours["reverse_kl"].dtype == torch.float32


def test_a_logit_that_is_no_number_shows_in_that_row_alone() -> None:
    logits, ids_T = random_case(5)
    logits[0][2, 7] = math.nan
    found = chunk_signals(logits, ids_T, everything(3000))
    assert found["student_logprob"].isnan().tolist() == [False, False, True, False, False]
    assert found["reverse_kl"].isnan().tolist() == [False, False, True, False, False]
    assert not found["teacher_entropy"].isnan().any()
