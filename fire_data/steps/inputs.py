"""What scoring reads: the rollouts of a round, checked against models and vocabulary, with the teachers' prompts."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa

from fire_data import chat, vocabulary
from fire_data.run import Run
from fire_data.schemas.errors import FingerprintError, TokenizerError
from fire_data.schemas.manifest import Manifest, Receipt
from fire_data.schemas.tables import FORMAT, IDS
from fire_data.session import Session
from fire_data.shards import Part, read_shard
from fire_data.vocabulary import Vocabulary


def score_fields(session: Session, round: int, source: Manifest) -> dict[str, Any]:
    """What evaluating student and teachers on a round's rollouts depends on.

    Raises FingerprintError if they were written by another student, over another vocabulary or behind another template.
    """
    cfg = session.run.config
    student = require_student(session, round, source)
    require_vocabulary(session, session.run.part("rollouts", round), source)
    return {
        "format": FORMAT,
        "score": cfg.score.results(),
        "student": student,
        "teachers": {name: session.teacher_fields(name) for name in routed(session.run, source)},
        "vocabulary": session.vocabulary_fields,
        "rollouts": source.digest,
    }


def routed(run: Run, source: Manifest) -> list[str]:
    """The teachers that the prompts of sealed rollouts go to, in the order of the configuration.

    Raises ConfigError for a route that leads nowhere.
    """
    used = {run.route(value) for value, _ in source.stats["routes"]}
    return [name for name in run.teachers if name in used]


def require_student(session: Session, round: int, source: Manifest) -> dict[str, Any]:
    """The student of a round, for a fingerprint. Raises FingerprintError if another one wrote the rollouts."""
    part = session.run.part("rollouts", round)
    student, wrote = session.student_fields(round), source.fields["student"]
    if student != wrote:
        text = f"the rollouts were written by another student: {json.dumps(wrote)}, now it is {json.dumps(student)}"
        raise FingerprintError(text, where=part.label, fix=f"{part.command} --redo")
    return student


def require_vocabulary(session: Session, part: Part, source: Manifest) -> None:
    """Raise FingerprintError if the rollouts were sampled over other ids than all models share now."""
    if session.vocabulary_fields != source.fields["vocabulary"]:
        text = "the rollouts were sampled over another vocabulary (another teacher's tokenizer, or none)"
        raise FingerprintError(text, where=part.label, fix=f"{part.command} --redo")


def score_inputs(session: Session, part: Part, receipt: Receipt) -> pa.Table:
    """A shard of rollouts with the column `teacher_prompt_ids`, null where that is the student's prompt.

    Raises TokenizerError if the models cannot read an id.
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


def with_teacher_prompts(session: Session, rollouts: pa.Table, name: str | None = None) -> pa.Table:
    """The messages as each row's teacher is given them, or all as the one called `name` is.

    Null where those are the student's ids, or where no prompt of its own is asked for.
    """
    run = session.run
    own: list[list[int] | None] = [None] * rollouts.num_rows
    if run.config.score.teacher_prompt == "own":
        known: dict[tuple[str, str], list[int]] = {}
        columns = (rollouts[c].to_pylist() for c in ("messages", "prompt_ids", "teacher"))
        for i, (messages, ids, route) in enumerate(zip(*columns, strict=True)):
            who = name or run.route(route)
            key = (who, json.dumps(messages))
            if key not in known:
                with session.lock:
                    tokenizer = session.teacher_tokenizer(who)
                    known[key] = chat.render(tokenizer, run.teacher(who), run.root, messages, False)
            own[i] = known[key] if known[key] != ids else None
    return rollouts.append_column("teacher_prompt_ids", pa.array(own, IDS))
