"""`fire report`: a round as one HTML page that needs no network: plots, findings, and a browser of trajectories.

`data` and `measure` read the sealed tables shard by shard, `sample` says which trajectories are shown, `trajectories`
turns those into numbers and runs of text, `plots` draws, `sections` puts together what is shown, `page` writes HTML.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fire_data import files
from fire_data.compare.plot import require_plots
from fire_data.report.page import MOST_BYTES, render
from fire_data.report.sections import gather
from fire_data.run import Run
from fire_data.schemas.errors import ConfigError
from fire_data.stages import Reporter, Silent

__all__ = ["MOST_BYTES", "Written", "write_report"]


@dataclass(frozen=True)
class Written:
    """A finished page: where it is, its size, and how many trajectories and tokens of the round it shows."""

    path: Path
    bytes: int
    round: int
    trajectories: int
    tokens: int
    total: int


def write_report(
    run: Run,
    path: str | Path | None = None,
    *,
    round: int | None = None,
    name: str | None = None,
    against: str | int | None = None,
    limit: int | None = None,
    report: Reporter | None = None,
) -> Written:
    """Write a report of a run and one of its rounds, all of it or nothing.

    Args:
        path: the file; None: `RUN/report.html`.
        round: None: the last that is scored, else the last with rollouts.
        name: the folder under `weights/`; None: those that are trained.
        against: put side by side with other weights of the round (a name) or with another round (a number).
        limit: trajectories to show at most; None: by their length, see `report.sample`. A page is at most 10 MB.

    Raises:
        IncompleteError: there are no sealed rollouts, or no weights of a name, with the command that makes them.
        DataError: tables are damaged or about different trajectories.
        ConfigError: an argument is wrong, or the extra `report` is not installed.
        StorageError: the file cannot be written.
    """
    require_plots()
    if limit is not None and limit < 1:
        raise ConfigError("a report shows at least one trajectory", fix="--trajectories 1")
    target = run.root / "report.html" if path is None else Path(path)
    gathered = gather(run, round, name, against, limit, report or Silent())
    page, shown = render(gathered.context, gathered.index, gathered.trajectories)
    files.replace_bytes(target, page, target.parent)
    tokens = sum(len(t["a"]["ids"]) for t in gathered.trajectories[:shown])
    return Written(target, len(page), gathered.index["round"], shown, tokens, gathered.index["total"])
