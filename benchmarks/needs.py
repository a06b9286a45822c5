"""What a basis takes on every rank, the floats of a step's sum, and what sharded models take.

    python benchmarks/needs.py

Prints the tables of docs/many-machines.md and of README.md beside this file. All of it is computed
(the models are not even made in memory); the tests compare the formulas with real bases.
"""

import math
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

import models
from training.parallel import size
from training.settings import Parser
from twa.storage.columns import Columns
from twa.storage.memory import Plan

CHECKPOINTS, COMPONENTS = 100, (3, 12, 24, None)  # None: all, 99
MODELS = {
    "VGG16BN": lambda: models.build("VGG16BN", 100),
    "ResNet-50": lambda: models.imagenet.build("resnet50", 1000, 224),
    "GPT-124M": lambda: models.gpt.build("gpt-124M", 50_257, 1024),
}
SHARDED = {"ResNet-50": (25.6e6, 300), "ViT-L/16": (304e6, 300), "7 B": (7e9, 100)}
MEMORY, LINK, NETWORK, NODE = 3.35e12, 450e9, 50e9, 8  # bytes/s of and between GPUs; in a node


def main() -> None:
    Parser(__doc__.partition("\n")[0]).parse_args()
    print("\n".join([*memory(), "", *sums(), "", *sharded()]))


def made(name: str) -> nn.Module:
    with torch.device("meta"):
        return MODELS[name]()


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def memory() -> Iterator[str]:
    """The table of a basis's memory."""
    yield row("model", "bits", "3", "12", "24", f"all of {CHECKPOINTS} checkpoints")
    yield row("---", *["---:"] * 5)
    for name in MODELS:
        weights = Columns(made(name)).total
        for bits in (32, 8, 4):
            plans = [Plan(CHECKPOINTS, components=k, bits=bits) for k in COMPONENTS]
            sizes = [size(plan.basis_bytes(weights)) for plan in plans]
            yield row(f"{name}, {weights / 1e6:.1f} M weights", bits, *sizes)


def sums() -> Iterator[str]:
    """The table of what a step's sum holds."""
    yield row("model", "directions", "by model", "by layer", "by channel", "gradient, of DDP")
    yield row("---", *["---:"] * 5)
    for name in MODELS:
        model = made(name)
        for height in (12, CHECKPOINTS - 1):
            counts = [coefficients(model, g, height) for g in ("model", "layer", "channel")]
            cells = [f"{count:,}: {size(4 * count)}" for count in counts]
            yield row(name, height, *cells, size(4 * Columns(model).total))


def coefficients(model: nn.Module, granularity: str, height: int) -> int:
    """How many there are: a block has as many as directions, or as weights if these are fewer."""
    blocks = Columns(model, granularity).blocks
    return sum(group.count * min(height, group.width) for group in blocks)


def sharded() -> Iterator[str]:
    """The table of what a rank takes where model and basis are sharded."""
    heads = ("basis GB", "memory GB", "while building GB", "on the wire GB")
    heads += ("basis ms", "wire ms", "floor ms")
    yield row("model", "checkpoints", "GPUs", "bits", *heads)
    yield row(*["---"] * 11)
    for name, (weights, count) in SHARDED.items():
        for gpus in (8, 64, 512):
            own = math.ceil(weights / gpus)
            vectors = 4 * 4 * own  # the weights, a gradient, the start point, one to work with
            for bits in (32, 8, 4):
                plan = Plan(count, bits=bits)
                basis = plan.basis_bytes(own)
                wire = 8 * (weights + plan.height + 4) * (gpus - 1) / gpus
                # Activations come on top of the memory; the mean of the window is not read.
                taken = basis + vectors + 4 * weights, plan.build_bytes(own) + vectors
                reading = 2 * (basis - 4 * own) / MEMORY
                sending = wire / (LINK if gpus <= NODE else NETWORK)
                sizes = [f"{each / 1e9:.3g}" for each in (basis, *taken, wire)]
                times = [f"{1e3 * t:.2g}" for t in (reading, sending, reading + sending)]
                yield row(name, count, gpus, bits, *sizes, *times)


if __name__ == "__main__":
    main()
