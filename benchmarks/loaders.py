"""Images per second of this project's loaders and of torchvision's usual ones, in one run.

    python benchmarks/loaders.py --datasets FashionMNIST
    python benchmarks/loaders.py --datasets ImageNet --workers 2         photographs that it writes
    python benchmarks/loaders.py --datasets ImageNet --data-dir /path/to/imagenet

The usual ones are torchvision's data set, PIL transforms (random crop, horizontal flip, to tensor,
normalise) and a DataLoader with worker processes. Of image folders both loaders decode the same
files with as many workers; otherwise this project's has one thread.
"""

import argparse
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain, islice, repeat
from pathlib import Path

import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training import data, entry, image_folders

WIDTH, HEIGHT = 500, 375  # pixels, the usual size in ImageNet
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def write_photographs(directory: Path, count: int = 1000) -> None:
    """Writes parts of scikit-learn's photographs as JPEG files of ImageNet's usual size."""
    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    for i in range(count):
        photograph = photographs[i % len(photographs)]
        left, top = i * 7 % (photograph.width - WIDTH), i * 11 % (photograph.height - HEIGHT)
        part = photograph.crop((left, top, left + WIDTH, top + HEIGHT))
        for subset in ("train", "val"):
            file = directory / subset / str(i % 10) / f"{i}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            part.save(file, quality=92)


def usual_images(spec: data.Spec, data_dir: str) -> Dataset:
    """torchvision's data set and transforms of small images."""
    steps = [transforms.RandomCrop(spec.size, padding=spec.padding)]
    steps += [transforms.RandomHorizontalFlip()] if spec.flip else []
    steps += [transforms.ToTensor(), transforms.Normalize(spec.mean, spec.std)]
    named = getattr(torchvision.datasets, spec.name)
    return named(data_dir, train=True, transform=transforms.Compose(steps))


def usual_folder(directory: Path) -> Dataset:
    """The training set of PyTorch's ImageNet example."""
    steps = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()]
    steps += [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    return torchvision.datasets.ImageFolder(directory / "train", transforms.Compose(steps))


def measure(make: Callable[[], Iterable], batches: int) -> tuple[float, float]:
    """Images per second, and milliseconds of all cores per image, of a loader and its workers.

    Other work on the cores hardly changes the second.
    """
    busy, start = sum(os.times()[:4]), time.perf_counter()
    loaded = islice(chain.from_iterable(repeat(make())), batches)
    count = sum(len(images) for images, _ in loaded)
    seconds = time.perf_counter() - start
    del loaded  # ends the workers, whose time is counted only then
    return count / seconds, 1000 * (sum(os.times()[:4]) - busy) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [name for name in data.DATASETS if hasattr(torchvision.datasets, name)]
    names.append(image_folders.NAME)
    parser.add_argument("--datasets", default="FashionMNIST", choices=names, help="data set")
    parser.add_argument("--data-dir", type=Path, help="where it lies (default: ./datasets)")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--workers", type=int, default=4, help="processes of each loader")
    parser.add_argument("--batches", type=int, default=100, help="to measure, per loader")
    parser.add_argument("--rounds", type=int, default=3, help="the loaders take turns")
    args = parser.parse_args()
    # More threads give a higher figure, but on a busy machine they wait for each other, and that is
    # measured as well. The worker processes have one thread each in any case.
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores

    cpu, settings = torch.device("cpu"), {"train": True}
    with tempfile.TemporaryDirectory() as temporary:
        if args.datasets == image_folders.NAME:
            directory = args.data_dir or Path(temporary)
            if args.data_dir is None:
                write_photographs(directory)
            (train, _), loader = image_folders.load(directory), image_folders.Loader
            settings |= {"device": cpu, "workers": args.workers}
            usual = usual_folder(directory)
        else:
            directory = str(args.data_dir or "./datasets")
            (train, _), loader = data.load(args.datasets, directory, cpu), data.Loader
            usual = usual_images(train.spec, directory)
        workers = {"num_workers": args.workers, "persistent_workers": args.workers > 0}
        theirs = partial(DataLoader, usual, args.batch_size, shuffle=True, **workers)
        ours = partial(loader, train, args.batch_size, **settings)
        print(f"{args.datasets}, {args.batches} batches of {args.batch_size}\n")
        print("| images/s: torchvision's | this loader | ratio ", end="")
        print("| CPU ms an image: torchvision's | this loader | ratio |\n" + "| ---: " * 6 + "|")
        for _ in range(args.rounds):
            (usual_speed, usual_cpu), (speed, cpu_ms) = (
                measure(make, args.batches) for make in (theirs, ours)
            )
            print(f"| {usual_speed:,.0f} | {speed:,.0f} | {speed / usual_speed:.2f} ", end="")
            print(f"| {usual_cpu:.2f} | {cpu_ms:.2f} | {cpu_ms / usual_cpu:.2f} |", flush=True)


if __name__ == "__main__":
    entry.run(main)
