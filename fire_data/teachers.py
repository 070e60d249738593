"""Several teachers as one before a rule sees the table: one by name, their average, or the surest per row or token.

What every teacher says of all rows is stored beside the scores (`teacher_logprob.NAME`, `teacher_entropy.NAME`), and
the plain columns hold those of each row's own teacher. Another combination replaces the plain columns while a table is
read, so it costs no scoring. What is stored of the row's own teacher alone is then not there, because it would be about
another distribution. An entropy that is only a lower bound says so here, and no rule reads it unasked.
Units: logprobs and entropies in nats; masses are probabilities from 0 to 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from fire_data.rules import Rule, entropies, every
from fire_data.rules.base import sources
from fire_data.rules.tokens import fold
from fire_data.schemas.config import ADDED_TEACHER, TEACHER
from fire_data.schemas.errors import ConfigError, IncompleteError
from fire_data.schemas.manifest import Manifest
from fire_data.schemas.tables import ADDONS, JOINT, SCORES, TOPK_BOUND

AVERAGE, CONFIDENT, TOKEN = "average", "confident", "token"
EXACT = ("exact", "fake")  # a dry run has no distributions that its entropies could be a bound of
MEAN_BOUND = "mean-of-teachers"

MADE = ("teacher_logprob", "teacher_entropy")
"""Columns that a combination replaces."""
_ABOUT_TEACHERS = [c.name for c in SCORES if c.name.startswith("teacher_") and sources(c.name) == (c.name,)]
OWN_ONLY = frozenset({*_ABOUT_TEACHERS, *JOINT} - {*MADE}) | frozenset(
    c.name for columns in ADDONS.values() for c in columns if "teacher" in c.name
)
"""Columns that are stored of each row's own teacher alone."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Teachers:
    """Which teachers count: `how` is routed, average, confident, token or a name. Ties go to the first of `names`."""

    how: str = "routed"
    names: tuple[str, ...] = ()

    @property
    def routed(self) -> bool:
        """True if every row has its own teacher: the stored columns as they are."""
        return self.how == "routed"

    @property
    def chosen(self) -> bool:
        """True if entropies decide whose columns are taken."""
        return self.how in (CONFIDENT, TOKEN) and len(self.names) > 1

    def columns(self, entropies: bool = True) -> list[str]:
        """The stored columns it is made from, with the entropies if those are asked for or decide."""
        if self.routed:
            return []
        signals = MADE if entropies or self.chosen else MADE[:1]
        return [f"{signal}.{name}" for signal in signals for name in self.names]

    def record(self) -> dict[str, Any]:
        """For a manifest, JSON-ready."""
        return {"how": self.how, "names": list(self.names)}


ROUTED = Teachers()


def in_columns(names: Iterable[str], how: str = "routed") -> Teachers:
    """The combination called `how` of the teachers whose columns are there, in their order.

    Raises ConfigError if it is neither a combination nor one of them, IncompleteError if there are none.
    """
    prefix = f"{MADE[0]}."
    there = tuple(n.removeprefix(prefix) for n in names if n.startswith(prefix))
    known = ("routed", AVERAGE, CONFIDENT, TOKEN, *there)
    if how not in known:
        near = difflib.get_close_matches(how, known, n=1) or known
        text = f"teacher is one of {', '.join(known)}, not {how!r}"
        raise ConfigError(text, fix=f"--set weigh.teacher={near[0]}")
    if how == "routed":
        return ROUTED
    if not there:
        text = f"teacher {how!r} needs the columns of several teachers, {prefix}NAME and {MADE[1]}.NAME"
        raise IncompleteError(text, fix="fire score RUN --add teacher.NAME, then run.scores(add='teacher.NAME')")
    return Teachers(how, (how,) if how in there else there)


def combine(lf: pl.LazyFrame, teachers: Teachers) -> pl.LazyFrame:
    """The table with `teacher_logprob` and `teacher_entropy` of this combination, without what would contradict them.

    average: log of the mean probability of the token, which is exactly that of the mixture, and the mean of the
    entropies, which is at most the mixture's. confident: per trajectory both columns of the teacher whose mean entropy
    is smallest; token: the same per token. A column whose sources are not there is left out, never another's.
    """
    if teachers.routed:
        return lf
    have = lf.collect_schema().names()
    gone = {*MADE, *OWN_ONLY}
    lf = lf.drop(c for c in have if gone & {*sources(c)})
    logprobs, entropies = ([f"{signal}.{name}" for name in teachers.names] for signal in MADE)
    made = {}
    for signal, columns in zip(MADE, (logprobs, entropies), strict=True):
        if {*columns, *(entropies if teachers.chosen else ())} <= {*have}:
            made[signal] = _combined(teachers, signal, columns, entropies)
    return lf.with_columns(**made)


def _combined(teachers: Teachers, signal: str, columns: list[str], entropies: list[str]) -> pl.Expr:
    if len(columns) == 1:
        return pl.col(columns[0])
    if teachers.how == CONFIDENT:
        return _surest(columns, entropies)
    if teachers.how == TOKEN:
        return _per_token([*columns, *entropies], _surest_tokens)
    return _per_token(columns, _mixture if signal == MADE[0] else _mean)


def _surest(columns: list[str], entropies: list[str]) -> pl.Expr:
    """Per trajectory the column whose entropies have the smallest sum; of equal ones, the first."""
    sums = [pl.col(c).cast(pl.List(pl.Float64)).list.sum() for c in entropies]
    least, taken = pl.min_horizontal(sums), pl.col(columns[-1])
    for total, column in zip(sums[-2::-1], columns[-2::-1], strict=True):
        taken = pl.when(total == least).then(column).otherwise(taken)
    return taken


def _per_token(columns: list[str], work: Callable[[Floats], Floats]) -> pl.Expr:
    """A token column from several: `work` takes them as [column, token] and gives [token]."""

    def fill(series: Sequence[pl.Series]) -> pl.Series:
        flat = [s.explode(empty_as_null=False).cast(pl.Float64).to_numpy() for s in series]
        return fold(pl.Series(series[0].name, work(np.stack(flat))), series[0].list.len())

    return pl.map_batches(columns, fill, return_dtype=pl.List(pl.Float64), is_elementwise=True)


def _surest_tokens(both: Floats) -> Floats:
    """Of the values in the first half of the rows, those whose entropy, in the other half, is smallest."""
    values, entropies = np.split(both, 2)
    taken: Floats = np.take_along_axis(values, entropies.argmin(axis=0)[None], axis=0)[0]
    return taken


def _mixture(logprobs: Floats) -> Floats:
    """log of the mean probability. Around the largest, so that improbable tokens do not underflow."""
    largest: Floats = logprobs.max(axis=0)
    mixed: Floats = largest + np.log(_mean(np.exp(logprobs - largest)))
    return mixed


def _mean(values: Floats) -> Floats:
    """Row after row: how numpy orders a sum over an axis depends on the length of the other one."""
    total: Floats = values[0].copy()
    for row in values[1:]:
        total += row
    total /= len(values)
    return total


# --- what a rule may read ------------------------------------------------------------------------------------------


def require_common(rule: Rule, teachers: Teachers) -> None:
    """Raise ConfigError if a rule reads what is stored of each row's own teacher alone, and others are combined."""
    if teachers.routed:
        return
    for leaf, column in ((r, c) for r in _leaves(rule) for c in r.columns if c in OWN_ONLY):
        text = (
            f"the rule {leaf.name} reads {column!r}, which is stored of each row's own teacher alone, "
            f"and weigh.teacher is {teachers.how}"
        )
        raise ConfigError(text, where=_where(rule), fix="--set weigh.teacher=routed")


def require_stored(teachers: Teachers, columns: Iterable[str], have: Collection[str], run: str) -> None:
    """Raise IncompleteError with the command that adds them if columns of the teachers are missing."""
    missing = [c for c in columns if c not in have]
    if missing:
        lacking = list(dict.fromkeys(c.partition(".")[2] for c in missing))
        text = f"weigh.teacher {teachers.how} needs {missing[0]!r}, which is not stored yet"
        add = " ".join(f"--add {ADDED_TEACHER}{name}" for name in lacking)
        raise IncompleteError(text, fix=f"fire score {run} {add}")


class Bound(NamedTuple):
    """An entropy column that is not exact: of which kind, whose, and how much probability it was computed from."""

    kind: str
    of: tuple[str, ...] = ()
    mass: float | None = None

    def __str__(self) -> str:
        names = ", ".join(n for n in self.of if n != TEACHER)
        whose = f": the mean of those of {names}" if self.kind == MEAN_BOUND else f" of {names}" if names else ""
        words = [self.kind + whose]
        words += [f"from tokens that hold {self.mass:.4g} of the probability"] if self.mass is not None else []
        return f"only a lower bound ({', '.join(words)})"

    def record(self) -> dict[str, Any]:
        """For a manifest, JSON-ready."""
        return {"kind": self.kind, "of": list(self.of), "mass": self.mass}


Bounds = dict[str, Bound]
"""By the name of the entropy column, those that are not exact."""


def stored_bounds(scores: Manifest, addons: Mapping[str, Manifest], columns: Collection[str] = ()) -> Bounds:
    """What the manifests of a round say of its entropies: those of the scores, and by name those of added teachers.

    `columns` are names of columns that are there: a stored mass means a bound, whatever a manifest lacks.
    """
    said = scores.recorded.get("entropy_kind") or {}
    kinds = dict.fromkeys(("student", TEACHER), said) if isinstance(said, str) else dict(said)
    student = {"student": kinds.pop("student", None)}
    masses = {who: scores.stats.get(f"{who}_entropy_mass") for who in ("student", "teacher")}
    found = {
        "student_entropy": _bound(student, masses["student"], "student_entropy_mass" in columns),
        "teacher_entropy": _bound(kinds, masses["teacher"], "teacher_entropy_mass" in columns),
    }
    for name, manifest in addons.items():
        theirs = manifest.recorded.get("entropy_kind")
        mass = manifest.stats.get("teacher_entropy_mass")
        # Rows of its own have their numbers from the scores, so both kinds are in the addon.
        both = (kinds.get(name), theirs.get(name) if isinstance(theirs, dict) else theirs)
        kind = next((k for k in both if k not in (None, *EXACT)), None)
        found[f"teacher_entropy.{name}"] = _bound({name: kind}, mass, f"teacher_entropy_mass.{name}" in columns)
    return {column: bound for column, bound in found.items() if bound is not None}


def _bound(kinds: Mapping[str, str | None], mass: float | None, stored: bool) -> Bound | None:
    inexact = {name: kind for name, kind in kinds.items() if kind not in (None, *EXACT)}
    if not inexact and mass is None and not stored:
        return None
    kind = next((str(k) for k in inexact.values()), TOPK_BOUND)
    return Bound(kind, tuple(n for n in inexact or kinds if n != "student"), mass)


def frame_bounds(frame: pl.DataFrame) -> Bounds:
    """The entropies of a frame that come with masses, and are therefore bounds."""
    found = {}
    for column in frame.columns:
        base, dot, name = column.partition(".")
        if base in ("student_entropy_mass", "teacher_entropy_mass"):
            values = frame[column].drop_nulls().explode(empty_as_null=False).cast(pl.Float64).to_numpy()
            if values.size:
                entropy = base.removesuffix("_mass") + dot + name
                found[entropy] = Bound(TOPK_BOUND, (name,) if name else (), float(values.mean()))
    return found


def combined_bounds(stored: Bounds, teachers: Teachers) -> Bounds:
    """The same of the table that `combine` makes."""
    if teachers.routed:
        return stored
    found = {column: bound for column, bound in stored.items() if column != "teacher_entropy"}
    theirs = [b for n in teachers.names if (b := stored.get(f"teacher_entropy.{n}")) is not None]
    mass = min((b.mass for b in theirs if b.mass is not None), default=None)
    if teachers.how == AVERAGE and len(teachers.names) > 1:
        found["teacher_entropy"] = Bound(MEAN_BOUND, teachers.names, mass)
    elif theirs:
        found["teacher_entropy"] = Bound(theirs[0].kind, tuple(n for b in theirs for n in b.of), mass)
    return found


def require_exact(rule: Rule, teachers: Teachers, entropy: str, stored: Bounds, where: str | None = None) -> Bounds:
    """The bounds that the rule, or the choice between teachers, would read in place of entropies.

    Raises ConfigError if there are any and `entropy` is not "any".
    """
    there = combined_bounds(stored, teachers)
    if not there:
        return {}
    read = {MADE[1]: f"weigh.teacher {teachers.how} chooses by"} if teachers.chosen else {}
    for leaf in _leaves(rule):
        read = dict.fromkeys(entropies(leaf.columns), f"the rule {leaf.name} reads") | read
    used = {column: there[column] for column in read if column in there}
    if entropy == "any" or not used:
        return used
    column, bound = next(iter(used.items()))
    otherwise = "--set weigh.teacher=token" if bound.kind == MEAN_BOUND else "an engine that gives exact ones"
    fix = f"--set weigh.entropy=any takes the bound; or {otherwise}"
    raise ConfigError(f"{read[column]} {column}, which is {bound}", where=where or _where(rule), fix=fix)


def _leaves(rule: Rule) -> list[Rule]:
    """The rules that decide something themselves, in a composition or matched by another."""
    return [r for r in every(rule) if any(c is r for c in r.components)]


def _where(rule: Rule) -> str:
    return f"rule {rule.record()['name']}"
