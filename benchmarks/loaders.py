"""Images per second of this project's loaders and of torchvision's usual ones, in one run.

    python benchmarks/loaders.py --datasets FashionMNIST
    python benchmarks/loaders.py --datasets ImageNet --workers 2         photographs that it writes
    python benchmarks/loaders.py --datasets ImageNet --data-dir /path/to/imagenet

The usual ones are torchvision's data set, PIL transforms (random crop, horizontal flip, to tensor,
normalise) and a DataLoader with worker processes. For image folders both loaders decode the same
files with as many workers; otherwise this project's has one thread.
"""

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
from torch.utils.data import DataLoader
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training import data, image_folders
from training.run import run_script
from training.settings import Parser


def write_photographs(directory: Path, count: int = 1000) -> None:
    """Writes parts of scikit-learn's photographs as JPEG files of ImageNet's usual size."""
    photographs, width, height = load_sample_images().images, 500, 375
    for i in range(count):
        photograph = Image.fromarray(photographs[i % len(photographs)])
        left, top = i * 7 % (photograph.width - width), i * 11 % (photograph.height - height)
        part = photograph.crop((left, top, left + width, top + height))
        for subset in ("train", "val"):
            file = directory / subset / str(i % 10) / f"{i}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            part.save(file, quality=92)


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
    parser = Parser(__doc__.splitlines()[0])
    names = [name for name in data.DATASETS if hasattr(torchvision.datasets, name)]
    names.append(image_folders.NAME)
    parser.add_argument("--datasets", default="FashionMNIST", choices=names, help="data set")
    parser.add_argument("--data-dir", type=Path, help="where it lies (default: ./datasets)")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--workers", type=int, default=4, help="processes of each loader")
    parser.add_argument("--batches", type=int, default=100, help="to measure, per loader")
    args = parser.parse_args()
    # More threads give a higher figure, but on a busy machine they wait for each other, and that is
    # measured as well. The worker processes have one thread each in any case.
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores

    cpu, settings, temporary = torch.device("cpu"), {"train": True}, tempfile.TemporaryDirectory()
    if args.datasets == image_folders.NAME:
        directory = args.data_dir or Path(temporary.name)
        if args.data_dir is None:
            write_photographs(directory)
        (train, _), loader = image_folders.load(directory), image_folders.Loader
        settings |= {"device": cpu, "workers": args.workers}
        usual = partial(torchvision.datasets.ImageFolder, directory / "train")
        steps = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()]
        scale = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    else:
        directory = args.data_dir or "./datasets"
        (train, _), loader = data.load(args.datasets, directory, cpu), data.Loader
        usual = partial(getattr(torchvision.datasets, args.datasets), directory, train=True)
        steps = [transforms.RandomCrop(train.spec.size, padding=train.spec.padding)]
        steps += [transforms.RandomHorizontalFlip()] if train.spec.flip else []
        scale = transforms.Normalize(train.spec.mean, train.spec.std)
    usual = usual(transform=transforms.Compose([*steps, transforms.ToTensor(), scale]))
    workers = {"num_workers": args.workers, "persistent_workers": args.workers > 0}
    theirs = partial(DataLoader, usual, args.batch_size, shuffle=True, **workers)
    ours = partial(loader, train, args.batch_size, **settings)
    print("| images/s: torchvision's | this loader | ratio ", end="")
    print("| CPU ms an image: torchvision's | this loader | ratio |\n" + "| ---: " * 6 + "|")
    for _ in range(3):  # they take turns
        usual_speed, usual_cpu = measure(theirs, args.batches)
        speed, cpu_ms = measure(ours, args.batches)
        print(f"| {usual_speed:,.0f} | {speed:,.0f} | {speed / usual_speed:.2f} ", end="")
        print(f"| {usual_cpu:.2f} | {cpu_ms:.2f} | {cpu_ms / usual_cpu:.2f} |", flush=True)


if __name__ == "__main__":
    run_script(main)
