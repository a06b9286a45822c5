"""What every training script does: train an epoch, evaluate, re-estimate batch norm."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

from training import data, ranks, text
from training.logs import format_metric
from training.optimizers import schedule_of
from twa import TWA
from twa.checkpoints import NotFiniteError
from utils import UserError


def autocast(device: torch.device, amp: bool) -> torch.autocast:
    """bfloat16 autocast on `device` if `amp`, else a context that does nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=amp)


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def build(
    arch: str,
    spec: data.Spec | text.Spec,
    device: torch.device,
    amp: bool = False,
    compiled: bool = False,
    shard: Callable[[nn.Module, torch.device], bool] | None = None,
) -> nn.Module:
    """The model of this name for a data set, freshly initialised, on `device`.

    Args:
        amp: whether it is laid out for bfloat16, with its channels last.
        compiled: whether it is compiled.
        shard: shards the model among the ranks on the device, or does not, and says whether it
            did; None: each rank has a whole one.

    Raises:
        UserError: the architecture is not known, or does not take such samples.
    """
    model = spec.model(arch)
    if not (shard and shard(model, device)):  # FSDP2 takes contiguous weights only
        model.to(device, memory_format=torch.channels_last if amp else torch.contiguous_format)
    if compiled:
        model.compile()
    return model


class Totals:
    """Sums of loss and hits, kept on the device: adding a batch does not wait for it.

    Args:
        top5: whether to count labels among the five best classes, too.
        sums: those to continue from, as `self.sums`, float32 [4].
    """

    def __init__(self, device: torch.device, top5: bool = False, sums: Tensor | None = None):
        self._top5 = top5
        self.sums = torch.zeros(4, device=device) if sums is None else sums.to(device, copy=True)

    @torch.no_grad()
    def add(self, loss: Tensor, outputs: Tensor, labels: Tensor) -> None:
        """Adds a batch: `loss` its sum, `outputs` [B, classes], `labels` [B]; -100 is no label."""
        hits, count = (outputs.argmax(1) == labels).sum(), (labels >= 0).sum()
        near = hits
        if self._top5:
            best = outputs.topk(min(5, outputs.shape[1])).indices
            near = (best == labels.unsqueeze(1)).sum()
        self.sums += torch.stack([loss.float(), hits.float(), near.float(), count.float()])

    def read(self) -> dict[str, float]:
        """The means over all ranks: "loss" in nats, "accuracy" and "top5_accuracy" in percent."""
        loss, hits, near, count = map(sum, zip(*ranks.gather(self.sums.tolist()), strict=True))
        totals = {"loss": loss / max(count, 1), "accuracy": 100.0 * hits / max(count, 1)}
        return totals | ({"top5_accuracy": 100.0 * near / max(count, 1)} if self._top5 else {})


@dataclass
class Progress:
    """How far the latest epoch is trained; part of a resumable state.

    Attributes:
        epoch: its number, from 1 on.
        iteration: batches done, whose gradients are in the weights.
        rate: learning rate at the start of the epoch.
        seconds: that its training took so far.
        sums: of `Totals` on this rank, float32 [4].
    """

    epoch: int = 0
    iteration: int = 0
    rate: float = 0.0
    seconds: float = 0.0
    sums: Tensor = field(default_factory=lambda: torch.zeros(4))

    def state_dict(self) -> dict:
        """Called on every rank; the sums are those of all ranks, float32 [ranks, 4]."""
        return vars(self) | {"sums": torch.stack(ranks.gather(self.sums.cpu()))}

    def load_state_dict(self, state: dict) -> None:
        """Raises a `KeyError` where something is missing."""
        vars(self).update({key: state[key] for key in vars(self)})
        everyones = self.sums.view(-1, 4)
        if len(everyones) == ranks.world():
            self.sums = everyones[ranks.rank()].clone()
        else:  # the first rank continues from the sums of all
            self.sums = everyones.sum(0) if ranks.rank() == 0 else torch.zeros(4)


class Diverged(UserError):
    """The loss or the weights have become NaN or infinite."""


@dataclass
class Trainer:
    """Trains and tests epoch by epoch. SGD, SWA and TWA differ in `optimizer` alone.

    On several ranks each computes its share of a batch, and the gradient is that of the whole.

    Args:
        model: whole and the same on all ranks, or sharded by `ranks.shard` and trained by TWA.
        scheduler: stepped after each optimizer step.
        epochs: of the whole training.
        line: takes the lines of the log.
        print_every: iterations between two lines (on a terminal, updates of the bar).
        accumulate: batches whose mean gradient makes one step; the last step of an epoch takes
            those that are left.
        label_smoothing: of the training loss, in [0, 1].
        clip_grad: maximum norm of the gradient of all parameters; None for no clipping.
        top5: whether to measure the accuracy among the five best classes, too.
        name: stands before "epoch 3/10" in the log.
        progress: how far the latest epoch is trained, up to date after every step.
        state: the file of the resumable state, for messages.
    """

    model: nn.Module
    train: data.Loader
    test: data.Loader
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    epochs: int
    line: Callable[[str], None] = print
    amp: bool = False
    print_every: int = 50
    accumulate: int = 1
    label_smoothing: float = 0.0
    clip_grad: float | None = None
    top5: bool = False
    name: str = ""
    progress: Progress = field(default_factory=Progress)
    state: Path | None = None

    @classmethod
    def of(cls, args, model, train, test, optimizer, factor, first: int = 0, **more) -> "Trainer":
        """A trainer for `args.epochs` epochs with the settings in `args`.

        Args:
            factor: of the rate, as in `optimizers.SCHEDULES`; follows `args.warmup_epochs`.
            first: optimizer steps that count as done.
            more: further fields.
        """
        names = ("amp", "accumulate", "label_smoothing", "clip_grad")
        more |= {key: value for key, value in vars(args).items() if key in names}
        trainer = cls(
            *(model, train, test, optimizer, None, args.epochs), print_every=args.print_freq, **more
        )
        warmup = round(vars(args).get("warmup_epochs", 0) * trainer.steps_an_epoch)
        steps = args.epochs * trainer.steps_an_epoch
        trainer.scheduler = schedule_of(factor, optimizer, steps, warmup, first)
        return trainer

    @property
    def steps_an_epoch(self) -> int:
        return math.ceil(len(self.train) / self.accumulate)

    def __post_init__(self):
        # TWA sums n floats in place of the gradient, where FSDP2 does not sum it.
        together = isinstance(self.optimizer, TWA)
        self._forward = self.model if together else ranks.replicate(self.model)

    def epoch(
        self,
        epoch: int,
        after_step: Callable[[int], None] | None = None,
        before_test: Callable[[int], None] | None = None,
    ) -> dict:
        """Trains epoch `epoch` (from 1 on) and tests; returns rate, losses, accuracies, seconds.

        Continues where `progress` says that the epoch has begun.

        Args:
            after_step: called after each optimizer step with the iterations done in this epoch.
            before_test: called with the epoch once its last step is done.

        Raises:
            Diverged: the loss is NaN or infinite, or `after_step` or `before_test` found weights
                that are. The loss is read in every iteration on the CPU, elsewhere with each line
                of the log, as reading waits for the device.
        """
        title = f"{self.name}epoch {epoch}/{self.epochs}"
        if self.progress.epoch != epoch:
            vars(self.progress).update(vars(Progress(epoch)))
            self.progress.rate = self.optimizer.param_groups[0]["lr"]
        trained = Totals(device_of(self.model), self.top5, self.progress.sums)
        if self.progress.iteration < len(self.train):
            try:
                self._train(epoch, title, trained, after_step)
                ranks.average_buffers(self.model)
                if before_test:
                    before_test(epoch)
            except NotFiniteError as error:
                raise self._diverged(
                    f"{title}, iteration {self.progress.iteration}", error
                ) from None
        tested = evaluate(self.model, self.test, self.amp, self.top5)
        self._refuse_divergence(tested["loss"], f"{title}, test")
        trained = self.train.measures(trained.read())
        return {
            "epoch": epoch,
            "rate": self.progress.rate,
            **{f"train_{key}": value for key, value in trained.items()},
            **{f"test_{key}": value for key, value in self.test.measures(tested).items()},
            "seconds": self.progress.seconds,
        }

    def _train(
        self, epoch: int, title: str, totals: Totals, after_step: Callable[[int], None] | None
    ) -> None:
        self.model.train()
        self.train.set_epoch(epoch)
        device = device_of(self.model)
        count, done = len(self.train), self.progress.iteration
        started = time.perf_counter() - self.progress.seconds
        watched = device.type == "cpu" and ranks.world() == 1
        silent = None if ranks.rank() == 0 else True  # None: silent unless on a terminal
        batches = self.train.batches(done)
        bar = tqdm(batches, title, count, leave=False, initial=done, disable=silent)
        for i, (images, labels) in enumerate(bar, start=done + 1):
            with autocast(device, self.amp):
                outputs = self._forward(images).flatten(0, -2)
                loss = F.cross_entropy(
                    outputs, labels, label_smoothing=self.label_smoothing, reduction="sum"
                )
            totals.add(loss, outputs, labels)
            if watched:
                self._refuse_divergence(loss.item(), f"{title}, iteration {i}")
            left = count - (i - 1) // self.accumulate * self.accumulate  # from this step's first on
            # The mean over the batch; gradients are averaged over the ranks, hence their number.
            share = ranks.world() / self.train.labels_in(i - 1)
            (loss * share / min(self.accumulate, left)).backward()
            if i % self.print_every == 0 or i == count:  # before a step whose weights are saved
                so_far = self.train.measures(totals.read())
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
                self.progress.iteration = i
                self.progress.seconds = time.perf_counter() - started
                self.progress.sums = totals.sums
                if after_step:
                    after_step(i)

    def _refuse_divergence(self, loss: float, where: str) -> None:
        if not math.isfinite(loss):
            raise self._diverged(where, f"the loss is {loss}")

    def _diverged(self, where: str, what: object) -> Diverged:
        rate = self.optimizer.param_groups[0]["lr"]
        intact = f" ({self.state} is intact, as saved before)" if self.state else ""
        return Diverged(f"{where}: {what} at rate {rate:.3g}; try a lower --lr{intact}")


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    amp: bool = False,
    top5: bool = False,
) -> dict[str, float]:
    """Mean loss in nats and accuracy in percent over `batches`, in evaluation mode."""
    return score(predict(model, batches, amp), device_of(model), top5)


def score(
    predictions: Iterable[tuple[Tensor, Tensor]], device: torch.device, top5: bool = False
) -> dict[str, float]:
    """Mean loss in nats and accuracy in percent of logits [B, classes] for labels [B]."""
    totals = Totals(device, top5)
    for outputs, labels in predictions:
        totals.add(F.cross_entropy(outputs, labels, reduction="sum"), outputs, labels)
    return totals.read()


@torch.no_grad()
def predict(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], amp: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields logits float32 [B, classes] and labels [B] for each batch, in evaluation mode.

    Of text, B counts the tokens of the batch.
    """
    model.eval()
    device = device_of(model)
    for images, labels in batches:
        with autocast(device, amp):
            outputs = model(images).flatten(0, -2)
        yield outputs.float(), labels


def reestimate_bn(
    model: nn.Module, train: data.Loader, amp: bool = False, images: int | None = None
) -> None:
    """Re-estimates batch norm's running statistics for the current weights of `model`.

    The images are those of epoch 0, which no training uses: the same weights get the same
    statistics whatever was trained before, on any number of ranks.

    Args:
        images: how many to take, in whole batches; None for all of them.
    """
    train.set_epoch(0)
    count = len(train)
    if images is not None:
        count = min(count, math.ceil(images / train.batch_size))
    with autocast(device_of(model), amp):
        update_bn(train.whole_batches(count), model)
    ranks.average_buffers(model)


def sample_loss(
    model: nn.Module, train: data.Loader, amp: bool = False, last: bool = False
) -> float:
    """The loss in nats on `train.sample` images of epoch 0, which no training uses.

    Batch norm is re-estimated on the first ones. Start and end points are chosen by this loss, as
    test data choose nothing.

    Args:
        last: use the last images instead of the first. The best of many start points is biased on
            the images that chose it, and is compared with an end point on others.
    """
    reestimate_bn(model, train, amp, train.sample)
    count = min(len(train), math.ceil(train.sample / train.batch_size))
    first = len(train) - count if last else 0
    return evaluate(model, train.watch(islice(train.batches(first), count)), amp)["loss"]


def describe(metrics: dict[str, float]) -> str:
    """The metrics in one line: `loss 0.1234 accuracy 95.12 % top-5 99.87 %`."""
    names = {"top5_accuracy": "top-5", "bits_a_byte": "bits a byte"}
    return " ".join(f"{names.get(key, key)} {format_metric(key, v)}" for key, v in metrics.items())
