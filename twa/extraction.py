"""From the inner products of checkpoints to the transform that makes them a basis.

For n checkpoints `W ∈ R^{n×D}` the functions here see only n×n matrices, in float64 and for a
batch of blocks at once: inner products of the differences `X = B W`, whose rows are `w_1`,
`w_2 − w_1`, …, `w_n − w_{n−1}`. Checkpoints of one run differ by a thousandth of their norm, so
their own inner products agree in the first six digits; those of the differences do not, and no
digit is lost to that. `B` is lower triangular with a positive diagonal, so Gram–Schmidt yields
the same basis from X as from W.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# A checkpoint is dependent if its part outside the span of the ones before it is no larger than
# this, relative to its norm: the rounding of float32 weights alone is 6e-8.
DEPENDENT = 1e-6
# Rounding errors of the inner products, 1e-16 if they are taken in float64, enter the basis by the
# square of their amplification; where it is larger than this, the products are taken once more, of
# the basis.
AMPLIFICATION = 3e3
# Up to this much of it, float32 is enough; the checkpoints of one run amplify by one to three.
SMALL_AMPLIFICATION = 4

# products(None, dtype) is `X Xᵀ`, products(T, dtype) is `(T X)(T X)ᵀ` computed from the rows `T X`
# themselves, with factors in dtype and sums in float64; float64 [blocks, rows, rows].
Products = Callable[[Tensor | None, torch.dtype], Tensor]


def gram_schmidt(products: Products, single: bool = True) -> tuple[Tensor, Tensor, torch.dtype]:
    """Gram–Schmidt in the order of the checkpoints (Li et al., ICLR 2023, Section 3).

    With the Cholesky factor `X Xᵀ = L Lᵀ` the basis is `P = L⁻¹ X`. Where X is too close to
    dependent for that, the factor of `X Xᵀ` with a small shift of its diagonal brings it near to
    a basis first, and the products of the result tell which checkpoints are dependent (shifted
    Cholesky QR: Fukaya et al., SIAM J. Sci. Comput. 2020).

    Args:
        single: whether products with factors in float32 are worth a try.

    Returns:
        T with `P = T X`, float64 [blocks, n, n]: the rows of the basis, then zero rows for the
        checkpoints that depend on the ones before them; which ones do not, bool [blocks, n]; and
        the precision that computing `T X` takes.
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
        transform = _reorthonormalise(transform, products(transform, torch.float64))
    return transform, kept, torch.float64


def principal_directions(products: Products, components: int) -> Tensor:
    """The leading principal directions of the window, centred on its mean; then the mean.

    The mean is kept as one direction more: what is left of it outside the span of the others. The
    sign of a principal direction is such that its largest averaging weight is positive.

    Args:
        components: how many principal directions to keep; a block that has fewer keeps these.

    Returns:
        T with `P = T X`, float64 [blocks, min(components + 1, n), n]; zero rows where a block has
        fewer directions.
    """
    gram = products(None, torch.float64)
    n = gram.shape[1]
    identity = torch.eye(n, dtype=gram.dtype, device=gram.device)
    centring = (identity - 1 / n).flip(1).cumsum(1).flip(1)  # From differences to W less its mean,
    centring[:, 0] = 0  # in which w_1 has no part.
    values, vectors = torch.linalg.eigh(centring @ gram @ centring.mT)
    floor = DEPENDENT**2 * torch.maximum(_norms(gram).amax(dim=1).square(), values[:, -1])
    values, vectors = values.flip(1)[:, :components], vectors.flip(2)[:, :, :components]
    largest = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True)).sign()
    scale = torch.where(values > floor[:, None], values, torch.inf).rsqrt()
    directions = (vectors * largest).mT @ centring * scale[:, :, None]

    mean = torch.full_like(gram[:, :1], 1 / n).flip(2).cumsum(2).flip(2)
    for _ in range(2):  # The second time removes the rounding errors of the first.
        mean = mean - mean @ gram @ directions.mT @ directions
    square = mean @ gram @ mean.mT
    mean = mean * torch.where(square > floor[:, None, None], square, torch.inf).rsqrt()
    transform = torch.cat([directions, mean], dim=1)
    transform = _zero_rows_last(transform, (transform != 0).any(dim=2))[:, :n]
    if _amplifications(transform, gram).max() > AMPLIFICATION:
        transform = _reorthonormalise(transform, products(transform, torch.float64))
    return transform


def of_checkpoints(transform: Tensor) -> Tensor:
    """The transform `T B` of the checkpoints W from that of their differences, `T`."""
    weights = transform.clone()
    weights[:, :, :-1] -= transform[:, :, 1:]
    return weights


def _norms(gram: Tensor) -> Tensor:
    """The norms of the checkpoints, [blocks, n]: each is the sum of the differences up to it."""
    return gram.cumsum(1).cumsum(2).diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()


def _amplifications(transform: Tensor, gram: Tensor) -> Tensor:
    """How much larger, relative to the rows, rounding errors are in `T X` than in X, [blocks].

    By how much the worst row of `T X` is smaller than the rows of X that it is combined of.
    """
    squares = gram.diagonal(dim1=1, dim2=2)[:, :, None]
    return (transform.square() @ squares).amax(dim=(1, 2)).sqrt()


def _cholesky(gram: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """L⁻¹ with `gram = L Lᵀ`, and for which blocks it exists, L's diagonal above `thresholds`."""
    factor, info = torch.linalg.cholesky_ex(gram)
    regular = (info == 0) & (factor.diagonal(dim1=1, dim2=2) > thresholds).all(dim=1)
    transform = torch.zeros_like(gram)
    transform[regular] = _inverse(factor[regular])
    return transform, regular


def _inverse(factor: Tensor) -> Tensor:
    """The inverses of lower triangular matrices."""
    identity = torch.eye(factor.shape[1], dtype=factor.dtype, device=factor.device)
    return torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)


def _reorthonormalise(transform: Tensor, gram: Tensor) -> Tensor:
    """`transform`, whose rows `T X` have the inner products `gram`, made orthonormal to rounding.

    For rows that nearly are.
    """
    empty = (transform == 0).all(dim=2)
    return _inverse(torch.linalg.cholesky(gram + torch.diag_embed(empty.to(gram)))) @ transform


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
        T with `P = T Y` and which checkpoints are in, as `gram_schmidt`.
    """
    transform, regular = _cholesky(gram, thresholds / factor.diagonal(dim1=1, dim2=2))
    kept = regular[:, None].expand_as(thresholds).clone()
    if regular.all():
        return transform, kept
    gram, factor, thresholds = gram[~regular], factor[~regular], thresholds[~regular]
    rows, keep = torch.zeros_like(gram), torch.zeros_like(thresholds, dtype=torch.bool)
    # A checkpoint less the last one that was kept: a sum of rows of X, as combination of Y.
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


def _zero_rows_last(transform: Tensor, kept: Tensor) -> Tensor:
    """The rows of `transform` that are `kept`, in their order, then the others."""
    order = kept.int().argsort(dim=1, descending=True, stable=True)
    return transform.gather(1, order[:, :, None].expand_as(transform))
