"""The ranks that `torchrun` starts: how they meet and part, what they exchange, who writes.

Without `torchrun` there is one rank, and each function does what one process would do.
"""

import atexit
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from training.files import on_cpu, save
from twa.files.checkpoints import check_finite
from utils import UserError


def launched() -> bool:
    """Whether `torchrun`, or what sets the same variables, started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def restarts() -> int:
    """How often `torchrun` has restarted the ranks because one of them died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def first() -> bool:
    """Whether this process is the first rank; known before the ranks have met, too."""
    return not launched() or int(os.environ["RANK"]) == 0


def local_rank() -> int:
    """The number of this process among those on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_world() -> int:
    """The number of ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """The number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def refuse() -> None:
    """Raises a `UserError` if `torchrun` started this script, which runs in one process."""
    if launched():
        raise UserError(f"{Path(sys.argv[0]).name} runs in one process: start it without torchrun")


def start(device: torch.device) -> None:
    """Makes `device` the current one and joins the other ranks: by NCCL on CUDA, else by gloo."""
    accelerator = device.type != "cpu"
    if accelerator and hasattr(torch.get_device_module(device), "set_device"):  # MPS has none
        torch.get_device_module(device).set_device(device)
    if not launched() or dist.is_initialized():
        return
    # `barrier`, which takes no tensor, then does not have to guess the device.
    how: dict = {"device_id": device} if accelerator else {}
    # A wait would delay Python's handlers: `torchrun`'s SIGTERM ends who waits for a dead rank.
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    try:
        if int(os.environ.get("GROUP_WORLD_SIZE", 1)) == 1:  # machines may count restarts otherwise
            store, rank, world = next(dist.rendezvous("env://"))
            # After a restart the addresses of dead ranks are still in the store.
            store = dist.PrefixStore(f"restart {restarts()}", store)
            how |= {"store": store, "rank": rank, "world_size": world}
        dist.init_process_group(dist.get_default_backend_for_device(device), **how)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop() -> None:
    """Leaves the group once all ranks are done."""
    if dist.is_initialized():
        barrier()
        dist.destroy_process_group()


def leave(status: int) -> NoReturn:
    """Ends this process, one of the ranks, with `status`, without Python's own shutdown.

    DTensor's caches keep the process group alive, whose threads may still hold tensors. Freeing
    these in a half-finalised interpreter aborts the process, in rare runs.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def print_once(*lines: str | None) -> None:
    """Prints on the first rank the lines that are not None."""
    if rank() == 0:
        print(*filter(None, lines), sep="\n")


def barrier() -> None:
    """Waits until all ranks are here."""
    if dist.is_initialized():
        dist.barrier()


def largest(number: int) -> int:
    """The largest `number`, an int32, of all ranks."""
    if not dist.is_initialized():
        return number
    gloo = dist.get_backend() == "gloo"
    device = "cpu" if gloo else torch.accelerator.current_accelerator()
    tensor = torch.tensor(number, dtype=torch.int32, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor)


def gather(value: object) -> list:
    """The values of all ranks, in their order, on every rank."""
    values = [value] * world()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def shard(
    model: nn.Module, device: torch.device, reshard: bool = False, mesh: DeviceMesh | None = None
) -> nn.Module:
    """Moves `model` to `device`; on several ranks FSDP2 shards it among them.

    The elements of its lists of modules (residual blocks, transformer layers) are shard groups; all
    other weights make one more.

    Args:
        reshard: free the gathered weights of a block after its forward pass. The backward pass
            gathers them again, and no rank ever holds the whole model.
        mesh: the ranks to shard among, in one dimension; None for all of them.
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
    """The module to call in training, so that gradients are the mean over the ranks."""
    if world() == 1:
        return model
    with warnings.catch_warnings():  # of the argument's new name, which older versions do not know
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(model, broadcast_buffers=False)


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that differ between ranks, by name: batch norm's running statistics."""
    return {name: b for name, b in model.named_buffers() if b.is_floating_point()}


def _mean_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Means over the ranks, in new tensors."""
    means = {name: buffer.clone() for name, buffer in buffers_of(model).items()}
    for mean in means.values():
        dist.all_reduce(mean)
        mean /= world()
    return means


def average_buffers(model: nn.Module) -> None:
    """Replaces batch norm's running statistics by their means over the ranks."""
    if dist.is_initialized():
        for name, mean in _mean_buffers(model).items():
            model.get_buffer(name).copy_(mean)


def state_dict_of(model: nn.Module) -> dict[str, Tensor]:
    """The whole `state_dict`, on the CPU, on the first rank; empty on the others.

    Called on every rank. Batch norm's statistics in it are means over the ranks.
    """
    if not dist.is_initialized():
        return on_cpu(model.state_dict())
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    means = on_cpu(_mean_buffers(model))
    return state | {name: mean for name, mean in means.items() if name in state}


def save_model(model: nn.Module, path: str | os.PathLike) -> None:
    """Writes the whole `state_dict` to `path`, once; called on every rank.

    Weights that hold NaN or infinity are not saved: a `NotFiniteError` names the first.
    """
    state = state_dict_of(model)
    if rank() == 0:
        check_finite(state, f"{path} is not saved")
        save(state, Path(path))
