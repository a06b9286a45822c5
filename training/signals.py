"""Signals that end a run in order: SIGTERM, SIGINT and SIGUSR1."""

import signal
import sys
from collections.abc import Callable
from itertools import pairwise

from training import ranks

REMEDY = "the same command continues (with --resume, if it was training)"


class Stopped(BaseException):
    """A signal asks the run to end. Not an `Exception`, so that no error handler catches it.

    Args:
        together: whether all ranks stop at the same place.
    """

    def __init__(self, number: int, remedy: str, together: bool = False):
        super().__init__(f"stopped by {signal.Signals(number).name}; {remedy}")
        self.status, self.together = 128 + number, together


class Signals:
    """Context in which SIGTERM, SIGINT and SIGUSR1 raise `Stopped`; a second one kills at once.

    SLURM can send SIGUSR1 ahead of the time limit. On several ranks one may get the signal, or all:
    `torchrun` passes its own on to all ranks, and sends SIGTERM to those left where one has died.

    Args:
        deferred: raise in `check` and at the end of the context alone. All ranks call `check`
            equally often, and all stop there if one of them got a signal.
        on_signal: called when a signal comes.
    """

    NAMES = ("SIGTERM", "SIGINT", "SIGUSR1")  # Windows has no SIGUSR1

    def __init__(self, deferred: bool = False, on_signal: Callable[[], None] | None = None):
        self._deferred, self._on_signal = deferred, on_signal
        self._caught = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Signals":
        self._before = {number: signal.signal(number, self._catch) for number in _numbers()}
        return self

    def __exit__(self, exception_type, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if exception_type is None:
            self.check()
        elif self._caught and ranks.world() > 1 and issubclass(exception_type, RuntimeError):
            # A collective failed because other ranks have ended, by the signal or by a fault.
            raise Stopped(self._caught, f"so were other ranks, or they failed; {REMEDY}") from None

    def _catch(self, number: int, _) -> None:
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)
        self._caught = number
        if self._on_signal:
            self._on_signal()
        if not self._deferred:
            raise Stopped(number, REMEDY)

    def check(self, save: Callable[[], None] | None = None) -> None:
        """Calls `save` and raises `Stopped` if any rank got a signal."""
        number = ranks.largest(self._caught) if self._deferred else self._caught
        if not number:
            return
        remedy = REMEDY
        if save:
            save()
            # The command is not spelled out: it may be a shell script's, with paths relative to
            # another folder. `--resume STATE` would start from there again; a plain one would not.
            words = pairwise([*sys.argv, "-"])
            plain = any(one == "--resume" and other.startswith("-") for one, other in words)
            how = "which has --resume" if plain else "ending in --resume"
            remedy = f"the state is saved, continue with the same command, {how}"
        raise Stopped(number, remedy, together=self._deferred)


def ignore() -> None:
    """From now on these signals do nothing: this process is already ending in order."""
    for number in _numbers():
        signal.signal(number, signal.SIG_IGN)


def _numbers() -> list[int]:
    return [getattr(signal, name) for name in Signals.NAMES if hasattr(signal, name)]
