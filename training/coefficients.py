"""TWA's coefficients as the scripts train them: flags, optimizer, the best of what came out."""

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from training import flags, optimizers
from training.flags import number
from training.optimizers import SCHEDULES
from twa import TWA, rate_of
from twa.storage.memory import BITS
from twa.subspace import EXTRACTS, GRANULARITIES, UNITS
from utils import UserError

# In units of the window's spread it holds for every model and granularity that was tried.
RATE_OF_SGD = 0.1
# From so many steps on, on samples that are seen again, finer coefficients and a coarser unit pay.
MANY_STEPS = 50


def add_arguments(parser: argparse.ArgumentParser, schedule: str, trajectory: bool = True) -> None:
    """The flags of every script that trains coefficients, but for epochs and start point.

    Args:
        trajectory: whether unit and rate, left out, go by the steps and images; see `optimizer_of`.
    """
    add = parser.add_argument_group("coefficients").add_argument
    add(
        "--extract",
        default="PCA",
        choices=EXTRACTS,
        help="the basis: the window's principal directions, coefficients in units of its spread "
        "along each (PCA), or as in the paper Gram-Schmidt, coefficients in units of the weights",
    )
    add("--components", type=number(int, 1), help="directions to keep, of PCA; left out, all")
    add("--bits", type=int, default=32, choices=BITS, help="of a stored basis element")
    parts_help = "what has coefficients of its own"
    add("--granularity", default="model", choices=GRANULARITIES, help=parts_help)
    unit, rate = "direction", "0.02"
    if trajectory:
        many = f"for {MANY_STEPS} steps or more of Adam(W) on images"
        unit = f"block by layer and by channel {many}, else {unit}"
        rate = f"{rate} to 0.14 by the steps and images"
    unit_help = "of coefficients, with PCA: the spread along each direction, or that of its block"
    add("--unit", choices=UNITS, help=f"{unit_help}; left out, {unit}")
    add(
        "--opt",
        default="AdamW",
        choices=("SGD", "Adam", "AdamW"),
        help="optimizer of the coefficients",
    )
    add("--schedule", default=schedule, choices=tuple(SCHEDULES), help=flags.SCHEDULE_HELP)
    rates = f"left out, with --extract PCA: {rate}; for SGD 0.1"
    add("--lr", type=flags.scale, help=f"rate of the coefficients; {rates}")
    add("--momentum", type=number(float, 0, 1), default=0.9, help="momentum of SGD")
    add("--weight-decay", "--wd", type=flags.scale, default=0.0, help="weight decay")


def check_arguments(args: argparse.Namespace) -> argparse.Namespace:
    """`args`; a `UserError` says which flags do not go together."""
    for flag, value in (("--components", args.components), ("--unit", args.unit)):
        if args.extract == "Schmidt" and value is not None:
            raise UserError(f"{flag}: only with --extract PCA")
    if args.lr is None and args.extract != "PCA":
        raise UserError(f"--lr: needed with --extract {args.extract}, in units of the weights")
    return args


def unit_of(granularity: str, steps: int, samples: float) -> str:
    """The unit of the coefficients that suits AdamW, for so many steps on so many samples.

    In few steps, or where no sample is seen twice, as of a text, the window knows best where to go.
    Samples that are seen again and again tell more, where there are coefficients to take it in.
    """
    many = granularity != "model" and steps >= MANY_STEPS and samples < math.inf
    return "block" if many else "direction"


def optimizer_of(
    args: argparse.Namespace,
    model: nn.Module,
    window: Sequence[Path],
    *,
    steps: int = 0,
    samples: float = math.inf,
    **arguments,
) -> TWA:
    """The optimizer that the flags ask for.

    Args:
        args: with the flags of `add_arguments`.
        steps, samples: of the whole training, by which the rate grows if `--lr` is left out; see
            `twa.rate_of`. Without steps, as for soups, whose models are no trajectory, it does not.
        arguments: further ones of `TWA`, `start` above all.

    Raises:
        UserError: all checkpoints are the same, or there is one alone.
        twa.CheckpointError: a file of the window cannot be used.
    """
    if args.extract == "PCA" and len(window) < 2:
        raise UserError(f"{window[0]}: is alone; give two checkpoints or more: one has no spread")
    names = ("extract", "components", "bits", "granularity", "unit")
    basis = {name: getattr(args, name) for name in names}
    if args.unit is None:
        adam = args.extract == "PCA" and args.opt != "SGD"
        basis["unit"] = unit_of(args.granularity, steps, samples) if adam else "direction"
    rate = args.lr
    if rate is None:
        rate = RATE_OF_SGD if args.opt == "SGD" else rate_of(steps, samples, basis["unit"])
    base, settings = optimizers.chosen(args.opt.lower(), rate, args.weight_decay, args.momentum)
    try:
        optimizer = TWA(model, window, base, **basis, **arguments, **settings)
    except ValueError as error:
        raise UserError(str(error)) from None
    if not len(optimizer.subspace):
        raise UserError("the checkpoints hold nothing but zeros: there is nothing to average")
    return optimizer


class LateMean:
    """The mean of the coefficients over the last half of the training; part of a run's state.

    Args:
        steps: optimizer steps of the whole training.
    """

    def __init__(self, optimizer: TWA, steps: int):
        self._coefficients, self._first = optimizer.coefficients, steps // 2
        self._done, self.mean = 0, torch.zeros_like(optimizer.coefficients)
        optimizer.register_step_post_hook(lambda *_: self._update())

    @torch.no_grad()
    def _update(self) -> None:
        self._done += 1
        if self._done > self._first:
            self.mean += (self._coefficients - self.mean) / (self._done - self._first)

    def state_dict(self) -> dict:
        return {"done": self._done, "mean": self.mean}

    def load_state_dict(self, state: dict) -> None:
        self._done = state["done"]
        self.mean.copy_(state["mean"])


def keep_best(optimizer: TWA, late: LateMean, loss: Callable[[], float]) -> dict[str, float]:
    """Moves the model to the best of start, end and late mean; returns their losses.

    Args:
        loss: of the model as it is.
    """
    points = {
        "end": optimizer.coefficients.detach().clone(),
        "mean of the last half": late.mean,
        "start": optimizer.origin,
    }
    losses = {}
    for name, coefficients in points.items():
        optimizer.set_coefficients(coefficients)
        value = loss()
        losses[name] = value if math.isfinite(value) else math.inf
    optimizer.set_coefficients(points[min(losses, key=losses.get)])  # of equals the first
    return losses


def comparison(losses: dict[str, float]) -> str:
    """What `keep_best` or `best_start` compared, for the log; the best one first."""
    told = [f"{name} {losses[name]:.4f}" for name in sorted(losses, key=losses.get)]
    return f"loss on a sample of training data: {', '.join(told)}"


def described(optimizer: TWA) -> str:
    """The number of coefficients, the rate and the size of the basis, for the log."""
    rate, size = optimizer.param_groups[0]["lr"], optimizer.subspace.nbytes / 2**20
    return f"{len(optimizer.subspace)} coefficients, rate {rate:.3g}, basis of {size:.1f} MiB"


def averaging_weights(optimizer: TWA) -> list[float]:
    """α of every checkpoint of the window; at a finer granularity the mean over the blocks."""
    alpha = optimizer.averaging_weights()
    return (alpha.mean(0) if alpha.dim() == 2 else alpha).tolist()
