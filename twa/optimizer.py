"""TWA: an optimizer whose parameters are the coefficients of a weight average."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from twa.checkpoints import Checkpoint, average, load_into
from twa.subspace import Subspace


class TWA(torch.optim.Optimizer):
    """Trainable Weight Averaging (Li et al., ICLR 2023, Section 3) around any optimizer.

    The checkpoints are orthonormalised into a basis `P` of n rows, and the model moves only in
    their span, `w = w_0 + Pᵀ(β − β_0)` with `β_0 = P w_0`: a step projects the model's gradient,
    `β.grad = P ∇loss(w)`, lets `base` step on the n coefficients `β`, and writes `w` back.
    Before the first step the model is the start point to the bit. With `torch.optim.SGD` this is
    the paper's SGD on `w` with its gradient projected by `PᵀP`; weight decay then acts within
    the span.

        optimizer = TWA(model, checkpoints, torch.optim.SGD, lr=0.5, momentum=0.9)
        for images, labels in loader:
            criterion(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()

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
        **base_arguments: what `base` takes: `lr`, `momentum`, `weight_decay`, …

    Raises:
        CheckpointError: a checkpoint cannot be read or does not fit the model.
        ValueError: an argument is out of its range, or no checkpoint was given.
        MemoryError: the basis does not fit into the memory that is free.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        checkpoints: Sequence[Checkpoint],
        base: type[torch.optim.Optimizer] = torch.optim.SGD,
        *,
        start: Checkpoint | None = None,
        extract: str = "Schmidt",
        components: int | None = None,
        bits: int = 32,
        granularity: str = "model",
        **base_arguments,
    ):
        # What `base` does not take, it says here, before the model is changed.
        base([torch.nn.Parameter(torch.zeros(1))], **base_arguments)
        self.subspace = Subspace(
            model,
            checkpoints,
            extract=extract,
            components=components,
            bits=bits,
            granularity=granularity,
        )
        load_into(model, average(checkpoints, model.state_dict()) if start is None else start)
        self._start = self.subspace.flatten(self.subspace.parameters)
        self._flat = self.subspace.empty()  # For gradients and weights in turn.
        # Once more on what is left, against the rounding of a sum as long as the model.
        self._start_coefficients = self.subspace.project(self._start)
        back = self.subspace.expand(self._start_coefficients, out=self._flat)
        self._start_coefficients += self.subspace.project(self._start - back)
        # Of another window this is another vector, even where both begin with the start point.
        self._fingerprint = self.subspace.project(self._flat.fill_(1))
        self.coefficients = torch.nn.Parameter(self._start_coefficients.clone())
        self.base = base([self.coefficients], **base_arguments)
        super().__init__(self.base.param_groups, self.base.defaults)
        # One list and one state for both, so that a schedule that writes a rate into a group, and
        # a `state_dict`, reach the optimizer that steps.
        self.base.param_groups = self.param_groups
        self.state = self.base.state

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step of `base` on the coefficients; the weights follow.

        A parameter without a gradient counts as one whose gradient is zero.

        Args:
            closure: clears the gradients, computes the loss, calls `backward` and returns the
                loss, as for any optimizer; those that evaluate it many times (`LBFGS`) need it.
        """
        if closure is None:
            self._project_gradients()
            self.base.step()
            self._write_weights()
            return None

        def closure_at_coefficients() -> Tensor:
            self._write_weights()
            loss = closure()
            self._project_gradients()
            return loss

        loss = self.base.step(closure_at_coefficients)
        self._write_weights()
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

        The largest magnitude of an eigenvalue of `P H Pᵀ`, H the Hessian, by the Lanczos method;
        its products are differences of gradients. What SGD does at a rate depends on
        rate · curvature: with momentum m a full-batch step is stable below
        `2 (1 + m) / curvature`, and `(1 - m) / curvature` suits small batches. Costs
        `iterations + 1` calls of `closure`.

        Args:
            closure: clears the gradients, computes the loss, calls `backward` and returns the loss,
                always on the same data.
            iterations: of the Lanczos method; a few find the largest within a tenth or two.
        """
        here = self.coefficients.detach().clone()

        def gradient(coefficients: Tensor) -> Tensor:
            self._set_coefficients(coefficients)
            closure()
            self._project_gradients()
            return self.coefficients.grad.clone()

        try:
            within = _hessian_within(gradient, here, iterations)
        finally:
            self._set_coefficients(here)
            self.zero_grad()
        return float(torch.linalg.eigvalsh((within + within.T) / 2).abs().max())

    def averaging_weights(self) -> Tensor:
        """α with `w = Σ α_i w_i`: how much of each checkpoint the model now holds.

        Float64 of shape [checkpoints], zero where a checkpoint was dropped; at granularity
        "layer" or "channel" [blocks, checkpoints]. Exact where the start point lies in the span
        and the basis has 32 bits; below, the model holds the rounding of the basis as well.
        """
        return self.subspace.averaging_weights(self.coefficients.detach())

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
        for found, own, rounding in (
            (start, self._start_coefficients, 1e-5 * float(self._start_coefficients.norm())),
            (fingerprint, self._fingerprint, 1e-2 + 1e-4 * float(self._fingerprint.norm())),
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
        self._set_coefficients(coefficients)

    def __getstate__(self) -> dict:
        raise TypeError(
            "a TWA optimizer, with its model and basis, is not copied: use state_dict()"
        )

    def _project_gradients(self) -> None:
        gradients = self.subspace.flatten(
            (p.grad for p in self.subspace.parameters), out=self._flat
        )
        self.coefficients.grad = self.subspace.project(gradients)

    @torch.no_grad()
    def _set_coefficients(self, coefficients: Tensor) -> None:
        self.coefficients.copy_(coefficients)
        self._write_weights()

    @torch.no_grad()
    def _write_weights(self) -> None:
        moved = self.coefficients - self._start_coefficients
        self.subspace.assign(self.subspace.expand(moved, out=self._flat).add_(self._start))


def _hessian_within(gradient: Callable[[Tensor], Tensor], here: Tensor, iterations: int) -> Tensor:
    """The Hessian within the Krylov space of so many of its products, by the Lanczos method.

    Args:
        gradient: of the loss, [n], at coefficients [n].
        here: where the Hessian is taken, [n].

    Returns:
        float64 on the CPU, [products, products]; symmetric up to rounding.
    """
    # As far as float32 gradients tell the difference, and the loss is still quadratic.
    length = 1e-3 * here.norm().clamp(min=1e-3)
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
