"""A window of checkpoints, and the averages of it that TWA is compared with."""

import argparse
import re
import warnings
from collections.abc import Callable
from pathlib import Path

from torch import nn

from training import flags, ranks
from twa import best_start
from twa.files.checkpoints import Checkpoint, average, last_means, without_copies
from twa.files.formats import verify
from twa.files.windows import numbered
from utils import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that choose the window and the start point in it."""
    add = parser.add_argument
    natural = flags.number(int, 0)
    add("--params_start", type=natural, default=0, help="first checkpoint of the window")
    add("--params_end", type=natural, default=101, help="one past the window's last")
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--start",
        default="auto",
        choices=("auto", "last", "SWA"),
        help="where TWA starts: auto takes the last checkpoint, the mean of the last 2, 4, 8, … or "
        "all (SWA), or an exponential mean (EMA), whichever has the lowest loss on a sample of "
        "what it trains on",
    )
    start.add_argument(
        "--train_start",
        type=flags.number(int, -1),
        help="checkpoint to start from; -1: the mean of the window (SWA). Left out, --start says "
        "(in the paper's release, checkpoint 0)",
    )
    start.add_argument(
        "--start-average",
        type=flags.number(int, 1),
        metavar="K",
        help="start from the mean of the window's last K checkpoints",
    )


def paths_of(args: argparse.Namespace) -> list[Path]:
    """The checkpoints of the window in order, each once, once known to be undamaged.

    Each file is read once for that, by one of the ranks; the others then read only their shards.

    Raises:
        UserError: as `window_paths`.
        CheckpointError: one of them is damaged.
    """
    window = window_paths(args)
    start_point = [_start_point(args)] if args.train_start not in (None, -1) else []
    for path in [*window, *start_point][ranks.rank() :: ranks.world()]:
        verify(path)
    with warnings.catch_warnings():
        if ranks.rank():  # the first one says it
            warnings.simplefilter("ignore")
        return without_copies(window)


def window_paths(args: argparse.Namespace) -> list[Path]:
    """The checkpoints of the window, in order; they are not opened.

    Of files called by a number alone none may be missing; of others, such as the folders
    `checkpoint-N` of transformers, the window takes those that exist.

    Raises:
        UserError: the window is empty, or one of its checkpoints is missing.
        CheckpointError: as `numbered`.
    """
    start, end = args.params_start, args.params_end
    if start >= end:
        raise UserError(
            f"--params_start {start} --params_end {end}: the window [{start}, {end}) is empty"
        )
    found = numbered(Path(args.save_dir))
    holds = f"it holds {min(found)} to {max(found)}" if found else "it holds no checkpoints"
    missing = next((number for number in range(start, end) if number not in found), None)
    any_path = _path(args, found, start)
    if missing is not None and any_path.stem.isdecimal() and any_path.suffix:
        name = _path(args, found, missing).name
        raise UserError(f"{args.save_dir}: {name} is missing from [{start}, {end}); {holds}")
    window = [path for number, path in found.items() if start <= number < end]
    if not window:
        name = re.sub(r"\d+", "N", any_path.name)
        raise UserError(f"{args.save_dir}: no {name} with N in [{start}, {end}); {holds}")
    return window


def _path(args: argparse.Namespace, found: dict[int, Path], number: int) -> Path:
    """The checkpoint of this `number`, or where it would be, called as those that were `found`."""
    example = next(iter(found.values()), Path(args.save_dir, "0.pt"))
    return found.get(number) or example.with_name(
        re.sub(r"\d+", str(number), example.name, count=1)
    )


def _start_point(args: argparse.Namespace) -> Path:
    """The checkpoint of `--train_start`."""
    return _path(args, numbered(Path(args.save_dir)), args.train_start)


def averages_of(window: list[Path], model: nn.Module) -> dict[str, dict]:
    """The averages that TWA is compared with, by name: `state_dict`s."""
    few = min(5, len(window))
    names = {"last": 1, f"mean of last {few}": few, "SWA": len(window)}
    counts = sorted(set(names.values()))
    means = dict(zip(counts, last_means(window, counts, model), strict=True))
    return {name: means[count] for name, count in names.items()}


def start_of(
    window: list[Path], args: argparse.Namespace, model: nn.Module, loss: Callable[[], float]
) -> tuple[str, Checkpoint, dict[str, float]]:
    """The start point that the flags ask for: its name, the checkpoint, what it was compared with.

    Args:
        loss: of the model as it is; what `--start auto` compares.

    Raises:
        UserError: the window is shorter than `--start-average`.
    """
    if args.train_start not in (None, -1):
        return f"checkpoint {args.train_start}", _start_point(args), {}
    start = args.start if args.train_start is None else "SWA"
    count = args.start_average or {"auto": None, "last": 1, "SWA": len(window)}[start]
    if count is None:
        checkpoint, losses = best_start(model, window, loss)
        compared = {name_of(key, window): value for key, value in losses.items()}
        return min(compared, key=compared.get), checkpoint, compared
    if count > len(window):
        raise UserError(f"--start-average: the window has only {len(window)} checkpoints")
    return name_of(count, window), average(window[-count:], model), {}


def name_of(average: float, window: list[Path]) -> str:
    """What an average is called: of so many checkpoints, or with weights that fall by a factor."""
    if average < 1:
        return f"EMA {average:.2f}"
    return {len(window): "SWA", 1: "last"}.get(average, f"mean of last {average}")
