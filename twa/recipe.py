"""The start point: the average of the last checkpoints that has the lowest loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from twa.files.checkpoints import Checkpoint, average, check_window, last_means, load_into


def best_start(
    model: torch.nn.Module, checkpoints: Iterable[Checkpoint], loss: Callable[[], float]
) -> tuple[dict[str, Tensor], dict[float, float]]:
    """The best average of the last checkpoints, uniform or exponential.

    How many to average is a matter of the run: of noisy checkpoints at a constant rate the mean of
    a few is far better than the last one, and better than the mean of many where the early ones
    are far away. Compared are the last checkpoint, the means of the last 2, 4, 8, … and of all;
    where the best of these is that of k > 2, also two exponential averages whose weights fall as
    fast as it suggests, by 1 − 2/k and 1 − √2/k from one checkpoint to the one before.

        start, losses = best_start(model, checkpoints, lambda: training_loss(model))
        optimizer = TWA(model, checkpoints, start=start)

    Args:
        model: takes the averages one after the other, whole or sharded; it holds the last of them
            afterwards, and is in training mode or not as before.
        checkpoints: paths or `state_dict`s, in the order of training; each is read once for all
            uniform means, and once more for each exponential one.
        loss: the loss of the model as it is, always on the same sample of training data (some
            hundred images do); re-estimates batch norm's statistics first, if there are any. On
            several ranks the same number on each.

    Returns:
        The best start point, a `state_dict`, and the losses: of the means by how many checkpoints
        they average, from 1 on, and of the exponential ones by the factor, below 1.

    Raises:
        CheckpointError: as `twa.files.checkpoints.average`.
        ValueError: there are no checkpoints, or one is the model's own `state_dict`, uncopied.
    """
    checkpoints = check_window(model, checkpoints)
    modes = [(module, module.training) for module in model.modules()]
    losses: dict[float, float] = {}

    def means() -> Iterator[tuple[float, dict[str, Tensor]]]:
        counts = [2**k for k in range(len(checkpoints).bit_length()) if 2**k < len(checkpoints)]
        counts.append(len(checkpoints))
        yield from zip(counts, last_means(checkpoints, counts, model), strict=True)
        count = min(losses, key=losses.get)
        for decay in (1 - 2 / count, 1 - math.sqrt(2) / count) if count > 2 else ():
            yield decay, average(checkpoints, model, decay)

    for key, mean in means():
        load_into(model, mean)
        with torch.no_grad():
            value = float(loss())
        losses[key] = value if math.isfinite(value) else math.inf
        if key == min(losses, key=losses.get):  # of equals the first
            best = mean
    for module, mode in modes:  # `loss` has most likely called `model.eval()`
        module.training = mode
    return best, losses
