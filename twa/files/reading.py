"""What all readers of files share: errors of one line, and tensors that are read when used."""

from __future__ import annotations

import functools
import io
import os
import pickle
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


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


def refusing(read: Callable) -> Callable:
    """`read(path, …)`, where whatever goes wrong becomes a `CheckpointError` with the path."""

    @functools.wraps(read)
    def wrapped(path: Path, *args):
        try:
            return read(path, *args)
        except CheckpointError:
            raise
        except FileNotFoundError:
            raise CheckpointError(f"{path}: there is no such checkpoint") from None
        except pickle.UnpicklingError as e:
            # A damaged archive raises other errors; this one asked for a class or a function.
            asked = re.search(r"(?:GLOBAL |got <class ')([\w.]+)", str(e))
            if not asked:
                reason = "cannot be read: it is damaged, or no checkpoint of torch"
            elif asked[1].endswith(".ShardedTensor"):
                reason = "is one rank's shard of FSDP: save by torch.distributed.checkpoint instead"
            else:
                reason = (
                    f"holds pickled code ({asked[1]}); only plain tensors are read. If you trust "
                    "it, name that to torch.serialization.add_safe_globals, or pass its state_dict"
                )
            raise CheckpointError(f"{path}: {reason}") from None
        except Exception as e:  # a damaged file can make its reader fail in any way
            raise CheckpointError(f"{path}: cannot be read ({one_line(e)})") from None

    return wrapped


def opened(path: Path) -> io.BufferedReader:
    """The file `path`, open for reading; a named pipe would be waited for, and is refused."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise CheckpointError(f"{path}: is not a file")
    return open(path, "rb")


def beside(file: Path, name: str) -> Path:
    """The path `name` in the folder of `file`, which names it and may be a stranger's."""
    if name in ("", "..") or Path(name).name != name:
        raise CheckpointError(f"{file}: names a file outside its folder ({name})")
    return file.with_name(name)
