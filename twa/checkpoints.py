"""Checkpoint files: reading without executing anything in them, averaging, writing atomically."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import safe_open
from torch import Tensor

from twa import sharding

Value = TypeVar("Value")
Checkpoint = str | os.PathLike | Mapping[str, Tensor]


class CheckpointError(ValueError):
    """A file that cannot be read or written; the message is one line that names it and says why."""


class NotFiniteError(CheckpointError):
    """A `state_dict` that holds NaN or infinity; the message names the file and the key."""


def load(path: str | os.PathLike):
    """What `torch.save` wrote to `path`, or the tensors of a `.safetensors` file, on the CPU.

    Nothing in the file is executed (`weights_only=True`). Tensors are memory-mapped, so that only
    what is used of them is read. Damage within a tensor is therefore not found here, but by
    `verify`; and if the file is overwritten in place, rather than replaced as `save` does, the
    tensors change with it, or this process ends with a bus error where the file became shorter.

    Raises:
        CheckpointError: the file is missing, unreadable, truncated, or holds pickled code.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            # `open` first: safe_open says "no such file" also of one that may not be read.
            with open(path, "rb"), safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        # Files of torch < 1.6 are no zip archives and cannot be memory-mapped.
        mmap = zipfile.is_zipfile(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about unusual pickles: they are read or refused
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such checkpoint") from None
    except pickle.UnpicklingError:
        # A damaged archive raises other errors; this one asked for a class or a function.
        raise CheckpointError(
            f"{path}: holds pickled code or is no checkpoint; only plain tensors are read"
        ) from None
    except Exception as e:  # a damaged pickle can make its reader fail in any way
        raise CheckpointError(f"{path}: cannot be read ({one_line(e)})") from None


def verify(path: str | os.PathLike) -> None:
    """Reads the file `path` in full and compares the checksums that `torch.save` put into it.

    They cover every byte of every tensor. `.safetensors` files and those of torch < 1.6 have no
    checksums: they are not read, and `load` finds damage to their structure only.

    Raises:
        CheckpointError: a checksum differs, or the file cannot be read.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            if path.suffix == ".safetensors" or not zipfile.is_zipfile(file):
                return
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such checkpoint") from None
    except Exception as e:  # a damaged archive can make its reader fail in any way
        raise CheckpointError(f"{path}: cannot be read ({one_line(e)})") from None
    if damaged is not None:
        raise CheckpointError(f"{path}: is damaged (the checksum of {damaged} differs)")


def one_line(error: BaseException) -> str:
    """The first line of the message of `error`, or its type if the message is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def load_state_dict(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The `state_dict` of `checkpoint`: a path is read, a mapping is taken as it is.

    The prefixes of wrappers are removed from its keys.

    Raises:
        CheckpointError: as `load`, or the file holds something other than a `state_dict`.
    """
    state = checkpoint if isinstance(checkpoint, Mapping) else load(checkpoint)
    if not isinstance(state, Mapping) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()
    ):
        raise CheckpointError(f"{name_of(checkpoint)}: is not a state_dict (names to tensors)")
    return unwrapped(state)


def unwrapped(state: Mapping[str, Value]) -> dict[str, Value]:
    """`state` without the prefix that a wrapper puts before every key.

    That is `module.` for `DataParallel` and `DistributedDataParallel` and `_orig_mod.` for
    `torch.compile`. It stays where not all keys have it: then it is the name of a submodule.
    """
    for prefix in ("module.", "_orig_mod.") * 2:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return dict(state)


def completed(state: dict[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state`, with a tied weight under each of the names that the model's `expected` has for it.

    `safetensors` saves it once, under one of them.
    """
    names: dict[tuple, list[str]] = {}
    for key, tensor in expected.items():
        names.setdefault(_identity(tensor), []).append(key)
    for tied in names.values():
        there = [key for key in tied if key in state]
        if 0 < len(there) < len(tied):
            state = dict.fromkeys(tied, state[there[0]]) | state
    return state


def _identity(tensor: Tensor) -> tuple:
    """What tells the memory of `tensor` from that of another: tied weights agree in it."""
    own = sharding.local(tensor)
    return own.device, own.data_ptr() or id(tensor), tensor.shape, tensor.stride()


def name_of(checkpoint: Checkpoint) -> str:
    """The name of `checkpoint` in messages: its path, or "state_dict"."""
    return "state_dict" if isinstance(checkpoint, Mapping) else os.fspath(checkpoint)


def check(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], name: str) -> None:
    """Raises `CheckpointError` unless `state` fits a model whose `state_dict` is `expected`.

    In this order: a key is missing or of another shape, the model does not have a key, a tensor
    holds NaN or infinity (of a sharded model, in this rank's part). The message names the key.
    """
    expected = unwrapped(expected)
    check_shapes(state, expected, name)
    for key in state:
        if key not in expected:
            raise CheckpointError(f"{name}: of another architecture: the model has no {key}")
    check_finite({k: sharding.part(tensor, expected[k]) for k, tensor in state.items()}, name)


def check_shapes(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], name: str) -> None:
    """Raises `CheckpointError` if `state` lacks a key of `expected`, or has it in another shape."""
    for key, tensor in expected.items():
        if key not in state:
            raise CheckpointError(f"{name}: of another architecture: {key} is missing")
        if state[key].shape != tensor.shape:
            raise CheckpointError(
                f"{name}: of another architecture: {key} is {list(state[key].shape)} there "
                f"and {list(tensor.shape)} in the model"
            )


def check_finite(state: Mapping[str, Tensor], name: str) -> None:
    """Raises `NotFiniteError` with the first key of `state` that holds NaN or infinity."""
    for key, tensor in state.items():
        if not tensor.isfinite().all():
            raise NotFiniteError(f"{name}: {key} holds NaN or infinity")


def load_into(model: torch.nn.Module, checkpoint: Checkpoint, name: str | None = None) -> None:
    """Loads `checkpoint` into `model`, which is left as it was if the checkpoint does not fit.

    Of a sharded model, each rank reads its own part.

    Args:
        name: the name of the checkpoint in messages, if it is not a path.

    Raises:
        CheckpointError: as `load_state_dict` and `check`.
    """
    own = model.state_dict()
    state = completed(load_state_dict(checkpoint), unwrapped(own))
    check(state, own, name or name_of(checkpoint))
    keys = unwrapped({key: key for key in own})
    # Into the model's own `state_dict`, whose metadata holds the versions of the modules.
    own.update({key: sharding.shard(state[plain], own[key]) for plain, key in keys.items()})
    model.load_state_dict(own)


def load_verified(model: torch.nn.Module, path: str | os.PathLike) -> None:
    """Loads the checkpoint `path` into `model` once it is known to be whole and to fit.

    Raises:
        CheckpointError: as `verify` and `load_into`; the model is as it was.
    """
    verify(path)
    load_into(model, path)


def average(
    checkpoints: Sequence[Checkpoint], expected: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The uniform mean of `checkpoints` (SWA, Izmailov et al., UAI 2018).

    Summed in float64, one checkpoint in memory at a time. Integers (the counters of batch norm)
    are those of the last.

    Args:
        expected: the `state_dict` that each has to fit, and that gives the mean its dtypes; the
            first checkpoint if None. Where it is sharded, so is the mean, and each rank reads its
            own part.

    Raises:
        CheckpointError: one of them cannot be read, does not fit, or holds NaN or infinity.
    """
    (mean,) = last_means(checkpoints, [len(checkpoints)], expected)
    return mean


def last_means(
    checkpoints: Sequence[Checkpoint],
    counts: Sequence[int],
    expected: Mapping[str, Tensor] | None = None,
) -> Iterator[dict[str, Tensor]]:
    """The means, as `average` takes them, of the last so many checkpoints, for each of `counts`.

    Each file is read once, from the last one back.

    Args:
        counts: in rising order.
        checkpoints, expected: as for `average`.

    Raises:
        CheckpointError: as `average`.
    """
    like = load_state_dict(checkpoints[-1]) if expected is None else unwrapped(expected)
    total: dict[str, Tensor] = {}
    for count, checkpoint in enumerate(reversed(checkpoints[-counts[-1] :]), start=1):
        state = completed(load_state_dict(checkpoint), like)
        check(state, like, name_of(checkpoint))
        for key, value in state.items():
            if key not in total:
                exact = torch.float64 if value.is_floating_point() else value.dtype
                total[key] = sharding.part(value, like[key]).to(exact, copy=True)
            elif value.is_floating_point():
                total[key] += sharding.part(value, like[key])
        if count in counts:
            # At the end freed one by one: sum and mean are never both complete.
            take = total.pop if count == counts[-1] else total.get
            mean = {}
            for key, tensor in like.items():
                value = take(key)
                if value.is_floating_point():
                    value = value / count
                mean[key] = sharding.shard(value.to(tensor.dtype), tensor)
            yield mean


def save(obj, path: str | os.PathLike) -> None:
    """`torch.save`, atomically: a reader finds the complete old file or the complete new one.

    Raises:
        CheckpointError: as `replacing`.
    """
    with replacing(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(obj, file)
        except RuntimeError as error:
            # After a failed write torch's zip writer raises too, and hides the first error.
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


class replacing:
    """Context manager: yields a temporary path in the folder of `path`, renamed to it at the end.

    If the block raises, the temporary file is removed and `path` stays as it was. The data are
    flushed to the disk before the renaming, so that a crash leaves no empty file. A process that is
    killed in the block leaves the temporary file, which matches `LEFTOVERS`.

    Raises:
        CheckpointError: the disk is full, or the file cannot be written for another reason.
    """

    LEFTOVERS = ".*.*.tmp"

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")

    def __enter__(self) -> Path:
        return self.temporary

    def __exit__(self, _, error: BaseException | None, __) -> None:
        try:
            if error is None:
                with open(self.temporary, "rb") as file:
                    os.fsync(file.fileno())
                os.replace(self.temporary, self.path)
                return
        except OSError as failed:
            error = failed
        with contextlib.suppress(OSError):
            self.temporary.unlink()
        if isinstance(error, OSError):
            raise CheckpointError(unwritten(self.path, error)) from None


def unwritten(path: Path, error: OSError) -> str:
    """One line that says why `path` could not be written, and what to do."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    remedy = "; make room there: what was saved before stands" if full else ""
    return f"{path}: cannot be written ({error.strerror or error}){remedy}"
