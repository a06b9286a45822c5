"""`Matrix`: the basis `P ∈ R^{height×D}` in memory as float32, and products with it.

A product is taken block by block (`twa.storage.columns.Blocks`), as if P were block-diagonal.
Memory traffic bounds its speed, so it reads P once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from twa.storage.columns import Blocks

# Columns of a float32 tile: a longer matrix-vector product would use one core only.
PIECE = 2**16
# Columns of a compressed tile.
TILE = 256


class Matrix:
    """P, and its products for the blocks that its columns form.

    Args:
        rows: P, float32 [height, D]; not copied.
        blocks: the blocks of the columns.
        count: the number of blocks of the model; other ranks may have some of them.
    """

    def __init__(self, rows: Tensor, blocks: list[Blocks], count: int):
        self.rows, self.height, self._count = rows, len(rows), count
        self._runs = list(runs_of_tiles(blocks, PIECE))
        self._tiles = [
            rows[:, run.start : run.stop].unflatten(1, (run.count * pieces, -1)).transpose(0, 1)
            for run, pieces in self._runs
        ]

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
        for index, (run, pieces) in enumerate(self._runs):
            columns = gradients[run.start : run.stop].view(run.count * pieces, -1)
            sums = columns.new_empty(len(columns), self.height)
            self._project(index, columns, sums)
            products[run.numbers] += _sum(sums.unflatten(0, (-1, pieces)))
        return products

    def expand(self, coefficients: Tensor, out: Tensor) -> None:
        """Writes `Pᵀ c` to `out` [D], for the coefficients c of each block, [blocks, height]."""
        for index, (run, pieces) in enumerate(self._runs):
            columns = out[run.start : run.stop].view(run.count * pieces, -1)
            of_tiles = coefficients[run.numbers, None].expand(-1, pieces, -1).flatten(0, 1)
            self._expand(index, of_tiles, columns)

    def _project(self, index: int, columns: Tensor, out: Tensor) -> None:
        """Writes the tiles times `columns` [tiles, width] to `out` [tiles, height]."""
        torch.bmm(columns[:, None], self._tiles[index].mT, out=out[:, None])

    def _expand(self, index: int, coefficients: Tensor, out: Tensor) -> None:
        """Writes `coefficients` [tiles, height] times the tiles to `out` [tiles, width]."""
        torch.bmm(coefficients[:, None], self._tiles[index], out=out[:, None])


def runs_of_tiles(blocks: list[Blocks], longest: int) -> Iterator[tuple[Blocks, int]]:
    """Divides blocks into runs of equal tiles, of about `longest` columns at most.

    Yields blocks, or parts of a block, and the number of tiles in each.
    """
    for group in blocks:
        if group.count > 1 and group.width < PIECE:  # `fill` gets wider blocks in parts.
            # Tiles as wide as the block, or even parts: many channels are 9 * 2^k columns wide.
            divisors = range(1, 4 * group.width // longest + 1) if group.width > 2 * longest else ()
            even = (k for k in divisors if group.width % k == 0 and group.width <= 2 * longest * k)
            yield group, next(even, 1)
            continue
        for block in group.split(1):
            pieces, rest = divmod(block.width, longest)
            if pieces:
                yield replace(block, width=pieces * longest), pieces
            if rest:
                yield replace(block, start=block.stop - rest, width=rest), 1


def _sum(pieces: Tensor) -> Tensor:
    """The sums of [blocks, pieces, height] over the pieces, in float64 where the device has it."""
    if pieces.shape[1] == 1:
        return pieces[:, 0]
    exact = torch.float32 if pieces.device.type == "mps" else torch.float64
    return pieces.sum(1, dtype=exact).to(pieces.dtype)
