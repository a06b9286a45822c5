"""A window of checkpoints, and the averages of it that TWA is compared with."""

import argparse
from pathlib import Path

from torch import nn

from training import flags, ranks
from twa.files.checkpoints import Checkpoint, average, last_means
from twa.files.formats import verify
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
    """The checkpoints of the window, whole, in order.

    Each file is read once for that, by one of the ranks: shards are then read by those that own
    them.

    Raises:
        UserError: as of `listed`.
        CheckpointError: one of them is damaged.
    """
    window = listed(args)
    start_point = [_start_point(args)] if args.train_start not in (None, -1) else []
    for path in [*window, *start_point][ranks.rank() :: ranks.world()]:
        verify(path)
    return window


def listed(args: argparse.Namespace) -> list[Path]:
    """The checkpoints of the window, in order; they are not opened.

    They are `N.pt`, or where there are none the folders `checkpoint-N` that transformers' `Trainer`
    leaves, of which the window takes those that there are.

    Raises:
        UserError: the window is empty, or one of its checkpoints is missing.
    """
    save_dir, start, end = Path(args.save_dir), args.params_start, args.params_end
    if start >= end:
        raise UserError(
            f"--params_start {start} --params_end {end}: the window [{start}, {end}) is empty"
        )
    files, folders = _files(save_dir), _folders_of_transformers(save_dir)
    if folders and not files:
        window = [folders[number] for number in sorted(folders) if start <= number < end]
        if not window:
            holds = f"it holds checkpoint-{min(folders)} to checkpoint-{max(folders)}"
            raise UserError(f"{save_dir}: no checkpoint-N with N in [{start}, {end}); {holds}")
        return window
    missing = next((i for i in range(start, end) if i not in files), None)
    if missing is not None:
        holds = f"it holds {min(files)} to {max(files)}" if files else "it holds no checkpoints"
        raise UserError(f"{save_dir}: {missing}.pt is missing from [{start}, {end}); {holds}")
    return [save_dir / f"{i}.pt" for i in range(start, end)]


def _start_point(args: argparse.Namespace) -> Path:
    """The checkpoint of `--train_start`: a file, or a folder where the window takes folders."""
    save_dir, number = Path(args.save_dir), args.train_start
    folders = {} if _files(save_dir) else _folders_of_transformers(save_dir)
    return save_dir / (f"checkpoint-{number}" if folders else f"{number}.pt")


def _files(save_dir: Path) -> set[int]:
    """The numbers N of the files `N.pt`."""
    return {int(path.stem) for path in save_dir.glob("*.pt") if path.stem.isdecimal()}


def _folders_of_transformers(save_dir: Path) -> dict[int, Path]:
    """The folders `checkpoint-N`, by N."""
    numbers = {
        path.name.removeprefix("checkpoint-"): path for path in save_dir.glob("checkpoint-*")
    }
    return {int(number): path for number, path in numbers.items() if number.isdecimal()}


def averages_of(window: list[Path], model: nn.Module) -> dict[str, dict]:
    """The averages that TWA is compared with, by name: `state_dict`s."""
    few = min(5, len(window))
    names = {"last": 1, f"mean of last {few}": few, "SWA": len(window)}
    counts = sorted(set(names.values()))
    means = dict(zip(counts, last_means(window, counts, model), strict=True))
    return {name: means[count] for name, count in names.items()}


def is_searched(args: argparse.Namespace) -> bool:
    """Whether the flags leave the start point to `best_start`."""
    return args.train_start is None and args.start == "auto" and not args.start_average


def start_of(
    window: list[Path],
    args: argparse.Namespace,
    model: nn.Module,
    losses: dict[float, float],
) -> tuple[str, Checkpoint, dict[str, float]]:
    """The start point that the flags ask for: its name, the checkpoint, and what it was chosen by.

    Args:
        losses: what `best_start` returned, where `is_searched`.

    Raises:
        UserError: the window is shorter than `--start-average`.
    """
    if args.train_start not in (None, -1):
        return f"checkpoint {args.train_start}", _start_point(args), {}
    start = args.start if args.train_start is None else "SWA"
    count = args.start_average or {"auto": None, "last": 1, "SWA": len(window)}[start]
    if count is None:
        count = min(losses, key=losses.get)  # of equals the first
        decay, kept = (count, window) if count < 1 else (1.0, window[-count:])
        compared = {name_of(key, window): value for key, value in losses.items()}
        return name_of(count, window), average(kept, model, decay), compared
    if count > len(window):
        raise UserError(f"--start-average: the window has only {len(window)} checkpoints")
    return name_of(count, window), average(window[-count:], model), {}


def name_of(average: float, window: list[Path]) -> str:
    """What an average is called: of so many checkpoints, or with weights that fall by a factor."""
    if average < 1:
        return f"EMA {average:.2f}"
    return {len(window): "SWA", 1: "last"}.get(average, f"mean of last {average}")
