"""Many processes: the ranks that `torchrun` starts, what they share, and what the first one writes.

Without `torchrun` there is one rank, and each function does what one process would do.
"""

import atexit
import contextlib
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from training.files import save
from twa.files.checkpoints import check_finite
from utils import UserError


def launched() -> bool:
    """Whether `torchrun`, or what sets the same variables, started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def restarts() -> int:
    """How often `torchrun` has started the ranks anew because one of them had died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def first() -> bool:
    """Whether this process is the first rank, also before the ranks have met."""
    return not launched() or int(os.environ["RANK"]) == 0


def local_rank() -> int:
    """The number of this process among those on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_world() -> int:
    """How many ranks there are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def on_each_machine() -> int | None:
    """How many ranks there are on each machine; None if they differ in that."""
    counts = {*gather(local_world())}
    return counts.pop() if len(counts) == 1 else None


def start(device: torch.device) -> None:
    """Joins the other ranks, by NCCL on CUDA and by gloo on the CPU."""
    if not launched() or dist.is_initialized():
        return
    if device.type != "cpu":
        torch.get_device_module(device).set_device(device)
    with uncaught_signals():
        _meet(dist.get_default_backend_for_device(device))


@contextlib.contextmanager
def uncaught_signals() -> Iterator[None]:
    """Context in which signals have their default action, where a wait would hold up handlers.

    A rank that waits for one that has died is then ended by `torchrun`'s SIGTERM.
    """
    before = {
        number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _meet(backend: str) -> None:
    if int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1:
        dist.init_process_group(backend)  # The machines may count their restarts differently.
        return
    # After a restart the ranks meet in the same store, where the addresses of the dead still stand.
    store, rank, world = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"restart {restarts()}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)


def stop() -> None:
    """Leaves the other ranks, once all of them are done."""
    if dist.is_initialized():
        barrier()
        dist.destroy_process_group()


def leave(status: int) -> NoReturn:
    """Ends this process, one of the ranks, with `status`, and does not take Python to pieces.

    DTensor's caches keep the process group alive, whose threads may still hold tensors: to free
    them in an interpreter that is half gone aborts the process, in rare runs.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Waits until all ranks are here."""
    if dist.is_initialized():
        dist.barrier()


def refuse() -> None:
    """Raises a `UserError` where `torchrun` started a script that runs in one process."""
    if launched():
        raise UserError(f"{Path(sys.argv[0]).name} runs in one process: start it without torchrun")


def largest(number: int) -> int:
    """The largest `number`, an int32, that a rank has."""
    if not dist.is_initialized():
        return number
    on_cpu = dist.get_backend() == "gloo"
    device = "cpu" if on_cpu else torch.accelerator.current_accelerator()
    tensor = torch.tensor(number, dtype=torch.int32, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor)


def gather(value: object) -> list:
    """What each rank has as its `value`, in the order of the ranks, on all of them."""
    values = [value] * world()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def shard(
    model: nn.Module, device: torch.device, reshard: bool = False, mesh: DeviceMesh | None = None
) -> nn.Module:
    """`model` on `device`; where there are ranks, sharded among them by FSDP2.

    The elements of its lists of modules (residual blocks, transformer layers) are shard groups, and
    what is left over is one more.

    Args:
        reshard: free the gathered weights of a block after its forward pass. Backward gathers them
            again, and no rank ever holds the whole model.
        mesh: the ranks among which, in one dimension; all of them if None.
    """
    if not dist.is_initialized():
        return model.to(device)
    mesh = mesh or init_device_mesh(device.type, (world(),))
    lists = [m for m in model.modules() if isinstance(m, nn.Sequential | nn.ModuleList)]
    for block in (child for modules in lists for child in modules):
        if any(True for _ in block.children()) and any(True for _ in block.parameters()):
            fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
    return fully_shard(model, mesh=mesh, reshard_after_forward=False).to(device)


def replicate(model: nn.Module) -> nn.Module:
    """What to call in place of `model` while training, so that gradients are the mean of all ranks.

    The only one there is is called itself.
    """
    if world() == 1:
        return model
    with warnings.catch_warnings():  # of the argument's new name, which older versions do not know
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(model, broadcast_buffers=False)


def buffers_of(model: nn.Module) -> list[Tensor]:
    """The buffers that each rank has of its own: batch norm's running statistics."""
    return [buffer for buffer in model.buffers() if buffer.is_floating_point()]


def average_buffers(model: nn.Module) -> None:
    """Makes batch norm's running statistics the mean of those that the ranks gathered."""
    if dist.is_initialized():
        for buffer in buffers_of(model):
            dist.all_reduce(buffer)
            buffer /= world()


def state_dict_of(model: nn.Module) -> dict[str, Tensor]:
    """The whole `state_dict`, on the CPU, on the first rank; empty on the others.

    Called on every rank. Batch norm's statistics are averaged over the ranks first.
    """
    if not dist.is_initialized():
        return model.state_dict()
    average_buffers(model)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model, options=options)


def save_model(model: nn.Module, path: str | os.PathLike) -> None:
    """Writes the whole `state_dict` to `path`, once; called on every rank.

    Weights that hold NaN or infinity are not saved: a `NotFiniteError` names the first.
    """
    state = state_dict_of(model)
    if rank() == 0:
        check_finite(state, f"{path} is not saved")
        save(state, Path(path))
