"""Where the metrics of a run go besides its log: Weights & Biases and TensorBoard."""

import argparse
import importlib
from pathlib import Path

from torch import Tensor

from utils import UserError


def check(args: argparse.Namespace) -> None:
    """Raises a `UserError` if the package of `--wandb` or `--tensorboard` is missing."""
    for package in ("wandb", "tensorboard"):
        if getattr(args, package):
            try:
                importlib.import_module(package)
            except ImportError:
                missing = f"the package is missing; pip install {package}"
                raise UserError(f"--{package}: {missing}") from None


class Trackers:
    """What `--wandb` and `--tensorboard` ask for; without either, `epoch` does nothing.

    Args:
        directory: for TensorBoard's files.
        done: epochs that are done; what TensorBoard's files hold of later ones, from before a
            resumed run, is no longer shown.
    """

    def __init__(self, args: argparse.Namespace, directory: Path, done: int):
        self._wandb = self._board = None
        if args.wandb:
            import wandb

            self._histogram = wandb.Histogram
            self._wandb = wandb.init(project="TWA", name=args.EXP, config=vars(args))
        if args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(directory), purge_step=done + 1)

    def epoch(self, metrics: dict[str, float | None], alpha: Tensor | None) -> None:
        """Sends the metrics of an epoch, those that are not None.

        Args:
            alpha: the averaging coefficients, of any shape, of which a histogram is sent; None
                where nothing is averaged.
        """
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
