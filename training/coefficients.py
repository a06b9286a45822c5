"""The flags of TWA's coefficients, and the recipe and the optimizer that they ask for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from training import flags, optimizers, ranks
from training.optimizers import SCHEDULES
from training.settings import Settings, flag
from twa import TWA, Recipe
from twa.files.weights import NAME, save_weights
from twa.files.writing import replacing
from twa.recipe import MANY_STEPS
from twa.storage.memory import BITS
from twa.subspace import EXTRACTS, GRANULARITIES, UNITS
from utils import UserError


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


def recipe_of(
    args: Coefficients, model: nn.Module, window: Sequence[Path], loss: Callable[[], float], **how
) -> Recipe:
    """The recipe that the flags ask for; `how` are further arguments of `twa.Recipe`.

    Raises:
        UserError: with principal directions, there is only one checkpoint.
    """
    if args.extract == "PCA" and len(window) < 2:
        raise UserError(f"{window[0]}: is alone; give two checkpoints or more: one has no spread")
    return Recipe(model, window, loss, granularity=args.granularity, **how)


def optimizer_of(args: Coefficients, recipe: Recipe, **arguments) -> TWA:
    """The optimizer that the flags ask for; `arguments` are further ones of `Recipe.optimizer`.

    Raises:
        UserError: the checkpoints do not differ, or a file of the window cannot be used.
    """
    base, settings = optimizers.chosen(args.opt.lower(), args.lr, args.weight_decay, args.momentum)
    basis = {name: getattr(args, name) for name in ("extract", "components", "bits", "unit")}
    try:
        optimizer = recipe.optimizer(base, **basis | settings | arguments)
    except ValueError as error:
        raise UserError(str(error)) from None
    if not len(optimizer.subspace):
        raise UserError("the checkpoints hold nothing but zeros: there is nothing to average")
    return optimizer


def factor_of(args: Coefficients) -> Callable[[float], float]:
    """The factor of the learning rate, as in `optimizers.SCHEDULES`."""
    if args.schedule == "step":
        return optimizers.step_of_the_paper(args.epochs)
    return SCHEDULES[args.schedule]


def comparison(what: str, losses: dict[str, float]) -> str | None:
    """The losses of the start or the end points for the log, the best one first; None for none."""
    shown = [f"{name} {losses[name]:.4f}" for name in sorted(losses, key=losses.get)]
    return f"{what}: loss on a sample of training data: {', '.join(shown)}" if shown else None


def described(optimizer: TWA) -> str:
    """The number of coefficients, the learning rate and the size of the basis, for the log."""
    rate, size = optimizer.param_groups[0]["lr"], optimizer.subspace.nbytes / 2**20
    return f"{len(optimizer.subspace)} coefficients, rate {rate:.3g}, basis of {size:.1f} MiB"


def averaging_weights(
    optimizer: TWA, paths: Sequence[Path], folder: Path | None = None
) -> dict[str, float]:
    """α of every checkpoint of the window by its path; of many blocks, their mean.

    Args:
        folder: takes a file with α of each parameter, for `twa average --weights`.
    """
    alpha = optimizer.averaging_weights()
    if folder is not None and ranks.rank() == 0:
        with replacing(folder / NAME) as temporary:
            save_weights(optimizer.subspace.by_name(alpha), paths, temporary)
    alpha = alpha.mean(0) if alpha.dim() == 2 else alpha
    return dict(zip(map(str, paths), alpha.tolist(), strict=True))
