"""What a run reports at its end: a table of solutions and a figure."""

import argparse
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from training import flags, ranks
from training.files import read_json, read_lines, write_json
from training.logs import format_metric
from training.tasks import Task
from twa.files.writing import replacing
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
    """The run that saved the checkpoints, read from its log directory."""

    metrics: list[dict]
    arguments: dict  # of the script; {} if nothing is known of the run
    unit: str = "epochs"  # of what is spent, in results: "epochs" or "steps"

    @classmethod
    def read(cls, log_dir: Path, task: Task | None = None, unit: str = "epochs") -> "SGDRun":
        """Reads the files of the run, if they are there.

        Args:
            task: what the run has to go with; None for whatever has this `unit`.

        Raises:
            UserError: they are damaged, or of a run on other data.
        """
        unit = task.unit if task else unit
        arguments = read_json(log_dir / "run.json").get("arguments", {})
        on_text = arguments.get("datasets") == flags.TEXT
        if arguments and on_text != (unit == "steps"):
            its, wanted = ("text", "images") if on_text else ("images", "text")
            raise UserError(f"{log_dir}: is of a run on {its}; give the folder of one on {wanted}")
        # Without the arguments the steps of an epoch are not known.
        known = arguments or unit == "epochs"
        metrics = read_lines(log_dir / "metrics.jsonl", "epoch", "seconds") if known else []
        if task:
            task.check_run(arguments)
        return cls(metrics, arguments, unit)

    @property
    def saves_per_epoch(self) -> int:
        return self.arguments.get("saves_per_epoch", 1)

    def _in_unit(self, epochs: float) -> float:
        return epochs * (self.arguments["epoch_steps"] if self.unit == "steps" else 1)

    def spent(self, checkpoint: int) -> dict[str, float | None]:
        """The epochs and the training seconds up to the checkpoint of this number, if known."""
        if not self.arguments:
            return {self.unit: None, "seconds": None}
        epochs, seconds = checkpoint / self.saves_per_epoch, None
        if epochs <= len(self.metrics):
            shares = (min(1.0, max(0.0, epochs - i)) for i in range(len(self.metrics)))
            seconds = sum(s * m["seconds"] for s, m in zip(shares, self.metrics, strict=True))
        return {self.unit: self._in_unit(epochs), "seconds": seconds}

    @property
    def curves(self) -> dict[str, Curve]:
        """Test accuracy over epochs, of SGD and its average; of text, test loss over steps."""
        keys = {"SGD": "test_accuracy", "SWA": "SWA_accuracy"}
        curves = {}
        for name, key in ({"AdamW": "test_loss"} if self.unit == "steps" else keys).items():
            tested = [m for m in self.metrics if m.get(key) is not None]
            if tested:
                curves[name] = [self._in_unit(m["epoch"]) for m in tested], [m[key] for m in tested]
        return curves

    def notes(self, args: argparse.Namespace) -> Iterator[str]:
        """Warnings about flags of a TWA run that do not go well with this run."""
        held_out = flags.held_out(argparse.Namespace(**{"split": False} | self.arguments))
        if args.split and held_out != flags.held_out(args):
            yield (
                f"the checkpoints' run held out {held_out or 'nothing'}, so its models know images "
                "that the coefficients are trained on; give both the same --split"
            )
        theirs = self.arguments.get("images")
        if self.arguments and theirs != args.images:
            yield (
                f"--images is {args.images or 'left out'} here and {theirs or 'left out'} in the "
                "checkpoints' run; the table counts an epoch of either as one"
            )
        risen = math.ceil(self.arguments.get("warmup_epochs", 0) * self.saves_per_epoch)
        if args.params_start < risen:
            yield (
                "the window begins within the warm-up of the run, whose checkpoints are far from "
                f"the others; try --params_start {risen}"
            )

    @property
    def end(self) -> dict[str, float] | None:
        """What the run measured at its end, the epochs and seconds spent; None if not known."""
        if not self.metrics:
            return None
        last = self.metrics[-1]
        tested = {k.removeprefix("test_"): v for k, v in last.items() if k.startswith("test_")}
        seconds = sum(m["seconds"] for m in self.metrics)
        return tested | {self.unit: self._in_unit(last["epoch"]), "seconds": seconds}

    def last_checkpoint(self, save_dir: Path) -> Path | None:
        """The run's last checkpoint, to be measured as other solutions are, if it is there.

        The run itself tests with batch norm's running statistics.
        """
        last = self.metrics[-1]["epoch"] * self.saves_per_epoch if self.metrics else None
        path = save_dir / f"{last}.pt"
        return path if path.exists() else None


def write_results(folder: Path, results: dict, sgd: SGDRun, task) -> str | None:
    """Writes `twa.json` and `twa.png`, on the first rank; returns the table and what was written.

    Args:
        results: of a TWA run, with "results", the solutions by name; "averaging_weights", α by the
            path of each checkpoint; and "sgd", the end of the run of all weights.
    """
    if ranks.rank() > 0:
        return None
    solutions, full = dict(results["results"]), results["sgd"]
    alpha = {Path(path).name: a for path, a in results["averaging_weights"].items()}
    write_json(results | {"averaging_weights": alpha}, folder / "twa.json")
    figure(
        folder / "twa.png",
        task.title,
        curves=sgd.curves,
        points={name: (s[task.unit], s[task.quality]) for name, s in solutions.items()},
        averaging_weights=alpha,
        loss=task.quality == "loss",
    )
    spent = solutions["last"][task.unit]
    if full and spent is not None and full[task.unit] > spent:
        solutions[f"{task.baseline} to its end"] = full
    written = ", ".join(str(folder / f"twa.{kind}") for kind in ("pt", "json", "png"))
    return f"{table(solutions)}\nwritten: {written}"


def more(spent: Mapping[str, float | None], **further: float) -> dict[str, float | None]:
    """Adds what was spent further; what is not known stays None."""
    return {k: None if spent[k] is None else spent[k] + value for k, value in further.items()}


def table(solutions: Mapping[str, Mapping[str, float | None]]) -> str:
    """An aligned table of solutions: by name, the values of a row; None for what is not known."""
    columns = list(dict.fromkeys(key for values in solutions.values() for key in values))
    rows = [["solution", *(key.replace("_", " ") for key in columns)]]
    rows += [
        [n, *(format_metric(key, s.get(key)) for key in columns)] for n, s in solutions.items()
    ]
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
    """Draws test accuracy over epochs and, if given, the averaging coefficients as bars.

    Args:
        path: the image to write, by its suffix (`.png`).
        curves: name to (epochs, test accuracies in percent).
        points: name to (epochs spent, test accuracy in percent); a line where epochs are not known.
        averaging_weights: name of a checkpoint file to α.
        loss: whether these are steps and losses in nats a token.
    """
    form = "{:.4f}" if loss else "{:.2f} %"
    panels = 1 if averaging_weights is None else 2
    fig = Figure(figsize=(6 * panels, 4))
    left, *right = fig.subplots(1, panels, squeeze=False)[0]
    for name, curve in curves.items():
        left.plot(*curve, color=COLOURS.get(name, OTHER), label=name)
    for name, (epochs, value) in points.items():
        style = {"color": COLOURS.get(name, OTHER), "label": f"{name}: {form.format(value)}"}
        if epochs is None:
            left.axhline(value, linestyle=":", **style)
        else:
            _mark(left, name, (epochs, value), **style)
    # Without a limit the first epochs would squeeze all that matters into a line at the edge.
    shown = [
        *(v for _, values in curves.values() for v in values),
        *(v for _, v in points.values()),
    ]
    shown.sort(reverse=not loss)
    best, middle = shown[0], shown[2 * len(shown) // 3]
    spread, labels = abs(best - middle), {"xlabel": "epochs spent", "ylabel": "test accuracy (%)"}
    if loss:
        labels = {"xlabel": "steps spent", "ylabel": "test loss (nats a token)"}
        left.set_ylim(best - 0.1 * spread, middle + spread)
    else:
        left.set_ylim(max(0.0, middle - spread - 1), min(100.5, best + 0.2 * spread + 1))
    left.set(title=title, **labels)
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
    """Draws validation accuracy against test accuracy, as Model Soups does (Wortsman et al., 2022).

    Args:
        path: the image to write, by its suffix (`.png`).
        models: (validation, test) accuracies in percent of the individual models.
        soups: name to the same of a soup.
    """
    fig = Figure(figsize=(6, 4.5))
    axes = fig.subplots()
    grey = {"color": COLOURS["SGD"], "alpha": 0.6, "label": "individual models"}
    axes.plot(*zip(*models, strict=True), "d", **grey)
    for i, (name, point) in enumerate(soups.items()):
        _mark(axes, name, point, color=f"C{i}", alpha=0.8, label=f"{name}: {point[1]:.2f} %")
    axes.set(xlabel="validation accuracy (%)", ylabel="test accuracy (%)", title=title)
    axes.legend(fontsize=8)
    _write(fig, path)


def _mark(axes: Axes, name: str, point: tuple[float, float], **style) -> None:
    """Marks the point of a solution: a star for TWA."""
    marker, size = ("*", 15) if name.startswith("TWA") else ("o", 7)
    axes.plot(*point, linestyle="none", marker=marker, markersize=size, **style)


def _write(fig: Figure, path: Path) -> None:
    for axes in fig.axes:
        axes.grid(alpha=0.3)
    fig.tight_layout()
    with replacing(path) as temporary:
        fig.savefig(temporary, dpi=150, format=path.suffix[1:])
