"""Engines outside of this process: vLLM in processes of its own, servers behind urls, actors on a Ray cluster.

Each is opened when it is first needed and lives on through the rounds, until another model needs its room. vLLM gets
new weights where only those changed; a server is probed before it is asked anything.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from fire_data.run import Run
from fire_data.schemas.config import TEACHER, ModelConfig, RayConfig
from fire_data.schemas.errors import ConfigError, FireError
from fire_data.schemas.manifest import digest
from fire_data.stages import Reporter
from fire_data.vocabulary import Vocabulary

if TYPE_CHECKING:
    from fire_data.engines import Engine
    from fire_data.ray_cluster import Cluster
    from fire_data.ray_engine import RayEngine
    from fire_data.sampling import Sampling

P = ParamSpec("P")
T = TypeVar("T")


def _one_at_a_time(method: Callable[Concatenate[Outside, P], T]) -> Callable[Concatenate[Outside, P], T]:
    """A method that holds the lock."""

    @functools.wraps(method)
    def run(outside: Outside, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with outside.lock:
            return method(outside, *args, **kwargs)

    return run


class Outside:
    """The engines that one run has outside of this process, by the name of their model."""

    def __init__(
        self,
        run: Run,
        report: Reporter,
        lock: threading.RLock,
        fingerprint: Callable[[ModelConfig], str],
        ray: RayConfig | None = None,
    ) -> None:
        """`lock`: held while one is opened. `fingerprint`: of a model's weights. `ray`: place them on this cluster."""
        self.run, self.report, self.lock = run, report, lock
        self.fingerprint = fingerprint
        self.ray = ray
        self.place = ""  # marks the logs of engines on a node of a cluster
        self.probes: dict[str, dict[str, Any]] = {}
        self._cluster: Cluster | None = None
        self._engines: dict[str, tuple[str, Engine]] = {}

    def close(self) -> None:
        """End all of them, and the connection to the cluster."""
        self.end(*self._engines)
        if self._cluster is not None:
            self._cluster.close()
            self._cluster = None

    @property
    def names(self) -> tuple[str, ...]:
        """Whose engines are open."""
        return tuple(self._engines)

    def holds_gpu(self, who: str) -> bool:
        """True if an engine is open that holds an accelerator of this machine."""
        return who in self._engines and self._engines[who][1].holds_gpu

    def end(self, *who: str) -> None:
        """End these engines, if they are open."""
        for name in who:
            _, engine = self._engines.pop(name, ("", None))
            if engine is not None:
                engine.close()

    def places(self, engine: str) -> bool:
        """True if this engine runs on the workers of a cluster; a server needs no worker to be asked."""
        return self.ray is not None and engine != "http"

    @property
    def workers(self) -> int:
        """How many engines the cluster has room for."""
        return self._connected().workers

    def _connected(self) -> Cluster:
        from fire_data.ray_cluster import connect

        if self._cluster is None:
            self.report.busy("connecting to Ray")
            engines = (self.run.config.rollout.engine, self.run.config.score.engine)
            gpus = self.run.config.vllm.tensor_parallel_size if "vllm" in engines else 1
            self._cluster = connect(self.ray or RayConfig(), threads=self.run.config.threads, gpus=gpus)
        return self._cluster

    @_one_at_a_time
    def placed(self, who: str, arguments: dict[str, Any], depth: int) -> RayEngine:
        """Engines on all workers of the cluster, by `fire_data.steps.engines.remote` with these arguments.

        They take the place of those of any other model: a worker has room for one.
        """
        from fire_data.ray_engine import RayEngine, Recipe

        key = digest(arguments)
        if self._engines.get(who, ("", None))[0] != key:
            self.end(*(name for name, (_, engine) in self._engines.items() if isinstance(engine, RayEngine)))
            self.report.busy(f"placing {called(who)} on {self.workers} workers")
            recipe = Recipe("fire_data.steps.engines:remote", arguments, (arguments["root"],))
            made = RayEngine(self._connected(), recipe, report=self.report, depth=depth)
            self._engines[who] = (key, made)
        found = self._engines[who][1]
        assert isinstance(found, RayEngine)
        return found

    @_one_at_a_time
    def process(self, who: str, cfg: ModelConfig, ids: Vocabulary, stops: frozenset[int], longest: int) -> Engine:
        """A model in a vllm process, which lives on and is given new weights where only those changed.

        `longest`: tokens of prompt and response together.
        """
        from fire_data import models
        from fire_data.vllm_engine import VllmEngine

        folder, key = models.local_folder(cfg, self.run.root), self.fingerprint(cfg)
        positions = getattr(models.model_config(cfg, self.run.root), "max_position_embeddings", None)
        if positions:  # vllm refuses to make room for more than the model was made for
            longest = min(longest, positions - 1)
        known, engine = self._engines.get(who, ("", None))
        assert engine is None or isinstance(engine, VllmEngine)
        if engine is not None and known != key:
            self.report.busy(f"loading {who}")
            engine.load(folder)
            self._engines[who] = (key, engine)
        elif engine is None:
            self.report.busy(f"starting vllm for {who}")
            log = self.run.root / ".fire" / "logs" / f"vllm-{who.replace(' ', '-')}{self.place}.log"
            made = VllmEngine(
                folder, dtype=cfg.dtype, device=cfg.device, settings=self.run.config.vllm, vocabulary=ids,
                stop_ids=stops, log=log, threads=self.run.config.threads, longest=longest,
                entropy_topk=self.run.config.score.entropy_topk,
            )  # fmt: skip
            self._engines[who] = (key, made)
        return self._engines[who][1]

    @_one_at_a_time
    def server(
        self,
        who: str,
        cfg: ModelConfig,
        ids: Vocabulary,
        stops: frozenset[int],
        tokenizer: Any,
        longest: int,
        sampling: Sampling | None,
    ) -> Engine:
        """A model behind its url, after a probe of the server. Raises ConfigError if it is not what was declared.

        `sampling`: how it will write; None: it scores.
        """
        from fire_data.http_engine import HttpEngine

        if self._engines.get(who, ("", None))[0] != cfg.model:
            assert cfg.url is not None
            self.end(who)
            made = HttpEngine(
                cfg.url, cfg.served_name or cfg.model, model=cfg.model, settings=self.run.config.http,
                api_key=_secret(cfg), vocabulary=ids, stop_ids=stops,
                entropy_topk=self.run.config.score.entropy_topk, who=who, warn=self.report.warn,
            )  # fmt: skip
            self.report.busy(f"probing the server of {who}")
            try:
                self.probes[who] = made.probe(tokenizer, longest, sampling)
            except FireError:
                made.close()
                raise
            self._engines[who] = (cfg.model, made)
        return self._engines[who][1]


def _secret(cfg: ModelConfig) -> str | None:
    """The key of a model's server, from the environment. Raises ConfigError if the variable is not set."""
    if cfg.api_key_env is None:
        return None
    value = os.environ.get(cfg.api_key_env)
    if not value:
        text = f"the environment variable {cfg.api_key_env} is not set"
        raise ConfigError(text, where=f"api_key_env of {cfg.model}", fix=f"export {cfg.api_key_env}=KEY")
    return value


def called(teacher: str) -> str:
    """What messages call a model."""
    return teacher if teacher in (TEACHER, "student", "base") else f"teacher {teacher}"
