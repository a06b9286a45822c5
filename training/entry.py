"""How a script starts and ends: errors in one line on stderr, signals, exit status."""

import contextlib
import sys
from collections.abc import Callable

from training import ranks
from training.signals import Signals, Stopped, ignore
from twa.files.reading import CheckpointError, one_line
from utils import UserError


def run(main: Callable[[], None]) -> None:
    """Calls `main`; an error that the user can mend ends in one line on stderr, exit status 2.

    A signal ends the script in one line too, with status 128 + its number, as in shells: 143 for
    SIGTERM, 130 for SIGINT, 138 for SIGUSR1 (where that is signal 10, as on Linux). Of many ranks
    the first one says it for all.
    """
    line, status, together = "", 0, False
    try:
        with Signals():
            main()
            ranks.stop()
    except Stopped as stopped:
        line, status = str(stopped) if ranks.first() else "", stopped.status
        together = stopped.together
    except Exception as error:
        remedy = remedy_for(error)
        if remedy is None:
            raise
        line, status = f"error: {remedy}", 2
    if line:
        who = f"rank {ranks.rank()}: " if ranks.world() > 1 and status == 2 else ""
        print(who + " ".join(line.splitlines()), file=sys.stderr, flush=True)
    if together:
        with contextlib.suppress(RuntimeError):  # where a rank is gone already
            ranks.barrier()
            ignore()  # `torchrun` ends those that are left as soon as one is gone.
            ranks.stop()
    if ranks.launched():
        ranks.leave(status)
    if status:
        sys.exit(status)


def remedy_for(error: Exception) -> str | None:
    """What went wrong and what to do, if the user can mend it; None for an error of ours."""
    if isinstance(error, UserError | CheckpointError | MemoryError):
        return str(error)
    if isinstance(error, OSError):  # a full disk, a path too long, a pipe that nobody reads
        return f"{error.filename or 'a file'}: {error.strerror or error}"
    if isinstance(error, ValueError) and "more than 1 value per channel" in str(error):
        return (  # torch has no type for it, and whether it happens depends on the model
            "batch norm needs more than one image in each batch, the last too; "
            "give another --batch-size"
        )
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"--compile: {one_line(error)}; leave it out"
    return None
