"""From the JSON of the studies to Markdown: entries by seed, means, comparisons, tables."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from textwrap import fill

from study import DATA

from training.coefficients import MANY_STEPS

Runs = list[dict[str, dict]]  # the entries of each seed
Studies = dict[str, dict[str, Runs]]  # by part, then by "ARCH on DATA"
SPREAD = "TWA, in units of the spread"  # nothing tuned
BY_CHANNEL, BY_MODEL = f"{SPREAD}, by channel", f"{SPREAD}, by model"
ADVISED = f"{SPREAD}, as advised"  # by channel from MANY_STEPS on, in fewer by model
TUNED = "SGD, decaying, from the best mean, tuned rate"
RECIPE = "TWA, the recipe"  # as it was, in the paper's coordinates
START = "mean of the last 10"  # the entry of the point that TWA started from, as it was


def read(measurements: Path) -> Studies:
    """What `PART.DATA.ARCH.SEED.json` in a folder say, "spread" as more entries of "head".

    A seed that lacks entries of its part is left out: means are over the same seeds.
    """
    found: dict[tuple[str, str], dict[str, dict]] = {}
    for path in sorted(measurements.glob("*.json")):
        part, training, arch, seed = path.stem.split(".")
        found.setdefault((part, f"{arch} on {training}"), {})[seed] = json.loads(path.read_text())
    for key, runs in found.items():
        entries = set().union(*runs.values())
        found[key] = {seed: run for seed, run in runs.items() if run.keys() == entries}
    studies: Studies = {}
    for (part, name), runs in found.items():
        if part != "spread" and runs:
            more = found.get(("spread", name), {}) if part == "head" else {}
            whole = [run | more.get(seed, {}) for seed, run in runs.items()]
            studies.setdefault(part, {})[name] = [run | advised(run, name) for run in whole]
    return studies


def advised(run: dict[str, dict], study: str) -> dict[str, dict]:
    """The entries of TWA as the README advises it, of those by model and by channel in `run`."""
    found = {}
    for name, made in run.items():
        row, _, budget = name.partition(" | ")
        if row in (BY_CHANNEL, BY_MODEL):
            steps = float(budget) * DATA[study.partition(" on ")[2]].steps
            if row == (BY_CHANNEL if steps >= MANY_STEPS else BY_MODEL):
                found[f"{ADVISED} | {budget}"] = made
    return found


def values(runs: Runs, name: str, key: str = "accuracy") -> list[float]:
    """The values of an entry, one for each seed that has it."""
    return [run[name][key] for run in runs if name in run]


def spread(values: Sequence[float], form: str) -> str:
    """`mean ± deviation`, the sample's, which one value alone does not have; "" of none."""
    if not values:
        return ""
    mean, unsigned = format(statistics.mean(values), form), form.removeprefix("+")
    return f"{mean} ± {statistics.stdev(values):{unsigned}}" if len(values) > 1 else mean


def told(runs: Runs, name: str, key: str = "accuracy", form: str = ".2f") -> str:
    """Mean and deviation of an entry, and the number of seeds if some lack it."""
    found = values(runs, name, key)
    few = f" ({len(found)} of {len(runs)} seeds)" if 0 < len(found) < len(runs) else ""
    return spread(found, form) + few


def scores(runs: Runs, name: str) -> tuple[str, str]:
    """Accuracy and loss of an entry over the seeds."""
    return told(runs, name), told(runs, name, "loss", ".4f")


def mean(runs: Runs, name: str, key: str = "loss") -> float:
    return statistics.mean(values(runs, name, key))


def error(values: Sequence[float]) -> float:
    """The standard error of the mean; nan of one value."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def split(runs: Runs) -> tuple[list[str], list[str]]:
    """The rows and the columns of the entries called `row | column`, in order, TWA's rows last."""
    names = [name.split(" | ") for run in runs for name in run if " | " in name]
    rows, columns = (list(dict.fromkeys(parts)) for parts in zip(*names, strict=True))
    rows.sort(key=lambda row: row.startswith("TWA"))
    numbers = all(c.replace(".", "").isdecimal() for c in columns)
    return rows, sorted(columns, key=float) if numbers else columns


def budgets_of(runs: Runs, *rows: str) -> list[str]:
    """The budgets at which all these rows were measured."""
    return [b for b in split(runs)[1] if all(values(runs, f"{row} | {b}") for row in rows)]


def averages(runs: Runs) -> list[str]:
    """The names of the entries without a column: what is measured without training."""
    return [name for name in runs[0] if " | " not in name and name != "SGD"]


def best(runs: Runs, names: Iterable[str], key: str = "loss") -> str:
    """The entry with the best mean over the seeds that have it."""
    means = {name: statistics.mean(v) for name in names if (v := values(runs, name, key))}
    return min(means, key=means.get) if key == "loss" else max(means, key=means.get)


def rival(runs: Runs, budget: str, key: str, tuned: bool = True) -> str:
    """The entry with the best mean at this budget, averages, which need no training, included.

    Args:
        tuned: whether the rival whose rate was tuned is one of them.
    """
    return best(runs, [*trained(runs, budget, tuned), *averages(runs)], key)


def trained(runs: Runs, budget: str, tuned: bool = True) -> list[str]:
    """The entries at this budget of the rivals that train all weights."""
    rows, _ = split(runs)
    rivals = [row for row in rows if not row.startswith("TWA") and (tuned or row != TUNED)]
    return [f"{row} | {budget}" for row in rivals]


def gains(
    runs: Runs, row: str, budget: str, key: str = "accuracy", other: str | None = None
) -> list[float]:
    """How far each seed is ahead of an entry: points of accuracy, or by how much less loss.

    Args:
        other: the entry; None: the best rival.
    """
    other, sign = other or rival(runs, budget, key), -1 if key == "loss" else 1
    pairs = [(run.get(f"{row} | {budget}"), run.get(other)) for run in runs]
    return [sign * (ours[key] - theirs[key]) for ours, theirs in pairs if ours and theirs]


def seeds(runs: Runs) -> str:
    return "one seed" if len(runs) == 1 else f"{len(runs)} seeds"


def listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def bullet(text: str) -> list[str]:
    return [paragraph(f"- {text}", subsequent_indent="  ")]


def paragraph(text: str, **indents: str) -> str:
    """Lines of at most 98 characters; a command in backquotes stays on one."""
    whole = re.sub("`[^`]*`", lambda code: code[0].replace(" ", "\0"), text)
    return fill(whole, 98, break_on_hyphens=False, **indents).replace("\0", " ")


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    lines = [f"| {' | '.join(row)} |" for row in (headings, *rows)]
    return [lines[0], "| --- " * len(headings) + "|", *lines[1:]]


def table(
    runs: Runs, rows: list[str], columns: list[str], key: str = "accuracy", form: str = ".2f"
) -> list[str]:
    """Entries called `row | column`, as Markdown."""
    cells = [[told(runs, f"{row} | {c}", key, form) for c in columns] for row in rows]
    return markdown(("", *columns), [(row, *rest) for row, rest in zip(rows, cells, strict=True)])


def between(page: Path, begin: str, end: str, lines: list[str]) -> None:
    """Replaces what a page has between two marks, each on a line of its own."""
    before, _, rest = page.read_text().partition(f"{begin}\n")
    page.write_text(f"{before}{begin}\n" + "\n".join(lines) + f"\n{end}" + rest.partition(end)[2])
