"""A lock on a directory, so that no two processes write into it."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from training import ranks
from twa.checkpoints import replacing
from utils import UserError, make_directory

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None


class Lock:
    """Context in which no other process that asks for the same lock writes into `directory`.

    The lock is on a file `.lock` there, and held by the first rank until it ends: a killed process
    holds none, and the half-written files that it left are removed. Where there is no `fcntl` (on
    Windows), or the file system has no locks, nobody is refused.

    Args:
        writes: whether the process is going to write there; one that only reads takes no lock.

    Raises:
        UserError: another process holds it, or the directory cannot be made or written to.
    """

    def __init__(self, directory: Path | str, writes: bool = True):
        self._path = Path(directory) / ".lock"
        self._writes = writes
        self._file = None

    def __enter__(self) -> None:
        if fcntl is None or not self._writes or not ranks.first():
            return
        parents = (self._path.parent, *self._path.parent.parents)
        self._made = [directory for directory in parents if not directory.exists()]
        make_directory(self._path.parent)
        try:
            while not self._is_locked():
                self._file = open(self._path, "w")
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                return
            reason = "another process writes there; wait for its end, or give another directory"
            if not isinstance(error, BlockingIOError):
                reason = f"cannot be written to ({error.strerror})"
            raise UserError(f"{self._path.parent}: {reason}") from None
        for leftover in self._path.parent.glob(replacing.LEFTOVERS):
            leftover.unlink(missing_ok=True)

    def _is_locked(self) -> bool:
        """Whether the locked file still has its name: the last holder may have removed it."""
        try:
            return self._file is not None and os.path.samestat(
                os.fstat(self._file.fileno()), os.stat(self._path)
            )
        except FileNotFoundError:
            return False

    def __exit__(self, *_) -> None:
        if self._file is None:
            return
        with contextlib.suppress(OSError):
            self._path.unlink()  # while it is locked, so that it is not the next process's
            for directory in self._made:
                directory.rmdir()  # if it is still empty
        self._file.close()
