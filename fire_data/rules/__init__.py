"""The rules by name: published presets, controls and free expressions, made from plain parameters with checks."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from fire_data.rules.base import Rule, Stats
from fire_data.rules.controls import Random, Uniform
from fire_data.rules.expression import PARTS, Expression
from fire_data.rules.fire import Fire
from fire_data.schemas.errors import ConfigError

__all__ = ["RULES", "Expression", "Rule", "RuleEntry", "Stats", "Uniform", "describe_rule", "make_rule"]


class RuleEntry(NamedTuple):
    """A name users can give: a class, and the parameters this name presets."""

    cls: type[Rule]
    preset: dict[str, Any]
    what: str


_ALL_STEP = {"filter_scope": "step", "max_scope": "step", "mean_scope": "step", "denominator": "tokens"}
_PAPER = {"filter_scope": "step", "max_scope": "step", "mean_scope": "trajectory", "denominator": "tokens"}
_RELEASED = {
    "filter_scope": "trajectory",
    "max_scope": "trajectory",
    "mean_scope": "trajectory",
    "denominator": "sequences",
}

RULES: dict[str, RuleEntry] = {
    "uniform": RuleEntry(Uniform, {}, "plain on-policy distillation"),
    "fire": RuleEntry(Fire, _ALL_STEP, "every statistic over the step: the reference function given the whole batch"),
    "fire-paper": RuleEntry(Fire, _PAPER, "as printed: filter and maxima over the step, mean weight per trajectory"),
    "fire-released": RuleEntry(Fire, _RELEASED, "what the released scripts compute: the filter is inert"),
    "random": RuleEntry(Random, {}, "random drops at the token budget of another rule"),
    "expression": RuleEntry(Expression, {}, "keep, weight, advantage, token_keep as expressions"),
}


def make_rule(
    rule: str | Mapping[str, Any] | Rule, params: Mapping[str, Any] | None = None, scope: str | None = None
) -> Rule:
    """A rule from its name, from a mapping of expressions, or as it is. `scope` sets all its scopes at once.

    Raises ConfigError for an unknown name, parameter or value, with the nearest match.
    """
    params = dict(params or {})
    if isinstance(rule, Rule):
        return dataclasses.replace(rule, **params) if params else rule
    if isinstance(rule, Mapping):
        params, rule = {**rule, **params}, "expression"
    elif rule not in RULES and "=" in rule:
        params, rule = {**_parse_parts(rule), **params}, "expression"
    if rule not in RULES:
        near = difflib.get_close_matches(rule, RULES, n=1)
        hint = f", did you mean {near[0]!r}?" if near else f"; there are: {', '.join(RULES)}"
        raise ConfigError(f"there is no rule {rule!r}{hint}", fix="fire rules")
    entry = RULES[rule]
    known = {f.name for f in dataclasses.fields(entry.cls)}
    scopes = {name: scope for name in known if name == "scope" or name.endswith("_scope")} if scope else {}
    if scope and not scopes:
        raise ConfigError(f"rule {rule!r} has no statistics, so no scope", fix="leave weigh.scope out")
    for name in params:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f", did you mean {near[0]!r}?" if near else f"; it has: {', '.join(sorted(known))}"
            raise ConfigError(f"rule {rule!r} has no parameter {name!r}{hint}", fix=f"fire rules {rule}")
    made = _validated(entry.cls, {**entry.preset, **scopes, **params}, rule)
    if isinstance(made, Expression) and all(getattr(made, part) is None for part in PARTS):
        fix = "--rule 'weight = 1 + teacher_entropy; keep = length > 3'"
        raise ConfigError(f"the rule expression needs one of {', '.join(PARTS)}", fix=fix)
    return made


def _validated(cls: type[Rule], values: dict[str, Any], name: str) -> Rule:
    adapter = TypeAdapter(cls)
    try:
        return adapter.validate_python(values)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}, not {e['input']!r}" for e in error.errors()]
        raise ConfigError("; ".join(lines), where=f"rule {name}", fix=f"fire rules {name}") from None


def _parse_parts(text: str) -> dict[str, str]:
    """`keep = length > 3; weight = 2 * teacher_entropy` as a mapping."""
    parts = {}
    for piece in filter(None, (p.strip() for p in text.split(";"))):
        name, equals, value = piece.partition("=")
        if not equals or name.strip() not in PARTS:
            raise ConfigError(
                f"cannot read {piece!r} as a rule",
                fix="a name from `fire rules`, or 'weight = ...; keep = ...' with " + ", ".join(PARTS),
            )
        parts[name.strip()] = value.strip()
    return parts


def describe_rule(name: str) -> dict[str, Any]:
    """Everything `fire rules NAME` shows, JSON-ready. Raises ConfigError for an unknown name."""
    rule = Expression() if name == "expression" else make_rule(name)
    cls = RULES[name].cls
    return {
        "name": name,
        "what": RULES[name].what,
        "formula": " ".join((cls.__doc__ or "").split()),
        "paper": f"arXiv {cls.paper}" if cls.paper else "",
        "believes": cls.belief,
        "needs": list(cls.needs),
        "goes_stale": cls.goes_stale,
        "parameters": {f.name: getattr(rule, f.name) for f in dataclasses.fields(rule)},
    }
