"""`Replicas`: ranks that have the same model and compute gradients of different data."""

from __future__ import annotations

import socket
from collections.abc import Mapping

import torch.distributed as dist
from torch import Tensor


class Replicas:
    """The ranks of `group`, or this process alone if it is None.

    Attributes:
        count: the number of ranks.
    """

    def __init__(self, group: dist.ProcessGroup | None):
        self._group = group
        self.count = 1 if group is None else dist.get_world_size(group)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sums `tensor` over the ranks, in place, and returns it: the same on all, to the bit."""
        if self._group is not None:
            dist.all_reduce(tensor, group=self._group)
        return tensor

    def broadcast(self, tensor: Tensor) -> Tensor:
        """The first rank's `tensor`, whose shape is the same on all ranks."""
        tensor = tensor.contiguous()
        if self._group is not None:
            dist.broadcast(tensor, group=self._group, group_src=0)
        return tensor

    def check(self, own: Mapping[str, object]) -> None:
        """Compares values between the ranks.

        Args:
            own: this rank's values, by their names in the message.

        Raises:
            ValueError: a value differs; raised on all ranks.
        """
        if self._group is None:
            return
        gathered: list = [None] * self.count
        mine = (f"rank {dist.get_rank()} ({socket.gethostname()})", dict(own))
        dist.all_gather_object(gathered, mine, group=self._group)
        (first, expected), *others = gathered
        differences = []
        for rank, found in others:
            names = expected.keys() | found.keys()
            different = sorted(name for name in names if found.get(name) != expected.get(name))
            if different:
                more = f" and {len(different) - 3} more" if len(different) > 3 else ""
                differences.append(f"{rank} has another {', '.join(different[:3])}{more}")
        if differences:
            raise ValueError(f"{'; '.join(differences)} than {first}")
