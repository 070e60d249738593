"""Receipts of finished shards, and manifests: a stage of a round with its plan, fingerprint and, once sealed, shards.

A file that no receipt names does not exist; a stage that is not sealed is not finished.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator

from .tables import FORMAT

ADAPTER = "adapter"
"""The folder of a checkpoint that holds its adapter alone; the other files are a whole model without folders."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Receipt(_Record):
    """Proof that one shard is complete: created once, never changed.

    `columns`: digests of parts of the file, by which a reader of few columns knows them (`fire_data.partial`).
    """

    shard: str
    sha256: str
    bytes: int
    rows: int
    tokens: int
    fingerprint: str
    versions: dict[str, str] = {}
    seconds: float = 0.0
    columns: dict[str, str] = {}


class Shard(_Record):
    """One planned shard: its name and the half-open range of the round's units it covers."""

    name: str
    start: int
    stop: int


Values = dict[str, Any]


class _Fields(_Record):
    """Of `Manifest.fields`, `stats` and `recorded`: what readers take apart. All of it may be missing."""

    student: Values | None = None
    teachers: dict[str, Values] | None = None
    vocabulary: Values | None = None
    rollout: Values | None = None
    score: Values | None = None
    rule: Values | None = None
    train: Values | None = None
    addons: dict[str, str] | None = None
    inputs: dict[str, str] | None = None


class _Stats(_Record):
    steps: int | list[Values] | None = None
    rule: dict[str, list[Values]] | None = None
    routes: list[tuple[str | None, int]] | None = None
    teachers: dict[str, Values] | None = None
    mean_length: float | None = None


class _Recorded(_Record):
    teachers: dict[str, str] | None = None
    entropy_kind: str | dict[str, str] | None = None
    entropy: dict[str, Values] | None = None
    sampling: Values | None = None
    reads: dict[str, Values] | None = None
    tokenizers: Values | None = None


def _as(kind: type[_Record]) -> AfterValidator:
    """Values stay as they are; ValueError for those that cannot be read as `kind`."""

    def check(values: Values) -> Values:
        try:
            kind.model_validate(values)
        except ValidationError as error:
            raise ValueError(problem(error)) from None
        return values

    return AfterValidator(check)


class Manifest(_Record):
    """A stage of one round. `fields` are what the fingerprint is made of, kept so that a difference can be named."""

    format: int = FORMAT
    stage: str
    name: str | None = None
    round: int
    state: Literal["open", "sealed"] = "open"
    fingerprint: str
    fields: Annotated[Values, _as(_Fields)]
    plan: tuple[Shard, ...]
    shards: tuple[Receipt, ...] = ()
    stats: Annotated[Values, _as(_Stats)] = {}
    recorded: Annotated[Values, _as(_Recorded)] = {}

    @model_validator(mode="after")
    def _steps_are_counted_or_listed(self) -> Self:
        kind, steps = int if self.stage == "checkpoints" else list, self.stats.get("steps")
        if steps is not None and not isinstance(steps, kind):
            raise ValueError(f"stats.steps of {self.stage} is no {kind.__name__}")
        return self

    @property
    def sealed(self) -> bool:
        return self.state == "sealed"

    @property
    def digest(self) -> str:
        """Identifies the stage's content: what a later stage's fingerprint names as its input."""
        return digest([[r.shard, r.sha256] for r in self.shards])


def problem(error: ValidationError) -> str:
    """Why a record is none: the first place in it that is wrong, and how."""
    first = error.errors()[0]
    return ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, "))))


def canonical(value: Any) -> str:
    """JSON with sorted keys and no blanks: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any) -> str:
    """sha256 (hex) of the canonical JSON of `value`."""
    return hashlib.sha256(canonical(value).encode("utf-8", "surrogatepass")).hexdigest()


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """The dotted names, with both values, at which two nested dictionaries differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [d for k in keys for d in differences(old.get(k), new.get(k), f"{path}.{k}" if path else str(k))]
    return [] if canonical(old) == canonical(new) else [f"{path}: {_short(old)} -> {_short(new)}"]


def _short(value: Any) -> str:
    text = canonical(value)
    return text if len(text) <= 40 else text[:37] + "..."
