"""A checkpoint as a `state_dict`, found in a file or a mapping."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from twa.files.formats import load
from twa.files.reading import CheckpointError, Stored, refusing, tensor_of
from twa.ranks.sharding import is_sharded

Checkpoint = str | os.PathLike | Mapping
# Where training scripts put the model's `state_dict` among other things.
CONTAINERS = ("state_dict", "model_state_dict", "model", "module", "app")
# What `torch.compile`, FSDP1, activation checkpointing and Lightning put anywhere into names.
INSERTED = (
    *("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"),
    "_forward_module",
)


class State(dict):
    """Names to tensors, and the versions of the modules that saved them, if they are known."""

    versions: Mapping = {}


def name_of(checkpoint: Checkpoint, index: int | None = None) -> str:
    """The name of `checkpoint` in messages: its path; without one, its `index` in the window."""
    if not isinstance(checkpoint, Mapping):
        return os.fspath(checkpoint)
    return "state_dict" if index is None else f"checkpoints[{index}]"


def load_state_dict(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The `state_dict` of `checkpoint`: a path is read, a mapping is searched.

    It may be the value of one of `CONTAINERS`; mappings beside its tensors are ignored. What
    wrappers insert (`INSERTED`) is removed from its keys, and so is `module.` where all have it.

    Raises:
        CheckpointError: as `twa.files.formats.load`, or there is no `state_dict`.
    """
    state = weights_of(checkpoint, name_of(checkpoint))
    return {name: tensor_of(state[key]) for name, key in plain(state).items()}


def uninserted(key: str) -> str:
    return ".".join(segment for segment in key.split(".") if segment not in INSERTED)


def plain(keys: Iterable[str]) -> dict[str, str]:
    """`keys` by their names without what wrappers insert, or all begin with as `module.`."""
    named = {uninserted(key): key for key in keys}
    while named and all(name.startswith("module.") for name in named):
        named = {name.removeprefix("module."): key for name, key in named.items()}
    return named


def container_of(content: object) -> tuple[str, ...]:
    """The keys that lead from `content`, of a file, to the model's `state_dict` in it."""
    path: list[str] = []
    for _ in CONTAINERS:  # A container may hold another, and not itself without end.
        if isinstance(content, Mapping):
            key = next((k for k in CONTAINERS if isinstance(content.get(k), Mapping)), None)
            if key is None:
                break
            path.append(key)
            content = content[key]
    return tuple(path)


def weights_of(checkpoint: Checkpoint, name: str) -> State:
    """The `state_dict` of `checkpoint`, with tensors or `Stored` ones: nothing is read of files.

    Args:
        name: of the checkpoint, in messages.

    Raises:
        CheckpointError: it cannot be read, has no `state_dict`, or one of a single rank's shards.
    """
    content = checkpoint if isinstance(checkpoint, Mapping) else load(checkpoint)
    for key in container_of(content):
        content = content[key]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{name}: is not a state_dict (names to tensors)")
    # Modules may unpickle their extra state: it stays the model's own.
    state = State((k, v) for k, v in content.items() if not str(k).endswith("_extra_state"))
    if any(isinstance(value, Tensor | Stored) for value in state.values()):
        # What torchtitan saves has the model's tensors beside the optimizer.
        state = State((k, v) for k, v in state.items() if not isinstance(v, Mapping))
    state.versions = getattr(content, "_metadata", None) or {}
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor | Stored):
            places = ", ".join(CONTAINERS)
            raise CheckpointError(
                f"{name}: is not a state_dict (names to tensors) and holds none as {places}: "
                f"{key!r} is a {type(value).__name__}"
            )
        if is_sharded(value):
            value = state[key] = _whole(name, value, isinstance(checkpoint, Mapping))
        if isinstance(value, Tensor) and (
            value.layout != torch.strided or value.is_meta or value.is_quantized
        ):
            raise CheckpointError(f"{name}: {key} is no ordinary tensor with values")
    return state


@refusing
def _whole(name: str, value: Tensor, in_memory: bool) -> Tensor:
    """A `DTensor`, or the tensor that it is in a file, where other ranks' shards are not there."""
    if in_memory and torch.distributed.is_initialized():
        return value
    sizes = zip(value.placements, value.device_mesh.mesh.shape, strict=True)
    if not any(size > 1 and not placement.is_replicate() for placement, size in sizes):
        with torch.no_grad():  # by which it is read as it lies there
            return value.to_local()
    count, rank = value.device_mesh.size(), re.search(r"(.*rank\D?)(\d+)(.*)", name)
    there = [Path(f"{rank[1]}{i}{rank[3]}") for i in range(count)] if rank else []
    missing = [path.name for path in there if not path.exists()]
    lacking = f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing; "
    raise CheckpointError(
        f"{name}: is {f'that of rank {rank[2]}' if rank else 'one'} of {count} shards of a model "
        f"(FSDP2); {lacking if missing else ''}merge all of them first (verl: python -m "
        "verl.model_merger), or save by torch.distributed.checkpoint"
    )
