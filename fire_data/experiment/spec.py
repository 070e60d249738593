"""What an experiment is made of: a checked YAML file, and the cells that it expands to.

A cell is one world in one setting, one arm, one seed: one run. All arms of a seed have the same world, prompts and
sampling seed, so they are compared in pairs. Everything that can be wrong with a specification is found before anything
is computed: every arm's configuration and rule is made once with placeholders for the models.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fire_data.run import Run
from fire_data.schemas.config import ModelConfig, parse_config, parse_yaml
from fire_data.schemas.errors import ConfigError
from fire_data.worlds.registry import ANSWER_PATTERN, WORLDS, is_lost

Json = dict[str, Any]
Metric = Literal["sampled", "greedy", "area", "retain"]

METRICS: dict[str, str] = {
    "sampled": "accuracy at temperature 1",
    "greedy": "greedy accuracy",
    "area": "area under the curve of accuracy at temperature 1",
    "retain": "greedy accuracy on what the student knew before",
}
TEACHER = "teacher"
"""Where there is one, its route; and the arm under which it is evaluated, `teacher-ROUTE` where there are several."""
ROUTED = "teacher-routed"
"""All teachers together, each on the prompts that are routed to it."""
_MOST_SEEDS = 10_000
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,59}$"
_TOY: Json = {
    "threads": 1,
    "rollout": {"n": 2, "prompts_per_round": 64, "max_new_tokens": 48, "verifier": "exact", "rows_in_flight": 128},
    "train": {"lr": 5e-4, "batch_size": 32, "export_dtype": "float32"},
    "eval": {"n": 2},
    "verify": {"pattern": ANSWER_PATTERN},
}
"""Settings of the worlds that are made here; those whose models are given start from the defaults of any run."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Arm(_Part):
    """What is compared: a rule with its parameters, or a baseline written as one."""

    rule: str | dict[str, str] | None = Field(None, description="as weigh.rule; null: the arm's name")
    params: Json = Field({}, description="as weigh.params")
    config: Json = Field({}, description="sections of fire.yaml that this arm alone has")


class Given(_Part):
    """A world whose models and prompts are there already; local paths are relative to the specification."""

    student: Json = Field(description="as the section student of fire.yaml")
    teachers: dict[str, dict[str, Json]] = Field(
        description="by setting: teachers by route, or one named teacher; each as the section teacher of fire.yaml"
    )
    prompts: str = Field(description="as prompts.path")
    main: str = Field(description="held-out prompts of what is to be learnt")
    retain: str | None = Field(None, description="held-out prompts of what the student knew before")


class Claim(_Part):
    """A statement that is tested, written down before the runs."""

    arm: str
    against: str = "uniform"
    metric: Metric = "sampled"
    world: str
    setting: str = "single"
    against_setting: str | None = Field(None, description="the setting of against; null: the same")
    holds: Literal["better", "worse", "within"] = Field(description="than against; within: at most margin apart")
    margin: float = Field(0.02, gt=0, description="of within, in the metric's unit")

    def __str__(self) -> str:
        how = f"within {self.margin:g} of" if self.holds == "within" else f"{self.holds} than"
        other = f"/{self.against_setting}" if self.against_setting else ""
        return f"{self.arm} is {how} {self.against}{other} in {self.world}/{self.setting} ({self.metric})"


class Spec(_Part):
    """An experiment."""

    about: str = Field("", description="one line for the report")
    worlds: dict[str, list[str]] = Field(description="settings by world", min_length=1)
    given: dict[str, Given] = Field({}, description="worlds by name whose models exist already")
    arms: dict[str, Arm] = Field(description="by name; empty: the rule of that name", min_length=1)
    seeds: list[int] = Field(description="a list, or how many: 5 is [0, 1, 2, 3, 4]", min_length=1)
    rounds: int = Field(20, ge=1, description="of every cell")
    evaluate_every: int = Field(5, ge=1, description="rounds between evaluations; start and last are always there")
    config: Json = Field({}, description="sections of fire.yaml that all cells have")
    against: list[str] = Field(["uniform", "random"], description="arms that all others are compared with")
    metric: Metric = Field("sampled", description="what comparisons are tested on; the others are shown")
    teachers: bool = Field(False, description="evaluate every teacher too, each prompt also by the one it is routed to")
    target: float = Field(0.8, gt=0, le=1, description="accuracy at temperature 1 to count tokens and steps to")
    claims: list[Claim] = Field([], description="tested as a family of their own")

    @field_validator("seeds", mode="before")
    @classmethod
    def _counted(cls, value: Any) -> Any:
        if not isinstance(value, int) or isinstance(value, bool):
            return value
        if value > _MOST_SEEDS:
            raise ValueError(f"{value} seeds are more than {_MOST_SEEDS}")
        return list(range(value))

    @field_validator("arms", mode="before")
    @classmethod
    def _empty_is_plain(cls, value: Any) -> Any:
        return {k: {} if v is None else v for k, v in value.items()} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _names_exist(self) -> Spec:
        for name in self.arms:
            if str(name).partition("-")[0] == TEACHER:
                raise ValueError(f"arm {name!r}: such a name is that of a teacher's own evaluation")
        for name in (*self.arms, *self.given):
            if not re.fullmatch(_NAME, str(name)):
                raise ValueError(f"{name!r} cannot be a name (letters, digits, ., _, + and -)")
        if len({*self.seeds}) != len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds {self.seeds}: each once, none below 0")
        for world, settings in self.worlds.items():
            there = self.settings_of(world)
            for setting in settings:
                if setting not in there:
                    raise ValueError(f"world {world!r} has no setting {setting!r}; it has: {', '.join(there)}")
        for claim in self.claims:
            for arm in (claim.arm, claim.against):
                if arm not in self.arms:
                    raise ValueError(f"a claim names {arm!r}, which is no arm; there are: {', '.join(self.arms)}")
            for setting in (claim.setting, claim.against_setting or claim.setting):
                if setting not in self.worlds.get(claim.world, ()):
                    raise ValueError(f"a claim is about {claim.world}/{setting}, which is not among the worlds")
        return self

    def settings_of(self, world: str) -> list[str]:
        """The settings that a world has. Raises ValueError if there is no such world."""
        if world in self.given:
            return list(self.given[world].teachers)
        if world not in WORLDS:
            known = [*self.given, *WORLDS]
            near = difflib.get_close_matches(world, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known)}"
            raise ValueError(f"there is no world {world!r}, {hint}")
        return list(WORLDS[world].teachers)


@dataclass(frozen=True)
class Cell:
    """One run of the matrix. `group` is what it shares with the other arms and seeds."""

    world: str
    setting: str
    arm: str
    seed: int

    @property
    def route(self) -> str | None:
        """Of a teacher that is evaluated, what it is called; None for an arm."""
        first, _, route = self.arm.partition("-")
        return (route or TEACHER) if first == TEACHER else None

    @property
    def id(self) -> str:
        return f"{self.world}/{self.setting}/{self.arm}/seed-{self.seed:03d}"

    @property
    def group(self) -> str:
        return f"{self.world}/{self.setting}"


def cells(spec: Spec) -> Iterator[Cell]:
    """Every cell, seed by seed: an experiment that was stopped has whole seeds."""
    for seed in spec.seeds:
        for world, settings in spec.worlds.items():
            for setting in settings:
                for arm in (*spec.arms, *_teachers(spec, world, setting)):
                    yield Cell(world, setting, arm, seed)


def _teachers(spec: Spec, world: str, setting: str) -> list[str]:
    """Names of the cells in which the teachers of a world are evaluated. A lost one cannot write."""
    if not spec.teachers or (world not in spec.given and is_lost(world, setting)):
        return []
    routes = _routes(spec, world, setting)
    return [TEACHER if route == TEACHER else f"{TEACHER}-{route}" for route in routes]


def load_spec(path: Path) -> Spec:
    """Read and check a specification. Raises ConfigError naming every wrong key, and the arm of a wrong setting."""
    where = str(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the specification cannot be read: {error}", where=where, fix="fire experiment FILE"
        ) from None
    values = parse_yaml(text, "the specification", where)
    if not isinstance(values, dict):
        raise ConfigError("a specification holds keys and values", where=where, fix="see docs/experiments.md")
    try:
        spec = Spec.model_validate(values)
    except ValidationError as error:
        raise ConfigError("; ".join(map(_explain, error.errors())), where=where, fix="correct the file") from None
    placeholder = ModelConfig(model="placeholder").model_dump(mode="json")
    for world, settings in spec.worlds.items():
        for setting in settings:
            for arm in spec.arms:
                routes = dict.fromkeys(_routes(spec, world, setting), placeholder)
                made = values_of(spec, Cell(world, setting, arm, 0), placeholder, routes, "p", {"main": "m"})
                place = f"{where}, arm {arm} in {world}/{setting}"
                try:
                    Run(path.parent, parse_config(made, place)).rule()
                except ConfigError as error:
                    raise ConfigError(error.what, where=place, fix="correct the file") from None
    return spec


def values_of(
    spec: Spec, cell: Cell, student: Json, teachers: dict[str, Json], prompts: str, held_out: dict[str, str]
) -> Json:
    """The values of a cell's `fire.yaml`. `teachers`: by route, or one called `teacher`."""
    arm = Arm.model_validate({"rule": "uniform"}) if cell.route else spec.arms[cell.arm]
    if cell.route:
        student = teachers[cell.route]
    made: Json = {} if cell.world in spec.given else _merged(_TOY, WORLDS[cell.world].config)
    made = _merged(_merged(made, spec.config), arm.config)
    several = {name: model for name, model in teachers.items() if name != TEACHER}
    fixed: Json = {
        "seed": cell.seed,
        "student": student,
        "teacher": teachers.get(TEACHER),
        "teachers": several,
        "prompts": {"path": prompts},
        "eval": {"prompts": held_out},
        "weigh": {"rule": cell.arm if arm.rule is None else arm.rule, "params": arm.params},
    }
    return _merged(made, fixed)


def _routes(spec: Spec, world: str, setting: str) -> list[str]:
    if world in spec.given:
        return list(spec.given[world].teachers[setting])
    chosen = WORLDS[world].teachers[setting]
    return list(chosen) if isinstance(chosen, dict) else [TEACHER]


def _merged(old: Json, new: Json) -> Json:
    """Sections of `new` over those of `old`, key by key."""
    both = {k for k in old.keys() & new.keys() if isinstance(old[k], dict) and isinstance(new[k], dict)}
    return {**old, **new, **{k: {**old[k], **new[k]} for k in both}}


def _explain(error: Any) -> str:
    key = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        return f"unknown key {key!r}"
    if error["type"] == "missing":
        return f"{key!r} is missing"
    text = str(error["msg"]).removeprefix("Value error, ")
    return f"{key!r}: {text}" if key else text
