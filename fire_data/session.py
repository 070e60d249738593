"""Models and tokenizers of one process, loaded when first needed and shared by the stages that run in it.

Tokenizers are loaded for the fingerprints of a stage; weights not before a shard is missing.
"""

from __future__ import annotations

import gc
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fire_data import chat, vocabulary
from fire_data.run import Run
from fire_data.schemas.config import ModelConfig
from fire_data.schemas.errors import TokenizerError
from fire_data.schemas.manifest import Manifest, digest
from fire_data.shards import Part, read_manifest, verify_file
from fire_data.stages import Reporter, Silent
from fire_data.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Session:
    """What the stages of one run share in one process."""

    def __init__(self, run: Run, report: Reporter | None = None) -> None:
        self.run = run
        self.report = report or Silent()
        self._models: dict[str, tuple[str, Any]] = {}
        if run.config.threads:
            import torch

            torch.set_num_threads(run.config.threads)

    @cached_property
    def tokenizer(self) -> Any:
        """The student's tokenizer."""
        from fire_data import models

        return models.load_tokenizer(self.run.config.student, self.run.root)

    @cached_property
    def teacher_tokenizer(self) -> Any:
        """The teacher's tokenizer."""
        from fire_data import models

        return models.load_tokenizer(self.run.teacher(), self.run.root)

    @cached_property
    def comparison(self) -> vocabulary.Comparison:
        """Student's and teacher's tokenizers compared; raises TokenizerError if an id means different bytes."""
        found = vocabulary.compare(self.tokenizer, self.teacher_tokenizer)
        student, teacher = self.run.config.student.model, self.run.teacher().model
        vocabulary.require_compatible(found, f"student {student}, teacher {teacher}")
        for warning in found.warnings:
            self.report.warn(warning)
        return found

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The ids that may be sampled, share the probability and are trained: those all models have."""
        from fire_data import models

        cfg = self.run.config
        models.check_model_files(cfg.student, self.run.root, weights=cfg.rollout.engine != "fake")
        if cfg.teacher is not None:
            models.check_model_files(cfg.teacher, self.run.root, weights=cfg.score.engine != "fake")
            _ = self.comparison  # raises if the tokenizers do not fit together
        used = [cfg.student] + ([cfg.teacher] if cfg.teacher else [])
        tokenizers = [self.tokenizer] + ([self.teacher_tokenizer] if cfg.teacher else [])
        rows = [models.output_rows(model, self.run.root) for model in used]
        return vocabulary.shared_vocabulary(*tokenizers, rows=rows)

    @cached_property
    def base_ids(self) -> Vocabulary:
        """All ids the reference model can read. Raises TokenizerError if one has another meaning for the student."""
        from fire_data import models

        cfg, base = self.run.config, self.run.base()
        tokenizer = self.tokenizer
        if base is not cfg.student:
            models.check_model_files(base, self.run.root, weights=cfg.score.engine != "fake")
            tokenizer = models.load_tokenizer(base, self.run.root)
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

    @cached_property
    def teacher_vocabulary(self) -> Vocabulary:
        """All ids of the teacher: what it may write itself."""
        from fire_data import models

        rows = models.output_rows(self.run.teacher(), self.run.root)
        return vocabulary.shared_vocabulary(self.teacher_tokenizer, rows=[rows])

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

    def teacher_fields(self) -> dict[str, Any]:
        """The teacher, for a fingerprint."""
        cfg = self.run.teacher()
        return {"weights": self._fingerprint(cfg), "dtype": cfg.dtype}

    def base_fields(self) -> dict[str, Any]:
        """The reference model, for a fingerprint."""
        cfg = self.run.base()
        return {"weights": self._fingerprint(cfg), "dtype": cfg.dtype}

    def performance(self, section: str) -> dict[str, Any]:
        """Settings of a section that change bytes at most, never the meaning: recorded in manifests."""
        import torch

        return {"threads": torch.get_num_threads(), section: getattr(self.run.config, section).performance()}

    def template_fields(self, cfg: ModelConfig) -> str:
        """The chat template a model renders with, for a fingerprint."""
        tokenizer = self.teacher_tokenizer if cfg is self.run.config.teacher else self.tokenizer
        raw = cfg is self.run.config.student and self.run.config.rollout.raw
        return chat.template_fingerprint(tokenizer, cfg, self.run.root, raw)

    def student(self, round: int) -> PreTrainedModel:
        """The model that writes in a round, loaded for inference; its bytes are verified if it is a checkpoint."""
        key = self.student_fields(round)["weights"]
        if round > 0 and self._models.get("student", ("", None))[0] != key:
            part = self.run.part("checkpoints", round - 1)
            verify_checkpoint(part, read_manifest(part))
        return self._load("student", key, self.run.student(round))

    def teacher(self) -> PreTrainedModel:
        """The teacher, loaded for inference."""
        return self._load("teacher", self.teacher_fields()["weights"], self.run.teacher())

    def base(self) -> PreTrainedModel:
        """The reference model, loaded for inference; the student where that is the same."""
        cfg, key, given = self.run.base(), self.base_fields()["weights"], self.run.config.student
        same = self._models.get("student", ("", None))[0] == key and (cfg.dtype, cfg.device) == (
            given.dtype,
            given.device,
        )
        return self._load("student" if same else "base", key, cfg)

    def release(self, *who: str) -> None:
        """Forget loaded models (all, if none is named) and give their memory back."""
        there = [name for name in who or tuple(self._models) if self._models.pop(name, None) is not None]
        if not there:
            return
        gc.collect()
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _load(self, who: str, key: str, cfg: ModelConfig) -> PreTrainedModel:
        from fire_data import models

        if self._models.get(who, ("", None))[0] != key:
            self.release(who)
            self.report.start(f"loading {who}", 1, "model")
            self._models[who] = (key, models.load_model(cfg, self.run.root))
        model: PreTrainedModel = self._models[who][1]
        return model

    def _fingerprint(self, cfg: ModelConfig) -> str:
        from fire_data import models

        return models.model_fingerprint(cfg, self.run.root, self._cache)

    @property
    def _cache(self) -> Path:
        return self.run.root / ".fire" / "model-hashes.json"


def verify_checkpoint(part: Part, manifest: Manifest | None) -> None:
    """Raise DamagedError if a file of a checkpoint is not what its manifest says."""
    for receipt in manifest.shards if manifest else ():
        verify_file(part, part.folder / receipt.shard, receipt)
