"""Fine-tunes one base model many times, each time with other settings: what a soup is made of.

    python finetune.py --datasets CIFAR100 --arch ViT --base ../results/base.pt --models 12 \\
        --optimizer adamw --lr 1e-5 1e-3 --epochs 4 8 --label-smoothing 0 0.1 --randaugment 0 9 \\
        --save-dir ../results/soup/models

The flags that take several values span a grid, which is run whole, or from which `--models N` draws
N runs. Each leaves a `state_dict` (`001.pt`, `002.pt`, …) and a line of `runs.jsonl` in --save-dir:
its settings and its validation accuracy. Finished runs are not run again.
"""

import argparse
import copy
import hashlib
import itertools
import math
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import models
import utils
from training import data, flags, optimizers, ranks, tasks
from training.files import read_lines, save, write_json, write_lines
from training.logs import provenance
from training.loop import Diverged, Trainer, describe
from training.optimizers import SCHEDULES
from training.run import lock, run_script
from training.settings import REQUIRED, flag
from twa.checkpoints import CheckpointError, load_into
from twa.formats import verify
from utils import UserError


@dataclass(kw_only=True)
class Settings(flags.Soup, flags.Training, flags.Recipe, flags.Augmentation):
    """fine-tunes one base model many times, each time with other settings"""

    datasets: str = flag("CIFAR10", choices=tuple(data.DATASETS))
    arch: str = flag("PreResNet20", choices=models.ARCHITECTURES)
    base: str | None = flag(
        REQUIRED, "state_dict that every run starts from", metavar="FILE", exclusive="base"
    )
    pretrained: bool = flag(
        False, "start from torchvision's weights of --arch, with a new head", exclusive="base"
    )
    save_dir: str = flag(REQUIRED, "folder of the models and of runs.jsonl")
    models: int | None = flag(None, "number of runs to draw (default: the whole grid)", low=1)
    images: int | None = flag(None, "number of training images to use (default: all)", low=1)
    schedule: str = flag("cosine", choices=tuple(SCHEDULES))
    # What varies: one value or more each. A draw of the rate is log-uniform between the extremes.
    lr: tuple[float, ...] = flag((0.01,), "learning rates", nargs="+", low=1e-12)
    weight_decay: tuple[float, ...] = flag((1e-4,), "weight decays", nargs="+")
    epochs: tuple[int, ...] = flag((5,), "numbers of epochs", nargs="+", low=1)
    label_smoothing: tuple[float, ...] = flag((0.0,), nargs="+")
    randaugment: tuple[int, ...] = flag((0,), nargs="+")

    def check(self):
        if self.pretrained and self.arch not in models.imagenet.NAMES:
            known = ", ".join(models.imagenet.NAMES)
            raise UserError(f"--pretrained: only with --arch {known}")


VARIED = ("lr", "weight_decay", "epochs", "label_smoothing", "randaugment")


def settings_of_runs(args) -> list[dict]:
    """What varies, run by run, with a seed for each; the first runs of N + 1 are those of N."""
    values = {key: getattr(args, key) for key in VARIED}
    if args.models is None:
        runs = [dict(zip(VARIED, v, strict=True)) for v in itertools.product(*values.values())]
    else:
        runs = []
        for run in range(1, args.models + 1):
            draw = random.Random(f"{args.randomseed}/{run}")
            runs.append({key: draw.choice(choices) for key, choices in values.items()})
            lowest, highest = math.log(min(args.lr)), math.log(max(args.lr))
            runs[-1]["lr"] = math.exp(draw.uniform(lowest, highest))
    return [settings | {"seed": run} for run, settings in enumerate(runs, start=1)]


def start_point(args, model: torch.nn.Module) -> tuple[dict, str]:
    """The `state_dict` that every run starts from, and what identifies it."""
    if args.pretrained:
        models.imagenet.load_pretrained(model, args.arch)
        origin = "torchvision"
    else:
        verify(args.base)
        load_into(model, args.base)
        origin = hashlib.sha256(Path(args.base).read_bytes()).hexdigest()[:16]
    return copy.deepcopy(model.state_dict()), origin


def is_finished(record: dict | None, settings: dict, path: Path, model: torch.nn.Module) -> bool:
    """Whether the run of `record` left a model at `path` that is whole and fits, or diverged.

    Raises:
        UserError: it was run with other settings.
    """
    if record is None:
        return False
    for key, value in settings.items():
        if record["settings"].get(key) != value:
            raise UserError(
                f"{path}: was made with {key} {record['settings'].get(key)} instead of {value}; "
                f"give another --save-dir, or remove {path.parent}"
            )
    if record["validation"] is None:
        return True
    try:
        verify(path)
        load_into(model, path)
    except CheckpointError:
        return False
    return True


def train(task: tasks.Task, model, validation, name: str, args) -> dict[str, float]:
    """Fine-tunes `model` with the settings of one run; its loss and accuracy on `validation`."""
    utils.set_seed(args.seed)
    varied = {"seed": args.seed, "randaugment": args.randaugment}
    loader = task.loader(task.train_set, train=True, **varied)
    base, settings = optimizers.chosen(args.optimizer, args.lr, args.weight_decay, args.momentum)
    optimizer = base(model.parameters(), **settings)
    factor = SCHEDULES[args.schedule]
    trainer = Trainer.of(args, model, loader, validation, optimizer, factor, name=f"{name} ")
    for epoch in range(1, args.epochs + 1):
        metrics = trainer.epoch(epoch)
    return {key: metrics[f"test_{key}"] for key in ("loss", "accuracy")}


def main():
    args = Settings.parse()
    ranks.refuse()
    with lock(args.save_dir):
        fine_tune(args)


def fine_tune(args):
    utils.set_seed(args.randomseed)
    task = tasks.of(args)
    validation = task.loader(task.held_out, train=False)
    model = task.build()
    start, origin = start_point(args, model)

    save_dir = Path(args.save_dir)
    write_json({"arguments": vars(args), **provenance()}, save_dir / "run.json")
    same = ("batch_size", "optimizer", "momentum", "schedule", "amp", "warmup_epochs", "clip_grad")
    fixed = {
        "model": args.arch,
        "datasets": args.datasets,
        "held_out": flags.held_out(args),
        "base": origin,
        "images": len(task.train_set),
        **{key: getattr(args, key) for key in same},
    }
    runs = save_dir / "runs.jsonl"
    records = {record["file"]: record for record in read_lines(runs, "file", "settings")}
    for varied in settings_of_runs(args):
        settings, path = varied | fixed, save_dir / f"{varied['seed']:03}.pt"
        if is_finished(records.get(path.name), settings, path, model):
            continue
        started = time.perf_counter()
        model.load_state_dict(start)
        model.zero_grad()  # a run that diverged leaves its gradients
        try:
            run = argparse.Namespace(**vars(args) | varied)
            scores = train(task, model, validation, path.name, run)
            save(model.state_dict(), path)
        except Diverged as diverged:
            print(f"{path.name} diverged, and soups do without it: {diverged}")
            scores = None
        records[path.name] = {
            "file": path.name,
            "settings": settings,
            "validation": scores,
            "seconds": time.perf_counter() - started,
        }
        write_lines(records.values(), runs)
        if scores:
            chosen = ", ".join(f"{key} {value:.4g}" for key, value in varied.items())
            print(f"{path.name}: validation {describe(scores)} ({chosen})")
    print(f"written: {save_dir}")


if __name__ == "__main__":
    run_script(main)
