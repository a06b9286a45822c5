"""A lock on a directory, so that no two processes write into it."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from training import ranks
from training.files import replacing
from utils import UserError, make_directory


@contextlib.contextmanager
def lock(directory: Path | str, writes: bool = True) -> Iterator[None]:
    """No other process that asks for the same lock writes into `directory` meanwhile.

    The lock is on a file `.lock` there, and held by the first rank until it ends: a killed process
    holds none, and the half-written files that it left are removed.

    Args:
        writes: whether this process is going to write there; one that only reads takes no lock.

    Raises:
        UserError: another process holds it, or the directory cannot be made or written to.
    """
    if not writes or not ranks.first():
        yield
        return
    directory = Path(directory)
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    make_directory(directory)
    path = directory / ".lock"
    try:
        held = FileLock(path, timeout=0)
        held.acquire()
    except Timeout:
        remedy = "wait for its end, or give another directory"
        raise UserError(f"{directory}: another process writes there; {remedy}") from None
    except OSError as error:
        raise UserError(f"{directory}: cannot be written to ({error.strerror})") from None
    try:
        for leftover in directory.glob(replacing.LEFTOVERS):
            leftover.unlink(missing_ok=True)
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # while it is locked, so that it is not the next process's
            for folder in made:
                folder.rmdir()  # if it is still empty
        held.release()
