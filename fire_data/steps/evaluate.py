"""`fire eval`: accuracy on held-out prompts, greedy and sampled, before training and after each round.

Each benchmark has an evaluation of its own, so that another one can be added later, and each is made, continued and
compared by itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import pyarrow as pa

from fire_data.engines import Generator
from fire_data.overview import start_over
from fire_data.prompts import read_prompts
from fire_data.sampling import Sampling
from fire_data.schedule import hash_text
from fire_data.schemas.manifest import Manifest, Receipt, Shard, digest
from fire_data.schemas.tables import FORMAT, IDS, conform
from fire_data.session import Session
from fire_data.shards import Part, read_shard
from fire_data.stages import Stage, plan_shards, run_stage
from fire_data.steps.benchmarks import PROMPTS_PER_SHARD, benchmarks
from fire_data.steps.engines import lanes, make_generator
from fire_data.steps.rollout import prompt_ids
from fire_data.verify import Verifier, mean, tally
from fire_data.verify.estimates import per_prompt

_MEASURED = ["prompt_id", "mode", "reward", "extracted"]


def evaluate(
    session: Session, round: int | None, prompts: str | None = None, *, redo: bool = False
) -> dict[str | None, Manifest]:
    """Evaluate the student after `round`, or (None) the given student. The same prompts and noise every round.

    Args:
        prompts: benchmarks or files, as `benchmarks` takes them; None: all of `eval.prompts`.

    Returns:
        The sealed manifest of every benchmark by its name, None for the one without a name.
    """
    run = session.run
    named = benchmarks(run, prompts)
    generator = functools.cache(lambda: make_generator(session, 0 if round is None else round + 1))
    with Verifier(run.config.verify, run.root) as verifier:
        return {name: _one(session, round, name, path, verifier, generator, redo) for name, path in named.items()}


def _one(
    session: Session,
    round: int | None,
    name: str | None,
    path: str,
    verifier: Verifier,
    generator: Callable[[], Generator],
    redo: bool,
) -> Manifest:
    run, cfg = session.run, session.run.config
    setting = "eval.prompts" if name is None else f"eval.prompts.{name}"
    prompts = read_prompts(path, run.root, need_answer=verifier.compares, setting=setting)
    rows = prompts.slice(0, cfg.eval.limit).to_pylist()
    verifier.check(rows, path, "correct the prompts, or --set verify.kind=KIND")
    part = run.part("evals", "start" if round is None else round, name)
    plan = plan_shards(len(rows), PROMPTS_PER_SHARD)
    recorded = {**session.performance("rollout"), "prompts": path}
    stage = Stage(part, _fields(session, 0 if round is None else round + 1, rows, verifier), plan, recorded)
    modes = [("greedy", 0)] * cfg.eval.greedy + [("sampled", j) for j in range(cfg.eval.n)]

    def ready(_: list[Shard]) -> None:
        for warning in verifier.start():
            session.report.warn(warning)
        generator()

    if redo:
        ready([])  # what is wrong is told before anything is set aside
        start_over(run, "evals", part.round, session.report, name)

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
            parts.append(_graded(chosen, samples, mode, list(map(str, texts)), answers, verifier))
        return conform(pa.concat_tables(parts), "evals", f"{part.label}, shard {shard.name}")

    def finish(done: list[Receipt]) -> dict[str, Any]:
        stage.recorded["verify"] = verifier.recorded
        if doubt := verifier.doubt([x for r in done for x in read_shard(part, r, ["reward"])["reward"].to_pylist()]):
            session.report.warn(doubt)
        return _stats(session, part, done)

    return run_stage(
        stage, make, finish, session.report, lanes=lanes(session, cfg.rollout.engine), before=ready
    )  # fmt: skip


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
    verifier: Verifier,
) -> pa.Table:
    right, extra = ([prompts[i][column] for i, _ in samples] for column in ("answer", "extra"))
    graded = verifier.grade(texts, right, extra)
    return pa.table({
        "prompt_id": [prompts[i]["prompt_id"] for i, _ in samples],
        "mode": [mode] * len(samples),
        "sample": pa.array([j for _, j in samples], pa.int32()),
        "response": texts,
        "extracted": pa.array([g.extracted for g in graded], pa.string()),
        "vote": pa.array([g.vote for g in graded], pa.string()),
        "answer": pa.array(right, pa.string()),
        "reward": pa.array([g.reward for g in graded], pa.float32()),
        "verdict": [g.verdict for g in graded],
        "length": pa.array([len(x) for x in answers["response_ids"].to_pylist()], pa.int32()),
        "finish_reason": answers["finish_reason"],
    })  # fmt: skip


def _fields(session: Session, model_round: int, rows: list[dict[str, Any]], verifier: Verifier) -> dict[str, Any]:
    cfg = session.run.config
    return {
        "format": FORMAT,
        "seed": cfg.seed,
        "eval": cfg.eval.results(),
        "max_new_tokens": cfg.eval.max_new_tokens or cfg.rollout.max_new_tokens,
        "engine": cfg.rollout.engine,
        "verify": verifier.fields,
        "prompts": digest(rows),  # in their order: shards are cut from it
        "student": session.student_fields(model_round),
        "template": session.template_fields(),
        "vocabulary": session.vocabulary_fields,
    }


def measured(part: Part, receipts: Iterable[Receipt], ks: Iterable[int]) -> dict[str, dict[str, float]]:
    """Every metric of an evaluation: per prompt a value from 0 to 1."""
    tables = [read_shard(part, r, _MEASURED, optional=["vote"]) for r in receipts]
    return per_prompt([row for table in tables for row in table.to_pylist()], ks)


def _stats(session: Session, part: Part, receipts: list[Receipt]) -> dict[str, Any]:
    """Greedy accuracy, avg@n, pass@k and maj@k (means over prompts) with their intervals; mean length; verdicts."""
    from fire_data.verify.bootstrap import interval

    cfg = session.run.config
    values = {name: list(v.values()) for name, v in measured(part, receipts, cfg.eval.k).items()}
    found = {name: interval(v, cfg.seed) for name, v in values.items()}
    table = pa.concat_tables(
        [read_shard(part, r, ["length", "finish_reason", "verdict", "prompt_id"]) for r in receipts]
    )
    return {
        "prompts": len(set(table["prompt_id"].to_pylist())),
        **{name: mean(v) for name, v in values.items()},
        "mean_length": mean(table["length"].to_pylist()),
        "truncated_fraction": mean([float(r == "length") for r in table["finish_reason"].to_pylist()]),
        "verdicts": tally(table["verdict"].to_pylist()),
        "intervals": {name: [i.low, i.high] for name, i in found.items()},
    }
