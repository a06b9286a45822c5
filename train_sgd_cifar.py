"""Trains a model with SGD and saves a checkpoint per epoch: what TWA averages later.

    python train_sgd_cifar.py --datasets CIFAR100 --arch VGG16BN --epochs 200 --lr 0.1 \\
        --save-dir results/checkpoints --log-dir results

Writes `0.pt` (the initialisation), `1.pt`, `2.pt`, … and `state.pt` (to resume) to --save-dir.
"""

import math
from pathlib import Path

import data
import models
import parallel
import utils
from engine import (
    OPTIMIZERS,
    SCHEDULES,
    Progress,
    Trainer,
    describe,
    evaluate,
    schedule_of,
    set_up,
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
    "saves_per_epoch",
    "randomseed",
    "images",
)


def parse_arguments():
    parser = utils.Parser("SGD training that leaves the checkpoints for TWA")
    utils.add_common_arguments(parser, models.ARCHITECTURES, data.DATASETS)
    add = parser.add_argument
    add("--epochs", type=utils.number(int, 0), default=200, help="epochs in all")
    add("--optimizer", default="sgd", choices=tuple(OPTIMIZERS), help="optimizer")
    add(
        "--schedule",
        default="step",
        choices=("step", "constant", "cosine"),
        help="of the rate; step divides it by 10 at half and at three quarters of the epochs",
    )
    add("--lr", "--learning-rate", type=utils.number(float, 0), default=0.1, help="learning rate")
    add("--weight-decay", "--wd", type=utils.number(float, 0), default=1e-4, help="weight decay")
    add("--saves-per-epoch", type=utils.number(int, 1), default=1, help="checkpoints an epoch")
    add("--overwrite", action="store_true", help=utils.OVERWRITE_HELP)
    utils.add_recipe_arguments(parser)
    args = parser.parse_args()
    if args.warmup_epochs > args.epochs:
        parser.error(f"--warmup-epochs {args.warmup_epochs:g} is more than --epochs {args.epochs}")
    return args


def main():
    args = parse_arguments()
    with utils.lock(args):
        train_sgd(args)


def train_sgd(args):
    utils.set_seed(args.randomseed)
    save_dir = Path(args.save_dir)

    model, train, test = set_up(args)
    if args.saves_per_epoch > len(train):
        raise UserError(f"--saves-per-epoch: an epoch has only {len(train)} iterations")
    optimizer = OPTIMIZERS[args.optimizer](
        model.parameters(), args.lr, args.weight_decay, args.momentum
    )
    steps, warmup = args.epochs * len(train), round(args.warmup_epochs * len(train))
    scheduler = schedule_of(SCHEDULES[args.schedule], optimizer, steps, warmup)

    settings = {key: getattr(args, key) for key in RESUME_WITH}
    settings["held_out"] = utils.held_out(args)
    progress = Progress()
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "progress": progress}
    state = utils.state_path(args, "state.pt")
    done = utils.resume(args, state, settings, **parts)
    if args.evaluate:
        tested = evaluate(model, test, args.amp)
        if parallel.rank() == 0:
            print("test", describe(tested))
        return
    if done is None or state.resolve().parent != save_dir.resolve():
        utils.clear(save_dir, args.overwrite)
    done = done or 0
    if done == 0 and progress.iteration == 0:
        utils.save_state(save_dir / "state.pt", 0, settings, **parts)
        parallel.save_model(model, save_dir / "0.pt")
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
                    parallel.save_model(model, save_dir / f"{number}.pt")
                signals.check(lambda: save(before))

            log.epoch(trainer.epoch(epoch, after_step))
            save(epoch)


if __name__ == "__main__":
    utils.run(main)
