"""TWA on many ranks: measured with processes on this machine, computed for larger ones.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --processes 1 2 --checkpoints 20 --weights 1_000_000

The first table is measured under torchrun with gloo: for each number of processes, the basis of a
rank, the peak of the memory that building it took, and the time of a training step. The second is
computed by the formulas in `twa.storage.memory.Plan` and `training.parallel.sent`. Both are
Markdown.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from subspace import checkpoints, peak_memory, write_checkpoints

from training import ranks, settings
from training.parallel import RIDERS, sent
from twa import TWA
from twa.storage.memory import Plan

BATCH = 32


def main():
    parser = settings.Parser(__doc__.partition("\n")[0])
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2, 4], help="to measure")
    parser.add_argument("--checkpoints", type=int, default=40, help="how many, n")
    parser.add_argument("--weights", type=int, default=4_000_000, help="of the model, about")
    parser.add_argument("--blocks", type=int, default=8, help="of the model, a shard group each")
    parser.add_argument("--step", type=float, default=1e-3, help="of a checkpoint, over its norm")
    parser.add_argument("--repeats", type=int, default=11, help="of a step; the median counts")
    parser.add_argument("--memory-bandwidth", type=float, default=3.35e12, help="of a GPU, bytes/s")
    parser.add_argument("--link", type=float, default=450e9, help="within a node, bytes/s and GPU")
    parser.add_argument("--network", type=float, default=50e9, help="between nodes, the same")
    parser.add_argument("--node", type=int, default=8, help="GPUs of a node")
    parser.add_argument("--folder", help=argparse.SUPPRESS)  # of a rank: where checkpoints lie
    args = parser.parse_args()
    if args.folder:
        measure(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        if args.processes:
            write_checkpoints(folder, args, make_model(args))
            print_measured(args, {count: launch(count, folder) for count in args.processes})
    print_computed(args)


# --- measured ---


def make_model(args) -> nn.Module:
    """`args.blocks` blocks of two square linear layers, about `args.weights` weights together."""
    side = math.isqrt(args.weights // (2 * args.blocks))

    def block() -> nn.Module:
        return nn.Sequential(nn.Linear(side, side), nn.Tanh(), nn.Linear(side, side))

    return nn.Sequential(*(block() for _ in range(args.blocks)))


def launch(processes: int, folder: str) -> list[dict]:
    """Runs `measure` in so many processes; returns what each rank measured."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(processes), *sys.argv, "--folder", folder]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(args):
    """Builds the basis on a rank and takes some steps; the first rank prints the figures of all."""
    device = torch.device("cpu")
    ranks.start(device)
    model = ranks.shard(make_model(args), device)
    window = checkpoints(args.folder, args)
    torch.load(window[0], mmap=True, weights_only=True)  # Imports modules, untimed.

    before, started = peak_memory(), time.perf_counter()
    optimizer = TWA(model, window, lr=1e-9)
    build, peak = time.perf_counter() - started, peak_memory() - before
    images = torch.randn(BATCH, model[0][0].in_features)
    steps, twa = [], []
    for _ in range(args.repeats + 1):
        dist.barrier()
        started = time.perf_counter()
        F.mse_loss(model(images), images).backward()
        between = time.perf_counter()
        optimizer.step()
        ended = time.perf_counter()
        optimizer.zero_grad()
        steps.append(ended - started)
        twa.append(ended - between)
    own = {
        "basis": optimizer.subspace.nbytes,
        "peak": peak,
        "build": build,
        "step": statistics.median(steps[1:]),
        "twa": statistics.median(twa[1:]),
    }
    everyone = ranks.gather(own)
    if ranks.rank() == 0:
        print(json.dumps(everyone))
    ranks.stop()
    ranks.leave(0)


def print_measured(args, by_count: dict[int, list[dict]]):
    total = sum(p.numel() for p in make_model(args).parameters())
    print(
        f"{args.checkpoints} checkpoints of {total:,} weights, {args.blocks} shard groups; "
        f"batch {BATCH} a rank; torch {torch.__version__}, a thread each, on "
        f"{os.cpu_count()} cores; a checkpoint is {4 * total / 1e6:.0f} MB\n"
    )
    print(
        "| processes | basis MB a rank | peak while building MB a rank | build s | step ms "
        "| of which TWA ms |\n" + "| --- " * 6 + "|"
    )
    for count, seen in by_count.items():
        most = {key: max(rank[key] for rank in seen) for key in seen[0]}
        row = [str(count), f"{most['basis'] / 1e6:.1f}", f"{most['peak'] / 1e6:.1f}"]
        row += [f"{most['build']:.1f}", f"{most['step'] * 1e3:.0f}", f"{most['twa'] * 1e3:.0f}"]
        print("| " + " | ".join(row) + " |")


# --- computed ---


MODELS = {  # weights, and checkpoints of the window
    "ResNet-50": (25_600_000, 300),
    "ViT-L/16": (304_000_000, 300),
    "7 B": (7_000_000_000, 100),
}


def print_computed(args):
    print(
        f"\nComputed: {args.memory_bandwidth / 1e12:.2f} TB/s of memory, "
        f"{args.link / 1e9:.0f} GB/s a GPU among the {args.node} of a node and "
        f"{args.network / 1e9:.0f} GB/s between nodes.\n"
    )
    print(
        "| model | checkpoints | GPUs | bits | basis GB | memory GB | while building GB "
        "| on the wire GB | basis ms | wire ms | floor ms |\n" + "| --- " * 11 + "|"
    )
    for name, (weights, count) in MODELS.items():
        for gpus in (8, 64, 512):
            own = math.ceil(weights / gpus)
            vectors = 4 * 4 * own  # the weights, a gradient, the start point, one to work with
            link = args.link if gpus <= args.node else args.network
            for bits in (32, 8, 4):
                plan = Plan(count, bits=bits)
                basis, wire = plan.basis_bytes(own), sent(weights + plan.height + RIDERS, gpus)
                # Activations come on top of the memory; the mean of the window is not read.
                memory, building = basis + vectors + 4 * weights, plan.build_bytes(own) + vectors
                reading, sending = 2 * (basis - 4 * own) / args.memory_bandwidth, wire / link
                row = [name, str(count), str(gpus), str(bits)]
                row += [f"{size / 1e9:.3g}" for size in (basis, memory, building, wire)]
                row += [f"{1e3 * t:.2g}" for t in (reading, sending, reading + sending)]
                print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
