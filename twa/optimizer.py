"""`TWA`: an optimizer whose parameters are the coefficients of a weight average."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from twa.files.checkpoints import Checkpoint, average, check_window, load_into
from twa.ranks.replicas import Replicas
from twa.ranks.sharding import local
from twa.subspace import UNITS, Subspace

# The rate of AdamW on coefficients in units of the spread: it suits every model and granularity
# that was tried.
RATE = 0.02

# Steps after which the ranks of a process group compare their coefficients again.
COMPARE_EVERY = 100

# What a state holds besides that of the base optimizer.
OWN = {"coefficients", "start_coefficients", "probe", "fingerprint"}


def rate_of(steps: int, samples: float = math.inf, unit: str = "direction") -> float:
    """The rate for a training of so many steps, of AdamW on coefficients in units of the spread.

    With more steps there is time to go farther, from 0.02 up, to fall linearly to 0: by the root of
    the steps up to 0.1 in units of each direction's spread, by the steps up to 0.14 in those of the
    block's. What can be learned from few samples is learned near the start, and beyond it they are
    learned by heart: of N samples the rate is at most 0.02 (of the block: 0.04) times the root of
    N / 1000, if that is more than 0.02.

    Args:
        steps: of the whole training.
        samples: in the training set, such as its images; left out, if none is seen many times, as
            of the text of a language model.
        unit: as of `Subspace`.

    Raises:
        ValueError: there is no such unit, or a number is negative.
    """
    if unit not in UNITS:
        raise ValueError(f"unit must be one of {', '.join(UNITS)}, not {unit!r}")
    if steps < 0 or samples < 0:
        raise ValueError(f"steps and samples must not be negative, not {steps} and {samples}")
    root = math.sqrt(samples / 1000)
    if unit == "block":
        growth = min(steps / 50, 2 * root, 7)
    else:
        growth = min(math.sqrt(steps / 25), root, 5)
    return RATE * max(1, growth)


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

    The optimizer's one group holds the model's trainable parameters and the hyper-parameters of
    `base`, so that schedules, `GradScaler`, clipping and frameworks work as with any optimizer.
    They see the gradient of the model: it is unscaled, or clipped, before it is projected.

    Many ranks train together for the price of n floats a step, with `process_group`: each has the
    whole model, not wrapped in DistributedDataParallel, and calls `backward` on its own share of
    the batch; `step` sums the gradient of the coefficients, and all ranks take the same step, so
    that their weights stay equal to the bit. Start point and checkpoints are compared by hash at
    the beginning, coefficients and rates at the first step and after every 100 again. What every
    rank does at once: making the optimizer, and `step`. With a `GradScaler`, all ranks skip a step
    that overflows on one. Buffers remain each rank's own.

    The weights follow the coefficients, and never the other way: to go back to an earlier point,
    load the optimizer's state or call `set_coefficients`. What is written into trained parameters
    between steps is overwritten, and parameters frozen later still move.

    To resume, load `state_dict()` into an optimizer that was made with the same arguments (with
    `start=model`, of the model as it stood then), and the model's own into the model, in any order.

    Args:
        model: the module to train, whole or sharded by FSDP2 (`fully_shard`). Its trainable
            parameters are set to the start point, and so are its buffers and frozen parameters.
            Batch norm's running statistics belong to the data, not to the average: re-estimate
            them (`torch.optim.swa_utils.update_bn`) before you evaluate. If `accelerate` shards
            it later, and tells the optimizer, the basis is built again.
        checkpoints: paths or `state_dict`s, in the order of training; see `Subspace`.
        base: the class of the optimizer that steps on the coefficients, float32 of shape
            [len(subspace)].
        start: the start point, a path or a `state_dict`, or `model` itself as it stands; the
            checkpoints' mean (SWA) if None.
        extract, components, bits, granularity, unit: the basis; see `Subspace`.
        radius: after a step, the coefficients of each block (all of them at granularity "model")
            whose root mean square is larger are scaled back to it, so that a rate that is much too
            large cannot take the model arbitrarily far from the checkpoints. From the mean, the
            checkpoints are at about 1; ordinary training stays below 3. `math.inf` for no limit.
            For "PCA" only: the paper's coefficients have no such unit, and are not limited.
        process_group: the ranks among which `step` takes the mean of the gradient, such as
            `dist.group.WORLD`; None: this rank's is taken as it is. Where the model is sharded
            within each machine (`fully_shard` with the one-dimensional mesh of its ranks), the
            group of the ranks that hold the same shards: n floats then are all that goes from
            machine to machine.
        **base_arguments: what `base` takes: `lr`, `momentum`, `weight_decay`, … Those left out are
            its own defaults, except that AdamW with "PCA" gets `lr=0.02` and `weight_decay=0`;
            `lr=rate_of(steps, samples, unit)` goes farther where there is time to.

    Attributes:
        coefficients: z, float32 [len(subspace)]; `origin`, the same, is the start point's.
        subspace: the basis.
        stop: whether this rank asks all ranks to stop; for the caller to set, and False at first.
            The next step's sum carries it, and `stopping` then says so on all ranks.

    Raises:
        CheckpointError: a checkpoint cannot be read or does not fit the model.
        ValueError: an argument is out of its range; there are no checkpoints, or for "PCA" no two
            that differ. A rank of the process group, which is named, differs from the first.
        MemoryError: the basis does not fit into the memory that is free.
    """

    def __init__(
        self,
        model: nn.Module,
        checkpoints: Iterable[Checkpoint],
        base: type[torch.optim.Optimizer] = torch.optim.AdamW,
        *,
        start: Checkpoint | nn.Module | None = None,
        extract: str = "PCA",
        components: int | None = None,
        bits: int = 32,
        granularity: str = "model",
        unit: str = "direction",
        radius: float = 10.0,
        process_group: dist.ProcessGroup | None = None,
        **base_arguments,
    ):
        adamw = isinstance(base, type) and issubclass(base, torch.optim.AdamW)
        if extract == "PCA" and adamw:
            base_arguments = {"lr": RATE, "weight_decay": 0.0} | base_arguments
        # If `base` does not take these, it says so here, before the model is changed.
        defaults = base([nn.Parameter(torch.zeros(1))], **base_arguments).defaults
        if not radius > 0:
            raise ValueError(f"radius must be larger than 0, not {radius!r}")
        self._model, self._checkpoints = model, check_window(model, checkpoints)
        if not (start is None or start is model or isinstance(start, Checkpoint)):
            raise TypeError(
                f"start is a path, a state_dict or the model itself, not a {type(start).__name__} "
                "(best_start returns the start and its losses)"
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
        # A GradScaler then leaves the skipping to `step`, which all ranks have to call.
        self._step_supports_amp_scaling = self._replicas.count > 1
        self._set_up()
        self.coefficients = nn.Parameter(self.origin.clone())
        self.base = base([self.coefficients], **base_arguments)
        super().__init__(self.subspace.parameters, defaults)
        coarse = {str(p.dtype) for p in self.subspace.parameters if p.dtype.itemsize < 4}
        if coarse:
            warnings.warn(
                f"the model's weights are {', '.join(sorted(coarse))}, whose steps are larger than "
                "most of what the coefficients move them by: use model.float(), and autocast",
                stacklevel=2,
            )
        _copy_hyperparameters(self.base, self)
        self._steps = 0  # since the ranks were compared

    def _set_up(self) -> None:
        """Builds the basis of the model as it is now, and moves the model to the start point."""
        self.subspace = self._start = self._flat = None  # Old and new together might not fit.
        self.subspace = Subspace(self._model, self._checkpoints, **self._basis)
        self._many = self.subspace.shards * self._replicas.count > 1
        for parameter in self.subspace.parameters if self._replicas.count > 1 else ():
            if isinstance(parameter, DTensor) and parameter.device_mesh.ndim > 1:
                raise ValueError(
                    "with a process group, shard the model by the one-dimensional mesh of a "
                    "machine's ranks, mesh['shard']: by a mesh of two dimensions FSDP2 sums the "
                    "gradients between machines itself"
                )
        self._overwritten = self._load_start()
        self._start = self.subspace.flatten(self.subspace.parameters)
        self._fingerprint = self.subspace.fingerprint(self._start)
        self._replicas.check({"start point": self._fingerprint.item()})
        coordinates = self.subspace.coordinates(self._start)
        self._start_coefficients = self._replicas.take_first(coordinates)
        # The coefficients at which the model is the start point.
        self.origin = self._start_coefficients.clone()
        if self.subspace.scale is not None:
            self.origin.zero_()
        self._flat = self.subspace.empty()  # For gradients and weights in turn.
        # Windows differ in this even where their starts and the start coefficients agree.
        self._probe = self.subspace.project(self._flat.fill_(1))

    def _load_start(self) -> list[tuple[Tensor, Tensor, int]]:
        """Loads the start point.

        Returns:
            the buffers and frozen parameters that it changed, their values before, and the versions
            of the tensors after, by which `load_state_dict` sees whether they were written since.
        """
        if self._start_point is self._model:
            return []
        trained = {id(parameter) for parameter in self.subspace.parameters}
        state = self._model.state_dict(keep_vars=True).values()  # modules may add what is no tensor
        others = [t for t in state if isinstance(t, Tensor) and id(t) not in trained]
        before = [local(tensor).clone() for tensor in others]
        start = self._start_point
        if start is None:
            start = average(self._checkpoints, self._model)
        load_into(self._model, start)
        return [
            (tensor, old, tensor._version)
            for tensor, old in zip(others, before, strict=True)
            if not tensor.is_meta and not torch.equal(local(tensor), old)
        ]

    def add_param_group(self, param_group: dict) -> None:
        """Takes the one group that the constructor makes; raises ValueError for a second."""
        if self.param_groups:
            raise ValueError(
                "a TWA optimizer has one group: its coefficients are one vector, with one rate "
                "and one weight decay"
            )
        super().add_param_group(param_group)

    def step(
        self, closure: Callable[[], Tensor] | None = None, *, weight: float = 1.0
    ) -> Tensor | None:
        """One step of `base` on the coefficients, limited by `radius`; the weights follow.

        A parameter without a gradient counts as one whose gradient is zero; where none has one,
        nothing is done (with many ranks, of which others may have some, all count as zero).

        Args:
            closure: clears the gradients, computes the loss, calls `backward` and returns the
                loss, as for any optimizer; those that evaluate it many times (`LBFGS`) need it.
            weight: of this rank in the mean over the ranks of the process group. Where each rank's
                loss is the mean over its share of a batch, and the shares differ: the number of
                samples in the share, 0 for an empty one. (Within a machine that FSDP2 shards the
                model over, FSDP2 takes the mean, and all ranks weigh the same.)

        Returns:
            the loss that `closure` returned first, the mean of all ranks.
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
        """Has `base` train, if it is one that has to be told, as those of schedulefree."""
        self._tell("train")

    def eval(self) -> None:
        """Has such a `base` move to where it evaluates, and the weights with it, until `train`."""
        self._tell("eval")

    def _tell(self, mode: str) -> None:
        tell = getattr(self.base, mode, None)
        if tell is None:
            return
        before = self.coefficients.detach().clone()
        tell()
        _copy_hyperparameters(self.base, self)  # The mode is kept there.
        if not torch.equal(self.coefficients, before):
            self._write_weights()

    @property
    def stopping(self) -> bool:
        """Whether a rank had set `stop` before the last step; the same on all ranks."""
        return bool(self._stopping > 0) if self._many else self.stop

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
        """Coefficients and the state of `base`, under the first parameter; `weights_only` loads it.

        The basis is not in it: it is built from the checkpoints again.
        """
        begun = bool(self.state)
        self._share_state()
        state = super().state_dict()
        if not begun:  # Until the first step it has none, by which torch.distributed.checkpoint
            self.state.clear()  # sees that it has to make one before it asks for its form.
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        """Restores the coefficients, the state of `base` and the trainable parameters.

        Before or after the model's own `load_state_dict`: buffers and frozen parameters that the
        constructor set to the start point, and that nobody has written since, get back the values
        that they had before it.

        Raises:
            ValueError: the state belongs to another window, start point or kind of basis, or is not
                that of a TWA optimizer.
        """
        self._follow_parameters()
        states = state_dict.get("state", {}).values()
        state = dict(next((state for state in states if state.keys() >= OWN), {}))
        if not state:
            raise ValueError(
                "the state holds no coefficients: it is not that of a TWA optimizer, or of an "
                "earlier version, which this one cannot continue"
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
        """Gives frameworks the state where they look for it: under a parameter of the model."""
        first, *others = self.param_groups[0]["params"]
        self.state.clear()
        self.state[first] = {
            "coefficients": self.coefficients.detach(),
            "start_coefficients": self._start_coefficients,
            "probe": self._probe,
            "fingerprint": self._fingerprint,
            **self.base.state.get(self.coefficients, {}),
        }
        for parameter in others:
            self.state[parameter] = {}

    def _check_origin(self, state: dict[str, Tensor]) -> None:
        """Raises ValueError unless coefficients of `state` mean here what they meant there."""
        # Between devices and numbers of ranks, sums are rounded differently: so near are the same.
        units = self.subspace.scale
        floor, unit = (0.0, 1.0) if units is None else (1e-3, float(units.max()))
        near_start = 1e-5 * float(self._start_coefficients.norm()) + floor
        near_probe = 1e-4 * float(self._probe.norm()) + 1e-2 * unit
        same = torch.equal(state["fingerprint"].cpu(), self._fingerprint)
        for key, own, near in (
            ("start_coefficients", self._start_coefficients, near_start),
            ("probe", self._probe, near_probe),
        ):
            found = state[key].to(own)
            same &= found.shape == own.shape and torch.allclose(found, own, rtol=0, atol=near)
        if not same:
            raise ValueError(
                "the state belongs to another window of checkpoints, start point or kind of basis "
                "(extract, components, granularity, unit)"
            )

    def _follow_parameters(self) -> None:
        """Builds the basis again where a framework has sharded the model since."""
        parameters = self.param_groups[0]["params"]
        if parameters[0].device != self.coefficients.device:
            raise RuntimeError(
                f"the model is on {parameters[0].device}, and was on {self.coefficients.device} "
                "when TWA was made: move it before"
            )
        if any(a is not b for a, b in zip(parameters, self.subspace.parameters, strict=True)):
            if self._checkpoints is None:
                raise RuntimeError("the model was sharded after the first step of TWA")
            self._set_up()
            self._write_weights()

    def __getstate__(self) -> dict:
        raise TypeError(
            "a TWA optimizer, with its model and basis, is not copied: use state_dict()"
        )

    def _project_gradients(
        self, weight: float, loss: Tensor | None = None
    ) -> tuple[Tensor | None, bool]:
        """Sets the gradient of the coefficients.

        Returns:
            `loss`, and whether the gradients of a rank overflowed; both of all ranks.
        """
        given = [p.grad for p in self.subspace.parameters]
        missing = sum(gradient is None for gradient in given)
        if missing and not {*self.subspace.parameters} <= {*self._model.parameters()}:
            raise RuntimeError(
                "the model has other parameters than when TWA was made (as fully_shard makes): "
                "make it after that"
            )
        if missing == len(given) and not self._many:
            self.coefficients.grad = None  # Then `base` leaves them alone, as any optimizer does.
            return loss, False
        gradients = self.subspace.flatten(given, out=self._flat)
        skip = False
        if self._many:
            gradient, loss, skip = self._summed(gradients, weight, loss)
        else:
            gradient = self.subspace.project(gradients)
        self.coefficients.grad = gradient
        if self._checkpoints is not None and gradient.any():
            # From the first real step on, nothing of the constructor is needed any more.
            self._checkpoints, self._start_point, self._overwritten = None, None, []
        return loss, skip

    def _summed(
        self, gradients: Tensor, weight: float, loss: Tensor | None
    ) -> tuple[Tensor, Tensor | None, bool]:
        """The projected gradient and `loss`, means over all ranks, and whether one overflowed.

        All of it in one sum over the shards and one over the replicas.
        """
        riders = gradients.new_tensor([weight, 0, self.stop, 0])
        if loss is not None and weight:  # That of an empty share is NaN.
            riders[1] = weight * loss.detach()
        overflow = getattr(self, "found_inf", None)  # A scaler sets this, and `grad_scale`.
        if overflow is not None:
            riders[3] = overflow
        gradient = self.subspace.project(gradients, riders)
        if getattr(self, "grad_scale", None) is not None:
            gradient = gradient / self.grad_scale
        if self._replicas.count > 1:
            # The gradient of an empty share may be NaN as well.
            weighted = (riders[0] * gradient).where(riders[0] > 0, 0)
            total = self._replicas.sum(torch.cat([weighted, riders]))
            gradient, riders = total[:-4], total[-4:]
            gradient = gradient / riders[0].clamp(min=torch.finfo(riders.dtype).tiny)
        self._stopping = riders[2]
        mean = None if loss is None else riders[1] / riders[0]
        return gradient, mean, overflow is not None and bool(riders[3] > 0)

    @torch.no_grad()
    def _compare_ranks(self) -> None:
        """Raises ValueError where a rank has come to differ from the first one of its group.

        What differs by rounding, as on processors of another kind, becomes the first one's.
        """
        if self._replicas.count > 1 and self._steps % COMPARE_EVERY == 0:
            state = self.base.state.get(self.coefficients, {}).values()
            shape, group = self.coefficients.shape, self.param_groups[0]
            vectors = [self.coefficients]
            vectors += [v for v in state if isinstance(v, Tensor) and v.shape == shape]
            arguments = {key: str(group[key]) for key in group if key != "params"}
            self._replicas.check(arguments | {"state of the optimizer": len(vectors)})
            firsts = self._replicas.take_first(torch.stack(vectors))
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

    @torch.no_grad()
    def set_coefficients(self, coefficients: Tensor) -> None:
        """Moves the model to these coefficients; `origin` is the start point."""
        self.coefficients.copy_(coefficients)
        self._write_weights()

    @torch.no_grad()
    def _write_weights(self) -> None:
        moved = self.coefficients - self.origin
        self.subspace.assign(self._start, self.subspace.expand(moved, out=self._flat))


def _copy_hyperparameters(source: torch.optim.Optimizer, target: torch.optim.Optimizer) -> None:
    (group,), (own,) = source.param_groups, target.param_groups
    own.update({key: value for key, value in group.items() if key != "params"})
