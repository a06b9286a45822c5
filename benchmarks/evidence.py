"""Does it hold, and how well: the studies behind RESULTS.md, each part alone and resumable.

    python evidence.py head --data FashionMNIST-12k --arch PreResNet20 --seed 1
    python evidence.py rates --data FashionMNIST-12k --arch PreResNet20 --seed 1
    python evidence.py report            RESULTS.md and its figures, from results/*.json

`bash evidence.sh` runs everything. A part trains what it needs with the project's own scripts,
below results/evidence, and adds what it measures to `results/PART.DATA.ARCH.SEED.json`, one entry
after the other; entries that stand are not made again. Test data choose nothing.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import evidence_report
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import utils
from engine import SCHEDULES, autocast, device_of, evaluate, reestimate_bn, schedule_of, set_up
from train_twa import safe_rate
from twa import TWA
from twa.checkpoints import Checkpoint, average, load_into, load_state_dict

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent

DATA = {"FashionMNIST": None, "FashionMNIST-12k": 12_000}  # images of the training set; None: all
EPOCHS, HEAD = 24, 12  # of the full run, and of those that leave the checkpoints
SAVES = 5  # an epoch
BUDGETS = (0.1, 0.2, 0.5, 1, 2, 5)  # epochs more
SQUEEZED = (
    1,
    2,
    5,
)  # of these, where the whole schedule is squeezed in: scripts train whole epochs


def main():
    parser = utils.Parser("the studies behind RESULTS.md")
    parser.add_argument("part", choices=(*PARTS, "report"))
    parser.add_argument("--data", choices=DATA, default="FashionMNIST-12k", help="training set")
    parser.add_argument("--arch", default="PreResNet20", help="architecture")
    parser.add_argument("--seed", type=int, default=1, help="of the run and of all that follows")
    parser.add_argument("--data-dir", default=str(ROOT / "datasets"), help="where data sets lie")
    args = parser.parse_args()
    if args.part == "report":
        evidence_report.write(HERE / "results", ROOT / "RESULTS.md")
    else:
        PARTS[args.part](Bench(args))


class Bench:
    """A finished SGD run, its checkpoints, the data, and the measurements that stand.

    Attributes:
        window: the checkpoints of the head, five an epoch, without the initialisation.
        model, train, test: what is trained and measured.
    """

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.folder = ROOT / "results/evidence" / f"{args.data}.{args.arch}.{args.seed}"
        self.path = HERE / "results" / f"{args.part}.{args.data}.{args.arch}.{args.seed}.json"
        self.path.parent.mkdir(exist_ok=True)
        self.records = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.sgd(EPOCHS, SAVES)
        checkpoints = self.folder / f"sgd{EPOCHS}"
        self.window = [checkpoints / f"{i}.pt" for i in range(1, HEAD * SAVES + 1)]
        utils.set_seed(args.seed)
        self.model, self.train, self.test = set_up(
            argparse.Namespace(
                **{"arch": args.arch, "data_dir": args.data_dir, "images": DATA[args.data]},
                **{"datasets": args.data.partition("-")[0], "batch_size": 128},
                **{"randomseed": args.seed, "amp": True, "split": False, "randaugment": 0},
                **{"device": None, "compile": False, "wandb": False},
            )
        )

    def sgd(self, epochs: int, saves: int) -> list[dict]:
        """The metrics of a whole SGD run of so many epochs, trained unless it stands."""
        folder, args = self.folder / f"sgd{epochs}", self.args
        images = DATA[args.data]
        metrics = utils.read_metrics(folder / "metrics.jsonl")
        if len(metrics) < epochs:
            command = [sys.executable, ROOT / "train_sgd_cifar.py", "--arch", args.arch, "--amp"]
            command += ["--datasets", args.data.partition("-")[0], "--data-dir", args.data_dir]
            command += ["--images", images] if images else []
            command += ["--epochs", epochs, "--saves-per-epoch", saves, "--randomseed", args.seed]
            command += ["--save-dir", folder, "--log-dir", folder, "-p", 1000, "--resume"]
            subprocess.run([str(word) for word in command], check=True)
            metrics = utils.read_metrics(folder / "metrics.jsonl")
        return metrics

    def measure(self, name: str, make: Callable[[], dict]) -> None:
        """Adds the entry `name`, unless it stands."""
        if name not in self.records:
            self.records[name] = make()
            utils.write_json(self.records, self.path)
            print(f"{self.path.stem}: {name}: {self.records[name]}", flush=True)

    def mean(self, count: int) -> dict[str, Tensor]:
        """The mean of the window's last checkpoints."""
        return average(self.window[-count:])

    def tested(self) -> dict:
        """Test loss and accuracy of the model's weights, batch norm re-estimated."""
        reestimate_bn(self.model, self.train, amp=True)
        return evaluate(self.model, self.test, amp=True)

    def solution(self, checkpoint: Checkpoint) -> dict:
        """What weights that are there are worth."""
        load_into(self.model, checkpoint)
        return self.tested() | {"epochs": HEAD}

    def trained(self, method: "Method", epochs: float) -> dict:
        """What is made of the method's start point in so many epochs more."""
        load_into(self.model, self.mean(method.start))
        started = time.perf_counter()
        optimizer = method.optimizer(self)
        built = time.perf_counter() - started
        steps = max(1, round(epochs * len(self.train)))
        loss = train(self.model, self.train, optimizer, steps, method.schedule)
        seconds = time.perf_counter() - started
        rate = optimizer.defaults["lr"]
        return self.tested() | {
            **{"epochs": HEAD + epochs, "train_loss": loss, "seconds": seconds, "build": built},
            **({"lr": rate} if rate else {}),
        }


def train(
    model: nn.Module, loader, optimizer: torch.optim.Optimizer, steps: int, schedule: str
) -> float:
    """So many steps, from epoch 1 of the loader on; returns the mean loss of the last tenth."""
    scheduler = schedule_of(SCHEDULES[schedule], optimizer, steps)
    device, losses, epoch = device_of(model), [], 0
    model.train()
    while len(losses) < steps:
        epoch += 1
        loader.set_epoch(epoch)
        for images, labels in loader:
            with autocast(device, True):
                loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            losses.append(loss.detach())
            if len(losses) == steps:
                break
    return float(torch.stack(losses[-max(1, steps // 10) :]).mean())


@dataclass(frozen=True)
class Method:
    """A way to spend epochs: `optimizer(bench)` steps on the weights of the start point.

    `start` is the number of checkpoints, the window's last, whose mean the start point is.
    """

    start: int
    optimizer: Callable[[Bench], torch.optim.Optimizer]
    schedule: str = "linear"


def sgd(bench: Bench) -> torch.optim.Optimizer:
    return torch.optim.SGD(bench.model.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)


def twa(
    base: type = torch.optim.SGD,
    start: int = 10,
    lr: float | None = None,
    factor: float = 1,
    **basis,
) -> Callable[[Bench], TWA]:
    """TWA over the whole window, at `lr`, or at `factor` times the default rate."""

    def make(bench: Bench) -> TWA:
        momentum = {"momentum": 0.9} if base is torch.optim.SGD else {}
        optimizer = TWA(
            *(bench.model, bench.window, base),
            **{"start": bench.mean(start), "lr": 0.0, "weight_decay": 1e-5} | momentum | basis,
        )
        rate = lr or factor * safe_rate(
            optimizer, bench.model, bench.train, momentum.get("momentum"), amp=True
        )
        optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] = rate
        return optimizer

    return make


CHANNEL = {"granularity": "channel"}
METHODS = {
    "SGD, decaying, from the last checkpoint": Method(1, sgd),
    "SGD, decaying, from the mean of the last 10": Method(10, sgd),
    "TWA": Method(10, twa()),
    "TWA by layer": Method(10, twa(granularity="layer")),
    "TWA by channel": Method(10, twa(**CHANNEL)),
    "TWA by channel, 12 directions": Method(10, twa(**CHANNEL, extract="SVD", components=12)),
    "TWA by channel, AdamW": Method(10, twa(torch.optim.AdamW, **CHANNEL)),
}


def head(bench: Bench) -> None:
    """The head stage: TWA and its rivals at equal budgets, from the same twelve epochs."""
    full = bench.sgd(EPOCHS, SAVES)
    curve = [{key: m[key] for key in ("epoch", "test_accuracy", "test_loss")} for m in full]
    seconds = sum(m["seconds"] for m in full) / EPOCHS
    bench.measure("SGD", lambda: {"curve": curve, "epoch_seconds": seconds})
    bench.measure("last checkpoint", lambda: bench.solution(bench.window[-1]))
    for count in (5, 10, len(bench.window)):
        name = f"mean of the last {count}" if count < len(bench.window) else "SWA"
        bench.measure(name, lambda count=count: bench.solution(bench.mean(count)))
    bench.measure("EMA", lambda: bench.solution(ema(bench.window)))
    for budget in BUDGETS:
        for name, method in METHODS.items():
            bench.measure(
                f"{name} | {budget:g}",
                lambda method=method, budget=budget: bench.trained(method, budget),
            )
        if budget in SQUEEZED:
            bench.measure(
                f"SGD, whole schedule | {budget:g}",
                lambda budget=budget: of_run(bench.sgd(HEAD + budget, 1)),
            )


def ema(window: list[Path], decay: float = 0.9) -> dict[str, Tensor]:
    """The exponential moving average over the checkpoints, five an epoch."""
    state = load_state_dict(window[0])
    total = {k: v.double() if v.is_floating_point() else v for k, v in state.items()}
    for path in window[1:]:
        for key, value in load_state_dict(path).items():
            if value.is_floating_point():
                total[key] = decay * total[key] + (1 - decay) * value
    return {key: value.to(state[key].dtype) for key, value in total.items()}


def of_run(metrics: list[dict]) -> dict:
    """The end of an SGD run as an entry."""
    last = metrics[-1]
    seconds = sum(m["seconds"] for m in metrics)
    results = {"loss": last["test_loss"], "accuracy": last["test_accuracy"]}
    return results | {"epochs": last["epoch"], "seconds": seconds}


def rates(bench: Bench) -> None:
    """How far the default rate of the coefficients is from the best, over three decades."""
    kinds = {
        "SGD": twa,
        "SGD by layer": lambda **o: twa(**o, granularity="layer"),
        "SGD by channel": lambda **o: twa(**o, **CHANNEL),
        "AdamW": lambda **o: twa(torch.optim.AdamW, **o),
        "AdamW by layer": lambda **o: twa(torch.optim.AdamW, **o, granularity="layer"),
        "AdamW by channel": lambda **o: twa(torch.optim.AdamW, **o, **CHANNEL),
    }
    for name, make in kinds.items():
        for factor in (1 / 32, 1 / 10, 1 / 3.2, 1, 3.2, 10, 32):
            method = Method(10, make(factor=factor))
            bench.measure(f"{name} | {factor:.3g}", lambda m=method: bench.trained(m, 1))


PARTS = {"head": head, "rates": rates}

if __name__ == "__main__":
    utils.run(main)
