"""SGD that leaves the checkpoints for TWA: what the scripts for images and text share."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from training import flags, optimizers, ranks
from training.loop import Trainer, describe
from training.optimizers import SCHEDULES
from training.run import Run
from training.settings import flag
from training.tasks import Task
from utils import UserError


@dataclass(kw_only=True)
class SGDSettings(flags.Training, flags.Recipe, flags.Overwrite):
    """checkpoints"""

    saves_per_epoch: int = flag(1, "checkpoints per epoch", low=1)


def train(
    run: Run,
    task: Task,
    model: nn.Module,
    factor: Callable[[float], float] | None = None,
    start_epoch: int = 0,
    state: dict | None = None,
) -> None:
    """Trains `model` as the settings say, or evaluates it, from where a resumed run stopped.

    Args:
        run: in the folder of the checkpoints.
        factor: the rate's, at x, the share of the training that is done, in [0, 1); None: as
            `--schedule` says.
        start_epoch: how many epochs count as done if there is no state to resume from.
        state: of the optimizer, to begin with; its rate and weight decay are those of `args`.

    Raises:
        UserError, CheckpointError: what a user can mend, as `Run` and `Trainer.epoch`.
    """
    args, train = run.args, task.train
    run.set_task(task, model)
    if args.saves_per_epoch > len(train):
        raise UserError(f"--saves-per-epoch: an epoch has only {len(train)} iterations")
    base, settings = optimizers.chosen(args.optimizer, args.lr, args.weight_decay, args.momentum)
    optimizer = base(model.parameters(), **settings)
    if state is not None:
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state["state"], "param_groups": groups})
    factor, first = factor or SCHEDULES[args.schedule], start_epoch * len(train)
    more = {"first": first, "top5": task.top5}
    trainer = Trainer.of(args, model, train, task.test, optimizer, factor, **more)
    run.restore(trainer, start_epoch)
    if args.evaluate:
        ranks.print_once(f"test {describe(task.evaluate(model))}", task.skipped())
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
    run.log.line(task.skipped())
