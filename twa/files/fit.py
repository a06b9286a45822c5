"""`Fit`: what a model needs of a checkpoint, and what it takes of one."""

from __future__ import annotations

import functools
import itertools
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from twa.files import loaders
from twa.files.formats import adapter_config
from twa.files.reading import CheckpointError, Stored, tensor_of
from twa.files.states import Checkpoint, State, plain, uninserted, weights_of
from twa.ranks import sharding

# What wrappers put before the names of a model: DDP, Lightning modules and the like, PEFT.
PREFIXES = ("module", "model", "base_model")
# By what PEFT scales the product of an adapter's matrices, which do not show it.
SCALING = ("lora_alpha", "use_rslora", "alpha_pattern", "rank_pattern")
# Parts of the names of what quantized weights have beside them.
QUANTIZED = re.compile("scale|zero|absmax|quant|qweight|SCB|_packed|_blocks")

EIGHT = "of 8 bits"
EXPANDED = "is expanded, several elements in one place of memory: make it a clone()"

# The name that a tensor has within wrappers, from its own; None if it lies outside.
View = Callable[[str], str | None]


class Fit:
    """What a model needs of a checkpoint, and what it takes of one.

    It needs the trainable parameters (of a model that has none: the parameters). Buffers and
    frozen parameters may be missing, and a weight that the model ties may have one of its names.
    Parameters have the model's shape; of a buffer that has another, the model keeps its own.
    Frozen parameters that the model has on `meta` are checked, and not taken. Other keys are
    ignored; one warning names them, except integers, such as the counter of `AveragedModel`.

    Names may have prefixes of wrappers, in the checkpoint and in the model, and lack the name of
    PEFT's adapter, as in the files that PEFT writes: of the views of the names that this allows,
    those are taken that find most. Where tensors are then missing or of another shape, the loaders
    of the model's own library are asked (`twa.files.loaders`).

    Args:
        like: a model, or a `state_dict`, all of which is needed then.

    Attributes:
        keys: the model's own keys, by their names without what wrappers insert, in its order.
        tensors: its parameters and buffers, by these names.
        averaged: the names of those that averages are taken of: the parameters with real or complex
            values. (In a `state_dict` buffers look like parameters: all such tensors.)
    """

    def __init__(self, like: nn.Module | Mapping[str, Tensor]):
        self._model = like if isinstance(like, nn.Module) else None
        state = self._model.state_dict(keep_vars=True) if self._model is not None else like
        self.keys = plain(key for key in state if not key.endswith("_extra_state"))
        self.tensors = {name: state[key] for name, key in self.keys.items()}
        parameters = {n for n, t in self.tensors.items() if isinstance(t, nn.Parameter)}
        trainable = {name for name in parameters if self.tensors[name].requires_grad}
        self._needed = trainable or parameters or set(self.tensors)
        self._buffers = set() if self._model is None else self.tensors.keys() - parameters
        self.averaged = {n for n in self.tensors.keys() - self._buffers if _kind(self.tensors[n])}
        ties: dict[tuple, list[str]] = {}
        for name, tensor in self.tensors.items():
            ties.setdefault(identity(tensor), []).append(name)
        self._ties = [names for names in ties.values() if len(names) > 1]
        self._adapters: dict[str, object] = {}
        for module in () if self._model is None else self._model.modules():
            self._adapters |= getattr(module, "peft_config", None) or {}
        views = [*_views(self.tensors)]
        views += [functools.partial(_in_file, adapter=adapter) for adapter in self._adapters]
        self._views = [(view, _seen(self.tensors, view)) for view in views]
        self._ignored: set[str] = set()
        self._compared: set[str] = set()

    def __call__(self, checkpoint: Checkpoint, name: str) -> dict[str, Tensor | Stored]:
        """What the model takes of `checkpoint`, by the names and in the order of `tensors`.

        No tensor is read, except those of different memory that the model ties, once, and those
        that go through the model's loaders.

        Args:
            name: of the checkpoint, in messages.

        Raises:
            CheckpointError: it cannot be read, does not fit, or has different values for what the
                model ties.
        """
        state = weights_of(checkpoint, name)
        self._check_scaling(checkpoint, name)
        keys, *views = self._match(state)
        found = {own: state[key] for own, key in keys.items()}
        odd = {k for k, t in self.tensors.items() if k not in found or found[k].shape != t.shape}
        spare = state.keys() - {key for own, key in keys.items() if own not in odd}
        asks = self._model is not None and odd and spare
        loaded = self._load(state, *views, odd, spare) if asks else {}
        found |= loaded
        if loaded and self._needed.isdisjoint(odd - loaded.keys()):
            spare = set()
        reshaped = self._buffers & odd & found.keys() - loaded.keys()
        for key in reshaped:
            del found[key]
        for key in self.tensors:
            difference = self._difference(key, found, key in loaded)
            scales = scales_of(keys.get(key, key), spare) if difference else ()
            if scales or difference not in (None, EIGHT):
                reason = self._reason(key, difference, found, scales, state)
                raise CheckpointError(f"{name}: {reason}")
        order = [k for k in self.tensors if k in found]
        found = {k: found[k] for k in order if k in self._needed or not self.tensors[k].is_meta}
        for first, *others in self._ties if name not in self._compared else ():
            for other in others if first in found else ():
                if not torch.equal(tensor_of(found[first]), tensor_of(found[other])):
                    raise CheckpointError(
                        f"{name}: {first} and {other} differ there; in the model they are one"
                    )
        self._compared.add(name)
        shapes = {keys[key] for key in reshaped}
        surplus = {key for key in spare - shapes if state[key].dtype.is_floating_point}
        self._warn("ignored in the checkpoints, as the model has no such keys", surplus)
        self._warn("of another shape in the checkpoints; the model keeps its own", reshaped)
        return found

    def _warn(self, what: str, names: set[str]) -> None:
        """Warns of the first of `names`, unless all have been in a warning before."""
        if names - self._ignored:
            some = ", ".join(sorted(names)[:5]) + (", …" if len(names) > 5 else "")
            warnings.warn(f"{what}: {some}", stacklevel=4)
            self._ignored |= names

    def _match(self, state: State) -> tuple[dict[str, str], View, View]:
        """The keys of `state` by the model's names for them, and the views of both by which."""
        there, best = plain(state), None
        seen = [(view, _seen(there, view)) for view in _views(there)]
        for (view, names), (own_view, own) in itertools.product(seen, self._views):
            found = {own[name]: there[names[name]] for name in own.keys() & names.keys()}
            count = len(self._needed & found.keys())
            if not best or not best[0] or count > len(self._needed & best[0].keys()):
                best = found, view, own_view
            if count == len(self._needed):
                break
        for tied in self._ties:
            keys = [best[0][name] for name in tied if name in best[0]]
            for name in tied if keys else ():
                best[0].setdefault(name, keys[0])
        return best

    def _load(
        self, state: State, view: View, own_view: View, odd: set[str], spare: set[str]
    ) -> dict[str, Tensor]:
        """What the loaders of the model's library make of `state`, by the model's names.

        Args:
            view, own_view: of the names in `state` and of the model's, by which they match.
            odd: the names of the tensors in question.
            spare: the keys of `state` that nothing has taken.
        """
        keys, names = plain(state), {key: name for name, key in self.keys.items()}
        own, key = next(iter(self.keys.items()))
        root = uninserted(key).removesuffix(own)  # such as `module.`, if all names have it

        def place_of(path: str) -> str | None:
            name = uninserted(path + "_")
            seen = own_view(name.removeprefix(root)) if name.startswith(root) else None
            return None if seen is None else seen.removesuffix("_")

        seen = {name: keys[key] for name, key in _seen(keys, view).items()}
        versions = ((view(f"{p}._" if p else "_"), v) for p, v in state.versions.items())
        found = loaders.by_modules(
            self._model,
            {name: state[key] for name, key in seen.items()},
            {name for name, key in seen.items() if key in spare},
            {path.removesuffix("_"): version for path, version in versions if path},
            place_of,
            {self.keys[name] for name in odd},
        )
        for load in (loaders.by_peft, loaders.by_transformers):
            left = odd - {names.get(key) for key in found}
            if not self._needed.isdisjoint(left):
                given = {name: state[key] for name, key in keys.items()}
                found |= load(self._model, given, {self.keys[name] for name in left})
        return {names[key]: value for key, value in found.items() if key in names}

    def _difference(self, key: str, found: Mapping, loaded: bool) -> str | None:
        """How what is `found` of `key` differs from the model's; None if the model can take it.

        Args:
            loaded: whether the model's own loader made it, which may give buffers another shape.
        """
        own, there, buffer = self.tensors[key], found.get(key), key in self._buffers
        if there is None:
            return "missing" if key in self._needed else None
        if there.shape != own.shape and not (loaded and buffer):
            return f"{list(there.shape)} there and {list(own.shape)} in the model"
        if _kind(there) == 2 > _kind(own) or (_kind(there) == 0 < _kind(own) and not buffer):
            return f"{there.dtype} there and {own.dtype} in the model"
        if self._model is not None and _expanded(own):
            return EXPANDED
        return EIGHT if there.dtype.itemsize == 1 < own.dtype.itemsize else None

    def _reason(
        self, key: str, difference: str, found: Mapping, scales: Sequence[str], state: State
    ) -> str:
        """Why the model cannot take `state`, of which `key` is the first that has a `difference`.

        Args:
            found: what it can take.
            scales: the keys of `state` that show that `key` is quantized.
        """
        if scales:
            return f"is quantized: {key} goes with {', '.join(scales)}; dequantize it first"
        if difference == EXPANDED:
            return f"cannot be loaded: {key} of the model {EXPANDED}"
        if any(name.endswith("prompt_embeddings") for name in state):
            return (
                f"holds the prompts that PEFT's encoder makes, not the encoder ({key}): save the "
                "model's state_dict"
            )
        sizes = [found[name].shape.numel() for name in self._needed if name in found]
        if not sizes and state:
            return (
                f"holds nothing by the model's names: {next(iter(state))} there, {key} in the "
                "model; give the module that was saved, or a state_dict of its part"
            )
        if sizes and max(sizes) <= 1 < self.tensors[key].numel():
            return (
                f"holds no weights ({key} is {difference}), as DeepSpeed's ZeRO-3 leaves them: run "
                "its zero_to_fp32.py, and give what that writes"
            )
        return f"of another architecture: {key} is {difference}"

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


def identity(tensor: Tensor) -> tuple:
    """What tells the memory of `tensor` from that of another: tied weights agree in it."""
    own = sharding.local(tensor)
    return own.device, own.data_ptr() or id(tensor), tensor.shape, tensor.stride()


def _kind(tensor: Tensor | Stored) -> int:
    """0 for integers, 1 for floats, 2 for complex numbers."""
    return 2 if tensor.dtype.is_complex else int(tensor.dtype.is_floating_point)


def _expanded(tensor: Tensor) -> bool:
    strides = zip(tensor.stride(), tensor.shape, strict=True)
    return any(stride == 0 and length > 1 for stride, length in strides)


def scales_of(key: str, spare: Collection[str]) -> list[str]:
    """The keys among `spare` that a quantized weight `key` has beside it."""
    module = key.rpartition(".")[0]
    return sorted(k for k in spare if k.startswith(module) and QUANTIZED.search(k[len(module) :]))


def _views(names: Iterable[str]) -> Iterator[View]:
    """Without the prefixes of wrappers, and without the `module` of DDP anywhere; whole first."""
    names = [*names]
    prefixes = {""}
    for name in names:
        segments = itertools.takewhile(PREFIXES.__contains__, name.split("."))
        prefixes.update(itertools.accumulate(f"{segment}." for segment in segments))
    for bare in (False, True) if any("module." in name for name in names) else (False,):
        for prefix in sorted(prefixes, key=len):
            yield functools.partial(_within, prefix=prefix, bare=bare)


def _within(name: str, prefix: str, bare: bool) -> str | None:
    """`name` without `prefix`; with `bare` without the segments `module` before that."""
    if bare:
        name = ".".join(segment for segment in name.split(".") if segment != "module")
    return name.removeprefix(prefix) if name.startswith(prefix) else None


def _in_file(name: str, adapter: str) -> str:
    """The name that PEFT gives in its files to what a model with this adapter calls `name`."""
    dropped = (adapter, "modules_to_save")
    name = ".".join(segment for segment in name.split(".") if segment not in dropped)
    return name.removesuffix(".weight") if "lora_magnitude_vector" in name else name


def _seen(names: Iterable[str], view: View) -> dict[str, str]:
    """`names` by how `view` shows them; none if it shows two alike."""
    shown = [(view(name), name) for name in names]
    seen = {name: own for name, own in shown if name is not None}
    return seen if len(seen) == sum(name is not None for name, _ in shown) else {}
