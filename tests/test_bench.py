"""Every benchmark runs at its smallest size and prints ratios as JSON; how fast anything is, is not tested."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "bench"
SCRIPTS = sorted(path.stem for path in BENCH.glob("*.py") if path.stem != "measure")
# vllm_stages runs the code of vllm; engines and clusters take long to start.
SMOKED = [name for name in SCRIPTS if name not in ("vllm", "cluster")]


def _smoke(script: str) -> dict[str, Any]:
    if script != "cli":
        pytest.importorskip("transformers")
    python = Path(os.environ.get("FIRE_VLLM_PYTHON") or ROOT / ".venv-vllm/bin/python")
    if script.startswith("vllm") and not python.exists():
        pytest.skip("needs an environment with vLLM: make vllm")
    if script == "report" and shutil.which("chromium") is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("needs chromium")
    command = [sys.executable, str(BENCH / f"{script}.py"), "--smoke"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert answer.returncode == 0, answer.stderr
    found: dict[str, Any] = json.loads(answer.stdout)
    return found


def test_there_is_a_benchmark_per_stage() -> None:
    names = "check cli cluster peer report rollout rules scale score storage train vllm vllm_stages weigh"
    assert names.split() == SCRIPTS


@pytest.mark.parametrize("script", SMOKED)
def test_a_benchmark_prints_its_ratios_as_json(script: str) -> None:
    found = _smoke(script)
    assert found["bench"] == script
    assert found["settings"]["smoke"] is True
    for group in found["groups"].values():
        assert len(group["ratios"]) == len(group["cases"]) - 1 > 0
        for case in group["cases"].values():
            assert len(case["seconds"]) == found["settings"]["repeat"]
            assert script == "cli" or case["tokens"] > 0
        numbers = [x for ratio in group["ratios"].values() for x in (ratio["median"], *ratio["range"])]
        assert all(math.isfinite(x) and x > 0 for x in numbers)
        assert group.get("largest_disagreement", 0.0) < 1e-4, "both sides must have done the same work"


def test_what_is_compared_computes_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    import measure

    alike = [{"loss": 2.0, "only ours": 1.0}, {"loss": 2.0}, {}]
    assert measure._disagreement(alike) == 0.0
    assert measure._disagreement([{"loss": 2.0}, {"loss": 1.0}]) == pytest.approx(0.5)


def test_ratios_are_of_neighbours_in_time_and_per_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    import measure

    ours = {"seconds": [1.0, 20.0, 3.0], "tokens": 10}
    peer = {"seconds": [2.0, 40.0, 2.0], "tokens": 20}
    found = measure.summarise({"fire": ours, "peer": peer})
    assert found["ratios"] == {"peer": {"median": 1.0, "range": [1.0, 3.0]}}
    assert found["cases"]["fire"]["tokens_per_s"] == pytest.approx(10 / 3)


def test_trainings_are_compared_where_both_have_spent_as_much(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(BENCH))
    import peer
    import polars as pl

    from fire_data.experiment.spec import Spec
    from fire_data.experiment.table import SCHEMA

    def rows(arm: str, tokens: int, seconds: float, ends: list[float]) -> list[dict[str, Any]]:
        """Three rounds of so many tokens and seconds, evaluated at the start and at the end."""
        return [
            {"arm": arm, "seed": seed, "round": r, "rollout_tokens": r * tokens, "cpu_seconds": seconds if r else 0.0}
            | (dict.fromkeys(peer.ACCURACIES, end if r else 0.0) if r in (0, 3) else {})
            for seed, end in enumerate(ends)
            for r in range(4)
        ]

    table = pl.DataFrame([*rows("fire", 100, 4.0, [0.6, 0.9]), *rows("trl", 200, 1.0, [0.8, 0.8])], schema=SCHEMA)
    spec = Spec.model_validate({"worlds": {"chain": ["single"]}, "arms": peer.OURS, "seeds": 2, "target": 0.6})
    found = peer.differences("fire", "trl", spec, table)
    assert found["greedy at equal tokens"]["by_seed"] == pytest.approx([0.2, 0.5]), "TRL had come half of its way"
    assert found["sampled at equal CPU seconds"]["by_seed"] == pytest.approx([0.15 - 0.8, 0.225 - 0.8])
    assert found["CPU seconds to 0.6"]["by_seed"] == pytest.approx([12 - 2.25, 8 - 2.25])
    assert found["greedy at equal tokens"]["mean"] == pytest.approx(0.35)
    assert found["greedy at equal tokens"]["low"] < 0.2
    never = peer.differences("fire", "trl", spec.model_copy(update={"target": 0.95}), table)
    assert "CPU seconds to 0.95" not in never
    assert peer.tested([0.1])["low"] is None, "one seed has no interval"
