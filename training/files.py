"""Files: written whole or not at all, and read only once they are known to be whole."""

import contextlib
import copy
import errno
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil
import torch
from torch import Tensor

from twa.files.reading import CheckpointError
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


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Context that yields a temporary path beside `path`, which is renamed to it at the end.

    A reader finds the complete old file or the complete new one: the data are on the disk before
    the renaming. If the block raises, `path` is unchanged. A process that is killed in it leaves
    its temporary file to `remove_leftovers`.

    Raises:
        CheckpointError: the disk is full, or the file cannot be written for another reason.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise unwritable(path, error) from None
        raise


def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files of `replacing` in `folder` whose processes have ended."""
    for path in folder.glob(".*.*.tmp"):
        process = path.name.split(".")[-2]
        if process.isdecimal() and not psutil.pid_exists(int(process)):
            path.unlink(missing_ok=True)


def unwritable(path: Path, error: OSError) -> CheckpointError:
    """An error that says in one line why `path` could not be written, and what to do."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    remedy = "; make room there: what was saved before is intact" if full else ""
    return CheckpointError(f"{path}: cannot be written ({error.strerror or error}){remedy}")


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
