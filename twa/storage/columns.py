"""`Columns`: the order of the basis's columns, and the blocks that they form.

The columns are the model's trainable parameters, one after the other, or this rank's shards of
them. A block (the whole model, a layer or an output channel) has a basis of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor, nn

from twa.files.fit import Fit
from twa.files.reading import Stored, tensor_of
from twa.ranks.sharding import Shards, first_row, local, part


@dataclass(frozen=True)
class Blocks:
    """`count` adjacent blocks of `width` columns each, from column `start` on.

    The first one is block `first` of the model. Several ranks have columns of a `shared` block.
    """

    first: int
    start: int
    count: int
    width: int
    shared: bool = False

    @property
    def numbers(self) -> slice:
        """Their indices among all blocks of the model."""
        return slice(self.first, self.first + self.count)

    @property
    def stop(self) -> int:
        """The column after the last."""
        return self.start + self.count * self.width

    def split(self, columns: int) -> Iterator[Blocks]:
        """These blocks in groups of at most `columns` columns; a wider block is alone."""
        step = max(1, columns // max(1, self.width))
        for skip in range(0, self.count, step):
            count, start = min(step, self.count - skip), self.start + skip * self.width
            yield replace(self, first=self.first + skip, start=start, count=count)


class Columns:
    """The layout of the columns.

    The columns are the trainable parameters of `model`, each once, in the order of `state_dict`,
    flattened in row-major order whatever their memory format. At granularity "channel" a weight
    whose output channels are in its second dimension is transposed first.

    Attributes:
        shards: the ranks that the model is sharded among.
        names: the parameters' names in a `state_dict`, without the prefixes of wrappers.
        parameters: the trainable parameters, in the same order.
        widths: the number of columns of each parameter on this rank, two for a complex number;
            `total` is their sum.
        dtype: float64 if a parameter is float64 or complex128, else float32.
        layout: the parameters' names and shapes, to compare.
        fit: finds in a checkpoint what the model needs.
        blocks: the blocks that have columns on this rank. Adjacent ones of equal width are one
            item; shared ones are not, so that they are the same items on every rank.
        count: the number of blocks of the whole model.

    Raises:
        ValueError: the model has no trainable parameters; one is not in the model's `state_dict`;
            or a sharded weight has its output channels in its second dimension.
    """

    def __init__(self, model: nn.Module, granularity: str = "model"):
        self.shards, self._granularity = Shards(model), granularity
        self.fit = Fit(model)
        # Matched by identity: some wrappers (activation checkpointing) change the names.
        missing = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
        trained = {name: p for name, p in self.fit.tensors.items() if missing.pop(id(p), None)}
        if missing:
            raise ValueError(f"the model's state_dict does not hold {', '.join(missing.values())}")
        self.names, self.parameters = list(trained), list(trained.values())
        self._groups = _transposed(model) if granularity == "channel" else {}
        self.widths = [self.arranged(local(p), p).numel() for p in self.parameters]
        wide = any(p.dtype in (torch.float64, torch.complex128) for p in self.parameters)
        self.dtype = torch.float64 if wide else torch.float32
        self.total = sum(self.widths)
        if not sum(p.numel() for p in self.parameters):
            raise ValueError("the model has no trainable parameters")
        self.layout = str([(*self.names, *(tuple(p.shape) for p in self.parameters))])
        for name, parameter in trained.items():
            if id(parameter) in self._groups and self.shards.count > 1:
                raise ValueError(
                    f"{name}: its output channels are spread over the ranks; use granularity "
                    '"layer" or "model", or do not shard the model'
                )
        self.blocks, self.count = self._blocks(granularity)

    def arranged(self, tensor: Tensor, parameter: Tensor) -> Tensor:
        """A view of `tensor`, shaped as `parameter`, with its elements in the columns' order.

        If `parameter` is complex, its last dimension is that of real and imaginary parts.
        """
        if parameter.is_complex():
            tensor = torch.view_as_real(tensor.to(parameter.dtype).resolve_conj())
        groups = self._groups.get(id(parameter))
        return tensor if groups is None else tensor.unflatten(0, (groups, -1)).transpose(1, 2)

    def split(self, flat: Tensor) -> Iterator[Tensor]:
        """Views of `flat` [D], one for each parameter or its shard, in the shape of `arranged`."""
        for columns, parameter in zip(flat.split(self.widths), self.parameters, strict=True):
            yield columns.view(self.arranged(local(parameter), parameter).shape)

    def read(self, state: Mapping[str, Tensor | Stored], start: int, row: Tensor) -> None:
        """Copies the columns of `state`, a result of `fit`, from `start` on until `row` is full."""
        begin = 0
        for key, parameter, width in zip(self.names, self.parameters, self.widths, strict=True):
            low, high = max(begin, start), min(begin + width, start + len(row))
            if high > low:
                value = self.arranged(part(tensor_of(state[key]), parameter), parameter)
                columns = row[low - start : high - start]
                if len(columns) == width:
                    columns.view(value.shape).copy_(value)
                else:
                    columns.copy_(value.flatten()[low - begin : high - begin])
            begin += width

    def by_name(self, rows: Tensor) -> dict[str, Tensor]:
        """`rows` [blocks, n], a row for each block of the model, by the names of the parameters.

        Each value is [n, ...]: its other dimensions are as many as the parameter's, and broadcast
        with them.
        """
        found, begin = {}, 0
        names = dict(zip(map(id, self.parameters), self.names, strict=True))
        for number, parameters in self._parts(self._granularity):
            if not sum(p.numel() for p in parameters):
                continue
            block, begin = rows[begin : begin + number].T, begin + number
            for parameter in parameters:
                groups = self._groups.get(id(parameter))
                if groups is not None:
                    shape = (len(block), groups, len(parameter) // groups, -1)
                    block = block.unflatten(1, (groups, -1))[:, :, None].expand(shape).flatten(1, 2)
                ones = [1] * (1 + parameter.dim() - block.dim())
                found[names[id(parameter)]] = block.reshape(*block.shape, *ones)
        return found

    def _blocks(self, granularity: str) -> tuple[list[Blocks], int]:
        blocks: list[Blocks] = []
        count = start = 0
        for number, parameters in self._parts(granularity):
            if not sum(p.numel() for p in parameters):
                continue
            if number > 1:  # the channels of a weight, each of which is on one rank
                (weight,) = parameters
                rows = number if self.shards.count == 1 else len(local(weight))
                width = weight.numel() // number * (1 + weight.is_complex())
                new = Blocks(count + first_row(weight), start, rows, width)
            else:
                width = sum(self.arranged(local(p), p).numel() for p in parameters)
                new = Blocks(count, start, 1, width, shared=self.shards.count > 1)
            count, start, last = count + number, new.stop, blocks[-1] if blocks else None
            separate = last is None or last.shared or new.shared
            if not separate and (last.numbers.stop, last.width) == (new.first, new.width):
                blocks[-1] = replace(last, count=last.count + new.count)
            elif new.count:
                blocks.append(new)
        return blocks, count

    def _parts(self, granularity: str) -> Iterator[tuple[int, list[nn.Parameter]]]:
        """The parameters in groups, in order, with the number of blocks that each group forms."""
        for layer in [self.parameters] if granularity == "model" else self._layers():
            if granularity != "channel":
                yield 1, layer
                continue
            for vectors, parameters in groupby(layer, key=lambda p: p.dim() < 2):
                if vectors:
                    yield 1, list(parameters)
                else:
                    yield from ((self._channels(p), [p]) for p in parameters)

    def _channels(self, weight: nn.Parameter) -> int:
        groups = self._groups.get(id(weight))
        return len(weight) if groups is None else groups * weight.shape[1]

    def _layers(self) -> list[list[nn.Parameter]]:
        """The parameters in groups, by the module that owns them.

        A module that owns only vectors, such as batch norm, joins the layer before it. Those before
        the first layer join that one.
        """
        layers: list[list[nn.Parameter]] = []
        leading = True  # Only vectors have come so far.
        named = zip(self.names, self.parameters, strict=True)
        for _, owned in groupby(named, key=lambda item: item[0].rpartition(".")[0]):
            parameters = [parameter for _, parameter in owned]
            vectors = all(p.dim() < 2 for p in parameters)
            if layers and (vectors or leading):
                layers[-1] += parameters
            else:
                layers.append(parameters)
            leading = leading and vectors
        return layers


def _transposed(model: nn.Module) -> dict[int, int]:
    """The number of groups of each weight whose output channels are its second dimension, by id.

    These are the weights of torch's transposed convolutions and of transformers' `Conv1D` (GPT-2).
    """
    groups = {}
    for module in model.modules():
        if isinstance(module, nn.modules.conv._ConvTransposeNd):
            groups[id(module.weight)] = module.groups
        elif type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
            groups[id(module.weight)] = 1
    return groups
