"""TWA's coefficients as the scripts train them: flags, optimizer, the best of what came out."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from training import flags, optimizers
from training.optimizers import SCHEDULES
from training.settings import Settings, flag
from twa import TWA, rate_of
from twa.storage.memory import BITS
from twa.subspace import EXTRACTS, GRANULARITIES, UNITS
from utils import UserError

# In units of the window's spread it holds for every model and granularity that was tried.
RATE_OF_SGD = 0.1
# From so many steps on, on samples that are seen again, finer coefficients and a coarser unit pay.
MANY_STEPS = 50


@dataclass(kw_only=True)
class Coefficients(Settings):
    """coefficients"""

    extract: str = flag(
        "PCA",
        "the basis: principal directions, with coefficients in units of the window's spread, or as "
        "in the paper Gram-Schmidt, in units of the weights",
        choices=EXTRACTS,
    )
    components: int | None = flag(None, "number of directions to keep (default: all)", low=1)
    bits: int = flag(32, "bits per stored element of the basis", choices=BITS)
    granularity: str = flag(
        "auto",
        "one set of coefficients per model, layer or output channel; auto: per model, but with PCA "
        f"and Adam(W) per channel from {MANY_STEPS} steps on",
        choices=("auto", *GRANULARITIES),
    )
    unit: str | None = flag(
        None,
        "with PCA, the unit of coefficients: the spread along a direction, or of its block "
        f"(default: block for images, layers or channels, Adam(W) and {MANY_STEPS} steps or more)",
        choices=UNITS,
    )
    opt: str = flag("AdamW", "optimizer of the coefficients", choices=("SGD", "Adam", "AdamW"))
    schedule: str = flag("linear", flags.SCHEDULE, choices=tuple(SCHEDULES))
    lr: float | None = flag(
        None, "rate (default with PCA: 0.02 to 0.14 by steps and images; SGD: 0.1)", **flags.SCALE
    )
    momentum: float = flag(0.9, "momentum of SGD", low=0, high=1)
    weight_decay: float = flag(0.0, "weight decay", "--weight-decay", "--wd", **flags.SCALE)

    def check(self):
        if self.extract != "PCA":
            self.refuse("components", "unit", why="only with --extract PCA")
            if self.lr is None:
                raise UserError(
                    f"--lr: needed with --extract {self.extract}, in units of the weights"
                )


def unit_of(granularity: str, steps: int, samples: float) -> str:
    """The unit of the coefficients that suits AdamW, for so many steps on so many samples.

    In few steps, or where no sample is seen twice, as of a text, the window knows best where to go.
    Samples that are seen again and again tell more, where there are coefficients to take it in.
    """
    many = granularity != "model" and steps >= MANY_STEPS and samples < math.inf
    return "block" if many else "direction"


def optimizer_of(
    args: Coefficients,
    model: nn.Module,
    window: Sequence[Path],
    *,
    steps: int = 0,
    samples: float = math.inf,
    **arguments,
) -> TWA:
    """The optimizer that the flags ask for.

    Args:
        steps, samples: of the whole training, by which `auto` and the unset `--unit` and `--lr` go;
            see `twa.rate_of`. Leave them out for soups, whose models are no trajectory.
        arguments: further ones of `TWA`, above all `start`.

    Raises:
        UserError: all checkpoints are the same, or there is only one.
        twa.CheckpointError: a file of the window cannot be used.
    """
    if args.extract == "PCA" and len(window) < 2:
        raise UserError(f"{window[0]}: is alone; give two checkpoints or more: one has no spread")
    basis = {name: getattr(args, name) for name in ("extract", "components", "bits", "unit")}
    adam, granularity = args.extract == "PCA" and args.opt != "SGD", args.granularity
    if granularity == "auto":
        granularity = "channel" if adam and steps >= MANY_STEPS else "model"
    basis["granularity"] = granularity
    if args.unit is None:
        basis["unit"] = unit_of(granularity, steps, samples) if adam else "direction"
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
    shown = [f"{name} {losses[name]:.4f}" for name in sorted(losses, key=losses.get)]
    return f"loss on a sample of training data: {', '.join(shown)}"


def described(optimizer: TWA) -> str:
    """The number of coefficients, the rate and the size of the basis, for the log."""
    rate, size = optimizer.param_groups[0]["lr"], optimizer.subspace.nbytes / 2**20
    return f"{len(optimizer.subspace)} coefficients, rate {rate:.3g}, basis of {size:.1f} MiB"


def averaging_weights(optimizer: TWA) -> list[float]:
    """α of every checkpoint of the window; at a finer granularity the mean over the blocks."""
    alpha = optimizer.averaging_weights()
    return (alpha.mean(0) if alpha.dim() == 2 else alpha).tolist()
