"""The log of a run: lines for people, the metrics of each epoch for programs and trackers."""

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from training import ranks
from training.files import append, read_lines, write_json, write_lines
from twa.checkpoints import CheckpointError
from utils import UserError, make_directory


class RunLog:
    """Writes lines to stdout and to `<directory>/<log_name>`, epochs to `metrics.jsonl`.

    `<directory>/<prefix>run.json` keeps arguments, versions and git commit. `--wandb` and
    `--tensorboard` get the epochs as well. Only the first rank prints and writes.

    Args:
        done: epochs that are done. Metrics of later ones, from before a run was resumed, are
            dropped.

    Attributes:
        epochs: the metrics of every epoch so far.
    """

    def __init__(self, args: argparse.Namespace, directory: Path, prefix: str, done: int):
        self.epochs: list[dict] = []
        self._columns: list[str] = []
        self._wandb = self._board = None
        self._tracked = args.wandb or args.tensorboard
        self._writes = ranks.rank() == 0
        if not self._writes:
            return
        self._log = directory / args.log_name
        make_directory(self._log.parent)
        append(self._log, "")
        self._metrics = directory / f"{prefix}metrics.jsonl"
        self.epochs = [m for m in read_lines(self._metrics, "epoch") if m["epoch"] <= done]
        write_lines(self.epochs, self._metrics)
        write_json({"arguments": vars(args), **provenance()}, directory / f"{prefix}run.json")
        if args.wandb:
            import wandb

            self._wandb = wandb.init(project="TWA", name=args.EXP, config=vars(args))
            self._histogram = wandb.Histogram
        if args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            folder = directory / f"{prefix}tensorboard"
            self._board = SummaryWriter(str(folder), purge_step=done + 1)

    def line(self, *texts: str | None) -> None:
        """Writes a line for each text that is not None."""
        for text in filter(None, texts if self._writes else ()):
            print(text, flush=True)
            append(self._log, text + "\n")

    def epoch(
        self, metrics: dict[str, float | None], alpha: Callable[[], Tensor] | None = None
    ) -> None:
        """Adds the metrics of one epoch; called on every rank.

        Args:
            metrics: "epoch" and all that was measured, in the order of the columns; None for what
                was not measured in this epoch.
            alpha: computes the averaging coefficients, of any shape, for the trackers.
        """
        if not self._columns:
            self._columns = list(metrics)
            self.line("  ".join(f"{key.replace('_', ' '):>8}" for key in metrics))
        row = (format_metric(key, value).rjust(max(8, len(key))) for key, value in metrics.items())
        self.line("  ".join(row))
        self.epochs.append(metrics)
        if self._writes:
            append(self._metrics, json.dumps(metrics) + "\n")
        if self._tracked:  # each rank may hold a shard of what α is computed from
            found = None
            with contextlib.suppress(CheckpointError):  # α needs the checkpoints again
                found = alpha() if alpha else None
            self._track(metrics, found)

    def _track(self, metrics: dict[str, float | None], alpha: Tensor | None) -> None:
        known = {key: value for key, value in metrics.items() if value is not None}
        if self._wandb:
            histogram = {} if alpha is None else {"alpha": self._histogram(alpha.flatten().numpy())}
            self._wandb.log(known | histogram)
        if self._board:
            epoch = known.pop("epoch")
            for key, value in known.items():
                self._board.add_scalar(key, value, epoch)
            if alpha is not None:
                self._board.add_histogram("alpha", alpha, epoch)
            self._board.flush()


def check_trackers(args: argparse.Namespace) -> None:
    """Raises a `UserError` if the package of `--wandb` or `--tensorboard` is missing."""
    for package in ("wandb", "tensorboard"):
        if vars(args).get(package):
            try:
                importlib.import_module(package)
            except ImportError:
                missing = f"the package is missing; pip install {package}"
                raise UserError(f"--{package}: {missing}") from None


# By the last word of a metric's name.
FORMATS = {
    "loss": "{:.4f}",
    "byte": "{:.4f}",
    "accuracy": "{:.2f} %",
    "steps": "{:.0f}",
    "seconds": "{:.1f}",
}


def format_metric(name: str, value: float | None) -> str:
    """The value of a metric as tables and logs show it; a dash where it is not known."""
    last_word = name.replace("_", " ").split()[-1]
    return "–" if value is None else FORMATS.get(last_word, "{:.4g}").format(value)


def provenance() -> dict:
    """What a run was made with: command, versions, platform, and the git commit if there is one."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True)
        commit = done.stdout.strip() or None
    except OSError:  # git is not installed
        commit = None
    versions = {name: importlib.metadata.version(name) for name in ("torch", "torchvision")}
    return {
        "command": sys.argv,
        "versions": {"python": platform.python_version(), **versions},
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "commit": commit,
    }
