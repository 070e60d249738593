"""The page of all commands: what each does, its arguments and options."""

from __future__ import annotations

import inspect
from typing import Any

import typer.main

from fire_data.cli.app import app
from fire_data.reference import code, prose, table

_INTRODUCTION = """# Commands

`RUN` is a run directory and the first argument. Settings come from its `fire.yaml`; `--set section.key=value` wins.
stdout is data (a table for people, `--json` for machines), stderr is progress and hints, of which the last is the next
command. [When something fails](../failures.md) has the exit codes.
"""


def page() -> str:
    """Markdown of the page: one section per command."""
    group: Any = typer.main.get_command(app)
    return "\n".join([_INTRODUCTION, *(_command(name, command) for name, command in group.commands.items())])


def _command(name: str, command: Any) -> str:
    arguments = [
        _value(p) if p.required else f"[{_value(p)}]" for p in command.params if p.param_type_name == "argument"
    ]
    usage = " ".join(["fire", name, *arguments, "[OPTIONS]"])
    about = inspect.cleandoc(command.help or "").split("\n\n")
    parts = [f"## `fire {name}`", f"```text\n{usage}\n```", *(prose(" ".join(p.split())) for p in about)]
    examples = inspect.cleandoc(command.epilog or "").removeprefix("Examples:").strip()
    if examples:
        parts.append(f"```sh\n{examples}\n```")
    rows = [[_flags(p), _default(p), prose(p.help or "")] for p in command.params if p.name != "help"]
    return "\n\n".join([*parts, table(("argument or option", "default", "meaning"), rows)])


def _value(parameter: Any) -> str:
    """What stands for the value on the command line."""
    return str(parameter.metavar or parameter.name.upper())


def _flags(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return code(_value(parameter))
    value = "" if parameter.is_flag else f" {_value(parameter)}"
    return code(", ".join([*parameter.opts, *parameter.secondary_opts]) + value)


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    return "" if parameter.default in (None, False, ()) else code(str(parameter.default))
