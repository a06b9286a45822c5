"""What the ranks of test_sharding.py compute: TWA on models that are whole or sharded by FSDP2.

    python ranks.py FOLDER                                      one process, whole models
    torchrun --standalone --nproc_per_node 3 ranks.py FOLDER    three ranks, a shard each

Writes `whole.pt` or `3.pt` to FOLDER: coefficients, weights and what else came out of each case.
"""

import contextlib
import os
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn import functional as F

from models.preresnet import PreResNet
from training import ranks
from twa import TWA, CheckpointError, Subspace
from twa.ranks.sharding import local

PAPER = {"base": torch.optim.SGD, "extract": "Schmidt", "lr": 0.01, "momentum": 0.9}
# By the name of a case: the model's function and what TWA is given.
CASES = {
    "model": ("uneven", {}),
    "layer": ("uneven", {"granularity": "layer"}),
    "channel": ("uneven", {"granularity": "channel"}),
    "3 directions": ("uneven", {"components": 3}),
    "8 bits": ("preresnet", {"bits": 8}),
    "8 bits by layer": ("preresnet", {"bits": 8, "granularity": "layer"}),
    "Schmidt": ("uneven", PAPER),
    "Schmidt by layer": ("uneven", PAPER | {"granularity": "layer"}),
    "Schmidt by channel": ("uneven", PAPER | {"granularity": "channel"}),
    "2 directions by layer": (
        "uneven",
        {"components": 2, "granularity": "layer", "unit": "block"},
    ),
    "Schmidt, 8 bits by layer, uneven": ("uneven", PAPER | {"bits": 8, "granularity": "layer"}),
    "Schmidt, 8 bits": ("preresnet", PAPER | {"bits": 8, "lr": 1e-3}),
    "Schmidt, 8 bits by layer": (
        "preresnet",
        PAPER | {"bits": 8, "granularity": "layer", "lr": 1e-4},
    ),
    "Schmidt, 8 bits by channel": (
        "preresnet",
        PAPER | {"bits": 8, "granularity": "channel", "lr": 1e-4},
    ),
}
STEPS, BATCH, CHECKPOINTS = 20, 12, 7
# The case whose basis is given away too: it is the smallest of those that round.
ROUNDED = "Schmidt, 8 bits by layer, uneven"


def uneven() -> nn.Module:
    """7 channels divide by no number of ranks, and of 2 rows some ranks get none."""
    block = nn.Sequential(nn.Conv2d(7, 12, 3), nn.BatchNorm2d(12), nn.ReLU())
    model = nn.Sequential(
        nn.Conv2d(1, 7, 3), nn.BatchNorm2d(7), nn.ReLU(), block, nn.Flatten(), nn.Linear(192, 2)
    )
    model[0].bias.requires_grad_(False)
    return model


def preresnet() -> nn.Module:
    return PreResNet(8, num_classes=2, in_channels=1)


def make_model(name: str) -> nn.Module:
    """The model of this name, with batch norm as in evaluation, whose results are no rank's own."""
    torch.manual_seed(0)
    return globals()[name]().eval()


def checkpoints(folder: Path, name: str) -> list[Path]:
    """A random walk of small steps; the fifth checkpoint is a multiple of the fourth."""
    paths = [folder / f"{name}.{i}.pt" for i in range(CHECKPOINTS)]
    if not paths[-1].exists():
        torch.manual_seed(1)
        state = make_model(name).state_dict()
        for i, path in enumerate(paths):
            for value in state.values():
                if value.is_floating_point() and i != 4:
                    value += 0.02 * value.std(correction=0) * torch.randn_like(value).abs()
            multiple = {key: value * (1 + 2**-6) for key, value in state.items()}
            torch.save(multiple if i == 4 else state, path)
    return paths


def batches() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(2)
    return [(torch.randn(BATCH, 1, 8, 8), torch.randint(2, (BATCH,))) for _ in range(STEPS)]


def rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def prepared(model: nn.Module, mesh: DeviceMesh | None = None) -> nn.Module:
    """The model as it is in one process, sharded in two groups where there are ranks."""
    if dist.is_initialized():
        mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
        block = model[3] if isinstance(model, nn.Sequential) else model.layer3
        fully_shard(block, mesh=mesh, reshard_after_forward=False)
        fully_shard(model, mesh=mesh, reshard_after_forward=False)
    return model


def loss_of(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """This rank's share of the mean loss; FSDP2 takes the mean of the gradients of all ranks."""
    rank, world = rank_and_world()
    mine = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    return F.cross_entropy(model(images[mine]), labels[mine])


def whole(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    return {k: (v.full_tensor() if isinstance(v, DTensor) else v).clone() for k, v in state.items()}


def train(folder: Path, name: str, options: dict) -> dict:
    """Twenty steps; the communication of the last of them is counted."""
    model = prepared(make_model(name))
    with torch.no_grad():
        model(torch.zeros(1, 1, 8, 8))  # leaves the weights gathered
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = TWA(model, checkpoints(folder, name), **options)
    start, subspace = whole(model), optimizer.subspace
    basis = None
    if (name, options) == CASES[ROUNDED]:
        basis = torch.stack([subspace.expand(unit) for unit in torch.eye(len(subspace))])
    for step, (images, labels) in enumerate(batches(), start=1):
        counted = CommDebugMode() if step == STEPS else contextlib.nullcontext()
        with counted:
            loss_of(model, images, labels).backward()
            optimizer.step()
        optimizer.zero_grad()
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    return {
        "coefficients": optimizer.coefficients.detach(),
        "start coefficients": state["state"][0]["start_coefficients"],
        "fingerprint": state["state"][0]["fingerprint"],
        "basis": basis,
        "scale": subspace.scale,
        "averaging weights": optimizer.averaging_weights(),
        "start": start,
        "weights": whole(model),
        "dropped": subspace.dropped,
        "warnings": sum("depend linearly" in str(w.message) for w in caught),
        "communication": {str(op): count for op, count in counted.get_comm_counts().items()},
        "bytes": subspace.nbytes,
        "columns": [local(p).numel() for p in subspace.parameters],
    }


def refusals(folder: Path) -> dict[str, str]:
    """What is said of a bad checkpoint and of a model that is half sharded."""
    said = {}
    good = checkpoints(folder, "uneven")
    bad = torch.load(good[0], weights_only=True)
    bad["5.weight"][0, 0] = torch.nan
    try:
        Subspace(prepared(make_model("uneven")), [good[0], bad])
    except CheckpointError as error:
        said["NaN"] = str(error)
    half = make_model("uneven")
    if dist.is_initialized():
        fully_shard(half[3], mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        try:
            Subspace(half, good)
        except ValueError as error:
            said["half"] = str(error)
    return said


def main(folder: Path):
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    rank, world = rank_and_world()
    cases = {name: train(folder, *case) for name, case in CASES.items()}
    everyones = [cases]
    if dist.is_initialized():
        everyones = [None] * world
        dist.all_gather_object(everyones, cases)
    results = {"ranks": everyones, "refusals": refusals(folder)}
    if rank == 0:
        torch.save(results, folder / f"{world if dist.is_initialized() else 'whole'}.pt")
    if dist.is_initialized():
        ranks.stop()
        ranks.leave(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
