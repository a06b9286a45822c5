"""Data sets of small images: one tensor on the device, and the loader that augments batches."""

import contextlib
import gzip
import http.client
import io
import itertools
import math
import random
import socket
import sys
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import datasets
from torchvision.datasets import mnist
from torchvision.datasets.utils import check_integrity
from torchvision.transforms import v2

import models
from twa.files.writing import replacing
from utils import UserError


@dataclass(frozen=True)
class Spec:
    """The constants of a data set."""

    name: str
    classes: int
    channels: int
    size: int  # height and width of an image, in pixels
    padding: int  # zeros around an image before the random crop, in pixels
    flip: bool  # whether mirrored images keep their class
    mean: tuple[float, ...]  # of each channel over the training images, in [0, 1]
    std: tuple[float, ...]
    content: str | None = None  # identifies a folder of images, wherever it lies

    def model(self, arch: str) -> nn.Module:
        """A freshly initialised model for these images; see `models.build`."""
        return models.build(arch, self.classes, self.channels, self.size)


# For CIFAR100 too, the paper's release normalises by CIFAR10's figures.
_CIFAR = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)}

DATASETS = {
    spec.name: spec
    for spec in (
        Spec("Digits", 10, 1, 8, padding=1, flip=False, mean=(0.305,), std=(0.376,)),
        Spec("FashionMNIST", 10, 1, 28, padding=2, flip=True, mean=(0.2860,), std=(0.3530,)),
        Spec("CIFAR10", 10, 3, 32, padding=4, flip=True, **_CIFAR),
        Spec("CIFAR100", 100, 3, 32, padding=4, flip=True, **_CIFAR),
    )
}


@dataclass(frozen=True)
class Split:
    """A part of a data set: to train on, to test on, or held out."""

    images: Tensor | np.ndarray  # uint8 [N, C, H, W]; or their files, bytes [N]
    labels: Tensor  # int64 [N]
    spec: Spec

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def crops(self) -> Tensor:
        """Every crop of every image: uint8 [N, C, 2 padding + 1, 2 padding + 1, H, W].

        It is a view of the padded images, so that one indexing operation copies a batch of crops.
        """
        padded = F.pad(self.images, (self.spec.padding,) * 4)
        return padded.unfold(2, self.spec.size, 1).unfold(3, self.spec.size, 1)

    def part(self, indices: Tensor | slice) -> "Split":
        """The images at these indices, in that order."""
        return Split(self.images[indices], self.labels[indices], self.spec)

    def sample(self, count: int, seed: int) -> "Split":
        """`count` images drawn by `seed`, in the order of the data set; all if there are fewer."""
        if count >= len(self):
            return self
        drawn = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count]
        content = f"{self.spec.content}, {count} images drawn by seed {seed}"
        return replace(self.part(drawn.sort().values), spec=replace(self.spec, content=content))

    def hold_out(self, percent: float, seed: int) -> "tuple[Split, Split]":
        """Splits off `percent` of the images, drawn by `seed`: (the others, those held out).

        Both are in random order: the first images of either are a fair sample of it.

        Raises:
            UserError: one of the two would be empty.
        """
        count = round(len(self) * percent / 100)
        if not 0 < count < len(self):
            raise UserError(
                f"--val-ratio {percent:g}: holds out {count} of {len(self)} images; "
                "both parts need some"
            )
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        order = order.to(self.labels.device)
        return self.part(order[count:]), self.part(order[:count])


def load(name: str, data_dir: str | Path, device: torch.device) -> tuple[Split, Split]:
    """The training and the test split of a data set, on `device`.

    Files that are missing in `data_dir` are unpacked there from Debian's package, if that is
    installed, or downloaded. Digits come with scikit-learn.

    Raises:
        UserError: there is no data set of this name, it cannot be downloaded, or a file is damaged.
    """
    if name not in DATASETS:
        raise UserError(f"unknown data set {name!r}: choose from {', '.join(DATASETS)}")
    if name == "Digits":
        splits = _digits()
    elif name == "FashionMNIST":
        splits = _fashion_mnist(Path(data_dir).expanduser())
    else:
        splits = _cifar(name, Path(data_dir).expanduser())
    train, test = (
        Split(images.contiguous().to(device), labels.to(device), DATASETS[name])
        for images, labels in splits
    )
    return train, test


GROUP = 4  # consecutive images of an epoch that go through the same operations of RandAugment


@dataclass(eq=False)
class Loader:
    """Iterates over a split in batches: (images float32 [B, C, H, W], labels int64 [B]).

    Images are normalised by the mean and standard deviation of their data set. The last batch may
    be smaller. Batch k of an epoch depends on the seed, the epoch and k alone. With several ranks,
    each gets its own part of every batch.

    Attributes:
        split: the images; batches are on their device.
        batch_size: images in a batch, on all ranks together.
        train: whether images are shuffled, and each cropped and mirrored at random; otherwise they
            come unchanged and in order.
        seed: of all random draws.
        channels_last: whether images are laid out in memory with their channels last.
        randaugment: strength of RandAugment, 1 to 30, for training; 0 for none.
        rank, world: this process among those that share each batch, and how many there are.
        count: images in an epoch.
        skipped: files that could not be read and were skipped so far.
        sample: the number of images on which start and end points are compared.
    """

    split: Split
    batch_size: int
    _: KW_ONLY
    train: bool
    seed: int = 0
    channels_last: bool = False
    randaugment: int = 0
    rank: int = 0
    world: int = 1
    sample: ClassVar[int] = 1024
    watch: ClassVar = staticmethod(iter)  # passes on the batches of a measurement; see `Run`

    def __post_init__(self):
        self.epoch, self.count, self.skipped = 0, len(self.split), set()
        spec, device = self.split.spec, self.split.labels.device
        # ToTensor divides by 255 before Normalize does the rest; here the two are one step.
        self.mean, self.std = (
            255 * torch.tensor(value, device=device).view(-1, 1, 1)
            for value in (spec.mean, spec.std)
        )

    def __len__(self) -> int:
        """The number of batches in an epoch."""
        return math.ceil(self.count / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.watch(self.batches())

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the next iteration."""
        self.epoch = epoch

    def endless(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterates over the batches of epoch 1, 2, … without end."""
        for epoch in itertools.count(1):
            self.set_epoch(epoch)
            yield from self

    def images_in(self, batch: int) -> int:
        """The number of images in a batch, on all ranks together."""
        return min(self.batch_size, self.count - batch * self.batch_size)

    def labels_in(self, batch: int) -> int:
        """The number of labels in a batch, on all ranks together."""
        return self.images_in(batch)

    def measures(self, metrics: dict[str, float]) -> dict[str, float]:
        """The metrics that suit the data, made of loss and accuracy."""
        return metrics

    def batches(self, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterates over this rank's parts of the epoch's batches, from batch `start` on.

        In place of an empty part comes one image with the label -100, which `cross_entropy`
        ignores, so that all ranks call the model equally often.
        """
        shares = [self._share(batch) for batch in range(start, len(self))]
        parts = [slice(low, max(high, low + 1)) for low, high in shares]
        for (low, high), (images, labels) in zip(shares, self._load(parts), strict=True):
            yield images, labels if high > low else labels.fill_(-100)

    def whole_batches(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterates over whole batches among the first `count`, which the ranks take in turn.

        Batch norm's statistics then do not depend on the number of ranks. Every rank takes equally
        many: the first batches come twice if need be.
        """
        turns = range(self.rank, math.ceil(count / self.world) * self.world, self.world)
        starts = [turn % count * self.batch_size for turn in turns]
        parts = [slice(first, first + self.batch_size) for first in starts]
        return self.watch(self._load(parts))

    def _share(self, batch: int) -> tuple[int, int]:
        """The positions in the epoch at which this rank's part of a batch begins and ends."""
        first, size = batch * self.batch_size, self.images_in(batch)
        low, high = (first + size * rank // self.world for rank in (self.rank, self.rank + 1))
        return low, high

    def _load(self, parts: Iterable[slice]) -> Iterator[tuple[Tensor, Tensor]]:
        """The images and labels at these positions of the epoch."""
        if not self.train:
            for part in parts:
                yield self._normalise(self.split.images[part]), self.split.labels[part].clone()
            return
        order, top, left, flip = (numbers.to(self.split.labels.device) for numbers in self.draw())
        for part in parts:
            images = self.split.crops[order[part], :, top[part], left[part]]
            if self.split.spec.flip:
                images = torch.where(flip[part].view(-1, 1, 1, 1), images.flip(3), images)
            if self.randaugment:
                images = self._rand_augment(images, part.start)
            yield self._normalise(images), self.split.labels[order[part]]

    def _rand_augment(self, images: Tensor, first: int) -> Tensor:
        """Two random operations for each group of images, which start at position `first`.

        A group whose images are in two batches or on two ranks gets the same operations in both.
        """
        transform = v2.RandAugment(num_ops=2, magnitude=self.randaugment)
        groups = []
        for group in range(first // GROUP, math.ceil((first + len(images)) / GROUP)):
            low, high = (max(edge * GROUP - first, 0) for edge in (group, group + 1))
            with seeded(f"{self.seed}/{self.epoch}/group {group}"):
                groups.append(transform(images[low:high]))
        return torch.cat(groups)

    def _normalise(self, images: Tensor) -> Tensor:
        """Images uint8 [B, C, H, W] as float32, normalised and in the memory format."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return images.sub(self.mean).div_(self.std).contiguous(memory_format=layout)

    def draw(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The draws of the epoch, each [N], in the order in which the images come, on the CPU.

        They are the same whatever the device of the images.

        Returns:
            The images' indices, the top and left edges of their crops in the padded images (int64),
            and whether they are mirrored (bool).
        """
        n, draws = len(self.split), generator(f"{self.seed}/{self.epoch}")
        order = torch.randperm(n, generator=draws)
        top, left = torch.randint(2 * self.split.spec.padding + 1, (2, n), generator=draws)
        flip = torch.randint(2, (n,), generator=draws).bool()
        return order, top, left, flip


def generator(name: str) -> torch.Generator:
    """A generator on the CPU whose draws depend on `name` alone."""
    return torch.Generator().manual_seed(_seed_of(name))


@contextlib.contextmanager
def seeded(name: str) -> Iterator[None]:
    """Context in which draws from torch's CPU generator depend on `name` alone.

    The generator's earlier state is restored at the end.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_seed_of(name))
        yield


def _seed_of(name: str) -> int:
    # The hash keeps seeds 1 and 2 from sharing an epoch; the CPU's generator takes 32 bits.
    return random.Random(name).getrandbits(32)


_Arrays = list[tuple[Tensor, Tensor]]  # images uint8 [N, C, H, W] and labels int64 [N]; train, test


def _digits() -> _Arrays:
    from sklearn.datasets import load_digits  # slow to import
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = (digits.images * (255 / 16)).round().astype(np.uint8)[:, np.newaxis]
    halves = train_test_split(
        images, digits.target, test_size=0.5, random_state=0, stratify=digits.target
    )
    train_images, test_images, train_labels, test_labels = map(torch.from_numpy, halves)
    return [(train_images, train_labels), (test_images, test_labels)]


_DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


def _fashion_mnist(data_dir: Path) -> _Arrays:
    kind, raw = datasets.FashionMNIST, data_dir / "FashionMNIST/raw"
    archives = [name for name, _ in kind.resources]
    for archive in archives:
        file, packed = raw / Path(archive).stem, _DEBIAN_FASHION_MNIST / archive
        if not file.exists() and packed.exists():
            _unpack(packed, file)
        if file.exists():
            read = mnist.read_image_file if "images" in archive else mnist.read_label_file
            try:
                read(file)
            except (AssertionError, KeyError, RuntimeError, TypeError, ValueError):
                raise _damaged(file) from None
    by_hand = f"put {', '.join(archives)} from {kind.mirrors[0]} into {raw}"
    remedy = f"install Debian's package dataset-fashion-mnist, or {by_hand}"
    splits = _torchvision(kind, data_dir, raw, remedy)
    return [(split.data.unsqueeze(1), split.targets) for split in splits]


def _cifar(name: str, data_dir: Path) -> _Arrays:
    kind = getattr(datasets, name)
    folder = data_dir / kind.base_folder
    sums = dict(kind.train_list + kind.test_list) | {kind.meta["filename"]: kind.meta["md5"]}
    for file, md5 in sums.items():
        if (folder / file).exists() and not check_integrity(folder / file, md5):
            raise _damaged(folder / file)
    remedy = f"put the file {kind.url} at {data_dir / kind.filename}"
    return [
        (torch.from_numpy(split.data).permute(0, 3, 1, 2), torch.tensor(split.targets))
        for split in _torchvision(kind, data_dir, folder, remedy)
    ]


def _torchvision(
    kind: type[datasets.VisionDataset], data_dir: Path, folder: Path, remedy: str
) -> list[datasets.VisionDataset]:
    """The training and the test set, downloaded if they are not in `folder`.

    Raises:
        UserError: they cannot be downloaded either; the error names the `remedy`.
    """
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # seconds without an answer; torchvision sets no limit of its own
    bar = sys.stderr if sys.stderr.isatty() else io.StringIO()  # not into logs
    try:
        with contextlib.redirect_stderr(bar):
            return [kind(data_dir, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{kind.__name__} is not in {folder} and cannot be downloaded ({reason}): {remedy}"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)


def _unpack(packed: Path, file: Path) -> None:
    """Unpacks a gzip file to `file`, which appears whole or not at all."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        content = gzip.decompress(packed.read_bytes())
    except (EOFError, OSError, zlib.error) as error:
        raise UserError(f"{packed} cannot be unpacked to {file} ({error})") from None
    with replacing(file) as temporary:
        temporary.write_bytes(content)


def _damaged(file: Path) -> UserError:
    return UserError(f"{file} is damaged: remove it, and the next run puts a whole one there")
