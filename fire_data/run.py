"""A run directory: its configuration, where each stage lies, and its tables as LazyFrames.

`fire_data.open_run("runs/demo")` is the Python entry. Every file handed out was compared with its receipt first,
because Polars reads most single-bit flips in a Parquet file as other numbers without an error.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from fire_data.rules import Rule, make_rule, own
from fire_data.schemas.config import ADDED_TEACHER, TEACHER, Config, ModelConfig, load_config
from fire_data.schemas.errors import ConfigError, DataError, IncompleteError
from fire_data.schemas.manifest import Manifest
from fire_data.schemas.tables import ADDONS, REWARD, added_by, addon_of
from fire_data.shards import Part, is_sealed, read_manifest, sealed, started_names, verify_shard

STAGES = ("rollouts", "scores", "addons", "weights", "checkpoints")


@dataclass(frozen=True)
class Run:
    """One run directory with its validated configuration."""

    root: Path
    config: Config

    def part(self, stage: str, round: int | str, name: str | None = None) -> Part:
        """Where a stage of a round lies; addons have a name, and weights, by default `lineage`."""
        if stage == "weights":
            name = name or self.lineage(round)
        return Part(self.root, stage, round, name)

    def lineage(self, round: int | str) -> str:
        """The weights that a round's student was trained on; before it is trained, those that will be."""
        try:
            checkpoint = read_manifest(Part(self.root, "checkpoints", round))
        except DataError:  # damaged: `fire check` tells
            checkpoint = None
        return str((checkpoint.fields.get("weights") if checkpoint else None) or self.config.trained_weights)

    def rollouts(self, round: int | None = None) -> pl.LazyFrame:
        """What the student wrote, one row per trajectory; `round` None: all sealed rounds."""
        return self._scan("rollouts", round)

    def scores(self, round: int | None = None, add: str | Iterable[str] = ()) -> pl.LazyFrame:
        """Rollouts with the signals of student and teacher, one list element per response token, in nats.

        Args:
            round: None: all sealed rounds.
            add: addons whose columns are joined row by row: "topk", "base", "pass-rate", "reward" (in place of the
                rollouts' own), "teacher.NAME".

        Raises:
            IncompleteError: an addon is not there, with the command that adds it.
            DataError: the tables are not about the same trajectories.
        """
        numbers = [round] if round is not None else self._sealed_rounds("scores", None)
        # Columns that only some engines give may differ between rounds.
        return pl.concat([self._scores(number, add) for number in numbers], how="diagonal")

    def weights(self, name: str | None = None, round: int | None = None, add: str | Iterable[str] = ()) -> pl.LazyFrame:
        """Scores joined row by row with the weights called `name` (default: those that are trained).

        Arguments and errors as for `scores`.
        """
        frames = []
        for number in [round] if round is not None else self._sealed_rounds("weights", name):
            weights = self._scan("weights", number, name)
            part = self.part("weights", number, name)
            frames.append(_beside(self._scores(number, add), weights, part, part.command))
        return pl.concat(frames, how="diagonal")  # optional columns may differ between rounds

    def addon(self, round: int, name: str) -> tuple[Part, Manifest]:
        """Where an addon lies, and its manifest: sealed, and made for the rollouts of this round's scores.

        Raises as `scores`, and ConfigError if there is no addon of this name.
        """
        if name not in self.addon_names:
            text = f"there are no further columns {name!r}; there are: {', '.join(self.addon_names)}"
            raise ConfigError(text, fix=added_by(self.addon_names[0], shlex.quote(str(self.root))))
        part = self.part("addons", round, name)
        manifest, scores = sealed(part), sealed(self.part("scores", round))
        if manifest.fields["rollouts"] != scores.fields["rollouts"]:
            text = "the columns were made for other rollouts than the scores"
            raise DataError(text, where=part.label, fix=f"{part.command} --redo")
        return part, manifest

    def addons(self, round: int) -> tuple[str, ...]:
        """The names of a round's sealed addons."""
        return tuple(name for name in self.addon_names if is_sealed(self.part("addons", round, name)))

    @property
    def addon_names(self) -> tuple[str, ...]:
        """Every addon that this run can have: the fixed groups, then one for each teacher."""
        return (*ADDONS, *(f"{ADDED_TEACHER}{name}" for name in self.teachers))

    def evals(self) -> pl.LazyFrame:
        """All evaluations, with columns `round` (-1: the student before training) and `benchmark` (null: no name)."""
        frames = []
        for part in self.evaluations():
            number = part.round if isinstance(part.round, int) else -1
            files = [verify_shard(part, r) for r in sealed(part).shards]
            told = {"round": pl.lit(number, dtype=pl.Int32), "benchmark": pl.lit(part.name, dtype=pl.String)}
            frames.append(pl.scan_parquet(files, glob=False).with_columns(**told))
        if not frames:
            raise IncompleteError("there is no evaluation yet", where=str(self.root), fix=f"fire eval {self.root}")
        return pl.concat(frames, how="diagonal")  # older ones have fewer columns

    def evaluations(self) -> list[Part]:
        """Every sealed evaluation: the start first, then by round; of a round, the one without a name first."""
        benchmarks = [None, *self.names("evals")]
        rounds: list[int | str] = ["start", *self.rounds()]
        parts = [self.part("evals", number, name) for number in rounds for name in benchmarks]
        return [part for part in parts if is_sealed(part)]

    def names(self, stage: str) -> list[str]:
        """The folders under `addons/`, `weights/` or `evals/` that were started."""
        return started_names(self.root, stage)

    def rounds(self) -> list[int]:
        """The rounds that were started, in order."""
        folder = self.root / ".fire" / "manifests"
        names = {p.stem for p in folder.rglob("round-*.json")} if folder.is_dir() else set()
        return sorted(int(n.removeprefix("round-")) for n in names if n.removeprefix("round-").isdecimal())

    def current_round(self) -> int:
        """The first round whose checkpoint is not sealed: what a stage command works on."""
        number = 0
        while is_sealed(self.part("checkpoints", number)):
            number += 1
        return number

    def last_round(self) -> int:
        """The newest round with sealed rollouts; 0 if there is none."""
        found = [n for n in self.rounds() if is_sealed(self.part("rollouts", n))]
        return found[-1] if found else 0

    def student(self, round: int) -> ModelConfig:
        """The model that writes in a round: the given student, then the checkpoint of the round before."""
        if round == 0:
            return self.config.student
        sealed(self.part("checkpoints", round - 1))
        folder = self.part("checkpoints", round - 1).folder.resolve()
        return self.config.student.model_copy(update={"model": str(folder), "revision": None, "served_name": None})

    def rule(self) -> Rule:
        """The configured rule; a file is named relative to the run. Raises ConfigError for what is no rule."""
        cfg, root = self.config.weigh, self.root.resolve()

        def here(text: str) -> str:
            return own.moved(text, lambda file: os.path.normpath(root / file))

        params = dict(cfg.params)
        if isinstance(params.get("match"), str):  # of the rule `random`: another rule
            params["match"] = here(params["match"])
        return make_rule(here(cfg.rule) if isinstance(cfg.rule, str) else cfg.rule, params, cfg.scope)

    def needed_addons(self) -> tuple[str, ...]:
        """The addons that a round needs: those of `score.add`, and what the rule reads. Raises as `rule`.

        Rewards are needed where the rollouts have none of their own (rollout.verifier: none).
        """
        rule = self.rule()
        columns = (*rule.columns, *(rule.matched.columns if rule.matched else ()))
        graded = self.config.rollout.verifier != "none"
        needed = [a for c in columns if (a := addon_of(c)) is not None and not (a == REWARD and graded)]
        return tuple(dict.fromkeys((*self.config.score.add, *self.combined, *needed)))

    def teacher_addons(self, names: str) -> tuple[str, ...]:
        """The addons of teachers named in a line, `math,code`, or of `all`. Raises ConfigError for an unknown one."""
        chosen = list(self.teachers) if names == "all" else [n.strip() for n in names.split(",")]
        for name in chosen:
            self.teacher(name)
        return tuple(f"{ADDED_TEACHER}{name}" for name in chosen)

    @property
    def combined(self) -> tuple[str, ...]:
        """The addons that `weigh.teacher` takes its teacher columns from; none if every row has its own teacher's."""
        chosen = self.config.weigh.teacher
        names = () if chosen == "routed" else (chosen,) if chosen in self.teachers else tuple(self.teachers)
        return tuple(f"{ADDED_TEACHER}{name}" for name in names)

    def base(self) -> ModelConfig:
        """The reference model of `base_logprob`: by default the given student, in every round."""
        return self.config.base or self.config.student

    @property
    def teachers(self) -> dict[str, ModelConfig]:
        """Every teacher by name; the one that has no name of its own is called "teacher"."""
        alone = {TEACHER: self.config.teacher} if self.config.teacher else {}
        return {**alone, **self.config.teachers}

    def teacher(self, name: str) -> ModelConfig:
        """A teacher's configuration. Raises ConfigError if there is none of this name."""
        if name not in self.teachers:
            there = ", ".join(self.teachers)
            text = f"there is no teacher {name!r}; there are: {there}" if there else "there is no teacher"
            key = "teacher.model" if name == TEACHER else f"teachers.{name}.model"
            raise ConfigError(text, where=str(self.root / "fire.yaml"), fix=f"--set {key}=FOLDER")
        return self.teachers[name]

    def route(self, value: str | None) -> str:
        """The name of the teacher for a prompt whose field `teacher` is this. With one teacher, it is that one.

        Raises ConfigError if none of several teachers has this name, or the prompt names none and there is no default.
        """
        if not self.config.teachers:
            self.teacher(TEACHER)
            return TEACHER
        if value is not None:
            return value if value == TEACHER else self._named(value)
        if self.config.teacher is None:
            text = f"a prompt names no teacher, and there are several: {', '.join(self.config.teachers)}"
            raise ConfigError(
                text,
                where="prompts, field `teacher`",
                fix="give every prompt one, or --set teacher.model=FOLDER for the rest",
            )
        return TEACHER

    def _named(self, value: str) -> str:
        if value not in self.config.teachers:
            text = f"a prompt names the teacher {value!r}; there are: {', '.join(self.config.teachers)}"
            fix = f"correct the prompts, or --set teachers.{value}.model=FOLDER"
            raise ConfigError(text, where="prompts, field `teacher`", fix=fix)
        return value

    def _scores(self, round: int, add: str | Iterable[str]) -> pl.LazyFrame:
        frame = self._scan("scores", round)
        for name in dict.fromkeys([add] if isinstance(add, str) else add):
            part, _ = self.addon(round, name)
            frame = frame.drop(REWARD) if name == REWARD else frame
            frame = _beside(frame, self._scan("addons", round, name), part, f"{part.command} --redo")
        return frame

    def _sealed_rounds(self, stage: str, name: str | None) -> list[int]:
        found = [n for n in self.rounds() if is_sealed(self.part(stage, n, name))]
        if not found:
            part = self.part(stage, 0, name)
            raise IncompleteError(f"there are no sealed {stage} yet", where=str(part.folder.parent), fix=part.command)
        return found

    def _scan(self, stage: str, round: int | None, name: str | None = None) -> pl.LazyFrame:
        files = []
        for number in [round] if round is not None else self._sealed_rounds(stage, name):
            part = self.part(stage, number, name)
            files += [verify_shard(part, r) for r in sealed(part).shards]
        return pl.scan_parquet(files, glob=False)


def _beside(scores: pl.LazyFrame, other: pl.LazyFrame, part: Part, fix: str) -> pl.LazyFrame:
    """Two tables of the same rows as one. Raises DataError if a row is not about the same trajectory in both."""
    mine, theirs = (f.select("trajectory_id").collect()["trajectory_id"] for f in (other, scores))
    if not mine.equals(theirs):
        raise DataError(f"{part.stage} and scores are about different trajectories", where=part.label, fix=fix)
    return pl.concat([scores, other.drop("trajectory_id")], how="horizontal")


def open_run(path: str | Path, overrides: tuple[str, ...] = ()) -> Run:
    """Open a run directory. `overrides` are `a.b=c` as with --set. Raises ConfigError if it is not one."""
    root = Path(path)
    return Run(root, load_config(root / "fire.yaml", overrides))
