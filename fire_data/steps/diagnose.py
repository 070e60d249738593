"""`fire diagnose`: reads a round's sealed scores, and what was made beside them, for the findings. No model is loaded.

One shard is in memory at a time; of its tokens only the advantage (4 bytes) and its place (1 byte) stay.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

import polars as pl
import pyarrow.parquet as pq

from fire_data.diagnose import Facts, Finding, Weighed, diagnose, measure, merge
from fire_data.diagnose.measure import COLUMNS, HISTORY_COLUMNS, TOPK, history
from fire_data.diagnose.responses import summary
from fire_data.precision import bits_of
from fire_data.run import Run
from fire_data.schemas.errors import DataError
from fire_data.schemas.manifest import Manifest, Receipt
from fire_data.schemas.tables import REWARD
from fire_data.shards import Part, is_sealed, read_shard, sealed
from fire_data.stages import Reporter, Silent
from fire_data.standing import nonfinite_steps

EARLIER = 4  # rounds just before this one that it is compared with, besides the first


def last_scored(run: Run) -> int:
    """The newest round with sealed scores; without any, the one that has rollouts to be scored."""
    found = [n for n in run.rounds() if is_sealed(run.part("scores", n))]
    return found[-1] if found else run.last_round()


def diagnose_round(run: Run, round: int, name: str | None = None, report: Reporter | None = None) -> list[Finding]:
    """The findings of a round. `name`: weights whose filter is looked at; None: the trained ones, if they are sealed.

    Raises IncompleteError with the command that is missing, DataError if tables are about different trajectories.
    """
    report = report or Silent()
    rollouts = sealed(run.part("rollouts", round))
    part = run.part("scores", round)
    scores = sealed(part)
    beside = [(p, sealed(p), columns) for p, columns in _beside(run, round, scores, name)]
    report.start(part.label, sum(r.rows for r in scores.shards), "rows")
    there = {n for r in scores.shards[:1] for n in pq.read_schema(part.file(r.shard)).names}  # some are optional
    bits = bits_of(scores)
    rounding = 2.0 ** -(bits + 1) if bits else 0.0
    parts = []
    for i, receipt in enumerate(scores.shards):
        frame = _read(part, receipt, tuple(c for c in COLUMNS if c in there))
        for other, manifest, columns in beside:
            frame = _joined(frame, other, manifest.shards[i], columns)
        parts.append(measure(frame, rounding=rounding))
        report.advance(receipt.rows)
    weights = next(((p, m) for p, m, _ in beside if p.stage == "weights"), None)
    return diagnose(merge(parts), _facts(run, round, rollouts, scores, weights))


def _beside(run: Run, round: int, scores: Manifest, name: str | None) -> Iterator[tuple[Part, tuple[str, ...]]]:
    """Sealed tables that are row by row like the scores, and the columns that are wanted of them."""
    weights = run.part("weights", round, name)
    if name is not None or is_sealed(weights):
        yield weights, ("keep",)
    for addon, columns in (("topk", TOPK), (REWARD, (REWARD,))):
        part = run.part("addons", round, addon)
        if is_sealed(part) and sealed(part).fields.get("rollouts") == scores.fields["rollouts"]:
            yield part, columns


def _read(part: Part, receipt: Receipt, columns: tuple[str, ...]) -> pl.DataFrame:
    frame = pl.from_arrow(read_shard(part, receipt, list(columns)))
    assert isinstance(frame, pl.DataFrame)
    return frame


def _joined(frame: pl.DataFrame, part: Part, receipt: Receipt, columns: tuple[str, ...]) -> pl.DataFrame:
    other = _read(part, receipt, ("trajectory_id", *columns))
    if not other["trajectory_id"].equals(frame["trajectory_id"]):
        text = f"{part.stage} and scores are about different trajectories"
        raise DataError(text, where=f"{part.label}, shard {receipt.shard}", fix=f"{part.command} --redo")
    # Rewards of `fire verify` take the place of the rollouts' own.
    return frame.drop(columns, strict=False).hstack(other.drop("trajectory_id"))


def _facts(run: Run, round: int, rollouts: Manifest, scores: Manifest, weights: tuple[Part, Manifest] | None) -> Facts:
    sampled = rollouts.fields.get("rollout") or {}
    size = (scores.fields.get("vocabulary") or {}).get("size")
    teachers: dict[str, dict[str, Any]] = scores.fields.get("teachers") or {}
    template = next(
        (t["template"] for t in teachers.values() if t["template"] != "shared"), "shared" if teachers else None
    )
    templates = (rollouts.fields.get("template"), template)
    return Facts(
        run=shlex.quote(str(run.root)),
        round=round,
        seed=run.config.seed,
        batch_size=run.config.train.batch_size,
        sampling={k: sampled[k] for k in ("temperature", "top_p", "top_k")} if sampled else None,
        vocabulary_size=size,
        tokenizers=next(iter((scores.recorded.get("tokenizers") or {}).values()), None),
        templates=(str(templates[0]), str(templates[1])) if all(templates) else None,
        dtypes={who: model["dtype"] for who, model in {"student": scores.fields["student"], **teachers}.items()},
        entropy_kind=_entropy_kind(scores),
        weighed=Weighed(str(weights[0].name), filters(weights[1].fields.get("rule"))) if weights else None,
        nonfinite_steps=nonfinite_steps(run, round),
        earlier=tuple(_earlier(run, round)),
    )


def _entropy_kind(scores: Manifest) -> str | None:
    """The kind of the least exact entropy."""
    kinds = set((scores.recorded.get("entropy_kind") or {}).values())
    return next((k for k in kinds if k != "exact"), "exact" if kinds else None)


def filters(record: Any) -> bool:
    """Whether a manifest's rule drops what is below a quantile: a guard may find nothing, a quantile must.

    A soft filter has a percentile and weighs by it. Composed rules hold the records of their components.
    """
    if isinstance(record, list | tuple):
        return any(filters(r) for r in record)
    if not isinstance(record, dict):
        return False
    below = record.get("percentile")
    mine = record.get("name") not in _SOFT and isinstance(below, int | float) and below > 0
    return mine or filters(record.get("rules"))


_SOFT = ("soft-filter",)


def _earlier(run: Run, round: int) -> Iterator[dict[str, Any]]:
    """Summaries of the first round and of those just before this one, as far as they are scored."""
    before = [n for n in run.rounds() if n < round and is_sealed(run.part("scores", n))]
    for number in sorted({*before[:1], *before[-EARLIER:]}):
        part = run.part("scores", number)
        scores = sealed(part)
        graded = [(p, sealed(p).shards) for p, _ in _beside(run, number, scores, None) if p.name == REWARD]
        frames = []
        for i, receipt in enumerate(scores.shards):
            frame = _read(part, receipt, ("trajectory_id", *HISTORY_COLUMNS))
            for other, shards in graded:
                frame = _joined(frame, other, shards[i], (REWARD,))
            frames.append(frame.select(HISTORY_COLUMNS))
        yield summary(history(frames), number)
