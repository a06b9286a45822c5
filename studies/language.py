"""The language-model study: what a few percent of a run are worth, spent in many ways.

    python language.py measure --text linux --seed 4 [--parts core]   adds to lm/linux/seed4.json
    python language.py report                                         the tables and figures

A run of 4,000 steps at a constant rate (`lm/train.py`) leaves a checkpoint every 25 steps. All that
follows begins from these or from its saved state and trains on the same batches, one setting after
the other; an entry that is there is not measured again. Seconds are those of the processor, on one
thread. The start and the end of TWA are chosen by training text, the rates and shapes of the rivals
by the validation text of the first seed of each text. TWA's own defaults were found on `python`
(seeds 1 to 3); `linux` (seeds 4 to 6) was measured once, after that.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import language_report
import numpy as np
import torch
from language_report import BUDGETS, SPACING, STEPS, WHOLE, WINDOW, of_decay
from study import ROOT, ema, fit, weighted
from torch import Tensor, nn

import utils
from training import entry, logs, text
from training.coefficients import LateMean, averaging_weights, keep_best
from training.loop import build, evaluate, sample_loss
from training.settings import Parser
from twa import TWA, best_start, rate_of
from twa.files.checkpoints import Checkpoint, average, load_into
from twa.files.formats import load

RESULTS = ROOT / "studies/lm"
# The folder of each text, and the seed that its rates are tuned with, which is measured first.
# None: Python's standard library; the other is of Debian's package linux-doc-6.1.
TEXTS = {"python": (None, 1), "linux": (Path("/usr/share/doc/linux-doc-6.1/html/_sources"), 4)}
EVERY, BATCH, RATE, DECAY = 25, 8, 2e-3, 0.1  # of the run
SOME = (20, 100, 400)
FACTORS = (1, 1 / 3.2, 1 / 10, 1 / 32)  # of the rival's rate
SHAPES = ("linear", "1-sqrt")
TESTED, TUNED_ON = 1024, 512  # windows of text that solutions and rates are judged by


class Evenly(text.Loader):
    """Windows of a text that lie evenly over all of it."""

    def __init__(self, split: text.Split, windows: int, device: torch.device):
        super().__init__(split, 32, train=False, device=device)
        self._stride = max(1, self.count // windows)
        self.count //= self._stride

    def _starts(self) -> np.ndarray:
        return super()._starts() * self._stride


class Bench:
    """A finished run, its checkpoints and its state, the text, and what was measured so far.

    Args:
        text_name: one of `TEXTS`.
        runs: the folder of the runs, one for each text and seed; trained if it is not there.
        arch, device: as of `lm/train.py`.
    """

    def __init__(self, text_name: str, seed: int, runs: Path, arch: str, device: str | None):
        folder, first = TEXTS[text_name]
        name = "seed{}" if arch == "gpt" else arch + ".seed{}"
        self._folder = runs / text_name / name.format(seed)
        self.path = RESULTS / text_name / f"{name.format(seed)}.json"
        # Whose rates are tuned; None for the first seed itself.
        self.first = self.path.with_name(f"{name.format(first)}.json") if seed != first else None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.records = logs.read_json(self.path)
        if not self.checkpoint(STEPS).exists():
            command = [sys.executable, ROOT / "lm/train.py", "--dir", self._folder]
            command += ["--steps", STEPS, "--save-every", EVERY, "--test-every", 2000]
            command += ["--batch-size", BATCH, "--lr", RATE, "--amp"]
            command += ["--seed", seed, "--arch", arch, "--resume"]
            command += ["--device", device] if device else []
            command += ["--data-dir", folder] if folder else []
            subprocess.run([str(word) for word in command], check=True)
        utils.set_seed(seed)
        self.device = utils.choose_device(device)
        train, validation, test = text.load(folder, text.Vocabulary(), text.TextSettings.context)
        # Other draws than the run's, whose text it has seen just before.
        drawn = {"train": True, "steps": max(BUDGETS), "seed": 1000 + seed, "device": self.device}
        self.train = text.Loader(train, BATCH, **drawn)
        self.test = Evenly(test, TESTED, self.device)
        self.validation = Evenly(validation, TUNED_ON, self.device)
        self.model = build(arch, train.spec, self.device, amp=True)
        self._starts: dict[tuple[Path, ...], tuple[Checkpoint, dict[int, float], float]] = {}

    def checkpoint(self, step: int) -> Path:
        return self._folder / "checkpoints" / f"{step // EVERY}.pt"

    def window(self, count: int = WINDOW, spacing: int = SPACING) -> list[Path]:
        """The last `count` checkpoints, `spacing` steps from one to the next."""
        steps = range(STEPS - (count - 1) * spacing, STEPS + 1, spacing)
        return [self.checkpoint(step) for step in steps]

    @cached_property
    def moments(self) -> dict:
        """The state of AdamW at the end of the run."""
        return load(self._folder / "checkpoints/state.pt")["optimizer"]["state"]

    def best(self, window: Sequence[Path]) -> tuple[Checkpoint, dict[int, float], float]:
        """The best mean of the last checkpoints, the losses compared for it, and the seconds."""
        key = tuple(window)
        if key not in self._starts:
            started = time.process_time()
            start, losses = best_start(self.model, window, self.sample_loss)
            self._starts[key] = start, losses, time.process_time() - started
        return self._starts[key]

    def sample_loss(self, last: bool = False) -> float:
        return sample_loss(self.model, self.train, True, last)

    def measure(self, name: str, make: Callable[[], dict]) -> None:
        """Adds what `make` returns, and the losses of the model then, unless there is the entry."""
        if name in self.records:
            return
        made = make()
        tested = self.test.measures(evaluate(self.model, self.test, amp=True))
        validated = evaluate(self.model, self.validation, amp=True)["loss"]
        measured = made | {"loss": tested["loss"], "validation_loss": validated}
        self.records[name] = {key: rounded(value) for key, value in measured.items()}
        logs.write_json(self.records, self.path)
        print(f"{self.path.stem}: {name}: {tested['loss']:.4f}", flush=True)

    def solution(self, name: str, checkpoint: Callable[[], Checkpoint], **known) -> None:
        """The entry of a checkpoint, or of an average that needs no training."""

        def make() -> dict:
            load_into(self.model, checkpoint())
            return {"steps": 0} | known

        self.measure(name, make)

    def fitted(self, optimizer: torch.optim.Optimizer, steps: int, shape: str) -> None:
        fit(self.model, self.train, optimizer, steps, shape)

    def twa(self, name: str, steps: int, window: list[Path], **arguments) -> None:
        """The entry of TWA as it is by default: nothing is tuned."""

        def make() -> dict:
            start, starts, choosing = self.best(window)
            started = time.process_time()
            optimizer = TWA(self.model, window, start=start, lr=rate_of(steps), **arguments)
            building, late = time.process_time() - started, LateMean(optimizer, steps)
            self.fitted(optimizer, steps, "linear")
            training = time.process_time() - started - building
            ends = keep_best(optimizer, late, lambda: self.sample_loss(last=True))
            choosing += time.process_time() - started - building - training
            return {
                "steps": steps,
                "seconds": {"choosing": choosing, "building": building, "training": training},
                "starts": {str(count): loss for count, loss in starts.items()},
                "ends": ends,
                "coefficients": len(optimizer.coefficients),
                "averaging_weights": averaging_weights(optimizer),
            }

        self.measure(name, make)

    def decay(self, name: str, steps: int, shape: str, start: str, factor: float = 1) -> None:
        """The entry of AdamW on all weights, with a falling rate and the moments of the run.

        Args:
            start: "last", or "mean" for the best mean.
        """

        def make() -> dict:
            choosing = 0.0
            if start == "mean":
                mean, _, choosing = self.best(self.window())
                load_into(self.model, mean)
            else:
                load_into(self.model, self.checkpoint(STEPS))
            started = time.process_time()
            optimizer = torch.optim.AdamW(
                self.model.parameters(), RATE * factor, weight_decay=DECAY
            )
            groups = optimizer.state_dict()["param_groups"]
            moments = copy.deepcopy(self.moments)  # which the steps change in place
            optimizer.load_state_dict({"state": moments, "param_groups": groups})
            clip(optimizer, list(self.model.parameters()))
            self.fitted(optimizer, steps, shape)
            training = time.process_time() - started
            return {"steps": steps, "seconds": {"choosing": choosing, "training": training}}

        self.measure(name, make)


def clip(optimizer: torch.optim.Optimizer, parameters: list[Tensor]) -> None:
    """Clips the gradient before each step, as the run does."""

    def before(*_) -> None:
        nn.utils.clip_grad_norm_(parameters, 1.0)

    optimizer.register_step_pre_hook(before)


def rounded(value):
    """`value` with its numbers rounded to what a table or a figure shows."""
    if isinstance(value, float):
        return round(value, 5)
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list) else value


def averages(bench: Bench) -> None:
    """The averages that need no training: means (LAWA), EMA, and WSM's coefficients of a decay."""
    bench.solution("last", lambda: bench.checkpoint(STEPS))
    for count in (2, 4, 8, 10, 16, 32, 60):
        bench.solution(f"mean | {count}", lambda count=count: average(bench.window(count)))
    window = bench.window()
    for rate in (0.8, 0.9, 0.95):
        alpha = ema(rate, len(window))
        bench.solution(f"EMA | {rate}", lambda alpha=alpha: weighted(window, alpha))
    for count in (8, 16, 32, 60):
        alpha = of_decay("1-sqrt", count)
        name = f"WSM, 1-sqrt | {count}"
        bench.solution(name, lambda alpha=alpha, count=count: weighted(bench.window(count), alpha))


def core(bench: Bench, budgets: Sequence[int]) -> None:
    """TWA and the decays at the run's own rate, at every budget: nothing is tuned."""
    averages(bench)
    for steps in budgets:
        for granularity in ("model", "channel", "layer") if steps in SOME else ("model", "channel"):
            name = f"TWA by {granularity} | {steps}"
            bench.twa(name, steps, bench.window(), granularity=granularity)
        for start in ("last", "mean"):
            for shape in SHAPES:
                bench.decay(name_of(shape, start, 1, steps), steps, shape, start)


def name_of(shape: str, start: str, factor: float, steps: int) -> str:
    return f"decay, {shape}, from the {start}, rate x {factor:.3g} | {steps}"


def tuned(bench: Bench, budgets: Sequence[int]) -> None:
    """The decays again at lower rates; seeds other than the first take what that one chose."""
    for steps in budgets:
        tried = {
            name_of(shape, start, factor, steps): (shape, start, factor)
            for start in ("mean", "last")
            for shape in SHAPES
            for factor in (FACTORS if start == "mean" else FACTORS[:2])
        }
        if bench.first:
            first = json.loads(bench.first.read_text())
            for start in ("mean", "last"):
                known = [name for name in tried if tried[name][1] == start and name in first]
                if known:
                    name = min(known, key=lambda name: first[name]["validation_loss"])
                    bench.decay(name, steps, *tried[name])
            continue
        for name, (shape, start, factor) in tried.items():
            bench.decay(name, steps, shape, start, factor)


def settings(bench: Bench) -> None:
    """Fewer directions, fewer bits."""
    for steps in SOME:
        for what, arguments in {"12 directions": {"components": 12}, "4 bits": {"bits": 4}}.items():
            for granularity in ("model", "channel"):
                name = f"TWA by {granularity}, {what} | {steps}"
                bench.twa(name, steps, bench.window(), granularity=granularity, **arguments)


def windows(bench: Bench) -> None:
    """How many checkpoints, and how far apart; 100 steps."""
    for spacing, counts in {50: (5, 10, 20, 40, 60), 25: (5, 10, 20, 40, 80, 120)}.items():
        for count in counts:
            for granularity in ("model", "channel"):
                name = f"TWA by {granularity}, {count} every {spacing} | 100"
                bench.twa(name, 100, bench.window(count, spacing), granularity=granularity)


def schedule_free(bench: Bench) -> None:
    """schedulefree's AdamW in place of the whole run, from the same start; needs the package."""

    def make() -> dict:
        import schedulefree

        load_into(bench.model, bench.checkpoint(0))
        parameters, settings = list(bench.model.parameters()), {"lr": RATE, "weight_decay": DECAY}
        optimizer = schedulefree.AdamWScheduleFree(parameters, warmup_steps=100, **settings)
        clip(optimizer, parameters)
        optimizer.train()
        started = time.process_time()
        bench.fitted(optimizer, STEPS, "constant")
        optimizer.eval()
        return {"steps": 0, "seconds": {"training": time.process_time() - started}}

    bench.measure(WHOLE, make)


PARTS = {
    part.__name__.replace("_", "-"): part
    for part in (core, tuned, settings, windows, schedule_free)
}


def main():
    parser = Parser("the study of language models")
    parser.add_argument("what", choices=("measure", "report"))
    parser.add_argument("--text", choices=TEXTS, default="python", help="what the run learns")
    parser.add_argument("--seed", type=int, default=1, help="of the run and of all that follows")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=tuple(PARTS), help="what")
    parser.add_argument("--budgets", nargs="+", type=int, choices=BUDGETS, help="in core and tuned")
    parser.add_argument("--runs", type=Path, default=ROOT / "results/lm_study", help="the runs")
    parser.add_argument("--arch", default="gpt", help="model, by its name in models/gpt.py")
    parser.add_argument("--device", help="torch device; left out, the accelerator, else cpu")
    args = parser.parse_args()
    if args.what == "report":
        language_report.write(RESULTS, ROOT)
        return
    bench = Bench(args.text, args.seed, args.runs, args.arch, args.device)
    for part in args.parts:
        if part in ("core", "tuned"):
            PARTS[part](bench, args.budgets or BUDGETS)
        else:
            PARTS[part](bench)


if __name__ == "__main__":
    entry.run(main)
