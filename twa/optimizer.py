"""TWA: an optimizer whose parameters are the coefficients of a weight average."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from twa.checkpoints import Checkpoint, average, load_into
from twa.subspace import Subspace

# In coordinates that count in the spread of the window, one rate suits every model, granularity
# and budget that was tried; 0.02 to 0.05 do.
RATE = 0.02


class TWA(torch.optim.Optimizer):
    """Trainable Weight Averaging (Li et al., ICLR 2023, Section 3) around any optimizer.

    The model moves in the span of the checkpoints, `w = w_0 + Σ_i σ_i z_i p_i`: w_0 is the start
    point, p_i are the principal directions of the window and σ_i the standard deviation of its
    checkpoints along p_i, so that a coefficient z_i of 1 goes as far as the checkpoints scatter. A
    step projects the model's gradient, `∂loss/∂z_i = σ_i p_i·∇loss(w)`, lets `base` step on the
    coefficients z, which begin at 0, and writes w back. Before the first step the model is the
    start point to the bit.

        optimizer = TWA(model, checkpoints)
        for images, labels in loader:
            criterion(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()

    With `base=torch.optim.SGD` and `extract="Schmidt"` it is the paper's method: coefficients
    `β`, which begin at `β_0 = P w_0`, of the orthonormal basis P that Gram–Schmidt makes of the
    checkpoints, and `w = w_0 + Pᵀ(β − β_0)`. That is SGD on w with its gradient projected by
    `PᵀP`; weight decay then acts within the span.

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
        radius: where a step takes the coefficients of a block (of the whole model at granularity
            "model") beyond this root mean square, they are scaled back to it: a rate that is far
            too large cannot leave the region that the checkpoints tell of, in which this measure
            of a checkpoint is about 1. `math.inf` for no limit. Of "PCA" alone: the coefficients
            of the paper have no such unit, and no limit.
        **base_arguments: what `base` takes: `lr`, `momentum`, `weight_decay`, … Those left out are
            its own defaults, but for AdamW with "PCA": there `lr=0.02` and `weight_decay=0`.

    Raises:
        CheckpointError: a checkpoint cannot be read or does not fit the model.
        ValueError: an argument is out of its range, or no checkpoint was given, for "PCA" no two
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
        # What `base` does not take, it says here, before the model is changed.
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
        # Of another window this is another vector, even where both begin with the start point.
        self._fingerprint = self.subspace.project(self._flat.fill_(1))
        self.coefficients = torch.nn.Parameter(self.origin.clone())
        self.base = base([self.coefficients], **base_arguments)
        super().__init__(self.base.param_groups, self.base.defaults)
        # One list and one state for both, so that a schedule that writes a rate into a group, and
        # a `state_dict`, reach the optimizer that steps.
        self.base.param_groups = self.param_groups
        self.state = self.base.state

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step of `base` on the coefficients; the weights follow.

        A parameter without a gradient counts as one whose gradient is zero. A step that leaves
        the ball of `radius` is cut.

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
        `iterations + 1` calls of `closure`. Each sees the same random numbers (of dropout) and the
        same buffers (of batch norm); they and the generators are afterwards as they were.

        Args:
            closure: clears the gradients, computes the loss, calls `backward` and returns the loss,
                always on the same data.
            iterations: of the Lanczos method; a few find the largest within a tenth or two.
        """
        here = self.coefficients.detach().clone()
        # As far as float32 gradients tell the difference, and the loss is still quadratic.
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
        start point has outside, the model keeps, and α leaves out: `Σ α_i w_i` is then the point
        of the subspace nearest to w. Below 32 bits the model holds the rounding of the basis too.
        """
        outset = self._start_coefficients - self.origin
        return self.subspace.averaging_weights(self.coefficients.detach() + outset)

    def state_dict(self) -> dict:
        """The state of `base` and the coefficients; the basis is rebuilt from its checkpoints."""
        state = super().state_dict()
        state["coefficients"] = self.coefficients.detach().clone()
        state["start_coefficients"] = self._start_coefficients.clone()
        state["fingerprint"] = self._fingerprint.clone()
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        """Resumes where `state_dict()` was taken, the model's weights included.

        Raises:
            ValueError: the state belongs to another window, start point or kind of basis, or is not
                that of a TWA optimizer.
        """
        state = dict(state_dict)
        keys = ("coefficients", "start_coefficients", "fingerprint")
        if not set(keys) <= state.keys():
            raise ValueError("the state holds no coefficients: it is not that of a TWA optimizer")
        coefficients, start, fingerprint = (state.pop(key) for key in keys)
        # Another number of ranks, or another device, rounds in another way.
        spread = self.subspace.spread
        unit, far = (1, 0) if spread is None else (float(spread.max()), 1e-3)
        for found, own, rounding in (
            (start, self._start_coefficients, far + 1e-5 * float(self._start_coefficients.norm())),
            (fingerprint, self._fingerprint, 1e-2 * unit + 1e-4 * float(self._fingerprint.norm())),
        ):
            if found.shape != own.shape or not torch.allclose(
                found.to(own.device), own, rtol=0, atol=rounding
            ):
                raise ValueError(
                    "the state belongs to another window of checkpoints or start point"
                )
        super().load_state_dict(state)
        self.base.param_groups = self.param_groups
        self.base.state = self.state
        self.set_coefficients(coefficients)

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
    """Context: afterwards the buffers of `model` and the random generators are as before."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    accelerators = [] if device.type == "cpu" else [device]
    try:
        with torch.random.fork_rng(accelerators, device_type=device.type):
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def _hessian_within(
    gradient: Callable[[Tensor], Tensor], here: Tensor, length: float, iterations: int
) -> Tensor:
    """The Hessian within the Krylov space of so many of its products, by the Lanczos method.

    Args:
        gradient: of the loss, [n], at coefficients [n].
        here: where the Hessian is taken, [n].
        length: of the steps between which gradients differ.

    Returns:
        float64 on the CPU, [products, products]; symmetric up to rounding.
    """
    start = gradient(here)
    # The gradient leans towards large curvature; chance sees to it that nothing is left out.
    generator = torch.Generator("cpu").manual_seed(0)  # the same direction on every rank
    chance = torch.randn(len(here), generator=generator, device="cpu").to(here)
    direction = start / start.norm().clamp(min=1e-12) + chance / chance.norm()
    if len(here) == 1:  # the one direction there is; the two above may cancel
        direction = torch.ones_like(here)
    directions = here.new_zeros(min(iterations, len(here)), len(here))
    products = torch.zeros_like(directions)
    for i in range(len(directions)):
        directions[i] = direction / direction.norm()
        products[i] = (gradient(here + length * directions[i]) - start) / length
        direction = products[i]
        for _ in range(2):  # the second time against the rounding of the first
            direction = direction - directions.T @ (directions @ direction)
        if direction.norm() <= 1e-4 * products[i].norm():
            break  # The directions span a space that the Hessian maps to itself.
    return (directions @ products.T).cpu().double()  # MPS has no float64
