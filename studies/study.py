"""A finished SGD run, its checkpoints, and ways to train on from them: what the studies measure."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import utils
from training import data, logs
from training.coefficients import LateMean, keep_best, unit_of
from training.loop import autocast, build, evaluate, reestimate_bn, sample_loss
from training.optimizers import SCHEDULES, schedule_of
from twa import TWA, best_start, rate_of
from twa.files.checkpoints import Checkpoint, average, load_into, load_state_dict

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "studies/results"  # what was measured, small, in the repository
WORK = ROOT / "results/evidence"  # checkpoints and logs
EPOCHS, HEAD = 24, 12  # of the full run, and of those that leave the checkpoints
SAVES, EVERY = 20, 4  # checkpoints an epoch, of which every fourth is in a window: five an epoch
BATCH = 128  # images a step
VALIDATION = 10_000  # training images, the last ones, that settings are chosen by
TUNED_ON = 4_000  # of these, the first ones, that the rival's rate is tuned on


@dataclass(frozen=True)
class Data:
    """A training set: the first images of FashionMNIST."""

    images: int

    @property
    def steps(self) -> int:
        """Steps in an epoch."""
        return math.ceil(self.images / BATCH)


DATA = {"FashionMNIST-12k": Data(12_000)}


class Bench:
    """A finished SGD run, its checkpoints, the data, and the measurements made so far.

    Args:
        part: the part of the studies that measures, by its name in `evidence.PARTS`.
        name: the training set, by its name in `DATA`.
        arch: an architecture that `models.build` knows.
        seed: of the SGD run and of everything after it.
        data_dir: the folder of FashionMNIST.
        chooses: measure on the last training images, which a run on part of them never saw, in
            place of the test images.

    Attributes:
        model: the model that is trained.
        train, judge: the loaders that it is trained and measured on.
        records: the entries by name.
        tuned_on: validation images that the rate of a rival is chosen by.
    """

    def __init__(
        self, part: str, name: str, arch: str, seed: int, data_dir: Path, chooses: bool = False
    ):
        self.arch, self.seed, self._data = arch, seed, DATA[name]
        study = f"{name}.{arch.rpartition(':')[2]}.{seed}"
        self._folder = WORK / study
        self.path = RESULTS / f"{part}.{study}.json"
        self.path.parent.mkdir(exist_ok=True)
        self.records = json.loads(self.path.read_text()) if self.path.exists() else {}
        self._data_dir = data_dir
        if not all(path.exists() for path in self.window()):
            self.sgd(EPOCHS, SAVES)

        utils.set_seed(seed)
        cpu = torch.device("cpu")
        training, test = data.load("FashionMNIST", self._data_dir, cpu)
        self.train = self._loader(training.part(slice(self._data.images)))
        validation = training.part(slice(-VALIDATION, None))
        judge = validation if chooses else test
        self.judge = data.Loader(judge, 1000, train=False, channels_last=True)
        some = validation.part(slice(TUNED_ON))
        self.tuned_on = data.Loader(some, 1000, train=False, channels_last=True)
        self.model = build(arch, training.spec, cpu, amp=True)

    def _loader(self, split: data.Split) -> data.Loader:
        return data.Loader(split, BATCH, train=True, seed=self.seed, channels_last=True)

    def sgd(self, epochs: int, saves: int) -> list[dict]:
        """The metrics of an SGD run with its whole schedule; trains it unless it is finished."""
        folder = self._folder / f"sgd{epochs}"
        metrics = logs.read_lines(folder / "metrics.jsonl")
        if len(metrics) < epochs:
            command = [sys.executable, ROOT / "train_sgd_cifar.py", "--datasets", "FashionMNIST"]
            command += ["--model-factory" if ":" in self.arch else "--arch", self.arch, "--amp"]
            command += [
                "--images",
                self._data.images,
                "--data-dir",
                self._data_dir,
                "--randomseed",
                self.seed,
                "-p",
                1000,
            ]
            command += ["--batch-size", BATCH, "--epochs", epochs, "--saves-per-epoch", saves]
            command += ["--save-dir", folder, "--log-dir", folder, "--resume"]
            subprocess.run([str(word) for word in command], check=True)
            metrics = logs.read_lines(folder / "metrics.jsonl")
        return metrics

    def end(self, epochs: int, saves: int) -> dict:
        """The entry of such a run, its last checkpoint measured as any other solution."""
        seconds = sum(m["seconds"] for m in self.sgd(epochs, saves))
        last = self._folder / f"sgd{epochs}" / f"{epochs * saves}.pt"
        return self.solution(last) | {"epochs": epochs, "seconds": seconds}

    @cached_property
    def full(self) -> list[dict]:
        """The metrics of the full run, one epoch each."""
        return self.sgd(EPOCHS, SAVES)

    @cached_property
    def best(self) -> tuple[Checkpoint, dict[float, float], float]:
        """The best average of the last checkpoints, the losses compared for it, and the seconds."""
        started = time.perf_counter()
        start, losses = best_start(self.model, self.window(), self.sample_loss)
        return start, losses, time.perf_counter() - started

    def sample_loss(self, last: bool = False) -> float:
        """The loss of the model on a sample of training images, the first ones or the last."""
        return sample_loss(self.model, self.train, True, last)

    def validation_loss(self) -> float:
        """The loss of the model on images that no run is trained on."""
        reestimate_bn(self.model, self.train, True, self.train.sample)
        return evaluate(self.model, self.tuned_on, amp=True)["loss"]

    def window(self, first: int = 0, every: int | None = None) -> list[Path]:
        """Every `every`-th (None: EVERY-th) checkpoint of the head after epoch `first`."""
        every = every or EVERY
        numbers = range(first * SAVES + every, HEAD * SAVES + 1, every)
        return [self._folder / f"sgd{EPOCHS}" / f"{i}.pt" for i in numbers]

    def mean(self, count: int) -> dict[str, Tensor]:
        """The mean of the window's last checkpoints."""
        return average(self.window()[-count:])

    def measure(self, name: str, make: Callable[[], dict]) -> None:
        """Adds what `make` returns as the entry `name`, unless there is one."""
        if name not in self.records:
            self.records[name] = make()
            logs.write_json(self.records, self.path)
            shown = {k: v for k, v in self.records[name].items() if not isinstance(v, list)}
            print(f"{self.path.stem}: {name}: {shown}", flush=True)

    def judged(self) -> dict:
        """Loss and accuracy of the model's weights, batch norm re-estimated."""
        reestimate_bn(self.model, self.train, amp=True)
        return evaluate(self.model, self.judge, amp=True)

    def solution(self, checkpoint: Checkpoint) -> dict:
        """The entry of a checkpoint: its loss and accuracy, as `judged` measures them."""
        load_into(self.model, checkpoint)
        return self.judged() | {"epochs": HEAD}

    def trained(self, method: Method, epochs: float = 1) -> dict:
        """The entry of a method after as many steps as `epochs` epochs of the training set have."""
        entry = self.spend(method, epochs)
        return self.judged() | entry

    def steps_of(self, epochs: float) -> int:
        return max(1, round(epochs * len(self.train)))

    def spend(self, method: Method, epochs: float) -> dict:
        """Trains as `trained` does; returns the entry without loss and accuracy."""
        load_into(self.model, method.start(self))
        started = time.perf_counter()
        optimizer = method.optimizer(self)
        build_seconds = time.perf_counter() - started
        steps = self.steps_of(epochs)
        late = LateMean(optimizer, steps) if method.keeps_best else None
        loss = fit(self.model, self.train, optimizer, steps, method.schedule)
        entry = {"epochs": HEAD + epochs, "train_loss": loss, "build_seconds": build_seconds}
        if late:
            _, losses, seconds = self.best
            starts = {str(count): loss for count, loss in losses.items()}
            entry |= {"starts": starts, "start_seconds": seconds}
            started -= seconds
            entry["ends"] = keep_best(optimizer, late, lambda: self.sample_loss(last=True))
        entry["seconds"] = time.perf_counter() - started
        if isinstance(optimizer, TWA):
            entry["lr"] = optimizer.defaults["lr"]
        return entry


@dataclass(frozen=True)
class Method:
    """A way to spend epochs after the head.

    Attributes:
        optimizer: makes the optimizer, from the bench, whose model is at the start point.
        start: makes the start point from the bench.
        schedule: of the rate, by its name in `SCHEDULES`.
        keeps_best: hand over the best of start, end and late mean by loss on training images, and
            count the seconds of choosing start and end; of TWA alone.
    """

    optimizer: Callable[[Bench], torch.optim.Optimizer]
    start: Callable[[Bench], Checkpoint] = lambda bench: bench.mean(10)
    schedule: str = "linear"
    keeps_best: bool = False


def fit(
    model: nn.Module,
    loader: data.Loader,
    optimizer: torch.optim.Optimizer,
    steps: int,
    schedule: str,
) -> float:
    """Trains as `train_steps` does; returns the mean loss of the last tenth of the steps."""
    losses = list(train_steps(model, loader, optimizer, steps, schedule))
    return float(torch.stack(losses[-max(1, steps // 10) :]).mean())


def train_steps(
    model: nn.Module,
    loader: data.Loader,
    optimizer: torch.optim.Optimizer,
    steps: int,
    schedule: str,
    warmup: int = 0,
    amp: bool = True,
) -> Iterator[Tensor]:
    """Trains for `steps` steps, from epoch 1 of the loader on; yields the loss after each."""
    scheduler = schedule_of(SCHEDULES[schedule], optimizer, steps, warmup)
    for images, labels in islice(loader.endless(), steps):
        model.train()  # whoever takes the loss may evaluate in between
        loss = loss_of(model, images, labels, amp=amp)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        yield loss


def loss_of(
    model: nn.Module, images: Tensor, labels: Tensor, share: float = 1.0, amp: bool = True
) -> Tensor:
    """Adds `share` of the mean loss's gradient to the model's; returns that share of the loss."""
    with autocast(images.device, amp):
        loss = F.cross_entropy(model(images).flatten(0, -2), labels) * share
    loss.backward()
    return loss.detach()


def sgd(bench: Bench, lr: float = 0.05) -> torch.optim.Optimizer:
    """SGD on all weights, at half the rate of the head if no other is given."""
    return torch.optim.SGD(bench.model.parameters(), lr, momentum=0.9, weight_decay=1e-4)


def in_spread(epochs: float, granularity: str = "model", unit: str | None = None) -> Method:
    """TWA in units of the window's spread; without `unit` as the scripts have it."""

    def make(bench: Bench) -> TWA:
        steps, samples = bench.steps_of(epochs), len(bench.train.split)
        of = unit or unit_of(granularity, steps, samples)
        settings = {"unit": of, "lr": rate_of(steps, samples, of)}
        start = bench.best[0]
        return TWA(bench.model, bench.window(), start=start, granularity=granularity, **settings)

    return Method(make, lambda bench: bench.best[0], keeps_best=True)


def ema(rate: float, count: int) -> list[float]:
    """The coefficients of an exponential moving average over `count` checkpoints, oldest first."""
    powers = [rate**age for age in reversed(range(count))]
    return [powers[0], *((1 - rate) * power for power in powers[1:])]


def weighted(window: Sequence[Path], alpha: Sequence[float]) -> dict[str, Tensor]:
    """Σ α_i w_i over the window."""
    total: dict[str, Tensor] = {}
    for path, weight in zip(window, alpha, strict=True):
        for key, tensor in load_state_dict(path).items():
            total[key] = total.get(key, 0) + weight * tensor.double()
    return {key: tensor.float() for key, tensor in total.items()}
