"""The examples run as they are, at their smallest size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_every_rule_can_be_trained_on_the_demo_world_and_the_results_become_a_table(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    command = [sys.executable, str(EXAMPLES / "train_rules.py"), "--smoke", "--folder", str(tmp_path)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert answer.returncode == 0, answer.stderr
    rows = [json.loads(line) for line in answer.stdout.splitlines()]
    assert [r["rule"] for r in rows] == ["uniform", "tip"]
    assert rows[0]["kept_tokens"] == 1 > rows[1]["kept_tokens"] > 0.4
    assert "| `tip` | 0.50 |" in answer.stderr
    again = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    same = [json.loads(line) for line in again.stdout.splitlines()]
    assert [r["sampled"] for r in same] == [r["sampled"] for r in rows], "what is finished is taken up"
