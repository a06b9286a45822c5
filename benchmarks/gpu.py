"""What a machine with an accelerator shows: tests, basis, steps and bfloat16, in one JSON file.

    python benchmarks/gpu.py --out gpu.json

It is meant to take less than 20 minutes on one GPU, and has not run on one yet. Every time is a
ratio to another one of the same run. The file is written after each part, so what is measured stays
if a later part fails.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from subspace import time_in_turns

import models
from training.files import write_json
from training.settings import Parser
from twa import TWA

ROOT = Path(__file__).resolve().parents[1]
# The files whose tests use an accelerator where there is one.
TESTS = ("test_accelerator.py", "test_subspace.py", "test_checkpoint_kinds.py")


def main():
    parser = Parser(__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON file")
    parser.add_argument("--device", default=None, help="default: the accelerator")
    parser.add_argument("--checkpoints", type=int, default=100, help="of the bases")
    parser.add_argument("--weights", type=int, default=10_000_000, help="of the bases, about")
    parser.add_argument("--repeats", type=int, default=51, help="of each step; the median counts")
    parser.add_argument(
        "--seeds", type=int, default=3, help="of the runs with and without bfloat16"
    )
    args = parser.parse_args()
    args.device = args.device or str(torch.accelerator.current_accelerator() or "cpu")
    found = {"device": name_of(args.device), "torch": torch.__version__}
    for part in (tests, basis, steps, bfloat16):
        found[part.__name__] = part(args)
        write_json(found, args.out)
        print(part.__name__, json.dumps(found[part.__name__], indent=1), flush=True)


def name_of(device: str) -> str:
    module = torch.get_device_module(device)
    return module.get_device_name() if hasattr(module, "get_device_name") else device


def tests(args) -> dict[str, int]:
    """How many tests passed, failed and were skipped."""
    files = [ROOT / "tests" / name for name in TESTS]
    done = run("-m", "pytest", "-q", "-n", "2", *files, check=False)
    return {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|skipped)", done)}


def basis(args) -> list[str]:
    """The table of `benchmarks/subspace.py`, with the release's way in its first row."""
    size = ["--checkpoints", args.checkpoints, "--weights", args.weights]
    table = run(ROOT / "benchmarks/subspace.py", "--device", args.device, *size)
    return table.splitlines()


def run(*command, check: bool = True) -> str:
    """What the command of Python printed."""
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True
    )
    if check and done.returncode:
        sys.exit(done.stderr)
    return done.stdout


def steps(args) -> dict[str, float]:
    """Seconds of a training step of PreResNet20, over those of SGD."""
    images, labels = torch.randn(128, 3, 32, 32, device=args.device), torch.arange(128) % 10
    labels = labels.to(args.device)
    model = models.build("PreResNet20", 10, 3, 32)
    states = []
    for _ in range(20):
        states.append(
            {k: v + 0.01 * torch.randn_like(v.float()) for k, v in model.state_dict().items()}
        )
    model.to(args.device)

    def step_of(optimizer) -> Callable[[], None]:
        def step():
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    makers = {"SGD": lambda: torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)}
    makers["the paper's release"] = lambda: Release(model, states)
    for granularity in ("model", "channel"):
        for bits in (32, 8, 4):
            how = {"granularity": granularity, "bits": bits}
            makers[f"TWA by {granularity}, {bits} bits"] = lambda how=how: TWA(model, states, **how)
    turns = {name: step_of(make()) for name, make in makers.items()}
    medians = time_in_turns(args, turns)
    return {name: round(median / medians["SGD"], 3) for name, median in medians.items()}


class Release:
    """A step as the paper's release takes it: a dense basis, and loops over the parameters."""

    def __init__(self, model: nn.Module, states: list[dict]):
        self._parameters = list(model.parameters())
        names = [name for name, _ in model.named_parameters()]
        rows = torch.stack([torch.cat([s[n].flatten() for n in names]) for s in states])
        basis = torch.linalg.qr(rows.T).Q.T.contiguous()  # exact, as only its products are timed
        self._basis = basis.to(self._parameters[0].device)

    def step(self) -> None:
        gradient = torch.cat([p.grad.flatten() for p in self._parameters])
        gradient = self._basis.T @ (self._basis @ gradient)
        begin = 0
        for parameter in self._parameters:
            part = gradient[begin : begin + parameter.numel()]
            parameter.data.add_(part.view_as(parameter), alpha=-1e-3)
            begin += parameter.numel()

    def zero_grad(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None


def bfloat16(args) -> dict[str, dict[str, list[float]]]:
    """Test loss and accuracy of TWA on Digits, for each seed, in float32 and with autocast."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, flags in (("float32", []), ("bfloat16", ["--amp"])):
            results = []
            for seed in range(1, args.seeds + 1):
                out = Path(folder, f"{name} {seed}")
                common = ["--datasets", "Digits", "--arch", "PreResNet20", *flags]
                common += ["--randomseed", seed]
                common += ["--device", args.device, "--save-dir", out, "--log-dir", out]
                run("train_sgd_cifar.py", *common, "--epochs", 10, "--lr", 0.1)
                run("train_twa.py", *common, "--epochs", 5, "--params_start", 0, "--params_end", 11)
                results.append(json.loads((out / "twa/twa.json").read_text())["results"]["TWA"])
            found[name] = {key: [r[key] for r in results] for key in ("loss", "accuracy")}
    return found


if __name__ == "__main__":
    main()
