"""Offline-first on-policy distillation of language models: roll out, score, weigh, train, with tables in between."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fire_data.frames import explode
    from fire_data.run import Run, open_run
    from fire_data.weighing import weigh

__all__ = ["Run", "explode", "open_run", "weigh"]

# Loaded when first used: importing the package costs nothing.
_HOMES = {"Run": "run", "explode": "frames", "open_run": "run", "weigh": "weighing"}


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"fire_data.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'fire_data' has no attribute {name!r}")
