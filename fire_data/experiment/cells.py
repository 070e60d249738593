"""Makes one cell of an experiment as an ordinary run, round by round; what is sealed is confirmed and never made again.

Folders of an experiment: `worlds/seed-NNN/` as `worlds.build` lays them out, `cells/WORLD/SETTING/ARM/seed-NNN/` are
run directories. Beside the run's own files a cell has `cell.json`, the values it was made from, and `cost.jsonl`, one
line per round and attempt: CPU seconds of the process and its largest resident memory meanwhile. What an attempt that
was killed had used in its last round is not known.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fire_data import files, metrics
from fire_data.create import init_run
from fire_data.experiment.spec import Cell, Given, Spec, values_of
from fire_data.run import Run, open_run
from fire_data.schemas.errors import ConfigError
from fire_data.session import Session
from fire_data.shards import is_sealed
from fire_data.stages import Reporter, Silent
from fire_data.steps.benchmarks import evaluated
from fire_data.steps.evaluate import evaluate
from fire_data.steps.refresh import one_round

Json = dict[str, Any]
_PEAK = Path("/proc/self/clear_refs")  # Linux: writing 5 starts the largest resident memory anew


def cell_folder(out: Path, cell: Cell) -> Path:
    return out / "cells" / cell.id


def evaluations(spec: Spec, cell: Cell | None = None) -> list[int]:
    """Numbers of rounds trained after which there is an evaluation; 0 is the start, and all of a teacher's."""
    if cell is not None and cell.route:
        return [0]
    return sorted({0, *range(spec.evaluate_every, spec.rounds, spec.evaluate_every), spec.rounds})


def build_worlds(out: Path, seed: int, wanted: Sequence[tuple[str, str]]) -> None:
    """Build the worlds of a seed, given as world and setting, once for all its cells."""
    from fire_data.worlds.build import build

    for world, setting in wanted:
        with _measured(out / "worlds" / "cost.jsonl", {"seed": seed, "world": world, "setting": setting}):
            build(_seed_folder(out, seed), world, setting, seed)


def worlds_cpu_seconds(out: Path, cells: Iterable[Cell]) -> float:
    """What building the worlds of these cells has cost so far."""
    mine = {(cell.seed, cell.world, cell.setting) for cell in cells}
    records = metrics.read(out / "worlds" / "cost.jsonl")
    return math.fsum(r["cpu_seconds"] for r in records if (r["seed"], r["world"], r["setting"]) in mine)


def make_cell(
    spec: Spec, out: Path, cell: Cell, base: Path, report: Reporter | None = None, *, held_out: bool = True
) -> None:
    """Make, continue or confirm a cell whose world is built.

    Args:
        base: the folder that given paths are relative to.
        held_out: False: rounds alone, so that what they cost is told without evaluations; another call makes those.

    Raises:
        ConfigError: the cell is there and was made from other values. Beside it, what the stages raise.
    """
    run, cost = _opened(spec, out, cell, base), cell_folder(out, cell) / "cost.jsonl"
    due = evaluations(spec, cell)
    if is_finished(run, due):
        return
    with Session(run, report or Silent()) as session:
        for trained in range(due[-1] + 1):
            number = trained - 1
            made = trained == 0 or is_sealed(run.part("checkpoints", number))
            seen = not held_out or trained not in due or evaluated(run, number if trained else None)
            if made and seen:
                continue
            with _measured(cost, {"round": trained}):
                if not made:
                    one_round(session, number)
                if not seen:
                    evaluate(session, number if trained else None)


def is_finished(run: Run, due: Sequence[int]) -> bool:
    """True if all rounds of a run up to its last evaluation are trained, and all its evaluations made."""
    rounds = all(is_sealed(run.part("checkpoints", number)) for number in range(due[-1]))
    return rounds and all(evaluated(run, n - 1 if n else None) for n in due)


def found_cell(out: Path, cell: Cell) -> Run | None:
    """The run of a cell as it is, if there is one."""
    root = cell_folder(out, cell)
    return open_run(root) if (root / "fire.yaml").exists() else None


def _opened(spec: Spec, out: Path, cell: Cell, base: Path) -> Run:
    """The run of a cell, made if it is not there."""
    root = cell_folder(out, cell)
    values = _values(spec, out, cell, base)
    plain = json.dumps(_relative(values, out.resolve()), indent=1, sort_keys=True) + "\n"
    record = root / "cell.json"
    if not (root / "fire.yaml").exists():
        files.make_folder(root)
        files.replace_bytes(record, plain.encode(), root / ".fire" / "tmp")
        return init_run(root, values)
    if not record.exists() or record.read_text(encoding="utf-8") != plain:
        text = "this cell was made from other settings than the specification has now"
        raise ConfigError(text, where=str(record), fix="fire experiment SPEC --out ANOTHER_FOLDER, or remove the cell")
    return open_run(root)


def _values(spec: Spec, out: Path, cell: Cell, base: Path) -> Json:
    if cell.world in spec.given:
        return _given(spec, spec.given[cell.world], cell, base)
    from fire_data.worlds.build import build

    built = build(_seed_folder(out, cell.seed), cell.world, cell.setting, cell.seed)
    teachers: dict[str, Json] = {
        route: {"model": str(folder.resolve()), **({"trust_remote_code": True} if built.trusted else {})}
        for route, folder in built.teachers.items()
    }
    held_out = {"main": str(built.main.resolve()), "retain": str(built.retain.resolve())}
    student = {"model": str(built.student.resolve())}
    return values_of(spec, cell, student, teachers, str(built.prompts.resolve()), held_out)


def _given(spec: Spec, world: Given, cell: Cell, base: Path) -> Json:
    def here(text: str) -> str:
        path = base / Path(text).expanduser()
        return str(path.resolve()) if path.exists() else text

    def model(values: Json) -> Json:
        return {**values, "model": here(str(values.get("model")))}

    teachers = {route: model(values) for route, values in world.teachers[cell.setting].items()}
    held_out = {"main": here(world.main), **({"retain": here(world.retain)} if world.retain else {})}
    return values_of(spec, cell, model(world.student), teachers, here(world.prompts), held_out)


def _relative(value: Any, out: Path) -> Any:
    """Paths below the experiment's folder as they are seen from it: it may be moved."""
    if isinstance(value, dict):
        return {k: _relative(v, out) for k, v in value.items()}
    below = isinstance(value, str) and value.startswith(f"{out}{os.sep}")
    return os.path.relpath(value, out) if below else value


def _seed_folder(out: Path, seed: int) -> Path:
    return out / "worlds" / f"seed-{seed:03d}"


@contextmanager
def _measured(path: Path, record: Json) -> Iterator[None]:
    """Append what the block has cost to a file, also if it fails."""
    files.make_folder(path.parent)
    if _PEAK.exists():
        with suppress(OSError):
            _PEAK.write_text("5")
    began, clock = time.process_time(), time.monotonic()
    try:
        yield
    finally:
        cost = {"cpu_seconds": time.process_time() - began, "seconds": time.monotonic() - clock, "peak_mb": _peak_mb()}
        metrics.append(path, record | cost)


def _peak_mb() -> float:
    """The largest resident memory in MB: since it was started anew on Linux, else since the process began."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**20 if sys.platform == "darwin" else 1024)
