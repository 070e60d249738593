"""Many shards: whatever fails and however late, all are there once, and none costs more because there are others."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from fire_data import records, shards
from fire_data.schemas.errors import EngineError, FingerprintError
from fire_data.schemas.manifest import Manifest, Shard
from fire_data.schemas.tables import conform
from fire_data.shards import Part, read_manifest, read_shard, require_current
from fire_data.stages import Stage, open_stage, plan_shards, run_stage, set_stage_aside
from fire_data.steps.passes import require_same_columns

ROWS = 2


def table(shard: Shard) -> pa.Table:
    rows = shard.stop - shard.start
    return conform(
        pa.table({
            "trajectory_id": [f"{i}" for i in range(shard.start, shard.stop)],
            "step": pa.array([0] * rows, pa.int32()),
            "keep": [True] * rows,
            "weight": pa.array([[1.0]] * rows, pa.list_(pa.float32())),
            "advantage": pa.array([[1.0]] * rows, pa.list_(pa.float32())),
            "coefficient": pa.array([[1.0]] * rows, pa.list_(pa.float32())),
            "drop_reason": pa.array([None] * rows, pa.string()),
        }),
        "weights",
        shard.name,
    )  # fmt: skip


def stage(root: Path, count: int) -> Stage:
    return Stage(Part(root, "weights", 0, "fire"), {"made": "fake"}, plan_shards(count * ROWS, ROWS))


@pytest.mark.parametrize("lanes", [1, 5])
def test_failing_calls_and_late_shards_leave_no_gap_and_no_row_twice(tmp_path: Path, lanes: int) -> None:
    made, calls, late = stage(tmp_path, 60), itertools.count(1), threading.Event()

    def make(shard: Shard) -> pa.Table:
        call = next(calls)
        if call % 7 == 0:
            raise EngineError("killed, as told")
        if lanes > 1 and call == 2:
            late.wait(60)  # until many that were started after it are done
        if call == 20:
            late.set()
        return table(shard)

    manifest: Manifest | None = None
    attempts = 0
    while manifest is None:
        attempts += 1
        try:
            manifest = run_stage(made, make, lanes=lanes)
        except EngineError:
            late.set()
    part = made.part
    assert attempts > 3
    assert [r.shard for r in manifest.shards] == [s.name for s in made.plan]
    assert len(list(part.folder.iterdir())) == len(list(part.receipts.iterdir())) == 60
    names = [n for r in manifest.shards for n in read_shard(part, r, ["trajectory_id"])["trajectory_id"].to_pylist()]
    assert names == [f"{i}" for i in range(60 * ROWS)]


def test_the_manifest_is_not_read_with_every_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    real: Callable[..., Any] = records.read

    def counting(kind: Any, path: Path, fix: str) -> Any:
        read.append(path)
        return real(kind, path, fix)

    monkeypatch.setattr(records, "read", counting)
    counts = {}
    for number in (5, 40):
        made = stage(tmp_path / str(number), number)
        read.clear()
        run_stage(made, table)
        counts[number] = read.count(made.part.manifest_path)
    assert counts[5] == counts[40]


def test_a_stage_that_was_set_aside_is_noticed_at_once(tmp_path: Path) -> None:
    made = stage(tmp_path, 3)
    open_stage(made)
    require_current(made.part, made.fingerprint)
    set_stage_aside(made.part)
    with pytest.raises(FingerprintError, match="set aside"):
        require_current(made.part, made.fingerprint)
    other = Stage(made.part, {"made": "otherwise"}, made.plan)
    open_stage(other)
    require_current(made.part, other.fingerprint)
    with pytest.raises(FingerprintError, match="set aside"):
        require_current(made.part, made.fingerprint)
    found = read_manifest(made.part)
    assert found is not None
    assert found.fingerprint == other.fingerprint


def test_columns_are_compared_with_one_other_shard_without_a_list_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = stage(tmp_path, 20)
    run_stage(made, table)
    monkeypatch.setattr(Path, "glob", None)
    require_same_columns(made.part, made.plan[0], ["weight"])
    with pytest.raises(FingerprintError, match="other columns"):
        require_same_columns(made.part, made.plan[0], ["weight", "token_keep"])
    assert shards.is_sealed(made.part)
