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
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import models
import utils
from training import data, flags, optimizers, ranks
from training.files import read_lines, save, write_json, write_lines
from training.flags import number
from training.logs import provenance
from training.loop import Diverged, Trainer, build, describe
from training.optimizers import OPTIMIZERS, SCHEDULES
from training.run import lock, run_script
from twa.files.checkpoints import CheckpointError, load_into
from twa.files.formats import verify
from utils import UserError


def parse_arguments():
    parser = flags.Parser("fine-tunes one base model many times, each time with other settings")
    flags.add_soup_arguments(parser, models.ARCHITECTURES, data.DATASETS)
    add = parser.add_argument
    base = parser.add_mutually_exclusive_group(required=True)
    base.add_argument("--base", metavar="FILE", help="state_dict that every run starts from")
    pretrained_help = "start from torchvision's weights of --arch, with a new head"
    base.add_argument("--pretrained", action="store_true", help=pretrained_help)
    add("--save-dir", required=True, help="where models and runs.jsonl go")
    add("--models", type=number(int, 1), metavar="N", help="draw N runs; left out, the whole grid")
    add("--images", type=number(int, 1), help="of the training part to use; left out, all")
    add("--optimizer", default="sgd", choices=tuple(OPTIMIZERS), help="optimizer")
    add("--momentum", type=number(float, 0, 1), default=0.9, help="momentum of SGD")
    add("--schedule", default="cosine", choices=tuple(SCHEDULES), help=flags.SCHEDULE_HELP)
    add("--warmup-epochs", type=number(float, 0), default=0.0, help=flags.WARMUP_HELP)
    add("--clip-grad", type=number(float, 0), metavar="NORM", help=flags.CLIP_HELP)

    grid = parser.add_argument_group("settings that vary, one value or more each")
    add = partial(grid.add_argument, nargs="+")
    lr_help = "rates; a draw is log-uniform between the lowest and the highest"
    share, strength = number(float, 0, 1), number(int, 0, 30)
    add("--lr", type=number(float, 1e-12), default=[0.01], help=lr_help)
    add("--weight-decay", "--wd", type=number(float, 0), default=[1e-4], help="decays")
    add("--epochs", type=number(int, 1), default=[5], help="lengths of the runs")
    add("--label-smoothing", type=share, default=[0.0], help=flags.SMOOTHING_HELP)
    add("--randaugment", type=strength, default=[0], help=flags.RANDAUGMENT_HELP)
    args = parser.parse_args()
    if args.warmup_epochs > min(args.epochs):
        parser.error(f"--warmup-epochs {args.warmup_epochs:g} is more than the least of --epochs")
    if args.pretrained and args.arch not in models.imagenet.NAMES:
        parser.error(f"--pretrained: only with --arch {', '.join(models.imagenet.NAMES)}")
    return args


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
    """The `state_dict` that every run starts from, and what tells it from another."""
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


def train(model, training, validation, name: str, args) -> dict[str, float]:
    """Fine-tunes `model` with the settings of one run; its loss and accuracy on `validation`."""
    utils.set_seed(args.seed)
    augmented = {"randaugment": args.randaugment, "channels_last": args.amp}
    loader = data.Loader(training, args.batch_size, train=True, seed=args.seed, **augmented)
    base, settings = optimizers.chosen(args.optimizer, args.lr, args.weight_decay, args.momentum)
    optimizer = base(model.parameters(), **settings)
    factor = SCHEDULES[args.schedule]
    trainer = Trainer.of(args, model, loader, validation, optimizer, factor, name=f"{name} ")
    for epoch in range(1, args.epochs + 1):
        metrics = trainer.epoch(epoch)
    return {key: metrics[f"test_{key}"] for key in ("loss", "accuracy")}


def main():
    args = parse_arguments()
    ranks.refuse()
    with lock(args.save_dir):
        fine_tune(args)


def fine_tune(args):
    utils.set_seed(args.randomseed)
    device = utils.choose_device(args.device)
    training, _ = data.load(args.datasets, args.data_dir, device)
    training, held_out = training.hold_out(args.val_ratio, args.randomseed)
    training = training.part(slice(args.images))
    validation = data.Loader(held_out, 1000, train=False, channels_last=args.amp)
    model = build(args.arch, training.spec, device, args.amp, args.compile)
    start, origin = start_point(args, model)

    save_dir = Path(args.save_dir)
    write_json({"arguments": vars(args), **provenance()}, save_dir / "run.json")
    same = ("batch_size", "optimizer", "momentum", "schedule", "amp", "warmup_epochs", "clip_grad")
    fixed = {
        "model": args.arch,
        "datasets": args.datasets,
        "held_out": flags.held_out(args),
        "base": origin,
        "images": len(training),
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
            scores = train(model, training, validation, path.name, run)
            save(model.state_dict(), path)
        except Diverged as diverged:
            print(f"{path.name} is left out: {diverged}")
            scores = None
        records[path.name] = {
            "file": path.name,
            "settings": settings,
            "validation": scores,
            "seconds": time.perf_counter() - started,
        }
        write_lines(records.values(), runs)
        if scores:
            told = ", ".join(f"{key} {value:.4g}" for key, value in varied.items())
            print(f"{path.name}: validation {describe(scores)} ({told})")
    print(f"written: {save_dir}")


if __name__ == "__main__":
    run_script(main)
