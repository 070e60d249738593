"""`fire score`: student and teachers evaluated on every token the student wrote.

The addons that are asked for follow. A shard that lacks both its scores and its top-k has both made in one pass.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import Any

import polars as pl
import pyarrow as pa

from fire_data import contract
from fire_data.diagnose.checks import DRIFT_WARNING
from fire_data.kept import Kept
from fire_data.outside import called
from fire_data.overview import start_over
from fire_data.precision import reduced
from fire_data.schemas.errors import NOT_FINITE
from fire_data.schemas.manifest import Manifest, Receipt, Shard
from fire_data.schemas.tables import MASSES, SIGNALS, TOPK_BOUND, conform
from fire_data.session import Session
from fire_data.shards import Part, read_shard, sealed
from fire_data.stages import Stage, run_stage
from fire_data.steps import columns
from fire_data.steps.engines import open_servers, require_same_servers
from fire_data.steps.inputs import routed, score_fields
from fire_data.steps.passes import Sweep, plan_passes

_MEANS = ("student_logprob", "teacher_logprob", "student_entropy", "teacher_entropy", "reverse_kl", "forward_kl")


def score(session: Session, round: int, *, add: Iterable[str] = (), redo: bool = False) -> Manifest:
    """Make, continue or confirm the scores of a round, then its addons. Returns the sealed manifest of the scores.

    Args:
        add: addons beside those of `score.add`.
        redo: make the scores anew, with all that was made from them; with `add`, those addons instead.

    Raises ConfigError if there is no addon of a name, before anything is made.
    """
    run, cfg = session.run, session.run.config
    source_part = run.part("rollouts", round)
    source = sealed(source_part)
    receipts = {r.shard: r for r in source.shards}
    names = routed(run, source)
    stage = Stage(
        run.part("scores", round), score_fields(session, round, source), source.plan, _recorded(session, source, names)
    )
    asked = tuple(dict.fromkeys(add))
    addons = [columns.prepare(session, round, name) for name in dict.fromkeys((*cfg.score.add, *asked))]
    if redo:
        if not asked:
            start_over(run, "scores", round, session.report)
        for name in asked:
            start_over(run, "addons", round, session.report, name)
    for addon in addons:
        columns.begin(session, addon)
    topk = next((a for a in addons if a.name == "topk"), None)

    def wanted(shard: Shard) -> tuple[int, bool]:
        return (topk.k if topk is not None and columns.lacks(topk, shard) else 0), True

    kept = Kept(stage.part, stage.fingerprint)
    sweep = Sweep(session, source_part, receipts, kept, plan_passes(session, round, names), wanted)

    def before(missing: list[Shard]) -> None:
        open_servers(session, round, names)
        require_same_servers(session, kept)
        sweep.before(missing)

    def make(shard: Shard) -> pa.Table:
        started = time.monotonic()
        rollouts = sweep.rows(shard)
        k, _ = wanted(shard)
        signals = sweep.columns(shard, rollouts)
        if topk is not None and k:
            columns.write(session, topk, shard, rollouts, signals, started)
        for name in (c.name for c in (*SIGNALS, *MASSES) if c.name in signals.column_names):
            rollouts = rollouts.append_column(name, signals[name])
        if cfg.score.rounding:  # before they are summed: sums are those of the numbers beside them
            rollouts = reduced(rollouts, "scores")
        from fire_data.scoring import summarise

        return conform(summarise(rollouts), "scores", f"{stage.part.label}, shard {shard.name}", NOT_FINITE)

    def finish(done: list[Receipt]) -> dict[str, Any]:
        rows = pl.concat([_numbers(stage.part, receipt) for receipt in done])
        stage.recorded["entropy_kind"] = _entropy_kinds(session, rows, names)
        return _stats(session, source, rows)

    manifest = run_stage(stage, make, finish, session.report, lanes=sweep.lanes, before=before)
    kept.clear()
    for addon in addons:
        columns.complete(session, addon)
    return manifest


def _recorded(session: Session, source: Manifest, names: list[str]) -> dict[str, Any]:
    run = session.run
    for name in names:
        teacher = run.teacher(name)
        templated = teacher.chat_template or session.teacher_tokenizer(name).chat_template  # a base teacher has none
        if run.config.score.teacher_prompt == "own" or run.config.rollout.raw or not templated:
            continue
        if session.template_fields() != session.template_fields(name):
            session.report.warn(
                f"student and {called(name)} have different chat templates; the teacher sees the student's prompt "
                "(--set score.teacher_prompt=own renders its own)"
            )
    return {
        **session.performance("score"),
        "teachers": {name: run.teacher(name).model for name in names},
        "tokenizers": {name: session.comparison(name).record() for name in names},
        "reads": contract.attest(session, run.teachers),
        "sampling": contract.sampling_of(source),
    }


def _entropy_kinds(session: Session, rows: pl.DataFrame, names: list[str]) -> dict[str, str]:
    """Whether a model's entropies are exact, by model: a bound says from how much probability it was computed."""
    if session.run.config.score.engine == "fake":
        return dict.fromkeys(("student", *names), "fake")
    routes = pl.Series([session.run.route(value) for value in rows["teacher"].to_list()], dtype=pl.String)
    kinds = {}
    for name in ("student", *names):
        column = f"{'student' if name == 'student' else 'teacher'}_entropy_mass_least"
        mine = rows if name == "student" else rows.filter(routes == name)
        least = mine[column].min() if column in rows.columns else None
        kinds[name] = "exact" if least is None or least == 1.0 else TOPK_BOUND
    return kinds


def _stats(session: Session, source: Manifest, rows: pl.DataFrame) -> dict[str, Any]:
    """Means over all response tokens in nats, from per-trajectory sums; the last token apart, where end roles show.

    `rollout_drift` compares the logprobs of sampling and of scoring, where both are under the same distribution.
    """
    comparable = not contract.truncation(contract.sampling_of(source))
    tokens = int(rows["length"].sum())
    stats: dict[str, Any] = {"tokens": tokens}
    for name in _MEANS:
        have = f"{name}_sum" in rows.columns
        stats[name] = math.fsum(rows[f"{name}_sum"]) / tokens if tokens and have else None
    masses = [c.name for c in MASSES if c.name in rows.columns]
    stats |= {name: math.fsum(rows[name]) / tokens if tokens else None for name in masses}
    last = rows["last"].drop_nulls()
    stats["last_token_advantage"] = math.fsum(last) / len(last) if len(last) else None
    drift = math.fsum(rows["drift"]) / tokens if comparable and tokens else None
    stats |= {"rollout_drift": drift, "rollout_drift_max": rows["drift_max"].max() if comparable else None}
    cfg = session.run.config
    if cfg.teachers or cfg.score.teacher_prompt == "own":
        stats["teachers"] = _by_teacher(session, rows)
    _tell_drift(session, source, drift, stats["rollout_drift_max"])
    return stats


def _tell_drift(session: Session, source: Manifest, drift: float | None, most: float | None) -> None:
    """Say how far the logprobs of sampling and of scoring are apart, in nats, or why that is not known."""
    told, report = contract.truncation(contract.sampling_of(source)), session.report
    if told:
        report.note(
            f"sampled with {told}: rollout_logprob is under another distribution than student_logprob, so there is no "
            "drift check (--set weigh.rollout_is_cap=5 weighs by the ratio of both)"
        )
        return
    if drift is None or most is None or session.run.config.score.engine == "fake":
        return
    text = f"rollout and rescored logprobs differ by {drift:.2g} nats on average, {most:.2g} at most"
    if drift > DRIFT_WARNING:
        report.warn(
            f"{text}: sample and score in the same dtype and engine, or correct for it: --set weigh.rollout_is_cap=5"
        )
    else:
        report.note(text)


def _by_teacher(session: Session, rows: pl.DataFrame) -> dict[str, Any]:
    """Per teacher: rows, tokens, mean logprobs in nats, how many tokens its prompts have more than the student's."""
    found = {}
    rows = rows.with_columns(offset=pl.col("offset").fill_null(0))
    routes = pl.Series([session.run.route(value) for value in rows["teacher"].to_list()], dtype=pl.String)
    for name in (n for n in session.run.teachers if n in routes):
        mine = rows.filter(routes == name)
        tokens = int(mine["length"].sum())
        means = {
            c: math.fsum(mine[f"{c}_sum"]) / tokens if tokens else None for c in ("student_logprob", "teacher_logprob")
        }
        offsets = {"least": mine["offset"].min(), "most": mine["offset"].max()}
        found[name] = {"trajectories": mine.height, "tokens": tokens, **means, "prompt_offset": offsets}
    return found


def _numbers(part: Part, receipt: Receipt) -> pl.DataFrame:
    """Per trajectory of a shard: sums of signals, drift, and the advantage of the token that ended it."""
    columns = ["finish_reason", "student_logprob", "teacher_logprob", "rollout_logprob", "teacher", "length"]
    further = (*(f"{m}_sum" for m in _MEANS), *(c.name for c in MASSES))
    table = read_shard(part, receipt, [*columns, "prompt_ids", "teacher_prompt_ids"], optional=further)
    sums = [n for n in (f"{m}_sum" for m in _MEANS) if n in table.column_names]
    masses = [c.name for c in MASSES if c.name in table.column_names]
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    student, sampled = (pl.col(f"{who}_logprob").cast(pl.List(pl.Float64)) for who in ("student", "rollout"))
    off = (student - sampled).list.eval(pl.element().abs())
    ended = pl.col("teacher_logprob").list.last() - pl.col("student_logprob").list.last()
    return frame.select(
        *sums,
        "teacher",
        "length",
        *(pl.col(n).cast(pl.List(pl.Float64)).list.sum() for n in masses),
        *(pl.col(n).list.min().alias(f"{n}_least") for n in masses),
        offset=pl.col("teacher_prompt_ids").list.len().cast(pl.Int64) - pl.col("prompt_ids").list.len(),
        drift=off.list.sum(),
        drift_max=off.list.max(),
        last=pl.when(pl.col("finish_reason") == "stop").then(ended.cast(pl.Float64)),
    )
