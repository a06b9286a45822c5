"""The head stage: TWA and the baselines at equal budgets, after twelve epochs of SGD.

    python studies/head.py --arch PreResNet20 --seed 1
    python studies/head.py --part units --seed 4

A run trains what it needs with the project's own scripts, into results/evidence, and adds what it
measures to `results/PART.DATA.ARCH.SEED.json` beside this file, one entry after the other. The part
`units` chooses a setting, so it measures on training images that the run never saw.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import tables
from common import CPU, ROOT, Bench, Records, call_script, data, ema, images, sgd, weighted
from tables import EPOCHS, HEAD, IMAGES

from training.files import read_lines
from training.run import run_script
from training.settings import Parser
from twa.files.checkpoints import Checkpoint, average, load_into

RESULTS = ROOT / "studies/results"  # what was measured
WORK = ROOT / "results/evidence"  # checkpoints and logs
NAME = "FashionMNIST-12k"
SAVES, EVERY = 20, 4  # checkpoints an epoch, of which every fourth is in the window
BATCH = 128  # images a step
VALIDATION = 10_000  # training images, the last ones, that settings are chosen by
TUNED_ON = 4_000  # of these, the first ones, that the baseline's rate is tuned on
BUDGETS = (0.1, 0.2, 0.5, 1, 2, 5)  # epochs after the head
TUNED_RATES = (0.01, 0.02, 0.05, 0.1)
SQUEEZED = (1, 5)  # budgets at which SGD with its whole schedule is a baseline


class HeadBench(Bench):
    """A finished SGD run, its checkpoints, the data, and the measurements made so far.

    Args:
        part: one of `PARTS`.
        arch: an architecture that `training.loop.build` knows.
        seed: of the SGD run and of everything after it.
        data_dir: the folder of FashionMNIST.
    """

    def __init__(self, part: str, arch: str, seed: int, data_dir: Path):
        self.arch, self.seed, self.data_dir = arch, seed, data_dir
        study = f"{NAME}.{arch.rpartition(':')[2]}.{seed}"
        self._folder = WORK / study
        self.records = Records(RESULTS / f"{part}.{study}.json")
        if not all(path.exists() for path in self.window):
            self.sgd_run(EPOCHS, SAVES)
        training, test = data.load("FashionMNIST", data_dir, CPU)
        validation = training.part(slice(-VALIDATION, None))
        self.judge = images(validation if part == "units" else test, 1000, train=False)
        self.tuned_on = images(validation.part(slice(TUNED_ON)), 1000, train=False)
        train = images(training.part(slice(IMAGES)), BATCH, train=True, seed=seed)
        super().__init__(arch, train, seed)

    @property
    def window(self) -> list[Path]:
        numbers = range(EVERY, HEAD * SAVES + 1, EVERY)
        return [self._folder / f"sgd{EPOCHS}" / f"{i}.pt" for i in numbers]

    def sgd_run(self, epochs: int, saves: int) -> list[dict]:
        """The metrics of an SGD run with its whole schedule; trains it unless it is finished."""
        folder = self._folder / f"sgd{epochs}"
        metrics = read_lines(folder / "metrics.jsonl")
        if len(metrics) < epochs:
            model = ("--model-factory" if ":" in self.arch else "--arch", self.arch)
            call_script(
                *("train_sgd_cifar.py", "--datasets", "FashionMNIST", *model, "--amp"),
                *("--images", IMAGES, "--data-dir", self.data_dir, "--randomseed", self.seed),
                *("--batch-size", BATCH, "--epochs", epochs, "--saves-per-epoch", saves),
                *("--save-dir", folder, "--log-dir", folder, "--resume", "-p", 1000),
            )
            metrics = read_lines(folder / "metrics.jsonl")
        return metrics

    def sgd_end(self, epochs: int, saves: int) -> dict:
        """The entry of such a run, its last checkpoint measured as any other solution."""
        seconds = sum(m["seconds"] for m in self.sgd_run(epochs, saves))
        last = self._folder / f"sgd{epochs}" / f"{epochs * saves}.pt"
        return self.solution(last) | {"epochs": epochs, "seconds": seconds}

    def solution(self, checkpoint: Checkpoint) -> dict:
        """The entry of a checkpoint."""
        load_into(self.model, checkpoint)
        return self.measured(self.judge) | {"epochs": HEAD}

    def steps_of(self, epochs: float) -> int:
        return max(1, round(epochs * len(self.train)))

    def decay(self, start: Checkpoint, epochs: float, lr: float = 0.05) -> dict:
        """The entry of SGD on all weights, at a rate that falls linearly."""
        load_into(self.model, start)
        self.fit(sgd(self.model, lr), self.steps_of(epochs))
        return self.measured(self.judge) | {"epochs": HEAD + epochs, "lr": lr}

    def twa(self, epochs: float, granularity: str = "model", unit: str | None = None) -> dict:
        """The entry of TWA by the recipe of `train_twa.py`."""
        made = self.fit_twa(self.window, self.steps_of(epochs), granularity, unit)
        made["seconds"] = sum(made["seconds"].values())
        return made | self.measured(self.judge) | {"epochs": HEAD + epochs}

    def tuned(self, budget: float) -> dict:
        """The entry of SGD from the best mean, at the rate that is best on validation images.

        The first seed tries the rates; the others take the one that it chose.
        """
        first = Records(self.records.path.with_suffix("").with_suffix(".1.json"))
        name, losses, entries = f"{tables.TUNED} | {budget:g}", {}, {}
        for lr in TUNED_RATES if self.seed == 1 else (first[name]["lr"],):
            entries[lr] = self.decay(self.start(*self.window)[0], budget, lr)
            losses[lr] = self.measured(self.tuned_on, self.train.sample)["loss"]
        best = min(losses, key=losses.get)
        return entries[best] | {"validation_losses": {str(lr): losses[lr] for lr in losses}}


def head(bench: HeadBench) -> None:
    """TWA and its baselines at equal budgets, from the same twelve epochs."""
    measure, window = bench.records.measure, bench.window
    measure("SGD", partial(bench.sgd_end, EPOCHS, SAVES))
    means = {f"mean of the last {count}": partial(average, window[-count:]) for count in (5, 10)}
    averages = {
        "last checkpoint": lambda: window[-1],
        **means,
        "mean of all (SWA)": partial(average, window),
        "EMA": lambda: weighted(window, ema(0.9, len(window))),
    }
    for name, make in averages.items():
        measure(name, lambda make=make: bench.solution(make()))
    starts = {"the last checkpoint": averages["last checkpoint"]}
    starts |= {f"the {name}": make for name, make in means.items()}
    for budget in BUDGETS:
        for start, make in starts.items():
            name = f"SGD, decaying, from {start} | {budget:g}"
            measure(name, lambda make=make, budget=budget: bench.decay(make(), budget))
        measure(f"{tables.BY_MODEL} | {budget:g}", partial(bench.twa, budget))
        measure(f"{tables.BY_CHANNEL} | {budget:g}", partial(bench.twa, budget, "channel"))
        measure(f"{tables.TUNED} | {budget:g}", partial(bench.tuned, budget))
    for budget in SQUEEZED:
        measure(f"SGD, whole schedule | {budget:g}", partial(bench.sgd_end, HEAD + budget, 1))


def units(bench: HeadBench) -> None:
    """What coefficients count in, each at its own rate, beside SGD at the rate that was tuned."""
    measure = bench.records.measure
    measure("mean of the last 10", lambda: bench.solution(average(bench.window[-10:])))
    for budget, lr in {0.1: 0.02, 0.2: 0.02, 0.5: 0.05, 1: 0.02, 2: 0.05, 5: 0.1}.items():
        decay = partial(bench.decay, bench.start(*bench.window)[0], budget, lr)
        measure(f"SGD on all weights | {budget:g}", decay)
        for unit in ("direction", "block"):
            measure(f"{unit} | {budget:g}", partial(bench.twa, budget, "channel", unit))
        measure(f"by model | {budget:g}", partial(bench.twa, budget))


PARTS = {"head": head, "units": units}


def main() -> None:
    parser = Parser(__doc__.partition("\n")[0])
    parser.add_argument("--part", choices=PARTS, default="head")
    parser.add_argument("--arch", default="PreResNet20", help="architecture, or module:function")
    parser.add_argument("--seed", type=int, default=1, help="of the run and of all that follows")
    parser.add_argument("--data-dir", default=ROOT / "datasets", type=Path, help="of FashionMNIST")
    args = parser.parse_args()
    PARTS[args.part](HeadBench(args.part, args.arch, args.seed, args.data_dir))


if __name__ == "__main__":
    run_script(main)
