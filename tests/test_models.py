"""Models are found, checked and fingerprinted before use, and the head gives the model's own logits."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers

from fire_data import chat
from fire_data.head import only_weight
from fire_data.models import (
    check_model_files,
    head_of,
    hidden_states,
    load_model,
    load_tokenizer,
    model_fingerprint,
    output_rows,
    resolve_device,
    stop_ids,
)
from fire_data.schemas.config import ModelConfig
from fire_data.schemas.errors import ConfigError, DataError, EngineError
from fire_data.schemas.manifest import digest

torch.set_num_threads(1)
SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MORE = SIZES | {"intermediate_size": 48, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
TEMPLATE = "{% for m in messages %}{{ m.role + ' ' + m.content + ' ' }}{% endfor %}{% if x %}{{ x }}{% endif %}"


def architectures(tied: bool) -> dict[str, tf.PreTrainedConfig]:
    more = MORE | {"tie_word_embeddings": tied}
    gpt2 = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
    return {
        "qwen3": tf.Qwen3Config(**more, head_dim=8),
        "llama": tf.LlamaConfig(**more),
        "gpt2": tf.GPT2Config(**gpt2, tie_word_embeddings=tied),
        "gemma2": tf.Gemma2Config(**more, head_dim=8, final_logit_softcapping=0.5),
        "gemma3": tf.Gemma3TextConfig(**more, head_dim=8, final_logit_softcapping=0.5),
        "cohere": tf.CohereConfig(**more, logit_scale=0.25),
        "granite": tf.GraniteConfig(**more, logits_scaling=8.0),
    }


def build(config: tf.PreTrainedConfig) -> tf.PreTrainedModel:
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(config).double().eval()


def save_tokenizer(folder: Path, template: str | None = None) -> None:
    backend = Tokenizer(
        models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "user": 3, "hi": 4, "x": 5}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    build(tf.Qwen3Config(**MORE, head_dim=8)).float().save_pretrained(folder)
    save_tokenizer(folder, TEMPLATE)
    return folder


@pytest.fixture
def tiny(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "tiny"))


def config(model: str | Path = "tiny", **fields: object) -> ModelConfig:
    return ModelConfig(model=str(model), **fields)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", list(architectures(True)))
def test_hidden_states_and_head_give_the_models_own_logits_under_padding(name: str, tied: bool) -> None:
    # Left padding in fp32: transformers' eager attention takes its softmax in fp32, where the fp64 mask overflows.
    model, ids_BL, lengths = build(architectures(tied)[name]), torch.arange(27).view(3, 9) + 7, [9, 5, 7]
    mask_BL = torch.arange(9) < torch.tensor(lengths)[:, None]
    left_BL = torch.stack([row.roll(9 - n) for row, n in zip(ids_BL, lengths, strict=True)])
    with torch.no_grad():
        plain = [model(input_ids=ids_BL[i : i + 1, :n]).logits[0] for i, n in enumerate(lengths)]
        logits = head_of(model)(hidden_states(model, ids_BL, mask_BL))
        left_logits = head_of(model.float())(hidden_states(model, left_BL, mask_BL.flip(1)))
    for i, n in enumerate(lengths):
        torch.testing.assert_close(logits[i, :n], plain[i], rtol=0, atol=1e-12)
        torch.testing.assert_close(left_logits[i, 9 - n :].double(), plain[i], rtol=0, atol=1e-5)


def test_a_matrix_is_used_directly_only_where_nothing_wraps_it() -> None:
    assert only_weight(head_of(build(tf.LlamaConfig(**MORE)))) is not None
    for wrap in (
        lambda matrix: matrix.register_forward_hook(lambda module, args, output: output),
        lambda matrix: matrix.register_forward_pre_hook(lambda module, args: args),
        lambda matrix: setattr(matrix, "forward", matrix.forward),
    ):
        model = build(tf.LlamaConfig(**MORE))
        wrap(model.lm_head)
        assert only_weight(head_of(model)) is None
    soft_capped = build(architectures(True)["gemma2"])
    assert only_weight(head_of(soft_capped)) is None


@pytest.mark.parametrize(
    "treat",
    [
        lambda logits: logits * 1.01,
        lambda logits: logits + 0.01,
        lambda logits: (logits / 30).tanh() * 30,  # invisible in the small logits of an untrained model
        lambda logits: logits[..., :-1],
    ],
)
def test_unknown_logit_treatment_is_an_error_not_wrong_logits(treat: Callable[[torch.Tensor], torch.Tensor]) -> None:
    model = build(tf.LlamaConfig(**MORE)).float()
    model.lm_head.weight.data *= 0.1
    original = model.forward

    def forward(*args: object, **kwargs: object) -> object:
        output = original(*args, **kwargs)
        output.logits = treat(output.logits)
        return output

    model.forward = forward
    with pytest.raises(EngineError, match="LlamaForCausalLM: logits differ"):
        head_of(model)
    model.forward = original
    head_of(model)


def test_a_folder_is_found_from_the_run_and_loads(tiny: Path) -> None:
    for name in ("tiny", "./tiny", str(tiny), f"../{tiny.parent.name}/tiny"):
        check_model_files(config(name), tiny.parent)
    model = load_model(config(dtype="bfloat16", device="cpu"), tiny.parent)
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert load_model(config(device="cpu"), tiny.parent, dtype="float64").dtype == torch.float64
    assert output_rows(config(), tiny.parent) == 61


def test_stop_ids_are_those_of_the_generation_config_and_the_tokenizer(tiny: Path) -> None:
    tokenizer = load_tokenizer(config(), tiny.parent)
    (tiny / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert stop_ids(config(), tiny.parent, tokenizer) == {2, 7, 9}
    (tiny / "generation_config.json").unlink()
    (tiny / "config.json").write_text(json.dumps(json.loads((tiny / "config.json").read_text()) | {"eos_token_id": 8}))
    assert stop_ids(config(), tiny.parent, tokenizer) == {2, 8}


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        (["config.json"], "no config.json"),
        (["model.safetensors"], "no weights to load: no \\*.safetensors"),
        (["tokenizer.json", "tokenizer_config.json"], "no tokenizer"),
    ],
)
def test_an_incomplete_folder_is_named_with_what_is_missing(tiny: Path, remove: list[str], message: str) -> None:
    for name in remove:
        (tiny / name).unlink()
    with pytest.raises(DataError, match=message) as caught:
        check_model_files(config(), tiny.parent)
    assert caught.value.where == str(tiny)
    assert caught.value.fix


def test_pickled_weights_are_refused(tiny: Path) -> None:
    os.rename(tiny / "model.safetensors", tiny / "pytorch_model.bin")
    with pytest.raises(DataError, match=r"only pytorch_model.bin, a pickle"):
        check_model_files(config(), tiny.parent)
    with pytest.raises(DataError, match=r"only pytorch_model.bin, a pickle"):
        load_model(config(device="cpu"), tiny.parent)


def test_missing_and_empty_folders_are_data_errors(tmp_path: Path) -> None:
    for name in ("./nowhere", "../nowhere", str(tmp_path / "nowhere"), "a/b/c", "~/surely/nowhere"):
        with pytest.raises(DataError, match="no such model folder"):
            check_model_files(config(name), tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="folder is empty"):
        check_model_files(config("empty"), tmp_path)


def test_an_unreachable_hub_model_is_a_data_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DataError, match="the Hub gave no model") as caught:
        check_model_files(config("someone/some-model", revision="abc"), tmp_path)
    assert "revision abc" in str(caught.value)
    assert "hf download someone/some-model" in str(caught.value)


def test_a_cached_hub_model_is_used_offline_and_named_by_commit(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "cache" / "models--someone--some-model"
    shutil.copytree(tiny, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    hub = config("someone/some-model", device="cpu")
    assert model_fingerprint(hub, tmp_path / "run") == f"hub:someone/some-model@{commit}"
    assert load_model(hub, tmp_path / "run").config.vocab_size == 61


def test_truncated_and_partial_weights_are_refused(tiny: Path) -> None:
    weights = tiny / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-100])
    with pytest.raises(DataError, match=r"model.safetensors is damaged"):
        check_model_files(config(), tiny.parent)
    weights.write_bytes(content)
    index = {"metadata": {}, "weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tiny / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"no model-00002-of-00002.safetensors"):
        check_model_files(config(), tiny.parent)


def test_weights_that_the_file_lacks_are_not_made_up(tiny: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(tiny / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tiny / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"1 weights are not in the files, the first is model\.norm\.weight"):
        load_model(config(device="cpu"), tiny.parent)


def test_an_unknown_architecture_is_a_data_error(tiny: Path) -> None:
    (tiny / "config.json").write_text(json.dumps({"model_type": "unheard_of"}))
    with pytest.raises(DataError, match=r"config.json cannot be used.*unheard_of"):
        check_model_files(config(), tiny.parent)


def test_the_fingerprint_follows_content_not_place(tiny: Path, tmp_path: Path) -> None:
    before = model_fingerprint(config(), tiny.parent)
    shutil.copytree(tiny, tmp_path / "elsewhere" / "other")
    assert model_fingerprint(config("other"), tmp_path / "elsewhere") == before
    content = bytearray((tiny / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (tiny / "model.safetensors").write_bytes(content)
    assert model_fingerprint(config(), tiny.parent) != before


def test_the_fingerprint_cache_is_used_checked_and_mended(tiny: Path, tmp_path: Path) -> None:
    cache = tmp_path / "run" / "hashes.json"
    before = model_fingerprint(config(), tiny.parent, cache)
    entries = json.loads(cache.read_text())
    assert len(entries) == 3
    key = str((tiny / "model.safetensors").resolve())
    other = [*entries[key][:-2], "0" * 64]
    cache.write_text(json.dumps(entries | {key: [*other, digest(other)]}))
    assert model_fingerprint(config(), tiny.parent, cache) != before
    for damaged in ("{ damaged", json.dumps(entries | {key: [*other, entries[key][-1]]})):
        cache.write_text(damaged)
        assert model_fingerprint(config(), tiny.parent, cache) == before
        assert json.loads(cache.read_text()) == entries
    content = bytearray((tiny / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (tiny / "model.safetensors").write_bytes(content)
    assert model_fingerprint(config(), tiny.parent, cache) != before
    assert [f.name for f in cache.parent.iterdir()] == ["hashes.json"]


def test_a_folder_with_only_a_tokenizer_serves_the_fake_engine(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "words")
    check_model_files(config("words"), tmp_path, weights=False)
    assert load_tokenizer(config("words"), tmp_path).eos_token_id == 2
    before = model_fingerprint(config("words"), tmp_path)
    (tmp_path / "words" / "tokenizer_config.json").write_text('{"eos_token": "x"}')
    assert model_fingerprint(config("words"), tmp_path) != before


def test_devices_that_are_not_here_are_config_errors() -> None:
    assert resolve_device("cpu").type == "cpu"
    for name in ("warp", "cuda:99"):
        with pytest.raises(ConfigError) as caught:
            resolve_device(name)
        assert caught.value.exit_code == 2


def said(text: str, role: str = "user") -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def test_messages_go_through_the_template_with_its_arguments(tiny: Path) -> None:
    tokenizer, messages = load_tokenizer(config(), tiny.parent), said("hi")
    assert chat.render(tokenizer, config(), tiny.parent, messages, raw=False) == [3, 4]
    other = config(chat_template_kwargs={"x": "x"})
    assert chat.render(tokenizer, other, tiny.parent, messages, raw=False) == [3, 4, 5]
    (tiny.parent / "own.jinja").write_text("{{ messages[0].content }}{% if add_generation_prompt %} x{% endif %}")
    own = config(chat_template="own.jinja")
    assert chat.render(tokenizer, own, tiny.parent, messages, raw=False) == [4, 5]
    prints = {chat.template_fingerprint(tokenizer, c, tiny.parent, raw=False) for c in (config(), other, own)}
    assert len(prints) == 3


def test_raw_prompts_are_the_text_alone(tiny: Path) -> None:
    tokenizer = load_tokenizer(config(), tiny.parent)
    assert chat.render(tokenizer, config(), tiny.parent, said("hi x"), raw=True) == [4, 5]
    assert chat.template_fingerprint(tokenizer, config(), tiny.parent, raw=True) == "raw"
    with pytest.raises(DataError, match="no tokens"):
        chat.render(tokenizer, config(), tiny.parent, said(""), raw=True)


def test_a_tokenizer_without_template_needs_an_explicit_raw(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "base")
    tokenizer = load_tokenizer(config("base"), tmp_path)
    with pytest.raises(ConfigError, match=r"rollout\.raw: true") as caught:
        chat.render(tokenizer, config("base"), tmp_path, said("hi"), raw=False)
    assert caught.value.exit_code == 2
    assert chat.render(tokenizer, config("base"), tmp_path, said("hi"), raw=True) == [4]


def test_messages_that_the_template_refuses_are_data_errors(tiny: Path) -> None:
    tokenizer = load_tokenizer(config(), tiny.parent)
    tokenizer.chat_template = "{{ raise_exception('no system role here') }}"
    with pytest.raises(DataError, match=r"roles: system.*no system role here"):
        chat.render(tokenizer, config(), tiny.parent, said("hi", "system"), raw=False)
    with pytest.raises(ConfigError, match="cannot be read"):
        chat.render(tokenizer, config(chat_template="gone.jinja"), tiny.parent, said("hi"), raw=False)
    tokenizer.chat_template = "{% if %}"
    with pytest.raises(ConfigError, match="not valid Jinja"):
        chat.render(tokenizer, config(), tiny.parent, said("hi"), raw=False)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "[Rr]ange"),
        ("{{ 'x' * 10 ** 18 }}", "MemoryError"),
        ("{{ messages[0].content.encode('ascii') }}", "ascii"),
    ],
)
def test_whatever_a_template_ends_in_is_a_data_error(tiny: Path, template: str, message: str) -> None:
    tokenizer = load_tokenizer(config(), tiny.parent)
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=f"refuses the messages .*{message}"):
        chat.render(tokenizer, config(), tiny.parent, said("hé"), raw=False)


LLAMA_DATE = """{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "unknown" %}
    {%- endif %}
{%- endif %}
  {{ date_string }}
"""


@pytest.mark.parametrize(
    ("template", "fixed", "own"),
    [
        (LLAMA_DATE, "  26 Jul 2024", "  1 May '26"),
        ("\n  {% if x %}{% endif %}a {{ strftime_now('%A, %-d %B %Y, %H:%M %p %%') }}", None, "\na 1 May '26"),
        ("{% macro m() %}{{ strftime_now('%Y-%m-%d') }}{% endmacro %}{% for _ in messages %}{{ m() }}{% endfor %}",
         "2024-07-26", "1 May '26"),
    ],
)  # fmt: skip
def test_a_template_that_asks_for_the_date_gets_the_same_every_day(
    tiny: Path, template: str, fixed: str | None, own: str
) -> None:
    tokenizer = load_tokenizer(config(), tiny.parent)
    tokenizer.chat_template = template

    def text(cfg: ModelConfig) -> str:
        source = chat.chat_template(tokenizer, cfg, tiny.parent)
        made = tokenizer.apply_chat_template(
            said("hi"), chat_template=source, tokenize=False, **cfg.chat_template_kwargs
        )
        assert tokenizer(made, add_special_tokens=False)["input_ids"] == chat.render(
            tokenizer, cfg, tiny.parent, said("hi"), raw=False
        )
        return str(made)

    dated = config(chat_template_kwargs={"date_string": "1 May '26"})
    assert text(config()) == (fixed or "\na Friday, 26 July 2024, 00:00 AM %")
    assert text(dated) == own
    prints = {chat.template_fingerprint(tokenizer, c, tiny.parent, raw=False) for c in (config(), dated)}
    assert len(prints) == 2


def test_a_template_without_a_date_is_used_as_it_is(tiny: Path) -> None:
    tokenizer = load_tokenizer(config(), tiny.parent)
    assert chat.chat_template(tokenizer, config(), tiny.parent) == TEMPLATE
