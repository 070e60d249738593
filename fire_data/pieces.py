"""Tensors in safetensors files, whole or in the shares of several processes, laid out and read as torch's DCP does.

Each process writes what it holds, and beside each tensor where in the whole it begins: the layout of
`HuggingFaceStorageWriter` of torch.distributed.checkpoint (DCP). That writer itself copies a whole file in memory and
puts its metadata in an order that changes from call to call, so the bytes are written here; they are read by DCP's own
reader, whose planner fits the pieces of any number of processes to any other.
Units: offsets are indices along each dimension of the whole tensor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fire_data import distributed

_PLACES, _OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"  # DCP's names


class Stored(NamedTuple):
    """What is known of a tensor without reading it."""

    shape: torch.Size
    dtype: torch.dtype


def file_name(kind: str) -> str:
    """Of the file in which this process writes its tensors of a kind."""
    if distributed.size() == 1:
        return f"{kind}.safetensors"
    return f"{kind}-{distributed.rank() + 1:05d}-of-{distributed.size():05d}.safetensors"


def kind_of(name: str) -> str:
    """The kind of a file, by its name."""
    return Path(name).stem.partition("-")[0]


def own(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    """What this process holds of tensors, each element on one process only; and where it lies in them, as metadata."""
    if distributed.size() == 1:
        return dict(tensors), None
    held: dict[str, Tensor] = {}
    places: dict[str, dict[str, list[int]]] = {}
    for name, tensor in tensors.items():
        part, offsets = tensor, [0] * tensor.ndim
        if distributed.is_share(tensor):
            share = cast(Any, tensor)
            part, offsets = share.to_local(), list(share.__create_chunk_list__()[0].offsets)
        if distributed.first() if part.shape == tensor.shape else part.numel():
            held[name], places[name] = part, {_OFFSETS: offsets}
    return held, {_PLACES: json.dumps(places)}


class Pieces:
    """The tensors of some files that belong together."""

    def __init__(self, files: Sequence[Path]) -> None:
        from torch.distributed.checkpoint.filesystem import FileSystem
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

        class Only(FileSystem):
            """Of their folder, the reader is shown these files alone."""

            def ls(self, path: Any) -> list[str]:
                return [str(file) for file in files]

        self._reader = HuggingFaceStorageReader(str(files[0].parent))
        self._reader.fs = Only()
        self._metadata = self._reader.read_metadata()
        described: Mapping[str, Any] = self._metadata.state_dict_metadata
        self.tensors = {name: Stored(d.size, d.properties.dtype) for name, d in described.items()}

    def read(self, tensors: dict[str, Tensor]) -> None:
        """Fill tensors in place; of a share only its part is read. Names, shapes and dtypes have to be the same."""
        from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

        planner: Any = DefaultLoadPlanner()
        planner.set_up_planner(tensors, self._metadata, is_coordinator=True)
        reader: Any = self._reader
        reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        reader.read_data(reader.prepare_local_plan(planner.create_local_plan()), planner).wait()
