"""Which checkpoints to average: folders, globs and paths; the last, every k-th or best of them."""

from __future__ import annotations

import contextlib
import csv
import glob
import itertools
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from twa.files.formats import file_of, parts_of
from twa.files.reading import CheckpointError
from twa.files.windows import copies, numbered

# A loss in the name of a file, as Lightning's ModelCheckpoint writes it: `val_loss=0.123`.
LOSS_IN_NAME = re.compile(r"loss[=_-]?(\d+\.\d+(?:e[+-]?\d+)?)")


@dataclass(frozen=True)
class Chosen:
    """A checkpoint to average.

    Attributes:
        step: the number in its name; None if it has none.
        weight: as given by `PATH:WEIGHT`; None if not.
    """

    path: Path
    step: int | None = None
    weight: float | None = None


def find(arguments: Iterable[str]) -> list[Chosen]:
    """The checkpoints that the arguments name, in the order of their numbers.

    An argument is a checkpoint, a folder of numbered checkpoints, or a glob; `:WEIGHT` may follow
    a checkpoint. Where not all have a number, they stay in the order given.

    Raises:
        CheckpointError: there is no such path, or a folder has no checkpoints.
    """
    found: list[Chosen] = []
    for argument in arguments:
        path, weight = _weighted(argument)
        paths = [path] if path.exists() else sorted(map(Path, glob.glob(str(path))))
        if not paths:
            raise CheckpointError(f"{argument}: there is no such file or folder")
        for each in paths:
            window = numbered(each) if weight is None else {}
            with contextlib.suppress(CheckpointError):
                if not set(window.values()).isdisjoint(parts_of(each)):
                    window = {}  # they are shards
            if window:
                found += [Chosen(file, step) for step, file in window.items()]
                continue
            try:
                file_of(each)
            except CheckpointError as error:
                raise CheckpointError(
                    f"{error}; and no names of checkpoints with numbers are in it"
                    if each.is_dir()
                    else str(error)
                ) from None
            found.append(Chosen(each, _number(each), weight))
    if all(chosen.step is not None for chosen in found):
        found.sort(key=lambda chosen: chosen.step)
    return found


def _weighted(argument: str) -> tuple[Path, float | None]:
    """The path and the weight of `PATH:WEIGHT`; a path may have a colon in it."""
    path, colon, number = argument.rpartition(":")
    if not colon or Path(argument).exists():
        return Path(argument), None
    try:
        weight = float(number)
    except ValueError:
        return Path(argument), None
    if not math.isfinite(weight):
        raise CheckpointError(f"{argument}: the weight is not finite")
    return Path(path), weight


def _number(path: Path) -> int | None:
    numbers = re.findall(r"\d+", path.stem if path.is_file() else path.name)
    return int(numbers[0]) if numbers else None


def select(
    found: Sequence[Chosen],
    *,
    first: int | None = None,
    final: int | None = None,
    every: int = 1,
    last: int | None = None,
    best: int | None = None,
    losses: Path | None = None,
) -> list[Chosen]:
    """Those of `found` to average.

    Args:
        first, final: the lowest and the highest step.
        every: takes every so manieth, from the last one back.
        last, best: so many of the last ones, and of those with the lowest loss.
        losses: the file of the losses; None: those that trainers leave (`loss_of`).

    Raises:
        CheckpointError: none is left, or one has no loss.
    """
    low, high = -math.inf if first is None else first, math.inf if final is None else final
    steps = first is not None or final is not None
    kept = [c for c in found if not steps or (c.step is not None and low <= c.step <= high)]
    kept = kept[::-1][::every][::-1]
    if best is not None:
        table = read_losses(losses) if losses else {}
        known = {c: table.get(c.step, table.get(c.path.name, loss_of(c.path))) for c in kept}
        for chosen, loss in known.items():
            if loss is None:
                raise CheckpointError(
                    f"{chosen.path}: its loss is not known, by which the best are chosen; give "
                    "--losses FILE"
                )
        chosen = set(sorted(kept, key=known.get)[:best])
        kept = [c for c in kept if c in chosen]
    if last is not None:
        kept = kept[-last:]
    if not kept:
        where = f"with a step in [{low}, {high}]" if steps else "to average"
        raise CheckpointError(f"{found[0].path.parent}: there is no checkpoint {where}")
    return kept


def read_losses(path: Path) -> dict[int | str, float]:
    """Losses by step or file name, from JSON lines or CSV with `loss` and `step` or `name`.

    Raises:
        CheckpointError: the file cannot be read, or has no such columns.
    """
    try:
        lines = [line for line in path.read_text().splitlines() if line.strip()]
        as_json = lines and lines[0].lstrip().startswith("{")
        rows = map(json.loads, lines) if as_json else csv.DictReader(lines)
        found = {}
        for row in rows:
            key = row.get("name") or int(row["step"])
            found[key] = float(row.get("loss") or row["eval_loss"])
        return found
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except (KeyError, ValueError, TypeError, csv.Error) as error:
        raise CheckpointError(
            f"{path}: is no list of losses (JSON lines or CSV with step or name, and loss: {error})"
        ) from None


def loss_of(path: Path) -> float | None:
    """The validation loss of a checkpoint that its trainer has left; None if there is none.

    transformers' Trainer writes `trainer_state.json` into the checkpoint, and Lightning puts the
    metric into the name.
    """
    named = LOSS_IN_NAME.search(path.name)
    if named:
        return float(named[1])
    history = trainer_state(path).get("log_history", [])
    losses = [
        e["eval_loss"] for e in history if e.get("step") == _number(path) and "eval_loss" in e
    ]
    return losses[-1] if losses else None


def trainer_state(path: Path) -> dict:
    """What transformers' Trainer wrote of its state into the checkpoint; {} if nothing."""
    file = path / "trainer_state.json"
    try:
        return dict(json.loads(file.read_text())) if file.exists() else {}
    except (OSError, ValueError):
        return {}


def checked(chosen: Sequence[Chosen]) -> tuple[list[Chosen], list[str]]:
    """`chosen` without copies of others, and what is odd about the window, for people to read."""
    same = copies([c.path for c in chosen])
    notes = [
        f"{chosen[i].path} is the same as {chosen[k].path}, and counts once"
        for i, k in same.items()
    ]
    kept = [c for i, c in enumerate(chosen) if i not in same]
    logs = [(c, trainer_state(c.path).get("log_history", [])) for c in kept]
    for (one, before), (other, after) in itertools.pairwise(logs):
        if before and after and before[0] != after[0]:
            notes.append(
                f"{other.path} is of another run than {one.path}: their logs begin differently"
            )
    rates = [e for _, log in logs[-1:] for e in log if "learning_rate" in e and "step" in e]
    top = max((e["learning_rate"] for e in rates), default=0)
    peak = next((e["step"] for e in rates if e["learning_rate"] == top), 0)
    early = [c for c in kept if c.step is not None and c.step < peak]
    if early and peak > rates[0]["step"]:
        notes.append(f"{early[0].path} is from the warm-up, before step {peak}")
    return kept, notes


def weights_of_decay(count: int) -> list[float]:
    """The coefficients of checkpoints that stand for a 1-sqrt decay of the learning rate over them.

    WSM (Tian et al., 2025): the mean `Σ c_j w_j` is the first checkpoint plus the steps after it,
    those between checkpoint i and i + 1 weighted by `Σ_{j>i} c_j`, as if the learning rate had been
    so much lower there. For a linear decay all coefficients are equal. Oldest first.
    """
    roots = [math.sqrt(i / count) for i in range(count + 1)]
    return [later - earlier for earlier, later in itertools.pairwise(roots)]


def coefficients(how: str, chosen: Sequence[Chosen]) -> list[float]:
    """The coefficients of the average `how`, oldest first, to divide by their sum.

    `how` is "mean" (with the weights of `PATH:WEIGHT`, if given), "ema=B", "wsm" or "wsm=linear".

    Raises:
        CheckpointError: there is no such average, or the weights sum to 0.
    """
    name, _, value = how.partition("=")
    count = len(chosen)
    if name == "mean" and not value:
        weights = [1.0 if c.weight is None else c.weight for c in chosen]
    elif name == "wsm" and value in ("", "linear"):
        weights = [1.0] * count if value else weights_of_decay(count)
    elif name == "ema" and _in_unit_interval(value):
        weights = [float(value) ** age for age in reversed(range(count))]
    else:
        raise CheckpointError(
            f"--how {how}: must be mean, ema=B with B between 0 and 1, wsm or wsm=linear"
        )
    if abs(math.fsum(weights)) < 1e-12:
        raise CheckpointError(f"{chosen[0].path}: the weights of the checkpoints sum to 0")
    return weights


def _in_unit_interval(value: str) -> bool:
    try:
        return 0 < float(value) < 1
    except ValueError:
        return False
