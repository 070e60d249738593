"""A run directory: its configuration, where each stage lies, and its tables as LazyFrames.

`fire_data.open_run("runs/demo")` is the Python entry. Every file handed out was compared with its receipt first,
because Polars reads most single-bit flips in a Parquet file as other numbers without an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import polars as pl

from fire_data.schemas.config import Config, ModelConfig, load_config
from fire_data.schemas.errors import ConfigError, DataError, IncompleteError
from fire_data.shards import Part, is_sealed, sealed, verify_shard

STAGES = ("rollouts", "scores", "weights", "checkpoints")


@dataclass(frozen=True)
class Run:
    """One run directory with its validated configuration."""

    root: Path
    config: Config

    def part(self, stage: str, round: int | str, name: str | None = None) -> Part:
        """Where a stage of a round lies; weights have a name, by default the one that is trained."""
        if stage == "weights":
            name = name or self.config.trained_weights
        return Part(self.root, stage, round, name)

    def rollouts(self, round: int | None = None) -> pl.LazyFrame:
        """What the student wrote, one row per trajectory; `round` None: all sealed rounds."""
        return self._scan("rollouts", round)

    def scores(self, round: int | None = None) -> pl.LazyFrame:
        """Rollouts with the signals of student and teacher, one list element per response token, in nats."""
        return self._scan("scores", round)

    def weights(self, name: str | None = None, round: int | None = None) -> pl.LazyFrame:
        """Scores joined row by row with the weights called `name` (default: those that are trained).

        Raises DataError if the two tables are not about the same trajectories.
        """
        frames = []
        for number in [round] if round is not None else self._sealed_rounds("weights", name):
            weights = self._scan("weights", number, name)
            scores = self._scan("scores", number)
            mine, theirs = (f.select("trajectory_id").collect()["trajectory_id"] for f in (weights, scores))
            if not mine.equals(theirs):
                part = self.part("weights", number, name)
                raise DataError(
                    "weights and scores are about different trajectories", where=part.label, fix=part.command
                )
            frames.append(pl.concat([scores, weights.drop("trajectory_id")], how="horizontal"))
        return pl.concat(frames, how="diagonal")  # optional columns may differ between rounds

    def evals(self) -> pl.LazyFrame:
        """All evaluations, with a column `round` (-1: the student before training)."""
        frames = []
        for number in [-1, *self.rounds()]:
            part = self.part("evals", "start" if number < 0 else number)
            if is_sealed(part):
                files = [verify_shard(part, r) for r in sealed(part).shards]
                frames.append(pl.scan_parquet(files, glob=False).with_columns(round=pl.lit(number, dtype=pl.Int32)))
        if not frames:
            raise IncompleteError("there is no evaluation yet", where=str(self.root), fix=f"fire eval {self.root}")
        return pl.concat(frames)

    def rounds(self) -> list[int]:
        """The rounds that were started, in order."""
        folder = self.root / ".fire" / "manifests"
        names = {p.stem for p in folder.rglob("round-*.json")} if folder.is_dir() else set()
        return sorted(int(n.removeprefix("round-")) for n in names if n.removeprefix("round-").isdigit())

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
        return self.config.student.model_copy(update={"model": str(folder), "revision": None})

    def teacher(self) -> ModelConfig:
        """The teacher's configuration. Raises ConfigError if there is none."""
        if self.config.teacher is None:
            raise ConfigError(
                "there is no teacher", where=str(self.root / "fire.yaml"), fix="--set teacher.model=FOLDER"
            )
        return self.config.teacher

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


def open_run(path: str | Path, overrides: tuple[str, ...] = ()) -> Run:
    """Open a run directory. `overrides` are `a.b=c` as with --set. Raises ConfigError if it is not one."""
    root = Path(path)
    return Run(root, load_config(root / "fire.yaml", overrides))
