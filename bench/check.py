"""`fire check` over many gigabytes of shards, against `sha256sum` of the same files, from the cache and from the disk.

Both are whole commands, with their start, on one thread. `hashlib` is the limit: an interpreter that reads the files
and hashes them, where the processor's own instructions for SHA-256 count that coreutils of many systems do not use.
`cached`: the files are in memory, as far as they fit; `disk`: before every repetition the system is asked to forget
them. The shards are one synthetic shard of scores and copies of it, each with a receipt; the digests that `sha256sum`
prints are compared with those. Bytes stand where tables say tokens; memory is not measured (0).
"""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import measure
from weigh import synthetic

from fire_data import files
from fire_data.create import init_run
from fire_data.schemas.manifest import Receipt, Shard
from fire_data.shards import versions, write_parquet
from fire_data.stages import Stage, open_stage, plan_shards, seal

SIZES: measure.Sizes = {
    "gb": (10.0, 0.0005, "gigabytes of shards"),
    "rows": (2048, 8, "trajectories of a shard"),
    "length": (512, 16, "mean length of a response, tokens"),
    "folder": ("", "", "where the shards are made; default: a temporary folder"),
}
CASES = ("fire", "sha256sum", "hashlib")
_BARE = "import hashlib, sys\nfor p in sys.argv[1:]:\n    hashlib.file_digest(open(p, 'rb'), 'sha256')"


class Cost(NamedTuple):
    """Seconds of a process, by the clock and of the processor."""

    wall_s: float
    cpu_s: float


def main() -> None:
    """Make the shards, compare the commands in turn, remove the shards."""
    groups = {"cached": CASES, "disk": CASES}
    options = measure.parse(__doc__ or "", SIZES, groups)
    root = Path(tempfile.mkdtemp(dir=options.folder or None))
    try:
        digests = make(root / "run", options)
        commands = {
            "fire": [sys.executable, "-m", "fire_data.cli", "check", str(root / "run")],
            "sha256sum": ["sha256sum", *map(str, digests)],
            "hashlib": [sys.executable, "-c", _BARE, *map(str, digests)],
        }
        said = subprocess.run(commands["sha256sum"], check=True, capture_output=True, text=True).stdout
        assert [line.split()[0] for line in said.splitlines()] == list(digests.values()), "both hash the same bytes"
        found = {g: compare(commands, list(digests), g == "disk", options) for g in options.only or groups}
    finally:
        shutil.rmtree(root)
    measure.report(options, SIZES, found)


def make(root: Path, options: argparse.Namespace) -> dict[Path, str]:
    """A run directory whose scores are sealed; the files with the sha256 in their receipts."""
    part = init_run(root, {"student": {"model": "none"}}).part("scores", 0)
    template, table = root / "template", synthetic(Shard(name="0", start=0, stop=options.rows), options.length)
    write_parquet(template, table, "synthetic")
    size, digest = template.stat().st_size, files.sha256_file(template)
    count = max(2, round(options.gb * 1e9 / size))
    stage = Stage(part, {"made": "synthetic"}, plan_shards(count * options.rows, options.rows))
    manifest, receipts = open_stage(stage), []
    part.folder.mkdir(parents=True)
    for shard in stage.plan:
        shutil.copyfile(template, part.file(shard.name))
        receipts.append(
            Receipt(
                shard=shard.name, sha256=digest, bytes=size, rows=options.rows, tokens=0,
                fingerprint=stage.fingerprint, versions=versions(),
            )
        )  # fmt: skip
        files.create_json(part.receipt_path(shard.name), receipts[-1].model_dump(mode="json"), part.tmp)
    template.unlink()
    seal(part, manifest, receipts, {}, {})
    os.sync()  # what is not written yet could not be forgotten
    return dict.fromkeys((part.file(r.shard) for r in receipts), digest)


def compare(
    commands: dict[str, list[str]], paths: list[Path], forget: bool, options: argparse.Namespace
) -> dict[str, Any]:
    """All commands in turn. Their digests were compared before, so what fits in memory is there."""
    actions = {name: functools.partial(run, command, paths if forget else []) for name, command in commands.items()}
    found = measure.alternate(actions, options.repeat)
    size = sum(p.stat().st_size for p in paths)
    cases = {
        name: {
            "seconds": [c.cpu_s if options.cpu_time else c.wall_s for c in costs],
            "cpu_s": [c.cpu_s for c in costs],
            "peak_mib": 0.0,
            "tokens": size,
        }
        for name, costs in found.items()
    }
    return measure.summarise(cases)


def run(command: list[str], forget: list[Path]) -> Cost:
    """A command from start to exit, after the system was asked to forget what it has of some files."""
    for path in forget:
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, command[:4]
    return Cost(time.perf_counter() - started, used.ru_utime + used.ru_stime)


if __name__ == "__main__":
    main()
