"""SGD that leaves the checkpoints for TWA: what the scripts for CIFAR and ImageNet share."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

from torch import nn

import utils
from training import data, flags, ranks
from training.flags import number
from training.loop import (
    OPTIMIZERS,
    Progress,
    Trainer,
    describe,
    evaluate,
    schedule_of,
    skipped_images,
)
from utils import UserError

# What has to be the same when a run is resumed: it would not be that run otherwise.
RESUME_WITH = (
    "arch",
    "datasets",
    "epochs",
    "batch_size",
    "optimizer",
    "schedule",
    "lr",
    "momentum",
    "weight_decay",
    "warmup_epochs",
    "label_smoothing",
    "clip_grad",
    "saves_per_epoch",
    "randomseed",
    "images",
    "randaugment",
    "amp",
)


def add_arguments(
    parser: argparse.ArgumentParser, epochs: int, saves_per_epoch: int, step_help: str
) -> None:
    """The flags of the recipe and of the checkpoints.

    Args:
        epochs, saves_per_epoch: what they are if left out.
        step_help: when the schedule "step" divides the rate by 10.
    """
    add = parser.add_argument
    add("--epochs", type=number(int, 0), default=epochs, help="epochs in all")
    add("--optimizer", default="sgd", choices=tuple(OPTIMIZERS), help="optimizer")
    add(
        "--schedule",
        default="step",
        choices=("step", "constant", "cosine"),
        help=f"{flags.SCHEDULE_HELP}; step divides the rate by 10 {step_help}",
    )
    add("--lr", "--learning-rate", type=number(float, 0), default=0.1, help="learning rate")
    add("--momentum", type=number(float, 0, 1), default=0.9, help="momentum of SGD")
    add("--weight-decay", "--wd", type=number(float, 0), default=1e-4, help="weight decay")
    saves = {"type": number(int, 1), "default": saves_per_epoch}
    add("--saves-per-epoch", **saves, help="checkpoints an epoch")
    add("--overwrite", action="store_true", help=flags.OVERWRITE_HELP)
    flags.add_recipe_arguments(parser)


def run(
    args: argparse.Namespace,
    model: nn.Module,
    train: data.Loader,
    test: data.Loader,
    factor: Callable[[float], float],
    start_epoch: int = 0,
    resume_with: tuple[str, ...] = RESUME_WITH,
    top5: bool = False,
) -> None:
    """Trains `model` as the arguments say, from where a resumed run stands, or evaluates it.

    Args:
        factor: the rate's, at x, the share of the training that is done, in [0, 1).
        start_epoch: how many epochs count as done if there is no state to go on from.
        resume_with: the arguments that must be the same when a run is resumed.
        top5: whether the accuracy among the five best classes is reported, too.

    Raises:
        UserError, CheckpointError: what a user can mend, as `Trainer.epoch` and `utils.resume`.
    """
    if args.warmup_epochs > args.epochs:
        raise UserError(
            f"--warmup-epochs {args.warmup_epochs:g} is more than --epochs {args.epochs}"
        )
    if args.saves_per_epoch > len(train):
        raise UserError(f"--saves-per-epoch: an epoch has only {len(train)} iterations")
    save_dir = Path(args.save_dir)
    optimizer = OPTIMIZERS[args.optimizer](
        model.parameters(), args.lr, args.weight_decay, args.momentum
    )
    steps, warmup = args.epochs * len(train), round(args.warmup_epochs * len(train))
    scheduler = schedule_of(factor, optimizer, steps, warmup, first=start_epoch * len(train))

    settings = {key: getattr(args, key) for key in resume_with}
    settings["held_out"] = flags.held_out(args)
    progress = Progress()
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "progress": progress}
    state = utils.state_path(args, "state.pt")
    resumed = utils.resume(args, state, {} if args.evaluate else settings, **parts)
    if args.evaluate:
        tested, skipped = evaluate(model, test, args.amp, top5), skipped_images(test)
        if ranks.rank() == 0:
            print("test", describe(tested))
            if skipped:
                print(skipped)
        return
    if resumed is None or state.resolve().parent != save_dir.resolve():
        utils.clear(save_dir, args.overwrite)
    done = start_epoch if resumed is None else resumed
    if done == start_epoch and progress.iteration == 0:
        utils.save_state(save_dir / "state.pt", done, settings, **parts)
        ranks.save_model(model, save_dir / f"{done * args.saves_per_epoch}.pt")
    log = utils.RunLog(args, resumed_epoch=done)
    log.line(f"{args.arch} on {args.datasets}: epochs {done} to {args.epochs}")
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
        label_smoothing=args.label_smoothing,
        clip_grad=args.clip_grad,
        top5=top5,
        progress=progress,
        state=save_dir / "state.pt",
    )

    # The iterations of an epoch after which a checkpoint is saved, evenly spaced.
    save_after = [
        math.ceil(k * len(train) / args.saves_per_epoch) for k in range(1, args.saves_per_epoch + 1)
    ]

    def save(epochs: int) -> None:
        utils.save_state(save_dir / "state.pt", epochs, settings, **parts)

    with utils.Signals(held=True) as signals:
        for epoch in range(done + 1, args.epochs + 1):

            def after_step(iteration: int, before: int = epoch - 1):
                if iteration in save_after:
                    number = before * args.saves_per_epoch + save_after.index(iteration) + 1
                    ranks.save_model(model, save_dir / f"{number}.pt")
                signals.check(lambda: save(before))

            log.epoch(trainer.epoch(epoch, after_step))
            save(epoch)
    skipped = skipped_images(train, test)
    if skipped:
        log.line(skipped)
