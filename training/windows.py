"""A window of checkpoints, the averages of it that TWA is compared with, and its start point."""

import re
import warnings
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from training import ranks
from training.settings import Settings, flag
from twa.files.checkpoints import last_means, without_copies
from twa.files.windows import numbered
from twa.formats import verify
from twa.recipe import start_name
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

    None may be missing of files that are called by a number alone. Of others, such as the folders
    `checkpoint-N` of transformers, the window takes those that exist.

    Attributes:
        paths: of the checkpoints, which are not opened.
        first, last: the numbers at the ends of the window.
        notes: for the log: which checkpoints are copies of others.

    Raises:
        UserError: the window is empty, or lacks a checkpoint.
        CheckpointError: as `numbered`.
    """

    def __init__(self, args):
        folder, start, end = Path(args.save_dir), args.params_start, args.params_end
        if start >= end:
            raise UserError(
                f"--params_start {start} --params_end {end}: the window [{start}, {end}) is empty"
            )
        found = numbered(folder)
        example = next(iter(found.values()), folder / "0.pt")
        contents = f"it holds {min(found)} to {max(found)}" if found else "it holds no checkpoints"
        missing = next((number for number in range(start, end) if number not in found), None)
        if missing is not None and example.stem.isdecimal() and example.suffix:
            name = _called(example, missing).name
            raise UserError(f"{folder}: {name} is missing from [{start}, {end}); {contents}")
        self.paths = [path for number, path in found.items() if start <= number < end]
        if not self.paths:
            name = _called(example, "N").name
            raise UserError(f"{folder}: no {name} with N in [{start}, {end}); {contents}")
        self.first, self.last, self.notes = start, end - 1, []
        self._start, count = args.start, args.start_average
        if count:
            self._start = count
        elif args.train_start == -1:
            self._start = "SWA"
        elif args.train_start is not None:
            self._start = found.get(args.train_start) or _called(example, args.train_start)

    def __len__(self) -> int:
        return len(self.paths)

    def verified(self) -> "Window":
        """This window, once each file was read, on one of the ranks, without copies of others.

        Raises:
            UserError: the window is shorter than `--start-average`.
            CheckpointError: a file is damaged.
        """
        for path in list(dict.fromkeys(self.files))[ranks.rank() :: ranks.world()]:
            verify(path)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            self.paths = without_copies(self.paths)
        self.notes = [str(warning.message) for warning in found]
        if isinstance(self._start, int) and self._start > len(self.paths):
            raise UserError(f"--start-average: the window has only {len(self.paths)} checkpoints")
        return self

    @property
    def files(self) -> list[Path]:
        """The files on which the start point depends."""
        return [*self.paths, *([self._start] if isinstance(self._start, Path) else [])]

    @property
    def start(self) -> float | Path | None:
        """The start point that the flags ask for, as of `twa.Recipe`; None: search for it."""
        ends = {"auto": None, "last": 1, "SWA": len(self.paths)}
        return ends.get(self._start, self._start)

    def start_name(self, start: float | Path) -> str:
        """What tables call a start point."""
        if isinstance(start, Path):
            return f"checkpoint {int(re.findall(r'[0-9]+', start.name)[0])}"
        return start_name(start, len(self.paths))

    def named(self, losses: dict[float, float]) -> dict[str, float]:
        """The losses that `best_start` compared, by the names of the averages."""
        return {start_name(key, len(self.paths)): loss for key, loss in losses.items()}

    def averages(self, model: nn.Module) -> dict[str, dict[str, Tensor]]:
        """The averages that TWA is compared with, by name: `state_dict`s."""
        few = min(5, len(self.paths))
        names = {"last": 1, f"mean of last {few}": few, "SWA": len(self.paths)}
        counts = sorted(set(names.values()))
        means = dict(zip(counts, last_means(self.paths, counts, model), strict=True))
        return {name: means[count] for name, count in names.items()}


def _called(example: Path, number: int | str) -> Path:
    """The path of a checkpoint that is called as `example`, with another number."""
    return example.with_name(re.sub(r"[0-9]+", str(number), example.name, count=1))
