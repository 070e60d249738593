"""A finding of the diagnosis: what was measured, how serious it is, why it matters and what to do.

Numbers are rounded to six significant digits, because sums of floats by several threads may differ beyond that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import polars as pl

from fire_data.diagnose.measure import Measured

Level = Literal["problem", "warning", "note", "unknown", "ok"]
LEVELS: tuple[Level, ...] = ("problem", "warning", "note", "unknown", "ok")
"""In the order in which people should read them. `unknown`: could not be measured."""

FEW = 20  # trajectories: with fewer, single responses decide, so statistics are worth a note at most (a judgement)


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `numbers` is JSON-ready; `do` is empty if there is nothing to do."""

    name: str
    level: Level
    measured: str
    numbers: dict[str, Any]
    why: str
    do: str = ""


@dataclass(frozen=True)
class Weighed:
    """The sealed weights whose decisions are looked at, and whether their rule filters by a quantile."""

    name: str
    filters: bool


@dataclass(frozen=True)
class Facts:
    """What the tables do not say, from manifests and configuration; None where it is not known.

    `run` is how commands name the run. `sampling` holds temperature, top_p and top_k; `tokenizers` how the two compare;
    `templates` are the fingerprints of the student's and the teacher's chat template, the latter 'shared' if the
    teacher saw the student's prompt; `nonfinite_steps` were skipped by training because a number was not finite;
    `earlier` are summaries of earlier rounds, the oldest first.
    """

    run: str = "RUN"
    round: int = 0
    seed: int = 0
    batch_size: int | None = None
    sampling: Mapping[str, Any] | None = None
    vocabulary_size: int | None = None
    tokenizers: Mapping[str, Any] | None = None
    templates: tuple[str, str] | None = None
    dtypes: Mapping[str, str] = field(default_factory=dict)
    entropy_kind: str | None = None
    weighed: Weighed | None = None
    nonfinite_steps: int | None = None
    earlier: tuple[Mapping[str, Any], ...] = ()

    def again(self, stage: str, *settings: str) -> str:
        """The command that makes a stage of the round anew with other settings."""
        options = "".join(f" --set {s}" for s in settings)
        return f"fire {stage} {self.run} --round {self.round} --redo{options}"

    @property
    def verify(self) -> str:
        """The command that grades the responses of the round."""
        return f"fire verify {self.run} --round {self.round}"

    def compare(self, *rules: str) -> str:
        """The command that puts rules side by side on these scores."""
        return f"fire compare {self.run} --round {self.round} --rules {','.join(rules)}"


def finding(name: str, level: Level, measured: str, numbers: Mapping[str, Any], why: str, do: str = "") -> Finding:
    """A Finding with plain finite numbers; what is fine needs no advice."""
    return Finding(name, level, measured, {k: plain(v) for k, v in numbers.items()}, why, "" if level == "ok" else do)


def plain(value: Any) -> Any:
    """A value as JSON takes it: floats to six significant digits, None for what is not a number."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def text(value: float | None) -> str:
    """A number for a sentence: three significant digits, a dash for nothing."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def percent(share: float | None) -> str:
    """A share for a sentence."""
    return "-" if share is None or not math.isfinite(share) else f"{100 * share:.3g} %"


def share(part: float, whole: float) -> float | None:
    """`part / whole`; None of nothing."""
    return part / whole if whole else None


def grade(value: float | None, note: float, warning: float) -> Level:
    """Which of two thresholds a number reaches, larger being worse; no number is no finding."""
    if value is None or math.isnan(value):
        return "ok"
    return "warning" if value >= warning else "note" if value >= note else "ok"


def worst(*levels: Level) -> Level:
    """The most serious level; `unknown` counts for less than a note."""
    return min(levels, key=LEVELS.index)


def softened(level: Level, measured: Measured) -> Level:
    """A statistic over few trajectories is at most a note."""
    return "note" if level == "warning" and measured.rows.height < FEW else level


def mean(column: pl.Series) -> float | None:
    """The mean of what is not null; None of nothing."""
    value = column.cast(pl.Float64).mean()
    return float(value) if isinstance(value, float) else None


def total(column: pl.Series) -> float:
    """The sum of what is not null."""
    return float(column.cast(pl.Float64).sum())


def spearman(x: pl.Series, y: pl.Series) -> float | None:
    """Rank correlation of rows where both are there, ties sharing their mean rank; None if one of them is constant."""
    both = pl.DataFrame({"x": x.cast(pl.Float64), "y": y.cast(pl.Float64)}).drop_nulls()
    if both["x"].n_unique() < 2 or both["y"].n_unique() < 2:
        return None
    value = both.select(pl.corr(pl.col("x").rank("average"), pl.col("y").rank("average"))).item()
    return float(value) if value is not None and math.isfinite(value) else None
