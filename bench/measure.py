"""Runs us and what we are compared with in turn, each in a process of its own: JSON to stdout, a table to stderr.

Why in turn: on a shared machine absolute times drift by more than what is to be seen. Both sides are repeated
alternately in the same run, and the ratio of neighbours in time is what counts. Why processes: the memory of one case
does not enter the peak of the other. Every case is run once before anything is timed; memory is measured there.
Units: seconds, tokens per second, MiB.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Done:
    """What one repetition did: how many tokens, and numbers in which all cases of a group have to agree."""

    tokens: int
    witness: dict[str, float] = field(default_factory=dict)


Work = Callable[[], Done]
Prepare = Callable[[str, str, argparse.Namespace], Work]
Sizes = dict[str, tuple[Any, Any, str]]  # option: default, with --smoke, help


def main(doc: str, sizes: Sizes, groups: dict[str, list[str]], prepare: Prepare) -> None:
    """The whole of a script: options, measuring, printing.

    `groups` names cases that do the same work; the first is ours, the others are what it is compared with.
    `prepare(group, case, options)` builds the input in a process of its own and returns what is to be timed, which
    ends by reading a result from the device.
    """
    options = parse(doc, sizes, groups)
    if options.worker:
        _serve(options, prepare)
        return
    chosen = {group: groups[group] for group in options.only or groups}
    found = {group: _compare_cases(group, cases, options) for group, cases in chosen.items()}
    report(options, sizes, found)


def parse(doc: str, sizes: Sizes, groups: Iterable[str] = ()) -> argparse.Namespace:
    """Command-line options; what is not given is the default, or the small value with --smoke."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, seconds: is the script alive?")
    for name, (default, _, text) in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), help=f"{text} (default {default})")
    parser.add_argument("--repeat", type=int, help="timed repetitions of every case (default 5)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument(
        "--cpu-time", action="store_true", help="time of the processor, for a machine shared with others"
    )
    if groups:
        parser.add_argument("--only", action="append", choices=list(groups), help="this group alone (repeatable)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    for name, (default, small, _) in {**sizes, "repeat": (5, 2, "")}.items():
        if getattr(options, name) is None:
            setattr(options, name, small if options.smoke else default)
    return options


def alternate(actions: dict[str, Callable[[], Any]], repeat: int) -> dict[str, list[Any]]:
    """Call every action `repeat` times in turn, every other time in reverse order."""
    found: dict[str, list[Any]] = {name: [] for name in actions}
    for i in range(repeat):
        for name in list(actions)[:: -1 if i % 2 else 1]:
            found[name].append(actions[name]())
    return found


def summarise(cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Add medians to cases with `seconds`, and the ratios of the first case's time to every other's, pair by pair."""
    for case in cases.values():
        case["median_s"] = statistics.median(case["seconds"])
        case["range_s"] = [min(case["seconds"]), max(case["seconds"])]
        if case.get("tokens"):
            case["tokens_per_s"] = case["tokens"] / case["median_s"]
    (_, ours), *others = cases.items()
    ratios = {}
    for name, other in others:
        # Per token, as cases that sample do not write equally many.
        scale = other["tokens"] / ours["tokens"] if ours.get("tokens") else 1.0
        pairs = [scale * a / b for a, b in zip(ours["seconds"], other["seconds"], strict=True)]
        ratios[name] = {"median": statistics.median(pairs), "range": [min(pairs), max(pairs)]}
    return {"cases": cases, "ratios": ratios}


def report(options: argparse.Namespace, sizes: Sizes, found: dict[str, Any]) -> None:
    """Everything as JSON to stdout, the medians as a table to stderr."""
    settings = {name: getattr(options, name) for name in (*sizes, "repeat", "threads", "cpu_time", "smoke")}
    bench = Path(sys.argv[0]).stem
    print(json.dumps({"bench": bench, "python": platform.python_version(), "settings": settings, "groups": found}))
    say = [f"{bench}: " + ", ".join(f"{k} {v}" for k, v in settings.items()), ""]
    say.append(f"{'':32}{'median s':>10}{'range s':>16}{'tokens/s':>11}{'MiB':>8}  time of ours / this (range)")
    for group, result in found.items():
        for name, case in result["cases"].items():
            low, high = case["range_s"]
            speed = f"{case['tokens_per_s']:.0f}" if "tokens_per_s" in case else "-"
            ratio = result["ratios"].get(name)
            shown = f"{ratio['median']:.2f} ({ratio['range'][0]:.2f}-{ratio['range'][1]:.2f})" if ratio else ""
            seconds = f"{case['median_s']:>10.3f}{f'{low:.3f}-{high:.3f}':>16}"
            say.append(f"{f'{group}: {name}':32}{seconds}{speed:>11}{case['peak_mib']:>8.0f}  {shown}")
    print("\n".join(say), file=sys.stderr)


def _compare_cases(group: str, cases: list[str], options: argparse.Namespace) -> dict[str, Any]:
    workers = {case: _start(f"{group}/{case}", options.threads) for case in cases}
    try:
        first = {case: _ask(worker) for case, worker in workers.items()}
        timed = alternate({case: lambda w=worker: _ask(w) for case, worker in workers.items()}, options.repeat)
    finally:
        for worker in workers.values():
            worker.communicate()
    result: dict[str, dict[str, Any]] = {}
    for case in cases:
        seconds = [answer["seconds"] for answer in timed[case]]
        result[case] = {"seconds": seconds, "tokens": first[case]["tokens"], "peak_mib": first[case]["peak_mib"]}
    return {**summarise(result), "largest_disagreement": _disagreement([first[case]["witness"] for case in cases])}


def _disagreement(witnesses: list[dict[str, float]]) -> float:
    """The largest relative difference between what ours and another case computed, 0 if nothing is comparable."""
    ours, *others = witnesses
    pairs = [(ours[k], other[k]) for other in others for k in ours.keys() & other.keys()]
    return max((abs(a - b) / max(abs(a), abs(b), 1e-12) for a, b in pairs), default=0.0)


def _start(case: str, threads: int) -> subprocess.Popen[str]:
    command = [sys.executable, *sys.argv, "--worker", case]
    limits = dict.fromkeys(("OMP_NUM_THREADS", "POLARS_MAX_THREADS"), str(threads))  # torch and pyarrow, Polars
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **limits}
    )


def _ask(worker: subprocess.Popen[str]) -> dict[str, Any]:
    assert worker.stdin is not None
    assert worker.stdout is not None
    print("go", file=worker.stdin, flush=True)
    line = worker.stdout.readline()
    if not line:
        raise SystemExit(f"a case failed: {' '.join(worker.args[1:])}")  # type: ignore[arg-type]
    answer: dict[str, Any] = json.loads(line)
    return answer


def _serve(options: argparse.Namespace, prepare: Prepare) -> None:
    """The other end: one repetition per line of stdin."""
    answers, sys.stdout = sys.stdout, sys.stderr
    group, case = options.worker.split("/")
    work = prepare(group, case, options)
    for _ in sys.stdin:
        before = _reset_peak()
        clock = time.process_time if options.cpu_time else time.perf_counter
        started = clock()
        done = work()
        seconds = clock() - started
        peak = max(0.0, _peak() - before)
        answer = {"seconds": seconds, "tokens": done.tokens, "witness": done.witness, "peak_mib": peak}
        print(json.dumps(answer), file=answers, flush=True)


def _reset_peak() -> float:
    """Begin a new peak; returns the memory in use now."""
    if _on_gpu():
        import torch

        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    if not _CLEAR.exists():
        return _peak()
    _CLEAR.write_text("5")  # Linux: forget the peak of the resident set
    return _field("VmRSS")


def _peak() -> float:
    """Largest memory in use since `_reset_peak`: of the GPU if there is one in use, else resident (whole life, where
    the system cannot forget)."""
    if _on_gpu():
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    if _STATUS.exists():
        return _field("VmHWM")
    import resource

    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _field(name: str) -> float:
    line = next(x for x in _STATUS.read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) / 1024


def _on_gpu() -> bool:
    return "torch" in sys.modules and bool(sys.modules["torch"].cuda.is_initialized())
