"""Training state and export: bitwise resume, masters apart from exports, nothing half-written is ever loaded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from fire_data import training, trainstate
from fire_data.models import head_of
from fire_data.optim import make_optimizer
from fire_data.schemas.config import TrainConfig
from fire_data.schemas.errors import DamagedError, DataError, StorageError, TrainingError
from fire_data.trainstate import export_checkpoint, load_state, prune_states, save_state
from tests.tinymodels import (
    SIZE,
    VOCABULARY,
    latest_state,
    moments_of,
    one_step,
    same_tensors,
    step_batch,
    tiny_model,
    train_config,
    weights_of,
)

# Training state


def _train(model: Any, optimizer: Any, steps: range, cfg: TrainConfig) -> None:
    scorer = tiny_model()
    for step in steps:
        one_step(model, optimizer, step_batch(scorer, seed=step, step=step), cfg, step)


RESUME = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
import tests.test_trainstate as t
torch.set_num_threads(1)
model = t.tiny_model(seed=9)
cfg = t.train_config(warmup_steps=5)
optimizer = t.make_optimizer(model, cfg)
root = Path(sys.argv[2])
meta = t.load_state(t.latest_state(root), model, optimizer)
t._train(model, optimizer, range(meta["global_step"], 6), cfg)
t.save_state(root / "6", model, optimizer, {"global_step": 6})
"""


def test_training_resumed_in_a_new_process_is_bitwise_the_same(tmp_path: Path) -> None:
    cfg = train_config(warmup_steps=5)
    model = tiny_model()
    optimizer = make_optimizer(model, cfg)
    _train(model, optimizer, range(3), cfg)
    save_state(tmp_path / "3", model, optimizer, {"global_step": 3, "round": 0})
    _train(model, optimizer, range(3, 6), cfg)
    command = [sys.executable, "-c", RESUME, str(Path(__file__).parent.parent), str(tmp_path)]
    subprocess.run(command, check=True, timeout=300)
    resumed = tiny_model(seed=2)
    restored = make_optimizer(resumed, cfg)
    assert load_state(tmp_path / "6", resumed, restored) == {"global_step": 6}
    assert same_tensors(weights_of(model), weights_of(resumed))
    assert same_tensors(moments_of(model, optimizer), moments_of(resumed, restored))
    assert len(moments_of(model, optimizer)) == 3 * len(list(model.parameters()))


def test_export_and_resume_after_each_of_50_steps_change_no_bit(tmp_path: Path) -> None:
    cfg = train_config(lr=1e-6)
    start = tiny_model()
    plain, optimizer = tiny_model(), None
    optimizer = make_optimizer(plain, cfg)
    _train(plain, optimizer, range(50), cfg)

    model = tiny_model()
    state = make_optimizer(model, cfg)
    for step in range(50):
        _train(model, state, range(step, step + 1), cfg)
        export_checkpoint(tmp_path / f"export-{step}", model, _tokenizer(), "bfloat16")
        save_state(tmp_path / "state" / str(step), model, state, {"global_step": step})
        prune_states(tmp_path / "state", 1)
        model, state = tiny_model(seed=step + 1), None
        state = make_optimizer(model, cfg)
        load_state(latest_state(tmp_path / "state"), model, state)
    assert same_tensors(weights_of(plain), weights_of(model))
    assert same_tensors(moments_of(plain, optimizer), moments_of(model, state))
    assert len(list((tmp_path / "state").iterdir())) == 1

    naive = tiny_model(dtype=torch.bfloat16)
    naive_start = weights_of(naive)
    naive_optimizer = make_optimizer(naive, cfg)
    for step in range(50):
        batch = step_batch(start, seed=step)
        training._accumulate(naive, head_of(naive), batch, cfg, VOCABULARY)
        naive_optimizer.step()
        naive_optimizer.zero_grad()
    assert _moved(naive_start, weights_of(naive)) < 0.02
    assert _moved(weights_of(start), weights_of(plain)) > 0.9


def _moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> float:
    """Share of the numbers that changed."""
    changed = sum(int((before[k] != after[k]).sum()) for k in before)
    return changed / sum(tensor.numel() for tensor in before.values())


@pytest.mark.parametrize("tied", [True, False])
def test_state_keeps_ties_and_stores_a_tied_matrix_once(tmp_path: Path, tied: bool) -> None:
    cfg = train_config()
    model = tiny_model(tied=tied)
    optimizer = make_optimizer(model, cfg)
    _train(model, optimizer, range(2), cfg)
    save_state(tmp_path / "a", model, optimizer, {"global_step": 2})
    record = json.loads((tmp_path / "a" / "meta.json").read_text())
    assert record["ties"] == ({"lm_head.weight": "model.embed_tokens.weight"} if tied else {})
    other = tiny_model(seed=5, tied=tied)
    restored = make_optimizer(other, cfg)
    load_state(tmp_path / "a", other, restored)
    assert same_tensors(weights_of(model), weights_of(other))
    assert (other.lm_head.weight is other.model.embed_tokens.weight) is tied
    _train(model, optimizer, range(2, 4), cfg)
    _train(other, restored, range(2, 4), cfg)
    assert same_tensors(weights_of(model), weights_of(other))
    mismatched = tiny_model(tied=not tied)
    with pytest.raises(DataError, match="differ in"):
        load_state(tmp_path / "a", mismatched, make_optimizer(mismatched, cfg))


def test_state_before_the_first_step_has_no_moments(tmp_path: Path) -> None:
    model = tiny_model()
    save_state(tmp_path / "0", model, make_optimizer(model, train_config()), {"global_step": 0})
    other = tiny_model(seed=1)
    optimizer = make_optimizer(other, train_config())
    _train(other, optimizer, range(1), train_config())
    load_state(tmp_path / "0", other, optimizer)
    assert same_tensors(weights_of(model), weights_of(other))
    assert not optimizer.state


def test_state_of_another_model_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    model = tiny_model()
    save_state(tmp_path / "0", model, make_optimizer(model, train_config()), {"global_step": 0})
    double = tiny_model(seed=1, dtype=torch.float64)
    weights = weights_of(double)
    with pytest.raises(DataError, match=r"float32 .* and torch.float64"):
        load_state(tmp_path / "0", double, make_optimizer(double, train_config()))
    assert same_tensors(weights, weights_of(double))


@pytest.mark.parametrize("name", ["weights", "exp_avg", "exp_avg_sq", "step", "meta"])
def test_flipped_bit_in_a_state_is_damage_and_nothing_changes(tmp_path: Path, name: str) -> None:
    model = tiny_model()
    optimizer = make_optimizer(model, train_config())
    _train(model, optimizer, range(1), train_config())
    save_state(tmp_path / "1", model, optimizer, {"global_step": 1, "note": "abc"})
    path = tmp_path / "1" / (name + (".json" if name == "meta" else ".safetensors"))
    data = bytearray(path.read_bytes())
    data[len(data) - 20 if name != "meta" else data.index(b"abc")] ^= 1
    path.write_bytes(data)
    other = tiny_model(seed=3)
    weights = weights_of(other)
    with pytest.raises(DamagedError, match=path.name):
        load_state(tmp_path / "1", other, make_optimizer(other, train_config()))
    assert same_tensors(weights, weights_of(other))


class Killed(BaseException):
    """Stands for kill -9: no handler of the code under test runs."""


def _fail_at(monkeypatch: pytest.MonkeyPatch, at: int, error: BaseException) -> list[str]:
    """Raise at the at-th file-system call of a save; calls before it happen. Returns the names of the calls made."""
    calls: list[str] = []

    def wrap(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            if len(calls) == at + 1:
                raise error
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    for owner, name in [
        (trainstate, "save_file"), (trainstate, "write_bytes"), (trainstate, "sha256_file"), (trainstate, "remove"),
        (Path, "mkdir"), (os, "fsync"), (os, "rename"),
    ]:  # fmt: skip
        wrap(owner, name)
    return calls


@pytest.mark.parametrize("replacing", [False, True])
@pytest.mark.parametrize("kill", [True, False])
def test_save_interrupted_at_any_call_leaves_a_whole_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replacing: bool, kill: bool
) -> None:
    cfg = train_config()
    model = tiny_model()
    optimizer = make_optimizer(model, cfg)
    _train(model, optimizer, range(1), cfg)
    target = "1" if replacing else "2"
    seen = set()
    for at in range(100):
        root = tmp_path / str(at)
        save_state(root / "1", model, optimizer, {"global_step": 1, "from": "old"})
        with monkeypatch.context() as patch:
            calls = _fail_at(patch, at, Killed() if kill else OSError(28, "No space left on device"))
            try:
                save_state(root / target, model, optimizer, {"global_step": int(target), "from": "new"})
                outcome = "done"
            except Killed:
                outcome = "killed"
            except StorageError as error:
                outcome = "refused" if "disk is full" in str(error) else str(error)
        other = tiny_model(seed=4)
        for visible in root.glob("[!.]*"):
            load_state(visible, other, make_optimizer(other, cfg))
        meta = load_state(latest_state(root), other, make_optimizer(other, cfg))
        assert same_tensors(weights_of(model), weights_of(other))
        assert meta["from"] == "new" or outcome != "done"
        seen.add((outcome, meta["from"]))
        save_state(root / target, model, optimizer, {"global_step": int(target), "from": "again"})
        prune_states(root, 1)
        assert [p.name for p in root.iterdir()] == [target]
        assert load_state(latest_state(root), other, make_optimizer(other, cfg))["from"] == "again"
        if outcome == "done":
            break
    assert at == len(calls) > 15
    assert {"save_file", "write_bytes", "fsync", "rename", "mkdir"} <= set(calls)
    assert seen >= {("killed" if kill else "refused", "old"), ("done", "new")}


def test_full_disk_inside_safetensors_is_a_storage_error_and_leaves_no_litter(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    model = tiny_model()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(StorageError, match="file system failed"):
            save_state(tmp_path / "0", model, make_optimizer(model, train_config()), {"global_step": 0})
        with pytest.raises(StorageError, match="file system failed"):
            export_checkpoint(tmp_path / "export", model, _tokenizer(), "float32")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_inside_tokenizers_is_a_storage_error(tmp_path: Path) -> None:
    class Full(PreTrainedTokenizerFast):
        def save_pretrained(self, *arguments: Any, **named: Any) -> Any:
            raise Exception("No space left on device (os error 28)")

    full = Full(tokenizer_object=_tokenizer().backend_tokenizer)
    with pytest.raises(StorageError, match="the disk is full"):
        export_checkpoint(tmp_path / "export", tiny_model(), full, "float32")
    assert list(tmp_path.iterdir()) == []


def test_latest_state_ignores_unfinished_and_incomplete_folders(tmp_path: Path) -> None:
    model = tiny_model()
    optimizer = make_optimizer(model, train_config())
    assert latest_state(tmp_path / "nowhere") is None
    for step in (9, 10, 2):
        save_state(tmp_path / f"step-{step}", model, optimizer, {"global_step": step})
    assert latest_state(tmp_path) == tmp_path / "step-10"
    (tmp_path / "step-11").mkdir()
    (tmp_path / "step-10").rename(tmp_path / ".step-10.tmp")
    assert latest_state(tmp_path) == tmp_path / "step-9"
    (tmp_path / "step-9" / "weights.safetensors").unlink()
    assert latest_state(tmp_path) == tmp_path / "step-2"
    assert prune_states(tmp_path, 1) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-11", "step-2", "step-9"]


def test_state_set_aside_counts_only_while_it_is_the_only_one(tmp_path: Path) -> None:
    model = tiny_model()
    optimizer = make_optimizer(model, train_config())
    for step in (1, 2, 3):
        save_state(tmp_path / str(step), model, optimizer, {"global_step": step})
    (tmp_path / "3").rename(tmp_path / "3.replaced")
    assert latest_state(tmp_path) == tmp_path / "3.replaced"
    save_state(tmp_path / "3", model, optimizer, {"global_step": 3})
    shutil.copytree(tmp_path / "2", tmp_path / "3.replaced")
    assert latest_state(tmp_path) == tmp_path / "3"
    (tmp_path / "3.replaced" / "meta.json").unlink()
    assert prune_states(tmp_path, 2) == [tmp_path / "1"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "3"]


def test_equal_states_have_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        model = tiny_model()
        optimizer = make_optimizer(model, train_config())
        _train(model, optimizer, range(2), train_config())
        save_state(tmp_path / name, model, optimizer, {"global_step": 2})
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert files == [
        "exp_avg.safetensors",
        "exp_avg_sq.safetensors",
        "meta.json",
        "step.safetensors",
        "weights.safetensors",
    ]
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)


# Export


def _tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(SIZE)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), eos_token="w1")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return tokenizer


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("tied", [True, False])
def test_export_loads_as_exactly_the_cast_weights(tmp_path: Path, dtype: str, tied: bool) -> None:
    model = tiny_model(tied=tied)
    model.generation_config.eos_token_id = [1, 3]
    before, config = weights_of(model), model.config.to_dict()
    export_checkpoint(tmp_path / "x", model, _tokenizer(), dtype)
    assert same_tensors(before, weights_of(model))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config.to_dict() == {**config, "architectures": ["Qwen3ForCausalLM"]}
    target = getattr(torch, dtype)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    assert same_tensors({k: v.to(target) for k, v in before.items()}, weights_of(loaded))
    assert loaded.config.dtype == target
    assert json.loads((tmp_path / "x" / "config.json").read_text())["dtype"] == dtype
    assert loaded.generation_config.eos_token_id == [1, 3]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "x")
    assert tokenizer.chat_template == _tokenizer().chat_template
    assert tokenizer.get_vocab() == _tokenizer().get_vocab()
    assert [p.name for p in (tmp_path / "x").glob("*.bin")] == []


def test_export_does_not_overwrite(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "precious").touch()
    with pytest.raises(StorageError):
        export_checkpoint(tmp_path / "x", tiny_model(), _tokenizer(), "float32")
    assert (tmp_path / "x" / "precious").exists()


def test_export_of_a_weight_beyond_half_range_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = 1e5
    with pytest.raises(TrainingError, match=r"layers.1.mlp.down_proj.weight .* float16"):
        export_checkpoint(tmp_path / "x", model, _tokenizer(), "float16")
    assert not (tmp_path / "x").exists()
