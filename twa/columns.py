"""Which weights are the columns of the basis, and which of them belong together.

The columns are the model's trainable parameters, one after the other. They fall into blocks (the
whole model, a layer, or an output channel), each of which gets a basis of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from torch import Tensor, nn

from twa.checkpoints import Checkpoint, CheckpointError, load_state_dict


@dataclass(frozen=True)
class Blocks:
    """`count` blocks of `width` columns each, side by side from column `start`.

    `first` is the number of the first of them among all blocks.
    """

    first: int
    start: int
    count: int
    width: int

    @property
    def numbers(self) -> slice:
        """The blocks, as a slice of all blocks."""
        return slice(self.first, self.first + self.count)

    @property
    def stop(self) -> int:
        """The column after the last."""
        return self.start + self.count * self.width

    def of(self, rows: Tensor) -> Tensor:
        """These columns of `rows` [height, D], a view of shape [count, height, width]."""
        part = rows[:, self.start : self.stop]
        return part.unflatten(1, (self.count, self.width)).transpose(0, 1)

    def split(self, columns: int) -> Iterator[Blocks]:
        """These blocks in parts of as many as fit in `columns`, of one where none does."""
        step = max(1, columns // self.width)
        for skip in range(0, self.count, step):
            count = min(step, self.count - skip)
            yield Blocks(self.first + skip, self.start + skip * self.width, count, self.width)


class Columns:
    """The layout of the columns.

    Each trainable parameter of `model` once, in the order of `named_parameters`, flattened in
    logical row-major order whatever its memory format.
    """

    def __init__(self, model: nn.Module):
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names = [_plain(name) for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        self.known = {_plain(name) for name in model.state_dict()}
        self.widths = [p.numel() for p in self.parameters]
        self.total = sum(self.widths)
        if not self.total:
            raise ValueError("the model has no trainable parameters")

    def split(self, flat: Tensor) -> Iterator[Tensor]:
        """`flat` [D] as views in the shapes of the parameters."""
        for part, parameter in zip(flat.split(self.widths), self.parameters, strict=True):
            yield part.view(parameter.shape)

    def read(self, checkpoint: Checkpoint, name: str, start: int, row: Tensor) -> None:
        """Writes the columns of `checkpoint` from `start` on into `row`, as many as it holds.

        Raises:
            CheckpointError: it cannot be read or does not fit the model; `name` is what to call
                it.
        """
        state = {_plain(key): value for key, value in load_state_dict(checkpoint).items()}
        self._check(state, name)
        begin = 0
        for key, width in zip(self.names, self.widths, strict=True):
            low, high = max(begin, start), min(begin + width, start + len(row))
            if high - low == width:
                row[low - start : high - start].view(state[key].shape).copy_(state[key])
            elif high > low:
                row[low - start : high - start] = state[key].flatten()[low - begin : high - begin]
            begin += width

    def _check(self, state: dict[str, Tensor], name: str) -> None:
        for key, parameter in zip(self.names, self.parameters, strict=True):
            if key not in state:
                raise CheckpointError(f"{name}: of another architecture: {key} is missing")
            if state[key].shape != parameter.shape:
                raise CheckpointError(
                    f"{name}: of another architecture: {key} is {list(state[key].shape)} there "
                    f"and {list(parameter.shape)} in the model"
                )
        for key, value in state.items():
            # Whole numbers are counters, such as batch norm's, and no sign of another model.
            if key not in self.known and value.is_floating_point():
                raise CheckpointError(f"{name}: of another architecture: the model has no {key}")

    def blocks(self, granularity: str) -> list[Blocks]:
        """The blocks at `granularity`; those of equal width that follow each other are one item."""
        if granularity == "model":
            parts = [(1, self.total)]
        elif granularity == "layer":
            parts = [(1, sum(p.numel() for p in layer)) for layer in self._layers()]
        else:
            parts = [part for layer in self._layers() for part in _channels(layer)]
        blocks = []
        first = start = 0
        for width, same in groupby(parts, key=lambda part: part[1]):
            count = sum(count for count, _ in same)
            if width:
                blocks.append(Blocks(first, start, count, width))
                first, start = first + count, start + count * width
        return blocks

    def _layers(self) -> list[list[nn.Parameter]]:
        """The parameters by the module that owns them.

        A module with vectors alone, such as batch norm, joins the layer before it; those ahead of
        every layer join the first.
        """
        layers = []
        leading = True
        named = zip(self.names, self.parameters, strict=True)
        for _, owned in groupby(named, key=lambda item: item[0].rpartition(".")[0]):
            parameters = [parameter for _, parameter in owned]
            small = all(p.dim() < 2 for p in parameters)
            if layers and (small or leading):
                layers[-1] += parameters
            else:
                layers.append(parameters)
            leading = leading and small
        return layers


def _channels(layer: list[nn.Parameter]) -> Iterator[tuple[int, int]]:
    """(count, width) of a layer's blocks at granularity "channel"."""
    for vectors, parameters in groupby(layer, key=lambda p: p.dim() < 2):
        if vectors:
            yield 1, sum(p.numel() for p in parameters)
        else:
            yield from ((len(p), p.numel() // max(1, len(p))) for p in parameters)


def _plain(name: str) -> str:
    """`name` without what DataParallel and torch.compile put before it."""
    return re.sub(r"^((module|_orig_mod)\.)+", "", name)
