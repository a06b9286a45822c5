"""The tables and figures of the language-model study, from its JSON."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from common import as_decay, of_decay
from head_report import save
from matplotlib.figure import Figure
from tables import Runs, cell, error, markdown, values

STEPS = 4000  # of the run
BUDGETS = (10, 20, 40, 100, 200, 400)  # steps: 0.25, 0.5, 1, 2.5, 5 and 10 % of the run
SPACING, WINDOW = 50, 60  # steps between the checkpoints of the usual window, and their number
TWAS = ("TWA by model", "TWA by layer", "TWA by channel")
UNTUNED = {  # the rivals at the run's own rate
    "decay, linear, from the last": "decay, linear, from the last, rate x 1",
    "decay, 1-sqrt, from the last": "decay, 1-sqrt, from the last, rate x 1",
    "decay, linear, from the best mean": "decay, linear, from the mean, rate x 1",
    "decay, 1-sqrt, from the best mean": "decay, 1-sqrt, from the mean, rate x 1",
}
WHOLE = "schedule-free, the whole run"  # another run in place of this one
TUNED = {
    "decay from the last, rate and shape tuned": "from the last",
    "decay from the best mean, rate and shape tuned": "from the mean",
}


def sections(runs: Runs, figures: Path, text: str, page: Path) -> list[str]:
    """The tables of a text, and its figures, drawn into `figures`."""
    lines = []
    tables = {
        "Without a step more": averages,
        "Steps more: test loss": budgets,
        "TWA less its rivals": differences,
        "Seconds": seconds,
        "Windows": lambda runs: variants(runs, ("every",)),
        "Fewer directions, fewer bits": lambda runs: variants(runs, ("12 directions", "4 bits")),
    }
    for title, section in tables.items():
        if table := section(runs):
            lines += [f"### {title}", "", *table, ""]
    for kind, (title, draw) in FIGURES.items():
        path = figures / f"lm.{text}.{kind}.png"
        draw(runs, path)
        lines += [f"![{title}]({os.path.relpath(path, page.parent)})", ""]
    return lines[:-1]


def read(measurements: Path) -> Runs:
    """The entries of each seed of one text."""
    return [json.loads(path.read_text()) for path in sorted(measurements.glob("seed*.json"))]


def losses(runs: Runs, name: str | None) -> list[float]:
    """The test losses of the seeds that have the entry."""
    return values(runs, name, "loss")


def loss(runs: Runs, name: str | None) -> str:
    """Mean ± deviation over the seeds; "–" of none, and the number of seeds if some lack it."""
    return cell(runs, name, "loss", ".4f") or "–"


def chosen(runs: Runs, where: str, steps: int) -> str | None:
    """The decay that the validation text of the first seed prefers, of those that start there.

    None where no rate but the run's own was tried.
    """
    tried = {
        name: entry["validation_loss"]
        for name, entry in runs[0].items()
        if name.startswith("decay") and where in name and name.endswith(f"| {steps}")
    }
    own_rate_only = all(f"rate x 1 | {steps}" in name for name in tried)
    return None if own_rate_only else min(tried, key=tried.get)


def untrained(runs: Runs) -> list[str]:
    """The entries that need no step after the run: the last checkpoint and the averages."""
    return [name for name in runs[0] if not runs[0][name]["steps"] and name != WHOLE]


def averages(runs: Runs) -> list[str]:
    names = [*untrained(runs), *([WHOLE] if WHOLE in runs[0] else [])]
    best = "its start: the best mean by training loss"
    rows = [(titled(name), loss(runs, name)) for name in names]
    starts = ", ".join(start_of(run) for run in runs)
    return [*markdown(("solution", "test loss"), rows), "", f"TWA takes as {best}: {starts}."]


def titled(name: str) -> str:
    return name.replace("mean | ", "mean of the last ").replace(" | ", ", ")


def start_of(run: dict[str, dict]) -> str:
    entry = next(entry for name, entry in run.items() if name.startswith("TWA by model |"))
    best = min(entry["starts"], key=entry["starts"].get)
    return f"the exponential one of {float(best):.2f}" if float(best) < 1 else f"that of {best}"


def names_at(runs: Runs, steps: int) -> dict[str, str | None]:
    """The rows of the table of budgets, and the entry of each."""
    names = {title: f"{name} | {steps}" for title, name in UNTUNED.items()}
    names |= {title: chosen(runs, where, steps) for title, where in TUNED.items()}
    return names | {name: f"{name} | {steps}" for name in TWAS}


def budgets(runs: Runs) -> list[str]:
    headings = ("method", *(f"{steps} ({steps / STEPS:.2%})" for steps in BUDGETS))
    columns = [names_at(runs, steps) for steps in BUDGETS]
    rows = [(title, *(loss(runs, names[title]) for names in columns)) for title in columns[0]]
    return markdown(headings, rows)


def decays_at(runs: Runs, steps: int) -> list[str]:
    """The decays that were measured with so many steps; tuned ones as validation text chose."""
    names = names_at(runs, steps)
    return [name for title in (*UNTUNED, *TUNED) if losses(runs, name := names[title])]


def paired(runs: Runs, one: str, other: str) -> tuple[float, float]:
    """The mean of the differences over the seeds, and its standard error."""
    found = [run[one]["loss"] - run[other]["loss"] for run in runs]
    return statistics.mean(found), error(found)


def best_of(runs: Runs, names: Iterable[str | None]) -> str | None:
    """The entry with the lowest mean, of those that every seed has; None if there is none."""
    known = [name for name in names if len(losses(runs, name)) == len(runs)]
    return min(known, key=lambda name: statistics.mean(losses(runs, name)), default=None)


def rivals(runs: Runs, steps: int) -> tuple[str | None, str | None]:
    """The best of the untuned rivals, all averages included, and the best of the tuned."""
    names = names_at(runs, steps)
    untuned = best_of(runs, [*untrained(runs), *(names[title] for title in UNTUNED)])
    return untuned, best_of(runs, [names[title] for title in TUNED])


def differences(runs: Runs) -> list[str]:
    """TWA less the best of its rivals, by the mean over the seeds: negative where TWA is ahead."""
    rows = []
    for steps in BUDGETS:
        for twa in ("TWA by model", "TWA by channel"):
            cells, ours = [], f"{twa} | {steps}"
            for best in rivals(runs, steps):
                if not best or len(losses(runs, ours)) < len(runs):
                    cells.append("–")
                    continue
                mean, apart = paired(runs, ours, best)
                errors = f" = {mean / apart:+.1f} errors" if apart else ""
                rival = titled(best.removesuffix(f" | {steps}"))
                cells.append(f"{mean:+.4f} ± {apart:.4f}{errors} ({rival})")
            rows.append((str(steps), twa, *cells))
    headings = ("steps", "method", "less the best untuned", "less the best tuned")
    return markdown(headings, rows)


def seconds(runs: Runs) -> list[str]:
    """Seconds of the processor on one thread, the mean over the seeds."""
    rows = []
    for name in (*UNTUNED.values(), *TWAS):
        cells = []
        for steps in BUDGETS:
            parts = values(runs, f"{name} | {steps}", "seconds")
            shown = [
                f"{statistics.mean(part[kind] for part in parts):.0f}"
                for kind in ("choosing", "building", "training")
                if parts and kind in parts[0]
            ]
            cells.append(" + ".join(shown) or "–")
        rows.append((name.replace(", rate x 1", ""), *cells))
    note = "Choosing start and end, building the basis, training:"
    return [note, "", *markdown(("method", *map(str, BUDGETS)), rows)]


def variants(runs: Runs, words: Sequence[str]) -> list[str]:
    """The entries of TWA with one of these words in their names, beside TWA as usual."""
    names = dict.fromkeys(
        name
        for run in runs
        for name in run
        if name.startswith("TWA") and any(word in name for word in words)
    )
    rows = []
    for name in names:
        method, _, steps = name.partition(" | ")
        usual = f"{method.partition(',')[0]} | {steps}"
        usual_there = loss([run for run in runs if name in run], usual)  # of the same seeds
        rows.append((method, steps, loss(runs, name), usual_there))
    return markdown(("method", "steps", "test loss", "as usual"), rows) if rows else []


def loss_figure(runs: Runs, path: Path) -> None:
    fig = Figure(figsize=(7, 4.5))
    axes = fig.subplots()
    colours = dict(zip((*UNTUNED, *TUNED), ("C7", "C7", "C0", "C0", "C2", "C1"), strict=True))
    for title in names_at(runs, BUDGETS[0]):
        points = [(s, losses(runs, names_at(runs, s)[title])) for s in BUDGETS]
        points = [(steps, statistics.mean(found)) for steps, found in points if found]
        if points:
            style = "--" if "1-sqrt" in title else "-"
            colour = colours.get(title, "C3")
            mark = {"TWA by model": "o", "TWA by layer": "s", "TWA by channel": "*"}.get(title, "")
            line = {"color": colour, "marker": mark, "linestyle": style}
            axes.plot(*zip(*points, strict=True), **line, label=title)
    best = min(statistics.mean(losses(runs, n)) for n in runs[0] if n.startswith("mean"))
    axes.axhline(best, color="k", linewidth=0.8, linestyle=":", label="the best mean, no step more")
    axes.set(xscale="log", xlabel="steps after the run", ylabel="test loss (nats a byte)")
    axes.set_xticks(BUDGETS, [str(steps) for steps in BUDGETS])
    axes.set_xticks([], minor=True)
    axes.legend(fontsize=7)
    save(fig, path)


def coefficients_figure(runs: Runs, path: Path) -> None:
    """α over the window, and the decay of the rate that it stands for, of the first seed."""
    fig = Figure(figsize=(11, 4))
    left, right = fig.subplots(1, 2)
    for i, steps in enumerate(BUDGETS):
        alpha = runs[0].get(f"TWA by model | {steps}", {}).get("averaging_weights")
        if alpha:
            ages = [SPACING * (j - len(alpha) + 1) for j in range(len(alpha))]
            shade = {"color": "C3", "alpha": 0.25 + 0.75 * i / len(BUDGETS)}
            left.plot(ages, alpha, **shade, label=f"TWA, {steps} steps")
            right.step(ages[:-1], as_decay(alpha), where="post", **shade)
    ages = [SPACING * (j - WINDOW + 1) for j in range(WINDOW - 1)]
    for shape, style in (("linear", "--"), ("1-sqrt", ":")):
        decay, label = as_decay(of_decay(shape, WINDOW)), f"{shape}, all {WINDOW}"
        right.step(ages, decay, style, where="post", color="k", label=label)
    left.axhline(0, color="k", linewidth=0.5)
    left.set(xlabel="checkpoint, steps before the end", ylabel="α", title="coefficients")
    factor = "factor of the rate"
    right.set(xlabel="steps before the end", ylabel=factor, title="the decay they stand for")
    for axes in (left, right):
        axes.legend(fontsize=7)
    save(fig, path)


FIGURES = {
    "loss": ("Loss over the budget", loss_figure),
    "coefficients": ("Coefficients and decays", coefficients_figure),
}
