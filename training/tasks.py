"""What a script trains and tests on: `of` makes the `Task` for arrays, image folders or text."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import nn

from training import data, image_folders, ranks, text
from training.loop import build, evaluate, reestimate_bn, sample_loss
from utils import UserError, choose_device

Parts = tuple[Any, Any, Any]  # splits: to train on, held out (None: nothing is), to test on


class Task:
    """The data, the model and the measures that the settings ask for; here for arrays of images.

    Under `torchrun` the ranks meet here, and each loads its share of every batch.

    Args:
        args: the script's settings.
        on_held_out: with `--split`, whether `train` is the held-out part instead of the rest.

    Attributes:
        unit: what training is counted in: "epochs" or "steps".
        title: names the model and the data set.
        quality: the metric that figures show: "accuracy" or "loss".
        baseline: the optimizer of all weights that leaves the checkpoints, for tables.
        top5: whether the accuracy among the five best classes is measured, too.
        bn_images: on how many images `measure` re-estimates batch norm; None: on all.
        training, held_out: the two parts of the training set; without `--split` the second is None,
            but for text, whose files decide.
        train_set: of these what `train` iterates over.
        samples: how many different samples it has; infinite for text.

    Raises:
        UserError: the device or the data set is not available, or the batch does not divide among
            the ranks.
    """

    unit, quality, baseline = "epochs", "accuracy", "SGD"
    top5 = False
    bn_images: int | None = None
    loader_type: type[data.Loader] = data.Loader
    test_batch_size: int | None = 1000  # None: as for training

    def __init__(self, args, on_held_out: bool = False):
        several = ranks.local_world() > 1
        self.device = choose_device(args.device, ranks.local_rank() if several else None)
        ranks.start(self.device)
        world = ranks.world()
        if args.batch_size % world:
            raise UserError(
                f"--batch-size {args.batch_size}: does not divide among {world} ranks; "
                f"give a multiple of {world}"
            )
        self.amp, self._compile, self._arch = args.amp, args.compile, args.arch
        self.title = f"{args.arch} on {args.datasets}"
        self._batch_size, self._skipped = args.batch_size, set()
        self._how = {"seed": args.randomseed, "rank": ranks.rank(), "world": world}
        self._how |= self._loading(args)
        self.training, self.held_out, self._test_set = self._parts(args)
        on_held_out = on_held_out and args.split
        self._share = args.val_ratio / 100 if on_held_out and args.val_ratio else 1
        self.train_set = self.held_out if on_held_out else self.training
        if args.images:
            self.train_set = self.train_set.part(slice(args.images))
        self.samples: float = len(self.train_set)

    def _loading(self, args) -> dict[str, Any]:
        """The further arguments of loaders."""
        return {"channels_last": args.amp, "randaugment": args.randaugment}

    def _parts(self, args) -> Parts:
        with first_on_machine():
            train, test = data.load(args.datasets, args.data_dir, self.device)
        held_out = None
        if args.split:
            train, held_out = train.hold_out(args.val_ratio, args.randomseed)
        return train, held_out, test

    def loader(self, split, train: bool, **changes) -> data.Loader:
        """A loader of `split`, with some arguments of its class changed."""
        size = self._batch_size if train else self.test_batch_size or self._batch_size
        loader = self.loader_type(split, size, train=train, **self._how | changes)
        loader.skipped = self._skipped
        return loader

    @cached_property
    def train(self) -> data.Loader:
        return self.loader(self.train_set, train=True)

    @cached_property
    def test(self) -> data.Loader:
        return self.loader(self._test_set, train=False)

    def build(self, shard: Callable[[nn.Module, torch.device], bool] | None = None) -> nn.Module:
        """A freshly initialised model for the data; see `loop.build`."""
        spec = self.training.spec
        return build(self._arch, spec, self.device, self.amp, self._compile, shard)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """The metrics on the test set, with batch norm's running statistics."""
        return self.test.measures(evaluate(model, self.test, self.amp, self.top5))

    def reestimate_bn(self, model: nn.Module) -> None:
        """Re-estimates batch norm's running statistics; see `loop.reestimate_bn`."""
        reestimate_bn(model, self.train, self.amp, self.bn_images)

    def measure(self, model: nn.Module) -> dict[str, float]:
        """The metrics on the test set, batch norm re-estimated for the current weights."""
        self.reestimate_bn(model)
        return self.evaluate(model)

    def loss(self, model: nn.Module, last: bool = False) -> float:
        """The loss on a training sample, which chooses start and end; see `loop.sample_loss`."""
        return sample_loss(model, self.train, self.amp, last)

    def cost(self, epochs: int, steps: int) -> dict[str, float]:
        """What so many epochs on `train`, of so many steps in all, cost in `unit`."""
        return {"epochs": epochs * self._share}

    def check_run(self, arguments: Mapping) -> None:
        """Raises a `UserError` if the run that left the checkpoints does not go with the data.

        Args:
            arguments: of that run; {} if nothing is known of it.
        """

    def skipped(self) -> str | None:
        """A line that counts the images that any rank skipped and names the first, or None."""
        files = sorted(set().union(*ranks.gather(self._skipped)))
        if not files:
            return None
        more = ", …" if len(files) > 5 else ""
        return f"skipped {len(files)} images that cannot be read: {', '.join(files[:5])}{more}"


class ImageFolders(Task):
    """Folders of image files, which worker processes decode."""

    top5 = True
    # Re-estimating batch norm on all of ImageNet would take a third of an epoch per solution.
    bn_images = 100_000
    loader_type, test_batch_size = image_folders.Loader, None

    def _loading(self, args) -> dict[str, Any]:
        decoding = {"device": self.device, "workers": args.workers, "strict": args.strict_images}
        return super()._loading(args) | decoding

    def _parts(self, args) -> Parts:
        train, test = image_folders.load(args.data_dir, args.image_size)
        if args.split:  # both parts are in random order
            return *train.hold_out(args.val_ratio, args.randomseed), test
        if args.images:  # files are listed class by class
            train = train.sample(args.images, args.randomseed)
        return train, None, test


class Text(Task):
    """Text, of which models predict the next token."""

    unit, quality, baseline = "steps", "loss", "AdamW"
    loader_type, test_batch_size = text.Loader, None

    def __init__(self, args, on_held_out: bool = False):
        super().__init__(args, on_held_out)
        self.samples, self._tokenizer = math.inf, args.tokenizer
        self._vocabulary = args.vocabulary

    def _loading(self, args) -> dict[str, Any]:
        return {"device": self.device, "steps": args.epoch_steps}

    def _parts(self, args) -> Parts:
        with first_on_machine():
            vocabulary = text.Vocabulary.read(args.tokenizer)
            return text.load(args.data_dir, vocabulary, args.context)

    def cost(self, epochs: int, steps: int) -> dict[str, float]:
        return {"steps": steps}

    def check_run(self, arguments: Mapping) -> None:
        if arguments.get("vocabulary", self._vocabulary) != self._vocabulary:
            given = f"--tokenizer {self._tokenizer}" if self._tokenizer else "no --tokenizer"
            wanted = arguments.get("tokenizer") or "none, for bytes"
            raise UserError(
                f"{given}: the checkpoints' run had another vocabulary; give its own: {wanted}"
            )


def of(args, on_held_out: bool = False) -> Task:
    """The task for the data set that the settings name; see `Task`."""
    kinds = {image_folders.NAME: ImageFolders, text.NAME: Text}
    return kinds.get(args.datasets, Task)(args, on_held_out)


@contextlib.contextmanager
def first_on_machine() -> Iterator[None]:
    """Context that the first rank of each machine leaves before the others enter.

    It writes the files that are missing.
    """
    if ranks.local_rank() > 0:
        ranks.barrier()
    yield
    if ranks.local_rank() == 0:
        ranks.barrier()
