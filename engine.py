"""What every trainer does: set up, train an epoch, evaluate, re-estimate batch norm."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

import data
import imagefolder
import models
import parallel
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
    factor: Callable[[float], float],
    optimizer: torch.optim.Optimizer,
    steps: int,
    warmup: int = 0,
    first: int = 0,
) -> torch.optim.lr_scheduler.LambdaLR:
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
    return torch.optim.lr_scheduler.LambdaLR(optimizer, at, last_epoch=first - 1)


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
    args: argparse.Namespace, on_held_out: bool = False, shard: bool = False
) -> tuple[nn.Module, data.Loader, data.Loader]:
    """The model and the loaders of the training and the test set that the arguments ask for.

    Under `torchrun` the ranks meet here, and each has its share of every batch.

    Args:
        on_held_out: with `--split`, whether the training set is the part that is held out, and not
            the rest.
        shard: whether the ranks hold the model together (`parallel.shard`) or each a whole one.

    Raises:
        UserError: the device, the data set or a package is not to be had, the architecture cannot
            take images of this size, or the batch does not divide among the ranks.
    """
    if args.wandb:
        utils.import_wandb()  # what is missing is said before anything is written
    device = utils.choose_device(args.device)
    parallel.start(device)
    ranks = {"rank": parallel.rank(), "world": parallel.world()}
    if args.batch_size % ranks["world"]:
        raise UserError(
            f"--batch-size {args.batch_size}: does not divide among {ranks['world']} ranks; "
            f"give a multiple of {ranks['world']}"
        )
    if args.datasets == imagefolder.NAME:
        train_set, test_set = imagefolder.load(args.data_dir, args.image_size)
        test_batch_size = args.batch_size
        loader = partial(
            imagefolder.Loader, device=device, workers=args.workers, strict=args.strict_images
        )
    else:
        with parallel.first_rank_first():
            train_set, test_set = data.load(args.datasets, args.data_dir, device)
        test_batch_size, loader = 1000, data.Loader
    if args.split:
        rest, held_out = train_set.hold_out(args.val_ratio, args.randomseed)
        train_set = held_out if on_held_out else rest
    train = loader(
        train_set,
        args.batch_size,
        train=True,
        seed=args.randomseed,
        channels_last=args.amp,
        randaugment=args.randaugment,
        **ranks,
    )
    test = loader(test_set, test_batch_size, train=False, channels_last=args.amp, **ranks)
    model = build(args.arch, train_set.spec, device, args, shard)
    return model, train, test


def build(
    name: str,
    spec: data.Spec,
    device: torch.device,
    args: argparse.Namespace,
    shard: bool = False,
) -> nn.Module:
    """The model of this name for a data set, on `device`, laid out and compiled as asked for.

    Raises:
        UserError: as `models.build`.
    """
    if spec.name == imagefolder.NAME:
        model = models.imagenet.build(name, spec.classes, spec.size)
    else:
        model = models.build(name, spec.classes, spec.channels, spec.size)
    if shard and parallel.world() > 1:  # FSDP2 takes contiguous weights only.
        parallel.shard(model, device, args.reshard_after_forward)
    else:
        model.to(device, memory_format=torch.channels_last if args.amp else torch.contiguous_format)
    if args.compile:
        model.compile()
    return model


class Totals:
    """Loss and hits, summed on the device and read only when asked: no sync in an iteration.

    Args:
        top5: whether to tell how often the label is among the five best classes, too.
    """

    def __init__(self, device: torch.device, top5: bool = False):
        self._top5 = top5
        self._sums = torch.zeros(4, device=device)

    @torch.no_grad()
    def add(self, loss: Tensor, outputs: Tensor, labels: Tensor) -> None:
        """Adds a batch: `loss` its sum, `outputs` [B, classes], `labels` [B]; -100 is no label."""
        hits, count = (outputs.argmax(1) == labels).sum(), (labels >= 0).sum()
        near = hits
        if self._top5:
            best = outputs.topk(min(5, outputs.shape[1])).indices
            near = (best == labels.unsqueeze(1)).sum()
        self._sums += torch.stack([loss.float(), hits.float(), near.float(), count.float()])

    def read(self) -> dict[str, float]:
        """The mean loss in nats and the accuracy in percent of all that was added on any rank.

        By the names "loss", "accuracy" and, if asked for, "top5_accuracy".
        """
        loss, hits, near, count = parallel.sum_over_ranks(self._sums.clone()).tolist()
        totals = {"loss": loss / max(count, 1), "accuracy": 100.0 * hits / max(count, 1)}
        return totals | ({"top5_accuracy": 100.0 * near / max(count, 1)} if self._top5 else {})


@dataclass
class Trainer:
    """One epoch after the other: train, then test. SGD, SWA and TWA differ in `optimizer` alone.

    On several ranks the gradient is that of the whole batch, of which each computes its share.

    Args:
        model: whole, and the same on all ranks, or sharded by `parallel.shard`.
        scheduler: stepped after each optimizer step.
        line: takes the lines of the log.
        print_every: iterations between two lines (or updates of the bar, on a terminal).
        accumulate: batches whose mean gradient makes one step; the last step of an epoch takes
            those that are left.
        label_smoothing: of the training loss, in [0, 1].
        clip_grad: largest norm of the gradient, of all parameters together; None for no limit.
        top5: whether the accuracy among the five best classes is told, too.
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
    top5: bool = False
    name: str = ""

    def __post_init__(self):
        self._forward = parallel.replicate(self.model)

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
        parallel.average_buffers(self.model)
        tested = evaluate(self.model, self.test, self.amp, self.top5)
        self._refuse_divergence(tested["loss"], f"{title}, test")
        return {
            "epoch": epoch,
            "rate": rate,
            **{f"train_{key}": value for key, value in trained.items()},
            **{f"test_{key}": value for key, value in tested.items()},
            "seconds": seconds,
        }

    def _train(self, title: str, after_step: Callable[[int], None] | None) -> dict[str, float]:
        self.model.train()
        device = device_of(self.model)
        totals = Totals(device, self.top5)
        count = len(self.train)
        silent = None if parallel.rank() == 0 else True  # None: silent unless on a terminal
        bar = tqdm(self.train, desc=title, leave=False, disable=silent)
        for i, (images, labels) in enumerate(bar, start=1):
            with autocast(device, self.amp):
                outputs = self._forward(images)
                loss = F.cross_entropy(
                    outputs, labels, label_smoothing=self.label_smoothing, reduction="sum"
                )
            totals.add(loss, outputs, labels)
            left = count - (i - 1) // self.accumulate * self.accumulate  # from this step's first on
            # The mean over the batch; gradients are averaged over the ranks, hence their number.
            share = parallel.world() / self.train.images_in(i - 1)
            (loss * share / min(self.accumulate, left)).backward()
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
    top5: bool = False,
) -> dict[str, float]:
    """The mean loss in nats and the accuracy in percent over `batches`, in evaluation mode."""
    return score(predict(model, batches, amp), device_of(model), top5)


def score(
    predictions: Iterable[tuple[Tensor, Tensor]], device: torch.device, top5: bool = False
) -> dict[str, float]:
    """The mean loss in nats and the accuracy in percent of logits [B, classes] for labels [B]."""
    totals = Totals(device, top5)
    for outputs, labels in predictions:
        totals.add(F.cross_entropy(outputs, labels, reduction="sum"), outputs, labels)
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
    statistics whatever was trained before, and on however many ranks.

    Args:
        images: how many to take, in whole batches; all of them if None.
    """
    train.set_epoch(0)
    count = len(train)
    if images is not None:
        count = min(count, math.ceil(images / train.batch_size))
    with autocast(device_of(model), amp):
        update_bn(train.whole_batches(count), model)
    parallel.average_buffers(model)


def describe(metrics: dict[str, float]) -> str:
    """`loss 0.1234 accuracy 95.12 %`, and `top-5 99.87 %` where it was measured."""
    text = f"loss {metrics['loss']:.4f} accuracy {metrics['accuracy']:.2f} %"
    if "top5_accuracy" in metrics:
        text += f" top-5 {metrics['top5_accuracy']:.2f} %"
    return text


def skipped_images(*loaders: data.Loader) -> str | None:
    """A line that counts the images that any rank skipped and names the first, or None."""
    mine = set().union(*(loader.skipped for loader in loaders))
    files = sorted(set().union(*parallel.gather(mine)))
    if not files:
        return None
    more = ", …" if len(files) > 5 else ""
    return f"skipped {len(files)} images that cannot be read: {', '.join(files[:5])}{more}"
