"""Trains a model with SGD and saves a checkpoint per epoch: what TWA averages later.

    python train_sgd_cifar.py --datasets CIFAR100 --arch VGG16BN --epochs 200 --lr 0.1 \\
        --save-dir results/checkpoints --log-dir results

Writes `0.pt` (the initialisation), `1.pt`, `2.pt`, … and `state.pt` (to resume) to --save-dir.
"""

from dataclasses import dataclass

import models
import utils
from training import data, flags, sgd, tasks
from training.run import Run, run_script
from training.settings import flag


@dataclass(kw_only=True)
class Settings(flags.Model, flags.DataSet, sgd.SGDSettings, flags.HeadStage):
    """SGD training that leaves the checkpoints for TWA"""

    arch: str = flag("VGG16BN", choices=models.ARCHITECTURES)
    datasets: str = flag("CIFAR10", choices=tuple(data.DATASETS))
    epochs: int = 200
    schedule: str = flag(
        "step", f"{flags.SCHEDULE}; step divides the rate by 10 after 1/2 and 3/4 of the epochs"
    )


def main():
    args = Settings.parse()
    with Run(args, args.save_dir, "--save-dir", log_dir=args.log_dir) as run:
        utils.set_seed(args.randomseed)
        task = tasks.of(args)
        sgd.train(run, task, task.build())


if __name__ == "__main__":
    run_script(main)
