"""Engines in the interpreter of FIRE_VLLM_PYTHON, else of .venv-vllm; without either, what needs one is skipped."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from fire_data.schemas.config import VllmConfig
from fire_data.schemas.tables import IDS
from fire_data.vllm_engine import VllmEngine
from fire_data.vocabulary import Vocabulary

ROWS, SIZE, FORBIDDEN = 48, 40, 7  # output rows of the model, ids of the tokenizer, one of them not the teacher's
VOCABULARY = Vocabulary(SIZE, np.arange(SIZE) != FORBIDDEN)
STOPS = frozenset({1, 5})
OWN_END = 9  # what the model's files call the end, and no response ends with
POSITIONS = 48


@pytest.fixture(scope="session")
def vllm_python() -> str:
    """The interpreter that has vLLM."""
    python = os.environ.get("FIRE_VLLM_PYTHON") or str(Path(__file__).parents[2] / ".venv-vllm" / "bin" / "python")
    if not Path(python).exists():
        pytest.skip("needs an environment with vLLM: make vllm")
    return python


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two Qwen3 with random weights. Heads of 32, as vLLM's attention on CPU knows no smaller ones."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folders = {}
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        config = transformers.Qwen3Config(
            vocab_size=ROWS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=32, tie_word_embeddings=True, initializer_range=0.3,
            bos_token_id=0, eos_token_id=OWN_END, pad_token_id=2, max_position_embeddings=POSITIONS,
        )  # fmt: skip
        folders[name] = tmp_path_factory.mktemp("models") / name
        transformers.Qwen3ForCausalLM(config).save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="session")
def torch_models(models: dict[str, Path]) -> dict[str, Any]:
    """The same weights in transformers."""
    from transformers import Qwen3ForCausalLM

    return {name: Qwen3ForCausalLM.from_pretrained(folder).eval() for name, folder in models.items()}


@pytest.fixture(scope="session")
def start(vllm_python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., VllmEngine]]:
    """`start(folder, ...)`: an engine in a process of its own, closed at the end."""
    engines = []

    def make(folder: Path, *, settings: dict[str, Any] | None = None, **changes: Any) -> VllmEngine:
        fields: dict[str, Any] = {"python": vllm_python, "cpu_kv_cache_gb": 0.1, "max_num_seqs": 8, **(settings or {})}
        given = {"dtype": "float32", "vocabulary": VOCABULARY, "stop_ids": STOPS, "threads": 1, "longest": POSITIONS}
        log = tmp_path_factory.mktemp("log") / "deep" / "vllm.log"
        engines.append(VllmEngine(folder, settings=VllmConfig(**fields), log=log, **(given | changes)))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture(scope="session")
def engine(start: Callable[..., VllmEngine], models: dict[str, Path]) -> VllmEngine:
    """Model a, its cache in blocks that these prompts can fill. Who loads other weights puts a's back."""
    return start(models["a"], settings={"args": {"block_size": 32}})


def requests(rows: int, seed: int = 0, longest: int = 8) -> pa.Table:
    """Prompts of 1 to `longest` ids of the vocabulary, pairs of neighbours alike."""
    random = np.random.default_rng(seed)
    ids = np.flatnonzero(VOCABULARY.allowed)
    pairs = [random.choice(ids, 1 + i % longest).tolist() for i in range((rows + 1) // 2)]
    prompts = [pairs[i // 2] for i in range(rows)]
    return pa.table({"trajectory_id": [f"t{i}" for i in range(rows)], "prompt_ids": pa.array(prompts, IDS)})


def answered(asked: pa.Table, answer: pa.Table) -> pa.Table:
    """Requests and their responses, as they are evaluated."""
    return asked.append_column("response_ids", answer["response_ids"])


def values(table: pa.Table, column: str) -> np.ndarray:
    """All elements of a list column."""
    found: np.ndarray = table[column].combine_chunks().flatten().to_numpy()
    return found


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended but was not waited for does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
