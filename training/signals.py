"""Signals that end a run in order: SIGTERM, SIGINT and SIGUSR1."""

import shlex
import signal
import sys
from collections.abc import Callable

from training import ranks


class Stopped(BaseException):
    """A signal asks the run to end, and what is to be kept is on the disk.

    Not an `Exception`, so that no handler of errors takes it for one.
    """

    def __init__(self, number: int, remedy: str):
        super().__init__(f"stopped by {signal.Signals(number).name}; {remedy}")
        self.status = 128 + number


class Signals:
    """Context in which SIGTERM, SIGINT and SIGUSR1 end the run in order; a second one, at once.

    SIGUSR1 is what SLURM sends ahead of the time limit, if asked to. Under `torchrun` no signal is
    caught: the ranks would have to agree on the step, and `torchrun` itself sends SIGTERM to those
    that wait for a dead one.

    Args:
        held: raise `Stopped` only in `check` and at the end of the context, not at once.
    """

    NAMES = ("SIGTERM", "SIGINT", "SIGUSR1")  # Windows has no SIGUSR1

    def __init__(self, held: bool = False):
        self._held = held
        self._caught: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Signals":
        if not ranks.launched():
            for number in (getattr(signal, name) for name in self.NAMES if hasattr(signal, name)):
                self._before[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, exception_type, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if exception_type is None:
            self.check()

    def _catch(self, number: int, _) -> None:
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)
        self._caught = number
        if not self._held:
            remedy = "the same command goes on (with --resume, if it was training)"
            raise Stopped(number, remedy)

    def check(self, save: Callable[[], None] | None = None) -> None:
        """Raises `Stopped` if a signal came, after it has called `save`."""
        if self._caught is None:
            return
        if save:
            save()
        command = shlex.join(sys.argv if sys.argv[-1] == "--resume" else [*sys.argv, "--resume"])
        raise Stopped(self._caught, f"the state is saved, go on with: python {command}")
