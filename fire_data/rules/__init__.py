"""The rules by name: published forms, repairs, controls and your own, made from plain parameters with checks."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, get_args

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from fire_data.rules import (
    advantages,
    controls,
    expression,
    filters,
    fire,
    forward_kl,
    masks,
    own,
    repairs,
    topk,
    weights,
)
from fire_data.rules.base import Parts, Rule, RuleEntry, Statistic, Stats, WeightRule, plain_advantage, top
from fire_data.rules.compose import Composite
from fire_data.rules.controls import Uniform
from fire_data.rules.expression import Expression
from fire_data.schemas.config import RULE_PARTS, Denominator, Normalise, Scope, is_expression, split_rule
from fire_data.schemas.errors import ConfigError
from fire_data.schemas.tables import MASSES, addon_of

__all__ = [
    "RULES", "Composite", "Expression", "Parts", "Rule", "RuleEntry", "Statistic", "Stats", "Uniform", "WeightRule",
    "describe_rule", "entropies", "entry_of", "every", "make_rule", "plain_advantage", "rule_names", "top",
]  # fmt: skip

RULES: dict[str, RuleEntry] = {
    **controls.ENTRIES, **fire.ENTRIES, **repairs.ENTRIES, **filters.ENTRIES, **weights.ENTRIES, **masks.ENTRIES,
    **advantages.ENTRIES, **topk.ENTRIES, **forward_kl.ENTRIES, **expression.ENTRIES,
}  # fmt: skip
"""The rules that come with the package; others are found by `entry_of`."""


def make_rule(
    rule: str | Mapping[str, Any] | Rule, params: Mapping[str, Any] | None = None, scope: str | None = None
) -> Rule:
    """A rule from what users write, with checks. `scope` sets all its scopes at once.

    `rule` is a name, names joined with `+`, `file.py:Class`, expressions as text ('weight = ...; keep = ...') or as a
    mapping, or a rule as it is. Parameters of a component are called `name.parameter`; the name may be left out where
    only one component has it. Raises ConfigError for an unknown name, parameter or value, with the nearest match.
    """
    params = dict(params or {})
    if isinstance(rule, Rule):
        return dataclasses.replace(rule, **params) if params else rule
    if isinstance(rule, Mapping):
        return _make("expression", {**rule, **params}, scope)
    if is_expression(rule):
        return _make("expression", {**_parse_parts(rule), **params}, scope)
    names = split_rule(rule)
    return _make(names[0], params, scope) if len(names) == 1 else _composite(names, params, scope)


def entry_of(name: str) -> RuleEntry:
    """The entry of a built-in rule, of an installed one (entry point `fire.rules`), or of `file.py:Class`.

    Raises ConfigError for an unknown name, or a file or class that is no rule.
    """
    if own.is_file(name):
        return own.from_file(name)
    if name in RULES:
        return RULES[name]
    installed = own.installed()
    if name in installed:
        return own.load_installed(name)
    known = [*RULES, *installed]
    near = difflib.get_close_matches(name, known, n=2)
    hint = f", did you mean {' or '.join(map(repr, near))}?" if near else f"; there are: {', '.join(known)}"
    raise ConfigError(f"there is no rule {name!r}{hint}", fix="fire rules")


def _label(name: str) -> str:
    """What a composition calls a component: a rule of a file by its own name."""
    return entry_of(name).cls.name if own.is_file(name) else name


def _make(name: str, params: dict[str, Any], scope: str | None, need_scope: bool = True) -> Rule:
    entry = entry_of(name)
    known = _parameters(entry)
    scopes = {n: scope for n in known if n == "scope" or n.endswith("_scope")} if scope else {}
    if scope and not scopes and need_scope:
        raise ConfigError(f"rule {name!r} has no statistics, so no scope", fix="leave weigh.scope out")
    for given in params:
        if given not in known:
            raise _no_parameter(name, given, known)
    made = _validated(entry.cls, {**entry.preset, **scopes, **params}, name)
    if isinstance(made, Expression) and all(getattr(made, part) is None for part in RULE_PARTS):
        fix = "--rule 'weight = 1 + teacher_entropy; keep = length > 3'"
        raise ConfigError(f"the rule expression needs one of {', '.join(RULE_PARTS)}", fix=fix)
    own.examine(made)
    return made


def _composite(names: list[str], params: dict[str, Any], scope: str | None) -> Composite:
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice is not None:
        raise ConfigError(f"{twice} is there twice", where=f"rule {'+'.join(names)}", fix="name each rule once")
    own_params = {"normalise", "normalise_over", "denominator"}
    outer = {k: v for k, v in params.items() if k in own_params}
    called = [_label(n) for n in names]
    same = next((c for c in called if called.count(c) > 1), None)
    if same is not None:
        text = f"two of the rules are called {same!r}"
        raise ConfigError(text, where=f"rule {'+'.join(names)}", fix="give one of the classes another name")
    labels = dict(zip(called, names, strict=True))
    inner: dict[str, dict[str, Any]] = {n: {} for n in labels}
    for key, value in params.items():
        if key not in own_params:
            label, parameter = _owner(key, labels)
            inner[label][parameter] = value
    rules = tuple(_make(n, inner[label], scope, need_scope=False) for label, n in labels.items())
    denominators = {r.denominator for r in rules} - {"tokens"}
    if len(denominators) > 1 and "denominator" not in outer:
        text = f"its parts have different denominators: {', '.join(sorted(denominators))}"
        raise ConfigError(text, where=f"rule {'+'.join(names)}", fix="-p denominator=tokens")
    values = {"denominator": next(iter(denominators), "tokens"), **outer}
    made = _validated(Composite, {"rules": rules, "names": tuple(labels), **values}, "+".join(labels))
    assert isinstance(made, Composite)
    return made


def _owner(key: str, labels: dict[str, str]) -> tuple[str, str]:
    """Which component a parameter belongs to: `fire.percentile`, or `percentile` if only one component has it."""
    prefix, dot, parameter = key.rpartition(".")
    if dot and prefix in labels:
        return prefix, parameter
    having = [label for label, n in labels.items() if key in _parameters(entry_of(n))]
    if len(having) == 1:
        return having[0], key
    if having:
        fix = f"-p {having[0]}.{key}=VALUE"
        raise ConfigError(f"{' and '.join(having)} both have a parameter {key!r}", fix=fix)
    known = [f"{label}.{p}" for label, n in labels.items() for p in _parameters(entry_of(n))]
    raise _no_parameter("+".join(labels), key, known)


def _parameters(entry: RuleEntry) -> list[str]:
    return [f.name for f in dataclasses.fields(entry.cls)]


def _no_parameter(rule: str, name: str, known: list[str]) -> ConfigError:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f", did you mean {near[0]!r}?" if near else f"; it has: {', '.join(sorted(known))}"
    return ConfigError(f"rule {rule!r} has no parameter {name!r}{hint}", fix=f"fire rules {rule}")


def _validated(cls: type[Rule], values: dict[str, Any], name: str) -> Rule:
    wild = next((k for k, v in values.items() if isinstance(v, float) and not math.isfinite(v)), None)
    if wild is not None:
        raise ConfigError(f"{wild} must be finite, not {values[wild]}", where=f"rule {name}", fix=f"fire rules {name}")
    try:
        return TypeAdapter(cls).validate_python(values)
    except PydanticUserError as error:
        text = f"a parameter has a type that cannot be checked: {error.message.splitlines()[0]}"
        raise ConfigError(text, where=f"rule {name}", fix="use float, int, bool, str or Literal") from None
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}, not {e['input']!r}" for e in error.errors()]
        raise ConfigError("; ".join(lines), where=f"rule {name}", fix=f"fire rules {name}") from None


def _parse_parts(text: str) -> dict[str, str]:
    """`keep = length > 3; weight = 2 * teacher_entropy` as a mapping."""
    parts: dict[str, str] = {}
    for piece in filter(None, (p.strip() for p in re.findall(r"(?:'[^']*'|\"[^\"]*\"|[^;])+", text))):
        name, equals, value = piece.partition("=")
        if name.strip() in parts:
            raise ConfigError(f"{name.strip()!r} is there twice", where=f"rule {text!r}", fix="give it once")
        if not equals or name.strip() not in RULE_PARTS:
            raise ConfigError(
                f"cannot read {piece!r} as a rule",
                fix="a name from `fire rules`, or 'weight = ...; keep = ...' with " + ", ".join(RULE_PARTS),
            )
        parts[name.strip()] = value.strip()
    return parts


def describe_rule(name: str) -> dict[str, Any]:
    """Everything `fire rules NAME` shows, JSON-ready. Raises ConfigError for an unknown name."""
    rule = Expression() if name == "expression" else make_rule(name)
    parts = rule.components
    names = ["expression"] if name == "expression" else split_rule(name)
    entries, labels = [entry_of(n) for n in names], [_label(n) for n in names]
    documents = [inspect.getdoc(type(r)) or "" for r in parts]
    return {
        "name": name,
        "what": entries[0].what if len(parts) == 1 else "all of: " + ", ".join(names),
        "changes": list(rule.changes) or ["nothing"],
        "formula": "\n\n".join(d if len(parts) == 1 else f"{n}: {d}" for n, d in zip(names, documents, strict=True)),
        "paper": list(dict.fromkeys(p for e, r in zip(entries, parts, strict=True) if (p := e.paper or r.paper))),
        "believes": "; ".join(r.belief for r in parts if r.belief),
        "needs": list(rule.columns),
        "adds": _beyond_scores(rule),
        "entropies": entropies(c for r in every(rule) for c in r.columns),
        "scope": list(rule.scopes) or ["token"],
        "stale": rule.goes_stale,
        "parameters": [
            {"name": f"{n}.{f.name}" if len(parts) > 1 else f.name, "value": getattr(r, f.name), "type": _choices(f)}
            for n, r in zip(labels, parts, strict=True)
            for f in dataclasses.fields(r)
        ],
    }


def _choices(field: dataclasses.Field[Any]) -> str:
    """The type of a parameter in words: what it may be."""
    words = field.type.__name__ if isinstance(field.type, type) else str(field.type)
    for name, literal in (("Scope", Scope), ("Denominator", Denominator), ("Normalise", Normalise)):
        words = re.sub(rf"\b{name}\b", " | ".join(get_args(literal)), words)
    return re.sub(r"Literal\[([^\]]*)\]", lambda m: m[1].replace(", ", " | ").replace("'", "").replace('"', ""), words)


def rule_names() -> list[str]:
    """The built-in rules and those that installed packages offer."""
    return list(dict.fromkeys([*RULES, *own.installed()]))


def every(rule: Rule) -> list[Rule]:
    """A rule with its components and what it is matched to."""
    inside = [r for c in rule.components if c is not rule for r in every(c)]
    return [rule, *inside, *(every(rule.matched) if rule.matched else [])]


def entropies(columns: Iterable[str]) -> list[str]:
    """Those of the columns that hold entropies. A rule that reads one must be told where these are only bounds."""
    kinds = {c.name.removesuffix("_mass") for c in MASSES}
    return list(dict.fromkeys(c for c in columns if c.partition(".")[0] in kinds))


def _beyond_scores(rule: Rule) -> list[str]:
    """What must be there beside the scores: rewards, or columns that `fire score --add` stores."""
    found = (addon_of(c) or ("reward" if c == "reward" else None) for c in rule.columns)
    return list(dict.fromkeys(f for f in found if f is not None))
