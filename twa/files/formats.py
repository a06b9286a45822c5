"""Files and folders of weights, read without executing anything that is in them.

Each becomes nested dictionaries that end in tensors, which are mapped into memory, or in `Stored`
ones: of a tensor nothing is read before it is used.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import os
import pickle
import re
import stat
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

# What is read of a folder is the first of these that it holds: the names of transformers, of PEFT,
# of torch.distributed.checkpoint (DCP), and of a folder of DCP in one of accelerate's.
IN_FOLDERS = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
    *("adapter_model.safetensors", "adapter_model.bin", ".metadata", "pytorch_model_fsdp_0"),
)


class CheckpointError(ValueError):
    """A file that cannot be read or written; the message is one line that names it and says why."""


@dataclass(frozen=True)
class Stored:
    """A tensor on the disk, which `read` reads."""

    shape: torch.Size
    dtype: torch.dtype
    read: Callable[[], Tensor]


def tensor_of(value: Tensor | Stored) -> Tensor:
    return value.read() if isinstance(value, Stored) else value.detach()


def mapped(value: Tensor | Stored) -> bool:
    """Whether `value` takes no memory before it is used; it owns none, as far as torch knows."""
    return isinstance(value, Stored) or not value.untyped_storage().resizable()


def one_line(error: BaseException) -> str:
    """The first line of the message of `error`, or its type if the message is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _refusing(read: Callable) -> Callable:
    """`read(path, …)`, where whatever goes wrong becomes a `CheckpointError` with the path."""

    @functools.wraps(read)
    def refusing(path: Path, *args):
        try:
            return read(path, *args)
        except CheckpointError:
            raise
        except FileNotFoundError:
            raise CheckpointError(f"{path}: there is no such checkpoint") from None
        except pickle.UnpicklingError as e:
            # A damaged archive raises other errors; this one asked for a class or a function.
            asked = re.search(r"(?:GLOBAL |got <class ')([\w.]+)", str(e))
            what = f"pickled code ({asked[1]})" if asked else "pickled code or is no checkpoint"
            raise CheckpointError(
                f"{path}: holds {what}; only plain tensors are read. If you trust it, name that to "
                "torch.serialization.add_safe_globals, or pass its state_dict"
            ) from None
        except Exception as e:  # a damaged file can make its reader fail in any way
            raise CheckpointError(f"{path}: cannot be read ({one_line(e)})") from None

    return refusing


def load(path: str | os.PathLike):
    """What `path` holds, on the CPU.

    - A file of `torch.save`: whatever plain objects are in it (`weights_only=True`).
    - A `.safetensors` file, an index of shards (`….index.json`), a folder of Hugging Face (a model,
      a Trainer's `checkpoint-*`, an adapter of PEFT): names to tensors.
    - A folder of DCP: its tensors, nested as they were saved. What else it holds is pickled, and is
      left out.

    Damage within a tensor is not found here, but by `verify`. If a file is overwritten in place,
    rather than replaced by another, its tensors change with it, or this process ends with a bus
    error where the file became shorter.

    Raises:
        CheckpointError: a file is missing, unreadable, truncated, or holds pickled code; an index
            and its files do not agree, or it names files outside its folder.
    """
    path = _in_folder(Path(path))
    if path.name == ".metadata":
        return _distributed(path)
    return _sharded(path) if path.name.endswith(".index.json") else _single(path)


@_refusing
def adapter_config(path: Path) -> dict:
    """What PEFT wrote of an adapter beside its weights, to which `path` leads; {} if nothing."""
    folder = Path(path) if os.path.isdir(path) else Path(path).parent
    file = folder / "adapter_config.json"
    return dict(json.loads(file.read_text())) if file.exists() else {}


def verify(path: str | os.PathLike) -> None:
    """Reads the file or folder `path` in full and compares the checksums that `torch.save` made.

    They cover every byte of every tensor. `.safetensors` files and those of torch < 1.6 have none:
    of these `load` finds damage to the structure only. Those of DCP are compared as it is read.

    Raises:
        CheckpointError: a checksum differs, or a file cannot be read.
    """
    path = _in_folder(Path(path))
    shards = sorted(set(_weight_map(path).values())) if path.name.endswith(".index.json") else ()
    for file in [path.with_name(name) for name in shards] or [path]:
        _verify(file)


@_refusing
def _verify(path: Path) -> None:
    with _opened(path) as file:
        if path.suffix == ".safetensors" or not zipfile.is_zipfile(file):
            return
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    if damaged is not None:
        raise CheckpointError(f"{path}: is damaged (the checksum of {damaged} differs)")


def _opened(path: Path) -> io.BufferedReader:
    if not stat.S_ISREG(os.stat(path).st_mode):  # A named pipe would be waited for.
        raise CheckpointError(f"{path}: is not a file")
    return open(path, "rb")


@_refusing
def _in_folder(path: Path) -> Path:
    """The file to read: `path`, or the one of `IN_FOLDERS` where it is a folder."""
    if not path.is_dir():
        return path
    for name in IN_FOLDERS:
        if (path / name).exists():
            return _in_folder(path / name)
    raise CheckpointError(f"{path}: is a folder with none of {', '.join(IN_FOLDERS)}")


@_refusing
def _single(path: Path):
    """What one file holds."""
    with _opened(path) as file:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as tensors:
                return {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118
        # Files of torch < 1.6 are no zip archives and cannot be memory-mapped.
        mmap = zipfile.is_zipfile(file)
        # The arguments of a script, which timm's and others' hold, are plain values as well.
        plain = torch.serialization.safe_globals([argparse.Namespace])
        with warnings.catch_warnings(), plain:
            warnings.simplefilter("ignore")  # about unusual pickles: they are read or refused
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def _beside(index: Path, name: str) -> Path:
    """The file `name` in the folder of `index`, which names it and may be a stranger's."""
    if name in ("", "..") or Path(name).name != name:
        raise CheckpointError(f"{index}: names a file outside its folder ({name})")
    return index.with_name(name)


@_refusing
def _weight_map(index: Path) -> dict[str, str]:
    """The names of the shards by those of the tensors, from an index of Hugging Face."""
    with _opened(index) as file:
        weight_map = dict(json.load(file)["weight_map"])
    for name in weight_map.values():
        _beside(index, name)
    return weight_map


def _sharded(index: Path) -> dict[str, Tensor]:
    """The tensors of all shards that `index` names."""
    weight_map, state = _weight_map(index), {}
    for name in sorted(set(weight_map.values())):
        path = index.with_name(name)
        shard = _single(path)
        for key in [key for key, file in weight_map.items() if file == name]:
            if key not in shard:
                raise CheckpointError(f"{path}: {key} is not in it, but {index.name} says so")
        for key in shard:
            if key in state:
                raise CheckpointError(f"{path}: {key} is in it, and in another shard")
        state |= shard
    return state


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


@_refusing
def _distributed(path: Path) -> dict:
    """The tensors of the DCP folder whose `.metadata` is `path`, nested as they were saved."""
    with _opened(path) as file:
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
            chunks.append((_beside(path, at.relative_path), at, chunk))
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


@_refusing
def _joined(_: Path, key: str, shape: torch.Size, dtype: torch.dtype, chunks: list) -> Tensor:
    """The tensor `key` of a DCP folder, from its chunks: file, place in the file, place in it."""
    whole, filled = torch.empty(shape, dtype=dtype), torch.zeros(shape, dtype=torch.bool)
    for path, at, chunk in chunks:
        _join(path, key, at, chunk, whole, filled)
    return whole


@_refusing
def _join(path: Path, key: str, at: _Record, chunk: _Record, whole: Tensor, filled: Tensor) -> None:
    """Reads a chunk into its place in `whole` and marks it in `filled`."""
    with _opened(path) as file:
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
