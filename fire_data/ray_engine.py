"""Runs engines as actors on a Ray cluster, one per GPU or CPU slot: tables go in and out, shards stay with the caller.

The caller reads rollouts and commits shards with the same code as ever, so a cluster brings no second way to read or
write a run, and a shard that two actors worked on is still committed once. An actor builds its engine from a recipe,
the name of a function and plain arguments, and keeps it. When its process or node dies, what it worked on is given to
another, and a new actor takes its place wherever there is room.

Bytes are those of a local run with the same threads, kind of device and versions; an actor whose versions differ from
the caller's is refused. Times are in seconds.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from fire_data.ray_cluster import Cluster, counted, last_line
from fire_data.schemas.errors import EngineError, FireError, PartialError
from fire_data.shards import versions
from fire_data.stages import LANE, Reporter, Silent

if TYPE_CHECKING:
    from fire_data.engines import Progress
    from fire_data.sampling import Sampling

_SAME = ("python", "fire-opd", "torch", "transformers")  # what can change the bytes that an engine gives
_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "ftp_proxy")
_START_S = 900.0  # until the first engine must be ready
_LOOK_S = 0.2  # how often a caller that waits for an engine looks
_STOP_S = 10.0  # until engines must have ended by themselves


@dataclass(frozen=True)
class Recipe:
    """How an actor makes its engine: `function` ("module:name") is called with `arguments`, which are plain values.

    `folders` must be there on every node, at the same absolute path.
    """

    function: str
    arguments: dict[str, Any]
    folders: tuple[str, ...] = ()


class Host:
    """What runs in an actor: one engine. Our own errors are answers, so that they arrive as what they are."""

    def start(
        self, recipe: Recipe, threads: int, expected: dict[str, str], offline: str | None
    ) -> tuple[dict[str, Any], FireError | None]:
        """Make the engine. Gives the facts about it."""
        import ray

        node: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        facts: dict[str, Any] = {"node": node, "pid": os.getpid()}
        for name in _PROXIES:
            for spelling in (name, name.upper()):
                os.environ.pop(spelling, None)
        if offline is not None:
            os.environ["HF_HUB_OFFLINE"] = offline
        try:
            _require_same(expected, node)
            _require_folders(recipe.folders, node)
            module, _, name = recipe.function.partition(":")
            self.engine = getattr(importlib.import_module(module), name)(**recipe.arguments)
        except FireError as error:
            return facts, error
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(threads)
        return facts | {"entropy_kind": getattr(self.engine, "entropy_kind", "exact")}, None

    def call(self, method: str, data: bytes, options: dict[str, Any]) -> tuple[bytes | None, FireError | None]:
        """What the engine answers to a table."""
        try:
            return _packed(getattr(self.engine, method)(_unpacked(data), **options)), None
        except PartialError as error:
            done, error.done = error.done, None
            return None if done is None else _packed(done), error
        except FireError as error:
            return None, error

    def stop(self) -> None:
        close = getattr(self.engine, "close", None)
        if close is not None:
            close()


def _require_same(expected: dict[str, str], node: str) -> None:
    """Raise EngineError if the versions here differ from those of the caller: the bytes might differ too."""
    here = _versions()
    wrong = [f"{n} is {here.get(n)} there and {expected.get(n)} here" for n in _SAME if here.get(n) != expected.get(n)]
    if wrong:
        fix = "install on every node what this machine has (fire env)"
        raise EngineError(f"a node has other versions: {', '.join(wrong)}", where=f"node {node}", fix=fix)


def _require_folders(folders: tuple[str, ...], node: str) -> None:
    for folder in folders:
        if not Path(folder).exists():
            fix = "put it on a file system that every node mounts at the same place"
            raise EngineError(f"the node does not see {folder}", where=f"node {node}", fix=fix)


def _versions() -> dict[str, str]:
    return {name: version for name, version in versions().items() if name in _SAME}


def _packed(table: pa.Table) -> bytes:
    """A table as bytes: what comes back is then no view of Ray's shared memory, which may go away."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def _unpacked(data: bytes) -> pa.Table:
    return pa.ipc.open_stream(data).read_all()


@dataclass(eq=False)
class _Place:
    """An actor that is ready, and how many calls it works on."""

    handle: Any
    facts: dict[str, Any]
    busy: int = 0

    def __str__(self) -> str:
        return f"node {self.facts['node']}, process {self.facts['pid']}"


@dataclass(eq=False)
class _State:
    """The actors of an engine: those that are ready and those that start."""

    places: list[_Place] = field(default_factory=list)
    starting: dict[Any, Any] = field(default_factory=dict)  # what their start will answer -> handle
    died: int = 0  # starts in a row that ended with the process
    failure: FireError | None = None
    closed: bool = False


class RayEngine:
    """Generator, Scorer and Evaluator, as far as what the recipe makes is one, on all workers of a cluster.

    May be called from `lanes` threads at once: each call goes to the actor that has least to do.

    Args:
        report: told when something died; from whatever thread called.
        depth: calls that an actor works on at a time; more than 1 only for engines that may be called by threads.
        retries: how often a call is given to another actor when one dies over it.
    """

    holds_gpu = True  # its actors keep others from being placed

    def __init__(
        self, cluster: Cluster, recipe: Recipe, *, report: Reporter | None = None, depth: int = 1, retries: int = 3
    ) -> None:
        self.cluster, self.recipe, self.depth, self.retries = cluster, recipe, depth, retries
        self.report = report or Silent()
        self._state, self._changed = _State(), threading.Condition()
        with self._changed:
            for _ in range(cluster.workers):
                self._launch()

    @property
    def lanes(self) -> int:
        """How many calls keep all actors busy."""
        return self.cluster.workers * self.depth

    @property
    def entropy_kind(self) -> str:
        """That of the actors' engines; waits until one is ready."""
        return str(self.ready()["entropy_kind"])

    def ready(self) -> dict[str, Any]:
        """Wait for the first actor and give the facts about it. Raises what making its engine raised."""
        place = self._take()
        self._give(place)
        return place.facts

    def generate(self, requests: pa.Table, sampling: Sampling, progress: Progress | None = None) -> pa.Table:
        return self._ask("generate", requests, {"sampling": sampling}, progress)

    def score(
        self, rollouts: pa.Table, progress: Progress | None = None, *, k: int = 0, signals: bool = True
    ) -> pa.Table:
        return self._ask("score", rollouts, {"k": k, "signals": signals}, progress)

    def evaluate(self, rows: pa.Table, progress: Progress | None = None) -> pa.Table:
        return self._ask("evaluate", rows, {}, progress)

    def close(self) -> None:
        """End all actors, those that are idle in an orderly way. Calls under way fail."""
        import ray

        with self._changed:
            state, self._state.closed = self._state, True
            idle = [p for p in state.places if not p.busy]
            handles = [*(p.handle for p in state.places), *state.starting.values()]
            state.places, state.starting = [], {}
            self._changed.notify_all()
        if not handles or not ray.is_initialized():
            return
        with contextlib.suppress(ray.exceptions.RayError):
            if idle:
                ray.wait([p.handle.stop.remote() for p in idle], num_returns=len(idle), timeout=_STOP_S)
        for handle in handles:
            _end(handle)

    def _ask(self, method: str, table: pa.Table, options: dict[str, Any], progress: Progress | None) -> pa.Table:
        """One call, given to further actors as long as those die that had it. Raises EngineError after `retries`."""
        import ray

        lane, data, why = LANE.get(), _packed(table), ""
        what = str(lane) if lane else f"a table of {table.num_rows} rows"
        for attempt in range(1 + self.retries):
            place = self._take()
            if lane:
                lane.place = str(place)
            try:
                answer, error = ray.get(place.handle.call.remote(method, data, options))
            except ray.exceptions.RayTaskError as failed:
                raise failed.cause from failed
            except ray.exceptions.RayError as lost:
                why = f"{place}: {last_line(lost)}"
                self._lose(place)
                if attempt < self.retries and not self._state.closed:
                    self.report.warn(f"{what} is given to another engine, its own was lost ({why})")
                continue
            finally:
                self._give(place)
            return self._answered(answer, error, progress, table.num_rows)
        text = f"{1 + self.retries} engines in a row were lost over {what}; the last: {why}"
        fix = "look at the memory of that node; --set ray.workers=N places fewer engines; the same command continues"
        raise EngineError(text, where=what, fix=fix)

    @staticmethod
    def _answered(answer: bytes | None, error: FireError | None, progress: Progress | None, rows: int) -> pa.Table:
        if isinstance(error, PartialError) and answer is not None:
            error.done = _unpacked(answer)
        if error is not None:
            raise error
        assert answer is not None
        if progress:
            progress(rows)
        return _unpacked(answer)

    def _take(self) -> _Place:
        """The actor with least to do, as soon as one has less than `depth` calls."""
        with self._changed:
            since, state = time.monotonic(), self._state
            while True:
                self._adopt()
                if state.closed:
                    raise EngineError("the engines on the Ray cluster were closed")
                if state.failure is not None:
                    raise state.failure
                free = [p for p in state.places if p.busy < self.depth]
                if free:
                    place = min(free, key=lambda p: p.busy)
                    place.busy += 1
                    return place
                if not state.places and time.monotonic() - since > _START_S:
                    raise self._no_room()
                self._changed.wait(_LOOK_S)

    def _give(self, place: _Place) -> None:
        with self._changed:
            place.busy -= 1
            self._changed.notify()

    def _lose(self, place: _Place) -> None:
        """An actor did not answer: it is ended, whatever became of it, and another one is started."""
        with self._changed:
            if place in self._state.places:
                self._state.places.remove(place)
                _end(place.handle)
                self._launch()

    def _launch(self) -> None:
        import ray

        if self._state.closed:
            return
        options: dict[str, Any] = {"num_cpus": self.cluster.need["CPU"], "num_gpus": self.cluster.need.get("GPU", 0.0)}
        options |= {"scheduling_strategy": "SPREAD", "max_concurrency": self.depth}
        handle: Any = ray.remote(**options)(Host).remote()  # type: ignore[call-overload]
        offline = os.environ.get("HF_HUB_OFFLINE")
        answer = handle.start.remote(self.recipe, self.cluster.threads, _versions(), offline)
        self._state.starting[answer] = handle

    def _adopt(self) -> None:
        """Take up the actors that became ready."""
        import ray

        state = self._state
        if not state.starting:
            return
        answers, _ = ray.wait(list(state.starting), num_returns=len(state.starting), timeout=0)
        for answer in answers:
            handle = state.starting.pop(answer)
            try:
                facts, error = ray.get(answer)
            except ray.exceptions.RayTaskError as failed:
                text = f"an engine could not be made: {failed.cause!r}"
                facts, error = {}, EngineError(text, where="Ray cluster", fix="the same command without --ray")
            except ray.exceptions.RayError as lost:
                self._again(last_line(lost))
                continue
            if error is not None:
                state.failure = state.failure or error
                continue
            state.places.append(_Place(handle, facts))
            state.died = 0

    def _again(self, why: str) -> None:
        """An actor died while it made its engine: start another, but not for ever."""
        state = self._state
        state.died += 1
        if state.died <= self.retries:
            self._launch()
        elif state.places or state.starting:
            self.report.warn(f"engines die while they start ({why}); going on with fewer")
        else:
            fix = "look at the memory of the nodes; --set ray.workers=N places fewer engines"
            state.failure = EngineError(f"engines die while they start: {why}", where="Ray cluster", fix=fix)

    def _no_room(self) -> EngineError:
        text = f"no engine was ready on the Ray cluster within {_START_S:.0f} s: {counted(self.cluster.need)} each"
        return EngineError(text, fix="ray status shows who holds the cluster; the same command continues")


def _end(handle: Any) -> None:
    import ray

    with contextlib.suppress(ray.exceptions.RayError, ValueError):
        ray.kill(handle)
