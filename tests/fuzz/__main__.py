"""The fuzzing campaign: `python -m tests.fuzz TARGET|all --inputs 20000 --seed 0`; `python -m tests.fuzz TARGET FILE`.

Each target runs in a process of its own, which has a memory limit and shares with this one a few bytes of memory: how
many inputs it has been through, and the one it is at. So an input that ends the process, or keeps it from ever
returning, is known, kept as a finding, and the campaign goes on behind it. Findings are files in `--out`, one for each
place where something went wrong; counts are appended to `counts.json` there.

Inputs come from libFuzzer by way of atheris, which looks for new branches of `fire_data`; half of them are its bytes as
they are, half are choices of the target's strategy. Without atheris, Hypothesis alone makes them.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import mmap
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_HEAD = struct.Struct("<QQ")  # inputs so far; one more than the length of the one it is at, 0 between two
_ROOM = 1 << 20  # bytes of an input
_STUCK = 30.0  # seconds in which no input ends
NAMES = (
    "prompts-jsonl", "prompts-parquet", "config", "rules", "spec", "server", "manifests", "hub-index", "hub-settings",
    "hub-names", "shards",
)  # fmt: skip
"""The targets. Written out, because atheris has to be there before anything of `fire_data` is imported."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=[*NAMES, "all"])
    parser.add_argument("file", nargs="?", type=Path, help="only this input: what a finding was kept as")
    parser.add_argument("--inputs", type=int, default=20_000, help="for each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/fuzz"), help="findings, and counts.json")
    parser.add_argument("--state", type=Path, help=argparse.SUPPRESS)  # of the process that does it
    given = parser.parse_args()
    if given.file is not None:
        return _replay(given.target, given.file)
    if given.state is not None:
        _work(given.target, given.inputs, given.seed, given.state, given.out)
        return 0
    rows = [
        _campaign(n, given.inputs, given.seed, given.out) for n in (NAMES if given.target == "all" else [given.target])
    ]
    return int(any(row["findings"] for row in rows))


def _replay(name: str, file: Path) -> int:
    from tests.fuzz.attempt import finding
    from tests.fuzz.targets import TARGETS

    found = finding(TARGETS[name], file.read_bytes())
    print("no finding" if found is None else "\n".join(found))
    return int(found is not None)


# --- the process that looks on ----------------------------------------------------------------------------------


def _campaign(name: str, inputs: int, seed: int, out: Path) -> dict[str, Any]:
    """Feed a target until it had so many inputs. Returns, prints and appends what came of it."""
    started, done, attempt = time.monotonic(), 0, 0
    mine = out / name
    shutil.rmtree(mine, ignore_errors=True)
    mine.mkdir(parents=True)
    while done < inputs:
        count, data, ending = _watched(name, inputs - done, seed + attempt, mine)
        done, attempt = done + count, attempt + 1
        if ending is not None and data is not None:
            _keep(mine, ending, "the process ended", data)
        elif count == 0:
            raise SystemExit(f"{name}: nothing was fed; see {mine / 'log.txt'}")
    findings = sorted({f.stem for f in mine.glob("*.txt")} - {"log"})
    row = {
        "target": name, "inputs": done, "findings": len(findings), "seed": seed,
        "engine": "atheris" if _has_atheris() else "hypothesis", "seconds": round(time.monotonic() - started),
    }  # fmt: skip
    print(json.dumps(row), flush=True)
    counts = out / "counts.json"
    rows = json.loads(counts.read_text()) if counts.exists() else []
    counts.write_text(json.dumps([*rows, row], indent=1) + "\n")
    return row


def _watched(name: str, inputs: int, seed: int, out: Path) -> tuple[int, bytes | None, str | None]:
    """Inputs that a process came through, the one it was at, if any, and how it ended if that was not by itself."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="fire-fuzz-", dir=memory, ignore_cleanup_errors=True) as folder:
        state = Path(folder) / "state"
        state.write_bytes(bytes(_HEAD.size + _ROOM))
        command = [sys.executable, "-m", "tests.fuzz", name, "--inputs", str(inputs), "--seed", str(seed)]
        command += ["--state", str(state), "--out", str(out)]
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "POLARS_MAX_THREADS": "1", "OMP_NUM_THREADS": "1"}
        env |= {"RUST_BACKTRACE": "0", "TMPDIR": folder}  # libFuzzer ends without clearing up
        with (out / "log.txt").open("ab") as log:
            child = subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)
        last, since, ending = -1, time.monotonic(), None
        while child.poll() is None:
            time.sleep(0.2)
            count, _ = _HEAD.unpack(state.read_bytes()[: _HEAD.size])
            if count != last:
                last, since = count, time.monotonic()
            elif time.monotonic() - since > _STUCK + 60 * (count == 0):  # before the first one much is imported
                child.kill()
                child.wait()
                ending = "stuck"
        found = state.read_bytes()
        count, size = _HEAD.unpack(found[: _HEAD.size])
        if ending is None and child.returncode != 0:
            code = child.returncode
            ending = signal.Signals(-code).name if code < 0 else f"exit {code}"
        return count, found[_HEAD.size : _HEAD.size + size - 1] if size else None, ending


def _keep(out: Path, signature: str, told: str, data: bytes) -> None:
    """The first input of its kind, and what it led to."""
    name = hashlib.sha256(signature.encode()).hexdigest()[:10]
    if not (out / f"{name}.txt").exists():
        (out / name).write_bytes(data)
        (out / f"{name}.txt").write_text(f"{signature}\n\n{told}", errors="replace")
        print(f"  {out / name}: {signature}", flush=True)


# --- the process that is fed ------------------------------------------------------------------------------------


def _work(name: str, inputs: int, seed: int, state: Path, out: Path) -> None:
    if _has_atheris():
        import atheris

        with atheris.instrument_imports(include=["fire_data"]):
            from tests.fuzz.targets import TARGETS
    else:
        from tests.fuzz.targets import TARGETS
    from tests.fuzz.attempt import finding, limit_memory

    target = TARGETS[name]
    with state.open("r+b") as f:
        shared = mmap.mmap(f.fileno(), 0)
    count, parent = 0, os.getppid()

    def feed(data: bytes) -> None:
        nonlocal count
        if os.getppid() != parent:
            os._exit(1)
        if count >= inputs:
            return
        data = data[:_ROOM]
        shared[_HEAD.size : _HEAD.size + len(data)] = data
        shared[: _HEAD.size] = _HEAD.pack(count, len(data) + 1)
        found = finding(target, data)
        if found is not None:
            _keep(out, *found, data)
        count += 1
        shared[: _HEAD.size] = _HEAD.pack(count, 0)

    seeds = target.seeds()
    for data in seeds:
        feed(data)
    limit_memory()
    (_guided if _has_atheris() else _random)(feed, target, inputs - count, seed, seeds)


def _has_atheris() -> bool:
    return importlib.util.find_spec("atheris") is not None


def _random(feed: Any, target: Any, inputs: int, seed: int, seeds: list[bytes]) -> None:
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded

    calm = settings(
        max_examples=inputs, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    seeded(seed)(calm(given(target.strategy())(feed)))()


def _guided(feed: Any, target: Any, inputs: int, seed: int, seeds: list[bytes]) -> None:
    """Never returns: libFuzzer ends the process."""
    import atheris
    from hypothesis import HealthCheck, given, settings

    chosen = settings(database=None, deadline=None, suppress_health_check=list(HealthCheck))(
        given(target.strategy())(feed)
    )

    def one(data: bytes) -> None:
        if data[:1] < b"\x80":
            feed(data[1:])
        else:
            chosen.hypothesis.fuzz_one_input(data[1:])

    corpus = Path(tempfile.mkdtemp())  # in the folder that this process was given
    for i, data in enumerate(seeds):
        (corpus / f"{i}").write_bytes(b"\0" + data)
    for i in range(50):
        (corpus / f"choices-{i}").write_bytes(b"\x80" + hashlib.shake_256(f"{seed} {i}".encode()).digest(2000))
    # Choices that a strategy cannot use are no inputs, so there are runs to spare; the parent reads off the count.
    # Time and memory are limited here: libFuzzer's own alarm, which cannot be turned off, comes after months.
    limits = ["-timeout=9999999", "-rss_limit_mb=0", "-max_len=65536", "-len_control=0", f"-artifact_prefix={corpus}/"]
    atheris.Setup([sys.argv[0], *limits, f"-runs={inputs}", f"-seed={seed + 1}", "-verbosity=0", str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    raise SystemExit(main())
