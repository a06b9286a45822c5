"""Outputs: a mean in the format of a checkpoint, written tensor by tensor.

Each output has `write(key, begin, piece)`, which is called with the pieces of every tensor in
their order, and `close()`. `make` chooses it by the checkpoint that it is made after.
"""

from __future__ import annotations

import argparse
import json
import pickle
import shutil
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from twa.files.formats import NO_WEIGHTS, SUFFIXES, file_of, kind_of, load, parts_of
from twa.files.reading import CheckpointError, Stored
from twa.files.states import container_of

# The names of dtypes in the headers of safetensors.
CODES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8"},
    **{torch.uint8: "U8", torch.bool: "BOOL", torch.complex64: "C64"},
    **{torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"},
    **{torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64"},
}
# What a checkpoint holds beside the weights that is of one moment of a training.
OF_A_MOMENT = ("optimizer", "lr_scheduler", "scheduler", "scaler", "grad_scaler", "amp")

Dtype = Callable[[Tensor | Stored], torch.dtype]


def make(source: Path, target: Path, tensors: Mapping[str, Tensor | Stored], dtype: Dtype):
    """An output at `target`, in the format of the checkpoint `source`.

    A folder gets the configuration, tokenizer and other small files of `source`, too.

    Args:
        tensors: of `source`, by name.
        dtype: of the written tensor, by that of `source`.

    Raises:
        CheckpointError: the format cannot be written.
    """
    folder, file = source.is_dir(), file_of(source)
    if folder:
        target.mkdir()
        copy_settings(source, target)
    if file.name == ".metadata":
        return Distributed(file, target, tensors, dtype)
    place = target / file.name if folder else target
    if file.name.endswith(".index.json"):
        if not folder:
            raise CheckpointError(f"{source}: give the folder of an index, whose shards are many")
        return Sharded(file, place, tensors, dtype)
    return _file(file, place, tensors, dtype)


def _file(source: Path, target: Path, tensors: Mapping, dtype: Dtype):
    return (SafeTensors if kind_of(source) == "safetensors" else Torch)(
        source, target, tensors, dtype
    )


def copy_settings(source: Path, target: Path) -> None:
    """Copies the files that are neither weights nor the states of a training."""
    weights = {path.name for path in parts_of(source)} | {file_of(source).name}
    for path in source.iterdir():
        state = path.name.startswith((*NO_WEIGHTS, "trainer_state", "zero_to_fp32", "latest", "."))
        index = path.name.endswith(".index.json")
        other = path.suffix in (*SUFFIXES, ".distcp")
        if path.is_file() and not (path.name in weights or state or index or other):
            shutil.copyfile(path, target / path.name)


class SafeTensors:
    """A file of safetensors, with the metadata of `source`."""

    def __init__(self, source: Path, target: Path, tensors: Mapping, dtype: Dtype):
        header, end, self._begins = {}, 0, {}
        with safe_open(source, framework="pt") as file:
            if file.metadata():
                header["__metadata__"] = file.metadata()
        for key, value in tensors.items():
            size = value.shape.numel() * dtype(value).itemsize
            header[key] = {"dtype": CODES[dtype(value)], "shape": list(value.shape)}
            header[key]["data_offsets"] = [end, end + size]
            self._begins[key], end = end, end + size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file = _opened(target, "wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._data = self._file.tell()

    def write(self, key: str, begin: int, piece: Tensor) -> None:
        self._file.seek(self._data + self._begins[key] + begin * piece.itemsize)
        self._file.write(_bytes(piece))

    def close(self) -> None:
        self._file.close()


class Sharded:
    """The shards of a folder of Hugging Face, and their index."""

    def __init__(self, source: Path, target: Path, tensors: Mapping, dtype: Dtype):
        index = json.loads(source.read_text())
        size = sum(value.shape.numel() * dtype(value).itemsize for value in tensors.values())
        index.setdefault("metadata", {})["total_size"] = size
        target.write_text(json.dumps(index, indent=2) + "\n")
        self._shards = {}
        for name in sorted(set(index["weight_map"].values())):
            inside = {k: v for k, v in tensors.items() if index["weight_map"][k] == name}
            self._shards |= dict.fromkeys(
                inside, _file(source.with_name(name), target.with_name(name), inside, dtype)
            )

    def write(self, key: str, begin: int, piece: Tensor) -> None:
        self._shards[key].write(key, begin, piece)

    def close(self) -> None:
        for shard in set(self._shards.values()):
            shard.close()


class Torch:
    """A file of `torch.save`, with everything in `source` but the states of its training.

    `torch.save` leaves room for the tensors, whose places in the file `torch.load` tells; checksums
    are corrected at the end.
    """

    def __init__(self, source: Path, target: Path, tensors: Mapping, dtype: Dtype):
        from torch._subclasses.fake_tensor import FakeTensorMode

        places: dict[tuple, Tensor] = {}  # Tied tensors have one place.
        new = {}
        for key, value in tensors.items():
            place = value.untyped_storage().data_ptr(), value.storage_offset(), value.shape
            if not value.numel() or place not in places:
                places[place] = torch.empty(value.shape, dtype=dtype(value))
            new[key] = places[place]
        content = load(source)
        path = container_of(content)
        with torch.serialization.skip_data():
            torch.save(_replaced(content, path, new), target)
        with FakeTensorMode(), torch.serialization.safe_globals([argparse.Namespace]):
            made = torch.load(target, weights_only=True)
        for name in path:
            made = made[name]
        self._begins = {key: made[key].untyped_storage()._checkpoint_offset for key in tensors}
        self._checksums: dict[int, int] = {}
        self._target, self._file = target, _opened(target, "r+b")

    def write(self, key: str, begin: int, piece: Tensor) -> None:
        place, content = self._begins[key], _bytes(piece)
        if not len(content):
            return
        self._file.seek(place + begin * piece.itemsize)
        self._file.write(content)
        self._checksums[place] = zlib.crc32(content, self._checksums[place] if begin else 0)

    def close(self) -> None:
        with zipfile.ZipFile(self._target) as archive:
            members, directory = archive.infolist(), archive.start_dir
        with self._file as file:
            for member in members:
                file.seek(directory)
                entry = file.read(46)
                lengths = [int.from_bytes(entry[i : i + 2], "little") for i in (28, 30, 32)]
                file.seek(member.header_offset + 26)
                own = file.read(4)
                data = member.header_offset + 30
                data += int.from_bytes(own[:2], "little") + int.from_bytes(own[2:], "little")
                if data in self._checksums:
                    checksum = self._checksums[data].to_bytes(4, "little")
                    file.seek(directory + 16)
                    file.write(checksum)
                    file.seek(data + member.file_size + 4)  # after the mark of a data descriptor
                    file.write(checksum)
                directory += 46 + sum(lengths)


def _replaced(content: Mapping, path: tuple[str, ...], new: Mapping[str, Tensor]) -> Mapping:
    """`content` with the `state_dict` at `path` replaced by `new`, without what is of a moment."""
    if path:
        kept = {k: v for k, v in content.items() if not str(k).startswith(OF_A_MOMENT)}
        return kept | {path[0]: _replaced(content[path[0]], path[1:], new)}
    replaced = type(content)((key, new.get(key, value)) for key, value in content.items())
    if hasattr(content, "_metadata"):
        replaced._metadata = content._metadata
    return replaced


class Distributed:
    """A folder of `torch.distributed.checkpoint` with one file, nested as `source` is."""

    def __init__(self, source: Path, target: Path, tensors: Mapping, dtype: Dtype):
        self._target = target
        self._file = _opened(target / "__0_0.distcp", "wb")
        self._shapes = {key: (value.shape, dtype(value)) for key, value in tensors.items()}
        self._places, self._whole = {}, torch.empty(0)
        # The path of each tensor in what was saved: its container, if any, and its key.
        self._outer = container_of(load(source.parent))

    def write(self, key: str, begin: int, piece: Tensor) -> None:
        shape, dtype = self._shapes[key]
        if begin == 0:
            self._whole = torch.empty(shape.numel(), dtype=dtype)
        self._whole[begin : begin + len(piece)] = piece
        if begin + len(piece) == shape.numel():
            offset = self._file.tell()
            torch.save(self._whole.view(shape), self._file)
            self._places[key] = offset, self._file.tell() - offset

    def close(self) -> None:
        from torch.distributed.checkpoint import metadata as meta
        from torch.distributed.checkpoint.filesystem import _StorageInfo

        self._file.close()
        entries, paths, storage = {}, {}, {}
        for key, (offset, length) in self._places.items():
            shape, dtype = self._shapes[key]
            path = (*self._outer, key)
            name, zeros = ".".join(path), torch.Size([0] * len(shape))
            chunk = meta.ChunkStorageMetadata(zeros, shape)
            properties = meta.TensorProperties(dtype=dtype)
            entries[name] = meta.TensorStorageMetadata(properties, shape, [chunk])
            paths[name] = path
            place = _StorageInfo("__0_0.distcp", offset, length)
            storage[meta.MetadataIndex(name, zeros)] = place
        content = meta.Metadata(entries, planner_data=paths, storage_data=storage)
        (self._target / ".metadata").write_bytes(pickle.dumps(content))


def _bytes(piece: Tensor) -> memoryview:
    return (
        memoryview(piece.contiguous().view(torch.uint8).numpy())
        if piece.numel()
        else memoryview(b"")
    )


def _opened(path: Path, mode: str) -> BinaryIO:
    return open(path, mode)
