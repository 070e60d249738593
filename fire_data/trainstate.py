"""Training state on disk: fp32 master weights and AdamW moments, and the export of a checkpoint for everyone else.

A state is written to a hidden sibling folder, synced, and renamed: it is there whole or not at all, and a load verifies
every byte before it touches the model. Masters and export are apart because a bf16 weight would never move at a
learning rate of 1e-6: the update is smaller than half the gap between neighbouring bf16 numbers.
Units: sizes are bytes, steps are global optimizer steps.

A state folder holds `weights.safetensors`, one file per kind of optimizer state (`exp_avg`, `exp_avg_sq`, `step`), each
with the names of the parameters, and `meta.json` with the size and sha256 of every file. Frozen parameters are not in
it: they are those of the model that is given. Of several processes each writes files of its own, with its share of
every tensor; any number of processes reads them (`pieces`). Here all of them call the same functions: the first one
makes folders and records, and publishes.
"""

from __future__ import annotations

import copy
import errno
import itertools
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from fire_data import distributed, lora, pieces
from fire_data.files import fsync_file, fsync_folder, remove, sha256_file, storage_errors, write_bytes
from fire_data.schemas.errors import DamagedError, DataError, StorageError, TrainingError
from fire_data.schemas.manifest import ADAPTER, digest

STATE_FORMAT = 2
META = "meta.json"
_REPLACED = ".replaced"
_REDO = "delete this folder and run the same command: training continues from an earlier state or the round's start"


def save_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, meta: dict[str, Any]) -> None:
    """Write weights, moments and `meta` (JSON-ready, with an int `global_step`) so that `folder` appears whole.

    A state already there is replaced; until the new one is in place the old one stays readable beside it. Names that
    begin with a dot are unfinished and may be removed by anyone.

    Raises:
        StorageError: the file system refused (full disk, no permission); earlier states are untouched.
    """
    assert isinstance(meta["global_step"], int), "meta needs an int global_step"
    unfinished = folder.with_name(f".{folder.name}.tmp")
    try:
        with _writing(folder):
            if distributed.first():
                remove(unfinished)
                unfinished.mkdir(parents=True)
            distributed.wait()
            described = _write_files(unfinished, model, optimizer)
            if distributed.first():
                _write_record(unfinished, model, described, meta)
                sync_tree(unfinished)
                _publish(unfinished, folder)
    except StorageError:
        remove(unfinished)
        raise


def load_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Verify a state, copy it into the model and the optimizer, and return the `meta` it was saved with.

    The learning rate and the other settings of the optimizer are not part of a state: they follow from the config.

    Raises:
        DamagedError: a file is missing or its bytes are not those that were written; model and optimizer are untouched.
        DataError: the state belongs to a model with other parameters, shapes, dtypes or ties.
    """
    record = _read_record(folder)
    names = sorted(record["files"])
    for name in names[distributed.rank() :: distributed.size()]:
        if not (folder / name).is_file() or _describe(folder / name) != record["files"][name]:
            raise DamagedError(f"{name} is not the file that was written", where=str(folder / name), fix=_REDO)
    distributed.wait()
    kinds = {kind: list(group) for kind, group in itertools.groupby(names, pieces.kind_of)}
    groups = {kind: pieces.Pieces([folder / name for name in group]) for kind, group in kinds.items()}
    ties, weights = _distinct(_trained(model))
    saved = groups.pop("weights")
    _require_same(ties, weights, record["ties"], saved.tensors, folder)
    saved.read(weights)
    _restore_moments(model, optimizer, groups)
    meta: dict[str, Any] = record["meta"]
    return meta


def whole_states(root: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Every whole state under `root` with the `meta` it was saved with, the largest global step first.

    Whole: `meta.json` verifies and sizes agree. Unfinished folders, and folders that hold something else, do not exist
    for this function.
    """
    return [(path, _read_record(path)["meta"]) for _, _, path in sorted(_states(root), reverse=True)]


def prune_states(root: Path, keep: int) -> list[Path]:
    """Remove all whole states but the `keep` (≥ 1) newest, and what killed writers left; return the states removed.

    A damaged state is not removed: what is in it is unknown. Call it only from the process that trains.
    """
    assert keep >= 1, "the last state is what training continues from"
    with storage_errors(root):
        for path in sorted(root.iterdir()) if root.is_dir() else []:
            hidden = path.name.startswith(".") and path.suffix in (".tmp", ".gone")
            superseded = path.suffix == _REPLACED and path.with_suffix("").is_dir()
            if hidden or superseded:
                remove(path)
        old = [path for _, _, path in sorted(_states(root), reverse=True)[keep:]]
        for path in old:
            gone = path.with_name(f".{path.name}.gone")
            os.rename(path, gone)
            remove(gone)
    return old


def export_checkpoint(folder: Path, model: Any, tokenizer: Any, dtype: str) -> None:
    """Write model and tokenizer in Hugging Face format, weights cast to `dtype`, into a folder that must not exist.

    Adapters are merged in the masters' dtype, one matrix at a time, before the cast; a folder inside holds them alone.
    The model keeps its own weights. Loading the folder with `AutoModelForCausalLM` gives exactly the cast weights; the
    generation config and the chat template go with them. All files are synced; publishing by rename is the caller's.

    Of several processes all have to call it, and the first one writes.

    Raises:
        TrainingError: a weight is too large for `dtype` (float16).
        StorageError: the folder exists, or the file system refused.
    """
    target: torch.dtype = getattr(torch, dtype)
    ties, cast = _cast_weights(model, target)
    if not distributed.first():
        return
    overflown = [name for name, t in cast.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
    if overflown:
        text = f"{overflown[0]} holds a value that is not finite in {dtype}"
        raise TrainingError(text, where=str(folder), fix="set train.export_dtype to bfloat16 or float32")
    state = cast | {alias: cast[name] for alias, name in ties.items()}
    with storage_errors(folder):
        folder.mkdir(parents=True)
    before = model.config.dtype
    try:
        with _writing(folder):
            model.save_pretrained(folder, state_dict=state)
            # save_pretrained names the dtype of the masters, in the config's file as in the model's config.
            model.config.dtype = before
            _with_dtype(model.config, target).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            lora.save_adapter(model, folder / ADAPTER)  # below: whoever finds it beside a model adds it to that
            sync_tree(folder)
    except StorageError:
        remove(folder)
        raise


def _cast_weights(model: nn.Module, target: torch.dtype) -> tuple[dict[str, str], dict[str, Tensor]]:
    """As `_distinct`, whole, in main memory and cast. Of several processes only the first one keeps them."""
    ties, distinct = _distinct(lora.base_weights(model))
    added = lora.additions(model)
    cast: dict[str, Tensor] = {}
    for name, tensor in distinct.items():
        whole = distributed.whole(tensor)
        if name in added:
            whole = (whole + added[name]()).detach()
        if distributed.first():
            cast[name] = whole.to("cpu", target if whole.is_floating_point() else whole.dtype)
    return ties, cast


def sync_tree(folder: Path) -> None:
    """fsync every file and folder below `folder`, and `folder` itself: after it a power cut loses none of them."""
    for path in sorted(folder.rglob("*")):
        (fsync_folder if path.is_dir() else fsync_file)(path)
    fsync_folder(folder)


def _write_files(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What each process holds, in files of its own; their descriptions by name, for all."""
    files = {}
    for kind, tensors in {"weights": _distinct(_trained(model))[1], **_moments(model, optimizer)}.items():
        held, places = pieces.own(tensors)
        if held:
            path = folder / pieces.file_name(kind)
            save_file({name: tensor.contiguous() for name, tensor in held.items()}, path, places)
            files[path.name] = _describe(path)
    described = {name: each[name] for each in distributed.gathered(files) for name in each}
    return {name: described[name] for name in sorted(described)}  # kinds come in another order after a resume


def _write_record(folder: Path, model: nn.Module, files: dict[str, Any], meta: dict[str, Any]) -> None:
    ties = _distinct(_trained(model))[0]
    record = {"format": STATE_FORMAT, "global_step": meta["global_step"], "ties": ties, "files": files, "meta": meta}
    text = json.dumps(record | {"sha256": digest(record)}, indent=1, ensure_ascii=False)
    write_bytes(folder / META, (text + "\n").encode())


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without the parameters that are frozen."""
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name not in frozen}


def _distinct(tensors: dict[str, Tensor]) -> tuple[dict[str, str], dict[str, Tensor]]:
    """`(alias -> name, name -> tensor)` of a state dict, each tied tensor once, under the first of its names.

    The state dict has the parameters themselves (`keep_vars`): shares of a tied one are known by that.
    """
    first: dict[tuple[Any, ...], str] = {}
    ties: dict[str, str] = {}
    for name, tensor in tensors.items():
        key: tuple[Any, ...] = (name,)
        if distributed.is_share(tensor):  # of which an empty part has no address
            key = (id(tensor),)
        elif tensor.numel():
            key = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
        if first.setdefault(key, name) != name:
            ties[name] = first[key]
    return ties, {name: t.detach() for name, t in tensors.items() if name not in ties}


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """Optimizer state by kind, then by parameter name; a parameter that never had a gradient has none."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        for kind, value in optimizer.state.get(parameter, {}).items():
            groups.setdefault(kind, {})[name] = value.detach()
    return groups


def _restore_moments(model: nn.Module, optimizer: torch.optim.Optimizer, groups: dict[str, pieces.Pieces]) -> None:
    optimizer.state.clear()
    for kind, saved in groups.items():
        moments: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters():
            if name in saved.tensors:
                shape, dtype = saved.tensors[name]
                # AdamW counts steps in a scalar on the CPU; moments live where their parameter does, in shares as it.
                moment = torch.empty(shape, dtype=dtype) if kind == "step" else torch.empty_like(parameter, dtype=dtype)
                optimizer.state[parameter][kind] = moments[name] = moment
        saved.read(moments)


def _require_same(
    ties: dict[str, str],
    weights: dict[str, Tensor],
    saved_ties: dict[str, str],
    saved: dict[str, pieces.Stored],
    folder: Path,
) -> None:
    fix = "continue with the student this run was started with, or start another run"
    odd = sorted(weights.keys() ^ saved.keys()) or sorted(f"{a} = {b}" for a, b in ties.items() ^ saved_ties.items())
    if odd:
        raise DataError(f"model and training state differ in {odd[0]} ({len(odd)} in all)", where=str(folder), fix=fix)
    for name, tensor in weights.items():
        theirs = saved[name]
        if (tensor.shape, tensor.dtype) != (theirs.shape, theirs.dtype):
            have, want = f"{theirs.dtype} {list(theirs.shape)}", f"{tensor.dtype} {list(tensor.shape)}"
            text = f"{name} is {have} in the training state and {want} in the model"
            raise DataError(text, where=str(folder), fix=fix)


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / META
    try:
        with storage_errors(path):
            data = path.read_bytes() if path.is_file() else b""
        record = json.loads(data)
    except ValueError as error:
        raise DamagedError(f"{META} cannot be read: {error}", where=str(path), fix=_REDO) from None
    if not isinstance(record, dict) or record.pop("sha256", None) != digest(record):
        raise DamagedError(f"{META} is not the file that was written", where=str(path), fix=_REDO)
    if record["format"] > STATE_FORMAT:
        text = f"training state of format {record['format']}; this version reads up to {STATE_FORMAT}"
        raise DataError(text, where=str(path), fix="pip install --upgrade fire-opd")
    return record


def _states(root: Path) -> Iterator[tuple[int, bool, Path]]:
    """`(global step, not set aside, path)` of every whole state: the largest is the one to continue from."""
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        if path.name.startswith(".") or not path.is_dir():
            continue
        try:
            record = _read_record(path)
        except DataError:
            continue
        if all((path / f).is_file() and (path / f).stat().st_size == d["bytes"] for f, d in record["files"].items()):
            yield record["global_step"], path.suffix != _REPLACED, path


def _publish(unfinished: Path, folder: Path) -> None:
    """Rename into place. A state already there is set aside under a visible name, so a kill never leaves neither."""
    aside = folder.with_name(folder.name + _REPLACED)
    if folder.exists():
        remove(aside)
        os.rename(folder, aside)
    os.rename(unfinished, folder)
    fsync_folder(folder.parent)
    remove(aside)


def _describe(path: Path) -> dict[str, Any]:
    return {"sha256": sha256_file(path), "bytes": path.stat().st_size}


def _with_dtype(config: Any, dtype: torch.dtype) -> Any:
    """A copy of a transformers config, its sub-configs included, that names `dtype`."""
    config = copy.deepcopy(config)
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        part.dtype = dtype
    return config


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """`storage_errors` that also knows safetensors and tokenizers: what the system refuses is an error of its own kind
    in the one, a plain Exception in the other."""
    with storage_errors(folder):
        try:
            yield
        except OSError:
            raise
        except Exception as error:
            number = re.search(r"\(os error (\d+)\)", str(error))
            if number is None and not isinstance(error, SafetensorError):
                raise
            raise OSError(int(number[1]) if number else errno.EIO, str(error), str(folder)) from error
