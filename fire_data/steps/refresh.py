"""`fire run`: refresh rounds. Each round: rollout, score, weigh, train, evaluate; the same command continues."""

from __future__ import annotations

from typing import Any

from fire_data.prompts import read_prompts
from fire_data.run import Run
from fire_data.schemas.config import TEACHER
from fire_data.schemas.manifest import Manifest
from fire_data.schemas.tables import REWARD
from fire_data.session import Session
from fire_data.shards import is_sealed, read_manifest
from fire_data.steps.benchmarks import benchmarks, evaluated
from fire_data.steps.evaluate import evaluate
from fire_data.steps.rollout import rollout
from fire_data.steps.score import score
from fire_data.steps.train import train
from fire_data.steps.verify import check_prompts, verify
from fire_data.steps.weigh import configured, weigh


def refresh(session: Session, rounds: int) -> list[dict[str, Any]]:
    """Bring a run to `rounds` rounds in all and return `round_table`. Finished rounds are left alone."""
    run = session.run
    configured(run)  # a rule that cannot be is told before an hour of sampling
    _require_inputs(run, rounds)
    if REWARD in run.needed_addons() and run.current_round() < rounds:
        check_prompts(run)
    held_out = run.config.eval.prompts is not None
    if held_out and not evaluated(run, None):
        evaluate(session, None)
    for number in range(rounds):
        finished = is_sealed(run.part("checkpoints", number))
        if not finished:
            one_round(session, number)
        if held_out and not evaluated(run, number):
            evaluate(session, number)
        if not finished:
            session.report.note(_line(round_row(run, number)))
    return round_table(run)


def one_round(session: Session, number: int) -> None:
    """Rollout, score, weigh and train one round, each continued or confirmed. The rounds before it are trained."""
    run = session.run
    rollout(session, number)
    if run.config.rollout.engine != run.config.score.engine:
        session.rest()
    # What the rule reads beside the scores is made without being asked for: a round cannot go on without it.
    needed = run.needed_addons()
    score(session, number, add=[name for name in needed if name != REWARD])
    if REWARD in needed:
        verify(run, number, session.report)
    weigh(run, number, session.report)
    session.rest()  # training needs the accelerator to itself
    train(session, number)


def _require_inputs(run: Run, rounds: int) -> None:
    """Raise, before anything is made, what a later stage would about a teacher or prompts that are not there."""
    left = [n for n in range(rounds) if not is_sealed(run.part("checkpoints", n))]
    if any(not is_sealed(run.part("rollouts", n)) for n in left):
        read_prompts(run.config.prompts.path, run.root)
    if not run.teachers and any(not is_sealed(run.part("scores", n)) for n in left):
        run.teacher(TEACHER)
    if run.config.eval.prompts is not None and not all(evaluated(run, n) for n in range(rounds)):
        for name, path in benchmarks(run).items():
            read_prompts(path, run.root, setting="eval.prompts" if name is None else f"eval.prompts.{name}")


def _line(row: dict[str, Any]) -> str:
    """A round in one line, for those who watch."""
    wanted = {k: v for k, v in row.items() if v is not None and (k in ("kept", "reverse_kl") or _is_accuracy(k))}
    return f"round {row['round']}: " + ", ".join(f"{k} {v:.3f}" for k, v in wanted.items())


def round_table(run: Run) -> list[dict[str, Any]]:
    """One row per finished round, the start first: accuracy, kept fraction, KL to the teacher, length, loss."""
    return [
        round_row(run, None),
        *(round_row(run, n) for n in run.rounds() if is_sealed(run.part("checkpoints", n))),
    ]


def round_row(run: Run, number: int | None) -> dict[str, Any]:
    """What is known of a round from its sealed manifests; None where a stage is missing."""
    if number is None:
        return {"round": "start", **_eval_numbers(run, "start")}
    rollouts, scores, checkpoint = (read_manifest(run.part(s, number)) for s in ("rollouts", "scores", "checkpoints"))
    rewards = read_manifest(run.part("addons", number, REWARD))
    weights = read_manifest(run.part("weights", number))
    return {
        "round": number,
        **_eval_numbers(run, number),
        "reward": _stat(rewards, "mean_reward") if rewards else _stat(rollouts, "mean_reward"),
        "length": _stat(rollouts, "mean_length"),
        "truncated": _stat(rollouts, "truncated_fraction"),
        "reverse_kl": _stat(scores, "reverse_kl"),
        "kept": _stat(weights, "kept_fraction"),
        "ess": _stat(weights, "effective_sample_share"),
        "loss": _stat(checkpoint, "loss_last"),
        "global_step": _stat(checkpoint, "global_step"),
    }


def _eval_numbers(run: Run, number: int | str) -> dict[str, Any]:
    """Accuracies by metric, with the name of the benchmark before it where it has one."""
    found: dict[str, Any] = {}
    for name in benchmarks(run) if run.config.eval.prompts is not None else {None: ""}:
        manifest = read_manifest(run.part("evals", number, name))
        stats = manifest.stats if manifest else {}
        found |= {k if name is None else f"{name} {k}": v for k, v in stats.items() if _is_accuracy(k)}
    return found


def _is_accuracy(name: str) -> bool:
    return name.endswith("greedy") or "@" in name


def _stat(manifest: Manifest | None, name: str) -> Any:
    return manifest.stats.get(name) if manifest else None
