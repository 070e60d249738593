"""A real vLLM server on this machine: its values are the model's, and it may die in the middle of the work."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

pytest.importorskip("httpx")
pytest.importorskip("stamina")
torch = pytest.importorskip("torch")

from fire_data import http_engine  # noqa: E402
from fire_data.http_engine import HttpEngine, probe_difference  # noqa: E402
from fire_data.sampling import Sampling, processed_logprobs  # noqa: E402
from fire_data.schemas.config import HttpConfig  # noqa: E402
from fire_data.schemas.errors import ConfigError  # noqa: E402
from fire_data.schemas.tables import IDS  # noqa: E402
from fire_data.scoring import TransformersEvaluator  # noqa: E402
from fire_data.vocabulary import Vocabulary  # noqa: E402
from tests.protocol_server import VOCAB, byte_tokenizer  # noqa: E402

VOCABULARY = Vocabulary(VOCAB, np.ones(VOCAB, dtype=np.bool_))
STOPS = frozenset({3, 17})  # not what the model's files call the end, which is 0
CONTEXT = 128
WORKER = Path(http_engine.__file__).parent / "vllm_worker"
EXTENDED = ("--worker-extension-cls", "fire_vllm.Extension", "--logprobs-mode", "processed_logprobs")


class Server:
    """`vllm.entrypoints.openai.api_server` on a port of its own; all its processes are one group."""

    def __init__(self, python: str, model: Path, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.python, self.model, self.log = python, model, log
        self.extra: tuple[str, ...] = ()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self, *extra: str) -> None:
        """Begin to start; returns at once."""
        self.extra = extra
        arguments = [
            "--model", str(self.model), "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(self.port),
            "--dtype", "float32", "--enforce-eager", "--max-model-len", str(CONTEXT), "--no-enable-chunked-prefill",
            "--max-num-batched-tokens", "4096", *extra,
        ]  # fmt: skip
        environment = os.environ | {
            "PYTHONPATH": str(WORKER), "VLLM_USE_V2_MODEL_RUNNER": "0", "TORCHDYNAMO_DISABLE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        command = [self.python, "-m", "vllm.entrypoints.openai.api_server", *arguments]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait(self) -> None:
        """Until it answers."""
        assert self.process is not None
        for _ in range(1200):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).close()
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                assert self.process.poll() is None, self.log.read_text()[-4000:]
                time.sleep(0.2)
            else:
                return
        raise AssertionError(self.log.read_text()[-4000:])

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def require(self, *extra: str) -> None:
        """Run with these arguments."""
        if self.process is None or self.extra != extra:
            self.kill()
            self.start(*extra)
        self.wait()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 with random weights and the tokenizer. Heads of 32, as vLLM's attention on CPU knows no smaller ones."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, tie_word_embeddings=False, initializer_range=0.3,
        bos_token_id=0, eos_token_id=0, pad_token_id=0, max_position_embeddings=CONTEXT,
    )  # fmt: skip
    target = tmp_path_factory.mktemp("served") / "tiny"
    transformers.Qwen3ForCausalLM(config).save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    from transformers import Qwen3ForCausalLM

    torch.set_num_threads(1)
    return Qwen3ForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def server(vllm_python: str, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    found = Server(vllm_python, folder, tmp_path_factory.mktemp("log") / "server.log")
    yield found
    found.kill()


@pytest.fixture
def engine(server: Server, folder: Path) -> Iterator[HttpEngine]:
    limits = HttpConfig(concurrency=4, timeout=120.0, deadline=300.0)
    found = HttpEngine(
        server.url, "tiny", model=str(folder), settings=limits, api_key=None, vocabulary=VOCABULARY, stop_ids=STOPS,
        entropy_topk=20, who="teacher",
    )  # fmt: skip
    yield found
    found.close()


def rows(count: int, seed: int = 0) -> pa.Table:
    """Prompts of 1 to 20 ids and responses of 1 to 30."""
    random = np.random.default_rng(seed)
    draw = lambda longest: random.integers(0, VOCAB, random.integers(1, longest + 1)).tolist()  # noqa: E731
    ids = {"prompt_ids": [draw(20) for _ in range(count)], "response_ids": [draw(30) for _ in range(count)]}
    return pa.table({"trajectory_id": [f"t{i}" for i in range(count)], **{n: pa.array(v, IDS) for n, v in ids.items()}})


def values(table: pa.Table, column: str) -> np.ndarray:
    found: np.ndarray = table[column].combine_chunks().flatten().to_numpy()
    return found


def theirs(model: Any, table: pa.Table) -> pa.Table:
    return TransformersEvaluator(model, VOCABULARY, 8192, 2**26).evaluate(table)


def test_a_plain_server_scores_as_transformers_and_bounds_the_entropy(
    server: Server, engine: HttpEngine, tokenizer: Any, model: Any
) -> None:
    server.require()
    record = engine.probe(tokenizer, CONTEXT - 1)
    assert record["dialect"] == "prompt_logprobs"
    assert record["tokenization"] == "tokenize"
    assert record["max_model_len"] == CONTEXT
    assert record["logprobs_mode"] == "raw"
    assert engine.entropy_kind == "topk-lower-bound"
    with pytest.raises(ConfigError, match="room for 128 tokens, the longest row needs 129"):
        engine.probe(tokenizer, CONTEXT)
    table = rows(40)
    found, right = engine.evaluate(table), theirs(model, table)
    for column in ("logprob", "max_logprob"):
        assert np.abs(values(found, column) - values(right, column)).max() < 1e-4
    for column in ("top1_id", "rank"):
        np.testing.assert_array_equal(values(found, column), values(right, column))
    gap, mass = values(right, "entropy") - values(found, "entropy"), values(found, "entropy_mass")
    assert (gap > -1e-4).all()
    assert (gap < (1 - mass) * np.log((VOCAB - 20) / (1 - mass)) + 1e-4).all()
    assert np.median(mass) < 0.99


def test_a_row_may_fill_the_context_but_for_the_token_that_scoring_writes(
    server: Server, engine: HttpEngine, tokenizer: Any, model: Any
) -> None:
    server.require()
    engine.probe(tokenizer, CONTEXT - 1)
    ids = np.random.default_rng(3).integers(0, VOCAB, CONTEXT - 1).tolist()
    table = pa.table(
        {"trajectory_id": ["t"], "prompt_ids": pa.array([ids[:9]], IDS), "response_ids": pa.array([ids[9:]], IDS)}
    )
    gap = values(engine.evaluate(table), "logprob") - values(theirs(model, table), "logprob")
    assert np.abs(gap).max() < 1e-4


def test_samples_have_the_logprobs_of_the_model_and_end_where_the_student_ends(
    server: Server, engine: HttpEngine, tokenizer: Any, model: Any
) -> None:
    server.require()
    sampling = Sampling(5, max_new_tokens=40)
    engine.probe(tokenizer, CONTEXT, sampling)
    asked = rows(40, seed=1).select(["trajectory_id", "prompt_ids"])
    found = engine.generate(asked, sampling)
    written = found["response_ids"].to_pylist()
    right = theirs(model, asked.append_column("response_ids", found["response_ids"]))
    assert np.abs(values(found, "rollout_logprob") - values(right, "logprob")).max() < 1e-4
    assert set(found["finish_reason"].to_pylist()) == {"stop", "length"}
    for ids, reason in zip(written, found["finish_reason"].to_pylist(), strict=True):
        assert (ids[-1] in STOPS) == (reason == "stop")
        assert not STOPS & set(ids[:-1])
        assert reason == "stop" or len(ids) == 40
    assert any(0 in ids[:-1] for ids in written), "the end that only the model's files name ends nothing"
    assert engine.generate(asked, sampling)["response_ids"].to_pylist() == written
    assert engine.generate(asked, Sampling(6, max_new_tokens=40))["response_ids"].to_pylist() != written
    with pytest.raises(ConfigError, match="rollout_logprob would be wrong"):
        engine.generate(asked, Sampling(5, temperature=0.7, max_new_tokens=40))
    greedy = engine.generate(asked, Sampling(5, max_new_tokens=10, greedy=True))
    right = theirs(model, asked.append_column("response_ids", greedy["response_ids"]))
    assert np.abs(values(greedy, "rollout_logprob") - values(right, "logprob")).max() < 1e-4


def test_a_server_killed_in_the_middle_and_started_again_loses_nothing_and_repeats_nothing(
    server: Server, engine: HttpEngine, tokenizer: Any, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.require()
    before = engine.probe(tokenizer, CONTEXT - 1)
    table, events, lock = rows(400, seed=2), [], threading.Lock()
    read = http_engine.read_scores

    def told(event: str, ids: list[int]) -> None:
        with lock:
            events.append((event, tuple(ids)))

    async def asked(request: Any) -> None:
        if request.url.path.endswith("/completions"):
            told("asked", json.loads(request.content)["prompt"])

    def read_and_tell(answer: Any, dialect: Any, ids: list[int], start: int) -> Any:
        scores = read(answer, dialect, ids, start)
        told("finished", ids)
        return scores

    monkeypatch.setattr(http_engine, "read_scores", read_and_tell)
    engine.client._http.event_hooks["request"].append(asked)
    finished, enough = [0], threading.Event()

    def progress(count: int) -> None:
        finished[0] += count
        if finished[0] >= 40:
            enough.set()

    def kill_and_start_again() -> None:
        enough.wait(120)
        server.kill()
        told("killed", [])
        server.start(*EXTENDED)

    helper = threading.Thread(target=kill_and_start_again)
    helper.start()
    found = engine.evaluate(table, progress)
    helper.join()
    kill = events.index(("killed", ()))
    assert 40 <= sum(e == "finished" for e, _ in events[:kill]) < 390, "it was killed in the middle"
    assert np.abs(values(found, "logprob") - values(theirs(model, table), "logprob")).max() < 1e-4
    assert Counter(ids for e, ids in events if e == "finished") == Counter(
        tuple(p + r) for p, r in zip(table["prompt_ids"].to_pylist(), table["response_ids"].to_pylist(), strict=True)
    )
    for i, (event, ids) in enumerate(events):
        assert event != "asked" or ("finished", ids) not in events[:i], "what was finished is asked again"
    requests = sum(e == "asked" for e, _ in events)
    assert 400 < requests <= 400 + 4, "only what was in flight is asked again"
    after = engine.probe(tokenizer, CONTEXT - 1)
    difference = probe_difference(before, after)
    assert difference is not None
    assert difference < 1e-4


def test_a_server_with_the_extension_gives_the_entropy_itself(
    server: Server, engine: HttpEngine, tokenizer: Any, model: Any
) -> None:
    server.require(*EXTENDED)
    record = engine.probe(tokenizer, CONTEXT - 1)
    assert record["entropy_kind"] == engine.entropy_kind == "exact"
    table = rows(40, seed=4)
    found, right = engine.evaluate(table), theirs(model, table)
    assert found.column_names == right.column_names
    for column in ("logprob", "max_logprob", "entropy"):
        assert np.abs(values(found, column) - values(right, column)).max() < 1e-4, column
    for column in ("top1_id", "rank"):
        np.testing.assert_array_equal(values(found, column), values(right, column))


@pytest.mark.parametrize("changes", [{"temperature": 0.6}, {"top_p": 0.8}, {"top_k": 7}])
def test_processed_logprobs_are_of_the_distribution_sampled_from(
    server: Server, engine: HttpEngine, tokenizer: Any, model: Any, changes: dict[str, Any]
) -> None:
    server.require(*EXTENDED)
    sampling = Sampling(8, max_new_tokens=12, **changes)
    assert engine.probe(tokenizer, CONTEXT, sampling)["logprobs_mode"] == "processed"
    asked = rows(8, seed=5)
    found = engine.generate(asked, sampling)
    answered = zip(
        asked["prompt_ids"].to_pylist(), *(found[c].to_pylist() for c in found.column_names[:2]), strict=True
    )
    gaps = []
    for prompt, ids, logprobs in answered:
        with torch.inference_mode():
            logits_LV = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        right = processed_logprobs(logits_LV, sampling)[torch.arange(len(ids)), torch.tensor(ids)]
        gaps += np.abs(right.numpy() - logprobs).tolist()
    # A token at the very edge of top-p may be in or out by rounding, which moves all the others by its probability.
    edge = 0.02 if sampling.top_p < 1 else 1e-4
    assert np.quantile(gaps, 0.9) < 1e-4
    assert max(gaps) < edge
