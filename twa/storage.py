"""The matrix `P ∈ R^{height×D}` in memory, and products with it.

`Dense` holds float32; `Compressed` holds 16, 8 or 4 bits an element. Products are bound by memory
traffic, so each reads the matrix once. They answer block by block: P stands for the block-diagonal
matrix whose blocks are its column ranges in `twa.columns`.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from twa.columns import Blocks

# Columns of a dense product that one core takes at a time: a single long matrix-vector product
# would run on one core.
PIECE = 2**16
# Columns of a compressed tile.
TILE = 256
# Compressed matrices with fewer elements are not worth the seconds that a compiler takes.
COMPILE_FROM = 2**27
# Elements that a compiled kernel takes at a time: always as many, so that it is compiled once.
COMPILED_PART = 2**24
# Elements decompressed at a time where no kernel is compiled: they fit the cache of a CPU, and fill
# a GPU.
PART = {"cpu": 2**20, "cuda": 2**24}


class Dense:
    """P in float32, row by row.

    Args:
        rows: float32 [height, D], kept and not copied.
        blocks: of the columns.
        count: how many blocks the model has.
    """

    def __init__(self, rows: Tensor, blocks: list[Blocks], count: int):
        self.rows = rows
        self._count = count
        self._filled = 0
        # Products are batched: over many narrow blocks, or over the pieces of one wide block.
        self._narrow, self._pieces = [], []
        for group in blocks:
            if group.count > 1 and group.width < PIECE:
                self._narrow.append(group)
                continue
            for block in group.split(1):
                pieces, rest = divmod(block.width, PIECE)
                if pieces:
                    self._pieces.append(Blocks(block.first, block.start, pieces, PIECE))
                if rest:
                    self._pieces.append(Blocks(block.first, block.stop - rest, 1, rest))

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes

    def append(self, rows: Tensor) -> None:
        """Fills the next columns with `rows` [height, columns]."""
        self.rows[:, self._filled : self._filled + rows.shape[1]] = rows
        self._filled += rows.shape[1]

    def project(self, gradients: Tensor) -> Tensor:
        """`P g` of every block, [blocks, height], from g [D]."""
        products = gradients.new_zeros(self._count, 1, len(self.rows))
        for blocks in self._narrow:
            part = gradients[blocks.start : blocks.stop].view(blocks.count, 1, blocks.width)
            torch.bmm(part, blocks.of(self.rows).mT, out=products[blocks.numbers])
        for pieces in self._pieces:
            part = gradients[pieces.start : pieces.stop].view(pieces.count, 1, pieces.width)
            products[pieces.first] += torch.bmm(part, pieces.of(self.rows).mT).sum(0)
        return products.squeeze(1)

    def expand(self, coefficients: Tensor, out: Tensor) -> None:
        """`out` [D] ← `Pᵀ β`, from the coefficients β of every block, [blocks, height]."""
        coefficients = coefficients[:, None]
        for blocks in self._narrow:
            part = out[blocks.start : blocks.stop].view(blocks.count, 1, blocks.width)
            torch.bmm(coefficients[blocks.numbers], blocks.of(self.rows), out=part)
        for pieces in self._pieces:
            part = out[pieces.start : pieces.stop].view(pieces.count, 1, pieces.width)
            same = coefficients[pieces.first].expand(pieces.count, 1, -1)
            torch.bmm(same, pieces.of(self.rows), out=part)


class Compressed:
    """P in tiles of 256 columns; in each tile a row is 256 small numbers and their scale.

    Tiles follow the columns, whatever the blocks. `values` is [tiles, height, 256], `scales`
    float32 [tiles, height], and an element is a value times its scale. A value is a float16 at 16
    bits, an int8 at 8, and at 4 a number from -8 to 7: with 8 added, column k of a tile is the low
    half of byte k and column k + 128 the high half. Zero is kept exactly.

    Both products use these values as they are, so `project` is the exact adjoint of `expand`.
    Large matrices are multiplied by compiled kernels, which decompress in registers; small ones,
    and all where no compiler is to be had, are decompressed in parts that fit the cache.

    Args:
        bits: 16, 8 or 4.
        height: number of rows.
        blocks: of the columns.
        count: how many blocks the model has.
        total: number of columns, D.
        device: where to keep it.
    """

    def __init__(
        self,
        bits: int,
        height: int,
        blocks: list[Blocks],
        count: int,
        total: int,
        device: torch.device,
    ):
        self._height, self._total, self._count = height, total, count
        tiles = -(-self._total // TILE)
        dtype = {16: torch.float16, 8: torch.int8, 4: torch.uint8}[bits]
        width = TILE // 2 if bits == 4 else TILE
        self.values = torch.empty(tiles, height, width, dtype=dtype, device=device)
        self.scales = torch.empty(tiles, height, dtype=torch.float32, device=device)
        self._filled = 0
        self._rest = torch.empty(height, 0, dtype=torch.float32, device=device)
        self._compiled = self.values[..., :1].numel() * TILE >= COMPILE_FROM
        self._compiled_part = max(1, COMPILED_PART // (height * TILE))
        self._part = max(1, PART.get(device.type, PART["cpu"]) // (height * TILE))
        self._room = torch.empty(self._part, height, TILE, dtype=torch.float32, device=device)
        self._lay_out(blocks)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes

    def append(self, rows: Tensor) -> None:
        """Fills the next columns with `rows`, float32 [height, columns]."""
        rows = torch.cat([self._rest, rows], dim=1)
        tiles, rest = divmod(rows.shape[1], TILE)
        if self._filled * TILE + rows.shape[1] == self._total and rest:
            rows = torch.nn.functional.pad(rows, (0, TILE - rest))
            tiles += 1
        self._rest = rows[:, tiles * TILE :].clone()
        self._fill(rows[:, : tiles * TILE].unflatten(1, (tiles, TILE)).transpose(0, 1))

    def _fill(self, rows: Tensor) -> None:
        """Compresses `rows`, float32 [tiles, height, 256]."""
        place = slice(self._filled, self._filled + len(rows))
        self._filled += len(rows)
        # The element furthest from zero takes the lowest level: there is one more below zero.
        levels = {torch.float16: 2**14, torch.int8: 2**7, torch.uint8: 2**3}[self.values.dtype]
        low, high = rows.amin(dim=2, keepdim=True), rows.amax(dim=2, keepdim=True)
        extreme = torch.where(high > -low, high, low)
        scales = extreme / -levels
        self.scales[place] = scales[:, :, 0]
        values = rows / scales.where(scales != 0, 1)
        if self.values.dtype == torch.float16:
            self.values[place] = values
            return
        values = values.round_().clamp_(-levels, levels - 1)
        if self.values.dtype == torch.uint8:
            low, high = (values + 8).to(torch.uint8).chunk(2, dim=2)
            values = low | high << 4
        self.values[place] = values

    def _lay_out(self, blocks: list[Blocks]) -> None:
        """Finds which tiles lie in one block, and cuts the others into pieces of one block each.

        Where many tiles are cut, since blocks are narrow, all are treated as pieces.
        """
        none = torch.arange(0)
        blocks = [b for b in blocks if b.width]
        starts = torch.cat([none, *(b.start + b.width * torch.arange(b.count) for b in blocks)])
        numbers = torch.cat([none, *(b.first + torch.arange(b.count) for b in blocks)])
        cuts = torch.cat([starts, torch.arange(0, self._total, TILE)]).unique()
        ends = torch.cat([cuts, torch.tensor([self._total])])[1:]
        tile = cuts // TILE
        block = numbers[torch.searchsorted(starts, cuts, right=True) - 1]
        whole = ends - cuts == TILE
        if int(whole.sum()) < 0.8 * len(self.values):
            whole.zero_()
        # Tiles that are cut belong, as a whole, to a block that there is not.
        block_of_tile = torch.full([len(self.values)], self._count)
        block_of_tile[tile[whole]] = block[whole]
        # The tiles up to here, the last that are whole, are multiplied without a look at pieces.
        self._whole = int(tile[whole].max()) + 1 if whole.any() else 0
        device, cut = self.values.device, ~whole
        self._block_of_tile = block_of_tile.to(device)
        # The pieces of tiles in parts, those of an incomplete last tile in parts of their own.
        last = tile == self._total // TILE
        pieces = torch.stack([tile, block, cuts - TILE * tile, ends - TILE * tile]).to(device)
        self._pieces = pieces[:, cut & ~last].split(self._part, dim=1)
        self._last_pieces = pieces[:, last].split(self._part, dim=1)

    def project(self, gradients: Tensor) -> Tensor:
        """`P g` of every block, [blocks, height], from g [D]."""
        exact = torch.float32 if gradients.device.type == "mps" else torch.float64
        products = gradients.new_zeros(self._count + 1, self._height, dtype=exact)
        tiles = gradients[: self._whole * TILE].view(-1, TILE)
        for part in self._parts():
            sums = gradients.new_empty(part.stop - part.start, self._height)
            self._run("project", self.values[part], self.scales[part], tiles[part], sums)
            products.index_add_(0, self._block_of_tile[part], sums.to(exact))
        for tile, block, columns, outside in self._cut_tiles(self._pieces + self._last_pieces):
            part = gradients[columns.clamp_max(self._total - 1)].masked_fill_(outside, 0)
            sums = gradients.new_empty(len(tile), self._height)
            self._run("project", *self._of(tile), part, sums)
            products.index_add_(0, block, sums.to(exact))
        return products[:-1].to(gradients.dtype)

    def expand(self, coefficients: Tensor, out: Tensor) -> None:
        """`out` [D] ← `Pᵀ β`, from the coefficients β of every block, [blocks, height]."""
        out[self._whole * TILE :] = 0
        end = self._total // TILE * TILE  # What is beyond is no whole tile.
        tiles, last = out[:end].view(-1, TILE), out[end:]
        coefficients = torch.cat([coefficients, coefficients.new_zeros(1, self._height)])
        for part in self._parts():
            of_tiles = coefficients[self._block_of_tile[part]]
            self._run("expand", self.values[part], self.scales[part], of_tiles, tiles[part])
        for tile, part in self._expand_cut(self._pieces, coefficients):
            tiles.index_add_(0, tile, part)
        for _, part in self._expand_cut(self._last_pieces, coefficients):
            last += part.sum(0)[: len(last)]

    def _expand_cut(
        self, pieces: tuple[Tensor, ...], coefficients: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The tiles of `pieces` [pieces] and what these add to them, [pieces, 256]; in parts."""
        for tile, block, _, outside in self._cut_tiles(pieces):
            part = coefficients.new_empty(len(tile), TILE)
            self._run("expand", *self._of(tile), coefficients[block], part)
            yield tile, part.masked_fill_(outside, 0)

    def _parts(self) -> Iterator[slice]:
        """The tiles that are multiplied as a whole, in parts."""
        step = self._compiled_part if self._compiled else self._part
        for start in range(0, self._whole, step):
            yield slice(start, min(start + step, self._whole))

    def _cut_tiles(
        self, pieces: tuple[Tensor, ...]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """The pieces of tiles, in parts: tile and block [pieces]; and of all columns of the tile,
        numbers and whether they are outside the piece, [pieces, 256]."""
        inside = torch.arange(TILE, device=self.values.device)
        for tile, block, first, stop in pieces:
            outside = (inside < first[:, None]) | (inside >= stop[:, None])
            yield tile, block, tile[:, None] * TILE + inside, outside

    def _of(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """Values and scales of the numbered `tiles`."""
        return self.values.index_select(0, tiles), self.scales.index_select(0, tiles)

    def _run(self, product: str, *tensors: Tensor) -> None:
        """Runs the kernel of `product` on `tensors`, whose first dimension is the tiles."""
        if self._compiled and len(tensors[0]) == self._compiled_part:
            try:
                return _compiled(product)(*tensors)
            except Exception as error:  # Whatever stops the compiler, the product needs none.
                reason = str(error).strip().partition("\n")[0]
                _warn_once(f"the compressed basis runs uncompiled, and slower: {reason}")
                self._compiled = False
        kernel = {"project": _project, "expand": _expand}[product]
        if len(tensors[0]) <= self._part:
            return kernel(*tensors, self._room)
        for part in zip(*(tensor.split(self._part) for tensor in tensors), strict=True):
            kernel(*part, self._room)


def _project(values: Tensor, scales: Tensor, gradients: Tensor, out: Tensor, room: Tensor) -> None:
    """`out` [tiles, height] ← each tile of P times its `gradients` [tiles, 256]."""
    torch.mul(scales, (gradients[:, None] @ _float(values, room).mT)[:, 0], out=out)


def _expand(
    values: Tensor, scales: Tensor, coefficients: Tensor, out: Tensor, room: Tensor
) -> None:
    """`out` [tiles, 256] ← `coefficients` [tiles, height] times each tile of P."""
    torch.bmm((scales * coefficients)[:, None], _float(values, room), out=out[:, None])


def _float(values: Tensor, room: Tensor) -> Tensor:
    """`values` as float32 [tiles, height, 256], not yet scaled, in `room`."""
    room = room[: len(values)]
    if values.dtype == torch.uint8:
        low, high = room.chunk(2, dim=2)
        low.copy_(values & 15)
        high.copy_(values >> 4)
        return room.sub_(8)
    return room.copy_(values)


# The same products in the form that a compiler fuses. Two halves of a tile at a time: at 4 bits
# these are the low and the high halves of bytes, and at any two sums run side by side.


def _project_fused(values: Tensor, scales: Tensor, gradients: Tensor, out: Tensor) -> None:
    low, high = _halves(values)
    left, right = gradients[:, None, : TILE // 2], gradients[:, None, TILE // 2 :]
    out.copy_(scales * (low * left + high * right).sum(2))


def _expand_fused(values: Tensor, scales: Tensor, coefficients: Tensor, out: Tensor) -> None:
    coefficients = (scales * coefficients)[:, :, None]
    low, high = _halves(values)
    out[:, : TILE // 2] = (low * coefficients).sum(1)
    out[:, TILE // 2 :] = (high * coefficients).sum(1)


def _halves(values: Tensor) -> tuple[Tensor, Tensor]:
    if values.dtype == torch.uint8:
        # A compiler for CPUs makes vector instructions of shifts in 32 bits, not in 8.
        values = values.int()
        return ((values & 15) - 8).float(), ((values >> 4) - 8).float()
    return values[:, :, : TILE // 2].float(), values[:, :, TILE // 2 :].float()


@functools.cache
def _compiled(product: str):
    kernel = {"project": _project_fused, "expand": _expand_fused}[product]
    return torch.compile(kernel, dynamic=False, fullgraph=True)


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)
