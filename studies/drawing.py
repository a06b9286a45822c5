"""The figures of the studies, drawn from their JSON."""

from __future__ import annotations

import statistics
from pathlib import Path

import torch
from matplotlib.figure import Figure
from study import EPOCHS, HEAD
from tables import BY_CHANNEL, BY_MODEL, RECIPE, Runs, mean, values

SHOWN = 2  # epochs after the head, in the figure's left half


def draw_head(runs: Runs, rows: list[str], budgets: list[str], path: Path) -> None:
    """Left, accuracy over all epochs; right, over the epochs spent after the head."""
    fig = Figure(figsize=(11, 4.6))
    left, right = fig.subplots(1, 2)
    shown = BY_CHANNEL if BY_CHANNEL in rows else RECIPE
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
        ours = {RECIPE: "#ff7f0e", BY_MODEL: "#e377c2"} | {shown: "C3"}
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


def draw_plane(runs: Runs, path: Path) -> None:
    """The training loss on the plane through three solutions."""
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
    save(fig, path)


def save(fig: Figure, path: Path) -> None:
    fig.tight_layout()
    fig.savefig(path, dpi=120)
