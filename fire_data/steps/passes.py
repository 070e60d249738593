"""Every model sweeps a round once: what each says of its rows is kept until all have spoken, then put together.

With one teacher that is evaluated together with the student there is one pass, shard by shard, and nothing is kept.
With several teachers, or engines that hold one model at a time, each is loaded once, goes over its rows of all shards,
and makes room for the next.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fire_data.kept import Kept
from fire_data.schemas.errors import ConfigError, FingerprintError
from fire_data.schemas.manifest import Receipt, Shard
from fire_data.schemas.tables import FLOATS, MASSES, columns_of
from fire_data.session import Session
from fire_data.shards import Part
from fire_data.stages import each_shard
from fire_data.steps import engines
from fire_data.steps.inputs import score_inputs

_MASSES = {c.name for c in MASSES}


@dataclass(frozen=True)
class Pass:
    """One sweep: over the rows of some teachers, by an engine that `run` asks.

    `run` takes rows, k and whether signals are wanted, as `Scorer.score`. `prefix`: what the columns it gives lack in
    their names.
    """

    name: str
    teachers: frozenset[str]
    engine: str
    run: Callable[[pa.Table, int, bool], pa.Table]
    finish: Callable[[], None]
    prefix: str = ""


def plan_passes(session: Session, round: int, names: Iterable[str]) -> list[Pass]:
    """The sweeps that score rows of these teachers: one for each teacher beside the student, or one for each model."""
    cfg, names = session.run.config.score, list(names)
    apart = [n for n in names if not engines.is_joint(session, n)]
    several = len(names) > 1 or bool(apart)

    def joint(name: str) -> Pass:
        def run(rows: pa.Table, k: int, signals: bool) -> pa.Table:
            scorer = engines.joint_scorer(session, round, name)
            return scorer.score(rows, k=k, signals=signals)

        def finish() -> None:
            if several:
                session.rest(name)

        return Pass(name, frozenset([name]), cfg.engine, run, finish)

    def student(rows: pa.Table, k: int, signals: bool) -> pa.Table:
        evaluator = engines.student_evaluator(session, round)
        return evaluator.evaluate(_plain(rows, False))

    def teacher(name: str) -> Pass:
        def run(rows: pa.Table, k: int, signals: bool) -> pa.Table:
            evaluator = engines.teacher_evaluator(session, name)
            return evaluator.evaluate(_plain(rows, True))

        engine = engines.teacher_engine(session, name)
        return Pass(name, frozenset([name]), engine, run, lambda: session.rest(name), "teacher_")

    rest = functools.partial(session.rest, engines.STUDENT)
    alone = [Pass(engines.STUDENT, frozenset(apart), cfg.engine, student, rest, "student_")]
    # The student, which the first ones need beside a teacher, rests when it is needed no more.
    return [*(joint(n) for n in names if n not in apart), *(alone if apart else []), *(teacher(n) for n in apart)]


def require_joint(session: Session, names: Iterable[str], what: str) -> None:
    """Raise ConfigError if a teacher is not evaluated together with the student, which `what` needs."""
    for name in names:
        if not engines.is_joint(session, name):
            text = f"{what} needs the logits of student and teacher {name} together"
            raise ConfigError(text, fix="--set score.engine=transformers, and no url for the teacher")


def require_same_columns(part: Part, shard: Shard, names: Iterable[str]) -> None:
    """Raise FingerprintError if a finished shard has other optional columns: an engine tells more or less than then."""
    other = _another(part, shard)
    if other is None or not part.file(other).is_file():
        return
    optional = {c.name for c in columns_of(part.table) if c.optional and c.per == "token"}
    then, now = (optional & {*n} for n in (pq.read_schema(part.file(other)).names, names))
    if then != now:
        told = [f"{who} has {', '.join(sorted(c))}" for who, c in ((other, then - now), (shard.name, now - then)) if c]
        text = f"an engine gives other columns than when this stage was begun: of the shards {' and '.join(told)} alone"
        fix = f"serve the models as they were then, or: {part.command} --redo"
        raise FingerprintError(text, where=f"{part.label}, shard {shard.name}", fix=fix)


def _another(part: Part, shard: Shard) -> str | None:
    """Some finished shard beside this one. Whichever the folder names first: there may be many thousands."""
    if not part.receipts.is_dir():
        return None
    with os.scandir(part.receipts) as entries:
        names = (e.name.removesuffix(".json") for e in entries if e.name.endswith(".json"))
        return next((name for name in names if name != shard.name), None)


class Sweep:
    """The passes of a round for one stage: `before` makes what has to be kept, `columns` gives a shard's rows."""

    def __init__(
        self,
        session: Session,
        source: Part,
        receipts: dict[str, Receipt],
        kept: Kept,
        passes: list[Pass],
        wanted: Callable[[Shard], tuple[int, bool]],
    ) -> None:
        """`wanted`: how many top-k tokens, and whether signals, a shard needs."""
        self.session, self.source, self.receipts = session, source, receipts
        self.kept, self.passes, self.wanted = kept, passes, wanted

    @property
    def lanes(self) -> int:
        """How many shards `columns` may be asked for at a time."""
        return engines.lanes(self.session, self.passes[0].engine) if len(self.passes) == 1 else 1

    def before(self, missing: list[Shard]) -> None:
        """Let every pass go over these shards, unless there is only one, which needs no keeping."""
        if len(self.passes) <= 1:
            return
        for one in self.passes:

            def work(shard: Shard, one: Pass = one) -> int:
                mine = self._mine(one, self.rows(shard))
                self._swept(one, shard, mine, keep=True)
                return pc.sum(pc.list_value_length(mine["response_ids"])).as_py() or 0

            report = self.session.report
            report.start(f"{self.source.label}: {one.name}", sum(_size(s) for s in missing), "prompts")
            lanes = engines.lanes(self.session, one.engine)
            each_shard(missing, work, int, lanes=lanes, report=report, label=one.name)
            one.finish()

    def rows(self, shard: Shard) -> pa.Table:
        """The rollouts of a shard with the teachers' prompts."""
        return score_inputs(self.session, self.source, self.receipts[shard.name])

    def columns(self, shard: Shard, rows: pa.Table) -> pa.Table:
        """What all passes say of the rows of a shard, in order; of the optional columns, those that all rows have."""
        keep = len(self.passes) > 1
        made = _together([self._swept(one, shard, self._mine(one, rows), keep=keep) for one in self.passes], rows)
        try:
            require_same_columns(self.kept.part, shard, made.column_names)
        except FingerprintError:
            self.kept.clear(shard.name)
            raise
        return made

    def _mine(self, one: Pass, rows: pa.Table) -> pa.Table:
        return rows.filter(_goes_to(self.session, rows, one.teachers))

    def _swept(self, one: Pass, shard: Shard, mine: pa.Table, *, keep: bool) -> pa.Table:
        k, signals = self.wanted(shard)
        name = f"{one.name}-{k}-{int(signals)}"
        made = self.kept.completed(shard.name, name, mine, lambda some: one.run(some, k, signals), keep=keep)
        return made.rename_columns([c if c == "trajectory_id" else f"{one.prefix}{c}" for c in made.column_names])


def _goes_to(session: Session, rows: pa.Table, teachers: frozenset[str]) -> pa.Array:
    return pa.array([session.run.route(value) in teachers for value in rows["teacher"].to_pylist()], pa.bool_())


def _together(parts: list[pa.Table], rows: pa.Table) -> pa.Table:
    """Tables over some of the rows each, as one over all.

    An optional column is there if every part that speaks of its model gives it, also one without a row in this shard:
    so all shards of a stage have the same columns.
    """
    names = list(dict.fromkeys(c for p in parts for c in p.column_names if c != "trajectory_id"))
    lengths = pc.list_value_length(rows["response_ids"])
    columns = {}
    for name in names:
        about = [p for p in parts if _of_student(name) in {_of_student(c) for c in p.column_names}]
        have = [p for p in about if name in p.column_names]
        if len(have) < len(about) and name not in _MASSES:
            continue
        ids = pa.chunked_array([c for p in have for c in p["trajectory_id"].chunks], pa.string())
        values = pa.chunked_array([c for p in have for c in p[name].chunks], have[0][name].type)
        columns[name] = values.take(pc.index_in(rows["trajectory_id"], value_set=ids))
        if name in _MASSES:  # the other rows' entropies are exact
            columns[name] = pc.coalesce(columns[name], pa.array([[1.0] * n for n in lengths.to_pylist()], FLOATS))
    return pa.table(columns)


def _of_student(column: str) -> bool | None:
    """Whether a column is about the student alone; None for the name of the row."""
    return None if column == "trajectory_id" else column.startswith("student_")


def _plain(rows: pa.Table, teachers: bool) -> pa.Table:
    """What an Evaluator takes; with the teacher's prompt where it has one of its own."""
    plain = rows.select(["trajectory_id", "prompt_ids", "response_ids"])
    if not teachers:
        return plain
    own = pc.if_else(pc.is_valid(rows["teacher_prompt_ids"]), rows["teacher_prompt_ids"], rows["prompt_ids"])
    return plain.set_column(1, "prompt_ids", own)


def _size(shard: Shard) -> int:
    return shard.stop - shard.start
