"""What a run shows at its end: a table of solutions and a figure."""

import argparse
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from torch import nn

from training import flags, logs, text
from training.files import replacing
from twa.files.checkpoints import load_into
from utils import UserError

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
    def read(cls, log_dir: Path, unit: str = "epochs") -> "SGDRun":
        """What the files of the run say, if they are there.

        Raises:
            UserError: they are damaged, or of a run on text where `unit` is "epochs", or on images.
        """
        arguments = logs.read_json(log_dir / "run.json").get("arguments", {})
        on_text = arguments.get("datasets") == text.NAME
        if arguments and on_text != (unit == "steps"):
            its, wanted = ("text", "images") if on_text else ("images", "text")
            raise UserError(f"{log_dir}: is of a run on {its}; give the folder of one on {wanted}")
        # The steps of an epoch are told by the arguments.
        known = arguments or unit == "epochs"
        return cls(
            logs.read_lines(log_dir / "metrics.jsonl", "epoch", "seconds") if known else [],
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

    def notes(self, args: argparse.Namespace) -> Iterator[str]:
        """What does not go well with the run in the flags of a TWA run."""
        if args.split and self.held_out != flags.held_out(args):
            yield (
                f"the checkpoints' run held out {self.held_out or 'nothing'}, so its models know "
                "images that the coefficients are trained on; give both the same --split"
            )
        theirs = self.arguments.get("images")
        if self.arguments and theirs != args.images:
            yield (
                f"--images is {args.images or 'left out'} here and {theirs or 'left out'} in the "
                "checkpoints' run; the table counts an epoch of either as one"
            )
        risen = math.ceil(self.arguments.get("warmup_epochs", 0) * (self.saves_per_epoch or 1))
        if args.params_start < risen:
            yield (
                "the window begins within the warm-up of the run, whose checkpoints are far from "
                f"the others; try --params_start {risen}"
            )

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

    def measured_end(
        self, model: nn.Module, save_dir: Path, measure: Callable[[], dict[str, float]]
    ) -> dict[str, float] | None:
        """`end`, its checkpoint in `model` and measured as other solutions are, if it is there.

        The run itself tests with batch norm's running statistics, which are those of its way.
        """
        if not self.metrics:
            return None
        last = save_dir / f"{self.metrics[-1]['epoch'] * (self.saves_per_epoch or 1)}.pt"
        if not last.exists():
            return self.end
        load_into(model, last)
        return self.end | measure()


def more(spent: Mapping[str, float | None], **further: float) -> dict[str, float | None]:
    """What was spent, and so much more; what is not known stays unknown."""
    return {k: None if spent[k] is None else spent[k] + value for k, value in further.items()}


def table(solutions: Mapping[str, Mapping[str, float | None]]) -> str:
    """The solutions, from name to the values of a row, as aligned text; None: not known."""
    columns = list(dict.fromkeys(key for values in solutions.values() for key in values))
    rows = [["solution", *(key.replace("_", " ") for key in columns)]]
    for name, values in solutions.items():
        rows.append([name, *(logs.told(key, values.get(key)) for key in columns)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )


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
    left, *right = fig.subplots(1, panels, squeeze=False)[0]
    for name, (epochs, accuracies) in curves.items():
        left.plot(epochs, accuracies, color=COLOURS.get(name, OTHER), label=name)
    for name, (epochs, accuracy) in points.items():
        style = {"color": COLOURS.get(name, OTHER), "label": f"{name}: {form.format(accuracy)}"}
        if epochs is None:
            left.axhline(accuracy, linestyle=":", **style)
        else:
            left.plot(epochs, accuracy, linestyle="none", **mark_of(name), **style)
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
    for axes in right:
        alpha, names = list(averaging_weights.values()), list(averaging_weights)
        axes.bar(range(len(alpha)), alpha, color=COLOURS["TWA"], label="TWA")
        axes.axhline(1 / len(alpha), color=COLOURS["SWA"], linestyle="--", label="SWA: all equal")
        ticks = range(0, len(alpha), max(1, len(alpha) // 8))
        axes.set_xticks(ticks, [Path(names[i]).stem for i in ticks])
        axes.set(xlabel="checkpoint", ylabel="coefficient α", title="averaging coefficients")
        axes.legend()
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
    grey = {"color": COLOURS["SGD"], "alpha": 0.6, "label": "individual models"}
    axes.plot(*zip(*models, strict=True), "d", **grey)
    for i, (name, point) in enumerate(soups.items()):
        style = {"color": f"C{i}", "alpha": 0.8, "label": f"{name}: {point[1]:.2f} %"}
        axes.plot(*point, linestyle="none", **mark_of(name), **style)
    axes.set(xlabel="validation accuracy (%)", ylabel="test accuracy (%)", title=title)
    axes.legend(fontsize=8)
    _write(fig, path)


def mark_of(name: str) -> dict:
    """The mark of a solution in a figure: a star for TWA."""
    star = name.startswith("TWA")
    return {"marker": "*", "markersize": 15} if star else {"marker": "o", "markersize": 7}


def _write(fig: Figure, path: Path) -> None:
    """Writes the figure, all or nothing, in the format that the suffix of `path` names."""
    for axes in fig.axes:
        axes.grid(alpha=0.3)
    fig.tight_layout()
    with replacing(path) as temporary:
        fig.savefig(temporary, dpi=150, format=path.suffix[1:])
