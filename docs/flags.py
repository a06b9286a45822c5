"""Prints docs/flags.md, the flags of all scripts as their own parsers have them.

python docs/flags.py > docs/flags.md
"""

import argparse
import importlib.util
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training import settings

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = (  # the head stage first: it orders the flags of the first table
    "train_sgd_cifar.py",
    "train_sgd_imagenet.py",
    "train_twa.py",
    "swa/train.py",
    "soup/finetune.py",
    "soup/soup.py",
    "lm/train.py",
)
INTRODUCTION = """\
# Flags

Written by `python docs/flags.py` from the settings of the scripts, whose `--help` says the same.
The command lines of the paper's README run unchanged.

**Data sets** (`--datasets`): `Digits`, `FashionMNIST`, `CIFAR10`, `CIFAR100`;
[`ImageNet`](imagenet.md) or any other image folder; [`Text`](../lm/README.md). The first four
lie on the device as one uint8 tensor and are augmented there in batches, several tens of times
faster than by worker processes ([benchmarks](../benchmarks/README.md#the-loader)).

**Architectures** (`--arch`): `VGG16`, `VGG16BN`, `VGG19`, `VGG19BN`, `PreResNet20/56/110/164`,
`ResNet18/34/50`, `WideResNet16x8`, `WideResNet28x10`, `ViT` (patches of 4×4), and torchvision's
`resnet18_224`, `resnet50_224`, `vit_b_16`, `vit_b_32`, which resize the images (`resnet18` is the
paper's network, the same as `ResNet18`; on image folders, torchvision's); of text `gpt`, `gpt-3M`,
`gpt-124M`. With `--model-factory` the module is looked for in the current directory, on the
`PYTHONPATH` and in the root of the repository, and may have a `data.py`, `models/` or `utils.py`
beside it. Checkpoints of VGG, PreResNet and ResNet models made by the paper's release load as they
are.

A blank default means that the flag is off, or the description says what happens then. A flag marked
*required* has no default, and one of those marked *one of these* is required. The first table
abbreviates scripts: sgd_cifar, sgd_imagenet, twa, swa, finetune, soup, lm.
"""


def parser_of(script: str) -> argparse.ArgumentParser:
    """The parser that follows from the settings of a script."""
    spec = importlib.util.spec_from_file_location(f"flags_of_{Path(script).stem}", ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return settings.parser_of(module.Settings)


def spelled(action: argparse.Action) -> str:
    """The names of a flag, with what it takes."""
    names = ", ".join(action.option_strings) or action.metavar
    if action.nargs == 0 or not action.option_strings:
        return f"`{names}`"
    choices = "{" + ",".join(map(str, action.choices or ())) + "}"
    value = action.metavar or (choices if action.choices else action.dest.upper())
    several = {"?": f"[{value}]", "+": f"{value} …", "*": f"[{value} …]"}
    return f"`{names} {several.get(action.nargs, value)}`"


def default_of(action: argparse.Action, parser: argparse.ArgumentParser) -> str:
    """The default, as one would type it."""
    if action.default is None or action.default is False:
        groups = (g for g in parser._mutually_exclusive_groups if action in g._group_actions)
        if any(group.required for group in groups):
            return "*one of these*"
        return "*required*" if action.required else ""
    default = action.default
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)


def explained(action: argparse.Action) -> str:
    text = "architecture" if action.metavar == "ARCH" else action.help
    return " ".join(text.replace("|", "\\|").split())


def tables() -> list[str]:
    """A table of the flags that several scripts have, and one for each script of its others."""
    found: dict[tuple[str, str], dict[str, str]] = {}  # flag and text: defaults by script
    for script in SCRIPTS:
        parser = parser_of(script)
        for action in parser._actions:
            if action.dest != "help":
                key = spelled(action), explained(action)
                found.setdefault(key, {})[script] = default_of(action, parser)
    lines = []
    for title in ("Several scripts", *SCRIPTS):
        rows = []
        for (flag, text), defaults in found.items():
            several = len(defaults) > 1
            if title == ("Several scripts" if several else next(iter(defaults))):
                row = [flag, text, different(defaults)]
                row += [where(defaults)] if several else []
                rows.append(f"| {' | '.join(row)} |")
        if rows:
            headings = ["flag", "what it does", "default"]
            headings += ["scripts"] if title == "Several scripts" else []
            name = title if title == "Several scripts" else f"`{title}` alone"
            lines += ["", f"## {name}", "", f"| {' | '.join(headings)} |"]
            lines += ["| --- " * len(headings) + "|", *rows]
    return lines


def different(defaults: dict[str, str]) -> str:
    """The most frequent default, and the others with the scripts that have them."""
    scripts: dict[str, list[str]] = {}
    for script, value in defaults.items():
        scripts.setdefault(value, []).append(short(script))
    most, *others = sorted(scripts, key=lambda value: -len(scripts[value]))
    rest = [f"{value or 'none'} ({', '.join(scripts[value])})" for value in others]
    return "; ".join([most or ("none" if rest else ""), *rest])


def where(defaults: dict[str, str]) -> str:
    """The scripts that have a flag, or those that lack it where these are fewer."""
    lacking = [short(script) for script in SCRIPTS if script not in defaults]
    if not lacking:
        return "all"
    if len(lacking) < 3:
        return f"all but {', '.join(lacking)}"
    return ", ".join(map(short, defaults))


def short(script: str) -> str:
    """The abbreviation of a script: sgd_cifar, …, swa, finetune, soup, lm."""
    folder, _, name = script.removesuffix(".py").rpartition("/")
    return folder if name == "train" else name.removeprefix("train_")


if __name__ == "__main__":
    print(INTRODUCTION + "\n".join(tables()))
