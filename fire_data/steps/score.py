"""`fire score`: student and teacher evaluated on every token the student wrote, in one joint pass."""

from __future__ import annotations

import json
import math
from typing import Any

import pyarrow as pa

from fire_data import chat, vocabulary
from fire_data.engines import FakeScorer, Scorer
from fire_data.schemas.errors import FingerprintError
from fire_data.schemas.manifest import Manifest, Receipt, Shard
from fire_data.schemas.tables import FORMAT, IDS, conform
from fire_data.session import Session
from fire_data.shards import Part, read_shard, sealed
from fire_data.stages import Stage, run_stage

DRIFT_WARNING = 0.05  # nats between rollout and rescored logprobs that are worth a word


def score(session: Session, round: int) -> Manifest:
    """Make, continue or confirm the scores of a round. Returns the sealed manifest."""
    run, cfg = session.run, session.run.config
    source_part = run.part("rollouts", round)
    source = sealed(source_part)
    receipts = {r.shard: r for r in source.shards}
    fields = _fields(session, round, source)
    stage = Stage(run.part("scores", round), fields, source.plan, _recorded(session))

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

    return run_stage(stage, make, lambda done: _stats(session, stage.part, done), session.report)


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
    student, wrote = session.student_fields(round), source.fields["student"]
    if student != wrote:
        text = f"the rollouts were written by another student: {json.dumps(wrote)}, now it is {json.dumps(student)}"
        raise FingerprintError(
            text, where=run.part("rollouts", round).label, fix=f"fire rollout {run.root} --round {round} --redo"
        )
    if session.vocabulary_fields != source.fields["vocabulary"]:
        text = "the rollouts were sampled over another vocabulary (another teacher's tokenizer, or none)"
        raise FingerprintError(
            text, where=run.part("rollouts", round).label, fix=f"fire rollout {run.root} --round {round} --redo"
        )
    return {
        "format": FORMAT,
        "score": cfg.score.results(),
        "student": student,
        "teacher": session.teacher_fields(),
        "template": session.template_fields(run.teacher()) if cfg.score.teacher_prompt == "own" else "shared",
        "vocabulary": session.vocabulary_fields,
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
        "teacher": teacher.model,
        "tokenizers": session.comparison.record(),
        "entropy_kind": "exact" if session.run.config.score.engine == "transformers" else "fake",
    }


def _stats(session: Session, part: Part, receipts: list[Receipt]) -> dict[str, Any]:
    """Means over all response tokens in nats, from per-trajectory sums; the last token apart, where stop roles show."""
    means = ("student_logprob", "teacher_logprob", "student_entropy", "teacher_entropy", "reverse_kl", "forward_kl")
    cfg = session.run.config.rollout
    comparable = cfg.temperature == 1.0 and cfg.top_p == 1.0 and cfg.top_k == 0 and cfg.engine != "fake"
    sums: dict[str, list[float]] = {m: [] for m in means}
    tokens, drift, last = 0, [], []
    for receipt in receipts:
        columns = [f"{m}_sum" for m in means] + [
            "finish_reason",
            "student_logprob",
            "teacher_logprob",
            "rollout_logprob",
        ]
        table = read_shard(part, receipt, columns)
        tokens += receipt.tokens
        for m in means:
            sums[m] += table[f"{m}_sum"].to_pylist()
        lists = [
            table[c].to_pylist() for c in ("student_logprob", "teacher_logprob", "rollout_logprob", "finish_reason")
        ]
        for s, t, r, reason in zip(*lists, strict=True):
            drift += [abs(a - b) for a, b in zip(s, r, strict=True)] if comparable else []
            last += [t[-1] - s[-1]] if reason == "stop" and s else []
    stats: dict[str, Any] = {
        "tokens": tokens,
        **{m: math.fsum(x) / tokens if tokens else None for m, x in sums.items()},
    }
    stats["last_token_advantage"] = math.fsum(last) / len(last) if last else None
    stats["rollout_drift"] = math.fsum(drift) / len(drift) if drift else None
    stats["rollout_drift_max"] = max(drift, default=None)
    if not comparable:
        session.report.note("rollout_logprob is not under the temperature-1 distribution: no drift check")
    elif stats["rollout_drift"] is not None and stats["rollout_drift"] > DRIFT_WARNING:
        session.report.warn(f"rollout and rescored logprobs differ by {stats['rollout_drift']:.3f} nats on average")
    return stats
