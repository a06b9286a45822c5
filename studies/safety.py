"""Whether TWA ever leaves a model worse than it found it: many small runs, held-out data.

    python studies/safety.py [CASE ...]

Every SGD run (of the GPT, AdamW on text) leaves checkpoints at a constant rate; TWA runs over
windows of them with the defaults of `train_twa.py`. The run and TWA train on the same data; the
held-out data judge and choose nothing. What is in `studies/safety.json` is not run again;
checkpoints go to `results/safety`. `python studies/report.py` makes the table.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
from common import CPU, ROOT, Bench, Evenly, Records, clip, data, images, text
from torch import Tensor
from torch.nn import functional as F

import utils
from training.files import save
from training.loop import predict, reestimate_bn
from training.run import run_script
from training.settings import Parser
from twa.checkpoints import average, load_into

RESULTS = ROOT / "studies/safety.json"
WORK = ROOT / "results/safety"
CNN, VIT = "studies.architectures:cnn", "studies.architectures:vit"


@dataclass(frozen=True)
class Case:
    """A run that leaves checkpoints."""

    data: str  # one of `training.data.DATASETS`, or Python's library as text
    arch: str
    images: int  # to train on; for text, windows that are drawn for an epoch
    held_out: int  # other training images, to judge by; or windows
    epochs: int
    saves: int  # checkpoints an epoch
    apart: int  # checkpoints from one to the next of a window, unless that asks for too many
    test: int = 1000  # test images or windows, to judge by as well
    batch: int = 128
    size: int | None = None  # pixels that images of 28×28 are padded to


DIGITS = partial(Case, "Digits", images=600, held_out=298, epochs=60, saves=2, apart=2)
FASHION = partial(Case, "FashionMNIST", images=12_000, held_out=2000, epochs=6, saves=20, apart=4)
FEW_IMAGES = {"images": 512, "held_out": 512, "epochs": 20, "saves": 1, "apart": 1, "batch": 64}
CASES = {
    "Digits PreResNet20": DIGITS("PreResNet20"),
    "Digits cnn": DIGITS(CNN),
    "Digits PreResNet56": DIGITS("PreResNet56"),
    "FashionMNIST PreResNet20": FASHION("PreResNet20"),
    "FashionMNIST cnn": FASHION(CNN),
    "FashionMNIST vit": FASHION(VIT),
    "FashionMNIST VGG16BN": FASHION("VGG16BN", **FEW_IMAGES, size=32),
    "Text gpt": Case(text.NAME, "gpt", 800, 512, 30, 4, 2, test=512, batch=8),
}
# Settings: the checkpoints of the window, the start, the granularity, the epochs.
MANY = """5 auto model 1, 5 auto channel 5, 20 auto model 0.2, 20 auto layer 5, 60 auto model 5,
60 auto layer 1, 60 auto channel 1, 60 auto channel 5, 60 SWA model 1, 60 SWA channel 5,
60 last model 1, 60 last channel 5, 120 auto model 1, 120 auto channel 0.2"""
FEW = """5 auto model 1, 20 auto layer 1, 60 auto channel 0.2, 60 auto channel 1, 60 SWA channel 1,
60 last model 1, 120 auto model 0.2, 60 auto model 5"""
SLOW = "5 auto model 1, 10 auto layer 0.2, 20 auto channel 1, 20 SWA model 1, 20 last channel 1"
PLAN = dict.fromkeys(CASES, FEW) | {"FashionMNIST VGG16BN": SLOW}
PLAN |= dict.fromkeys(("Digits PreResNet20", "Digits cnn", "Text gpt"), MANY)
SEEDS = (1, 2, 3)


class SafetyBench(Bench):
    """A finished run, its checkpoints and the images or the text to judge by.

    Args:
        folder: of the checkpoints; the run is made if it is not finished there.
        data_dir: the folder of FashionMNIST.
    """

    def __init__(self, case: Case, seed: int, folder: Path, data_dir: Path):
        self.case = case
        load = self._text if case.data == text.NAME else self._images
        train, self.judges = load(seed, data_dir)
        super().__init__(case.arch, train, seed, amp=case.data != "Digits")
        self.paths = [folder / f"{i + 1}.pt" for i in range(case.epochs * case.saves)]
        if not self.paths[-1].exists():
            self._run()

    def _images(self, seed: int, data_dir: Path) -> tuple[data.Loader, list[data.Loader]]:
        case, amp = self.case, self.case.data != "Digits"
        training, test = (padded(split, case.size) for split in data.load(case.data, data_dir, CPU))
        order = torch.randperm(len(training), generator=torch.Generator().manual_seed(seed))
        known, held_out = order[: case.images], order[case.images :][: case.held_out]
        judges = (training.part(held_out), test.part(slice(case.test)))
        train = images(training.part(known), case.batch, train=True, seed=seed, amp=amp)
        return train, [images(judge, 500, train=False, amp=amp) for judge in judges]

    def _text(self, seed: int, data_dir: Path) -> tuple[data.Loader, list[data.Loader]]:
        case = self.case
        training, validation, test = text.load(None, text.Vocabulary(), text.TextSettings.context)
        drawn = {"train": True, "steps": case.images // case.batch, "seed": seed, "device": CPU}
        judges = ((validation, case.held_out), (test, case.test))
        judges = [Evenly(split, windows) for split, windows in judges]
        return text.Loader(training, case.batch, **drawn), judges

    def _run(self) -> None:
        self.paths[0].parent.mkdir(parents=True, exist_ok=True)
        steps, parameters = len(self.train), list(self.model.parameters())
        after = {round(i * steps / self.case.saves) for i in range(1, self.case.saves + 1)}
        if self.case.data == text.NAME:
            optimizer, warmup = torch.optim.AdamW(parameters, 2e-3, weight_decay=0.1), 100
            clip(optimizer, parameters)
        else:
            optimizer, warmup = torch.optim.SGD(parameters, 0.1, 0.9, weight_decay=1e-4), 0
        paths = iter(self.paths)

        def keep(step: int) -> None:
            if (step - 1) % steps + 1 in after:
                save(self.model.state_dict(), next(paths))

        self.fit(optimizer, self.case.epochs * steps, "constant", warmup, keep)

    def window(self, count: int) -> list[Path]:
        """The last `count` of evenly spaced checkpoints; as few an epoch as possible."""
        spacing = min(len(self.paths) // count, self.case.apart)
        return self.paths[::-spacing][:count][::-1]

    def judged(self) -> list[Tensor]:
        """Losses of the held-out and of the test images, and which are recognised: [2, N].

        For text they are means over each window, whose tokens say little more than one does.
        """
        reestimate_bn(self.model, self.train, self.amp, self.train.sample)
        found = []
        for judge in self.judges:
            pairs = predict(self.model, judge, self.amp)
            outputs, labels = map(torch.cat, zip(*pairs, strict=True))
            losses = F.cross_entropy(outputs, labels, reduction="none")
            each = torch.stack([losses, outputs.argmax(1) == labels]).double()
            found.append(each.unflatten(1, (-1, judge.labels_in(0) // judge.images_in(0))).mean(2))
        return found

    def averages(self, count: int) -> dict[str, float]:
        """Held-out accuracy in percent of the averages that TWA is compared with."""
        window, found = self.window(count), {}
        points = {"last": window[-1:], "mean of last 5": window[-5:], "SWA": window}
        for name, averaged in points.items():
            load_into(self.model, average(averaged))
            found[name] = 100 * float(self.judged()[0][1].mean())
        return found

    def twa(self, setting: str) -> dict:
        """The entry of TWA by the recipe of `train_twa.py`, in a setting of `PLAN`.

        It has the held-out losses after the epochs, and the losses at the start and of what is
        kept, with the standard error of their difference.
        """
        utils.set_seed(self.seed)
        count, start_name, granularity, epochs = setting.split()
        window, epoch = self.window(int(count)), len(self.train)
        averaged = {"last": window[-1:], "SWA": window}.get(start_name)
        start = average(averaged) if averaged else self.start(*window)[0]
        load_into(self.model, start)
        points, after = {"start": self.judged()}, []
        steps = max(1, round(float(epochs) * epoch))

        def judge(step: int) -> None:
            if step % epoch == 0 or step == steps:
                points["end"] = self.judged()
                after.append(float(points["end"][0][0].mean()))

        sample = self.fit_twa(window, steps, granularity, start=start, after_step=judge)["ends"]
        kept = min(sample, key=sample.get)
        if kept not in points:
            points[kept] = self.judged()
        found: dict = {"after": after, "kept": kept, "sample": sample}
        ends = zip(("held out", "test"), points["start"], points[kept], strict=True)
        for data_set, first, end in ends:
            difference = end[0] - first[0]
            found[data_set] = {
                "start": float(first[0].mean()),
                "end": float(end[0].mean()),
                "error": float(difference.std()) / len(difference) ** 0.5,
                "start accuracy": 100 * float(first[1].mean()),
                "accuracy": 100 * float(end[1].mean()),
            }
        return found


def padded(split: data.Split, size: int | None) -> data.Split:
    """With zeros around the images, so that they are of this size."""
    if size is None:
        return split
    margin = (size - split.spec.size) // 2
    spec = replace(split.spec, size=size)
    return replace(split, images=F.pad(split.images, (margin,) * 4), spec=spec)


def main() -> None:
    parser = Parser(__doc__.partition("\n")[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help="; ".join(CASES))
    parser.add_argument("--data-dir", type=Path, default=ROOT / "datasets")
    args = parser.parse_args()
    for case in args.cases:
        if case not in CASES:
            parser.error(f"{case}: is no case; give some of {', '.join(CASES)}")
    records = Records(RESULTS)

    for seed, case in itertools.product(SEEDS, args.cases or CASES):
        folder = WORK / f"{case.replace(' ', '.')}.{seed}"
        bench = cache(partial(SafetyBench, CASES[case], seed, folder, args.data_dir))
        for setting in PLAN[case].replace("\n", " ").split(", "):
            run, window = f"{case} {seed}", setting.split()[0]
            records.measure(f"{run}: {window}", lambda b=bench, w=window: b().averages(int(w)))
            records.measure(f"{run}: {setting}", lambda b=bench, s=setting: b().twa(s))


if __name__ == "__main__":
    run_script(main)
