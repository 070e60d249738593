"""`RUN/metrics.jsonl`: one JSON object per optimizer step, each step once however often training was killed.

A line with `stopped_by` is no step: its round ended there, before the update that the line is about. The next step has
the same `global_step`, and belongs to a later round.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fire_data import files

_TOLD = {"seconds", "tokens_per_second", "loss", "grad_norm", "drift_kl"}


def append(path: Path, record: dict[str, Any]) -> None:
    """Add one line and make it durable enough to be read while training goes on."""
    with files.storage_errors(path), path.open("a", encoding="utf-8") as f:
        f.write(json.dumps(record, allow_nan=False) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """All whole lines; a line torn by a kill is left out. Raises StorageError."""
    with files.storage_errors(path):
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    records = []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            records.append(value)
    return records


def steps(path: Path, round: int | str | None = None) -> list[dict[str, Any]]:
    """The lines that are optimizer steps, of one round or of all."""
    return [r for r in read(path) if "stopped_by" not in r and round in (None, r.get("round"))]


def summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    """First and last loss of a round's steps, and how many were skipped, for the manifest."""
    # The log is for people, and nothing protects it: a line that was changed is as good as none.
    records = [r for r in records if "skipped" in r]
    done = [r for r in records if not r["skipped"] and r.keys() >= _TOLD]
    skipped = {
        "skipped_steps": sum(bool(r["skipped"]) for r in records),
        "nonfinite_steps": sum("nonfinite" in r for r in records),
    }
    if not done:
        return skipped
    seconds = [r["seconds"] for r in done]
    executed = sum(r["tokens_per_second"] * s for r, s in zip(done, seconds, strict=True))
    return {
        **skipped,
        "ratio_check": records[0].get("ratio_check"),
        "loss_first": done[0]["loss"],
        "loss_last": done[-1]["loss"],
        **({"fkl_loss_last": done[-1]["fkl_loss"]} if "fkl_loss" in done[-1] else {}),
        "grad_norm_last": done[-1]["grad_norm"],
        "drift_kl_last": done[-1]["drift_kl"],
        "ess_last": done[-1].get("ess"),
        "tokens_per_second": executed / sum(seconds),
    }


def rewind(path: Path, global_step: int, round: int, tmp: Path) -> None:
    """Forget what is from this step of this round on, and torn lines: it is about to be done again."""
    if not path.exists():
        return
    kept = [r for r in read(path) if (r.get("global_step", -1), r.get("round", -1)) < (global_step, round)]
    files.replace_bytes(path, "".join(json.dumps(r) + "\n" for r in kept).encode(), tmp)
