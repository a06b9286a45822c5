"""What a run shows at its end, a table of solutions and a figure, and a study: the mean of runs."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from training import flags, logs
from twa.checkpoints import replacing

# One colour a method in every figure.
COLOURS = {
    "SGD": "#7f7f7f",
    "SWA": "#1f77b4",
    "TWA": "#d62728",
    "last": "#2ca02c",
    "mean of last 5": "#ff7f0e",
}
OTHER = "#9467bd"

Curve = tuple[list[float], list[float]]  # epochs, test accuracies in percent


@dataclass(frozen=True)
class SGDRun:
    """The SGD run that left the checkpoints, read from its log directory."""

    metrics: list[dict]
    saves_per_epoch: int | None  # None: nothing is known of the run
    held_out: str | None  # see `flags.held_out`
    arguments: dict  # of the script; {}: nothing is known of them
    unit: str = "epochs"  # what is told in results: "epochs" or "steps"

    @classmethod
    def read(cls, log_dir: Path, unit: str = "epochs") -> SGDRun:
        """What the files of the run say, if they are there."""
        description = logs.read_json(log_dir / "run.json")
        arguments = description.get("arguments", {})
        return cls(
            logs.read_lines(log_dir / "metrics.jsonl"),
            arguments.get("saves_per_epoch", 1) if arguments else None,
            flags.held_out(argparse.Namespace(**{"split": False} | arguments)),
            arguments,
            unit,
        )

    def _in_unit(self, epochs: float) -> float:
        return epochs * (self.arguments["epoch_steps"] if self.unit == "steps" else 1)

    def spent(self, checkpoint: int) -> dict[str, float | None]:
        """The epochs and the training seconds up to the checkpoint of this number, if known."""
        if self.saves_per_epoch is None:
            return {self.unit: None, "seconds": None}
        epochs = checkpoint / self.saves_per_epoch
        seconds = sum(
            m["seconds"] * min(1.0, max(0.0, epochs - i)) for i, m in enumerate(self.metrics)
        )
        known = epochs <= len(self.metrics)
        return {self.unit: self._in_unit(epochs), "seconds": seconds if known else None}

    @property
    def curves(self) -> dict[str, Curve]:
        """Test accuracy over epochs, of SGD and, where it was tested, of its average.

        Of a text the test loss over steps.
        """
        curves, loss = {}, self.unit == "steps"
        keys = {"AdamW": "test_loss"} if loss else {"SGD": "test_accuracy", "SWA": "SWA_accuracy"}
        for name, key in keys.items():
            tested = [m for m in self.metrics if m.get(key) is not None]
            if tested:
                spent = [self._in_unit(m["epoch"]) for m in tested]
                curves[name] = spent, [m[key] for m in tested]
        return curves

    @property
    def end(self) -> dict[str, float] | None:
        """Test accuracy and loss, epochs and seconds at the end of the run."""
        if not self.metrics:
            return None
        last = self.metrics[-1]
        return {
            **{k.removeprefix("test_"): v for k, v in last.items() if k.startswith("test_")},
            self.unit: self._in_unit(last["epoch"]),
            "seconds": sum(m["seconds"] for m in self.metrics),
        }

    @property
    def swa_end(self) -> dict[str, float]:
        """Test accuracy and loss of the average at the end of a run with `--swa`."""
        last = self.metrics[-1]
        return {"accuracy": last["SWA_accuracy"], "loss": last["SWA_loss"]}


def more(spent: Mapping[str, float | None], **further: float) -> dict[str, float | None]:
    """What was spent, and so much more; what is not known stays unknown."""
    return {k: None if spent[k] is None else spent[k] + value for k, value in further.items()}


# The columns of a table of test results: the key of a value and its format.
# A column that no solution has is left out.
COLUMNS = {
    "accuracy": "{:.2f} %",
    "top5_accuracy": "{:.2f} %",
    "loss": "{:.4f}",
    "bits_a_byte": "{:.4f}",
    "perplexity": "{:.4g}",
    "epochs": "{:.4g}",
    "steps": "{:.0f}",
    "seconds": "{:.1f}",
}


def table(
    solutions: Mapping[str, Mapping[str, float | None]], columns: Mapping[str, str] = COLUMNS
) -> str:
    """The solutions as aligned text.

    Args:
        solutions: name to the values of its row, None for what is not known; epochs and seconds
            are those spent.
        columns: key of a value to its format.
    """
    columns = {k: form for k, form in columns.items() if any(k in v for v in solutions.values())}
    rows = [["solution", *(key.replace("_", " ") for key in columns)]]
    for name, values in solutions.items():
        known = {key: value for key, value in values.items() if value is not None}
        rows.append(
            [name, *(f.format(known[k]) if k in known else "–" for k, f in columns.items())]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )


def spread(values: Sequence[float], form: str) -> str:
    """`mean ± deviation`, the sample's, which one value alone does not have; "" of none."""
    if not values:
        return ""
    mean, unsigned = format(statistics.mean(values), form), form.removeprefix("+")
    return f"{mean} ± {statistics.stdev(values):{unsigned}}" if len(values) > 1 else mean


def figure(
    path: Path,
    title: str,
    curves: Mapping[str, Curve],
    points: Mapping[str, tuple[float | None, float]],
    averaging_weights: Mapping[str, float] | None = None,
    loss: bool = False,
) -> None:
    """Test accuracy over epochs and, if given, the averaging coefficients as bars beside it.

    Args:
        path: the image to write, by its suffix (`.png`).
        curves: name to (epochs, test accuracies in percent).
        points: name to (epochs spent, test accuracy in percent); "TWA" becomes a star, and a
            point whose epochs are not known a line.
        averaging_weights: name of a checkpoint file to α.
        loss: in place of epochs and accuracies, steps and losses in nats a token.
    """
    form = "{:.4f}" if loss else "{:.2f} %"
    panels = 1 if averaging_weights is None else 2
    fig = Figure(figsize=(6 * panels, 4))
    axes = fig.subplots(1, panels, squeeze=False)
    left = axes[0][0]
    for name, (epochs, accuracies) in curves.items():
        left.plot(epochs, accuracies, color=COLOURS.get(name, OTHER), label=name)
    for name, (epochs, accuracy) in points.items():
        star = name.startswith("TWA")
        style = {"color": COLOURS.get(name, OTHER), "label": f"{name}: {form.format(accuracy)}"}
        if epochs is None:
            left.axhline(accuracy, linestyle=":", **style)
        else:
            mark = {"marker": "*", "markersize": 15} if star else {"marker": "o", "markersize": 7}
            left.plot(epochs, accuracy, linestyle="none", **mark, **style)
    # Without a limit the first epochs would squeeze all that matters into a line at the top.
    shown = [a for _, accuracies in curves.values() for a in accuracies]
    shown += [accuracy for _, accuracy in points.values()]
    if loss:
        best, middle = min(shown), sorted(shown)[2 * len(shown) // 3]
        left.set_ylim(best - 0.1 * (middle - best), middle + (middle - best))
        left.set(xlabel="steps spent", ylabel="test loss (nats a token)", title=title)
    else:
        top, middle = max(shown), sorted(shown)[len(shown) // 3]
        lowest = max(0.0, middle - (top - middle) - 1)
        left.set_ylim(lowest, min(100.5, top + 0.2 * (top - middle) + 1))
        left.set(xlabel="epochs spent", ylabel="test accuracy (%)", title=title)
    left.legend(loc="upper right" if loss else "lower right")
    left.grid(alpha=0.3)
    if averaging_weights is not None:
        right = axes[0][1]
        values = list(averaging_weights.values())
        right.bar(range(len(values)), values, color=COLOURS["TWA"], label="TWA")
        right.axhline(1 / len(values), color=COLOURS["SWA"], linestyle="--", label="SWA: all equal")
        step = max(1, len(values) // 8)
        ticks = range(0, len(values), step)
        right.set_xticks(ticks, [Path(n).stem for n in list(averaging_weights)[::step]])
        right.set(xlabel="checkpoint", ylabel="coefficient α", title="averaging coefficients")
        right.legend()
        right.grid(axis="y", alpha=0.3)
    fig.tight_layout()
    _write(fig, path)


def scatter(
    path: Path,
    title: str,
    models: Iterable[tuple[float, float]],
    soups: Mapping[str, tuple[float, float]],
) -> None:
    """Validation accuracy against test accuracy, as Model Soups shows it (Wortsman et al., 2022).

    Args:
        path: the image to write, by its suffix (`.png`).
        models: (validation, test) accuracies in percent of the individual models.
        soups: name to the same of a soup; those of TWA become stars.
    """
    fig = Figure(figsize=(6, 4.5))
    axes = fig.subplots()
    axes.plot(
        *zip(*models, strict=True), "d", color=COLOURS["SGD"], alpha=0.6, label="individual models"
    )
    for i, (name, (validation, test)) in enumerate(soups.items()):
        star = name.startswith("TWA")
        axes.plot(
            validation,
            test,
            "*" if star else "o",
            markersize=14 if star else 8,
            color=f"C{i}",
            alpha=0.8,
            label=f"{name}: {test:.2f} %",
        )
    axes.set(xlabel="validation accuracy (%)", ylabel="test accuracy (%)", title=title)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    fig.tight_layout()
    _write(fig, path)


def _write(fig: Figure, path: Path) -> None:
    """Writes the figure, all or nothing, in the format that the suffix of `path` names."""
    with replacing(path) as temporary:
        fig.savefig(temporary, dpi=150, format=path.suffix[1:])
