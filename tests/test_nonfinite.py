"""A step whose numbers are not finite is skipped, counted and told; too many end training, whatever happens between."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fire_data import files, metrics, training, trainstate
from fire_data.optim import make_optimizer
from fire_data.run import Run
from fire_data.schemas.config import TrainConfig
from fire_data.schemas.errors import TrainingError
from fire_data.session import Session
from fire_data.shards import sealed
from fire_data.stages import Silent
from fire_data.steps import train as train_module
from fire_data.steps.diagnose import diagnose_round
from fire_data.steps.rollout import rollout
from fire_data.steps.score import score
from fire_data.steps.train import train
from fire_data.steps.weigh import weigh
from tests.conftest import Answer
from tests.tinymodels import (
    latest_state,
    moments_of,
    one_step,
    same_tensors,
    spoilt,
    step_batch,
    tiny_model,
    train_config,
    weights_of,
)

STEPS = 6
Fire = Callable[..., Answer]


class Killed(BaseException):
    """Stands for kill -9: no handler of the code under test runs."""


# One step


def _lora(model: Any) -> Any:
    pytest.importorskip("peft")
    from fire_data import lora
    from fire_data.schemas.config import LoraConfig

    lora.attach(model, LoraConfig(rank=2), seed=0)
    return model


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("wrong", ["coefficient", "old_logprob", "weight"])
def test_a_step_that_is_not_finite_changes_nothing_and_says_so(wrong: str, adapters: bool, compute: str) -> None:
    cfg, model = train_config(compute_dtype=compute), tiny_model()
    batch = step_batch(model)
    model = _lora(model) if adapters else model
    optimizer = make_optimizer(model, cfg)
    one_step(model, optimizer, batch, cfg)
    healthy = copy.deepcopy(model)
    if wrong == "weight":
        with torch.no_grad():
            next(p for n, p in model.named_parameters() if "up_proj" in n).view(-1)[0] = torch.nan
        bad = batch
    else:
        bad = spoilt(batch, wrong, np.inf if wrong == "coefficient" else np.nan, row=3)
    weights, moments = weights_of(model), moments_of(model, optimizer)
    found = one_step(model, optimizer, bad, cfg, 41)
    assert (found["nonfinite"], found["skipped"]) == (True, True)
    assert None in (found["loss"], found["grad_norm"])
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert all(torch.equal(torch.nan_to_num(weights[k]), torch.nan_to_num(v)) for k, v in model.state_dict().items())
    assert same_tensors(moments, moments_of(model, optimizer))
    assert all(p.grad is None for p in model.parameters())
    if wrong == "weight":
        model.load_state_dict(healthy.state_dict())
    after = one_step(model, optimizer, batch, cfg, 1)
    assert not after["skipped"]
    assert "nonfinite" not in after


def test_a_gradient_whose_norm_overflows_is_not_applied_though_each_number_is_finite() -> None:
    """Its square, a second moment, would not be finite, and its weight would never move again."""
    cfg, model = train_config(max_grad_norm=0), tiny_model()
    batch = step_batch(model)
    optimizer, weights = make_optimizer(model, cfg), weights_of(model)
    huge = replace(batch, coefficient=[c * 1e22 for c in batch.coefficient])
    found = one_step(model, optimizer, huge, cfg)
    assert found["loss"] is not None
    assert (found["grad_norm"], found["nonfinite"]) == (None, True)
    assert same_tensors(weights, weights_of(model))
    assert not moments_of(model, optimizer)


def test_a_spike_of_the_loss_moves_no_weight_further_than_any_other_step() -> None:
    cfg, model = train_config(), tiny_model()
    batch = step_batch(model)
    plain, spiky = copy.deepcopy(model), copy.deepcopy(model)
    one_step(plain, make_optimizer(plain, cfg), batch, cfg)
    spike = replace(batch, coefficient=[c * 1e9 for c in batch.coefficient])
    found = one_step(spiky, make_optimizer(spiky, cfg), spike, cfg)
    assert found["grad_norm"] > 1e6
    assert not found["skipped"]

    def moved(other: Any) -> float:
        before = model.state_dict()
        return max(float((t - before[k]).abs().max()) for k, t in other.state_dict().items())

    assert moved(spiky) <= 1.01 * moved(plain) <= 1.02 * cfg.lr


# A round


@pytest.fixture(scope="module")
def scored(make_scored: Callable[..., Any]) -> Callable[..., Run]:
    """`scored(folder, save_every=1, ...)`: a run whose round 0 has weights and waits to be trained in 6 steps."""
    made: Callable[..., Run] = make_scored(train={"batch_size": 2})
    return made


@pytest.fixture
def bad(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The global steps whose numbers are not finite; fill it."""
    chosen: set[int] = set()
    original = training.train_step

    def step(*arguments: Any, **named: Any) -> dict[str, Any]:
        model, head, optimizer, batch, cfg, vocabulary, global_step = arguments
        batch = spoilt(batch) if global_step in chosen else batch
        return original(model, head, optimizer, batch, cfg, vocabulary, global_step, **named)

    monkeypatch.setattr(training, "train_step", step)
    return chosen


class Heard(Silent):
    """Keeps the warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def _lines(run: Run) -> list[dict[str, Any]]:
    timed = ("seconds", "tokens_per_second")
    return [{k: v for k, v in r.items() if k not in timed} for r in metrics.read(run.root / "metrics.jsonl")]


def _outcome(run: Run) -> tuple[Any, ...]:
    """What a trained round left: numbers, fingerprint, metrics, weights and moments."""
    manifest = sealed(run.part("checkpoints", 0))
    stats = {k: v for k, v in manifest.stats.items() if k != "tokens_per_second"}
    state = latest_state(run.root / ".fire" / "train")
    assert state is not None
    tensors = {f"{p.stem}/{k}": v.tolist() for p in state.glob("*.safetensors") for k, v in load_file(p).items()}
    return stats, manifest.fingerprint, _lines(run), tensors


def test_skipped_steps_are_counted_and_told_and_the_round_goes_on(
    scored: Callable[..., Run], tmp_path: Path, bad: set[int], fire: Fire
) -> None:
    run, heard = scored(tmp_path / "run"), Heard()
    assert fire("status", run.root, "--json").code == 0
    assert _finding(run).level == "unknown"
    bad |= {1, 4}
    stats = train(Session(run, heard), 0).stats
    assert (stats["steps"], stats["global_step"]) == (STEPS, STEPS)
    assert (stats["nonfinite_steps"], stats["skipped_steps"]) == (2, 2)
    records = metrics.steps(run.root / "metrics.jsonl")
    assert [r.get("nonfinite", False) for r in records] == [i in bad for i in range(STEPS)]
    assert len(heard.warnings) == 2
    assert "global step 4 (step 4 of round 0) was skipped" in heard.warnings[1]
    assert "2 of 3 allowed" in heard.warnings[1]
    assert "sealed, 2 not finite" in fire("status", run.root).out
    found = _finding(run)
    assert (found.level, found.numbers) == ("warning", {"nonfinite_steps": 2})
    assert fire("report", run.root).code == 0
    assert "2 steps were skipped because loss or gradient was not finite" in (run.root / "report.html").read_text()


def _finding(run: Run) -> Any:
    (found,) = [f for f in diagnose_round(run, 0) if f.name == "training-steps"]
    return found


def test_a_round_whose_steps_are_finite_says_so(scored: Callable[..., Run], tmp_path: Path, fire: Fire) -> None:
    run = scored(tmp_path / "run")
    assert train(Session(run), 0).stats["nonfinite_steps"] == 0
    assert _finding(run).level == "ok"
    assert "finite" not in fire("status", run.root).out


@pytest.mark.parametrize("allowed", [0, 1])
def test_one_step_more_than_allowed_ends_training_and_more_allowance_continues_it(
    scored: Callable[..., Run], tmp_path: Path, bad: set[int], allowed: int, fire: Fire
) -> None:
    bad |= {1, 4}
    generous, run = scored(tmp_path / "generous"), scored(tmp_path / "run", save_every=1)
    train(Session(generous), 0)
    answer = fire("train", run.root, "--set", f"train.max_nonfinite_steps={allowed}", "--set", "train.save_every=1")
    assert answer.code == 1
    last = (1, 4)[allowed]
    for part in (f"global step {last}", "not finite", f"train.max_nonfinite_steps is {allowed}", "fix:"):
        assert part in answer.err
    assert [r["global_step"] for r in _lines(run) if r.get("nonfinite")] == [1, 4][: allowed + 1]
    assert f"{last + 1}/{STEPS}, {allowed + 1} not finite" in fire("status", run.root).out
    assert fire("train", run.root).code == 0  # the default allows three, and is no setting of the result
    assert _outcome(run) == _outcome(generous)


def test_a_round_of_which_no_step_could_be_applied_is_not_called_trained(
    scored: Callable[..., Run], tmp_path: Path, bad: set[int]
) -> None:
    bad |= set(range(STEPS))
    run = scored(tmp_path / "run", max_nonfinite_steps=STEPS)
    with pytest.raises(TrainingError, match="no step of the round was applied"):
        train(Session(run), 0)
    assert not (run.root / "checkpoints" / "round-000").exists()
    bad.remove(2)
    assert train(Session(run), 0).stats["nonfinite_steps"] == STEPS - 1


KILLS: dict[str, tuple[Any, str]] = {
    "before the line": (metrics, "append"),
    "before a state": (trainstate, "save_state"),
    "before the export": (trainstate, "export_checkpoint"),
    "before the seal": (train_module, "seal"),
    "at its publication": (files, "publish_folder"),
}


@pytest.mark.parametrize(("moment", "save_every"), [*((moment, 1) for moment in KILLS), ("before a state", 0)])
def test_a_kill_after_a_skipped_step_changes_nothing(
    scored: Callable[..., Run],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bad: set[int],
    moment: str,
    save_every: int,
) -> None:
    bad |= {0, 3}
    whole, run = scored(tmp_path / "whole", save_every=save_every), scored(tmp_path / "run", save_every=save_every)
    train(Session(whole), 0)
    where, name = KILLS[moment]
    original = getattr(where, name)

    def killed(*arguments: Any, **named: Any) -> Any:
        if sum(r.get("nonfinite", False) for r in metrics.read(run.root / "metrics.jsonl")) == 2:
            raise Killed
        return original(*arguments, **named)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(where, name, killed)
        train(Session(run), 0)
    train(Session(run), 0)
    assert _outcome(run) == _outcome(whole)
    assert sealed(run.part("checkpoints", 0)).stats["nonfinite_steps"] == 2


def test_the_allowance_is_no_setting_of_the_result() -> None:
    assert "max_nonfinite_steps" not in TrainConfig().executed()
    assert TrainConfig(max_nonfinite_steps=0).executed() == TrainConfig().executed()
    assert TrainConfig().performance()["max_nonfinite_steps"] == 3


def test_the_count_begins_anew_with_the_next_round(scored: Callable[..., Run], tmp_path: Path, bad: set[int]) -> None:
    run = scored(tmp_path / "run", max_nonfinite_steps=1)
    session = Session(run)
    bad |= {2, STEPS + 3}
    train(session, 0)
    rollout(session, 1)
    score(session, 1)
    weigh(run, 1)
    assert train(session, 1).stats["nonfinite_steps"] == 1


def test_a_bound_on_drift_does_not_end_a_round_before_its_first_update(
    scored: Callable[..., Run], tmp_path: Path, bad: set[int]
) -> None:
    bad |= {0, 1}
    run = scored(tmp_path / "run", max_drift_kl=1e-30)
    stats = train(Session(run), 0).stats
    assert (stats["steps"], stats["nonfinite_steps"], stats["stopped_by"]) == (3, 2, "max_drift_kl")
