"""Whether TWA ever leaves a model worse than it found it: many small runs, held-out data.

    python studies/safety.py [CASE ...]

Every SGD run (of the GPT, AdamW on text) leaves checkpoints at a constant rate; TWA runs over
windows of them, with the defaults of `train_twa.py` and with those of before (the window's mean,
SGD on Gram-Schmidt's coefficients at a measured rate). The run and TWA train on the same data; the
held-out ones judge and choose nothing. What is in `studies/safety.json` is not run again;
checkpoints go to `results/safety`. `python studies/evidence.py report` makes the table.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import language
import torch
from study import ROOT, safe_rate, train_steps
from torch import Tensor
from torch.nn import functional as F

import utils
from training import data, text, windows
from training.coefficients import LateMean, keep_best, unit_of
from training.files import save
from training.logs import write_json
from training.loop import build, predict, reestimate_bn, sample_loss
from twa import TWA, rate_of
from twa.files.checkpoints import load_into
from twa.optimizer import RATE

RESULTS = ROOT / "studies/safety.json"
WORK = ROOT / "results/safety"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """A run that leaves checkpoints.

    Attributes:
        data: of `training.data.DATASETS`, or Python's library as text; images of 28x28 are padded
            to `size`.
        arch: an architecture that `training.loop.build` knows.
        images: to train on; of text, windows that are drawn for an epoch.
        held_out, test: to judge by: other training images, and test images; or windows.
        epochs, saves, batch: of the run; checkpoints an epoch; images a step.
        apart: checkpoints from one to the next of a window, unless that asks for too many.
    """

    data: str
    arch: str
    images: int
    held_out: int
    epochs: int
    saves: int
    apart: int
    test: int = 1000
    batch: int = 128
    size: int | None = None


CASES = {
    "Digits PreResNet20": Case("Digits", "PreResNet20", 600, 298, 60, 2, 2),
    "Digits cnn": Case("Digits", "studies.architectures:cnn", 600, 298, 60, 2, 2),
    "Digits PreResNet56": Case("Digits", "PreResNet56", 600, 298, 60, 2, 2),
    "FashionMNIST PreResNet20": Case("FashionMNIST", "PreResNet20", 12_000, 2000, 6, 20, 4),
    "FashionMNIST cnn": Case("FashionMNIST", "studies.architectures:cnn", 12_000, 2000, 6, 20, 4),
    "FashionMNIST vit": Case("FashionMNIST", "studies.architectures:vit", 12_000, 2000, 6, 20, 4),
    "FashionMNIST VGG16BN": Case("FashionMNIST", "VGG16BN", 512, 512, 20, 1, 1, batch=64, size=32),
    "Text gpt": Case(text.NAME, "gpt", 800, 512, 30, 4, 2, test=512, batch=8),
}


@dataclass(frozen=True)
class Setting:
    """A TWA run: its window, the last `window` of evenly spaced checkpoints, and what flags say."""

    window: int
    start: str
    granularity: str
    epochs: float

    def __str__(self) -> str:
        return f"{self.window} {self.start} {self.granularity} {self.epochs:g}"


MANY = (
    *(Setting(5, "auto", "model", 1), Setting(5, "auto", "channel", 5)),
    *(Setting(20, "auto", "model", 0.2), Setting(20, "auto", "layer", 5)),
    *(Setting(60, "auto", "model", 5), Setting(60, "auto", "layer", 1)),
    *(Setting(60, "auto", "channel", 1), Setting(60, "auto", "channel", 5)),
    *(Setting(60, "SWA", "model", 1), Setting(60, "SWA", "channel", 5)),
    *(Setting(60, "last", "model", 1), Setting(60, "last", "channel", 5)),
    *(Setting(120, "auto", "model", 1), Setting(120, "auto", "channel", 0.2)),
)
FEW = (
    *(Setting(5, "auto", "model", 1), Setting(20, "auto", "layer", 1)),
    *(Setting(60, "auto", "channel", 0.2), Setting(60, "auto", "channel", 1)),
    *(Setting(60, "SWA", "channel", 1), Setting(60, "last", "model", 1)),
    *(Setting(120, "auto", "model", 0.2), Setting(60, "auto", "model", 5)),
)
SLOW = (
    *(Setting(5, "auto", "model", 1), Setting(10, "auto", "layer", 0.2)),
    *(Setting(20, "auto", "channel", 1), Setting(20, "SWA", "model", 1)),
    Setting(20, "last", "channel", 1),
)
# Settings and seeds; in the order in which they are run, the first seed of all before the second.
PLAN: dict[str, tuple[tuple[Setting, ...], int]] = {
    "Digits PreResNet20": (MANY, 3),
    "Digits cnn": (MANY, 3),
    "Digits PreResNet56": (FEW, 3),
    "FashionMNIST PreResNet20": (FEW, 3),
    "FashionMNIST cnn": (FEW, 3),
    "FashionMNIST vit": (FEW, 3),
    "FashionMNIST VGG16BN": (SLOW, 3),
    "Text gpt": (MANY, 3),
}


class Bench:
    """A finished run, its checkpoints and the images or the text to judge by.

    Args:
        folder: of the checkpoints; a run that is not finished there is made.
        data_dir: the folder of FashionMNIST.
    """

    def __init__(self, case: Case, seed: int, folder: Path, data_dir: Path):
        utils.set_seed(seed)
        self.case, self.seed, self.amp = case, seed, case.data != "Digits"
        self.on_text = case.data == text.NAME
        spec = self._text() if self.on_text else self._images(data_dir)
        self.model = build(case.arch, spec, CPU, self.amp)
        self.count = case.epochs * case.saves
        self.paths = [folder / f"{i + 1}.pt" for i in range(self.count)]
        if not self.paths[-1].exists():
            self._run(folder)

    def _images(self, data_dir: Path) -> data.Spec:
        case = self.case
        images, test = (resized(split, case.size) for split in data.load(case.data, data_dir, CPU))
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.seed))
        known, held_out = order[: case.images], order[case.images :][: case.held_out]
        self.train = self.loader(images.part(known))
        judges = (images.part(held_out), test.part(slice(case.test)))
        self.judges = [data.Loader(j, 500, train=False, channels_last=self.amp) for j in judges]
        return images.spec

    def _text(self) -> text.Spec:
        case = self.case
        train, validation, test = text.load(None, text.Vocabulary(), text.TextSettings.context)
        self.train = text.Loader(
            *(train, case.batch),
            **{"train": True, "steps": case.images // case.batch, "seed": self.seed, "device": CPU},
        )
        judges = ((validation, case.held_out), (test, case.test))
        self.judges = [language.Evenly(split, windows, CPU) for split, windows in judges]
        return train.spec

    def loader(self, split: data.Split) -> data.Loader:
        return data.Loader(
            split, self.case.batch, train=True, seed=self.seed, channels_last=self.amp
        )

    def _run(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        steps, parameters = len(self.train), list(self.model.parameters())
        after = {round(i * steps / self.case.saves) for i in range(1, self.case.saves + 1)}
        optimizer: torch.optim.Optimizer
        if self.on_text:
            settings = {"lr": language.RATE, "weight_decay": language.DECAY}
            optimizer, warmup = torch.optim.AdamW(parameters, **settings), 100
            language.clip(optimizer, parameters)
        else:
            optimizer = torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=1e-4)
            warmup = 0
        paths, total = iter(self.paths), self.case.epochs * steps
        way = train_steps(self.model, self.train, optimizer, total, "constant", warmup, self.amp)
        for step, _ in enumerate(way):
            if step % steps + 1 in after:
                save(self.model.state_dict(), next(paths))

    def window(self, count: int) -> list[Path]:
        """The last `count` of evenly spaced checkpoints; few of them an epoch where that does."""
        spacing = min(self.count // count, self.case.apart)
        return self.paths[::-spacing][:count][::-1]

    def judged(self) -> list[Tensor]:
        """The losses of the held-out and of the test images, and which are recognised: [2, N].

        Of text they are means over each window, whose tokens say little more than one does.
        """
        reestimate_bn(self.model, self.train, self.amp, self.train.sample)
        found = []
        for judge in self.judges:
            outputs, labels = map(
                torch.cat, zip(*predict(self.model, judge, self.amp), strict=True)
            )
            losses = F.cross_entropy(outputs, labels, reduction="none")
            told = torch.stack([losses, outputs.argmax(1) == labels]).double()
            found.append(told.unflatten(1, (-1, judge.labels_in(0) // judge.images_in(0))).mean(2))
        return found

    def averages(self, count: int) -> dict[str, float]:
        """Held-out accuracy in percent of the averages that TWA is compared with."""
        found = {}
        for name, mean in windows.averages_of(self.window(count), self.model).items():
            load_into(self.model, mean)
            found[name] = 100 * float(self.judged()[0][1].mean())
        return found


@dataclass(frozen=True)
class Recipe:
    """How coefficients are trained: by default as `train_twa.py` does.

    Attributes:
        lr: None: by the steps and the images.
        weight_decay: towards the start point (z = 0).
        kept_out: share of the training images that TWA does not train on; they choose the end.
    """

    lr: float | None = None
    weight_decay: float = 0.0
    kept_out: float = 0.0

    def run(self, bench: Bench, setting: Setting) -> dict:
        window, model, train = bench.window(setting.window), bench.model, bench.train
        chooser = train
        if self.kept_out:
            cut = round(len(train.split) * self.kept_out)
            chooser = bench.loader(train.split.part(slice(cut)))
            train = bench.loader(train.split.part(slice(cut, None)))

        def loss(last: bool = False) -> float:
            return sample_loss(model, chooser, bench.amp, last)

        name, start, _ = windows.start_of(window, setting.start, model, loss)
        steps = max(1, round(setting.epochs * len(train)))
        samples = math.inf if bench.on_text else len(train.split)
        unit = unit_of(setting.granularity, steps, samples)
        optimizer = TWA(
            model,
            window,
            start=start,
            granularity=setting.granularity,
            unit=unit,
            lr=self.lr or rate_of(steps, samples, unit),
            weight_decay=self.weight_decay,
        )
        late = LateMean(optimizer, steps)
        entry, points = trained(bench, train, optimizer, steps)
        sample = keep_best(optimizer, late, lambda: loss(last=True))
        kept = min(sample, key=sample.get)
        if kept == "mean of the last half":
            points[kept] = bench.judged()
        return entry | {"from": name} | told(points, kept) | {"sample": rounded(sample)}


class Before:
    """The defaults of before: the paper's method at a measured rate, its end as it comes."""

    def run(self, bench: Bench, setting: Setting) -> dict:
        window = bench.window(setting.window)
        optimizer = TWA(
            bench.model,
            window,
            torch.optim.SGD,
            extract="Schmidt",
            granularity=setting.granularity,
            lr=0.0,
            momentum=0.9,
        )
        rate = safe_rate(optimizer, bench.model, bench.train, 0.9, bench.amp)
        optimizer.param_groups[0]["lr"] = rate
        steps = max(1, round(setting.epochs * len(bench.train)))
        entry, points = trained(bench, bench.train, optimizer, steps)
        return entry | {"from": "SWA"} | told(points, "end") | {"lr": rate}


def resized(split: data.Split, size: int | None) -> data.Split:
    """With zeros around the images, so that they are of this size."""
    if size is None:
        return split
    margin = (size - split.spec.size) // 2
    padded = F.pad(split.images, (margin,) * 4)
    return data.Split(padded, split.labels, replace(split.spec, size=size))


def trained(
    bench: Bench, train: data.Loader, optimizer: TWA, steps: int
) -> tuple[dict, dict[str, list[Tensor]]]:
    """Trains the coefficients.

    Returns:
        The held-out losses after the epochs; what `Bench.judged` says of start and end.
    """
    points = {"start": bench.judged()}
    after = []
    way = train_steps(bench.model, train, optimizer, steps, "linear", amp=bench.amp)
    for step, _ in enumerate(way, start=1):
        if step % len(train) == 0 or step == steps:
            points["end"] = bench.judged()
            after.append(float(points["end"][0][0].mean()))
    return {"after": [round(value, 5) for value in after]}, points


def told(points: dict[str, list[Tensor]], kept: str) -> dict:
    """Losses at the start and of what was kept; their difference and its standard error."""
    entry: dict = {"kept": kept}
    for judge, start, end in zip(("held out", "test"), points["start"], points[kept], strict=True):
        difference = end[0] - start[0]
        figures = {
            "start": start[0].mean(),
            "end": end[0].mean(),
            "error": difference.std() / math.sqrt(len(difference)),
            "start accuracy": 100 * start[1].mean(),
            "accuracy": 100 * end[1].mean(),
        }
        entry[judge] = rounded(figures)
    return entry


def rounded(figures: dict[str, float]) -> dict[str, float]:
    return {key: round(float(value), 5) for key, value in figures.items()}


RECIPES = {
    "new": Recipe(),
    "before": Before(),
    # Remedies that were tried against over-fitting; `safety_remedies.json` has what they gave.
    "decay 5": Recipe(weight_decay=5.0),
    "kept out": Recipe(kept_out=0.2),
    "half rate": Recipe(lr=RATE / 2),
}


def planned(recipes: list[str]) -> Iterator[tuple[str, int, Setting, str]]:
    """Case, seed, setting and recipe of every run; the defaults of before from the mean alone."""
    for seed in range(1, 1 + max(seeds for _, seeds in PLAN.values())):
        for case, (settings, seeds) in PLAN.items():
            for setting in settings if seed <= seeds else ():
                for recipe in recipes:
                    if recipe != "before" or setting.start == "auto":
                        yield case, seed, setting, recipe


def main() -> None:
    parser = argparse.ArgumentParser(description="TWA's safety: many small runs")
    parser.add_argument("cases", nargs="*", metavar="CASE", help="; ".join(CASES))
    parser.add_argument("--data-dir", type=Path, default=ROOT / "datasets")
    parser.add_argument("--recipes", nargs="+", default=["new", "before"], choices=RECIPES)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    records = json.loads(args.out.read_text()) if args.out.exists() else {}
    bench, made = None, None
    for case, seed, setting, recipe in planned(args.recipes):
        if args.cases and case not in args.cases:
            continue
        name, averages = f"{case} {seed}: {setting}: {recipe}", f"{case} {seed}: {setting.window}"
        if name in records and averages in records:
            continue
        if made != (case, seed):
            folder = WORK / f"{case.replace(' ', '.')}.{seed}"
            bench, made = Bench(CASES[case], seed, folder, args.data_dir), (case, seed)
        if averages not in records:
            records[averages] = rounded(bench.averages(setting.window))
        if name not in records:
            utils.set_seed(seed)
            records[name] = RECIPES[recipe].run(bench, setting)
        write_json(records, args.out)
        print(name, records[name], flush=True)


if __name__ == "__main__":
    main()
