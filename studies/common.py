"""What the studies share: a model that is trained and measured, averages, records made once."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import utils
from training import data, text
from training.files import write_json
from training.loop import autocast, build, evaluate, reestimate_bn, sample_loss
from training.optimizers import SCHEDULES, schedule_of
from twa import Recipe, best_start
from twa.files.checkpoints import Checkpoint, load_state_dict

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


class Records(dict):
    """The entries of a JSON file by name; each is measured once and written at once."""

    def __init__(self, path: Path):
        super().__init__(json.loads(path.read_text()) if path.exists() else {})
        self.path = path

    def measure(self, name: str, make: Callable[[], dict]) -> None:
        """Adds what `make` returns as the entry `name`, unless it exists."""
        if name not in self:
            # Rounded to what a table or a figure shows.
            text = json.dumps(make())
            self[name] = json.loads(text, parse_float=lambda number: round(float(number), 5))
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self, self.path)
            print(f"{self.path.stem}: {name}: {self[name]}", flush=True)


class Bench:
    """A model, the data that trains it, and how both are measured.

    Args:
        arch: an architecture that `training.loop.build` knows.
        train: the loader of the training set.
        seed: of the model's weights.
        amp: whether to compute in bfloat16 where autocast allows it.
    """

    def __init__(self, arch: str, train: data.Loader, seed: int, amp: bool = True):
        utils.set_seed(seed)
        self.train, self.seed, self.amp = train, seed, amp
        self.samples = math.inf if isinstance(train, text.Loader) else len(train.split)
        self.model = build(arch, train.split.spec, CPU, amp)
        self.start = cache(self._start)

    def _start(self, *window: Path) -> tuple[Checkpoint, dict, float]:
        """The best average of the last checkpoints, the losses compared for it, the seconds."""
        started = time.process_time()
        return *best_start(self.model, window, self.sample_loss), time.process_time() - started

    def sample_loss(self, last: bool = False) -> float:
        """The model's loss on a sample of training data, the first part of it or the last."""
        return sample_loss(self.model, self.train, self.amp, last)

    def measured(self, judge: data.Loader, images: int | None = None) -> dict:
        """Loss and accuracy on `judge`, batch norm re-estimated on the training set or a part."""
        reestimate_bn(self.model, self.train, self.amp, images)
        return evaluate(self.model, judge, self.amp)

    def fit(
        self,
        optimizer: torch.optim.Optimizer,
        steps: int,
        schedule: str = "linear",
        warmup: int = 0,
        after_step: Callable[[int], None] = lambda step: None,
    ) -> None:
        """Trains for `steps` steps, from epoch 1 of the loader on."""
        scheduler = schedule_of(SCHEDULES[schedule], optimizer, steps, warmup)
        for step, (inputs, labels) in enumerate(islice(self.train.endless(), steps), start=1):
            self.model.train()  # `after_step` may have evaluated it
            with autocast(CPU, self.amp):
                loss = F.cross_entropy(self.model(inputs).flatten(0, -2), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            after_step(step)

    def fit_twa(
        self,
        window: Sequence[Path],
        steps: int,
        granularity: str = "model",
        unit: str | None = None,
        start: Checkpoint | None = None,
        after_step: Callable[[int], None] = lambda step: None,
    ) -> dict:
        """Trains coefficients by `Recipe`; the model ends at the best point.

        Args:
            unit: None for the recipe's choice.
            start: None for the best average of the last checkpoints.

        Returns:
            The losses by which start and end were chosen, and seconds of CPU time.
        """
        starts, choosing = {}, 0.0
        if start is None:
            start, starts, choosing = self.start(*window)
        started = time.process_time()
        how = {"steps": steps, "samples": self.samples, "granularity": granularity}
        recipe = Recipe(self.model, window, self.sample_loss, start=start, **how)
        optimizer, built = recipe.optimizer(unit=unit), time.process_time()
        self.fit(optimizer, steps, after_step=after_step)
        trained = time.process_time()
        ends = recipe.finish(lambda: self.sample_loss(last=True))
        choosing += time.process_time() - trained
        seconds = {"building": built - started, "training": trained - built}
        return {
            "steps": steps,
            "lr": optimizer.defaults["lr"],
            "coefficients": len(optimizer.coefficients),
            "seconds": {"choosing": choosing, **seconds},
            "starts": {str(name): loss for name, loss in starts.items()},
            "ends": ends,
        }


def images(
    split: data.Split, batch: int, train: bool, seed: int = 0, amp: bool = True
) -> data.Loader:
    """A loader of images."""
    return data.Loader(split, batch, train=train, seed=seed, channels_last=amp)


class Evenly(text.Loader):
    """Windows of a text that lie evenly over all of it."""

    def __init__(self, split: text.Split, windows: int):
        super().__init__(split, 32, train=False, device=CPU)
        self._stride = max(1, self.count // windows)
        self.count //= self._stride

    def _load(self, parts: Iterable[slice]) -> Iterator[tuple[Tensor, Tensor]]:
        by = self._stride
        return super()._load(slice(part.start * by, part.stop * by, by) for part in parts)


def clip(optimizer: torch.optim.Optimizer, parameters: list[Tensor]) -> None:
    """Clips the gradient before each step, as the runs on text do."""

    def before(*_) -> None:
        nn.utils.clip_grad_norm_(parameters, 1.0)

    optimizer.register_step_pre_hook(before)


def sgd(model: nn.Module, lr: float = 0.05) -> torch.optim.SGD:
    """SGD on all weights, at half the rate of the head unless another is given."""
    return torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=1e-4)


def call_script(name: str, *words: object) -> None:
    """Runs a script of the project, by its path in the repository."""
    subprocess.run([sys.executable, str(ROOT / name), *map(str, words)], cwd=ROOT, check=True)


def ema(rate: float, count: int) -> list[float]:
    """The coefficients of an exponential moving average over `count` checkpoints, oldest first."""
    powers = [rate**age for age in reversed(range(count))]
    return [powers[0], *((1 - rate) * power for power in powers[1:])]


def of_decay(shape: str, count: int) -> list[float]:
    """The coefficients of checkpoints that stand for a decay of the rate over them, oldest first.

    WSM (Tian et al., 2025): the mean `Σ c_j w_j` is the first checkpoint plus the steps after it,
    those between checkpoint i and i + 1 weighted by `Σ_{j>i} c_j`, as if the rate had been so much
    lower there. For the linear decay all coefficients are equal.
    """
    rates = [*(SCHEDULES[shape](i / count) for i in range(count)), 0.0]
    return [rates[i] - rates[i + 1] for i in range(count)]


def weighted(window: Sequence[Path], alpha: Sequence[float]) -> dict[str, Tensor]:
    """Σ α_i w_i over the window."""
    total: dict[str, Tensor] = {}
    for path, weight in zip(window, alpha, strict=True):
        for key, tensor in load_state_dict(path).items():
            total[key] = total.get(key, 0) + weight * tensor.double()
    return {key: tensor.float() for key, tensor in total.items()}
