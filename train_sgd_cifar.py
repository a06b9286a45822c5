"""Trains a model with SGD and saves a checkpoint per epoch: what TWA averages later.

    python train_sgd_cifar.py --datasets CIFAR100 --arch VGG16BN --epochs 200 --lr 0.1 \\
        --save-dir results/checkpoints --log-dir results

Writes `0.pt` (the initialisation), `1.pt`, `2.pt`, … and `state.pt` (to resume) to --save-dir.
"""

import models
import utils
from training import data, flags, sgd
from training.loop import set_up
from training.run import Run, run_script


def parse_arguments():
    parser = flags.Parser("SGD training that leaves the checkpoints for TWA")
    flags.add_data_set_arguments(parser, models.ARCHITECTURES, data.DATASETS, default="VGG16BN")
    flags.add_training_arguments(parser)
    step_help = "at half and at three quarters of the epochs"
    sgd.add_arguments(parser, epochs=200, saves_per_epoch=1, step_help=step_help)
    return parser.parse_args()


def main():
    args = parse_arguments()
    with Run(args, args.save_dir, "--save-dir", log_dir=args.log_dir) as run:
        utils.set_seed(args.randomseed)
        sgd.train(run, *set_up(args))


if __name__ == "__main__":
    run_script(main)
