"""Models and tokenizers of one process, loaded when first needed and shared by the stages that run in it.

Tokenizers are loaded for the fingerprints of a stage; weights not before a shard is missing.
"""

from __future__ import annotations

import gc
import threading
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fire_data import chat, vocabulary
from fire_data.outside import Outside, called
from fire_data.run import Run
from fire_data.schemas.config import ModelConfig, RayConfig
from fire_data.schemas.errors import TokenizerError
from fire_data.schemas.manifest import digest
from fire_data.shards import read_manifest, verify_checkpoint
from fire_data.stages import Reporter, Silent
from fire_data.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Follows(Protocol):
    """A tracker that is told of a run (`fire_data.steps.track`)."""

    def catch_up(self) -> None: ...
    def step(self, record: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


class Session:
    """What the stages of one run share in one process."""

    def __init__(self, run: Run, report: Reporter | None = None, ray: RayConfig | None = None) -> None:
        """`ray`: place engines on this cluster instead of running them here."""
        self.run = run
        self.report = report or Silent()
        self._models: dict[str, tuple[str, Any]] = {}
        self._tokenizers: dict[str, Any] = {}
        self._comparisons: dict[str, vocabulary.Comparison] = {}
        self._verified: set[str] = set()
        # Shards that are made in threads must not do some things at the same time: open a model, render a prompt.
        self.lock = threading.RLock()
        self.follower: Follows | None = None  # the tracker, from the first round that is trained here
        self.outside = Outside(run, self.report, self.lock, self._fingerprint, ray)
        if run.config.threads:
            import torch

            torch.set_num_threads(run.config.threads)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        """End what lives outside of this process."""
        self.outside.close()
        self.unfollow()

    def unfollow(self) -> None:
        """Let the tracker bring what it was told to where it goes. What comes later is told to another run of it."""
        if self.follower is not None:
            self.follower.close()
        self.follower = None

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
        if self.outside.ray is not None:
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

    def release(self, *who: str) -> None:
        """Forget loaded models and end engines (all, if none is named), and give their memory back."""
        self.outside.end(*(who or self.outside.names))
        self.forget(*(who or tuple(self._models)))

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

        names = who or (*self._models, *self.outside.names)
        configs = {"student": self.run.config.student, "base": self.run.base(), **self.run.teachers}
        for name in dict.fromkeys(names):
            if name in self._models and resolve_device(configs[name].device).type != "cpu":
                self.forget(name)
            if self.outside.holds_gpu(name):
                self.outside.end(name)

    def _load(self, who: str, key: str, cfg: ModelConfig) -> PreTrainedModel:
        from fire_data import models

        with self.lock:
            if self._models.get(who, ("", None))[0] != key:
                self.forget(who)
                self.report.busy(f"loading {called(who)}")
                self._models[who] = (key, models.load_model(cfg, self.run.root))
            model: PreTrainedModel = self._models[who][1]
        return model

    def _fingerprint(self, cfg: ModelConfig) -> str:
        from fire_data import models

        return models.model_fingerprint(cfg, self.run.root, self._cache)

    @property
    def _cache(self) -> Path:
        return self.run.root / ".fire" / "model-hashes.json"
