"""The sealed tables of a round, one shard at a time: rollouts or scores, with the weights of one name beside them.

What is not there is left out of the rows, so that a report can be made of a run that has only come so far.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import polars as pl

from fire_data.run import Run
from fire_data.schemas.errors import DataError
from fire_data.schemas.manifest import Manifest
from fire_data.schemas.tables import REWARD
from fire_data.shards import Part, is_sealed, read_shard, sealed


@dataclass(frozen=True)
class Tables:
    """A round's rows. `rows` is the part that holds them; `weights` and `reward` lie row by row beside it."""

    round: int
    rows: tuple[Part, Manifest]
    weights: tuple[Part, Manifest] | None = None
    reward: tuple[Part, Manifest] | None = None

    @property
    def scored(self) -> bool:
        return self.rows[0].stage == "scores"

    @property
    def name(self) -> str | None:
        """The name of the weights."""
        return self.weights[0].name if self.weights else None

    def __len__(self) -> int:
        return len(self.rows[1].shards)

    @property
    def trajectories(self) -> int:
        return sum(r.rows for r in self.rows[1].shards)

    @property
    def tokens(self) -> int:
        return sum(r.tokens for r in self.rows[1].shards)

    def read(self, shard: int, columns: Iterable[str]) -> pl.DataFrame:
        """The rows of a shard with those of the columns that are there. Raises DamagedError and DataError."""
        wanted = ["trajectory_id", *columns]
        frame = _read(*self.rows, shard, wanted)
        for beside in (self.weights, self.reward):
            if beside is None:
                continue
            other = _read(*beside, shard, wanted)
            part = beside[0]
            if not other["trajectory_id"].equals(frame["trajectory_id"]):
                text = f"{part.stage} and {self.rows[0].stage} are about different trajectories"
                raise DataError(text, where=f"{part.label}, shard {shard}", fix=f"{part.command} --redo")
            frame = frame.with_columns(other.drop("trajectory_id").get_columns())
        return frame


def open_tables(run: Run, round: int, name: str | None = None) -> Tables:
    """What there is of a round. `name` None: the weights that are trained, where they are sealed.

    Raises IncompleteError, with the command that makes them, if there are no rollouts, or no weights of a given name.
    """
    scores, weights = run.part("scores", round), run.part("weights", round, name)
    if not is_sealed(scores) and name is None:
        part = run.part("rollouts", round)
        return Tables(round, (part, sealed(part)))
    beside = (weights, sealed(weights)) if name is not None or is_sealed(weights) else None
    reward = run.addon(round, REWARD) if REWARD in run.addons(round) else None
    return Tables(round, (scores, sealed(scores)), beside, reward)


def _read(part: Part, manifest: Manifest, shard: int, columns: list[str]) -> pl.DataFrame:
    frame = pl.from_arrow(read_shard(part, manifest.shards[shard], [], optional=columns))
    assert isinstance(frame, pl.DataFrame)
    return frame
