"""How TWA uses several ranks: `--parallel` says who holds model and basis, or memory decides.

Replicated, each rank holds both whole, and a step sums n floats. Sharded by FSDP2, each rank holds
its shard of both, and a step gathers weights and scatters the gradient. The hybrid is sharded
within each machine and replicated between machines.
"""

import argparse
import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from training import ranks, windows
from training.settings import Settings, free
from twa.storage.memory import Plan, free_memory
from utils import UserError

STRATEGIES = ("replicate", "hybrid", "shard")  # from the least traffic to the least memory


@dataclass(kw_only=True)
class Parallel(Settings):
    """under torchrun"""

    parallel: str = free(
        "auto",
        "what a rank holds of model and basis: all (replicate), a shard (shard), or a shard within "
        "its machine (hybrid); auto: the first of replicate, hybrid and shard for which half of "
        "the free memory is enough",
        choices=("auto", *STRATEGIES),
    )
    reshard_after_forward: bool = free(
        False,
        "gather a sharded model's weights once more for the backward pass, for models that one "
        "device cannot hold",
    )


class Layout:
    """What each rank holds; chosen when the model is built.

    Attributes:
        strategy: one of `STRATEGIES`; None in one process.
        group: the ranks over which TWA sums the gradient of its coefficients; None where each rank
            holds a shard, or there is one rank.

    Raises:
        UserError: `--parallel` is given without `torchrun`.
    """

    def __init__(self, args: argparse.Namespace):
        if args.parallel != "auto" and not ranks.launched():
            raise UserError(f"--parallel {args.parallel}: only under torchrun, which starts ranks")
        self._args = args
        self.strategy: str | None = None
        self.group: dist.ProcessGroup | None = None

    def shard(self, model: nn.Module, device: torch.device) -> bool:
        """Chooses the strategy, shards `model` on `device` if it says so, and returns whether.

        Raises:
            UserError: the strategy asked for is impossible on these machines or with another flag.
        """
        if ranks.world() == 1:
            return False
        counts = {*ranks.gather(ranks.local_world())}
        self._local = counts.pop() if len(counts) == 1 else None  # ranks on each machine
        self.strategy, self._why = self._choose(model, device)
        if self.strategy == "replicate":
            self.group = dist.group.WORLD
            return False
        mesh = None
        if self.strategy == "hybrid":
            shape, names = (ranks.world() // self._local, self._local), ("replicate", "shard")
            mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
            self.group, mesh = mesh.get_group("replicate"), mesh["shard"]
        ranks.shard(model, device, self._args.reshard_after_forward, mesh)
        return True

    def _choose(self, model: nn.Module, device: torch.device) -> tuple[str, str]:
        """The strategy and the reason for it."""
        args, impossible = self._args, self._impossible()
        if args.parallel in impossible:
            why = f"{impossible[args.parallel]}; leave it out, or give shard"
            raise UserError(f"--parallel {args.parallel}: {why}")
        if args.parallel != "auto":
            return args.parallel, "as asked for"
        weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
        plan = Plan(len(windows.Window(args)), args.extract, args.components, args.bits, device)
        # Beside the basis: weights, gradient, start point and one more vector, in float32.
        needed = plan.build_bytes(weights) + 4 * 4 * weights
        sharing = ranks.local_world() if device.type == "cpu" else 1
        known = [free for free in ranks.gather(free_memory(device)) if free is not None]
        free = min(known, default=math.inf) / sharing
        holders = {"replicate": 1, "hybrid": self._local, "shard": ranks.world()}
        possible = [strategy for strategy in STRATEGIES if strategy not in impossible]
        fitting = [s for s in possible if needed / holders[s] <= free / 2]
        of = f"of the {size(free)} that are" if known else "and it is not known how much is"
        why = f"model and basis take {size(needed)} {of} free to a rank"
        return (fitting or ["shard"])[0], impossible.get("replicate", why)

    def _impossible(self) -> dict[str, str]:
        """The impossible strategies, and why."""
        why = {}
        if self._local is None:
            why["hybrid"] = "the machines do not have equally many ranks"
        elif self._local in (1, ranks.world()):
            why["hybrid"] = "takes several machines with several ranks each"
        if self._args.reshard_after_forward:
            why["replicate"] = "--reshard-after-forward is for a model that is sharded"
        if self._args.clip_grad is not None:
            norm = "--clip-grad needs the norm of the whole gradient, which only shards have"
            why |= {"replicate": norm, "hybrid": norm}
        return why

    @property
    def line(self) -> str | None:
        """A line for the log; None for a single process."""
        if ranks.world() == 1:
            return None
        return f"parallel: {self.strategy} on {ranks.world()} ranks ({self._why})"


def size(count: float) -> str:
    """A number of bytes for people: `412 B`, `60.9 MB`."""
    power = min(4, int(math.log(max(count, 1), 1000)))
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
