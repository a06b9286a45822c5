"""Sharded parameters: which rows of each this rank has, and sums over all ranks.

FSDP2 (`torch.distributed.fsdp.fully_shard`) makes a parameter a `DTensor` that is divided along its
first dimension, one shard a rank. The functions here also take ordinary tensors, as one shard.
`torch.distributed` is imported only where a tensor is sharded: some builds of torch lack it.
"""

from __future__ import annotations

import os
import sys

import torch
from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether `tensor` is a `DTensor`."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of `tensor`, a view."""
    return tensor.detach().to_local() if is_sharded(tensor) else tensor.detach()


def first_row(tensor: Tensor) -> int:
    """The first row of this rank's shard in the whole tensor, divided as by `torch.chunk`.

    Raises:
        ValueError: it is not sharded along its first dimension.
    """
    if not is_sharded(tensor):
        return 0
    index = _sharded_by(tensor)
    mesh = tensor.device_mesh
    height = -(-len(tensor) // mesh.size(index))
    return min(mesh.get_local_rank(index) * height, len(tensor))


def part(whole: Tensor, like: Tensor) -> Tensor:
    """The rows of `whole` that this rank has of `like`, a view; `whole` may be sharded itself."""
    if not is_sharded(like) or is_sharded(whole):
        return local(whole)
    first = first_row(like)
    return whole[first : first + len(local(like))]


def shard(whole: Tensor, like: Tensor) -> Tensor:
    """`whole`, or this rank's part of it, sharded as `like` is."""
    if not is_sharded(like) or is_sharded(whole):
        return whole
    from torch.distributed.tensor import DTensor

    rows = whole if whole.shape != like.shape else part(whole, like)
    return DTensor.from_local(
        rows.to(like.device),
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


class Ranks:
    """The ranks among which a model is sharded; this process alone if it is not.

    Args:
        model: a module of which no trainable parameter is sharded, or all are, by one mesh.

    Attributes:
        first: whether this rank is the first of them.
        count: their number.

    Raises:
        ValueError: some parameters are sharded and some are not, or not all by one mesh.
    """

    def __init__(self, model: nn.Module):
        fsdp = sys.modules.get("torch.distributed.fsdp")  # without it, no module is sharded
        self._modules = [m for m in model.modules() if fsdp and isinstance(m, fsdp.FSDPModule)]
        self.reshard()
        meshes = {
            (p.device_mesh, _sharded_by(p)) if is_sharded(p) else None
            for p in model.parameters()
            if p.requires_grad
        }
        if len(meshes) > 1:
            raise ValueError(
                "the model's trainable parameters are not all sharded, or not by one mesh; "
                "call fully_shard on the whole model, with one mesh"
            )
        mesh = meshes.pop() if meshes else None
        self._group = mesh and mesh[0].get_group(mesh[1])
        self.first = mesh is None or self._group.rank() == 0
        self.count = 1 if mesh is None else self._group.size()

    def reshard(self) -> None:
        """Frees the gathered parameters that a forward pass without a backward pass leaves.

        While they exist, the model computes with them and ignores what is written to the shards.
        """
        for module in self._modules:
            module.reshard()

    def sum(self, tensor: Tensor) -> Tensor:
        """Sums `tensor` over the ranks, in place, and returns it."""
        if self._group is not None:
            torch.distributed.all_reduce(tensor, group=self._group)
        return tensor

    def share(self, free: int | None, device: torch.device, replicas: int) -> int | None:
        """How much of `free` bytes on `device` each of the ranks on this machine can take."""
        count = self.count * replicas
        if free is None or device.type != "cpu" or count == 1:
            return free
        return free // int(os.environ.get("LOCAL_WORLD_SIZE", count))


def _sharded_by(tensor: Tensor) -> int:
    """The dimension of the mesh along which `tensor` is sharded."""
    from torch.distributed.tensor import Shard

    sharded = [i for i, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    if len(sharded) != 1 or tensor.placements[sharded[0]] != Shard(0):
        raise ValueError(
            f"a parameter is placed as {tensor.placements}; one Shard(0), as fully_shard makes it, "
            "is supported"
        )
    return sharded[0]
