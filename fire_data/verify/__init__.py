"""Verifiers: from a response to a reward. Text, maths, multiple choice, code in a sandbox, or a function of your own.

Whatever might not end, a regular expression included, runs in a process that can be killed. A response that takes too
long or too much memory gets reward 0 and says so in its verdict. What is not installed, not allowed on this machine or
wrong in a user's function is an error, not a reward.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fire_data import pyfile
from fire_data.schemas.errors import ConfigError, DataError
from fire_data.verify import choice, program
from fire_data.verify.answers import UNGRADED, Graded, compile_pattern, exact, extract, grade, grade_exact
from fire_data.verify.estimates import maj_at_k, mean, pass_at_k
from fire_data.verify.pool import Pool
from fire_data.verify.sandbox import FILES_MB, OUTPUT_MB, PROCESSES, Isolation

if TYPE_CHECKING:
    from fire_data.schemas.config import VerifyConfig

__all__ = [
    "Graded", "Verifier", "compile_pattern", "exact", "extract", "grade", "maj_at_k", "mean", "pass_at_k", "tally",
]  # fmt: skip

_BATCH = {"exact": 1024, "choice": 1024, "math": 32, "code": 4}
_GRACE_S = 10.0  # beside what a sandbox watches itself


class Verifier:
    """Grades responses as the section `verify` says. Processes are started when needed and end with the `with` block.

    Raises ConfigError for a pattern that is no regular expression, or a file that is not there.
    """

    def __init__(self, cfg: VerifyConfig, root: Path, kind: str | None = None) -> None:
        """`root`: the folder that a function's file is relative to. `kind`: another one than the configuration's."""
        self.kind = cfg.kind if kind is None else kind
        self.cfg = cfg
        compile_pattern(cfg.pattern)
        self._file = str(root / self.kind.rpartition(":")[0]) if ".py:" in self.kind else None
        self._code = pyfile.source(self._file, "grading function")[1] if self._file else None
        self._pool: Pool | None = None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.close()
        if self._scratch is not None:
            self._scratch.cleanup()

    def doubt(self, rewards: Sequence[float | None]) -> str | None:
        """A word on rewards that are all 0 because whole responses were compared with the answer; None otherwise."""
        if self.kind != "exact" or self.cfg.pattern is not None or not rewards or any(rewards):
            return None
        return "nothing is right: verify.pattern is null, so the whole response is compared with the answer"

    @property
    def compares(self) -> bool:
        """True if a response is compared with the prompt's `answer`."""
        return self.kind in ("exact", "math", "choice")

    @property
    def fields(self) -> dict[str, Any]:
        """What the rewards depend on, for a fingerprint. Paths, library versions and the machine are not part of it."""
        cfg = self.cfg
        seconds = {"timeout_s": cfg.timeout_s}
        if self.kind == "exact":
            # Manifests without a time limit were made under the default.
            usual = type(cfg).model_fields["timeout_s"].default
            return {"pattern": cfg.pattern, **(seconds if cfg.timeout_s != usual else {})}
        if self.kind == "choice":
            return {"kind": self.kind, "pattern": cfg.pattern, **seconds}
        limits = {**seconds, "memory_mb": cfg.memory_mb}
        if self.kind == "math":
            return {"kind": self.kind, "pattern": cfg.pattern, **limits}
        if self.kind == "code":
            most = {"processes": PROCESSES, "files_mb": FILES_MB, "output_mb": OUTPUT_MB}
            return {"kind": self.kind, **limits, **most}
        return {"kind": "function", "name": self.kind.rpartition(":")[2], "code": self._code, **limits}

    @property
    def recorded(self) -> dict[str, Any]:
        """What is worth knowing of how it was done: the kind, versions of libraries, how code was kept in."""
        libraries = ("math-verify", "latex2sympy2_extended", "sympy") if self.kind == "math" else ()
        versions = {name: metadata.version(name) for name in libraries} if self._pool is not None else {}
        return {"kind": self.kind, **versions, **(self._pool.facts if self._pool is not None else {})}

    def start(self) -> list[str]:
        """Start what grading needs, so that what is missing is told before hours of work. Returns warnings.

        Raises ConfigError: math-verify is not installed, the function's file is wrong, or code cannot be kept from the
        network here.
        """
        if not self._needs_process or self._pool is not None:
            return []
        cfg = self.cfg
        self._scratch = tempfile.TemporaryDirectory(prefix="fire-verify-") if self.kind == "code" else None
        recipe = {
            "kind": f"{self._file}:{self.kind.rpartition(':')[2]}" if self._file else self.kind,
            "pattern": cfg.pattern, "timeout_s": cfg.timeout_s, "memory_mb": cfg.memory_mb,
            "scratch": self._scratch.name if self._scratch else None,
        }  # fmt: skip
        self._pool = Pool(
            recipe, workers=cfg.workers or os.cpu_count() or 1, batch=_BATCH.get(self.kind, 16),
            seconds=cfg.timeout_s + (_GRACE_S if self.kind == "code" else 0),
        )  # fmt: skip
        self._pool.start()
        return self._weaknesses(Isolation(*self._pool.facts["isolation"])) if self.kind == "code" else []

    def _weaknesses(self, found: Isolation) -> list[str]:
        if not found.network and not self.cfg.allow_unsafe:
            raise ConfigError(
                "this machine allows neither namespaces nor a filter of system calls: code could reach the network",
                where="verify.kind: code", fix="run it where it may, or trust it: --set verify.allow_unsafe=true",
            )  # fmt: skip
        weak = {
            "network": "it can reach the network",
            "files": "it can change your files",
            "processes": "it can signal your processes",
        }
        return [f"code is less isolated here than it should be: {weak[name]}" for name in found.missing]

    @property
    def _needs_process(self) -> bool:
        return self.kind not in ("exact", "choice") or self.cfg.pattern is not None

    def check(self, rows: Sequence[dict[str, Any]], where: str, fix: str) -> None:
        """Raise DataError naming the first of these prompts that this verifier could not grade a response to."""
        for row in rows:
            reason = self.reason(row["answer"], row["extra"])
            if reason is not None:
                raise DataError(f"prompt {row['prompt_id']!r} {reason}", where=where, fix=fix)

    def reason(self, answer: str | None, extra: str | None) -> str | None:
        """Why responses to a prompt cannot be graded, behind the prompt's name; None if they can."""
        if self.compares and answer is None:
            return "has no answer to compare with"
        if self.kind == "choice" and choice.gold(answer or "") is None:
            return f"has the answer {answer!r}, which is none of the letters A to E"
        if self.kind == "code":
            try:
                program.read_tests(extra)
            except program.NoTestsError as error:
                return str(error)
        return None

    def grade(self, texts: Sequence[str], answers: Sequence[str | None], extras: Sequence[str | None]) -> list[Graded]:
        """The verdict on every response, in order; those that have nothing to be compared with are ungraded.

        Args:
            answers: the prompts' right answers.
            extras: the prompts' other fields, as JSON.

        Raises:
            ConfigError: as `start`, and what a user's function raises.
        """
        results = [Graded(None, UNGRADED)] * len(texts)
        tasks = [
            (i, {"text": text, "answer": answer, "extra": extra})
            for i, (text, answer, extra) in enumerate(zip(texts, answers, extras, strict=True))
            if self.reason(answer, extra) is None
        ]
        for (i, _), graded in zip(tasks, self._graded([task for _, task in tasks]), strict=True):
            results[i] = graded
        return results

    def _graded(self, tasks: list[dict[str, Any]]) -> list[Graded]:
        if self._needs_process:
            if self._pool is None:
                self.start()
            assert self._pool is not None
            return self._pool.grade(tasks)
        if self.kind == "choice":
            return [choice.grade_choice(task["text"], task["answer"]) for task in tasks]
        return [grade_exact(task["text"].strip(), task["answer"]) for task in tasks]


def tally(verdicts: Sequence[str | None]) -> dict[str, int]:
    """How often each verdict was given."""
    return dict(sorted(Counter(v for v in verdicts if v is not None).items()))
