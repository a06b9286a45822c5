"""Trains a model with SGD and saves a checkpoint per epoch: what TWA averages later.

    python train_sgd_cifar.py --datasets CIFAR100 --arch VGG16BN --epochs 200 --lr 0.1 \\
        --save-dir results/checkpoints --log-dir results

Writes `0.pt` (the initialisation), `1.pt`, `2.pt`, … and `state.pt` (to resume) to --save-dir.
"""

from dataclasses import dataclass

import models
import utils
from training import data, entry, flags, sgd, tasks
from training.locks import lock
from training.settings import flag

STEP_HELP = "; step divides the rate by 10 at half and at three quarters of the epochs"


@dataclass(kw_only=True)
class Settings(flags.Model, flags.DataSet, sgd.SGDSettings, flags.Training):
    """SGD training that leaves the checkpoints for TWA"""

    arch: str = flag(default="VGG16BN", choices=models.ARCHITECTURES)
    datasets: str = flag(default="CIFAR10", choices=tuple(data.DATASETS))
    schedule: str = flag(default="step", help=flags.SCHEDULE_HELP + STEP_HELP)


def main():
    args = Settings.parse()
    with lock(args.save_dir, writes=not args.evaluate):
        utils.set_seed(args.randomseed)
        task = tasks.of(args)
        sgd.run(args, task, task.build())


if __name__ == "__main__":
    entry.run(main)
