"""Sharded parameters: the rows of each that this rank has, and sums over the ranks.

FSDP2 (`torch.distributed.fsdp.fully_shard`) turns a parameter into a `DTensor`, which is divided
along its first dimension, one shard for each rank. The functions here treat any other tensor as a
single shard. Only a `DTensor` makes them import `torch.distributed`, which some builds lack.
"""

from __future__ import annotations

import os
import sys

import torch
from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether `tensor` is a `DTensor`."""
    return hasattr(type(tensor), "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of `tensor`, a view."""
    return tensor.detach().to_local() if is_sharded(tensor) else tensor.detach()


def first_row(tensor: Tensor) -> int:
    """The index of the first row of this rank's shard in the whole tensor."""
    if not is_sharded(tensor):
        return 0
    dimension, mesh = _mesh_dimension(tensor), tensor.device_mesh
    height = -(-len(tensor) // mesh.size(dimension))  # the shards are those of `torch.chunk`
    return min(mesh.get_local_rank(dimension) * height, len(tensor))


def part(whole: Tensor, like: Tensor) -> Tensor:
    """The rows of `whole` that this rank has of `like`, a view; `whole` may be sharded too."""
    if not is_sharded(like) or is_sharded(whole):
        return local(whole)
    first = first_row(like)
    return whole[first : first + len(local(like))]


def shard(whole: Tensor, like: Tensor) -> Tensor:
    """`whole`, or this rank's part of it, sharded as `like` is."""
    if not is_sharded(like) or is_sharded(whole):
        return whole
    from torch.distributed.tensor import DTensor

    rows = (whole if whole.shape != like.shape else part(whole, like)).to(like.device)
    placed = (like.device_mesh, like.placements)
    return DTensor.from_local(rows, *placed, shape=like.shape, stride=like.stride())


class Shards:
    """The ranks that a model is sharded among, or this process alone.

    Attributes:
        first: whether this rank is the first of them.
        count: the number of ranks.

    Raises:
        ValueError: the trainable parameters are not all sharded alike, or not by FSDP2.
    """

    def __init__(self, model: nn.Module):
        fsdp = sys.modules.get("torch.distributed.fsdp")  # Nothing is sharded before its import.
        self._modules = [m for m in model.modules() if fsdp and isinstance(m, fsdp.FSDPModule)]
        self.reshard()
        meshes = {
            (p.device_mesh, _mesh_dimension(p)) if is_sharded(p) else None
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
        """Frees the gathered parameters that a forward pass without a backward pass leaves behind.

        While they exist, the model uses them and ignores what is written to the shards.
        """
        for module in self._modules:
            module.reshard()

    def sum(self, tensor: Tensor) -> Tensor:
        """Sums `tensor` over the ranks, in place, and returns it."""
        if self._group is not None:
            torch.distributed.all_reduce(tensor, group=self._group)
        return tensor

    def share(self, free: int | None, device: torch.device, replicas: int) -> int | None:
        """The part of `free` bytes on `device` that each rank on this machine can use."""
        count = self.count * replicas
        if free is None or device.type != "cpu" or count == 1:
            return free
        return free // int(os.environ.get("LOCAL_WORLD_SIZE", count))


def _mesh_dimension(tensor: Tensor) -> int:
    """The dimension of the mesh along which `tensor` is sharded.

    Raises:
        ValueError: the tensor is not sharded once, along its first dimension.
    """
    from torch.distributed.tensor import Shard

    sharded = [i for i, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    if len(sharded) != 1 or tensor.placements[sharded[0]] != Shard(0):
        raise ValueError(
            f"a parameter is placed as {tensor.placements}; what is supported is one Shard(0), as "
            "fully_shard makes it"
        )
    return sharded[0]
