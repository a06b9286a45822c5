"""The matrix `P ∈ R^{height×D}` in memory, and products with it.

`Dense` holds float32; `Compressed` holds 16, 8 or 4 bits an element. Products are bound by memory
traffic, so each reads the matrix once. They are taken block by block (`twa.columns.Blocks`), as if
P were block-diagonal with its column ranges as blocks.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from twa.columns import Blocks

# Columns of a dense product for one core: a single long matrix-vector product would use one only.
PIECE = 2**16
# Columns of a compressed tile.
TILE = 256
# The number of elements from which compiled kernels save more time than their compilation takes.
COMPILE_FROM = 2**27
# Elements in a call of a compiled kernel: always the same number, so that it is compiled once.
COMPILED_PART = 2**24
# Elements in a call of a kernel that is not compiled: they fit the cache of a CPU, and fill a GPU.
PART = {"cpu": 2**20, "cuda": 2**24}


class Dense:
    """P in float32, row by row.

    Args:
        rows: float32 [height, D]; not copied.
        blocks: the blocks that the columns form.
        count: the number of blocks of the model.
    """

    def __init__(self, rows: Tensor, blocks: list[Blocks], count: int):
        self.rows = rows
        self._count = count
        self._filled = 0
        # Products are batched: over adjacent narrow blocks, or over the pieces of a wide one.
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
    """P in tiles of 256 columns; a row of a tile is 256 values and their scale.

    Tiles do not depend on the blocks. `values` is [tiles, height, 256], `scales` float32 [tiles,
    height], and an element is a value times its scale. A value is a float16 at 16 bits, an int8 at
    8, and at 4 a number from -8 to 7: with 8 added, column k of a tile is the low half of byte k
    and column k + 128 the high half. Zero is represented exactly.

    Both products use the same rounded elements, so `project` is the exact adjoint of `expand`.
    Large matrices are multiplied by compiled kernels, which decompress in registers. Small ones,
    and all of them where there is no compiler, are decompressed in parts that fit the cache.

    Args:
        bits: 16, 8 or 4.
        height: the number of rows.
        blocks: the blocks that the columns form.
        count: the number of blocks of the model.
        total: the number of columns, D.
        device: the device of the matrix.
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
        self._buffer = torch.empty(self._part, height, TILE, dtype=torch.float32, device=device)
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
        # The largest element takes the lowest level, as there is one more level below zero.
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
        """Finds the tiles within one block, and divides the others into pieces of one block each.

        If more than a fifth of the tiles are divided, as in narrow blocks, all are kept as pieces.
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
        # Divided tiles get the index after the last block, whose results are dropped.
        block_of_tile = torch.full([len(self.values)], self._count)
        block_of_tile[tile[whole]] = block[whole]
        # Up to the last tile that is not divided, tiles are multiplied as a whole.
        self._whole = int(tile[whole].max()) + 1 if whole.any() else 0
        device, cut = self.values.device, ~whole
        self._block_of_tile = block_of_tile.to(device)
        # The pieces in parts; those of an incomplete last tile in separate parts.
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
        end = self._total // TILE * TILE  # The columns from here on are less than a tile.
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
        """Yields the tiles of `pieces`, [pieces], and the result to add to each, [pieces, 256]."""
        for tile, block, _, outside in self._cut_tiles(pieces):
            part = coefficients.new_empty(len(tile), TILE)
            self._run("expand", *self._of(tile), coefficients[block], part)
            yield tile, part.masked_fill_(outside, 0)

    def _parts(self) -> Iterator[slice]:
        """Yields ranges of the tiles that are multiplied as a whole."""
        step = self._compiled_part if self._compiled else self._part
        for start in range(0, self._whole, step):
            yield slice(start, min(start + step, self._whole))

    def _cut_tiles(
        self, pieces: tuple[Tensor, ...]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Yields for each part of `pieces`: their tiles and blocks, [pieces]; and for all columns
        of these tiles their indices, and whether they are outside the piece, [pieces, 256]."""
        inside = torch.arange(TILE, device=self.values.device)
        for tile, block, first, stop in pieces:
            outside = (inside < first[:, None]) | (inside >= stop[:, None])
            yield tile, block, tile[:, None] * TILE + inside, outside

    def _of(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """Values and scales of the tiles with these indices."""
        return self.values.index_select(0, tiles), self.scales.index_select(0, tiles)

    def _run(self, product: str, *tensors: Tensor) -> None:
        """Runs the kernel of `product` on `tensors`, whose first dimension is the tiles."""
        if self._compiled and len(tensors[0]) == self._compiled_part:
            try:
                return _compiled(product)(*tensors)
            except Exception as error:  # Any failure of the compiler: the kernels below need none.
                reason = str(error).strip().partition("\n")[0]
                _warn_once(f"the compressed basis runs uncompiled, and slower: {reason}")
                self._compiled = False
        kernel = {"project": _project, "expand": _expand}[product]
        if len(tensors[0]) <= self._part:
            return kernel(*tensors, self._buffer)
        for part in zip(*(tensor.split(self._part) for tensor in tensors), strict=True):
            kernel(*part, self._buffer)


def _project(
    values: Tensor, scales: Tensor, gradients: Tensor, out: Tensor, buffer: Tensor
) -> None:
    """`out` [tiles, height] ← each tile of P times its `gradients` [tiles, 256]."""
    torch.mul(scales, (gradients[:, None] @ _float(values, buffer).mT)[:, 0], out=out)


def _expand(
    values: Tensor, scales: Tensor, coefficients: Tensor, out: Tensor, buffer: Tensor
) -> None:
    """`out` [tiles, 256] ← `coefficients` [tiles, height] times each tile of P."""
    torch.bmm((scales * coefficients)[:, None], _float(values, buffer), out=out[:, None])


def _float(values: Tensor, buffer: Tensor) -> Tensor:
    """`values` as float32 [tiles, height, 256], not yet scaled, written to `buffer`."""
    buffer = buffer[: len(values)]
    if values.dtype == torch.uint8:
        low, high = buffer.chunk(2, dim=2)
        low.copy_(values & 15)
        high.copy_(values >> 4)
        return buffer.sub_(8)
    return buffer.copy_(values)


# The same products in a form that the compiler fuses. The two halves of a tile are separate sums:
# at 4 bits they are the low and the high halves of bytes, and two sums run in parallel.


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
        # On CPUs the compiler vectorises shifts of 32-bit integers, not of bytes.
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
