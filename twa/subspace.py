"""The basis of the subspace that a window of checkpoints spans.

The n checkpoints, flattened, are the rows of `W ∈ R^{n×D}`; `Subspace` turns them into the
orthonormal rows of `P = T W`, by Gram–Schmidt or as the window's principal directions. T comes
from n×n inner products in float64 (`twa.extraction`), so the long dimension is passed over twice,
in cache-sized chunks: once for the inner products, once to apply T. Where checkpoints are close to
dependent, the inner products are taken again, up to three times.
"""

from __future__ import annotations

import functools
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from twa import extraction, memory
from twa.checkpoints import Checkpoint, CheckpointError
from twa.columns import Blocks, Columns
from twa.sharding import Ranks, local
from twa.storage import TILE, Compressed, Dense

EXTRACTS = ("Schmidt", "SVD")
BITS = (32, 16, 8, 4)
GRANULARITIES = ("model", "layer", "channel")

# Elements worked on at a time: in float64 they stay in the cache of a CPU; a GPU wants more.
CHUNK = {"cpu": 2**19, "cuda": 2**24}
# A basis that cannot be built in place is built from one of this many parts of W at a time, or from
# as many elements as this (256 MB), whichever is more: opening files takes its time as well.
PARTS = 8
SMALL = 2**26


def _exactly(method: Callable) -> Callable:
    """`method` without gradients, and without a caller's autocast, which would round products."""

    @functools.wraps(method)
    def wrapped(self, *args, **kwargs):
        device = self.parameters[0].device.type
        cpu, other = (torch.autocast(kind, enabled=False) for kind in ("cpu", device))
        with torch.no_grad(), cpu, other:
            return method(self, *args, **kwargs)

    return wrapped


class Subspace:
    """An orthonormal basis of the span of checkpoints, and products with it.

    Args:
        model: its trainable parameters are the columns, and their device is the basis's. Where
            FSDP2 (`fully_shard`) has sharded them, the shards of a rank are its columns, and D
            below is their number; what is called here is then called on every rank.
        checkpoints: n paths or `state_dict`s, in the order of training; buffers and frozen
            parameters are ignored. They are read one at a time, and once where the basis is built
            in place ("Schmidt" at 32 bits); else in up to eight parts, and blocks larger than a
            part once for each pass over them.
        extract: "Schmidt", Gram–Schmidt in the order of the checkpoints (Section 3 of Li et al.,
            ICLR 2023); or "SVD", the principal directions of the window.
        components: for "SVD", how many of the leading principal directions of the window centred
            on its mean are kept in each block (fewer where a block has no more). What the mean
            has outside their span follows as one direction more, so that the mean, the SWA
            solution, is in the span.
        bits: of a stored element, 32, 16, 8 or 4. Below 32 the rows are orthonormal up to the
            rounding of their elements, and `project` remains the exact adjoint of `expand`.
        granularity: "model", "layer" or "channel": what has a basis and coefficients of its own.
            A layer is a module that owns parameters; one with vectors alone, such as batch norm,
            joins the layer before it. A channel is an index of a weight's first dimension; the
            vectors of a layer form one block.

    Attributes:
        parameters: the model's trainable parameters behind the columns, in order.
        dropped: names (path, or index of a `state_dict`) of the checkpoints left out of the basis
            because in every block they depend linearly on the ones before them.

    Raises:
        CheckpointError: a checkpoint cannot be read, does not fit the model, or holds NaN or
            infinity.
        MemoryError: the basis does not fit into the memory that is free.
        ValueError: an argument is out of its range, no checkpoint was given, or the model has no
            trainable parameters, or some that are complex or not in its `state_dict`.
    """

    def __init__(
        self,
        model: nn.Module,
        checkpoints: Sequence[Checkpoint],
        *,
        extract: str = "Schmidt",
        components: int | None = None,
        bits: int = 32,
        granularity: str = "model",
    ):
        _check_arguments(checkpoints, extract, components, bits, granularity)
        self._granularity = granularity
        self._columns = Columns(model)
        self.parameters = self._columns.parameters
        device, total = self.parameters[0].device, self._columns.total
        self._ranks = self._columns.ranks
        blocks, self._count = self._columns.blocks(granularity)
        n = len(checkpoints)
        _check_memory(n, total, bits, components, device, self._ranks)

        height = _height(n, components)
        chunk = max(1, CHUNK.get(device.type, CHUNK["cpu"]) // n)
        in_place = _in_place(bits, components, device)
        width = total if in_place else _width(n, total, chunk)
        window = _Window(self._columns, checkpoints, width, chunk, _workplace(device))
        if bits < 32:
            self._storage = Compressed(bits, height, blocks, self._count, total, device)
        else:
            rows = (
                window.rows
                if in_place
                else torch.empty(height, total, dtype=torch.float32, device=device)
            )
            self._storage = Dense(rows, blocks, self._count)
        # From checkpoints to basis, [blocks, height, n]; float32 where there are many channels.
        self._transforms: list[tuple[Blocks, Tensor]] = []
        dtype = torch.float32 if granularity == "channel" else torch.float64
        used = torch.zeros(n, dtype=torch.float32, device="cpu")
        real = torch.zeros(self._count, height, dtype=torch.float32, device="cpu")
        with tqdm(
            desc="building the basis",
            total=2 * total,
            unit_scale=True,
            leave=False,
            disable=None if self._ranks.first else True,
        ) as bar:
            for batch in (part for group in blocks for part in group.split(chunk)):
                weights, kept = self._extract(batch, window, components, bar)
                self._transforms.append((batch, weights.to(dtype)))
                used += kept
                real[batch.numbers] = (weights != 0).any(dim=2).float()
        self._number_coefficients(real)
        used = self._ranks.sum(used.to(device)).tolist()
        self.dropped = [name for name, use in zip(window.names, used, strict=True) if not use]
        if self.dropped and self._ranks.first:
            warnings.warn(
                f"{len(self.dropped)} of {n} checkpoints depend linearly on the ones before them "
                f"and were dropped from the basis: {', '.join(self.dropped)}",
                stacklevel=2,
            )

    @_exactly
    def _extract(
        self, batch: Blocks, window: _Window, components: int | None, bar: tqdm
    ) -> tuple[Tensor, Tensor]:
        """Appends the basis of the blocks in `batch` to the storage.

        Returns:
            the transform from checkpoints to basis, float64 [blocks, height, n], and which
            checkpoints are in it, bool [n], both on the CPU.
        """
        device, n = window.rows.device, len(window.rows)

        def products(transform: Tensor | None, dtype: torch.dtype) -> Tensor:
            height = n if transform is None else transform.shape[1]
            total = torch.zeros(batch.count, height, height, dtype=torch.float64, device=device)
            for rows in window.differences(batch, _precise(dtype, device)):
                if transform is not None:
                    rows = transform @ rows
                total += rows @ rows.mT
                bar.update(batch.count * rows.shape[2])
            if batch.shared:
                self._ranks.sum(total)
            finite = total.diagonal(dim1=1, dim2=2).isfinite().all(dim=0)
            if not finite.all():
                name = window.names[finite.int().argmin()]
                raise CheckpointError(f"{name}: holds NaN or infinity")
            return total

        if components is None:
            single = _precise(torch.float32, device) == torch.float32
            transform, kept, dtype = extraction.gram_schmidt(products, single)
        else:
            transform, dtype = extraction.principal_directions(products, components), torch.float64
            kept = torch.ones(1, n, dtype=torch.bool, device=device)
        dtype = _precise(dtype, device)
        for differences in window.differences(batch, dtype):
            rows = transform.to(dtype) @ differences
            rows = rows.transpose(0, 1).flatten(1).float()
            self._storage.append(rows.to(self.parameters[0].device))
            bar.update(rows.shape[1])
        weights = extraction.of_checkpoints(transform).masked_fill_(~kept[:, None], 0)
        return weights.cpu(), kept.any(dim=0).cpu()

    def _number_coefficients(self, real: Tensor) -> None:
        """Numbers the rows that are there: in a block, those beyond its rank are zero.

        Args:
            real: [blocks, height], larger than 0 for the rows of this rank's blocks that are there.
        """
        self._shape = real.shape
        real = self._ranks.sum(real.to(self.parameters[0].device)).flatten() > 0
        self._length = int(real.sum())
        self._index = real.nonzero()[:, 0] if self._length < len(real) else None

    def __len__(self) -> int:
        """The number of coefficients, all blocks together."""
        return self._length

    @property
    def nbytes(self) -> int:
        """The memory of the stored basis in bytes, scales included; on this rank."""
        return self._storage.nbytes

    @_exactly
    def project(self, gradients: Tensor) -> Tensor:
        """`P g`: the gradient with respect to the coefficients.

        Args:
            gradients: float32 [D], in the order of the columns.

        Returns:
            float32 [len(self)], the coefficients of all blocks one after the other.
        """
        products = self._ranks.sum(self._storage.project(gradients)).flatten()
        return products if self._index is None else products[self._index]

    @_exactly
    def expand(self, coefficients: Tensor, out: Tensor | None = None) -> Tensor:
        """`Pᵀ β`: weights from coefficients.

        Args:
            coefficients: float32 [len(self)].
            out: float32 [D] to write to. Fresh memory for every result can take longer than the
                product itself, so a loop should have one vector and use it again.

        Returns:
            float32 [D], in the order of the columns; `out` if given.
        """
        out = self.empty() if out is None else out
        self._storage.expand(self._by_block(coefficients), out)
        return out

    @_exactly
    def averaging_weights(self, coefficients: Tensor) -> Tensor:
        """α with `w = Σ α_i w_i`, where `w` is `expand(coefficients)`.

        Args:
            coefficients: float32 [len(self)].

        Returns:
            float64 on the CPU, [checkpoints] at granularity "model", else [blocks, checkpoints].
            Zero where a checkpoint was dropped.
        """
        coefficients = self._by_block(coefficients).cpu()
        shape = (self._count, self._transforms[0][1].shape[2])
        weights = torch.zeros(shape, dtype=torch.float64, device="cpu")
        for batch, transform in self._transforms:
            if self._ranks.first or not batch.shared:  # What all ranks know counts once.
                weights[batch.numbers] = (
                    coefficients[batch.numbers, None].to(transform) @ transform
                )[:, 0].double()
        if self._ranks.count > 1:  # NCCL sums on its devices alone; MPS has no float64.
            weights = self._ranks.sum(weights.to(self.parameters[0].device)).cpu()
        return weights[0] if self._granularity == "model" else weights

    def empty(self) -> Tensor:
        """A vector for the columns, float32 [D], not filled."""
        device = self.parameters[0].device
        return torch.empty(self._columns.total, dtype=torch.float32, device=device)

    @torch.no_grad()
    def flatten(self, tensors: Iterable[Tensor | None], out: Tensor | None = None) -> Tensor:
        """`tensors`, one for each parameter, as one vector in the order of the columns.

        Args:
            tensors: in the shapes of `self.parameters`, any dtype; None stands for zeros.
            out: float32 [D] to write to, as for `expand`.

        Returns:
            float32 [D]; `out` if given.
        """
        out = self.empty() if out is None else out
        for part, tensor in zip(self._columns.split(out), tensors, strict=True):
            if tensor is None:
                part.zero_()
            else:
                part.copy_(local(tensor).to_dense())  # An embedding's gradient may be sparse.
        return out

    @torch.no_grad()
    def assign(self, flat: Tensor) -> None:
        """Writes `flat` [D] into the model's parameters."""
        self._ranks.reshard()
        for parameter, columns in zip(self.parameters, self._columns.split(flat), strict=True):
            local(parameter).copy_(columns)

    def _by_block(self, coefficients: Tensor) -> Tensor:
        """`coefficients` as [blocks, height], zero where a block has no such row."""
        if self._index is None:
            return coefficients.view(self._shape)
        padded = coefficients.new_zeros(self._shape.numel())
        padded[self._index] = coefficients
        return padded.view(self._shape)


class _Window:
    """The checkpoints as rows, of which a range of columns is in memory at a time.

    Args:
        width: how many columns that is.
        chunk: how many columns `differences` takes at a time.
        device: where they are.

    Attributes:
        rows: float32 [n, width].
        names: what to call the checkpoints.
    """

    def __init__(
        self,
        columns: Columns,
        checkpoints: Sequence[Checkpoint],
        width: int,
        chunk: int,
        device: torch.device,
    ):
        self.names = [
            str(index) if isinstance(checkpoint, Mapping) else os.fspath(checkpoint)
            for index, checkpoint in enumerate(checkpoints)
        ]
        self.rows = torch.empty(len(checkpoints), width, dtype=torch.float32, device=device)
        # One place for all differences: fresh memory for each chunk takes longer than to fill it.
        self._room = torch.empty(len(checkpoints) * chunk, dtype=torch.float64, device=device)
        self._columns, self._checkpoints, self._chunk = columns, checkpoints, chunk
        self._start = self._stop = 0

    def differences(self, batch: Blocks, dtype: torch.dtype) -> Iterator[Tensor]:
        """The first checkpoint and the differences of each from the one before it.

        Yields the columns of `batch` in chunks, or all at once if they are of more than one block
        (which then fit into a chunk), as [blocks, n, columns]; each takes the place of the last.
        """
        if batch.stop - batch.start <= self.rows.shape[1]:
            self._hold(batch.start, batch.stop)
        step = self._chunk if batch.count == 1 else batch.stop - batch.start
        room = self._room.view(dtype)
        for start in range(batch.start, batch.stop, step):
            stop = min(start + step, batch.stop)
            self._hold(start, stop)
            rows = self.rows[:, start - self._start : stop - self._start]
            rows = rows.unflatten(1, (batch.count, -1)).transpose(0, 1)
            differences = room[: rows.numel()].view(rows.shape).copy_(rows)
            differences[:, 1:] -= rows[:, :-1]
            yield differences

    def _hold(self, start: int, stop: int) -> None:
        """Sees to it that the columns from `start` to `stop` are in memory."""
        if self._start <= start and stop <= self._stop:
            return
        self._start = start
        self._stop = min(start + self.rows.shape[1], self._columns.total)
        rows = self.rows[:, : self._stop - start]
        named = zip(self._checkpoints, self.names, rows, strict=True)
        for checkpoint, name, row in tqdm(
            named, desc="reading checkpoints", total=len(rows), leave=False, disable=None
        ):
            self._columns.read(checkpoint, name, start, row)


def _check_arguments(checkpoints, extract, components, bits, granularity) -> None:
    if not len(checkpoints):
        raise ValueError("no checkpoints were given")
    for name, value, allowed in (
        ("extract", extract, EXTRACTS),
        ("bits", bits, BITS),
        ("granularity", granularity, GRANULARITIES),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, not {value!r}")
    if extract == "SVD" and (components is None or components < 1):
        raise ValueError(f"extract 'SVD' takes components, 1 or more, not {components!r}")
    if extract != "SVD" and components is not None:
        raise ValueError(f"components belongs to extract 'SVD', not to {extract!r}")


def _precise(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """`dtype`, or float64 where products in float32 may be computed in less."""
    try:
        exact = device.type == "cpu" and torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # Set for one backend alone, by PyTorch's newer interface.
        exact = False
    return dtype if exact else torch.float64


def _height(n: int, components: int | None) -> int:
    """The most rows that a block of the basis has."""
    return n if components is None else min(components + 1, n)


def _workplace(device: torch.device) -> torch.device:
    """Where a basis for `device` is made: there, but for MPS, which has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def _in_place(bits: int, components: int | None, device: torch.device) -> bool:
    """Whether the rows that are read become the basis."""
    return bits == 32 and components is None and _workplace(device) == device


def _width(n: int, total: int, chunk: int) -> int:
    """The columns in memory at a time where the basis is not built in place."""
    return min(total, max(chunk, math.ceil(total / PARTS), SMALL // n))


def _check_memory(
    n: int,
    total: int,
    bits: int,
    components: int | None,
    device: torch.device,
    ranks: Ranks,
) -> None:
    """Raises `MemoryError` if the basis and what building it takes are larger than what is free.

    The message says what would fit.
    """
    free = ranks.share(memory.available(device), device)

    def size(n: int, bits: int) -> int:
        basis = _height(n, components) * total * bits // 8
        if bits < 32:
            basis += _height(n, components) * total // TILE * 4
        rows = 0 if _in_place(bits, components, device) else n * _width(n, total, 1) * 4
        return basis + rows + 2 * total * 4  # and a gradient, and the weights

    if free is None or size(n, bits) <= free:
        return
    remedies = []
    fewer = max((k for k in range(1, n) if size(k, bits) <= free), default=None)
    if fewer:
        remedies.append(f"{fewer} checkpoints")
    smaller = [b for b in BITS if b < bits and size(n, b) <= free]
    if smaller:
        remedies.append(f"bits={smaller[0]}")
    more = math.ceil(ranks.count * size(n, bits) / max(1, free))
    remedies.append(f"{more} ranks with as much memory each")
    share = f" (one of {ranks.count} shards)" if ranks.count > 1 else ""
    raise MemoryError(
        f"a basis of {n} checkpoints of {total:,} weights{share} at {bits} bits takes "
        f"{size(n, bits) / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free on {device}; "
        f"{' or '.join(remedies)} would fit"
    )
