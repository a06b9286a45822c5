"""`TWA`: an optimizer whose parameters are the coefficients of a weight average.

The method itself, without files, blocks in memory and ranks, is `twa.reference`.
"""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from twa.files.checkpoints import Checkpoint, average, check_window, load_into
from twa.ranks.replicas import Replicas
from twa.ranks.sharding import is_sharded, local
from twa.subspace import Subspace

if TYPE_CHECKING:
    import torch.distributed as dist

# The learning rate of Adam and AdamW on coefficients in standard deviations of the checkpoints. It
# worked for every model and granularity that was tried.
RATE = 0.02

# The ranks of a process group compare their coefficients at the first step and after this many.
COMPARE_EVERY = 100

# What a saved state contains besides that of the base optimizer.
OWN = {"coefficients", "start_coefficients", "basis_checksum", "fingerprint"}


class TWA(torch.optim.Optimizer):
    """Trainable Weight Averaging (Li et al., ICLR 2023, Section 3) around any optimizer.

    The model moves only in the subspace that the checkpoints span, `w = w_0 + Σ_i σ_i z_i p_i`. The
    start point is w_0, p_i are the principal directions of the window, and σ_i is the standard
    deviation of its checkpoints along p_i, the unit of the coefficient z_i. A step projects the
    model's gradient, `∂loss/∂z_i = σ_i p_i·∇loss(w)`, lets `base` step on the coefficients z, which
    begin at 0, and writes w back. Before the first step the model is exactly the start point.

        optimizer = TWA(model, checkpoints)
        for images, labels in loader:
            criterion(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()

    `Recipe` chooses start point, granularity, unit and learning rate; here they are arguments.

    With `base=torch.optim.SGD` and `extract="Schmidt"` it is the paper's method: Gram–Schmidt makes
    an orthonormal basis P of the checkpoints, the coefficients β begin at `β_0 = P w_0`, and
    `w = w_0 + Pᵀ(β − β_0)`. This is SGD on w with its gradient projected by `PᵀP`; weight decay
    then acts within the subspace.

    The optimizer's one group contains the model's trainable parameters and the hyper-parameters of
    `base`, so schedules, `GradScaler`, clipping and frameworks work as with any optimizer. They see
    the gradient of the model, which is unscaled or clipped before it is projected.

    With `process_group`, many ranks train together and send n floats a step. Each rank has the
    whole model, not wrapped in DistributedDataParallel, and calls `backward` on its own share of
    the batch. `step` sums the gradient of the coefficients, and all ranks take the same step, so
    their weights stay identical. Hashes of the start point and the checkpoints are compared at the
    beginning; coefficients and learning rates at the first step and every 100 steps. Every rank has
    to construct the optimizer, and to call `step` and `averaging_weights`, at the same time. With a
    `GradScaler`, all ranks skip a step that overflows on one. Each rank keeps its own buffers.

    The weights follow the coefficients, never the other way round: to return to an earlier point,
    load the optimizer's state or call `set_coefficients`. A step overwrites what was written into
    trained parameters since the last one, and moves parameters that were frozen in the meantime.

    To resume, load `state_dict()` into an optimizer made with the same arguments (for
    `start=model`, with the model at the same start point), and the model's own state into the
    model, in any order.

    Args:
        model: the module to train, whole or sharded by FSDP2 (`fully_shard`). The constructor sets
            its parameters and buffers to the start point. Batch norm's running statistics belong to
            the data, not to the average: re-estimate them (`torch.optim.swa_utils.update_bn`)
            before you evaluate. If `accelerate` shards the model later and passes the new
            parameters to the optimizer, the basis is built again.
        checkpoints: paths or `state_dict`s, in the order of training; see `Subspace`.
        base: the class of the optimizer that steps on the coefficients, float32 [len(subspace)].
        start: the start point: a path, a `state_dict`, the result of `best_start`, or `model`
            itself for its present weights. None: the checkpoints' mean (SWA).
        extract, components, bits, granularity, unit: the basis; see `Subspace`.
        radius: the largest root mean square of the coefficients of a block (of all coefficients at
            granularity "model"). After a step, larger ones are scaled back, so that a learning rate
            that is much too high cannot take the model arbitrarily far from the checkpoints. The
            checkpoints themselves are at about 1; normal training stays below 3. `math.inf`: no
            limit. Ignored with "Schmidt", whose coefficients have no such unit.
        process_group: the ranks whose mean gradient `step` uses, such as `dist.group.WORLD`; None:
            this process alone. If the model is sharded within each machine (`fully_shard` with a
            one-dimensional mesh), the group of the ranks with the same shards; machines then send
            each other n floats.
        **base_arguments: the arguments of `base`: `lr`, `momentum`, `weight_decay`, … With "PCA",
            Adam and AdamW (their subclasses and partials too) have `lr=0.02` and `weight_decay=0`
            by default. Any other base that takes `lr` needs it.

    Attributes:
        coefficients: z, float32 [len(subspace)].
        origin: the coefficients of the start point, float32 [len(subspace)].
        subspace: the basis.
        stop: set this to ask all ranks to stop. The next step's sum carries it, and `stopping` is
            then True on all ranks.

    Raises:
        CheckpointError: a checkpoint cannot be read or does not fit the model.
        ValueError: an argument is out of its range; `base` needs `lr`; there are no checkpoints, or
            with "PCA" no two that differ; a rank of the process group differs from the first.
        MemoryError: the basis does not fit into the free memory.
    """

    def __init__(
        self,
        model: nn.Module,
        checkpoints: Iterable[Checkpoint],
        base: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
        *,
        start: Checkpoint | nn.Module | tuple | None = None,
        extract: str = "PCA",
        components: int | None = None,
        bits: int = 32,
        granularity: str = "model",
        unit: str = "direction",
        radius: float = 10.0,
        process_group: dist.ProcessGroup | None = None,
        **base_arguments,
    ):
        base_arguments = _with_defaults(base, extract, base_arguments)
        # If `base` refuses these, it does so here, before the model is changed.
        defaults = base([nn.Parameter(torch.zeros(1))], **base_arguments).defaults
        if not radius > 0:
            raise ValueError(f"radius must be larger than 0, not {radius!r}")
        self._model, self._checkpoints = model, check_window(model, checkpoints)
        start = getattr(start, "state_dict", start) if isinstance(start, tuple) else start
        if not (start is None or start is model or isinstance(start, Checkpoint)):
            raise TypeError(
                "start must be a path, a state_dict, the result of best_start or the model itself, "
                f"not a {type(start).__name__}"
            )
        self._start_point = start
        self._radius = radius
        self._basis = {
            "extract": extract,
            "components": components,
            "bits": bits,
            "granularity": granularity,
            "unit": unit,
            "process_group": process_group,
        }
        self._replicas = Replicas(process_group)
        self.stop, self._stopping = False, torch.zeros(())
        # A GradScaler then leaves skipping to `step`, which all ranks have to call.
        self._step_supports_amp_scaling = self._replicas.count > 1
        self._set_up()
        self.coefficients = nn.Parameter(self.origin.clone())
        self.base = base([self.coefficients], **base_arguments)
        super().__init__(self.subspace.parameters, defaults)
        coarse = {str(p.dtype) for p in self.subspace.parameters if p.dtype.itemsize < 4}
        if coarse:
            warnings.warn(
                f"the model's weights are {', '.join(sorted(coarse))}, too coarse for most of the "
                "steps that the coefficients take: use model.float(), and autocast",
                stacklevel=2,
            )
        _copy_hyperparameters(self.base, self)
        self._steps = 0  # since the ranks were last compared

    def _set_up(self) -> None:
        """Builds the basis for the model's present parameters, and moves the model to the start."""
        self.subspace = self._start = self._flat = None  # Old and new together might not fit.
        self.subspace = Subspace(self._model, self._checkpoints, **self._basis)
        self._many = self.subspace.shards * self._replicas.count > 1
        for parameter in self.subspace.parameters if self._replicas.count > 1 else ():
            if is_sharded(parameter) and parameter.device_mesh.ndim > 1:
                raise ValueError(
                    "with a process group, shard the model by the one-dimensional mesh of a "
                    "machine's ranks, mesh['shard']: with a mesh of two dimensions FSDP2 sums the "
                    "gradients between machines itself"
                )
        self._overwritten = self._load_start()
        exact = self.subspace.empty(self.subspace.dtype)
        self._start = self.subspace.flatten(self.subspace.parameters, out=exact)
        self._fingerprint = self.subspace.fingerprint(self._start)
        self._replicas.check({"start point": self._fingerprint.item()})
        coordinates = self.subspace.coordinates(self._start)
        self._start_coefficients = self._replicas.broadcast(coordinates)
        self.origin = self._start_coefficients.clone()
        if self.subspace.scale is not None:
            self.origin.zero_()
        self._flat = self.subspace.empty()  # for gradients and weights in turn
        # It tells windows apart whose start points and start coefficients agree.
        self._basis_checksum = self.subspace.project(self._flat.fill_(1))

    def _load_start(self) -> list[tuple[Tensor, Tensor, int]]:
        """Loads the start point.

        Returns:
            the buffers and frozen parameters that it changed, their values before, and the tensors'
            versions after, by which `load_state_dict` sees whether they were written since.
        """
        if self._start_point is self._model:
            return []
        trained = {id(parameter) for parameter in self.subspace.parameters}
        start = self._start_point
        if start is None:
            start = average(self._checkpoints, self._model)
        return [
            (tensor, old, tensor._version)
            for tensor, old in load_into(self._model, start)
            if id(tensor) not in trained and not torch.equal(local(tensor), old)
        ]

    def add_param_group(self, param_group: dict) -> None:
        """Takes the constructor's group; raises ValueError for a second one."""
        if self.param_groups:
            raise ValueError(
                "a TWA optimizer has one group: its coefficients are one vector, with one learning "
                "rate and one weight decay"
            )
        super().add_param_group(param_group)

    def step(
        self, closure: Callable[[], Tensor] | None = None, *, weight: float = 1.0
    ) -> Tensor | None:
        """Takes a step of `base` on the coefficients, limited by `radius`, and writes the weights.

        A parameter without a gradient counts as one whose gradient is zero. If no parameter has a
        gradient, nothing happens (on many ranks, of which others may have some, all count as zero).

        Args:
            closure: clears the gradients, computes the loss, calls `backward` and returns the loss,
                as for any optimizer. Optimizers that evaluate it several times (`LBFGS`) need it.
            weight: of this rank in the mean over the ranks of the process group. Pass the number of
                samples in this rank's share of the batch, 0 for an empty one, if each rank's loss
                is the mean over its share and the shares differ. (Within a machine that FSDP2
                shards the model over, FSDP2 takes the mean, and all ranks have the same weight.)

        Returns:
            the loss that `closure` returned first, the mean over all ranks.
        """
        self._follow_parameters()
        self._compare_ranks()
        _copy_hyperparameters(self, self.base)
        if closure is None:
            _, skip = self._project_gradients(weight)
            if skip:
                return None
            loss = self.base.step()
        else:
            written = self.coefficients.detach().clone()

            def closure_at_coefficients() -> Tensor:
                if not torch.equal(self.coefficients, written):
                    self._write_weights()
                    written.copy_(self.coefficients)
                loss = closure()
                return self._project_gradients(weight, loss)[0]

            loss = self.base.step(closure_at_coefficients)
        _copy_hyperparameters(self.base, self)  # Some optimizers keep numbers in their group.
        if self.subspace.scale is not None and self._radius < math.inf:
            self.subspace.limit(self.coefficients, self._radius)
        self._write_weights()
        self._share_state()
        return loss

    def train(self) -> None:
        """Switches `base` to train mode if it has modes, as the optimizers of schedulefree do."""
        self._switch_mode("train")

    def eval(self) -> None:
        """Switches such a `base`, and with it the weights, to eval mode until `train` is called."""
        self._switch_mode("eval")

    def _switch_mode(self, mode: str) -> None:
        switch = getattr(self.base, mode, None)
        if switch is None:
            return
        before = self.coefficients.detach().clone()
        switch()
        _copy_hyperparameters(self.base, self)  # which include the mode
        if not torch.equal(self.coefficients, before):
            self._write_weights()

    @property
    def stopping(self) -> bool:
        """Whether any rank had set `stop` before the last step; the same on all ranks."""
        return bool(self._stopping > 0) if self._many else self.stop

    def averaging_weights(self) -> Tensor:
        """α with `w = Σ α_i w_i`: the weight of each checkpoint in the model.

        It reads the checkpoints again, those in `subspace.names`: files must not change, and
        `state_dict`s stay in memory. Float64 of shape [checkpoints], zero where one was dropped;
        [blocks, checkpoints] at granularity "layer" or "channel". With "PCA" they sum to 1. They
        are exact up to rounding if the start point is in the subspace (as any average of the
        checkpoints is whose weights sum to 1, if all directions were kept) and the basis has 32
        bits. The model keeps the part of the start point outside the subspace: `Σ α_i w_i` is then
        the point of the subspace nearest to w. Below 32 bits the model also contains the rounding
        of the basis.

        Raises:
            CheckpointError: a checkpoint has changed, is no longer there, or cannot be read.
        """
        start = self._start_coefficients - self.origin
        return self.subspace.averaging_weights(self.coefficients.detach() + start)

    def named_averaging_weights(self) -> dict[str, Tensor]:
        """α by the names of the parameters in the model's `state_dict`; see `averaging_weights`.

        Each value is float64 [checkpoints, ...] and broadcasts with the parameter, so that
        `w = Σ α[i] * w_i`. The command `twa average --weights` takes them from a file.
        """
        return self.subspace.by_name(self.averaging_weights())

    def state_dict(self) -> dict:
        """Coefficients and state of `base`, under the first parameter; `weights_only` can load it.

        The basis is not included: it is built from the checkpoints again.
        """
        begun = bool(self.state)
        self._share_state()
        state = super().state_dict()
        if not begun:  # Before the first step there is none, by which torch.distributed.checkpoint
            self.state.clear()  # sees that it has to make one before it asks for its form.
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        """Restores the coefficients, the state of `base` and the trainable parameters.

        It may be called before or after the model's own `load_state_dict`: buffers and frozen
        parameters that the constructor set to the start point, and that were not written since, get
        their earlier values back.

        Raises:
            ValueError: the state belongs to another window, start point or kind of basis, or is not
                the state of a TWA optimizer.
        """
        self._follow_parameters()
        states = state_dict.get("state", {}).values()
        state = dict(next((state for state in states if state.keys() >= OWN), {}))
        if not state:
            raise ValueError(
                "the state has no coefficients: it is not the state of a TWA optimizer, or it is "
                "that of an earlier version, which this one cannot resume"
            )
        own = {key: state.pop(key) for key in OWN}
        self._check_origin(own)
        super().load_state_dict(state_dict | {"state": {}})
        _copy_hyperparameters(self, self.base)
        groups = self.base.state_dict()["param_groups"]
        self.base.load_state_dict({"state": {0: state} if state else {}, "param_groups": groups})
        if state or not torch.equal(own["coefficients"].to(self.origin), self.origin):
            with torch.no_grad():
                for tensor, before, version in self._overwritten:
                    if tensor._version == version:
                        local(tensor).copy_(before)
            self._overwritten = []
        self.set_coefficients(own["coefficients"])
        if state:
            self._share_state()
        self._steps = 0

    def _share_state(self) -> None:
        """Puts the state where frameworks look for it: under a parameter of the model."""
        first, *others = self.param_groups[0]["params"]
        self.state.clear()
        self.state[first] = {
            "coefficients": self.coefficients.detach(),
            "start_coefficients": self._start_coefficients,
            "basis_checksum": self._basis_checksum,
            "fingerprint": self._fingerprint,
            **self.base.state.get(self.coefficients, {}),
        }
        for parameter in others:
            self.state[parameter] = {}

    def _check_origin(self, state: dict[str, Tensor]) -> None:
        """Raises ValueError unless the coefficients of `state` mean the same here."""
        # Other devices and other numbers of ranks round sums differently, by no more than this.
        units = self.subspace.scale
        floor, unit = (0.0, 1.0) if units is None else (1e-3, float(units.max()))
        near_start = 1e-5 * float(self._start_coefficients.norm()) + floor
        near_checksum = 1e-4 * float(self._basis_checksum.norm()) + 1e-2 * unit
        same = torch.equal(state["fingerprint"].cpu(), self._fingerprint)
        for key, own, near in (
            ("start_coefficients", self._start_coefficients, near_start),
            ("basis_checksum", self._basis_checksum, near_checksum),
        ):
            found = state[key].to(own)
            same &= found.shape == own.shape and torch.allclose(found, own, rtol=0, atol=near)
        if not same:
            raise ValueError(
                "the state belongs to another window of checkpoints, start point or kind of basis "
                "(extract, components, granularity, unit)"
            )

    def _follow_parameters(self) -> None:
        """Builds the basis again if a framework has sharded the model since."""
        parameters = self.param_groups[0]["params"]
        if parameters[0].device != self.coefficients.device:
            raise RuntimeError(
                f"the model is on {parameters[0].device}, but was on {self.coefficients.device} "
                "when TWA was made: move it before"
            )
        if any(a is not b for a, b in zip(parameters, self.subspace.parameters, strict=True)):
            if self._checkpoints is None:
                raise RuntimeError("the model was sharded after the first step of TWA")
            self._set_up()
            self._write_weights()

    def __getstate__(self) -> dict:
        raise TypeError(
            "a TWA optimizer, with its model and basis, cannot be copied: use state_dict()"
        )

    def _project_gradients(
        self, weight: float, loss: Tensor | None = None
    ) -> tuple[Tensor | None, bool]:
        """Sets the gradient of the coefficients.

        Returns:
            `loss`, and whether the gradients of a rank overflowed; both over all ranks.
        """
        given = [p.grad for p in self.subspace.parameters]
        missing = sum(gradient is None for gradient in given)
        if missing and not {*self.subspace.parameters} <= {*self._model.parameters()}:
            raise RuntimeError(
                "the model's parameters were replaced after TWA was made (as fully_shard does): "
                "make TWA afterwards"
            )
        if missing == len(given) and not self._many:
            self.coefficients.grad = None  # `base` then leaves them alone, as any optimizer does.
            return loss, False
        gradients = self.subspace.flatten(given, out=self._flat)
        skip = False
        if self._many:
            gradient, loss, skip = self._summed(gradients, weight, loss)
        else:
            gradient = self.subspace.project(gradients)
        self.coefficients.grad = gradient
        if self._checkpoints is not None and gradient.any():
            # From the first real step on the basis is not built again.
            self._checkpoints, self._start_point, self._overwritten = None, None, []
        return loss, skip

    def _summed(
        self, gradients: Tensor, weight: float, loss: Tensor | None
    ) -> tuple[Tensor, Tensor | None, bool]:
        """The projected gradient and `loss`, means over all ranks, and whether one overflowed.

        All of it goes into one sum over the shards and one over the replicas.
        """
        extras = gradients.new_zeros(4)
        for place, number in ((0, weight), (2, self.stop)):
            extras[place].fill_(number)  # on the device, without a copy to wait for
        if loss is not None and weight:  # The loss of an empty share is NaN.
            extras[1] = weight * loss.detach()
        overflow = getattr(self, "found_inf", None)  # A scaler sets this, and `grad_scale`.
        if overflow is not None:
            extras[3] = overflow
        gradient = self.subspace.project(gradients, extras)
        if getattr(self, "grad_scale", None) is not None:
            gradient = gradient / self.grad_scale
        if self._replicas.count > 1:
            # The gradient of an empty share may be NaN as well.
            weighted = (extras[0] * gradient).where(extras[0] > 0, 0)
            total = self._replicas.sum(torch.cat([weighted, extras]))
            gradient, extras = total[:-4], total[-4:]
            gradient = gradient / extras[0].clamp(min=torch.finfo(extras.dtype).tiny)
        self._stopping = extras[2]
        mean = None if loss is None else extras[1] / extras[0]
        return gradient, mean, overflow is not None and bool(extras[3] > 0)

    @torch.no_grad()
    def _compare_ranks(self) -> None:
        """Raises ValueError if a rank has come to differ from the first one of its group.

        Differences by rounding, as between processors of different kinds, are removed: all ranks
        take the values of the first.
        """
        if self._replicas.count > 1 and self._steps % COMPARE_EVERY == 0:
            state = self.base.state.get(self.coefficients, {}).values()
            shape, group = self.coefficients.shape, self.param_groups[0]
            vectors = [self.coefficients]
            vectors += [v for v in state if isinstance(v, Tensor) and v.shape == shape]
            arguments = {key: str(group[key]) for key in group if key != "params"}
            self._replicas.check(arguments | {"state of the optimizer": len(vectors)})
            firsts = self._replicas.broadcast(torch.stack(vectors))
            near = [
                torch.allclose(vector, first, rtol=0, atol=1e-3 * float(first.abs().max()))
                for vector, first in zip(vectors, firsts, strict=True)
            ]
            self._replicas.check(
                {"vector of coefficients": near[0], "state of the optimizer": near[1:]}
            )
            for vector, first in zip(vectors, firsts, strict=True):
                vector.copy_(first)
        self._steps += 1

    def of_first_rank(self, number: float) -> float:
        """The first rank's `number`, by which all ranks of the process group decide alike."""
        if self._replicas.count == 1:
            return number
        return self._replicas.broadcast(self.coefficients.detach().new_tensor(number)).item()

    @torch.no_grad()
    def set_coefficients(self, coefficients: Tensor) -> None:
        """Moves the model to these coefficients, [len(subspace)]; `origin` is the start point.

        Raises:
            ValueError: they have another shape.
        """
        if coefficients.shape != self.coefficients.shape:
            raise ValueError(
                f"coefficients must have the shape {list(self.coefficients.shape)}, "
                f"not {list(coefficients.shape)}"
            )
        self.coefficients.copy_(coefficients)
        self._write_weights()

    @torch.no_grad()
    def _write_weights(self) -> None:
        moved = self.coefficients - self.origin
        self.subspace.assign(self._start, self.subspace.expand(moved, out=self._flat))


def is_adam(base: Callable) -> bool:
    """Whether `base` is Adam or AdamW, a subclass, or a partial of one."""
    while isinstance(base, functools.partial):
        base = base.func
    return isinstance(base, type) and issubclass(base, torch.optim.Adam | torch.optim.AdamW)


def _with_defaults(base: Callable, extract: str, arguments: dict) -> dict:
    """The arguments of `base`, with the defaults that suit coefficients.

    Raises:
        ValueError: `base` needs a learning rate.
    """
    kind, given = base, dict(arguments)
    while isinstance(kind, functools.partial):
        kind, given = kind.func, kind.keywords | given
    if extract == "PCA" and is_adam(base):
        defaults = {"lr": RATE, "weight_decay": 0.0}
        return {key: value for key, value in defaults.items() if key not in given} | arguments
    if "lr" not in given and "lr" in inspect.signature(kind).parameters:
        unit = "standard deviations of the checkpoints" if extract == "PCA" else "the weights' unit"
        raise ValueError(
            f"{kind.__name__} needs lr: its own default is not meant for coefficients in {unit}"
        )
    return arguments


def _copy_hyperparameters(source: torch.optim.Optimizer, target: torch.optim.Optimizer) -> None:
    (group,), (own,) = source.param_groups, target.param_groups
    own.update({key: value for key, value in group.items() if key != "params"})
