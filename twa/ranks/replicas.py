"""`Replicas`: ranks that hold the same model, and compute gradients of different data."""

from __future__ import annotations

import socket
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

# Up to so many bytes of all ranks together, each sends its own to all others: that takes half the
# time of an all-reduce, and half its packets, where the network's delay is what it takes.
GATHERED = 2**18


class Replicas:
    """The ranks of `group`; this process alone if it is None.

    Attributes:
        count: their number.
    """

    def __init__(self, group: dist.ProcessGroup | None):
        self._group = group
        self.count = 1 if group is None else dist.get_world_size(group)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sums `tensor` over the ranks, in place, and returns it: the same on all, to the bit."""
        if self._group is None:
            return tensor
        if not gathers(tensor.nbytes, self.count):
            dist.all_reduce(tensor, group=self._group)
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.count)]
        dist.all_gather(parts, tensor, group=self._group)
        tensor.zero_()
        for part in parts:  # One after the other: an order that is the same on all.
            tensor += part
        return tensor

    def take_first(self, tensor: Tensor) -> Tensor:
        """The first rank's `tensor`, of the same shape on all."""
        tensor = tensor.contiguous()
        if self._group is not None:
            dist.broadcast(tensor, group=self._group, group_src=0)
        return tensor

    def check(self, own: Mapping[str, object]) -> None:
        """Raises ValueError on all ranks if something has not the same value on each.

        Args:
            own: values of this rank, by the names that the message says.
        """
        if self._group is None:
            return
        everyones: list = [None] * self.count
        mine = (f"rank {dist.get_rank()} ({socket.gethostname()})", dict(own))
        dist.all_gather_object(everyones, mine, group=self._group)
        (first, expected), *others = everyones
        differences = []
        for rank, found in others:
            names = expected.keys() | found.keys()
            different = sorted(name for name in names if found.get(name) != expected.get(name))
            if different:
                more = f" and {len(different) - 3} more" if len(different) > 3 else ""
                differences.append(f"{rank} has another {', '.join(different[:3])}{more}")
        if differences:
            raise ValueError(f"{'; '.join(differences)} than {first}")


def gathers(nbytes: int, count: int) -> bool:
    """Whether a sum of so many bytes over so many ranks is an all-gather, not an all-reduce."""
    return nbytes * count <= GATHERED


def hash_of(tensor: Tensor) -> Tensor:
    """A hash of the bits of `tensor`, float32 [..., columns], along its last dimension: int64.

    It is the sum of the elements' bits: other elements give another hash, but for chance; their
    order does not count.
    """
    parts = tensor.view(torch.int32).split(2**19, dim=-1)
    return torch.stack([part.sum(-1, dtype=torch.int64) for part in parts]).sum(0)
