"""Packed rows give the loss and gradient of padded ones, and a model that mixes them is padded."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from transformers import modeling_flash_attention_utils as flash_utils

from fire_data import packed, training
from fire_data.models import head_of, hidden_states
from fire_data.packing import lay, micro_batches, packed_batches, pad
from fire_data.run import Run
from fire_data.schemas.config import TrainConfig
from fire_data.schemas.errors import ConfigError
from fire_data.session import Session
from fire_data.stages import Silent
from fire_data.steps.rollout import rollout
from fire_data.steps.score import score
from fire_data.steps.train import train
from fire_data.steps.weigh import weigh
from fire_data.training import ratio_check, ratio_tolerance
from fire_data.trainmode import use_attention
from tests.tinymodels import VOCABULARY, gradient_of, latest_state, step_batch, tiny_model, train_config

torch.set_num_threads(1)
SIZES = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
WINDOW = {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
PACKED: dict[str, Callable[[], tf.PreTrainedConfig]] = {
    "llama": lambda: tf.LlamaConfig(**SIZES, tie_word_embeddings=False),
    "qwen3 tied": lambda: tf.Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True),
    "gemma2": lambda: tf.Gemma2Config(
        **SIZES, **WINDOW, attn_logit_softcapping=2.0, final_logit_softcapping=5.0, query_pre_attn_scalar=8
    ),
    "gemma3": lambda: tf.Gemma3TextConfig(**SIZES, **WINDOW, query_pre_attn_scalar=8, final_logit_softcapping=5.0),
    "gpt2": lambda: tf.GPT2Config(vocab_size=48, n_embd=32, n_layer=2, n_head=4, n_positions=32, initializer_range=0.3),
    "qwen3-moe": lambda: tf.Qwen3MoeConfig(
        **SIZES, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, decoder_sparse_step=1
    ),
    "mixtral": lambda: tf.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, sliding_window=4),
}
MIXING: dict[str, Callable[[], tf.PreTrainedConfig]] = {
    "mamba2": lambda: tf.Mamba2Config(
        vocab_size=48, hidden_size=32, num_hidden_layers=2, num_heads=8, head_dim=8, state_size=8, n_groups=2
    ),
    "falcon-h1": lambda: tf.FalconH1Config(
        **SIZES, head_dim=8, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=4
    ),
    "qwen3-next": lambda: tf.Qwen3NextConfig(
        **SIZES, head_dim=8, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8,
        linear_value_head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
        shared_expert_intermediate_size=24, layer_types=["linear_attention", "full_attention"],
    ),
    "lfm2": lambda: tf.Lfm2Config(**SIZES, layer_types=["conv", "full_attention"]),
}  # fmt: skip


def build(config: tf.PreTrainedConfig, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    model.set_experts_implementation("eager")  # grouped products do not take fp64
    return model


def exact(**changes: Any) -> TrainConfig:
    return train_config(**{"compute_dtype": "float64", "max_grad_norm": 0, "tokens_per_microbatch": 60} | changes)


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models take some sums in fp32 whatever their dtype (softmax, norms): these would hide what is seen at 1e-10."""
    softmax, single = torch.nn.functional.softmax, torch.Tensor.float
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim=None, dtype=None, **_: softmax(x, dim=dim))
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else single(x))


@pytest.fixture
def laid(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of every packed pass in training."""
    found: list[int] = []
    monkeypatch.setattr(training, "packed_states", lambda m, r: found.append(len(r)) or packed.packed_states(m, r))
    return found


# What does not change


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", list(PACKED))
def test_packing_changes_neither_loss_nor_gradient(name: str, checkpointing: bool, laid: list[int]) -> None:
    model = build(PACKED[name]())
    batch = step_batch(model, noise=0.3)
    loss, gradient = gradient_of(copy.deepcopy(model), batch, exact(packing="off"))
    assert not laid
    packed_loss, packed_gradient = gradient_of(model, batch, exact(packing="on", gradient_checkpointing=checkpointing))
    assert max(laid) > 2
    assert sum(laid) == len(batch.response_ids)
    assert packed_loss == pytest.approx(loss, rel=1e-10)
    assert (packed_gradient - gradient).norm() <= 1e-10 * gradient.norm()
    assert gradient.norm() > 1e-3


@pytest.mark.parametrize("name", list(PACKED))
def test_a_row_does_not_see_the_one_before_it(name: str) -> None:
    model = build(PACKED[name](), torch.float32)
    rows = [np.array(ids) for ids in ([3, 4, 5, 6, 8, 9, 10], [20, 21, 22, 23, 24, 25], [30])]
    other = [np.array([40, 11, 12, 13, 14, 15, 16]), *rows[1:]]
    with torch.no_grad():
        first, second = (packed.packed_states(model, r) for r in (rows, other))
        alone = torch.cat([hidden_states(model, *pad([row]))[0] for row in rows])
    torch.testing.assert_close(first, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first[7:], second[7:], rtol=1e-6, atol=1e-7)
    assert (first[:7] - second[:7]).abs().max() > 0.01


@pytest.mark.parametrize("name", list(MIXING))
def test_a_model_that_mixes_rows_is_padded_with_equal_results(name: str, laid: list[int]) -> None:
    model = build(MIXING[name](), torch.float32)
    batch = step_batch(model, noise=0.3)
    cfg = exact(compute_dtype="float32", packing="off")
    loss, gradient = gradient_of(copy.deepcopy(model), batch, cfg)
    padded_loss, padded_gradient = gradient_of(model, batch, cfg.model_copy(update={"packing": "on"}))
    assert not laid
    assert (padded_loss, padded_gradient.norm()) == (loss, gradient.norm())
    assert gradient.norm() > 0


def test_a_model_that_counts_positions_through_is_padded() -> None:
    model = build(PACKED["gpt2"](), torch.float32)
    assert packed.packs(model, "on")
    through = build(PACKED["gpt2"](), torch.float32)
    through.transformer.wpe.register_forward_pre_hook(lambda _, args: (torch.arange(args[0].shape[-1])[None],))
    assert not packed.packs(through, "on")


def test_the_model_is_asked_once_and_only_where_packing_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = tiny_model(), []
    monkeypatch.setattr(packed, "_keeps_apart", lambda m: asked.append(m) or True)
    assert [packed.packs(model, packing) for packing in ("off", "auto", "on", "on")] == [False, False, True, True]
    assert asked == [model]


def test_the_ratio_check_finds_the_same_with_packed_rows(laid: list[int]) -> None:
    model = tiny_model()
    batch = step_batch(model)
    found = [
        ratio_check(model, head_of(model), batch, cfg, VOCABULARY, ratio_tolerance(cfg))
        for cfg in (train_config(packing="off"), train_config(packing="on"))
    ]
    assert laid == [len(batch.response_ids)]
    assert found[0] == pytest.approx(found[1], abs=1e-6)


def training_head(model: Any) -> Any:
    from fire_data.models import head_of

    return head_of(model)


# Attention over rows of any length


def attend(q_LHD: Any, k_LHD: Any, v_LHD: Any, causal: bool, softmax_scale: float) -> torch.Tensor:
    """What a flash kernel computes for one row, [L, H, D] each."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q_LHD, k_LHD, v_LHD))
    found: torch.Tensor = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=causal, scale=softmax_scale, enable_gqa=True
    )
    return found[0].transpose(0, 1)


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """transformers' own path to flash attention, its kernels replaced; the bounds that they were given."""
    bounds: list[list[int]] = []

    def rows(q: Any, k: Any, v: Any, **kwargs: Any) -> torch.Tensor:
        return torch.stack([attend(*row, **kwargs) for row in zip(q, k, v, strict=True)])

    def variable(q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, **kwargs: Any) -> torch.Tensor:
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        assert cu_seqlens_q.dtype == torch.int32
        bounds.append(cu_seqlens_q.tolist())
        sizes = cu_seqlens_q.diff().tolist()
        assert kwargs.pop("max_seqlen_q") == kwargs.pop("max_seqlen_k") == max(sizes)
        return torch.cat([attend(*row, **kwargs) for row in zip(*(x.split(sizes) for x in (q, k, v)), strict=True)])

    def settings(**given: Any) -> dict[str, Any]:
        chosen = {"causal": given["is_causal"], "softmax_scale": given["softmax_scale"]}
        return chosen | {name: given[name] for name in ("max_seqlen_q", "max_seqlen_k") if name in given}

    kernels = (rows, variable, None, None, None), (settings, None)
    monkeypatch.setattr(flash_utils, "lazy_import_flash_attention", lambda *_, **__: kernels)
    return bounds


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen3 tied", "gpt2"])
def test_flash_attention_gets_the_bounds_of_packed_rows(
    name: str, checkpointing: bool, flash: list[list[int]], laid: list[int]
) -> None:
    model = build(PACKED[name]())
    batch = step_batch(model, noise=0.3)
    loss, gradient = gradient_of(copy.deepcopy(model), batch, exact())
    assert not laid, "there is no such attention yet, so rows are padded"
    model.config._attn_implementation = "flash_attention_2"
    packed_loss, packed_gradient = gradient_of(model, batch, exact(gradient_checkpointing=checkpointing))
    assert sum(laid) == len(batch.response_ids)
    assert {len(found) - 1 for found in flash} >= set(laid)
    assert packed_loss == pytest.approx(loss, rel=1e-10)
    assert (packed_gradient - gradient).norm() <= 1e-10 * gradient.norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="needs flash-attn")
def test_flash_attention_on_a_gpu_gives_the_gradient_of_padded_rows(laid: list[int]) -> None:
    torch.manual_seed(0)
    config = tf.Qwen3Config(**SIZES | {"hidden_size": 128}, head_dim=32)
    model = tf.AutoModelForCausalLM.from_config(config).float().eval()
    batch = step_batch(model)
    cfg = train_config(compute_dtype="bfloat16", max_grad_norm=0, tokens_per_microbatch=60)
    loss, gradient = gradient_of(copy.deepcopy(model).cuda(), batch, cfg)
    model.config._attn_implementation = "flash_attention_2"
    packed_loss, packed_gradient = gradient_of(model.cuda(), batch, cfg)
    assert sum(laid) == len(batch.response_ids)
    assert packed_loss == pytest.approx(loss, abs=0.02)
    assert torch.cosine_similarity(gradient, packed_gradient, dim=0) > 0.99


# Which rows go together


def test_packed_batches_hold_every_row_once_within_the_budget_and_are_few() -> None:
    lengths = [*np.random.default_rng(0).integers(1, 60, 200).tolist(), 500]
    groups = packed_batches(lengths, 128)
    assert sorted(i for group in groups for i in group) == list(range(201))
    sizes = [sum(lengths[i] for i in group) for group in groups]
    assert [200] in groups
    assert sorted(sizes)[-2] <= 128
    assert len(groups) <= 1.1 * sum(lengths) / 128 < len(micro_batches(lengths, 128))
    assert groups == packed_batches(lengths, 128)
    assert packed_batches([], 128) == []
    assert packed_batches([500, 400], 128) == [[0], [1]]


def test_packed_batches_are_of_similar_size() -> None:
    lengths = np.random.default_rng(1).integers(1, 60, 400).tolist()
    sizes = [sum(lengths[i] for i in group) for group in packed_batches(lengths, 1000)]
    assert max(sizes) - min(sizes) <= max(lengths)


def test_positions_start_anew_in_every_row() -> None:
    ids_BL, position_BL = lay([[5, 6, 7], [8], [9, 4]])
    assert ids_BL.tolist() == [[5, 6, 7, 8, 9, 4]]
    assert position_BL.tolist() == [[0, 1, 2, 0, 0, 1]]
    assert ids_BL.dtype == position_BL.dtype == torch.int64


# The setting


def test_flash_attention_asks_for_half_precision_and_for_its_package() -> None:
    TrainConfig(attention="flash_attention_2", compute_dtype="bfloat16")
    with pytest.raises(ValueError, match="flash_attention_2 needs compute_dtype: bfloat16"):
        TrainConfig(attention="flash_attention_2")
    with pytest.raises(ValueError, match="attention"):
        TrainConfig(attention="flash")
    if importlib.util.find_spec("flash_attn") or importlib.util.find_spec("kernels"):
        pytest.skip("it is installed here")
    model = tiny_model()
    with pytest.raises(ConfigError, match="attention flash_attention_2 cannot be used") as caught:
        use_attention(model, "flash_attention_2")
    assert caught.value.exit_code == 2
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ConfigError, match="attention sdpa cannot be used"):
        use_attention(build(PACKED["gemma2"]()), "sdpa")


class Heard(Silent):
    """What a stage warned of."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def test_a_run_trains_the_same_packed_and_says_once_where_it_cannot(
    make_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, laid: list[int]
) -> None:
    states, heard = {}, {}
    for case in ("off", "on", "mixing"):
        if case == "mixing":
            monkeypatch.setattr(packed, "_keeps_apart", lambda _: False)
        run = make_run(tmp_path / case, train={"packing": "off" if case == "off" else "on", "attention": "eager"})
        heard[case] = Heard()
        session = Session(run, heard[case])
        rollout(session, 0)
        score(session, 0)
        weigh(run, 0)
        train(session, 0)
        folder = latest_state(run.root / ".fire" / "train")
        assert folder is not None
        states[case] = load_file(folder / "weights.safetensors")
        assert bool(laid) == (case == "on")
        laid.clear()
    told = {case: [text for text in heard[case].warnings if "packed" in text] for case in heard}
    assert (told["off"], told["on"], len(told["mixing"])) == ([], [], 1)
    assert "Qwen3ForCausalLM lets packed rows see each other" in told["mixing"][0]
    for name, tensor in states["off"].items():
        assert torch.equal(states["mixing"][name], tensor)
        torch.testing.assert_close(states["on"][name], tensor, rtol=0, atol=1e-4)
