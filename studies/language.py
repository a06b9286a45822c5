"""The language-model study: what a few percent of a run are worth, spent in many ways.

    python studies/language.py --text linux --seed 4 [--parts core]   adds to lm/linux/seed4.json

A run of 4,000 steps at a constant rate (`lm/train.py`) leaves a checkpoint every 25 steps. All that
follows begins from these or from its saved state and trains on the same batches, one setting after
the other; an entry that is there is not measured again. Seconds are those of the processor, on one
thread. The start and the end of TWA are chosen by training text, the rates and shapes of the
baselines by the validation text of the first seed of each text. TWA's own defaults were found on
`python` (seeds 1 to 3); `linux` (seeds 4 to 6) was measured once, after that.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import common
import torch
from common import CPU, ROOT, Bench, Evenly, Records, clip, text
from language_report import BUDGETS, SPACING, STEPS, WHOLE, WINDOW

from training.run import run_script
from training.settings import Parser
from twa.checkpoints import load_into
from twa.formats import load

RESULTS, WORK = ROOT / "studies/lm", ROOT / "results/lm_study"
# The folder of each text, and the seed that its rates are tuned with, which is measured first.
# None: Python's standard library; the other is of Debian's package linux-doc-6.1.
TEXTS = {"python": (None, 1), "linux": (Path("/usr/share/doc/linux-doc-6.1/html/_sources"), 4)}
EVERY, BATCH, RATE, DECAY = 25, 8, 2e-3, 0.1  # of the run
SOME = (20, 100, 400)  # budgets of what is measured less often
FACTORS = (1, 1 / 3.2, 1 / 10, 1 / 32)  # of the baseline's rate
SHAPES = ("linear", "1-sqrt")
TESTED, TUNED_ON = 1024, 512  # windows of text that solutions and rates are judged by


class LanguageBench(Bench):
    """A finished run, its checkpoints and its state, the text, and what was measured so far.

    Args:
        text_name: one of `TEXTS`.
        seed: of the run and of all that follows.
    """

    def __init__(self, text_name: str, seed: int):
        folder, first = TEXTS[text_name]
        self._folder = WORK / text_name / f"seed{seed}"
        self.records = Records(RESULTS / text_name / f"seed{seed}.json")
        # Of the seed whose rates are tuned; None for that seed itself.
        self.first = None if seed == first else Records(RESULTS / f"{text_name}/seed{first}.json")
        if not self.checkpoint(STEPS).exists():
            where = ("--data-dir", folder) if folder else ()
            common.call_script(
                *("lm/train.py", "--dir", self._folder, "--steps", STEPS, "--save-every", EVERY),
                *("--test-every", 2000, "--batch-size", BATCH, "--lr", RATE, "--amp"),
                *("--seed", seed, "--arch", "gpt", "--device", "cpu", "--resume", *where),
            )
        train, validation, test = text.load(folder, text.Vocabulary(), text.TextSettings.context)
        self.test = Evenly(test, TESTED)
        self.validation = Evenly(validation, TUNED_ON)
        # Other draws than the run's, whose text it has seen just before.
        drawn = {"train": True, "steps": max(BUDGETS), "seed": 1000 + seed, "device": CPU}
        super().__init__("gpt", text.Loader(train, BATCH, **drawn), seed)

    def checkpoint(self, step: int) -> Path:
        return self._folder / "checkpoints" / f"{step // EVERY}.pt"

    def window(self, count: int = WINDOW) -> list[Path]:
        """The last `count` checkpoints, SPACING steps from one to the next."""
        steps = range(STEPS - (count - 1) * SPACING, STEPS + 1, SPACING)
        return [self.checkpoint(step) for step in steps]

    def measure(self, name: str, make: Callable[[], dict]) -> None:
        """The entry of what `make` returns, with the losses of the model that it leaves."""

        def made() -> dict:
            found = make()
            validated = self.measured(self.validation)["loss"]
            return found | {"loss": self.measured(self.test)["loss"], "validation_loss": validated}

        self.records.measure(name, made)

    def average(self, name: str, alpha: list[float]) -> None:
        """The entry of an average of the last checkpoints with these coefficients."""

        def make() -> dict:
            load_into(self.model, common.weighted(self.window(len(alpha)), alpha))
            return {"steps": 0}

        self.measure(name, make)

    def decay(self, steps: int, shape: str, start: str, factor: float = 1) -> None:
        """The entry of AdamW on all weights, with a falling rate and the moments of the run.

        Args:
            start: "last", or "mean" for the best mean.
        """

        def make() -> dict:
            checkpoint, choosing = self.checkpoint(STEPS), 0.0
            if start == "mean":
                checkpoint, _, choosing = self.start(*self.window())
            load_into(self.model, checkpoint)
            started = time.process_time()
            parameters = list(self.model.parameters())
            optimizer = torch.optim.AdamW(parameters, RATE * factor, weight_decay=DECAY)
            state = load(self._folder / "checkpoints/state.pt")["optimizer"]["state"]
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
            clip(optimizer, parameters)
            self.fit(optimizer, steps, shape)
            training = time.process_time() - started
            return {"steps": steps, "seconds": {"choosing": choosing, "training": training}}

        self.measure(name_of(shape, start, factor, steps), make)


def name_of(shape: str, start: str, factor: float, steps: int) -> str:
    return f"decay, {shape}, from the {start}, rate x {factor:.3g} | {steps}"


def core(bench: LanguageBench) -> None:
    """The averages, TWA, and the decays at the run's own rate: nothing is tuned.

    The averages need no training: means (LAWA), EMA, and WSM's coefficients of a decay.
    """
    alphas = {"last": [1.0]}
    alphas |= {f"mean | {count}": [1 / count] * count for count in (2, 4, 8, 10, 16, 32, 60)}
    alphas |= {f"EMA | {rate}": common.ema(rate, WINDOW) for rate in (0.8, 0.9, 0.95)}
    alphas |= {f"WSM, 1-sqrt | {n}": common.of_decay("1-sqrt", n) for n in (8, 16, 32, 60)}
    for name, alpha in alphas.items():
        bench.average(name, alpha)
    for steps in BUDGETS:
        for by in ("model", "channel", "layer") if steps in SOME else ("model", "channel"):
            make = partial(bench.fit_twa, bench.window(), steps, by)
            bench.measure(f"TWA by {by} | {steps}", make)
        for start, shape in itertools.product(("last", "mean"), SHAPES):
            bench.decay(steps, shape, start)


def tuned(bench: LanguageBench) -> None:
    """The decays again at lower rates; seeds other than the first take what that one chose."""
    for steps, start in itertools.product(BUDGETS, ("mean", "last")):
        factors = FACTORS if start == "mean" else FACTORS[:2]
        tried = list(itertools.product(SHAPES, factors))
        if bench.first is not None:
            losses = {
                (shape, factor): bench.first[name]["validation_loss"]
                for shape, factor in tried
                if (name := name_of(shape, start, factor, steps)) in bench.first
            }
            tried = sorted(losses, key=losses.get)[:1]
        for shape, factor in tried:
            bench.decay(steps, shape, start, factor)


def schedule_free(bench: LanguageBench) -> None:
    """schedulefree's AdamW in place of the whole run, from the same start; needs the package."""

    def make() -> dict:
        import schedulefree

        load_into(bench.model, bench.checkpoint(0))
        parameters, settings = list(bench.model.parameters()), {"lr": RATE, "weight_decay": DECAY}
        optimizer = schedulefree.AdamWScheduleFree(parameters, warmup_steps=100, **settings)
        clip(optimizer, parameters)
        optimizer.train()
        started = time.process_time()
        bench.fit(optimizer, STEPS, "constant")
        optimizer.eval()
        return {"steps": 0, "seconds": {"training": time.process_time() - started}}

    bench.measure(WHOLE, make)


PARTS = {"core": core, "tuned": tuned, "schedule-free": schedule_free}


def main() -> None:
    parser = Parser(__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--text", choices=TEXTS, default="python", help="what the run learns")
    add("--seed", type=int, default=1, help="of the run and of all that follows")
    add("--parts", nargs="+", choices=PARTS, default=tuple(PARTS), help="what to measure")
    args = parser.parse_args()
    bench = LanguageBench(args.text, args.seed)
    for part in args.parts:
        PARTS[part](bench)


if __name__ == "__main__":
    run_script(main)
