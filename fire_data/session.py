"""Models and tokenizers of one process, loaded when first needed and shared by the stages that run in it.

Tokenizers are loaded for the fingerprints of a stage; weights not before a shard is missing.
"""

from __future__ import annotations

import functools
import gc
import os
import threading
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from fire_data import chat, vocabulary
from fire_data.run import Run
from fire_data.schemas.config import TEACHER, ModelConfig, RayConfig
from fire_data.schemas.errors import ConfigError, FireError, TokenizerError
from fire_data.schemas.manifest import Manifest, digest
from fire_data.shards import Part, read_manifest, verify_file
from fire_data.stages import Reporter, Silent
from fire_data.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fire_data.engines import Engine
    from fire_data.ray_cluster import Cluster
    from fire_data.ray_engine import RayEngine
    from fire_data.sampling import Sampling

P = ParamSpec("P")
T = TypeVar("T")


def _one_at_a_time(method: Callable[Concatenate[Session, P], T]) -> Callable[Concatenate[Session, P], T]:
    """A method that holds the session's lock."""

    @functools.wraps(method)
    def run(session: Session, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with session.lock:
            return method(session, *args, **kwargs)

    return run


class Session:
    """What the stages of one run share in one process."""

    def __init__(self, run: Run, report: Reporter | None = None, ray: RayConfig | None = None) -> None:
        """`ray`: place engines on this cluster instead of running them here."""
        self.run = run
        self._ray = ray
        self._cluster: Cluster | None = None
        self.report = report or Silent()
        self._models: dict[str, tuple[str, Any]] = {}
        self._tokenizers: dict[str, Any] = {}
        self._comparisons: dict[str, vocabulary.Comparison] = {}
        self._engines: dict[str, tuple[str, Engine]] = {}
        self._verified: set[str] = set()
        # Shards that are made in threads must not do some things at the same time: open a model, render a prompt.
        self.lock = threading.RLock()
        self.place = ""  # marks the logs of a session on a node of a cluster
        self.probes: dict[str, dict[str, Any]] = {}
        if run.config.threads:
            import torch

            torch.set_num_threads(run.config.threads)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        """End what lives outside of this process."""
        self._end(*self._engines)
        if self._cluster is not None:
            self._cluster.close()
            self._cluster = None

    def places(self, engine: str) -> bool:
        """True if this engine runs on the workers of a cluster; a server needs no worker to be asked."""
        return self._ray is not None and engine != "http"

    @property
    def workers(self) -> int:
        """How many engines the cluster has room for."""
        return self._connected().workers

    def _connected(self) -> Cluster:
        from fire_data.ray_cluster import connect

        if self._cluster is None:
            self.report.start("connecting to Ray", 1, "cluster")
            engines = (self.run.config.rollout.engine, self.run.config.score.engine)
            gpus = self.run.config.vllm.tensor_parallel_size if "vllm" in engines else 1
            self._cluster = connect(self._ray or RayConfig(), threads=self.run.config.threads, gpus=gpus)
        return self._cluster

    @_one_at_a_time
    def placed(self, who: str, arguments: dict[str, Any], depth: int) -> RayEngine:
        """Engines on all workers of the cluster, by `fire_data.steps.engines.remote` with these arguments.

        They take the place of those of any other model: a worker has room for one.
        """
        from fire_data.ray_engine import RayEngine, Recipe

        key = digest(arguments)
        if self._engines.get(who, ("", None))[0] != key:
            self._end(*(name for name, (_, engine) in self._engines.items() if isinstance(engine, RayEngine)))
            self.report.start(f"placing {called(who)} on {self.workers} workers", 1, "model")
            recipe = Recipe("fire_data.steps.engines:remote", arguments, (arguments["root"],))
            made = RayEngine(self._connected(), recipe, report=self.report, depth=depth)
            self._engines[who] = (key, made)
        found = self._engines[who][1]
        assert isinstance(found, RayEngine)
        return found

    @cached_property
    def tokenizer(self) -> Any:
        """The student's tokenizer."""
        from fire_data import models

        return models.load_tokenizer(self.run.config.student, self.run.root)

    def teacher_tokenizer(self, name: str) -> Any:
        """A teacher's tokenizer."""
        from fire_data import models

        if name not in self._tokenizers:
            self._tokenizers[name] = models.load_tokenizer(self.run.teacher(name), self.run.root)
        return self._tokenizers[name]

    def comparison(self, name: str) -> vocabulary.Comparison:
        """The student's and a teacher's tokenizers compared; TokenizerError if an id means different bytes."""
        if name not in self._comparisons:
            found = vocabulary.compare(self.tokenizer, self.teacher_tokenizer(name))
            student, teacher = self.run.config.student.model, self.run.teacher(name).model
            vocabulary.require_compatible(found, f"student {student}, {called(name)} {teacher}")
            for warning in found.warnings:
                self.report.warn(warning)
            self._comparisons[name] = found
        return self._comparisons[name]

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The ids that may be sampled, share the probability and are trained: those all models have."""
        from fire_data import models

        cfg, teachers = self.run.config, self.run.teachers
        # The student is trained here, whoever runs it while it writes.
        models.check_model_files(cfg.student, self.run.root, weights=cfg.rollout.engine != "fake")
        for name, teacher in teachers.items():
            weights = cfg.score.engine != "fake" and teacher.url is None
            models.check_model_files(teacher, self.run.root, weights=weights)
            self.comparison(name)  # raises if the tokenizers do not fit together
        tokenizers = [self.tokenizer, *map(self.teacher_tokenizer, teachers)]
        rows = [models.output_rows(model, self.run.root) for model in (cfg.student, *teachers.values())]
        return vocabulary.shared_vocabulary(*tokenizers, rows=rows)

    @cached_property
    def base_tokenizer(self) -> Any:
        """The reference model's tokenizer."""
        from fire_data import models

        base = self.run.base()
        return self.tokenizer if base is self.run.config.student else models.load_tokenizer(base, self.run.root)

    @cached_property
    def base_ids(self) -> Vocabulary:
        """All ids the reference model can read. Raises TokenizerError if one has another meaning for the student."""
        from fire_data import models

        cfg, base, tokenizer = self.run.config, self.run.base(), self.base_tokenizer
        if base is not cfg.student:
            models.check_model_files(base, self.run.root, weights=cfg.score.engine != "fake" and base.url is None)
            found = vocabulary.compare(self.tokenizer, tokenizer)
            if found.conflicts or not found.shared:
                text = "the base model's tokenizer gives ids another meaning than the student's"
                fix = "--set base.model=MODEL, one with the student's tokenizer"
                raise TokenizerError(text, where=base.model, fix=fix)
        return vocabulary.shared_vocabulary(tokenizer, rows=[models.output_rows(base, self.run.root)])

    @cached_property
    def base_vocabulary(self) -> Vocabulary:
        """The ids that share the probability under the reference model: of those of all models, what it has too."""
        size = min(self.vocabulary.size, self.base_ids.size)
        return Vocabulary(size, self.vocabulary.allowed[:size] & self.base_ids.allowed[:size])

    def teacher_vocabulary(self, name: str) -> Vocabulary:
        """All ids of a teacher: what it may write itself."""
        from fire_data import models

        rows = models.output_rows(self.run.teacher(name), self.run.root)
        return vocabulary.shared_vocabulary(self.teacher_tokenizer(name), rows=[rows])

    @cached_property
    def vocabulary_fields(self) -> dict[str, Any]:
        """The vocabulary for a fingerprint: what the student's ids mean and which of them may be used.

        A teacher enters only by the ids it lacks: one that has them all may be added after the rollouts.
        """
        allowed = digest(self.vocabulary.allowed.nonzero()[0].tolist())
        return {"tokenizer": vocabulary.fingerprint(self.tokenizer), "size": self.vocabulary.size, "allowed": allowed}

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end a response."""
        from fire_data import models

        return models.stop_ids(self.run.config.student, self.run.root, self.tokenizer)

    def student_fields(self, round: int) -> dict[str, Any]:
        """The model that writes in a round, for a fingerprint: its weights and how they are used."""
        cfg = self.run.student(round)
        if round == 0:
            return {"weights": self._fingerprint(cfg), "dtype": cfg.dtype}
        manifest = read_manifest(self.run.part("checkpoints", round - 1))
        assert manifest is not None
        return {"weights": f"checkpoint:{manifest.digest}", "dtype": cfg.dtype}

    def teacher_fields(self, name: str) -> dict[str, Any]:
        """A teacher, for a fingerprint: its weights, its tokenizer, and how it is told what to answer."""
        cfg = self.run.teacher(name)
        own = self.run.config.score.teacher_prompt == "own"
        return {
            "weights": self._fingerprint(cfg),
            "dtype": cfg.dtype,
            "tokenizer": vocabulary.fingerprint(self.teacher_tokenizer(name)),
            "template": self.template_fields(name) if own else "shared",
            **({"system": cfg.system} if cfg.system is not None else {}),
            **({"served": True} if cfg.url is not None else {}),
        }

    def base_fields(self) -> dict[str, Any]:
        """The reference model, for a fingerprint."""
        cfg = self.run.base()
        return {"weights": self._fingerprint(cfg), "dtype": cfg.dtype}

    def performance(self, section: str) -> dict[str, Any]:
        """Settings of a section that change bytes at most, never the meaning: recorded in manifests."""
        import torch

        config = self.run.config
        record = {"threads": torch.get_num_threads(), section: getattr(config, section).performance()}
        if self._ray is not None:
            record["threads"] = config.threads or 1
        engine = getattr(config, section).engine if section in ("rollout", "score") else None
        return {**record, "vllm": config.vllm.performance()} if engine == "vllm" else record

    def template_fields(self, teacher: str | None = None) -> str:
        """The chat template that the student, or a teacher, renders with, for a fingerprint."""
        if teacher is not None:
            cfg = self.run.teacher(teacher)
            return chat.template_fingerprint(self.teacher_tokenizer(teacher), cfg, self.run.root, False)
        cfg = self.run.config.student
        return chat.template_fingerprint(self.tokenizer, cfg, self.run.root, self.run.config.rollout.raw)

    def student(self, round: int) -> PreTrainedModel:
        """The model that writes in a round, loaded for inference; its bytes are verified if it is a checkpoint."""
        key = self.student_fields(round)["weights"]
        if self._models.get("student", ("", None))[0] != key:
            self.verify_student(round)
        return self._load("student", key, self.run.student(round))

    def verify_student(self, round: int) -> None:
        """Raise DamagedError if the model that writes in a round is a checkpoint with a file that was changed."""
        if round == 0:
            return
        part = self.run.part("checkpoints", round - 1)
        manifest = read_manifest(part)
        if manifest is not None and manifest.digest not in self._verified:
            verify_checkpoint(part, manifest)
            self._verified.add(manifest.digest)

    def teacher(self, name: str) -> PreTrainedModel:
        """A teacher, loaded for inference."""
        cfg = self.run.teacher(name)
        return self._load(name, self._fingerprint(cfg), cfg)

    def base(self) -> PreTrainedModel:
        """The reference model, loaded for inference; the student where that is the same."""
        cfg, key, given = self.run.base(), self.base_fields()["weights"], self.run.config.student
        same = self._models.get("student", ("", None))[0] == key and (cfg.dtype, cfg.device) == (
            given.dtype,
            given.device,
        )
        return self._load("student" if same else "base", key, cfg)

    @_one_at_a_time
    def process(self, who: str, cfg: ModelConfig, ids: Vocabulary, stops: frozenset[int], longest: int) -> Engine:
        """A model in a vllm process, which lives on and is given new weights where only those changed.

        `longest`: tokens of prompt and response together.
        """
        from fire_data import models
        from fire_data.vllm_engine import VllmEngine

        folder, key = models.local_folder(cfg, self.run.root), self._fingerprint(cfg)
        positions = getattr(models.model_config(cfg, self.run.root), "max_position_embeddings", None)
        if positions:  # vllm refuses to make room for more than the model was made for
            longest = min(longest, positions - 1)
        known, engine = self._engines.get(who, ("", None))
        assert engine is None or isinstance(engine, VllmEngine)
        if engine is not None and known != key:
            self.report.start(f"loading {who}", 1, "model")
            engine.load(folder)
            self._engines[who] = (key, engine)
        elif engine is None:
            self.report.start(f"starting vllm for {who}", 1, "model")
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
            self._end(who)
            made = HttpEngine(
                cfg.url, cfg.served_name or cfg.model, model=cfg.model, settings=self.run.config.http,
                api_key=_secret(cfg), vocabulary=ids, stop_ids=stops,
                entropy_topk=self.run.config.score.entropy_topk, who=who, warn=self.report.warn,
            )  # fmt: skip
            self.report.start(f"probing the server of {who}", 1, "server")
            try:
                self.probes[who] = made.probe(tokenizer, longest, sampling)
            except FireError:
                made.close()
                raise
            self._engines[who] = (cfg.model, made)
        return self._engines[who][1]

    def release(self, *who: str) -> None:
        """Forget loaded models and end engines (all, if none is named), and give their memory back."""
        self._end(*(who or tuple(self._engines)))
        self.forget(*(who or tuple(self._models)))

    def _end(self, *who: str) -> None:
        for name in who:
            _, engine = self._engines.pop(name, ("", None))
            if engine is not None:
                engine.close()

    def forget(self, *who: str) -> None:
        """Give the memory of models back that were loaded here; engines in processes of their own live on."""
        there = [name for name in who if self._models.pop(name, None) is not None]
        if not there:
            return
        gc.collect()
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def rest(self, *who: str) -> None:
        """As `release`, for what holds an accelerator that others need: in main memory a model may stay."""
        from fire_data.models import resolve_device

        names = who or (*self._models, *self._engines)
        configs = {"student": self.run.config.student, "base": self.run.base(), **self.run.teachers}
        for name in dict.fromkeys(names):
            _, engine = self._engines.get(name, ("", None))
            if name in self._models and resolve_device(configs[name].device).type != "cpu":
                self.forget(name)
            if engine is not None and engine.holds_gpu:
                self._end(name)

    @_one_at_a_time
    def _load(self, who: str, key: str, cfg: ModelConfig) -> PreTrainedModel:
        from fire_data import models

        if self._models.get(who, ("", None))[0] != key:
            self.forget(who)
            self.report.start(f"loading {called(who)}", 1, "model")
            self._models[who] = (key, models.load_model(cfg, self.run.root))
        model: PreTrainedModel = self._models[who][1]
        return model

    def _fingerprint(self, cfg: ModelConfig) -> str:
        from fire_data import models

        return models.model_fingerprint(cfg, self.run.root, self._cache)

    @property
    def _cache(self) -> Path:
        return self.run.root / ".fire" / "model-hashes.json"


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


def verify_checkpoint(part: Part, manifest: Manifest | None) -> None:
    """Raise DamagedError if a file of a checkpoint is not what its manifest says."""
    for receipt in manifest.shards if manifest else ():
        verify_file(part, part.folder / receipt.shard, receipt)
