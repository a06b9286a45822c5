"""The largest curvature of the loss along TWA's coefficients, by which rates were once chosen."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from twa import TWA


def curvature(
    optimizer: TWA, model: nn.Module, closure: Callable[[], Tensor], iterations: int = 4
) -> float:
    """The largest magnitude of an eigenvalue of the Hessian in the coefficients, ≥ 0.

    By the Lanczos method; its products are differences of gradients. With momentum m a full-batch
    step of SGD is stable below `2 (1 + m) / curvature`, and `(1 - m) / curvature` suits small
    batches. Costs `iterations + 1` calls of `closure`, each from the same random generators
    (dropout) and buffers (batch norm); both, and the model, are left as they were.

    Args:
        closure: clears the gradients, computes the loss, calls `backward` and returns the loss,
            always on the same data.
        iterations: of the Lanczos method; a few find the largest within a tenth or two.
    """
    here = optimizer.coefficients.detach().clone()
    in_spread = optimizer.subspace.scale is not None
    # Large enough for differences of float32 gradients, small enough for a quadratic loss.
    length = 0.03 if in_spread else 1e-3 * max(float(here.norm()), 1e-3)

    def gradient(coefficients: Tensor) -> Tensor:
        optimizer.set_coefficients(coefficients)
        with _unchanged(model, here.device):
            closure()
        flat = optimizer.subspace.flatten(p.grad for p in optimizer.subspace.parameters)
        return optimizer.subspace.project(flat)

    try:
        within = _hessian_within(gradient, here, length, iterations)
    finally:
        optimizer.set_coefficients(here)
        optimizer.zero_grad()
    return float(torch.linalg.eigvalsh((within + within.T) / 2).abs().max())


@contextlib.contextmanager
def _unchanged(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Context manager: restores the buffers of `model` and the random generators at the end."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = [] if device.type == "cpu" else [device]  # The CPU's generator is always restored.
    try:
        with torch.random.fork_rng(devices, device_type=device.type):
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def _hessian_within(
    gradient: Callable[[Tensor], Tensor], here: Tensor, length: float, iterations: int
) -> Tensor:
    """The Hessian restricted to a Krylov space, by the Lanczos method.

    Args:
        gradient: the gradient of the loss, [n], as a function of the coefficients [n].
        here: the coefficients at which the Hessian is taken, [n].
        length: the length of the steps for differences of gradients.
        iterations: the dimension of the Krylov space, at most.

    Returns:
        float64 on the CPU, [dimension, dimension]; symmetric up to rounding.
    """
    start = gradient(here)
    # The gradient has a large part along large curvature; a random vector has some along any.
    generator = torch.Generator("cpu").manual_seed(0)  # the same on every rank
    random = torch.randn(len(here), generator=generator, device="cpu").to(here)
    direction = start / start.norm().clamp(min=1e-12) + random / random.norm()
    if len(here) == 1:  # The two may cancel, and there is only this direction.
        direction = torch.ones_like(here)
    directions = here.new_zeros(min(iterations, len(here)), len(here))
    products = torch.zeros_like(directions)
    for i in range(len(directions)):
        directions[i] = direction / direction.norm()
        products[i] = (gradient(here + length * directions[i]) - start) / length
        direction = products[i]
        for _ in range(2):  # The second pass removes the rounding errors of the first.
            direction = direction - directions.T @ (directions @ direction)
        if direction.norm() <= 1e-4 * products[i].norm():
            break  # The Hessian maps the span of the directions to itself.
    return (directions @ products.T).cpu().double()  # MPS has no float64
