"""The report of a large round: writing it against reading its tables, loading it against an empty page as large.

The scores are synthetic. `read` reads every column of scores and weights shard by shard, each compared with its
receipt, and does nothing with them: a limit, not a peer. `empty page` has as many bytes as the report, one word and one
block of data that nothing looks at. Loading is until the load event has ended and the first contents are painted, in a
headless chromium with the network off; every repetition is a new page. Response tokens of the round per second.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import measure
import pyarrow as pa
from weigh import synthetic

from fire_data.create import init_run
from fire_data.report import write_report
from fire_data.run import Run
from fire_data.schemas.manifest import Shard
from fire_data.schemas.tables import ROLLOUTS, conform
from fire_data.shards import read_shard, sealed
from fire_data.stages import Stage, plan_shards, run_stage
from fire_data.steps.weigh import weigh

SIZES: measure.Sizes = {
    "trajectories": (10_000, 64, "of the round"),
    "rows": (512, 16, "trajectories of a shard"),
    "length": (512, 24, "mean length of a response, tokens"),
    "shown": (0, 8, "trajectories shown at most; 0: as many as a report shows"),
    "folder": ("", "", "where the run directory is made; default: a temporary one"),
}
_LOADED = """() => new Promise((done) => new PerformanceObserver((list) => {
    const painted = list.getEntriesByName("first-contentful-paint")[0];
    if (painted) done(Math.max(performance.getEntriesByType("navigation")[0].loadEventEnd, painted.startTime) / 1000);
}).observe({ type: "paint", buffered: true }))"""


def main() -> None:
    """One run directory, removed at the end, for both groups."""
    options = measure.parse(__doc__ or "", SIZES)
    with tempfile.TemporaryDirectory(dir=options.folder or None) as folder:
        root = Path(folder)
        run = make_run(root / "run", options)
        written = write_report(run, root / "report.html", limit=options.shown or None)
        (root / "empty.html").write_bytes(empty_page(written.bytes))
        actions: dict[str, Callable[[], float]] = {
            "fire report": lambda: timed(lambda: write_report(run, root / "report.html", limit=options.shown or None)),
            "read": lambda: timed(lambda: read(run)),
        }
        write = measure.alternate(actions, options.repeat)
        with chromium() as browser:
            pages = {"report": root / "report.html", "empty page": root / "empty.html"}
            loads = {name: functools.partial(load, browser, page) for name, page in pages.items()}
            measure.alternate(loads, 1)  # files enter the system's cache
            shown = measure.alternate(loads, options.repeat)
        tokens = sum(receipt.tokens for receipt in sealed(run.part("scores", 0)).shards)
        groups = {name: _summary(found, tokens) for name, found in (("write", write), ("load", shown))}
        groups["load"] |= {"bytes": written.bytes, "trajectories_shown": written.trajectories}
        measure.report(options, SIZES, groups)


def _summary(found: dict[str, list[float]], tokens: int) -> dict[str, Any]:
    return measure.summarise({k: {"seconds": s, "tokens": tokens, "peak_mib": 0.0} for k, s in found.items()})


def timed(action: Callable[[], object]) -> float:
    """Seconds that an action takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def read(run: Run) -> None:
    """Every column of scores and weights, shard by shard."""
    for part in (run.part("scores", 0), run.part("weights", 0)):
        for receipt in sealed(part).shards:
            read_shard(part, receipt)


def load(browser: Any, page: Path) -> float:
    """Seconds from the start of the navigation until the page is loaded and its first contents are painted."""
    context = browser.new_context(offline=True)
    opened = context.new_page()
    opened.goto(page.as_uri())
    seconds: float = opened.evaluate(_LOADED)
    context.close()
    return seconds


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser."""
    from playwright.sync_api import sync_playwright

    executable = shutil.which("chromium")
    if executable is None:
        raise SystemExit("there is no chromium: apt-get install --no-install-recommends chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield browser
        browser.close()


def make_run(root: Path, options: argparse.Namespace) -> Run:
    """A run with sealed rollouts, scores and weights of one round."""
    values: dict[str, Any] = {"student": {"model": "none"}, "weigh": {"rule": "fire"}}
    run = init_run(root, values | {"train": {"batch_size": options.rows}})
    plan = plan_shards(options.trajectories, options.rows)
    names = [c.name for c in ROLLOUTS]

    def rollouts(shard: Shard) -> pa.Table:
        return conform(synthetic(shard, options.length).select(names), "rollouts", "synthetic rollouts")

    fields = {"made": "synthetic", "student": {"dtype": "float32"}}
    run_stage(Stage(run.part("scores", 0), fields, plan), lambda shard: synthetic(shard, options.length))
    weigh(run, 0)
    run_stage(Stage(run.part("rollouts", 0), {"made": "synthetic"}, plan), rollouts)  # what diagnose asks for
    return run


def empty_page(size: int) -> bytes:
    """A page of so many bytes."""
    head = b'<!doctype html><meta charset="utf-8"><title>-</title><p>empty</p><script type="application/json">'
    tail = b"</script>"
    return head + b"x" * (size - len(head) - len(tail)) + tail


if __name__ == "__main__":
    main()
