"""The reference against linear algebra and autograd, and the optimizer against the reference."""

import copy

import numpy as np
import pytest
import torch
from test_optimizer import (
    digits_batches,
    digits_run,
    gradient_of,
    rows_of,
    set_weights,
    smooth,
    weights_of,
)
from torch import nn

from twa import TWA
from twa.files.checkpoints import average
from twa.reference import Reference, blocks_of, gram_schmidt, principal_directions

SGD, AdamW = torch.optim.SGD, torch.optim.AdamW
assert smooth  # a fixture of test_optimizer


def test_gram_schmidt_is_the_qr_decomposition():
    """Of rows that lie close together; a row that depends on others adds none."""
    W = 1 + 1e-3 * torch.randn(6, 40, generator=torch.Generator().manual_seed(0)).double()
    q, r = np.linalg.qr(W.numpy().T)
    expected = torch.from_numpy((q * np.sign(np.diag(r))).T)
    torch.testing.assert_close(gram_schmidt(W), expected, rtol=0, atol=1e-9)
    dependent = torch.cat([W[:3], W[:1] - 2 * W[2:3], W[3:]])
    torch.testing.assert_close(gram_schmidt(dependent), expected, rtol=0, atol=1e-9)


def test_principal_directions_are_the_eigenvectors_of_the_covariance():
    W = torch.randn(5, 12, generator=torch.Generator().manual_seed(0)).double()
    P, sigma = principal_directions(W)
    covariance = torch.from_numpy(np.cov(W.numpy().T, bias=True))
    torch.testing.assert_close(P @ covariance @ P.T, sigma.square().diag())
    torch.testing.assert_close(P @ P.T, torch.eye(4).double())


@pytest.mark.parametrize("granularity", ["model", "layer", "channel"])
@pytest.mark.parametrize("extract", ["PCA", "Schmidt"])
def test_project_is_the_derivative_of_the_loss_through_expand(extract, granularity):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2))
    W = torch.randn(4, sum(p.numel() for p in model.parameters())).double()
    reference = Reference(W, W[1], blocks_of(model, granularity), SGD, extract=extract, lr=0.1)
    target = torch.randn(W.shape[1]).double()
    z = reference.z_0.clone().requires_grad_()
    w = reference.w_0 + torch.autograd.functional.jacobian(reference.expand, z.detach()) @ z
    w = w - torch.autograd.functional.jacobian(reference.expand, z.detach()) @ reference.z_0
    (w - target).square().sum().backward()
    gradient = 2 * (reference.w_0 - target)
    torch.testing.assert_close(reference.project(gradient), z.grad)


# What rounding to float32 changes in 30 steps, relative to the distance from the start. Seen: at
# most 2.4e-5 with "Schmidt", whose coefficients are as large as the weights, and 5.0e-6 with "PCA".
BOUNDS = {"Schmidt": 5e-5, "PCA": 1e-5}


@pytest.mark.parametrize("granularity", ["model", "layer", "channel"])
@pytest.mark.parametrize(
    "extract, unit, base, arguments",
    [
        ("Schmidt", "direction", SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-3}),
        ("PCA", "direction", AdamW, {"lr": 0.02, "weight_decay": 0.0}),
        ("PCA", "block", AdamW, {"lr": 0.02, "weight_decay": 0.0}),
    ],
    ids=["the paper's", "the default", "in units of the block"],
)
def test_the_optimizer_follows_the_reference_for_30_steps(
    extract, unit, base, arguments, granularity, smooth
):
    """Each computes its own gradients, the reference in a model of float64."""
    model, checkpoints = digits_run(smooth)
    trained, plain = copy.deepcopy(model), copy.deepcopy(model).double()
    basis = {"extract": extract, "granularity": granularity}
    optimizer = TWA(trained, checkpoints, base, **basis, unit=unit, **arguments)
    plain.load_state_dict(average(checkpoints, model))
    W = rows_of(model, checkpoints)
    blocks = blocks_of(model, granularity)
    reference = Reference(W, W.mean(0), blocks, base, extract=extract, unit=unit, **arguments)
    assert len(optimizer.subspace) == len(reference.z)
    w = reference.w_0
    for batch in (digits_batches() * 2)[:30]:
        gradient_of(trained, batch)
        optimizer.step()
        set_weights(plain, w)
        w = reference.step(gradient_of(plain, batch))
    distance = (w - reference.w_0).norm()
    assert distance > 0.005 * w.norm()
    assert (weights_of(trained) - w).norm() <= BOUNDS[extract] * distance
