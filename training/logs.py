"""What a run writes down: its log, the metrics of each epoch, its arguments and versions."""

import argparse
import importlib.metadata
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from training import ranks
from training.files import replacing, unwritten
from training.trackers import Trackers
from twa.files.checkpoints import CheckpointError
from utils import UserError, make_directory


class RunLog:
    """The log of a run: lines for people, one JSON object an epoch for programs.

    Lines go to stdout and to `<directory>/<log_name>`. `<directory>/<prefix>run.json` keeps the
    arguments, the versions and the git commit; `<directory>/<prefix>metrics.jsonl` the epochs. All
    this on the first rank; on the others nothing is printed or written.

    Args:
        done: epochs that are done; metrics of later ones, from before a resumed run, are dropped.

    Attributes:
        epochs: the metrics of every epoch so far.
    """

    def __init__(self, args: argparse.Namespace, directory: Path, prefix: str, done: int):
        self.epochs: list[dict] = []
        self._has_header = False
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
        self._trackers = Trackers(args, directory / f"{prefix}tensorboard", done)

    def line(self, text: str) -> None:
        if self._writes:
            print(text, flush=True)
            append(self._log, text + "\n")

    def epoch(
        self, metrics: dict[str, float | None], alpha: Callable[[], Tensor] | None = None
    ) -> None:
        """Adds the metrics of one epoch: a row of the log's table and a JSON object.

        Called on every rank.

        Args:
            metrics: "epoch" and whatever else was measured, in the order of the columns; None
                where something was not measured in this epoch.
            alpha: computes the averaging coefficients for `--wandb` and `--tensorboard`; None where
                nothing is averaged.
        """
        if not self._has_header:
            self.line("  ".join(f"{key.replace('_', ' '):>8}" for key in metrics))
            self._has_header = True
        self.line("  ".join(told(k, v).rjust(max(8, len(k))) for k, v in metrics.items()))
        self.epochs.append(metrics)
        if self._writes:
            append(self._metrics, json.dumps(metrics) + "\n")
        if self._tracked:  # α on every rank: each may hold a shard of what it comes from
            alpha = alpha() if alpha else None
            if self._writes:
                self._trackers.epoch(metrics, alpha)


# By the last word of a value's name; others: four digits.
FORMATS = {
    "loss": "{:.4f}",
    "byte": "{:.4f}",
    "accuracy": "{:.2f} %",
    "steps": "{:.0f}",
    "seconds": "{:.1f}",
}


def told(key: str, value: float | None) -> str:
    """`value` as a table shows it, by the last word of its `key`; – for what is not known."""
    last = key.replace("_", " ").split()[-1]
    return "–" if value is None else FORMATS.get(last, "{:.4g}").format(value)


def append(path: Path, text: str) -> None:
    """Writes `text` at the end of the file `path`; a `CheckpointError` says why that fails."""
    try:
        with open(path, "a") as file:
            file.write(text)
    except OSError as error:
        raise CheckpointError(unwritten(path, error)) from None


def read_lines(path: Path, *keys: str) -> list[dict]:
    """The objects of a `.jsonl` file, without an unfinished last line; [] if there is no file.

    Args:
        keys: that each of them has; a `UserError` if one lacks them.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines()
    return [parse(line, path, *keys) for line in lines if line.endswith(b"}")]


def write_lines(records: Iterable[dict], path: Path) -> None:
    """Writes a `.jsonl` file, all or nothing."""
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(record) + "\n" for record in records))


def read_json(path: Path) -> dict:
    """The object in the JSON file `path`; {} if there is no file."""
    return parse(path.read_bytes(), path) if path.exists() else {}


def write_json(content: dict, path: Path) -> None:
    """Writes `content` as JSON, all or nothing."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def parse(text: bytes, path: Path, *keys: str) -> dict:
    """The JSON object `text` from the file `path`; a `UserError` if it is damaged or lacks keys."""
    try:
        content = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError("holds no JSON object")
        for key in keys:
            if key not in content:
                raise ValueError(f"an object in it lacks {key!r}")
    except ValueError as error:  # or what is raised of no JSON or no UTF-8
        raise UserError(f"{path}: is damaged ({error}); remove it") from None
    return content


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
