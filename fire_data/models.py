"""Finds, checks, fingerprints and loads models, and splits a model into hidden states and output head.

Why split: the hidden states of a batch are small, its logits are not. Everything that needs probabilities takes the
hidden states and applies the head to a few positions at a time. What an architecture does after its output matrix
(soft-capping, scaling) is part of the head; `head_of` compares its head with the model's own forward once, so that an
architecture not known here is an error and never wrong logits. Legend: `_B` sequences, `_L` padded length, `_D` hidden,
`_V` output rows.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import os
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fire_data.modelfiles import COPY, read_json, require_config, require_tokenizer, require_weights
from fire_data.schemas.config import ModelConfig
from fire_data.schemas.errors import NOT_FINITE, ConfigError, DataError, EngineError, first_line
from fire_data.schemas.manifest import digest

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fire_data.head import Head

_LIGHT = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]  # everything of a Hub repository but its weights
_TRUST = "read its code, and only if you would run it: trust_remote_code: true"
_BLOCK = 1 << 20  # bytes read at a time while hashing
_VERIFIED: weakref.WeakSet[Any] = weakref.WeakSet()


def load_tokenizer(cfg: ModelConfig, base: Path) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Raises DataError if there is none or it cannot be read."""
    from transformers import AutoTokenizer

    folder = _folder(cfg, base)
    require_tokenizer(folder)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=cfg.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        fix = _TRUST if "trust_remote_code" in str(error) else COPY
        raise DataError(f"the tokenizer cannot be loaded: {first_line(error)}", where=str(folder), fix=fix) from None
    return tokenizer


def load_model(cfg: ModelConfig, base: Path, *, dtype: str | None = None) -> PreTrainedModel:
    """The model in eval mode on `cfg.device`, weights from safetensors in `dtype` (default: `cfg.dtype`).

    Raises:
        DataError: files are missing or damaged, the architecture is unknown, or weights are missing in the files.
        ConfigError: the device does not exist here.
        EngineError: the model does not fit on the device.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    device = resolve_device(cfg.device)
    folder = _folder(cfg, base, weights=True)
    require_weights(folder)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # stderr belongs to the command's own progress
    try:
        loader: Any = AutoModelForCausalLM
        model, info = loader.from_pretrained(
            folder,
            dtype=getattr(torch, dtype or cfg.dtype),
            use_safetensors=True,
            trust_remote_code=cfg.trust_remote_code,
            output_loading_info=True,
        )
        missing = sorted(info["missing_keys"])
        if missing:
            text = f"{len(missing)} weights are not in the files, the first is {missing[0]}"
            raise DataError(text, where=str(folder), fix="save the model again with save_pretrained")
        placed: PreTrainedModel = model.to(device).eval()
    except torch.OutOfMemoryError as error:
        fix = "use another device, or a smaller dtype"
        raise EngineError(
            f"the model does not fit: {first_line(error)}", where=f"{folder} on {device}", fix=fix
        ) from None
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        fix = _TRUST if "trust_remote_code" in str(error) else COPY
        raise DataError(f"the model cannot be loaded: {first_line(error)}", where=str(folder), fix=fix) from None
    return placed


def local_folder(cfg: ModelConfig, base: Path) -> Path:
    """Where the model's files lie, weights included; a Hub model is downloaded first. Raises as `load_model`."""
    folder = _folder(cfg, base, weights=True)
    require_weights(folder)
    return folder


def here(cfg: ModelConfig, base: Path) -> Path | None:
    """Where the files of a model are on this machine, the Hub's cache included; None if it would be downloaded first.

    Raises DataError for a local folder that is not there.
    """
    if _local(cfg.model, base) is not None:
        return _folder(cfg, base)
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(cfg.model, "config.json", revision=cfg.revision)
    return Path(found).parent if isinstance(found, str) else None


def check_model_files(cfg: ModelConfig, base: Path, *, weights: bool = True) -> None:
    """What can be found wrong without loading: raise DataError if a needed file is missing, incomplete or unreadable.

    `weights=False` asks only for the tokenizer (the fake engine needs no more). The weights of a Hub model are
    checked when they are downloaded.
    """
    folder = _folder(cfg, base)
    require_tokenizer(folder)
    if weights:
        model_config(cfg, base)
        if folder == _local(cfg.model, base):
            require_weights(folder)


def model_config(cfg: ModelConfig, base: Path) -> Any:
    """The model's text configuration. Raises DataError if it is missing or its architecture unknown."""
    from transformers import AutoConfig

    folder = _folder(cfg, base)
    require_config(folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=cfg.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        text = f"config.json cannot be used: {first_line(error)}"
        fix = "pip install -U transformers, or copy the file again"
        raise DataError(text, where=str(folder), fix=_TRUST if "trust_remote_code" in str(error) else fix) from None
    return config.get_text_config()


def output_rows(cfg: ModelConfig, base: Path) -> int:
    """Rows of the model's output matrix (ids it can predict), from its configuration alone."""
    return int(model_config(cfg, base).vocab_size)


def stop_ids(cfg: ModelConfig, base: Path, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that end a response: those of generation_config.json (else config.json) and the tokenizer's eos."""
    folder = _folder(cfg, base)
    ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        value = read_json(folder / name).get("eos_token_id")
        if value is not None:
            ids.update(value if isinstance(value, list) else [value])
            break
    if isinstance(tokenizer.eos_token_id, int):
        ids.add(tokenizer.eos_token_id)
    return frozenset(ids)


def resolve_device(name: str) -> torch.device:
    """`auto` is cuda where available, else cpu. Raises ConfigError for a device that is not here."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fix = "device: auto, or cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"there is no device {name!r}; use auto, cpu, cuda, cuda:1 or mps", fix=fix) from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name}: torch sees {torch.cuda.device_count()} CUDA devices", fix=fix)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device mps is not available", fix=fix)
    return device


def model_fingerprint(cfg: ModelConfig, base: Path, cache: Path | None = None) -> str:
    """Identifies the weights: `hub:<id>@<commit>`, or `sha256:<hex>` over a local folder's names and contents.

    Covered are config.json, generation_config.json and *.safetensors; in a folder without weights, every file.
    `cache` is a JSON file of content hashes by path, size, times and inode, so that unchanged weights are read once.
    """
    local = _local(cfg.model, base)
    if local is None:
        return f"hub:{cfg.model}@{_folder(cfg, base).name}"
    folder = _folder(cfg, base)
    files = sorted(folder.glob("*.safetensors"))
    if files:
        files += [f for name in ("config.json", "generation_config.json") if (f := folder / name).is_file()]
    else:
        files = sorted(f for f in folder.iterdir() if f.is_file())
    known = read_json(cache) if cache else {}
    hashes = {str(f.resolve()): _cached_hash(f, known) for f in files}
    if cache and any(known.get(k) != v for k, v in hashes.items()):
        _write_json(cache, known | hashes)
    total = hashlib.sha256()
    for file in sorted(files):
        total.update(f"{file.name} {hashes[str(file.resolve())][-2]}\n".encode())
    return f"sha256:{total.hexdigest()}"


def hidden_states(model: PreTrainedModel, ids_BL: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
    """Last hidden states [B, L, D], after the final norm and before the head; values at padding mean nothing.

    Right padding comes after every real token of a causal model and cannot be seen by it, so no mask is passed then
    and attention takes its fastest path. Otherwise positions count real tokens only.
    """
    body = body_of(model)
    extra: dict[str, torch.Tensor] = {}
    mask_BL = mask_BL.to(ids_BL.device).long()
    if bool((mask_BL.diff(dim=1) > 0).any()):
        extra["attention_mask"] = mask_BL
        if "position_ids" in inspect.signature(body.forward).parameters:
            extra["position_ids"] = (mask_BL.cumsum(1) - 1).clamp(min=0)
    states: torch.Tensor = body(input_ids=ids_BL, use_cache=False, **extra).last_hidden_state
    return states


def head_of(model: PreTrainedModel) -> Head:
    """The function from last hidden states [..., D] to logits [..., V] in the model's dtype, differentiable.

    Covers the output matrix and what follows it: a factor (Cohere `logit_scale`, Falcon-H1 `lm_head_multiplier`), a
    divisor (Granite `logits_scaling`) and tanh soft-capping (Gemma `final_logit_softcapping`).

    Raises:
        EngineError: the model's own forward gives other logits.
    """
    from fire_data.head import LinearHead

    matrix = cast(Any, model).get_output_embeddings()
    if matrix is None:
        raise EngineError(f"{type(model).__name__} has no output embeddings", fix="use a causal language model")
    config = model.config.get_text_config()
    factor = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    cap = getattr(config, "final_logit_softcapping", None)

    head = LinearHead(matrix, factor, divisor, cap)
    if model not in _VERIFIED:
        _verify_head(model, head)
        _VERIFIED.add(model)
    return head


def _verify_head(model: PreTrainedModel, head: Head) -> None:
    """Run the whole model on a few tokens, its hidden states enlarged on the way, and compare with `head` on the same.

    Enlarged, because soft-capping and offsets show only in large logits, which an untrained model does not have.
    """
    import torch

    seen: list[torch.Tensor] = []

    def enlarge(module: Any, args: Any, output: Any) -> Any:
        states = output.last_hidden_state
        output.last_hidden_state = states * torch.tensor([1.0, 8.0, 64.0], device=states.device)[:, None].to(states)
        seen.append(output.last_hidden_state)
        return output

    ids_BL = torch.arange(3, device=model.device)[None]
    hook = body_of(model).register_forward_hook(enlarge)
    try:
        with torch.no_grad():
            expected = model(input_ids=ids_BL, use_cache=False).logits
    finally:
        hook.remove()
    name = type(model).__name__
    fix = "this architecture treats its logits in a way `fire` does not know: use another model"
    if len(seen) != 1:
        raise EngineError(f"{name}: the hidden states before the head cannot be found", fix=fix)
    with torch.no_grad():
        logits = head(seen[0])
    difference = tolerance = float("nan")
    if logits.shape == expected.shape:
        finite = expected.isfinite()  # half precision may overflow where it was enlarged
        if not finite.any():
            raise EngineError(
                f"{name}: not one logit is finite", where=model.config.name_or_path or None, fix=NOT_FINITE
            )
        tolerance = 8 * torch.finfo(expected.dtype).eps * float(expected[finite].abs().max())
        difference = float((logits - expected)[finite].abs().max())
    if not difference <= tolerance:
        text = f"{name}: logits differ from the model's own by up to {difference:.3g} (tolerance {tolerance:.3g})"
        raise EngineError(text, fix=fix)


def body_of(model: PreTrainedModel) -> Any:
    """The text model below the head: of a multimodal model its language part."""
    body = cast(Any, model).get_decoder()
    if body is None or body is model:
        raise EngineError(f"{type(model).__name__} has no model below its head", fix="use a causal language model")
    return body


def _local(name: str, base: Path) -> Path | None:
    """The folder that `name` means, or None for a Hub id: anything that looks like a path or exists below `base`."""
    path = base / Path(name).expanduser()
    looks_like_path = name.startswith(("/", "~", ".")) or name.count("/") > 1 or os.path.isabs(name)
    return path if looks_like_path or path.exists() else None


def _folder(cfg: ModelConfig, base: Path, *, weights: bool = False) -> Path:
    """The local folder of a model; a Hub model is downloaded first, its weights only if asked for."""
    path = _local(cfg.model, base)
    if path is None:
        return _download(cfg, base, weights=weights)
    where = str(path)
    if not path.is_dir():
        text = "the model is a file, not a folder" if path.exists() else "there is no such model folder"
        fix = "--set student.model=FOLDER, or teacher.model, or in fire.yaml; paths start at the run"
        raise DataError(text, where=where, fix=fix)
    if not any(path.iterdir()):
        raise DataError("the model folder is empty", where=where, fix=COPY)
    return path


def _download(cfg: ModelConfig, base: Path, *, weights: bool) -> Path:
    from huggingface_hub import errors, snapshot_download

    from fire_data.hub.client import line_of

    http_error: type[Exception] = vars(errors)["HTTPError"]  # that of whichever HTTP library it uses

    patterns = _LIGHT + ["*.py"] * cfg.trust_remote_code + ["*.safetensors"] * weights
    where = cfg.model + (f" at revision {cfg.revision}" if cfg.revision else "")
    try:
        folder = snapshot_download(cfg.model, revision=cfg.revision, allow_patterns=patterns, ignore_patterns=["*/*"])
    except errors.HFValidationError as error:
        text = f"neither a folder nor a Hub id: {line_of(error)}"
        raise DataError(text, where=str(base / cfg.model), fix="correct student.model / teacher.model") from None
    except (OSError, http_error) as error:
        text = f"no such folder in {base}, and the Hub gave no model: {line_of(error)}"
        fix = f"check the name and the network, or: hf download {cfg.model}"
        raise DataError(text, where=where, fix=fix) from None
    return Path(folder)


def _cached_hash(file: Path, known: dict[str, Any]) -> list[Any]:
    """[size, mtime, ctime, inode, sha256 hex, checksum]; read from `known` if the file has not changed since.

    The checksum is that of the others: a changed byte of the cache must not make another model of this one.
    """
    stat = file.stat()
    identity = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    entry = known.get(str(file.resolve()))
    known_by = isinstance(entry, list) and entry[:-2] == identity and isinstance(entry[-2], str)
    if entry and known_by and entry[-1] == digest(entry[:-1]):
        return list(entry)
    state = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            state.update(block)
    found = [*identity, state.hexdigest()]
    return [*found, digest(found)]


def _write_json(path: Path, value: dict[str, Any]) -> None:
    """Replace a cache atomically. A cache that cannot be written costs time, not correctness."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(value), encoding="utf-8")
        os.replace(partial, path)
