"""Real vLLM evaluates given responses as transformers does, exactly or with a bound that says so."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from fire_data.sampling import Sampling
from fire_data.schemas.errors import DataError
from fire_data.schemas.tables import EVALUATED, IDS
from fire_data.scoring import TransformersEvaluator
from fire_data.vllm_engine import VllmEngine
from tests.vllm_real.conftest import POSITIONS, VOCABULARY, answered, requests, values

SAMPLING = Sampling(seed=5, max_new_tokens=20)
ASKED = requests(30, seed=1)


@pytest.fixture(scope="module")
def written(engine: VllmEngine) -> pa.Table:
    return engine.generate(ASKED, SAMPLING)


@pytest.fixture(scope="module")
def rows(written: pa.Table) -> pa.Table:
    return answered(ASKED, written)


@pytest.fixture(scope="module")
def bound(start: Callable[..., VllmEngine], models: dict[str, Path]) -> VllmEngine:
    """An engine that lists the five most likely tokens, as one whose vLLM has no place for the entropy."""
    return start(models["b"], entropy_topk=5, exact=False)


def theirs(model: Any, rows: pa.Table) -> pa.Table:
    return TransformersEvaluator(model, VOCABULARY, 8192, 2**26).evaluate(rows)


def assert_alike(ours: pa.Table, other: pa.Table) -> None:
    assert ours.column_names == other.column_names == [c.name for c in EVALUATED if c.name != "entropy_mass"]
    for column in ("logprob", "entropy", "max_logprob"):
        np.testing.assert_allclose(values(ours, column), values(other, column), atol=1e-4)
    for column in ("rank", "top1_id"):
        np.testing.assert_array_equal(values(ours, column), values(other, column))


def test_scores_are_those_of_transformers(engine: VllmEngine, torch_models: dict[str, Any], rows: pa.Table) -> None:
    assert engine.entropy_kind == "exact"
    ours = engine.evaluate(rows)
    assert [ours.schema.field(c).type for c in ours.column_names] == [c.type for c in EVALUATED[:5]]
    assert_alike(ours, theirs(torch_models["a"], rows))


def test_sampled_logprobs_are_found_again(engine: VllmEngine, written: pa.Table, rows: pa.Table) -> None:
    scored = values(engine.evaluate(rows), "logprob")
    np.testing.assert_allclose(scored, values(written, "rollout_logprob"), atol=1e-4)


def test_a_bound_is_below_the_entropy_and_says_from_how_much(
    bound: VllmEngine, torch_models: dict[str, Any], rows: pa.Table
) -> None:
    assert bound.entropy_kind == "topk-lower-bound"
    ours, exact = bound.evaluate(rows), theirs(torch_models["b"], rows)
    for column in ("logprob", "max_logprob"):
        np.testing.assert_allclose(values(ours, column), values(exact, column), atol=1e-4)
    for column in ("rank", "top1_id"):
        np.testing.assert_array_equal(values(ours, column), values(exact, column))
    entropy, mass = values(ours, "entropy"), values(ours, "entropy_mass")
    assert (entropy <= values(exact, "entropy") + 1e-4).all()
    assert (entropy > 0.5 * values(exact, "entropy")).mean() > 0.9
    assert ((mass > 0) & (mass <= 1)).all()
    # At least the most likely token and the sampled one are listed.
    least = np.exp(values(ours, "max_logprob")) + np.where(values(ours, "rank") > 1, np.exp(values(ours, "logprob")), 0)
    assert (mass >= least - 1e-5).all()
    beyond = values(ours, "rank") > 5
    assert beyond.any(), "some sampled tokens are not among the five"


def test_rows_come_back_in_their_order_and_progress_counts_them(engine: VllmEngine, rows: pa.Table) -> None:
    told: list[int] = []
    straight = engine.evaluate(rows, told.append)
    assert sum(told) == rows.num_rows
    turned = np.random.default_rng(0).permutation(rows.num_rows)
    assert engine.evaluate(rows.take(turned))["logprob"].to_pylist() == straight.take(turned)["logprob"].to_pylist()


def test_an_empty_response_gives_empty_lists(engine: VllmEngine, rows: pa.Table) -> None:
    mixed = pa.table({
        "trajectory_id": ["empty", "both empty", "full"],
        "prompt_ids": pa.array([[3], [], [3, 4]], IDS),
        "response_ids": pa.array([[], [], [6, 8]], IDS),
    })  # fmt: skip
    told: list[int] = []
    answer = engine.evaluate(mixed, told.append)
    assert [len(x) for x in answer["entropy"].to_pylist()] == [0, 0, 2]
    assert sum(told) == 3
    none = engine.evaluate(mixed.slice(0, 2))
    assert none["rank"].to_pylist() == [[], []]
    assert none.schema == answer.schema
    assert engine.evaluate(rows.slice(0, 0)).num_rows == 0


@pytest.mark.parametrize(
    ("prompt", "response", "text"),
    [
        ([], [3], "no prompt token"),
        ([3], [4, 48], "48 is not among the model's 48"),
        ([3] * 10, [4] * (POSITIONS - 9), "49 tokens of prompt and response exceed the 48"),
    ],
    ids=["no prompt", "unknown", "long"],
)
def test_a_row_that_cannot_be_scored_is_named_before_any_work(
    engine: VllmEngine, prompt: list[int], response: list[int], text: str
) -> None:
    columns = {"prompt_ids": pa.array([[3], prompt], IDS), "response_ids": pa.array([[4], response], IDS)}
    with pytest.raises(DataError, match=text) as caught:
        engine.evaluate(pa.table({"trajectory_id": ["fine", "bad"], **columns}))
    assert "row 1 (trajectory bad)" in str(caught.value)


def test_new_weights_and_the_old_ones_again(
    engine: VllmEngine, models: dict[str, Path], torch_models: dict[str, Any], rows: pa.Table, written: pa.Table
) -> None:
    cached = pa.table(
        {"trajectory_id": [*"xyz"], "prompt_ids": pa.array([list(range(8, 38))[::-1] + [8] * 5] * 3, IDS)}
    )
    short = Sampling(seed=0, max_new_tokens=8)
    first, long = engine.evaluate(rows), engine.generate(cached, short)
    engine.load(models["b"])
    try:
        assert_alike(engine.evaluate(rows), theirs(torch_models["b"], rows))
        for asked, sampling in ((ASKED, SAMPLING), (cached, short)):
            other = engine.generate(asked, sampling)
            scored = theirs(torch_models["b"], answered(asked, other))
            np.testing.assert_allclose(values(other, "rollout_logprob"), values(scored, "logprob"), atol=1e-4)
    finally:
        engine.load(models["a"])
    assert engine.evaluate(rows).equals(first)
    assert engine.generate(ASKED, SAMPLING).equals(written)
    assert engine.generate(cached, short).equals(long)


def test_new_weights_wait_for_rows_that_are_being_written(
    engine: VllmEngine, models: dict[str, Path], torch_models: dict[str, Any], rows: pa.Table
) -> None:
    many = requests(120)
    before = engine.generate(many, SAMPLING)
    loading: list[Future[None]] = []
    with ThreadPoolExecutor(1) as pool:

        def load(_finished: int) -> None:
            if not loading:
                loading.append(pool.submit(engine.load, models["b"]))

        try:
            assert (
                engine.generate(many, SAMPLING, load)["response_ids"].to_pylist() == before["response_ids"].to_pylist()
            )
            loading[0].result()
            assert_alike(engine.evaluate(rows), theirs(torch_models["b"], rows))
        finally:
            engine.load(models["a"])


def test_a_wrong_folder_is_told_and_changes_nothing(
    engine: VllmEngine, models: dict[str, Path], rows: pa.Table, tmp_path: Path
) -> None:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    first = engine.evaluate(rows)
    (tmp_path / "empty").mkdir()
    shutil.copytree(models["b"], tmp_path / "torn")
    file = tmp_path / "torn" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    config = Qwen3Config.from_pretrained(models["b"])
    config.intermediate_size = 64
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "other")
    for name, text in {
        "nowhere": "no safetensors", "empty": "no safetensors", "torn": "not whole", "other": "another model",
    }.items():  # fmt: skip
        with pytest.raises(DataError, match=text) as caught:
            engine.load(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
    assert engine.evaluate(rows).equals(first)


def test_calls_of_several_threads_get_each_their_own_answer(
    engine: VllmEngine, models: dict[str, Path], rows: pa.Table, written: pa.Table
) -> None:
    scored = engine.evaluate(rows)
    halves = [(0, 17), (17, 13), (5, 20)]
    with ThreadPoolExecutor(6) as pool:
        writing = [pool.submit(engine.generate, ASKED.slice(*half), SAMPLING) for half in halves]
        reading = [pool.submit(engine.evaluate, rows.slice(*half)) for half in halves]
        loading = pool.submit(engine.load, models["a"])
        for half, answer in zip(halves, writing, strict=True):
            assert answer.result()["response_ids"].to_pylist() == written.slice(*half)["response_ids"].to_pylist()
        for half, answer in zip(halves, reading, strict=True):
            for column in ("logprob", "entropy"):
                expected = values(scored.slice(*half), column)
                np.testing.assert_allclose(values(answer.result(), column), expected, atol=1e-5)
        loading.result()
