"""How far each stage of a round is, while another process works on it: counted from receipts and metrics alone.

Nothing is locked and no shard is opened, so looking is cheap and harms nobody. What vanishes between two looks, because
a stage is being set aside, counts as not there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fire_data import metrics
from fire_data.run import STAGES, Run
from fire_data.schemas.errors import ConfigError, DataError
from fire_data.schemas.manifest import Manifest, Receipt
from fire_data.shards import Part, read_manifest, read_receipt

Seen = dict[tuple[Path, int], Receipt]
"""Receipts that were read before, by file and time of change: a receipt does not change, but it may be replaced."""


@dataclass(frozen=True)
class Standing:
    """One stage of a round. `total` is 0 while nobody knows how much there is to do."""

    stage: str
    state: str
    done: int
    total: int
    unit: str
    tokens: int


def standings(run: Run, round: int, seen: Seen | None = None) -> list[Standing]:
    """Every stage that the round has or needs, in the order in which they are made.

    The state is `open`, `sealed`, `-` for one that was not begun, or `damaged` if its records cannot be read.
    """
    seen = {} if seen is None else seen
    parts = [part for stage in STAGES for part in _parts(run, round, stage)]
    evals = [run.part("evals", round, name) for name in (None, *run.names("evals"))]
    begun = [part for part in evals if part.manifest_path.exists()]
    parts += begun or (evals[:1] if run.config.eval.prompts is not None else [])
    return [_standing(run, part, seen) for part in parts]


def _parts(run: Run, round: int, stage: str) -> list[Part]:
    if stage != "addons":
        return [run.part(stage, round)]
    try:
        needed = run.needed_addons()
    except ConfigError:  # a rule that cannot be is for `fire weigh` to tell
        needed = run.config.score.add
    there = (name for name in run.names(stage) if run.part(stage, round, name).manifest_path.exists())
    return [run.part(stage, round, name) for name in dict.fromkeys([*needed, *there])]


def _standing(run: Run, part: Part, seen: Seen) -> Standing:
    stage = part.stage if part.name is None else f"{part.stage}/{part.name}"
    unit = "steps" if part.stage == "checkpoints" else "shards"
    try:
        manifest = read_manifest(part)
        if manifest is None:
            return Standing(stage, "-", 0, 0, unit, 0)
        if part.stage == "checkpoints":
            done, total, tokens = _trained(run, part, manifest)
        else:
            receipts = manifest.shards or [r for s in manifest.plan if (r := _receipt(part, s.name, seen)) is not None]
            done, total, tokens = len(receipts), len(manifest.plan), sum(r.tokens for r in receipts)
    except DataError:
        return Standing(stage, "damaged", 0, 0, unit, 0)
    return Standing(stage, manifest.state, done, total, unit, tokens)


def _trained(run: Run, part: Part, manifest: Manifest) -> tuple[int, int, int]:
    """Optimizer steps done, in all, and the response tokens they were about."""
    records = metrics.steps(run.root / "metrics.jsonl", part.round)
    tokens = sum(r.get("tokens", 0) for r in records)
    if manifest.sealed:
        return manifest.stats["steps"], manifest.stats["steps"], tokens
    weights = read_manifest(run.part("weights", part.round))
    steps = len(weights.stats.get("steps", ())) if weights else 0
    return len(records), steps * manifest.fields["train"]["epochs"], tokens


def _receipt(part: Part, shard: str, seen: Seen) -> Receipt | None:
    path = part.receipt_path(shard)
    try:
        key = path, path.stat().st_mtime_ns
    except FileNotFoundError:
        return None
    if key not in seen:
        receipt = read_receipt(part, shard)
        if receipt is None:
            return None
        seen[key] = receipt
    return seen[key]


def nonfinite_steps(run: Run, round: int) -> int | None:
    """Steps of a round that were skipped as loss or gradient was not finite; None where nothing was trained."""
    manifest = read_manifest(run.part("checkpoints", round))
    if manifest is None:
        return None
    if manifest.sealed:
        return int(manifest.stats.get("nonfinite_steps", 0))
    return sum("nonfinite" in r for r in metrics.steps(run.root / "metrics.jsonl", round))
