"""`Recipe`: start point, granularity, unit, learning rate and final iterate of a TWA training.

These are the choices behind the tables of the README. They are rules in the number of steps and of
training samples, found on validation data, so nothing is left to tune.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from twa.files.checkpoints import Checkpoint, average, check_window, last_means, load_into
from twa.optimizer import RATE, TWA, is_adam
from twa.subspace import GRANULARITIES, UNITS

# From this many steps on, a set of coefficients for each output channel pays.
MANY_STEPS = 50
# The learning rate of SGD on coefficients in standard deviations of the checkpoints.
RATE_OF_SGD = 0.1


class Start(NamedTuple):
    """The best average of the last checkpoints, and the losses of all that were compared.

    The keys of `losses` are the number of checkpoints in a uniform mean, 1 or more, and the decay
    of an exponential one, below 1.
    """

    state_dict: dict[str, Tensor]
    losses: dict[float, float]

    @property
    def key(self) -> float:
        """The key of the best average."""
        return min(self.losses, key=self.losses.get)  # the first of equals


def best_start(
    model: nn.Module, checkpoints: Iterable[Checkpoint], loss: Callable[[], float]
) -> Start:
    """Finds the average of the last checkpoints with the lowest loss, and loads it into `model`.

    How many checkpoints to average depends on the run. While the learning rate is constant, the
    mean of a few is far better than the last one, and better than the mean of many if the early
    ones are far away. The candidates are the last checkpoint and the means of the last 2, 4, 8, …
    and of all. If the best of these averages k > 2 checkpoints, two exponential averages follow.
    Their weights decay by 1 − 2/k and by 1 − √2/k from one checkpoint to the one before it.

        start = best_start(model, checkpoints, lambda: training_loss(model))
        optimizer = TWA(model, checkpoints, start=start)

    Args:
        model: takes the averages in turn, whole or sharded. Its modules are in training or
            evaluation mode afterwards as they were before.
        checkpoints: paths or `state_dict`s, in the order of training. Each is read once for all
            uniform means, and once more for each exponential average.
        loss: the loss of the current model, always on the same sample of training data (a few
            hundred images are enough). It re-estimates batch norm's statistics first, if there are
            any. On several ranks it returns the same number on each.

    Raises:
        CheckpointError: as `twa.files.checkpoints.average`.
        ValueError: there are no checkpoints, or one is the model's own `state_dict`, not copied.
    """
    checkpoints = check_window(model, checkpoints)
    losses: dict[float, float] = {}

    def candidates() -> Iterator[tuple[float, dict[str, Tensor]]]:
        counts = [2**k for k in range(len(checkpoints).bit_length()) if 2**k < len(checkpoints)]
        counts.append(len(checkpoints))
        yield from zip(counts, last_means(checkpoints, counts, model), strict=True)
        count = min(losses, key=losses.get)
        for decay in (1 - 2 / count, 1 - math.sqrt(2) / count) if count > 2 else ():
            yield decay, average(checkpoints, model, decay)

    for key, mean in candidates():
        load_into(model, mean)
        losses[key] = _measured(model, loss)
        if key == min(losses, key=losses.get):  # the first of equals
            best = mean
    load_into(model, best)
    return Start(best, losses)


def start_name(key: float, count: int) -> str:
    """The name of an average of a window of `count` checkpoints, by its key as in `Start`."""
    if key < 1:
        return f"EMA {key:.2f}"
    return {count: "SWA", 1: "last"}.get(key, f"mean of last {key}")


def rate_of(steps: int, samples: float = math.inf, unit: str = "direction") -> float:
    """The learning rate of AdamW for a training of this length, to decay linearly to 0.

    Longer trainings can move further, from 0.02 up: with the square root of the steps to at most
    0.1 if the unit is each direction's standard deviation, with the steps to at most 0.14 if it is
    the block's. What few samples can teach is learned near the start; further away they are
    memorised. So with N samples the rate is at most 0.02 (unit "block": 0.04) times √(N / 1000), or
    0.02.

    Args:
        steps: of the whole training.
        samples: in the training set. Infinite (the default) if none is seen many times, as in the
            text of a language model.
        unit: see `Subspace`.

    Raises:
        ValueError: there is no such unit, or a number is negative.
    """
    if unit not in UNITS:
        raise ValueError(f"unit must be one of {', '.join(UNITS)}, not {unit!r}")
    if steps < 0 or samples < 0:
        raise ValueError(f"steps and samples must not be negative, not {steps} and {samples}")
    root = math.sqrt(samples / 1000)
    if unit == "block":
        growth = min(steps / 50, 2 * root, 7)
    else:
        growth = min(math.sqrt(steps / 25), root, 5)
    return RATE * max(1, growth)


class Recipe:
    """A TWA training from its start point to the best of what came out.

        recipe = Recipe(model, checkpoints, loss, steps=steps, samples=len(train_set))
        optimizer = recipe.optimizer()
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, steps)
        for images, labels in batches:  # steps of them
            criterion(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        recipe.finish()

    - Start: the best average of the last checkpoints by `loss` (`best_start`).
    - Granularity: one set of coefficients for the model in fewer than 50 steps, one for each output
      channel from there on. Always one with SGD and others, and in the paper's coordinates.
    - Unit: with Adam or AdamW by layer or channel, in 50 steps or more on samples that are seen
      again and again, the block's standard deviation; otherwise that of each direction.
    - Learning rate: `rate_of` for Adam and AdamW, 0.1 for SGD.
    - Final iterate: `finish` moves the model to the best of the last iterate, the mean of the
      coefficients over the last half of the training, and the start.

    It has `state_dict` and `load_state_dict`, to resume with. To make it again without the search,
    pass the found `key` as `start`; load the model's own state after `optimizer` was called.

    Args:
        model: the module to train; see `TWA`.
        checkpoints: paths or `state_dict`s, in the order of training.
        loss: the loss of the current model on a sample of training data; see `best_start`.
        steps: optimizer steps of the whole training.
        samples: in the training set; infinite if none is seen many times. See `rate_of`.
        start: where to begin instead of searching: the key of an average as in `Start`, or what
            `TWA` takes (a path, a `state_dict`, the model itself).
        granularity: "auto", as above, or "model", "layer" or "channel".

    Attributes:
        granularity: as given, or once `optimizer` was called what "auto" has become.
        start: the key of the start point, or what was given for it.
        start_losses: the losses that `best_start` compared; {} if it did not search.
        end_losses: the losses that `finish` compared, by name.

    Raises:
        CheckpointError, ValueError: as `best_start` and `TWA`.
    """

    def __init__(
        self,
        model: nn.Module,
        checkpoints: Iterable[Checkpoint],
        loss: Callable[[], float],
        *,
        steps: int,
        samples: float = math.inf,
        start: float | Checkpoint | nn.Module | None = None,
        granularity: str = "auto",
    ):
        if granularity not in ("auto", *GRANULARITIES):
            allowed = ", ".join(("auto", *GRANULARITIES))
            raise ValueError(f"granularity must be one of {allowed}, not {granularity!r}")
        rate_of(steps, samples)  # refuses negative numbers before anything is read
        self._model, self._checkpoints, self._loss = model, check_window(model, checkpoints), loss
        self._steps, self._samples, self.granularity = steps, samples, granularity
        self.start, self.start_losses, self.end_losses = start, {}, {}
        self._optimizer: TWA | None = None

    def optimizer(
        self, base: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW, **arguments
    ) -> TWA:
        """Finds the start point, and makes the optimizer there.

        Args:
            base: of `TWA`.
            arguments: further ones of `TWA` and `base`, which replace what the recipe would choose:
                `extract`, `components`, `bits`, `unit`, `process_group`, `lr`, `weight_decay`, …
        """
        self.granularity = arguments.pop("granularity", self.granularity)
        start = self.start
        if start is None:
            found = best_start(self._model, self._checkpoints, self._loss)
            self.start, self.start_losses, start = found.key, found.losses, found.state_dict
        elif isinstance(start, int | float):
            start = average_of(start, self._checkpoints, self._model)
        adam, own_units = is_adam(base), arguments.get("extract", "PCA") == "PCA"
        many = adam and own_units and self._steps >= MANY_STEPS
        if self.granularity == "auto":
            self.granularity = "channel" if many else "model"
        if arguments.get("unit") is None:
            block = many and self.granularity != "model" and self._samples < math.inf
            arguments["unit"] = "block" if block else "direction"
        if own_units and arguments.get("lr") is None:
            arguments.pop("lr", None)
            if adam and "lr" not in getattr(base, "keywords", {}):
                arguments["lr"] = rate_of(self._steps, self._samples, arguments["unit"])
            elif base is torch.optim.SGD:
                arguments["lr"] = RATE_OF_SGD
        arguments["granularity"] = self.granularity
        optimizer = TWA(self._model, self._checkpoints, base, start=start, **arguments)
        self._optimizer, self._done = optimizer, 0
        self._late_mean = torch.zeros_like(optimizer.coefficients)
        # Without a reference cycle, which would keep basis and model in memory.
        follow = weakref.WeakMethod(self._follow)
        optimizer.register_step_post_hook(lambda *_: follow() and follow()())
        return optimizer

    @torch.no_grad()
    def _follow(self) -> None:
        """Takes the coefficients of a step of the last half into their mean."""
        self._done += 1
        late = self._done - self._steps // 2
        if late > 0:
            self._late_mean += (self._optimizer.coefficients - self._late_mean) / late

    def finish(self, loss: Callable[[], float] | None = None) -> dict[str, float]:
        """Moves the model to the best of last iterate, late mean and start; returns their losses.

        With the paper's coordinates ("Schmidt") the last iterate stays, and nothing is compared.
        The buffers are those that `loss` has left at the best point, such as batch norm's
        statistics if it re-estimates them.

        Args:
            loss: as of the recipe, on other samples if there are enough: the start has an unfair
                advantage on the samples that chose it. Ranks take the first one's losses.

        Raises:
            RuntimeError: there is no optimizer yet.
        """
        if self._optimizer is None:
            raise RuntimeError("call optimizer() first")
        optimizer, loss = self._optimizer, loss or self._loss
        if optimizer.subspace.scale is None:
            return {}
        points = {
            "end": optimizer.coefficients.detach().clone(),
            "mean of the last half": self._late_mean,
            "start": optimizer.origin,
        }
        buffers = {}
        for name, coefficients in points.items():
            optimizer.set_coefficients(coefficients)
            self.end_losses[name] = optimizer.of_first_rank(_measured(self._model, loss))
            buffers[name] = [buffer.clone() for buffer in self._model.buffers()]
        best = min(self.end_losses, key=self.end_losses.get)  # the first of equals
        optimizer.set_coefficients(points[best])
        with torch.no_grad():
            for buffer, value in zip(self._model.buffers(), buffers[best], strict=True):
                buffer.copy_(value)
        return self.end_losses

    def state_dict(self) -> dict:
        """The late mean, float32 [len(optimizer.subspace)], and the steps that are done."""
        return {"done": self._done, "mean": self._late_mean.clone()}

    def load_state_dict(self, state: dict) -> None:
        """Restores `state_dict`, after `optimizer` was called."""
        self._done = state["done"]
        self._late_mean.copy_(state["mean"])


def average_of(key: float, checkpoints: list[Checkpoint], model: nn.Module) -> dict[str, Tensor]:
    """The average of the last `checkpoints` with this key, as in `Start`.

    Raises:
        ValueError: the key is neither a decay in (0, 1) nor a number of the checkpoints.
    """
    if 0 < key < 1:
        return average(checkpoints, model, key)
    if key != int(key) or not 1 <= key <= len(checkpoints):
        raise ValueError(
            f"start {key} is neither a decay between 0 and 1 nor a number of the "
            f"{len(checkpoints)} checkpoints"
        )
    return average(checkpoints[-int(key) :], model)


def _measured(model: nn.Module, loss: Callable[[], float]) -> float:
    """`loss()`, infinite if it is not finite; the modules keep their modes."""
    with torch.no_grad(), _modes_restored(model):
        value = float(loss())
    return value if math.isfinite(value) else math.inf


@contextlib.contextmanager
def _modes_restored(model: nn.Module) -> Iterator[None]:
    """Context after which every module is in training or evaluation mode as before."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
