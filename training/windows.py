"""A window of checkpoints, and the averages of it that TWA is compared with."""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import nn

from training import flags, ranks
from twa.checkpoints import average, verify
from utils import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that choose the window and the start point in it."""
    add = parser.add_argument
    natural = flags.number(int, 0)
    add("--params_start", type=natural, default=0, help="first checkpoint of the window")
    add("--params_end", type=natural, default=51, help="one past the window's last")
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--train_start",
        type=flags.number(int, -1),
        default=-1,
        help="checkpoint to start from; -1: the mean of the window (SWA)",
    )
    start.add_argument(
        "--start-average",
        type=flags.number(int, 1),
        metavar="K",
        help="start from the mean of the window's last K checkpoints",
    )


def paths_of(args: argparse.Namespace) -> list[Path]:
    """The checkpoints of the window, whole, in order.

    Each file is read once for that, by one of the ranks: the others read their own columns only.

    Raises:
        UserError: the window is empty, or one of its checkpoints is missing.
        CheckpointError: one of them is damaged.
    """
    save_dir, start, end = Path(args.save_dir), args.params_start, args.params_end
    if start >= end:
        raise UserError(
            f"--params_start {start} --params_end {end}: the window [{start}, {end}) is empty"
        )
    found = {int(p.stem) for p in save_dir.glob("*.pt") if p.stem.isdecimal()}
    missing = next((i for i in range(start, end) if i not in found), None)
    if missing is not None:
        holds = f"it holds {min(found)} to {max(found)}" if found else "it holds no checkpoints"
        raise UserError(f"{save_dir}: {missing}.pt is missing from [{start}, {end}); {holds}")
    window = [save_dir / f"{i}.pt" for i in range(start, end)]
    start_point = [save_dir / f"{args.train_start}.pt"] if args.train_start >= 0 else []
    for path in [*window, *start_point][ranks.rank() :: ranks.world()]:
        verify(path)
    return window


def averages_of(window: list[Path], args: argparse.Namespace, model: nn.Module) -> tuple[dict, str]:
    """The averages that TWA is compared with, by name, and which of them is its start point."""
    expected = model.state_dict()
    averages = {
        "last": window[-1],
        f"mean of last {min(5, len(window))}": average(window[-5:], expected),
        "SWA": average(window, expected),
    }
    if args.start_average:
        if args.start_average > len(window):
            raise UserError(f"--start-average: the window has only {len(window)} checkpoints")
        start = f"mean of last {args.start_average}"
        averages.setdefault(start, average(window[-args.start_average :], expected))
    elif args.train_start >= 0:
        start = f"checkpoint {args.train_start}"
        averages[start] = Path(args.save_dir) / f"{args.train_start}.pt"
    else:
        start = "SWA"
    return averages, start
