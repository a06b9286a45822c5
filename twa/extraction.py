"""The transform that makes a basis of checkpoints, computed from their inner products.

The functions see only n×n matrices of the n checkpoints `W ∈ R^{n×D}`, in float64, for a batch of
blocks at once. These are inner products of the differences `X = B W`, whose rows are `w_1`,
`w_2 − w_1`, …, `w_n − w_{n−1}`: checkpoints of one run differ by a thousandth of their norm, so
their own inner products would lose six digits by cancellation. `B` is lower triangular with a
positive diagonal, so Gram–Schmidt of X yields the same basis as that of W.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# A checkpoint or direction counts as dependent if its part outside the span of the ones before is
# no larger than this, relative to the norm of a checkpoint. Rounding to float32 changes it by 6e-8.
DEPENDENT = 1e-6
# The square of a smaller spread is 0 in float32, as for a filter that weight decay took to 0.
NO_SPREAD = 1e-18
# Rounding errors of the inner products, 1e-16 in float64, enter the basis multiplied by the square
# of an amplification. If that is above this limit, the inner products of the computed rows are
# taken as well, and correct the rows.
AMPLIFICATION = 3e3
# Up to this amplification float32 is enough; the checkpoints of one run have one to three.
SMALL_AMPLIFICATION = 4

# products(None, dtype) is `X Xᵀ`, products(T, dtype) is `(T X)(T X)ᵀ` computed from the rows `T X`
# themselves, with factors in dtype and sums in float64; float64 [blocks, rows, rows].
Products = Callable[[Tensor | None, torch.dtype], Tensor]


def gram_schmidt(products: Products, single: bool) -> tuple[Tensor, Tensor, torch.dtype]:
    """Gram–Schmidt in the order of the checkpoints (Li et al., ICLR 2023, Section 3).

    With the Cholesky factor `X Xᵀ = L Lᵀ` the basis is `P = L⁻¹ X`. Where X is too close to
    dependent for that, the factor of `X Xᵀ` with a small shift of its diagonal first makes the rows
    nearly orthonormal, and their inner products show which checkpoints are dependent (shifted
    Cholesky QR: Fukaya et al., SIAM J. Sci. Comput. 2020).

    Args:
        single: whether to try inner products in float32 first.

    Returns:
        T with `P = T X`, float64 [blocks, n, n], with a zero row at the end for each dependent
        checkpoint; which checkpoints are independent, bool [blocks, n]; and the dtype for `T X`.
    """
    attempts = [(torch.float32, SMALL_AMPLIFICATION)] if single else []
    for dtype, limit in [*attempts, (torch.float64, AMPLIFICATION)]:
        gram = products(None, dtype)
        norms = _norms(gram)
        transform, regular = _inverse_cholesky(gram, DEPENDENT * norms)
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
    """The leading principal directions of the window, centred on its mean, and its spread there.

    Directions along which the checkpoints spread by no more than rounding are dropped. The sign of
    a direction makes the last of its largest averaging weights positive.

    Args:
        components: the number of directions to keep, at most n; a block may have fewer.
        dependent: the spread that is rounding, relative to the norm of a checkpoint.

    Returns:
        T with `P = T X`, float64 [blocks, components, n], with zero rows where a block has fewer
        directions. And the standard deviation of the checkpoints along each direction (the root of
        their mean square about the mean), float64 [blocks, components]; 0 for zero rows.
    """
    gram = products(None, torch.float64)
    n = gram.shape[1]
    identity = torch.eye(n, dtype=gram.dtype, device=gram.device)
    centring = (identity - 1 / n).flip(1).cumsum(1).flip(1)  # From X to W less its mean,
    centring[:, 0] = 0  # which does not depend on w_1.
    values, vectors = torch.linalg.eigh(centring @ gram @ centring.mT)
    floor = dependent**2 * torch.maximum(_norms(gram).amax(dim=1).square(), values[:, -1])
    floor = floor.clamp(min=n * NO_SPREAD**2)
    values, vectors = values.flip(1)[:, :components], vectors.flip(2)[:, :, :components]
    values = values.where(values > floor[:, None], 0)
    inverse_roots = values.where(values > 0, torch.inf).rsqrt()
    transform = (vectors * _signs(vectors)).mT @ centring * inverse_roots[:, :, None]
    if _amplifications(transform, gram).max() > AMPLIFICATION:
        gram = products(transform, torch.float64)
    else:
        gram = transform @ gram @ transform.mT
    return _orthonormalising(gram) @ transform, (values / n).sqrt()


def root_mean_squares(spread: Tensor) -> Tensor:
    """`spread` [blocks, rows], its positive elements replaced by their root mean square."""
    positive = spread > 0
    count = positive.sum(dim=1, keepdim=True).clamp(min=1)
    return (spread.square().sum(dim=1, keepdim=True) / count).sqrt() * positive


def mean_row(like: Tensor) -> Tensor:
    """The row T for which `T X` is the checkpoints' mean, [blocks, 1, n]; `like` has n columns."""
    return torch.full_like(like[:, :1], 1 / like.shape[2]).flip(2).cumsum(2).flip(2)


def of_checkpoints(transform: Tensor) -> Tensor:
    """`T B`, which applies to the checkpoints W as `transform`, T, does to their differences X."""
    weights = transform.clone()
    weights[:, :, :-1] -= transform[:, :, 1:]
    return weights


def _norms(gram: Tensor) -> Tensor:
    """The norms of the checkpoints, [blocks, n]: each is the sum of the differences up to it."""
    return gram.cumsum(1).cumsum(2).diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()


def _amplifications(transform: Tensor, gram: Tensor) -> Tensor:
    """How much larger relative rounding errors are in `T X` than in X, [blocks].

    It is the largest norm of the terms whose sum is a row of `T X`; the row's own norm is 1.
    """
    squares = gram.diagonal(dim1=1, dim2=2)[:, :, None]
    return (transform.square() @ squares).amax(dim=(1, 2)).sqrt()


def _inverse_cholesky(gram: Tensor, thresholds: Tensor | float) -> tuple[Tensor, Tensor]:
    """L⁻¹ with `gram = L Lᵀ`, and which blocks have an L with a diagonal above `thresholds`.

    It is zero in the other blocks.
    """
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
    """The matrix that makes nearly orthonormal rows with inner products `gram` orthonormal.

    Zero rows stay zero.
    """
    zero = gram.diagonal(dim1=1, dim2=2) == 0
    matrix, regular = _inverse_cholesky(gram + torch.diag_embed(zero.to(gram)), 0.5)
    matrix[~regular] = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    return matrix


def _gram_schmidt_dropping(
    gram: Tensor, factor: Tensor, thresholds: Tensor
) -> tuple[Tensor, Tensor]:
    """Gram–Schmidt of the checkpoints in terms of rows Y, where `X = factor @ Y`.

    It drops checkpoints whose part outside the span of the ones before is no larger than their
    entry of `thresholds` [blocks, n]. `gram` is `Y Yᵀ`; `factor` is lower triangular.

    Returns:
        T with `P = T Y`, and which checkpoints are kept, as `gram_schmidt`.
    """
    transform, regular = _inverse_cholesky(gram, thresholds / factor.diagonal(dim1=1, dim2=2))
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
    kept_first = keep.int().argsort(dim=1, descending=True, stable=True)
    transform[~regular] = rows.gather(1, kept_first[:, :, None].expand_as(rows))
    kept[~regular] = keep
    return transform, kept


def _signs(vectors: Tensor) -> Tensor:
    """The sign of the largest element of each column of `vectors` [blocks, n, columns].

    Of elements that are equally large up to rounding, it is that of the last.
    """
    sizes = vectors.abs()
    largest = sizes >= 0.999 * sizes.amax(dim=1, keepdim=True)
    last = largest.shape[1] - 1 - largest.flip(1).int().argmax(dim=1, keepdim=True)
    return vectors.gather(1, last).sign()
