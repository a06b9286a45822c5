"""What every trainer does: set up, train an epoch, evaluate, re-estimate batch norm."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

import data
import models
import utils
from utils import UserError

# The rate's factor at x, the share of the training that is done, in [0, 1).
SCHEDULES: dict[str, Callable[[float], float]] = {
    "step": lambda x: 1.0 if x < 0.5 else 0.1 if x < 0.75 else 0.01,
    "constant": lambda x: 1.0,
    "linear": lambda x: 1.0 - x,
    "cosine": lambda x: 0.5 * (1.0 + math.cos(math.pi * x)),
}


def schedule_of(
    factor: Callable[[float], float], optimizer: torch.optim.Optimizer, steps: int, warmup: int = 0
) -> torch.optim.lr_scheduler.LambdaLR:
    """A schedule to be stepped after each of `steps` optimizer steps, by a factor of progress.

    The rate rises linearly over the first `warmup` steps; the progress is that of the rest.
    """

    def at(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return factor((step - warmup) / max(steps - warmup, 1))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, at)


# By the names of --optimizer: called with (parameters, rate, weight decay, momentum).
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda parameters, lr, weight_decay, momentum: torch.optim.SGD(
        parameters, lr, momentum=momentum, weight_decay=weight_decay
    ),
    "adam": lambda parameters, lr, weight_decay, momentum: torch.optim.Adam(
        parameters, lr, weight_decay=weight_decay
    ),
    "adamw": lambda parameters, lr, weight_decay, momentum: torch.optim.AdamW(
        parameters, lr, weight_decay=weight_decay
    ),
}


def autocast(device: torch.device, amp: bool) -> torch.autocast:
    """bfloat16 autocast on `device` if `amp`, else a context that does nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=amp)


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def set_up(
    args: argparse.Namespace, on_held_out: bool = False
) -> tuple[nn.Module, data.Loader, data.Loader]:
    """The model and the loaders of the training and the test set that the arguments ask for.

    With `--split` the training set is what the split leaves, or the held-out part if `on_held_out`.

    Raises:
        UserError: the device, the data set or a package is not to be had, or the architecture
            cannot take images of this size.
    """
    if args.wandb:
        utils.import_wandb()  # what is missing is said before anything is written
    device = utils.choose_device(args.device)
    train_set, test_set = data.load(args.datasets, args.data_dir, device)
    if args.split:
        rest, held_out = train_set.hold_out(args.val_ratio, args.randomseed)
        train_set = held_out if on_held_out else rest
    train = data.Loader(
        train_set,
        args.batch_size,
        train=True,
        seed=args.randomseed,
        channels_last=args.amp,
        randaugment=args.randaugment,
    )
    test = data.Loader(test_set, 1000, train=False, channels_last=args.amp)
    model = build(args.arch, train_set.spec, device, args)
    return model, train, test


def build(name: str, spec: data.Spec, device: torch.device, args: argparse.Namespace) -> nn.Module:
    """The model of this name for a data set, on `device`, laid out and compiled as asked for.

    Raises:
        UserError: as `models.build`.
    """
    model = models.build(name, spec.classes, spec.channels, spec.size)
    model.to(device, memory_format=torch.channels_last if args.amp else torch.contiguous_format)
    if args.compile:
        model.compile()
    return model


class Totals:
    """Loss and hits, summed on the device and read only when asked: no sync in an iteration."""

    def __init__(self, device: torch.device):
        self._sums = torch.zeros(2, device=device)
        self._count = 0

    @torch.no_grad()
    def add(self, loss: Tensor, outputs: Tensor, labels: Tensor) -> None:
        """Adds a batch: `loss` its mean, `outputs` [B, classes], `labels` [B]."""
        hits = (outputs.argmax(1) == labels).sum()
        self._sums += torch.stack([loss.float() * len(labels), hits.float()])
        self._count += len(labels)

    def read(self) -> dict[str, float]:
        """The mean loss in nats and the accuracy in percent of all that was added."""
        loss, hits = (self._sums / max(self._count, 1)).tolist()
        return {"loss": loss, "accuracy": 100.0 * hits}


@dataclass
class Trainer:
    """One epoch after the other: train, then test. SGD, SWA and TWA differ in `optimizer` alone.

    Args:
        scheduler: stepped after each optimizer step.
        line: takes the lines of the log.
        print_every: iterations between two lines (or updates of the bar, on a terminal).
        accumulate: batches whose mean gradient makes one step; the last step of an epoch takes
            those that are left.
        label_smoothing: of the training loss, in [0, 1].
        clip_grad: largest norm of the gradient, of all parameters together; None for no limit.
        name: what stands before "epoch 3/10" in the log.
    """

    model: nn.Module
    train: data.Loader
    test: data.Loader
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    line: Callable[[str], None]
    epochs: int
    amp: bool = False
    print_every: int = 50
    accumulate: int = 1
    label_smoothing: float = 0.0
    clip_grad: float | None = None
    name: str = ""

    def epoch(self, epoch: int, after_step: Callable[[int], None] | None = None) -> dict:
        """Trains epoch `epoch` (from 1 on) and tests; returns rate, losses, accuracies, seconds.

        Args:
            after_step: called after each optimizer step with the iterations done in this epoch.

        Raises:
            UserError: the loss is NaN or infinite (looked at when a line is due, and in the test).
        """
        started = time.perf_counter()
        title = f"{self.name}epoch {epoch}/{self.epochs}"
        rate = self.optimizer.param_groups[0]["lr"]
        self.train.set_epoch(epoch)
        trained = self._train(title, after_step)
        seconds = time.perf_counter() - started
        tested = evaluate(self.model, self.test, self.amp)
        self._refuse_divergence(tested["loss"], f"{title}, test")
        return {
            "epoch": epoch,
            "rate": rate,
            "train_loss": trained["loss"],
            "train_accuracy": trained["accuracy"],
            "test_loss": tested["loss"],
            "test_accuracy": tested["accuracy"],
            "seconds": seconds,
        }

    def _train(self, title: str, after_step: Callable[[int], None] | None) -> dict[str, float]:
        self.model.train()
        device = device_of(self.model)
        totals = Totals(device)
        count = len(self.train)
        bar = tqdm(self.train, desc=title, leave=False, disable=None)
        for i, (images, labels) in enumerate(bar, start=1):
            with autocast(device, self.amp):
                outputs = self.model(images)
                loss = F.cross_entropy(outputs, labels, label_smoothing=self.label_smoothing)
            totals.add(loss, outputs, labels)
            left = count - (i - 1) // self.accumulate * self.accumulate  # from this step's first on
            (loss / min(self.accumulate, left)).backward()
            if i % self.print_every == 0 or i == count:  # before a step whose weights are saved
                so_far = totals.read()
                self._refuse_divergence(so_far["loss"], f"{title}, iteration {i}")
                bar.set_postfix(so_far)
                if bar.disable and i < count:
                    self.line(f"{title} [{i}/{count}] {describe(so_far)}")
            if i % self.accumulate == 0 or i == count:
                if self.clip_grad is not None:
                    nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad)
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.scheduler.step()
                if after_step:
                    after_step(i)
        return totals.read()

    def _refuse_divergence(self, loss: float, where: str) -> None:
        if not math.isfinite(loss):
            rate = self.optimizer.param_groups[0]["lr"]
            raise UserError(
                f"{where}: the loss is {loss} at rate {rate:.3g}; try a lower --lr "
                "(what was saved at the end of the last epoch stands)"
            )


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    amp: bool = False,
) -> dict[str, float]:
    """The mean loss in nats and the accuracy in percent over `batches`, in evaluation mode."""
    return score(predict(model, batches, amp), device_of(model))


def score(predictions: Iterable[tuple[Tensor, Tensor]], device: torch.device) -> dict[str, float]:
    """The mean loss in nats and the accuracy in percent of logits [B, classes] for labels [B]."""
    totals = Totals(device)
    for outputs, labels in predictions:
        totals.add(F.cross_entropy(outputs, labels), outputs, labels)
    return totals.read()


@torch.no_grad()
def predict(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], amp: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batch by batch, in evaluation mode: logits float32 [B, classes] and labels [B]."""
    model.eval()
    device = device_of(model)
    for images, labels in batches:
        with autocast(device, amp):
            outputs = model(images)
        yield outputs.float(), labels


def reestimate_bn(
    model: nn.Module, train: data.Loader, amp: bool = False, images: int | None = None
) -> None:
    """Batch norm's running statistics, made anew for the weights that `model` holds.

    Always over the draws of epoch 0, which no training uses: the same weights get the same
    statistics whatever was trained before.

    Args:
        images: how many to take, in whole batches; all of them if None.
    """
    train.set_epoch(0)
    batches = None if images is None else math.ceil(images / train.batch_size)
    with autocast(device_of(model), amp):
        update_bn(islice(train, batches), model)


def describe(metrics: dict[str, float]) -> str:
    """`loss 0.1234 accuracy 95.12 %`."""
    return f"loss {metrics['loss']:.4f} accuracy {metrics['accuracy']:.2f} %"
