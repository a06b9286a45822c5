"""The page of the head stage: accuracies, losses, comparisons, and a figure."""

from __future__ import annotations

import os
import statistics
from pathlib import Path

import tables
from matplotlib.figure import Figure
from tables import ADVISED, BY_CHANNEL, BY_MODEL, TUNED, Runs, markdown, scores, table, values

ACCURACY = """\
Test accuracy (%) after so many epochs more; and from which on it is the full run's,
or how many points are missing:"""
PAIRED = "Points of accuracy ahead, and by how much the loss is below, paired by seed:"
KEYS = {"accuracy": "+.2f", "loss": "+.4f"}


def sections(studies: dict[str, Runs], figures: Path, page: Path) -> list[str]:
    """A section for each study; draws its figure into `figures`."""
    lines = []
    for study, runs in studies.items():
        path = figures / f"head.{study.replace(' on ', '.')}.png"
        draw(runs, path)
        accuracy, loss = scores(runs, "SGD")
        lines += [f"### {study}, {tables.seeds(runs)}", ""]
        lines += [
            f"Full run, {tables.EPOCHS} epochs: {accuracy} %, test loss {loss}. After the head:",
            "",
        ]
        headings = ("solution", "test accuracy (%)", "test loss")
        lines += markdown(headings, [(name, *scores(runs, name)) for name in tables.averages(runs)])
        lines += ["", ACCURACY, "", *with_full_run(runs), ""]
        lines += ["Test loss:", "", *table(runs, "loss", ".4f"), "", PAIRED, "", *compared(runs)]
        lines += ["", f"![{study}]({os.path.relpath(path, page.parent)})", ""]
    return lines[:-1]


def units(studies: dict[str, Runs]) -> list[str]:
    """The study of units, by validation images."""
    lines = []
    for study, runs in studies.items():
        lines += [f"### {study}, {tables.seeds(runs)}", ""]
        lines += ["Validation accuracy (%) after so many epochs more:", "", *table(runs)]
        lines += ["", "Validation loss:", "", *table(runs, "loss", ".4f"), ""]
    return lines[:-1]


def with_full_run(runs: Runs) -> list[str]:
    """The table of accuracies, with the budget at which a row is as good as the full run."""
    first, rule, *rest = table(runs)
    rows = zip(rest, tables.split(runs)[0], strict=True)
    lines = [f"{line} {reached(runs, row)} |" for line, row in rows]
    return [f"{first} full run |", f"{rule} --- |", *lines]


def reached(runs: Runs, row: str) -> str:
    """From which budget on the method is as good as the full run, in the mean."""
    goal = tables.mean(runs, "SGD", "accuracy")
    means = {b: tables.mean(runs, f"{row} | {b}", "accuracy") for b in tables.budgets_of(runs, row)}
    first = next((b for b in means if means[b] >= goal), None)
    return f"from {first}" if first else f"−{goal - max(means.values()):.2f}"


def compared(runs: Runs) -> list[str]:
    """TWA less the tuned baseline."""
    budgets = tables.split(runs)[1]
    rows = []
    for row in (ADVISED, BY_CHANNEL, BY_MODEL):
        for key, form in KEYS.items():
            ahead = [tables.gains(runs, row, b, key, f"{TUNED} | {b}") for b in budgets]
            cells = [tables.spread(gains, form) for gains in ahead]
            rows.append((f"{row}, {key}, against the rival at its tuned rate", *cells))
    rates = [dict.fromkeys(values(runs, f"{TUNED} | {b}", "lr")) for b in budgets]
    rows.append(("the tuned rate", *(" ".join(f"{rate:g}" for rate in each) for each in rates)))
    return markdown(("", *budgets), rows)


def draw(runs: Runs, path: Path) -> None:
    """The accuracy over the epochs spent after the head."""
    fig = Figure(figsize=(7, 5.4))
    axes = fig.subplots()
    baselines = iter(("C0", "C9", "C2", "C4", "#000000"))
    ours = {BY_MODEL: "#e377c2", BY_CHANNEL: "C3"}
    rows, budgets = tables.split(runs)
    for row in rows:
        if row == ADVISED:
            continue
        found = {float(b): values(runs, f"{row} | {b}") for b in tables.budgets_of(runs, row)}
        means = [statistics.mean(accuracies) for accuracies in found.values()]
        colour = ours[row] if row in ours else next(baselines)
        axes.plot(list(found), means, "o-" if row in ours else "s--", color=colour, label=row)
        if row == BY_CHANNEL and len(runs) > 1:
            around = list(zip(means, map(statistics.stdev, found.values()), strict=True))
            low, high = ([m + sign * s for m, s in around] for sign in (-1, 1))
            axes.fill_between(list(found), low, high, color=colour, alpha=0.15)
    end = tables.mean(runs, "SGD", "accuracy")
    axes.axhline(end, color="#7f7f7f", linestyle=":", label="SGD, the full run")
    title = "equal budgets; shaded: ± standard deviation"
    axes.set(xscale="log", xlabel="epochs after the head", ylabel="test accuracy (%)", title=title)
    axes.set_xticks([float(b) for b in budgets], budgets)
    axes.minorticks_off()
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncol=2)
    save(fig, path)


def save(fig: Figure, path: Path) -> None:
    for axes in fig.axes:
        axes.grid(alpha=0.3)
    fig.tight_layout()
    fig.savefig(path, dpi=120)
