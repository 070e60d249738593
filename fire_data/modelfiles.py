"""What a model folder must hold and may not: whole safetensors, and nothing that names code or weights from elsewhere.

Libraries follow what such a folder says: an index names files of weights, an adapter another model, a configuration a
kernel to fetch. Of all that only safetensors beside the index are taken, because what else there is can run code, or is
not covered by the fingerprint of the model. Reads headers, never weights; needs no torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fire_data.schemas.errors import DataError, first_line

COPY = "copy the model again, or save it with save_pretrained"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_PICKLES = ("*.bin", "*.pt", "*.pth")
_INDEX = "model.safetensors.index.json"
_KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")


def require(folder: Path, name: str) -> None:
    """Raise DataError if a model folder lacks a file."""
    if not (folder / name).is_file():
        raise DataError(f"the model folder has no {name}", where=str(folder), fix=COPY)


def require_tokenizer(folder: Path) -> None:
    """Raise DataError if there is no tokenizer in a model folder."""
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        fix = "save the tokenizer into the same folder: tokenizer.save_pretrained(folder)"
        raise DataError("the model folder has no tokenizer (tokenizer.json)", where=str(folder), fix=fix)


def require_weights(folder: Path) -> None:
    """config.json, and safetensors that are all there and as long as their headers say; else DataError."""
    from safetensors import SafetensorError, safe_open

    require_config(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = [f.name for pattern in _PICKLES for f in sorted(folder.glob(pattern))]
        reason = f"only {pickles[0]}, a pickle, which can run code" if pickles else "no *.safetensors"
        fix = "save it again with transformers 5: model.save_pretrained(folder)"
        raise DataError(f"the model folder has no weights to load: {reason}", where=str(folder), fix=fix)
    if (folder / "adapter_config.json").exists():
        fix = "model.merge_and_unload().save_pretrained(folder) writes it whole"
        raise DataError("the model folder holds an adapter, not a whole model", where=str(folder), fix=fix)
    for name in _indexed(folder):
        require(folder, name)
    for file in files:
        try:
            with safe_open(file, framework="np"):
                pass
        except (SafetensorError, OSError) as error:
            raise DataError(f"{file.name} is damaged: {first_line(error)}", where=str(file), fix=COPY) from None


def require_config(folder: Path) -> None:
    """Raise DataError if config.json is missing, or has weights or kernels fetched from elsewhere."""
    require(folder, "config.json")
    config, where = read_json(folder / "config.json"), str(folder / "config.json")
    named = config.get("transformers_weights")
    if named is not None and named != _INDEX and not _is_beside(named):
        text = f"transformers_weights is {named!r:.100}, which is no safetensors file of this folder"
        raise DataError(text, where=where, fix="remove it")
    pending: list[Any] = [config]
    while pending:
        node = pending.pop()
        if isinstance(node, dict):
            kernel = next((node[k] for k in _KERNELS if "/" in str(node.get(k))), None)
            if kernel is not None:
                raise DataError(f"it names code to be fetched: {kernel!r:.100}", where=where, fix="remove it")
        pending += node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()


def _indexed(folder: Path) -> list[str]:
    """The files of weights that an index names; none if there is no index."""
    found = read_json(folder / _INDEX).get("weight_map", {})
    names = list(found.values()) if isinstance(found, dict) else [found]
    wrong = next((name for name in names if not _is_beside(name)), None)
    if wrong is not None:
        text = f"{_INDEX} names {wrong!r:.100}, which is no safetensors file of this folder"
        raise DataError(text, where=str(folder), fix=COPY)
    return sorted({*names})


def _is_beside(name: object) -> bool:
    """True for the name of a safetensors file in the same folder, on any system."""
    return isinstance(name, str) and name.endswith(".safetensors") and not {*"/\\:"} & {*name}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if the file is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
