"""What the Tab key offers: runs, rounds, weights, rules, teachers, settings. Light: no table and no rule is imported.

A completer gets the beginning of a word and returns what may stand there; `(word, what it is)` where the shell shows
both. It must not fail and must not wait: whatever cannot be read at once offers nothing.
"""

from __future__ import annotations

import ast
import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

import typer

Offers = list[tuple[str, str]]

_DEPTH, _FOLDERS = 4, 500  # how deep, and in how many folders, runs are looked for


def runs(incomplete: str) -> list[str]:
    """Folders that hold a fire.yaml, here or below what was typed."""
    above, _, begun = incomplete.rpartition("/")
    start = Path(f"{above}/") if above or incomplete.startswith("/") else Path()
    found: list[Path] = []
    level, room = [start], _FOLDERS
    for depth in range(_DEPTH):
        below = (p for folder in level for p in _folders(folder) if depth or p.name.startswith(begun))
        level = list(itertools.islice(below, room))
        room -= len(level)
        found += [p for p in level if (p / "fire.yaml").is_file()]
        level = [p for p in level if p not in found]
    return sorted(map(str, found))


def rounds(ctx: typer.Context) -> list[str]:
    """The rounds of the run that was typed before."""
    found = {p.stem.removeprefix("round-") for p in _manifests(ctx).rglob("round-*.json")}
    return [str(int(n)) for n in sorted(found) if n.isdigit()]


def weights(ctx: typer.Context) -> list[str]:
    """The folders under weights/ of the run that was typed before."""
    return sorted(p.name for p in _folders(_manifests(ctx) / "weights"))


def stages() -> list[str]:
    """The folders of a run's stages."""
    return ["rollouts", "scores", "addons", "weights", "checkpoints", "evals"]


def rules(incomplete: str) -> Offers:
    """Rules by name, also after the `+` of a composition or the comma of a list."""
    begun = incomplete[: max(incomplete.rfind("+"), incomplete.rfind(",")) + 1]
    return [(f"{begun}{name}", what) for name, what in _rules()]


def added(ctx: typer.Context) -> list[str]:
    """What `fire score --add` can make."""
    from fire_data.schemas.config import ADDED, ADDED_TEACHER

    return [*ADDED, *(f"{ADDED_TEACHER}{name}" for name in _teachers(ctx))]


def teachers(ctx: typer.Context) -> list[str]:
    """The run's teachers, or all of them."""
    return ["all", *_teachers(ctx)]


def combinations(ctx: typer.Context) -> list[str]:
    """How `fire weigh --teacher` can combine teachers, or which it can take alone."""
    return ["routed", "average", "confident", "token", *_teachers(ctx)]


def scopes() -> list[str]:
    """The scopes of a rule's statistics."""
    from fire_data.schemas.config import Scope

    return list(get_args(Scope))


def denominators() -> list[str]:
    """What the sum over a step's tokens can be divided by."""
    from fire_data.schemas.config import Denominator

    return list(get_args(Denominator))


def trackers() -> list[str]:
    """What can follow a run."""
    from fire_data.schemas.config import Tracker

    return list(get_args(Tracker))


def settings() -> Offers:
    """Every setting of fire.yaml as `section.field=`, with its line of why."""
    from fire_data.schemas.config import Config

    # Of teachers the names between are the run's own.
    return _settings({name: field for name, field in Config.model_fields.items() if name != "teachers"})


def _settings(fields: dict[str, Any], above: str = "") -> Offers:
    found: Offers = []
    for name, field in fields.items():
        kinds = (field.annotation, *get_args(field.annotation))
        inner: dict[str, Any] = next((kind.model_fields for kind in kinds if hasattr(kind, "model_fields")), {})
        found += _settings(inner, f"{above}{name}.") or [(f"{above}{name}=", field.description or "")]
    return found


def _folders(folder: Path) -> Iterator[Path]:
    """The visible folders in one, in no order; none if it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            yield from [folder / e.name for e in entries if e.is_dir() and not e.name.startswith(".")]
    except OSError:
        return


def _run(ctx: typer.Context) -> Path:
    """The run that was typed; among the other words while the option before the cursor still has no value."""
    return Path(str(next(filter(None, (ctx.params.get("run"), *ctx.args)), "")))


def _manifests(ctx: typer.Context) -> Path:
    return _run(ctx) / ".fire" / "manifests"


def _teachers(ctx: typer.Context) -> list[str]:
    """The names in the section `teachers` of the run that was typed before."""
    import yaml

    try:
        values = yaml.safe_load((_run(ctx) / "fire.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return []
    found = values.get("teachers") if isinstance(values, dict) else None
    return [str(name) for name in found] if isinstance(found, dict) else []


def _rules() -> Iterator[tuple[str, str]]:
    """Name and few words of every built-in rule, read from the sources of `fire_data.rules`; and the installed ones."""
    from importlib.metadata import entry_points

    import fire_data

    for path in sorted((Path(fire_data.__file__).parent / "rules").glob("*.py")):
        for name, entry in _entries(ast.parse(path.read_text(encoding="utf-8")).body):
            words = entry.args[2] if isinstance(entry, ast.Call) and len(entry.args) > 2 else None
            yield name, str(words.value) if isinstance(words, ast.Constant) else ""
    yield from ((point.name, "installed") for point in entry_points(group="fire.rules"))


def _entries(body: Iterable[ast.stmt]) -> Iterator[tuple[str, ast.expr]]:
    """The names and values of the table ENTRIES of a module."""
    for statement in body:
        targets: list[Any] = getattr(statement, "targets", [getattr(statement, "target", None)])
        table = getattr(statement, "value", None)
        if isinstance(table, ast.Dict) and any(isinstance(t, ast.Name) and t.id == "ENTRIES" for t in targets):
            for key, value in zip(table.keys, table.values, strict=True):
                if isinstance(key, ast.Constant):
                    yield str(key.value), value
