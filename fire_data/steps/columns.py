"""Further columns beside the scores, made when asked for: top-k of both models, base logprob, teacher pass rate.

Each group is a stage of its own over the plan of the rollouts, row by row like the scores, so that a sealed shard of
scores is never written again and only what is missing is computed. Units: nats; rates from 0 to 1.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fire_data import verify
from fire_data.engines import Evaluator
from fire_data.kept import Kept
from fire_data.outside import called
from fire_data.overview import start_over
from fire_data.precision import reduced
from fire_data.schemas.config import ADDED_TEACHER
from fire_data.schemas.errors import NOT_FINITE, ConfigError, FingerprintError
from fire_data.schemas.manifest import Manifest, Receipt, Shard, digest
from fire_data.schemas.tables import FLOATS, FORMAT, REWARD, TOPK_BOUND, addon_columns, conform
from fire_data.session import Session
from fire_data.shards import Part, is_sealed, read_manifest, read_shard, sealed, write_shard
from fire_data.stages import Stage, open_stage, run_stage
from fire_data.steps import engines
from fire_data.steps.inputs import (
    require_known,
    require_vocabulary,
    routed,
    score_fields,
    with_teacher_prompts,
)
from fire_data.steps.passes import Sweep, plan_passes, require_joint, require_same_columns
from fire_data.steps.passrate import count_prompts, pass_rate_fields, pass_rates
from fire_data.teachers import EXACT

_TRUNCATED = 0.1  # cut answers among the teacher's that are worth a word


@dataclass(frozen=True)
class Addon:
    """An addon of one round that can be made: its stage, how a shard and the statistics are computed, its cost."""

    name: str
    stage: Stage
    make: Callable[[Shard], pa.Table]
    stats: Callable[[list[Receipt]], dict[str, Any]]
    cost: str
    k: int = 0
    lanes: int = 1
    before: Callable[[list[Shard]], None] | None = None


def add_columns(session: Session, round: int, name: str, *, redo: bool = False) -> Manifest:
    """Make, continue or confirm one addon of a round, or make it anew. Returns its sealed manifest.

    Raises ConfigError if there is no addon of this name, DataError if the rollouts lack what it needs.
    """
    addon = prepare(session, round, name)
    if redo:
        start_over(session.run, "addons", round, session.report, name)
    begin(session, addon)
    return complete(session, addon)


def prepare(session: Session, round: int, name: str) -> Addon:
    """What is to be made for an addon. Finds what is wrong with the settings; no weights are loaded."""
    source = sealed(session.run.part("rollouts", round))
    known = session.run.addon_names
    if name not in known:
        text = f"there are no further columns {name!r}; there are: {', '.join(known)}"
        raise ConfigError(text, fix=f"fire score RUN --add {known[0]}")
    if name == REWARD:
        fix = session.run.part("addons", round, name).command
        raise ConfigError("rewards come from a verifier, not from a model", where="--add reward", fix=fix)
    if name.startswith(ADDED_TEACHER):
        return _teacher(session, round, source, name.removeprefix(ADDED_TEACHER))
    return _MAKERS[name](session, round, source)


def begin(session: Session, addon: Addon) -> None:
    """Open the stage of an addon and tell what it stores. Raises FingerprintError if it was begun otherwise."""
    part = addon.stage.part
    found = read_manifest(part)
    if found is not None and found.sealed and found.fingerprint == addon.stage.fingerprint:
        return
    try:
        open_stage(addon.stage)
    except FingerprintError as error:
        # The command's own --redo may be about the scores, which need not be made again.
        raise FingerprintError(error.what, where=error.where, fix=f"set them back, or: {part.command} --redo") from None
    session.report.note(addon.cost)


def complete(session: Session, addon: Addon) -> Manifest:
    """Make the shards that an addon still lacks, and seal it."""
    manifest = run_stage(addon.stage, addon.make, addon.stats, session.report, lanes=addon.lanes, before=addon.before)
    Kept(addon.stage.part, addon.stage.fingerprint).clear()
    session.release("base")  # an own model, needed no more in this round
    if addon.name.startswith(ADDED_TEACHER) and len(session.run.teachers) > 1:
        session.rest(addon.name.removeprefix(ADDED_TEACHER))  # room for the next one
    return manifest


def lacks(addon: Addon, shard: Shard) -> bool:
    """True if a shard of an addon was not made yet."""
    return not addon.stage.part.receipt_path(shard.name).exists()


def write(
    session: Session, addon: Addon, shard: Shard, rollouts: pa.Table, columns: pa.Table, started: float
) -> Receipt:
    """Commit a shard of an addon whose columns were computed together with the scores."""
    part = addon.stage.part
    table = _beside(session, part, shard, rollouts, columns)
    return write_shard(part, shard, table, addon.stage.fingerprint, started)


def _beside(session: Session, part: Part, shard: Shard, rollouts: pa.Table, columns: pa.Table) -> pa.Table:
    """The columns of an addon with the names of their rows."""
    named = columns.append_column("trajectory_id", rollouts["trajectory_id"])
    if session.run.config.score.rounding:
        named = reduced(named, part.table)
    return conform(named, part.table, f"{part.label}, shard {shard.name}", NOT_FINITE)


def _topk(session: Session, round: int, source: Manifest) -> Addon:
    cfg = session.run.config.score
    part, source_part = session.run.part("addons", round, "topk"), session.run.part("rollouts", round)
    receipts = {r.shard: r for r in source.shards}
    k = min(cfg.topk, int(session.vocabulary.allowed.sum()))
    names = routed(session.run, source)
    require_joint(session, names, "top-k")
    recorded = {**session.performance("score"), "teachers": {n: session.run.teacher(n).model for n in names}}
    stage = Stage(part, {**score_fields(session, round, source), "k": k}, source.plan, recorded)
    kept, passes = Kept(part, stage.fingerprint), plan_passes(session, round, names)
    sweep = Sweep(session, source_part, receipts, kept, passes, lambda _: (k, False))

    def make(shard: Shard) -> pa.Table:
        rollouts = sweep.rows(shard)
        return _beside(session, part, shard, rollouts, sweep.columns(shard, rollouts))

    def stats(done: list[Receipt]) -> dict[str, Any]:
        """How much of the probability the lists hold, mean over response tokens."""
        masses = {f"{who}_topk_mass": _mean(part, done, f"{who}_topk_logprobs", k) for who in ("student", "teacher")}
        on_student = _mean(part, done, "teacher_logprob_on_student_topk", k)
        return {"k": k, **masses, "teacher_mass_on_student_topk": on_student}

    return Addon("topk", stage, make, stats, _cost("topk", source, k), k, sweep.lanes, sweep.before)


def _base(session: Session, round: int, source: Manifest) -> Addon:
    cfg = session.run.config.score
    part, source_part = session.run.part("addons", round, "base"), session.run.part("rollouts", round)
    receipts = {r.shard: r for r in source.shards}
    require_vocabulary(session, source_part, source)
    ids = session.base_vocabulary

    def model() -> Evaluator:
        return engines.base_evaluator(session)

    def make(shard: Shard) -> pa.Table:
        rollouts = read_shard(source_part, receipts[shard.name])
        for name, known in (("prompt_ids", session.base_ids), ("response_ids", ids)):
            require_known(rollouts, name, known, source_part, receipts[shard.name], "base model")
        plain = rollouts.select(["trajectory_id", "prompt_ids", "response_ids"])
        made = kept.completed(shard.name, "base", plain, lambda some: model().evaluate(some))
        return _beside(session, part, shard, rollouts, made.select(["logprob"]).rename_columns(["base_logprob"]))

    fields = {
        "format": FORMAT,
        "engine": cfg.engine,
        "base": session.base_fields(),
        "vocabulary": {"size": ids.size, "allowed": digest(ids.allowed.nonzero()[0].tolist())},
        "rollouts": source.digest,
        **cfg.rounding,
    }
    recorded = {**session.performance("score"), "base": session.run.base().model}
    stage = Stage(part, fields, source.plan, recorded)
    kept = Kept(part, stage.fingerprint)

    def stats(done: list[Receipt]) -> dict[str, Any]:
        return {"base_logprob": _mean(part, done, "base_logprob")}

    engine = engines.base_engine(session)
    return Addon(
        "base", stage, make, stats, _cost("base", source), lanes=engines.lanes(session, engine),
        before=_probe(session, kept, engine, model),
    )  # fmt: skip


def _probe(session: Session, kept: Kept, engine: str, model: Callable[[], Evaluator]) -> Callable[[list[Shard]], None]:
    """Before any shard: that the server is what was declared, and the one that other shards are from."""

    def before(_: list[Shard]) -> None:
        if engine == "http":
            model()
            engines.require_same_servers(session, kept)

    return before


def _teacher(session: Session, round: int, source: Manifest, name: str) -> Addon:
    """All rows under one teacher. Rows that have their scores from it keep those numbers: nothing is computed twice."""
    run = session.run
    part, source_part, scores = (
        run.part(*p) for p in (("addons", round, f"{ADDED_TEACHER}{name}"), ("rollouts", round), ("scores", round))
    )
    receipts = {r.shard: r for r in source.shards}
    require_vocabulary(session, source_part, source)
    fields = {
        "format": FORMAT,
        "score": run.config.score.results(),
        "teacher": session.teacher_fields(name),
        "vocabulary": session.vocabulary_fields,
        "rollouts": source.digest,
    }
    stage = Stage(part, fields, source.plan, {**session.performance("score"), "teacher": run.teacher(name).model})
    kept = Kept(part, stage.fingerprint)

    @functools.cache  # once for all shards, each of which it names
    def scored_before() -> tuple[Manifest, dict[str, Receipt]]:
        told = sealed(scores)
        return told, {r.shard: r for r in told.shards}

    def make(shard: Shard) -> pa.Table:
        rollouts = with_teacher_prompts(session, read_shard(source_part, receipts[shard.name]), name)
        own = run.config.score.teacher_prompt == "own"
        for column in ("response_ids", "teacher_prompt_ids" if own else "prompt_ids"):
            require_known(rollouts, column, session.vocabulary, source_part, receipts[shard.name])
        told, scored_receipts = scored_before()
        scored = read_shard(scores, scored_receipts[shard.name])
        mine = pa.array([run.route(value) == name for value in rollouts["teacher"].to_pylist()], pa.bool_())
        theirs = rollouts.filter(pc.invert(mine))
        values = pc.if_else(
            pc.is_valid(theirs["teacher_prompt_ids"]), theirs["teacher_prompt_ids"], theirs["prompt_ids"]
        )
        rows = theirs.select(["trajectory_id", "prompt_ids", "response_ids"]).set_column(1, "prompt_ids", values)
        made = kept.completed(shard.name, name, rows, lambda some: model().evaluate(some)) if rows.num_rows else rows
        kind = (told.recorded.get("entropy_kind") or {}).get(name)
        if kind in EXACT and "entropy_mass" in made.column_names:
            text = f"{called(name)} now gives only bounds of its entropies, its scores have exact ones"
            fix = f"serve it as it was then, or: {scores.command} --redo"
            raise FingerprintError(text, where=f"{part.label}, shard {shard.name}", fix=fix)
        columns = _merged(name, rollouts, scored.filter(mine), made, kind)
        require_same_columns(part, shard, columns.column_names)
        return _beside(session, part, shard, rollouts, columns)

    def model() -> Evaluator:
        return engines.teacher_evaluator(session, name)

    def stats(done: list[Receipt]) -> dict[str, Any]:
        columns = [c.name.removesuffix(f".{name}") for c in addon_columns(part.name or "") or () if c.per == "token"]
        wanted = [f"{c}.{name}" for c in columns]
        there = {c for r in done for c in read_shard(part, r, ["trajectory_id"], optional=wanted).column_names}
        found = {c: _mean(part, done, f"{c}.{name}") for c in columns if f"{c}.{name}" in there}
        stage.recorded["entropy_kind"] = (
            TOPK_BOUND if "teacher_entropy_mass" in found else "fake" if engine == "fake" else "exact"
        )
        return found

    engine = engines.teacher_engine(session, name)
    return Addon(
        part.name or "", stage, make, stats, _cost(part.name or "", source), lanes=engines.lanes(session, engine),
        before=_probe(session, kept, engine, model),
    )  # fmt: skip


def _merged(name: str, rollouts: pa.Table, scored: pa.Table, made: pa.Table, kind: str | None) -> pa.Table:
    """The columns of a teacher's addon: from the scores where they are its own, else from what was made.

    `kind`: that of its entropies in the scores; None if it has no rows there. All shards have the same columns.
    """
    ids = pa.chunked_array([*scored["trajectory_id"].chunks, *made["trajectory_id"].chunks], pa.string())
    places = pc.index_in(rollouts["trajectory_id"], value_set=ids)
    columns = {f"teacher_prompt_ids.{name}": rollouts["teacher_prompt_ids"]}
    bound = "entropy_mass" in made.column_names if kind is None else kind not in EXACT
    for column in ("logprob", "entropy", *(["entropy_mass"] if bound else [])):
        halves = [_half(t, c) for t, c in ((scored, f"teacher_{column}"), (made, column)) if t.num_rows]
        values = pa.chunked_array([chunk for half in halves for chunk in half.chunks], FLOATS)
        columns[f"teacher_{column}.{name}"] = values.take(places)
    return pa.table(columns)


def _half(table: pa.Table, column: str) -> pa.ChunkedArray:
    """A column; masses of entropies that are exact are 1."""
    if column in table.column_names or not column.endswith("entropy_mass"):
        return table[column]
    lengths = pc.list_value_length(table["response_ids"] if "response_ids" in table.column_names else table["logprob"])
    return pa.chunked_array([[[1.0] * n for n in lengths.to_pylist()]], FLOATS)


def _mean(part: Part, receipts: list[Receipt], column: str, k: int | None = None) -> float | None:
    """Mean of a column over response tokens; with `k`, of the sum of the probabilities of their lists."""
    parts = []
    for receipt in receipts:
        values = pc.list_flatten(read_shard(part, receipt, [column])[column])
        numbers = pc.list_flatten(values) if k else values
        logprobs = numbers.to_numpy().astype(np.float64)
        parts.append(float(np.exp(logprobs).sum() if k else logprobs.sum()))
    tokens = sum(r.tokens for r in receipts)
    return math.fsum(parts) / tokens if tokens else None


def _pass_rate(session: Session, round: int, source: Manifest) -> Addon:
    cfg = session.run.config
    part, source_part = session.run.part("addons", round, "pass-rate"), session.run.part("rollouts", round)
    receipts = {r.shard: r for r in source.shards}
    samples, longest = cfg.score.pass_rate_samples, cfg.rollout.max_new_tokens
    prompts = 0 if is_sealed(part) else count_prompts(session, source_part, source)
    names = routed(session.run, source)

    def make(shard: Shard) -> pa.Table:
        rollouts = with_teacher_prompts(session, read_shard(source_part, receipts[shard.name]))
        name = "teacher_prompt_ids" if cfg.score.teacher_prompt == "own" else "prompt_ids"
        for who in names:
            routes = [session.run.route(value) == who for value in rollouts["teacher"].to_pylist()]
            mine = rollouts.filter(pa.array(routes, pa.bool_()))
            require_known(mine, name, session.teacher_vocabulary(who), source_part, receipts[shard.name], "teacher")
        rates, cut = pass_rates(session, rollouts)
        if cut > _TRUNCATED:
            session.report.warn(
                f"{cut:.0%} of the teacher's answers in shard {shard.name} were cut at {longest} tokens"
            )
        column = pa.array(rates, pa.float32())
        return _beside(session, part, shard, rollouts, pa.table({"teacher_pass_rate": column}))

    def stats(done: list[Receipt]) -> dict[str, Any]:
        """Over trajectories: mean rate, and the shares whose prompt the teacher never or always gets right."""
        rates = [x for r in done for x in read_shard(part, r, ["teacher_pass_rate"])["teacher_pass_rate"].to_pylist()]
        never, always = (verify.mean([float(r == end) for r in rates]) for end in (0.0, 1.0))
        return {
            "samples": samples,
            "teacher_pass_rate": verify.mean(rates),
            "never_right": never,
            "always_right": always,
        }

    recorded = {**session.performance("rollout"), "teachers": {n: session.run.teacher(n).model for n in names}}
    stage = Stage(part, pass_rate_fields(session, source), source.plan, recorded)
    work = f"; the teacher writes {samples} answers to each of {prompts:,} prompts"
    return Addon("pass-rate", stage, make, stats, _cost("pass-rate", source) + work)


def _cost(name: str, source: Manifest, k: int | None = None) -> str:
    """What an addon will store, from its schema and the receipts of the rollouts."""
    columns, receipts = [c for c in addon_columns(name) or () if not (c.optional or c.nullable)], source.shards
    per_token = columns[0].per == "token"
    each = sum(_width(column.type, k or 1) for column in columns)
    count = sum(r.tokens if per_token else r.rows for r in receipts)
    unit, units = ("response token", "tokens") if per_token else ("trajectory", "trajectories")
    which = name if k is None else f"{name} with k={k}"
    size = f"{_size(each * count)} for {count:,} {units}"
    return f"{which} stores about {each} bytes per {unit} before compression: {size}"


def _width(type_: pa.DataType, k: int) -> int:
    """Bytes of a column per token or row, lists per token having k numbers."""
    if pa.types.is_list(type_):
        inner = type_.value_type
        return k * _width(inner.value_type, 1) if pa.types.is_list(inner) else _width(inner, 1)
    return int(type_.bit_width) // 8


def _size(count: float) -> str:
    """Bytes in decimal units, three digits."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


_MAKERS = {"topk": _topk, "base": _base, "pass-rate": _pass_rate}
