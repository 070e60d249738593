"""`fire rules`: all rules as a table, or one in full: formula, parameters, what it needs and what it believes."""

from __future__ import annotations

from typing import Any

import typer

from fire_data.schemas.errors import ConfigError

from .errors import say
from .terminal import show, show_one, text


def show_rules(as_json: bool) -> None:
    """One row per rule: what it changes, over which population, if it goes stale, what must be there beside scores."""
    from fire_data.rules import describe_rule, rule_names

    described = []
    for name in rule_names():
        try:
            described.append(describe_rule(name))
        except ConfigError as error:  # an installed package that is broken must not hide the others
            say(f"warning: {error}")
    columns = ("name", "changes", "scope", "stale", "adds", "paper", "what")
    titles = {"paper": "arXiv", "adds": "beside scores"}
    rows = [{titles.get(k, k): d[k] for k in columns} for d in described]
    show(described if as_json else rows, as_json)


def show_rule(name: str, as_json: bool) -> None:
    """One rule, or a composition, in full."""
    from fire_data.rules import describe_rule

    found = describe_rule(name)
    if as_json:
        show_one(found, True)
        return
    lines = [f"{found['name']}: {found['what']}", ""]
    facts = {
        "paper": ", ".join(f"arXiv {p}" for p in found["paper"]),
        "believes": found["believes"],
        "changes": text(found["changes"]),
        "scope": text(found["scope"]),
        "needs": text(found["needs"]),
        "beside scores": text(found["adds"]),
        "entropies": found["entropies"] and f"{text(found['entropies'])}: exact ones, or --set weigh.entropy=any",
        "stale": "yes: it depends on the student, which training changes" if found["stale"] else "no",
    }
    lines += [f"{k:<14}{v}" for k, v in facts.items() if v]
    lines += ["", "formula", *(f"  {line}".rstrip() for line in found["formula"].splitlines()), "", "parameters"]
    lines += [_parameter(p) for p in found["parameters"]]
    typer.echo("\n".join(lines))


def _parameter(parameter: dict[str, Any]) -> str:
    return f"  {parameter['name']} = {text(parameter['value'])}    ({parameter['type']})"
