"""Files and folders of weights, read without executing anything that is in them.

Each becomes nested dictionaries that end in tensors, which are mapped into memory, or in `Stored`
ones: of a tensor nothing is read before it is used. The first bytes of a file decide what it is,
and not its name.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import pickle
import warnings
import zipfile
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from twa.files.distributed import load_distributed
from twa.files.reading import CheckpointError, beside, one_line, opened, refusing

# What is read of a folder is the first of these that it holds: the names of transformers, of PEFT,
# of torch.distributed.checkpoint (DCP), and of a folder of DCP in one of accelerate's.
IN_FOLDERS = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
    *("adapter_model.safetensors", "adapter_model.bin", ".metadata", "pytorch_model_fsdp_0"),
)
# Of a folder with none of these, the only file with the first of these endings is read, other than
# the states of a training.
SUFFIXES = (".index.json", ".safetensors", ".bin", ".pt", ".pth", ".ckpt")
NO_WEIGHTS = ("optimizer", "scheduler", "scaler", "random", "rng", "sampler", "training_args")
# The first bytes of files that are no checkpoints, and what to do about them.
OTHERS = {
    b"version https://git-lfs": "is a pointer of Git LFS, not the file itself: run git lfs pull",
    b"\x1f\x8b": "is packed with gzip: unpack it (tar -xzf or gunzip), and give what is in it",
    b"GGUF": "is a GGUF file of llama.cpp, not one of torch: give the folder it was made from",
    b"\x89HDF": "is an HDF5 file, as of Keras, not a checkpoint of torch",
    b"\x93NUMPY": "is an array of NumPy, not a checkpoint of torch",
}


def load(path: str | os.PathLike):
    """What `path` holds, on the CPU.

    - A file of `torch.save`: the plain objects in it (`weights_only=True`).
    - A file of safetensors, an index of shards (`….index.json`), a folder of Hugging Face (a model,
      a Trainer's `checkpoint-*`, an adapter of PEFT): names to tensors.
    - A folder of DCP: its tensors, nested as they were saved. Everything else in
      it is pickled, and ignored.
    - A folder of DeepSpeed in which one file holds the module (ZeRO 1 and 2): that file.
    - Any other folder: its only file of weights.

    Damage within a tensor is not found here, but by `verify`. If a file is overwritten in place,
    rather than replaced by another, its tensors change with it, or this process ends with a bus
    error where the file became shorter.

    Raises:
        CheckpointError: a file is missing, unreadable, truncated, of another kind, or holds pickled
            code; an index and its files do not agree, or it names files outside its folder.
    """
    path = file_of(Path(path))
    return load_distributed(path) if path.name == ".metadata" else _load_file(path)


@refusing
def adapter_config(path: Path) -> dict:
    """What PEFT wrote of an adapter beside its weights, to which `path` leads; {} if nothing."""
    folder = Path(path) if os.path.isdir(path) else Path(path).parent
    file = folder / "adapter_config.json"
    return dict(json.loads(file.read_text())) if file.exists() else {}


def verify(path: str | os.PathLike) -> None:
    """Reads the file or folder `path` in full and compares the checksums that `torch.save` made.

    They cover every byte of every tensor. Files of safetensors, of torch < 1.6, and those saved
    after `torch.serialization.set_crc32_options(False)` have none: of these `load` finds damage to
    the structure only. Those of DCP are compared as it is read.

    Raises:
        CheckpointError: a checksum differs, or a file cannot be read.
    """
    for file in parts_of(Path(path)):
        _verify(file)


def parts_of(path: Path) -> list[Path]:
    """The files that hold the tensors of the checkpoint `path`.

    Raises:
        CheckpointError: a folder or an index does not say which they are.
    """
    path = file_of(path)
    if path.name == ".metadata":
        return sorted(path.parent.glob("*.distcp"))
    if path.name.endswith(".index.json"):
        return [path.with_name(name) for name in sorted(set(_weight_map(path).values()))]
    return [path]


@refusing
def _verify(path: Path) -> None:
    with opened(path) as file:
        if _kind(path, file) != "torch" or path.suffix == ".distcp":
            return
        with zipfile.ZipFile(file) as archive:
            checked = any(member.CRC for member in archive.infolist())
            damaged = archive.testzip() if checked else None
    if damaged is not None:
        raise CheckpointError(f"{path}: is damaged (the checksum of {damaged} differs)")


@refusing
def file_of(path: Path) -> Path:
    """The file to read: `path`, or the one that holds or describes the weights of a folder.

    Raises:
        CheckpointError: the folder holds no such file, or several.
    """
    if not path.is_dir():
        return path
    for name in IN_FOLDERS:
        if (path / name).exists():
            return file_of(path / name)
    if (path / "latest").is_file():  # In it DeepSpeed names the folder of the last checkpoint.
        return file_of(beside(path / "latest", (path / "latest").read_text().strip()))
    ranks = sorted(file.name for file in path.glob("*mp_rank_*_model_states.pt"))
    if any(name.startswith("zero_pp_rank_") for name in ranks):
        raise CheckpointError(
            f"{path}: is divided among ranks by ZeRO-3 of DeepSpeed: run its zero_to_fp32.py "
            "there, and give what that writes"
        )
    names = [entry.name for entry in path.iterdir() if entry.is_file()]
    names = [name for name in names if not name.startswith(NO_WEIGHTS)]
    for files in (ranks, *([n for n in names if n.endswith(suffix)] for suffix in SUFFIXES)):
        if len(files) == 1:
            return path / files[0]
        if files:
            raise CheckpointError(
                f"{path}: is a folder of {len(files)} files with weights, such as {min(files)}: "
                "give one, or merge them if they are parts of one model"
            )
    raise CheckpointError(f"{path}: is a folder with none of {', '.join(IN_FOLDERS)}")


def kind_of(path: Path) -> str:
    """What the file is: "torch", "old torch", "safetensors" or "JSON"; see `_kind`."""
    with opened(path) as file:
        return _kind(path, file)


def _kind(path: Path, file: io.BufferedReader) -> str:
    """What the file is by its first bytes: "torch", "old torch", "safetensors" or "JSON".

    Raises:
        CheckpointError: it is none of these; the message says what it is.
    """
    start = file.read(512)
    if start.startswith(b"PK\3\4"):
        return "torch"
    if start.startswith(b"\x80"):
        return "old torch"
    if start[8:9] == b"{":
        return "safetensors"
    text = start.removeprefix(b"\xef\xbb\xbf").strip()
    words = next((OTHERS[first] for first in OTHERS if start.startswith(first)), None)
    if start[257:262] == b"ustar":
        words = "is a tar archive, as of NeMo: unpack it (tar -xf), and give the checkpoint in it"
    elif text.startswith(b"{"):
        return "JSON"
    elif text.startswith(b"<"):
        words = "is a page of HTML or XML, not the file itself: download it again"
    elif not start:
        words = "cannot be read: it is empty"
    elif not words and text.isascii() and b"".join(text.split()).decode().isprintable():
        words = f"is text, not a checkpoint ({one_line(ValueError(text.decode()))[:40]})"
    raise CheckpointError(f"{path}: {words or 'is no checkpoint of torch or safetensors'}")


@refusing
def _load_file(path: Path, shards: bool = True):
    """What one file holds, or with `shards` what the files hold that it lists."""
    kind = kind_of(path)
    if kind == "JSON" and shards:
        return _sharded(path)
    if kind == "safetensors":
        with safe_open(path, framework="pt") as tensors:
            return {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118
    # The arguments of a script, which timm's and others' hold, are plain values as well.
    plain = torch.serialization.safe_globals([argparse.Namespace])
    with warnings.catch_warnings(), plain:
        warnings.simplefilter("ignore")  # about unusual pickles: they are read or refused
        try:
            if path.suffix == ".safetensors":  # by which torch, too, would take it for one
                with opened(path) as file:
                    return torch.load(file, map_location="cpu", weights_only=True)
            # Files of torch < 1.6 are no zip archives and cannot be memory-mapped.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=kind == "torch")
        except pickle.UnpicklingError as error:
            if "must be imported to load DTensors" not in str(error):
                raise
            importlib.import_module("torch.distributed.tensor")
            return _load_file(path, shards)
        except RuntimeError as error:
            if "TorchScript" not in str(error):
                raise
    raise CheckpointError(f"{path}: is a program of TorchScript: give the state_dict of its model")


@refusing
def _weight_map(index: Path) -> dict[str, str]:
    """The names of the shards by those of the tensors, from an index of Hugging Face."""
    with opened(index) as file:
        content = json.load(file)
    if "weight_map" not in content:
        raise CheckpointError(f"{index}: is JSON, not a checkpoint or an index (no weight_map)")
    weight_map = dict(content["weight_map"])
    for name in weight_map.values():
        beside(index, name)
    return weight_map


def _sharded(index: Path) -> dict[str, Tensor]:
    """The tensors of all shards that `index` names."""
    weight_map, state = _weight_map(index), {}
    for name in sorted(set(weight_map.values())):
        path = index.with_name(name)
        shard = _load_file(path, False)
        for key in [key for key, file in weight_map.items() if file == name]:
            if key not in shard:
                raise CheckpointError(f"{path}: {key} is not in it, but {index.name} says so")
        for key in shard:
            if key in state:
                raise CheckpointError(f"{path}: {key} is in it, and in another shard")
        state |= shard
    return state
