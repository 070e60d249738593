"""Ray: bytes are those of a local run whatever the workers, whichever of them die; a local cluster leaves nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # the loopback interface alone; read when Ray is imported
os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "RAY_DEDUP_LOGS_SKIP_REGEX": ".*"}

import pyarrow as pa
import pytest

from fire_data import ray_engine
from fire_data.ray_cluster import Cluster, connect, places
from fire_data.ray_engine import RayEngine, Recipe
from fire_data.sampling import Sampling
from fire_data.schemas.config import RayConfig
from fire_data.schemas.errors import ConfigError, DataError, EngineError, PartialError
from fire_data.schemas.manifest import Shard
from fire_data.schemas.tables import IDS, conform
from fire_data.shards import Part, read_shard
from fire_data.stages import LANE, Silent, Stage, each_shard, plan_shards, run_stage

from .conftest import shard_files
from .rayactors import Facts, Tiny, Troubled, die, fake, mistaken, plain, refuse

ray = pytest.importorskip("ray")

WAIT = 60  # seconds after which something that never comes is given up
SAMPLING = Sampling(0, 1.0, 1.0, 0, 12)
FIELDS = {"seed": 0}
Ask = Callable[[pa.Table], pa.Table]


def recipe(function: Callable[..., Any], **arguments: Any) -> Recipe:
    return Recipe(f"{function.__module__}:{function.__name__}", arguments)


def requests(shard: Shard) -> pa.Table:
    prompts = [[(7 * i + j) % 20 for j in range(2 + i % 4)] for i in range(shard.start, shard.stop)]
    names = [f"trajectory {i}" for i in range(shard.start, shard.stop)]
    return pa.table({"trajectory_id": names, "prompt_ids": pa.array(prompts, IDS)})


def rollouts(asked: pa.Table, answers: pa.Table) -> pa.Table:
    rows = asked.num_rows
    table = pa.table({**{n: asked[n] for n in asked.column_names}, **{n: answers[n] for n in answers.column_names}})
    for name, value in {"prompt_id": "p", "round": 0, "sample": 0, "response": "r"}.items():
        table = table.append_column(name, pa.array([value] * rows))
    return conform(
        table.append_column("messages", pa.array([[{"role": "user", "content": "c"}]] * rows)), "rollouts", ""
    )


def staged(root: Path, ask: Ask, lanes: int, shards: int = 6, report: Any = None) -> dict[str, bytes]:
    """The shards of a stage of rollouts with what `ask` answers to requests."""
    stage = Stage(Part(root, "rollouts", 0), FIELDS, plan_shards(4 * shards, 4))

    def make(shard: Shard) -> pa.Table:
        asked = requests(shard)
        return rollouts(asked, ask(asked))

    run_stage(stage, make, lanes=lanes, report=report)
    return {p.name: p.read_bytes() for p in shard_files(stage.part)}


def generated(root: Path, engine: Any, lanes: int) -> dict[str, bytes]:
    """As `staged`, written by a Generator."""
    return staged(root, lambda asked: engine.generate(asked, SAMPLING), lanes)


def scored(root: Path, engine: Any, lanes: int) -> dict[str, bytes]:
    """As `generated`, the scores of the rollouts in the same run."""
    from fire_data.scoring import summarise
    from fire_data.shards import sealed

    source = Part(root, "rollouts", 0)
    receipts = {r.shard: r for r in sealed(source).shards}
    stage = Stage(Part(root, "scores", 0), FIELDS, sealed(source).plan)

    def make(shard: Shard) -> pa.Table:
        rows = read_shard(source, receipts[shard.name])
        rows = rows.append_column("teacher_prompt_ids", pa.array([None] * rows.num_rows, IDS))
        for name, column in zip((found := engine.score(rows)).column_names, found.columns, strict=True):
            rows = rows.append_column(name, column)
        return conform(summarise(rows), "scores", "")

    run_stage(stage, make, lanes=lanes)
    return {p.name: p.read_bytes() for p in shard_files(stage.part)}


class Listener(Silent):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A cluster of two simulated nodes, with two CPUs and one, and this process connected to it."""
    from ray.cluster_utils import Cluster as Simulated

    folder = tempfile.mkdtemp(prefix="fire-")  # names of sockets are in it, and must be short
    os.environ |= {"RAY_TMPDIR": folder, "HTTPS_PROXY": "http://127.0.0.1:9"}  # actors have what their node was given
    options: dict[str, Any] = {"node_ip_address": "127.0.0.1", "object_store_memory": 80 << 20}
    quick = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 200, "health_check_failure_threshold": 5}
    simulated = Simulated(
        True, head_node_args={**options, "num_cpus": 2, "include_dashboard": False, "_system_config": quick}
    )
    simulated.add_node(**options, num_cpus=1)
    simulated.options = options
    del os.environ["HTTPS_PROXY"]
    ray.init(simulated.address, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield simulated
    ray.shutdown()
    simulated.shutdown()  # asserts that none of its processes is left
    del os.environ["RAY_TMPDIR"]
    shutil.rmtree(folder)


@pytest.fixture
def place(nodes: Any) -> Iterator[Callable[..., RayEngine]]:
    """`place(recipe, workers=1, ...)`: engines on the cluster, ended with the test."""
    placed: list[RayEngine] = []

    def make(what: Recipe, workers: int | None = 1, threads: int = 1, **options: Any) -> RayEngine:
        cluster = connect(RayConfig(address=nodes.address, workers=workers), threads=threads)
        placed.append(RayEngine(cluster, what, **options))
        return placed[-1]

    yield make
    for engine in placed:
        engine.close()


def everyone(engine: RayEngine) -> None:
    """Wait until every actor is ready."""
    places = [engine._take() for _ in range(engine.lanes)]
    assert len({str(p) for p in places}) == engine.lanes
    for place in places:
        engine._give(place)


# -- Bytes ------------------------------------------------------------------------------------------------------------


def test_bytes_do_not_depend_on_the_number_of_workers(place: Callable[..., RayEngine], tmp_path: Path) -> None:
    alone = generated(tmp_path / "alone", fake(), lanes=1)
    engine = place(recipe(fake), workers=3)
    assert engine.lanes == 3
    everyone(engine)
    for busy in (1, 2, 3):  # as many actors as lanes are ever asked: the first that has nothing to do
        assert generated(tmp_path / f"{busy}", engine, lanes=busy) == alone


def test_real_models_give_the_same_bytes_on_workers(
    place: Callable[..., RayEngine], make_run: Callable[..., Any], tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run")
    local = Tiny(str(run.root))
    written = generated(tmp_path / "alone", local, lanes=1)
    alone = scored(tmp_path / "alone", local, lanes=1)
    engine = place(recipe(Tiny, root=str(run.root)), workers=3)
    everyone(engine)
    for busy in (1, 2, 3):
        assert generated(tmp_path / f"{busy}", engine, lanes=busy) == written
        assert scored(tmp_path / f"{busy}", engine, lanes=busy) == alone


def test_a_call_goes_to_the_actor_that_has_least_to_do(nodes: Any) -> None:
    engine = RayEngine(Cluster(0, {"CPU": 1.0}, 1, ours=False), recipe(fake), depth=2)
    engine._state.places = [ray_engine._Place(None, {}), ray_engine._Place(None, {})]
    first, second = engine._take(), engine._take()
    assert first is not second
    engine._give(first)
    assert engine._take() is first
    assert {engine._take(), engine._take()} == {first, second}
    assert [p.busy for p in (first, second)] == [2, 2]


# -- What dies --------------------------------------------------------------------------------------------------------


def test_the_shards_of_a_removed_node_are_made_elsewhere(
    nodes: Any, place: Callable[..., RayEngine], tmp_path: Path
) -> None:
    third = nodes.add_node(**nodes.options, num_cpus=1)
    os.mkfifo(tmp_path / "pipe")
    happens = {f"trajectory {i}": "wait" for i in range(4 * 12)}
    engine = place(recipe(Troubled, happens=happens, folder=str(tmp_path), node=third.node_id), workers=None)
    assert engine.lanes == 4
    everyone(engine)
    removed = []

    def remove() -> None:
        removed.append((tmp_path / "pipe").read_text())
        nodes.remove_node(third, allow_graceful=False)

    thread = threading.Thread(target=remove, daemon=True)
    thread.start()
    report = Listener()
    engine.report = report
    found = staged(tmp_path / "placed", engine.evaluate, lanes=4, shards=12, report=report)
    thread.join(WAIT)
    assert removed == ["here"]
    assert len(report.warnings) == 1
    assert "is given to another engine, its own was lost (node 127.0.0.1, process" in report.warnings[0]
    assert found == staged(tmp_path / "alone", plain, lanes=1, shards=12)


def test_the_shard_of_a_killed_actor_is_made_again(place: Callable[..., RayEngine], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    engine = place(recipe(Troubled, happens={"trajectory 9": "wait once"}, folder=str(tmp_path)), workers=1)
    engine.ready()

    def kill() -> None:
        assert (tmp_path / "pipe").read_text() == "here"
        ray.kill(engine._state.places[0].handle)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    found = staged(tmp_path / "placed", engine.evaluate, lanes=1)
    thread.join(WAIT)
    assert found == staged(tmp_path / "alone", plain, lanes=1)
    assert len((tmp_path / "calls").read_bytes()) == 6 + 1


def test_a_shard_that_kills_every_engine_ends_in_an_error(place: Callable[..., RayEngine], tmp_path: Path) -> None:
    engine = place(recipe(Troubled, happens={"trajectory 9": "die"}, folder=str(tmp_path)), retries=1)
    with pytest.raises(EngineError, match="2 engines in a row were lost over shard 00002") as caught:
        each_shard(plan_shards(24, 4), lambda s: engine.evaluate(requests(s)))
    assert caught.value.where == "shard 00002"
    assert "ray.workers" in str(caught.value.fix)
    assert engine.evaluate(requests(plan_shards(4, 4)[0])).num_rows == 4, "the others can go on"


def test_engines_that_die_while_they_start_end_in_an_error(place: Callable[..., RayEngine]) -> None:
    with pytest.raises(EngineError, match="engines die while they start"):
        place(recipe(die), retries=1).ready()


# -- What is refused --------------------------------------------------------------------------------------------------


def test_errors_of_an_engine_arrive_as_they_are_and_are_not_tried_again(
    place: Callable[..., RayEngine], tmp_path: Path
) -> None:
    happens = {"trajectory 0": "data", "trajectory 4": "partial", "trajectory 8": "mistake"}
    engine = place(recipe(Troubled, happens=happens, folder=str(tmp_path)))
    data, partial, mistake, good = plan_shards(16, 4)
    with pytest.raises(DataError) as caught:
        engine.evaluate(requests(data))
    assert (caught.value.what, caught.value.where, caught.value.fix) == ("no good", "row 3", "another row")
    with pytest.raises(PartialError, match="given up") as given_up:
        engine.evaluate(requests(partial))
    assert given_up.value.done["trajectory_id"].to_pylist() == ["trajectory 4"]
    with pytest.raises(KeyError, match="a mistake of ours"):
        engine.evaluate(requests(mistake))
    seen: list[int] = []
    assert engine.evaluate(requests(good), seen.append).num_rows == 4
    assert seen == [4]
    assert len((tmp_path / "calls").read_bytes()) == 4


@pytest.mark.parametrize(
    ("function", "kind", "text"),
    [(refuse, ConfigError, "cannot be made"), (mistaken, EngineError, "could not be made: KeyError")],
)
def test_what_making_an_engine_raises_is_raised_here(
    place: Callable[..., RayEngine], function: Any, kind: type[Exception], text: str
) -> None:
    with pytest.raises(kind, match=text):
        place(recipe(function)).ready()


def test_a_node_that_does_not_see_the_run_is_refused(place: Callable[..., RayEngine], tmp_path: Path) -> None:
    missing = str(tmp_path / "nowhere")
    with pytest.raises(EngineError, match=f"the node does not see {missing}") as caught:
        place(Recipe("tests.rayactors:fake", {}, folders=(str(tmp_path), missing))).ready()
    assert caught.value.where == "node 127.0.0.1"


def test_a_node_with_other_versions_is_refused(
    place: Callable[..., RayEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = ray_engine._versions()
    assert mine.keys() == {"python", "fire-opd", "torch", "transformers"}
    monkeypatch.setattr(ray_engine, "_versions", lambda: mine | {"torch": "0.0.1"})
    with pytest.raises(EngineError, match=f"torch is {mine['torch']} there and 0.0.1 here".replace("+", r"\+")):
        place(recipe(fake)).ready()


def test_an_actor_has_the_threads_of_the_config_and_no_proxy(
    place: Callable[..., RayEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "yes")
    engine = place(recipe(Facts), threads=2)

    def work(shard: Shard) -> tuple[Any, str | None]:
        lane = LANE.get()
        return engine.evaluate(requests(shard)).to_pylist()[0], lane and lane.place

    ((facts, where),) = each_shard(plan_shards(4, 4), work)
    assert facts == {"threads": 2, "proxies": [], "offline": "yes"}
    assert str(where).startswith("node 127.0.0.1, process "), "what a message about a slow shard says"
    assert engine.entropy_kind == "topk-lower-bound"


def test_closed_engines_say_so(place: Callable[..., RayEngine]) -> None:
    engine = place(recipe(fake))
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="were closed"):
        engine.generate(requests(plan_shards(4, 4)[0]), SAMPLING)


# -- The cluster ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes_", "threads", "gpus", "room"),
    [
        ([{"CPU": 8.0}], 1, 1, 8),
        ([{"CPU": 8.0}, {"CPU": 3.0}], 2, 1, 5),  # an engine is on one node
        ([{"CPU": 1.0}], 2, 1, 0),
        ([{"CPU": 64.0, "GPU": 8.0}, {"CPU": 4.0}], 4, 1, 8),  # with GPUs, only nodes that have some
        ([{"CPU": 64.0, "GPU": 8.0}, {"CPU": 64.0, "GPU": 4.0}], 4, 8, 1),
        ([{"CPU": 4.0, "GPU": 8.0}], 2, 1, 2),
        ([{"GPU": 8.0}], 1, 1, 0),  # a head that is to do no work
    ],
)
def test_engines_are_placed_where_there_is_room(
    nodes_: list[dict[str, float]], threads: int, gpus: int, room: int
) -> None:
    need, found = places(nodes_, threads, gpus)
    assert found == room
    assert need["CPU"] == threads
    assert need.get("GPU", 0) == (gpus if any("GPU" in n for n in nodes_) else 0)


def test_without_room_for_one_engine_nothing_starts(nodes: Any) -> None:
    with pytest.raises(EngineError, match="no node of the Ray cluster has room for an engine: 64 CPU each"):
        connect(RayConfig(address=nodes.address), threads=64)
    assert ray.is_initialized(), "a connection that was there stays"


@pytest.mark.parametrize(
    ("address", "text"),
    [
        ("127.0.0.1:9", "there is no Ray cluster at 127.0.0.1:9: Connection refused"),
        ("ray://127.0.0.1:10001", "'ray://127.0.0.1:10001' is not the address of a Ray cluster"),
        ("nonsense", "'nonsense' is not the address of a Ray cluster"),
    ],
)
def test_an_address_without_a_cluster_is_refused_at_once(address: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        connect(RayConfig(address=address))
    assert caught.value.what == text
    assert caught.value.fix


LOCAL = """
import os, signal, socket, sys
from pathlib import Path

def mine():
    return {int(p.name) for p in Path("/proc").iterdir() if p.name.isdecimal() and folder in (text(p / "cmdline"))}

def text(path):
    try: return path.read_bytes().decode(errors="replace")
    except OSError: return ""

def listening(pids):
    names = [link(f) for pid in pids for f in Path(f"/proc/{pid}/fd").glob("*")]
    sockets = {name[8:-1] for name in names if name.startswith("socket:")}
    lines = [line.split() for kind in ("tcp", "tcp6") for line in text(Path("/proc/net") / kind).splitlines()[1:]]
    return {line[1].rpartition(":")[0] for line in lines if line[3] == "0A" and line[9] in sockets}

def link(path):
    try: return os.readlink(path)
    except OSError: return ""

import pyarrow as pa
from fire_data.ray_cluster import connect
from fire_data.ray_engine import RayEngine, Recipe
from fire_data.schemas.config import RayConfig
from fire_data.stages import each_shard, plan_shards
handler = signal.getsignal(signal.SIGTERM)
cluster = connect(RayConfig(workers=3))
folder = str(cluster.folder)
assert signal.getsignal(signal.SIGTERM) is handler
assert not {"RAY_AUTH_TOKEN", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_USAGE_STATS_ENABLED"} & os.environ.keys()
engine = RayEngine(cluster, Recipe("tests.rayactors:Interrupting", {"caller": os.getpid()}))
print("lanes", engine.lanes)
def work(shard): return engine.evaluate(pa.table({"trajectory_id": [shard.name]}))

try: each_shard(plan_shards(3, 1), work, lanes=3)
except KeyboardInterrupt: print("interrupted")
pids = mine()
print("processes", len(pids) > 3)
loopback = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
found = listening(pids | {os.getpid()})
print("listening", bool(found), found - loopback)
engine.close()
cluster.close()
print("left", mine(), Path(folder).exists())
"""


def test_a_local_cluster_stays_on_the_loopback_interface_and_leaves_nothing(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    environment = {n: v for n, v in os.environ.items() if not n.startswith("RAY_")} | {
        "PYTHONPATH": str(root),
        "HOME": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-c", LOCAL], capture_output=True, text=True, timeout=3 * WAIT, check=False, env=environment
    )
    assert done.stdout.splitlines() == [
        "lanes 3",
        "interrupted",
        "processes True",
        "listening True set()",
        "left set() False",
    ]
    assert (done.stderr, done.returncode) == ("", 0)
    assert list(tmp_path.iterdir()) == [], "Ray writes nothing into the home either"


def test_a_missing_ray_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match="Ray is not installed") as caught:
        connect(RayConfig())
    assert caught.value.fix == "pip install 'fire-opd[ray]'"
