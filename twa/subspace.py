"""The basis of the subspace that a window of checkpoints spans, and products with it.

The n checkpoints, flattened, are the rows of `W ∈ R^{n×D}`. `Subspace` turns them, in place, into
the orthonormal rows of `P = T W`: by Gram–Schmidt (Li et al., ICLR 2023, Section 3), or as the
window's principal directions. Both come from the n×n Gram matrix `W Wᵀ` in float64, so the long
dimension is only ever passed over in cache-sized column chunks.

Columns are the model's trainable parameters, one after the other. They fall into blocks (the whole
model, a layer, or an output channel), each with a basis and coefficients of its own.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from twa.checkpoints import Checkpoint, CheckpointError, load_state_dict

EXTRACTS = ("Schmidt", "SVD")
BITS = (32,)
GRANULARITIES = ("model", "layer", "channel")

# A checkpoint whose part outside the span of the ones before it is smaller than this, relative to
# its own norm, is dropped: float32 weights carry rounding errors of 6e-8.
DEPENDENT = 1e-6
# Elements of a float64 column chunk: 8 MB, to stay within the cache.
CHUNK = 2**20


@dataclass(frozen=True)
class Blocks:
    """`count` blocks of `width` columns each, side by side from column `start`.

    `first` is the number of the first of them among all blocks.
    """

    first: int
    start: int
    count: int
    width: int

    @property
    def numbers(self) -> slice:
        """The blocks, as a slice of all blocks."""
        return slice(self.first, self.first + self.count)

    @property
    def columns(self) -> slice:
        """The columns, as a slice of all columns."""
        return slice(self.start, self.start + self.count * self.width)

    def of(self, rows: Tensor) -> Tensor:
        """This range of `rows` [n, D], seen as [count, n, width]."""
        return rows[:, self.columns].unflatten(1, (self.count, self.width)).transpose(0, 1)


class Columns:
    """Where a model's trainable parameters lie in the columns of the basis.

    Each unique trainable parameter in the order of `named_parameters`, flattened in logical
    row-major order whatever its memory format.
    """

    def __init__(self, model: nn.Module):
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if not named:
            raise ValueError("the model has no trainable parameters")
        self.names = [_plain(name) for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        self.known = {_plain(name) for name in model.state_dict()}
        self.total = sum(p.numel() for p in self.parameters)

    def split(self, flat: Tensor) -> Iterator[Tensor]:
        """`flat` [D] as views in the shapes of the parameters."""
        for part, p in zip(flat.split([p.numel() for p in self.parameters]), self.parameters):
            yield part.view(p.shape)

    def read(self, checkpoint: Checkpoint, name: str, row: Tensor) -> None:
        """Writes `checkpoint`'s trainable parameters into `row` [D], in the row's dtype."""
        try:
            state = load_state_dict(checkpoint)
        except CheckpointError as error:
            message = str(error)
            raise CheckpointError(message if name in message else f"{name}: {message}") from None
        state = {_plain(key): value for key, value in state.items()}
        for key, out in zip(self.names, self.split(row)):
            if key not in state:
                raise CheckpointError(f"{name}: of another architecture: {key} is missing")
            if state[key].shape != out.shape:
                raise CheckpointError(
                    f"{name}: of another architecture: {key} is {list(state[key].shape)} there "
                    f"and {list(out.shape)} in the model"
                )
            out.copy_(state[key])
        for key, value in state.items():
            if key not in self.known and value.is_floating_point():
                raise CheckpointError(f"{name}: of another architecture: the model has no {key}")

    def blocks(self, granularity: str) -> list[Blocks]:
        """The blocks at `granularity`, equal widths that follow each other taken together."""
        if granularity == "model":
            parts = [(1, self.total)]
        elif granularity == "layer":
            parts = [(1, sum(p.numel() for p in layer)) for layer in self._layers()]
        else:
            parts = [part for layer in self._layers() for part in _channels(layer)]
        blocks = []
        first = start = 0
        for width, same in groupby((part for part in parts if part[1]), key=lambda part: part[1]):
            count = sum(count for count, _ in same)
            blocks.append(Blocks(first, start, count, width))
            first, start = first + count, start + count * width
        return blocks

    def _layers(self) -> list[list[nn.Parameter]]:
        """The parameters by the module that owns them.

        Modules with vectors alone (batch norm) join the layer before them, leading ones the first.
        """
        layers = []
        leading = True
        named = zip(self.names, self.parameters)
        for _, owned in groupby(named, key=lambda item: item[0].rpartition(".")[0]):
            parameters = [parameter for _, parameter in owned]
            small = all(p.dim() < 2 for p in parameters)
            if layers and (small or leading):
                layers[-1] += parameters
            else:
                layers.append(parameters)
            leading = leading and small
        return layers


class Subspace:
    """An orthonormal basis of the span of checkpoints, and products with it.

    Args:
        model: its trainable parameters give the columns, their device is the basis's.
        checkpoints: n paths or `state_dict`s, in the order of training. Read one at a time;
            what is not a trainable parameter of `model` is ignored.
        extract: "Schmidt", Gram–Schmidt in the order of the checkpoints (Section 3 of the paper);
            or "SVD", the principal directions of the window.
        components: for "SVD", how many of the leading principal directions of the window centred
            on its mean are kept in each block (fewer where a block has no more). What is left of
            the mean outside their span follows them as one direction more, so that the mean
            itself is in the span.
        bits: of a stored element.
        granularity: "model", "layer" or "channel": what gets a basis and coefficients of its own.
            A layer is a module that owns parameters; one with vectors alone, such as batch norm,
            joins the layer before it. A channel is one index of a weight's first dimension; the
            vectors of a layer form one block.

    Attributes:
        parameters: the model's trainable parameters behind the columns, in order.
        dropped: names (path, or index of a `state_dict`) of checkpoints left out of the basis,
            because in every block they depend linearly on the ones before them.

    Raises:
        CheckpointError: a checkpoint cannot be read, does not fit the model, or holds NaN or
            infinity.
        ValueError: an argument is out of its range, or no checkpoint was given.
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
        names = [
            str(index) if isinstance(checkpoint, Mapping) else os.fspath(checkpoint)
            for index, checkpoint in enumerate(checkpoints)
        ]
        self._columns = Columns(model)
        self.parameters = self._columns.parameters
        self._blocks = self._columns.blocks(granularity)
        device = self.parameters[0].device
        n, count = len(checkpoints), self._blocks[-1].numbers.stop

        rows = torch.empty(n, self._columns.total, device=device)
        for checkpoint, name, row in zip(checkpoints, names, rows):
            self._columns.read(checkpoint, name, row)
        # Channels are many: float32 keeps their transforms small beside the basis.
        dtype = torch.float32 if granularity == "channel" else torch.float64
        height = n if extract == "Schmidt" else min(components + 1, n)
        self._transforms = torch.zeros(count, height, n, dtype=dtype, device=device)
        used = torch.zeros(n, dtype=torch.bool, device=device)
        for batch in _batches(self._blocks, n):
            part = batch.of(rows)
            gram = _gram(part)
            _check_finite(gram, names)
            transform = _extract(gram, extract, components)
            if _amplification(transform, gram) > 1e4:
                transform = _extract(_gram(part, transform), "Schmidt", None) @ transform
            _apply(transform, part)
            self._transforms[batch.numbers] = transform[:, :height].to(dtype)
            used |= (transform != 0).any(dim=1).any(dim=0)
        # Rows of a rank-deficient block beyond its rank are zero and have no coefficient.
        real = (self._transforms != 0).any(dim=2)
        self._height = int(real.sum(dim=1).max())
        self._transforms = self._transforms[:, : self._height]
        real = real[:, : self._height]
        self._index = None if real.all() else real.flatten().nonzero().squeeze(1)
        self._length = int(real.sum())
        self._basis = rows[: self._height]
        if self._height < n and extract == "SVD":
            self._basis = self._basis.clone()
        self.dropped = [name for name, use in zip(names, used.tolist()) if not use]
        if self.dropped:
            warnings.warn(
                f"{len(self.dropped)} of {n} checkpoints depend linearly on the ones before them "
                f"and were dropped from the basis: {', '.join(self.dropped)}",
                stacklevel=2,
            )

    def __len__(self) -> int:
        """The number of coefficients, all blocks together."""
        return self._length

    @property
    def nbytes(self) -> int:
        """Memory of the stored basis, in bytes."""
        return self._basis.untyped_storage().nbytes()

    @torch.no_grad()
    def project(self, gradients: Tensor) -> Tensor:
        """`P g`: the gradient with respect to the coefficients.

        Args:
            gradients: float32 [D], in the order of the columns.

        Returns:
            float32 [len(self)], the coefficients of all blocks one after the other.
        """
        products = gradients.new_zeros(len(self._transforms), self._height)
        for blocks in self._blocks:
            part = gradients[blocks.columns].view(blocks.count, blocks.width, 1)
            torch.bmm(blocks.of(self._basis), part, out=products[blocks.numbers].unsqueeze(2))
        return products.flatten() if self._index is None else products.flatten()[self._index]

    @torch.no_grad()
    def expand(self, coefficients: Tensor) -> Tensor:
        """`Pᵀ β`: weights from coefficients.

        Args:
            coefficients: float32 [len(self)].

        Returns:
            float32 [D], in the order of the columns.
        """
        coefficients = self._padded(coefficients).unsqueeze(1)
        weights = coefficients.new_empty(self._columns.total)
        for blocks in self._blocks:
            out = weights[blocks.columns].view(blocks.count, 1, blocks.width)
            torch.bmm(coefficients[blocks.numbers], blocks.of(self._basis), out=out)
        return weights

    @torch.no_grad()
    def averaging_weights(self, coefficients: Tensor) -> Tensor:
        """α with `w = Σ α_i w_i`, for `w` = `expand(coefficients)`.

        Args:
            coefficients: float32 [len(self)].

        Returns:
            float64 [checkpoints] at granularity "model", [blocks, checkpoints] at finer ones.
            Zero where a checkpoint was dropped.
        """
        padded = self._padded(coefficients).to(self._transforms.dtype).unsqueeze(1)
        alpha = torch.bmm(padded, self._transforms).squeeze(1).double()
        return alpha.squeeze(0) if len(alpha) == 1 else alpha

    @torch.no_grad()
    def flatten(self, tensors: Iterable[Tensor | None]) -> Tensor:
        """`tensors`, one for each parameter, as one vector in the order of the columns.

        Args:
            tensors: in the shapes of `self.parameters`, any dtype; None stands for zeros.

        Returns:
            float32 [D].
        """
        flat = self._basis.new_empty(self._columns.total)
        for out, tensor in zip(self._columns.split(flat), tensors, strict=True):
            if tensor is None:
                out.zero_()
            else:
                out.copy_(tensor)
        return flat

    @torch.no_grad()
    def assign(self, flat: Tensor) -> None:
        """Writes `flat` [D] into the model's parameters."""
        for parameter, part in zip(self.parameters, self._columns.split(flat), strict=True):
            parameter.copy_(part)

    def _padded(self, coefficients: Tensor) -> Tensor:
        """`coefficients` as [blocks, height], zero where a block has no such direction."""
        shape = len(self._transforms), self._height
        if self._index is None:
            return coefficients.view(shape)
        padded = coefficients.new_zeros(shape[0] * shape[1])
        padded[self._index] = coefficients
        return padded.view(shape)


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


def _plain(name: str) -> str:
    """`name` without what DataParallel and torch.compile put before it."""
    return re.sub(r"^((module|_orig_mod)\.)+", "", name)


def _channels(layer: list[nn.Parameter]) -> Iterator[tuple[int, int]]:
    """(count, width) of a layer's blocks at granularity "channel"."""
    for vectors, parameters in groupby(layer, key=lambda p: p.dim() < 2):
        if vectors:
            yield 1, sum(p.numel() for p in parameters)
        else:
            for p in parameters:
                yield len(p), p[0].numel() if len(p) else 0


def _batches(blocks: list[Blocks], n: int) -> Iterator[Blocks]:
    """`blocks` in batches whose n×n matrices fit a chunk."""
    for group in blocks:
        step = max(1, CHUNK // n**2)
        for skip in range(0, group.count, step):
            yield Blocks(
                group.first + skip,
                group.start + skip * group.width,
                min(step, group.count - skip),
                group.width,
            )


def _chunks(part: Tensor) -> Iterator[Tensor]:
    """`part` [count, n, width] in column chunks."""
    return part.split(max(1, CHUNK // (part.shape[0] * part.shape[1])), dim=2)


def _gram(part: Tensor, transform: Tensor | None = None) -> Tensor:
    """`X Xᵀ` in float64 for each X = `transform` @ `part` [count, n, width]."""
    count, n, _ = part.shape
    gram = torch.zeros(count, n, n, dtype=torch.float64, device=part.device)
    for chunk in _chunks(part):
        chunk = chunk.double()
        if transform is not None:
            chunk = transform @ chunk
        gram.baddbmm_(chunk, chunk.mT)
    return gram


def _apply(transform: Tensor, part: Tensor) -> None:
    """`part` [count, n, width] ← `transform` @ `part`, in place, computed in float64."""
    for chunk in _chunks(part):
        chunk.copy_(transform @ chunk.double())


def _check_finite(gram: Tensor, names: list[str]) -> None:
    """Raises `CheckpointError` if a row held NaN or infinity: its square then does too."""
    finite = gram.diagonal(dim1=1, dim2=2).isfinite().all(dim=0)
    if not finite.all():
        raise CheckpointError(f"{names[finite.int().argmin()]}: holds NaN or infinity")


def _amplification(transform: Tensor, gram: Tensor) -> float:
    """By how much `transform` amplifies errors of the rows relative to their norms.

    Rounding errors of the Gram matrix enter `P Pᵀ` by its square.
    """
    norms = gram.diagonal(dim1=1, dim2=2).sqrt().unsqueeze(2)
    return float((transform.abs() @ norms).max())


def _extract(gram: Tensor, extract: str, components: int | None) -> Tensor:
    """T [count, n, n] with orthonormal rows `T W`, then zero rows, from `gram` = W Wᵀ."""
    if extract == "SVD":
        return _principal(gram, components)
    return _gram_schmidt(gram)


def _gram_schmidt(gram: Tensor) -> Tensor:
    """The inverse of the Cholesky factor L: `W = L P`, so `P = L⁻¹ W`.

    Rows that depend on the ones before them are left out: their columns are zero, and zero rows
    at the end stand for them.
    """
    factor, info = torch.linalg.cholesky_ex(gram)
    norms = gram.diagonal(dim1=1, dim2=2).sqrt()
    pivots = factor.diagonal(dim1=1, dim2=2)
    full = (info == 0) & (pivots > DEPENDENT * norms).all(dim=1)
    transform = torch.zeros_like(gram)
    identity = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    transform[full] = torch.linalg.solve_triangular(
        factor[full], identity.expand_as(gram[full]), upper=False
    )
    if not full.all():
        transform[~full] = _gram_schmidt_dropping(gram[~full])
    return transform


def _gram_schmidt_dropping(gram: Tensor) -> Tensor:
    """As `_gram_schmidt`, row by row, for windows with dependent rows."""
    count, n, _ = gram.shape
    transform = torch.zeros_like(gram)
    kept = torch.zeros(count, n, dtype=torch.bool, device=gram.device)
    for i in range(n):
        # Row i of L, and what is left of w_i once its projections are taken away.
        projections = transform[:, :i] @ gram[:, :, i : i + 1]
        residual = -(projections.mT @ transform[:, :i])
        residual[:, 0, i] += 1
        square = gram[:, i, i] - projections.square().sum(dim=(1, 2))
        kept[:, i] = square > DEPENDENT**2 * gram[:, i, i]
        scale = torch.where(kept[:, i], square, torch.inf).rsqrt()
        transform[:, i] = residual.squeeze(1) * scale.unsqueeze(1)
    order = kept.int().argsort(dim=1, descending=True, stable=True)
    return transform.gather(1, order.unsqueeze(2).expand_as(transform))


def _principal(gram: Tensor, components: int) -> Tensor:
    """The `components` leading principal directions, then what is left of the mean.

    Signs are chosen so that the largest averaging weight of each direction is positive.
    """
    n = gram.shape[1]
    centring = torch.eye(n, dtype=gram.dtype, device=gram.device) - 1 / n
    values, vectors = torch.linalg.eigh(centring @ gram @ centring)
    values, vectors = values.flip(1), vectors.flip(2)
    norm = gram.diagonal(dim1=1, dim2=2).amax(dim=1, keepdim=True)
    kept = (values > DEPENDENT**2 * norm) & (torch.arange(n, device=gram.device) < components)
    scale = torch.where(kept, values, torch.inf).rsqrt()
    directions = (centring @ vectors * scale.unsqueeze(1)).mT
    largest = directions.gather(2, directions.abs().argmax(dim=2, keepdim=True))
    directions = directions * torch.where(largest < 0, -1.0, 1.0)

    mean = torch.full_like(gram[:, :1], 1 / n)
    for _ in range(2):  # Once more against rounding, since the mean dwarfs what is left of it.
        mean = mean - mean @ gram @ directions.mT @ directions
    square = mean @ gram @ mean.mT
    kept = square > DEPENDENT**2 * norm.unsqueeze(2)
    mean = mean * torch.where(kept, square, torch.inf).rsqrt()
    rows = kept.new_zeros(gram.shape[:2]) | (directions != 0).any(dim=2)
    place = rows.sum(dim=1)
    transform = directions
    has_room = place < n
    numbers = torch.arange(len(gram), device=gram.device)[has_room]
    transform[numbers, place[has_room]] = mean[has_room, 0]
    return transform
