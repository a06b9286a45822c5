"""Soups of fine-tuned models: uniform, greedy, and with trained coefficients (TWA).

    python soup.py --checkpoints '../results/soup/models/*.pt' --datasets CIFAR100 --arch ViT \\
        --log-dir ../results/soup

Uniform and greedy soups and the ensemble are those of Model Soups (Wortsman et al., ICML 2022,
Section 2). TWA (Li et al., ICLR 2023) starts from one of the soups and trains the averaging
coefficients: TWA-t on images of the training part, TWA-v on the held-out part, in as many steps.
Greedy and TWA-v look at the held-out part only; test data choose nothing.

Writes `results.jsonl`, `soup.png` and each soup as an ordinary state_dict to --log-dir. What stands
in `results.jsonl` is not done again, so that a second call can add TWA of another kind.
"""

import glob
import hashlib
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

import models
import utils
from training import coefficients, data, entry, flags, locks, logs, ranks, report
from training.flags import number
from training.loop import (
    Trainer,
    build,
    describe,
    device_of,
    evaluate,
    predict,
    reestimate_bn,
    score,
)
from training.optimizers import SCHEDULES, schedule_of
from twa.checkpoints import (
    Checkpoint,
    average,
    check,
    load_into,
    load_state_dict,
    save,
    verify,
)
from utils import UserError


def parse_arguments():
    parser = flags.Parser("soups of fine-tuned models: uniform, greedy, TWA")
    flags.add_soup_arguments(parser, models.ARCHITECTURES, data.DATASETS)
    add = parser.add_argument
    add(
        "--checkpoints",
        nargs="+",
        required=True,
        metavar="GLOB",
        help="state_dicts (.pt, .safetensors) of one architecture",
    )
    add("--log-dir", required=True, help="where results, soups and the figure go")
    add(
        "--bn-images",
        type=number(int, 1),
        default=10_000,
        help="training images on which batch norm is re-estimated for everything that is measured",
    )
    twa = parser.add_argument_group("TWA")
    twa.add_argument(
        "--twa",
        nargs="*",
        default=["t", "v"],
        choices=("t", "v"),
        help="t: on the training part, v: on the held-out part; no value: none",
    )
    twa.add_argument(
        "--start", default="uniform", choices=("uniform", "greedy"), help="soup to start from"
    )
    twa.add_argument(
        "--epochs", type=number(int, 1), default=5, help="passes over as many images as held out"
    )
    coefficients.add_arguments(parser, opt="AdamW", schedule="cosine")
    return parser.parse_args()


def expand(patterns: Sequence[str]) -> list[Path]:
    """The files that match, numbers in their names in order, each once."""
    found = set()
    for pattern in patterns:
        matches = glob.glob(pattern)
        if not matches:
            raise UserError(f"--checkpoints {pattern}: matches no file")
        found |= set(matches)

    def natural(path: str) -> list:
        return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path)]

    return [Path(path) for path in sorted(found, key=natural)]


def refuse_other_split(paths: Sequence[Path], args) -> None:
    """Refuses models of `finetune.py` that were trained on what is held out here."""
    here = flags.held_out(args)
    for folder in sorted({path.parent for path in paths}):
        for record in logs.read_lines(folder / "runs.jsonl"):
            path, there = folder / record["file"], record["settings"]["held_out"]
            if path in paths and there != here:
                raise UserError(
                    f"{path}: was fine-tuned with {there} held out, and here it is {here}; "
                    "give the same --val-ratio and --randomseed"
                )


class Results:
    """`results.jsonl`: a line for everything that was measured, with the settings it came from."""

    def __init__(self, path: Path):
        self.path = path
        self.records = {record["name"]: record for record in logs.read_lines(path)}

    def stand(self, settings: dict, *names: str) -> bool:
        return all(self.records.get(name, {}).get("settings") == settings for name in names)

    def add(self, name: str, settings: dict, **values) -> None:
        """Puts a record in the place of an older one, and tells of it."""
        self.records[name] = {"name": name, **values, "settings": settings}
        logs.write_lines(self.records.values(), self.path)
        print(
            f"{name}: validation {describe(values['validation'])}, test {describe(values['test'])}"
        )


@dataclass
class Bench:
    """One model that takes all weights in turn, and the data they are measured on.

    Args:
        train: for batch norm, on `bn_images` of its images.
    """

    model: nn.Module
    train: data.Loader
    validation: data.Loader
    test: data.Loader
    amp: bool
    bn_images: int

    def put(self, checkpoint: Checkpoint) -> None:
        """Loads weights; whatever is measured gets its batch norm re-estimated alike."""
        load_into(self.model, checkpoint)
        self.reestimate_bn()

    def reestimate_bn(self) -> None:
        reestimate_bn(self.model, self.train, self.amp, self.bn_images)

    def validation_accuracy(self, checkpoint: Checkpoint) -> float:
        self.put(checkpoint)
        return evaluate(self.model, self.validation, self.amp)["accuracy"]

    def scores(self) -> dict[str, dict[str, float]]:
        """Loss and accuracy on both parts, of the weights that are in the model."""
        return {
            "validation": evaluate(self.model, self.validation, self.amp),
            "test": evaluate(self.model, self.test, self.amp),
        }


def measure_models(paths: Sequence[Path], bench: Bench, results: Results, settings: dict) -> None:
    """Adds every individual model, the best of them, and the ensemble (the mean of logits)."""
    started = time.perf_counter()
    device = device_of(bench.model)
    loaders = {"validation": bench.validation, "test": bench.test}
    mean: dict[str, torch.Tensor | float] = dict.fromkeys(loaders, 0.0)
    for path in paths:
        bench.put(path)
        scores = {}
        for part, loader in loaders.items():
            predictions = list(predict(bench.model, loader, bench.amp))
            logits, labels = (torch.cat(tensors) for tensors in zip(*predictions, strict=True))
            scores[part] = score([(logits, labels)], device)
            mean[part] += logits / len(paths)
        results.add(str(path), settings, **scores)

    best = max(paths, key=lambda path: results.records[str(path)]["validation"]["accuracy"])
    scores = {part: results.records[str(best)][part] for part in loaders}
    results.add("best single model", settings, **scores, models=[str(best)], seconds=0.0)
    scores = {
        part: score([(mean[part], loader.split.labels)], device) for part, loader in loaders.items()
    }
    seconds = time.perf_counter() - started
    results.add("ensemble", settings, **scores, models=[*map(str, paths)], seconds=seconds)


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
    name: str, paths: Sequence[Path], start: Path, images: data.Split, bench: Bench, args
) -> dict[str, float]:
    """Trains the averaging coefficients over `paths` on `images`; they are in the model then.

    Returns:
        α of every checkpoint; at a finer granularity the mean over its blocks.
    """
    train = data.Loader(
        images, args.batch_size, train=True, seed=args.randomseed, channels_last=args.amp
    )
    optimizer = coefficients.optimizer_of(args, bench.model, paths, train, start=start)
    print(f"{name}: {coefficients.described(optimizer)}")
    scheduler = schedule_of(SCHEDULES[args.schedule], optimizer, args.epochs * len(train))
    trainer = Trainer(
        bench.model,
        train,
        bench.validation,
        optimizer,
        scheduler,
        args.epochs,
        amp=args.amp,
        print_every=args.print_freq,
        name=f"{name} ",
    )
    for epoch in range(1, args.epochs + 1):
        trainer.epoch(epoch)
    bench.reestimate_bn()
    return dict(zip(map(str, paths), coefficients.averaging_weights(optimizer), strict=True))


def main():
    args = parse_arguments()
    ranks.refuse()
    with locks.lock(args.log_dir):
        make_soups(args)


def make_soups(args):
    utils.set_seed(args.randomseed)
    log_dir = Path(args.log_dir)
    paths = expand(args.checkpoints)
    refuse_other_split(paths, args)

    device = utils.choose_device(args.device)
    training, test = data.load(args.datasets, args.data_dir, device)
    training, held_out = training.hold_out(args.val_ratio, args.randomseed)
    model = build(args.arch, training.spec, device, args)
    for path in paths:
        verify(path)
        check(load_state_dict(path), model.state_dict(), str(path))
    bench = Bench(
        model,
        data.Loader(
            training, args.batch_size, train=True, seed=args.randomseed, channels_last=args.amp
        ),
        data.Loader(held_out, 1000, train=False, channels_last=args.amp),
        data.Loader(test, 1000, train=False, channels_last=args.amp),
        args.amp,
        args.bn_images,
    )

    utils.make_directory(log_dir)
    logs.write_json({"arguments": vars(args), **logs.provenance()}, log_dir / "soup_run.json")
    results = Results(log_dir / "results.jsonl")
    files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    settings = {
        "checkpoints": hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16],
        "datasets": args.datasets,
        "held_out": flags.held_out(args),
        **{key: getattr(args, key) for key in ("batch_size", "bn_images", "amp")},
    }

    def serve(name: str, ingredients: Sequence[Path], started: float, settings: dict, **values):
        """Saves and measures the soup that is in the model."""
        save(model.state_dict(), log_dir / f"{name.replace(' ', '-')}.pt")
        seconds = time.perf_counter() - started
        ingredients = [str(path) for path in ingredients]
        scores = bench.scores()
        results.add(name, settings, **scores, models=ingredients, seconds=seconds, **values)

    if not results.stand(settings, *map(str, paths), "best single model", "ensemble"):
        measure_models(paths, bench, results, settings)

    if not results.stand(settings, "uniform"):
        started = time.perf_counter()
        bench.put(average(paths))
        serve("uniform", paths, started, settings)

    if not results.stand(settings, "greedy"):
        started = time.perf_counter()
        accuracies = [results.records[str(path)]["validation"]["accuracy"] for path in paths]
        ingredients = greedy_soup(
            paths, accuracies, lambda some: bench.validation_accuracy(average(some))
        )
        bench.put(average(ingredients))
        serve("greedy", ingredients, started, settings)

    trained = ("start", "epochs", "opt", "schedule", "lr", "momentum", "weight_decay")
    twa_settings = settings | {key: getattr(args, key) for key in (*trained, "randomseed")}
    for kind in args.twa:
        name = f"TWA-{kind}"
        name += f" {args.granularity}" if args.granularity != "model" else ""
        name += f" {args.bits} bits" if args.bits != 32 else ""
        name += " from greedy" if args.start == "greedy" else ""
        if results.stand(twa_settings, name):
            continue
        started = time.perf_counter()
        # As many images of either part, so that the two differ in what they see, not in how much.
        images = held_out if kind == "v" else training.part(slice(len(held_out)))
        alpha = train_coefficients(name, paths, log_dir / f"{args.start}.pt", images, bench, args)
        serve(name, paths, started, twa_settings, averaging_weights=alpha)

    # Everything that was ever made of these checkpoints, by this call or an earlier one.
    made = [
        record
        for record in results.records.values()
        if "models" in record and settings.items() <= record["settings"].items()
    ]
    soups = {
        record["name"]: {
            "validation": record["validation"]["accuracy"],
            "test": record["test"]["accuracy"],
            "test loss": record["test"]["loss"],
            "models": len(record["models"]),
            "seconds": record["seconds"],
        }
        for record in made
    }
    report.scatter(
        log_dir / "soup.png",
        f"{len(paths)} models on {args.datasets}",
        models=[
            tuple(results.records[str(path)][part]["accuracy"] for part in ("validation", "test"))
            for path in paths
        ],
        soups={name: (s["validation"], s["test"]) for name, s in soups.items()},
    )
    print(report.table(soups, COLUMNS))
    print(f"written: {results.path}, {log_dir / 'soup.png'}, and the soups beside them")


COLUMNS = {
    "validation": "{:.2f} %",
    "test": "{:.2f} %",
    "test loss": "{:.4f}",
    "models": "{}",
    "seconds": "{:.1f}",
}


if __name__ == "__main__":
    entry.run(main)
