"""The flags that scripts share, in groups that a script's settings inherit."""

import argparse
from dataclasses import dataclass

import torch

from training import ranks, trackers
from training.settings import Settings, derived, flag
from utils import UserError

IMAGE_FOLDER, TEXT = "ImageNet", "Text"  # what --datasets calls them
# Flags that one kind of data alone has a use for.
_OF_ONE_KIND = {
    IMAGE_FOLDER: ("image_size", "strict_images"),
    TEXT: ("epoch_steps", "tokenizer", "context"),
}
_OF_IMAGES = ("images", "randaugment", "val_ratio")

SCALE = {"low": 0, "high": 1e30}  # of a rate or a weight decay: float32 holds what follows from it
RANDAUGMENT = {
    "low": 0,
    "high": 30,
    "help": "strength of RandAugment, with two operations per image; 0: none",
}
WARMUP = {
    "low": 0,
    "help": "epochs over which the rate rises linearly; the schedule spans the others",
}
SMOOTHING = {"low": 0, "high": 1, "help": "share of a label that is spread over all classes"}
CLIP = {"low": 0, "metavar": "NORM", "help": "maximum gradient norm (default: no clipping)"}
WORKERS_HELP = "processes per rank that decode and augment an image folder; other data need none"
SCHEDULE_HELP = "learning rate schedule"


def percentage(text: str) -> float:
    """Parses a percentage that leaves something on both sides."""
    value = float(text)
    if not 0 < value < 100:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 100, both excluded")
    return value


def factory(text: str) -> str:
    """Parses `module:function`, which `models.build` imports and calls."""
    if not all(text.partition(":")):
        raise argparse.ArgumentTypeError(f"{text} is not MODULE:FUNCTION")
    return text


@dataclass(kw_only=True)
class Model(Settings):
    """model"""

    arch: str = flag("--arch", "-a", metavar="ARCH", exclusive="model", help="architecture")
    model_factory: str | None = flag(
        default=None,
        type=factory,
        metavar="MODULE:FUNCTION",
        exclusive="model",
        may_change=True,  # it becomes `arch`
        help="your own function, called without arguments, that returns the nn.Module",
    )

    def check(self):
        self.arch = self.model_factory or self.arch


@dataclass(kw_only=True)
class DataSet(Settings):
    """data set"""

    datasets: str = flag(default="CIFAR10", help="data set")
    data_dir: str | None = flag(
        default="./datasets", may_change=True, help="folder of the data sets, or for downloads"
    )

    def check(self):
        for kind, names in _OF_ONE_KIND.items():
            if self.datasets != kind:
                self.refuse(*names, why=f"only with --datasets {kind}")
        if self.datasets == TEXT:
            self.refuse(*_OF_IMAGES, why=f"not with --datasets {TEXT}; leave it out")


@dataclass(kw_only=True)
class Batch(Settings):
    """batches and seed"""

    batch_size: int = flag(
        "--batch-size", "-b", default=128, low=1, help="images, or windows of text, per step"
    )
    randomseed: int = flag(
        "--randomseed", "--seed", default=1, low=0, high=2**31 - 1, help="seed of all randomness"
    )


@dataclass(kw_only=True)
class TrainingSet(Settings):
    """training set"""

    split: bool = flag(
        default=False,
        may_change=True,  # as is the next: `held_out` says what matters of them
        help="hold out a part of the training set, drawn by --randomseed: SGD does not train on "
        "it, TWA trains the coefficients on it alone",
    )
    val_ratio: float | None = flag(
        default=10, type=percentage, metavar="X", may_change=True, help="percent that is held out"
    )
    images: int | None = flag(
        default=None,
        low=1,
        help="number of training images to use: the first ones, of an image folder a random sample "
        "(default: all)",
    )
    randaugment: int = flag(default=0, **RANDAUGMENT)


@dataclass(kw_only=True)
class ImageFolder(Settings):
    """image folders"""

    image_size: int | None = flag(
        default=None,
        low=1,
        help="height and width in pixels of the images that the model gets (default: 224)",
    )
    strict_images: bool = flag(
        default=False, may_change=True, help="stop at an unreadable image instead of skipping it"
    )

    def check(self):
        if self.datasets == IMAGE_FOLDER:
            self.image_size = self.image_size or 224


@dataclass(kw_only=True)
class Recipe(Settings):
    """training recipe"""

    warmup_epochs: float = flag(default=0.0, **WARMUP)
    label_smoothing: float = flag(default=0.0, **SMOOTHING)
    clip_grad: float | None = flag(default=None, **CLIP)

    def check(self):
        if self.warmup_epochs > self.epochs:
            raise UserError(
                f"--warmup-epochs {self.warmup_epochs:g} is more than --epochs {self.epochs}"
            )


@dataclass(kw_only=True)
class Compute(Settings):
    """computing"""

    print_freq: int = flag(
        "--print-freq", "-p", default=50, low=1, may_change=True, help="iterations between lines"
    )
    device: str | None = flag(
        default=None, may_change=True, help="torch device (default: the accelerator, else cpu)"
    )
    amp: bool = flag(
        "--amp", "--half", default=False, help="bfloat16 autocast and channels_last memory format"
    )
    compile: bool = flag(default=False, may_change=True, help="compile the model (torch.compile)")


@dataclass(kw_only=True)
class Run(Compute):
    """log and resuming"""

    log_name: str = flag(default="log", may_change=True, help="name of the log file")
    wandb: bool = flag(
        default=False, may_change=True, help="also send metrics, and TWA's α, to Weights & Biases"
    )
    tensorboard: bool = flag(
        default=False, may_change=True, help="also send metrics, and TWA's α, to TensorBoard"
    )
    EXP: str = flag(default="TWA", may_change=True, help="name of the Weights & Biases run")
    resume: str | None = flag(
        default=None,
        nargs="?",
        metavar="STATE",
        may_change=True,
        help="resume from STATE; without a value from the run's own state, if there is one",
    )

    def check(self):
        trackers.check(self)


@dataclass(kw_only=True)
class Training(Batch, TrainingSet, Run):
    """folders and workers"""

    workers: int = flag(
        "--workers", "--worker", "-j", default=4, low=0, may_change=True, help=WORKERS_HELP
    )
    save_dir: str = flag(
        default="save_temp",
        may_change=True,
        help="folder of the checkpoints: SGD writes them, TWA reads them",
    )
    log_dir: str = flag(
        default="save_temp",
        may_change=True,
        help="folder of SGD's log and metrics: TWA reads them, and writes its own beside them",
    )
    evaluate: bool = flag(
        "--evaluate",
        "-e",
        default=False,
        may_change=True,
        help="only test: the model, with --resume the saved one; for TWA the averages",
    )


@dataclass(kw_only=True)
class Launch(Settings):
    """in place of torchrun, for one process"""

    gpu: int | None = flag(
        default=None, low=0, may_change=True, help="accelerator; the same as --device cuda:GPU"
    )
    world_size: int = flag(
        default=1, low=1, may_change=True, help="number of machines; for several use torchrun"
    )
    rank: int = flag(default=0, low=0, may_change=True, help="number of this machine")
    dist_url: str | None = flag(
        default=None, may_change=True, help="where machines meet; torchrun has --rdzv_endpoint"
    )
    dist_backend: str | None = flag(
        default=None, may_change=True, help="ignored: nccl for CUDA, gloo for the CPU"
    )
    multiprocessing_distributed: bool = flag(
        default=False,
        may_change=True,
        help="a process per accelerator; for several of them use torchrun",
    )

    def check(self):
        """Takes `--gpu` as the device; raises a `UserError` where torchrun is needed."""
        count = torch.accelerator.device_count()
        several = self.multiprocessing_distributed and count > 1
        if self.world_size > 1 or (several and self.gpu is None and not ranks.launched()):
            name = "--world-size" if self.world_size > 1 else "--multiprocessing-distributed"
            many = f"--nnodes {self.world_size} --rdzv_backend c10d --rdzv_endpoint HOST:PORT"
            how = many if self.world_size > 1 else "--standalone"
            raise UserError(
                f"{name}: start the script with torchrun {how} "
                f"--nproc_per_node {max(1, count)}, without this flag"
            )
        if self.gpu is not None:
            if self.device:
                raise UserError(f"--gpu {self.gpu} and --device {self.device}: give one of them")
            if self.gpu >= count:
                raise UserError(
                    f"--gpu {self.gpu}: there are {count} accelerators; try --device cpu"
                )
            self.device = f"{torch.accelerator.current_accelerator()}:{self.gpu}"


@dataclass(kw_only=True)
class Soup(Model, DataSet, Batch, Compute):
    """held-out part"""

    arch: str = "PreResNet20"
    val_ratio: float = flag(
        default=10,
        type=percentage,
        metavar="X",
        help="percent of the training set that is held out, drawn by --randomseed",
    )
    split: bool = derived(True)
    images: int | None = derived()
    randaugment: int = derived(0)


def held_out(args) -> str | None:
    """Which samples `--split` holds out: runs that give the same string hold out the same."""
    if not args.split:
        return None
    if args.datasets == TEXT:
        return "the validation files"
    return f"{args.val_ratio:g} % by seed {args.randomseed}"


def settings(args: Settings) -> dict:
    """The values that must be the same when a run is resumed."""
    return args.must_agree() | {"held_out": held_out(args)}
