"""The transform that makes a basis of checkpoints, computed from their inner products.

For n checkpoints `W ∈ R^{n×D}` the functions here see only n×n matrices, in float64 and for a
batch of blocks at once: inner products of the differences `X = B W`, whose rows are `w_1`,
`w_2 − w_1`, …, `w_n − w_{n−1}`. Checkpoints of one run differ by a thousandth of their norm, so
that six digits of their own inner products would cancel; those of the differences keep theirs.
`B` is lower triangular with a positive diagonal, so Gram–Schmidt yields the same basis from X as
from W.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# A checkpoint, or a direction, counts as dependent if its part outside the span of the ones before
# is no larger than this, relative to the norm of a checkpoint; float32 weights round at 6e-8.
DEPENDENT = 1e-6
# A spread whose square is no number of float32, as that of a filter that weight decay took to 0.
NO_SPREAD = 1e-18
# Rounding errors of the inner products, 1e-16 in float64, enter the basis multiplied by the square
# of their amplification. Where that is larger than this, the inner products of the computed rows
# are taken as well, and correct them.
AMPLIFICATION = 3e3
# Up to this amplification float32 is enough; in the checkpoints of one run it is one to three.
SMALL_AMPLIFICATION = 4

# products(None, dtype) is `X Xᵀ`, products(T, dtype) is `(T X)(T X)ᵀ` computed from the rows `T X`
# themselves, with factors in dtype and sums in float64; float64 [blocks, rows, rows].
Products = Callable[[Tensor | None, torch.dtype], Tensor]


def gram_schmidt(products: Products, single: bool) -> tuple[Tensor, Tensor, torch.dtype]:
    """Gram–Schmidt in the order of the checkpoints (Li et al., ICLR 2023, Section 3).

    With the Cholesky factor `X Xᵀ = L Lᵀ` the basis is `P = L⁻¹ X`. Where X is too close to
    dependent for that, the factor of `X Xᵀ` with a small shift of its diagonal makes the rows
    nearly orthonormal first, and their inner products tell which checkpoints are dependent (shifted
    Cholesky QR: Fukaya et al., SIAM J. Sci. Comput. 2020).

    Args:
        single: whether to try inner products in float32 first.

    Returns:
        T with `P = T X`, float64 [blocks, n, n]: the rows of the basis, then zero rows, as many as
        checkpoints depend on the ones before them; which checkpoints do not, bool [blocks, n]; and
        the dtype in which to compute `T X`.
    """
    attempts = [(torch.float32, SMALL_AMPLIFICATION)] if single else []
    for dtype, limit in [*attempts, (torch.float64, AMPLIFICATION)]:
        gram = products(None, dtype)
        norms = _norms(gram)
        transform, regular = _cholesky(gram, DEPENDENT * norms)
        if regular.all() and _amplifications(transform, gram).max() < limit:
            return transform, torch.ones_like(norms, dtype=torch.bool), dtype

    squares = gram.diagonal(dim1=1, dim2=2)
    shift = DEPENDENT**2 * (norms.square() + gram.shape[1] * squares)
    factor = torch.linalg.cholesky(gram + torch.diag_embed(shift.where(shift > 0, 1)))
    transform = _inverse(factor)
    gram = products(transform, torch.float64)
    correction, kept = _gram_schmidt_dropping(gram, factor, DEPENDENT * norms)
    transform = correction @ transform
    if _amplifications(correction, gram).max() > AMPLIFICATION:
        transform = _orthonormalising(products(transform, torch.float64)) @ transform
    return transform, kept, torch.float64


def principal_directions(
    products: Products, components: int, dependent: float = DEPENDENT
) -> tuple[Tensor, Tensor]:
    """The leading principal directions of the window centred on its mean, and its spread there.

    Directions along which the checkpoints spread by no more than rounding are left out. The sign
    of a direction is such that the last of its largest averaging weights is positive.

    Args:
        components: how many directions to keep, at most n; a block that has fewer keeps these.
        dependent: the spread that is rounding, relative to the norm of a checkpoint.

    Returns:
        T with `P = T X`, float64 [blocks, components, n], zero rows where a block has no such
        direction. And the standard deviation of the checkpoints along each direction (the root of
        their mean square, about the mean), float64 [blocks, components]; 0 for zero rows.
    """
    gram = products(None, torch.float64)
    n = gram.shape[1]
    identity = torch.eye(n, dtype=gram.dtype, device=gram.device)
    centring = (identity - 1 / n).flip(1).cumsum(1).flip(1)  # From differences to W less its mean,
    centring[:, 0] = 0  # in which w_1 has no part.
    values, vectors = torch.linalg.eigh(centring @ gram @ centring.mT)
    floor = dependent**2 * torch.maximum(_norms(gram).amax(dim=1).square(), values[:, -1])
    floor = floor.clamp(min=n * NO_SPREAD**2)
    values, vectors = values.flip(1)[:, :components], vectors.flip(2)[:, :, :components]
    values = values.where(values > floor[:, None], 0)
    transform = (vectors * _signs(vectors)).mT @ centring * _rsqrt(values)[:, :, None]
    if _amplifications(transform, gram).max() > AMPLIFICATION:
        gram = products(transform, torch.float64)
    else:
        gram = transform @ gram @ transform.mT
    return _orthonormalising(gram) @ transform, (values / n).sqrt()


def root_mean_squares(spread: Tensor) -> Tensor:
    """In each block the root mean square in place of its positive elements, [blocks, rows]."""
    there = spread > 0
    mean = spread.square().sum(dim=1, keepdim=True) / there.sum(dim=1, keepdim=True).clamp(min=1)
    return mean.sqrt() * there


def mean_row(like: Tensor) -> Tensor:
    """The transform whose one row `T X` is the mean of the checkpoints: float64 [blocks, 1, n].

    Args:
        like: [blocks, rows, n].
    """
    return torch.full_like(like[:, :1], 1 / like.shape[2]).flip(2).cumsum(2).flip(2)


def of_checkpoints(transform: Tensor) -> Tensor:
    """The transform `T B` of the checkpoints W from that of their differences, `T`."""
    weights = transform.clone()
    weights[:, :, :-1] -= transform[:, :, 1:]
    return weights


def _norms(gram: Tensor) -> Tensor:
    """The norms of the checkpoints, [blocks, n]: each is the sum of the differences up to it."""
    return gram.cumsum(1).cumsum(2).diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()


def _amplifications(transform: Tensor, gram: Tensor) -> Tensor:
    """How much larger rounding errors are in `T X` than in X, relative to the rows, [blocks].

    It is the norm of the terms whose sum is a row of `T X`, of norm 1; the largest of all rows.
    """
    squares = gram.diagonal(dim1=1, dim2=2)[:, :, None]
    return (transform.square() @ squares).amax(dim=(1, 2)).sqrt()


def _cholesky(gram: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """L⁻¹ with `gram = L Lᵀ`, and which blocks have an L with a diagonal above `thresholds`."""
    factor, info = torch.linalg.cholesky_ex(gram)
    regular = (info == 0) & (factor.diagonal(dim1=1, dim2=2) > thresholds).all(dim=1)
    transform = torch.zeros_like(gram)
    transform[regular] = _inverse(factor[regular])
    return transform, regular


def _inverse(factor: Tensor) -> Tensor:
    """The inverses of lower triangular matrices."""
    identity = torch.eye(factor.shape[1], dtype=factor.dtype, device=factor.device)
    return torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)


def _orthonormalising(gram: Tensor) -> Tensor:
    """The matrix that makes nearly orthonormal rows, of inner products `gram`, orthonormal.

    Zero rows stay zero.
    """
    empty = gram.diagonal(dim1=1, dim2=2) == 0
    matrix, regular = _cholesky(gram + torch.diag_embed(empty.to(gram)), gram.new_tensor(0.5))
    matrix[~regular] = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    return matrix


def _gram_schmidt_dropping(
    gram: Tensor, factor: Tensor, thresholds: Tensor
) -> tuple[Tensor, Tensor]:
    """Gram–Schmidt of the checkpoints in terms of other rows Y, with `X = factor @ Y`.

    Checkpoints whose part outside the span of the ones before is no larger than their entry of
    `thresholds` [blocks, n] are left out.

    Args:
        gram: `Y Yᵀ`.
        factor: lower triangular.

    Returns:
        T with `P = T Y` and which checkpoints are kept, as `gram_schmidt`.
    """
    transform, regular = _cholesky(gram, thresholds / factor.diagonal(dim1=1, dim2=2))
    kept = regular[:, None].expand_as(thresholds).clone()
    if regular.all():
        return transform, kept
    gram, factor, thresholds = gram[~regular], factor[~regular], thresholds[~regular]
    rows, keep = torch.zeros_like(gram), torch.zeros_like(thresholds, dtype=torch.bool)
    # The checkpoint less the last one that was kept, a sum of rows of X, in terms of Y.
    difference = torch.zeros_like(gram[:, 0])
    for i in range(gram.shape[1]):
        difference += factor[:, i].masked_fill(keep, 0)
        projections = rows[:, :i] @ gram @ difference[:, :, None]
        residual = difference - (projections.mT @ rows[:, :i])[:, 0]
        square = (residual[:, None] @ gram @ residual[:, :, None])[:, 0, 0]
        keep[:, i] = square > thresholds[:, i].square()
        rows[:, i] = residual * torch.where(keep[:, i], square, torch.inf).rsqrt()[:, None]
        difference[keep[:, i]] = 0
    transform[~regular], kept[~regular] = _zero_rows_last(rows, keep), keep
    return transform, kept


def _signs(vectors: Tensor) -> Tensor:
    """The sign of the largest element of each column of `vectors` [blocks, n, columns].

    Of elements that are equally large up to rounding, it is that of the last.
    """
    sizes = vectors.abs()
    largest = sizes >= 0.999 * sizes.amax(dim=1, keepdim=True)
    last = largest.shape[1] - 1 - largest.flip(1).int().argmax(dim=1, keepdim=True)
    return vectors.gather(1, last).sign()


def _rsqrt(values: Tensor) -> Tensor:
    """`1 / sqrt(values)`, and 0 where a value is not positive."""
    return values.where(values > 0, torch.inf).rsqrt()


def _zero_rows_last(transform: Tensor, kept: Tensor) -> Tensor:
    """The rows of `transform` that are `kept`, in their order, then the others."""
    order = kept.int().argsort(dim=1, descending=True, stable=True)
    return transform.gather(1, order[:, :, None].expand_as(transform))
