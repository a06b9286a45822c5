"""Checkpoints: what a model needs of them, and their averages."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from twa.files.formats import CheckpointError, Stored, adapter_config, load, tensor_of
from twa.ranks import sharding

Checkpoint = str | os.PathLike | Mapping
# Where training scripts put the model's `state_dict` among other things.
CONTAINERS = ("state_dict", "model_state_dict", "model", "module", "app")
# What wrappers put before the names of a model: DDP, Lightning modules and the like, PEFT.
PREFIXES = ("module", "model", "base_model")
# What `torch.compile`, FSDP1 and activation checkpointing put anywhere into names.
INSERTED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# By what PEFT scales the product of an adapter's matrices, which do not show it.
SCALING = ("lora_alpha", "use_rslora", "alpha_pattern", "rank_pattern")


class NotFiniteError(CheckpointError):
    """A `state_dict` that holds NaN or infinity; the message names the file and the key."""


def listed(model: nn.Module, checkpoints: Iterable[Checkpoint]) -> list[Checkpoint]:
    """`checkpoints` as a list, once it and `model` are what their names say.

    Raises:
        TypeError: they are not; the message says what was given instead.
        ValueError: there are none, or one holds the model's own weights, which training changes.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"a model (torch.nn.Module) comes first, not a {type(model).__name__}")
    if isinstance(checkpoints, Checkpoint):
        raise TypeError("checkpoints are several, in a list; one alone was given")
    checkpoints = list(checkpoints)
    if not checkpoints:
        raise ValueError("no checkpoints were given")
    trained = {_identity(p) for p in model.parameters() if p.requires_grad}
    for index, checkpoint in enumerate(checkpoints):
        name, kind = f"checkpoints[{index}]", type(checkpoint).__name__
        if not isinstance(checkpoint, Checkpoint):
            raise TypeError(f"{name} is no path and no state_dict, but a {kind}")
        values = _weights(checkpoint, name).values() if isinstance(checkpoint, Mapping) else ()
        if any(isinstance(value, Tensor) and _identity(value) in trained for value in values):
            raise ValueError(
                f"{name} holds the model's own weights, which change with it: give "
                "copy.deepcopy(model.state_dict())"
            )
    return checkpoints


def name_of(checkpoint: Checkpoint, index: int | None = None) -> str:
    """The name of `checkpoint` in messages: its path; without one, its `index` in the window."""
    if not isinstance(checkpoint, Mapping):
        return os.fspath(checkpoint)
    return "state_dict" if index is None else f"checkpoints[{index}]"


def load_state_dict(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The `state_dict` of `checkpoint`: a path is read, a mapping is searched.

    It may be the value of one of `CONTAINERS`; mappings beside its tensors are left out. What
    wrappers insert (`INSERTED`) is removed from its keys, and so is `module.` where all have it.

    Raises:
        CheckpointError: as `twa.files.formats.load`, or there is no `state_dict`.
    """
    state = _weights(checkpoint, name_of(checkpoint))
    return {name: tensor_of(state[key]) for name, key in _plain(state).items()}


def _weights(checkpoint: Checkpoint, name: str) -> dict[str, Tensor | Stored]:
    """The `state_dict` of `checkpoint`, unread as far as it comes from files."""
    content = checkpoint if isinstance(checkpoint, Mapping) else load(checkpoint)
    for _ in CONTAINERS:  # A container may hold another, and not itself without end.
        if isinstance(content, Mapping):
            inner = (content.get(key) for key in CONTAINERS)
            content = next((c for c in inner if isinstance(c, Mapping)), content)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{name}: is not a state_dict (names to tensors)")
    # Modules may unpickle their extra state: it stays the model's own.
    state = {k: v for k, v in content.items() if not str(k).endswith("_extra_state")}
    if any(isinstance(value, Tensor | Stored) for value in state.values()):
        # What torchtitan saves has the model's tensors beside the optimizer.
        state = {k: v for k, v in state.items() if not isinstance(v, Mapping)}
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor | Stored):
            places = ", ".join(CONTAINERS)
            raise CheckpointError(
                f"{name}: is not a state_dict (names to tensors) and holds none as {places}: "
                f"{key!r} is a {type(value).__name__}"
            )
        if isinstance(value, Tensor) and (
            value.layout != torch.strided or value.is_meta or value.is_quantized
        ):
            raise CheckpointError(f"{name}: {key} is no ordinary tensor with values")
    return state


def _plain(keys: Iterable[str]) -> dict[str, str]:
    """`keys` by their names without what wrappers insert, or all begin with as `module.`."""
    named = {".".join(s for s in key.split(".") if s not in INSERTED): key for key in keys}
    while named and all(name.startswith("module.") for name in named):
        named = {name.removeprefix("module."): key for name, key in named.items()}
    return named


def _prefixes(names: Iterable[str]) -> list[str]:
    """The prefixes of wrappers with which some of `names` begin; the empty one is the first."""
    found = {""}
    for name in names:
        segments = itertools.takewhile(PREFIXES.__contains__, name.split("."))
        found.update(itertools.accumulate(f"{segment}." for segment in segments))
    return sorted(found, key=len)


class Fit:
    """What a model needs of a checkpoint, and what it takes of one.

    Needed are the trainable parameters (of a model that has none: the parameters). Buffers and
    frozen parameters may be missing, and a weight that the model ties may have one of its names;
    what is there has the model's shape. Frozen ones that the model has on `meta` are checked, and
    not taken. Other keys are ignored; one warning names them, except integers, such as the counter
    of `AveragedModel`. The names may have prefixes of wrappers, in the checkpoint and in the model,
    and lack the name of PEFT's adapter, as in the files that PEFT writes: of the readings that this
    allows, the one that finds most is taken.

    Args:
        like: a model, or a `state_dict`, all of which is needed then.

    Attributes:
        keys: the model's own keys, by their names without prefixes, in its order.
        tensors: its parameters and buffers, by these names.
    """

    def __init__(self, like: nn.Module | Mapping[str, Tensor]):
        module = isinstance(like, nn.Module)
        state = like.state_dict(keep_vars=True) if module else like
        self.keys = _plain(key for key in state if not key.endswith("_extra_state"))
        self.tensors = {name: state[key] for name, key in self.keys.items()}
        parameters = {n: t for n, t in self.tensors.items() if isinstance(t, nn.Parameter)}
        trainable = {n for n, t in parameters.items() if t.requires_grad}
        self._needed = trainable or set(parameters or self.tensors)
        ties: dict[tuple, list[str]] = {}
        for name, tensor in self.tensors.items():
            ties.setdefault(_identity(tensor), []).append(name)
        self._ties = [names for names in ties.values() if len(names) > 1]
        # The model's names by those that a checkpoint may have for them, reading by reading.
        self._readings = [
            {name.removeprefix(prefix): name for name in self.tensors if name.startswith(prefix)}
            for prefix in _prefixes(self.tensors)
        ]
        modules = like.modules() if module else ()
        self._adapters: dict[str, object] = {}
        for configurations in (getattr(m, "peft_config", {}) for m in modules):
            self._adapters |= configurations
        for adapter in self._adapters:
            self._readings.append({_in_file(name, adapter): name for name in self.tensors})
        self._ignored: set[str] = set()
        self._compared: set[str] = set()

    def __call__(self, checkpoint: Checkpoint, name: str) -> dict[str, Tensor | Stored]:
        """What the model takes of `checkpoint`, by the names and in the order of `tensors`.

        No tensor is read, except those of different memory that the model ties, once.

        Args:
            name: of the checkpoint, in messages.

        Raises:
            CheckpointError: it cannot be read, does not fit, or has different values for what the
                model ties.
        """
        state = _weights(checkpoint, name)
        self._check_scaling(checkpoint, name)
        keys = self._keys(state)
        found = {own: state[keys[own]] for own in self.tensors if own in keys}
        if state and self._needed and self._needed.isdisjoint(found):
            own = next(name for name in self.tensors if name in self._needed)
            raise CheckpointError(
                f"{name}: holds nothing by the model's names: {next(iter(state))} there, {own} in "
                "the model; give the module that was saved, or a state_dict of its part"
            )
        for key, own in self.tensors.items():
            there = found.get(key)
            if there is None:
                if key not in self._needed:
                    continue
                differs = "missing"
            elif there.shape != own.shape:
                differs = f"{list(there.shape)} there and {list(own.shape)} in the model"
            elif own.is_floating_point() and not there.dtype.is_floating_point:
                differs = f"{there.dtype} there and {own.dtype} in the model"
            else:
                continue
            raise CheckpointError(f"{name}: of another architecture: {key} is {differs}")
        found = {k: v for k, v in found.items() if k in self._needed or not self.tensors[k].is_meta}
        for first, *others in self._ties if name not in self._compared else ():
            for other in others if first in found else ():
                if not torch.equal(tensor_of(found[first]), tensor_of(found[other])):
                    raise CheckpointError(
                        f"{name}: {first} and {other} differ there; in the model they are one"
                    )
        self._compared.add(name)
        surplus = {k for k, v in state.items() if v.dtype.is_floating_point} - {*keys.values()}
        if surplus - self._ignored:
            some = ", ".join(sorted(surplus)[:5]) + (", …" if len(surplus) > 5 else "")
            warnings.warn(
                f"ignored in the checkpoints, as the model has no such keys: {some}", stacklevel=3
            )
            self._ignored |= surplus
        return found

    def _check_scaling(self, checkpoint: Checkpoint, name: str) -> None:
        """Raises a `CheckpointError` for an adapter that no adapter of the model is scaled as."""
        if isinstance(checkpoint, Mapping) or not self._adapters:
            return
        there = adapter_config(checkpoint)
        for key in SCALING if there else ():
            own = [getattr(adapter, key, None) for adapter in self._adapters.values()]
            if (there.get(key) or None) not in [value or None for value in own]:
                raise CheckpointError(
                    f"{name}: is an adapter of {key} {there.get(key)}, the model's has {own[0]}: "
                    "their weights do not count alike"
                )

    def _keys(self, state: Mapping[str, object]) -> dict[str, str]:
        """Under which key `state` has what the model calls so, as far as it has it."""
        keys, best = _plain(state), {}
        for prefix, reading in itertools.product(_prefixes(keys), self._readings):
            found = {
                reading[name.removeprefix(prefix)]: key
                for name, key in keys.items()
                if name.startswith(prefix) and name.removeprefix(prefix) in reading
            }
            if not best or len(self._needed & found.keys()) > len(self._needed & best.keys()):
                best = found
        for tied in self._ties:
            there = [best[name] for name in tied if name in best]
            if there:
                best = dict.fromkeys(tied, there[0]) | best
        return best


def _identity(tensor: Tensor) -> tuple:
    """What tells the memory of `tensor` from that of another: tied weights agree in it."""
    own = sharding.local(tensor)
    return own.device, own.data_ptr() or id(tensor), tensor.shape, tensor.stride()


def _in_file(name: str, adapter: str) -> str:
    """The name that PEFT gives in its files to what a model with this adapter calls `name`."""
    left_out = (adapter, "modules_to_save")
    name = ".".join(segment for segment in name.split(".") if segment not in left_out)
    return name.removesuffix(".weight") if "lora_magnitude_vector" in name else name


def _computable(tensor: Tensor) -> Tensor:
    """`tensor`, at 32 bits if its floats have 8, with which torch computes nothing."""
    eight = tensor.is_floating_point() and tensor.dtype.itemsize == 1
    return tensor.float() if eight else tensor


def check_finite(
    state: Mapping[str, Tensor], name: str, like: Mapping[str, Tensor] | None = None
) -> None:
    """Raises `NotFiniteError` with the first key of `state` that holds NaN or infinity.

    Args:
        name: of what holds it, in the message.
        like: a model's tensors. What its buffers hold in the same places, as one does that masks
            attention, is no fault; of its weights, it would be of the model as well.
    """
    for key, tensor in state.items():
        if not isinstance(tensor, Tensor):  # the extra state of a module
            continue
        tensor = _computable(tensor)
        odd = ~tensor.isfinite()
        if odd.any():
            own = tensor.new_zeros(())
            if like and not isinstance(like[key], nn.Parameter):
                own = sharding.local(like[key]).to(tensor)[odd]
            if not torch.allclose(tensor[odd], own, equal_nan=True):
                raise NotFiniteError(f"{name}: {key} holds NaN or infinity")


def load_into(model: nn.Module, checkpoint: Checkpoint, name: str | None = None) -> None:
    """Loads into `model` what `checkpoint` has of it; the model keeps the rest.

    If the checkpoint does not fit (`Fit`), the model is left as it was. Of a sharded model, each
    rank reads its own part.

    Args:
        name: the name of the checkpoint in messages, if it is not a path.

    Raises:
        CheckpointError: as `Fit`, or there is NaN or infinity in what would be loaded.
    """
    fit, name = Fit(model), name or name_of(checkpoint)
    state = {
        key: sharding.part(tensor_of(value), fit.tensors[key])
        for key, value in fit(checkpoint, name).items()
    }
    check_finite(state, name, fit.tensors)
    # In the model's own `state_dict`, whose metadata holds the versions of the modules, but not
    # what else is in it: modules may save more than they load, as quantized ones do.
    own = model.state_dict()
    own.clear()
    own.update({fit.keys[k]: sharding.shard(v, fit.tensors[k]) for k, v in state.items()})
    model.load_state_dict(own, strict=False)


def average(
    checkpoints: Sequence[Checkpoint],
    like: nn.Module | Mapping[str, Tensor] | None = None,
    decay: float = 1.0,
) -> dict[str, Tensor]:
    """The uniform mean of `checkpoints` (SWA, Izmailov et al., UAI 2018), or an exponential one.

    Summed in float64, one checkpoint in memory at a time. Integers (the counters of batch norm) and
    complex numbers are those of the last. What one of them lacks, buffers or frozen parameters, is
    not in the mean. The mean of adapters of PEFT is that of their matrices A and of their matrices
    B: its product BA is not the mean of the adapters' products.

    Args:
        like: the model, or the `state_dict`, that each has to fit (`Fit`), and that gives the mean
            its names and dtypes; the last checkpoint if None. Where it is sharded, so is the mean,
            and each rank reads its own part.
        decay: the weight of a checkpoint as a share of that of the next one, in (0, 1].

    Raises:
        CheckpointError: one of them cannot be read, does not fit, or holds NaN or infinity.
        ValueError: there are none.
    """
    (mean,) = last_means(checkpoints, [len(checkpoints)], like, decay)
    return mean


def last_means(
    checkpoints: Sequence[Checkpoint],
    counts: Sequence[int],
    like: nn.Module | Mapping[str, Tensor] | None = None,
    decay: float = 1.0,
) -> Iterator[dict[str, Tensor]]:
    """The means, as `average` takes them, of the last so many checkpoints, for each of `counts`.

    Each file is read once, from the last one back.

    Args:
        counts: in rising order.
        checkpoints, like, decay: as for `average`.

    Raises:
        CheckpointError, ValueError: as `average`.
    """
    if not checkpoints:
        raise ValueError("no checkpoints were given")
    fit = Fit(load_state_dict(checkpoints[-1]) if like is None else like)
    by_design = fit.tensors if isinstance(like, nn.Module) else None
    total: dict[str, Tensor | None] = {}
    for count in range(1, counts[-1] + 1):
        name = name_of(checkpoints[-count], len(checkpoints) - count)
        state = fit(checkpoints[-count], name)
        total = {key: total.get(key) for key in total or state if key in state}
        for key in total:
            value = _computable(sharding.part(tensor_of(state[key]), fit.tensors[key]))
            check_finite({key: value}, name, by_design)
            value = value.cpu() if value.is_mps else value  # which has no float64
            if count == 1:
                exact = torch.float64 if value.is_floating_point() else value.dtype
                total[key] = value.to(exact, copy=True)
            elif value.is_floating_point():
                total[key].add_(value, alpha=decay ** (count - 1))
        if count in counts:
            # At the end freed one by one: sum and mean are never both complete.
            take = total.pop if count == counts[-1] else total.get
            weights = sum(decay**age for age in range(count))
            mean = {}
            for key in list(total):
                own, value = fit.tensors[key], take(key)
                if value.is_floating_point():
                    value = value / weights
                mean[key] = sharding.shard(value.to(own.dtype), own)
            yield mean
