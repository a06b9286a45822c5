"""The page of the head stage: accuracies, losses, comparisons, and a figure."""

from __future__ import annotations

import os
import statistics
from pathlib import Path

from matplotlib.figure import Figure
from tables import (
    ADVISED,
    BY_CHANNEL,
    BY_MODEL,
    EPOCHS,
    HEAD,
    TUNED,
    Runs,
    averages,
    budgets_of,
    gains,
    markdown,
    mean,
    scores,
    seeds,
    split,
    spread,
    table,
    values,
)

KEYS = {"accuracy": "+.2f", "loss": "+.4f"}
SHOWN = 2  # epochs after the head, in the figure's left half


def sections(studies: dict[str, Runs], figures: Path, page: Path) -> list[str]:
    """A section for each study; draws its figure into `figures`."""
    lines = []
    for study, runs in studies.items():
        path = figures / f"head.{study.replace(' on ', '.')}.png"
        draw(runs, path)
        accuracy, loss = scores(runs, "SGD")
        lines += [f"### {study}, {seeds(runs)}", ""]
        lines += [f"Full run, {EPOCHS} epochs: {accuracy} %, test loss {loss}. After the head:", ""]
        headings = ("solution", "test accuracy (%)", "test loss")
        lines += markdown(headings, [(name, *scores(runs, name)) for name in averages(runs)])
        lines += [
            "",
            "Test accuracy (%) after so many epochs more; and from which on it is the full run's,",
            "or how many points are missing:",
        ]
        lines += ["", *with_full_run(runs), "", "Test loss:", "", *table(runs, "loss", ".4f")]
        lines += [
            "",
            "Points of accuracy ahead, and by how much the loss is below, paired by seed:",
        ]
        lines += ["", *compared(runs)]
        lines += ["", f"![{study}]({os.path.relpath(path, page.parent)})", ""]
    return lines[:-1]


def units(studies: dict[str, Runs]) -> list[str]:
    """The study of units, by validation images."""
    lines = []
    for study, runs in studies.items():
        lines += [f"### {study}, {seeds(runs)}", ""]
        lines += ["Validation accuracy (%) after so many epochs more:", "", *table(runs)]
        lines += ["", "Validation loss:", "", *table(runs, "loss", ".4f"), ""]
    return lines[:-1]


def with_full_run(runs: Runs) -> list[str]:
    """The table of accuracies, with the budget at which a row is as good as the full run."""
    first, rule, *rest = table(runs)
    lines = [
        f"{line} {reached(runs, row)} |" for line, row in zip(rest, split(runs)[0], strict=True)
    ]
    return [f"{first} full run |", f"{rule} --- |", *lines]


def reached(runs: Runs, row: str) -> str:
    """From which budget on the method is as good as the full run, in the mean."""
    goal = mean(runs, "SGD", "accuracy")
    means = {b: mean(runs, f"{row} | {b}", "accuracy") for b in budgets_of(runs, row)}
    first = next((b for b in means if means[b] >= goal), None)
    return f"from {first}" if first else f"−{goal - max(means.values()):.2f}"


def compared(runs: Runs) -> list[str]:
    """TWA less the tuned baseline."""
    budgets = split(runs)[1]
    rows = []
    for row in (ADVISED, BY_CHANNEL, BY_MODEL):
        for key, form in KEYS.items():
            cells = [spread(gains(runs, row, b, key, f"{TUNED} | {b}"), form) for b in budgets]
            rows.append((f"{row}, {key}, against the rival at its tuned rate", *cells))
    rates = [dict.fromkeys(values(runs, f"{TUNED} | {b}", "lr")) for b in budgets]
    rows.append(("the tuned rate", *(" ".join(f"{rate:g}" for rate in each) for each in rates)))
    return markdown(("", *budgets), rows)


def draw(runs: Runs, path: Path) -> None:
    """Left, accuracy over all epochs; right, over the epochs spent after the head."""
    fig = Figure(figsize=(11, 4.6))
    left, right = fig.subplots(1, 2)
    rows, budgets = split(runs)
    curves = [[m["test_accuracy"] for m in run["SGD"]["curve"]] for run in runs]
    averaged = [statistics.mean(accuracies) for accuracies in zip(*curves, strict=True)]
    end = averaged[-1]
    left.plot(range(1, EPOCHS + 1), averaged, color="#7f7f7f", label="SGD, the full run")
    left.axvspan(0, HEAD, color="#f0f0f0")
    five = "mean of the last 5"
    left.plot(HEAD, mean(runs, five, "accuracy"), "s", color="C1", markersize=8, label=five)
    at_two, label = f"{BY_CHANNEL} | {SHOWN}", f"{BY_CHANNEL}, {SHOWN} epochs more"
    star = {"color": "C3", "markersize": 15, "label": label}
    left.plot(HEAD + SHOWN, mean(runs, at_two, "accuracy"), "*", **star)
    left.set(xlabel="epochs", ylabel="test accuracy (%)", title="the head is grey")
    baselines, ours = iter(("C0", "C9", "C2", "C4", "#000000")), {BY_MODEL: "#e377c2"}
    ours[BY_CHANNEL] = "C3"
    for row in rows:
        if row == ADVISED:
            continue
        there = budgets_of(runs, row)
        found = [values(runs, f"{row} | {b}") for b in there]
        means, x = [statistics.mean(v) for v in found], [float(b) for b in there]
        colour = ours[row] if row in ours else next(baselines)
        right.plot(x, means, "o-" if row in ours else "s--", color=colour, label=row)
        if row == BY_CHANNEL and len(runs) > 1:
            around = list(zip(means, map(statistics.stdev, found), strict=True))
            low, high = ([m + sign * s for m, s in around] for sign in (-1, 1))
            right.fill_between(x, low, high, color=colour, alpha=0.15)
    right.axhline(end, color="#7f7f7f", linestyle=":", label="SGD, the full run")
    title = "equal budgets; shaded: ± standard deviation"
    right.set(xscale="log", xlabel="epochs after the head", title=title)
    right.set_xticks([float(b) for b in budgets], budgets)
    right.minorticks_off()
    left.set_ylim(end - 12, end + 2)
    for axes in (left, right):
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncol=2)
    save(fig, path)


def save(fig: Figure, path: Path) -> None:
    for axes in fig.axes:
        axes.grid(alpha=0.3)
    fig.tight_layout()
    fig.savefig(path, dpi=120)
