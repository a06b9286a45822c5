"""Signals that end a run in order: SIGTERM, SIGINT and SIGUSR1."""

import signal
import sys
from collections.abc import Callable
from itertools import pairwise

from training import ranks

REMEDY = "the same command goes on (with --resume, if it was training)"


class Stopped(BaseException):
    """A signal asks the run to end, and what is to be kept is on the disk.

    Not an `Exception`, so that no handler of errors takes it for one.

    Args:
        together: whether all ranks are stopped at the same place.
    """

    def __init__(self, number: int, remedy: str, together: bool = False):
        super().__init__(f"stopped by {signal.Signals(number).name}; {remedy}")
        self.status, self.together = 128 + number, together


class Signals:
    """Context in which SIGTERM, SIGINT and SIGUSR1 end the run in order; a second one, at once.

    SIGUSR1 is what SLURM sends ahead of the time limit, if asked to. Of many ranks one may get the
    signal, or all: `torchrun` sends its own on to all of its ranks, and SIGTERM to those that are
    left where one has died.

    Args:
        held: raise `Stopped` only in `check` and at the end of the context, not at once. All ranks
            call `check` and reach the end, and all are stopped there if one of them got a signal.
        told: called when a signal comes.
    """

    NAMES = ("SIGTERM", "SIGINT", "SIGUSR1")  # Windows has no SIGUSR1

    def __init__(self, held: bool = False, told: Callable[[], None] | None = None):
        self._held, self._told = held, told
        self._caught = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Signals":
        for number in _numbers():
            self._before[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, exception_type, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if exception_type is None:
            self.check()
        elif self._caught and ranks.world() > 1 and issubclass(exception_type, RuntimeError):
            # Of a sum that cannot be taken: the others have ended, at once or by a fault.
            raise Stopped(self._caught, f"so were other ranks, or they failed; {REMEDY}") from None

    def _catch(self, number: int, _) -> None:
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)
        self._caught = number
        if self._told:
            self._told()
        if not self._held:
            raise Stopped(number, REMEDY)

    def check(self, save: Callable[[], None] | None = None) -> None:
        """Raises `Stopped` if a signal came to any of the ranks, after it has called `save`."""
        number = ranks.largest(self._caught) if self._held else self._caught
        if not number:
            return
        if save:
            save()
        # Not spelled out: it may be that of a shell script, and paths depend on where it was given.
        # A `--resume STATE` would begin there again, unless a plain one follows.
        words = pairwise([*sys.argv, "-"])
        plain = any(one == "--resume" and other.startswith("-") for one, other in words)
        how = "which has --resume" if plain else "ending in --resume"
        remedy = f"the state is saved, go on by the same command once more, {how}"
        raise Stopped(number, remedy, together=self._held)


def ignore() -> None:
    """From now on these signals do nothing: this process is leaving, in order."""
    for number in _numbers():
        signal.signal(number, signal.SIG_IGN)


def _numbers() -> list[int]:
    return [getattr(signal, name) for name in Signals.NAMES if hasattr(signal, name)]
