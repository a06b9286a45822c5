"""`CompressedMatrix`: the basis in 8 or 4 bits.

The columns are divided into tiles of about 256. An element is a small integer times the scale of
its row in the tile; zero is exact. Both products use the same rounded elements, so `project` is the
exact adjoint of `expand`.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from twa.files.reading import one_line
from twa.storage.columns import Blocks
from twa.storage.matrix import TILE, Matrix, runs_of_tiles

# The number of elements from which compiled kernels save more time than their compilation takes.
COMPILE_FROM = 2**27
# The elements of a call: they fill a GPU, and the intermediate sums of a compiled kernel fit the
# cache of a CPU. Without a compiler, the decompressed elements have to fit it.
PART = 2**24
CACHED_PART = 2**20


class CompressedMatrix(Matrix):
    """P in 8 or 4 bits.

    The scales of tiles are float32 [tiles, height]. The values are int8 [tiles, height, width] or,
    at 4 bits, uint8 [tiles, height, width / 2]: byte k contains column k in its low half and column
    k + width / 2 in its high half, each from -8 to 7 with 8 added. A zero column pads an odd width.

    Large matrices use compiled kernels, which decompress in registers. Small ones, and all of them
    where there is no compiler, are decompressed in parts.
    """

    def __init__(
        self, bits: int, height: int, blocks: list[Blocks], count: int, device: torch.device
    ):
        self.height, self._count = height, count
        self._runs = list(runs_of_tiles(blocks, TILE))
        self._tiles: list[tuple[Tensor, Tensor]] = []  # values and scales
        for run, pieces in self._runs:
            width = -(-run.width // pieces // 2) * (bits // 4)  # in bytes
            shape, dtype = (run.count * pieces, height), torch.int8 if bits == 8 else torch.uint8
            values = torch.empty(*shape, width, dtype=dtype, device=device)
            self._tiles.append((values, torch.empty(shape, dtype=torch.float32, device=device)))
        self._compiled = (
            height * sum(run.count * run.width for run, _ in self._runs) >= COMPILE_FROM
        )

    @property
    def nbytes(self) -> int:
        """The memory of values and scales in bytes."""
        return sum(tensor.nbytes for tensors in self._tiles for tensor in tensors)

    def fill(self, start: int, rows: Tensor) -> None:
        """As `Matrix.fill`; compresses the rows."""
        for (run, pieces), (values, scales) in zip(self._runs, self._tiles, strict=True):
            low, high = max(start, run.start), min(start + rows.shape[1], run.stop)
            if low < high:
                width = run.width // pieces
                part = rows[:, low - start : high - start].unflatten(1, (-1, width))
                tiles = slice((low - run.start) // width, (high - run.start) // width)
                _compress(part.transpose(0, 1), values[tiles], scales[tiles])

    def _project(self, index: int, columns: Tensor, out: Tensor) -> None:
        self._run(_project, _project_fused, index, _padded(columns), out)

    def _expand(self, index: int, coefficients: Tensor, out: Tensor) -> None:
        padded = _padded(out)
        self._run(_expand, _expand_fused, index, coefficients, padded)
        if padded is not out:
            out.copy_(padded[:, :-1])

    def _run(self, plain: Callable, fused: Callable, index: int, factors: Tensor, out: Tensor):
        """Runs one of both kernels; `factors` and `out` have a row for each tile."""
        (run, pieces), tensors = self._runs[index], (*self._tiles[index], factors, out)
        size = self.height * (run.width // pieces)
        if self._compiled and tensors[0].numel() > CACHED_PART:
            try:
                return _in_parts(_compiled(fused), PART // size, tensors)
            except Exception as error:  # Whatever the compiler fails at, the plain kernels work.
                warnings.warn(
                    f"the compressed basis runs uncompiled, and slower: {one_line(error)}",
                    stacklevel=2,
                )
                self._compiled = False
        _in_parts(plain, (CACHED_PART if out.device.type == "cpu" else PART) // size, tensors)


def _in_parts(kernel: Callable, step: int, tensors: tuple[Tensor, ...]) -> None:
    """Calls `kernel` for `step` tiles at a time, or for one."""
    for part in zip(*(tensor.split(max(1, step)) for tensor in tensors), strict=True):
        kernel(*part)


def _compress(rows: Tensor, values: Tensor, scales: Tensor) -> None:
    """Compresses `rows`, float32 [tiles, height, width], into `values` and `scales`."""
    # The largest element takes the lowest level, as there is one more level below zero.
    levels = 8 if values.dtype == torch.uint8 else 128
    low, high = rows.amin(dim=2, keepdim=True), rows.amax(dim=2, keepdim=True)
    factors = torch.where(high > -low, high, low) / -levels
    scales.copy_(factors[:, :, 0])
    rounded = (rows / factors.where(factors != 0, 1)).round_().clamp_(-levels, levels - 1)
    rounded = _padded(rounded)
    if values.dtype == torch.uint8:
        low, high = (rounded + 8).to(torch.uint8).chunk(2, dim=2)
        rounded = low | high << 4
    values.copy_(rounded)


def _padded(columns: Tensor) -> Tensor:
    """`columns`, with a zero appended to its last dimension if that is odd."""
    odd = columns.shape[-1] % 2
    return torch.nn.functional.pad(columns, (0, 1)) if odd else columns


def _project(values: Tensor, scales: Tensor, gradients: Tensor, out: Tensor) -> None:
    """Writes each tile of P times its `gradients` [tiles, width] to `out` [tiles, height]."""
    torch.mul(scales, (gradients[:, None] @ _floats(values).mT)[:, 0], out=out)


def _expand(values: Tensor, scales: Tensor, coefficients: Tensor, out: Tensor) -> None:
    """Writes `coefficients` [tiles, height] times each tile of P to `out` [tiles, width]."""
    torch.bmm((scales * coefficients)[:, None], _floats(values), out=out[:, None])


def _floats(values: Tensor) -> Tensor:
    """`values` as float32 [tiles, height, width], not yet scaled."""
    if values.dtype == torch.uint8:
        return torch.cat([values & 15, values >> 4], dim=2).float().sub_(8)
    return values.float()


# The same products in a form that the compiler fuses. The two halves of a tile are separate sums:
# at 4 bits they are the low and the high halves of bytes, and two sums run in parallel. Naming the
# usual width makes the compiler write faster kernels for it.


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
def _compiled(kernel: Callable) -> Callable:
    # Once for all shapes: layers and channels differ in the number and the width of their tiles.
    return torch.compile(kernel, dynamic=True, fullgraph=True)
