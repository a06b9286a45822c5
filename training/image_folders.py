"""Folders of images such as ImageNet's, and the loader whose worker processes decode them.

An image folder contains `train/` and `val/`, and each of these a folder per class.
"""

import hashlib
import os
import signal
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import models
from training import data
from training.flags import IMAGE_FOLDER as NAME
from utils import UserError

SIZE = 224  # pixels
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's training images


class Spec(data.Spec):
    """The constants of an image folder."""

    def model(self, arch: str) -> nn.Module:
        """A freshly initialised model for these images; see `models.imagenet.build`."""
        return models.imagenet.build(arch, self.classes, self.size)


def load(directory: str | Path, size: int = SIZE) -> tuple[data.Split, data.Split]:
    """The training and the validation set of an image folder, for images of `size` pixels.

    Files are listed and not read. Classes are numbered in the order of their folders' names.

    Raises:
        UserError: `train/` or `val/` is missing, a class has no image, or the two have not the same
            classes.
    """
    parts = train, val = [_listed(Path(directory).expanduser() / part) for part in ("train", "val")]
    odd = sorted(set(train.classes) ^ set(val.classes))
    if odd:
        has, lacks = (train, val) if odd[0] in train.classes else (val, train)
        raise UserError(
            f"{lacks.root}: lacks the class folder {odd[0]} that {has.root} has; "
            "both need the same class folders"
        )
    # Not of the files: a damaged one may be removed before the run is resumed.
    digest = hashlib.sha256(os.fsencode("/".join(train.classes))).hexdigest()[:16]
    content = f"of {len(train.classes)} classes, SHA-256 of their names {digest}"
    how = {"padding": 0, "flip": True, "mean": _MEAN, "std": _STD, "content": content}
    spec = Spec(NAME, len(train.classes), 3, size, **how)
    # In an array, because worker processes would copy a list: they count its references.
    files = [np.array([os.fsencode(file) for file, _ in part.samples]) for part in parts]
    labels = [torch.tensor(part.targets) for part in parts]
    return tuple(data.Split(*of_part, spec) for of_part in zip(files, labels, strict=True))


def _listed(directory: Path) -> ImageFolder:
    try:
        return ImageFolder(directory)
    except OSError as error:
        reason = " ".join((error.strerror or str(error)).split())
        remedy = "the data directory holds train/ and val/, and each of these a folder per class"
        raise UserError(f"{directory}: {reason}; {remedy}") from None


def transform(size: int, train: bool, randaugment: int) -> v2.Transform:
    """From a PIL image to uint8 [3, size, size]; it draws from torch's global generator.

    Args:
        train: whether to take a random part of the image and mirror it at random, or its centre.
        randaugment: strength of RandAugment, 1 to 30, for training; 0 for none.
    """
    if not train:
        centre = [v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size)]
        return v2.Compose([*centre, v2.PILToTensor()])
    # Tensors of uint8 are resized in half the time that PIL takes.
    part = [v2.PILToTensor(), v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
    return v2.Compose([*part, *([v2.RandAugment(magnitude=randaugment)] if randaugment else [])])


def decode(file: str) -> Image.Image:
    """The image in `file`, in RGB.

    Raises:
        OSError: with an `errno`, if the file cannot be opened.
        Exception: of many types, if it is damaged.
    """
    with warnings.catch_warnings(), open(file, "rb") as stream:
        warnings.simplefilter("ignore")  # of odd metadata
        return Image.open(stream).convert("RGB")


@dataclass(frozen=True)
class _Unread:
    """A file that could not be read, why, and whether it could be opened."""

    file: str
    reason: str
    opened: bool


@dataclass(frozen=True)
class _Batches(Dataset):
    """What worker processes load: from (epoch, first position in it, indices of images) to a batch.

    An image that cannot be read has the mean colour, the label -100 and an `_Unread`.
    """

    split: data.Split
    transform: v2.Transform
    seed: int

    def __getitem__(self, key: tuple[int, int, np.ndarray]) -> tuple[Tensor, Tensor, list[_Unread]]:
        epoch, first, indices = key
        loaded = [
            self._load(index, f"{self.seed}/{epoch}/{position}")
            for position, index in enumerate(indices, start=first)
        ]
        images, labels, unread = zip(*loaded, strict=True)
        return default_collate(images), torch.tensor(labels), [one for one in unread if one]

    def _load(self, index: int, draws: str) -> tuple[Tensor, int, _Unread | None]:
        file = os.fsdecode(self.split.images[index])
        try:
            image = decode(file)
            with data.seeded(draws):
                return self.transform(image), int(self.split.labels[index]), None
        except Exception as error:  # PIL raises many types
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            if isinstance(error, UnidentifiedImageError):  # whose words name the stream
                reason = "not an image of a known format"
            opened = getattr(error, "errno", None) is None
        colour = torch.tensor(self.split.spec.mean).mul(255).round().to(torch.uint8)
        image = colour.view(3, 1, 1).repeat(1, *(self.split.spec.size,) * 2)
        return image, -100, _Unread(file, " ".join(reason.split()), opened)


def _leave_signals_to_the_trainer(worker: int) -> None:
    """The trainer ends in order, and its workers with it, whichever process a signal reaches first.

    Terminals, `torchrun` and schedulers send it to all of them. A second SIGTERM ends the worker,
    as Python does with those that are left at its exit.
    """
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _: signal.signal(number, signal.SIG_DFL))


@dataclass(eq=False, kw_only=True)
class Loader(data.Loader):
    """As `data.Loader`, for the files of an image folder. Only one iteration runs at a time.

    What is drawn for an image depends on the seed, the epoch and its position there alone.

    A damaged file is skipped: in its place comes an image of the mean colour with the label -100,
    which `cross_entropy` ignores. As the loss of a batch is divided by the number of all its
    images, the weight of the others does not change.

    Attributes:
        device: where the batches go.
        workers: processes that decode and augment; with 0, this one does.
        strict: whether to stop at a damaged file.

    Raises:
        UserError: while iterating: a worker process failed, a file cannot be opened, or it is
            damaged and `strict`.
    """

    device: torch.device
    workers: int = 4
    strict: bool = False

    def __post_init__(self):
        super().__post_init__()
        self.mean, self.std = self.mean.to(self.device), self.std.to(self.device)
        self._keys: list[tuple[int, int, np.ndarray]] = []  # of the batches to be loaded
        drawn = transform(self.split.spec.size, self.train, self.randaugment)
        self._decoded = DataLoader(
            _Batches(self.split, drawn, self.seed),
            batch_size=None,
            sampler=self._keys,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=self.device.type not in ("cpu", "mps"),
            worker_init_fn=_leave_signals_to_the_trainer,
            generator=torch.Generator(),  # not the run's
        )

    def _load(self, parts: Iterable[slice]) -> Iterator[tuple[Tensor, Tensor]]:
        order = self._order()
        self._keys[:] = [(self.epoch, part.start, order[part]) for part in parts]
        for images, labels, unread in self._decode():
            for one in unread:
                self._skip(one)
            images = images.to(self.device, non_blocking=True)
            yield self._normalise(images), labels.to(self.device, non_blocking=True)

    def _decode(self) -> Iterator[tuple[Tensor, Tensor, list[_Unread]]]:
        """The batches of `_keys`."""
        try:
            batches = iter(self._decoded)
            if hasattr(signal, "SIGCHLD"):  # torch's handler would raise outside of this function
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            yield from batches
        except RuntimeError as error:
            if not self.workers:
                raise
            reason = " ".join(str(error).split())
            raise UserError(
                f"--workers {self.workers}: a process that decodes images failed ({reason}); "
                "try fewer: each needs memory"
            ) from None

    def _order(self) -> np.ndarray:
        """The indices of the images in the order of this epoch."""
        if not self.train:
            return np.arange(len(self.split))
        generator = data.generator(f"{self.seed}/{self.epoch}")
        return torch.randperm(len(self.split), generator=generator).numpy()

    def _skip(self, unread: _Unread) -> None:
        if not unread.opened:
            raise UserError(f"{unread.file}: cannot be opened ({unread.reason})")
        if self.strict:
            raise UserError(
                f"{unread.file}: is damaged ({unread.reason}); replace or remove it, or leave out "
                "--strict-images to skip such files"
            )
        self.skipped.add(unread.file)
