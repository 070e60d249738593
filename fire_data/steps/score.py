"""`fire score`: student and teacher evaluated on every token the student wrote, in one joint pass."""

from __future__ import annotations

import json
import math
from typing import Any

import polars as pl
import pyarrow as pa

from fire_data import chat, vocabulary
from fire_data.engines import FakeScorer, Scorer
from fire_data.overview import start_over
from fire_data.rules.base import floats
from fire_data.schemas.errors import FingerprintError
from fire_data.schemas.manifest import Manifest, Receipt, Shard
from fire_data.schemas.tables import FORMAT, IDS, conform
from fire_data.session import Session
from fire_data.shards import Part, read_shard, sealed
from fire_data.stages import Stage, run_stage

_MEANS = ("student_logprob", "teacher_logprob", "student_entropy", "teacher_entropy", "reverse_kl", "forward_kl")
DRIFT_WARNING = 0.05  # nats between rollout and rescored logprobs that are worth a word


def score(session: Session, round: int, *, redo: bool = False) -> Manifest:
    """Make, continue or confirm the scores of a round, or make them anew. Returns the sealed manifest."""
    run, cfg = session.run, session.run.config
    source_part = run.part("rollouts", round)
    source = sealed(source_part)
    receipts = {r.shard: r for r in source.shards}
    fields = _fields(session, round, source)
    stage = Stage(run.part("scores", round), fields, source.plan, _recorded(session))

    if redo:
        start_over(run, "scores", round, session.report)

    def make(shard: Shard) -> pa.Table:
        where = f"{stage.part.label}, shard {shard.name}"
        rollouts = read_shard(source_part, receipts[shard.name])
        rollouts = _with_teacher_prompts(session, rollouts)
        for name in ("response_ids", "teacher_prompt_ids" if cfg.score.teacher_prompt == "own" else "prompt_ids"):
            vocabulary.require_known_ids(
                rollouts[name], session.vocabulary, name, f"{source_part.label}, shard {shard.name}"
            )
        signals = _make_scorer(session, round).score(rollouts)
        for name in signals.column_names:
            rollouts = rollouts.append_column(name, signals[name])
        from fire_data.scoring import summarise

        return conform(summarise(rollouts), "scores", where)

    return run_stage(stage, make, lambda done: _stats(session, source, stage.part, done), session.report)


def _make_scorer(session: Session, round: int) -> Scorer:
    cfg = session.run.config.score
    if cfg.engine == "fake":
        return FakeScorer(session.vocabulary)
    from fire_data.scoring import TransformersScorer

    budget = cfg.logits_budget_mb << 20
    return TransformersScorer(
        session.student(round), session.teacher(), session.vocabulary, cfg.tokens_per_batch, budget
    )


def _with_teacher_prompts(session: Session, rollouts: pa.Table) -> pa.Table:
    """The messages under the teacher's own template, null where that gives the student's ids."""
    cfg, root = session.run.config, session.run.root
    own: list[list[int] | None] = [None] * rollouts.num_rows
    if cfg.score.teacher_prompt == "own":
        known: dict[str, list[int]] = {}
        for i, (messages, ids) in enumerate(
            zip(rollouts["messages"].to_pylist(), rollouts["prompt_ids"].to_pylist(), strict=True)
        ):
            key = json.dumps(messages)
            if key not in known:
                known[key] = chat.render(session.teacher_tokenizer, session.run.teacher(), root, messages, False)
            own[i] = known[key] if known[key] != ids else None
    return rollouts.append_column("teacher_prompt_ids", pa.array(own, IDS))


def _fields(session: Session, round: int, source: Manifest) -> dict[str, Any]:
    run, cfg = session.run, session.run.config
    part = run.part("rollouts", round)
    student, wrote = session.student_fields(round), source.fields["student"]
    if student != wrote:
        text = f"the rollouts were written by another student: {json.dumps(wrote)}, now it is {json.dumps(student)}"
        raise FingerprintError(text, where=part.label, fix=f"{part.command} --redo")
    if session.vocabulary_fields != source.fields["vocabulary"]:
        text = "the rollouts were sampled over another vocabulary (another teacher's tokenizer, or none)"
        raise FingerprintError(text, where=part.label, fix=f"{part.command} --redo")
    return {
        "format": FORMAT,
        "score": cfg.score.results(),
        "student": student,
        "teacher": session.teacher_fields(),
        "template": session.template_fields(run.teacher()) if cfg.score.teacher_prompt == "own" else "shared",
        "vocabulary": session.vocabulary_fields,
        "teacher_tokenizer": vocabulary.fingerprint(session.teacher_tokenizer),
        "rollouts": source.digest,
    }


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
    off = (floats("student_logprob") - floats("rollout_logprob")).list.eval(pl.element().abs())
    ended = pl.col("teacher_logprob").list.last() - pl.col("student_logprob").list.last()
    return frame.select(
        *(f"{m}_sum" for m in _MEANS),
        drift=off.list.sum(),
        drift_max=off.list.max(),
        last=pl.when(pl.col("finish_reason") == "stop").then(ended.cast(pl.Float64)),
    )
