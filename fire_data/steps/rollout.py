"""`fire rollout`: the student answers the round's prompts, n samples each, one shard at a time."""

from __future__ import annotations

import collections
import functools
from typing import Any

import pyarrow as pa

from fire_data import chat, contract
from fire_data.engines import Generator
from fire_data.kept import Kept
from fire_data.overview import start_over
from fire_data.prompts import as_messages, prompts_digest, read_prompts
from fire_data.schedule import Slot, round_slots, trajectory_id
from fire_data.schemas.errors import DataError
from fire_data.schemas.manifest import Manifest, Receipt, Shard
from fire_data.schemas.tables import FORMAT, IDS, conform
from fire_data.session import Session
from fire_data.shards import Part, read_shard
from fire_data.stages import Stage, plan_shards, run_stage
from fire_data.steps.engines import lanes, make_generator, require_same_servers, sampling, teacher_generator
from fire_data.verify import Verifier, mean


def rollout(session: Session, round: int, *, redo: bool = False) -> Manifest:
    """Make, continue or confirm the rollouts of a round, or make them anew. Returns the sealed manifest."""
    run, cfg = session.run, session.run.config
    prompts = read_prompts(cfg.prompts.path, run.root, need_answer=cfg.rollout.verifier != "none")
    verifier = _verifier(session)
    _check_routes(session, prompts)
    _warn_of_truncation(session)
    slots = round_slots(prompts["prompt_id"].to_pylist(), cfg.seed, round, cfg.rollout.prompts_per_round)
    rows = prompts.take([s.row for s in slots]).to_pylist()
    ids = [prompt_ids(session, row) for row in rows]
    wanted = len(rows)
    rows, ids, slots = _within_limit(session, rows, ids, slots)
    stage = Stage(
        run.part("rollouts", round),
        fields=_fields(session, round, prompts, rows),
        plan=plan_shards(len(rows), cfg.rollout.prompts_per_shard),
        recorded={
            "prompts": cfg.prompts.path,
            "student": run.student(round).model,
            "skipped_prompts": wanted - len(rows),
            "reads": contract.attest(session),
            **session.performance("rollout"),
        },
    )

    if redo:
        start_over(run, "rollouts", round, session.report)

    kept = Kept(stage.part, stage.fingerprint)

    @functools.cache
    def generator(teacher: str | None = None) -> Generator:
        return make_generator(session, round) if teacher is None else teacher_generator(session, teacher, shared=True)

    def write(requests: pa.Table, names: list[str], routes: list[str | None] | None) -> pa.Table:
        """The student's answers or, with routes by trajectory, those of each one's teacher."""
        if routes is None:
            return generator().generate(requests, sampling(session))
        teachers = dict(zip(names, map(run.route, routes), strict=True))
        mine = [teachers[name] for name in requests["trajectory_id"].to_pylist()]
        parts = []
        for teacher in dict.fromkeys(mine):
            asked = requests.filter(pa.array([name == teacher for name in mine]))
            made = generator(teacher).generate(asked, sampling(session))
            parts.append(made.append_column("trajectory_id", asked["trajectory_id"]))
        return pa.concat_tables(parts)

    def before(_: list[Shard]) -> None:
        if cfg.rollout.verifier != "none":
            verifier.start()
        if cfg.rollout.writer == "student":
            generator()
        require_same_servers(session, kept)

    def make(shard: Shard) -> pa.Table:
        samples = [
            (i, slots[i].repeat * cfg.rollout.n + j)
            for i in range(shard.start, shard.stop)
            for j in range(cfg.rollout.n)
        ]
        names = [trajectory_id(cfg.seed, round, rows[i]["prompt_id"], sample) for i, sample in samples]
        requests = pa.table({"trajectory_id": names, "prompt_ids": pa.array([ids[i] for i, _ in samples], IDS)})
        routes = [rows[i]["teacher"] for i, _ in samples] if cfg.rollout.writer == "teacher" else None
        answers = kept.completed(shard.name, "student", requests, lambda r: write(r, names, routes))
        texts = session.tokenizer.batch_decode(answers["response_ids"].to_pylist(), skip_special_tokens=True)
        columns: dict[str, Any] = {
            "round": [round] * len(samples),
            "sample": [sample for _, sample in samples],
            "response": [str(t) for t in texts],
            **{k: [rows[i][k] for i, _ in samples] for k in ("prompt_id", "answer", "teacher", "extra")},
            "messages": [as_messages(rows[i]) for i, _ in samples],
        }
        if cfg.rollout.verifier == "exact":
            graded = verifier.grade(columns["response"], columns["answer"], columns["extra"])
            columns["reward"] = [g.reward for g in graded]
        table = pa.table(
            {**{k: answers[k] for k in answers.column_names}, **{k: requests[k] for k in requests.column_names}}
        )
        for name, values in columns.items():
            table = table.append_column(name, pa.array(values))
        return conform(table, "rollouts", f"{stage.part.label}, shard {shard.name}")

    with verifier:
        manifest = run_stage(
            stage,
            make,
            lambda receipts: _stats(stage.part, receipts),
            session.report,
            lanes=lanes(session, cfg.rollout.engine),
            before=before,
        )
    kept.clear()
    return manifest


def _verifier(session: Session) -> Verifier:
    """What fills `reward` as responses are written: plain comparison. `fire verify` has the other kinds."""
    return Verifier(session.run.config.verify, session.run.root, kind="exact")


def _check_routes(session: Session, prompts: pa.Table) -> None:
    """Raise ConfigError for a prompt whose teacher is unknown, before anything is loaded."""
    run = session.run
    values = dict.fromkeys(prompts["teacher"].to_pylist())
    if not run.teachers:
        return  # rollouts need none
    for value in values:
        run.route(value)
    named = [v for v in values if v is not None]
    if named and not run.config.teachers:
        session.report.warn(
            f"the prompts name teachers ({', '.join(map(str, named[:5]))}), and all go to the one there is: `teacher`"
        )


def _warn_of_truncation(session: Session) -> None:
    """Say that what is sampled is not the distribution that the loss is about."""
    cfg = session.run.config
    told = contract.truncation(cfg.rollout.results())
    if told and cfg.weigh.rollout_is_cap is None:
        session.report.warn(
            f"sampling with {told} is not sampling from the student: distillation assumes its full distribution at "
            "temperature 1 (weigh.rollout_is_cap: 5 corrects for it, up to that factor)"
        )


def prompt_ids(session: Session, row: dict[str, Any]) -> list[int]:
    """The student's ids of a prompt. Raises DataError naming the prompt if its template refuses it."""
    cfg, root, tokenizer = session.run.config, session.run.root, session.tokenizer
    try:
        return chat.render(tokenizer, cfg.student, root, as_messages(row), cfg.rollout.raw)
    except DataError as error:
        raise DataError(error.what, where=f"prompt {row['prompt_id']!r}", fix=error.fix) from None


def _within_limit(
    session: Session, rows: list[dict[str, Any]], ids: list[list[int]], slots: list[Slot]
) -> tuple[list[dict[str, Any]], list[list[int]], list[Slot]]:
    cfg = session.run.config
    limit = cfg.rollout.max_prompt_tokens
    long = [i for i, x in enumerate(ids) if len(x) > limit]
    if long and cfg.rollout.long_prompts == "error":
        i = long[0]
        name = rows[i]["prompt_id"]
        text = f"prompt {name!r} has {len(ids[i])} tokens, the limit is {limit} ({len(long)} prompts are too long)"
        fix = f"--set rollout.max_prompt_tokens={max(map(len, ids))}, or --set rollout.long_prompts=skip"
        raise DataError(text, where=cfg.prompts.path, fix=fix)
    if long:
        session.report.warn(f"{len(long)} prompts are longer than {limit} tokens and are skipped")
    good = [i for i in range(len(ids)) if len(ids[i]) <= limit]
    if not good:
        raise DataError(
            f"no prompt has at most {limit} tokens", where=cfg.prompts.path, fix="--set rollout.max_prompt_tokens=N"
        )
    return [rows[i] for i in good], [ids[i] for i in good], [slots[i] for i in good]


def _fields(session: Session, round: int, prompts: pa.Table, rows: list[dict[str, Any]]) -> dict[str, Any]:
    cfg, run = session.run.config, session.run
    writers = dict.fromkeys(run.route(row["teacher"]) for row in rows) if cfg.rollout.writer == "teacher" else {}
    return {
        "format": FORMAT,
        "seed": cfg.seed,
        "rollout": cfg.rollout.results(),
        **({"writers": {name: session.teacher_fields(name) for name in writers}} if writers else {}),
        "verify": _verifier(session).fields if cfg.rollout.verifier != "none" else None,
        "prompts": prompts_digest(prompts),
        "student": session.student_fields(round),
        "template": session.template_fields(),
        "vocabulary": session.vocabulary_fields,
    }


def _stats(part: Part, receipts: list[Receipt]) -> dict[str, Any]:
    tables = [read_shard(part, r, ["finish_reason", "reward", "teacher"]) for r in receipts]
    routes = collections.Counter(x for t in tables for x in t["teacher"].to_pylist())
    reasons = [x for t in tables for x in t["finish_reason"].to_pylist()]
    rewards = [x for t in tables for x in t["reward"].to_pylist() if x is not None]
    tokens = sum(r.tokens for r in receipts)
    return {
        "trajectories": len(reasons),
        "tokens": tokens,
        "mean_length": tokens / len(reasons) if reasons else None,
        "truncated_fraction": reasons.count("length") / len(reasons) if reasons else None,
        "mean_reward": mean(rewards),
        "routes": [list(pair) for pair in sorted(routes.items(), key=lambda p: p[0] or "")],
    }
