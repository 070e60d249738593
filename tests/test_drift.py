"""The drift gauge: a round ends before the step at which the student has moved too far, also after a kill."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fire_data import files, metrics, trainstate
from fire_data.loss import add_statistics, crossed_bound, effective_share, ratio_statistics
from fire_data.optim import make_optimizer
from fire_data.overview import check, next_command, status
from fire_data.run import Run, open_run
from fire_data.schemas.config import TrainConfig
from fire_data.schemas.errors import FingerprintError
from fire_data.schemas.manifest import Manifest
from fire_data.session import Session
from fire_data.shards import sealed
from fire_data.standing import standings
from fire_data.steps import train as train_module
from fire_data.steps.diagnose import diagnose_round
from fire_data.steps.refresh import refresh
from fire_data.steps.train import train
from tests.conftest import Answer
from tests.tinymodels import (
    VOCABULARY,
    head_of,
    latest_state,
    moments_of,
    same_tensors,
    step_batch,
    tiny_model,
    train_config,
    train_step,
    weights_of,
)

Fire = Callable[..., Answer]
FAST = {"batch_size": 2, "lr": 5e-2, "max_drift_kl": 0.05}  # a rate at which a step or two cross the bound


class Killed(BaseException):
    """Stands for kill -9: no handler of the code under test runs."""


# The numbers


def test_effective_share_is_that_of_all_tokens_however_they_are_cut() -> None:
    random = np.random.default_rng(0)
    old, now = random.normal(-2, 1, 50), random.normal(-2, 1, 50)
    ratio = np.exp(now - old)
    cut = [(torch.from_numpy(now[a:b]), torch.from_numpy(old[a:b])) for a, b in ((0, 3), (3, 40), (40, 50))]
    parts = [ratio_statistics(n, o, torch.ones(len(n))) for n, o in cut]
    assert effective_share(add_statistics(parts)) == pytest.approx(ratio.sum() ** 2 / (50 * (ratio**2).sum()))


def test_effective_share_is_one_for_equal_ratios_and_one_nth_where_one_token_carries_all() -> None:
    def share(log_ratio: list[float]) -> float:
        now = torch.tensor(log_ratio, dtype=torch.float64)
        return effective_share(add_statistics([ratio_statistics(now, torch.zeros_like(now), torch.ones(len(now)))]))

    assert share([0.7] * 5) == pytest.approx(1)
    assert share([20.0, *[-20.0] * 7]) == pytest.approx(1 / 8)
    assert share([]) == 1


def test_a_bound_is_crossed_from_its_own_side_and_by_more_than_nothing() -> None:
    assert crossed_bound(0.3, 0.1, None, None) is None
    assert crossed_bound(0.2, 0.5, 0.2, 0.5) is None
    assert crossed_bound(0.21, 0.5, 0.2, 0.5) == "max_drift_kl"
    assert crossed_bound(0.2, 0.49, 0.2, 0.5) == "min_ess"
    assert crossed_bound(float("nan"), float("nan"), 0.2, 0.5) is None  # what is not finite is an error, not drift


@pytest.mark.parametrize("bounds", [{"max_drift_kl": 1e-4}, {"min_ess": 0.999}])
def test_a_step_over_a_bound_changes_nothing_and_says_so(bounds: dict[str, float]) -> None:
    cfg, model = train_config(**bounds), tiny_model()
    optimizer, batch = make_optimizer(model, cfg), step_batch(model, noise=0.3)
    other = copy.deepcopy(model)
    free = train_step(other, head_of(other), make_optimizer(other, cfg), batch, cfg, VOCABULARY, 0)
    before = weights_of(model), moments_of(model, optimizer)
    held = train_step(model, head_of(model), optimizer, batch, cfg, VOCABULARY, 0, gauge=True)
    assert held["stopped_by"] == next(iter(bounds))
    assert "stopped_by" not in free
    assert same_tensors(before[0], weights_of(model))
    assert same_tensors(before[1], moments_of(model, optimizer))
    assert all(p.grad is None for p in model.parameters())
    for name in ("drift_kl", "ess", "ratio_mean_abs", "ratio_max", "clip_fraction", "trained_tokens"):
        assert held[name] == pytest.approx(free[name], rel=1e-6)


# A round


@pytest.fixture(scope="module")
def scored(make_scored: Callable[..., Any]) -> Callable[..., Run]:
    """`scored(folder, epochs=2, ...)`: a run whose round 0 has weights and waits to be trained, 6 steps an epoch."""
    made: Callable[..., Run] = make_scored(train=FAST)
    return made


def _tensors(run: Run) -> dict[str, torch.Tensor]:
    folder = latest_state(run.root / ".fire" / "train")
    assert folder is not None
    return {f"{p.stem}/{k}": v for p in folder.glob("*.safetensors") for k, v in load_file(p).items()}


def _lines(run: Run) -> list[dict[str, Any]]:
    timed = ("seconds", "tokens_per_second")
    return [{k: v for k, v in r.items() if k not in timed} for r in metrics.read(run.root / "metrics.jsonl")]


def _outcome(run: Run, manifest: Manifest) -> tuple[Any, ...]:
    stats = {k: v for k, v in manifest.stats.items() if k != "tokens_per_second"}
    return stats, manifest.digest, _lines(run)


def test_a_round_ends_before_the_step_that_is_over_the_bound(scored: Callable[..., Run], tmp_path: Path) -> None:
    run, free = scored(tmp_path / "run"), scored(tmp_path / "free", max_drift_kl=None, save_every=1, keep_states="all")
    stats = train(Session(run), 0).stats
    train(Session(free), 0)
    steps, all_steps = metrics.steps(run.root / "metrics.jsonl"), metrics.steps(free.root / "metrics.jsonl")
    done = len(steps)
    assert 1 <= done < len(all_steps) == 6
    over = [r["drift_kl"] > 0.05 for r in all_steps]
    assert done == over.index(True)
    assert (stats["steps"], stats["global_step"], stats["stopped_at"]) == (done, done, done)
    assert stats["stopped_by"] == "max_drift_kl"
    assert stats["stopped_drift_kl"] == pytest.approx(all_steps[done]["drift_kl"])
    assert stats["stopped_ess"] == pytest.approx(all_steps[done]["ess"])
    assert (stats["unused_steps"], stats["unused_trajectories"]) == (6 - done, 12 - 2 * done)
    last = metrics.read(run.root / "metrics.jsonl")[-1]
    assert (last["stopped_by"], last["global_step"], last["step"]) == ("max_drift_kl", done, done)
    (there,) = [p for p in (free.root / ".fire" / "train").iterdir() if p.name == f"step-{done:08d}-round-000"]
    expected = {f"{p.stem}/{k}": v for p in there.glob("*.safetensors") for k, v in load_file(p).items()}
    assert same_tensors(_tensors(run), expected)


def test_few_tokens_that_moved_far_end_a_round_too(scored: Callable[..., Run], tmp_path: Path) -> None:
    run = scored(tmp_path / "run", max_drift_kl=None, min_ess=0.9)
    stats = train(Session(run), 0).stats
    assert stats["stopped_by"] == "min_ess"
    assert stats["stopped_ess"] < 0.9
    assert all(r["ess"] >= 0.9 for r in metrics.steps(run.root / "metrics.jsonl"))


def test_a_small_rate_never_ends_a_round(scored: Callable[..., Run], tmp_path: Path) -> None:
    run = scored(tmp_path / "run", lr=1e-6, epochs=2, min_ess=0.5)
    stats = train(Session(run), 0).stats
    assert stats["steps"] == len(_lines(run)) == 12
    assert not [k for k in stats if k.startswith(("stopped", "unused"))]


def test_the_first_step_is_always_made(scored: Callable[..., Run], tmp_path: Path) -> None:
    run = scored(tmp_path / "run", max_drift_kl=1e-30)
    stats = train(Session(run), 0).stats
    assert (stats["steps"], stats["unused_steps"], stats["unused_trajectories"]) == (1, 5, 10)


def test_what_an_epoch_has_used_is_not_unused(scored: Callable[..., Run], tmp_path: Path) -> None:
    run = scored(tmp_path / "run", epochs=3, lr=5e-3, max_drift_kl=None)
    drift = [r["drift_kl"] for r in metrics.steps(_trained(run))]
    late = max(drift[:7]) * 1.01  # a bound that no step of the first epoch, nor the first of the second, crosses
    assert any(d > late for d in drift[7:])
    other = scored(tmp_path / "other", epochs=3, lr=5e-3, max_drift_kl=late)
    stats = train(Session(other), 0).stats
    assert 7 <= stats["steps"] < 18
    assert (stats["unused_trajectories"], stats["unused_steps"]) == (0, 18 - stats["steps"])


def _trained(run: Run) -> Path:
    train(Session(run), 0)
    return run.root / "metrics.jsonl"


KILLS: dict[str, tuple[Any, str]] = {
    "before the line": (metrics, "append"),
    "after the line": (trainstate, "save_state"),
    "after the state": (trainstate, "export_checkpoint"),
    "after the checkpoint": (train_module, "seal"),
    "at its publication": (files, "publish_folder"),
}


@pytest.mark.parametrize("moment", KILLS)
@pytest.mark.parametrize("save_every", [0, 1])
def test_a_kill_around_the_stop_changes_nothing(
    scored: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, save_every: int
) -> None:
    whole = scored(tmp_path / "whole", save_every=save_every)
    expected = _outcome(whole, train(Session(whole), 0))
    run = scored(tmp_path / "run", save_every=save_every)
    where, name = KILLS[moment]
    original = getattr(where, name)

    def killed(*arguments: Any, **named: Any) -> Any:
        ended = [r for r in metrics.read(run.root / "metrics.jsonl") if "stopped_by" in r]
        if ended or (name == "append" and "stopped_by" in arguments[1]):
            raise Killed
        return original(*arguments, **named)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(where, name, killed)
        train(Session(run), 0)
    assert _outcome(run, train(Session(run), 0)) == expected
    assert same_tensors(_tensors(run), _tensors(whole))
    assert _outcome(run, train(Session(run), 0)) == expected  # and once more, when there is nothing to do


# Afterwards


def test_the_next_round_goes_on_and_nobody_takes_an_ended_round_for_damage(
    make_run: Callable[..., Run], tmp_path: Path, fire: Fire
) -> None:
    run = make_run(tmp_path / "run", train=FAST, eval={"prompts": None})
    refresh(Session(run), 2)
    first, second = (sealed(run.part("checkpoints", n)) for n in (0, 1))
    assert {first.stats["stopped_by"], second.stats["stopped_by"]} == {"max_drift_kl"}
    assert [r["global_step"] for r in metrics.steps(run.root / "metrics.jsonl")] == list(
        range(second.stats["global_step"])
    )
    stops = [(r["round"], r["global_step"]) for r in _lines(run) if "stopped_by" in r]
    assert stops == [(0, first.stats["global_step"]), (1, second.stats["global_step"])]
    assert {row["state"] for row in status(run)} == {"sealed"}
    assert check(run) == []
    (standing,) = [s for s in standings(run, 0) if s.stage == "checkpoints"]
    assert (standing.state, standing.done, standing.total) == ("sealed", first.stats["steps"], first.stats["steps"])
    assert next_command(run) == f"fire run {run.root} --rounds 3"
    assert diagnose_round(run, 0)
    planned = [s for s in fire("plan", run.root, "--rounds", 2, "--json").json["stages"] if s["action"] != "nothing"]
    assert planned == []
    assert fire("report", run.root).code == 0
    assert "Round 0 ended after" in (run.root / "report.html").read_text(encoding="utf-8")


def test_training_says_in_one_sentence_that_a_round_ended(
    scored: Callable[..., Run], tmp_path: Path, fire: Fire
) -> None:
    run = scored(tmp_path / "run")
    answer = fire("train", run.root)
    assert answer.code == 0
    (said,) = [line for line in answer.err.splitlines() if "round 0 ended after" in line]
    for part in ("of 6 steps", "is above train.max_drift_kl 0.05", "trajectories were not used"):
        assert part in said


def test_a_bound_is_a_setting_of_the_result_and_none_is_not(scored: Callable[..., Run], tmp_path: Path) -> None:
    assert not {"max_drift_kl", "min_ess", "tracker"} & TrainConfig().executed().keys()
    assert TrainConfig(min_ess=0.5).executed()["min_ess"] == 0.5
    run = scored(tmp_path / "run")
    train(Session(run), 0)
    with pytest.raises(FingerprintError, match=r"train\.max_drift_kl: 0.05 -> 0.1"):
        train(Session(open_run(run.root, ("train.max_drift_kl=0.1",))), 0)
