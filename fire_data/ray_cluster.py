"""A connection to a Ray cluster, or to one started here for the time being, and the engines it has room for.

A cluster that is started here listens on the loopback interface alone and asks for a token: whoever reaches the ports
of a Ray cluster can run code on it. It writes into a folder of its own, which goes with it. Times are in seconds.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fire_data.schemas.config import RayConfig
from fire_data.schemas.errors import ConfigError, EngineError

_REACH_S = 10.0  # until the port of a cluster must answer
_LOOPBACK = "127.0.0.1"
# Read when Ray is imported. It would print what its own processes report to stdout, which is for data.
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "1", "RAY_DEDUP_LOGS_SKIP_REGEX": ".*"}
_SWITCH = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # 0: Ray stays on the loopback interface, on every system


@dataclass
class Cluster:
    """A connection to Ray, and how many engines are placed on it. `close` ends the connection and what it started."""

    workers: int
    need: dict[str, float]  # of one engine: CPU and GPU
    threads: int
    ours: bool  # the connection was made here
    folder: Path | None = None  # of the cluster that was started here

    def close(self) -> None:
        if self.ours:
            import ray

            self.ours = False
            ray.shutdown()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def connect(settings: RayConfig, *, threads: int | None = None, gpus: int = 1) -> Cluster:
    """Connect to the cluster at `settings.address`, or start one on this machine.

    A process that is connected to Ray stays with that cluster. Without `settings.workers` there are as many engines as
    have room: one per GPU, or per `threads` CPUs.

    Args:
        threads: CPUs of an engine; None: 1.
        gpus: GPUs of an engine, where the cluster has any.

    Raises:
        ConfigError: Ray is not installed, or there is no such cluster.
        EngineError: Ray does not start, or no node has room for an engine.
    """
    threads = threads or 1
    if settings.address is not None:
        _reach(settings.address)
    with _environment(_QUIET if settings.address is not None else _QUIET | _local()):
        try:
            import ray
        except ModuleNotFoundError:
            raise ConfigError("Ray is not installed", where="--ray", fix="pip install 'fire-opd[ray]'") from None
        cluster = Cluster(0, {}, threads, ours=not ray.is_initialized())
        if cluster.ours:
            if settings.address is None:
                cluster.folder = Path(tempfile.mkdtemp(prefix="fire-ray-", dir=os.environ.get("RAY_TMPDIR")))
            try:
                _init(settings, threads, cluster.folder)
            except BaseException:
                cluster.close()
                raise
    alive = [n for n in ray.nodes() if n["Alive"]]  # type: ignore[no-untyped-call]
    if cluster.folder is not None and any(n["NodeManagerAddress"] != _LOOPBACK for n in alive):
        cluster.close()
        text = "Ray was imported before, and would listen on all network interfaces"
        raise EngineError(text, fix=f"export {_SWITCH}=0 before Python starts, or give the address of a cluster")
    nodes = [dict(n["Resources"]) for n in alive]
    cluster.need, room = places(nodes, threads, gpus)
    cluster.workers = settings.workers or room
    if not cluster.workers:
        cluster.close()
        text = f"no node of the Ray cluster has room for an engine: {counted(cluster.need)} each"
        raise EngineError(text, where=f"{len(nodes)} nodes", fix="--set threads=N, at most the CPUs of a node")
    return cluster


def places(nodes: list[dict[str, float]], threads: int, gpus: int) -> tuple[dict[str, float], int]:
    """What one engine needs, and how many engines have room on nodes with these resources.

    GPUs are needed if any node has one. An engine is on one node.
    """
    need = {"CPU": float(threads)}
    if any(node.get("GPU", 0.0) for node in nodes):
        need["GPU"] = float(gpus)
    return need, sum(min(int(node.get(name, 0.0) // count) for name, count in need.items()) for node in nodes)


def counted(need: dict[str, float]) -> str:
    return ", ".join(f"{count:g} {name}" for name, count in need.items())


def _init(settings: RayConfig, threads: int, folder: Path | None) -> None:
    """`ray.init`, quiet; our handler of SIGTERM stays."""
    import ray

    options: dict[str, Any] = {"include_dashboard": False, "logging_level": "ERROR", "log_to_driver": False}
    if folder is None:
        options["address"] = settings.address
    else:
        options |= {"address": "local", "_node_ip_address": _LOOPBACK, "_temp_dir": str(folder)}
        wanted = (settings.workers or 1) * threads  # CPUs are only counted: more may be given than there are
        if settings.workers or wanted > (os.cpu_count() or 1):
            options["num_cpus"] = wanted
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**options)
    except (ConnectionError, ValueError) as error:
        raise _unreachable(settings.address or "local", last_line(error)) from error
    except (RuntimeError, OSError, ray.exceptions.RayError) as error:
        text = f"Ray does not start: {last_line(error)}"
        raise EngineError(text, where=settings.address, fix="ray status shows an existing cluster") from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _reach(address: str) -> None:
    """Raise ConfigError if nothing answers at an address: Ray itself would wait for minutes."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdecimal():
        text = f"{address!r} is not the address of a Ray cluster"
        raise ConfigError(text, where="--ray", fix="--ray HOST:6379 on a machine of the cluster, or --ray auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_S).close()
    except OSError as error:
        raise _unreachable(address, error.strerror or str(error)) from None


def _unreachable(address: str, why: str) -> ConfigError:
    fix = "`ray start --head` there, or --ray without an address: it starts a cluster on this machine"
    return ConfigError(f"there is no Ray cluster at {address}: {why}", where="--ray", fix=fix)


@functools.cache
def _local() -> dict[str, str]:
    """For a cluster of our own: no other interface, and a token of this process, or Ray would put one into the home."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    return {_SWITCH: "0", **({} if "RAY_AUTH_MODE" in os.environ else token)}


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Environment variables for the time being."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def last_line(error: BaseException) -> str:
    """The last line that says something: Ray's errors are long and end with the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
