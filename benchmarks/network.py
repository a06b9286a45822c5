"""Training over networks of every speed: seconds and bytes a step, accuracy against seconds.

    python benchmarks/network.py

Needs root, `ip` and `tc` (Debian's iproute2), and FashionMNIST (its dataset-fashion-mnist). Two
hosts are laid as network namespaces, one core each, and joined by a wire of limited rate. On it,
two ranks (of the hybrid, four) train on from the same head, each way from the same start point.

What is measured, each cell once, so that the same command goes on where it was stopped:

- on each wire, some steps of each way: the seconds that one takes, the bytes that a rank sends,
  counted by the kernel, and the seconds before the first step;
- once for each way, on the fastest wire, the whole training: test loss and accuracy after so many
  steps. They do not depend on the wire, as in all of these ways the ranks wait for each other. So
  accuracy against seconds is this curve, its steps times the seconds of a step.

Local SGD's step is timed without the averaging, and the averaging alone, of which a step gets its
share. FSDP2 and the hybrid take the same steps as replicated TWA (the tests hold them to that), and
have its curve. Writes `network.json` to --out, and the table and the figure made of it.
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
from dataclasses import dataclass, field
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
from training import data, entry, ranks, settings
from training.files import save
from training.logs import write_json
from training.loop import autocast, evaluate, reestimate_bn, sample_loss
from training.optimizers import SCHEDULES, schedule_of
from training.settings import number
from twa import TWA, best_start, rate_of
from twa.files.checkpoints import load_into
from utils import UserError

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = ("PreResNet20", "studies.architectures:vgg")
BATCH = 128  # images a step, of all ranks together
SAVES = 5  # checkpoints an epoch of the head
WARM_UP = 4  # steps that are not timed; PowerSGD compresses from the third on


@dataclass(frozen=True)
class Wire:
    """What joins the hosts: bits a second, and seconds that a packet takes; None and 0: no limit.

    The delay is half of what `ping` shows.
    """

    rate: float | None = None
    delay: float = 0.0


WIRES = {
    "no limit": Wire(),
    "1 Gbit/s": Wire(1e9),
    "100 Mbit/s": Wire(1e8),
    "10 Mbit/s": Wire(1e7),
    "100 Mbit/s, 50 ms": Wire(1e8, 0.025),
}


def parse_arguments() -> argparse.Namespace:
    parser = settings.Parser(__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--archs", nargs="+", default=ARCHITECTURES, help="architectures")
    add("--ways", nargs="+", default=tuple(WAYS), choices=tuple(WAYS), help="ways to train")
    add("--wires", nargs="+", default=tuple(WIRES), choices=tuple(WIRES), help="between the hosts")
    add("--images", type=number(int, 1), default=60_000, help="training images")
    add("--test-images", type=number(int, 1), default=10_000, help="test images")
    add("--head", type=number(int, 1), default=6, help="epochs of the head")
    add("--epochs", type=number(float, 0), default=2.0, help="epochs of each way")
    add("--every", type=number(int, 1), default=100, help="steps between two tests")
    add("--steps-only", action="store_true", help="measure steps, and train nothing to its end")
    add("--seconds", type=number(float, 0), default=15.0, help="to time a cell for, about")
    add("--data-dir", default="./datasets", help="where FashionMNIST lies or is unpacked to")
    add("--work", default="./results/network", help="where the heads are kept")
    add("--out", default=ROOT / "benchmarks", type=Path, help="where the results are written")
    add("--cell", nargs=3, help=argparse.SUPPRESS)  # of a rank: architecture, way, wire
    return parser.parse_args()


def main():
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
            curve = [CURVE] if WAYS[way].curve and not args.steps_only else []
            for wire in [*curve, *args.wires]:
                cell = cells.setdefault(way, {})
                if wire not in cell:
                    cell[wire] = launch(arch, way, wire)
                    write_json(results, path)
                    told = {k: v for k, v in cell[wire].items() if k != CURVE}
                    print(f"{arch}: {way}: {wire}: {told}", flush=True)
    write_report(results, args.out)


def prepare(args: argparse.Namespace, arch: str) -> None:
    """Trains the head of an architecture, unless it stands, and finds its best mean."""
    folder = head_of(args, arch)
    if (folder / "start.pt").exists():
        return
    command = [sys.executable, ROOT / "train_sgd_cifar.py", "--datasets", "FashionMNIST", "--amp"]
    command += ["--model-factory" if ":" in arch else "--arch", arch, "--batch-size", BATCH]
    command += ["--epochs", args.head, "--saves-per-epoch", SAVES, "--schedule", "constant"]
    command += ["--images", args.images, "--data-dir", args.data_dir, "-p", 1000]
    command += ["--save-dir", folder, "--log-dir", folder, "--resume"]
    subprocess.run([str(word) for word in command], cwd=ROOT, check=True)
    train, _ = loaders(args)
    model = models.build(arch, 10, 1, 28)
    start, _ = best_start(model, window_of(args, arch), lambda: sample_loss(model, train, True))
    save(start, folder / "start.pt")


def head_of(args: argparse.Namespace, arch: str) -> Path:
    return Path(args.work).resolve() / f"{arch.rpartition(':')[2]}.{args.images}.{args.head}"


def window_of(args: argparse.Namespace, arch: str) -> list[Path]:
    return [head_of(args, arch) / f"{i}.pt" for i in range(1, args.head * SAVES + 1)]


def loaders(args: argparse.Namespace) -> tuple[data.Loader, data.Loader]:
    """This rank's shares of the training and the test images."""
    train, test = data.load("FashionMNIST", args.data_dir, torch.device("cpu"))
    among = {"rank": ranks.rank(), "world": ranks.world(), "channels_last": True}
    return (
        data.Loader(train.part(slice(args.images)), BATCH, train=True, **among),
        data.Loader(test.part(slice(args.test_images)), 1000, train=False, **among),
    )


# --- the hosts ---


def check_system() -> None:
    """Raises a `UserError` where hosts cannot be laid."""
    missing = [name for name in ("ip", "tc") if not shutil.which(name)]
    if missing:
        raise UserError(f"{' and '.join(missing)} not found: install Debian's iproute2")
    if os.geteuid() != 0:
        raise UserError("network namespaces need root: start it as root")


def ip(*words: object) -> str:
    return subprocess.run(
        ["ip", *map(str, words)], check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def inside(host: str, *words: object) -> list[str]:
    """The command that runs `words` on a host."""
    return ["ip", "netns", "exec", host, *map(str, words)]


@contextlib.contextmanager
def hosts(wire: Wire) -> Iterator[list[str]]:
    """Two hosts, 10.0.0.1 and 10.0.0.2, whose interfaces `wire` are joined; gone at the end."""
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
        if wire.delay:
            stack.enter_context(delayed(names, wire.delay))
        else:
            peer = ("peer", "name", "wire", "netns", names[1])
            ip("link", "add", "wire", "netns", names[0], "type", "veth", *peer)
        for host, name in enumerate(names, start=1):
            ip("-n", name, "address", "add", f"10.0.0.{host}/24", "dev", "wire")
            ip("-n", name, "link", "set", "wire", "up")
            if wire.rate:
                # What may pass at once: as much as the wire carries in a tick of the kernel.
                burst = max(3200, round(wire.rate / 8 / 250))
                limit = ("rate", f"{wire.rate:.0f}bit", "burst", burst, "latency", "100ms")
                command = inside(name, "tc", "qdisc", "add", "dev", "wire", "root", "tbf", *limit)
                subprocess.run(command, check=True)
        yield names


@contextlib.contextmanager
def delayed(names: list[str], seconds: float) -> Iterator[None]:
    """Joins the hosts by threads that hold each packet back: many kernels have no `netem`."""
    ends = []
    for host, name in enumerate(names):
        end = os.open("/dev/net/tun", os.O_RDWR)
        no_header, tun = 0x1000, 0x0001  # IFF_NO_PI, IFF_TUN; below, TUNSETIFF
        fcntl.ioctl(end, 0x400454CA, struct.pack("16sH14x", b"twa%d" % host, no_header | tun))
        ip("link", "set", f"twa{host}", "netns", name)
        ip("-n", name, "link", "set", f"twa{host}", "name", "wire", "mtu", 9000)
        ends.append(end)

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
    each, count = WAYS[way].ranks, WAYS[way].hosts
    with contextlib.ExitStack() as stack:
        names = stack.enter_context(hosts(WIRES.get(wire, Wire())))
        processes = []
        for rank in range(count * each):
            environment = os.environ | {
                "MASTER_ADDR": "10.0.0.1",
                "MASTER_PORT": "29500",
                "GLOO_SOCKET_IFNAME": "wire",
                "RANK": str(rank),
                "WORLD_SIZE": str(count * each),
                "LOCAL_RANK": str(rank % each),
                "LOCAL_WORLD_SIZE": str(each),
                "OMP_NUM_THREADS": "1",
                "TORCH_CPP_LOG_LEVEL": "ERROR",  # Hosts without names are told of, again and again.
            }
            own = [sys.executable, *sys.argv, "--cell", arch, way, wire]
            process = subprocess.Popen(
                inside(names[rank // each], *own),
                env=environment,
                stdout=subprocess.DEVNULL if rank else subprocess.PIPE,
                text=True,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes.append(process)
        while (codes := [process.poll() for process in processes]) != [0] * len(processes):
            if any(codes):
                raise UserError(f"{arch}, {way}, {wire}: a rank failed, see above")
            time.sleep(0.1)
        return json.loads(processes[0].stdout.read().splitlines()[-1])


# --- a rank ---


@dataclass
class Trained:
    """A model in training, as a way made it.

    Attributes:
        model: what is tested.
        optimizer: its groups' rates are scheduled.
        forward: what is called in place of the model; None: the model itself.
        average: what local SGD does after every `period` steps.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    forward: nn.Module | None = None
    average: Callable[[], None] = lambda: None
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
    device = torch.device("cpu")
    ranks.start(device)
    train, test = loaders(args)
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
        results[CURVE] = curve(args, trained, train, test, args.epochs * WAYS[way].times)
    else:
        results |= cost_of_step(args, trained, train)
    if ranks.rank() == 0:
        print(json.dumps(results))


def curve(
    args: argparse.Namespace,
    trained: Trained,
    train: data.Loader,
    test: data.Loader,
    epochs: float,
) -> list[dict]:
    """Trains to the end; the tests on the way."""
    steps = max(1, round(epochs * len(train)))
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


def cost_of_step(args: argparse.Namespace, trained: Trained, train: data.Loader) -> dict:
    """The seconds that a step takes, and the bytes that a rank sends in it."""
    batches = train.endless()
    trained.model.train()
    results = {"seconds": 0.0, "bytes": 0.0}

    def step() -> None:
        trained.step(*next(batches))

    parts = [(step, 1)]
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


# --- the ways ---


def sgd(model: nn.Module) -> torch.optim.SGD:
    """On all weights, at half the rate of the head, as the rivals in docs/RESULTS.md."""
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)


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
    model = ranks.shard(model, torch.device("cpu"))
    return Trained(model, TWA(model, window, start=start))


def replicated(model: nn.Module, window: list[Path], start: Path, **arguments) -> Trained:
    """TWA on a whole model on each rank."""
    everyone = dist.group.WORLD
    return Trained(model, TWA(model, window, start=start, process_group=everyone, **arguments))


def hybrid(model: nn.Module, window: list[Path], start: Path) -> Trained:
    """TWA on a model that is sharded within a host and replicated between hosts."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = ranks.shard(model, torch.device("cpu"), mesh=mesh["shard"])
    group = mesh.get_group("replicate")
    return Trained(model, TWA(model, window, start=start, process_group=group))


@dataclass(frozen=True)
class Way:
    """A way to train.

    Attributes:
        make: makes a `Trained` of the model at the start point, the window and the start's file.
        curve: whether its accuracy is measured.
        times: how many times the epochs of the others.
        ranks, hosts: how many ranks on how many hosts.
    """

    make: Callable[..., Trained] = field(repr=False)
    curve: bool = True
    times: int = 1
    ranks: int = 1
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
    entry.run(main)
