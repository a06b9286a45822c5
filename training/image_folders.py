"""Image folders as ImageNet's: files that worker processes decode and augment, batch by batch.

The folder holds `train/` and `val/`, and each of these a folder per class, with the same names.
"""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from training import data
from utils import UserError

NAME = "ImageNet"  # what --datasets calls an image folder
SIZE = 224  # pixels, what torchvision's models are made for
# What batch norm's statistics are re-estimated on: the whole of ImageNet's training set would take
# as long as a third of an epoch of training, for each solution, and tell no more.
BN_IMAGES = 100_000
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's training images


def load(directory: str | Path, size: int = SIZE) -> tuple[data.Split, data.Split]:
    """The training and the validation set of an image folder, for images of `size` pixels.

    Files are listed, not read; classes are numbered in the order of their folders' names.

    Raises:
        UserError: `train/` or `val/` is missing, a class has no image, or the classes differ.
    """
    train, val = (_listed(Path(directory).expanduser() / part) for part in ("train", "val"))
    odd = sorted(set(train.classes) ^ set(val.classes))
    if odd:
        has, lacks = (train, val) if odd[0] in train.classes else (val, train)
        raise UserError(
            f"{lacks.root}: lacks the class folder {odd[0]} that {has.root} has; "
            "both need the same class folders"
        )
    spec = data.Spec(NAME, len(train.classes), 3, size, padding=0, flip=True, mean=_MEAN, std=_STD)
    return _split(train, spec), _split(val, spec)


def _listed(directory: Path) -> ImageFolder:
    try:
        return ImageFolder(directory)
    except OSError as error:
        reason = " ".join((error.strerror or str(error)).split())
        raise UserError(
            f"{directory}: {reason}; the data directory holds train/ and val/, and each of these "
            "a folder of images per class"
        ) from None


def _split(folder: ImageFolder, spec: data.Spec) -> data.Split:
    # One array of bytes, which worker processes share: of a list each would come to have a copy.
    files = np.array([os.fsencode(file) for file, _ in folder.samples])
    return data.Split(files, torch.tensor(folder.targets), spec)


def transform(size: int, train: bool, randaugment: int = 0) -> v2.Transform:
    """From a PIL image to uint8 [3, size, size]; it draws from torch's global generator.

    Args:
        train: a random part of the image, mirrored or not; otherwise its middle.
        randaugment: strength of RandAugment, 1 to 30, for training; 0 for none.
    """
    if not train:
        middle = [v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size)]
        return v2.Compose([*middle, v2.PILToTensor()])
    # Tensors of uint8 are resized in half the time that PIL takes.
    part = [v2.PILToTensor(), v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
    return v2.Compose([*part, *([v2.RandAugment(magnitude=randaugment)] if randaugment else [])])


def decode(file: str) -> Image.Image:
    """The image in `file`, in RGB.

    Raises:
        OSError: with an `errno`, if the file cannot be opened.
        Exception: of many types, if it is no whole image.
    """
    with warnings.catch_warnings(), open(file, "rb") as stream:
        warnings.simplefilter("ignore")  # of odd metadata
        return Image.open(stream).convert("RGB")


@dataclass(frozen=True)
class _Unread:
    """A file that gave no image, and why; whether it could be opened at all."""

    file: str
    reason: str
    opened: bool


@dataclass(frozen=True)
class _Images(Dataset):
    """What worker processes do: from (index, epoch, position in the epoch) to an image.

    It comes with its label and None; or, if its file is damaged, in the mean colour with the label
    -100 and an `_Unread`.
    """

    split: data.Split
    transform: v2.Transform
    seed: int

    def __getitem__(self, key: tuple[int, int, int]) -> tuple[Tensor, int, _Unread | None]:
        index, epoch, position = key
        file = os.fsdecode(self.split.images[index])
        try:
            image = decode(file)
            with data.seeded(f"{self.seed}/{epoch}/{position}"):
                return self.transform(image), int(self.split.labels[index]), None
        except UnidentifiedImageError:
            unread = _Unread(file, "not an image of a known format", opened=True)
        except Exception as error:  # a damaged image can make its reader fail in any way
            reason = " ".join((getattr(error, "strerror", None) or str(error)).split())
            opened = getattr(error, "errno", None) is None
            unread = _Unread(file, reason or type(error).__name__, opened)
        colour = torch.tensor(self.split.spec.mean).mul(255).round().to(torch.uint8)
        size = self.split.spec.size
        return colour.view(3, 1, 1).repeat(1, size, size), -100, unread


def _collate(samples: list) -> tuple[Tensor, Tensor, list[_Unread]]:
    images, labels, unread = zip(*samples, strict=True)
    return default_collate(images), torch.tensor(labels), [one for one in unread if one]


def _leave_interrupts_to_the_trainer(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # workers end when the trainer does


class _Plan:
    """The batches that the workers are to load next, as lists of the keys of `_Images`."""

    def __init__(self):
        self.epoch, self.order, self.parts = 0, torch.arange(0), []

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        for part in self.parts:
            positions = range(len(self.order))[part]
            indices = self.order[part].tolist()
            yield [(i, self.epoch, p) for i, p in zip(indices, positions, strict=True)]


class Loader(data.Loader):
    """As `data.Loader`, for the files of an image folder: one iteration at a time.

    What is drawn for an image depends on the seed, the epoch and its position there alone, and not
    on the number of workers or ranks.

    A file that can be opened and is no whole image is skipped: an image of the mean colour stands
    in for it, with the label -100, which `cross_entropy` leaves out. The loss of a batch is divided
    by all its images as ever, so that the others weigh what they would have weighed.

    Args:
        device: where the batches go; all other arguments as of `data.Loader`.
        workers: processes that decode and augment; 0 for none but this one.
        strict: stop at the first image that would be skipped.

    Raises:
        UserError: while iterating: a worker process died, or a file cannot be opened or, with
            `strict`, is no whole image.
    """

    def __init__(
        self,
        split: data.Split,
        batch_size: int,
        *,
        train: bool,
        device: torch.device,
        workers: int = 4,
        strict: bool = False,
        seed: int = 0,
        randaugment: int = 0,
        **layout_and_ranks,
    ):
        super().__init__(split, batch_size, train=train, seed=seed, **layout_and_ranks)
        self.device, self.strict = device, strict
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        self.skipped = set()
        self._plan = _Plan()
        self._decoded = DataLoader(
            _Images(split, transform(split.spec.size, train, randaugment), seed),
            batch_sampler=self._plan,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type not in ("cpu", "mps"),  # Apple's memory is one
            collate_fn=_collate,
            worker_init_fn=_leave_interrupts_to_the_trainer,
            generator=torch.Generator(),  # else it would draw from the run's
        )

    def _load(self, parts: Iterable[slice]) -> Iterator[tuple[Tensor, Tensor]]:
        self._plan.epoch, self._plan.order, self._plan.parts = self.epoch, self._order(), parts
        for images, labels, unread in self._batches():
            for one in unread:
                self._skip(one)
            images = images.to(self.device, non_blocking=True)
            yield self._normalise(images), labels.to(self.device, non_blocking=True)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor, list[_Unread]]]:
        """The planned batches, decoded."""
        try:
            batches = iter(self._decoded)
            if hasattr(signal, "SIGCHLD"):  # torch's handler raises wherever the trainer then is
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            yield from batches
        except RuntimeError as error:
            if not self._decoded.num_workers:
                raise
            reason = " ".join(str(error).split())
            raise UserError(
                f"--workers {self._decoded.num_workers}: a process that decodes images failed "
                f"({reason}); try fewer: each needs memory"
            ) from None

    def _order(self) -> Tensor:
        """The indices of the images as they come in this epoch."""
        if not self.train:
            return torch.arange(len(self.split))
        generator = data.generator(f"{self.seed}/{self.epoch}", torch.device("cpu"))
        return torch.randperm(len(self.split), generator=generator)

    def _skip(self, unread: _Unread) -> None:
        if not unread.opened:
            raise UserError(f"{unread.file}: cannot be opened ({unread.reason})")
        if self.strict:
            raise UserError(
                f"{unread.file}: is no whole image ({unread.reason}); replace or remove it, or "
                "leave out --strict-images, which skips such files"
            )
        self.skipped.add(unread.file)
