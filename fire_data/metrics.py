"""`RUN/metrics.jsonl`: one JSON object per optimizer step, each step once however often training was killed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fire_data import files


def append(path: Path, record: dict[str, Any]) -> None:
    """Add one line and make it durable enough to be read while training goes on."""
    with files.storage_errors(path), path.open("a", encoding="utf-8") as f:
        f.write(json.dumps(record, allow_nan=False) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """All whole lines; a line torn by a kill is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            records.append(value)
    return records


def rewind(path: Path, global_step: int, tmp: Path) -> None:
    """Forget steps from `global_step` on, and torn lines: they are about to be done again."""
    if not path.exists():
        return
    kept = [r for r in read(path) if r.get("global_step", -1) < global_step]
    files.replace_bytes(path, "".join(json.dumps(r) + "\n" for r in kept).encode(), tmp)
