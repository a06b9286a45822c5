"""RESULTS.md and its figures, from the measurements of `evidence.py`: no number typed by hand."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Runs = list[dict[str, dict]]  # the entries of each seed


def write(measurements: Path, target: Path) -> None:
    """Writes `target`, and a figure beside it for each head-stage study.

    Args:
        measurements: holds `PART.DATA.ARCH.SEED.json`.
    """
    studies: dict[tuple[str, str], Runs] = {}
    for path in sorted(measurements.glob("*.json")):
        part, _, rest = path.stem.partition(".")
        studies.setdefault((part, rest.rpartition(".")[0]), []).append(json.loads(path.read_text()))
    lines = [
        "# Results",
        "",
        "Written by `python benchmarks/evidence.py report` from the runs' own",
    ]
    lines += ["JSON in `benchmarks/results`; `bash benchmarks/evidence.sh` makes the runs.", ""]
    for (part, name), runs in studies.items():
        data, _, arch = name.partition(".")
        lines += [f"## {TITLES[part]}: {arch} on {data}, {len(runs)} of 3 seeds", ""]
        lines += SECTIONS[part](runs, target.with_name(f"{part}.{name}.png"))
        lines.append("")
    target.write_text("\n".join(lines))


def cell(values: list[float], form: str) -> str:
    """`mean ± deviation`, the sample's, which one seed alone does not have."""
    mean = format(statistics.mean(values), form)
    return f"{mean} ± {format(statistics.stdev(values), form)}" if len(values) > 1 else mean


def of(runs: Runs, name: str, key: str) -> list[float]:
    """What the seeds that have the entry say."""
    return [run[name][key] for run in runs if name in run]


def table(runs: Runs, rows: list[str], columns: list[str], key: str, form: str) -> list[str]:
    """Entries called `row | column`, as Markdown."""
    lines = ["| | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 1) + "|"]
    for row in rows:
        values = [of(runs, f"{row} | {column}", key) for column in columns]
        lines.append(f"| {row} | " + " | ".join(cell(v, form) if v else "" for v in values) + " |")
    return lines


def split(runs: Runs) -> tuple[list[str], list[str]]:
    """The rows and the columns of a table's entries, in order."""
    names = [name.split(" | ") for run in runs for name in run if " | " in name]
    columns = sorted({column for _, column in names}, key=float)
    return list(dict.fromkeys(row for row, _ in names)), columns


def head(runs: Runs, figure: Path) -> list[str]:
    rows, budgets = split(runs)
    full = [run["SGD"]["curve"][-1] for run in runs]
    lines = [
        f"Full run, {full[0]['epoch']} epochs: test accuracy "
        f"{cell([end['test_accuracy'] for end in full], '.2f')} %, test loss "
        f"{cell([end['test_loss'] for end in full], '.4f')}.",
        "",
        "After the head, without training (batch norm re-estimated):",
        "",
        "| solution | test accuracy (%) | test loss |",
        "| --- | --- | --- |",
    ]
    for name in (n for n in runs[0] if " | " not in n and n != "SGD"):
        accuracy, loss = of(runs, name, "accuracy"), of(runs, name, "loss")
        lines.append(f"| {name} | {cell(accuracy, '.2f')} | {cell(loss, '.4f')} |")
    for key, title, form in (("accuracy", "accuracy (%)", ".2f"), ("loss", "loss", ".4f")):
        lines += ["", f"Test {title} after so many epochs more:", ""]
        lines += table(runs, rows, budgets, key, form)
    draw(runs, rows, budgets, figure)
    return [*lines, "", f"![Test accuracy over epochs]({figure.name})"]


def draw(runs: Runs, rows: list[str], budgets: list[str], path: Path) -> None:
    """Test accuracy over the epochs spent after the head, a line a method."""
    fig, axes = plt.subplots(figsize=(8, 5))
    for i, row in enumerate(rows):
        there = [b for b in budgets if of(runs, f"{row} | {b}", "accuracy")]
        means = [statistics.mean(of(runs, f"{row} | {b}", "accuracy")) for b in there]
        style = "o-" if row.startswith("TWA") else "s--"
        axes.plot([float(b) for b in there], means, style, color=f"C{i}", label=row)
    full = statistics.mean(run["SGD"]["curve"][-1]["test_accuracy"] for run in runs)
    axes.axhline(full, color="#7f7f7f", linestyle=":", label="SGD, full run")
    axes.set(xscale="log", xlabel="epochs after the head", ylabel="test accuracy (%)")
    axes.set_ylim(bottom=full - 5)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    fig.tight_layout()
    fig.savefig(path, dpi=150)
    plt.close(fig)


def rates(runs: Runs, figure: Path) -> list[str]:
    rows, factors = split(runs)
    lines = ["Test accuracy (%) after one epoch of TWA, at so many times the default rate:", ""]
    return lines + table(runs, rows, factors, "accuracy", ".2f")


TITLES = {"head": "Head stage", "rates": "Rates"}
SECTIONS: dict[str, Callable[[Runs, Path], list[str]]] = {"head": head, "rates": rates}
