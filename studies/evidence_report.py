"""RESULTS.md and its figures, from the measurements of `evidence.py`: no number typed by hand."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from textwrap import fill

import torch
from matplotlib.figure import Figure
from study import DATA, EPOCHS, EVERY, HEAD, ROOT, SAVES
from torch.utils.flop_counter import FlopCounterMode

import models
from training import data
from training.report import spread

Runs = list[dict[str, dict]]  # the entries of each seed
Studies = dict[str, dict[str, Runs]]  # by part, then by "ARCH on DATA"
START = "mean of the last 10"  # the entry of the point that TWA starts from
SHOWN = 2  # epochs more, in the four rows and in the figure's left half: as many as in run.sh
RECIPE = "TWA, the recipe"  # the README's, to be held against the rivals


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
    for title, note, script in OTHERS:
        table = subprocess.run([sys.executable, ROOT / script], capture_output=True, check=True)
        parts += ["", f"## {title}", "", fill(note, 98), "", table.stdout.decode().strip()]
    parts += ["", *papers(), ""]
    target.write_text("\n".join(parts))


def read(measurements: Path) -> Studies:
    """All entries; a seed that lacks some of its study's is left out, so that means compare."""
    studies: Studies = {}
    for path in sorted(measurements.glob("*.json")):
        part, training, arch, _ = path.stem.split(".")
        runs = studies.setdefault(part, {}).setdefault(f"{arch} on {training}", [])
        runs.append(json.loads(path.read_text()))
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
leave {SAVES // EVERY} checkpoints an epoch. TWA starts from the mean of the last ten of them and
trains the coefficients of all {HEAD * SAVES // EVERY}, at the default rate falling linearly to 0.
The training sets are FashionMNIST's 60,000 images or the first 12,000 of them (12k), of which 40
% have wrong labels in one (noisy). The cnn and the vit of `studies/architectures.py` have no
batch norm; where there is one, it is re-estimated for every solution. "Epochs" count what is
trained on; measuring the default rate takes five batches more."""


def summary(studies: Studies) -> list[str]:
    """Four rows of the head stage on the largest study there is."""
    heads = studies["head"]
    name = max(heads, key=lambda n: (len(heads[n]), n.startswith("PreResNet20"), "12k" not in n))
    runs = heads[name]
    end = [run["SGD"]["curve"][-1] for run in runs]
    rows = {
        "last checkpoint of the head": ("last checkpoint", HEAD),
        "mean of its last 5": ("mean of the last 5", HEAD),
        f"{RECIPE}, {SHOWN} epochs": (f"{RECIPE} | {SHOWN}", HEAD + SHOWN),
    }
    lines = ["", f"The head stage in four rows ({name}, {seeds(runs)}):", ""]
    lines += ["| solution | epochs | test accuracy (%) | test loss |", "| --- | --- | --- | --- |"]
    for title, (entry, epochs) in rows.items():
        accuracy, loss = spread(of(runs, entry), ".2f"), spread(of(runs, entry, "loss"), ".4f")
        lines.append(f"| {title} | {epochs} | {accuracy} | {loss} |")
    accuracy = spread([e["test_accuracy"] for e in end], ".2f")
    loss = spread([e["test_loss"] for e in end], ".4f")
    return [*lines, f"| SGD, the full run | {EPOCHS} | {accuracy} | {loss} |"]


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
    """The budgets at which the recipe leads in the mean, and at which of them beyond scatter.

    The scatter of fewer than three seeds says nothing.
    """
    found = {budget: gains(runs, RECIPE, budget, key) for budget in budgets}
    first = [b for b, gain in found.items() if gain and statistics.mean(gain) > 0]
    if len(runs) < 3 or not first:
        return ", ".join(first) or "none"
    errors = {b: statistics.stdev(found[b]) / len(found[b]) ** 0.5 for b in first}
    clear = [b for b in first if statistics.mean(found[b]) > 2 * errors[b]]
    return f"{', '.join(first)} (by more than two standard errors at {', '.join(clear) or 'none'})"


def seeds(runs: Runs) -> str:
    return "one seed" if len(runs) == 1 else f"{len(runs)} seeds"


def bullet(text: str) -> list[str]:
    return [fill(f"- {text}", 98, subsequent_indent="  ")]


def of(runs: Runs, name: str, key: str = "accuracy") -> list[float]:
    """What the seeds that have the entry say."""
    return [run[name][key] for run in runs if name in run]


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
    lines = ["| | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 1) + "|"]
    for row in rows:
        cells = [spread(of(runs, f"{row} | {column}", key), form) for column in columns]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return lines


def averages(runs: Runs) -> list[str]:
    """The entries that are no `row | column`: what the head is worth without training."""
    return [name for name in runs[0] if " | " not in name and name != "SGD"]


def plain(runs: Runs, images: str = "test") -> list[str]:
    """What the head is worth without training."""
    lines = [f"| solution | {images} accuracy (%) | {images} loss |", "| --- | --- | --- |"]
    for name in averages(runs):
        accuracy, loss = spread(of(runs, name), ".2f"), spread(of(runs, name, "loss"), ".4f")
        lines.append(f"| {name} | {accuracy} | {loss} |")
    return lines


def both(runs: Runs, what: str, images: str = "test") -> list[str]:
    """All entries `row | column` twice: accuracy and loss."""
    kind, (rows, columns) = images.capitalize(), split(runs)
    lines = [f"{kind} accuracy (%) {what}:", "", *table(runs, rows, columns), ""]
    lines += [f"{kind} loss:", ""]
    return lines + table(runs, rows, columns, "loss", ".4f")


def choice(runs: Runs, what: str) -> list[str]:
    """What the start point is worth, and what is made of it, on the images to choose by."""
    return [*plain(runs, "validation"), "", *both(runs, what, "validation")]


def head(runs: Runs, figure: Path) -> list[str]:
    rows, budgets = split(runs)
    ends = [run["SGD"]["curve"][-1] for run in runs]
    accuracy = spread([end["test_accuracy"] for end in ends], ".2f")
    loss = spread([end["test_loss"] for end in ends], ".4f")
    lines = [f"Full run, {EPOCHS} epochs: {accuracy} %, test loss {loss}. After the head:", ""]
    lines += [*plain(runs), "", *both(runs, "after so many epochs more"), ""]
    lines += ["Points of test accuracy that TWA is ahead of the rival with the highest mean:", ""]
    lines += [*ahead(runs, rows, budgets, "accuracy", "+.2f"), ""]
    lines += ["How far TWA's test loss is below that of the rival with the lowest mean:", ""]
    lines += [*ahead(runs, rows, budgets, "loss", "+.4f"), ""]
    lines += [f"- {row}: {reached(runs, row)}." for row in rows]
    draw_head(runs, rows, budgets, figure)
    return lines


def seconds(runs: Runs, cost: dict[str, dict], steps: int) -> list[str]:
    """What the methods took, from the cost of a step with nothing beside it, so many an epoch."""
    ways = {"TWA": "model", "TWA by layer": "layer", "TWA by channel": "channel"}
    _, budgets = split(runs)
    lines = ["The same in seconds of one quiet core, from the cost of a step below; TWA's with"]
    lines += ["building the basis and measuring the rate. The head itself took "]
    lines[-1] += f"{HEAD * steps * cost['SGD']['step_ms'] / 1e3:.0f}."
    lines += ["", "| | " + " | ".join(budgets) + " |", "| --- " * (len(budgets) + 1) + "|"]
    for name in ("SGD", *ways):
        way = cost[f"TWA, 32 bits | {ways[name]}" if name in ways else name]
        epoch = steps * way["step_ms"] / 1e3
        cells = [f"{way['setup_seconds'] + float(b) * epoch:.1f}" for b in budgets]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def rival(runs: Runs, budget: str, key: str = "accuracy") -> str:
    """The entry with the best mean at this budget; the averages, which cost nothing, are in."""
    rows, _ = split(runs)
    there = [f"{row} | {budget}" for row in rows if not row.startswith("TWA")] + averages(runs)
    means = {name: statistics.mean(found) for name in there if (found := of(runs, name, key))}
    return min(means, key=means.get) if key == "loss" else max(means, key=means.get)


def gains(runs: Runs, row: str, budget: str, key: str = "accuracy") -> list[float]:
    """How much each seed is ahead of the rival: points of accuracy, or loss less."""
    other, sign = rival(runs, budget, key), -1 if key == "loss" else 1
    pairs = [(run.get(f"{row} | {budget}"), run.get(other)) for run in runs]
    return [sign * (ours[key] - theirs[key]) for ours, theirs in pairs if ours and theirs]


def ahead(runs: Runs, rows: list[str], budgets: list[str], key: str, form: str) -> list[str]:
    """TWA against the best rival at each budget."""
    lines = ["| | " + " | ".join(budgets) + " |", "| --- " * (len(budgets) + 1) + "|"]
    for row in (r for r in rows if r.startswith("TWA")):
        cells = [spread(gains(runs, row, budget, key), form) for budget in budgets]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    names = [rival(runs, budget, key).split(" | ")[0] for budget in budgets]
    return [*lines, f"| the rival | {' | '.join(names)} |"]


def reached(runs: Runs, row: str) -> str:
    """From which budget on the method is as good as the full run, in the mean."""
    _, budgets = split(runs)
    full = statistics.mean(run["SGD"]["curve"][-1]["test_accuracy"] for run in runs)
    means = {b: statistics.mean(v) for b in budgets if (v := of(runs, f"{row} | {b}"))}
    first = next((b for b in means if means[b] >= full), None)
    if first:
        share = (HEAD + float(first)) / EPOCHS
        return f"reaches the full run's mean after {first} epochs, {share:.0%} of its epochs"
    lacks = full - max(means.values())
    return f"does not reach the full run's mean; at best {lacks:.2f} points are missing"


def draw_head(runs: Runs, rows: list[str], budgets: list[str], path: Path) -> None:
    """Left, accuracy over all epochs; right, over the epochs spent after the head."""
    fig = Figure(figsize=(11, 4.6))
    left, right = fig.subplots(1, 2)
    curves = [[m["test_accuracy"] for m in run["SGD"]["curve"]] for run in runs]
    mean = [statistics.mean(accuracies) for accuracies in zip(*curves, strict=True)]
    full = mean[-1]
    left.plot(range(1, EPOCHS + 1), mean, color="#7f7f7f", label="SGD, the full run")
    left.axvspan(0, HEAD, color="#f0f0f0")
    marks = {"mean of the last 5": ("s", "C1"), f"{RECIPE} | {SHOWN}": ("*", "C3")}
    for name, (mark, colour) in marks.items():
        if of(runs, name):
            row, _, more = name.partition(" | ")
            label = f"{row}, {more} epochs more" if more else row
            left.plot(
                HEAD + float(more or 0), statistics.mean(of(runs, name)), mark, color=colour,
                markersize=8 if mark == "s" else 15, label=label, linestyle="none",
            )  # fmt: skip
    left.set(xlabel="epochs", ylabel="test accuracy (%)", title="the head is grey")
    shades = {True: iter(("#ffbb78", "#ff7f0e", "#8c564b")), False: iter(("C0", "C9", "C2", "C4"))}
    for row in rows:
        there = [b for b in budgets if of(runs, f"{row} | {b}")]
        means = [statistics.mean(of(runs, f"{row} | {b}")) for b in there]
        style = "o-" if row.startswith("TWA") else "s--"
        colour = "C3" if row == RECIPE else next(shades[row.startswith("TWA")])
        right.plot([float(b) for b in there], means, style, color=colour, label=row)
        if row == RECIPE and len(runs) > 1:
            deviations = [statistics.stdev(of(runs, f"{row} | {b}")) for b in there]
            low, high = (
                [m + sign * s for m, s in zip(means, deviations, strict=True)] for sign in (-1, 1)
            )
            right.fill_between([float(b) for b in there], low, high, color=colour, alpha=0.15)
    right.axhline(full, color="#7f7f7f", linestyle=":", label="SGD, the full run")
    right.set(
        xscale="log",
        xlabel="epochs after the head",
        title="equal budgets; shaded: ± standard deviation",
    )
    right.set_xticks([float(b) for b in budgets], budgets)
    right.minorticks_off()
    left.set_ylim(full - 12, full + 2)
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
    means = {f: statistics.mean(v) for f in factors if (v := of(runs, f"{row} | {f}"))}
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
    """What became of the averaging coefficients, in the first seed."""
    fig = Figure(figsize=(8, 3.4))
    axes = fig.subplots()
    for i, saves in enumerate((1, 2, 5)):  # of more, neighbours cancel each other
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
    long, short = of(runs, "SGD | 10"), [of(runs, f"{m} | 1") for m in ("L-BFGS", "Newton")]
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
    lines = ["| | seconds an epoch | of SGD's | share of a step in the optimizer | coefficients | "]
    lines[0] += "basis MB | build seconds |"
    lines.append("| --- " * 7 + "|")
    for name in ("SGD", *(n for n in run if n.startswith("TWA"))):
        entry = run[name]
        cells = [
            f"{entry['step_ms'] * steps / 1e3:.1f}",
            f"{entry['step_ms'] / sgd:.2f}",
            f"{entry['optimizer_ms'] / entry['step_ms']:.1%}",
            *([f"{entry['coefficients']:,}"] if "coefficients" in entry else [""]),
            *([f"{entry['basis_bytes'] / 1e6:.1f}"] if "basis_bytes" in entry else [""]),
            *([f"{entry['build_seconds']:.2f}"] if "build_seconds" in entry else [""]),
        ]
        lines.append(f"| {name.replace(' | ', ', by ')} | {' | '.join(cells)} |")
    peak = run["process"]["peak_bytes"] / 1e9
    return [*lines, "", f"The process, PyTorch and the data set included, peaked at {peak:.2f} GB."]


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


SECTIONS = {
    "head": (
        "Head stage",
        "TWA against rivals that spend the same epochs: SGD on all weights from rate 0.05 falling "
        "linearly to 0, and SGD with its whole schedule squeezed into the epochs of both. The "
        "recipe is AdamW (below one epoch SGD) on a set of coefficients for each channel, from the "
        "mean of the last five; validation images beside the 12,000 chose it.",
        head,
    ),
    "plane": (
        "The loss around the solutions",
        "The training loss on the plane through the head's last checkpoint (SGD), the mean of its "
        "window (SWA) and TWA's solution after one epoch; 1024 images, first seed.",
        plane,
    ),
    "checkpoints": (
        "How many checkpoints, how often",
        "One epoch of TWA from the mean of the head's last two epochs. The figure: the averaging "
        "coefficients that it ends with, scaled so that windows of any number compare.",
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
        "For steps worth one epoch, on the training set or on so many images with right labels "
        "that the run never saw; there batch norm is re-estimated on them, too, as if the training "
        "data were gone.",
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
        "Tail stage: PreResNet20 on FashionMNIST",
        "Measured by `bash studies/swa/study.sh`; swa/README.md describes it.",
        "studies/swa/summary.py",
    ),
    (
        "Soups: PreResNet20 on FashionMNIST",
        "Measured by `bash studies/soup/study.sh`; soup/README.md describes it.",
        "studies/soup/summary.py",
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
    lines = ["## The paper's own set-up", ""]
    lines += [
        "Not run here. The commands are in the README; this is what they take, with operations"
    ]
    lines += ["counted by PyTorch on the model and hours for a GPU that sustains 20 TFLOP/s.", ""]
    lines += ["| model | epochs of SGD + TWA | training operations (10¹⁵) | GPU hours |"]
    lines += ["| --- | --- | --- | --- |"]
    for arch, training, epochs, more in PAPER:
        on_imagenet = training == "ImageNet"
        images, size = (1_281_167, 224) if on_imagenet else (50_000, data.DATASETS[training].size)
        with torch.device("meta"):
            model = models.build(arch, 1000 if on_imagenet else 100, 3, size)
            with FlopCounterMode(display=False) as counter:
                model(torch.empty(2, 3, size, size)).sum().backward()
        operations = counter.get_total_flops() / 2 * images * (epochs + more)
        name = f"{arch} on {training}"
        hours = operations / 20e12 / 3600
        lines.append(f"| {name} | {epochs} + {more} | {operations / 1e15:,.0f} | {hours:.1f} |")
    return lines
