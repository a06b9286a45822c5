"""`Checkpoints`, a few elements of which are read together, and `Means` of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from twa.files.checkpoints import NotFiniteError
from twa.files.fit import PREFIXES, scales_of
from twa.files.reading import CheckpointError, Stored, mapped, tensor_of
from twa.files.states import plain, weights_of

# The elements of a piece: in float64 they fit the cache of a CPU.
PIECE = 2**18


class Checkpoints:
    """Checkpoints of one architecture, of which the same elements are read together.

    Args:
        paths: the last one gives the names. No tensor is read yet.

    Attributes:
        paths: as given.
        tensors: the names in the last checkpoint, and its tensors.

    Raises:
        CheckpointError: a checkpoint cannot be read, is quantized, or is of another architecture.
    """

    def __init__(self, paths: Sequence[Path]):
        self.paths = paths
        self.tensors = weights_of(paths[-1], str(paths[-1]))
        self._names = {key: name for name, key in plain(self.tensors).items()}
        self._states = [self._matched(path) for path in paths[:-1]]
        self._states.append({name: self.tensors[key] for key, name in self._names.items()})

    def _matched(self, path: Path) -> dict[str, Tensor | Stored]:
        state = weights_of(path, str(path))
        state = {name: state[key] for name, key in plain(state).items()}
        for key, own in self.tensors.items():
            there = state.get(self._names[key])
            if there is None or there.shape != own.shape:
                what = "missing" if there is None else f"{list(there.shape)}"
                raise CheckpointError(
                    f"{path}: of another architecture: {key} is {what} there and "
                    f"{list(own.shape)} in {self.paths[-1]}"
                )
            eight = own.dtype.itemsize == 1 and own.dtype != torch.bool
            if scales := ", ".join(scales_of(key, self.tensors)) if eight else "":
                raise CheckpointError(
                    f"{path}: is quantized: {key} goes with {scales}; dequantize it first"
                )
        return state

    @property
    def bytes_to_read(self) -> int:
        """The bytes of all tensors of all checkpoints."""
        return len(self.paths) * sum(
            v.shape.numel() * v.dtype.itemsize for v in self.tensors.values()
        )

    @property
    def memory(self) -> int:
        """The bytes of memory that it takes, without the pages of mapped files."""
        whole = 0
        for states in zip(*(state.values() for state in self._states), strict=False):
            unmapped = [v for v in states if not mapped(v) or isinstance(v, Stored)]
            whole = max(whole, sum(v.shape.numel() * v.dtype.itemsize for v in unmapped))
        return whole + 8 * PIECE * 4

    def pieces(self, key: str, size: int = PIECE) -> Iterator[tuple[int, list[Tensor]]]:
        """The first element of a piece of the tensor `key`, and that piece of each checkpoint."""
        name = self._names[key]
        flats = [tensor_of(state[name]).reshape(-1) for state in self._states]
        for begin in range(0, max(len(flats[-1]), 1), size):
            yield begin, [flat[begin : begin + size] for flat in flats]


class Means(Checkpoints):
    """Means `Σ α_i w_i / Σ α_i` of checkpoints, for several α at once.

    Real and complex tensors are averaged, with sums in float64 (complex128) in the order of the
    checkpoints. The division comes last, so that the mean of few float32 values is rounded once.
    Everything else, such as counters, is that of the last checkpoint. Without the model's code
    buffers and parameters look alike, so buffers are averaged as well.

    Args:
        paths: as of `Checkpoints`.
        alphas: for each mean the weights of the checkpoints, [len(paths)]; or those of each
            tensor by name, as `twa.files.weights` reads them. These are not divided by their sum,
            and a tensor without any is that of the last checkpoint.
    """

    def __init__(
        self, paths: Sequence[Path], alphas: Sequence[Sequence[float] | Mapping[str, Tensor]]
    ):
        super().__init__(paths)
        self._alphas = alphas
        for alpha in alphas:
            used = {_within(name, alpha) for name in self._names.values()}
            for name in alpha.keys() - used if isinstance(alpha, Mapping) else ():
                raise CheckpointError(f"{paths[-1]}: has no {name}, of which there are weights")

    def of(
        self, key: str, dtype: torch.dtype, read: Callable[[int], None]
    ) -> Iterator[tuple[int, list[Tensor]]]:
        """The means of the tensor `key`, in pieces: the first element, and a piece of each mean.

        Args:
            dtype: of the result.
            read: is called with the number of bytes after each piece that was read.

        Raises:
            NotFiniteError: a checkpoint has NaN or infinity where another has not.
        """
        name, last = self._names[key], self.tensors[key]
        real, complex_ = last.dtype.is_floating_point, last.dtype.is_complex
        wide = torch.complex128 if complex_ else torch.float64
        for begin, pieces in self.pieces(key):
            if not (real or complex_):
                yield begin, [pieces[-1]] * len(self._alphas)
            else:
                totals = [torch.zeros(len(pieces[-1]), dtype=wide) for _ in self._alphas]
                alphas = [_part(a, name, last.shape, begin, len(pieces[-1])) for a in self._alphas]
                for i, piece in enumerate(pieces):
                    exact = piece.float() if piece.dtype.itemsize == 1 else piece
                    exact = exact.to(wide)
                    for total, (alpha, _) in zip(totals, alphas, strict=True):
                        # Not by `add_(..., alpha=)`, which rounds otherwise on other CPUs.
                        plain_sum = isinstance(alpha[i], float) and alpha[i] == 1
                        total += exact if plain_sum else alpha[i] * exact
                for total, (_, divisor) in zip(totals, alphas, strict=True):
                    if divisor != 1:
                        total /= divisor
                    if not total.sum().isfinite():
                        self._settle(key, pieces, total)
                yield begin, [total.to(dtype) for total in totals]
            read(sum(piece.nbytes for piece in pieces))

    def _settle(self, key: str, pieces: list[Tensor], total: Tensor) -> None:
        """Puts NaN and infinities into `total` where all checkpoints have the same ones.

        A mask of attention has them by design.
        """
        odd = [
            ~piece.float().isfinite() if piece.dtype.itemsize == 1 else ~piece.isfinite()
            for piece in pieces
        ]
        last = pieces[-1].to(total.dtype)
        for path, piece, mine in zip(self.paths, pieces, odd, strict=True):
            same = torch.allclose(piece[mine].to(total), last[mine], equal_nan=True)
            if not torch.equal(mine, odd[-1]) or not same:
                culprit = path if mine.any() else self.paths[-1]
                raise NotFiniteError(f"{culprit}: {key} holds NaN or infinity")
        total[odd[-1]] = last[odd[-1]]


def _within(name: str, alpha: Sequence[float] | Mapping[str, Tensor]) -> str:
    """The name that `alpha` has for a tensor, whose own may have prefixes of wrappers."""
    while name not in alpha and name.partition(".")[0] in PREFIXES:
        name = name.partition(".")[2]
    return name


def _part(
    alpha: Sequence[float] | Mapping[str, Tensor],
    name: str,
    shape: torch.Size,
    begin: int,
    size: int,
) -> tuple[Sequence[float | Tensor], float]:
    """The weights of the checkpoints for some elements of a tensor, and what to divide by."""
    if not isinstance(alpha, Mapping):
        return alpha, math.fsum(alpha)
    values = alpha.get(_within(name, alpha))
    if values is None:
        count = len(next(iter(alpha.values())))
        return [*[0.0] * (count - 1), 1.0], 1.0
    places, own = torch.arange(begin, begin + size), torch.zeros(size, dtype=torch.int64)
    stride = 1
    for length, dimension in zip(reversed(values.shape[1:]), reversed(shape), strict=True):
        if length > 1:
            own += places % dimension * stride
            stride *= length
        places //= dimension
    return [each.flatten()[own] if stride > 1 else each.item() for each in values.double()], 1.0
