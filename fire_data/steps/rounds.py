"""What is known of each round, in one row: accuracy, kept fraction, KL to the teacher, length, loss."""

from __future__ import annotations

from typing import Any

from fire_data.run import Run
from fire_data.schemas.manifest import Manifest
from fire_data.schemas.tables import REWARD
from fire_data.shards import is_sealed, read_manifest
from fire_data.steps.benchmarks import benchmarks


def round_table(run: Run) -> list[dict[str, Any]]:
    """One row per finished round, the start first: accuracy, kept fraction, KL to the teacher, length, loss."""
    return [
        round_row(run, None),
        *(round_row(run, n) for n in run.rounds() if is_sealed(run.part("checkpoints", n))),
    ]


def round_row(run: Run, number: int | None) -> dict[str, Any]:
    """What is known of a round from its sealed manifests; None where a stage is missing."""
    if number is None:
        return {"round": "start", **eval_numbers(run, "start")}
    rollouts, scores, checkpoint = (read_manifest(run.part(s, number)) for s in ("rollouts", "scores", "checkpoints"))
    rewards = read_manifest(run.part("addons", number, REWARD))
    weights = read_manifest(run.part("weights", number))
    return {
        "round": number,
        **eval_numbers(run, number),
        "reward": _stat(rewards, "mean_reward") if rewards else _stat(rollouts, "mean_reward"),
        "length": _stat(rollouts, "mean_length"),
        "truncated": _stat(rollouts, "truncated_fraction"),
        "reverse_kl": _stat(scores, "reverse_kl"),
        "kept": _stat(weights, "kept_fraction"),
        "ess": _stat(weights, "effective_sample_share"),
        "loss": _stat(checkpoint, "loss_last"),
        "global_step": _stat(checkpoint, "global_step"),
    }


def eval_numbers(run: Run, number: int | str) -> dict[str, Any]:
    """Accuracies of the student after a round (or at the start) by metric, with the benchmark's name before it."""
    found: dict[str, Any] = {}
    for name in benchmarks(run) if run.config.eval.prompts is not None else {None: ""}:
        manifest = read_manifest(run.part("evals", number, name))
        stats = manifest.stats if manifest else {}
        found |= {k if name is None else f"{name} {k}": v for k, v in stats.items() if is_accuracy(k)}
    return found


def is_accuracy(name: str) -> bool:
    """True for a number of an evaluation that is one of its results."""
    return name.endswith("greedy") or "@" in name


def _stat(manifest: Manifest | None, name: str) -> Any:
    return manifest.stats.get(name) if manifest else None
