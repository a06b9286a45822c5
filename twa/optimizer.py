"""`TWA`: an optimizer whose parameters are the coefficients of a weight average."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from twa.checkpoints import Checkpoint, average, load_into
from twa.subspace import Subspace

# The rate of AdamW on coefficients in units of the spread: it suits every model, granularity and
# budget that was tried.
RATE = 0.02


class TWA(torch.optim.Optimizer):
    """Trainable Weight Averaging (Li et al., ICLR 2023, Section 3) around any optimizer.

    The model moves only in the span of the checkpoints, `w = w_0 + Σ_i σ_i z_i p_i`: w_0 is the
    start point, p_i are the principal directions of the window and σ_i is the standard deviation
    of its checkpoints along p_i, the unit in which the coefficient z_i counts. A step projects the
    model's gradient, `∂loss/∂z_i = σ_i p_i·∇loss(w)`, lets `base` step on the coefficients z,
    which begin at 0, and writes w back. Before the first step the model is the start point to the
    bit.

        optimizer = TWA(model, checkpoints)
        for images, labels in loader:
            criterion(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()

    With `base=torch.optim.SGD` and `extract="Schmidt"` it is the paper's method: Gram–Schmidt makes
    an orthonormal basis P of the checkpoints, the coefficients β begin at `β_0 = P w_0`, and
    `w = w_0 + Pᵀ(β − β_0)`. That is SGD on w with its gradient projected by `PᵀP`; weight decay
    then acts within the span.

    Learning rate schedules, `state_dict()` and `load_state_dict()` work as with any optimizer.

    Args:
        model: the module to train, whole or sharded by FSDP2 (`fully_shard`, called before). Its
            trainable parameters are set to the start point, and so are its buffers and frozen
            parameters. Batch norm's running statistics belong to the data, not to the average:
            re-estimate them (`torch.optim.swa_utils.update_bn`) before you evaluate.
        checkpoints: paths (`.pt`, `.safetensors`) or `state_dict`s, in the order of training.
        base: the class of the optimizer that steps on the coefficients, float32 of shape [n].
        start: the start point, a path or a `state_dict`; the checkpoints' mean (SWA) if None.
        extract, components, bits, granularity: the basis; see `Subspace`.
        radius: after a step, the coefficients of each block (all of them at granularity "model")
            whose root mean square is larger are scaled back to it, so that a rate that is much too
            large cannot take the model arbitrarily far from the checkpoints. From the mean, the
            checkpoints are at about 1; ordinary training stays below 3. `math.inf` for no limit.
            For "PCA" only: the paper's coefficients have no such unit, and are not limited.
        **base_arguments: what `base` takes: `lr`, `momentum`, `weight_decay`, … Those left out are
            its own defaults, except that AdamW with "PCA" gets `lr=0.02` and `weight_decay=0`.

    Raises:
        CheckpointError: a checkpoint cannot be read or does not fit the model.
        ValueError: an argument is out of its range; there are no checkpoints, or for "PCA" no two
            that differ.
        MemoryError: the basis does not fit into the memory that is free.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        checkpoints: Sequence[Checkpoint],
        base: type[torch.optim.Optimizer] = torch.optim.AdamW,
        *,
        start: Checkpoint | None = None,
        extract: str = "PCA",
        components: int | None = None,
        bits: int = 32,
        granularity: str = "model",
        radius: float = 10.0,
        **base_arguments,
    ):
        if extract == "PCA" and base is torch.optim.AdamW:
            base_arguments = {"lr": RATE, "weight_decay": 0.0} | base_arguments
        # If `base` does not take these, it says so here, before the model is changed.
        base([torch.nn.Parameter(torch.zeros(1))], **base_arguments)
        if not radius > 0:
            raise ValueError(f"radius must be larger than 0, not {radius!r}")
        self.subspace = Subspace(
            model,
            checkpoints,
            extract=extract,
            components=components,
            bits=bits,
            granularity=granularity,
        )
        load_into(model, average(checkpoints, model.state_dict()) if start is None else start)
        self._model, self._radius = model, radius
        self._start = self.subspace.flatten(self.subspace.parameters)
        self._start_coefficients = self.subspace.coordinates(self._start)
        # The coefficients at which the model is the start point.
        self.origin = self._start_coefficients.clone()
        if extract == "PCA":
            self.origin.zero_()
        self._flat = self.subspace.empty()  # For gradients and weights in turn.
        # This differs between windows, even where the start coefficients agree.
        self._fingerprint = self.subspace.project(self._flat.fill_(1))
        self.coefficients = torch.nn.Parameter(self.origin.clone())
        self.base = base([self.coefficients], **base_arguments)
        super().__init__(self.base.param_groups, self.base.defaults)
        # Shared, so that rates written into a group, and a loaded `state_dict`, reach `base`.
        self.base.param_groups = self.param_groups
        self.state = self.base.state

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step of `base` on the coefficients, limited by `radius`; the weights follow.

        A parameter without a gradient counts as one whose gradient is zero.

        Args:
            closure: clears the gradients, computes the loss, calls `backward` and returns the
                loss, as for any optimizer; those that evaluate it many times (`LBFGS`) need it.
        """
        if closure is None:
            self._project_gradients()
            self.base.step()
            self._finish_step()
            return None

        def closure_at_coefficients() -> Tensor:
            self._write_weights()
            loss = closure()
            self._project_gradients()
            return loss

        loss = self.base.step(closure_at_coefficients)
        self._finish_step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients of the coefficients and of the model's parameters."""
        super().zero_grad(set_to_none)
        for parameter in self.subspace.parameters:
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.zero_()

    def curvature(self, closure: Callable[[], Tensor], iterations: int = 4) -> float:
        """The largest curvature of the loss along the coefficients, at where they are, ≥ 0.

        The largest magnitude of an eigenvalue of the Hessian in the coefficients, by the Lanczos
        method; its products are differences of gradients. What SGD does at a rate depends on
        rate · curvature: with momentum m a full-batch step is stable below
        `2 (1 + m) / curvature`, and `(1 - m) / curvature` suits small batches. Costs
        `iterations + 1` calls of `closure`. Each starts from the same random generators (dropout)
        and buffers (batch norm), and both are left as they were.

        Args:
            closure: clears the gradients, computes the loss, calls `backward` and returns the loss,
                always on the same data.
            iterations: of the Lanczos method; a few find the largest within a tenth or two.
        """
        here = self.coefficients.detach().clone()
        # Large enough for differences of float32 gradients, small enough for a quadratic loss.
        length = 0.03 if self.subspace.spread is not None else 1e-3 * max(float(here.norm()), 1e-3)

        def gradient(coefficients: Tensor) -> Tensor:
            self.set_coefficients(coefficients)
            with _unchanged(self._model, here.device):
                closure()
            self._project_gradients()
            return self.coefficients.grad.clone()

        try:
            within = _hessian_within(gradient, here, length, iterations)
        finally:
            self.set_coefficients(here)
            self.zero_grad()
        return float(torch.linalg.eigvalsh((within + within.T) / 2).abs().max())

    def averaging_weights(self) -> Tensor:
        """α with `w = Σ α_i w_i`: how much of each checkpoint the model now holds.

        Float64 of shape [checkpoints], zero where a checkpoint was dropped; at granularity
        "layer" or "channel" [blocks, checkpoints]. With "PCA" they sum to 1. Exact up to rounding
        where the start point lies in the subspace (as any average of the checkpoints whose
        weights sum to 1 does, if no direction was left out) and the basis has 32 bits. What the
        start point has outside of it, the model keeps: `Σ α_i w_i` is then the point of the
        subspace that is nearest to w. Below 32 bits the model also holds the rounding of the basis.
        """
        start = self._start_coefficients - self.origin
        return self.subspace.averaging_weights(self.coefficients.detach() + start)

    def state_dict(self) -> dict:
        """The state of `base` and the coefficients, loadable with `weights_only=True`.

        The basis is not in it: it is built from the checkpoints again.
        """
        state = super().state_dict()
        state["coefficients"] = self.coefficients.detach().clone()
        state["start_coefficients"] = self._start_coefficients.clone()
        state["fingerprint"] = self._fingerprint.clone()
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        """Restores the coefficients, the state of `base` and the weights of the model.

        Raises:
            ValueError: the state belongs to another window, start point or kind of basis, or is not
                that of a TWA optimizer.
        """
        state = dict(state_dict)
        keys = ("coefficients", "start_coefficients", "fingerprint")
        if not set(keys) <= state.keys():
            raise ValueError("the state holds no coefficients: it is not that of a TWA optimizer")
        coefficients, start, fingerprint = (state.pop(key) for key in keys)
        near_start, near_fingerprint = self._tolerances()
        for found, own, tolerance in (
            (start, self._start_coefficients, near_start),
            (fingerprint, self._fingerprint, near_fingerprint),
        ):
            if found.shape != own.shape or not torch.allclose(
                found.to(own.device), own, rtol=0, atol=tolerance
            ):
                raise ValueError(
                    "the state belongs to another window of checkpoints or start point"
                )
        super().load_state_dict(state)
        self.base.param_groups = self.param_groups
        self.base.state = self.state
        self.set_coefficients(coefficients)

    def _tolerances(self) -> tuple[float, float]:
        """How much start coefficients and fingerprint may differ between devices or rank counts."""
        start, fingerprint = float(self._start_coefficients.norm()), float(self._fingerprint.norm())
        if self.subspace.spread is None:
            return 1e-5 * start, 1e-2 + 1e-4 * fingerprint
        return 1e-3 + 1e-5 * start, 1e-2 * float(self.subspace.spread.max()) + 1e-4 * fingerprint

    def __getstate__(self) -> dict:
        raise TypeError(
            "a TWA optimizer, with its model and basis, is not copied: use state_dict()"
        )

    def _project_gradients(self) -> None:
        gradients = self.subspace.flatten(
            (p.grad for p in self.subspace.parameters), out=self._flat
        )
        self.coefficients.grad = self.subspace.project(gradients)

    def _finish_step(self) -> None:
        if self.subspace.spread is not None and self._radius < math.inf:
            self.subspace.limit(self.coefficients, self._radius)
        self._write_weights()

    @torch.no_grad()
    def set_coefficients(self, coefficients: Tensor) -> None:
        """Moves the model to these coefficients, float32 [n]; `origin` is the start point."""
        self.coefficients.copy_(coefficients)
        self._write_weights()

    @torch.no_grad()
    def _write_weights(self) -> None:
        moved = self.coefficients - self.origin
        self.subspace.assign(self.subspace.expand(moved, out=self._flat).add_(self._start))


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
