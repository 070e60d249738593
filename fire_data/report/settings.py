"""The configuration of a run as rows of a table, with whatever may be a secret taken out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from fire_data.environment import KEY
from fire_data.schemas.config import Config

HIDDEN = "(not shown)"
# Only free mappings (arguments of an engine, of a template) can hold keys that `Config` does not name.
_SECRET_WORDS = frozenset(
    {"key", "apikey", "token", "secret", "password", "passwd", "credential", "credentials", "authorization", "auth"}
)
_IN_URL = re.compile(r"(?<=://)[^/@\s]+@")
_IN_QUERY = re.compile(r"(?<=[?&])([\w-]*(?:key|token|secret|password|auth)[\w-]*)=[^&\s]+", re.IGNORECASE)


def settings(config: Config) -> list[dict[str, Any]]:
    """Every field as `key`, `value` and whether it is `changed`, other than its default."""
    values = config.model_dump(mode="json")
    defaults = dict(_flat(Config.model_validate({"student": {"model": ""}}).model_dump(mode="json")))
    found = []
    for key, value in _flat(values):
        model, _, name = key.rpartition(".")
        # Every model has the defaults of the student's.
        default = f"student.{name}" if model in ("teacher", "base") or model.startswith("teachers.") else key
        changed = default not in defaults or defaults[default] != value
        found.append({"key": key, "value": redacted(key, value), "changed": changed})
    return found


def redacted(key: str, value: Any) -> Any:
    """The value, or as much of it as is no secret: nothing of a key called so, no password of a url, no token."""
    if isinstance(value, Mapping):
        return {k: redacted(k, v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(key, v) for v in value]
    words = re.split(r"[^a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key.rpartition(".")[2]).lower())
    if value not in (None, "") and _SECRET_WORDS & {*words} and not key.endswith(_NAMED):
        return HIDDEN
    if not isinstance(value, str):
        return value
    return KEY.sub(HIDDEN, _IN_QUERY.sub(rf"\1={HIDDEN}", _IN_URL.sub(f"{HIDDEN}@", value)))


_NAMED = ("api_key_env", "weigh.end_token")  # fields whose names sound like secrets and are none


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
