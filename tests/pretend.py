"""A pretend accelerator, "pretend", in Python alone: what it refuses, a CUDA device refuses.

Its tensors wrap tensors of the CPU whose data no CPU operator can reach. An operator on tensors of
two devices raises an error as CUDA's operators do. It has two devices, a generator for each, pinned
memory, autocast and gloo, and it counts what a program on an accelerator should not do often:
waits for the device, and launches of operators.

`install` sets it up for the whole process, which cannot undo it; tests run in processes of their
own. It is built on `torch.utils.backend_registration`.
"""

import contextlib
import functools
import types
from collections import Counter
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.utils import backend_registration
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
NAME = "pretend"
DEVICES = 2
# The version of torch has what the device needs.
POSSIBLE = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")

# CUDA takes indices from the CPU, and copies between any two devices.
_INDEXING = {aten.index, aten.index_put_, aten.index_put, aten._index_put_impl_}
_COPIES = {aten.copy_, aten._copy_from, aten._foreach_copy_}
# The host has to know what these return before it can go on.
_WAITING = {
    *(aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero),
    *(aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.bincount),
    *(aten.linalg_eigh, aten.linalg_cholesky, aten._linalg_eigh),
}
# Operators that make tensors, with a `device` among their keywords.
_FACTORIES = (
    *("empty.memory_format", "empty_strided", "arange", "arange.start", "arange.start_step"),
    *("eye", "eye.m", "linspace", "randperm", "randperm.generator"),
)

counts: Counter[str] = Counter()  # "waits" and "launches", and waits by their operator
_generators = [torch.Generator() for _ in range(DEVICES)]
_current = [0]
_kept: list[torch.library.Library] = []  # what is registered lasts as long as its library


class Tensor(torch.Tensor):
    """A tensor on the device of this `index`; `raw` is where its data are.

    PyTorch's own code, which knows one device made in Python, takes it for one on the first.
    """

    @staticmethod
    def __new__(cls, raw: torch.Tensor, index: int):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=torch.device(NAME, 0),
        )

    def __init__(self, raw: torch.Tensor, index: int):
        self.raw, self.index = raw, index

    @property
    def device(self) -> torch.device:
        return torch.device(NAME, self.index)

    def __tensor_flatten__(self):
        return ["raw"], self.index

    @staticmethod
    def __tensor_unflatten__(inner, index, size, stride):
        return Tensor(inner["raw"], index)

    def __repr__(self, **_):
        return f"{self.raw!r} on {self.device}"

    def tolist(self):
        _wait("tolist")
        return self.detach().raw.tolist()

    def numpy(self, **_):
        raise TypeError(f"can't convert {self.device} tensor to numpy: use Tensor.cpu() first")

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.to:
            return _to(*args, **kwargs or {})
        return torch._C._disabled_torch_function_impl(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


def _to(tensor: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    """`Tensor.to`, which PyTorch cannot do itself between devices that it does not tell apart."""
    if args and isinstance(args[0], torch.Tensor):
        args = (args[0].device, args[0].dtype, *args[1:])
    described = {key: value for key, value in kwargs.items() if key != "copy"}
    device = torch._C._nn._parse_to(*args, **described)[0]
    here = tensor.device
    if device and here.type == device.type == NAME and here.index != _index(device):
        tensor = _Move.apply(tensor, _index(device))
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.to(*args, **kwargs)


class _Move(torch.autograd.Function):
    """To another device of the kind, and back with the gradient."""

    @staticmethod
    def forward(context, tensor: Tensor, index: int) -> Tensor:
        context.index = tensor.index
        return Tensor(tensor.detach().raw.clone(), index)

    @staticmethod
    def backward(context, gradient: Tensor):
        return Tensor(gradient.raw.clone(), context.index), None


def _wait(what: str) -> None:
    counts.update(["waits", f"waits: {what}"])


def _raw(value: object) -> object:
    return value.raw if isinstance(value, Tensor) else value


def _run(function, args: tuple, kwargs: dict):
    """Runs an operator, some of whose arguments are on the device."""
    packet = function.overloadpacket
    if packet in _COPIES:
        return _copy(packet, args, kwargs)
    if packet is aten._to_copy:
        return _moved(args[0], **kwargs)
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    index = _only_device(tensors[:1] if packet in _INDEXING else tensors, function)
    if packet in _INDEXING:
        _check_indices(args[1], tensors[0])
    if packet in _WAITING:
        _wait(packet.__name__)
    if kwargs.get("device") is not None:
        index = _index(kwargs["device"])
    raw = {key: value for key, value in tree_map(_raw, kwargs).items() if key != "pin_memory"}
    if "device" in raw:
        raw["device"] = "cpu"
    with _generator(function, index):
        out = function(*tree_map(_raw, args), **raw)
    if function.namespace == "c10d":
        return out
    made = tree_map(lambda t: Tensor(t, index) if isinstance(t, torch.Tensor) else t, out)
    made = return_and_correct_aliasing(function, args, kwargs, made)
    if not function.is_view:
        counts["launches"] += 1
    return made


def _only_device(tensors: list[torch.Tensor], function) -> int:
    """The index of the device of `tensors`, among which may be scalars on the CPU."""
    devices = {t.device for t in tensors if t.dim()}
    scalars = {t.device for t in tensors if isinstance(t, Tensor)}
    if len(devices) > 1 or {device.type for device in devices | scalars} - {NAME}:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{' and '.join(map(str, devices))}! ({function})"
        )
    return (devices or scalars or {torch.device(NAME, _current[0])}).pop().index


def _check_indices(indices, tensor: torch.Tensor) -> None:
    for i in indices:
        if i is not None and tensor.device.type == "cpu":
            raise RuntimeError("indices should be on the CPU, as the indexed tensor is")
        if i is not None and (i.dtype == torch.bool or (i.device.type == "cpu" and i.dim())):
            _wait("index by a mask" if i.dtype == torch.bool else "index from the CPU")


@contextlib.contextmanager
def _generator(function, index: int) -> Iterator[None]:
    """Random operators draw from the device's generator, not from the CPU's."""
    if torch.Tag.nondeterministic_seeded not in function.tags:
        yield
        return
    before = torch.get_rng_state()
    torch.set_rng_state(_generators[index].get_state())
    try:
        yield
        _generators[index].set_state(torch.get_rng_state())
    finally:
        torch.set_rng_state(before)


def _copy(packet, args: tuple, kwargs: dict):
    targets, sources = args[:2] if packet is not aten._copy_from else (args[1], args[0])
    non_blocking = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
    if packet is aten._foreach_copy_:
        pairs = list(zip(targets, sources, strict=True))
        counts["launches"] += (
            1 if len({t.device for pair in pairs for t in pair}) == 1 else len(pairs)
        )
    else:
        pairs = [(targets, sources)]
        counts["launches"] += 1
    for target, source in pairs:
        _note_copy(source, target.device, non_blocking)
        _raw(target).copy_(_raw(source))
    return None if packet is aten._foreach_copy_ else targets


def _moved(tensor: torch.Tensor, device=None, non_blocking=False, pin_memory=None, **kwargs):
    device = tensor.device if device is None else torch.device(device)
    counts["launches"] += 1
    _note_copy(tensor, device, non_blocking)
    raw = aten._to_copy.default(_raw(tensor), **kwargs)
    return Tensor(raw, _index(device)) if device.type == NAME else raw


def _note_copy(source: torch.Tensor, device: torch.device, non_blocking: bool) -> None:
    """Counts a copy between the CPU and the device, unless it is one that nobody waits for."""
    pinned = getattr(source, "pinned", False)
    if source.device.type != device.type and not (non_blocking and pinned) and source.numel():
        _wait(f"copy from {source.device.type} to {device.type}")


def _index(device: torch.device | str) -> int:
    index = torch.device(device).index
    return _current[0] if index is None else index


def _made(function, *args, device=None, pin_memory=None, **kwargs):
    index = _index(device)
    counts["launches"] += 1
    if function is aten.empty.memory_format and kwargs.get("memory_format") is None:
        kwargs["memory_format"] = torch.contiguous_format
    with _generator(function, index):
        return Tensor(function(*args, device="cpu", **kwargs), index)


def install() -> None:
    """Makes torch know the device, as its accelerator."""
    module = types.ModuleType(f"torch.{NAME}")
    vars(module).update(
        is_available=lambda: True,
        is_initialized=lambda: True,
        is_bf16_supported=lambda: True,
        device_count=lambda: DEVICES,
        current_device=lambda: _current[0],
        set_device=lambda device: _current.__setitem__(0, _index(device)),
        synchronize=lambda device=None: _wait("synchronize"),
        manual_seed_all=lambda seed: [g.manual_seed(seed) for g in _generators],
        get_rng_state=lambda device=NAME: _generators[_index(device)].get_state(),
        set_rng_state=lambda state, device=NAME: _generators[_index(device)].set_state(state),
        get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float16],
        _is_in_bad_fork=lambda: False,
        _lazy_init=lambda: None,
    )
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=module)
    library = torch.library.Library("aten", "IMPL")
    for name in _FACTORIES:
        packet, _, overload = name.partition(".")
        function = getattr(getattr(aten, packet), overload or "default")
        library.impl(name, functools.partial(_made, function), "PrivateUse1")
    library.impl(
        "_copy_from",
        lambda *args, **kwargs: _copy(aten._copy_from, args, kwargs),
        "PrivateUse1",
    )
    _kept.append(library)
    torch.Tensor.pin_memory = _pinned
    torch.accelerator.is_available = lambda: True
    torch.accelerator.current_accelerator = lambda *_, **__: torch.device(NAME)
    torch.accelerator.device_count = lambda: DEVICES
    torch.accelerator.synchronize = lambda device=None: _wait("synchronize")
    dist.Backend.default_device_backend_map[NAME] = "gloo"
    dist.Backend.backend_capability["gloo"].append(NAME)


def _pinned(tensor: torch.Tensor, *_) -> torch.Tensor:
    copy = tensor.clone()
    copy.pinned = True
    return copy
