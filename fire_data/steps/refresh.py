"""`fire run`: refresh rounds. Each round: rollout, score, weigh, train, evaluate; the same command continues."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fire_data import trackers
from fire_data.prompts import read_prompts
from fire_data.run import Run
from fire_data.schemas.config import TEACHER
from fire_data.schemas.tables import REWARD
from fire_data.session import Session
from fire_data.shards import is_sealed
from fire_data.steps.benchmarks import benchmarks, evaluated
from fire_data.steps.evaluate import evaluate
from fire_data.steps.rollout import rollout
from fire_data.steps.rounds import is_accuracy, round_row, round_table
from fire_data.steps.score import score
from fire_data.steps.train import train
from fire_data.steps.verify import check_prompts, verify
from fire_data.steps.weigh import configured, weigh


def refresh(session: Session, rounds: int, trainer: Callable[[Session, int], object] = train) -> list[dict[str, Any]]:
    """Bring a run to `rounds` rounds in all and return `round_table`. Finished rounds are left alone.

    Args:
        trainer: trains a round, as `steps.train.train` does.
    """
    run = session.run
    configured(run)  # a rule that cannot be is told before an hour of sampling
    trackers.require(run.config.train.tracker)
    _require_inputs(run, rounds)
    if REWARD in run.needed_addons() and run.current_round() < rounds:
        check_prompts(run)
    held_out = run.config.eval.prompts is not None
    if held_out and not evaluated(run, None):
        evaluate(session, None)
    for number in range(rounds):
        finished = is_sealed(run.part("checkpoints", number))
        if not finished:
            one_round(session, number, trainer)
        if held_out and not evaluated(run, number):
            evaluate(session, number)
            if session.follower is not None:
                session.follower.catch_up()
        if not finished:
            session.report.note(_line(round_row(run, number)))
    return round_table(run)


def one_round(session: Session, number: int, trainer: Callable[[Session, int], object] = train) -> None:
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
    trainer(session, number)


def _require_inputs(run: Run, rounds: int) -> None:
    """Raise, before anything is made, what a later stage would about a teacher, prompts or peft that are not there."""
    left = [n for n in range(rounds) if not is_sealed(run.part("checkpoints", n))]
    if left and run.config.train.lora is not None:
        from fire_data.lora import require_peft

        require_peft()
    if any(not is_sealed(run.part("rollouts", n)) for n in left):
        read_prompts(run.config.prompts.path, run.root)
    if not run.teachers and any(not is_sealed(run.part("scores", n)) for n in left):
        run.teacher(TEACHER)
    if run.config.eval.prompts is not None and not all(evaluated(run, n) for n in range(rounds)):
        for name, path in benchmarks(run).items():
            read_prompts(path, run.root, setting="eval.prompts" if name is None else f"eval.prompts.{name}")


def _line(row: dict[str, Any]) -> str:
    """A round in one line, for those who watch."""
    wanted = {k: v for k, v in row.items() if v is not None and (k in ("kept", "reverse_kl") or is_accuracy(k))}
    return f"round {row['round']}: " + ", ".join(f"{k} {v:.3f}" for k, v in wanted.items())
