"""Real vLLM writes: seeds, stops, lengths, and logprobs of the very distribution that was sampled from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from fire_data.sampling import Sampling, processed_logprobs
from fire_data.schemas.errors import ConfigError, DataError
from fire_data.schemas.tables import IDS
from fire_data.vllm_engine import VllmEngine
from fire_data.vocabulary import mask_logits
from tests.vllm_real.conftest import FORBIDDEN, OWN_END, POSITIONS, SIZE, STOPS, VOCABULARY, answered, requests, values

ROWS, NEW = 24, 16
ASKED = requests(ROWS)


@pytest.fixture(scope="module")
def written(engine: VllmEngine) -> pa.Table:
    return engine.generate(ASKED, Sampling(seed=3, max_new_tokens=NEW))


def distributions(model: Any, rows: pa.Table, sampling: Sampling) -> np.ndarray:
    """What transformers says: log of the distribution sampled from [T, V], for all response tokens."""
    import torch

    found = []
    for prompt, response in zip(rows["prompt_ids"].to_pylist(), rows["response_ids"].to_pylist(), strict=True):
        with torch.no_grad():
            logits_TV = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        found.append(processed_logprobs(mask_logits(logits_TV, VOCABULARY), sampling).numpy())
    return np.concatenate(found)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(seed=3, max_new_tokens=NEW),
        Sampling(seed=3, max_new_tokens=NEW, temperature=0.7, top_k=5),
        Sampling(seed=3, max_new_tokens=NEW, temperature=1.5, top_p=0.8),
    ],
    ids=["plain", "top-k", "top-p"],
)
def test_logprobs_are_of_the_distribution_sampled_from(
    engine: VllmEngine, torch_models: dict[str, Any], sampling: Sampling
) -> None:
    answer = engine.generate(ASKED, sampling)
    ids = values(answer, "response_ids")
    theirs = distributions(torch_models["a"], answered(ASKED, answer), sampling)
    np.testing.assert_allclose(values(answer, "rollout_logprob"), theirs[np.arange(len(ids)), ids], atol=1e-4)


def test_tokens_come_as_often_as_they_are_likely(engine: VllmEngine, torch_models: dict[str, Any]) -> None:
    count, prompt = 2000, [3, 11, 20]
    many = pa.table({"trajectory_id": [f"m{i}" for i in range(count)], "prompt_ids": pa.array([prompt] * count, IDS)})
    answer = engine.generate(many, Sampling(seed=0, max_new_tokens=1))
    p = np.exp(distributions(torch_models["a"], answered(many, answer).slice(0, 1), Sampling(seed=0))[0])
    seen = np.bincount(values(answer, "response_ids"), minlength=SIZE)
    likely = p * count >= 5
    chi_square = ((seen - p * count)[likely] ** 2 / (p * count)[likely]).sum()
    assert likely.sum() >= 5
    assert chi_square < 3 * likely.sum(), "5 standard deviations and more of a chi-square with so many degrees"


def test_greedy_takes_what_transformers_takes(engine: VllmEngine, torch_models: dict[str, Any]) -> None:
    from fire_data.generate import TransformersGenerator

    greedy = Sampling(seed=0, max_new_tokens=NEW, greedy=True, temperature=0.3, top_k=2)
    ours = engine.generate(ASKED, greedy)
    theirs = TransformersGenerator(torch_models["a"], VOCABULARY, STOPS, 8).generate(ASKED, greedy)
    assert ours["response_ids"].to_pylist() == theirs["response_ids"].to_pylist()
    assert ours["finish_reason"].to_pylist() == theirs["finish_reason"].to_pylist()
    np.testing.assert_allclose(values(ours, "rollout_logprob"), values(theirs, "rollout_logprob"), atol=1e-4)


def test_a_sample_depends_on_its_seed_and_trajectory_alone(engine: VllmEngine, written: pa.Table) -> None:
    sampling = Sampling(seed=3, max_new_tokens=NEW)
    again = engine.generate(ASKED, sampling)
    assert again["response_ids"].to_pylist() == written["response_ids"].to_pylist()
    few = [20, 3, 11]
    alone = engine.generate(ASKED.take(few), sampling)
    assert alone["response_ids"].to_pylist() == written.take(few)["response_ids"].to_pylist()
    np.testing.assert_allclose(
        values(alone, "rollout_logprob"), values(written.take(few), "rollout_logprob"), atol=1e-5
    )
    other = engine.generate(ASKED, Sampling(seed=4, max_new_tokens=NEW))
    assert other["response_ids"].to_pylist() != written["response_ids"].to_pylist()


def test_samples_of_one_prompt_differ(written: pa.Table) -> None:
    prompts, responses = ASKED["prompt_ids"].to_pylist(), written["response_ids"].to_pylist()
    assert all(prompts[i] == prompts[i + 1] for i in range(0, ROWS, 2))
    assert sum(responses[i] != responses[i + 1] for i in range(0, ROWS, 2)) >= ROWS // 2 - 1


def test_exactly_the_given_ids_end_a_response_and_are_in_it(engine: VllmEngine) -> None:
    asked = requests(200)
    answer = engine.generate(asked, Sampling(seed=1, max_new_tokens=NEW))
    reasons = answer["finish_reason"].to_pylist()
    assert set(reasons) == {"stop", "length"}
    logprobs = answer["rollout_logprob"].to_pylist()
    for ids, logprob, reason in zip(answer["response_ids"].to_pylist(), logprobs, reasons, strict=True):
        assert len(ids) == len(logprob)
        assert not STOPS & set(ids[:-1])
        assert (ids[-1] in STOPS) == (reason == "stop")
        assert reason == "stop" or len(ids) == NEW
    seen = values(answer, "response_ids")
    assert OWN_END in seen, "the end of the model's own files ends nothing here"
    assert seen.max() < SIZE
    assert FORBIDDEN not in seen


def test_a_row_as_long_as_the_model_has_positions_is_written_and_scored(engine: VllmEngine) -> None:
    asked = pa.table({"trajectory_id": [f"{i}" for i in range(9)], "prompt_ids": pa.array([[3, 4]] * 9, IDS)})
    answer = engine.generate(asked, Sampling(seed=2, max_new_tokens=POSITIONS - 2, temperature=0.5))
    full = [len(ids) == POSITIONS - 2 for ids in answer["response_ids"].to_pylist()]
    assert any(full)
    scored = engine.evaluate(answered(asked, answer))
    assert [len(x) for x in scored["logprob"].to_pylist()] == [len(x) for x in answer["response_ids"].to_pylist()]


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ([], "no tokens"),
        ([3, 48], "48 is not among the model's 48"),
        ([-1], "-1 is not among"),
        ([3] * (POSITIONS + 2 - NEW), "34 prompt tokens and 17 new ones exceed the 49"),
    ],
    ids=["empty", "unknown", "negative", "long"],
)
def test_a_prompt_that_cannot_be_answered_is_named_before_any_work(
    engine: VllmEngine, prompt: list[int], text: str
) -> None:
    bad = pa.table({"trajectory_id": ["fine", "bad"], "prompt_ids": pa.array([[3], prompt], IDS)})
    with pytest.raises(DataError, match=text) as caught:
        engine.generate(bad, Sampling(seed=0, max_new_tokens=NEW + 1))
    assert "row 1 (trajectory bad)" in str(caught.value)


def test_a_temperature_that_vllm_would_raise_is_refused(engine: VllmEngine) -> None:
    with pytest.raises(ConfigError, match=r"0\.001"):
        engine.generate(ASKED, Sampling(seed=0, temperature=0.001))


def test_no_requests_give_an_empty_table(engine: VllmEngine) -> None:
    assert engine.generate(ASKED.slice(0, 0), Sampling(seed=0)).num_rows == 0
