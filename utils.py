"""What every script stands on: user errors, signals, device, seed, a run's log, lock and state."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib.metadata
import json
import logging
import os
import platform
import random
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from training import ranks
from twa.checkpoints import (
    CheckpointError,
    check_finite,
    load,
    load_into,
    replacing,
    save,
    unwritten,
    verify,
)

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None


class UserError(Exception):
    """An error that the user can mend: one line on stderr, exit status 2."""


class Stopped(BaseException):
    """A signal asks the run to end, and it may: what is to be kept is on the disk.

    Not an `Exception`, so that nothing that mends errors takes it for one of them.
    """

    def __init__(self, number: int, remedy: str):
        super().__init__(f"stopped by {signal.Signals(number).name}; {remedy}")
        self.status = 128 + number


class Signals:
    """Context in which SIGTERM, SIGINT and SIGUSR1 end the run in order; a second one, at once.

    SIGUSR1 is what SLURM sends ahead of the time limit, if asked to. Under `torchrun` nothing is
    caught: its ranks would have to agree on the step, and it sends SIGTERM to those that wait
    for one that has died.

    Args:
        held: `Stopped` is raised by `check` and at the context's end only, not wherever the
            program is.
    """

    NAMES = ("SIGTERM", "SIGINT", "SIGUSR1")  # the last is not known everywhere

    def __init__(self, held: bool = False):
        self._held = held
        self._caught: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> Signals:
        if not ranks.launched():
            for number in (getattr(signal, name) for name in self.NAMES if hasattr(signal, name)):
                self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, exception_type, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if exception_type is None:
            self.check()

    def _take(self, number: int, _) -> None:
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


def run(main: Callable[[], None]) -> None:
    """Calls `main`; errors that the user can mend end in one line on stderr, exit status 2.

    What a signal stops ends in one line too, with status 128 + its number, as shells have it:
    143 for SIGTERM, 130 for SIGINT, 138 for SIGUSR1 (where that is signal 10, as on Linux).
    """
    line, status = "", 0
    try:
        with Signals():
            main()
            ranks.stop()
    except (UserError, CheckpointError, MemoryError) as error:
        line, status = f"error: {error}", 2
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        line = "error: batch norm needs more than one image in each batch, the last too; "
        line, status = line + "give another --batch-size", 2
    except OSError as error:  # a disk that is full, a path too long, a pipe that nobody reads
        line, status = f"error: {error.filename or 'a file'}: {error.strerror or error}", 2
    except RuntimeError as error:
        if str(error).startswith("DataLoader worker"):
            line = f"error: {error} (try fewer --workers: each needs memory)"
        elif type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            line = f"error: --compile: {str(error).splitlines()[0]}; leave it out"
        else:
            raise
        status = 2
    except Stopped as stopped:
        line, status = str(stopped), stopped.status
    if status:
        who = f"rank {ranks.rank()}: " if ranks.world() > 1 else ""
        print(who + " ".join(line.splitlines()), file=sys.stderr)
    if ranks.launched():
        ranks.leave(status)
    if status:
        sys.exit(status)


def choose_device(name: str | None) -> torch.device:
    """The device that `--device` names, or the accelerator if there is one, else the CPU.

    Of several accelerators in a machine, each rank there takes its own.
    """
    if name is None:
        there = torch.accelerator.is_available()
        name = torch.accelerator.current_accelerator().type if there else "cpu"
    try:
        device = torch.device(name)
        if ranks.launched() and device.type != "cpu" and device.index is None:
            device = torch.device(device.type, ranks.local_rank())
        torch.zeros((), device=device).item()  # "meta" holds nothing
        return device
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name}: not usable here ({reason}); try --device cpu") from None


def set_seed(seed: int) -> None:
    """Seeds Python, NumPy and torch, on the CPU and on every accelerator."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def random_states() -> dict:
    """The state of every generator that `set_seed` seeds, as plain tensors and numbers.

    An accelerator's generator is part of it where the backend has one to read.
    """
    name, keys, position, has_gauss, cached = np.random.get_state()
    states = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
    }
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator().type
        states[kind] = torch.get_device_module(kind).get_rng_state()
    return states


def set_random_states(states: dict) -> None:
    """Puts back what `random_states` returned."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator().type
        if kind in states:
            torch.get_device_module(kind).set_rng_state(states[kind])


class RunLog:
    """The log of a run: lines for people, one JSON object an epoch for programs.

    Lines go to stdout and to `<log_dir>/<log_name>`. `<log_dir>/<prefix>run.json` keeps the
    arguments, the versions and the git commit; `<log_dir>/<prefix>metrics.jsonl` the epochs. All
    this on the first rank; on the others nothing is printed or written.

    Args:
        resumed_epoch: epochs that stand already; later lines of an earlier run are dropped.

    Attributes:
        epochs: the metrics of every epoch so far.
    """

    def __init__(self, args: argparse.Namespace, prefix: str = "", resumed_epoch: int = 0):
        self.epochs: list[dict] = []
        self._wandb = None
        self._has_header = False
        self._logger = logging.Logger("run")
        self._writes = ranks.rank() == 0
        if not self._writes:
            self._logger.addHandler(logging.NullHandler())
            return
        directory = Path(args.log_dir)
        make_directory(directory)
        self._logger.addHandler(logging.StreamHandler(sys.stdout))
        self._logger.addHandler(LogFile(directory / args.log_name))
        self._metrics = directory / f"{prefix}metrics.jsonl"
        self.epochs = [m for m in read_metrics(self._metrics) if m["epoch"] <= resumed_epoch]
        with replacing(self._metrics) as temporary:
            temporary.write_text("".join(json.dumps(m) + "\n" for m in self.epochs))
        write_json({"arguments": vars(args), **provenance()}, directory / f"{prefix}run.json")
        if args.wandb:
            self._wandb = start_wandb(args)

    def line(self, text: str) -> None:
        self._logger.info(text)

    def epoch(self, metrics: dict[str, float | None]) -> None:
        """Adds the metrics of one epoch: a row of the log's table and a JSON object.

        Args:
            metrics: "epoch" and what else there is to tell, in the order of the columns; None
                where something was not measured in this epoch.
        """
        if not self._has_header:
            self.line("  ".join(f"{key.replace('_', ' '):>8}" for key in metrics))
            self._has_header = True
        self.line("  ".join(cell(key, value) for key, value in metrics.items()))
        self.epochs.append(metrics)
        if self._writes:
            append(self._metrics, json.dumps(metrics) + "\n")
        if self._wandb:
            self._wandb.log(metrics)


def append(path: Path, text: str) -> None:
    """Writes `text` at the end of the file `path`; a `CheckpointError` says why that fails."""
    try:
        with open(path, "a") as file:
            file.write(text)
    except OSError as error:
        raise CheckpointError(unwritten(path, error)) from None


class LogFile(logging.Handler):
    """Appends the lines of the log to a file; one that cannot be written ends the run."""

    def __init__(self, path: Path):
        super().__init__()
        self._path = path
        make_directory(path.parent)
        append(path, "")

    def emit(self, record: logging.LogRecord) -> None:
        append(self._path, self.format(record) + "\n")


def cell(key: str, value: float | None) -> str:
    """`value` as it stands below the heading `key` of the log's table."""
    if value is None:
        text = "-"
    elif key.endswith("loss"):
        text = f"{value:.4f}"
    elif key.endswith("accuracy"):
        text = f"{value:.2f}"
    else:
        text = f"{value:.4g}"
    return text.rjust(max(8, len(key)))


def read_metrics(path: Path) -> list[dict]:
    """The epochs of a `metrics.jsonl`, in order; none if the file is not there."""
    if not path.exists():
        return []
    return [of_json(line, path) for line in path.read_text().splitlines() if line.endswith("}")]


def of_json(text: str, path: Path) -> dict:
    """The JSON object that `text`, read from `path`, holds; a `UserError` if it is damaged."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: is damaged ({error}); remove it") from None


def clear(save_dir: Path, overwrite: bool) -> None:
    """Makes `save_dir`, empty of checkpoints; those of an earlier run go only if `overwrite`.

    The first rank does so; the others leave it to that.

    Raises:
        UserError: the directory cannot be made, or holds checkpoints that must not go.
    """
    if ranks.rank() > 0:
        return
    make_directory(save_dir)
    earlier = [path for path in save_dir.glob("*.pt") if path.stem.isdecimal()]
    if earlier and not overwrite:
        raise UserError(
            f"{save_dir}: holds the checkpoints of an earlier run; "
            "--resume goes on with it, --overwrite replaces it"
        )
    # The state first: who is killed here must not leave one whose checkpoints are gone.
    for path in (save_dir / "state.pt", *earlier):
        path.unlink(missing_ok=True)


class Lock:
    """Context in which no other process that asks for the same lock writes into `directory`.

    The lock is on a file `.lock` there, and the first rank's as long as that lives: what a killed
    process leaves is not locked, and is taken over, with the half-written files beside it. Where
    there is no `fcntl` (on Windows), or the file system knows no locks, nobody is refused.

    Raises:
        UserError: another process holds it, or the directory cannot be made or written to.
    """

    def __init__(self, directory: Path | str):
        self._path = Path(directory) / ".lock"
        self._file = None

    def __enter__(self) -> None:
        if fcntl is None or not ranks.first():
            return
        ways = (self._path.parent, *self._path.parent.parents)
        self._made = [directory for directory in ways if not directory.exists()]
        make_directory(self._path.parent)
        try:
            while not self._holds():
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

    def _holds(self) -> bool:
        """Whether the locked file still has its name: its holder may just have taken it away."""
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
                directory.rmdir()  # if nothing came into it
        self._file.close()


def lock(args: argparse.Namespace) -> contextlib.AbstractContextManager:
    """The lock on `--save-dir` for a run that writes there; with `--evaluate` none does."""
    return contextlib.nullcontext() if getattr(args, "evaluate", False) else Lock(args.save_dir)


def write_json(content: dict, path: Path) -> None:
    """Writes `content` as JSON, all or nothing."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def refuse_ranks() -> None:
    """Raises a `UserError` where `torchrun` started a script that runs in one process."""
    if ranks.launched():
        raise UserError(f"{Path(sys.argv[0]).name} runs in one process: start it without torchrun")


def make_directory(directory: Path) -> None:
    """Makes `directory` with its parents; a `UserError` names one that cannot be made."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{directory}: cannot be made ({error.strerror})") from None


def provenance() -> dict:
    """What a run was made with: versions, platform, and the git commit where there is one."""
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
        ).stdout.strip()
    except OSError:  # git is not installed
        commit = ""
    return {
        "command": sys.argv,
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("torch", "torchvision")},
        },
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "commit": commit or None,
    }


def import_wandb():
    """The package that `--wandb` asks for."""
    try:
        import wandb
    except ImportError:
        raise UserError("--wandb: the package is missing; pip install wandb") from None
    return wandb


def start_wandb(args: argparse.Namespace):
    """The Weights & Biases run that `--wandb` asks for, named by `--EXP`."""
    return import_wandb().init(project="TWA", name=args.EXP, config=vars(args))


STATE_FORMAT = 4  # 1: without progress within an epoch; 2: fewer settings; 3: no fingerprint of TWA


def state_path(args: argparse.Namespace, name: str) -> Path:
    """Where the resumable state lies: where `--resume` says, else `name` in `--save-dir`."""
    return Path(args.resume or Path(args.save_dir) / name)


def save_state(path: Path, epoch: int, settings: dict, **parts) -> None:
    """Saves all that a run needs to go on after `epoch` epochs as if it had not stopped.

    Called on every rank; the first one writes. Another number of ranks can go on from it.
    Weights that hold NaN or infinity are not saved: a `NotFiniteError` names the first.

    Args:
        settings: plain values that must be the same when the run goes on.
        parts: "model", and what else has a `state_dict()`: optimizer, schedule, …
    """
    state = {
        "format": STATE_FORMAT,
        "epoch": epoch,
        "settings": settings,
        "random": random_states(),
        **{name: part.state_dict() for name, part in parts.items() if name != "model"},
        "model": ranks.state_dict_of(parts["model"]),
    }
    if ranks.rank() == 0:
        check_finite(state["model"], f"{path} is left as it was")
        save(state, path)


def resume(args: argparse.Namespace, path: Path, settings: dict, **parts) -> int | None:
    """Puts back what `save_state` saved, if `--resume` is given or `torchrun` restarts the run.

    Returns:
        The epochs that are done; None if there is nothing to go on from.

    Raises:
        UserError: the file is no such state, or one of another format or setting.
        CheckpointError: the file cannot be read, or belongs to another architecture.
    """
    wanted = args.resume is not None or ranks.restarts() > 0
    if not wanted or not (args.resume or path.exists()):
        return None
    if ranks.rank() == 0:  # reads all of it; the others read their part
        verify(path)
    state = load(path)
    if not isinstance(state, dict) or "format" not in state:
        raise UserError(f"{path}: is not a resumable state")
    if state["format"] != STATE_FORMAT:
        raise UserError(
            f"{path}: has format {state['format']}, this version reads format {STATE_FORMAT}; "
            "go on with the version that wrote it, or remove this file to start anew"
        )
    for key, value in settings.items():
        if state["settings"].get(key) != value:
            raise UserError(
                f"{path}: was saved with {key} {state['settings'].get(key)}, "
                f"but this run has {key} {value}; give that, or another --save-dir, or remove "
                "this file to start anew"
            )
    load_into(parts.pop("model"), state["model"], name=str(path))
    for name, part in parts.items():
        try:
            part.load_state_dict(state[name])
        except (KeyError, ValueError, RuntimeError) as error:
            raise UserError(f"{path}: the state of the {name} does not fit ({error})") from None
    set_random_states(state["random"])
    return state["epoch"]
