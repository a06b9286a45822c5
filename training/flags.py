"""The flags that scripts share, in groups that a script's settings inherit."""

import argparse
from dataclasses import dataclass

import torch

from training import ranks
from training.optimizers import OPTIMIZERS
from training.settings import REQUIRED, Settings, derived, flag, free
from utils import UserError

IMAGE_FOLDER, TEXT = "ImageNet", "Text"  # what --datasets calls them
# Flags that say something about one kind of data alone.
_OF_ONE_KIND = {
    IMAGE_FOLDER: ("image_size", "strict_images"),
    TEXT: ("epoch_steps", "tokenizer", "context"),
}
_OF_IMAGES = ("images", "randaugment", "val_ratio")
SCALE = {"low": 0, "high": 1e30}  # of a rate or a weight decay: float32 holds what follows from it
SCHEDULE = "learning rate schedule"
EVALUATE = "only test: the model, with --resume the saved one; for TWA the averages"


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

    arch: str = flag(REQUIRED, "architecture", "--arch", "-a", metavar="ARCH", exclusive="model")
    model_factory: str | None = free(
        None,
        "your own function, called without arguments, that returns the nn.Module",
        type=factory,
        metavar="MODULE:FUNCTION",
        exclusive="model",
    )

    def check(self):
        self.arch = self.model_factory or self.arch


@dataclass(kw_only=True)
class DataSet(Settings):
    """data set"""

    datasets: str = flag("CIFAR10", "data set")
    data_dir: str | None = free("./datasets", "folder of the data sets, or for downloads")

    def check(self):
        for kind, names in _OF_ONE_KIND.items():
            if self.datasets != kind:
                self.refuse(*names, why=f"only with --datasets {kind}")
        if self.datasets == TEXT:
            self.refuse(*_OF_IMAGES, why=f"not with --datasets {TEXT}; leave it out")


@dataclass(kw_only=True)
class Batch(Settings):
    """batches and seed"""

    batch_size: int = flag(128, "images, or windows of text, a step", "--batch-size", "-b", low=1)
    randomseed: int = flag(
        1, "seed of all randomness", "--randomseed", "--seed", low=0, high=2**31 - 1
    )


@dataclass(kw_only=True)
class Augmentation(Settings):
    """augmentation"""

    randaugment: int = flag(
        0,
        "strength of RandAugment (0: none); its draws make an accelerator wait in every step",
        low=0,
        high=30,
    )


@dataclass(kw_only=True)
class TrainingSet(Augmentation):
    """training set"""

    # Of these two, `held_out` says what must agree when a run is resumed.
    split: bool = free(False, "hold out training images: TWA trains on them, SGD does not")
    val_ratio: float | None = free(10, "percent held out, drawn by --randomseed", type=percentage)
    images: int | None = flag(
        None, "training images to use: the first, or of a folder random ones (default: all)", low=1
    )


@dataclass(kw_only=True)
class Workers(Settings):
    """workers"""

    workers: int = free(
        4, "processes per rank that decode image folders", "--workers", "--worker", "-j", low=0
    )


@dataclass(kw_only=True)
class ImageFolder(Workers):
    """image folders"""

    image_size: int | None = flag(None, "height and width in pixels (default: 224)", low=1)
    strict_images: bool = free(False, "stop at an unreadable image instead of skipping it")

    def check(self):
        if self.datasets == IMAGE_FOLDER:
            self.image_size = self.image_size or 224


@dataclass(kw_only=True)
class Training(Settings):
    """optimizer of all weights"""

    epochs: int = flag(REQUIRED, "total number of epochs", low=0)
    optimizer: str = flag("sgd", "optimizer", choices=tuple(OPTIMIZERS))
    schedule: str = flag("step", SCHEDULE, choices=("step", "constant", "cosine"))
    lr: float = flag(0.1, "learning rate", "--lr", "--learning-rate", **SCALE)
    momentum: float = flag(0.9, "momentum of SGD", low=0, high=1)
    weight_decay: float = flag(1e-4, "weight decay", "--weight-decay", "--wd", **SCALE)


@dataclass(kw_only=True)
class Recipe(Settings):
    """training recipe"""

    warmup_epochs: float = flag(0.0, "epochs of linear warm-up, before the schedule", low=0)
    label_smoothing: float = flag(0.0, "label smoothing", low=0, high=1)
    clip_grad: float | None = flag(None, "maximum gradient norm (default: no clipping)", low=0)

    def check(self):
        epochs = min(self.epochs) if isinstance(self.epochs, tuple | list) else self.epochs
        if self.warmup_epochs > epochs:
            raise UserError(
                f"--warmup-epochs {self.warmup_epochs:g} is more than --epochs {epochs}"
            )


@dataclass(kw_only=True)
class Compute(Settings):
    """computing"""

    print_freq: int = free(50, "iterations between lines", "--print-freq", "-p", low=1)
    device: str | None = free(None, "torch device (default: the accelerator, else cpu)")
    amp: bool = flag(False, "bfloat16 autocast and channels_last", "--amp", "--half")
    compile: bool = free(False, "compile the model (torch.compile)")


@dataclass(kw_only=True)
class Run(Compute):
    """log and resuming"""

    log_name: str = free("log", "name of the log file")
    wandb: bool = free(False, "also send metrics, and TWA's α, to Weights & Biases")
    tensorboard: bool = free(False, "also send metrics, and TWA's α, to TensorBoard")
    EXP: str = free("TWA", "name of the Weights & Biases run", "--EXP")
    resume: str | None = free(
        None, "resume from STATE, by default the run's own, if any", nargs="?", metavar="STATE"
    )


@dataclass(kw_only=True)
class HeadStage(Batch, TrainingSet, Workers, Run):
    """folders"""

    save_dir: str = free("save_temp", "folder of the checkpoints that SGD writes and TWA reads")
    log_dir: str = free("save_temp", "folder of SGD's log and metrics, which TWA reads")
    evaluate: bool = free(False, EVALUATE, "--evaluate", "-e")


@dataclass(kw_only=True)
class Overwrite(Settings):
    """earlier runs"""

    overwrite: bool = free(False, "replace the checkpoints of an earlier run")


@dataclass(kw_only=True)
class Launch(Settings):
    """in place of torchrun, for one process"""

    gpu: int | None = free(None, "accelerator; the same as --device cuda:GPU", low=0)
    world_size: int = free(1, "number of machines; for several use torchrun", low=1)
    rank: int = free(0, "number of this machine", low=0)
    dist_url: str | None = free(None, "where machines meet; torchrun has --rdzv_endpoint")
    dist_backend: str | None = free(None, "ignored: nccl for CUDA, gloo for the CPU")
    multiprocessing_distributed: bool = free(False, "for several accelerators use torchrun")

    def check(self):
        """Takes `--gpu` as the device; raises a `UserError` where torchrun is needed."""
        count, how = torch.accelerator.device_count(), None
        if self.world_size > 1:
            where = "--rdzv_backend c10d --rdzv_endpoint HOST:PORT"
            how = "--world-size", f"--nnodes {self.world_size} {where}"
        elif self.multiprocessing_distributed and count > 1 and self.gpu is None:
            how = None if ranks.launched() else ("--multiprocessing-distributed", "--standalone")
        if how:
            each = f"--nproc_per_node {max(1, count)}"
            raise UserError(
                f"{how[0]}: start the script with torchrun {how[1]} {each}, without this flag"
            )
        if self.gpu is not None:
            if self.device:
                raise UserError(f"--gpu {self.gpu} and --device {self.device}: give one of them")
            if self.gpu >= count:
                known = f"there are {count} accelerators"
                raise UserError(f"--gpu {self.gpu}: {known}; try --device cpu")
            self.device = f"{torch.accelerator.current_accelerator()}:{self.gpu}"


@dataclass(kw_only=True)
class Soup(Model, DataSet, Batch, Compute):
    """held-out part"""

    arch: str = "PreResNet20"
    val_ratio: float = flag(
        10, "percent of the training set that is held out, drawn by --randomseed", type=percentage
    )
    split: bool = derived(True)


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
