"""Trains a classifier of torchvision on an image folder and saves checkpoints for TWA to average.

    python train_sgd_imagenet.py /path/to/imagenet -a resnet18 --amp \\
        --save-dir results/checkpoints --log-dir results

The folder holds `train/` and `val/`, and each of these a folder per class. Writes `0.pt` (the
initialisation), `1.pt`, `2.pt`, …, five an epoch, and `state.pt` (to resume) to --save-dir.
Under `torchrun` each rank trains on its share of every batch.
"""

import models
import utils
from training import flags, image_folders, sgd
from training.flags import number
from training.loop import set_up
from training.run import Run, run_script
from utils import UserError


def parse_arguments():
    parser = flags.Parser("SGD training on an image folder that leaves the checkpoints for TWA")
    add = parser.add_argument
    add("data_dir", metavar="DIR", help="holds train/ and val/, each with a folder per class")
    architectures = models.imagenet.CLASSIFIERS
    flags.add_model_arguments(parser, "--arch", "-a", choices=architectures, default="resnet18")
    add("--pretrained", action="store_true", help="start from torchvision's weights of --arch")
    start_help = "epochs that count as done; --resume knows this itself"
    add("--start-epoch", type=number(int, 0), default=0, help=start_help)
    step_help = "every 30 epochs"
    sgd.add_arguments(parser, epochs=90, saves_per_epoch=5, step_help=step_help)
    flags.add_training_arguments(parser, batch_size=256)
    flags.add_launch_arguments(parser)
    flags.add_image_arguments(parser, image_folders.SIZE)
    parser.set_defaults(datasets=image_folders.NAME)
    args = parser.parse_args()
    if args.pretrained and args.arch not in models.imagenet.CLASSIFIERS:
        parser.error("--pretrained: only with --arch, whose weights torchvision has")
    return args


def main():
    args = parse_arguments()
    flags.check_launch(args)
    if args.start_epoch > args.epochs:
        raise UserError(f"--start-epoch {args.start_epoch} lies past --epochs {args.epochs}")
    with Run(args, args.save_dir, "--save-dir", log_dir=args.log_dir) as run:
        train_sgd(args, run)


def train_sgd(args, run):
    utils.set_seed(args.randomseed)
    model, train, test = set_up(args)
    if args.pretrained:
        models.imagenet.load_pretrained(model, args.arch)

    def every_30_epochs(x: float) -> float:
        return 0.1 ** int(x * args.epochs / 30 + 1e-9)  # x may be rounded down

    factor = every_30_epochs if args.schedule == "step" else None
    sgd.train(run, model, train, test, factor, args.start_epoch, top5=True)


if __name__ == "__main__":
    run_script(main)
