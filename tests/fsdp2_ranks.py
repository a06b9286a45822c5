"""What the ranks of test_examples.py compute: TWA on a model that `accelerate` shards by FSDP2.

    python fsdp2_ranks.py FOLDER                                      one process, a whole model
    torchrun --standalone --nproc_per_node 2 fsdp2_ranks.py FOLDER    two ranks, a shard each

Writes to `1.pt` or `2.pt` in FOLDER the weights after some steps, uninterrupted and resumed.
"""

import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from ranks import batches, checkpoints, loss_of, make_model, whole
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from training.ranks import leave
from twa import TWA

STEPS, HALF = 10, 5


def accelerator_of() -> Accelerator:
    """`accelerate` shards on GPUs only; told that it may, it runs the same code on CPUs."""
    accelerator = Accelerator(cpu=True)
    if accelerator.num_processes > 1:
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, cpu_ram_efficient_loading=False, state_dict_type="SHARDED_STATE_DICT"
        )
    return accelerator


def prepared(accelerator: Accelerator, folder: Path):
    model = make_model("uneven")
    return accelerator.prepare(model, TWA(model, checkpoints(folder, "uneven")))


def steps(accelerator: Accelerator, model, optimizer, which: range) -> dict[str, torch.Tensor]:
    for images, labels in batches()[which.start : which.stop]:
        accelerator.backward(loss_of(model, images, labels))
        optimizer.step()
        optimizer.zero_grad()
    return whole(model)


def main(folder: Path):
    accelerator = accelerator_of()
    ranks = accelerator.num_processes
    model, optimizer = prepared(accelerator, folder)
    found = {"start": whole(model)}
    steps(accelerator, model, optimizer, range(HALF))
    accelerator.save_state(folder / f"state{ranks}")
    middle = {
        full: copy.deepcopy(
            (
                get_model_state_dict(model, options=StateDictOptions(full_state_dict=full)),
                get_optimizer_state_dict(
                    model, optimizer.optimizer, options=StateDictOptions(full_state_dict=full)
                ),
            )
        )
        for full in (False, True)
    }
    found["uninterrupted"] = steps(accelerator, model, optimizer, range(HALF, STEPS))

    accelerator.free_memory()
    model, optimizer = prepared(accelerator, folder)
    accelerator.load_state(folder / f"state{ranks}")
    found["load_state"] = steps(accelerator, model, optimizer, range(HALF, STEPS))
    for full, (weights, state) in middle.items():
        options = StateDictOptions(full_state_dict=full)
        model, optimizer = prepared(accelerator, folder)
        set_model_state_dict(model, weights, options=options)
        set_optimizer_state_dict(model, optimizer.optimizer, state, options=options)
        found[f"full_state_dict={full}"] = steps(accelerator, model, optimizer, range(HALF, STEPS))
    if accelerator.is_main_process:
        torch.save(found, folder / f"{ranks}.pt")
    accelerator.end_training()
    if ranks > 1:
        leave(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
