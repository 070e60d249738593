"""Numbers that say where they are from: measured in this run, given by the user or the settings, or assumed.

What is computed from several is as good as the weakest of them. Units: tokens are response tokens, bytes, seconds.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from fire_data import metrics
from fire_data.run import Run
from fire_data.schemas.config import ADDED_TEACHER
from fire_data.schemas.manifest import Manifest, Receipt
from fire_data.schemas.tables import FLOAT_LISTS, FLOATS, ID_LISTS, IDS, MASSES, Column, columns_of
from fire_data.shards import Part, read_manifest, read_receipt

Origin = Literal["measured", "given", "assumed"]
_WEAKER: tuple[Origin, ...] = ("measured", "given", "assumed")

# Bytes per number after compression, and of text per token: bench/RESULTS.md, "A plan's assumptions".
FLOAT_BYTES, REDUCED_BYTES, ID_BYTES, TEXT_BYTES = 3.4, 2.1, 1.6, 1.8
ROW_BYTES = 64.0  # of a row of a table without token columns
WEIGH_TOKENS_PER_S = 1.5e6  # one CPU thread, rule `fire`: bench/RESULTS.md
_TEXT_TABLES = ("rollouts", "scores", "evals")
_STORED = "bytes per number as bench/RESULTS.md has them"


@dataclass(frozen=True)
class Figure:
    """A number with its unit and origin; None: nobody knows, and `how` says what is missing."""

    value: float | None
    unit: str
    origin: Origin
    how: str

    def json(self) -> dict[str, Any]:
        return asdict(self)


def derived(value: float | None, unit: str, how: str, *of: Figure) -> Figure:
    """A number computed from others: None if one of them is, its origin that of the weakest."""
    known = value is not None and all(f.value is not None for f in of)
    origin: Origin = max((f.origin for f in of), key=_WEAKER.index) if of else "given"
    missing = "; ".join(dict.fromkeys(f.how for f in of if f.value is None))
    return Figure(value if known else None, unit, origin, how if known else missing)


def product(unit: str, how: str, *of: Figure) -> Figure:
    """The product of numbers."""
    value: float | None = 1.0
    for figure in of:
        value = None if value is None or figure.value is None else value * figure.value
    return derived(value, unit, how, *of)


def total(figures: list[Figure], unit: str) -> Figure:
    """The sum of the known ones; `how` says how many are not."""
    known = [f for f in figures if f.value is not None]
    left_out = len(figures) - len(known)
    how = f"sum of what is known; {left_out} are not" if left_out else "sum"
    summed = derived(sum(f.value or 0.0 for f in known), unit, how, *known)
    return summed if known or not figures else Figure(None, unit, "assumed", "nothing of it is known")


def receipts_of(part: Part, manifest: Manifest | None = None) -> list[Receipt]:
    """The receipts that a stage has, sealed or not."""
    manifest = manifest or read_manifest(part)
    if manifest is None:
        return []
    return list(manifest.shards) or [r for s in manifest.plan if (r := read_receipt(part, s.name)) is not None]


def newest(run: Run, stage: str, name: str | None) -> tuple[Part, Manifest, list[Receipt]] | None:
    """The last round in which something of a stage was made."""
    numbers: list[int | str] = [*reversed(run.rounds()), *(["start"] if stage == "evals" else [])]
    for number in numbers:
        part = run.part(stage, number, name)
        manifest = read_manifest(part)
        if manifest is not None and (receipts := receipts_of(part, manifest)):
            return part, manifest, receipts
    return None


def mean_length(run: Run, given: float | None) -> Figure:
    """Response tokens per trajectory: given, else of the newest rollouts, else the longest that is allowed."""
    if given is not None:
        return Figure(given, "tokens", "given", "--length")
    found = newest(run, "rollouts", None)
    if found is not None and (rows := sum(r.rows for r in found[2])):
        tokens = sum(r.tokens for r in found[2])
        return Figure(tokens / rows, "tokens", "measured", f"mean of {rows:,} trajectories, {found[0].label}")
    longest = run.config.rollout.max_new_tokens
    how = "as long as rollout.max_new_tokens allows: an upper bound (--length N)"
    return Figure(float(longest), "tokens", "assumed", how)


def eval_length(run: Run, name: str | None, length: Figure) -> Figure:
    """Tokens of an answer to a held-out prompt: of earlier evaluations, else as in rollouts."""
    found = newest(run, "evals", name)
    if found is not None and found[1].stats.get("mean_length"):
        return Figure(float(found[1].stats["mean_length"]), "tokens", "measured", f"mean length, {found[0].label}")
    if run.config.eval.max_new_tokens is None:
        return length
    return Figure(float(run.config.eval.max_new_tokens), "tokens", "assumed", "as long as eval.max_new_tokens allows")


def bytes_per_token(run: Run, stage: str, name: str | None) -> Figure:
    """Bytes of a table on disk per response token: of the newest shards, else from its columns."""
    found = newest(run, stage, name)
    tokens = sum(r.tokens for r in found[2]) if found else 0
    if found and tokens:
        return Figure(sum(r.bytes for r in found[2]) / tokens, "bytes per token", "measured", found[0].label)
    part = run.part(stage, 0, name)
    masses = {c.name for c in MASSES}
    k = run.config.score.topk
    numbers = {FLOATS: 1, IDS: 1, FLOAT_LISTS: k, ID_LISTS: k}
    rounds = bool(run.config.score.rounding) and stage in ("scores", "addons")
    columns = [c for c in columns_of(part.table) if c.per == "token" and c.name not in masses]
    if stage == "weights" or (name or "").startswith(ADDED_TEACHER):
        columns = [c for c in columns if not c.optional]
    size = sum(numbers[c.type] * _number_bytes(c, rounds) if c.type in numbers else 0.125 for c in columns)
    size += TEXT_BYTES if stage in _TEXT_TABLES else 0.0
    return Figure(round(size, 1), "bytes per token", "assumed", _STORED)


def _number_bytes(column: Column, rounds: bool) -> float:
    """Of one number of a list column. `rounds`: with `score.precision: reduced`."""
    if column.type in (IDS, ID_LISTS):
        return ID_BYTES
    return REDUCED_BYTES if rounds and column.reducible else FLOAT_BYTES


def bytes_per_row(run: Run, stage: str, name: str | None) -> Figure:
    """As `bytes_per_token`, for tables that have no token columns."""
    found = newest(run, stage, name)
    rows = sum(r.rows for r in found[2]) if found else 0
    if found and rows:
        return Figure(sum(r.bytes for r in found[2]) / rows, "bytes per row", "measured", found[0].label)
    return Figure(ROW_BYTES, "bytes per row", "assumed", _STORED)


def tokens_per_s(run: Run, stage: str, name: str | None, command: str, given: dict[str, float]) -> Figure:
    """Response tokens per second of a stage: given for its command, else of what was made of it, else unknown.

    Receipts hold the seconds of each shard. Shards made at the same time are counted once, by when each ended. What
    swept the round before its first shard (several teachers, the fit of a rule) is in no receipt.
    """
    unit = "tokens per second"
    if command in given:
        return Figure(given[command], unit, "given", f"--tokens-per-s {command}={given[command]:g}")
    missing = Figure(None, unit, "assumed", f"--tokens-per-s {command}=N")
    if stage == "checkpoints":
        return _trained(run) or missing
    found = newest(run, stage, name)
    tokens = _tokens(*found) if found else 0.0
    if found is None or not tokens or sum(r.seconds for r in found[2]) <= 0:
        if stage == "evals":  # the same engine writes
            return tokens_per_s(run, "rollouts", None, command, given)
        return Figure(WEIGH_TOKENS_PER_S, unit, "assumed", "bench/RESULTS.md") if stage == "weights" else missing
    part, manifest, receipts = found
    if len(manifest.fields.get("teachers") or ()) > 1:
        return missing
    return Figure(tokens / _busy(part, receipts), unit, "measured", f"receipts of {part.label}")


def _tokens(part: Part, manifest: Manifest, receipts: list[Receipt]) -> float:
    """Response tokens that receipts are about; those of an evaluation count rows alone."""
    if part.stage == "evals":
        return sum(r.rows for r in receipts) * float(manifest.stats.get("mean_length") or 0.0)
    return float(sum(r.tokens for r in receipts))


def _busy(part: Part, receipts: list[Receipt]) -> float:
    """Seconds in which at least one shard was being made, at most the sum of all; from the times of the receipts."""
    spans = []
    for receipt in receipts:
        try:
            ended = part.receipt_path(receipt.shard).stat().st_mtime
        except FileNotFoundError:
            return sum(r.seconds for r in receipts)
        spans.append((ended - receipt.seconds, ended))
    busy, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return max(busy, *(r.seconds for r in receipts))


def _trained(run: Run) -> Figure | None:
    records = [r for r in metrics.steps(run.root / "metrics.jsonl") if r.get("seconds") and r.get("tokens")]
    last = [r for r in records if r["round"] == records[-1]["round"]]
    if not last:
        return None
    speed = sum(r["tokens"] for r in last) / sum(r["seconds"] for r in last)
    how = f"metrics.jsonl, {len(last)} steps of round {last[0]['round']}"
    return Figure(speed, "tokens per second", "measured", how)
