"""The ratio check finds shifted columns and other models before the first step, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fire_data.models import head_of
from fire_data.schemas.errors import TrainingError
from fire_data.training import StepBatch, ratio_check, ratio_tolerance
from tests.tinymodels import VOCABULARY, same_tensors, step_batch, tiny_model, train_config, weights_of

# The ratio check


def _check(model: Any, batch: StepBatch, tolerance: float = 1e-4, **more: Any) -> dict[str, float]:
    return ratio_check(
        model, head_of(model), batch, train_config(tokens_per_microbatch=64), VOCABULARY, tolerance, **more
    )


def test_ratio_check_passes_for_the_model_that_scored() -> None:
    model = tiny_model()
    result = _check(model, step_batch(model))
    assert result["ratio_mean_abs"] < 1e-5
    assert result["ratio_mean_abs_shifted"] > 0.5
    assert result["rows"] == 8


@pytest.mark.parametrize("by", [1, -1])
def test_ratio_check_names_a_shifted_column(by: int) -> None:
    model = tiny_model()
    batch = step_batch(model)
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
    model = tiny_model()
    batch = step_batch(model)
    wrong = replace(batch, old_logprob=[_shifted(x, by) for x in batch.old_logprob])
    with pytest.raises(TrainingError, match="shifted by one token"):
        _check(model, wrong, tolerance=100.0)
    assert _check(model, batch, tolerance=100.0)["ratio_mean_abs"] < 1e-5


def test_ratio_check_names_another_model() -> None:
    batch = step_batch(tiny_model(seed=1))
    with pytest.raises(TrainingError, match="not of the model to be trained") as caught:
        _check(tiny_model(), batch)
    assert "the tolerance is 0.0001" in str(caught.value)
    assert "--redo" in str(caught.value)


def test_ratio_check_works_on_single_tokens_and_on_flat_columns() -> None:
    model = tiny_model()
    batch = step_batch(model)
    columns = ("prompt_ids", "response_ids", "old_logprob", "coefficient")
    single = replace(batch, kept_tokens=1, **{c: [getattr(batch, c)[0]] for c in columns})
    assert np.isnan(_check(model, single)["ratio_mean_abs_shifted"])
    with torch.no_grad():
        model.model.norm.weight.zero_()  # every token equally likely: the shifted column is the column
    result = _check(model, step_batch(model))
    assert result["ratio_mean_abs"] == pytest.approx(result["ratio_mean_abs_shifted"])


def test_ratio_check_is_bounded_and_changes_nothing() -> None:
    model = tiny_model()
    weights = weights_of(model)
    batch = step_batch(model)
    result = _check(model, batch, max_tokens=10)
    assert (result["rows"], result["tokens"]) == (2, 7)
    assert _check(model, batch, max_tokens=1)["rows"] == 1
    assert same_tensors(weights, weights_of(model))
    assert all(p.grad is None for p in model.parameters())


def test_ratio_tolerance_follows_the_least_exact_dtype() -> None:
    assert ratio_tolerance(train_config(), "float32") == 1e-4
    assert ratio_tolerance(train_config(), "bfloat16", "float32") == 0.03
    assert ratio_tolerance(train_config(compute_dtype="bfloat16"), "float32") == 0.03
    assert ratio_tolerance(train_config(ratio_tolerance=0.5), "float32") == 0.5
