"""Windows of checkpoints: which files of a folder they are, by number, and which are the same."""

from __future__ import annotations

import itertools
import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from twa.files.formats import parts_of
from twa.files.reading import CheckpointError, opened, tensor_of
from twa.files.states import Checkpoint, weights_of

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
# What stands before the numbers in the names of checkpoints.
WORDS = {
    *("epoch", "ep", "step", "steps", "global", "iter", "iteration", "iterations"),
    *("checkpoint", "ckpt", "model", "weights", "snapshot"),
}
# A metric in the name, as Lightning writes it: its number is no step.
METRIC = re.compile(
    r"[-_]?(?:(?:val|valid|validation|eval|test|train)[-_/]?)?[a-z]*(?:loss|acc|accuracy|ppl|wer)"
    r"[=_-]?\d+\.\d+(?:e[+-]?\d+)?"
)
# Of files without checksums, so many parts of so many bytes are compared before all is.
SAMPLES = 64


def numbered(folder: Path) -> dict[int, Path]:
    """The checkpoints in `folder` by the numbers in their names, in rising order.

    They are files or folders called by a number, with zeros before it or not (`7.pt`, `007.pth`),
    and after the words that people put there (`epoch-7.pt`, `step_0700.safetensors`,
    `checkpoint-500`). Of several numbers the first counts that differs between all of them
    (`epoch=7-step=700.ckpt`: the epoch, or the step if there are several an epoch). Metrics in the
    names (`epoch=7-val_loss=0.12.ckpt`) are ignored.

    Raises:
        CheckpointError: they are of several kinds, or two of them have the same number.
    """
    kinds: dict[tuple, dict[tuple[int, ...], Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        suffix = path.suffix if path.suffix in SUFFIXES else "/" if path.is_dir() else None
        name = path.name if suffix == "/" else path.stem
        parts = re.findall(r"\d+|[a-z]+", METRIC.sub("", name.lower()))
        words = tuple(part for part in parts if not part.isdecimal())
        numbers = tuple(int(part) for part in parts if part.isdecimal())
        if numbers and WORDS.issuperset(words) and suffix:
            same = kinds.setdefault((words, suffix, len(numbers)), {}).setdefault(numbers, path)
            if same != path:
                raise CheckpointError(f"{path}: has the same number as {same.name}; move one away")
    files = [kind for kind in kinds if kind[1] != "/"]
    if files:  # Folders beside files may be other things, such as where results are written.
        kinds = {k: v for k, v in kinds.items() if k in files or k[0][:1] == ("checkpoint",)}
    if len(kinds) > 1:
        first, second = [min(kind.values()).name for kind in kinds.values()][:2]
        raise CheckpointError(
            f"{folder}: holds checkpoints of several kinds, such as {first} and {second}; "
            "move one kind into a folder of its own"
        )
    for found in kinds.values():
        for place in itertools.count():
            by_number = {numbers[place]: path for numbers, path in found.items()}
            if len(by_number) == len(found):
                return dict(sorted(by_number.items()))
            if place + 1 == len(next(iter(found))):
                raise CheckpointError(f"{folder}: none of the numbers in the names orders them")
    return {}


def copies(checkpoints: Sequence[Checkpoint]) -> dict[int, int]:
    """The indices of checkpoints that are the same as another one, and the index of that.

    It compares paths, and finds links to one file and files whose tensors are equal to the bit. Of
    equal ones the first with a number in its name is not in the result, or else the first.
    """
    paths = {i: Path(c) for i, c in enumerate(checkpoints) if not isinstance(c, Mapping)}
    firsts: dict[tuple, list[int]] = {}
    result = {}
    for index in sorted(paths, key=lambda i: (not re.search(r"\d", paths[i].name), i)):
        try:
            others = firsts.setdefault(tuple(map(_mark, parts_of(paths[index]))), [])
            same = next((i for i in others if _same(paths[i], paths[index])), None)
        except Exception:  # Damaged files raise many types; their reader will say what is wrong.
            continue
        if same is None:
            others.append(index)
        else:
            result[index] = same
    return dict(sorted(result.items()))


def stamp(checkpoint: Checkpoint) -> list[tuple] | None:
    """Sizes and times of the files of a checkpoint, by which changes show; None for a mapping."""
    if isinstance(checkpoint, Mapping):
        return None
    stats = [path.stat() for path in parts_of(Path(checkpoint))]
    return [(stat.st_size, stat.st_mtime_ns) for stat in stats]


def _mark(path: Path) -> tuple:
    """What the copies of a file have in common, and other files seldom."""
    with opened(path) as file:
        if file.read(4) == b"PK\3\4" and path.suffix != ".distcp":
            with zipfile.ZipFile(file) as archive:
                members = [m for m in archive.infolist() if "/data/" in m.filename]
            if any(member.CRC for member in members):
                return tuple((member.CRC, member.file_size) for member in members)
        size, parts = file.seek(0, os.SEEK_END), []
        for number in range(SAMPLES):
            file.seek(size * number // SAMPLES)
            parts.append(file.read(SAMPLES))
        return size, *parts


def _same(one: Path, other: Path) -> bool:
    """Whether both are one file, or contain the same tensors to the bit."""
    if os.path.samefile(one, other):
        return True
    a, b = (weights_of(path, str(path)) for path in (one, other))
    return a.keys() == b.keys() and all(
        a[key].dtype == b[key].dtype and torch.equal(tensor_of(a[key]), tensor_of(b[key]))
        for key in a
    )
