"""What the ranks of test_replicas.py compute: TWA on models of which each rank holds a whole one.

    torchrun --standalone --nproc_per_node 3 replica_ranks.py FOLDER

Writes to FOLDER what came out on each rank, `replicas.3.pt`. Four ranks are two hosts of two, too:
sharded within a host, replicated between hosts.
"""

import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from ranks import PAPER, STEPS, batches, checkpoints, make_model, prepared, whole
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from training import ranks
from twa import TWA
from twa.files.checkpoints import load_into

# What TWA is given, by the name of a case; the model is `uneven` of ranks.py.
CASES = {
    "model": {},
    "layer": {"granularity": "layer"},
    "channel": {"granularity": "channel"},
    "8 bits": {"bits": 8},
    "8 bits by channel": {"bits": 8, "granularity": "channel"},
    "4 bits": {"bits": 4},
    "4 bits by layer": {"bits": 4, "granularity": "layer"},
    "Schmidt": PAPER,
}
LONG = 200  # steps after which the ranks are compared to the bit


class Halving(torch.optim.Optimizer):
    """Goes along the gradient, at half the rate again and again until the loss is lower."""

    def __init__(self, parameters, lr: float):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        ((vector,), rate) = (self.param_groups[0][key] for key in ("params", "lr"))
        first = self._closure(closure)
        start, gradient = vector.clone(), vector.grad.clone()
        for _ in range(20):
            vector.copy_(start - rate * gradient)
            if self._closure(closure) < first:
                break
            rate /= 2
        return first

    @staticmethod
    def _closure(closure: Callable[[], Tensor]) -> Tensor:
        with torch.enable_grad():
            return closure()


class Traffic(TorchDispatchMode):
    """Records the collectives: name, elements and the ranks that take part."""

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[str, int, list[int]]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            tensors = [t for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, Tensor)]
            groups = [a for a in args if isinstance(a, torch.ScriptObject)]
            groups = [dist.ProcessGroup.unbox(g) for g in groups if "ProcessGroup" in str(g)]
            members = [dist.get_process_group_ranks(group) for group in groups]
            name = function.__name__.partition(".")[0]
            self.seen.append((name, max(t.numel() for t in tensors), *members))
        return function(*args, **(kwargs or {}))


def share(rank: int, world: int, size: int) -> slice:
    """A rank's part of a batch: of unequal parts, the last one empty where there are three."""
    edges = [round(size * (i / max(1, world - (world == 3))) ** 1.5) for i in range(world)]
    edges = [min(edge, size) for edge in edges] + [size]
    return slice(edges[rank], edges[rank + 1])


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor], part: slice) -> Tensor:
    """The mean over a part of the batch: NaN if that is empty."""
    images, labels = batch
    return F.cross_entropy(model(images[part]), labels[part])


def step(optimizer: TWA, model: nn.Module, batch: tuple[Tensor, Tensor], even: bool = False):
    """A step on this rank's part of the batch, weighted by its images."""
    rank, world, size = dist.get_rank(), dist.get_world_size(), len(batch[1])
    part = share(rank, world, size)
    if even:
        part = slice(rank * size // world, (rank + 1) * size // world)
    loss_of(model, batch, part).backward()
    optimizer.step(weight=part.stop - part.start)
    optimizer.zero_grad()


def replica(folder: Path, group: object = "all", **options) -> tuple[nn.Module, TWA]:
    model = make_model("uneven")
    group = dist.group.WORLD if group == "all" else group
    return model, TWA(model, checkpoints(folder, "uneven"), process_group=group, **options)


def trained(folder: Path, options: dict) -> dict:
    """Twenty steps; the communication of the last is recorded. The basis, for the reference."""
    model, optimizer = replica(folder, **options)
    basis = torch.stack([optimizer.subspace.expand(u) for u in torch.eye(len(optimizer.subspace))])
    start = whole(model)
    for batch in batches():
        with Traffic() as traffic:
            step(optimizer, model, batch)
    return {
        "basis": basis,
        "start": start,
        "origin": optimizer.origin,
        "coefficients": optimizer.coefficients.detach(),
        "weights": whole(model),
        "traffic": traffic.seen,
    }


def long(folder: Path) -> dict:
    """The weights after many steps, and what is said when a rank's coefficients have changed."""
    model, optimizer = replica(folder, granularity="layer")
    for number in range(LONG):
        step(optimizer, model, batches()[number % STEPS])
    weights, followed = [whole(model)], []
    for error in (1e-6, 0.1):
        if dist.get_rank() == dist.get_world_size() - 1:
            with torch.no_grad():
                optimizer.coefficients[0] += error
        followed.append(refusal(lambda: [step(optimizer, model, batches()[0]) for _ in range(100)]))
        weights.append(whole(model))
    return {"weights": weights[:2], "said": followed}


def with_scaler(folder: Path) -> dict:
    """In the fourth step the last rank's gradient overflows; and the steps without that one."""
    coefficients, scales = [], []
    for overflows in (True, False):
        model, optimizer = replica(folder)
        # Each rank has its own scale.
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** (8 + dist.get_rank()))
        for number, batch in enumerate(batches()):
            if number == 3 and not overflows:
                continue
            size, rank, world = len(batch[1]), dist.get_rank(), dist.get_world_size()
            part = slice(rank * size // world, (rank + 1) * size // world)
            scaler.scale(loss_of(model, batch, part)).backward()
            if number == 3 and rank == world - 1:
                model[0].weight.grad[0] = math.inf
            scaler.step(optimizer, weight=part.stop - part.start)
            scaler.update()
            optimizer.zero_grad()
        coefficients.append(optimizer.coefficients.detach())
        scales.append(scaler.get_scale())
    return {"coefficients": coefficients, "scale": scales[0]}


def with_closure(folder: Path) -> dict:
    """An optimizer that decides by the loss; and the same in one process."""
    ends = []
    for together in (True, False):
        model, optimizer = replica(folder, group="all" if together else None, base=Halving, lr=1e3)
        for batch in batches()[:5]:
            size = len(batch[1])
            part = share(dist.get_rank(), dist.get_world_size(), size)
            part = part if together else slice(0, size)

            def closure(batch=batch, part=part, model=model, optimizer=optimizer) -> Tensor:
                optimizer.zero_grad()
                loss = loss_of(model, batch, part)
                loss.backward()
                return loss.detach()

            loss = optimizer.step(closure, weight=part.stop - part.start)
        ends.append((optimizer.coefficients.detach(), loss))
    return {"coefficients": [end for end, _ in ends], "losses": [loss for _, loss in ends]}


def resumed(folder: Path) -> dict:
    """Ten steps together, then ten more: together, in one process, and sharded; and back."""
    ends = {}
    model, optimizer = replica(folder)
    for batch in batches()[:10]:
        step(optimizer, model, batch, even=True)
    half, weights = copy_of(optimizer.state_dict()), whole(model)
    for name in ("together", "alone", "sharded"):
        if name == "sharded":
            model = prepared(make_model("uneven"))
            optimizer = TWA(model, checkpoints(folder, "uneven"))
        else:
            model, optimizer = replica(folder, group="all" if name == "together" else None)
        load_into(model, weights)
        optimizer.load_state_dict(copy_of(half))  # Optimizers go on in the tensors of a state.
        for batch in batches()[10:]:
            if name == "alone":
                loss_of(model, batch, slice(None)).backward()
                optimizer.step()
                optimizer.zero_grad()
            else:
                step(optimizer, model, batch, even=True)
        ends[name] = optimizer.coefficients.detach().clone()
    return ends


def copy_of(value: object) -> object:
    return torch.utils._pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, value)


def asked_to_stop(folder: Path) -> list[bool]:
    """Whether a step told of it, for each of five; the last rank asks before the third."""
    model, optimizer = replica(folder)
    told = []
    for number, batch in enumerate(batches()[:5]):
        optimizer.stop = number == 2 and dist.get_rank() == dist.get_world_size() - 1
        step(optimizer, model, batch)
        told.append(optimizer.stopping)
    return told


def refusals(folder: Path) -> dict[str, str]:
    """What is said where the last rank differs."""
    paths, last = checkpoints(folder, "uneven"), dist.get_rank() == dist.get_world_size() - 1
    changed = torch.load(paths[2], weights_only=True)
    changed["5.weight"][0, 0] += 1e-6
    torch.save(changed, folder / f"changed.{dist.get_rank()}.pt")
    torch.save(changed, folder / f"start.{dist.get_rank()}.pt")
    (folder / "other").mkdir(exist_ok=True)
    other = folder / "other" / paths[2].name
    if last:
        torch.save(changed, other)

    def build(window=paths, **arguments) -> TWA:
        return TWA(make_model("uneven"), window, process_group=dist.group.WORLD, **arguments)

    def with_rate() -> None:
        step(build(lr=0.1 if last else 0.2), make_model("uneven"), batches()[0])

    window = [*paths[:2], other, *paths[3:]] if last else paths
    return {
        "checkpoint": refusal(lambda: build(window)),
        "start": refusal(lambda: build(start=changed if last else paths[2])),
        "number": refusal(lambda: build(paths[1:] if last else paths)),
        "basis": refusal(lambda: build(bits=8 if last else 32)),
        "rate": refusal(with_rate),
        "mesh": refusal(lambda: two_dimensional(folder)),
    }


def refusal(action: Callable[[], object]) -> str:
    try:
        action()
    except ValueError as error:
        return str(error)
    return "nothing was said"


def two_dimensional(folder: Path) -> None:
    model, world = make_model("uneven"), dist.get_world_size()
    fully_shard(model, mesh=init_device_mesh("cpu", (1, world), mesh_dim_names=("a", "b")))
    TWA(model, checkpoints(folder, "uneven"), process_group=dist.group.WORLD)


def hybrid(folder: Path, options: dict) -> dict:
    """Two hosts of two ranks: each host takes half of a batch, and each rank half of that."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = prepared(make_model("uneven"), mesh["shard"])
    group = mesh.get_group("replicate")
    optimizer = TWA(model, checkpoints(folder, "uneven"), process_group=group, **options)
    told = []
    for number, batch in enumerate(batches()):
        optimizer.stop = number == 2 and dist.get_rank() == 3
        with Traffic() as traffic:
            step(optimizer, model, batch, even=True)
        told.append(optimizer.stopping)
    return {
        "coefficients": optimizer.coefficients.detach(),
        "weights": whole(model),
        "traffic": traffic.seen,
        "stopping": told,
    }


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    if dist.get_rank() == 0:
        checkpoints(folder, "uneven")
    dist.barrier()
    results = {name: trained(folder, options) for name, options in CASES.items()}
    for part in (long, with_scaler, with_closure, resumed, asked_to_stop, refusals):
        results[part.__name__] = part(folder)
    if dist.get_world_size() == 4:
        for name in ("model", "channel"):
            results[f"hybrid, {name}"] = hybrid(folder, CASES[name])
    everyones = ranks.gather(results)
    if dist.get_rank() == 0:
        torch.save(everyones, folder / f"replicas.{len(everyones)}.pt")
    ranks.stop()
    ranks.leave(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
