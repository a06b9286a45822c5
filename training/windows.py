"""A window of checkpoints, the averages of it that TWA is compared with, and its start point."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from training import ranks
from training.settings import Settings, flag
from twa import best_start
from twa.files.checkpoints import Checkpoint, average, last_means
from twa.files.formats import verify
from utils import UserError


@dataclass(kw_only=True)
class WindowSettings(Settings):
    """window of checkpoints and start point"""

    params_start: int = flag(0, "first checkpoint of the window", "--params_start", low=0)
    params_end: int = flag(101, "one past the window's last", "--params_end", low=0)
    start: str = flag(
        "auto",
        "where TWA starts: auto compares the last checkpoint, the mean of the last 2, 4, 8, … or "
        "all (SWA) and exponential means (EMA) by their loss on a training sample",
        choices=("auto", "last", "SWA"),
        exclusive="start",
    )
    train_start: int | None = flag(
        None,
        "checkpoint to start from; -1: the mean of the window (default: as --start says)",
        "--train_start",
        low=-1,
        exclusive="start",
    )
    start_average: int | None = flag(
        None,
        "start from the mean of the window's last K checkpoints",
        low=1,
        metavar="K",
        exclusive="start",
    )


class Window:
    """The checkpoints with numbers in [params_start, params_end) of a folder, in order.

    They are `N.pt`, or where there are none the folders `checkpoint-N` that transformers' `Trainer`
    leaves, of which the window takes those that exist.

    Attributes:
        paths: of the checkpoints, which are not opened.

    Raises:
        UserError: the window is empty, shorter than `--start-average`, or lacks a checkpoint.
    """

    def __init__(self, args):
        save_dir, start, end = Path(args.save_dir), args.params_start, args.params_end
        if start >= end:
            raise UserError(
                f"--params_start {start} --params_end {end}: the window [{start}, {end}) is empty"
            )
        files, folders = _numbered(save_dir, "", ".pt"), _numbered(save_dir, "checkpoint-", "")
        self.first, self.last = start, end - 1
        if folders and not files:
            self.paths = [folders[number] for number in sorted(folders) if start <= number < end]
            if not self.paths:
                holds = f"it holds checkpoint-{min(folders)} to checkpoint-{max(folders)}"
                raise UserError(f"{save_dir}: no checkpoint-N with N in [{start}, {end}); {holds}")
            name = f"checkpoint-{args.train_start}"
        else:
            missing = next((i for i in range(start, end) if i not in files), None)
            if missing is not None:
                holds = (
                    f"it holds {min(files)} to {max(files)}" if files else "it holds no checkpoints"
                )
                raise UserError(
                    f"{save_dir}: {missing}.pt is missing from [{start}, {end}); {holds}"
                )
            self.paths = [files[i] for i in range(start, end)]
            name = f"{args.train_start}.pt"
        self._train_start, count = args.train_start, args.start_average
        self._start_path = None if args.train_start in (None, -1) else save_dir / name
        self._start = count or ("SWA" if args.train_start == -1 else args.start)
        if count and count > len(self.paths):
            raise UserError(f"--start-average: the window has only {len(self.paths)} checkpoints")

    def __len__(self) -> int:
        return len(self.paths)

    def verify(self) -> None:
        """Reads each file once, on one of the ranks; a `CheckpointError` if one is damaged."""
        start = [self._start_path] if self._start_path else []
        for path in [*self.paths, *start][ranks.rank() :: ranks.world()]:
            verify(path)

    def start_point(
        self, model: nn.Module, loss: Callable[[], float]
    ) -> tuple[str, Checkpoint, dict[str, float]]:
        """As `start_of`, for the start that the flags ask for."""
        if self._start_path:
            return f"checkpoint {self._train_start}", self._start_path, {}
        return start_of(self.paths, self._start, model, loss)


def averages_of(window: Sequence[Path], model: nn.Module) -> dict[str, dict]:
    """The averages that TWA is compared with, by name: `state_dict`s."""
    few = min(5, len(window))
    names = {"last": 1, f"mean of last {few}": few, "SWA": len(window)}
    counts = sorted(set(names.values()))
    means = dict(zip(counts, last_means(window, counts, model), strict=True))
    return {name: means[count] for name, count in names.items()}


def start_of(
    window: Sequence[Path], start: str | int, model: nn.Module, loss: Callable[[], float]
) -> tuple[str, Checkpoint, dict[str, float]]:
    """A start point: its name, the checkpoint, and the losses that were compared, by name.

    Args:
        start: "auto", "last", "SWA", or how many of the last checkpoints to average.
        loss: of the model's current weights; what "auto" compares.
    """

    def name_of(mean: float) -> str:  # of so many checkpoints, or with weights that fall by it
        if mean < 1:
            return f"EMA {mean:.2f}"
        return {len(window): "SWA", 1: "last"}.get(mean, f"mean of last {mean}")

    if start == "auto":
        checkpoint, losses = best_start(model, window, loss)
        compared = {name_of(key): value for key, value in losses.items()}
        return min(compared, key=compared.get), checkpoint, compared
    count = {"last": 1, "SWA": len(window)}.get(start, start)
    return name_of(count), average(window[-count:], model), {}


def _numbered(folder: Path, before: str, after: str) -> dict[int, Path]:
    """What is called by a number between `before` and `after` in `folder`, by that number."""
    paths = folder.glob(f"{before}*{after}")
    found = {path.name.removeprefix(before).removesuffix(after): path for path in paths}
    return {int(number): path for number, path in found.items() if number.isdecimal()}
