"""The method on a page: Trainable Weight Averaging, dense, in float64, in one process.

It follows `docs/method.md` equation by equation; the fast code is tested against it. The rows of
W [n, D] are the n checkpoints of a model with D trainable weights, flattened.
"""

import torch
from torch import Tensor, nn

DEPENDENT = 1e-6  # A direction shorter than this, relative to a checkpoint, is rounding.


def gram_schmidt(W: Tensor) -> Tensor:
    """P [rows, D] with W = L P, L lower triangular, P Pᵀ = I; dependent checkpoints add no row."""
    rows: list[Tensor] = []
    for w in W:
        rest = w
        for _ in range(2):  # A single pass leaves errors where checkpoints are nearly parallel.
            for p in rows:
                rest = rest - (p @ rest) * p
        if rest.norm() > DEPENDENT * w.norm():
            rows.append(rest / rest.norm())
    return torch.stack(rows)


def principal_directions(W: Tensor) -> tuple[Tensor, Tensor]:
    """P [rows, D], the principal directions, and σ [rows], the standard deviation along each."""
    _, values, P = torch.linalg.svd(W - W.mean(0), full_matrices=False)
    kept = values > DEPENDENT * W.norm(dim=1).max()
    return P[kept], values[kept] / len(W) ** 0.5


def blocks_of(model: nn.Module, granularity: str) -> list[Tensor]:
    """The blocks of columns of W that have a basis of their own, int64 [columns] each.

    A module that owns only vectors joins the layer before it; a layer's vectors form one block.
    """
    layers, start, begun = [], 0, False
    for module in model.modules():
        owned = list(module.parameters(recurse=False))
        matrices = any(parameter.dim() > 1 for parameter in owned)
        if owned and (not layers or (matrices and begun)):
            layers.append([])
        begun |= matrices
        for parameter in owned:
            layers[-1].append(torch.arange(start, start + parameter.numel()).view(parameter.shape))
            start += parameter.numel()
    if granularity != "channel":
        whole = [torch.cat([columns.flatten() for columns in layer]) for layer in layers]
        return whole if granularity == "layer" else [torch.cat(whole)]
    blocks = []
    for layer in layers:
        matrices = [columns for columns in layer if columns.dim() > 1]
        vectors = [columns for columns in layer if columns.dim() < 2]
        blocks += [channel.flatten() for columns in matrices for channel in columns]
        blocks += [torch.cat(vectors)] if vectors else []
    return blocks


class Reference:
    """TWA on flattened weights w [D]: w = w_0 + Pᵀ (u ∘ (z − z_0)) in each block.

    `base` steps on z. With "PCA" z_0 = 0, and u is σ, or the root mean square of a block's σ
    (unit "block"). With "Schmidt" u = 1 and z_0 = P w_0.
    """

    def __init__(self, W, w_0, blocks, base, *, extract="PCA", unit="direction", **arguments):
        self.w_0, self.blocks, self.P, u, z_0 = w_0.double(), blocks, [], [], []
        for block in blocks:
            rows = W[:, block].double()
            if extract == "Schmidt":
                P = gram_schmidt(rows)
                sigma, first = torch.ones(len(P)).double(), P @ self.w_0[block]
            else:
                P, sigma = principal_directions(rows)
                first = torch.zeros(len(P)).double()
                sigma = sigma.square().mean().sqrt().expand(len(P)) if unit == "block" else sigma
            self.P.append(P), u.append(sigma), z_0.append(first)
        self.u, self.z_0 = torch.cat(u), torch.cat(z_0)
        self.z = nn.Parameter(self.z_0.clone())
        self.base = base([self.z], **arguments)

    def project(self, gradient: Tensor) -> Tensor:
        """∂loss/∂z = u ∘ P ∇loss(w), from the gradient [D]."""
        products = [P @ gradient[block] for P, block in zip(self.P, self.blocks, strict=True)]
        return self.u * torch.cat(products)

    def expand(self, z: Tensor) -> Tensor:
        """w = w_0 + Pᵀ (u ∘ (z − z_0)), float64 [D]."""
        w = self.w_0.clone()
        moves = (self.u * (z - self.z_0)).split([len(P) for P in self.P])
        for P, block, move in zip(self.P, self.blocks, moves, strict=True):
            w[block] += move @ P
        return w

    def step(self, gradient: Tensor) -> Tensor:
        """Lets `base` step along the gradient ∇loss(w) [D]; returns the new w [D]."""
        self.z.grad = self.project(gradient.double())
        self.base.step()
        return self.expand(self.z.detach())
