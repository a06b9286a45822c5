"""Writes docs/RESULTS.md and its figures from the measurements: no number is typed by hand."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from textwrap import fill

import torch
from matplotlib.figure import Figure
from study import DATA, EPOCHS, EVERY, HEAD, ROOT, SAVES
from torch.utils.flop_counter import FlopCounterMode

import models
from training import data

Runs = list[dict[str, dict]]  # the entries of each seed
Studies = dict[str, dict[str, Runs]]  # by part, then by "ARCH on DATA"
START = "mean of the last 10"  # the entry of the point that TWA starts from
SPREAD = "TWA, in units of the spread"  # nothing tuned
TUNED = "SGD, decaying, from the best mean, tuned rate"
BY_CHANNEL = f"{SPREAD}, by channel"
SHOWN = 2  # epochs after the head, in the four rows and the figure's left half
RECIPE = "TWA, the recipe"  # as it was, in the paper's coordinates
TOLD = {"new": "the defaults", "before": "as it was"}  # recipes of the safety study


def write(measurements: Path, target: Path, figures: Path) -> None:
    """Writes `target`, and its figures into the folder `figures`.

    Args:
        measurements: holds `PART.DATA.ARCH.SEED.json`.
    """
    studies = read(measurements)
    costs = {name.split(" on ")[0]: runs[0] for name, runs in studies.get("cost", {}).items()}
    figures.mkdir(parents=True, exist_ok=True)
    parts = [INTRODUCTION, *summary(studies), *answers(studies)]
    for part, (title, note, section) in SECTIONS.items():
        for name, runs in studies.get(part, {}).items():
            figure = figures / f"{part}.{name.replace(' on ', '.')}.png"
            lines = section(runs, figure)
            arch, training = name.split(" on ")
            if part == "head" and arch in costs:
                lines += ["", *seconds(runs, costs[arch], DATA[training].steps)]
            parts += ["", f"## {title}: {name}, {seeds(runs)}", "", fill(note, 98), "", *lines]
            if figure.exists():
                parts += ["", f"![{title}]({os.path.relpath(figure, target.parent)})"]
    for title, note, section in OTHERS:
        parts += ["", f"## {title}", "", fill(note, 98), "", *section()]
    parts += ["", *papers(), ""]
    target.write_text("\n".join(parts))


def read(measurements: Path) -> Studies:
    """All measurements; a seed without all entries is left out: means are over the same seeds."""
    studies: Studies = {}
    for path in sorted(measurements.glob("*.json")):
        part, training, arch, _ = path.stem.split(".")
        runs = studies.setdefault(part, {}).setdefault(f"{arch} on {training}", [])
        run = json.loads(path.read_text())
        beside = path.with_name(path.name.replace("spread", "head", 1))
        if part == "spread" and beside.exists():  # the rivals at their usual rates
            run = json.loads(beside.read_text()) | run
        runs.append(run)
    for named in studies.values():
        for name, runs in [*named.items()]:
            entries = set().union(*runs)
            named[name] = [run for run in runs if run.keys() == entries]
            if not named[name]:
                del named[name]
    return studies


INTRODUCTION = f"""# Results

Does Trainable Weight Averaging save epochs, does it beat the simple averages, and which settings
are safe? `bash studies/evidence.sh` makes the runs, `python studies/evidence.py report`
writes this page from their JSON in `studies/results`. All of it ran on two CPU cores, with
bf16 autocast, batches of 128, and mean ± standard deviation over the seeds. Test data chose
nothing: where settings are compared, they are on 10,000 validation images, training images that
the run never saw.

The full run is SGD for {EPOCHS} epochs at rate 0.1, a tenth of it from the middle on and a
hundredth from three quarters on. The *head* is its first {HEAD} epochs, all at rate 0.1; they
leave {SAVES // EVERY} checkpoints an epoch, {HEAD * SAVES // EVERY} in all. "TWA, in units of the
spread" is what `TWA(model, checkpoints)` does, with nothing tuned: principal directions, AdamW at
0.02 falling linearly to 0, from the best mean of the last checkpoints; of start, end and the mean
of the last half of training the best is kept, by loss on 1,024 training images. All other rows of
TWA are as it was before: the paper's coordinates, from the mean of the last ten, at a rate from the
curvature of the loss ("the default rate"), which the scripts no longer have.
The training sets are FashionMNIST's 60,000 images or the first 12,000 of them (12k), of which 40
% have wrong labels in one (noisy). The cnn and the vit of `studies/architectures.py` have no
batch norm; where there is one, it is re-estimated for every solution. "Epochs" count what is
trained on; comparing start points and ends takes forward passes beside them, on 2,048 images for
each of ten points, which is about half an epoch's work; the rate of the old rows took five
batches."""


def summary(studies: Studies) -> list[str]:
    """Four rows of the head stage, from the study with the most seeds."""
    studied = studies["spread"]
    name = max(studied, key=lambda name: len(studied[name]))
    runs = studied[name]
    rows = [
        ("mean of the head's last 5 checkpoints", HEAD, scores(runs, "mean of the last 5")),
        (BY_CHANNEL, HEAD + SHOWN, scores(runs, f"{BY_CHANNEL} | {SHOWN}")),
        (TUNED, HEAD + SHOWN, scores(runs, f"{TUNED} | {SHOWN}")),
        ("SGD, the full run", EPOCHS, scores(full(runs), "SGD")),
    ]
    lines = ["", f"The head stage in four rows ({name}, {seeds(runs)}):", ""]
    return lines + markdown(
        ("solution", "epochs", "test accuracy (%)", "test loss"),
        [(title, str(epochs), *cells) for title, epochs, cells in rows],
    )


def answers(studies: Studies) -> list[str]:
    """What the studies of the head stage and of the rates say, each in a sentence or two."""
    lines = ["", "## In short", ""]
    for name, runs in studies["head"].items():
        rows, budgets = split(runs)
        if RECIPE in rows:
            lines += bullet(
                f"**{name}**, {seeds(runs)}: {RECIPE} {reached(runs, RECIPE)}. Of budgets of "
                f"{', '.join(budgets)} epochs more it is, in the mean, ahead of every rival and "
                f"every average by accuracy at {leads(runs, budgets, 'accuracy')}, by loss at "
                f"{leads(runs, budgets, 'loss')}."
            )
    for name, runs in studies.get("spread", {}).items():
        lines += bullet(
            f"**{SPREAD}**, nothing tuned, by channel: {name}, {seeds(runs)}, budgets of "
            f"{', '.join(measured(runs))} epochs."
        )
        lines += goals(runs)
    cases = {
        f"{name}, {row}": (best_rate(runs, row)[1], start_gain(runs, row))
        for name, runs in studies.get("rates", {}).items()
        for row in split(runs)[0]
    }
    if cases:
        where = max(cases, key=cases.get)
        lines += bullet(
            f"**The default rate** is within {cases[where][0]:.2f} points of the best of seven "
            f"rates over three decades in all {len(cases)} cases (most is lost in: {where}). The "
            f"least that it gained over the start point is "
            f"{min(gain for _, gain in cases.values()):.2f} points."
        )
    return lines


def leads(runs: Runs, budgets: list[str], key: str) -> str:
    """The budgets at which the recipe leads in the mean, and those where the lead is clear.

    Clear is a lead of more than two standard errors, which takes three seeds or more.
    """
    found = {budget: gains(runs, RECIPE, budget, key) for budget in budgets}
    first = [b for b, gain in found.items() if gain and statistics.mean(gain) > 0]
    if len(runs) < 3 or not first:
        return ", ".join(first) or "none"
    errors = {b: statistics.stdev(found[b]) / len(found[b]) ** 0.5 for b in first}
    clear = [b for b in first if statistics.mean(found[b]) > 2 * errors[b]]
    return f"{', '.join(first)} (by more than two standard errors at {', '.join(clear) or 'none'})"


def measured(runs: Runs) -> list[str]:
    """The budgets at which the recipe and the rival at a tuned rate were measured."""
    _, budgets = split(runs)
    return [b for b in budgets if all(values(runs, f"{row} | {b}") for row in (BY_CHANNEL, TUNED))]


def goals(runs: Runs) -> list[str]:
    """Where the goals are met: TWA, untuned, against the tuned rival and the untuned ones."""
    budgets, lines = measured(runs), []
    for key in ("accuracy", "loss"):
        against = {b: gains(runs, BY_CHANNEL, b, key, f"{TUNED} | {b}") for b in budgets}
        means = {b: statistics.mean(gain) for b, gain in against.items()}
        errors = {b: statistics.stdev(g) / len(g) ** 0.5 for b, g in against.items() if len(g) > 1}
        usual = {
            b: statistics.mean(gains(runs, BY_CHANNEL, b, key, rival(runs, b, key, tuned=False)))
            for b in budgets
            if float(b) <= 1
        }
        ahead = [b for b in budgets if means[b] > 0]
        behind = [b for b in budgets if means[b] < -errors.get(b, 0)]
        lost = [b for b, gain in usual.items() if gain <= 0]
        far, none = "behind it", "no verdict from one seed"
        if errors:
            far, none = "more than one standard error behind it", told(not behind)
        lines += bullet(
            f"By {key}, of budgets of {', '.join(budgets)} epochs: ahead of the rival at its tuned "
            f"rate at {', '.join(ahead) or 'none'} (goal: half of them: "
            f"{told(2 * len(ahead) >= len(budgets))}); {far} at "
            f"{', '.join(behind) or 'none'} (goal: not by more than one "
            f"standard error: {none}); not ahead of every "
            f"average and every rival at its usual rate, up to one epoch, at "
            f"{', '.join(lost) or 'none'} (goal: none: {told(not lost)})."
        )
    return lines


def told(met: bool) -> str:
    return "met" if met else "not met"


def seeds(runs: Runs) -> str:
    return "one seed" if len(runs) == 1 else f"{len(runs)} seeds"


def bullet(text: str) -> list[str]:
    return [fill(f"- {text}", 98, subsequent_indent="  ")]


def values(runs: Runs, name: str, key: str = "accuracy") -> list[float]:
    """The values of an entry, one for each seed that has it."""
    return [run[name][key] for run in runs if name in run]


def full(runs: Runs) -> Runs:
    """The end of the full run as the entry "SGD" of each seed."""
    ends = [run["SGD"]["curve"][-1] for run in runs]
    return [{"SGD": {"accuracy": e["test_accuracy"], "loss": e["test_loss"]}} for e in ends]


def spread(values: Sequence[float], form: str) -> str:
    """`mean ± deviation`, the sample's, which one value alone does not have; "" of none."""
    if not values:
        return ""
    mean, unsigned = format(statistics.mean(values), form), form.removeprefix("+")
    return f"{mean} ± {statistics.stdev(values):{unsigned}}" if len(values) > 1 else mean


def scores(runs: Runs, name: str) -> tuple[str, str]:
    """Accuracy and loss of an entry over the seeds."""
    return spread(values(runs, name), ".2f"), spread(values(runs, name, "loss"), ".4f")


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    lines = [f"| {' | '.join(row)} |" for row in (headings, *rows)]
    return [lines[0], "| --- " * len(headings) + "|", *lines[1:]]


def split(runs: Runs) -> tuple[list[str], list[str]]:
    """The rows and the columns of the entries called `row | column`, in order, TWA's rows last."""
    names = [name.split(" | ") for run in runs for name in run if " | " in name]
    rows, columns = (list(dict.fromkeys(parts)) for parts in zip(*names, strict=True))
    rows.sort(key=lambda row: row.startswith("TWA"))
    numbers = all(c.replace(".", "").isdecimal() for c in columns)
    return rows, sorted(columns, key=float) if numbers else columns


def table(
    runs: Runs, rows: list[str], columns: list[str], key: str = "accuracy", form: str = ".2f"
) -> list[str]:
    """Entries called `row | column`, as Markdown."""
    cells = [[spread(values(runs, f"{row} | {c}", key), form) for c in columns] for row in rows]
    return markdown(("", *columns), [(row, *rest) for row, rest in zip(rows, cells, strict=True)])


def averages(runs: Runs) -> list[str]:
    """The names of the entries without a column: what is measured without training."""
    return [name for name in runs[0] if " | " not in name and name != "SGD"]


def plain(runs: Runs, images: str = "test") -> list[str]:
    """The table of what is measured without training."""
    headings = ("solution", f"{images} accuracy (%)", f"{images} loss")
    return markdown(headings, [(name, *scores(runs, name)) for name in averages(runs)])


def both(runs: Runs, what: str, images: str = "test") -> list[str]:
    """Two tables of the entries called `row | column`: accuracy and loss."""
    kind, (rows, columns) = images.capitalize(), split(runs)
    lines = [f"{kind} accuracy (%) {what}:", "", *table(runs, rows, columns), ""]
    lines += [f"{kind} loss:", ""]
    return lines + table(runs, rows, columns, "loss", ".4f")


def choice(runs: Runs, what: str) -> list[str]:
    """The tables of a part that compares settings, on the validation images."""
    return [*plain(runs, "validation"), "", *both(runs, what, "validation")]


def head(runs: Runs, figure: Path) -> list[str]:
    rows, budgets = split(runs)
    accuracy, loss = scores(full(runs), "SGD")
    lines = [f"Full run, {EPOCHS} epochs: {accuracy} %, test loss {loss}. After the head:", ""]
    lines += [*plain(runs), "", *both(runs, "after so many epochs more"), ""]
    lines += ["Points of test accuracy that TWA is ahead of the rival with the highest mean:", ""]
    lines += [*ahead(runs, rows, budgets, "accuracy", "+.2f"), ""]
    lines += ["How far TWA's test loss is below that of the rival with the lowest mean:", ""]
    lines += [*ahead(runs, rows, budgets, "loss", "+.4f"), ""]
    lines += [f"- {row}: {reached(runs, row)}." for row in rows]
    draw_head(runs, rows, budgets, figure)
    return lines


def in_spread(runs: Runs, figure: Path) -> list[str]:
    rows, budgets = split(runs)[0], measured(runs)
    rows = [row for row in rows if values(runs, f"{row} | {budgets[0]}")]
    lines = ["Test accuracy (%) after so many epochs more:", "", *table(runs, rows, budgets), ""]
    lines += ["Test loss:", "", *table(runs, rows, budgets, "loss", ".4f"), ""]
    return lines + against_tuned(runs, rows)


def against_tuned(runs: Runs, rows: list[str]) -> list[str]:
    """TWA in units of the spread against the rival at its tuned rate, seed by seed."""
    budgets = measured(runs)
    lines = ["Against the rival at its tuned rate, paired by seed:", ""]
    cells = [
        [
            f"{row}: {what}",
            *(spread(gains(runs, row, b, key, f"{TUNED} | {b}"), form) for b in budgets),
        ]
        for row in rows
        if row.startswith(SPREAD)
        for key, what, form in (
            ("accuracy", "points of accuracy ahead", "+.2f"),
            ("loss", "loss below", "+.4f"),
        )
    ]
    rates = [
        " ".join({f"{rate:g}": 0 for rate in values(runs, f"{TUNED} | {b}", "lr")}) for b in budgets
    ]
    return [*lines, *markdown(("", *budgets), [*cells, ["the tuned rate", *rates]])]


def seconds(runs: Runs, cost: dict[str, dict], steps: int) -> list[str]:
    """Seconds of the methods at each budget, from the cost of a step and the steps of an epoch."""
    ways = {"TWA": "model", "TWA by layer": "layer", "TWA by channel": "channel"}
    _, budgets = split(runs)
    lines = ["The same in seconds of one quiet core, from the cost of a step below; TWA's with"]
    lines += ["building the basis and measuring the rate. The head itself took "]
    lines[-1] += f"{HEAD * steps * cost['SGD']['step_ms'] / 1e3:.0f}."
    rows = []
    for name in ("SGD", *ways):
        way = cost[f"TWA, 32 bits | {ways[name]}" if name in ways else name]
        epoch = steps * way["step_ms"] / 1e3
        rows.append([name, *(f"{way['setup_seconds'] + float(b) * epoch:.1f}" for b in budgets)])
    return [*lines, "", *markdown(("", *budgets), rows)]


def rival(runs: Runs, budget: str, key: str = "accuracy", tuned: bool = True) -> str:
    """The entry with the best mean at this budget, averages, which need no training, included.

    Args:
        tuned: whether the rival whose rate was tuned is one of them.
    """
    rows, _ = split(runs)
    rivals = [row for row in rows if not row.startswith("TWA") and (tuned or row != TUNED)]
    there = [f"{row} | {budget}" for row in rivals] + averages(runs)
    means = {name: statistics.mean(found) for name in there if (found := values(runs, name, key))}
    return min(means, key=means.get) if key == "loss" else max(means, key=means.get)


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


def ahead(runs: Runs, rows: list[str], budgets: list[str], key: str, form: str) -> list[str]:
    """TWA against the best rival at each budget."""
    lines = [
        [row, *(spread(gains(runs, row, budget, key), form) for budget in budgets)]
        for row in rows
        if row.startswith("TWA")
    ]
    lines.append(["the rival", *(rival(runs, b, key).split(" | ")[0] for b in budgets)])
    return markdown(("", *budgets), lines)


def reached(runs: Runs, row: str) -> str:
    """From which budget on the method is as good as the full run, in the mean."""
    _, budgets = split(runs)
    goal = statistics.mean(values(full(runs), "SGD"))
    means = {b: statistics.mean(v) for b in budgets if (v := values(runs, f"{row} | {b}"))}
    first = next((b for b in means if means[b] >= goal), None)
    if first:
        share = (HEAD + float(first)) / EPOCHS
        return f"reaches the full run's mean after {first} epochs, {share:.0%} of its epochs"
    lacks = goal - max(means.values())
    return f"does not reach the full run's mean; at best {lacks:.2f} points are missing"


def draw_head(runs: Runs, rows: list[str], budgets: list[str], path: Path) -> None:
    """Left, accuracy over all epochs; right, over the epochs spent after the head."""
    fig = Figure(figsize=(11, 4.6))
    left, right = fig.subplots(1, 2)
    curves = [[m["test_accuracy"] for m in run["SGD"]["curve"]] for run in runs]
    mean = [statistics.mean(accuracies) for accuracies in zip(*curves, strict=True)]
    end = mean[-1]
    left.plot(range(1, EPOCHS + 1), mean, color="#7f7f7f", label="SGD, the full run")
    left.axvspan(0, HEAD, color="#f0f0f0")
    marks = {"mean of the last 5": ("s", "C1"), f"{RECIPE} | {SHOWN}": ("*", "C3")}
    for name, (mark, colour) in marks.items():
        if values(runs, name):
            row, _, more = name.partition(" | ")
            label = f"{row}, {more} epochs more" if more else row
            left.plot(
                HEAD + float(more or 0), statistics.mean(values(runs, name)), mark, color=colour,
                markersize=8 if mark == "s" else 15, label=label, linestyle="none",
            )  # fmt: skip
    left.set(xlabel="epochs", ylabel="test accuracy (%)", title="the head is grey")
    shades = {
        True: iter(("#ffbb78", "#ff7f0e", "#8c564b", "#e377c2", "#bcbd22")),
        False: iter(("C0", "C9", "C2", "C4", "#000000")),
    }
    for row in rows:
        there = [b for b in budgets if values(runs, f"{row} | {b}")]
        means = [statistics.mean(values(runs, f"{row} | {b}")) for b in there]
        style = "o-" if row.startswith("TWA") else "s--"
        colour = "C3" if row == RECIPE else next(shades[row.startswith("TWA")])
        right.plot([float(b) for b in there], means, style, color=colour, label=row)
        if row == RECIPE and len(runs) > 1:
            deviations = [statistics.stdev(values(runs, f"{row} | {b}")) for b in there]
            low, high = (
                [m + sign * s for m, s in zip(means, deviations, strict=True)] for sign in (-1, 1)
            )
            right.fill_between([float(b) for b in there], low, high, color=colour, alpha=0.15)
    right.axhline(end, color="#7f7f7f", linestyle=":", label="SGD, the full run")
    right.set(
        xscale="log",
        xlabel="epochs after the head",
        title="equal budgets; shaded: ± standard deviation",
    )
    right.set_xticks([float(b) for b in budgets], budgets)
    right.minorticks_off()
    left.set_ylim(end - 12, end + 2)
    for axes in (left, right):
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncol=2)
        axes.grid(alpha=0.3)
    save(fig, path)


def save(fig, path: Path) -> None:
    fig.tight_layout()
    fig.savefig(path, dpi=120)


def rates(runs: Runs, figure: Path) -> list[str]:
    rows, _ = split(runs)
    lines = [*choice(runs, "at so many times the default rate"), ""]
    for row in rows:
        best, lacks = best_rate(runs, row)
        text = f"{row}: the default is {lacks:.2f} points below the best, {best} times it."
        lines += bullet(text)
    return lines


def best_rate(runs: Runs, row: str) -> tuple[str, float]:
    """The best factor in the mean of the seeds, and the points by which the default is below it."""
    _, factors = split(runs)
    means = {f: statistics.mean(v) for f in factors if (v := values(runs, f"{row} | {f}"))}
    best = max(means, key=means.get)
    return best, means[best] - means["1"]


def start_gain(runs: Runs, row: str) -> float:
    """Points that the default rate gains over the start point, in the worst seed."""
    return min(run[f"{row} | 1"]["accuracy"] - run[START]["accuracy"] for run in runs)


def settings(runs: Runs, figure: Path) -> list[str]:
    what = "with coefficients of the model, of each layer, of each channel"
    return choice(runs, what)


def checkpoints(runs: Runs, figure: Path) -> list[str]:
    what = "by checkpoints an epoch and by the epoch that the window begins after"
    lines = choice(runs, what)
    counts = table(runs, *split(runs), "count", ".0f")
    draw_averaging(runs, figure)
    return [*lines, "", "The number of checkpoints in the window:", "", *counts]


def draw_averaging(runs: Runs, path: Path) -> None:
    """The averaging coefficients after training, in the first seed."""
    fig = Figure(figsize=(8, 3.4))
    axes = fig.subplots()
    for i, saves in enumerate((1, 2, 5)):  # with more, neighbours cancel each other
        entry = runs[0].get(f"{saves} an epoch | 0")
        if entry:
            alpha = [a * saves for a in entry["averaging_weights"]]
            epochs = [(k + 1) / saves for k in range(len(alpha))]
            axes.plot(epochs, alpha, ".-", color=f"C{i}", label=f"{saves} an epoch")
    axes.axhline(1 / HEAD, color="#7f7f7f", linestyle=":", label="the uniform mean (SWA)")
    axes.set(xlabel="epoch of the checkpoint", ylabel="coefficient · checkpoints an epoch")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    save(fig, path)


def second_order(runs: Runs, figure: Path) -> list[str]:
    lines = choice(runs, "for so many epochs' worth of passes")
    long, short = values(runs, "SGD | 10"), [values(runs, f"{m} | 1") for m in ("L-BFGS", "Newton")]
    if not (long and all(short)):
        return lines
    gap = statistics.mean(long) - max(map(statistics.mean, short))
    do = "do not reach" if gap > 0 else "reach"
    return [*lines, "", f"In one epoch they {do} what SGD has after ten: {-gap:+.2f} points."]


def little(runs: Runs, figure: Path) -> list[str]:
    return [*plain(runs), "", *both(runs, "after training on the column's images alone")]


def cost(runs: Runs, figure: Path) -> list[str]:
    (run, *_) = runs
    steps, sgd = run["process"]["steps_an_epoch"], run["SGD"]["step_ms"]
    columns = {
        "": lambda name, _: name.replace(" | ", ", by "),
        "seconds an epoch": lambda _, e: f"{e['step_ms'] * steps / 1e3:.1f}",
        "of SGD's": lambda _, e: f"{e['step_ms'] / sgd:.2f}",
        "share of a step in the optimizer": lambda _, e: f"{e['optimizer_ms'] / e['step_ms']:.1%}",
        "coefficients": lambda _, e: f"{e['coefficients']:,}" if "coefficients" in e else "",
        "basis MB": lambda _, e: f"{e['basis_bytes'] / 1e6:.1f}" if "basis_bytes" in e else "",
        "build seconds": lambda _, e: f"{e['build_seconds']:.2f}" if "build_seconds" in e else "",
    }
    names = ("SGD", *(name for name in run if name.startswith("TWA")))
    rows = [[cell(name, run[name]) for cell in columns.values()] for name in names]
    peak = run["process"]["peak_bytes"] / 1e9
    end = f"The process, PyTorch and the data set included, peaked at {peak:.2f} GB."
    return [*markdown([*columns], rows), "", end]


def plane(runs: Runs, figure: Path) -> list[str]:
    found = runs[0]["plane"]
    fig = Figure(figsize=(6, 4.6))
    axes = fig.subplots()
    losses = torch.tensor(found["loss"])
    levels = torch.logspace(losses.min().log10().item(), losses.max().log10().item(), 18).tolist()
    contours = axes.contourf(found["x"], found["y"], losses, levels, cmap="viridis_r")
    fig.colorbar(contours, label="training loss", format="%.2f")
    for name, (x, y) in found["points"][0].items():
        axes.plot(x, y, "o", color="white", markeredgecolor="black")
        axes.annotate(name, (x, y), (5, 5), textcoords="offset points", color="black")
    axes.set(xlabel="way from SGD's last checkpoint to SWA", ylabel="across")
    save(fig, figure)
    return []


def tail_stage() -> list[str]:
    """SGD, SWA and TWA, from `swa/results/NAME.SEED.json`."""
    runs: dict[str, Runs] = {}
    for path in sorted((ROOT / "studies/swa/results").glob("*.json")):
        name = path.stem.rpartition(".")[0]
        runs.setdefault(name, []).append(json.loads(path.read_text())["results"])
    names = [("SGD, rate to 0.01 · lr_init", "sgd", "SGD")]
    for rate in ("0.05", "0.1"):
        names += [
            (f"SGD in the tail (last checkpoint), swa_lr {rate}", f"swa{rate}", "SGD"),
            (f"SWA, swa_lr {rate}", f"swa{rate}", "SWA"),
            (f"TWA from the last checkpoint, swa_lr {rate}", f"swa{rate}.paper", "TWA"),
            (f"TWA from the mean, swa_lr {rate}", f"swa{rate}.mean", "TWA"),
        ]
    rows = [
        (title, *scores(runs[name], solution), f"{runs[name][0][solution]['epochs']:.4g}")
        for title, name, solution in names
    ]
    return markdown(("solution", "test accuracy (%)", "test loss", "epochs"), rows)


def safety() -> list[str]:
    """Whether TWA leaves a model worse than it found it: defaults, as it was, and remedies."""
    records = json.loads((ROOT / "studies/safety.json").read_text())
    tried = json.loads((ROOT / "studies/safety_remedies.json").read_text())
    chosen = {key.rpartition(": ")[0] for key in tried if key.count(": ") == 2}
    rows: dict[tuple[str, str], list[tuple[float, ...]]] = {}
    for key, entry in (records | tried).items():
        run, _, recipe = key.rpartition(": ")
        if "held out" not in entry:
            continue
        start, end, error = (entry["held out"][k] for k in ("start", "end", "error"))
        case, _, setting = run.partition(": ")
        averages = records[f"{case}: {setting.split()[0]}"].values()
        figures = (
            end / start,
            end > 1.05 * start,
            end - start > error > 0,
            max(entry["after"]) / start,
            entry["held out"]["accuracy"] >= max(averages) - 1e-4,
        )
        if recipe in TOLD:
            rows.setdefault((TOLD[recipe], case.rpartition(" ")[0]), []).append(figures)
        if run in chosen and recipe != "before":
            name = f"remedies: {TOLD.get(recipe, recipe)}"
            rows.setdefault((name, "some on Digits"), []).append(figures)
    names = [*TOLD.values(), *sorted({how for how, _ in rows} - {*TOLD.values()})]
    rank = {name: place for place, name in enumerate(names)}
    table = []
    for (how, case), runs in sorted(rows.items(), key=lambda row: rank[row[0][0]]):
        ratio, over, beyond, worst, accurate = zip(*runs, strict=True)
        table.append(
            (
                *(how, case, str(len(runs)), f"{statistics.median(ratio):.3f}"),
                *(f"{max(ratio):.3f}", str(sum(over)), str(sum(beyond))),
                *(f"{max(worst):.2f}", f"{100 * sum(accurate) / len(runs):.0f} %"),
            )
        )
    heads = ("TWA", "SGD run", "runs", "end / start, median", "largest", "above 1.05")
    heads += ("above by more than its error", "worst epoch / start", "accuracy")
    return [*markdown(heads, table), "", *against_before(records)]


def against_before(records: dict[str, dict]) -> list[str]:
    """How much higher the final loss was at the same settings, by architecture."""
    ratios: dict[str, list[float]] = {}
    for key, entry in records.items():
        now = records.get(f"{key.removesuffix(': before')}: new")
        if key.endswith(": before") and now:
            ratio = entry["held out"]["end"] / now["held out"]["end"]
            ratios.setdefault(key.split()[1], []).append(ratio)
    times = [f"{statistics.geometric_mean(r):.1f} ({arch})" for arch, r in ratios.items()]
    return bullet(
        "As it was, TWA hardly moves from its start, the window's mean, which is poor: at the same "
        f"settings its final loss is {', '.join(times)} times that of the defaults."
    )


def soups() -> list[str]:
    """Soups and what they are made of, from `soup/results/SEED.jsonl`."""
    runs: Runs = []
    for path in sorted((ROOT / "studies/soup/results").glob("*.jsonl")):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        runs.append({r["name"]: r | r["test"] for r in records if "models" in r})
    rows = []
    for name in dict.fromkeys(name for run in runs for name in run):
        validation = [scored["accuracy"] for scored in values(runs, name, "validation")]
        seconds = values(runs, name, "seconds")
        rest = (spread(seconds, ".0f"), str(len(seconds)))
        rows.append((name, spread(validation, ".2f"), *scores(runs, name), *rest))
    headings = ("validation accuracy", "test accuracy", "test loss", "seconds", "seeds")
    return markdown(("solution", *headings), rows)


SECTIONS = {
    "head": (
        "Head stage",
        "TWA against rivals that spend the same epochs: SGD on all weights from rate 0.05 falling "
        "linearly to 0, and SGD with its whole schedule in as many epochs as head and budget. "
        "The recipe, as it was, is AdamW (below one epoch SGD) on a set of coefficients for each "
        "channel, from the mean of the last five; validation images beside the 12,000 chose it.",
        head,
    ),
    "spread": (
        "Head stage in units of the spread",
        "From the same checkpoints, to the bit: TWA as it is by default, with nothing tuned, and "
        "SGD on all weights from the same start point (the best mean) at the best of the rates "
        "0.01, 0.02, 0.05 and 0.1 by loss on 4,000 validation images, tried for each budget on the "
        "first seed. The other rows are those of the table above, same seeds.",
        in_spread,
    ),
    "plane": (
        "The loss around the solutions",
        "The training loss on the plane through the head's last checkpoint (SGD), the mean of its "
        "checkpoints (SWA) and TWA's solution after one epoch; 1024 images, first seed.",
        plane,
    ),
    "checkpoints": (
        "How many checkpoints, how often",
        "One epoch of TWA from the mean of the head's last two epochs. The figure: the averaging "
        "coefficients that it ends with, scaled so that windows of different size can be compared.",
        checkpoints,
    ),
    "rates": (
        "Rates",
        "One epoch of TWA; the rest as in the head stage.",
        rates,
    ),
    "settings": ("Settings", "One epoch of TWA, one setting changed at a time.", settings),
    "second-order": (
        "Second-order steps on the coefficients",
        "L-BFGS with a line search on fixed batches, and two Newton steps in the twelve leading "
        "directions, the Hessian from differences of gradients. Every pass counts as training.",
        second_order,
    ),
    "little": (
        "Few images, and wrong labels",
        "As many steps as one epoch has, on the training set or on so many images with right "
        "labels that the run never saw; then batch norm is re-estimated on these images as well, "
        "as if the training data were gone.",
        little,
    ),
    "cost": (
        "Cost",
        "Sixty checkpoints, batches of 128, one core with nothing beside it.",
        cost,
    ),
}
OTHERS = (
    (
        "Safety: many small runs",
        "Measured by `python studies/safety.py`: windows of 5 to 120 checkpoints, start points "
        "auto, SWA and last, by model, layer and channel, 0.2 to 5 epochs. Loss on held-out "
        "images (298 of Digits, 2,000 of FashionMNIST) that neither SGD nor TWA saw, at the end "
        "over that at the start; the last column counts the runs whose final accuracy is at least "
        "that of the best of last, mean of last 5, and SWA (an image of Digits is 0.34 points). "
        "As it was: the paper's coordinates, SGD at a measured rate, from the mean of the window. "
        "The runs share checkpoints and images, so these rates are rough. Where training images "
        "are learned by heart, as 600 of Digits are, the sample of them can choose neither start "
        "nor end: give --split there. Remedies tried against it: AdamW's weight decay of 5 towards "
        "the start, a fifth of the images kept out to choose by, half the rate; on FashionMNIST "
        "none of them has been tried.",
        safety,
    ),
    (
        "Tail stage: PreResNet20 on FashionMNIST",
        "Measured by `bash studies/swa/study.sh`; described in [swa/README.md](../swa/README.md).",
        tail_stage,
    ),
    (
        "Soups: PreResNet20 on FashionMNIST",
        "Measured by `bash studies/soup/study.sh`; described in "
        "[soup/README.md](../soup/README.md).",
        soups,
    ),
)

# The paper's runs: architecture, data set, epochs of SGD in the head, epochs of TWA.
PAPER = (
    ("VGG16BN", "CIFAR100", 100, 10),
    ("PreResNet164", "CIFAR100", 100, 10),
    ("resnet18", "ImageNet", 60, 2),
)


def papers() -> list[str]:
    """What the paper's runs would cost: counted operations, nothing that was run."""
    note = (
        "Not run here. The commands are in [head-stage.md](head-stage.md) and "
        "[imagenet.md](imagenet.md); this is what they take, with operations counted by PyTorch on "
        "the model, and hours for a GPU that sustains 20 TFLOP/s."
    )
    rows = []
    for arch, training, epochs, more in PAPER:
        on_imagenet = training == "ImageNet"
        images, size = (1_281_167, 224) if on_imagenet else (50_000, data.DATASETS[training].size)
        with torch.device("meta"):
            model = (
                models.imagenet.build(arch, 1000, size)
                if on_imagenet
                else models.build(arch, 100, 3, size)
            )
            with FlopCounterMode(display=False) as counter:
                model(torch.empty(2, 3, size, size)).sum().backward()
        operations = counter.get_total_flops() / 2 * images * (epochs + more)
        name = f"{arch} on {training}"
        hours = operations / 20e12 / 3600
        rows.append((name, f"{epochs} + {more}", f"{operations / 1e15:,.0f}", f"{hours:.1f}"))
    headings = ("model", "epochs of SGD + TWA", "training operations (10¹⁵)", "GPU hours")
    return ["## The paper's own set-up", "", fill(note, 98), "", *markdown(headings, rows)]
