"""Rules that users bring: a class in a Python file, or one that an installed package names as entry point `fire.rules`.

A file is code and runs when it is named; nothing is ever loaded that was not named. Its sha256 is part of what the
weights were made from, so a changed rule is another rule.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import polars as pl
from polars.exceptions import PanicException, PolarsError

from fire_data import pyfile
from fire_data.rules.base import GROUP, ROW, Parts, Rule, RuleEntry, Statistic
from fire_data.schemas.config import is_expression, split_rule
from fire_data.schemas.errors import ConfigError, FireError

_GROUP = "fire.rules"


def is_file(name: str) -> bool:
    """True for `file.py` and `file.py:Class`."""
    path, _, _ = name.partition(".py:")
    return name.endswith(".py") or (".py:" in name and bool(path))


def moved(text: str, place: Callable[[str], str]) -> str:
    """A rule's text with every relative file in it, class included, replaced by what `place` says of it."""
    if is_expression(text):
        return text
    names = split_rule(text)
    return "+".join(_moved(n, place) if is_file(n) and not n.startswith("/") else n for n in names)


def _moved(name: str, place: Callable[[str], str]) -> str:
    path, dot, cls = name.partition(".py")
    return place(f"{path}{dot}") + cls


def from_file(name: str) -> RuleEntry:
    """The rule in `file.py:Class`, or the only one in `file.py`. Raises ConfigError saying what is wrong with it."""
    path, _, cls = (name, "", "") if name.endswith(".py") else name.rpartition(":")
    module = pyfile.load(path, "rule")
    found = {
        k: v
        for k, v in vars(module).items()
        if inspect.isclass(v) and issubclass(v, Rule) and v.__module__ == module.__name__ and not inspect.isabstract(v)
    }
    if not cls and len(found) != 1:
        text = f"{path} has {len(found)} rules" + (f": {', '.join(found)}" if found else "")
        fix = f"{path}:{next(iter(found))}" if found else "class Mine(Rule): ... with a method parts()"
        raise ConfigError(text, where=path, fix=fix)
    if cls and cls not in found:
        what = _not_a_rule(getattr(module, cls, None), cls)
        raise ConfigError(what, where=path, fix=f"there is: {', '.join(found) or 'no complete subclass of Rule'}")
    rule = found[cls] if cls else next(iter(found.values()))
    return _entry(rule, path, (inspect.getdoc(rule) or rule.__name__).splitlines()[0])


def _not_a_rule(value: object, name: str) -> str:
    if value is None:
        return f"there is no {name}"
    if inspect.isclass(value) and issubclass(value, Rule):
        return f"{name} has no method parts()"
    return f"{name} is not a subclass of fire_data.rules.Rule"


def _entry(rule: type[Rule], where: str, what: str) -> RuleEntry:
    if "__dataclass_fields__" not in vars(rule) or not rule.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise ConfigError(f"{rule.__name__} is not a frozen dataclass", where=where, fix="@dataclass(frozen=True)")
    if not rule.name:
        rule.name = rule.__name__.lower()
    return RuleEntry(rule, {}, what)


def source_of(rule: Rule) -> str | None:
    """sha256 of the code a user's rule was loaded from; None for a rule of this package."""
    if is_ours(rule):
        return None
    module: Any = inspect.getmodule(type(rule))
    try:
        return getattr(module, "__digest__", None) or hashlib.sha256(inspect.getsource(module).encode()).hexdigest()
    except (OSError, TypeError):  # compiled, or made at run time
        return None


def is_ours(rule: Rule) -> bool:
    """True for a rule of this package."""
    return type(rule).__module__.startswith("fire_data.")


def remedy(rule: Rule) -> str:
    """Where to look when a rule is wrong: its description, or the code that a user wrote."""
    cls = type(rule)
    return f"fire rules {rule.name}" if is_ours(rule) else f"correct the class {cls.__name__} in {inspect.getfile(cls)}"


@contextmanager
def told(rule: Rule, what: str) -> Iterator[None]:
    """Errors of Polars about a rule's expressions, and whatever a user's own code raises, as ConfigError."""
    try:
        yield
    except FireError:
        raise
    except (PolarsError, PanicException) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0].replace("_made_", "")
        raise ConfigError(f"{what} cannot be computed: {line}", where=f"rule {rule.name}", fix=remedy(rule)) from None
    except (Exception, SystemExit) as error:
        if is_ours(rule):
            raise
        text = pyfile.told(error, inspect.getfile(type(rule)), "rule")
        raise ConfigError(text, where=f"rule {rule.name}", fix=remedy(rule)) from None


def examine(rule: Rule) -> None:
    """Ask a rule for its expressions once, so that a mistake in a user's code is told before any data is read."""
    if is_ours(rule):
        return
    with told(rule, "the rule"):
        parts, statistics, derived = rule.parts(), rule.statistics(), rule.derived()
        rule.record()
    where = f"rule {rule.name}"
    wrong = next((s for s in statistics if not isinstance(s, Statistic)), None)
    if not isinstance(parts, Parts) or wrong is not None:
        what = "parts() gives no Parts" if wrong is None else "statistics() gives something else than Statistic"
        raise ConfigError(what, where=where, fix="return Parts(weight=..., keep=...)")
    used = {f"statistic {s.name}": e for s in statistics for e in s.expressions()}
    named = {**parts.expressions(), **derived, **used}
    for name, expression in named.items():
        if not isinstance(expression, pl.Expr):
            text = f"{name} is {expression!r}, not an expression"
            raise ConfigError(text, where=where, fix=f"pl.lit({expression!r}), in {remedy(rule)}")
        bare = _aggregate(expression)
        if bare is not None:
            text = f"{name} aggregates over the table ({bare}), of which only a part may be in memory"
            raise ConfigError(text, where=where, fix=SCOPED)
    if any(s.name.startswith("_") for s in statistics):
        raise ConfigError("a statistic's name begins with _", where=where, fix="give it another name")


SCOPED = "declare a Statistic with its scope, or use .over('_row') or .over('_group')"
_AGGREGATES = {"Quantile", "Any", "All", "ArgMax", "ArgMin", "Skew", "Kurtosis", "NullCount", "ApproxNUnique"}


def _aggregate(expression: pl.Expr) -> str | None:
    """The name of an aggregate that is over neither a trajectory nor a group; None if there is none to be seen."""
    try:
        tree = json.loads(expression.meta.serialize(format="json"))
    except (PolarsError, ValueError):  # a Python function cannot be written down: rows tell (`_require_local`)
        return None
    pending = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, list):
            pending += node
        elif isinstance(node, dict):
            if "Over" in node:
                by = {column.get("Column") for column in node["Over"]["partition_by"] if isinstance(column, dict)}
                if not by & {ROW, GROUP}:
                    return "over neither '_row' nor '_group'"
                continue
            if "Agg" in node:
                return str(
                    next(iter(node["Agg"]), "aggregate") if isinstance(node["Agg"], dict) else node["Agg"]
                ).lower()
            found = _AGGREGATES & {str(k) for k in node}
            if found:
                return found.pop().lower()
            pending += node.values()
        elif node == "Len" or node in _AGGREGATES:
            return str(node).lower()
    return None


def installed() -> Mapping[str, importlib.metadata.EntryPoint]:
    """The rules that installed packages offer, by name; none is loaded."""
    return {e.name: e for e in importlib.metadata.entry_points(group=_GROUP)}


def load_installed(name: str) -> RuleEntry:
    """An installed package's rule: an entry point that names a Rule class or a RuleEntry."""
    point = installed()[name]
    try:
        value = point.load()
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a package that does not import is no internal error
        text = f"the rule {name!r} of {point.value} cannot be loaded: {type(error).__name__}: {error}"
        raise ConfigError(text, where=f"entry point {_GROUP}", fix="reinstall the package that offers it") from None
    if isinstance(value, RuleEntry):
        return value
    if not (inspect.isclass(value) and issubclass(value, Rule)) or not dataclasses.is_dataclass(value):
        text = f"{point.value} is not a dataclass that is a Rule"
        raise ConfigError(text, where=f"entry point {_GROUP}", fix="name a subclass of fire_data.rules.Rule")
    return _entry(value, point.value, (inspect.getdoc(value) or name).splitlines()[0])
