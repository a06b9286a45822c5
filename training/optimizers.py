"""Which optimizer and which schedule of its rate a flag means."""

import math
from collections.abc import Callable

import torch
from torch.optim.lr_scheduler import LambdaLR

OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}

# The rate's factor at x, the share of the training that is done, in [0, 1).
SCHEDULES: dict[str, Callable[[float], float]] = {
    "step": lambda x: 1.0 if x < 0.5 else 0.1 if x < 0.75 else 0.01,
    "constant": lambda x: 1.0,
    "linear": lambda x: 1.0 - x,
    "1-sqrt": lambda x: 1.0 - math.sqrt(x),
    "cosine": lambda x: 0.5 * (1.0 + math.cos(math.pi * x)),
}


def step_of_the_paper(epochs: int) -> Callable[[float], float]:
    """The factor of `step` in TWA, as the paper's release has it: by whole epochs.

    The rate is divided by 10 at epoch int(0.5 epochs) and at epoch int(0.75 epochs + 0.9), counted
    from 0: a single epoch runs at a tenth of the rate throughout.
    """
    milestones = int(0.5 * epochs), int(0.75 * epochs + 0.9)

    def factor(x: float) -> float:
        epoch = int(x * epochs + 1e-9)  # x may be rounded down
        return 0.1 ** sum(epoch >= milestone for milestone in milestones)

    return factor


def chosen(
    name: str, lr: float, weight_decay: float, momentum: float
) -> tuple[type[torch.optim.Optimizer], dict[str, float]]:
    """The class and the hyper-parameters of the optimizer `name`; momentum is SGD's alone."""
    arguments = {"lr": lr, "weight_decay": weight_decay}
    if name == "sgd":
        arguments["momentum"] = momentum
    return OPTIMIZERS[name], arguments


def schedule_of(
    factor: Callable[[float], float],
    optimizer: torch.optim.Optimizer,
    steps: int,
    warmup: int = 0,
    first: int = 0,
) -> LambdaLR:
    """A schedule to be stepped after each of `steps` optimizer steps, by a factor of progress.

    The rate rises linearly over the first `warmup` steps; the progress is that of the rest. It
    begins as if `first` steps were done.
    """

    def at(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return factor((step - warmup) / max(steps - warmup, 1))

    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    return LambdaLR(optimizer, at, last_epoch=first - 1)
