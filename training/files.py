"""Files that are written whole or not at all, and read once they are known to be whole."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

import torch
from torch import nn

from twa.files.checkpoints import CheckpointError, load_into
from twa.files.formats import verify


def save(obj, path: str | os.PathLike) -> None:
    """`torch.save`, atomically: a reader finds the complete old file or the complete new one.

    Raises:
        CheckpointError: as `replacing`.
    """
    with replacing(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(obj, file)
        except RuntimeError as error:
            # After a failed write torch's zip writer raises too, and hides the first error.
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


class replacing:
    """Context manager: yields a temporary path in the folder of `path`, renamed to it at the end.

    If the block raises, the temporary file is removed and `path` stays as it was. The data are
    flushed to the disk before the renaming, so that a crash leaves no empty file. A process that is
    killed in the block leaves the temporary file, which matches `LEFTOVERS`.

    Raises:
        CheckpointError: the disk is full, or the file cannot be written for another reason.
    """

    LEFTOVERS = ".*.*.tmp"

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")

    def __enter__(self) -> Path:
        return self.temporary

    def __exit__(self, _, error: BaseException | None, __) -> None:
        try:
            if error is None:
                with open(self.temporary, "rb") as file:
                    os.fsync(file.fileno())
                os.replace(self.temporary, self.path)
                return
        except OSError as failed:
            error = failed
        with contextlib.suppress(OSError):
            self.temporary.unlink()
        if isinstance(error, OSError):
            raise CheckpointError(unwritten(self.path, error)) from None


def unwritten(path: Path, error: OSError) -> str:
    """One line that says why `path` could not be written, and what to do."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    remedy = "; make room there: what was saved before stands" if full else ""
    return f"{path}: cannot be written ({error.strerror or error}){remedy}"


def load_verified(model: nn.Module, path: str | os.PathLike) -> None:
    """Loads the checkpoint `path` into `model` once it is known to be whole and to fit.

    Raises:
        CheckpointError: as `verify` and `load_into`; the model is as it was.
    """
    verify(path)
    load_into(model, path)
