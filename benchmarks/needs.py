"""What it takes to hold the basis on every rank: memory, and the floats of a step's sum.

    python benchmarks/needs.py

Prints the tables of docs/many-machines.md. All of it is computed (the models are not even made in
memory); the tests hold the formulas to bases that are.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

import models
from training.parallel import size
from twa.storage.columns import Columns
from twa.storage.memory import Plan

CHECKPOINTS, COMPONENTS = 100, (3, 12, 24, None)  # None: all, 99
MODELS = {
    "VGG16BN": lambda: models.build("VGG16BN", 100),
    "ResNet-50": lambda: models.imagenet.build("resnet50", 1000, 224),
    "GPT-124M": lambda: models.gpt.build("gpt-124M", 50_257, 1024),
}


def main() -> None:
    print("\n".join([*memory(), "", *sums()]))


def made(name: str) -> nn.Module:
    with torch.device("meta"):
        return MODELS[name]()


def memory() -> Iterator[str]:
    """The table of a basis's memory."""
    names = ["3", "12", "24", f"all of {CHECKPOINTS} checkpoints"]
    yield f"| model | bits | {' | '.join(names)} |"
    yield "| --- | ---: |" + " ---: |" * len(names)
    for name in MODELS:
        weights = Columns(made(name)).total
        for bits in (32, 8, 4):
            sizes = [
                size(Plan(CHECKPOINTS, components=k, bits=bits).basis_bytes(weights))
                for k in COMPONENTS
            ]
            yield f"| {name}, {weights / 1e6:.1f} M weights | {bits} | {' | '.join(sizes)} |"


def sums() -> Iterator[str]:
    """The table of what a step's sum holds."""
    yield "| model | directions | by model | by layer | by channel | gradient, of DDP |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: |"
    for name in MODELS:
        model = made(name)
        for components in (12, None):
            height = components or CHECKPOINTS - 1
            counts = [coefficients(model, g, height) for g in ("model", "layer", "channel")]
            told = [f"{count:,}: {size(4 * count)}" for count in counts]
            gradient = size(4 * Columns(model).total)
            yield f"| {name} | {height} | {' | '.join(told)} | {gradient} |"


def coefficients(model: nn.Module, granularity: str, height: int) -> int:
    """How many there are: a block has as many as directions, or as weights if these are fewer."""
    blocks = Columns(model, granularity).blocks
    return sum(group.count * min(height, group.width) for group in blocks)


if __name__ == "__main__":
    main()
