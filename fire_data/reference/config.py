"""The page of all settings: type, default, meaning, and what happens when a setting changes."""

from __future__ import annotations

from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fire_data.reference import code, prose, table
from fire_data.schemas.config import Config

_INTRODUCTION = """# Settings

`fire init` writes a `fire.yaml` with every setting, its default and its meaning; a key that is left out has its
default. On the command line `--set section.key=value` wins over the file. Unknown keys are errors.

The last column says what a change means for what is there already:

* **result**: the setting is part of a stage's fingerprint. Changing it inside a started round is an error (exit 2)
  that names the setting; it may change between rounds, and `--redo` makes a stage anew.
* **addon**: it changes a table beside the scores alone, and enters the fingerprint of that table.
* **free**: speed, memory or a place. It is recorded, may change at any time, and changes no result.
"""
_SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
_WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false", NoneType: "null", Any: "any"}


def page() -> str:
    """Markdown of the page: one table per section."""
    parts = [_INTRODUCTION]
    plain = {n: f for n, f in Config.model_fields.items() if section(f.annotation) is None}
    parts += ["## Top level\n", _fields(plain)]
    for name, field in Config.model_fields.items():
        inner = section(field.annotation)
        if inner is None:
            continue
        about = prose(field.description or inner.__doc__ or "").removesuffix(".")
        parts.append(f"## `{name}`\n\n{about[:1].upper()}{about[1:]}.\n")
        if name in ("teacher", "teachers", "base"):
            of = "Each has the" if name == "teachers" else "The"
            parts.append(f"{of} keys of [`student`](#student).\n")
        else:
            parts.append(_fields(inner.model_fields))
            for key, sub in inner.model_fields.items():
                if (below := section(sub.annotation)) is not None:
                    parts.append(f"### `{name}.{key}`\n\n{prose(below.__doc__ or '')}\n")
                    parts.append(_fields(below.model_fields))
    return "\n".join(parts)


def section(annotation: Any) -> type[BaseModel] | None:
    """The model behind the annotation of a section, of one that may be null, or of sections by name."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def effect(field: FieldInfo) -> str:
    """What a change of a field means: result, addon or free."""
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    return "free" if extra.get("perf") else "addon" if extra.get("addon") else "result"


def _fields(fields: dict[str, FieldInfo]) -> str:
    rows = [
        [f"`{name}`", _type(field), _default(field), prose(field.description or ""), effect(field)]
        for name, field in fields.items()
    ]
    return table(("key", "type", "default", "meaning", "changes"), rows)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    text = yaml.safe_dump(value, default_flow_style=True).removesuffix("\n").removesuffix("\n...")
    return code(text)


def _type(field: FieldInfo) -> str:
    signs = ((m, name, sign) for m in field.metadata for name, sign in _SIGNS.items() if hasattr(m, name))
    return ", ".join([_words(field.annotation), *(f"{sign} {getattr(m, name):g}" for m, name, sign in signs)])


def _words(annotation: Any) -> str:
    """A type in words."""
    inner = get_args(annotation)
    origin = get_origin(annotation)
    if annotation is section(annotation):
        return "section"
    if origin is Literal:
        return ", ".join(code(str(v)) for v in inner)
    if origin in (Union, UnionType):
        return " or ".join(map(_words, inner))
    if origin is tuple:
        return f"list of {_words(inner[0])}" if inner[-1] is Ellipsis else f"{len(inner)} times {_words(inner[0])}"
    if origin is dict:
        return f"mapping to {_words(inner[1])}"
    return _WORDS[annotation]
