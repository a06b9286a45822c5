"""The curvature along TWA's coefficients, against the Hessian in float64."""

import pytest
import torch
from curvature import curvature
from torch import Tensor, nn

from twa import TWA

INPUTS = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
TARGETS = INPUTS.sum(1, keepdim=True)


class Regression(nn.Module):
    """Linear, so that the Hessian does not depend on the weights; with dropout and batch norm."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(6, affine=False)
        self.fc = nn.Linear(6, 1, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.fc(2 * self.norm(inputs) * (torch.rand(inputs.shape) < 0.5))


def checkpoints(count: int) -> list[dict]:
    states, generator = [], torch.Generator().manual_seed(2)
    for _ in range(count):
        model = Regression()
        model.fc.weight.data.copy_(torch.randn(1, 6, generator=generator))
        states.append(model.state_dict())
    return states


def closure_for(model: nn.Module, optimizer: TWA):
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(INPUTS) - TARGETS).square().mean()
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("extract, count", [("PCA", 2), ("PCA", 4), ("Schmidt", 1), ("Schmidt", 4)])
def test_it_is_the_largest_eigenvalue_of_the_hessian(extract, count):
    """In the coefficients, with the same masks of dropout each time; nothing else is changed."""
    model = Regression()
    optimizer = TWA(model, checkpoints(count), torch.optim.SGD, extract=extract, lr=0.1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(5)
    generator = torch.get_rng_state()
    measured = curvature(optimizer, model, closure_for(model, optimizer), iterations=10)

    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(optimizer.coefficients, optimizer.origin)
    inputs = INPUTS.double()
    inputs = (inputs - inputs.mean(0)) / (inputs.var(0, correction=0) + 1e-5).sqrt()
    inputs = inputs * 2 * (torch.rand(inputs.shape, dtype=torch.float32) < 0.5)
    basis = torch.stack(
        [optimizer.subspace.expand(unit) for unit in torch.eye(len(optimizer.coefficients))]
    )
    rows = inputs @ basis.double().T
    exact = torch.linalg.eigvalsh(2 * rows.T @ rows / len(rows)).abs().max().item()
    assert measured == pytest.approx(exact, rel=0.01)


def test_a_closure_that_fails_leaves_the_model_where_it_was():
    model = Regression()
    optimizer = TWA(model, checkpoints(3), torch.optim.SGD, lr=0.1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    calls = []

    def closure() -> Tensor:
        calls.append(None)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return closure_for(model, optimizer)()

    with pytest.raises(RuntimeError, match="out of memory"):
        curvature(optimizer, model, closure)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
