"""The columns of the basis, their order, and the blocks that they form.

The columns are the model's trainable parameters, one after the other; of a sharded model, this
rank's shards of them. They form blocks (the whole model, a layer, or an output channel), each of
which gets a basis of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby

from torch import Tensor, nn

from twa.files.fit import Fit
from twa.files.reading import Stored, tensor_of
from twa.ranks.sharding import Ranks, first_row, local, part


@dataclass(frozen=True)
class Blocks:
    """`count` adjacent blocks of `width` columns each, from column `start` on.

    `first` is the index of the first of them among all blocks of the model. The columns of a
    `shared` block are spread over several ranks; any other block lies on this rank alone.
    """

    first: int
    start: int
    count: int
    width: int
    shared: bool = False

    @property
    def numbers(self) -> slice:
        """Their indices among all blocks of the model, as a slice."""
        return slice(self.first, self.first + self.count)

    @property
    def stop(self) -> int:
        """The column after the last."""
        return self.start + self.count * self.width

    def follows(self, other: Blocks) -> bool:
        """Whether `other` and these blocks can be merged: adjacent, equally wide and not shared."""
        shared = self.shared or other.shared
        return not shared and (other.numbers.stop, other.width) == (self.first, self.width)

    def split(self, columns: int) -> Iterator[Blocks]:
        """Runs of these blocks of at most so many `columns`, or of one block that is wider."""
        step = max(1, columns // max(1, self.width))
        for skip in range(0, self.count, step):
            count, start = min(step, self.count - skip), self.start + skip * self.width
            yield Blocks(self.first + skip, start, count, self.width, self.shared)


class Columns:
    """The layout of the columns.

    Each trainable parameter of `model` once, in the order of `state_dict`, flattened in logical
    row-major order whatever its memory format.

    Attributes:
        ranks: the ranks among which the columns are divided.
        names, parameters: the trainable parameters in order, and their names in a `state_dict`
            without the prefixes of wrappers.
        widths: the number of columns that each parameter has on this rank.
        total: the number of columns on this rank.
        layout: names and shapes of the parameters, for comparisons.
        fit: what the model takes of a checkpoint.

    Raises:
        ValueError: the model has no trainable parameters, or one that is complex or that its
            `state_dict` does not hold.
    """

    def __init__(self, model: nn.Module):
        self.ranks = Ranks(model)
        self.fit = Fit(model)
        # Matched by identity: some wrappers (activation checkpointing) change the names.
        missing = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
        trained = {name: p for name, p in self.fit.tensors.items() if missing.pop(id(p), None)}
        if missing:
            raise ValueError(f"the model's state_dict does not hold {', '.join(missing.values())}")
        self.names, self.parameters = list(trained), list(trained.values())
        self.widths = [local(p).numel() for p in self.parameters]
        self.total = sum(self.widths)
        if not sum(p.numel() for p in self.parameters):
            raise ValueError("the model has no trainable parameters")
        self.layout = str([(*self.names, *(tuple(p.shape) for p in self.parameters))])
        for name, parameter in trained.items():
            if parameter.is_complex():
                raise ValueError(f"{name} is complex: coefficients are real numbers")

    def split(self, flat: Tensor) -> Iterator[Tensor]:
        """Views of `flat` [D] in the shapes of the parameters, or of their shards."""
        for columns, parameter in zip(flat.split(self.widths), self.parameters, strict=True):
            yield columns.view(local(parameter).shape)

    def read(self, state: Mapping[str, Tensor | Stored], start: int, row: Tensor) -> None:
        """Copies the columns of `state`, which `fit` took, from `start` on until `row` is full."""
        begin = 0
        for key, parameter, width in zip(self.names, self.parameters, self.widths, strict=True):
            low, high = max(begin, start), min(begin + width, start + len(row))
            if high > low:
                value = part(tensor_of(state[key]), parameter)
                columns = row[low - start : high - start]
                if len(columns) == width:
                    columns.view(value.shape).copy_(value)
                else:
                    columns.copy_(value.flatten()[low - begin : high - begin])
            begin += width

    def blocks(self, granularity: str) -> tuple[list[Blocks], int]:
        """The blocks at `granularity` that have columns on this rank, and the model's number.

        Adjacent blocks of equal width are merged into one item, except shared ones, so that these
        are the same items on every rank.
        """
        blocks: list[Blocks] = []
        count = start = 0
        for number, parameters in self._parts(granularity):
            if not sum(p.numel() for p in parameters):
                continue
            if number > 1:  # The channels of a weight, each whole on one rank.
                (weight,) = parameters
                first, held = count + first_row(weight), len(local(weight))
                new = Blocks(first, start, held, weight.numel() // number)
            else:
                width = sum(local(p).numel() for p in parameters)
                new = Blocks(count, start, 1, width, shared=self.ranks.count > 1)
            count += number
            if not new.count:
                continue
            start = new.stop
            if blocks and new.follows(blocks[-1]):
                last = blocks.pop()
                new = Blocks(last.first, last.start, last.count + new.count, last.width)
            blocks.append(new)
        return blocks, count

    def _parts(self, granularity: str) -> Iterator[tuple[int, list[nn.Parameter]]]:
        """The parameters in groups, in order, and the number of blocks that each group forms."""
        if granularity == "model":
            yield 1, self.parameters
        elif granularity == "layer":
            yield from ((1, layer) for layer in self._layers())
        else:
            for layer in self._layers():
                for vectors, parameters in groupby(layer, key=lambda p: p.dim() < 2):
                    if vectors:
                        yield 1, list(parameters)
                    else:
                        yield from ((len(p), [p]) for p in parameters)

    def _layers(self) -> list[list[nn.Parameter]]:
        """The parameters in groups, by the module that owns them.

        A module that owns only vectors, such as batch norm, joins the layer before it, or the
        first layer if there is none before.
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
