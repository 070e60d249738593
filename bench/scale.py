"""Thousands of shards: what a shard costs beside its rows, and whether that grows with how many others there are.

`many` has `--shards` shards of a few tiny rows, `few` a tenth of them; the work per shard is the same, so a ratio of 1
is linear growth and 10 would be quadratic. `stage` makes and seals rollouts of the fake engine in lanes, while calls
of the engine fail and others take long, with the same command again and again until the stage is sealed: every row must
then be there once. `calm` is the same without trouble, in one lane. `again` confirms what is finished, `look` is `fire
status`, `fire check` and `fire plan` together, `weigh` the stage of that name and then reading as training does. Shards
per second.
"""

from __future__ import annotations

import argparse
import atexit
import itertools
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import numpy as np
import pyarrow as pa
from weigh import synthetic

from fire_data import overview
from fire_data.create import init_run
from fire_data.engines import FakeGenerator
from fire_data.plan import plan
from fire_data.run import Run
from fire_data.sampling import Sampling
from fire_data.schedule import hash_text
from fire_data.schemas.errors import EngineError
from fire_data.schemas.manifest import Manifest, Receipt, Shard
from fire_data.schemas.tables import IDS, conform
from fire_data.shards import read_shard, sealed
from fire_data.stages import Stage, plan_shards, run_stage
from fire_data.steps.weigh import weigh
from fire_data.stream import step_batches
from fire_data.vocabulary import Vocabulary

SIZES: measure.Sizes = {
    "shards": (5000, 20, "shards of the larger run"),
    "rows": (2, 2, "rows of a shard"),
    "length": (8, 4, "longest response, tokens"),
    "lanes": (8, 4, "shards in flight, where there is trouble"),
    "kills": (100, 3, "failing calls of the engine, whatever the number of shards"),
    "slow": (0.01, 0.01, "share of shards that take `--wait` seconds longer"),
    "wait": (0.2, 0.01, "seconds"),
    "folder": ("", "", "where run directories are made; default: a temporary one"),
}
Generate = Callable[[pa.Table, Sampling], pa.Table]
GROUPS = {name: ["many", "few"] for name in ("calm", "stage", "again", "look", "weigh")}


def prepare(group: str, case: str, options: argparse.Namespace) -> measure.Work:
    """A run directory, with sealed shards where the work is to look at them; removed at the end."""
    root = Path(tempfile.mkdtemp(dir=options.folder or None))
    atexit.register(shutil.rmtree, root)
    count = options.shards if case == "many" else max(2, options.shards // 10)
    fresh = (root / f"run-{i}" for i in itertools.count())
    if group in ("calm", "stage"):
        kills = options.kills if group == "stage" else 0
        return lambda: _made(next(fresh), count, options, kills)
    run = new_run(next(fresh), count, options)
    if group == "weigh":
        plan_ = plan_shards(count * options.rows, options.rows)
        run_stage(Stage(run.part("scores", 0), {"made": "synthetic"}, plan_), lambda s: synthetic(s, options.length))
    else:
        _until_sealed(run, count, options, 0)
    work: dict[str, Callable[[], object]] = {
        "again": lambda: _until_sealed(run, count, options, 0),
        "look": lambda: (overview.status(run), overview.check(run), plan(run)),
        "weigh": lambda: _weighed(run),
    }

    def timed() -> measure.Done:
        work[group]()
        return measure.Done(count)

    return timed


def new_run(root: Path, count: int, options: argparse.Namespace) -> Run:
    """A run directory with one prompt for each row of so many shards."""
    (root.parent / "prompts.jsonl").write_text(
        "".join(f'{{"prompt_id": "{i}", "prompt": "{i}"}}\n' for i in range(count * options.rows))
    )
    values: dict[str, Any] = {
        "student": {"model": "none"},
        "weigh": {"rule": "fire"},
        "prompts": {"path": "../prompts.jsonl"},
    }
    shards = {"n": 1, "prompts_per_shard": options.rows, "engine": "fake"}
    return init_run(root, values | {"rollout": shards, "train": {"batch_size": 64}})


def _made(root: Path, count: int, options: argparse.Namespace, kills: int) -> measure.Done:
    """Everything from an empty run directory to a sealed stage without a gap and without a row twice."""
    run = new_run(root, count, options)
    return complete(run, _until_sealed(run, count, options, kills), count, options)


def complete(run: Run, manifest: Manifest, count: int, options: argparse.Namespace) -> measure.Done:
    """That every shard and every row is there once."""
    part = run.part("rollouts", 0)
    assert len(manifest.shards) == len(list(part.folder.iterdir())) == len(list(part.receipts.iterdir())) == count
    assert sum(r.rows for r in manifest.shards) == count * options.rows
    some = manifest.shards[:: max(1, count // 50)]
    names = [name for r in some for name in read_shard(part, r, ["trajectory_id"])["trajectory_id"].to_pylist()]
    assert len(set(names)) == len(some) * options.rows
    return measure.Done(count)


def _until_sealed(run: Run, count: int, options: argparse.Namespace, kills: int) -> Manifest:
    """The command again and again. Which calls fail and which shards are slow is a function of numbers, not of time."""
    stage, engine = stage_of(run, count, options), fake()
    calls, lock = itertools.count(1), threading.Lock()
    every = max(2, count // kills) if kills else 0

    def make(shard: Shard) -> pa.Table:
        with lock:
            call = next(calls)
        if every and call % every == 0 and call // every <= kills:
            raise EngineError("killed, as told", where=shard.name)
        if every and int(hash_text(shard.name), 16) % 10_000 < options.slow * 10_000:
            time.sleep(options.wait)
        return rollouts(shard, engine.generate, options)

    while True:
        try:
            return run_stage(stage, make, tokens, lanes=options.lanes if kills else 1)
        except EngineError:
            continue


def stage_of(run: Run, count: int, options: argparse.Namespace) -> Stage:
    """The stage that is made."""
    return Stage(run.part("rollouts", 0), {"made": "fake"}, plan_shards(count * options.rows, options.rows))


def tokens(receipts: list[Receipt]) -> dict[str, int]:
    """What its manifest says."""
    return {"tokens": sum(r.tokens for r in receipts)}


def fake() -> FakeGenerator:
    """The engine, which loads no model."""
    return FakeGenerator(Vocabulary(100, np.ones(100, dtype=np.bool_)), frozenset([0]))


def rollouts(shard: Shard, generate: Generate, options: argparse.Namespace) -> pa.Table:
    """The rows of a shard, whatever engine writes them."""
    names = [f"trajectory {i}" for i in range(shard.start, shard.stop)]
    requests = pa.table({"trajectory_id": names, "prompt_ids": pa.array([[1, 2]] * len(names), IDS)})
    answers = generate(requests, Sampling(seed=0, max_new_tokens=options.length))
    table = pa.table({n: t[n] for t in (requests, answers) for n in t.column_names})
    for name, value in {"prompt_id": "p", "round": 0, "sample": 0, "response": "r"}.items():
        table = table.append_column(name, pa.array([value] * len(names)))
    told = pa.array([[{"role": "user", "content": "c"}]] * len(names))
    return conform(table.append_column("messages", told), "rollouts", shard.name)


def _weighed(run: Run) -> int:
    for folder in (run.root, run.root / ".fire" / "receipts", run.root / ".fire" / "manifests"):
        shutil.rmtree(folder / "weights", ignore_errors=True)
    weights = weigh(run, 0)
    scores = run.part("scores", 0)
    return sum(1 for _ in step_batches((scores, sealed(scores)), (run.part("weights", 0), weights)))


if __name__ == "__main__":
    measure.main(__doc__, SIZES, GROUPS, prepare)
