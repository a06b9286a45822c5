"""Images per second of this project's loader and of torchvision's usual one, in one run.

The usual one is torchvision's data set, PIL transforms (random crop, horizontal flip, to tensor,
normalise) and a DataLoader with four worker processes. This project's is given one thread.

    python benchmarks/loader.py --datasets FashionMNIST
"""

import argparse
import os
import sys
import time
import warnings
from collections.abc import Iterable
from itertools import chain, repeat
from pathlib import Path

import torch
import torchvision
from torch.utils.data import DataLoader
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training import data
from training.run import run_script


def usual_loader(spec: data.Spec, data_dir: str, batch_size: int) -> DataLoader:
    """torchvision's data set and transforms with four worker processes."""
    augmentation = [transforms.RandomCrop(spec.size, padding=spec.padding)]
    if spec.flip:
        augmentation.append(transforms.RandomHorizontalFlip())
    transform = transforms.Compose(
        [*augmentation, transforms.ToTensor(), transforms.Normalize(spec.mean, spec.std)]
    )
    dataset = getattr(torchvision.datasets, spec.name)(data_dir, train=True, transform=transform)
    return DataLoader(dataset, batch_size, shuffle=True, num_workers=4, persistent_workers=True)


def images_per_second(loader: Iterable, seconds: float) -> float:
    """The speed over about `seconds`; the first batch, for which workers start, is left out."""
    batches = chain.from_iterable(repeat(loader))
    next(batches)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        count += len(next(batches)[0])
    return count / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [name for name in data.DATASETS if hasattr(torchvision.datasets, name)]
    parser.add_argument("--datasets", default="FashionMNIST", choices=names, help="data set")
    parser.add_argument("--data-dir", default="./datasets", help="where it lies")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=10, help="time given to each loader")
    args = parser.parse_args()

    # More threads give a higher figure, but on a busy machine they wait for each other, and that is
    # measured as well. The worker processes have one thread each in any case.
    torch.set_num_threads(1)
    # Four workers are the setting to compare with, whatever the number of cores.
    warnings.filterwarnings("ignore", "This DataLoader will create 4 worker processes")

    train, _ = data.load(args.datasets, args.data_dir, torch.device("cpu"))
    usual = usual_loader(train.spec, args.data_dir, args.batch_size)
    ours = data.Loader(train, args.batch_size, train=True)
    usual_speed = images_per_second(usual, args.seconds)
    speed = images_per_second(ours, args.seconds)

    print(f"{args.datasets}, batches of {args.batch_size}, {os.cpu_count()} cores\n")
    print("| loader | images/s | ratio |\n| --- | ---: | ---: |")
    print(f"| torchvision, PIL, DataLoader, 4 workers | {usual_speed:,.0f} | 1 |")
    print(f"| data.Loader, 1 thread | {speed:,.0f} | {speed / usual_speed:.1f} |")


if __name__ == "__main__":
    run_script(main)
