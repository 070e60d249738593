"""What scoring reads: the rollouts of a round, checked against models and vocabulary, with the teacher's prompts."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa

from fire_data import chat, vocabulary
from fire_data.engines import FakeScorer, Scorer
from fire_data.schemas.errors import FingerprintError, TokenizerError
from fire_data.schemas.manifest import Manifest, Receipt
from fire_data.schemas.tables import FORMAT, IDS
from fire_data.session import Session
from fire_data.shards import Part, read_shard
from fire_data.vocabulary import Vocabulary


def score_fields(session: Session, round: int, source: Manifest) -> dict[str, Any]:
    """What evaluating student and teacher on a round's rollouts depends on.

    Raises FingerprintError if they were written by another student, or over another vocabulary.
    """
    run, cfg = session.run, session.run.config
    part = run.part("rollouts", round)
    student, wrote = session.student_fields(round), source.fields["student"]
    if student != wrote:
        text = f"the rollouts were written by another student: {json.dumps(wrote)}, now it is {json.dumps(student)}"
        raise FingerprintError(text, where=part.label, fix=f"{part.command} --redo")
    require_vocabulary(session, part, source)
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


def require_vocabulary(session: Session, part: Part, source: Manifest) -> None:
    """Raise FingerprintError if the rollouts were sampled over other ids than student and teacher share now."""
    if session.vocabulary_fields != source.fields["vocabulary"]:
        text = "the rollouts were sampled over another vocabulary (another teacher's tokenizer, or none)"
        raise FingerprintError(text, where=part.label, fix=f"{part.command} --redo")


def score_inputs(session: Session, part: Part, receipt: Receipt) -> pa.Table:
    """A shard of rollouts with the column `teacher_prompt_ids`, null where that is the student's prompt.

    Raises TokenizerError if both models cannot read an id.
    """
    rollouts = with_teacher_prompts(session, read_shard(part, receipt))
    own = session.run.config.score.teacher_prompt == "own"
    for name in ("response_ids", "teacher_prompt_ids" if own else "prompt_ids"):
        require_known(rollouts, name, session.vocabulary, part, receipt)
    return rollouts


def require_known(
    table: pa.Table, name: str, ids: Vocabulary, part: Part, receipt: Receipt, who: str | None = None
) -> None:
    """Raise TokenizerError naming shard, row and id if a column holds one that a vocabulary lacks, that of `who`."""
    try:
        vocabulary.require_known_ids(table[name], ids, name, f"{part.label}, shard {receipt.shard}")
    except TokenizerError as error:
        if who is None:
            raise
        text = f"{error.what.partition(', which')[0]}, which the {who} lacks"
        raise TokenizerError(text, where=error.where, fix=f"use a {who} with the student's tokenizer") from None


def with_teacher_prompts(session: Session, rollouts: pa.Table) -> pa.Table:
    """The messages under the teacher's own template, null where that gives the student's ids or is not asked for."""
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


def make_scorer(session: Session, round: int) -> Scorer:
    """The configured scoring engine with the round's student and the teacher."""
    cfg = session.run.config.score
    if cfg.engine == "fake":
        return FakeScorer(session.vocabulary)
    from fire_data.scoring import TransformersScorer

    budget = cfg.logits_budget_mb << 20
    return TransformersScorer(
        session.student(round), session.teacher(), session.vocabulary, cfg.tokens_per_batch, budget
    )
