"""The flags that scripts share, and what their values may be."""

import argparse
import math
from collections.abc import Callable, Iterable

import torch

from training import ranks
from utils import UserError

EVALUATE_HELP = "test the model, with --resume the saved one, and end; TWA: the averages"
WORKERS_HELP = (
    "processes that decode and augment the images of ImageNet, on each rank; the other data sets "
    "live on the device and need none"
)
IMAGE_SIZE_HELP = "height and width of the images that the model gets, in pixels"
RANDAUGMENT_HELP = "strength of RandAugment, two operations an image; 0: none"
SMOOTHING_HELP = "share of a label that is spread evenly over all classes"
SCHEDULE_HELP = "learning rate schedule"
WARMUP_HELP = "epochs of a linear rise of the rate; the schedule takes the rest"
CLIP_HELP = "largest norm of the gradient, all parameters together; left out, any"
TRACKERS_HELP = "send the metrics of each epoch, of TWA also the coefficients α,"
OVERWRITE_HELP = "replace the checkpoints of an earlier run"


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but for None: the help says what a flag is that is left out."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that shows defaults in `--help` and says errors in one line."""

    def __init__(self, description: str):
        super().__init__(
            description=description,
            formatter_class=_Formatter,
            allow_abbrev=False,
        )

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {' '.join(message.splitlines())}\n")


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], float]:
    """An argument type: a finite `kind` (int or float) in [low, high]."""

    def parse(text: str):
        value = kind(text)
        if not (low <= value <= high and math.isfinite(value)):
            limit = f"at least {low}" if high == math.inf else f"between {low} and {high}"
            raise argparse.ArgumentTypeError(f"{text} is not {limit}")
        return value

    parse.__name__ = kind.__name__  # argparse says it: "invalid int value: …"
    return parse


scale = number(float, 0, 1e30)  # a rate or a weight decay; float32 can hold what comes of it


def percentage(text: str) -> float:
    """An argument type: a share in percent that leaves something on both sides."""
    value = float(text)
    if not 0 < value < 100:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 100, both excluded")
    return value


def factory(text: str) -> str:
    """An argument type: `module:function`, which `models.build` imports and calls."""
    if not all(text.partition(":")):
        raise argparse.ArgumentTypeError(f"{text} is not MODULE:FUNCTION")
    return text


def add_model_arguments(
    parser: argparse.ArgumentParser, *flags: str, choices: Iterable[str], **named
) -> None:
    """The flag of an architecture's name, `flags`, and the one of a model that the user brings."""
    group = parser.add_mutually_exclusive_group(required="default" not in named)
    # argparse would print the choices, a hundred, in place of the metavar: three times in all.
    named |= {"metavar": "ARCH", "help": f"architecture: {', '.join(choices)}"}
    group.add_argument(*flags, dest="arch", choices=choices, **named)
    group.add_argument(
        "--model-factory",
        dest="arch",
        default=argparse.SUPPRESS,
        type=factory,
        metavar="MODULE:FUNCTION",
        help="a function of your own that returns the nn.Module; called without arguments",
    )


def add_data_set_arguments(
    parser: argparse.ArgumentParser, architectures: Iterable[str], datasets: Iterable[str], **named
) -> None:
    """The flags of the model and of the data set, with the names of the paper's release.

    Args:
        named: `default`, the architecture if none is given.
    """
    add_model_arguments(parser, "--arch", "-a", choices=architectures, **named)
    add = parser.add_argument
    add("--datasets", default="CIFAR10", choices=datasets, help="data set")
    add("--data-dir", default="./datasets", help="where data sets lie or are downloaded to")


def add_batch_arguments(parser: argparse.ArgumentParser, size: int = 128) -> None:
    add = parser.add_argument
    seed = {"type": number(int, 0, 2**31 - 1), "default": 1}
    add(
        "--batch-size",
        "-b",
        type=number(int, 1),
        default=size,
        help="images, or windows of text, a step",
    )
    add("--randomseed", "--seed", **seed, help="seed of all randomness")


def add_training_arguments(parser: argparse.ArgumentParser, batch_size: int = 128) -> None:
    """The flags of every trainer of the head stage, but for the model and the data set."""
    add = parser.add_argument
    add("--workers", "--worker", "-j", type=number(int, 0), default=4, help=WORKERS_HELP)
    save_help = "folder of the checkpoints: SGD writes them, TWA reads them"
    log_help = "folder of SGD's log and metrics; TWA reads these, and writes its own beside them"
    add("--save-dir", default="save_temp", help=save_help)
    add("--log-dir", default="save_temp", help=log_help)
    add("--evaluate", "-e", action="store_true", help=EVALUATE_HELP)
    add_batch_arguments(parser, batch_size)
    add_data_arguments(parser)
    add_run_arguments(parser)


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of every trainer that say on what it trains."""
    add = parser.add_argument
    add(
        "--split",
        action="store_true",
        help="hold out a part of the training set, drawn by --randomseed: SGD does not train on "
        "it, TWA trains the coefficients on it alone",
    )
    add("--val-ratio", type=percentage, default=10, help="percent that --split holds out")
    add("--images", type=number(int, 1), help="training images to use, the first N; left out, all")
    add("--randaugment", type=number(int, 0, 30), default=0, help=RANDAUGMENT_HELP)


def add_image_arguments(parser: argparse.ArgumentParser, size: int | None) -> None:
    """The flags of every trainer on image folders; images have `size` pixels if left out."""
    add = parser.add_argument
    add("--image-size", type=number(int, 1), default=size, help=IMAGE_SIZE_HELP)
    strict_help = "stop at an image that cannot be read, rather than skip it"
    add("--strict-images", action="store_true", help=strict_help)


def add_launch_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags with which the paper's ImageNet scripts start their processes."""
    add = parser.add_argument_group("in place of torchrun, for one process").add_argument
    add("--gpu", type=number(int, 0), help="accelerator to use; the same as --device cuda:GPU")
    add("--world-size", type=number(int, 1), default=1, help="machines; more than one: torchrun")
    add("--rank", type=number(int, 0), default=0, help="number of this machine")
    add("--dist-url", help="where machines meet; torchrun has --rdzv_endpoint")
    add("--dist-backend", help="left to the device: nccl for CUDA, gloo for the CPU")
    each_help = "a process for each accelerator; where there are several: torchrun"
    add("--multiprocessing-distributed", action="store_true", help=each_help)


def check_launch(args: argparse.Namespace) -> None:
    """Takes `--gpu` as the device; a `UserError` tells what is wrong, or where to use torchrun."""
    several = args.multiprocessing_distributed and torch.accelerator.device_count() > 1
    if args.world_size > 1 or (several and args.gpu is None and not ranks.launched()):
        flag = "--world-size" if args.world_size > 1 else "--multiprocessing-distributed"
        many = f"--nnodes {args.world_size} --rdzv_backend c10d --rdzv_endpoint HOST:PORT"
        how = many if args.world_size > 1 else "--standalone"
        raise UserError(
            f"{flag}: start the script with torchrun {how} "
            f"--nproc_per_node {max(1, torch.accelerator.device_count())}, without this flag"
        )
    if args.gpu is not None:
        count = torch.accelerator.device_count()
        if args.device:
            raise UserError(f"--gpu {args.gpu} and --device {args.device}: give one of them")
        if args.gpu >= count:
            raise UserError(f"--gpu {args.gpu}: there are {count} accelerators; try --device cpu")
        args.device = f"{torch.accelerator.current_accelerator()}:{args.gpu}"


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of a training recipe, transformers' above all, beside rate and weight decay."""
    add = parser.add_argument
    add("--warmup-epochs", type=number(float, 0), default=0.0, help=WARMUP_HELP)
    add("--label-smoothing", type=number(float, 0, 1), default=0.0, help=SMOOTHING_HELP)
    add("--clip-grad", type=number(float, 0), metavar="NORM", help=CLIP_HELP)


def check_recipe(args: argparse.Namespace) -> None:
    """Raises a `UserError` if the rate would never have risen."""
    if args.warmup_epochs > args.epochs:
        raise UserError(
            f"--warmup-epochs {args.warmup_epochs:g} is more than --epochs {args.epochs}"
        )


def add_soup_arguments(
    parser: argparse.ArgumentParser, architectures: Iterable[str], datasets: Iterable[str]
) -> None:
    """The flags of both scripts of the fine-tune stage, which always hold out validation data."""
    add_data_set_arguments(parser, architectures, datasets, default="PreResNet20")
    add_batch_arguments(parser)
    ratio_help = "percent of the training set that is held out, drawn by --randomseed"
    parser.add_argument("--val-ratio", type=percentage, default=10, help=ratio_help)
    add_compute_arguments(parser)
    parser.set_defaults(split=True)


def add_compute_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say where and how a script computes, and how often it says so."""
    add = parser.add_argument
    add("--print-freq", "-p", type=number(int, 1), default=50, help="iterations between lines")
    add("--device", help="torch device; left out, the accelerator if there is one, else cpu")
    amp_help = "bfloat16 autocast and channels_last memory format"
    add("--amp", "--half", action="store_true", help=amp_help)
    add("--compile", action="store_true", help="compile the model with torch.compile")


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of every trainer: where and how a run computes, what it logs, resuming."""
    add_compute_arguments(parser)
    add = parser.add_argument
    add("--log-name", default="log", help="name of the log file")
    add("--wandb", action="store_true", help=f"{TRACKERS_HELP} to Weights & Biases as well")
    add("--tensorboard", action="store_true", help=f"{TRACKERS_HELP} to TensorBoard as well")
    add("--EXP", default="TWA", help="name of the Weights & Biases run")
    add(
        "--resume",
        nargs="?",
        const="",
        metavar="STATE",
        help="go on from STATE; without a value from the state that the run saved, or from the "
        "start if there is none yet",
    )


# What may differ between a run and its resumption; all else must be the same.
MAY_CHANGE = {
    *("save_dir", "log_dir", "out", "log_name", "data_dir", "resume", "overwrite", "evaluate"),
    *("tokenizer", "initial"),  # the vocabulary counts; and what a run began with is in its state
    *("device", "compile", "workers", "parallel", "reshard_after_forward", "strict_images"),
    *("print_freq", "save_freq", "eval_freq", "pretrained", "start_epoch"),
    *("wandb", "tensorboard", "EXP"),
    *("gpu", "world_size", "rank", "dist_url", "dist_backend", "multiprocessing_distributed"),
    *("split", "val_ratio"),  # said by `held_out`
}


def settings(args: argparse.Namespace) -> dict:
    """The arguments that must be the same when a run is resumed: it would be another otherwise."""
    kept = {key: value for key, value in vars(args).items() if key not in MAY_CHANGE}
    return kept | {"held_out": held_out(args)}


def held_out(args: argparse.Namespace) -> str | None:
    """Which images `--split` holds out: runs that say the same hold out the same."""
    if not args.split:
        return None
    if args.datasets == "Text":
        return "the validation files"
    return f"{args.val_ratio:g} % by seed {args.randomseed}"
