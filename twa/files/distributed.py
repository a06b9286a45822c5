"""Folders of `torch.distributed.checkpoint` (DCP), read without executing what they hold."""

from __future__ import annotations

import functools
import io
import os
import pickle
from pathlib import Path

import torch
from torch import Tensor

from twa.files.reading import CheckpointError, Stored, beside, opened, refusing


class _Record:
    """Stands for an object in a DCP `.metadata`: its attributes without its class."""

    def __init__(self, *_):
        pass

    def __setstate__(self, state):
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


def _member(*_) -> _Record:
    """Stands for `getattr`, by which Python before 3.11.4 pickles the members of enumerations."""
    return _Record()


class _MetadataUnpickler(pickle._Unpickler):
    """Makes a `_Record` of each object, and knows only what a DCP `.metadata` is made of.

    It is the one in Python: that in C takes memory by numbers in the file, up to 64 GB.
    """

    MODULES = (
        *("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"),
        *("torch.serialization", "pathlib", "pathlib._local"),
    )

    def find_class(self, module: str, name: str):
        plain = vars(torch).get(name) if module == "torch" else None
        if plain is torch.Size or isinstance(plain, torch.dtype):
            return plain
        if (module, name) == ("builtins", "getattr"):
            return _member
        if module in self.MODULES:
            return type(name, (_Record,), {"offset": None, "transform_descriptors": None})
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")


@refusing
def load_distributed(path: Path) -> dict:
    """The tensors of the DCP folder whose `.metadata` is `path`, nested as they were saved."""
    with opened(path) as file:
        metadata = _MetadataUnpickler(file).load()
    places = {(index.fqn, index.offset): at for index, at in metadata.storage_data.items()}
    content: dict = {}
    for key, entry in metadata.state_dict_metadata.items():
        if type(entry).__name__ != "TensorStorageMetadata":
            continue
        shape, dtype = torch.Size(entry.size), entry.properties.state[0]
        chunks = []
        for chunk in entry.chunks:
            at = places[key, chunk.offsets]
            if at.transform_descriptors:
                raise CheckpointError(f"{path}: {key} is compressed, which is not supported")
            chunks.append((beside(path, at.relative_path), at, chunk))
        if sum(torch.Size(chunk.sizes).numel() for _, _, chunk in chunks) != shape.numel():
            raise CheckpointError(f"{path}: the parts of {key} do not make it up")
        if not isinstance(dtype, torch.dtype):
            raise CheckpointError(f"{path}: {key} has no dtype")
        *outer, name = (metadata.planner_data or {}).get(key, (key,))
        inner = content
        for part in outer:
            inner = inner.setdefault(part, {})
        read = functools.partial(_joined, path, key, shape, dtype, chunks)
        inner[name] = Stored(shape, dtype, read)
    return content


@refusing
def _joined(_: Path, key: str, shape: torch.Size, dtype: torch.dtype, chunks: list) -> Tensor:
    """The tensor `key` of a DCP folder, from its chunks: file, place in the file, place in it."""
    whole, filled = torch.empty(shape, dtype=dtype), torch.zeros(shape, dtype=torch.bool)
    for path, at, chunk in chunks:
        _join(path, key, at, chunk, whole, filled)
    return whole


@refusing
def _join(path: Path, key: str, at: _Record, chunk: _Record, whole: Tensor, filled: Tensor) -> None:
    """Reads a chunk into its place in `whole` and marks it in `filled`."""
    with opened(path) as file:
        file.seek(at.offset)
        if at.offset + at.length > os.path.getsize(path):
            raise CheckpointError(f"{path}: is truncated")
        stored = io.BytesIO(file.read(at.length))
    part = torch.load(stored, map_location="cpu", weights_only=True)
    if (part.dtype, part.shape) != (whole.dtype, chunk.sizes):
        raise CheckpointError(f"{path}: {key} is not of the dtype and shape of .metadata")
    region = tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))
    if filled[region].any():
        raise CheckpointError(f"{path}: {key} overlaps another part of itself")
    whole[region], filled[region] = part, True
