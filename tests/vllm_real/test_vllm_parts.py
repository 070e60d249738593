"""What of the vLLM engine needs no vLLM: messages, the entropy's arithmetic, seeds, interpreters that lack it."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fire_data.schemas.config import VllmConfig
from fire_data.schemas.errors import ConfigError, EngineError
from fire_data.vllm_engine import VllmEngine
from fire_data.vllm_process import last_words
from fire_data.vllm_worker import fire_vllm
from tests.vllm_real.conftest import STOPS, VOCABULARY


def test_a_message_comes_through_whole_or_not_at_all() -> None:
    stream = io.BytesIO()
    arrays = {"ids": np.arange(6, dtype=np.int32)[::2], "pairs": np.zeros((0, 3), np.float32), "ok": np.array([True])}
    fire_vllm.write_message(stream, {"job": 3, "text": "ü}"}, arrays)
    data = stream.getvalue()
    read = fire_vllm.read_message(io.BytesIO(data))
    assert read is not None
    assert read[0] == {"job": 3, "text": "ü}"}
    assert {name: (a.tolist(), a.dtype, a.shape) for name, a in read[1].items()} == {
        name: (a.tolist(), a.dtype, a.shape) for name, a in arrays.items()
    }
    for end in range(len(data)):
        assert fire_vllm.read_message(io.BytesIO(data[:end])) is None


def test_entropy_slots_hold_token_top1_and_entropy() -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    logits_TV = torch.randn(64, 9) * 4
    logits_TV[:, 4] = torch.finfo(torch.float32).min / 4
    ids_T = torch.randint(0, 4, (64,))
    ids, slots, ranks = fire_vllm.entropy_slots(logits_TV, ids_T)
    logprobs_TV = logits_TV.double().log_softmax(-1)
    entropy = torch.special.entr(logprobs_TV.exp()).sum(-1)
    torch.testing.assert_close(slots[:, 0].double(), logprobs_TV[range(64), ids_T], atol=1e-5, rtol=0)
    torch.testing.assert_close(slots[:, 1].double(), logprobs_TV.max(-1).values, atol=1e-5, rtol=0)
    torch.testing.assert_close(slots[:, 2].double(), entropy, atol=1e-5, rtol=0)
    assert torch.equal(ids[:, 0], ids_T.int())
    assert torch.equal(ids[:, 1], logits_TV.argmax(-1).int())
    more_likely = logprobs_TV > logprobs_TV[range(64), ids_T][:, None]
    assert ranks.tolist() == (more_likely.sum(-1) + 1).tolist()
    for token, top1, free in ids.tolist():
        assert free == next(i for i in range(3) if i not in (token, top1))


def test_a_certain_token_has_entropy_zero_and_equal_tokens_share_a_rank() -> None:
    torch = pytest.importorskip("torch")
    certain = torch.tensor([[0.0, 200.0, 0.0], [1.0, 1.0, 0.0]])
    _, slots, ranks = fire_vllm.entropy_slots(certain, torch.tensor([1, 1]))
    assert slots[0].tolist() == [0.0, 0.0, 0.0]
    assert ranks.tolist() == [1, 1]


@pytest.mark.parametrize("version", ["none", "another"])
def test_another_vllm_keeps_its_own_prompt_logprobs(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    class Runner:
        def _get_prompt_logprobs_dict(self) -> None: ...

    plain = Runner._get_prompt_logprobs_dict
    names = ["vllm", "vllm.v1", "vllm.v1.worker", "vllm.v1.worker.gpu_model_runner"]
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    if version == "another":
        sys.modules[names[-1]].GPUModelRunner = Runner  # type: ignore[attr-defined]
    assert fire_vllm.install() is False
    assert Runner._get_prompt_logprobs_dict is plain


def test_last_words_are_what_was_raised_and_not_what_was_handled() -> None:
    log = """
(MainProcess pid=7) WARNING 11-22 19:05:50 [base.py:380] ValueError: Tokenizer not available
[rank0]:   File "a.py", line 3, in build
[rank0]: RuntimeError: Unsupported CPU attention configuration: head_dim=16
Traceback (most recent call last):
  File "b.py", line 3, in main
pydantic_core.ValidationError: 1 validation error for ModelConfig
  Value error, too long
"""
    assert last_words(log) == [
        "RuntimeError: Unsupported CPU attention configuration: head_dim=16",
        "pydantic_core.ValidationError: 1 validation error for ModelConfig",
        "Value error, too long",
    ]
    assert last_words("\n".join("abcdefg") + "\n\n") == list("defg")
    assert last_words("") == []


def engine_with(python: object, folder: Path, log: Path) -> VllmEngine:
    return VllmEngine(
        folder, dtype="float32", settings=VllmConfig(python=str(python)), vocabulary=VOCABULARY, stop_ids=STOPS,
        log=log, threads=1, longest=8,
    )  # fmt: skip


def test_an_interpreter_without_vllm_is_told_with_what_to_install(models: dict[str, Any], tmp_path: Path) -> None:
    log = tmp_path / "log"
    with pytest.raises(ConfigError, match="no interpreter") as caught:
        engine_with(tmp_path / "python", models["a"], log)
    assert "fire-opd[vllm]" in str(caught.value)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    with pytest.raises(ConfigError, match="not installed") as caught:
        engine_with(tmp_path / "bare" / "bin" / "python", models["a"], log)
    assert "vllm.python" in str(caught.value)
    assert str(tmp_path / "bare") in str(caught.value)
    assert not log.exists()


def test_a_worker_that_cannot_start_is_told_with_its_last_words(models: dict[str, Any], tmp_path: Path) -> None:
    liar = tmp_path / "python"
    liar.write_text('#!/bin/sh\ncase "$1" in -I) exit 0;; esac\necho the disk is made of cheese >&2\nexit 7\n')
    os.chmod(liar, 0o755)
    (tmp_path / "log").write_text("an older run\n")
    with pytest.raises(EngineError, match=r"(?s)exit code 7.*the disk is made of cheese") as caught:
        engine_with(liar, models["a"], tmp_path / "log")
    assert "an older run" not in str(caught.value)
    assert str(tmp_path / "log") in str(caught.value)
