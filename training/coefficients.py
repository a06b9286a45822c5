"""TWA's coefficients as the scripts train them: flags, optimizer, rate, averaging weights."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from training import data, flags, optimizers, ranks
from training.flags import number
from training.loop import autocast
from training.optimizers import SCHEDULES
from twa import TWA
from twa.checkpoints import load_into, verify
from utils import UserError

RATE_HELP = (
    "(1 - momentum) / curvature for SGD, with the largest curvature of the training loss along the "
    "coefficients, which is measured; 0.01 · ‖coefficients‖ / sqrt(their number) for AdamW"
)
# Images of which the curvature is measured, in whole batches.
CURVATURE_IMAGES = 128


def add_arguments(parser: argparse.ArgumentParser, opt: str, schedule: str) -> None:
    """The flags of every script that trains coefficients, with its defaults of two of them."""
    add = parser.add_argument_group("coefficients").add_argument
    add("--bits", type=int, default=32, choices=(32, 16, 8, 4), help="of a stored basis element")
    parts, parts_help = ("model", "layer", "channel"), "what has coefficients of its own"
    add("--granularity", default="model", choices=parts, help=parts_help)
    add("--opt", default=opt, choices=("SGD", "AdamW"), help="optimizer of the coefficients")
    add("--schedule", default=schedule, choices=tuple(SCHEDULES), help=flags.SCHEDULE_HELP)
    add("--lr", type=flags.scale, help="rate of the coefficients; left out: " + RATE_HELP)
    add("--momentum", type=number(float, 0, 1), default=0.9, help="momentum of SGD")
    add("--weight-decay", "--wd", type=flags.scale, default=1e-5, help="weight decay")


def optimizer_of(
    args: argparse.Namespace,
    model: nn.Module,
    window: Sequence[Path],
    train: data.Loader,
    **arguments,
) -> TWA:
    """The optimizer that the flags ask for; without `--lr` at a rate that is measured on `train`.

    Args:
        args: with the flags of `add_arguments`, and `amp`.
        arguments: further ones of `TWA`, `start` above all.

    Raises:
        UserError: as `safe_rate`.
        twa.CheckpointError: a file of the window cannot be used.
    """
    base, settings = optimizers.chosen(
        args.opt.lower(), args.lr or 0.0, args.weight_decay, args.momentum
    )
    basis = {"bits": args.bits, "granularity": args.granularity}
    optimizer = TWA(model, window, base, **basis, **arguments, **settings)
    if args.lr is None:
        rate = safe_rate(optimizer, model, train, settings.get("momentum"), args.amp)
        optimizer.param_groups[0]["lr"] = rate
    return optimizer


def safe_rate(
    optimizer: TWA, model: nn.Module, train: data.Loader, momentum: float | None, amp: bool
) -> float:
    """A rate for the coefficients at the start point (see RATE_HELP).

    What a rate of SGD does depends on its product with the curvature alone, whatever the model, the
    granularity and the number of checkpoints; what one of Adam's does on the angle by which a step,
    which is about rate · √n long, turns the weights.

    Args:
        momentum: of SGD; None: AdamW.

    Raises:
        UserError: there are no coefficients, or the loss does not depend on them.
    """
    coefficients = optimizer.coefficients.detach()
    if len(coefficients) == 0:
        raise UserError("the checkpoints hold nothing but zeros: there is nothing to average")
    if momentum is None:
        return 0.01 * coefficients.norm().item() / math.sqrt(len(coefficients))
    train.set_epoch(0)
    batches = list(islice(train, math.ceil(CURVATURE_IMAGES / train.batch_size)))
    model.train()

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        for i, (images, labels) in enumerate(batches):
            share = ranks.world() / train.images_in(i) / len(batches)
            with autocast(images.device, amp):
                part = F.cross_entropy(model(images), labels, reduction="sum") * share
            part.backward()
        return part

    curvature = optimizer.curvature(loss)
    if not 0 < curvature < math.inf:
        raise UserError(f"--lr: needed here, since the loss has a curvature of {curvature}")
    return (1 - momentum) / curvature


def described(optimizer: TWA) -> str:
    """The number of coefficients, the rate and the size of the basis, for the log."""
    rate, size = optimizer.param_groups[0]["lr"], optimizer.subspace.nbytes / 2**20
    return f"{len(optimizer.subspace)} coefficients, rate {rate:.3g}, basis of {size:.1f} MiB"


def averaging_weights(optimizer: TWA) -> list[float]:
    """α of every checkpoint of the window; at a finer granularity the mean over the blocks."""
    alpha = optimizer.averaging_weights()
    return (alpha.mean(0) if alpha.dim() == 2 else alpha).tolist()


def load_verified(model: nn.Module, path: Path | str) -> None:
    """Loads the checkpoint `path` into `model` once it is known to be whole and to fit.

    Raises:
        twa.CheckpointError: as `verify` and `load_into`; the model is as it was.
    """
    verify(path)
    load_into(model, path)
