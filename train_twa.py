"""Trains the averaging coefficients over a window of checkpoints (Li et al., ICLR 2023).

    python train_twa.py --datasets CIFAR100 --arch VGG16BN --params_start 0 --params_end 101 \\
        --train_start -1 --opt SGD --schedule step --lr 2 --epochs 10 \\
        --save-dir results/checkpoints --log-dir results

Reads `N.pt` from --save-dir and writes `twa.pt`, an ordinary state_dict, there; `twa.json` (the
results) and `twa.png` go to --log-dir. Test data choose nothing: the end of training is reported.

Under `torchrun` the ranks hold model and basis together, a shard each, and all else is the same.
"""

import math
import time
from functools import partial
from pathlib import Path

from torch import nn

import models
import utils
from training import coefficients, data, flags, image_folders, ranks, report
from training.flags import number
from training.loop import (
    SCHEDULES,
    Progress,
    Trainer,
    evaluate,
    reestimate_bn,
    schedule_of,
    set_up,
    skipped_images,
)
from twa.checkpoints import average, load_into, verify
from utils import UserError

# What has to be the same when a run is resumed: it would not be that run otherwise.
RESUME_WITH = (
    "arch",
    "datasets",
    "epochs",
    "extract",
    "components",
    "bits",
    "granularity",
    "batch_size",
    "accumulate",
    "opt",
    "schedule",
    "lr",
    "momentum",
    "weight_decay",
    "randomseed",
    "images",
    "image_size",
    "randaugment",
    "amp",
)


def parse_arguments():
    parser = flags.Parser("trains the averaging coefficients over a window of checkpoints")
    architectures = dict.fromkeys((*models.ARCHITECTURES, *models.imagenet.CLASSIFIERS))
    flags.add_common_arguments(parser, architectures, (*data.DATASETS, image_folders.NAME))
    add = parser.add_argument
    epochs_help = "epochs over the training set, or over its held-out part with --split"
    add("--epochs", type=number(int, 0), default=100, help=epochs_help)
    add("--params_start", type=number(int, 0), default=0, help="first checkpoint of the window")
    add("--params_end", type=number(int, 0), default=51, help="one past the window's last")
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--train_start",
        type=number(int, -1),
        default=-1,
        help="checkpoint to start from; -1: the mean of the window (SWA)",
    )
    start.add_argument(
        "--start-average",
        type=number(int, 1),
        metavar="K",
        help="start from the mean of the window's last K checkpoints",
    )
    add(
        "--extract",
        default="Schmidt",
        choices=("Schmidt", "SVD"),
        help="how the basis is made: Gram-Schmidt, or the window's principal directions",
    )
    add("--components", type=number(int, 1), help="directions that --extract SVD keeps")
    coefficients.add_arguments(parser, opt="SGD", schedule="step")
    add("--accumulate", "-acc", type=number(int, 1), default=1, help="batches per projected step")
    add(
        "--reshard-after-forward",
        action="store_true",
        help="under torchrun, gather the weights of a block once more for its backward pass: for "
        "models that one device cannot hold",
    )
    flags.add_image_arguments(parser, None)
    args = parser.parse_args()
    if args.datasets == image_folders.NAME:
        args.image_size = args.image_size or image_folders.SIZE
    elif args.image_size or args.strict_images:
        parser.error(f"--image-size and --strict-images: only with --datasets {image_folders.NAME}")
    if (args.extract == "SVD") != (args.components is not None):
        parser.error("--extract SVD and --components belong together")
    return args


def window_paths(save_dir: Path, start: int, end: int) -> list[Path]:
    """The checkpoints `start` to `end` - 1 of `save_dir`, all of which are there."""
    if start >= end:
        raise UserError(
            f"--params_start {start} --params_end {end}: the window [{start}, {end}) is empty"
        )
    there = {int(p.stem) for p in save_dir.glob("*.pt") if p.stem.isdecimal()}
    missing = next((i for i in range(start, end) if i not in there), None)
    if missing is not None:
        found = f"it holds {min(there)} to {max(there)}" if there else "it holds no checkpoints"
        raise UserError(f"{save_dir}: {missing}.pt is missing from [{start}, {end}); {found}")
    return [save_dir / f"{i}.pt" for i in range(start, end)]


def averages_of(window: list[Path], args, model: nn.Module) -> tuple[dict, str]:
    """The averages that TWA is compared with, and which of them is its start point."""
    expected = model.state_dict()
    averages = {
        "last": window[-1],
        f"mean of last {min(5, len(window))}": average(window[-5:], expected),
        "SWA": average(window, expected),
    }
    if args.start_average:
        if args.start_average > len(window):
            raise UserError(f"--start-average: the window has only {len(window)} checkpoints")
        start = f"mean of last {args.start_average}"
        averages.setdefault(start, average(window[-args.start_average :], expected))
    elif args.train_start >= 0:
        start = f"checkpoint {args.train_start}"
        averages[start] = Path(args.save_dir) / f"{args.train_start}.pt"
    else:
        start = "SWA"
    return averages, start


def main():
    args = parse_arguments()
    with utils.lock(args):
        train_twa(args)


def train_twa(args):
    utils.set_seed(args.randomseed)
    save_dir, log_dir = Path(args.save_dir), Path(args.log_dir)
    window = window_paths(save_dir, args.params_start, args.params_end)
    model, train, test = set_up(args, on_held_out=True, shard=True)
    on_imagenet = args.datasets == image_folders.NAME
    bn_images = image_folders.BN_IMAGES if on_imagenet else None

    # Each file read once, by one of the ranks: the others touch their own columns only.
    start_point = [save_dir / f"{args.train_start}.pt"] if args.train_start >= 0 else []
    for path in [*window, *start_point][ranks.rank() :: ranks.world()]:
        verify(path)

    # Batch norm is re-estimated for every solution: its statistics belong to the data.
    averages, start = averages_of(window, args, model)
    sgd = report.SGDRun.read(log_dir)
    spent = sgd.spent(args.params_end - 1)
    solutions = {}
    for name, checkpoint in averages.items():
        load_into(model, checkpoint)
        reestimate_bn(model, train, args.amp, bn_images)
        solutions[name] = evaluate(model, test, args.amp, on_imagenet) | spent
    if args.evaluate:
        skipped = skipped_images(train, test)
        if ranks.rank() == 0:
            print(report.table(solutions))
            if skipped:
                print(skipped)
        return

    started = time.perf_counter()
    optimizer = coefficients.optimizer_of(
        args,
        model,
        window,
        train,
        start=averages[start],
        extract=args.extract,
        components=args.components,
    )
    rate = optimizer.param_groups[0]["lr"]
    build_seconds = time.perf_counter() - started
    steps = args.epochs * math.ceil(len(train) / args.accumulate)
    scheduler = schedule_of(SCHEDULES[args.schedule], optimizer, steps)
    settings = {key: getattr(args, key) for key in RESUME_WITH}
    settings |= {
        "window": f"[{args.params_start}, {args.params_end})",
        "start": start,
        "held_out": flags.held_out(args),
    }
    progress = Progress()
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "progress": progress}
    done = utils.resume(args, utils.state_path(args, "twa_state.pt"), settings, **parts) or 0

    log = utils.RunLog(args, prefix="twa_", resumed_epoch=done)
    log.line(
        f"{args.arch} on {args.datasets}: TWA over checkpoints {args.params_start} to "
        f"{args.params_end - 1} from {start}: {coefficients.described(optimizer)} in "
        f"{build_seconds:.1f} s"
    )
    if args.split and sgd.held_out != flags.held_out(args):
        log.line(
            f"note: the checkpoints' run held out {sgd.held_out or 'nothing'}, so its models know "
            "images that the coefficients are trained on; give both the same --split"
        )
    trainer = Trainer(
        model,
        train,
        test,
        optimizer,
        scheduler,
        log.line,
        args.epochs,
        amp=args.amp,
        print_every=args.print_freq,
        accumulate=args.accumulate,
        top5=on_imagenet,
        name="TWA ",
        progress=progress,
        state=save_dir / "twa_state.pt",
    )

    def save(epochs: int) -> None:
        utils.save_state(save_dir / "twa_state.pt", epochs, settings, **parts)

    if done == 0 and progress.iteration == 0:
        save(0)
    with utils.Signals(held=True) as signals:
        for epoch in range(done + 1, args.epochs + 1):
            stop = partial(signals.check, partial(save, epoch - 1))
            log.epoch(trainer.epoch(epoch, lambda _, stop=stop: stop()))
            save(epoch)

    # The end of training is what is reported: test data choose nothing.
    reestimate_bn(model, train, args.amp, bn_images)
    ranks.save_model(model, save_dir / "twa.pt")
    seconds = build_seconds + sum(m["seconds"] for m in log.epochs)
    solutions["TWA"] = evaluate(model, test, args.amp, on_imagenet) | {
        "epochs": spent["epochs"] + args.epochs * (args.val_ratio / 100 if args.split else 1),
        "seconds": spent["seconds"] + seconds,
    }
    alpha = coefficients.averaging_weights(optimizer)
    skipped = skipped_images(train, test)
    if ranks.rank() > 0:
        return
    averaging_weights = {path.name: a for path, a in zip(window, alpha, strict=True)}
    utils.write_json(
        {
            "results": solutions,
            "averaging_weights": averaging_weights,
            "epochs": args.epochs,
            "seconds": seconds,
            "build_seconds": build_seconds,
            "lr": rate,
            "start": start,
            "sgd": sgd.end,
        },
        log_dir / "twa.json",
    )
    report.figure(
        log_dir / "twa.png",
        f"{args.arch} on {args.datasets}",
        curves=sgd.curves,
        points={name: (s["epochs"], s["accuracy"]) for name, s in solutions.items()},
        averaging_weights=averaging_weights,
    )
    if sgd.end and sgd.end["epochs"] > spent["epochs"]:
        solutions["SGD to its end"] = sgd.end
    log.line(report.table(solutions))
    if skipped:
        log.line(skipped)
    log.line(f"written: {save_dir / 'twa.pt'}, {log_dir / 'twa.json'}, {log_dir / 'twa.png'}")


if __name__ == "__main__":
    utils.run(main)
