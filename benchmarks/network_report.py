"""The table and the figure of `network.py`, from its JSON: no number is typed by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from matplotlib.figure import Figure

from studies.tables import markdown
from training.parallel import size
from training.settings import Parser

CURVE = "curve"  # in place of a wire's name: the cell of a whole training
CHANNEL = "TWA, replicated, by channel"
TWAS = ("TWA, replicated", "TWA, replicated, by layer", CHANNEL, f"{CHANNEL}, twice the steps")
BASELINES = ("SGD, DDP", "SGD, PowerSGD of rank 2", "local SGD, H = 10", "local SGD, H = 100")


def write_report(results: dict, folder: Path) -> None:
    """Writes `network.md` and `figures/network.png` into `folder`."""
    archs = {name: ways for name, ways in results.items() if name != "settings"}
    lines = []
    for arch, ways in archs.items():
        wires = [wire for wire in next(iter(ways.values())) if wire != CURVE]
        lines += ["", f"{arch.rpartition(':')[2]}:", "", *seconds_table(ways, wires)]
        curves = {way: cells for way, cells in ways.items() if CURVE in cells}
        if "SGD, DDP" in curves:
            lines += ["", *goals_table(curves, wires), "", *crossings_table(curves, wires)]
    (folder / "network.md").write_text("\n".join(lines[1:]) + "\n")
    (folder / "figures").mkdir(exist_ok=True)
    trained = {a: ways for a, ways in archs.items() if any(CURVE in way for way in ways.values())}
    if trained:
        draw(trained, folder / "figures/network.png")


def seconds_table(ways: dict, wires: list[str]) -> list[str]:
    """The seconds of a step on each wire, the bytes in it, and where the training ends."""
    rows = []
    for way, cells in ways.items():
        end = cells[CURVE][CURVE][-1] if CURVE in cells else None
        scores = f"{end['accuracy']:.2f} %, {end['loss']:.4f}" if end else ""
        measured = [cells.get(wire) for wire in wires]
        sent = min((cell["bytes"] for cell in measured if cell), default=0)
        numbers = next((c["coefficients"] for c in measured if c and "coefficients" in c), "")
        steps = [f"{cell['seconds']:.3f}" if cell else "" for cell in measured]
        rows.append([way, str(numbers), size(sent), *steps, scores])
    head = ["way", "coefficients", "sent a rank and step"]
    return markdown([*head, *(f"s a step, {wire}" for wire in wires), "test accuracy, loss"], rows)


def points(cells: dict, wire: str) -> list[tuple[float, float, float]]:
    """Seconds, accuracy and loss along a training on this wire."""
    setup, step = cells[wire]["setup_seconds"], cells[wire]["seconds"]
    return [
        (setup + step * max(1, test["step"]), test["accuracy"], test["loss"])  # no 0 on a log scale
        for test in cells[CURVE][CURVE]
    ]


def goals_table(curves: dict, wires: list[str]) -> list[str]:
    """The seconds until a way has the accuracy, and the loss, at which SGD with DDP ends."""
    _, accuracy, loss = points(curves["SGD, DDP"], wires[0])[-1]
    rows = []
    for way, cells in curves.items():
        row = [way]
        for wire in (wire for wire in wires if wire in cells):
            along = points(cells, wire)
            accurate = (f"{s:.0f}" for s, value, _ in along if value >= accuracy)
            low = (f"{s:.0f}" for s, _, value in along if value <= loss)
            row.append(f"{next(accurate, '–')}, {next(low, '–')}")
        rows.append(row)
    head = f"seconds to {accuracy:.2f} %, to {loss:.4f}"
    return markdown([head, *wires], rows)


def crossings_table(curves: dict, wires: list[str]) -> list[str]:
    """The rate of the wire below which TWA's end is better than what a baseline has by then."""
    mine = [way for way in TWAS if way in curves]
    rows = [
        [baseline, *(crossing(curves[baseline], curves[way], wires[0]) for way in mine)]
        for baseline in BASELINES
        if baseline in curves
    ]
    return markdown(["has the loss at the end of", *mine], rows)


def crossing(baseline: dict, mine: dict, wire: str) -> str:
    """The rate at which `baseline` reaches the loss at the end of `mine` in the same seconds.

    A step takes what it takes without a limit, and its bytes at the rate.
    """
    end = mine[CURVE][CURVE][-1]
    tests = baseline[CURVE][CURVE]
    steps = next((test["step"] for test in tests if test["loss"] <= end["loss"]), None)
    if steps is None:
        return "never"
    more_bytes = steps * baseline[wire]["bytes"] - end["step"] * mine[wire]["bytes"]
    seconds_left = end["step"] * mine[wire]["seconds"] - steps * baseline[wire]["seconds"]
    if seconds_left <= 0:
        return "later at every rate" if more_bytes > 0 else "later above some rate"
    if more_bytes <= 0:
        return "sooner at every rate"
    return f"sooner above {8 * more_bytes / seconds_left / 1e6:.3g} Mbit/s"


def draw(archs: dict, path: Path) -> None:
    """Accuracy and loss against seconds, a column for each wire."""
    wires = [w for w in next(iter(next(iter(archs.values())).values())) if w != CURVE]
    figure = Figure(figsize=(3.2 * len(wires), 4.6 * len(archs)), layout="constrained")
    axes = figure.subplots(2 * len(archs), len(wires), squeeze=False, sharey="row", sharex="col")
    for i, (arch, ways) in enumerate(archs.items()):
        for j, wire in enumerate(wires):
            shown = {way: points(c, wire) for way, c in ways.items() if {CURVE, wire} <= c.keys()}
            for k, name in enumerate(("test accuracy (%)", "test loss")):
                ax = axes[2 * i + k, j]
                for way, along in shown.items():
                    seconds, *values = zip(*along, strict=True)
                    ax.plot(seconds, values[k], "-" if way in TWAS else "--", label=way, marker=".")
                ax.set_xscale("log")
                ax.grid(alpha=0.3)
                if j == 0:
                    ax.set_ylabel(f"{arch.rpartition(':')[2]}\n{name}")
            axes[2 * i, j].set_title(wire)
    for ax in axes[-1]:
        ax.set_xlabel("seconds")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    parser, here = Parser(__doc__), Path(__file__).resolve().parent
    parser.add_argument("folder", nargs="?", type=Path, default=here, help="of network.json")
    folder = parser.parse_args().folder
    write_report(json.loads((folder / "network.json").read_text()), folder)
