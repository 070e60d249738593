"""Promises of the generator: a sample is its own, exactly the model's distribution, whoever shares the batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from scipy import stats
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.cache_utils import DynamicCache

from fire_data import generate
from fire_data.generate import Sample, TransformersGenerator, admit
from fire_data.kvcache import RoomyLayer
from fire_data.sampling import Sampling
from fire_data.schemas.errors import DataError, EngineError
from fire_data.vocabulary import Vocabulary, mask_logits

VOCAB = 60
STOPS = frozenset({3, 4})
FAMILIES = ["qwen3", "llama", "gpt2", "mistral-window"]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def tiny(family: str = "qwen3", dtype: torch.dtype = torch.float64, sharpness: float = 3.0) -> PreTrainedModel:
    """A random model whose next-token distributions are neither flat nor certain."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    common = {**sizes, "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 128}
    model: PreTrainedModel
    if family == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**common, head_dim=8))
    elif family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**common))
    elif family == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=128))
    else:
        model = MistralForCausalLM(MistralConfig(**common, sliding_window=6))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "wpe" not in name:
                weight.normal_(0, sharpness / 32**0.5)
    return model.to(dtype).eval()


def vocabulary(forbidden: tuple[int, ...] = (0, 1)) -> Vocabulary:
    allowed = np.ones(VOCAB - 2, dtype=bool)
    allowed[list(forbidden)] = False
    return Vocabulary(VOCAB - 2, allowed)


def prompts(count: int, seed: int = 0) -> list[np.ndarray]:
    """Prompts of 1 to 15 tokens, each one twice."""
    rng = np.random.default_rng(seed)
    distinct = [rng.integers(2, VOCAB - 2, rng.integers(1, 16)) for _ in range((count + 1) // 2)]
    return [prompt for prompt in distinct for _ in range(2)][:count]


def table(names: list[str], asked: list[np.ndarray]) -> pa.Table:
    ids = pa.array([prompt.tolist() for prompt in asked], type=pa.list_(pa.int32()))
    return pa.table({"trajectory_id": names, "prompt_ids": ids})


def names(count: int) -> list[str]:
    return [f"trajectory-{i}" for i in range(count)]


def engine(model: PreTrainedModel, rows: int, stops: frozenset[int] = STOPS) -> TransformersGenerator:
    return TransformersGenerator(model, vocabulary(), stops, rows)


def full_logprobs(model: PreTrainedModel, prompt: np.ndarray, response: np.ndarray) -> torch.Tensor:
    """Log-softmax over the vocabulary at every response position, from one plain forward: [n, V]."""
    ids = torch.as_tensor(np.concatenate([prompt, response]))[None]
    with torch.inference_mode():
        logits_LV = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
    return mask_logits(logits_LV, vocabulary()).log_softmax(dim=-1)


def picked(model: PreTrainedModel, prompt: np.ndarray, response: np.ndarray) -> np.ndarray:
    """Logprob of every response token, from one plain forward: [n]."""
    return full_logprobs(model, prompt, response)[torch.arange(len(response)), response].numpy()


def assert_same(one: Sample, other: Sample, tolerance: float = 1e-9) -> None:
    assert one.ids.tolist() == other.ids.tolist()
    assert one.finish_reason == other.finish_reason
    np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_sample_does_not_depend_on_its_neighbours(family: str) -> None:
    model, asked, sampling = tiny(family), prompts(65), Sampling(seed=11, max_new_tokens=24)
    together = {rows: engine(model, rows).samples(names(65), asked, sampling) for rows in (3, 64)}
    lengths = {len(sample.ids) for sample in together[64]}
    assert len(lengths) > 8, "rows have to leave at different times for this test to mean anything"
    for i in range(0, 65, 4):
        [alone] = engine(model, 1).samples([names(65)[i]], [asked[i]], sampling)
        for rows in together:
            assert_same(together[rows][i], alone)


@pytest.mark.parametrize("family", FAMILIES)
def test_rollout_logprob_equals_a_plain_full_forward(family: str) -> None:
    model, asked = tiny(family), prompts(20)
    samples = engine(model, 7).samples(names(20), asked, Sampling(2, max_new_tokens=20))
    for prompt, sample in zip(asked, samples, strict=True):
        np.testing.assert_allclose(sample.logprobs, picked(model, prompt, sample.ids), rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers_generate(family: str) -> None:
    model, asked = tiny(family), prompts(24)
    everything = Vocabulary(VOCAB, np.ones(VOCAB, dtype=bool))
    ours = TransformersGenerator(model, everything, STOPS, 5).samples(
        names(24), asked, Sampling(0, max_new_tokens=16, greedy=True)
    )
    for prompt, sample in zip(asked, ours, strict=True):
        ids = torch.as_tensor(prompt)[None]
        theirs = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=16,
            eos_token_id=sorted(STOPS),
            pad_token_id=0,
        )
        assert sample.ids.tolist() == theirs[0, len(prompt) :].tolist()


def test_first_tokens_pass_a_chi_square_test_against_the_softmax() -> None:
    model, draws = tiny(dtype=torch.float32, sharpness=1.5), 20_000
    [prompt] = prompts(1)
    answer = engine(model, 500).generate(table(names(draws), [prompt] * draws), Sampling(3, max_new_tokens=1))
    firsts = np.array([ids[0] for ids in answer["response_ids"].to_pylist()])
    expected_V = full_logprobs(model, prompt, np.array([2]))[0].double().exp().numpy()
    counts_V = np.bincount(firsts, minlength=VOCAB - 2)
    assert counts_V[expected_V == 0].sum() == 0
    likely = expected_V * draws >= 5
    assert likely.sum() > 20
    observed = np.append(counts_V[likely], counts_V[~likely].sum())
    expected = np.append(expected_V[likely], expected_V[~likely].sum())
    assert stats.chisquare(observed, expected / expected.sum() * draws).pvalue > 1e-4


def test_mean_logprob_is_close_to_minus_mean_entropy() -> None:
    model, asked = tiny(sharpness=2.0), prompts(200)
    samples = engine(model, 64).samples(names(200), asked, Sampling(5, max_new_tokens=24))
    differences = []
    for prompt, sample in zip(asked, samples, strict=True):
        logprobs_TV = full_logprobs(model, prompt, sample.ids)
        entropy_T = -(logprobs_TV.exp() * logprobs_TV).sum(dim=-1)
        differences.append(sample.logprobs + entropy_T.numpy())
    gaps = np.concatenate(differences)
    assert abs(gaps.mean()) < 4 * gaps.std() / len(gaps) ** 0.5
    assert abs(gaps.mean()) < 0.05


@pytest.mark.parametrize(
    "sampling", [Sampling(1, top_k=3, max_new_tokens=20), Sampling(1, top_p=0.6, max_new_tokens=20)]
)
def test_truncated_sampling_stays_inside_its_set(sampling: Sampling) -> None:
    model, asked = tiny(), prompts(30)
    for prompt, sample in zip(asked, engine(model, 16).samples(names(30), asked, sampling), strict=True):
        logprobs_TV = full_logprobs(model, prompt, sample.ids)
        ids_T1 = torch.as_tensor(sample.ids, dtype=torch.int64)[:, None]
        more_likely_TV = logprobs_TV > logprobs_TV.gather(1, ids_T1)
        if sampling.top_k:
            assert (more_likely_TV.sum(dim=1) < 3).all()
        else:
            assert ((logprobs_TV.exp() * more_likely_TV).sum(dim=1) < 0.6).all()
        assert (sample.logprobs >= logprobs_TV.gather(1, ids_T1)[:, 0].numpy() - 1e-12).all()


def test_end_token_is_kept_and_forbidden_ids_never_appear() -> None:
    unreachable = frozenset({0, VOCAB - 1, 10_000})
    answer = engine(tiny(), 8, STOPS | unreachable).generate(
        table(names(60), prompts(60)), Sampling(9, max_new_tokens=12)
    )
    assert set(answer["finish_reason"].to_pylist()) == {"stop", "length"}
    for row in answer.to_pylist():
        ids = row["response_ids"]
        assert len(row["rollout_logprob"]) == len(ids)
        assert not set(ids) & {0, 1, VOCAB - 2, VOCAB - 1}
        assert not set(ids[:-1]) & STOPS
        assert (ids[-1] in STOPS) == (row["finish_reason"] == "stop")
        assert row["finish_reason"] == "stop" or len(ids) == 12


def test_order_of_requests_does_not_matter_and_answers_keep_it() -> None:
    model, asked, sampling = tiny(), prompts(40), Sampling(13, max_new_tokens=16)
    forward = engine(model, 9).samples(names(40), asked, sampling)
    shuffle = np.random.default_rng(1).permutation(40)
    shuffled = engine(model, 9).samples([names(40)[i] for i in shuffle], [asked[i] for i in shuffle], sampling)
    for place, i in enumerate(shuffle):
        assert_same(shuffled[place], forward[i])


def test_two_calls_give_equal_bytes_and_other_seeds_other_samples() -> None:
    requests, model = table(names(40), prompts(40)), tiny(dtype=torch.float32)
    first = engine(model, 9).generate(requests, Sampling(1, max_new_tokens=16))
    assert first.equals(engine(model, 9).generate(requests, Sampling(1, max_new_tokens=16)))
    assert not first.equals(engine(model, 9).generate(requests, Sampling(2, max_new_tokens=16)))
    assert first.schema.types == [pa.list_(pa.int32()), pa.list_(pa.float32()), pa.string()]


def test_noise_of_a_row_is_used_from_its_first_position() -> None:
    model, asked = tiny(), prompts(12)
    short = engine(model, 4).samples(names(12), asked, Sampling(1, max_new_tokens=5))
    long = engine(model, 4).samples(names(12), asked, Sampling(1, max_new_tokens=20))
    for a, b in zip(short, long, strict=True):
        assert a.ids.tolist() == b.ids[: len(a.ids)].tolist()


def test_small_prefills_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked, sampling = tiny(), prompts(40), Sampling(1, max_new_tokens=16)
    usual = engine(model, 16).samples(names(40), asked, sampling)
    monkeypatch.setattr(generate, "_PREFILL_TOKENS", 20)
    for a, b in zip(usual, engine(model, 16).samples(names(40), asked, sampling), strict=True):
        assert_same(a, b)


def test_equal_prompts_are_read_once_and_finished_rows_are_not_carried_along(monkeypatch: pytest.MonkeyPatch) -> None:
    model, shapes = tiny(), []
    plain = TransformersGenerator.forward

    def spy(
        self: TransformersGenerator, ids: torch.Tensor, pad: torch.Tensor | None, cache: DynamicCache, width: int
    ) -> torch.Tensor:
        shapes.append(tuple(ids.shape))
        return plain(self, ids, pad, cache, width)

    monkeypatch.setattr(TransformersGenerator, "forward", spy)
    [prompt] = prompts(1)
    samples = engine(model, 32).samples(names(32), [prompt] * 32, Sampling(4, max_new_tokens=30))
    assert shapes[0] == (1, len(prompt))
    decoded = [rows for rows, width in shapes[1:] if width == 1]
    alive = [sum(len(s.ids) > t for s in samples) for t in range(1, 30)]
    assert decoded == [rows for rows in alive if rows]


def test_progress_counts_every_row_once() -> None:
    told: list[int] = []
    engine(tiny(), 8).generate(table(names(30), prompts(30)), Sampling(1, max_new_tokens=10), told.append)
    assert sum(told) == 30
    assert min(told) > 0


def test_admission_fills_up_refills_in_groups_and_never_joins_a_wave() -> None:
    assert admit(waiting=100, running=0, capacity=64, mergeable=False) == 64
    assert admit(waiting=10, running=0, capacity=64, mergeable=True) == 10
    assert admit(waiting=100, running=63, capacity=64, mergeable=True) == 0
    assert admit(waiting=100, running=48, capacity=64, mergeable=True) == 16
    assert admit(waiting=1, running=63, capacity=64, mergeable=True) == 1
    assert admit(waiting=100, running=1, capacity=64, mergeable=False) == 0


def test_no_requests_give_an_empty_table() -> None:
    answer = engine(tiny(), 8).generate(table([], []), Sampling(1))
    assert answer.num_rows == 0
    assert answer.column_names == ["response_ids", "rollout_logprob", "finish_reason"]


def test_training_mode_is_put_back_and_has_no_influence() -> None:
    model, asked = tiny("gpt2"), prompts(6)
    usual = engine(model, 4).samples(names(6), asked, Sampling(1, max_new_tokens=8))
    model.train()
    for a, b in zip(usual, engine(model, 4).samples(names(6), asked, Sampling(1, max_new_tokens=8)), strict=True):
        assert_same(a, b)
    assert model.training


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.arange(2, 50), "48 prompt tokens and 100 new ones exceed the model's 128 positions"),
        (np.array([], dtype=np.int64), "the prompt has no tokens"),
        (np.array([5, VOCAB]), f"token id {VOCAB} is not among the model's {VOCAB}"),
    ],
    ids=["too long", "empty", "unknown id"],
)
def test_unusable_prompts_are_named(bad: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        engine(tiny("gpt2"), 4).generate(table(names(3), [*prompts(2), bad]), Sampling(1, max_new_tokens=100))
    assert "row 2" in str(caught.value)
    assert "trajectory-2" in str(caught.value)


def test_prompt_and_response_may_fill_the_model_exactly() -> None:
    [sample] = engine(tiny("gpt2"), 1, frozenset()).samples(["t"], [np.arange(2, 30)], Sampling(1, max_new_tokens=100))
    assert len(sample.ids) == 100
    with pytest.raises(DataError, match="29 prompt tokens and 100 new ones"):
        engine(tiny("gpt2"), 1).samples(["t"], [np.arange(2, 31)], Sampling(1, max_new_tokens=100))


def test_logits_that_are_not_finite_name_the_trajectory() -> None:
    model = tiny()
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = float("nan")
    with pytest.raises(EngineError, match="not finite") as caught:
        engine(model, 4).samples(names(2), [np.array([5]), np.array([7])], Sampling(1, max_new_tokens=9))
    assert "trajectory-1" in str(caught.value)
    assert all(word in str(caught.value.fix) for word in ("float32", "sdpa", "equal length", "NaN"))


@pytest.mark.parametrize(
    ("stops", "forbidden", "can"),
    [({3, 4}, [3], True), ({3, 4}, [3, 4], False), ({VOCAB + 1}, [], False), (set(), [], False)],
)
def test_a_generator_knows_whether_it_can_stop(stops: set[int], forbidden: list[int], can: bool) -> None:
    vocabulary = Vocabulary(VOCAB, ~np.isin(np.arange(VOCAB), forbidden))
    assert TransformersGenerator(tiny(), vocabulary, frozenset(stops), 4).can_stop is can


def test_window_caches_run_in_waves_and_full_caches_are_refilled(monkeypatch: pytest.MonkeyPatch) -> None:
    batches: dict[str, list[tuple[int, int]]] = {"mistral-window": [], "qwen3": []}
    plain = TransformersGenerator.forward
    for family, shapes in batches.items():

        def spy(self: TransformersGenerator, ids: torch.Tensor, *rest: Any, log: list[Any] = shapes) -> torch.Tensor:
            log.append(tuple(ids.shape))
            return plain(self, ids, *rest)

        monkeypatch.setattr(TransformersGenerator, "forward", spy)
        asked = [np.array([5 + i, 6, 7]) for i in range(40)]
        engine(tiny(family), 8).samples(names(40), asked, Sampling(1, max_new_tokens=30))
    waves = [rows for rows, width in batches["mistral-window"] if width > 1]
    refills = [rows for rows, width in batches["qwen3"] if width > 1]
    assert waves == [8, 8, 8, 8, 8]
    assert refills[0] == 8
    assert len(refills) > 5


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_float32_logprobs_equal_a_full_forward_for_every_attention(attention: str) -> None:
    model, asked = tiny(dtype=torch.float32), prompts(20)
    model.set_attn_implementation(attention)
    samples = engine(model, 6).samples(names(20), asked, Sampling(2, max_new_tokens=40))
    for prompt, sample in zip(asked, samples, strict=True):
        np.testing.assert_allclose(sample.logprobs, picked(model, prompt, sample.ids), rtol=0, atol=2e-5)


def test_cache_room_grows_for_long_responses() -> None:
    model, asked = tiny("gpt2"), prompts(10)
    samples = engine(model, 4, frozenset({3})).samples(names(10), asked, Sampling(6, max_new_tokens=110))
    assert max(len(sample.ids) for sample in samples) > 80
    for prompt, sample in zip(asked, samples, strict=True):
        np.testing.assert_allclose(sample.logprobs, picked(model, prompt, sample.ids), rtol=0, atol=1e-9)


def test_cache_room_holds_what_plain_concatenation_would() -> None:
    def states(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, 2, columns, 3, generator=torch.Generator().manual_seed(rows * 100 + columns))

    layer = RoomyLayer()
    layer.absorb(states(2, 4), states(2, 4) + 1)
    for _ in range(50):
        keys, values = layer.update(states(2, 1), states(2, 1) + 1)
    layer.absorb(states(3, 70), states(3, 70) + 1)
    assert layer.keys.shape == (5, 2, 70, 3)
    assert torch.equal(layer.keys[:2, :, 16:], torch.cat([states(2, 4), *[states(2, 1)] * 50], dim=2))
    assert torch.equal(layer.keys[2:], states(3, 70))
    layer.keep(4, torch.tensor([1]), torch.tensor([4]), crop=16)
    assert torch.equal(layer.keys, torch.cat([keys[:1], states(3, 70)[2:, :, 16:], states(3, 70)[:2, :, 16:]]))
    assert torch.equal(layer.values[:1], values[:1])
