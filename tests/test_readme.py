"""The README is true: its file tree is the modules' first lines, every command is named, the config it shows exists."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _modules() -> list[Path]:
    folders = ("schemas", "fire_data", "cli")
    return sorted(
        p.relative_to(ROOT) for f in folders for p in (ROOT / f).rglob("*.py") if "__pycache__" not in p.parts
    )


def _tree() -> dict[str, str]:
    """Path -> one line, from the README's file tree."""
    block = README.split("## What is where")[1].split("```")[1]
    found, folder = {}, ""
    for line in block.splitlines()[1:]:
        name, _, what = line.strip().partition("  ")
        if line and not line.startswith(" "):
            folder = name.removesuffix("/")
        elif name:
            found[f"{folder}/{name}"] = what.strip()
    return found


@pytest.mark.parametrize("path", _modules(), ids=str)
def test_a_modules_first_line_is_its_line_in_the_tree(path: Path) -> None:
    first = (ast.get_docstring(ast.parse((ROOT / path).read_text(encoding="utf-8"))) or "").splitlines()[0]
    assert _tree()[str(path)] == first


def test_the_tree_names_no_file_that_is_not_there() -> None:
    assert [p for p in _tree() if not (ROOT / p).exists()] == []


def _commands() -> list[list[str]]:
    lines = [line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()]
    inline = re.findall(r"`(fire [^`]+)`", README)
    return [shlex.split(x, comments=True) for x in [*lines, *inline] if x.startswith("fire ")]


def test_every_command_in_the_readme_parses() -> None:
    from typer.testing import CliRunner

    from fire_data.cli.app import app

    assert len(_commands()) > 12
    for command in _commands():
        result = CliRunner().invoke(app, [*command[1:], "--help"])
        assert result.exit_code == 0, command


def test_every_command_is_in_the_readme(fire: Callable[..., Any]) -> None:
    names = re.findall(r"^  (\w+) +[A-Z]", fire("--help").out, re.M)
    assert len(names) >= 13
    assert [n for n in names if f"fire {n}" not in README] == []


def test_settings_named_in_the_readme_exist() -> None:
    from fire_data.schemas.config import Config, _section_of

    sections = "|".join(Config.model_fields)
    named = re.findall(rf"`({sections})\.(\w+)[:`]", README)
    assert len(named) > 3
    for section, field in named:
        model = _section_of(Config.model_fields[section].annotation)
        assert model is not None
        assert field in model.model_fields, f"{section}.{field}"
