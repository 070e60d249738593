"""`fire weigh`: a rule over the sealed scores of a round, frozen as one coefficient per token. No model is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from fire_data import weighing
from fire_data.overview import start_over
from fire_data.rules import Expression, make_rule
from fire_data.run import Run
from fire_data.schemas.errors import DataError
from fire_data.schemas.manifest import Manifest, Receipt, Shard
from fire_data.schemas.tables import FORMAT, arrow_schema, conform
from fire_data.shards import Part, read_shard, sealed, verify_shard
from fire_data.stages import Reporter, Silent, Stage, run_stage
from fire_data.weighing import Weighing


def configured(run: Run) -> Weighing:
    """The rule of the configuration with its policies. Raises ConfigError before anything is read."""
    cfg = run.config.weigh
    return Weighing(
        make_rule(cfg.rule, cfg.params, cfg.scope),
        run.config.train.batch_size,
        cfg.denominator,
        cfg.constant,
        cfg.truncated,
        cfg.end_token,
        cfg.rollout_is_cap,
        run.config.rollout.n,
    )


def weigh(run: Run, round: int, report: Reporter | None = None, *, redo: bool = False) -> Manifest:
    """Make, continue or confirm the weights of a round, or make them anew.

    Returns the sealed manifest with what the rule did.
    """
    report = report or Silent()
    rule = configured(run)
    source_part = run.part("scores", round)
    source = sealed(source_part)
    stage = Stage(run.part("weights", round, run.config.weights_name), weights_fields(rule, source), source.plan)
    work = _Work(rule, source_part, source.shards)

    def make(shard: Shard) -> pa.Table:
        columns = [c for c in arrow_schema("weights").names if c in work.schema_names]
        table = work.weighted(shard.name).select(columns).collect().to_arrow(compat_level=pl.CompatLevel.oldest())
        try:
            return conform(table, "weights", f"{stage.part.label}, shard {shard.name}")
        except DataError as error:
            raise DataError(
                error.what, where=error.where, fix="a rule must give finite numbers: fire rules NAME"
            ) from None

    # Whatever is wrong with the rule is found before a stage is opened or, with all its numbers, set aside.
    if not stage.part.manifest_path.exists():
        _ = work.fitted
    elif redo:
        for shard in stage.plan:
            make(shard)
        start_over(run, "weights", round, report, stage.part.name)

    def finish(receipts: list[Receipt]) -> dict[str, Any]:
        return _stats(work, stage.part, receipts)

    manifest = run_stage(stage, make, finish, report)
    name, stats = run.config.weights_name, manifest.stats
    if stats["n_dropped"] == 0 and drops(rule):
        report.warn(f"the filter of {name} dropped nothing: it is inert at this scope and these data")
    if empty := stats["skipped_steps"]:
        which = "any step" if len(empty) == len(stats["steps"]) else f"step {', '.join(map(str, empty[:5]))}"
        report.warn(f"{name} keeps no token in {which}: nothing is learnt there")
    return manifest


def drops(rule: Weighing) -> bool:
    """True if the rule has a filter, so that dropping nothing is worth a warning."""
    inner = rule.rule
    if isinstance(inner, Expression):
        return inner.keep is not None
    return getattr(inner, "percentile", 0) > 0


class _Work:
    """The verified shards of a round's scores and what `fit` found in them, computed when first needed."""

    def __init__(self, rule: Weighing, part: Part, receipts: Sequence[Receipt]) -> None:
        self.rule, self.part, self.receipts = rule, part, receipts
        self._fitted: weighing.Fitted | None = None
        self._names: list[str] | None = None
        self._files: dict[int, Path] = {}  # verified: several passes read them, one hash is enough

    @property
    def fitted(self) -> weighing.Fitted:
        if self._fitted is None:
            lf = self._scan(range(len(self.receipts)))
            for i in range(len(self.receipts)):
                weighing.check_values(self._scan([i]), self.rule)
            self._fitted = weighing.fit(lf, self.rule)
        return self._fitted

    @property
    def schema_names(self) -> list[str]:
        if self._names is None:
            self._names = self.weighted(self.receipts[0].shard).collect_schema().names()
        return self._names

    def weighted(self, shard: str) -> pl.LazyFrame:
        """The rows of one shard with the columns of the weights table, in the shard's order."""
        at = [r.shard for r in self.receipts].index(shard)
        first = sum(r.rows for r in self.receipts[:at])
        span = self._span(at)
        lf = weighing.apply(self._scan(span), self.rule, self.fitted)
        if len(span) > 1:
            lf = lf.filter(pl.col("_row").is_between(first, first + self.receipts[at].rows, closed="left"))
        return lf

    def _span(self, at: int) -> range:
        """The shards `apply` must see together for shard `at`: those that share a step with it, if the rule says so."""
        rows = [r.rows for r in self.receipts]
        starts = [sum(rows[:i]) for i in range(len(rows) + 1)]
        size = self.rule.batch_size
        if self.rule.rule.reads == "shard":
            return range(at, at + 1)
        if self.rule.rule.reads == "round" or size is None:
            return range(len(rows))
        low, high = starts[at] // size * size, -(-starts[at + 1] // size) * size
        touched = [i for i in range(len(rows)) if starts[i] < high and starts[i + 1] > low]
        return range(touched[0], touched[-1] + 1)

    def _scan(self, shards: Sequence[int]) -> pl.LazyFrame:
        for i in shards:
            if i not in self._files:
                self._files[i] = verify_shard(self.part, self.receipts[i])
        files = [self._files[i] for i in shards]
        first = sum(r.rows for r in self.receipts[: shards[0]])
        return weighing.prepare(pl.scan_parquet(files, glob=False), self.rule, first)


def weights_fields(rule: Weighing, source: Manifest) -> dict[str, Any]:
    """What the weights of a round depend on: the rule with its policies, and the scores."""
    parameters = {k: str(v) if isinstance(v, pl.Expr) else v for k, v in dataclasses.asdict(rule.rule).items()}
    return {
        "format": FORMAT,
        "rule": {"name": rule.rule.name, **parameters},
        "batch_size": rule.batch_size,
        "denominator": rule.divisor,
        "constant": rule.constant,
        "truncated": rule.truncated,
        "end_token": rule.end_token,
        "rollout_is_cap": rule.rollout_is_cap,
        "n": rule.samples_per_group,
        "scores": source.digest,
    }


def _stats(work: _Work, part: Part, receipts: list[Receipt]) -> dict[str, Any]:
    """What the rule did, summed shard by shard in shard order, with its statistics and the steps' denominators."""
    parts = []
    for receipt, source in zip(receipts, work.receipts, strict=True):
        weights = pl.from_arrow(read_shard(part, receipt))
        lengths = pl.from_arrow(read_shard(work.part, source, ["length"]))
        assert isinstance(weights, pl.DataFrame)
        assert isinstance(lengths, pl.DataFrame)
        parts.append(weighing.summarise(weights.lazy().with_columns(lengths["length"])))
    skipped = [s["step"] for s in work.fitted.steps if s["kept_tokens"] == 0]
    steps = {"steps": work.fitted.steps, "skipped_steps": skipped}
    return {**weighing.merge_summaries(parts), "rule": work.fitted.stats, **steps}
