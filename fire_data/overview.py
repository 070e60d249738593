"""Where a run stands: which stages of which rounds are sealed, what is damaged, what to do next, and how to redo."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from fire_data import files, trackers
from fire_data.run import STAGES, Run
from fire_data.schemas.errors import ConfigError, DataError
from fire_data.schemas.manifest import Manifest, Receipt
from fire_data.schemas.tables import added_by
from fire_data.shards import VERBS, Part, foreign_files, intact, is_sealed, read_manifest, read_receipt
from fire_data.stages import Reporter, set_stage_aside, strangers

MANIFEST = "manifest"  # what `check` calls the damaged thing where it is no shard


def parts(run: Run) -> list[Part]:
    """Every stage of every round that was started, in the order in which they are made."""
    benchmarks = [None, *run.names("evals")]
    starts = [run.part("evals", "start", name) for name in benchmarks]
    found = [p for p in starts if p.manifest_path.exists()]
    for number in run.rounds():
        stages = [run.part(s, number) for s in ("rollouts", "scores")]
        stages += [run.part("addons", number, n) for n in run.names("addons")]
        stages += [run.part("weights", number, n) for n in run.names("weights")]
        stages += [run.part("checkpoints", number), *(run.part("evals", number, name) for name in benchmarks)]
        found += [p for p in stages if p.manifest_path.exists()]
    return found


def status(run: Run) -> list[dict[str, Any]]:
    """One row per started stage: state, shards done and planned, rows, tokens, bytes, seconds.

    The state is `damaged` if a file is gone or has another size; `check` reads every byte.
    """
    rows = []
    for part in parts(run):
        manifest = read_manifest(part)
        assert manifest is not None
        done = list(manifest.shards) or [r for s in manifest.plan if (r := read_receipt(part, s.name)) is not None]
        gone = any(not _file(part, r).is_file() or _file(part, r).stat().st_size != r.bytes for r in done)
        rows.append({
            "stage": part.stage if part.name is None else f"{part.stage}/{part.name}",
            "round": part.round,
            "state": "damaged" if gone else manifest.state,
            "shards": len(done),
            "planned": len(manifest.plan) or len(done),
            "rows": sum(r.rows for r in done),
            "tokens": sum(r.tokens for r in done),
            "bytes": sum(r.bytes for r in done),
            "seconds": round(sum(r.seconds for r in done), 1),
        })  # fmt: skip
    return rows


def next_command(run: Run) -> str:
    """The command that brings the run on: the first stage of the current round that is not sealed."""
    number = run.current_round()
    added = [(number, name) for name in _addons(run)]
    places = [(stage, *place) for stage in STAGES for place in (added if stage == "addons" else [(number, None)])]
    part = next(p for place in places if not is_sealed(p := run.part(*place)))
    if number and part.stage == "rollouts" and not run.teachers:  # a shared run: another round needs a teacher
        return shlex.join(["fire", "inspect", str(run.root), "--round", str(number - 1)])
    if number and part.stage == "rollouts" and not part.manifest_path.exists():
        return shlex.join(["fire", "run", str(run.root), "--rounds", str(number + 1)])
    if part.stage == "addons" and part.name not in run.config.score.add:
        return added_by(str(part.name), shlex.quote(str(run.root)))
    if part.stage == "weights" and part.name != run.config.weights_name:
        return part.command
    return shlex.join(["fire", VERBS[part.stage], str(run.root)])


def _addons(run: Run) -> tuple[str, ...]:
    try:
        return run.needed_addons()
    except ConfigError:  # a rule that cannot be is for `fire weigh` to tell
        return run.config.score.add


def check(run: Run) -> list[dict[str, Any]]:
    """Compare every finished shard and checkpoint file with its receipt; what does not hold, with the fix.

    Also named: receipts and manifests that were changed or are gone, and files that no receipt names but readers of the
    folder, or loaders of the model, would take for a part of it.
    """
    damage = [_damage(part, MANIFEST, "is missing", part.manifest_path) for part in _without_manifest(run)]
    for part in parts(run):
        try:
            manifest = read_manifest(part)
        except DataError as error:
            damage.append(_damage(part, MANIFEST, error.what, part.manifest_path))
            continue
        assert manifest is not None
        damage += _damages(part, manifest)
    return damage


def _damages(part: Part, manifest: Manifest) -> list[dict[str, Any]]:
    """What does not hold in one stage of a round."""
    damage, listed = [], {r.shard: r for r in manifest.shards}
    for name in [shard.name for shard in manifest.plan]:
        where = part.receipt_path(name)
        try:
            receipt = read_receipt(part, name)
        except DataError as error:
            damage.append(_damage(part, name, error.what, where))
            continue
        if receipt is None and name in listed:
            damage.append(_damage(part, name, "has no receipt", where))
        elif receipt is not None and listed.setdefault(name, receipt).sha256 != receipt.sha256:
            damage.append(_damage(part, name, "has another receipt than the manifest lists", where))
    for receipt in listed.values():
        path = _file(part, receipt)
        if not intact(path, receipt):
            what = "differs from its receipt" if path.exists() else "is missing"
            damage.append(_damage(part, receipt.shard, what, path))
    foreign = foreign_files if part.stage == "checkpoints" else strangers
    return damage + [_damage(part, p.stem, "is no part of what was made", p) for p in foreign(part, manifest)]


def _without_manifest(run: Run) -> list[Part]:
    """Stages whose tables are there, and their manifest is not."""
    found = []
    for stage in VERBS:
        for folder in sorted({path.parent for path in (run.root / stage).rglob("*.parquet")}):
            place = folder.relative_to(run.root / stage).parts
            number = re.fullmatch(r"round-(\d+)|start", place[-1]) if place else None
            if number and len(place) < 3:
                name = place[0] if len(place) == 2 else None
                part = Part(run.root, stage, int(number[1]) if number[1] else "start", name)
                found += [part] if not part.manifest_path.exists() else []
    return found


def _file(part: Part, receipt: Receipt) -> Path:
    """The file a receipt is about: a checkpoint has one for each of its files."""
    return part.folder / receipt.shard if part.stage == "checkpoints" else part.file(receipt.shard)


def _damage(part: Part, shard: str, what: str, path: Path) -> dict[str, Any]:
    return {"stage": part.label, "shard": shard, "what": what, "path": str(path), "fix": _repair(part)}


def _repair(part: Part) -> str:
    """The command that makes a damaged file again; a checkpoint needs the training state it was exported from."""
    if part.stage != "checkpoints" or part.round in [r for r, _ in _states(part.root)]:
        return part.command
    return f"copy the file back; the state it was exported from is gone: {train_anew(part.root)}"


def train_anew(root: Path) -> str:
    """The command that is left when the training state a round starts from is gone."""
    command = shlex.join(["fire", "train", str(root), "--round", "0", "--redo"])
    return f"{command} trains all rounds anew (train.keep_states: all keeps every round's end)"


def start_over(run: Run, stage: str, number: int | str, report: Reporter, name: str | None = None) -> list[str]:
    """Set a stage aside with everything that was made from it, later rounds included. Returns and tells what was moved.

    Raises ConfigError, before anything is moved, if the training state that the round starts from is gone.
    """
    if not isinstance(number, int) or stage == "evals":
        part = run.part("evals", number, name)  # nothing is made from an evaluation
        there = part.manifest_path.exists()
        set_stage_aside(part)
        return _told([part.label] * there, part, report)
    lineage = _lineage(run, stage, number, name)
    if lineage:
        _require_start(run, number)
    moved = []
    for part in reversed(parts(run)):
        same = part.round == number and _follows(part, stage, name, lineage)
        later = isinstance(part.round, int) and part.round > number and lineage
        if same or later:
            set_stage_aside(part)
            moved.append(part.label)
    if lineage:
        _set_states_aside(run, number)
    return _told(moved[::-1], run.part(stage, number, name), report)


def _told(moved: list[str], part: Part, report: Reporter) -> list[str]:
    if moved:
        report.note(f"set aside under {part.orphans}: {', '.join(moved)}")
    return moved


def _lineage(run: Run, stage: str, number: int, name: str | None) -> bool:
    """Whether the checkpoint is made from it: weights may be there to compare, addons for such weights."""
    if stage == "addons":
        return _uses(run.part("weights", number), name) or _uses(run.part("checkpoints", number), name)
    if stage != "weights":
        return True
    return name == run.lineage(number)


def _follows(part: Part, stage: str, name: str | None, lineage: bool) -> bool:
    """Whether a part of the same round is the stage itself or was made from it."""
    if part.stage in ("checkpoints", "evals"):
        return lineage
    if stage == part.stage == "weights" or stage == part.stage == "addons":
        return part.name == name
    if stage == "addons":
        return part.stage == "weights" and _uses(part, name)
    return STAGES.index(part.stage) >= STAGES.index(stage)


def _uses(part: Part, addon: str | None) -> bool:
    """Whether weights or a checkpoint were made with an addon; true where the manifest cannot be read."""
    try:
        manifest = read_manifest(part)
    except DataError:
        return True
    fields = manifest.fields if manifest else {}
    return any(addon in (fields.get(key) or ()) for key in ("addons", "inputs"))


def _states(root: Path) -> list[tuple[int, Path]]:
    """The round of every training state, and its folder; one that is being replaced has a suffix."""
    folder = root / ".fire" / "train"
    found = sorted(folder.glob("step-*-round-*")) if folder.is_dir() else []
    return [(int(p.name.rpartition("-")[2].partition(".")[0]), p) for p in found]


def _require_start(run: Run, number: int) -> None:
    rounds = [r for r, _ in _states(run.root)]
    trained = run.part("checkpoints", number).manifest_path.exists()
    if trained and number > 0 and number - 1 not in rounds:
        text = f"round {number} cannot be trained again: the training state at the end of round {number - 1} is gone"
        raise ConfigError(text, where=str(run.root / ".fire" / "train"), fix=train_anew(run.root))


def _set_states_aside(run: Run, number: int) -> None:
    """Training states of a round that is done again, and of later ones; trackers get a new run for what comes."""
    states = [p for r, p in _states(run.root) if r >= number]
    files.set_aside([*states, trackers.id_path(run.root)], run.root / ".fire" / "orphans")
