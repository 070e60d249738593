"""How often the teacher itself answers a prompt right: it writes a few answers, and the verifier compares them.

The teacher writes over all its own ids, with the sampling settings of the rollouts and noise of its own: neither round
nor student enters it, so a prompt has the same rate whenever it is asked again.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from fire_data.schedule import hash_text
from fire_data.schemas.manifest import Manifest
from fire_data.schemas.tables import FORMAT, IDS
from fire_data.session import Session
from fire_data.shards import Part, read_shard
from fire_data.steps.engines import sampling, teacher_generator
from fire_data.steps.inputs import routed
from fire_data.verify import Verifier


def pass_rates(session: Session, rollouts: pa.Table) -> tuple[list[float], float]:
    """The rate of every row's prompt under its teacher, from 0 to 1, and the share of answers cut at max_new_tokens.

    Args:
        rollouts: with `teacher_prompt_ids` where the teacher's prompt differs from the student's.
    """
    samples = session.run.config.score.pass_rate_samples
    rows = rollouts.select(["prompt_id", "prompt_ids", "teacher_prompt_ids", "answer", "extra", "teacher"]).to_pylist()
    asked = list({row["prompt_id"]: row for row in rows}.values())
    rates: dict[str, float] = {}
    cut = 0
    with Verifier(session.run.config.verify, session.run.root) as verifier:
        for warning in verifier.start():
            session.report.warn(warning)
        for name in dict.fromkeys(session.run.route(row["teacher"]) for row in asked):
            mine = [row for row in asked if session.run.route(row["teacher"]) == name]
            cut += _ask(session, verifier, name, mine, rates)
    return [rates[row["prompt_id"]] for row in rows], cut / max(1, len(asked) * samples)


def _ask(session: Session, verifier: Verifier, name: str, asked: list[dict[str, Any]], rates: dict[str, float]) -> int:
    """Add the rates of prompts under one teacher; returns how many of its answers were cut."""
    cfg = session.run.config
    samples = cfg.score.pass_rate_samples
    names = [hash_text(cfg.seed, "pass-rate", row["prompt_id"], j) for row in asked for j in range(samples)]
    ids = [row["teacher_prompt_ids"] or row["prompt_ids"] for row in asked for _ in range(samples)]
    requests = pa.table({"trajectory_id": names, "prompt_ids": pa.array(ids, IDS)})
    answers = teacher_generator(session, name).generate(requests, sampling(session))
    texts = session.teacher_tokenizer(name).batch_decode(answers["response_ids"].to_pylist(), skip_special_tokens=True)
    right, extra = ([row[column] for row in asked for _ in range(samples)] for column in ("answer", "extra"))
    graded = verifier.grade([str(text) for text in texts], right, extra)
    for i, row in enumerate(asked):
        rates[row["prompt_id"]] = sum(g.reward or 0.0 for g in graded[i * samples : (i + 1) * samples]) / samples
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
        "verify": Verifier(cfg.verify, session.run.root).fields,
        "teachers": {name: session.teacher_fields(name) for name in routed(session.run, source)},
        "rollouts": source.digest,
    }


def count_prompts(session: Session, part: Part, source: Manifest) -> int:
    """Distinct prompts of sealed rollouts. Raises DataError if the verifier could not grade the answers to one."""
    prompts: dict[str, dict[str, Any]] = {}
    for receipt in source.shards:
        rows = read_shard(part, receipt, ["prompt_id", "answer", "extra"]).to_pylist()
        prompts |= {row["prompt_id"]: row for row in rows}
    fix = f"correct the prompts, then: {part.command} --redo"
    Verifier(session.run.config.verify, session.run.root).check(list(prompts.values()), part.label, fix)
    return len(prompts)
