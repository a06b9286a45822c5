"""The tables and the figure of the language-model study, from its JSON."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterable
from pathlib import Path

from head_report import save
from matplotlib.figure import Figure
from tables import Runs, best, cell, markdown, mean, paired, values

STEPS = 4000  # of the run
BUDGETS = (10, 20, 40, 100, 200, 400)  # steps: 0.25, 0.5, 1, 2.5, 5 and 10 % of the run
SPACING, WINDOW = 50, 60  # steps between the checkpoints of the usual window, and their number
TWAS = {"TWA by model": "o", "TWA by layer": "s", "TWA by channel": "*"}  # marks in the figure
UNTUNED = {  # the baselines at the run's own rate
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


def sections(runs: Runs, figure: Path, page: Path) -> list[str]:
    """The tables of a text, and its figure, drawn to `figure`."""
    tables = {
        "Without a step more": averages(runs),
        "Steps more: test loss": budgets(runs),
        "TWA less its rivals": differences(runs),
        "Seconds": seconds(runs),
    }
    lines = []
    for title, table in tables.items():
        lines += [f"### {title}", "", *table, ""]
    draw(runs, figure)
    return [*lines, f"![Loss over the budget]({os.path.relpath(figure, page.parent)})"]


def read(measurements: Path) -> Runs:
    """The entries of each seed of one text."""
    return [json.loads(path.read_text()) for path in sorted(measurements.glob("seed*.json"))]


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
    rows = [(titled(name), loss(runs, name)) for name in names]
    best = "its start: the best mean by training loss"
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


def decays_at(runs: Runs, steps: int) -> list[str]:
    """The decays that were measured with so many steps; tuned ones as validation text chose."""
    names = names_at(runs, steps)
    return [name for title in (*UNTUNED, *TUNED) if values(runs, name := names[title], "loss")]


def budgets(runs: Runs) -> list[str]:
    headings = ("method", *(f"{steps} ({steps / STEPS:.2%})" for steps in BUDGETS))
    columns = [names_at(runs, steps) for steps in BUDGETS]
    rows = [(title, *(loss(runs, names[title]) for names in columns)) for title in columns[0]]
    return markdown(headings, rows)


def best_of(runs: Runs, names: Iterable[str | None]) -> str | None:
    """The entry with the low mean, of those that every seed has; None if there is none."""
    known = [name for name in names if all(name in run for run in runs)]
    return best(runs, known) if known else None


def differences(runs: Runs) -> list[str]:
    """TWA less the best of its rivals, by the mean over the seeds: negative where TWA is ahead."""
    rows = []
    for steps in BUDGETS:
        names = names_at(runs, steps)
        untuned = best_of(runs, [*untrained(runs), *(names[title] for title in UNTUNED)])
        for twa in ("TWA by model", "TWA by channel"):
            cells, ours = [], best_of(runs, [f"{twa} | {steps}"])
            for rival in (untuned, best_of(runs, [names[title] for title in TUNED])):
                if not (rival and ours):
                    cells.append("–")
                    continue
                less, apart = paired(runs, ours, rival)
                errors = f" = {less / apart:+.1f} errors" if apart else ""
                title = titled(rival.removesuffix(f" | {steps}"))
                cells.append(f"{less:+.4f} ± {apart:.4f}{errors} ({title})")
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
            kinds = [k for k in ("choosing", "building", "training") if k in (*parts, {})[0]]
            means = (statistics.mean(part[kind] for part in parts) for kind in kinds)
            cells.append(" + ".join(f"{mean:.0f}" for mean in means) or "–")
        rows.append((name.replace(", rate x 1", ""), *cells))
    note = "Choosing start and end, building the basis, training:"
    return [note, "", *markdown(("method", *map(str, BUDGETS)), rows)]


def draw(runs: Runs, path: Path) -> None:
    """The test loss over the steps that follow the run."""
    fig = Figure(figsize=(7, 4.5))
    axes = fig.subplots()
    colours = dict(zip((*UNTUNED, *TUNED), ("C7", "C7", "C0", "C0", "C2", "C1"), strict=True))
    for title in names_at(runs, BUDGETS[0]):
        names = {steps: names_at(runs, steps)[title] for steps in BUDGETS}
        points = [(s, mean(runs, name)) for s, name in names.items() if values(runs, name, "loss")]
        if points:
            line = {"color": colours.get(title, "C3"), "marker": TWAS.get(title, "")}
            line["linestyle"] = "--" if "1-sqrt" in title else "-"
            axes.plot(*zip(*points, strict=True), **line, label=title)
    low = min(mean(runs, name) for name in runs[0] if name.startswith("mean"))
    label = "the best mean, no step more"
    axes.axhline(low, color="k", linewidth=0.8, linestyle=":", label=label)
    axes.set(xscale="log", xlabel="steps after the run", ylabel="test loss (nats a byte)")
    axes.set_xticks(BUDGETS, [str(steps) for steps in BUDGETS])
    axes.set_xticks([], minor=True)
    axes.legend(fontsize=7)
    save(fig, path)
