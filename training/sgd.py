"""SGD that leaves the checkpoints for TWA: what the scripts for CIFAR and ImageNet share."""

import argparse
import math
from collections.abc import Callable

from torch import nn

from training import data, flags, optimizers, ranks
from training.flags import number
from training.loop import Trainer, describe, evaluate, skipped_images
from training.optimizers import OPTIMIZERS, SCHEDULES
from training.run import Run
from utils import UserError


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
    add("--lr", "--learning-rate", type=flags.scale, default=0.1, help="learning rate")
    add("--momentum", type=number(float, 0, 1), default=0.9, help="momentum of SGD")
    add("--weight-decay", "--wd", type=flags.scale, default=1e-4, help="weight decay")
    saves = {"type": number(int, 1), "default": saves_per_epoch}
    add("--saves-per-epoch", **saves, help="checkpoints an epoch")
    add("--overwrite", action="store_true", help=flags.OVERWRITE_HELP)
    flags.add_recipe_arguments(parser)


def train(
    run: Run,
    model: nn.Module,
    train: data.Loader,
    test: data.Loader,
    factor: Callable[[float], float] | None = None,
    start_epoch: int = 0,
    top5: bool = False,
    state: dict | None = None,
) -> None:
    """Trains `model` as the arguments say, from where a resumed run stopped, or evaluates it.

    Args:
        run: in the folder of the checkpoints.
        factor: the rate's, at x, the share of the training that is done, in [0, 1); None: as
            `--schedule` says.
        start_epoch: how many epochs count as done if there is no state to go on from.
        top5: whether the accuracy among the five best classes is reported, too.
        state: of the optimizer, to begin with; its rate and weight decay are those of `args`.

    Raises:
        UserError, CheckpointError: what a user can mend, as `Run` and `Trainer.epoch`.
    """
    args = run.args
    flags.check_recipe(args)
    run.set_data(model, train, test)
    if args.saves_per_epoch > len(train):
        raise UserError(f"--saves-per-epoch: an epoch has only {len(train)} iterations")
    base, settings = optimizers.chosen(args.optimizer, args.lr, args.weight_decay, args.momentum)
    optimizer = base(model.parameters(), **settings)
    if state is not None:
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state["state"], "param_groups": groups})
    factor = factor or SCHEDULES[args.schedule]
    done = start_epoch * len(train)
    trainer = Trainer.of(args, model, train, test, optimizer, factor, first=done, top5=top5)
    run.restore(trainer, start_epoch)
    if args.evaluate:
        tested = test.measures(evaluate(model, test, args.amp, top5))
        skipped = skipped_images(test)
        if ranks.rank() == 0:
            print("\n".join(filter(None, [f"test {describe(tested)}", skipped])))
        return
    run.start(f"{args.arch} on {args.datasets}: epochs {run.done} to {args.epochs}")
    if run.is_before_first_step:
        ranks.save_model(model, run.folder / f"{run.done * args.saves_per_epoch}.pt")

    # The iterations of an epoch after which a checkpoint is saved, evenly spaced.
    saves = range(1, args.saves_per_epoch + 1)
    save_after = {math.ceil(k * len(train) / args.saves_per_epoch): k for k in saves}

    def save_checkpoint(epoch: int, iteration: int) -> None:
        if iteration in save_after:
            number = (epoch - 1) * args.saves_per_epoch + save_after[iteration]
            ranks.save_model(model, run.folder / f"{number}.pt")

    run.train(after_step=save_checkpoint)
    skipped = skipped_images(train, test)
    if skipped:
        run.log.line(skipped)
