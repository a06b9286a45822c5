"""What every trainer starts with: shared arguments, device, seed, the log of a run, user errors."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib.metadata
import json
import logging
import math
import os
import platform
import random
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

import parallel
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
        if not parallel.launched():
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
            parallel.stop()
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
        who = f"rank {parallel.rank()}: " if parallel.world() > 1 else ""
        print(who + " ".join(line.splitlines()), file=sys.stderr)
    if parallel.launched():
        parallel.leave(status)
    if status:
        sys.exit(status)


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that shows defaults in `--help` and says errors in one line."""

    def __init__(self, description: str):
        super().__init__(
            description=description,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {' '.join(message.splitlines())}\n")


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], float]:
    """An argument type: a finite `kind` (int or float) in [low, high]."""

    def parse(text: str):
        value = kind(text)
        if not (low <= value <= high and math.isfinite(value)):
            limit = f"at least {low}" if high == math.inf else f"between {low} and {high}"
            raise argparse.ArgumentTypeError(f"{text} is not {limit}")
        return value

    parse.__name__ = kind.__name__  # argparse says it: "invalid int value: …"
    return parse


def percentage(text: str) -> float:
    """An argument type: a share in percent that leaves something on both sides."""
    value = float(text)
    if not 0 < value < 100:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 100, both excluded")
    return value


def factory(text: str) -> str:
    """An argument type: `module:function`, which `models.build` imports and calls."""
    if not all(text.partition(":")):
        raise argparse.ArgumentTypeError(f"{text} is not MODULE:FUNCTION")
    return text


def add_model_arguments(
    parser: argparse.ArgumentParser, *flags: str, choices: Iterable[str], **named
) -> None:
    """The flag of an architecture's name, `flags`, and the one of a model that the user brings."""
    group = parser.add_mutually_exclusive_group(required="default" not in named)
    # argparse would show the choices, a hundred, in place of the metavar: three times in all.
    named |= {"metavar": "ARCH", "help": f"architecture: {', '.join(choices)}"}
    group.add_argument(*flags, dest="arch", choices=choices, **named)
    group.add_argument(
        "--model-factory",
        dest="arch",
        default=argparse.SUPPRESS,
        type=factory,
        metavar="MODULE:FUNCTION",
        help="a function of your own that returns the nn.Module; called without arguments",
    )


def add_common_arguments(
    parser: argparse.ArgumentParser, architectures: Iterable[str], datasets: Iterable[str]
) -> None:
    """The flags of both trainers of the head stage, with the names of the paper's release."""
    add = parser.add_argument
    add_model_arguments(parser, "--arch", "-a", choices=architectures, default="VGG16BN")
    add("--datasets", default="CIFAR10", choices=datasets, help="data set")
    add("--data-dir", default="./datasets", help="where data sets lie or are downloaded to")
    add_training_arguments(parser, batch_size=128)


def add_training_arguments(parser: argparse.ArgumentParser, batch_size: int) -> None:
    """The flags of every trainer of the head stage, but for the model and the data set."""
    add = parser.add_argument
    seed = {"type": number(int, 0, 2**31 - 1), "default": 1}
    add("--workers", "-j", type=number(int, 0), default=4, help=WORKERS_HELP)
    add("--batch-size", "-b", type=number(int, 1), default=batch_size, help="images per step")
    add("--momentum", type=number(float, 0, 1), default=0.9, help="momentum of SGD")
    add("--randomseed", "--seed", **seed, help="seed of all randomness")
    add("--save-dir", default="save_temp", help="where checkpoints are saved")
    add("--log-dir", default="save_temp", help="where log, metrics, tables and figures go")
    add("--evaluate", "-e", action="store_true", help=EVALUATE_HELP)
    add_data_arguments(parser)
    add_run_arguments(parser)


EVALUATE_HELP = "test the model, with --resume the saved one, and end; TWA: the averages"
WORKERS_HELP = (
    "processes that decode and augment the images of ImageNet, on each rank; the other data sets "
    "live on the device and need none"
)


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of every trainer that say on what it trains."""
    add = parser.add_argument
    add(
        "--split",
        action="store_true",
        help="hold out a part of the training set, drawn by --randomseed: SGD does not train on "
        "it, TWA trains the coefficients on it alone",
    )
    add("--val-ratio", type=percentage, default=10, help="percent that --split holds out")
    add("--images", type=number(int, 1), help="training images to use, the first N; left out, all")
    add("--randaugment", type=number(int, 0, 30), default=0, help=RANDAUGMENT_HELP)


def add_image_arguments(parser: argparse.ArgumentParser, size: int | None) -> None:
    """The flags of every trainer on image folders; images have `size` pixels if left out."""
    add = parser.add_argument
    add("--image-size", type=number(int, 1), default=size, help=IMAGE_SIZE_HELP)
    strict_help = "stop at an image that cannot be read, rather than skip it"
    add("--strict-images", action="store_true", help=strict_help)


IMAGE_SIZE_HELP = "height and width of the images that the model gets, in pixels"
RANDAUGMENT_HELP = "strength of RandAugment, two operations an image; 0: none"


def held_out(args: argparse.Namespace) -> str | None:
    """Which images `--split` holds out: runs that say the same hold out the same."""
    return f"{args.val_ratio:g} % by seed {args.randomseed}" if args.split else None


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of a training recipe, transformers' above all, beside rate and weight decay."""
    add = parser.add_argument
    add("--warmup-epochs", type=number(float, 0), default=0.0, help=WARMUP_HELP)
    add("--label-smoothing", type=number(float, 0, 1), default=0.0, help=SMOOTHING_HELP)
    add("--clip-grad", type=number(float, 0), metavar="NORM", help=CLIP_HELP)


SMOOTHING_HELP = "share of a label that is spread evenly over all classes"
SCHEDULE_HELP = "learning rate schedule"
WARMUP_HELP = "epochs of a linear rise of the rate; the schedule takes the rest"
CLIP_HELP = "largest norm of the gradient, all parameters together; left out, any"


def add_soup_arguments(
    parser: argparse.ArgumentParser, architectures: Iterable[str], datasets: Iterable[str]
) -> None:
    """The flags of both scripts of the fine-tune stage, which always hold out validation data."""
    add = parser.add_argument
    add_model_arguments(parser, "--arch", "-a", choices=architectures, default="PreResNet20")
    add("--datasets", default="CIFAR10", choices=datasets, help="data set")
    add("--data-dir", default="./datasets", help="where data sets lie or are downloaded to")
    add("--batch-size", "-b", type=number(int, 1), default=128, help="images per step")
    ratio_help = "percent of the training set that is held out, drawn by --randomseed"
    add("--val-ratio", type=percentage, default=10, help=ratio_help)
    add("--randomseed", type=number(int, 0, 2**31 - 1), default=1, help="seed of all randomness")
    add("--print-freq", "-p", type=number(int, 1), default=100, help="iterations between lines")
    add_compute_arguments(parser)
    parser.set_defaults(split=True)


def add_compute_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say where and how a script computes."""
    add = parser.add_argument
    add("--device", help="torch device; left out, the accelerator if there is one, else cpu")
    amp_help = "bfloat16 autocast and channels_last memory format"
    add("--amp", "--half", action="store_true", help=amp_help)
    add("--compile", action="store_true", help="compile the model with torch.compile")


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of every trainer: where and how a run computes, what it logs, resuming."""
    add_compute_arguments(parser)
    add = parser.add_argument
    add("--print-freq", "-p", type=number(int, 1), default=50, help="iterations between lines")
    add("--log-name", default="log", help="name of the log file")
    add("--wandb", action="store_true", help="send the metrics to Weights & Biases as well")
    add("--EXP", default="TWA", help="name of the Weights & Biases run")
    add(
        "--resume",
        nargs="?",
        const="",
        metavar="STATE",
        help="go on from STATE; without a value from the state that the run saved, or from the "
        "start if there is none yet",
    )


OVERWRITE_HELP = "replace the checkpoints of an earlier run"


def choose_device(name: str | None) -> torch.device:
    """The device that `--device` names, or the accelerator if there is one, else the CPU.

    Of several accelerators in a machine, each rank there takes its own.
    """
    if name is None:
        there = torch.accelerator.is_available()
        name = torch.accelerator.current_accelerator().type if there else "cpu"
    try:
        device = torch.device(name)
        if parallel.launched() and device.type != "cpu" and device.index is None:
            device = torch.device(device.type, parallel.local_rank())
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
        self._writes = parallel.rank() == 0
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
    if parallel.rank() > 0:
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
        if fcntl is None or not parallel.first():
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
    if parallel.launched():
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


STATE_FORMAT = 3  # 1: without the progress within an epoch; 2: with fewer settings


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
        "model": parallel.state_dict_of(parts["model"]),
    }
    if parallel.rank() == 0:
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
    wanted = args.resume is not None or parallel.restarts() > 0
    if not wanted or not (args.resume or path.exists()):
        return None
    if parallel.rank() == 0:  # reads all of it; the others read their part
        verify(path)
    state = load(path)
    if not isinstance(state, dict) or "format" not in state:
        raise UserError(f"{path}: is not a resumable state")
    if state["format"] != STATE_FORMAT:
        raise UserError(
            f"{path}: has format {state['format']}, this version reads format {STATE_FORMAT}"
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
