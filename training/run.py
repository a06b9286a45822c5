"""`Run`: a script's life in its folder. Lock, log, resumable state, signals, errors in one line."""

import argparse
import contextlib
import errno
import itertools
import os
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from training import flags, ranks
from training.files import on_cpu, read_json, save
from training.logs import RunLog, check_trackers
from training.loop import Trainer
from training.signals import Signals, Stopped, ignore
from training.tasks import Task
from twa.files.checkpoints import check_finite, load_into
from twa.files.reading import CheckpointError, one_line
from twa.files.writing import remove_leftovers
from twa.formats import load, verify
from utils import UserError, make_directory

try:
    import fcntl
except ImportError:  # Windows has no `flock`
    fcntl = None

# Of resumable states. Up to 6 they had no "results", and the test was part of an epoch.
FORMAT = 7
# Steps, or batches that are measured, after which the ranks ask each other for signals.
LOOK = 5


def run_script(main: Callable[[], None]) -> None:
    """Calls `main`; an error that the user can mend ends in one line on stderr, exit status 2.

    A signal ends the script in one line too, with status 128 + its number, as in shells: 143 for
    SIGTERM, 130 for SIGINT. Of several ranks the first one prints the line.
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
        who = f"rank {ranks.rank()}: " if ranks.world() > 1 else ""
        line, status = f"{who}error: {remedy}", 2
    if line:
        print(" ".join(line.splitlines()), file=sys.stderr, flush=True)
    if together:
        with contextlib.suppress(RuntimeError):  # where a rank has ended already
            ranks.barrier()
            ignore()  # `torchrun` ends the other ranks as soon as one has ended.
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
        # torch has no type for it, and whether it happens depends on the model
        what = "batch norm needs more than one image in each batch, the last too"
        return f"{what}; give another --batch-size"
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"--compile: {one_line(error)}; leave it out"
    return None


@contextlib.contextmanager
def lock(folder: Path | str, writes: bool = True) -> Iterator[None]:
    """Context in which no other process that takes this lock writes into `folder`.

    The first rank locks the file `.lock` there. A killed process holds no lock, and the temporary
    files that it left are removed.

    Args:
        writes: False for a process that only reads: it takes no lock.

    Raises:
        UserError: another process has the lock, or the folder cannot be made or written to.
    """
    if not writes or not ranks.first():
        yield
        return
    folder = Path(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    make_directory(folder)
    path = folder / ".lock"
    try:
        while (file := _locked(path)) is None:
            pass
    except BlockingIOError:
        remedy = "wait for its end, or give another directory"
        raise UserError(f"{folder}: another process writes there; {remedy}") from None
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to ({error.strerror})") from None
    try:
        remove_leftovers(folder)
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # while it is locked: the next process makes its own
            for empty in made:
                empty.rmdir()
        os.close(file)


def _locked(path: Path) -> int | None:
    """The descriptor of the file `path`, locked; None if its last holder has just removed it."""
    file = os.open(path, os.O_CREAT | os.O_RDWR)
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not fcntl or os.path.samestat(os.fstat(file), os.stat(path)):
            return file
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):  # no locks here
            return file
        if not isinstance(error, FileNotFoundError):
            os.close(file)
            raise
    os.close(file)
    return None


class Run:
    """Context of a run: its folder is locked, and it can be stopped at any time and resumed.

        with Run(args, args.out, "--out", prefix="twa_") as run:
            task = tasks.of(args)
            model = task.build()
            run.set_task(task, model)
            measured = run.once("averages", measure, window)
            run.restore(trainer)
            run.start("a line for the log")
            run.train()

    A run is resumed under `--resume`, and where `torchrun` restarts the ranks. The state is saved
    after each result of `once`, before the first step, when an epoch is trained and not yet tested,
    and, if any rank gets a signal, after the current step.

    Args:
        args: the script's. Those in `flags.settings` must be the same when the run is resumed. With
            `--evaluate` nothing is locked or saved.
        folder: of the state, `<prefix>state.pt`; the command line names it by `flag`.
        log_dir: of log and metrics; None for `folder`.

    Attributes:
        done: epochs that are done.
        resumed: whether the run is resumed from a state in its own folder.
        log: from `start` on.

    Raises:
        UserError, CheckpointError: on entering: the folder is locked, or the state to resume from
            cannot be read or belongs to other settings.
    """

    log: RunLog

    def __init__(self, args: argparse.Namespace, folder, flag: str, *, log_dir=None, prefix=""):
        self.args, self.folder, self._flag, self._prefix = args, Path(folder), flag, prefix
        self._log_dir = Path(log_dir or folder)
        self._path = self._source = self.folder / f"{prefix}state.pt"
        self._evaluates = vars(args).get("evaluate", False)
        self._settings = {} if self._evaluates else flags.settings(args)
        self.done, self.resumed = 0, False
        self._saved: dict | None = None  # the state to resume from, until it is restored
        self._other: dict | None = None  # an earlier run's, which may have to be kept
        self._early = False  # whether the file holds nothing but results of this run
        self._results: dict[str, dict] = {}
        self._trainer: Trainer | None = None
        self._parts: dict[str, object] = {}
        self._signals: Signals | None = None  # while it trains

    def __enter__(self) -> "Run":
        check_trackers(self.args)
        with contextlib.ExitStack() as stack:
            stack.enter_context(lock(self.folder, writes=not self._evaluates))
            if not self._evaluates:
                self._read()
            self._unlock = stack.pop_all().close
        return self

    def __exit__(self, _, error: BaseException | None, __) -> None:
        if self._early and isinstance(error, Exception) and ranks.first():
            self._path.unlink(missing_ok=True)  # what mends the error may change the results
        # Loaders refer to the run: these cycles would keep basis and model in memory.
        self._trainer, self._parts = None, {}
        self._unlock()

    def _read(self) -> None:
        resume = self.args.resume
        self._source = Path(resume or self._path)
        exists = self._source.exists()
        if self._evaluates and resume == "" and not exists:
            raise UserError(f"--resume: there is no {self._source} to evaluate; train first")
        if resume or (exists and (resume is not None or ranks.restarts())):
            self._saved = _read_state(self._source, self._flag)
            self._check(self._saved)
            self.resumed = self._source.resolve().parent == self._path.resolve().parent
        if not self.resumed and self._path.exists() and not hasattr(self.args, "overwrite"):
            with contextlib.suppress(CheckpointError):  # nobody can resume from it
                self._other = _read_state(self._path, self._flag)

    def _check(self, state: dict, path: Path | None = None) -> None:
        for key, value in self._settings.items():
            if state["settings"].get(key) != value:
                saved = f"{path or self._source}: was saved with {key} {state['settings'].get(key)}"
                raise UserError(
                    f"{saved}, but this run has {key} {value}; give that, or another {self._flag} "
                    "to start anew"
                )

    def set_task(self, task: Task, model: nn.Module) -> None:
        """Takes the data and the model; called before anything is measured.

        On a signal all ranks then stop within a few batches of what is measured on these data.

        Raises:
            UserError: the state to resume from, or one that would be replaced, is of other data.
        """
        self._model, self._device = model, task.device
        task.train.watch = task.test.watch = self._watch
        if self._evaluates:
            return
        self._settings["data_dir"] = task.training.spec.content  # what they are, not where they lie
        if self._saved:
            self._check(self._saved)
            self._results = self._saved["results"]
            self._early = self.resumed and "model" not in self._saved
        if self._other and "model" in self._other:
            self._check(self._other, self._path)

    def _watch(self, batches: Iterable) -> Iterator:
        """Yields `batches`; if any rank gets a signal, all stop between two of them."""
        if not self._signals and ranks.world() == 1:  # a signal raises at once
            yield from batches
            return
        save = self.save if self._signals else None
        with contextlib.nullcontext(self._signals) if save else Signals(deferred=True) as signals:
            for i, batch in enumerate(batches):
                if i % LOOK == 0:
                    signals.check(save)
                yield batch

    def once(self, name: str, compute: Callable[[], dict], files: Iterable[Path] = ()) -> dict:
        """The result of `compute`, which a resumed run takes from the saved state.

        Random draws in `compute` have no effect on later ones.

        Args:
            name: of the result.
            compute: returns plain values, the same on all ranks.
            files: what the result depends on. If their names, sizes or times have changed, it is
                computed again.
        """
        stamp = _stamp(files) if ranks.rank() == 0 else None
        found = self._results.get(name, {"stamp": None})
        stamp, found = ranks.gather((stamp, found))[0]  # the first rank decides for all
        if found["stamp"] != stamp:
            before = random_states(self._device)
            found = self._results[name] = {"stamp": stamp, "value": compute()}
            set_random_states(before, self._device)
            states = [state for state in (self._saved, self._other) if state]
            trained = any("model" in state for state in states) if states else self._path.exists()
            free = self._early or not trained
            if self._parts or (free and not self._evaluates):
                self.save()
        return found["value"]

    def restore(self, trainer: Trainer, first_epoch: int = 0, **parts) -> None:
        """Takes what is to be trained, and restores its state if the run is resumed.

        Args:
            first_epoch: epochs that count as done if there is no state to resume from.
            parts: what has a `state_dict` and belongs to the run besides what the trainer has.

        Raises:
            UserError, CheckpointError: the state does not fit.
        """
        if self._evaluates:
            self._read()
        self.done = self._first_epoch = first_epoch
        self._trainer, trainer.state = trainer, self._path
        names = ("optimizer", "scheduler", "progress")
        self._parts = parts | {name: getattr(trainer, name) for name in names}
        state, self._saved = self._saved, None
        if not state or "model" not in state:
            return
        load_into(self._model, state["model"], name=str(self._source))
        for name, part in self._parts.items():
            try:
                part.load_state_dict(state[name])
            except (KeyError, ValueError, RuntimeError) as error:
                reason = f"the state of the {name} does not fit ({error})"
                raise UserError(f"{self._source}: {reason}") from None
        self.done = state["epoch"]
        same = len(state["ranks"]) == ranks.world()
        own = state["ranks"][ranks.rank()] if same else state | {"buffers": {}}
        set_random_states(own["random"], self._device)
        for name, value in own["buffers"].items():
            self._model.get_buffer(name).copy_(value)

    def save(self) -> None:
        """Saves the state; called on every rank.

        Another number of ranks can resume from it. The same number does so to the bit, as it holds
        what differs between ranks, random states and buffers. Weights that hold NaN or infinity are
        not saved: a `NotFiniteError` names the first.
        """
        state = {"format": FORMAT, "settings": self._settings, "results": self._results}
        if self._parts:
            buffers = on_cpu(ranks.buffers_of(self._model))
            own = {"random": random_states(self._device), "buffers": buffers}
            state |= {"epoch": self.done, "random": own["random"]}
            state["ranks"] = ranks.gather(own) if ranks.world() > 1 else []
            state |= {name: on_cpu(part.state_dict()) for name, part in self._parts.items()}
            state["model"] = ranks.state_dict_of(self._model)
        if ranks.rank() == 0:
            check_finite(state.get("model", {}), f"{self._path} is unchanged")
            save(state, self._path)
        self._early = not self._parts

    @property
    def is_before_first_step(self) -> bool:
        return self.done == self._first_epoch and self._trainer.progress.iteration == 0

    def start(self, *lines: str | None) -> None:
        """Opens the log, and saves the state if no step is done yet.

        `lines` go into the log, except those that are None. A script with `--overwrite` removes the
        checkpoints of an earlier run.

        Raises:
            UserError: there are some, or the log of others, and `--overwrite` is not given.
        """
        if hasattr(self.args, "overwrite") and not self.resumed and ranks.rank() == 0:
            self._clear()
        self.log = RunLog(self.args, self._log_dir, self._prefix, self.done)
        self._trainer.line = self.log.line
        for line in lines:
            self.log.line(line)
        if self.is_before_first_step:
            self.save()

    def _clear(self) -> None:
        own, overwrite = vars(self.args), self.args.overwrite
        log = self._log_dir / f"{self._prefix}run.json"
        other = read_json(log).get("arguments", {})
        if {"save_dir", "log_dir"} <= other.keys() and not (own["resume"] or overwrite):
            # Relative to the log's folder, which may have been moved or have several names.
            ours, its = (os.path.relpath(a["save_dir"], a["log_dir"]) for a in (own, other))
            if ours != its:
                raise UserError(
                    f"{log}: is of the run with the checkpoints in {other['save_dir']}; give "
                    "another --log-dir, or --overwrite to replace it"
                )
        earlier = [path for path in self.folder.glob("*.pt") if path.stem.isdecimal()]
        if earlier and not overwrite:
            raise UserError(
                f"{self.folder}: holds the checkpoints of an earlier run; "
                "--resume continues it, --overwrite replaces it"
            )
        # The state first: a kill here must not leave a state whose checkpoints are gone.
        for path in (self._path, *earlier):
            path.unlink(missing_ok=True)

    def train(
        self,
        after_step: Callable[[int, int], None] | None = None,
        after_training: Callable[[int], None] | None = None,
        after_epoch: Callable[[int, dict], None] | None = None,
    ) -> None:
        """Trains the epochs that are left; of one that is trained, only the test is left.

        Args:
            after_step: called after each optimizer step with the epoch, from 1 on, and the
                iterations done in it.
            after_training: called with the epoch before its state is saved and it is tested.
            after_epoch: called with the epoch and its metrics, to which it may add; changes nothing
                that is saved.
        """
        trainer, optimizer, steps = self._trainer, self._trainer.optimizer, itertools.count(1)
        # Asking other ranks makes an accelerator wait. TWA's sum says whether it is necessary.
        every = 1 if ranks.world() == 1 or self._device.type == "cpu" else LOOK
        save_every = vars(self.args).get("save_freq", 1)

        def stop() -> None:
            optimizer.stop = True

        def step_done(iteration: int) -> None:
            if after_step:
                after_step(self.done + 1, iteration)
            due = next(steps) % every == 0 and iteration < len(trainer.train)
            if due and getattr(optimizer, "stopping", True):
                self._signals.check(self.save)

        def trained(epoch: int) -> None:
            if after_training:
                after_training(epoch)
            if epoch % save_every == 0 or epoch == trainer.epochs:
                self.save()
            self._signals.check(self.save)

        with Signals(deferred=True, on_signal=stop) as self._signals:
            for epoch in range(self.done + 1, trainer.epochs + 1):
                metrics = trainer.epoch(epoch, step_done, trained)
                if after_epoch:
                    after_epoch(epoch, metrics)
                self.log.epoch(metrics, getattr(optimizer, "averaging_weights", None))
                self.done = epoch
                if epoch == trainer.epochs:
                    self.save()
                self._signals.check(self.save)
        self._signals = None


def _read_state(path: Path, flag: str) -> dict:
    """The state in the file `path`, whose tensors stay there until they are used.

    Raises:
        UserError: it is no state, or one of another format.
        CheckpointError: the file cannot be read.
    """
    if ranks.first():  # reads all of it
        verify(path)
    state = load(path)
    if not isinstance(state, dict) or "format" not in state:
        raise UserError(f"{path}: is not a resumable state")
    if state["format"] != FORMAT:
        raise UserError(
            f"{path}: has format {state['format']}, this version reads format {FORMAT}; "
            f"continue with the version that wrote it, or give another {flag} to start anew"
        )
    return state


def _stamp(files: Iterable[Path]) -> list[tuple]:
    """Names, sizes and times of `files`, and of all files in those that are folders."""
    paths = [p for path in files for p in ([path] if path.is_file() else sorted(path.rglob("*")))]
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]


def random_states(device: torch.device) -> dict:
    """The states of the generators of Python, NumPy, torch and, if in use, the accelerator."""
    name, keys, *rest = np.random.get_state()
    states = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state()
    return states


def set_random_states(states: dict, device: torch.device) -> None:
    """Restores what `random_states` returned; an accelerator's only on one of its kind."""
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy(), *rest))
    random.setstate(states["python"])
    torch.set_rng_state(states["torch"])
    if device.type != "cpu" and device.type in states:
        torch.get_device_module(device).set_rng_state(states[device.type])
