"""How many ranks hold TWA's model and basis: `--parallel`, which says it or leaves it to memory.

Replicated, each rank holds all of both, and a step sums n floats. Sharded by FSDP2, the ranks hold
them together, and a step gathers the weights and scatters the gradient. The hybrid is sharded
within each machine and replicated between machines.
"""

import argparse
import math

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from training import ranks, windows
from twa import TWA
from twa.storage.memory import Plan, free_memory
from utils import UserError

WAYS = ("replicate", "hybrid", "shard")  # from the least on the wire to the least in memory
RIDERS = 4  # floats that TWA sums beside those of the coefficients


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("under torchrun").add_argument
    add(
        "--parallel",
        default="auto",
        choices=("auto", *WAYS),
        help="what a rank holds of model and basis: all (replicate), a shard (shard), a shard "
        "within its machine (hybrid); auto: the first of replicate, hybrid and shard for which "
        "half of the free memory is enough",
    )
    add(
        "--reshard-after-forward",
        action="store_true",
        help="of a sharded model, gather the weights of a block once more for its backward pass: "
        "for models that one device cannot hold",
    )


class Layout:
    """What each rank holds; chosen when the model is made.

    Args:
        args: the script's arguments.

    Attributes:
        way: "replicate", "hybrid" or "shard", where there are ranks.
        group: the ranks over which TWA sums the gradient of its coefficients, where more than one
            holds the model; None otherwise.

    Raises:
        UserError: a way is asked for, and there are no ranks.
    """

    def __init__(self, args: argparse.Namespace):
        if args.parallel != "auto" and not ranks.launched():
            raise UserError(f"--parallel {args.parallel}: only under torchrun, which starts ranks")
        self.way: str | None = None
        self.group: dist.ProcessGroup | None = None
        self._args = args

    def shard(self, model: nn.Module, device: torch.device) -> bool:
        """Chooses, and shards `model` among the ranks on `device` where that is the choice.

        Returns:
            whether it is sharded.

        Raises:
            UserError: what is asked for does not go with the machines or with another flag.
        """
        if ranks.world() == 1:
            return False
        self._local = ranks.on_each_machine()
        self.way, self._why = self._choose(model, device)
        if self.way == "replicate":
            self.group = dist.group.WORLD
            return False
        mesh = None
        if self.way == "hybrid":
            shape, names = (ranks.world() // self._local, self._local), ("replicate", "shard")
            mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
            self.group, mesh = mesh.get_group("replicate"), mesh["shard"]
        ranks.shard(model, device, self._args.reshard_after_forward, mesh)
        return True

    def _choose(self, model: nn.Module, device: torch.device) -> tuple[str, str]:
        """The way, and why it was taken."""
        asked, impossible = self._args.parallel, self._impossible()
        if asked in impossible:
            raise UserError(f"--parallel {asked}: {impossible[asked]}; leave it out, or give shard")
        if asked != "auto":
            return asked, "as asked for"
        weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
        args, n = self._args, len(windows.window_paths(self._args))
        plan = Plan(n, args.extract, args.components, args.bits, device)
        # And weights, gradient, start point and a vector to work in; activations come on top.
        needed = plan.build_bytes(weights) + 4 * 4 * weights
        shared_by = ranks.local_world() if device.type == "cpu" else 1
        free = min(ranks.gather(free_memory(device) / shared_by))
        shares = {"replicate": 1, "hybrid": self._local, "shard": ranks.world()}
        possible = [way for way in WAYS if way not in impossible]
        fitting = [way for way in possible if needed / shares[way] <= free / 2]
        way = (fitting or ["shard"])[0]
        why = f"model and basis take {size(needed)} of the {size(free)} that are free to a rank"
        return way, why if "replicate" in possible else impossible["replicate"]

    def _impossible(self) -> dict[str, str]:
        """The ways that do not go, and why."""
        why = {}
        if self._args.reshard_after_forward:
            why["replicate"] = "--reshard-after-forward is for a model that is sharded"
        if self._args.clip_grad is not None:
            norm = "--clip-grad needs the norm of the whole gradient, which only shards have"
            why |= {"replicate": norm, "hybrid": norm}
        if self._local is None:
            why["hybrid"] = "the machines do not have equally many ranks"
        elif self._local in (1, ranks.world()):
            why["hybrid"] = "takes several machines with several ranks each"
        return why

    def line(self, optimizer: TWA) -> str:
        """For the log of several ranks: what was chosen, why, and what a step sends."""
        world = ranks.world()
        sums = len(optimizer.subspace) + RIDERS
        gathered = 3 if self._args.reshard_after_forward else 2  # and scattered, times the weights
        weights = sum(p.numel() for p in optimizer.subspace.parameters) * gathered / 2
        sends = {
            "replicate": f"{size(sent(sums, world))} a rank",
            "shard": f"{size(sent(weights + sums, world))} a rank",
        }
        if self.way == "hybrid":
            within = sent(weights + sums, self._local)
            between = sent(sums, world // self._local)
            sends["hybrid"] = (
                f"{size(within)} a rank within a machine, {size(between)} between machines"
            )
        return (
            f"parallel: {self.way} on {world} ranks ({self._why}); a step sends {sends[self.way]}"
        )


def sent(floats: float, ranks: int) -> float:
    """The bytes that each rank sends, and receives, in a sum of so many `floats` over `ranks`.

    The least possible, that of a ring; and of a gathering and a scattering of as many floats.
    """
    return 4 * floats * 2 * (ranks - 1) / ranks


def size(count: float) -> str:
    """So many bytes: `412 B`, `60.9 MB`."""
    power = min(4, int(math.log(max(count, 1), 1000)))
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
