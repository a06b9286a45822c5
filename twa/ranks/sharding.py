"""Sharded parameters: which rows of each this rank holds, and sums over all ranks.

FSDP2 (`torch.distributed.fsdp.fully_shard`) makes a parameter a `DTensor` that is divided along its
first dimension, one shard a rank. The functions here take ordinary tensors too, and treat them as
one shard.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of `tensor`, a view."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


def first_row(tensor: Tensor) -> int:
    """The first row of this rank's shard in the whole tensor, divided as by `torch.chunk`.

    Raises:
        ValueError: it is not sharded along its first dimension.
    """
    if not isinstance(tensor, DTensor):
        return 0
    index = _sharded_by(tensor)
    mesh = tensor.device_mesh
    height = -(-len(tensor) // mesh.size(index))
    return min(mesh.get_local_rank(index) * height, len(tensor))


def part(whole: Tensor, like: Tensor) -> Tensor:
    """The rows of `whole` that this rank holds of `like`, a view; `whole` may be sharded itself."""
    if not isinstance(like, DTensor) or isinstance(whole, DTensor):
        return local(whole)
    first = first_row(like)
    return whole[first : first + len(local(like))]


def shard(whole: Tensor, like: Tensor) -> Tensor:
    """`whole`, or this rank's part of it, sharded as `like` is."""
    if not isinstance(like, DTensor) or isinstance(whole, DTensor):
        return whole
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
        self._modules = [m for m in model.modules() if isinstance(m, FSDPModule)]
        self.reshard()
        meshes = {
            (p.device_mesh, _sharded_by(p)) if isinstance(p, DTensor) else None
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
        self.first = mesh is None or dist.get_rank(self._group) == 0
        self.count = 1 if mesh is None else dist.get_world_size(self._group)

    def reshard(self) -> None:
        """Frees the gathered parameters that a forward pass without a backward pass leaves.

        As long as they exist, the model computes with them, and ignores what is written to the
        shards.
        """
        for module in self._modules:
            module.reshard()

    def sum(self, tensor: Tensor) -> Tensor:
        """Sums `tensor` over the ranks, in place, and returns it."""
        if self._group is not None:
            dist.all_reduce(tensor, group=self._group)
        return tensor

    def share(self, free: int | None, device: torch.device, replicas: int) -> int | None:
        """How much of `free` bytes on `device` each of the ranks on this machine can take."""
        count = self.count * replicas
        if free is None or device.type != "cpu" or count == 1:
            return free
        return free // int(os.environ.get("LOCAL_WORLD_SIZE", count))


def _sharded_by(tensor: DTensor) -> int:
    """The dimension of the mesh along which `tensor` is sharded."""
    sharded = [i for i, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    if len(sharded) != 1 or tensor.placements[sharded[0]] != Shard(0):
        raise ValueError(
            f"a parameter is placed as {tensor.placements}; one Shard(0), as fully_shard makes it, "
            "is supported"
        )
    return sharded[0]
