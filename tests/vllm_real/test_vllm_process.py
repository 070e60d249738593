"""The life of a vLLM process: how it ends, what is kept when it dies, and that it never outlives who started it."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fire_data.sampling import Sampling
from fire_data.schemas.errors import EngineError, PartialError
from fire_data.vllm_engine import VllmEngine
from tests.vllm_real.conftest import alive, answered, requests

ASKED = requests(12)
SAMPLING = Sampling(seed=3, max_new_tokens=16)
PARENT = """
import sys
from pathlib import Path
from fire_data.schemas.config import VllmConfig
from fire_data.vllm_engine import VllmEngine
from tests.vllm_real.conftest import POSITIONS, STOPS, VOCABULARY

settings = VllmConfig(python=sys.argv[1], cpu_kv_cache_gb=0.1)
engine = VllmEngine(
    Path(sys.argv[2]), dtype="float32", settings=settings, vocabulary=VOCABULARY, stop_ids=STOPS,
    log=Path(sys.argv[3]), threads=1, longest=POSITIONS,
)
print(engine.pid, flush=True)
sys.stdin.read()
"""


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether a condition of another process comes true in time."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        select.select([], [], [], 0.05)
    return condition()


def test_two_engines_agree_and_closing_one_leaves_the_other(
    engine: VllmEngine, start: Callable[..., VllmEngine], models: dict[str, Path]
) -> None:
    ours = engine.generate(ASKED, SAMPLING)
    other = start(models["a"], settings={"max_num_seqs": 3})
    assert other.pid != engine.pid
    again = other.generate(ASKED, SAMPLING)
    assert again["response_ids"].to_pylist() == ours["response_ids"].to_pylist(), "another process, other batches"
    other.close()
    assert not alive(other.pid)
    other.close()
    with pytest.raises(EngineError, match="closed"):
        other.evaluate(answered(ASKED, ours))
    assert engine.generate(ASKED, SAMPLING).equals(ours)


def test_a_killed_engine_is_told_and_its_finished_rows_are_kept(
    engine: VllmEngine, start: Callable[..., VllmEngine], models: dict[str, Path]
) -> None:
    long = Sampling(seed=3, max_new_tokens=36)
    many = requests(400)
    whole = answered(many, engine.generate(many, long))
    lengths = [len(ids) for ids in whole["response_ids"].to_pylist()]
    order = sorted(range(400), key=lambda i: lengths[i])
    whole = whole.take([order[-1], *order[:-1]])  # the first row is not the first to be finished
    doomed = start(models["a"], settings={"max_num_seqs": 2})
    with pytest.raises(PartialError, match="exit code -9") as caught:
        doomed.generate(whole, long, lambda _finished: os.kill(doomed.pid, signal.SIGKILL))
    assert caught.value.where is not None
    assert Path(caught.value.where).exists(), "the log"
    done = caught.value.done
    assert 0 < done.num_rows < many.num_rows
    expected = dict(zip(whole["trajectory_id"].to_pylist(), whole["response_ids"].to_pylist(), strict=True))
    for name, ids in zip(done["trajectory_id"].to_pylist(), done["response_ids"].to_pylist(), strict=True):
        assert ids == expected[name]
    with pytest.raises(EngineError, match="exit code -9"):
        doomed.evaluate(whole)


def test_an_engine_ends_with_the_process_that_started_it(
    vllm_python: str, models: dict[str, Path], tmp_path: Path
) -> None:
    command = [sys.executable, "-c", PARENT, vllm_python, str(models["a"]), str(tmp_path / "log")]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert alive(pid)
        parent.kill()
    assert wait_for(lambda: not alive(pid), 15)


def test_an_engine_that_is_not_ready_in_time_is_ended(
    start: Callable[..., VllmEngine], models: dict[str, Path]
) -> None:
    with pytest.raises(EngineError, match="not ready after") as caught:
        start(models["a"], settings={"start_timeout": 0.1})
    assert "vllm.start_timeout" in str(caught.value)
