"""From the JSON of the studies to Markdown: entries by seed, means, comparisons, tables."""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from textwrap import fill

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from twa.recipe import MANY_STEPS

Runs = list[dict[str, dict]]  # the entries of each seed
EPOCHS, HEAD = 24, 12  # of the full run, and of those that leave the checkpoints
IMAGES, STEPS = 12_000, 94  # of the head stage's training set, and of an epoch
SPREAD = "TWA, in units of the spread"  # nothing tuned
BY_CHANNEL, BY_MODEL = f"{SPREAD}, by channel", f"{SPREAD}, by model"
ADVISED = f"{SPREAD}, as advised"  # by channel from MANY_STEPS on, in fewer by model
TUNED = "SGD, decaying, from the best mean, tuned rate"


def read(measurements: Path, part: str) -> dict[str, Runs]:
    """What `PART.DATA.ARCH.SEED.json` in a folder say, by "ARCH on DATA".

    Seeds that lack entries are skipped: means are over the same seeds.
    """
    found: dict[str, Runs] = {}
    for path in sorted(measurements.glob(f"{part}.*.json")):
        _, training, arch, _ = path.stem.split(".")
        found.setdefault(f"{arch} on {training}", []).append(json.loads(path.read_text()))
    for name, runs in found.items():
        entries = set().union(*runs)
        found[name] = [run | advised(run) for run in runs if run.keys() == entries]
    return found


def advised(run: dict[str, dict]) -> dict[str, dict]:
    """The entries of TWA as the README advises it, of those by model and by channel in `run`."""
    names = [name.partition(" | ") for name in run]
    return {
        f"{ADVISED} | {budget}": run[f"{row} | {budget}"]
        for row, _, budget in names
        if budget and row == (BY_CHANNEL if float(budget) * STEPS >= MANY_STEPS else BY_MODEL)
    }


def values(runs: Runs, name: str | None, key: str = "accuracy") -> list[float]:
    """The values of an entry, one for each seed that has it."""
    return [run[name][key] for run in runs if name in run]


def mean(runs: Runs, name: str, key: str = "loss") -> float:
    return statistics.mean(values(runs, name, key))


def spread(values: Sequence[float], form: str) -> str:
    """`mean ± deviation`, the sample's, which one value alone does not have; "" of none."""
    if not values:
        return ""
    mean, unsigned = format(statistics.mean(values), form), form.removeprefix("+")
    return f"{mean} ± {statistics.stdev(values):{unsigned}}" if len(values) > 1 else mean


def cell(runs: Runs, name: str | None, key: str = "accuracy", form: str = ".2f") -> str:
    """Mean and deviation of an entry, and the number of seeds if some lack it."""
    found = values(runs, name, key)
    few = f" ({len(found)} of {len(runs)} seeds)" if 0 < len(found) < len(runs) else ""
    return spread(found, form) + few


def scores(runs: Runs, name: str) -> tuple[str, str]:
    """Accuracy and loss of an entry over the seeds."""
    return cell(runs, name), cell(runs, name, "loss", ".4f")


def error(values: Sequence[float]) -> float:
    """The standard error of the mean; nan of one value."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan


def paired(runs: Runs, one: str, other: str) -> tuple[float, float]:
    """The loss of an entry less that of another: the mean difference and its standard error."""
    found = [run[one]["loss"] - run[other]["loss"] for run in runs]
    return statistics.mean(found), error(found)


def split(runs: Runs) -> tuple[list[str], list[str]]:
    """The rows and the columns of the entries called `row | column`, in order, TWA's rows last."""
    names = [name.split(" | ") for run in runs for name in run if " | " in name]
    rows, columns = (list(dict.fromkeys(parts)) for parts in zip(*names, strict=True))
    return sorted(rows, key=lambda row: row.startswith("TWA")), sorted(columns, key=float)


def budgets_of(runs: Runs, row: str) -> list[str]:
    """The budgets at which the row was measured."""
    return [budget for budget in split(runs)[1] if values(runs, f"{row} | {budget}")]


def averages(runs: Runs) -> list[str]:
    """The names of the entries without a column: what is measured without training."""
    return [name for name in runs[0] if " | " not in name and name != "SGD"]


def trained(runs: Runs, budget: str) -> list[str]:
    """The entries at this budget of the baselines that train all weights."""
    return [f"{row} | {budget}" for row in split(runs)[0] if not row.startswith("TWA")]


def best(runs: Runs, names: Iterable[str], key: str = "loss") -> str:
    """The entry with the lowest mean over the seeds that have it."""
    return min((n for n in names if values(runs, n, key)), key=lambda n: mean(runs, n, key))


def gains(runs: Runs, row: str, budget: str, key: str, other: str) -> list[float]:
    """How far each seed is ahead of an entry: points of accuracy, or by how much less loss."""
    sign = -1 if key == "loss" else 1
    pairs = [(run.get(f"{row} | {budget}"), run.get(other)) for run in runs]
    return [sign * (ours[key] - theirs[key]) for ours, theirs in pairs if ours and theirs]


def seeds(runs: Runs) -> str:
    return "one seed" if len(runs) == 1 else f"{len(runs)} seeds"


def bullet(text: str) -> list[str]:
    """Lines of at most 98 characters; a command in backquotes stays on one."""
    whole = re.sub("`[^`]*`", lambda code: code[0].replace(" ", "\0"), f"- {text}")
    wrapped = fill(whole, 98, break_on_hyphens=False, subsequent_indent="  ")
    return [wrapped.replace("\0", " ")]


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    lines = [f"| {' | '.join(row)} |" for row in (headings, *rows)]
    return [lines[0], "| --- " * len(headings) + "|", *lines[1:]]


def table(runs: Runs, key: str = "accuracy", form: str = ".2f") -> list[str]:
    """Entries called `row | column`, as Markdown."""
    rows, columns = split(runs)
    return markdown(
        ("", *columns),
        [(row, *(cell(runs, f"{row} | {c}", key, form) for c in columns)) for row in rows],
    )


def replace_block(page: Path, name: str, lines: Iterable[str]) -> None:
    """Replaces what a page has between the marks of a block, each on a line of its own."""
    begin, end = f"<!-- {name}: python studies/report.py -->\n", f"<!-- end of {name} -->"
    before, found, rest = page.read_text().partition(begin)
    if not found or end not in rest:
        raise ValueError(f"{page}: has no block {name}")
    made = "\n".join(["", *lines, "", ""])
    page.write_text(f"{before}{begin}{made}{end}{rest.partition(end)[2]}")
