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
from training.logs import told
from training.optimizers import schedule_of
from twa import TWA
from twa.files.checkpoints import NotFiniteError
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
    """Loss and hits, summed on the device and read only when asked: no sync in an iteration.

    Args:
        top5: whether to tell how often the label is among the five best classes, too.
        sums: those of other totals to go on from, as `self.sums`.
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
        """The mean loss in nats and the accuracy in percent of all that was added on any rank.

        By the names "loss", "accuracy" and, if asked for, "top5_accuracy".
        """
        loss, hits, near, count = map(sum, zip(*ranks.gather(self.sums.tolist()), strict=True))
        totals = {"loss": loss / max(count, 1), "accuracy": 100.0 * hits / max(count, 1)}
        return totals | ({"top5_accuracy": 100.0 * near / max(count, 1)} if self._top5 else {})


@dataclass
class Progress:
    """How far an epoch is trained: what a run goes on from that was stopped within it.

    Attributes:
        iteration: batches done; all that they gave is in the weights, after an optimizer step.
        rate: at the epoch's start.
        seconds: that they took.
        sums: what `Totals` has summed on this rank, float32 [4].
    """

    iteration: int = 0
    rate: float = 0.0
    seconds: float = 0.0
    sums: Tensor = field(default_factory=lambda: torch.zeros(4))

    def state_dict(self) -> dict:
        """Called on every rank; the sums are those of all, float32 [ranks, 4]."""
        return vars(self) | {"sums": torch.stack(ranks.gather(self.sums.cpu()))}

    def load_state_dict(self, state: dict) -> None:
        """Raises a `KeyError` where something is missing."""
        vars(self).update({key: state[key] for key in vars(self)})
        everyones = self.sums.view(-1, 4)
        if len(everyones) == ranks.world():
            self.sums = everyones[ranks.rank()].clone()
        else:  # The first rank goes on with the sums of all.
            self.sums = everyones.sum(0) if ranks.rank() == 0 else torch.zeros(4)

    def reset(self) -> None:
        """Sets out for another epoch."""
        vars(self).update(vars(Progress()))


class Diverged(UserError):
    """The training left the finite numbers."""


@dataclass
class Trainer:
    """One epoch after the other: train, then test. SGD, SWA and TWA differ in `optimizer` alone.

    On several ranks the gradient is that of the whole batch, of which each computes its share.

    Args:
        model: whole, and the same on all ranks, or sharded by `ranks.shard` and its optimizer TWA.
        scheduler: stepped after each optimizer step.
        epochs: how many there are in all, for the log.
        line: takes the lines of the log.
        print_every: iterations between two lines (or updates of the bar, on a terminal).
        accumulate: batches whose mean gradient makes one step; the last step of an epoch takes
            those that are left.
        label_smoothing: of the training loss, in [0, 1].
        clip_grad: largest norm of the gradient, of all parameters together; None for no limit.
        top5: whether the accuracy among the five best classes is reported, too.
        name: what stands before "epoch 3/10" in the log.
        progress: kept up to date, so that it can be saved after any step; what it holds is gone
            on from.
        state: where resumable states are saved: what stands if the training diverges.
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
        """A trainer for `args.epochs` epochs, with what else the flags in `args` say of it.

        Args:
            factor: of the rate, as in `optimizers.SCHEDULES`; behind `args.warmup_epochs`.
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

    def epoch(self, epoch: int, after_step: Callable[[int], None] | None = None) -> dict:
        """Trains epoch `epoch` (from 1 on) and tests; returns rate, losses, accuracies, seconds.

        An epoch that `progress` says is begun is gone on with.

        Args:
            after_step: called after each optimizer step with the iterations done in this epoch.

        Raises:
            Diverged: the loss is NaN or infinite (looked at in every iteration on the CPU; where
                a look would cost a wait, when a line is due; and in the test), or `after_step`
                found weights that are.
        """
        title = f"{self.name}epoch {epoch}/{self.epochs}"
        if self.progress.iteration == 0:
            self.progress.rate = self.optimizer.param_groups[0]["lr"]
        self.train.set_epoch(epoch)
        trained = self._train(title, after_step)
        rate, seconds = self.progress.rate, self.progress.seconds
        ranks.average_buffers(self.model)
        tested = evaluate(self.model, self.test, self.amp, self.top5)
        self._refuse_divergence(tested["loss"], f"{title}, test")
        self.progress.reset()
        return {
            "epoch": epoch,
            "rate": rate,
            **{f"train_{key}": value for key, value in self.train.measures(trained).items()},
            **{f"test_{key}": value for key, value in self.test.measures(tested).items()},
            "seconds": seconds,
        }

    def _train(self, title: str, after_step: Callable[[int], None] | None) -> dict[str, float]:
        self.model.train()
        device = device_of(self.model)
        totals = Totals(device, self.top5, self.progress.sums)
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
                    try:
                        after_step(i)
                    except NotFiniteError as error:
                        raise self._diverged(f"{title}, iteration {i}", error) from None
        return totals.read()

    def _refuse_divergence(self, loss: float, where: str) -> None:
        if not math.isfinite(loss):
            raise self._diverged(where, f"the loss is {loss}")

    def _diverged(self, where: str, what: object) -> Diverged:
        rate = self.optimizer.param_groups[0]["lr"]
        stands = f" ({self.state} stands as it was saved before)" if self.state else ""
        return Diverged(f"{where}: {what} at rate {rate:.3g}; try a lower --lr{stands}")


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
    """Batch by batch, in evaluation mode: logits float32 [B, classes] and labels [B].

    Of a text, B counts the tokens of the batch.
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
    return evaluate(model, islice(train.batches(first), count), amp)["loss"]


def describe(metrics: dict[str, float]) -> str:
    """`loss 0.1234 accuracy 95.12 %`, and `top-5 99.87 %` or what else was measured."""
    names = {"top5_accuracy": "top-5", "bits_a_byte": "bits a byte"}
    return " ".join(f"{names.get(key, key)} {told(key, value)}" for key, value in metrics.items())
