"""Training over networks of every speed: seconds and bytes a step, accuracy against seconds.

    python benchmarks/network.py

Needs root, `ip` and `tc` (Debian's iproute2), and FashionMNIST (its dataset-fashion-mnist). Two
hosts are simulated as network namespaces, one core each, and joined by a wire of limited rate. On
it, two ranks (of the hybrid, four) train on from the same head, each way from the same start point.

Each cell is measured once, so that the same command resumes where it was stopped:

- on each wire, some steps of each way: the seconds that one takes, the bytes that a rank sends,
  counted by the kernel, and the seconds before the first step;
- once for each way, on the fastest wire, the whole training: test loss and accuracy after so many
  steps. They do not depend on the wire, as in all of these ways the ranks wait for each other. So
  accuracy against seconds is this curve, its steps times the seconds of a step.

Local SGD's averaging is timed alone, and a step gets its share. FSDP2 and the hybrid take the same
steps as replicated TWA, as the tests show. Writes `network.json` to --out, its table and figure.
"""

import argparse
import contextlib
import fcntl
import json
import os
import queue
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from network_report import CURVE, write_report
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.distributed.algorithms.model_averaging.utils import average_parameters
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import models
import utils
from studies.common import CPU, ROOT, Bench, call_script, sgd
from training import data, ranks
from training.files import save, write_json
from training.loop import autocast, evaluate, reestimate_bn
from training.optimizers import SCHEDULES, schedule_of
from training.run import run_script
from training.settings import Parser
from twa import TWA, rate_of
from twa.checkpoints import load_into
from utils import UserError

BATCH = 128  # images a step, of all ranks together
SAVES = 5  # checkpoints an epoch of the head
WARM_UP = 4  # steps that are not timed; PowerSGD compresses from the third on
# What joins the hosts: bits a second, and seconds that a packet takes (half of what `ping` shows).
WIRES = {
    "no limit": (None, 0.0),
    "1 Gbit/s": (1e9, 0.0),
    "100 Mbit/s": (1e8, 0.0),
    "10 Mbit/s": (1e7, 0.0),
    "100 Mbit/s, 50 ms": (1e8, 0.025),
}


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--archs", nargs="+", default=("PreResNet20", "studies.architectures:vgg"))
    add("--ways", nargs="+", default=tuple(WAYS), choices=tuple(WAYS), help="ways to train")
    add("--wires", nargs="+", default=tuple(WIRES), choices=tuple(WIRES), help="between the hosts")
    add("--images", type=int, default=60_000, help="training images")
    add("--test-images", type=int, default=10_000, help="test images")
    add("--head", type=int, default=6, help="epochs of the head")
    add("--epochs", type=float, default=2.0, help="epochs of each way")
    add("--every", type=int, default=100, help="steps between two tests")
    add("--seconds", type=float, default=15.0, help="to time a cell for, about")
    add("--data-dir", default="./datasets", type=Path, help="where FashionMNIST is unpacked")
    add("--work", default="./results/network", type=Path, help="where the heads are kept")
    add("--out", default=ROOT / "benchmarks", type=Path, help="where the results are written")
    add("--cell", nargs=3, help=argparse.SUPPRESS)  # of a rank: architecture, way, wire
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if args.cell:
        measure(args, *args.cell)
        return
    check_system()
    path = args.out / "network.json"
    names = ("images", "test_images", "head", "epochs", "every")
    settings = {name: getattr(args, name) for name in names}
    results = json.loads(path.read_text()) if path.exists() else {"settings": settings}
    if results["settings"] != settings:
        raise UserError(f"{path}: was measured with {results['settings']}; give another --out")
    for arch in args.archs:
        prepare(args, arch)
        cells = results.setdefault(arch, {})
        for way in args.ways:
            for wire in [*([CURVE] if WAYS[way].curve else []), *args.wires]:
                cell = cells.setdefault(way, {})
                if wire not in cell:
                    cell[wire] = launch(arch, way, wire)
                    write_json(results, path)
                    print(f"{arch}: {way}: {wire}", flush=True)
    write_report(results, args.out)


def prepare(args: argparse.Namespace, arch: str) -> None:
    """Trains the head of an architecture, unless it exists, and finds its best mean."""
    folder = head_of(args, arch)
    if (folder / "start.pt").exists():
        return
    call_script(
        *("train_sgd_cifar.py", "--datasets", "FashionMNIST", "--amp", "--batch-size", BATCH),
        *("--model-factory" if ":" in arch else "--arch", arch, "--epochs", args.head),
        *("--saves-per-epoch", SAVES, "--schedule", "constant", "--images", args.images),
        *("--data-dir", args.data_dir.resolve(), "-p", 1000, "--resume"),
        *("--save-dir", folder, "--log-dir", folder),
    )
    train, _ = loaders(args)
    start, _, _ = Bench(arch, train, 1).start(*window_of(args, arch))
    save(start, folder / "start.pt")


def head_of(args: argparse.Namespace, arch: str) -> Path:
    return args.work.resolve() / f"{arch.rpartition(':')[2]}.{args.images}.{args.head}"


def window_of(args: argparse.Namespace, arch: str) -> list[Path]:
    return [head_of(args, arch) / f"{i}.pt" for i in range(1, args.head * SAVES + 1)]


def loaders(args: argparse.Namespace) -> tuple[data.Loader, data.Loader]:
    """This rank's shares of the training and the test images."""
    train, test = data.load("FashionMNIST", args.data_dir, CPU)
    among = {"rank": ranks.rank(), "world": ranks.world(), "channels_last": True}
    return (
        data.Loader(train.part(slice(args.images)), BATCH, train=True, **among),
        data.Loader(test.part(slice(args.test_images)), 1000, train=False, **among),
    )


# --- the hosts ---


def check_system() -> None:
    """Raises a `UserError` where hosts cannot be made."""
    if not (shutil.which("ip") and shutil.which("tc")):
        raise UserError("`ip` or `tc` not found: install Debian's iproute2")
    if os.geteuid() != 0:
        raise UserError("network namespaces need root: start it as root")


def ip(*words: object) -> str:
    command = ["ip", *map(str, words)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


@contextlib.contextmanager
def hosts(wire: str) -> Iterator[list[str]]:
    """Two hosts, 10.0.0.1 and 10.0.0.2, whose interfaces `wire` are joined; removed at the end."""
    rate, delay = WIRES.get(wire, (None, 0.0))
    for name in ip("netns", "list").split():  # of a process that was killed
        owner = name.removeprefix("twa-").partition("-")[0]
        if name.startswith("twa-") and not Path(f"/proc/{owner}").exists():
            ip("netns", "delete", name)
    names = [f"twa-{os.getpid()}-{host}" for host in range(2)]
    with contextlib.ExitStack() as stack:
        for name in names:
            ip("netns", "add", name)
            stack.callback(ip, "netns", "delete", name)
            ip("-n", name, "link", "set", "lo", "up")
        if delay:
            stack.enter_context(delayed(names, delay))
        else:
            peer = ("peer", "name", "wire", "netns", names[1])
            ip("link", "add", "wire", "netns", names[0], "type", "veth", *peer)
        for host, name in enumerate(names, start=1):
            ip("-n", name, "address", "add", f"10.0.0.{host}/24", "dev", "wire")
            ip("-n", name, "link", "set", "wire", "up")
            if rate:
                # What may pass at once: as much as the wire carries in a tick of the kernel.
                burst = max(3200, round(rate / 8 / 250))
                limit = f"dev wire root tbf rate {rate:.0f}bit burst {burst} latency 100ms"
                ip("netns", "exec", name, "tc", "qdisc", "add", *limit.split())
        yield names


@contextlib.contextmanager
def delayed(names: list[str], seconds: float) -> Iterator[None]:
    """Joins the hosts by threads that delay each packet: many kernels have no `netem`."""
    ends = []
    for host, name in enumerate(names):
        ends.append(os.open("/dev/net/tun", os.O_RDWR))
        no_header, tun = 0x1000, 0x0001  # IFF_NO_PI, IFF_TUN; below, TUNSETIFF
        request = struct.pack("16sH14x", b"twa%d" % host, no_header | tun)
        fcntl.ioctl(ends[host], 0x400454CA, request)
        ip("link", "set", f"twa{host}", "netns", name)
        ip("-n", name, "link", "set", f"twa{host}", "name", "wire", "mtu", 9000)

    def take(end: int, packets: queue.SimpleQueue) -> None:
        with contextlib.suppress(OSError):  # the host is gone
            while True:
                packets.put((os.read(end, 65536), time.monotonic() + seconds))

    def give(end: int, packets: queue.SimpleQueue) -> None:
        while (item := packets.get()) is not None:
            packet, due = item
            time.sleep(max(0, due - time.monotonic()))
            with contextlib.suppress(OSError):  # Lost: the other end is not up yet.
                os.write(end, packet)

    waiting: list[queue.SimpleQueue] = [queue.SimpleQueue(), queue.SimpleQueue()]
    for source, target, packets in zip(ends, ends[::-1], waiting, strict=True):
        threading.Thread(target=take, args=(source, packets), daemon=True).start()
        threading.Thread(target=give, args=(target, packets), daemon=True).start()
    try:
        yield
    finally:
        for name, end, packets in zip(names, ends, waiting, strict=True):
            ip("-n", name, "link", "delete", "wire")  # which ends the reader
            packets.put(None)
            os.close(end)


def launch(arch: str, way: str, wire: str) -> dict:
    """Runs `measure` on every rank of the way; returns what the first one measured."""
    each, world = WAYS[way].ranks, WAYS[way].ranks * WAYS[way].hosts
    shared = {
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "29500",
        "GLOO_SOCKET_IFNAME": "wire",
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(each),
        "OMP_NUM_THREADS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # Else it warns again and again of hosts without names.
    }
    with contextlib.ExitStack() as stack:
        names, processes = stack.enter_context(hosts(wire)), []
        for rank in range(world):
            inside = ["ip", "netns", "exec", names[rank // each]]
            process = subprocess.Popen(
                [*inside, sys.executable, *sys.argv, "--cell", arch, way, wire],
                env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank % each)},
                stdout=subprocess.DEVNULL if rank else subprocess.PIPE,
                text=True,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes.append(process)
        while (codes := [process.poll() for process in processes]) != [0] * world:
            if any(codes):
                raise UserError(f"{arch}, {way}, {wire}: a rank failed, see above")
            time.sleep(0.1)
        return json.loads(processes[0].stdout.read().splitlines()[-1])


# --- a rank ---


@dataclass
class Trained:
    """A model in training, as a way made it."""

    model: nn.Module  # what is tested
    optimizer: torch.optim.Optimizer
    forward: nn.Module | None = None  # what is called in place of the model
    average: Callable[[], None] = lambda: None  # what local SGD does after every `period` steps
    period: int = 1

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        with autocast(images.device, True):
            loss = F.cross_entropy((self.forward or self.model)(images), labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def measure(args: argparse.Namespace, arch: str, way: str, wire: str) -> None:
    """What a rank does for a cell; the first one prints the results."""
    cores = sorted(os.sched_getaffinity(0))
    host = int(os.environ["RANK"]) // WAYS[way].ranks
    os.sched_setaffinity(0, {cores[host % len(cores)]})
    utils.set_seed(1)
    ranks.start(CPU)
    model = models.build(arch, 10, 1, 28)
    start = head_of(args, arch) / "start.pt"
    load_into(model, start)
    dist.barrier()
    before, started = sent(), time.perf_counter()
    trained = WAYS[way].make(model, window_of(args, arch), start)
    results = {"setup_seconds": time.perf_counter() - started, "setup_bytes": sent() - before}
    if isinstance(trained.optimizer, TWA):
        results["coefficients"] = len(trained.optimizer.subspace)
    if wire == CURVE:
        results[CURVE] = curve(args, trained, WAYS[way].times)
    else:
        results |= cost_of_step(args, trained)
    if ranks.rank() == 0:
        print(json.dumps(results))


def curve(args: argparse.Namespace, trained: Trained, times: int) -> list[dict]:
    """Trains to the end; the tests on the way."""
    train, test = loaders(args)
    steps = max(1, round(args.epochs * times * len(train)))
    if isinstance(trained.optimizer, TWA):  # as train_twa.py has it
        rate = rate_of(steps, args.images, trained.optimizer.subspace.unit)
        trained.optimizer.param_groups[0]["lr"] = rate
    scheduler = schedule_of(SCHEDULES["linear"], trained.optimizer, steps)
    tests = []
    batches = chain([None], islice(train.endless(), steps))  # tested before the first step, too
    for done, batch in enumerate(batches):
        if batch is not None:
            trained.model.train()
            trained.step(*batch)
            scheduler.step()
            if done % trained.period == 0 or done == steps:
                trained.average()
        if done % args.every == 0 or done == steps:
            reestimate_bn(trained.model, train, True, 2048)
            tests.append({"step": done} | evaluate(trained.model, test, True))
    return tests


def cost_of_step(args: argparse.Namespace, trained: Trained) -> dict:
    """The seconds that a step takes, and the bytes that a rank sends in it."""
    batches, results = loaders(args)[0].endless(), {"seconds": 0.0, "bytes": 0.0}
    trained.model.train()
    parts = [(lambda: trained.step(*next(batches)), 1)]
    if trained.period > 1:
        parts.append((trained.average, trained.period))
    for action, share in parts:
        for _ in range(WARM_UP):
            started = time.perf_counter()
            action()
        last = torch.tensor(time.perf_counter() - started)
        dist.broadcast(last, 0)
        count = min(100, max(2, int(args.seconds / last)))
        dist.barrier()
        before, started = sent(), time.perf_counter()
        for _ in range(count):
            action()
        dist.barrier()
        results["seconds"] += (time.perf_counter() - started) / count / share
        results["bytes"] += (sent() - before) / count / share
    return results


def sent() -> float:
    """The bytes that this host has sent so far, by rank."""
    counter = Path("/sys/class/net/wire/statistics/tx_bytes")
    return int(counter.read_text()) / int(os.environ["LOCAL_WORLD_SIZE"])


# --- the ways: each takes a model at the start point, the window, and the file of the start ---


def ddp(model: nn.Module, window: list[Path], start: Path) -> Trained:
    """SGD whose gradients are averaged."""
    return Trained(model, sgd(model), ranks.replicate(model))


def power_sgd(model: nn.Module, window: list[Path], start: Path, rank: int) -> Trained:
    """The same, the gradients sent as matrices of a low rank (Vogels et al., NeurIPS 2019)."""
    # One bucket: of several, gloo's threads start the sums in an order of their own on each rank.
    forward = DistributedDataParallel(model, bucket_cap_mb=1000, broadcast_buffers=False)
    state = powerSGD_hook.PowerSGDState(None, rank, start_powerSGD_iter=3)
    forward.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    return Trained(model, sgd(model), forward)


def local_sgd(model: nn.Module, window: list[Path], start: Path, period: int) -> Trained:
    """SGD on each rank alone, and the mean of the weights after every `period` steps."""
    average = partial(average_parameters, [*model.parameters()], dist.group.WORLD)
    return Trained(model, sgd(model), average=average, period=period)


def sharded(model: nn.Module, window: list[Path], start: Path) -> Trained:
    """TWA on a model that FSDP2 shards among all ranks."""
    model = ranks.shard(model, CPU)
    return Trained(model, TWA(model, window, start=start))


def replicated(model: nn.Module, window: list[Path], start: Path, **arguments) -> Trained:
    """TWA on a whole model on each rank."""
    everyone = dist.group.WORLD
    return Trained(model, TWA(model, window, start=start, process_group=everyone, **arguments))


def hybrid(model: nn.Module, window: list[Path], start: Path) -> Trained:
    """TWA on a model that is sharded within a host and replicated between hosts."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = ranks.shard(model, CPU, mesh=mesh["shard"])
    group = mesh.get_group("replicate")
    return Trained(model, TWA(model, window, start=start, process_group=group))


@dataclass(frozen=True)
class Way:
    """A way to train."""

    make: Callable[..., Trained]
    curve: bool = True  # whether its accuracy is measured
    times: int = 1  # how many times the epochs of the others
    ranks: int = 1  # on each host
    hosts: int = 2


LAYER = {"granularity": "layer", "unit": "block"}
CHANNEL = {"granularity": "channel", "unit": "block", "components": 12}
WAYS = {
    "SGD, DDP": Way(ddp),
    "SGD, PowerSGD of rank 2": Way(partial(power_sgd, rank=2)),
    "local SGD, H = 10": Way(partial(local_sgd, period=10)),
    "local SGD, H = 100": Way(partial(local_sgd, period=100)),
    "TWA, FSDP2": Way(sharded, curve=False),
    "TWA, hybrid 2x2": Way(hybrid, curve=False, ranks=2),
    "TWA, replicated": Way(replicated),
    "TWA, replicated, 4 bits": Way(partial(replicated, bits=4), curve=False),
    "TWA, replicated, by layer": Way(partial(replicated, **LAYER)),
    "TWA, replicated, by channel": Way(partial(replicated, **CHANNEL)),
    "TWA, replicated, by channel, twice the steps": Way(partial(replicated, **CHANNEL), times=2),
    "TWA, one process": Way(replicated, curve=False, hosts=1),
}


if __name__ == "__main__":
    run_script(main)
