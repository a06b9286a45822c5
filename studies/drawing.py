"""The figures of the studies, drawn from their JSON."""

from __future__ import annotations

import statistics
from pathlib import Path

from matplotlib.figure import Figure
from study import EPOCHS, HEAD
from tables import BY_CHANNEL, BY_MODEL, Runs, mean, values

SHOWN = 2  # epochs after the head, in the figure's left half


def draw_head(runs: Runs, rows: list[str], budgets: list[str], path: Path) -> None:
    """Left, accuracy over all epochs; right, over the epochs spent after the head."""
    fig = Figure(figsize=(11, 4.6))
    left, right = fig.subplots(1, 2)
    shown = BY_CHANNEL
    curves = [[m["test_accuracy"] for m in run["SGD"]["curve"]] for run in runs]
    averaged = [statistics.mean(accuracies) for accuracies in zip(*curves, strict=True)]
    end = averaged[-1]
    left.plot(range(1, EPOCHS + 1), averaged, color="#7f7f7f", label="SGD, the full run")
    left.axvspan(0, HEAD, color="#f0f0f0")
    five = "mean of the last 5"
    left.plot(HEAD, mean(runs, five, "accuracy"), "s", color="C1", markersize=8, label=five)
    at_two, label = f"{shown} | {SHOWN}", f"{shown}, {SHOWN} epochs more"
    twa = {"color": "C3", "markersize": 15, "label": label}
    left.plot(HEAD + SHOWN, mean(runs, at_two, "accuracy"), "*", **twa)
    left.set(xlabel="epochs", ylabel="test accuracy (%)", title="the head is grey")
    rivals = iter(("C0", "C9", "C2", "C4", "#000000"))
    for row in rows:
        there = [b for b in budgets if values(runs, f"{row} | {b}")]
        found = [values(runs, f"{row} | {b}") for b in there]
        means, x = [statistics.mean(v) for v in found], [float(b) for b in there]
        ours = {BY_MODEL: "#e377c2", shown: "C3"}
        colour = ours[row] if row in ours else next(rivals)
        right.plot(x, means, "o-" if row in ours else "s--", color=colour, label=row)
        if row == shown and len(found[0]) > 1:
            around = list(zip(means, map(statistics.stdev, found), strict=True))
            low, high = ([m + sign * s for m, s in around] for sign in (-1, 1))
            right.fill_between(x, low, high, color=colour, alpha=0.15)
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


def save(fig: Figure, path: Path) -> None:
    fig.tight_layout()
    fig.savefig(path, dpi=120)
