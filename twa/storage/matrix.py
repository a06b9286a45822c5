"""`Matrix`: the basis `P ∈ R^{height×D}` in memory as float32, and products with it.

A product is taken block by block (`twa.storage.columns.Blocks`), as if P were block-diagonal.
Memory traffic bounds its speed, so it reads P once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from twa.storage.columns import Blocks

# Columns of a float32 tile: a longer matrix-vector product would use one core only.
PIECE = 2**16
# Columns of a compressed tile.
TILE = 256


@dataclass(frozen=True)
class Tiles:
    """`count` adjacent tiles of `width` columns, from column `start` on.

    A block consists of `pieces` tiles. The first block is block `first` of the model.
    """

    start: int
    count: int
    width: int
    first: int
    pieces: int

    @property
    def columns(self) -> slice:
        """Their columns in P."""
        return slice(self.start, self.start + self.count * self.width)

    @property
    def blocks(self) -> slice:
        """The indices of their blocks among all blocks of the model."""
        return slice(self.first, self.first + self.count // self.pieces)


class Matrix:
    """P, and its products for the blocks that its columns form.

    Args:
        rows: P, float32 [height, D]; not copied.
        blocks: the blocks of the columns.
        count: the number of blocks of the model, some of which other ranks may store.
    """

    def __init__(self, rows: Tensor, blocks: list[Blocks], count: int):
        self.rows = rows
        self._set_up(len(rows), blocks, count, PIECE)
        self._values = [
            rows[:, tiles.columns].unflatten(1, (-1, tiles.width)).transpose(0, 1)
            for tiles in self._tiles
        ]

    def _set_up(self, height: int, blocks: list[Blocks], count: int, longest: int) -> None:
        self.height, self._count = height, count
        self._tiles = [tiles for group in blocks for tiles in _tiles_of(group, longest)]

    @property
    def nbytes(self) -> int:
        """The memory of the matrix in bytes."""
        return self.rows.nbytes

    def fill(self, start: int, rows: Tensor) -> None:
        """Stores `rows`, float32 [height, columns], in the columns from `start` on.

        They are whole blocks, or begin and end at multiples of `TILE` in a block or at its end.
        """
        self.rows[:, start : start + rows.shape[1]] = rows

    def project(self, gradients: Tensor) -> Tensor:
        """`P g` of each block, [blocks, height], for g [D]."""
        products = gradients.new_zeros(self._count, self.height)
        for index, tiles in enumerate(self._tiles):
            columns = gradients[tiles.columns].view(-1, tiles.width)
            sums = columns.new_empty(tiles.count, self.height)
            self._project(index, columns, sums)
            products[tiles.blocks] += _sum(sums.unflatten(0, (-1, tiles.pieces)))
        return products

    def expand(self, coefficients: Tensor, out: Tensor) -> None:
        """Writes `Pᵀ c` to `out` [D], for the coefficients c of each block, [blocks, height]."""
        for index, tiles in enumerate(self._tiles):
            columns = out[tiles.columns].view(-1, tiles.width)
            of_tiles = coefficients[tiles.blocks, None].expand(-1, tiles.pieces, -1).flatten(0, 1)
            self._expand(index, of_tiles, columns)

    def _project(self, index: int, columns: Tensor, out: Tensor) -> None:
        """Writes the tiles times `columns` [tiles, width] to `out` [tiles, height]."""
        torch.bmm(columns[:, None], self._values[index].mT, out=out[:, None])

    def _expand(self, index: int, coefficients: Tensor, out: Tensor) -> None:
        """Writes `coefficients` [tiles, height] times the tiles to `out` [tiles, width]."""
        torch.bmm(coefficients[:, None], self._values[index], out=out[:, None])


def _tiles_of(group: Blocks, longest: int) -> Iterator[Tiles]:
    """The tiles of the blocks in `group`, of about `longest` columns at most."""
    if group.count > 1 and group.width < PIECE:  # `fill` gets wider blocks in parts.
        # A block is one tile or is divided evenly: channels are mostly 9 times a power of 2 wide.
        divisors = range(1, 4 * group.width // longest + 1) if group.width > 2 * longest else ()
        even = (k for k in divisors if group.width % k == 0 and group.width <= 2 * longest * k)
        pieces = next(even, 1)
        width = group.width // pieces
        yield Tiles(group.start, group.count * pieces, width, group.first, pieces)
        return
    for block in group.split(1):
        pieces, rest = divmod(block.width, longest)
        if pieces:
            yield Tiles(block.start, pieces, longest, block.first, pieces)
        if rest:
            yield Tiles(block.stop - rest, 1, rest, block.first, 1)


def _sum(pieces: Tensor) -> Tensor:
    """The sums of [blocks, pieces, height] over the pieces, in float64 where the device has it."""
    if pieces.shape[1] == 1:
        return pieces[:, 0]
    exact = torch.float32 if pieces.device.type == "mps" else torch.float64
    return pieces.sum(1, dtype=exact).to(pieces.dtype)
