"""Files of the scripts: tensors, JSON and logs, written whole and read once they are whole."""

import copy
import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from twa.files.writing import replacing, unwritable
from utils import UserError


def save(obj, path: str | os.PathLike) -> None:
    """`torch.save`, atomically: see `replacing`."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(obj, file)
        except RuntimeError as error:
            # After a failed write torch's zip writer raises too, and hides the first error.
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def on_cpu(state):
    """The same dicts, lists and tuples with their tensors on the CPU, after one wait for a device.

    A `state_dict` keeps its attributes.
    """
    devices = set()

    def move(value):
        if isinstance(value, Tensor):
            devices.add(value.device)
            return value.to("cpu", non_blocking=True)
        if isinstance(value, dict):
            moved = copy.copy(value)
            moved.update({key: move(part) for key, part in value.items()})
            return moved
        return type(value)(map(move, value)) if type(value) in (list, tuple) else value

    moved = move(state)
    for device in devices - {torch.device("cpu")}:
        torch.accelerator.synchronize(device)
    return moved


def append(path: Path, text: str) -> None:
    """Writes `text` at the end of the file `path`; a `CheckpointError` says why that fails."""
    try:
        with open(path, "a") as file:
            file.write(text)
    except OSError as error:
        raise unwritable(path, error) from None


def read_lines(path: Path, *keys: str) -> list[dict]:
    """The objects in the `.jsonl` file `path`, without an unfinished last line; [] without a file.

    Args:
        keys: that each object must have; a `UserError` names the first that is missing.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines()
    return [_parse(line, path, *keys) for line in lines if line.endswith(b"}")]


def write_lines(records: Iterable[dict], path: Path) -> None:
    """Writes a `.jsonl` file atomically."""
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(record) + "\n" for record in records))


def read_json(path: Path) -> dict:
    """The object in the JSON file `path`; {} if there is no file."""
    return _parse(path.read_bytes(), path) if path.exists() else {}


def write_json(content: dict, path: Path) -> None:
    """Writes `content` as JSON, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def _parse(text: bytes, path: Path, *keys: str) -> dict:
    try:
        content = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError("holds no JSON object")
        for key in keys:
            if key not in content:
                raise ValueError(f"an object in it lacks {key!r}")
    except ValueError as error:  # also what is raised where the text is no JSON or no UTF-8
        raise UserError(f"{path}: is damaged ({error}); remove it") from None
    return content
