"""Trains a classifier of torchvision on an image folder and saves checkpoints for TWA to average.

    python train_sgd_imagenet.py /path/to/imagenet -a resnet18 --amp \\
        --save-dir results/checkpoints --log-dir results

The folder holds `train/` and `val/`, and each of these a folder per class. Writes `0.pt` (the
initialisation), `1.pt`, `2.pt`, …, five per epoch, and `state.pt` (to resume) to --save-dir.
Under `torchrun` each rank trains on its share of every batch.
"""

from dataclasses import dataclass

import models
import utils
from training import flags, sgd, tasks
from training.run import Run, run_script
from training.settings import REQUIRED, derived, flag, free
from utils import UserError


@dataclass(kw_only=True)
class Settings(flags.Model, sgd.SGDSettings, flags.HeadStage, flags.ImageFolder, flags.Launch):
    """SGD training on an image folder that leaves the checkpoints for TWA"""

    data_dir: str = free(
        REQUIRED, "holds train/ and val/, a folder per class", "data_dir", metavar="DIR"
    )
    arch: str = flag("resnet18", choices=models.imagenet.CLASSIFIERS)
    datasets: str = derived(flags.IMAGE_FOLDER, free=False)
    pretrained: bool = free(False, "start from torchvision's weights of --arch")
    start_epoch: int = free(0, "epochs that count as done; --resume knows them itself", low=0)
    epochs: int = 90
    saves_per_epoch: int = 5
    batch_size: int = 256
    schedule: str = flag("step", f"{flags.SCHEDULE}; step divides the rate by 10 every 30 epochs")

    def check(self):
        if self.pretrained and self.model_factory:
            raise UserError("--pretrained: only with --arch, whose weights torchvision has")
        if self.start_epoch > self.epochs:
            raise UserError(f"--start-epoch {self.start_epoch} lies past --epochs {self.epochs}")


def main():
    args = Settings.parse()
    with Run(args, args.save_dir, "--save-dir", log_dir=args.log_dir) as run:
        train_sgd(args, run)


def train_sgd(args, run):
    utils.set_seed(args.randomseed)
    task = tasks.of(args)
    model = task.build()
    if args.pretrained:
        models.imagenet.load_pretrained(model, args.arch)

    def every_30_epochs(x: float) -> float:
        return 0.1 ** int(x * args.epochs / 30 + 1e-9)  # x may be rounded down

    factor = every_30_epochs if args.schedule == "step" else None
    sgd.train(run, task, model, factor, args.start_epoch)


if __name__ == "__main__":
    run_script(main)
