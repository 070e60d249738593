"""The long campaign against what `docs/promises.md` promises: kills, flips, failing disks, damage, state machines.

    python -m tests.campaign --kills 1000 --flips 10000 --steps 10000 --faults 500 --damage 200 --seed 0 --minutes 30

Runs in slices: every slice adds its counts to a JSON file, so the numbers asked for are totals, and the same command
goes on until they are reached. It ends with the table of that page (`--table` prints it alone), and writes it there if
the counts are those of the usual file. What goes wrong is kept in the file word for word; anything there is a broken
promise, and the exit code is 1. Other campaigns add what they counted: `--add inputs=1000`. To use several cores, run
slices of other kinds with `--counts FILE` of their own, and then `--take FILE`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import shlex
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

COUNTS = Path(__file__).with_name("campaign.json")
PAGE = Path(__file__).parents[1] / "docs" / "promises.md"
WRONG = ("lost", "duplicated", "silent", "tracebacks", "other bytes")
KINDS = ("kills", "flips", "faults", "damage", "steps")
WORDS = {
    "kills": "processes ended (SIGKILL, SIGTERM, at random moments and at calls to the disk)",
    "flips": "single bits flipped in any file of a run",
    "faults": "calls to the file system that failed (EIO, EACCES, ENOSPC, short, slow, read-only, full)",
    "damage": "stages damaged otherwise (cut, swapped, deleted, foreign, edited), then mended",
    "steps": "actions of the state machine",
    "inputs": "fuzzed inputs",
    "lost": "trajectories lost",
    "duplicated": "trajectories duplicated",
    "silent": "silent corruptions",
    "tracebacks": "tracebacks",
    "other bytes": "runs that ended in other bytes than an undisturbed one",
}


class Record:
    """The counts of all slices so far, in a file that is written after each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.value: dict[str, Any] = {"counts": {}, "outcomes": {}, "wrong": [], "slices": []}
        if path.exists():
            self.value |= json.loads(path.read_text())

    def __getitem__(self, kind: str) -> int:
        return int(self.value["counts"].get(kind, 0))

    def add(self, kind: str, count: int = 1, **outcomes: int) -> None:
        """Count acts of a kind and, by their names, what came of them."""
        self.value["counts"][kind] = self[kind] + count
        for name, times in outcomes.items():
            known = self.value["outcomes"].setdefault(kind, {})
            known[name] = known.get(name, 0) + times

    def take(self, other: Record) -> None:
        """Add all that another record has."""
        for kind in other.value["counts"]:
            self.add(kind, other[kind], **other.value["outcomes"].get(kind, {}))
        for several in ("wrong", "slices"):
            self.value[several] += other.value[several]

    def went_wrong(self, what: str, text: str) -> None:
        """A promise that was broken, for whoever mends it."""
        self.add(what)
        self.value["wrong"].append({"what": what, "text": text})
        print(f"{what}: {text}", file=sys.stderr)

    def save(self) -> None:
        self.path.write_text(json.dumps(self.value, indent=1, sort_keys=True) + "\n")


class Campaign:
    """One slice: models, a run before each stage, and the time it has."""

    def __init__(self, record: Record, folder: Path, seed: int, until: float) -> None:
        from tests.faults import disk
        from tests.faults.world import small_run, small_world, stages_before, visible

        self.record, self.folder, self.until = record, folder, until
        # Slices differ, and a slice can be repeated.
        self.rng = random.Random(f"{seed} {len(record.value['slices'])}")
        self.world = small_world(folder / "world")
        self.stages = stages_before(folder, small_run(folder / "run", self.world))
        self.expected = {stage: visible(root) for stage, root in self.stages.items()}
        self.shim = disk.build(folder)

    def left(self, kind: str, wanted: int) -> bool:
        return self.record[kind] < wanted and time.monotonic() < self.until

    @contextmanager
    def trial(self, what: str) -> Iterator[None]:
        """Whatever an act brings to light is written down, and the slice goes on."""
        try:
            yield
        except AssertionError as error:
            self.record.went_wrong("silent", f"{what}: {error or traceback.format_exc()}")
        except Exception:  # noqa: BLE001 - that is what the campaign looks for
            self.record.went_wrong("tracebacks", f"{what}: {traceback.format_exc()}")

    def kills(self, wanted: int) -> None:
        from tests.faults import kills
        from tests.faults.world import STAGES, following

        victim, longest = self.folder / "victim", dict.fromkeys(STAGES, 0.4)
        with kills.loaded_before(self.shim):
            while self.left("kills", wanted):
                stage, calls = self.rng.choice(STAGES), self.rng.choice([0, 80]) if self.shim else 0
                with self.trial(f"killed {stage}"):
                    landed = kills.kill_until_finished(
                        self.stages[stage], victim, stage, 8, longest[stage], self.rng, calls
                    )
                    if not calls:
                        longest[stage] *= 1.1 if landed else 0.8
                    self.record.add("kills", landed.total(), **landed)
                    self.compare(victim, following(stage), f"killed {stage}: {dict(landed)}")

    def compare(self, root: Path, after: str, what: str) -> None:
        """Count what a finished stage lost, or has twice, and whether its bytes are others."""
        from tests.faults.world import visible

        found = visible(root)
        if found == self.expected[after]:
            return
        self.record.went_wrong("other bytes", what)
        for table in ("rollouts", "scores", "weights/fire"):
            ours, theirs = (_trajectories(r / table) for r in (root, self.stages[after]))
            if lost := len(set(theirs) - set(ours)):
                self.record.add("lost", lost)
            if twice := len(ours) - len(set(ours)):
                self.record.add("duplicated", twice)

    def flips(self, wanted: int) -> None:
        from tests.faults import trials
        from tests.faults.world import copy

        flips = trials.Flips(copy(self.stages["after"], self.folder / "flips"))
        while self.left("flips", wanted):
            path = self.rng.choice(flips.files)
            with self.trial(f"flip in {path.relative_to(self.folder)}"):
                self.record.add("flips", 1, **{flips.once(path, self.rng): 1})

    def faults(self, wanted: int) -> None:
        from tests.faults import disk
        from tests.faults.world import STAGES, following

        def job(stage: str, fault: str, *points: int) -> disk.Job:
            start, after = self.stages[stage], self.stages[following(stage)]
            return disk.Job(str(start), str(after), stage, fault, points)

        calls: dict[tuple[str, str], int] = {}
        while self.shim and self.left("faults", wanted):
            jobs = []
            for _ in range(8):
                stage, fault = self.rng.choice(STAGES), self.rng.choice(list(disk.FAULTS))
                if (stage, fault) not in calls:
                    # How many such calls there are is told by a fault that is never reached.
                    (found,) = disk.run(self.shim, [job(stage, fault, sys.maxsize)], self.folder)
                    calls[stage, fault] = found.calls
                points = sorted(self.rng.sample(range(calls[stage, fault]), min(6, calls[stage, fault])))
                jobs.append(job(stage, fault, *points))
            for done, found in zip(jobs, disk.run(self.shim, jobs, self.folder), strict=True):
                self.record.add("faults", found.faults, **{done.fault: found.faults})
                for text in found.wrong:
                    self.record.went_wrong("tracebacks" if "Traceback" in text else "other bytes", text)

    def damage(self, wanted: int) -> None:
        from tests.faults import trials
        from tests.faults.damage import ACTS
        from tests.faults.world import TABLES

        while self.left("damage", wanted):
            stage, kind, seed = self.rng.choice(list(TABLES)), self.rng.choice(list(ACTS)), self.rng.random()
            with self.trial(f"{stage}: {kind}, {seed}"):
                trials.damage(self.stages["after"], self.folder / "damaged", stage, kind, random.Random(seed))
            self.record.add("damage", 1, **{kind: 1})

    def steps(self, wanted: int) -> None:
        from tests.faults import machine
        from tests.hub_server import calling, serving

        (self.folder / "machine").mkdir()
        truth = machine.Truth(self.folder / "machine", self.world)
        with serving() as hub, calling(hub, self.folder / "home") as caller:
            while self.left("steps", wanted):
                counts = machine.Counts()
                with self.trial("state machine"):
                    seed = self.rng.randrange(10**9)
                    machine.play(truth, counts, examples=5, steps=30, seed=seed, hub=hub, caller=caller)
                self.record.add("steps", counts.actions.total(), **counts.actions)


def _trajectories(folder: Path) -> list[str]:
    """The names of all rows that anybody who reads a folder finds."""
    import pyarrow.parquet as pq

    tables = [pq.read_table(path, columns=["trajectory_id"]) for path in sorted(folder.rglob("*.parquet"))]
    return [name for table in tables for name in table["trajectory_id"].to_pylist()]


def table(record: Record) -> str:
    """The figures as a Markdown table, with when and how they were made."""
    rows = [(WORDS[k], record[k]) for k in (*KINDS, "inputs") if k in record.value["counts"]]
    rows += [(f"**{WORDS[k]}**", record[k]) for k in WRONG]
    lines = ["| what was done, and what came of it | count |", "|---|---|"]
    lines += [f"| {what} | {count:,} |" for what, count in rows]
    slices = record.value["slices"]
    if slices:
        days = sorted({s["date"] for s in slices})
        seconds = sum(s["seconds"] for s in slices)
        often = "1 slice" if len(slices) == 1 else f"{len(slices)} slices"
        when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
        lines += [
            "",
            f"Made {when} in {often}, {seconds / 60:.0f} minutes in all, on {slices[-1]['machine']}.",
        ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Run a slice and print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__.partition("\n")[0])
    for kind in KINDS:
        parser.add_argument(
            f"--{kind}", type=int, default=0, metavar="N", help=f"{WORDS[kind]}, in all slices together"
        )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60.0, help="of this slice")
    parser.add_argument("--counts", type=Path, default=COUNTS, help="the file that the counts are added to")
    parser.add_argument("--table", action="store_true", help="print the table and do nothing")
    parser.add_argument("--add", action="append", default=[], metavar="KIND=N", help="count what was done elsewhere")
    parser.add_argument("--take", action="append", default=[], type=Path, metavar="FILE", help="add another's counts")
    given = parser.parse_args(arguments)
    record = Record(given.counts)
    for file in given.take:
        if not file.is_file():
            parser.error(f"{file} is not there")
        record.take(Record(file))
        record.save()
    for text in given.add:
        kind, _, count = text.partition("=")
        if kind not in WORDS or not count.isdecimal():
            parser.error(f"--add takes one of {', '.join(WORDS)} and a number, not {text!r}")
        record.add(kind, int(count))
        record.save()
    if not (given.table or given.add or given.take):
        _slice(given, record, sys.argv[1:] if arguments is None else arguments)
    print(table(record), end="")
    if given.counts == COUNTS:
        begin, end = "<!-- figures -->\n", "<!-- end of figures -->"
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(begin)
        PAGE.write_text(f"{before}{begin}\n{table(record)}\n{end}{rest.partition(end)[2]}", encoding="utf-8")
    return 1 if record.value["wrong"] else 0


def _slice(given: argparse.Namespace, record: Record, arguments: list[str]) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    from tests.faults.world import scratch

    started, folder = time.monotonic(), scratch("campaign")
    wanted = {kind: getattr(given, kind) for kind in KINDS if getattr(given, kind) > record[kind]}
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        stack.callback(record.save)
        campaign = Campaign(record, folder, given.seed, 0.0)
        for place, (kind, count) in enumerate(wanted.items()):
            # What is left of the time is shared by the kinds that are left.
            now, end = time.monotonic(), started + 60 * given.minutes
            campaign.until = now + max(0.0, end - now) / (len(wanted) - place)
            act: Callable[[int], None] = getattr(campaign, kind)
            act(count)
            record.save()
        record.value["slices"].append({
            "command": shlex.join(["python", "-m", "tests.campaign", *arguments]),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "seconds": round(time.monotonic() - started),
            "machine": f"{os.cpu_count()} CPU cores ({platform.system()}, Python {platform.python_version()})",
        })  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
