"""The matrix `P ∈ R^{height×D}` in memory, in 32, 8 or 4 bits, and products with it.

Products are bound by memory traffic, so each reads the matrix once. They are taken block by block
(`twa.storage.columns.Blocks`), as if P were block-diagonal with its column ranges as blocks.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from twa.files.reading import one_line
from twa.storage.columns import Blocks

# Columns of a tile at 32 bits: a longer matrix-vector product would use one core only.
PIECE = 2**16
# Columns of a tile below 32 bits, whose elements in a row have a scale in common.
TILE = 256
# The number of elements from which compiled kernels save more time than their compilation takes.
COMPILE_FROM = 2**27
# Elements of a call: they fill a GPU, and the intermediate sums of a compiled kernel fit the cache
# of a CPU. Where nothing is compiled, the decompressed elements have to fit it.
PART = 2**24
CACHED_PART = 2**20


@dataclass
class Tiles:
    """Adjacent tiles of equal width, from column `start` on; so many `pieces` make up a block.

    `values` is [tiles, height, width]: float32, or int8, or at 4 bits a byte for the columns k and
    k + width / 2, the first in its low half, each from -8 to 7 with 8 added. Below 32 bits an
    element is a value times its scale, float32 [tiles, height]; an odd width has a column of
    padding. Zero is represented exactly.
    """

    start: int
    width: int
    first: int
    pieces: int
    values: Tensor
    scales: Tensor | None

    @property
    def stop(self) -> int:
        """The column after the last."""
        return self.start + len(self.values) * self.width

    @property
    def blocks(self) -> slice:
        """The indices of their blocks among all of the model."""
        return slice(self.first, self.first + len(self.values) // self.pieces)

    def fill(self, first: int, rows: Tensor) -> None:
        """Compresses `rows`, float32 [tiles, height, width], into the tiles from `first` on."""
        place = slice(first, first + len(rows))
        # The largest element takes the lowest level, as there is one more level below zero.
        levels = 8 if self.values.dtype == torch.uint8 else 128
        low, high = rows.amin(dim=2, keepdim=True), rows.amax(dim=2, keepdim=True)
        scales = torch.where(high > -low, high, low) / -levels
        self.scales[place] = scales[:, :, 0]
        values = (rows / scales.where(scales != 0, 1)).round_().clamp_(-levels, levels - 1)
        values = _padded(values)
        if self.values.dtype == torch.uint8:
            low, high = (values + 8).to(torch.uint8).chunk(2, dim=2)
            values = low | high << 4
        self.values[place] = values


class Storage:
    """P, of which each column belongs to one block.

    Below 32 bits both products use the same rounded elements, so that `project` is the exact
    adjoint of `expand`. Large matrices are multiplied by compiled kernels, which decompress in
    registers; small ones, and all of them where there is no compiler, are decompressed in parts.

    Args:
        bits: 32, 8 or 4.
        height: the number of rows.
        blocks: the blocks that the columns form.
        count: the number of blocks of the model.
        rows: at 32 bits the matrix, float32 [height, D], which is not copied; else on its device.
    """

    def __init__(self, bits: int, height: int, blocks: list[Blocks], count: int, rows: Tensor):
        self.height, self._count, self.rows = height, count, rows if bits == 32 else None
        self._tiles = [
            self._make(bits, rows, *tiles) for group in blocks for tiles in _layout(group, bits)
        ]
        elements = height * sum(tiles.stop - tiles.start for tiles in self._tiles)
        self._compiled = bits < 32 and elements >= COMPILE_FROM

    def _make(self, bits: int, rows: Tensor, start, count, width, first, pieces) -> Tiles:
        if bits == 32:
            values = rows[:, start : start + count * width].unflatten(1, (count, width))
            return Tiles(start, width, first, pieces, values.transpose(0, 1), None)
        stored, dtype = width + width % 2, torch.int8
        if bits == 4:
            stored, dtype = stored // 2, torch.uint8
        values = torch.empty(count, self.height, stored, dtype=dtype, device=rows.device)
        scales = torch.empty(count, self.height, dtype=torch.float32, device=rows.device)
        return Tiles(start, width, first, pieces, values, scales)

    @property
    def nbytes(self) -> int:
        """The memory of values and scales in bytes."""
        tensors = [t for tiles in self._tiles for t in (tiles.values, tiles.scales)]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def fill(self, start: int, rows: Tensor) -> None:
        """Fills the columns from `start` on with `rows`, float32 [height, columns].

        They are whole blocks, or begin and end at multiples of `TILE` in a block or at its end.
        """
        if self.rows is not None:
            self.rows[:, start : start + rows.shape[1]] = rows
            return
        for tiles in self._tiles:
            low, high = max(start, tiles.start), min(start + rows.shape[1], tiles.stop)
            if low < high:
                part = rows[:, low - start : high - start].unflatten(1, (-1, tiles.width))
                tiles.fill((low - tiles.start) // tiles.width, part.transpose(0, 1))

    def project(self, gradients: Tensor) -> Tensor:
        """`P g` of every block, [blocks, height], from g [D]."""
        products = gradients.new_zeros(self._count, self.height)
        for tiles in self._tiles:
            columns = gradients[tiles.start : tiles.stop].view(-1, tiles.width)
            sums = columns.new_empty(len(columns), self.height)
            if tiles.scales is None:
                torch.bmm(columns[:, None], tiles.values.mT, out=sums[:, None])
            else:
                self._run("project", tiles, _padded(columns), sums)
            products[tiles.blocks] += _sum(sums.unflatten(0, (-1, tiles.pieces)))
        return products

    def expand(self, coefficients: Tensor, out: Tensor) -> None:
        """`out` [D] ← `Pᵀ β`, from the coefficients β of every block, [blocks, height]."""
        for tiles in self._tiles:
            columns = out[tiles.start : tiles.stop].view(-1, tiles.width)
            of_tiles = coefficients[tiles.blocks, None].expand(-1, tiles.pieces, -1).flatten(0, 1)
            if tiles.scales is None:
                torch.bmm(of_tiles[:, None], tiles.values, out=columns[:, None])
            elif tiles.width % 2:
                padded = columns.new_empty(len(columns), tiles.width + 1)
                self._run("expand", tiles, of_tiles, padded)
                columns.copy_(padded[:, :-1])
            else:
                self._run("expand", tiles, of_tiles, columns)

    def _run(self, product: str, tiles: Tiles, factors: Tensor, out: Tensor) -> None:
        """Runs the kernel of `product`; `factors` and `out` have a row for each tile."""

        def run(kernel: Callable, elements: int) -> None:
            step = max(1, elements // (self.height * tiles.width))
            tensors = (tiles.values, tiles.scales, factors, out)
            for part in zip(*(tensor.split(step) for tensor in tensors), strict=True):
                kernel(*part)

        if self._compiled and tiles.values.numel() > CACHED_PART:
            try:
                return run(_compiled(product), PART)
            except Exception as error:  # Any failure of the compiler: the kernels below need none.
                _warn_once(f"the compressed basis runs uncompiled, and slower: {one_line(error)}")
                self._compiled = False
        kernel = {"project": _project, "expand": _expand}[product]
        run(kernel, PART if out.device.type == "cuda" else CACHED_PART)


def _layout(group: Blocks, bits: int) -> list[tuple[int, int, int, int, int]]:
    """The tiles of the blocks in `group`: start, number, width, first block, tiles a block."""
    longest = PIECE if bits == 32 else TILE
    if group.count > 1 and group.width < PIECE:  # Wider ones are filled in parts, see `fill`.
        # A block is one tile, or divided evenly: channels are mostly 9 times a power of 2 wide.
        divisors = range(1, group.width // (TILE // 4) + 1) if group.width > 2 * TILE else []
        even = [k for k in divisors if group.width % k == 0 and group.width <= 2 * TILE * k]
        pieces = even[0] if even and bits < 32 else 1
        width = group.width // pieces
        return [(group.start, group.count * pieces, width, group.first, pieces)]
    layout = []
    for block in group.split(1):
        pieces, rest = divmod(block.width, longest)
        if pieces:
            layout.append((block.start, pieces, longest, block.first, pieces))
        if rest:
            layout.append((block.stop - rest, 1, rest, block.first, 1))
    return layout


def _sum(pieces: Tensor) -> Tensor:
    """The sums of [blocks, pieces, height] over the pieces; exact, as far as the device can."""
    if pieces.shape[1] == 1:
        return pieces[:, 0]
    exact = torch.float32 if pieces.device.type == "mps" else torch.float64
    return pieces.sum(1, dtype=exact).to(pieces.dtype)


def _padded(columns: Tensor) -> Tensor:
    """`columns` with a zero more in its last dimension if that is odd."""
    odd = columns.shape[-1] % 2
    return torch.nn.functional.pad(columns, (0, 1)) if odd else columns


def _project(values: Tensor, scales: Tensor, gradients: Tensor, out: Tensor) -> None:
    """`out` [tiles, height] ← each tile of P times its `gradients` [tiles, width]."""
    torch.mul(scales, (gradients[:, None] @ _floats(values).mT)[:, 0], out=out)


def _expand(values: Tensor, scales: Tensor, coefficients: Tensor, out: Tensor) -> None:
    """`out` [tiles, width] ← `coefficients` [tiles, height] times each tile of P."""
    torch.bmm((scales * coefficients)[:, None], _floats(values), out=out[:, None])


def _floats(values: Tensor) -> Tensor:
    """`values` as float32 [tiles, height, width], not yet scaled."""
    if values.dtype == torch.uint8:
        return torch.cat([values & 15, values >> 4], dim=2).float().sub_(8)
    return values.float()


# The same products in a form that the compiler fuses. The two halves of a tile are separate sums:
# at 4 bits they are the low and the high halves of bytes, and two sums run in parallel. Asking for
# the usual width makes the compiler write kernels for just this, which are faster.


def _project_fused(values: Tensor, scales: Tensor, gradients: Tensor, out: Tensor) -> None:
    low, high = _halves(values)
    half = TILE // 2 if gradients.shape[1] == TILE else gradients.shape[1] // 2
    left, right = gradients[:, None, :half], gradients[:, None, half:]
    out.copy_(scales * (low * left + high * right).sum(2))


def _expand_fused(values: Tensor, scales: Tensor, coefficients: Tensor, out: Tensor) -> None:
    coefficients = (scales * coefficients)[:, :, None]
    low, high = _halves(values)
    half = TILE // 2 if out.shape[1] == TILE else out.shape[1] // 2
    out[:, :half] = (low * coefficients).sum(1)
    out[:, half:] = (high * coefficients).sum(1)


def _halves(values: Tensor) -> tuple[Tensor, Tensor]:
    if values.dtype == torch.uint8:
        # On CPUs the compiler vectorises shifts of 32-bit integers, not of bytes.
        values = values.int()
        return ((values & 15) - 8).float(), ((values >> 4) - 8).float()
    low, high = values.chunk(2, dim=2)
    return low.float(), high.float()


@functools.cache
def _compiled(product: str):
    kernel = {"project": _project_fused, "expand": _expand_fused}[product]
    # Once for all shapes: layers and channels differ in the number and the width of their tiles.
    return torch.compile(kernel, dynamic=True, fullgraph=True)


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)
