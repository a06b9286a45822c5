"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil

from twa.files.reading import CheckpointError


@contextlib.contextmanager
def replacing(path: str | os.PathLike, keep: bool = False) -> Iterator[Path]:
    """Context that yields a temporary path beside `path`, which is renamed to it at the end.

    It is a file or a folder, as the block makes it. A reader finds the complete old one or the
    complete new one: the data are on the disk before the renaming. If the block raises, `path` is
    unchanged. A process that is killed in it leaves its temporary file to `remove_leftovers`.

    Args:
        keep: whether to refuse to replace a file or folder that is there at the end.

    Raises:
        CheckpointError: the disk is full, or the file cannot be written for another reason.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        for file in sorted(temporary.rglob("*")) if temporary.is_dir() else (temporary,):
            if file.is_file():
                with open(file, "rb") as written:
                    os.fsync(written.fileno())
        if keep and path.exists():
            raise CheckpointError(f"{path}: has come into being meanwhile, and is kept")
        _put(temporary, path)
    except BaseException as error:
        _remove(temporary)
        if isinstance(error, OSError):
            raise unwritable(path, error) from None
        raise


def _put(new: Path, path: Path) -> None:
    """Renames `new` to `path`. A folder that is there is moved away first, and then removed."""
    if not path.is_dir():
        os.replace(new, path)
        return
    old = new.with_name(f".old{new.name}")
    os.rename(path, old)
    os.replace(new, path)
    _remove(old)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files of `replacing` in `folder` whose processes have ended."""
    for path in folder.glob(".*.*.tmp"):
        process = path.name.split(".")[-2]
        if process.isdecimal() and not psutil.pid_exists(int(process)):
            _remove(path)


def unwritable(path: Path, error: OSError) -> CheckpointError:
    """An error that says in one line why `path` could not be written, and what to do."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    remedy = "; make room there: what was saved before is intact" if full else ""
    return CheckpointError(f"{path}: cannot be written ({error.strerror or error}){remedy}")
