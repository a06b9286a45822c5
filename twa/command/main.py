"""The command line of `twa`: errors that a user can mend are one line, with exit status 2."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import twa
from twa.command import adapters, choice, inspecting, outputs
from twa.command.mean import Checkpoints, Means
from twa.files.formats import parts_of
from twa.files.reading import CheckpointError, Stored
from twa.files.weights import NAME, load_weights
from twa.files.writing import remove_leftovers, replacing

DTYPES = ("float32", "bfloat16", "float16", "float64")


class Parser(argparse.ArgumentParser):
    """Ends with one line and status 2, as all errors here do."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    args = parser().parse_args(arguments)
    try:
        args.run(args)
    except (CheckpointError, MemoryError) as error:
        print(f"twa {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"twa {args.command}: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


def parser() -> Parser:
    made = Parser("twa", description="Averages of checkpoints, without their model's code.")
    made.add_argument("--version", action="version", version=f"twa {twa.__version__}")
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    inspect = commands.add_parser(
        "inspect",
        help="show how checkpoints lie to each other",
        description="Prints a table of checkpoints: step, distance to the one before and to the "
        "mean, cosine of successive moves, loss; and which averages make sense.",
    )
    inspect.set_defaults(run=run_inspect)
    inspect.add_argument("paths", nargs="+", metavar="PATH", help="folder, checkpoint or glob")
    inspect.add_argument("--figure", type=Path, metavar="FILE", help="draw distances and spread")
    average = commands.add_parser(
        "average",
        help="write the average of checkpoints",
        description="Writes the average of checkpoints, in their own format. Of one folder and no "
        "choice it takes the last half.",
    )
    average.set_defaults(run=run_average)
    add = average.add_argument
    add("paths", nargs="+", metavar="PATH[:WEIGHT]", help="folder of checkpoints, checkpoint, glob")
    add("-o", "--output", required=True, type=Path, metavar="OUT", help="file or folder to write")
    add(
        "--how",
        action="append",
        help="mean, ema=B (0 < B < 1), wsm or wsm=linear (as a decay of the learning rate); "
        "several are written from one reading, into the folder OUT (default: mean)",
    )
    add("--last", type=positive, metavar="N", help="the last N")
    add("--from", type=int, dest="first", metavar="STEP", help="from this step on")
    add("--to", type=int, dest="final", metavar="STEP", help="up to this step")
    add("--every", type=positive, default=1, metavar="K", help="every K-th, from the last one back")
    add("--best", type=positive, metavar="N", help="the N with the lowest validation loss")
    add("--losses", type=Path, metavar="FILE", help="losses for --best: JSON lines or CSV")
    add(
        "--weights",
        type=Path,
        metavar="FILE",
        help="the weights that train_twa.py has learned (twa_weights.safetensors, or the twa.json "
        "beside it), of the checkpoints that they are for",
    )
    add("--rank", type=positive, metavar="R", help="of the mean of LoRA adapters (default: exact)")
    add("--dtype", choices=DTYPES, help="of the output (default: that of the inputs)")
    add("--overwrite", action="store_true", help="replace OUT if it is there")
    add("--dry-run", action="store_true", help="only print what would be read and written")
    return made


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {text}")
    return number


def run_inspect(args) -> None:
    found = choice.find(args.paths)
    size = len(found) * sum(part.stat().st_size for part in parts_of(found[-1].path))
    with tqdm(total=size, unit="B", unit_scale=True, leave=False, disable=None) as bar:
        lines = inspecting.report(found, bar.update, args.figure)
    print(*lines, sep="\n")


def run_average(args) -> None:
    if args.weights:
        chosen, named = of_weights(args)
        # Of many blocks, what is printed and recorded is the mean.
        means = torch.stack([v.flatten(1).mean(1) for v in named.values()]).mean(0)
        hows, notes, weights, alphas = ["weights"], [], [named], [means.tolist()]
    else:
        chosen, notes = choose(args)
        hows = list(dict.fromkeys(args.how or ["mean"]))
        weights = [choice.coefficients(how, chosen) for how in hows]
        alphas = [[weight / math.fsum(each) for weight in each] for each in weights]
    paths = [each.path for each in chosen]
    lora = not args.weights and adapters.is_adapter(paths[-1])
    if lora:
        adapters.check(paths)
        if args.dtype:
            raise CheckpointError(f"--dtype: {paths[-1]} is an adapter, which keeps its dtypes")
    elif args.rank:
        raise CheckpointError(f"--rank: {paths[-1]} is no folder of an adapter of PEFT")
    means = Checkpoints(paths[-1:]) if lora else Means(paths, weights)
    print(*described(chosen, hows, alphas), sep="\n")
    for note in notes:
        print(f"twa average: warning: {note}", file=sys.stderr)
    check_output(args, means, paths, len(hows))
    if args.dry_run:
        return
    remove_leftovers(args.output.absolute().parent)
    several = len(hows) > 1
    with replacing(args.output, keep=not args.overwrite) as temporary:
        if several:
            temporary.mkdir()
        places = [temporary / name(how, paths[-1]) if several else temporary for how in hows]
        if lora:
            write_adapters(paths, weights, places, args.rank)
        else:
            write(means, [(paths[-1], place) for place in places], dtype_of(args))
        for how, alpha, place in zip(hows, alphas, places, strict=True):
            if place.is_dir() or several:
                write_record(place, record(args, paths, how, alpha))
    if not args.output.is_dir():
        write_record(args.output, record(args, paths, hows[0], alphas[0]))
    print(f"wrote {args.output}")


def dtype_of(args) -> Callable[[Tensor | Stored], torch.dtype]:
    """The dtype of the output, by the tensor of the last checkpoint."""
    dtype = getattr(torch, args.dtype) if args.dtype else None
    return lambda value: dtype if dtype and value.dtype.is_floating_point else value.dtype


def check_output(args, means: Checkpoints, paths: Sequence[Path], count: int) -> None:
    """Prints what is read and written, and makes the folder of the output unless it is a dry run.

    Raises:
        CheckpointError: the output is there, holds an input, does not fit, or cannot be made.
    """
    output, dtype = args.output.absolute(), dtype_of(args)
    values = means.tensors.values()
    size = count * sum(v.shape.numel() * dtype(v).itemsize for v in values)
    free = shutil.disk_usage(next(p for p in output.parents if p.exists())).free
    print(
        f"reads {means.bytes_to_read / 1e9:.2f} GB, writes {size / 1e9:.2f} GB to {args.output} "
        f"({free / 1e9:.1f} GB are free), takes {means.memory / 1e9:.2f} GB of memory"
    )
    if output.exists() and not args.overwrite:
        raise CheckpointError(f"{args.output}: is there already; give --overwrite or another name")
    for path in paths:
        if output.resolve() in (path.resolve(), *path.resolve().parents):
            raise CheckpointError(
                f"{args.output}: holds {path}, one of the inputs; give another name"
            )
    if size > free:
        raise CheckpointError(
            f"{args.output}: takes {size / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free there"
        )
    try:
        if not args.dry_run:
            output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{args.output}: cannot be made ({error.strerror})") from None


def record(args, paths: Sequence[Path], how: str, alpha: Sequence[float]) -> dict:
    """What `twa.json` says of an average."""
    versions = {"version": twa.__version__, "torch": torch.__version__, "dtype": args.dtype}
    inputs = [str(path.resolve()) for path in paths]
    return versions | {"how": how, "inputs": inputs, "weights": alpha}


def write_record(place: Path, content: dict) -> None:
    """Writes `twa.json` into the folder `place`, or beside the file."""
    path = place / "twa.json" if place.is_dir() else place.with_suffix(".twa.json")
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def choose(args) -> tuple[list[choice.Chosen], list[str]]:
    """The checkpoints that the arguments choose, and what is odd about them."""
    if args.losses and args.best is None:
        raise CheckpointError(f"--losses {args.losses}: is for --best N, which is not given")
    found = choice.find(args.paths)
    one_folder = len(args.paths) == 1 and len(found) > 1
    choices = (args.first, args.final, args.last, args.best)
    if one_folder and args.every == 1 and all(value is None for value in choices):
        args.last = -(-len(found) // 2)
    kept = choice.select(
        found,
        first=args.first,
        final=args.final,
        every=args.every,
        last=args.last,
        best=args.best,
        losses=args.losses,
    )
    kept, notes = choice.checked(kept)
    if len(kept) < 2:
        raise CheckpointError(
            f"{kept[0].path}: is the only checkpoint; an average takes two or more"
        )
    return kept, notes


def of_weights(args) -> tuple[list[choice.Chosen], dict[str, torch.Tensor]]:
    """The checkpoints that --weights is for, and their weights for each tensor."""
    flags = {"how": None, "first": None, "final": None, "last": None, "best": None, "every": 1}
    for flag, default in flags.items():
        if getattr(args, flag) != default:
            flag = {"first": "from", "final": "to"}.get(flag, flag)
            raise CheckpointError(f"--{flag}: --weights says which checkpoints count, and how much")
    file = args.weights
    named, names = load_weights(file.with_name(NAME) if file.suffix == ".json" else file)
    found = {each.path.name: each for each in choice.find(args.paths)}
    missing = [name for name in names if name not in found]
    if missing:
        raise CheckpointError(f"{file}: is for {missing[0]} as well, which is not among the paths")
    return [found[name] for name in names], named


def described(chosen, hows: list[str], alphas: list[list[float]]) -> list[str]:
    """A line for each checkpoint, with its weight in each average."""
    width = max(len(str(each.path)) for each in chosen)
    head = f"{'checkpoint':{width}}  " + "  ".join(f"{how:>10}" for how in hows)
    rows = zip(chosen, zip(*alphas, strict=True), strict=True)
    lines = [
        f"{each.path!s:{width}}  " + "  ".join(f"{a:10.6f}" for a in row) for each, row in rows
    ]
    return [head, *lines]


def name(how: str, example: Path) -> str:
    """The name of one of several outputs."""
    return how if example.is_dir() else f"{how}{example.suffix}"


def write(means: Means, places: list[tuple[Path, Path]], dtype: outputs.Dtype) -> None:
    """Writes the means, each to its place, from one reading."""
    writers = [outputs.make(source, target, means.tensors, dtype) for source, target in places]
    size = means.bytes_to_read
    with tqdm(total=size, unit="B", unit_scale=True, leave=False, disable=None) as bar:
        for key, value in means.tensors.items():
            for begin, pieces in means.of(key, dtype(value), bar.update):
                for writer, piece in zip(writers, pieces, strict=True):
                    writer.write(key, begin, piece)
    for writer in writers:
        writer.close()


def write_adapters(
    paths: Sequence[Path], weights: Sequence, places: Sequence[Path], rank: int | None
) -> None:
    for weight, place in zip(weights, places, strict=True):
        place.mkdir()
        outputs.copy_settings(paths[-1], place)
        error = adapters.write(paths, weight, place, rank)
        if rank:
            print(f"rank {rank} leaves out {100 * error:.2f} % of the mean product")
