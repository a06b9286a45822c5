"""Checkpoints into a model, and the averages of several."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from twa.files.fit import Fit, identity
from twa.files.reading import CheckpointError, tensor_of
from twa.files.states import Checkpoint, load_state_dict, name_of, weights_of
from twa.files.windows import copies
from twa.ranks import sharding


class NotFiniteError(CheckpointError):
    """A `state_dict` that holds NaN or infinity; the message names the file and the key."""


def check_window(model: nn.Module, checkpoints: Iterable[Checkpoint]) -> list[Checkpoint]:
    """`checkpoints` as a list, each once, after checking the types of both arguments.

    Of files that are the same, by links or by content, one counts; a warning names the others.

    Raises:
        TypeError: one is of another type; the message says which.
        ValueError: there are none, or one holds the model's own weights, which training changes.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"a model (torch.nn.Module) comes first, not a {type(model).__name__}")
    if isinstance(checkpoints, Checkpoint):
        raise TypeError("checkpoints are several, in a list; one alone was given")
    checkpoints = list(checkpoints)
    if not checkpoints:
        raise ValueError("no checkpoints were given")
    trained = {identity(p) for p in model.parameters() if p.requires_grad}
    for index, checkpoint in enumerate(checkpoints):
        name, kind = f"checkpoints[{index}]", type(checkpoint).__name__
        if not isinstance(checkpoint, Checkpoint):
            raise TypeError(f"{name} is no path and no state_dict, but a {kind}")
        values = weights_of(checkpoint, name).values() if isinstance(checkpoint, Mapping) else ()
        if any(isinstance(value, Tensor) and identity(value) in trained for value in values):
            raise ValueError(
                f"{name} holds the model's own weights, which change with it: give "
                "copy.deepcopy(model.state_dict())"
            )
    return without_copies(checkpoints)


def without_copies(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """`checkpoints` with the first of files that are the same, unless all are; warns of others."""
    same = copies(checkpoints)
    if len(checkpoints) - len(same) < 2:
        return [*checkpoints]
    if same:
        names = [f"{name_of(checkpoints[i])} is {name_of(checkpoints[k])}" for i, k in same.items()]
        warnings.warn(f"the same checkpoint counts once: {', '.join(names)}", stacklevel=3)
    return [checkpoint for i, checkpoint in enumerate(checkpoints) if i not in same]


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
            buffer = like and not isinstance(like[key], nn.Parameter)
            if buffer and sharding.local(like[key]).shape == tensor.shape:
                own = sharding.local(like[key]).to(tensor)[odd]
            if not torch.allclose(tensor[odd], own, equal_nan=True):
                raise NotFiniteError(f"{name}: {key} holds NaN or infinity")


def load_into(
    model: nn.Module, checkpoint: Checkpoint, name: str | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Loads into `model` what `checkpoint` has of it; the model keeps the rest.

    If anything fails, the model keeps all its values. Each rank of a sharded model reads its own
    part. Frozen parameters that are equal already are not written.

    Args:
        name: the name of the checkpoint in messages, if it is not a path.

    Returns:
        the tensors of the model that were written and do not train, and their values before.

    Raises:
        CheckpointError: as `Fit`, or there is NaN or infinity in what would be loaded.
    """
    fit, name = Fit(model), name or name_of(checkpoint)
    state = {
        key: sharding.part(tensor_of(value), fit.tensors[key])
        for key, value in fit(checkpoint, name).items()
    }
    for key in [key for key in state if _is_equal_and_frozen(fit.tensors[key], state[key])]:
        del state[key]
    check_finite(state, name, fit.tensors)
    # In the model's own `state_dict`, whose metadata holds the versions of the modules, but not
    # what else is in it: modules may save more than they load, as quantized ones do.
    own = model.state_dict()
    own.clear()
    own.update({fit.keys[k]: sharding.shard(v, fit.tensors[k]) for k, v in state.items()})
    written = {id(fit.tensors[key]) for key in state}
    if _cannot_fail(model, fit, state):  # Then trained tensors need no copy.
        written -= {id(tensor) for tensor in fit.tensors.values() if tensor.requires_grad}
    with _restored_on_failure(model, written) as before:
        model.load_state_dict(own, strict=False)
    return [(tensor, values) for tensor, values in before if not tensor.requires_grad]


def _cannot_fail(model: nn.Module, fit: Fit, state: Mapping[str, Tensor]) -> bool:
    """Whether loading `state` is nothing but copies between tensors of one shape."""
    for module in model.modules():
        load = type(module)._load_from_state_dict
        hooks = (module._load_state_dict_pre_hooks, module._load_state_dict_post_hooks)
        if not load.__module__.startswith("torch.nn.modules") or any(hooks):
            return False
    tensors = [(sharding.local(fit.tensors[key]), value) for key, value in state.items()]
    # torch refuses to write to a tensor of which several elements share memory.
    alone = (torch._debug_has_internal_overlap(own) == 0 for own, _ in tensors)
    return all(alone) and all(own.shape == value.shape for own, value in tensors)


def _is_equal_and_frozen(own: Tensor, value: Tensor) -> bool:
    """Whether `own` is a frozen parameter, of which a copy would be too large, with this value."""
    if not isinstance(own, nn.Parameter) or own.requires_grad:
        return False
    own = sharding.local(own)
    return own.shape == value.shape and torch.equal(own, value.to(own))


@contextlib.contextmanager
def _restored_on_failure(
    model: nn.Module, written: Collection[int]
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Context that yields the tensors with an `id` in `written` and their values before.

    If the block raises, it restores these values.
    """
    before = [
        (holder, name, tensor, sharding.local(tensor).clone())
        for module in model.modules()
        for holder in (module._parameters, module._buffers)
        for name, tensor in holder.items()
        if id(tensor) in written
    ]
    try:
        yield [(tensor, values) for _, _, tensor, values in before]
    except BaseException:
        with torch.no_grad():
            for holder, name, tensor, values in before:
                holder[name] = tensor
                sharding.local(tensor).resize_(values.shape).copy_(values)
        raise


def average(
    checkpoints: Sequence[Checkpoint],
    like: nn.Module | Mapping[str, Tensor] | None = None,
    decay: float = 1.0,
) -> dict[str, Tensor]:
    """The uniform mean of `checkpoints` (SWA, Izmailov et al., UAI 2018), or an exponential one.

    The mean is that of the model's parameters, real or complex, summed in float64 (complex128) with
    one checkpoint in memory at a time. Buffers are the last checkpoint's, whatever they hold, and
    so are integers. Without a model, buffers and parameters look alike: then the mean is taken of
    all real and complex tensors, also of buffers such as the vectors of spectral norm, of which a
    mean makes no sense. What one of the checkpoints lacks, such as frozen parameters, is not in the
    mean. The mean of adapters of PEFT is that of their matrices A and of their matrices B: its
    product BA is not the mean of the adapters' products. Files that are the same count once.

    Args:
        like: the model, or the `state_dict`, that each has to fit (`Fit`), and that gives the mean
            its names and dtypes; the last checkpoint if None. Where it is sharded, so is the mean,
            and each rank reads its own part.
        decay: the weight of a checkpoint as a share of that of the next one, in (0, 1].

    Raises:
        CheckpointError: one of them cannot be read, does not fit, or holds NaN or infinity.
        ValueError: there are none.
    """
    checkpoints = without_copies(checkpoints)
    (mean,) = last_means(checkpoints, [len(checkpoints)], like, decay)
    return mean


def last_means(
    checkpoints: Sequence[Checkpoint],
    counts: Sequence[int],
    like: nn.Module | Mapping[str, Tensor] | None = None,
    decay: float = 1.0,
) -> Iterator[dict[str, Tensor]]:
    """The means, as `average` takes them, of the last so many checkpoints, for each of `counts`.

    Each file is read once, from the last one back; files that are the same count each.

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
        if count == 1:
            total = dict.fromkeys(state)
        averaged = [key for key in total if count == 1 or key in fit.averaged]
        for key in averaged:
            if key not in state:
                del total[key]
                continue
            value = _computable(sharding.part(tensor_of(state[key]), fit.tensors[key]))
            check_finite({key: value}, name, by_design)
            value = value.cpu() if value.is_mps else value  # which has no float64
            if count == 1:
                wide = torch.complex128 if value.is_complex() else torch.float64
                total[key] = value.to(wide if key in fit.averaged else value.dtype, copy=True)
            else:
                total[key].add_(value.to(total[key].device), alpha=decay ** (count - 1))
        if count in counts:
            # At the end freed one by one: sum and mean are never both complete.
            take = total.pop if count == counts[-1] else total.get
            weights = sum(decay**age for age in range(count))
            mean = {}
            for key in list(total):
                own, value = fit.tensors[key], take(key)
                if key in fit.averaged:
                    value = value / weights
                mean[key] = sharding.shard(value.to(own.dtype), own)
            yield mean
