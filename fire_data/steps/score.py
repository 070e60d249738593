"""`fire score`: student and teacher evaluated on every token the student wrote, in one joint pass.

The addons that are asked for follow. A shard that lacks both its scores and its top-k has both made in one pass.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import Any

import polars as pl
import pyarrow as pa

from fire_data.diagnose.checks import DRIFT_WARNING
from fire_data.overview import start_over
from fire_data.schemas.manifest import Manifest, Receipt, Shard
from fire_data.schemas.tables import SIGNALS, conform
from fire_data.session import Session
from fire_data.shards import Part, read_shard, sealed
from fire_data.stages import Stage, run_stage
from fire_data.steps import columns
from fire_data.steps.inputs import make_scorer, score_fields, score_inputs

_MEANS = ("student_logprob", "teacher_logprob", "student_entropy", "teacher_entropy", "reverse_kl", "forward_kl")


def score(session: Session, round: int, *, add: Iterable[str] = (), redo: bool = False) -> Manifest:
    """Make, continue or confirm the scores of a round, then its addons. Returns the sealed manifest of the scores.

    Args:
        add: addons beside those of `score.add`.
        redo: make the scores anew, with all that was made from them; with `add`, those addons instead.

    Raises ConfigError if there is no addon of a name, before anything is made.
    """
    run, cfg = session.run, session.run.config
    source_part = run.part("rollouts", round)
    source = sealed(source_part)
    receipts = {r.shard: r for r in source.shards}
    stage = Stage(run.part("scores", round), score_fields(session, round, source), source.plan, _recorded(session))
    asked = tuple(dict.fromkeys(add))
    addons = [columns.prepare(session, round, name) for name in dict.fromkeys((*cfg.score.add, *asked))]
    if redo:
        if not asked:
            start_over(run, "scores", round, session.report)
        for name in asked:
            start_over(run, "addons", round, session.report, name)
    for addon in addons:
        columns.begin(session, addon)
    topk = next((a for a in addons if a.name == "topk"), None)

    def make(shard: Shard) -> pa.Table:
        started = time.monotonic()
        rollouts = score_inputs(session, source_part, receipts[shard.name])
        k = topk.k if topk is not None and columns.lacks(topk, shard) else 0
        signals = make_scorer(session, round).score(rollouts, k=k)
        if topk is not None and k:
            columns.write(topk, shard, rollouts, signals, started)
        for name in (c.name for c in SIGNALS):
            rollouts = rollouts.append_column(name, signals[name])
        from fire_data.scoring import summarise

        return conform(summarise(rollouts), "scores", f"{stage.part.label}, shard {shard.name}")

    manifest = run_stage(stage, make, lambda done: _stats(session, source, stage.part, done), session.report)
    for addon in addons:
        columns.complete(session, addon)
    return manifest


def _recorded(session: Session) -> dict[str, Any]:
    teacher = session.run.teacher()
    templated = teacher.chat_template or session.teacher_tokenizer.chat_template  # a base teacher has none
    if session.run.config.score.teacher_prompt == "shared" and not session.run.config.rollout.raw and templated:
        mine, theirs = session.template_fields(session.run.config.student), session.template_fields(teacher)
        if mine != theirs:
            session.report.warn(
                "student and teacher have different chat templates; the teacher sees the student's prompt "
                "(--set score.teacher_prompt=own renders its own)"
            )
    return {
        **session.performance("score"),
        "teacher": teacher.model,
        "tokenizers": session.comparison.record(),
        "entropy_kind": "exact" if session.run.config.score.engine == "transformers" else "fake",
    }


def _stats(session: Session, source: Manifest, part: Part, receipts: list[Receipt]) -> dict[str, Any]:
    """Means over all response tokens in nats, from per-trajectory sums; the last token apart, where end roles show.

    `rollout_drift` compares the logprobs of sampling and of scoring, where both are under the same distribution.
    """
    sampled = source.fields["rollout"]
    comparable = (sampled["temperature"], sampled["top_p"], sampled["top_k"]) == (1.0, 1.0, 0)
    rows = pl.concat([_numbers(part, receipt) for receipt in receipts])
    tokens = sum(receipt.tokens for receipt in receipts)
    stats: dict[str, Any] = {"tokens": tokens}
    for name in _MEANS:
        stats[name] = math.fsum(rows[f"{name}_sum"]) / tokens if tokens else None
    last = rows["last"].drop_nulls()
    stats["last_token_advantage"] = math.fsum(last) / len(last) if len(last) else None
    drift = math.fsum(rows["drift"]) / tokens if comparable and tokens else None
    stats |= {"rollout_drift": drift, "rollout_drift_max": rows["drift_max"].max() if comparable else None}
    if not comparable:
        session.report.note("rollout_logprob is not under the temperature-1 distribution: no drift check")
    elif drift is not None and drift > DRIFT_WARNING and session.run.config.score.engine != "fake":
        session.report.warn(f"rollout and rescored logprobs differ by {drift:.3f} nats on average")
    return stats


def _numbers(part: Part, receipt: Receipt) -> pl.DataFrame:
    """Per trajectory of a shard: sums of signals, drift, and the advantage of the token that ended it."""
    columns = ["finish_reason", "student_logprob", "teacher_logprob", "rollout_logprob"]
    frame = pl.from_arrow(read_shard(part, receipt, [f"{m}_sum" for m in _MEANS] + columns))
    assert isinstance(frame, pl.DataFrame)
    student, sampled = (pl.col(f"{who}_logprob").cast(pl.List(pl.Float64)) for who in ("student", "rollout"))
    off = (student - sampled).list.eval(pl.element().abs())
    ended = pl.col("teacher_logprob").list.last() - pl.col("student_logprob").list.last()
    return frame.select(
        *(f"{m}_sum" for m in _MEANS),
        drift=off.list.sum(),
        drift_max=off.list.max(),
        last=pl.when(pl.col("finish_reason") == "stop").then(ended.cast(pl.Float64)),
    )
