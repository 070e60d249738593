"""How often the teacher itself answers a prompt right: it writes a few answers, and the verifier compares them.

The teacher writes over all its own ids, with the sampling settings of the rollouts and noise of its own: neither round
nor student enters it, so a prompt has the same rate whenever it is asked again.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from fire_data import verify
from fire_data.schedule import hash_text
from fire_data.schemas.errors import DataError
from fire_data.schemas.manifest import Manifest
from fire_data.schemas.tables import FORMAT, IDS
from fire_data.session import Session
from fire_data.shards import Part, read_shard
from fire_data.steps.engines import sampling, teacher_generator
from fire_data.steps.inputs import routed


def pass_rates(session: Session, rollouts: pa.Table) -> tuple[list[float], float]:
    """The rate of every row's prompt under its teacher, from 0 to 1, and the share of answers cut at max_new_tokens.

    Args:
        rollouts: with `teacher_prompt_ids` where the teacher's prompt differs from the student's.
    """
    samples = session.run.config.score.pass_rate_samples
    rows = rollouts.select(["prompt_id", "prompt_ids", "teacher_prompt_ids", "answer", "teacher"]).to_pylist()
    asked = list({row["prompt_id"]: row for row in rows}.values())
    rates: dict[str, float] = {}
    cut = 0
    for name in dict.fromkeys(session.run.route(row["teacher"]) for row in asked):
        mine = [row for row in asked if session.run.route(row["teacher"]) == name]
        cut += _ask(session, name, mine, rates)
    return [rates[row["prompt_id"]] for row in rows], cut / max(1, len(asked) * samples)


def _ask(session: Session, name: str, asked: list[dict[str, Any]], rates: dict[str, float]) -> int:
    """Add the rates of prompts under one teacher; returns how many of its answers were cut."""
    cfg = session.run.config
    pattern, samples = verify.compile_pattern(cfg.verify.pattern), cfg.score.pass_rate_samples
    names = [hash_text(cfg.seed, "pass-rate", row["prompt_id"], j) for row in asked for j in range(samples)]
    ids = [row["teacher_prompt_ids"] or row["prompt_ids"] for row in asked for _ in range(samples)]
    requests = pa.table({"trajectory_id": names, "prompt_ids": pa.array(ids, IDS)})
    answers = teacher_generator(session, name).generate(requests, sampling(session))
    texts = session.teacher_tokenizer(name).batch_decode(answers["response_ids"].to_pylist(), skip_special_tokens=True)
    for i, row in enumerate(asked):
        mine = texts[i * samples : (i + 1) * samples]
        rates[row["prompt_id"]] = sum(verify.exact(str(text), row["answer"], pattern) for text in mine) / samples
    return int(answers["finish_reason"].to_pylist().count("length"))


def pass_rate_fields(session: Session, source: Manifest) -> dict[str, Any]:
    """What the rates of a round's prompts depend on."""
    cfg = session.run.config
    how = sampling(session)
    return {
        "format": FORMAT,
        "seed": cfg.seed,
        "score": cfg.score.results(),
        "samples": cfg.score.pass_rate_samples,
        "sampling": {k: getattr(how, k) for k in ("temperature", "top_p", "top_k", "max_new_tokens")},
        "verify": cfg.verify.results(),
        "teachers": {name: session.teacher_fields(name) for name in routed(session.run, source)},
        "rollouts": source.digest,
    }


def count_prompts(part: Part, source: Manifest) -> int:
    """Distinct prompts of sealed rollouts. Raises DataError if one has no answer to compare with."""
    answers: dict[str, str | None] = {}
    for receipt in source.shards:
        columns = read_shard(part, receipt, ["prompt_id", "answer"]).to_pydict()
        answers |= dict(zip(columns["prompt_id"], columns["answer"], strict=True))
    for prompt, answer in answers.items():
        if answer is None:
            text = f"prompt {prompt!r} has no answer, and a pass rate needs one"
            raise DataError(text, where=part.label, fix=f"give every prompt an `answer`, then: {part.command} --redo")
    return len(answers)
