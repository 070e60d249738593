"""`fire eval`: accuracy on held-out prompts with `answer`, greedy and sampled, before training and after each round."""

from __future__ import annotations

import functools
from typing import Any

import pyarrow as pa

from fire_data import verify
from fire_data.engines import Generator
from fire_data.overview import start_over
from fire_data.prompts import read_prompts
from fire_data.sampling import Sampling
from fire_data.schedule import hash_text
from fire_data.schemas.errors import ConfigError
from fire_data.schemas.manifest import Manifest, Receipt, Shard, digest
from fire_data.schemas.tables import FORMAT, IDS, conform
from fire_data.session import Session
from fire_data.shards import Part, read_shard
from fire_data.stages import Stage, plan_shards, run_stage
from fire_data.steps.engines import lanes, make_generator
from fire_data.steps.rollout import prompt_ids

_PROMPTS_PER_SHARD = 256


def evaluate(session: Session, round: int | None, *, redo: bool = False) -> Manifest:
    """Evaluate the student after `round`, or (None) the given student. The same prompts and noise every round."""
    run, cfg = session.run, session.run.config
    if cfg.eval.prompts is None:
        raise ConfigError(
            "there are no held-out prompts", where=str(run.root / "fire.yaml"), fix="--set eval.prompts=held_out.jsonl"
        )
    prompts = read_prompts(cfg.eval.prompts, run.root, need_answer=True, setting="eval.prompts")
    prompts = prompts.slice(0, cfg.eval.limit)
    pattern = verify.compile_pattern(cfg.verify.pattern)
    rows = prompts.to_pylist()
    model_round = 0 if round is None else round + 1
    part = run.part("evals", "start" if round is None else round)
    plan = plan_shards(len(rows), _PROMPTS_PER_SHARD)
    stage = Stage(part, _fields(session, model_round, rows), plan, session.performance("rollout"))
    if redo:
        start_over(run, "evals", part.round, session.report)
    modes = [("greedy", 0)] * cfg.eval.greedy + [("sampled", j) for j in range(cfg.eval.n)]

    @functools.cache
    def generator() -> Generator:
        return make_generator(session, model_round)

    def before(_: list[Shard]) -> None:
        generator()

    def make(shard: Shard) -> pa.Table:
        chosen = rows[shard.start : shard.stop]
        with session.lock:
            ids = [prompt_ids(session, row) for row in chosen]
        parts = []
        for mode in dict.fromkeys(m for m, _ in modes):
            samples = [(i, j) for i in range(len(chosen)) for m, j in modes if m == mode]
            # Neither round nor model enters the noise: two evaluations differ by their models alone.
            names = [hash_text(cfg.seed, "eval", chosen[i]["prompt_id"], j) for i, j in samples]
            requests = pa.table({"trajectory_id": names, "prompt_ids": pa.array([ids[i] for i, _ in samples], IDS)})
            answers = generator().generate(requests, _sampling(session, mode == "greedy"))
            texts = session.tokenizer.batch_decode(answers["response_ids"].to_pylist(), skip_special_tokens=True)
            parts.append(_graded(chosen, samples, mode, texts, answers, pattern))
        return conform(pa.concat_tables(parts), "evals", f"{part.label}, shard {shard.name}")

    engines = lanes(session, cfg.rollout.engine)
    return run_stage(
        stage, make, lambda done: _stats(session, part, done), session.report, lanes=engines, before=before
    )


def _sampling(session: Session, greedy: bool) -> Sampling:
    cfg = session.run.config
    longest = cfg.eval.max_new_tokens or cfg.rollout.max_new_tokens
    return Sampling(cfg.seed, temperature=cfg.eval.temperature, max_new_tokens=longest, greedy=greedy)


def _graded(
    prompts: list[dict[str, Any]],
    samples: list[tuple[int, int]],
    mode: str,
    texts: list[str],
    answers: pa.Table,
    pattern: Any,
) -> pa.Table:
    found = [verify.extract(t, pattern) for t in texts]
    right = [prompts[i]["answer"] for i, _ in samples]
    return pa.table({
        "prompt_id": [prompts[i]["prompt_id"] for i, _ in samples],
        "mode": [mode] * len(samples),
        "sample": pa.array([j for _, j in samples], pa.int32()),
        "response": texts,
        "extracted": pa.array(found, pa.string()),
        "answer": right,
        "reward": pa.array([verify.grade(f, a) for f, a in zip(found, right, strict=True)], pa.float32()),
        "length": pa.array([len(x) for x in answers["response_ids"].to_pylist()], pa.int32()),
        "finish_reason": answers["finish_reason"],
    })  # fmt: skip


def _fields(session: Session, model_round: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
    cfg = session.run.config
    return {
        "format": FORMAT,
        "seed": cfg.seed,
        "eval": cfg.eval.results(),
        "max_new_tokens": cfg.eval.max_new_tokens or cfg.rollout.max_new_tokens,
        "engine": cfg.rollout.engine,
        "verify": cfg.verify.results(),
        "prompts": digest(rows),  # in their order: shards are cut from it
        "student": session.student_fields(model_round),
        "template": session.template_fields(),
        "vocabulary": session.vocabulary_fields,
    }


def _stats(session: Session, part: Part, receipts: list[Receipt]) -> dict[str, Any]:
    """Greedy accuracy, avg@n, pass@k (means over prompts) and mean length."""
    cfg = session.run.config.eval
    table = pa.concat_tables([read_shard(part, r) for r in receipts])
    rewards: dict[str, dict[str, list[float]]] = {"greedy": {}, "sampled": {}}
    for row in table.select(["mode", "prompt_id", "reward"]).to_pylist():
        rewards[row["mode"]].setdefault(row["prompt_id"], []).append(row["reward"])
    stats: dict[str, Any] = {"prompts": len(set(table["prompt_id"].to_pylist()))}
    if rewards["greedy"]:
        stats["greedy"] = verify.mean([r[0] for r in rewards["greedy"].values()])
    if rewards["sampled"]:
        by_prompt = list(rewards["sampled"].values())
        stats[f"avg@{cfg.n}"] = verify.mean([sum(r) / len(r) for r in by_prompt])
        for k in cfg.k:
            stats[f"pass@{k}"] = verify.mean([verify.pass_at_k(len(r), int(sum(r)), k) for r in by_prompt])
    stats["mean_length"] = verify.mean(table["length"].to_pylist())
    stats["truncated_fraction"] = verify.mean([float(r == "length") for r in table["finish_reason"].to_pylist()])
    return stats
