"""`fire weigh`: a rule over the sealed scores of a round, frozen as one coefficient per token. No model is loaded."""

from __future__ import annotations

import itertools
import shlex
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import polars as pl
import pyarrow as pa

from fire_data import contract, weighing
from fire_data.overview import start_over
from fire_data.prepare import Decided, Weighing, check_values, prepare, require_columns, stored
from fire_data.rules import every, own
from fire_data.rules.base import ROW
from fire_data.run import Run
from fire_data.schemas.config import ADDED_TEACHER
from fire_data.schemas.errors import DataError
from fire_data.schemas.manifest import Manifest, Receipt, Shard
from fire_data.schemas.tables import FORMAT, REWARD, addon_of, conform
from fire_data.shards import Part, is_sealed, read_manifest, read_schema, read_shard, sealed
from fire_data.stages import Reporter, Silent, Stage, run_stage
from fire_data.summary import merge_summaries, summarise
from fire_data.teachers import Bounds, Teachers, require_exact, stored_bounds

_LANES = 2  # shards made at the same time: reading, most of computing, hashing and writing use one core each


def configured(run: Run) -> Weighing:
    """The rule of the configuration with its policies. Raises ConfigError before anything is read."""
    cfg = run.config.weigh
    return Weighing(
        run.rule(),
        run.config.train.batch_size,
        cfg.denominator,
        cfg.constant,
        cfg.truncated,
        cfg.end_token,
        cfg.rollout_is_cap,
        run.config.rollout.n,
        Teachers(cfg.teacher, tuple(name.removeprefix(ADDED_TEACHER) for name in run.combined)),
        cfg.entropy,
    )


def weigh(run: Run, round: int, report: Reporter | None = None, *, redo: bool = False) -> Manifest:
    """Make, continue or confirm the weights of a round, or make them anew.

    Returns the sealed manifest with what the rule did.
    """
    report = report or Silent()
    rule = configured(run)
    source = sealed(run.part("scores", round))
    work = ScoredRound(run, round, rule)
    fields = weights_fields(rule, source, work.addons)
    recorded = contract.enforce(run, round, work.addons, report)
    recorded |= {"entropy": {c: b.record() for c, b in work.bounds.items()}} if work.bounds else {}
    stage = Stage(run.part("weights", round, run.config.weights_name), fields, source.plan, recorded)

    done: dict[str, dict[str, float]] = {}
    # What several shards share, or a user's code that may not expect company, is for one shard at a time to use.
    apart = rule.rule.reads == "shard" and all(own.is_ours(r) for r in every(rule.rule))
    turn: AbstractContextManager[Any] = nullcontext() if apart else threading.Lock()

    def make(shard: Shard) -> pa.Table:
        with turn:
            weights = work.weighted(shard.name)
        done[shard.name] = summarise(weights, weights["weight"].list.len())
        table = weights.to_arrow(compat_level=pl.CompatLevel.oldest())
        return conform(table, "weights", f"{stage.part.label}, shard {shard.name}")

    # Whatever is wrong with the rule is found before a stage is opened or, with all its numbers, set aside.
    if not stage.part.manifest_path.exists():
        _ = work.fitted
    elif redo:
        for shard in stage.plan:
            make(shard)
        start_over(run, "weights", round, report, stage.part.name)

    def finish(receipts: list[Receipt]) -> dict[str, Any]:
        return _stats(work, stage.part, receipts, done)

    manifest = run_stage(stage, make, finish, report, lanes=_LANES)
    name, stats = run.config.weights_name, manifest.stats
    if work.bounds:
        told = "; ".join(f"{column} is {bound}" for column, bound in work.bounds.items())
        report.warn(f"{name} rests on entropies that are not exact: {told}")
    if stats["n_dropped"] == 0 and drops(rule):
        report.warn(f"the filter of {name} dropped nothing: it is inert at this scope and these data")
    if empty := stats["skipped_steps"]:
        which = "any step" if len(empty) == len(stats["steps"]) else f"step {', '.join(map(str, empty[:5]))}"
        report.warn(f"{name} keeps no token in {which}: nothing is learnt there")
    return manifest


def drops(rule: Weighing) -> bool:
    """True if the rule has a filter, so that dropping nothing is worth a warning."""
    return "filter" in rule.rule.changes


class ScoredRound:
    """The shards of a round's scores and addons as a `Table`, and what `fit` found, once it is needed.

    Of each shard those columns are read, and compared with its receipt, that are asked for.
    `graded`: rewards of `fire verify` are there too, whether or not the rule reads them.
    """

    def __init__(self, run: Run, round: int, rule: Weighing, graded: bool = False) -> None:
        self.rule = rule
        self.place = f"{shlex.quote(str(run.root))} --round {round}"
        self.part = run.part("scores", round)
        self.source = sealed(self.part)
        self.receipts = self.source.shards
        self.addons = addon_tables(run, round, rule)
        rewards = run.part("addons", round, REWARD)
        more = [run.addon(round, REWARD)] if graded and is_sealed(rewards) else []
        self._beside = list({p.name: (p, m) for p, m in (*self.addons, *more)}.values())
        self._schemas: dict[str, pl.Schema] = {}
        self._seen: set[str] = set()
        self.last: Decided | None = None
        self._fitted: weighing.Fitted | None = None
        self._fitting = threading.Lock()
        self.bounds = require_exact(rule.rule, rule.teachers, rule.entropy, self._stored_bounds(), self.part.label)

    def __len__(self) -> int:
        return len(self.receipts)

    @property
    def fitted(self) -> weighing.Fitted:
        with self._fitting:
            self._fitted = self._fitted or self._fit()
        return self._fitted

    def _fit(self) -> weighing.Fitted:
        if not sum(r.rows for r in self.receipts):
            raise DataError("the scores have no rows", where=self.part.label, fix=f"{self.part.command} --redo")
        empty = pl.DataFrame(schema={c: t for _, s in self._sources() for c, t in s.items()})
        require_columns(prepare(empty.lazy(), self.rule), self.rule, self.place)
        fitted = weighing.fit(self, self.rule)
        # Values are looked at when they are read: of those that only the weights need, token columns are left to then,
        # so that they are read once.
        rows = [c for c in self.rule.columns if c in empty.schema and not isinstance(empty.schema[c], pl.List)]
        if left := [c for c in rows if c not in self._seen]:
            for i in range(len(self)):
                self.read(range(i, i + 1), left)
        return fitted

    def weighted(self, shard: str) -> pl.DataFrame:
        """The rows of one shard of the weights table."""
        return weighing.apply(self, [r.shard for r in self.receipts].index(shard), self.rule, self.fitted)

    def rows(self, shard: int) -> tuple[int, int]:
        return sum(r.rows for r in self.receipts[:shard]), self.receipts[shard].rows

    def read(self, shards: range, columns: Sequence[str]) -> pl.DataFrame:
        first = self.rows(shards[0])[0]
        frame = pl.concat([self._stored(i, columns) for i in shards])
        self._seen.update(frame.columns)
        check_values(frame.with_row_index(ROW, offset=first), self.rule, self.place)
        return prepare(frame.lazy(), self.rule, first).select(columns).collect()

    def span(self, shard: int, reads: Literal["step", "round"]) -> range:
        size = self.rule.batch_size
        if reads == "round" or size is None:
            return range(len(self))
        starts = list(itertools.accumulate((r.rows for r in self.receipts), initial=0))
        low, high = starts[shard] // size * size, -(-starts[shard + 1] // size) * size
        touched = [i for i in range(len(self)) if starts[i] < high and starts[i + 1] > low]
        return range(touched[0], touched[-1] + 1)

    def _stored_bounds(self) -> Bounds:
        """The entropies of the scores, and of added teachers, that are not exact."""
        added = {_teacher_of(p): (p, m) for p, m in self.addons if _teacher_of(p)}
        columns = {c for p, m in added.values() if m.shards for c in self._schema(p, m.shards[0])}
        return stored_bounds(self.source, {name: m for name, (_, m) in added.items()}, columns)

    def _sources(self) -> list[tuple[tuple[Part, Manifest], pl.Schema]]:
        """The scores and the addons beside them, each with the columns that are taken from it."""
        replaced = {REWARD} if REWARD in [p.name for p, _ in self._beside] else set()
        sources = [((self.part, self.source), replaced), *((beside, {"trajectory_id"}) for beside in self._beside)]
        return [
            ((p, m), pl.Schema({c: t for c, t in self._schema(p, m.shards[0]).items() if c not in without}))
            for (p, m), without in sources
        ]

    def _schema(self, part: Part, receipt: Receipt) -> pl.Schema:
        if part.label not in self._schemas:
            empty = pl.from_arrow(read_schema(part, receipt).empty_table())
            assert isinstance(empty, pl.DataFrame)
            self._schemas[part.label] = empty.schema
        return self._schemas[part.label]

    def _stored(self, shard: int, columns: Sequence[str]) -> pl.DataFrame:
        """What these columns are made from, of one shard."""
        sources = self._sources()
        wanted = {*stored(columns, self.rule, [c for _, schema in sources for c in schema])}
        frames = []
        for (part, manifest), schema in sources:
            if mine := [c for c in schema if c in wanted]:
                frame = pl.from_arrow(read_shard(part, manifest.shards[shard], mine))
                assert isinstance(frame, pl.DataFrame)
                frames.append(frame)
        return pl.concat(frames, how="horizontal")


def addon_tables(run: Run, round: int, rule: Weighing) -> list[tuple[Part, Manifest]]:
    """The sealed addons whose columns a rule, or a combination of teachers, reads.

    One that is not there is a missing column, told elsewhere. But rewards that were begun have to be finished, as those
    of the rollouts would take their place unseen. Raises IncompleteError.
    """

    def counts(name: str) -> bool:
        part = run.part("addons", round, name)
        return is_sealed(part) or (name == REWARD and read_manifest(part) is not None)

    return [run.addon(round, name) for name in addon_names(rule) if counts(name)]


def addon_names(rule: Weighing) -> list[str]:
    """The addons whose columns a rule reads."""
    return list(dict.fromkeys(a for c in rule.columns if (a := addon_of(c)) is not None))


def _teacher_of(part: Part) -> str:
    """The teacher whose columns an addon holds; empty for other addons."""
    name = str(part.name)
    return name.removeprefix(ADDED_TEACHER) if name.startswith(ADDED_TEACHER) else ""


def weights_fields(rule: Weighing, source: Manifest, addons: list[tuple[Part, Manifest]]) -> dict[str, Any]:
    """What the weights of a round depend on: the rule with its policies, the scores, the addons it reads, and which
    teachers count, where that is not each row's own."""
    made_of = {"addons": {str(p.name): m.digest for p, m in addons}} if addons else {}
    code = {r.name: s for r in every(rule.rule) if (s := own.source_of(r)) is not None}
    return {
        "format": FORMAT,
        "rule": rule.rule.record(),
        "batch_size": rule.batch_size,
        "denominator": rule.divisor,
        "constant": rule.constant,
        "truncated": rule.truncated,
        "end_token": rule.end_token,
        "rollout_is_cap": rule.rollout_is_cap,
        "n": rule.samples_per_group,
        "scores": source.digest,
        **({"fkl_renormalise": rule.rule.fkl_renormalises} if "forward KL" in rule.rule.changes else {}),
        **made_of,
        **({} if rule.teachers.routed else {"teacher": rule.teachers.record()}),
        **({"code": code} if code else {}),
    }


def _stats(work: ScoredRound, part: Part, receipts: list[Receipt], done: dict[str, dict[str, float]]) -> dict[str, Any]:
    """What the rule did, summed shard by shard in shard order, with its statistics and the steps' denominators.

    `done`: the sums of shards that were just made, which need not be read again.
    """
    parts = [done.get(r.shard) or _read_sums(part, r) for r in receipts]
    skipped = [s["step"] for s in work.fitted.steps if s["kept_tokens"] == 0]
    steps = {"steps": work.fitted.steps, "skipped_steps": skipped}
    return {**merge_summaries(parts), "rule": work.fitted.stats, **steps}


def _read_sums(part: Part, receipt: Receipt) -> dict[str, float]:
    weights = pl.from_arrow(read_shard(part, receipt))
    assert isinstance(weights, pl.DataFrame)
    return summarise(weights, weights["weight"].list.len())
