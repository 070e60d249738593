"""LoRA: only adapters move, their gradient is peft's own, rounds and resumes continue exactly, exports need no peft."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fire_data import lora, metrics, training
from fire_data.head import plain_linear
from fire_data.hub.checkpoint import model_card
from fire_data.hub.layout import files_of, read_index, write_index
from fire_data.hub.redact import shared_manifest
from fire_data.loss import surrogate_loss
from fire_data.models import head_of, load_model
from fire_data.optim import make_optimizer
from fire_data.plan.models import adapters, parameters
from fire_data.plan.models import training as plan_training
from fire_data.run import Run, open_run
from fire_data.schemas.config import LoraConfig, TrainConfig
from fire_data.schemas.errors import ConfigError, DataError, FingerprintError
from fire_data.schemas.manifest import ADAPTER
from fire_data.session import Session
from fire_data.shards import sealed
from fire_data.steps.refresh import refresh
from fire_data.steps.rollout import rollout
from fire_data.steps.score import score
from fire_data.steps.train import train
from fire_data.steps.weigh import weigh
from fire_data.training import EXACT_TOLERANCE, ROUNDED_TOLERANCE
from fire_data.trainstate import export_checkpoint, load_state, save_state
from tests.faults import kills
from tests.test_trainstate import _tokenizer
from tests.tinymodels import (
    SIZE,
    VOCABULARY,
    latest_state,
    one_step,
    plain_logprobs,
    same_tensors,
    step_batch,
    tiny_model,
    train_config,
    with_budget,
)

peft = pytest.importorskip("peft")

MakeRun = Callable[..., Run]
SMALL = LoraConfig(rank=4, alpha=8)
HEAD = LoraConfig(rank=4, alpha=8, targets=("q_proj", "down_proj", "lm_head"))
HEAD_ALONE = LoraConfig(rank=4, alpha=8, targets=("lm_head",))
TRAIN = {"lora": {"rank": 4, "alpha": 8}, "lr": 1e-2, "epochs": 2, "save_every": 1}


def adapted(
    cfg: LoraConfig = SMALL, *, tied: bool = True, dtype: torch.dtype = torch.float32, moved: bool = True
) -> Any:
    """A tiny model with adapters; `moved`: B is random as well, as after some training."""
    model = tiny_model(tied=tied, dtype=dtype)
    lora.attach(model, cfg, seed=1)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if moved and "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients(model: Any, batch: Any, cfg: TrainConfig) -> dict[str, torch.Tensor]:
    """Gradients as they reach the optimizer, by name."""
    seen: dict[str, torch.Tensor] = {}
    optimizer = make_optimizer(model, cfg)
    optimizer.register_step_pre_hook(lambda *_: seen.update({n: p.grad.clone() for n, p in trained(model).items()}))
    one_step(model, optimizer, batch, cfg)
    return seen


def plain_gradients(model: Any, batch: Any, cfg: TrainConfig) -> dict[str, torch.Tensor]:
    """The same by plain autograd through full logits, row by row."""
    total = torch.zeros((), dtype=torch.float64)
    allowed = torch.tensor(VOCABULARY.allowed)
    for prompt, response, old, coefficient in zip(
        batch.prompt_ids, batch.response_ids, batch.old_logprob, batch.coefficient, strict=True
    ):
        ids = torch.tensor(np.concatenate([prompt, response]))
        logits = model(ids[None]).logits[0, :, :SIZE].masked_fill(~allowed, -torch.inf)
        now = logits.log_softmax(-1)[torch.arange(len(prompt) - 1, len(ids) - 1), torch.tensor(response)]
        total = total + surrogate_loss(now, torch.tensor(old), torch.tensor(coefficient), cfg.clip)
    total.backward()
    found = {name: p.grad.clone() for name, p in trained(model).items()}
    model.zero_grad()
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("cfg", "tied"), [(SMALL, True), (SMALL, False), (HEAD, False), (HEAD_ALONE, False)])
def test_the_gradient_of_adapters_is_that_of_plain_peft_and_full_logits(
    cfg: LoraConfig, tied: bool, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = train_config(
        compute_dtype="float64", max_grad_norm=0.0, tokens_per_microbatch=40, gradient_checkpointing=checkpointing
    )
    monkeypatch.setattr(training, "head_backward", with_budget(5 * 48 * 8))  # the head in several chunks
    model = adapted(cfg, tied=tied, dtype=torch.float64)
    batch = step_batch(tiny_model(tied=tied, dtype=torch.float64), noise=0.1)
    assert (plain_linear(head_of(model)) is None) == ("lm_head" in cfg.targets)
    expected = plain_gradients(model, batch, settings)
    found = gradients(model, batch, settings)
    assert found.keys() == expected.keys() != set()
    assert all("lora_" in name and float(found[name].abs().max()) > 0 for name in found)
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-14)


def test_only_adapters_move_and_only_they_have_gradients_moments_and_a_place_in_the_state(tmp_path: Path) -> None:
    model, cfg = adapted(), train_config()
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, cfg)
    batch = step_batch(tiny_model())
    seen: set[str] = set()
    optimizer.register_step_pre_hook(
        lambda *_: seen.update(n for n, p in model.named_parameters() if p.grad is not None)
    )
    for step in range(3):
        one_step(model, optimizer, batch, cfg, step)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == seen == set(trained(model))
    assert {id(p) for p in optimizer.state} == {id(p) for p in trained(model).values()}
    save_state(tmp_path / "s", model, optimizer, {"global_step": 3})
    saved = load_file(tmp_path / "s" / "weights.safetensors")
    assert same_tensors(saved, {n: p.detach() for n, p in trained(model).items()})
    other = adapted(moved=False)
    load_state(tmp_path / "s", other, make_optimizer(other, cfg))
    assert same_tensors(model.state_dict(), other.state_dict())


def test_a_step_without_a_trained_token_has_zero_gradients_whatever_is_adapted() -> None:
    batch = step_batch(tiny_model(tied=False))
    batch = dataclasses.replace(batch, coefficient=[0 * np.asarray(c) for c in batch.coefficient])
    for cfg in (SMALL, HEAD, HEAD_ALONE):
        found = gradients(adapted(cfg, tied=False), batch, train_config())
        assert found
        assert all(not bool(g.any()) for g in found.values())


def test_new_adapters_change_no_bit_of_the_logits_and_follow_from_the_seed() -> None:
    ids = torch.arange(6)[None]
    model, again, other = adapted(moved=False), tiny_model(), tiny_model()
    assert torch.equal(model(ids).logits, again(ids).logits)
    state = torch.random.get_rng_state()
    lora.attach(again, SMALL, seed=1)
    lora.attach(other, SMALL, seed=2)
    assert torch.equal(torch.random.get_rng_state(), state), "the seed of others is left alone"
    assert same_tensors(trained(model), trained(again))
    assert not same_tensors(trained(model), trained(other))


@pytest.mark.parametrize(("cfg", "tied"), [(SMALL, True), (HEAD, False)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_export_is_the_merged_model_rounded_once(tmp_path: Path, cfg: LoraConfig, tied: bool, dtype: str) -> None:
    model = adapted(cfg, tied=tied)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    prompt, response = np.arange(5), np.arange(10, 30)
    now = plain_logprobs(model, prompt, response)
    export_checkpoint(tmp_path / "x", model, _tokenizer(), dtype)
    assert same_tensors(before, model.state_dict())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    assert type(loaded.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    whole = tiny_model(tied=tied)
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            with torch.no_grad():
                added = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * 2.0
                whole.get_submodule(name).weight += added
    assert same_tensors(loaded.state_dict(), {k: t.to(getattr(torch, dtype)) for k, t in whole.state_dict().items()})
    # Rounding is all that is between the exported model and the trainer's.
    moved = np.abs(plain_logprobs(tiny_model(tied=tied), prompt, response) - now).mean()
    difference = np.abs(plain_logprobs(loaded.float(), prompt, response) - now).mean()
    assert difference < (EXACT_TOLERANCE if dtype == "float32" else ROUNDED_TOLERANCE) < moved / 3


def test_the_adapter_folder_is_peft_own_format_and_exact(tmp_path: Path) -> None:
    model = tiny_model(tied=False)
    lora.attach(model, HEAD, seed=1, base="me/student", revision="abc")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    for name in ("a", "b"):
        export_checkpoint(tmp_path / name, model, _tokenizer(), "bfloat16")
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    assert [f.name for f in files if f.parent.name == ADAPTER] == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((tmp_path / "a" / ADAPTER / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"], config["r"]) == ("me/student", "abc", 4)
    loaded = peft.PeftModel.from_pretrained(tiny_model(tied=False), tmp_path / "a" / ADAPTER)
    ids = torch.arange(8)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert not getattr(plain, "peft_config", {}), "the whole model does not take the adapter up a second time"


@pytest.mark.parametrize(
    ("targets", "words"),
    [(("qproj",), ["'qproj'", "q_proj"]), (("q_proj", "norm"), ["'norm'"]), (("lm_head",), ["embedding as well"])],
)
def test_targets_that_cannot_be_adapted_are_named(targets: tuple[str, ...], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        lora.attach(tiny_model(tied=True), LoraConfig(targets=targets), seed=0)
    assert all(word in caught.value.what for word in words)
    assert caught.value.fix


def test_without_peft_the_command_that_installs_it_is_told_before_a_rollout(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", train=TRAIN)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match="peft is not installed") as caught:
        refresh(Session(run), 1)
    assert "pip install 'fire-opd[lora]'" in str(caught.value)
    assert not (run.root / "rollouts").exists()


def test_without_adapters_the_fingerprint_is_that_of_runs_that_knew_of_none() -> None:
    assert "lora" not in TrainConfig().results()
    assert TrainConfig(lora=LoraConfig()).results()["lora"] == {"rank": 32, "alpha": 32.0, "targets": "all-linear"}


# Runs


def _snapshot(run: Run) -> dict[str, bytes]:
    """Checkpoints, and the newest training state."""
    state = latest_state(run.root / ".fire" / "train")
    assert state is not None
    files = [*(run.root / "checkpoints").rglob("*"), *state.iterdir()]
    return {str(p.relative_to(run.root)): p.read_bytes() for p in files if p.is_file()}


@pytest.fixture(scope="module")
def two_rounds(tmp_path_factory: pytest.TempPathFactory, make_run: MakeRun) -> Run:
    run = make_run(tmp_path_factory.mktemp("lora") / "run", train=TRAIN)
    refresh(Session(run), 2)
    return run


def test_two_rounds_go_on_from_one_adapter_and_the_checkpoints_follow_it(two_rounds: Run) -> None:
    run = two_rounds
    records = metrics.read(run.root / "metrics.jsonl")
    first = [next(r for r in records if r["round"] == number) for number in (0, 1)]
    assert all(r["ratio_check"] < 1e-5 for r in first)
    assert first[0]["ratio_mean_abs"] < 1e-5
    assert first[1]["ratio_max"] == pytest.approx(1.0, abs=1e-3)
    files = [load_file(run.part("checkpoints", n).folder / ADAPTER / "adapter_model.safetensors") for n in (0, 1)]
    assert files[0].keys() == files[1].keys()
    assert not same_tensors(*files)
    start = load_model(run.config.student, run.root)
    for number in (0, 1):
        folder = run.part("checkpoints", number).folder
        whole = AutoModelForCausalLM.from_pretrained(folder)
        alone = peft.PeftModel.from_pretrained(load_model(run.config.student, run.root), folder / ADAPTER)
        ids = torch.arange(10)[None]
        torch.testing.assert_close(whole(ids).logits, alone(ids).logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(whole(ids).logits, start(ids).logits, atol=1e-2)
    manifest = sealed(run.part("checkpoints", 1))
    assert {r.shard for r in manifest.shards if "/" in r.shard} == {
        f"{ADAPTER}/adapter_config.json", f"{ADAPTER}/adapter_model.safetensors"
    }  # fmt: skip
    state = latest_state(run.root / ".fire" / "train")
    assert state is not None
    held = sum(p.stat().st_size for p in state.glob("*.safetensors"))
    assert held < 3.5 * sum(p.stat().st_size for p in (folder / ADAPTER).iterdir())


def test_the_adapter_is_shared_with_the_checkpoint_and_its_card_says_how_to_load_it(two_rounds: Run) -> None:
    manifest = shared_manifest(sealed(two_rounds.part("checkpoints", 1)), two_rounds.root)
    index = write_index([manifest])
    (theirs,) = read_index(index, "here").values()
    assert f"{ADAPTER}/adapter_model.safetensors" in files_of(theirs)
    assert f'subfolder="{ADAPTER}"' in model_card(two_rounds, manifest, "me/model", None)
    for name in ("../x", "adapter/../x", "adapter/a/b", "adapters/x", "/x", "adapter/"):
        with pytest.raises(DataError):
            read_index(index.replace(f"{ADAPTER}/adapter_config.json".encode(), name.encode()), "here")
    config = (two_rounds.part("checkpoints", 1).folder / ADAPTER / "adapter_config.json").read_text()
    assert json.loads(config)["base_model_name_or_path"] == Path(two_rounds.config.student.model).name, "no folder"


def test_the_plan_counts_what_is_trained_and_what_its_state_takes(two_rounds: Run) -> None:
    cfg = two_rounds.config
    assert cfg.train.lora is not None
    state = latest_state(two_rounds.root / ".fire" / "train")
    assert state is not None
    numbers = sum(t.numel() for t in load_file(state / "weights.safetensors").values())
    assert adapters(cfg.student, cfg.train.lora, two_rounds.root).value == numbers
    names = LoraConfig(rank=2, targets=("q_proj", "layers.1.mlp.up_proj"))
    model = load_model(cfg.student, two_rounds.root)
    lora.attach(model, names, seed=0)
    assert adapters(cfg.student, names, two_rounds.root).value == sum(p.numel() for p in trained(model).values())
    student = parameters(cfg.student, two_rounds.root)
    held = plan_training(two_rounds, student)["memory"].value
    assert held == 4 * (student.value or 0) + 16 * numbers


def test_a_damaged_adapter_is_found_and_exported_again(
    two_rounds: Run, tmp_path: Path, fire: Callable[..., Any]
) -> None:
    shutil.copytree(two_rounds.root, tmp_path / "run")
    run = open_run(tmp_path / "run")
    expected = _snapshot(run)
    path = run.part("checkpoints", 1).folder / ADAPTER / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert fire("check", run.root).code == 3
    train(Session(run), 1)
    assert _snapshot(run) == expected
    assert fire("check", run.root).code == 0


def test_training_killed_in_the_middle_ends_in_the_same_bytes(make_run: MakeRun, tmp_path: Path) -> None:
    whole = make_run(tmp_path / "whole", train=TRAIN)
    session = Session(whole)
    rollout(session, 0)
    score(session, 0)
    weigh(whole, 0)
    shutil.copytree(whole.root, tmp_path / "killed")
    killed = open_run(tmp_path / "killed")
    train(session, 0)
    child = kills.spawn(killed.root, "train")
    while child.is_alive() and not any((killed.root / ".fire" / "train").glob("step-*[2-9]-round-000")):
        time.sleep(0.01)
    assert child.is_alive(), "the kill comes before the end"
    child.kill()
    child.join()
    assert not (killed.root / "checkpoints" / "round-000").exists()
    train(Session(killed), 0)
    assert _snapshot(killed) == _snapshot(whole)
    steps = [[r["global_step"] for r in metrics.read(run.root / "metrics.jsonl")] for run in (whole, killed)]
    assert steps[0] == steps[1] == list(range(len(steps[0])))


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"rank": 2}, "rank: 4 -> 2"), ({"targets": ["q_proj"]}, "targets"), (None, "trained adapters")],
)
def test_other_adapters_in_a_later_round_are_refused(
    changes: dict[str, Any] | None, words: str, two_rounds: Run, tmp_path: Path
) -> None:
    shutil.copytree(two_rounds.root, tmp_path / "run")
    value = None if changes is None else {"rank": 4, "alpha": 8, **changes}
    run = open_run(tmp_path / "run", (f"train.lora={json.dumps(value)}",))
    session = Session(run)
    rollout(session, 2)
    score(session, 2)
    weigh(run, 2)
    with pytest.raises(FingerprintError) as caught:
        train(session, 2)
    assert words in caught.value.what
    assert "fire init" in str(caught.value.fix)


def test_other_adapters_inside_a_round_are_refused_by_name(two_rounds: Run, fire: Callable[..., Any]) -> None:
    refused = fire("train", two_rounds.root, "--round", 1, "--set", "train.lora.rank=8")
    assert refused.code == 2
    assert "train.lora.rank: 4 -> 8" in refused.err
    assert refused.fix


def test_another_student_under_the_adapters_is_refused(two_rounds: Run, tmp_path: Path, tiny_world: Any) -> None:
    shutil.copytree(two_rounds.root, tmp_path / "run")
    run = open_run(tmp_path / "run", (f"student.model={tiny_world.teacher}",))
    session = Session(run)
    rollout(session, 2)
    score(session, 2)
    weigh(run, 2)
    with pytest.raises(FingerprintError, match="student: "):
        train(session, 2)


def test_adapters_learn() -> None:
    """On one batch, seen again and again, the surrogate falls: what the coefficients ask for becomes likelier."""
    model = adapted(moved=False)
    batch = step_batch(tiny_model())
    cfg = train_config(lr=1e-2)
    optimizer = make_optimizer(model, cfg)
    losses = [one_step(model, optimizer, batch, cfg, step)["loss"] for step in range(10)]
    assert losses[-1] < losses[0] - 0.05
