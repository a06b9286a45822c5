"""Images per second of this project's image-folder loader and of PyTorch's ImageNet example's.

The example's is ImageFolder, PIL transforms (random resized crop, horizontal flip, to tensor,
normalise) and a DataLoader. Both decode the same files with as many workers, and both end in
normalised float32 batches of 224×224 pixels on the device.

    python benchmarks/image_folder.py                            photographs that it writes first
    python benchmarks/image_folder.py --data-dir /path/to/imagenet
"""

import argparse
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain, islice, repeat
from pathlib import Path

import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils
from training import image_folders
from training.run import run_script

WIDTH, HEIGHT = 500, 375  # pixels, the usual size in ImageNet


def write_photographs(directory: Path, count: int) -> None:
    """Writes parts of scikit-learn's photographs as JPEG files of ImageNet's usual size."""
    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    for i in range(count):
        photograph = photographs[i % len(photographs)]
        left = i * 7 % (photograph.width - WIDTH)
        top = i * 11 % (photograph.height - HEIGHT)
        part = photograph.crop((left, top, left + WIDTH, top + HEIGHT))
        for subset in ("train", "val"):
            file = directory / subset / str(i % 10) / f"{i}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            part.save(file, quality=92)


class Example:
    """The example's training pipeline."""

    def __init__(self, directory: Path, batch_size: int, workers: int, device: torch.device):
        transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(224),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        )
        self.device = device
        self.batches = DataLoader(
            ImageFolder(directory / "train", transform),
            batch_size,
            shuffle=True,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type not in ("cpu", "mps"),
        )

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self.batches:
            yield (
                images.to(self.device, non_blocking=True),
                labels.to(self.device, non_blocking=True),
            )


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
    parser.add_argument("--data-dir", type=Path, help="holds train/ and val/")
    parser.add_argument("--images", type=int, default=1000, help="to write without --data-dir")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--workers", type=int, default=4, help="processes of each loader")
    parser.add_argument("--batches", type=int, default=16, help="what is measured, per loader")
    parser.add_argument("--rounds", type=int, default=3, help="the loaders take turns")
    parser.add_argument("--device", help="left out, the accelerator if there is one, else the CPU")
    args = parser.parse_args()
    torch.set_num_threads(1)
    # More workers than cores may be asked for.
    warnings.filterwarnings("ignore", "This DataLoader will create")

    device = utils.choose_device(args.device)
    with tempfile.TemporaryDirectory() as temporary:
        directory = args.data_dir or Path(temporary)
        if args.data_dir is None:
            write_photographs(directory, args.images)
        train, _ = image_folders.load(directory)
        print(f"{len(train)} images, batches of {args.batch_size}, {args.workers} workers each\n")
        example = partial(Example, directory, args.batch_size, args.workers, device)
        ours = partial(
            image_folders.Loader,
            train,
            args.batch_size,
            train=True,
            device=device,
            workers=args.workers,
        )
        print(
            "| images/s: example | this loader | ratio "
            "| CPU ms an image: example | this loader | ratio |"
        )
        print("| ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
        for _ in range(args.rounds):
            usual, usual_cpu = measure(example, args.batches)
            speed, cpu = measure(ours, args.batches)
            print(
                f"| {usual:,.0f} | {speed:,.0f} | {speed / usual:.2f} "
                f"| {usual_cpu:.2f} | {cpu:.2f} | {cpu / usual_cpu:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    run_script(main)
