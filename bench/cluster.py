"""Thousands of shards on a Ray cluster whose engines die and dawdle: as `scale.py`, and the same rows as a local run.

`many` has `--shards` shards of a few tiny rows, `few` a tenth of them, each on a cluster of its own, started here.
The process of an engine dies over `--deaths` of the shards, once each; some shards take longer. Starting the cluster is
not timed, replacing engines is. Every shard and every row must then be there once, as a local engine writes it. Shards
per second. Takes minutes: not part of the smoke test.
"""

from __future__ import annotations

import argparse
import atexit
import itertools
import os
import shutil
import tempfile
import time
from pathlib import Path

import measure
import pyarrow as pa
import scale

from fire_data.ray_cluster import connect
from fire_data.ray_engine import RayEngine, Recipe
from fire_data.sampling import Sampling
from fire_data.schedule import hash_text
from fire_data.schemas.config import RayConfig
from fire_data.shards import read_shard
from fire_data.stages import run_stage

SIZES: measure.Sizes = {
    **{name: scale.SIZES[name] for name in ("rows", "length", "slow", "wait", "folder")},
    "shards": (2000, 20, "shards of the larger run"),
    "deaths": (10, 1, "shards over which the process of an engine dies"),
    "workers": (2, 1, "engines on the cluster"),
}


class Troubled:
    """An engine that ends its process over some shards, once each, and is slow with others.

    `folder` remembers over which it died; what happens is a function of the numbers of the rows.
    """

    def __init__(self, folder: str, every: int, slow: float, wait: float) -> None:
        self.folder, self.every, self.slow, self.wait, self.engine = Path(folder), every, slow, wait, scale.fake()

    def generate(self, requests: pa.Table, sampling: Sampling) -> pa.Table:
        """What the engine writes, in the end."""
        number = int(requests["trajectory_id"][0].as_py().split()[1]) // requests.num_rows
        died = self.folder / str(number)
        if number % self.every == self.every - 1 and not died.exists():
            died.touch()
            os._exit(1)
        if int(hash_text(str(number)), 16) % 10_000 < self.slow * 10_000:
            time.sleep(self.wait)
        return self.engine.generate(requests, sampling)


def prepare(group: str, case: str, options: argparse.Namespace) -> measure.Work:
    """A cluster with its engines ready; a run directory for each repetition."""
    root = Path(tempfile.mkdtemp(dir=options.folder or None))
    atexit.register(shutil.rmtree, root)
    died = root / "died"
    died.mkdir()
    count = options.shards if case == "many" else max(2, options.shards // 10)
    every = max(2, count // options.deaths)
    cluster = connect(RayConfig(workers=options.workers))
    atexit.register(cluster.close)
    told = {"folder": str(died), "every": every, "slow": options.slow, "wait": options.wait}
    engine = RayEngine(cluster, Recipe("cluster:Troubled", told))
    atexit.register(engine.close)
    engine.ready()
    fresh = (root / f"run-{i}" for i in itertools.count())
    return lambda: work(next(fresh), engine, died, count, options)


def work(root: Path, engine: RayEngine, died: Path, count: int, options: argparse.Namespace) -> measure.Done:
    """From an empty run directory to a sealed stage, with the same rows as a local engine writes."""
    for shard in died.iterdir():
        shard.unlink()
    run = scale.new_run(root, count, options)
    stage = scale.stage_of(run, count, options)
    manifest = run_stage(
        stage, lambda shard: scale.rollouts(shard, engine.generate, options), scale.tokens, lanes=engine.lanes
    )
    assert any(died.iterdir())
    some = slice(None, None, max(1, count // 50))
    local = [scale.rollouts(shard, scale.fake().generate, options) for shard in stage.plan[some]]
    assert all(read_shard(stage.part, r).equals(t) for r, t in zip(manifest.shards[some], local, strict=True))
    return scale.complete(run, manifest, count, options)


if __name__ == "__main__":
    measure.main(__doc__, SIZES, {"cluster": ["many", "few"]}, prepare)
