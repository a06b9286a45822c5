"""Soups of fine-tuned models: uniform, greedy, and with trained coefficients (TWA).

    python soup.py --checkpoints '../results/soup/models/*.pt' --datasets CIFAR100 --arch ViT \\
        --log-dir ../results/soup

Uniform and greedy soups and the ensemble are those of Model Soups (Wortsman et al., ICML 2022,
Section 2). TWA (Li et al., ICLR 2023) starts from one of the soups and trains the averaging
coefficients: TWA-t on images of the training part, TWA-v on the held-out part, in as many steps.
Greedy and TWA-v look at the held-out part only; test data choose nothing.

Writes `results.jsonl`, `soup.png` and each soup as an ordinary state_dict to --log-dir. A solution
that `results.jsonl` has with the same settings is not made again, so that a second call can add TWA
by another --granularity, --bits or --start, and one that was stopped goes on.
"""

import glob
import hashlib
import json
import re
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

import models
import utils
from training import coefficients, data, flags, ranks, report, tasks
from training.files import read_lines, save, write_json, write_lines
from training.logs import provenance
from training.loop import Trainer, describe, evaluate, predict, sample_loss, score
from training.optimizers import SCHEDULES
from training.run import lock, run_script
from training.settings import REQUIRED, derived, flag
from twa.files.checkpoints import Checkpoint, average, load_into, without_copies
from twa.formats import verify
from twa.optimizer import RATE
from twa.recipe import RATE_OF_SGD
from twa.subspace import GRANULARITIES
from utils import UserError

PARTS = ("validation", "test")  # what every solution is evaluated on
RESULTS = "results.jsonl"
ARCHITECTURES = (*models.ARCHITECTURES, *models.imagenet.CLASSIFIERS, *models.clip.NAMES)


@dataclass(kw_only=True)
class Settings(flags.Soup, flags.ImageFolder, coefficients.Coefficients):
    """soups of fine-tuned models: uniform, greedy, TWA"""

    datasets: str = flag("CIFAR10", choices=(*data.DATASETS, flags.IMAGE_FOLDER))
    arch: str = flag("PreResNet20", choices=tuple(dict.fromkeys(ARCHITECTURES)))
    checkpoints: tuple[str, ...] = flag(
        REQUIRED, "state_dicts (.pt, .safetensors) of one architecture", nargs="+", metavar="GLOB"
    )
    log_dir: str = flag(REQUIRED, "folder of the results, the soups and the figure")
    bn_images: int = flag(
        10_000, "training images on which batch norm is re-estimated for every solution", low=1
    )
    twa: tuple[str, ...] = flag(
        ("t", "v"),
        "t: on the training part, v: on the held-out part; no value: none",
        nargs="*",
        choices=("t", "v"),
    )
    start: str = flag("uniform", "soup that TWA starts from", choices=("uniform", "greedy"))
    epochs: int = flag(5, "passes over as many images as are held out", low=1)
    # The models are no trajectory: granularity, unit and rate do not grow with the steps.
    granularity: str = flag(
        "model", "one set of coefficients per model, layer or channel", choices=GRANULARITIES
    )
    unit: str | None = flag(
        None, "with PCA, the spread along a direction, or of its block (default: direction)"
    )
    lr: float | None = flag(None, "rate (default with PCA: 0.02; for SGD 0.1)")
    images: int | None = derived()
    randaugment: int = derived(0)


def files_of(patterns: Sequence[str]) -> list[Path]:
    """The files that match, by the numbers in their names; of files that are the same, one."""
    found: set[str] = set()
    for pattern in patterns:
        matches = glob.glob(pattern)
        if not matches:
            raise UserError(f"--checkpoints {pattern}: matches no file")
        found.update(matches)

    def by_number(path: str) -> list:
        return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path)]

    return without_copies([Path(path) for path in sorted(found, key=by_number)])


def refuse_unfit(paths: Sequence[Path], args) -> None:
    """Refuses models trained on what is held out here, and soups that a glob takes for models."""
    here, names = flags.held_out(args), set(map(str, paths))
    for folder in sorted({path.parent for path in paths}):
        for record in read_lines(folder / RESULTS, "name", "settings", *PARTS):
            soup = folder / file_of(record["name"])
            if soup in paths and not names.isdisjoint(record.get("models", ())):
                raise UserError(
                    f"{soup}: is a soup of the other models; give --checkpoints that leave it out"
                )
        for record in read_lines(folder / "runs.jsonl", "file", "settings"):
            path, there = folder / record["file"], record["settings"]["held_out"]
            if path in paths and there != here:
                raise UserError(
                    f"{path}: was fine-tuned with {there} held out, and here it is {here}; "
                    "give the same --val-ratio and --randomseed"
                )


def settings_of(paths: Sequence[Path], args) -> dict:
    """What every solution depends on: the files (by name, size and time) and the data."""
    files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return {
        "checkpoints": hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16],
        "held_out": flags.held_out(args),
        **{key: getattr(args, key) for key in ("datasets", "batch_size", "bn_images", "amp")},
        **({"image_size": args.image_size} if args.image_size else {}),
    }


def twa_settings_of(args) -> dict:
    """What TWA depends on besides: the flags of the coefficients that its name does not give."""
    names = [field.name for field in fields(coefficients.Coefficients)]
    names = [name for name in names if name not in ("granularity", "bits")]
    return {name: getattr(args, name) for name in (*names, "start", "epochs", "randomseed")}


def name_of(kind: str, args) -> str:
    """The name of a soup by TWA, "t" or "v", in its record and its file."""
    name = f"TWA-{kind}"
    name += f" {args.granularity}" if args.granularity != "model" else ""
    name += f" {args.bits} bits" if args.bits != 32 else ""
    return name + (" from greedy" if args.start == "greedy" else "")


def file_of(name: str) -> str:
    """The file of the soup of this name."""
    return f"{name.replace(' ', '-')}.pt"


def differing(record: dict, settings: dict) -> list[str]:
    """The settings that differ in a record; those that it lacks were at None."""
    return [key for key, value in settings.items() if record["settings"].get(key) != value]


class Evaluator:
    """The model, which takes all weights in turn, and the data that they are evaluated on.

    Batch norm is re-estimated alike before everything is evaluated.

    Attributes:
        loaders: by part: "validation", what is held out, and "test".
    """

    def __init__(self, args):
        self.task = tasks.of(args)
        self.task.bn_images = args.bn_images
        self.model = self.task.build()
        validation = self.task.loader(self.task.held_out, train=False)
        self.loaders = dict(zip(PARTS, (validation, self.task.test), strict=True))
        self._summed: list[Path] = []  # the models whose logits are in the sum of the ensemble
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}  # by part: of logits, and the labels

    def load(self, weights: Checkpoint) -> None:
        load_into(self.model, weights)
        self.task.reestimate_bn(self.model)

    def evaluate(self, part: str) -> dict[str, float]:
        """Loss and accuracy of the model's current weights."""
        return evaluate(self.model, self.loaders[part], self.task.amp)

    def evaluate_single(self, path: Path) -> dict[str, dict[str, float]]:
        """Loss and accuracy of one model, by part; adds its logits to those of the ensemble."""
        self.load(path)
        scores = {}
        for part, loader in self.loaders.items():
            batches = zip(*predict(self.model, loader, self.task.amp), strict=True)
            logits, labels = map(torch.cat, batches)
            scores[part] = score([(logits, labels)], logits.device)
            self._sums[part] = self._sums.get(part, (0, None))[0] + logits, labels
        self._summed.append(path)
        return scores

    def evaluate_ensemble(self, paths: Sequence[Path]) -> dict[str, dict[str, float]]:
        """Loss and accuracy, by part, of the mean of the models' logits."""
        if self._summed != paths:  # an earlier call evaluated some of them
            self._summed, self._sums = [], {}
            for path in paths:
                self.evaluate_single(path)
        return {
            part: score([(logits / len(paths), labels)], logits.device)
            for part, (logits, labels) in self._sums.items()
        }


class Solutions:
    """What is made of the models: a record each in `results.jsonl`, and the soups beside it."""

    def __init__(self, log_dir: Path, evaluator: Evaluator):
        self.path, self._evaluator = log_dir / RESULTS, evaluator
        records = read_lines(self.path, "name", "settings", *PARTS)
        self.records = {record["name"]: record for record in records}

    def refuse_other_flags(self, name: str, settings: dict, twa_settings: dict) -> None:
        """Refuses to replace a soup by TWA of the same models and data, which other flags made."""
        record = self.records.get(name)
        if record is None or differing(record, settings):
            return
        for key in differing(record, twa_settings):
            raise UserError(
                f"{self.path}: {name} was made with {key} {record['settings'].get(key)} instead of "
                f"{twa_settings[key]}; give another --log-dir, or remove this file to make all anew"
            )

    def make(self, name: str, settings: dict, function: Callable[[], dict]) -> dict:
        """The record of the solution `name`, made unless the file has it with these settings.

        Args:
            function: returns what the record holds: "validation" and "test", the scores; or
                "weights", which are then saved and evaluated.
        """
        record = self.records.get(name)
        if record is None or differing(record, settings):
            started = time.perf_counter()
            values = function()
            if "weights" in values:
                self._evaluator.load(values.pop("weights"))
                soup = self.path.with_name(file_of(name))
                save(self._evaluator.model.state_dict(), soup)
                values["seconds"] = time.perf_counter() - started
                values |= {part: self._evaluator.evaluate(part) for part in PARTS}
            record = self.records[name] = {"name": name, **values, "settings": settings}
            write_lines(self.records.values(), self.path)
            print(f"{name}: {', '.join(f'{part} {describe(record[part])}' for part in PARTS)}")
        return record


def greedy_soup(
    paths: Sequence[Path],
    accuracies: Sequence[float],
    accuracy_of: Callable[[Sequence[Path]], float],
) -> list[Path]:
    """The ingredients of the greedy soup (Wortsman et al., ICML 2022, Recipe 1).

    From the best model down, each stays in the soup if the soup's accuracy does not fall.

    Args:
        accuracies: of the individual models, on validation data.
        accuracy_of: the same of the uniform average of some of them.
    """
    ranked = sorted(zip(accuracies, paths, strict=True), key=lambda pair: -pair[0])
    best, first = ranked[0]
    ingredients = [first]
    for _, path in ranked[1:]:
        accuracy = accuracy_of([*ingredients, path])
        if accuracy >= best:
            best = accuracy
            ingredients.append(path)
    return ingredients


def train_coefficients(
    name: str, paths: Sequence[Path], images: data.Split, start: Path, evaluator: Evaluator, args
) -> dict:
    """The average of `paths` whose coefficients are trained on `images`, from the soup `start` on.

    Returns:
        its "weights", its "models", and its "averaging_weights", α of each; at a finer granularity
        the mean over the blocks.
    """
    utils.set_seed(args.randomseed)  # the same draws whatever was made before
    train = evaluator.task.loader(images, train=True)
    model, validation = evaluator.model, evaluator.loaders["validation"]
    how = {"steps": args.epochs * len(train), "start": start}
    loss = partial(sample_loss, model, train, args.amp)
    recipe = coefficients.recipe_of(args, model, paths, loss, **how)
    # The models are no trajectory: unit and learning rate do not follow from the steps.
    rate = args.lr
    if rate is None:
        rate = RATE_OF_SGD if args.opt == "SGD" else RATE
    optimizer = coefficients.optimizer_of(args, recipe, unit=args.unit or "direction", lr=rate)
    print(f"{name}: {coefficients.described(optimizer)}")
    factor = SCHEDULES[args.schedule]
    trainer = Trainer.of(args, model, train, validation, optimizer, factor, name=f"{name} ")
    for epoch in range(1, args.epochs + 1):
        trainer.epoch(epoch)
    print(coefficients.comparison(f"{name}, end", recipe.finish()) or f"{name}: the last iterate")
    return {
        "weights": model.state_dict(),
        "models": [str(path) for path in paths],
        "averaging_weights": coefficients.averaging_weights(optimizer, paths),
    }


def main():
    args = Settings.parse()
    ranks.refuse()
    with lock(args.log_dir), warnings.catch_warnings():
        make_soups(args)


def make_soups(args):
    utils.set_seed(args.randomseed)
    log_dir, paths = Path(args.log_dir), files_of(args.checkpoints)
    refuse_unfit(paths, args)
    evaluator = Evaluator(args)
    for path in paths:
        verify(path)
        load_into(evaluator.model, path)
        warnings.filterwarnings("ignore", "ignored in the checkpoints")  # said of the first

    solutions, settings = Solutions(log_dir, evaluator), settings_of(paths, args)
    twa_settings = settings | twa_settings_of(args)
    for kind in args.twa:
        solutions.refuse_other_flags(name_of(kind, args), settings, twa_settings)
    write_json({"arguments": vars(args), **provenance()}, log_dir / "soup_run.json")
    started, names = time.perf_counter(), [str(path) for path in paths]
    for name, path in zip(names, paths, strict=True):
        solutions.make(name, settings, partial(evaluator.evaluate_single, path))
    accuracies = [solutions.records[name]["validation"]["accuracy"] for name in names]
    best = names[accuracies.index(max(accuracies))]

    def best_single_model() -> dict:
        return {
            **{part: solutions.records[best][part] for part in PARTS},
            **{"models": [best], "seconds": 0.0},
        }

    def ensemble() -> dict:
        scores, seconds = evaluator.evaluate_ensemble(paths), time.perf_counter() - started
        return scores | {"models": names, "seconds": seconds}

    def accuracy_of(ingredients: Sequence[Path]) -> float:
        evaluator.load(average(ingredients))
        return evaluator.evaluate("validation")["accuracy"]

    def greedy() -> dict:
        ingredients = greedy_soup(paths, accuracies, accuracy_of)
        return {"weights": average(ingredients), "models": [str(path) for path in ingredients]}

    solutions.make("best single model", settings, best_single_model)
    solutions.make("ensemble", settings, ensemble)
    solutions.make("uniform", settings, lambda: {"weights": average(paths), "models": names})
    solutions.make("greedy", settings, greedy)

    start, task, held_out = log_dir / f"{args.start}.pt", evaluator.task, evaluator.task.held_out
    for kind in args.twa:
        name = name_of(kind, args)
        # As many images of either part, so that the two differ in what they see, not in how much.
        images = held_out if kind == "v" else task.training.part(slice(len(held_out)))
        soup = partial(train_coefficients, name, paths, images, start, evaluator, args)
        solutions.make(name, twa_settings, soup)
    show(solutions, names, settings, args)
    if skipped := task.skipped():
        print(skipped)


def show(solutions: Solutions, names: Sequence[str], settings: dict, args) -> None:
    """The figure and the table of all that was made of the models `names`, by any call."""
    rows = {
        name: {
            "validation accuracy": record["validation"]["accuracy"],
            "test accuracy": record["test"]["accuracy"],
            "test loss": record["test"]["loss"],
            "models": len(record.get("models", [name])),
            "seconds": record.get("seconds"),
        }
        for name, record in solutions.records.items()
        if settings.items() <= record["settings"].items()
    }
    points = {n: (row["validation accuracy"], row["test accuracy"]) for n, row in rows.items()}
    single = [points.pop(name) for name in names]
    figure = solutions.path.with_name("soup.png")
    report.scatter(figure, f"{len(names)} models on {args.datasets}", single, points)
    print(report.table({name: rows[name] for name in points}))
    print(f"written: {solutions.path}, {figure}, and the soups beside them")


if __name__ == "__main__":
    run_script(main)
