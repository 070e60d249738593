"""Shards: nothing torn is ever seen, nothing is overwritten or deleted, and a changed byte is always noticed."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fire_data import files, shards
from fire_data.run import open_run
from fire_data.schemas.errors import DamagedError, DataError, FingerprintError, StorageError
from fire_data.schemas.manifest import Receipt, Shard, digest
from fire_data.schemas.tables import columns_of, conform
from fire_data.shards import (
    Part,
    adopt,
    intact,
    read_manifest,
    read_receipt,
    read_schema,
    read_shard,
    sealed,
    verify_shard,
    write_shard,
)
from fire_data.stages import Stage, open_stage, plan_shards, run_stage, set_stage_aside

from .conftest import edit_record, flip, shard_files
from .faults.calls import failing

FIELDS = {"seed": 0}
FINGERPRINT = digest(FIELDS)
SHARD = Shard(name="00000", start=0, stop=4)


def rollouts(start: int = 0, stop: int = 4, salt: int = 0) -> pa.Table:
    """A table of rollouts whose content follows from its arguments."""
    rng = random.Random(f"{start} {stop} {salt}")
    lengths = [rng.randrange(1, 9) for _ in range(stop - start)]
    data = {
        "trajectory_id": [f"{rng.getrandbits(128):032x}" for _ in lengths],
        "prompt_id": [f"prompt {i}" for i in range(start, stop)],
        "round": [0] * len(lengths),
        "sample": [0] * len(lengths),
        "messages": [[{"role": "user", "content": f"say {i}"}] for i in range(start, stop)],
        "prompt_ids": [[1, 2, 3] for _ in lengths],
        "response": [f"text {rng.random()}" for _ in lengths],
        "response_ids": [[rng.randrange(100) for _ in range(n)] for n in lengths],
        "finish_reason": ["stop" for _ in lengths],
        "rollout_logprob": [[-rng.random() for _ in range(n)] for n in lengths],
    }
    return conform(pa.table(data), "rollouts", "test")


def stage(root: Path, units: int = 4, fields: dict[str, Any] | None = None) -> Stage:
    return Stage(Part(root, "rollouts", 0), fields or FIELDS, plan_shards(units, 4))


def make(shard: Shard) -> pa.Table:
    return rollouts(shard.start, shard.stop)


@pytest.fixture
def part(tmp_path: Path) -> Part:
    """A stage that is open, with nothing made yet."""
    opened = stage(tmp_path / "run")
    open_stage(opened)
    return opened.part


def write(part: Part, table: pa.Table | None = None, fingerprint: str = FINGERPRINT) -> Receipt:
    return write_shard(part, SHARD, rollouts() if table is None else table, fingerprint, 0.0)


def orphans(part: Part) -> list[str]:
    """What was set aside, by its place within the run."""
    return sorted("/".join(p.relative_to(part.orphans).parts[1:]) for p in part.orphans.rglob("*") if p.is_file())


def leftovers(part: Part) -> list[str]:
    return [p.name for p in part.tmp.iterdir() if p.suffix != ".lock"]


def readable(part: Part) -> dict[str, pa.Table]:
    """Everything a reader can see: only what a receipt names, and that whole."""
    found = {}
    manifest = read_manifest(part)
    for planned in manifest.plan if manifest else ():
        receipt = read_receipt(part, planned.name)
        if receipt is not None:
            found[planned.name] = read_shard(part, receipt)
    return found


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("state", ["nothing", "damaged", "without receipt"])
def test_any_call_may_fail_and_the_same_command_finishes(tmp_path: Path, number: int, state: str) -> None:
    """SQLite's way: fail the 1st, 2nd, 3rd ... call until all succeed; look at the disk after every failure."""
    whole = {s.name: make(s) for s in plan_shards(8, 4)}
    start = tmp_path / "start"
    run_stage(stage(start, 8), make)
    part = stage(start, 8).part
    if state == "nothing":
        set_stage_aside(part)
    elif state == "damaged":
        flip(part.file("00001"), 1000)
    else:
        part.receipt_path("00001").unlink()
    for k in range(500):
        root = tmp_path / f"run-{k}"
        shutil.copytree(start, root)
        work, failure = stage(root, 8), None
        with failing(k, number) as calls:
            try:
                run_stage(work, make)
            except StorageError as error:
                failure = error
            met = len(calls) > k
        if failure is not None:
            assert failure.exit_code == 1
            assert "continues" in str(failure.fix)
            assert ("the disk is full" in failure.what) == (number == errno.ENOSPC)
            assert state == "damaged" or all(table.equals(whole[n]) for n, table in readable(work.part).items())
            assert leftovers(work.part) == [] or calls[k] == "unlink"
            run_stage(work, make)
        manifest = read_manifest(work.part)
        assert manifest is not None
        assert manifest.sealed
        found = readable(work.part)
        assert found.keys() == whole.keys()
        assert all(table.equals(whole[n]) for n, table in found.items())
        shutil.rmtree(root)
        if not met:
            break
        # Where the folder is there already, nobody minds that it cannot be made.
        assert failure or calls[k] == "mkdir", f"the fault of {calls[k]} must not be swallowed"
    assert not met, "the last attempt must have met no fault"
    assert k > 20, "the faults must have reached the calls in question"


def _killed(root: str, k: int) -> None:
    with failing(k, functools.partial(os._exit, 9)):
        run_stage(stage(Path(root)), make)


def test_a_killed_writer_leaves_no_visible_shard(part: Part) -> None:
    """A process that ends, without cleaning up, at each of its calls in turn."""
    context = multiprocessing.get_context("fork")
    for k in range(200):
        root = part.root.with_name(f"run-{k}")
        shutil.copytree(part.root, root)
        mine = Part(root, "rollouts", 0)
        writer = context.Process(target=_killed, args=(str(root), k))
        writer.start()
        writer.join(30)
        assert writer.exitcode in (0, 9)
        assert all(table.equals(rollouts()) for table in readable(mine).values())
        assert all(p.suffix == ".parquet" for p in mine.folder.rglob("*"))
        run_stage(stage(root), make)
        assert readable(mine)["00000"].equals(rollouts())
        assert leftovers(mine) == []
        if writer.exitcode == 0:
            break
    assert writer.exitcode == 0
    assert k > 15


def _race(root: str, salt: int, barrier: Any, answers: Any) -> None:
    part = Part(Path(root), "rollouts", 0)
    table = rollouts(salt=salt)
    barrier.wait()
    receipt = write_shard(part, SHARD, table, FINGERPRINT, 0.0)
    answers.put((salt, receipt.sha256))


def test_of_two_writers_one_wins_and_both_return_its_receipt(part: Part) -> None:
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(4), context.Queue()
    writers = [context.Process(target=_race, args=(str(part.root), i, barrier, answers)) for i in range(4)]
    for writer in writers:
        writer.start()
    found = dict(answers.get(timeout=30) for _ in writers)
    for writer in writers:
        writer.join(30)
    receipt = read_receipt(part, "00000")
    assert receipt is not None
    assert set(found.values()) == {receipt.sha256}
    table = read_shard(part, receipt)
    assert sum(table.equals(rollouts(salt=i)) for i in range(4)) == 1
    assert [p.name for p in part.folder.iterdir()] == ["00000.parquet"]
    assert leftovers(part) == []


def test_a_second_writer_discards_its_copy(part: Part) -> None:
    first = write(part)
    before = part.file("00000").stat()
    second = write(part, rollouts(salt=1))
    assert second == first
    assert part.file("00000").stat().st_mtime_ns == before.st_mtime_ns
    assert read_shard(part, first).equals(rollouts())
    assert orphans(part) == []


def test_the_same_table_gives_the_same_bytes(part: Part, tmp_path: Path) -> None:
    other = stage(tmp_path / "elsewhere")
    open_stage(other)
    mine, theirs = write(part), write(other.part)
    assert mine.sha256 == theirs.sha256
    chunked = pa.concat_tables([rollouts().slice(0, 1), rollouts().slice(1)])
    set_stage_aside(other.part)
    open_stage(other)
    assert write(other.part, chunked).sha256 == mine.sha256


def test_a_receipt_counts_what_was_written(part: Part) -> None:
    receipt = write(part)
    table = rollouts()
    assert receipt.rows == table.num_rows == 4
    assert receipt.tokens == sum(len(x) for x in table["response_ids"].to_pylist())
    assert receipt.bytes == part.file("00000").stat().st_size
    assert receipt.sha256 == files.sha256_file(part.file("00000"))
    assert receipt.fingerprint == FINGERPRINT
    assert "pyarrow" in receipt.versions
    metadata = pq.read_metadata(part.file("00000")).metadata
    assert metadata[b"fire.fingerprint"] == FINGERPRINT.encode()
    assert metadata[b"fire.shard"] == b"00000"
    assert metadata[b"fire.table"] == b"rollouts"
    assert metadata[b"fire.format"] == b"1"


def test_a_whole_file_without_receipt_is_adopted(part: Part) -> None:
    receipt = write(part)
    part.receipt_path("00000").unlink()
    before = part.file("00000").stat().st_ino
    adopted = adopt(part, SHARD, FINGERPRINT)
    assert adopted is not None
    assert (adopted.sha256, adopted.rows, adopted.tokens) == (receipt.sha256, receipt.rows, receipt.tokens)
    assert part.file("00000").stat().st_ino == before
    assert read_receipt(part, "00000") == adopted


def test_a_shard_that_lost_its_receipt_is_not_taken_for_another(tmp_path: Path) -> None:
    """Both are whole and of this very stage: only their footers say which is which."""
    work = stage(tmp_path / "run", 8)
    run_stage(work, make)
    first, second = shard_files(work.part)
    whole = first.read_bytes(), second.read_bytes()
    first.write_bytes(whole[1])
    second.write_bytes(whole[0])
    for path in work.part.receipts.iterdir():
        path.unlink()
    run_stage(work, make)
    assert (first.read_bytes(), second.read_bytes()) == whole


@pytest.mark.parametrize("state", ["foreign", "truncated", "empty", "text", "another table"])
def test_any_other_file_without_receipt_is_set_aside_and_not_deleted(part: Part, state: str) -> None:
    write(part)
    part.receipt_path("00000").unlink()
    path = part.file("00000")
    if state == "another table":
        pq.write_table(pa.table({"a": [1]}).replace_schema_metadata({"fire.fingerprint": FINGERPRINT}), path)
    elif state != "foreign":
        path.write_bytes({"truncated": path.read_bytes()[:-9], "empty": b"", "text": b"notes"}[state])
    content = path.read_bytes()
    assert adopt(part, SHARD, "another" if state == "foreign" else FINGERPRINT) is None
    assert not path.exists()
    assert orphans(part) == ["rollouts/round-000/00000.parquet"]
    assert next(part.orphans.rglob("*.parquet")).read_bytes() == content
    assert adopt(part, SHARD, FINGERPRINT) is None
    assert leftovers(part) == []


def test_a_file_without_receipt_is_not_adopted_with_a_single_bit_changed(part: Part) -> None:
    """Page checksums alone miss those in page headers, statistics and the footer."""
    write(part)
    path = part.file("00000")
    good = path.read_bytes()
    rng = random.Random(1)
    for offset in rng.sample(range(len(good)), 80):
        part.receipt_path("00000").unlink(missing_ok=True)
        path.write_bytes(good)
        flip(path, offset, rng.randrange(8))
        assert adopt(part, SHARD, FINGERPRINT) is None, offset
    path.write_bytes(good)
    assert adopt(part, SHARD, FINGERPRINT) is not None


def test_every_flipped_bit_and_every_cut_is_noticed_by_every_reader(tmp_path: Path) -> None:
    root = tmp_path / "run"
    run_stage(stage(root), make)
    (root / "fire.yaml").write_text("student: {model: m}\n")
    run, part = open_run(root), stage(root).part
    receipt = read_receipt(part, "00000")
    assert receipt is not None
    path = part.file("00000")
    good = path.read_bytes()
    rng = random.Random(0)
    damages = [(o, 1 << rng.randrange(8)) for o in rng.sample(range(len(good)), 60)]
    bad = [good[:o] + bytes([good[o] ^ b]) + good[o + 1 :] for o, b in damages]
    bad += [good[:n] for n in (0, 1, len(good) // 2, len(good) - 1)] + [good + b"\0"]
    for data in bad:
        path.write_bytes(data)
        for reader in (lambda: read_shard(part, receipt), lambda: verify_shard(part, receipt), lambda: run.rollouts(0)):
            with pytest.raises(DamagedError) as caught:
                reader()
            assert "00000" in str(caught.value.where)
            assert caught.value.fix == f"fire rollout {root} --round 0"
    path.unlink()
    with pytest.raises(DamagedError, match="missing"):
        read_shard(part, receipt)
    path.write_bytes(good)
    assert read_shard(part, receipt).equals(rollouts())
    assert run.rollouts(0).collect().height == 4


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', '{"shard": "00000"}', "\x00\x01", '{"rows": NaN}'])
def test_a_receipt_that_is_garbage_is_an_error_to_readers_and_written_again(tmp_path: Path, text: str) -> None:
    work = stage(tmp_path / "run", 8)
    run_stage(work, make)
    before = {p.name: p.stat().st_ino for p in shard_files(work.part)}
    path = work.part.receipt_path("00001")
    path.write_text(text)
    if text != "null":  # reads as no receipt
        with pytest.raises(DataError) as caught:
            read_receipt(work.part, "00001")
        assert caught.value.where == str(path)
        assert caught.value.fix == work.part.command
    path.unlink()
    path.write_text(text)
    run_stage(work, lambda shard: pytest.fail("a whole shard must not be computed again"))
    assert readable(work.part)["00001"].equals(rollouts(4, 8))
    assert {p.name: p.stat().st_ino for p in shard_files(work.part)} == before


@pytest.mark.parametrize("text", ["{", "[1]", '{"stage": "rollouts"}', "no JSON"])
def test_a_manifest_that_is_garbage_is_refused_by_readers_and_mended_by_its_stage(tmp_path: Path, text: str) -> None:
    work = stage(tmp_path / "run", 8)
    before = run_stage(work, make)
    whole = {p.name: p.read_bytes() for p in shard_files(work.part)}
    work.part.manifest_path.write_text(text)
    with pytest.raises(DamagedError) as caught:
        sealed(work.part)
    assert (caught.value.where, caught.value.fix) == (str(work.part.manifest_path), work.part.command)
    other = stage(tmp_path / "run", 8, fields={"seed": 1})
    with pytest.raises(DamagedError) as caught:
        run_stage(other, make)
    assert str(caught.value.fix).endswith("--redo"), "shards of other settings are not taken over unseen"
    assert run_stage(work, lambda shard: pytest.fail("whole shards must not be computed again")).digest == before.digest
    assert {p.name: p.read_bytes() for p in shard_files(work.part)} == whole
    assert orphans(work.part) == [".fire/manifests/rollouts/round-000.json"]


def test_a_changed_byte_of_a_receipt_or_manifest_is_never_believed(tmp_path: Path) -> None:
    """Counts of rows decide which tokens make a step, so they must be as safe as the shards."""
    work = stage(tmp_path / "run", 8)
    run_stage(work, make)
    part = work.part
    for path, read in (
        (part.manifest_path, lambda: read_manifest(part)),
        (part.receipt_path("00001"), lambda: read_receipt(part, "00001")),
    ):
        good, value = path.read_bytes(), read()
        for offset in range(len(good)):
            flip(path, offset, offset % 8)
            with contextlib.suppress(DamagedError):
                assert read() == value, offset  # one bit of the word "checksum"
            path.write_bytes(good)
        path.write_text(json.dumps(json.loads(good) | {"rows": 9}))
        with pytest.raises(DamagedError, match="by something else"):
            read()
        path.write_bytes(good)


def test_a_record_in_the_place_of_another_is_not_taken_for_it(tmp_path: Path) -> None:
    work = stage(tmp_path / "run", 8)
    run_stage(work, make)
    part, later = work.part, Part(tmp_path / "run", "rollouts", 1)
    later.manifest_path.write_bytes(part.manifest_path.read_bytes())
    with pytest.raises(DamagedError, match="the manifest of rollouts"):
        read_manifest(later)
    part.receipt_path("00001").write_bytes(part.receipt_path("00000").read_bytes())
    with pytest.raises(DamagedError, match="the receipt of shard 00000"):
        read_receipt(part, "00001")
    before = {p.name: p.stat().st_ino for p in shard_files(part)}
    run_stage(work, lambda shard: pytest.fail("a whole shard must not be computed again"))
    assert {p.name: p.stat().st_ino for p in shard_files(part)} == before


def test_a_shard_that_no_plan_names_is_set_aside(tmp_path: Path) -> None:
    """As by a copy that was made by hand: `scan_parquet` on the folder would count its rows twice."""
    work = stage(tmp_path / "run", 8)
    run_stage(work, make)
    shutil.copy(work.part.file("00000"), work.part.file("00002"))
    run_stage(work, lambda shard: pytest.fail("nothing is missing"))
    assert [p.name for p in shard_files(work.part)] == ["00000.parquet", "00001.parquet"]
    assert orphans(work.part) == ["rollouts/round-000/00002.parquet"]


def test_a_newer_format_is_refused_before_anything_else(part: Part) -> None:
    edit_record(part.manifest_path)
    value = json.loads(part.manifest_path.read_text())
    for newer in ({**value, "format": 2}, {"format": 2, "shape": "unknown"}):
        part.manifest_path.write_text(json.dumps(newer))
        with pytest.raises(DataError, match="format 2 is newer than this version reads") as caught:
            read_manifest(part)
        assert "upgrade" in str(caught.value.fix)


def no_links(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


@pytest.mark.parametrize("hard_links", [True, False])
def test_nothing_is_overwritten_with_hard_links_or_without(
    part: Part, monkeypatch: pytest.MonkeyPatch, hard_links: bool
) -> None:
    if not hard_links:
        monkeypatch.setattr(os, "link", no_links)
    first = write(part)
    assert write(part, rollouts(salt=1)) == first
    assert read_shard(part, first).equals(rollouts())
    assert leftovers(part) == []
    scratch = files.temporary(part.tmp, "x")
    scratch.write_bytes(b"mine")
    assert files.publish(scratch, part.file("00000")) is False
    assert read_shard(part, first).equals(rollouts())
    assert files.create_json(part.receipt_path("00000"), {"other": 1}, part.tmp) is False
    assert read_receipt(part, "00000") == first


def _race_without_links(root: str, salt: int, barrier: Any, answers: Any) -> None:
    os.link = no_links
    _race(root, salt, barrier, answers)


def test_without_hard_links_one_writer_wins_too(part: Part) -> None:
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(3), context.Queue()
    paths = [str(part.root), str(part.root.parent / "." / "run"), os.path.relpath(part.root)]
    writers = [context.Process(target=_race_without_links, args=(p, i, barrier, answers)) for i, p in enumerate(paths)]
    for writer in writers:
        writer.start()
    found = dict(answers.get(timeout=30) for _ in writers)
    for writer in writers:
        writer.join(30)
    receipt = read_receipt(part, "00000")
    assert receipt is not None
    assert set(found.values()) == {receipt.sha256}
    read_shard(part, receipt)


def test_leftovers_of_dead_processes_go_and_those_of_living_ones_stay(part: Part) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    mine = files.temporary(part.tmp, "mine.parquet")
    host = mine.name.partition(".")[0]
    living, gone = part.tmp / f"{host}.{os.getppid()}.ab.x", part.tmp / f"{host}.{dead.pid}.ab.x"
    folder = part.tmp / f"{host}.{dead.pid}.cd.round-000"
    elsewhere = part.tmp / f"another-host.{dead.pid}.ab.x"
    for path in (mine, living, gone, elsewhere):
        path.write_bytes(b"1")
    folder.mkdir()
    (folder / "weights").write_bytes(b"1")
    files.remove_leftovers(part.tmp)
    assert sorted(leftovers(part)) == sorted(p.name for p in (mine, living, elsewhere))


def test_names_of_temporaries_can_be_told_apart_on_hosts_with_dots(part: Part) -> None:
    script = (
        "import socket; socket.gethostname = lambda: 'node.cluster.example'\n"
        "import sys, pathlib; from fire_data import files\n"
        "path = files.temporary(pathlib.Path(sys.argv[1]), 'a.parquet'); path.write_bytes(b'1')\n"
        "files.remove_leftovers(path.parent); assert path.exists(); print(path.name)\n"
    )
    command = [sys.executable, "-c", script, str(part.tmp)]
    first = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    second = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert leftovers(part) == [second]
    assert first != second


def test_only_parquet_files_are_ever_in_a_stage_folder(tmp_path: Path) -> None:
    seen: set[str] = set()
    work = stage(tmp_path / "run", 12)

    def watched(shard: Shard) -> pa.Table:
        seen.update(p.suffix for p in work.part.folder.rglob("*"))
        return make(shard)

    run_stage(work, watched)
    seen.update(p.suffix for p in work.part.folder.rglob("*"))
    assert seen == {".parquet"}


def test_a_writer_whose_stage_was_set_aside_does_not_write_into_its_successor(tmp_path: Path) -> None:
    """A slow `fire rollout`, and meanwhile `fire rollout --redo --set ...` in another terminal."""
    old, new = stage(tmp_path / "run"), stage(tmp_path / "run", fields={"seed": 1})

    def slow(shard: Shard) -> pa.Table:
        set_stage_aside(old.part)
        open_stage(new)
        return make(shard)

    with pytest.raises(FingerprintError, match="set aside by another command"):
        run_stage(old, slow)
    assert shard_files(new.part) == []
    assert read_receipt(new.part, "00000") is None
    manifest = run_stage(new, lambda shard: rollouts(salt=1))
    assert readable(new.part)["00000"].equals(rollouts(salt=1))
    assert manifest.fingerprint == new.fingerprint


def test_a_stage_that_was_set_aside_is_not_sealed_over_its_successor(tmp_path: Path) -> None:
    old, new = stage(tmp_path / "run"), stage(tmp_path / "run", fields={"seed": 1})

    def finish(receipts: list[Receipt]) -> dict[str, Any]:
        set_stage_aside(old.part)
        open_stage(new)
        return {}

    with pytest.raises(FingerprintError):
        run_stage(old, make, finish)
    manifest = read_manifest(new.part)
    assert manifest is not None
    assert (manifest.fingerprint, manifest.state) == (new.fingerprint, "open")


def test_a_shard_of_another_stage_is_never_taken_for_ours(part: Part) -> None:
    """Published by a writer of the stage before in the instant between two checks."""
    write(part)
    receipt = read_receipt(part, "00000")
    assert receipt is not None
    foreign = receipt.model_copy(update={"fingerprint": "another"})
    part.receipt_path("00000").unlink()
    files.create_json(part.receipt_path("00000"), foreign.model_dump(mode="json"), part.tmp)
    mine = write(part, rollouts(salt=1))
    assert mine.fingerprint == FINGERPRINT
    assert read_shard(part, mine).equals(rollouts(salt=1))
    assert len(orphans(part)) == 2


def test_a_manifest_that_names_other_bytes_than_the_receipts_is_sealed_again(tmp_path: Path) -> None:
    work = stage(tmp_path / "run")
    manifest = run_stage(work, make)
    wrong = manifest.shards[0].model_copy(update={"sha256": "0" * 64})
    bad = manifest.model_copy(update={"shards": (wrong,)})
    files.replace_json(work.part.manifest_path, bad.model_dump(mode="json"), work.part.tmp)
    assert run_stage(work, make).digest == manifest.digest
    assert read_manifest(work.part) == manifest


def test_set_aside_keeps_everything_under_its_own_name(tmp_path: Path) -> None:
    work = stage(tmp_path / "run", 8)
    run_stage(work, make)
    set_stage_aside(work.part)
    assert orphans(work.part) == [
        ".fire/manifests/rollouts/round-000.json",
        ".fire/receipts/rollouts/round-000/00000.json", ".fire/receipts/rollouts/round-000/00001.json",
        "rollouts/round-000/00000.parquet", "rollouts/round-000/00001.parquet",
    ]  # fmt: skip
    assert not work.part.folder.exists()
    run_stage(work, make)
    assert len(shard_files(work.part)) == 2


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "disk is full"), (errno.EDQUOT, "disk is full"), (errno.EACCES, "no permission"),
     (errno.EROFS, "no permission"), (errno.EIO, "file system failed")],
)  # fmt: skip
def test_what_the_file_system_refuses_is_said_in_words(part: Part, number: int, words: str) -> None:
    with failing(3, number), pytest.raises(StorageError, match=words) as caught:
        write(part)
    assert "same command again" in str(caught.value.fix)
    assert caught.value.where


def test_a_folder_that_cannot_be_synced_is_no_obstacle(part: Part, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network file systems refuse fsync on folders with EINVAL."""
    real = os.fsync

    def fsync(fd: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{fd}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    assert read_shard(part, write(part)).equals(rollouts())


def test_a_run_folder_with_odd_characters_is_read(tmp_path: Path) -> None:
    for name in ("a b", "x[1]*?", "lr=0.1", "ünï", "100%20", "-dash"):
        root = tmp_path / name
        run_stage(stage(root), make)
        (root / "fire.yaml").write_text("student: {model: m}\n")
        assert open_run(root).rollouts(0).collect()["prompt_id"].to_list() == [f"prompt {i}" for i in range(4)]


def test_intact_compares_bytes_and_not_dates(part: Part) -> None:
    receipt = write(part)
    os.utime(part.file("00000"), (1, 1))
    assert intact(part.file("00000"), receipt)
    assert not intact(part.file("00001"), receipt)
    assert not intact(part.folder, receipt)


def test_row_groups_stay_far_below_what_viewers_refuse(part: Part, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_ROW_GROUP_BYTES", 200)
    receipt = write(part)
    assert pq.read_metadata(part.file("00000")).num_row_groups > 1
    assert read_shard(part, receipt).equals(rollouts())


def scored_shard(tmp_path: Path) -> tuple[Part, Receipt]:
    part = Part(tmp_path, "scores", 0)
    shard = Shard(name="00000", start=0, stop=3)
    run_stage(Stage(part, {"made": "here"}, (shard,)), lambda _: few_scores())
    receipt = read_receipt(part, "00000")
    assert receipt is not None
    return part, receipt


def few_scores() -> pa.Table:
    lengths = [2, 0, 3]
    columns: dict[str, Any] = {}
    for column in columns_of("scores"):
        if column.per == "token":
            columns[column.name] = pa.array([[i + 1 for i in range(n)] for n in lengths], column.type)
        elif not column.nullable:
            values: list[Any] = [[1]] * 3 if column.per == "prompt" else lengths
            columns[column.name] = [str(v) for v in values] if pa.types.is_string(column.type) else values
    return conform(pa.table(columns), "scores", "here")


def test_damage_anywhere_is_an_error_or_in_columns_that_are_not_read(tmp_path: Path) -> None:
    part, receipt = scored_shard(tmp_path)
    path, wanted = part.file("00000"), ["trajectory_id", "teacher_entropy", "length"]
    whole, expected = path.read_bytes(), read_shard(part, receipt).select(wanted)
    found = {"refused": 0, "elsewhere": 0}
    for place in range(0, len(whole), 97):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            assert read_shard(part, receipt, wanted).equals(expected)
            found["elsewhere"] += 1
        except DamagedError:
            found["refused"] += 1
        assert not intact(path, receipt)
        with pytest.raises(DamagedError):
            read_shard(part, receipt)
    assert min(found.values()) > 10


@pytest.mark.parametrize("size", [0, 3, 8, 100])
def test_a_cut_file_has_no_columns(tmp_path: Path, size: int) -> None:
    part, receipt = scored_shard(tmp_path)
    path = part.file("00000")
    path.write_bytes(path.read_bytes()[:size])
    for read in (lambda: read_shard(part, receipt, ["length"]), lambda: read_schema(part, receipt)):
        with pytest.raises(DamagedError):
            read()


def test_few_columns_are_read_without_the_bytes_of_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part, receipt = scored_shard(tmp_path)
    expected, read = read_shard(part, receipt), list[int]()
    fill = os.preadv

    def counted(fd: int, buffers: list[memoryview], offset: int) -> int:
        read.append(sum(len(b) for b in buffers))
        return fill(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    monkeypatch.setattr(shards, "_verified", lambda *_: pytest.fail("the whole file was read"))
    few = read_shard(part, receipt, ["length", "teacher_logprob"], optional=["reverse_kl", "no_such_column"])
    assert few.equals(expected.select(["length", "teacher_logprob", "reverse_kl"]))
    assert len(read) == 5, "the footer's length, the footer, three columns"
    assert read_schema(part, receipt) == expected.schema


def test_receipts_without_digests_of_columns_are_still_read(tmp_path: Path) -> None:
    part, receipt = scored_shard(tmp_path)
    wanted = (["length"], ["teacher_logprob", "trajectory_id"])
    expected, schema = [read_shard(part, receipt, columns) for columns in wanted], read_schema(part, receipt)
    older = receipt.model_copy(update={"columns": {}})
    part.receipt_path("00000").write_text(older.model_dump_json())
    assert all(read_shard(part, receipt, c).equals(t) for c, t in zip(wanted, expected, strict=True))
    assert read_schema(part, receipt) == schema


def test_sealed_manifests_do_not_repeat_the_digests_of_columns(tmp_path: Path) -> None:
    part, receipt = scored_shard(tmp_path)
    assert set(receipt.columns) == {"", *few_scores().column_names}
    (listed,) = sealed(part).shards
    assert listed == receipt.model_copy(update={"columns": {}})
