"""Lets a tracker follow a run: all that metrics.jsonl and the sealed manifests have, then each step as it is done.

`metrics.jsonl` is the truth and a tracker is told it from the beginning, so that following live and `fire track`
afterwards are one function. A tracker that fails is told of once and left; training does not stop for it.

Names: `train/` for optimizer steps, `rollout/` and `weigh/` for what the round was made of, at its first step, `eval/`
at the step after its last; the axis is global_step.
"""

from __future__ import annotations

import atexit
import secrets
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from fire_data import environment, files, metrics, trackers
from fire_data.hub.redact import shared_config
from fire_data.run import Run
from fire_data.schemas.errors import ConfigError, FireError
from fire_data.session import Follows, Session
from fire_data.shards import is_sealed, read_manifest
from fire_data.stages import Reporter
from fire_data.steps.rounds import eval_numbers, round_row

_STEP = {"lr": "learning_rate", "drift_kl": "approx_kl"}  # what the field calls them
_ROUND = {
    "length": "rollout/mean_length",
    "truncated": "rollout/truncated_fraction",
    "reward": "rollout/reward",
    "reverse_kl": "rollout/reverse_kl",
    "kept": "weigh/kept_fraction",
    "ess": "weigh/ess",
}
_PLACE = ("global_step", "step")

Record = tuple[tuple[str, int], int, dict[str, float]]
"""What it is about (kind, number), the global step, the numbers by name."""


class Follower:
    """A tracker that is told what is new."""

    def __init__(self, run: Run, name: str, report: Reporter) -> None:
        self.run, self.name, self.report = run, name, report
        self.told: set[tuple[str, int]] = set()
        self.tracker: trackers.Tracker | None = None
        self._guarded(self._open)
        self.catch_up()
        atexit.register(self.close)

    def catch_up(self) -> None:
        """Tell everything that was not told yet."""
        self._tell(lambda: records(self.run))

    def step(self, record: dict[str, Any]) -> None:
        """Tell a line that was just added to metrics.jsonl."""
        self._tell(lambda: [_step(record)])

    def close(self) -> None:
        """Bring everything to where it goes."""
        if self.tracker is not None:
            self._guarded(self.tracker.close)
            self.tracker = None
        atexit.unregister(self.close)

    def _open(self) -> None:
        run = self.run
        self.tracker = trackers.open_tracker(self.name, run.root, run.root.resolve().name, _id(run), described(run))

    def _tell(self, given: Callable[[], Iterable[Record]]) -> None:
        if self.tracker is None:
            return
        log = self.tracker.log

        def tell() -> None:
            for key, step, numbers in given():
                if key not in self.told and numbers:
                    log(step, numbers)
                    self.told.add(key)

        self._guarded(tell)

    def _guarded(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # noqa: BLE001 - whatever a tracker raises, training goes on
            self.tracker = None
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            self.report.warn(
                f"the tracker {self.name} failed and is left alone from now on ({what}); metrics.jsonl has everything: "
                f"fire track {self.run.root} --to {self.name} sends it later"
            )


def following(session: Session) -> Follows | None:
    """The follower of a session, caught up, if `train.tracker` names a tracker. It is opened once for all rounds."""
    name = session.run.config.train.tracker
    if name is None:
        return None
    if session.follower is None:
        session.follower = Follower(session.run, name, session.report)
    else:
        session.follower.catch_up()
    return session.follower


def track(run: Run, name: str | None, report: Reporter) -> dict[str, Any]:
    """Give a tracker (None: `train.tracker`) all that a run has. Returns how much that was, and where to look."""
    name = name or run.config.train.tracker
    if name is None:
        fix = f"fire track {run.root} --to {trackers.NAMES[0]}"
        raise ConfigError(f"no tracker is named; there are: {', '.join(trackers.NAMES)}", fix=fix)
    trackers.require(name)
    follower = Follower(run, name, report)
    if follower.tracker is None:
        raise FireError(f"nothing was given to {name}", where=str(run.root), fix="the warning says what failed")
    where = follower.tracker.where
    follower.close()
    kinds = [kind for kind, _ in follower.told]
    return {"tracker": name, "steps": kinds.count("step"), "evaluations": kinds.count("eval"), "show": where}


def records(run: Run) -> Iterator[Record]:
    """All that a run has, in the order of global steps."""
    by_round: dict[int, list[dict[str, Any]]] = {}
    for record in metrics.read(run.root / "metrics.jsonl"):
        by_round.setdefault(record["round"], []).append(record)
    at = 0
    yield ("eval", -1), at, _evaluation(run, "start")
    for number in run.rounds():
        lines = by_round.get(number, [])
        at = lines[0]["global_step"] if lines else at
        if is_sealed(run.part("weights", number)):
            row = round_row(run, number)
            yield ("round", number), at, {new: float(row[old]) for old, new in _ROUND.items() if row[old] is not None}
        yield from map(_step, lines)
        checkpoint = read_manifest(run.part("checkpoints", number))
        if checkpoint is not None and checkpoint.sealed:
            at = checkpoint.stats["global_step"]
            yield ("eval", number), at, _evaluation(run, number)


def _step(record: dict[str, Any]) -> Record:
    numbers = {
        f"train/{_STEP.get(name, name)}": float(value)
        for name, value in record.items()
        if name not in _PLACE and isinstance(value, int | float)
    }
    step = record["global_step"]
    if "stopped_by" in record:  # no step: where the round ended is where the next one begins
        numbers = {f"stopped/{name.removeprefix('train/')}": value for name, value in numbers.items()}
        return ("stop", step), step, numbers
    return ("step", step), step, numbers


def _evaluation(run: Run, number: int | str) -> dict[str, float]:
    return {f"eval/{name}": float(value) for name, value in eval_numbers(run, number).items() if value is not None}


def described(run: Run) -> dict[str, Any]:
    """What a tracker is told of a run beside numbers: settings as they may be shared, and the rounds' fingerprints.

    No folder, server, name of a key, or performance setting; what looks like a key, in a name or a rule, is replaced.
    """
    manifests = [m for n in run.rounds() if (m := read_manifest(run.part("checkpoints", n))) is not None]
    fingerprints = {f"round-{m.round:03d}": m.fingerprint for m in manifests}
    clean: dict[str, Any] = _clean({**shared_config(run.config, run.root, []), "fingerprints": fingerprints})
    return clean


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _clean(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(inner) for inner in value]
    return environment.redacted(value, user="") if isinstance(value, str) else value


def _id(run: Run) -> str:
    """What trackers know this run by. Training that is done anew gets another: its old curves stay what they are."""
    path = trackers.id_path(run.root)
    files.create_bytes(path, secrets.token_hex(4).encode(), run.root / ".fire" / "tmp")
    return path.read_text(encoding="utf-8")
