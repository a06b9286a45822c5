"""Writes docs/RESULTS.md, the pages behind it, their figures, and the tables of swa/ and soup/.

The numbers in their tables and conclusions come from the JSON beside this file. What stands in
texts (`PAGES` here, `MACHINES` in front_page.py) is typed, from this code and from network.md.
"""

from __future__ import annotations

import os
import statistics
from pathlib import Path

import drawing
import front_page
import goals
import stages
import torch
from study import EPOCHS, HEAD, RESULTS, SAVES
from study import EVERY as APART
from tables import (
    ADVISED,
    BY_CHANNEL,
    BY_MODEL,
    RECIPE,
    SPREAD,
    START,
    TUNED,
    Runs,
    averages,
    between,
    gains,
    markdown,
    paragraph,
    read,
    scores,
    seeds,
    split,
    spread,
    table,
    values,
)
from torch.utils.flop_counter import FlopCounterMode

import models
from training import data
from training.coefficients import MANY_STEPS

BEGIN, END = "<!-- python studies/evidence.py report -->", "<!-- end of the report -->"


def write(root: Path, measurements: Path = RESULTS) -> None:
    """Writes the pages and figures below `root`, which has the READMEs of swa/ and soup/.

    Args:
        measurements: holds `PART.DATA.ARCH.SEED.json`.
    """
    studies, docs, figures = read(measurements), root / "docs", root / "studies/figures"
    for folder in (docs / "results", figures):
        folder.mkdir(parents=True, exist_ok=True)
    for name, (title, introduction, sections) in PAGES.items():
        page = docs / f"results/{name}.md"
        lines = [f"# {title}", "", paragraph(introduction)]
        for part, heading, note, section in sections:
            named = studies.get(part, {})
            if named:
                lines += ["", f"## {heading}", *(["", paragraph(note)] if note else [])]
            for study, runs in named.items():
                figure = figures / f"{part}.{study.replace(' on ', '.')}.png"
                lines += ["", f"### {study}, {seeds(runs)}", "", *section(runs, figure)]
                if figure.exists():
                    lines += ["", f"![{study}]({os.path.relpath(figure, page.parent)})"]
        lines += EXTRA.get(name, list)()
        page.write_text("\n".join(lines) + "\n")
    for page, made in (("swa", stages.tail_table()), ("soup", stages.soup_table())):
        between(root / page / "README.md", BEGIN, END, ["", *made, ""])
    (docs / "RESULTS.md").write_text(front_page.text(studies))


def head(runs: Runs, figure: Path) -> list[str]:
    rows, budgets = split(runs)
    accuracy, loss = scores(runs, "SGD")
    lines = [f"Full run, {EPOCHS} epochs: {accuracy} %, test loss {loss}. After the head:", ""]
    lines += [*plain(runs), ""]
    lines += [
        "Test accuracy (%) after so many epochs more; and from which on it is the full run's,"
    ]
    lines += ["or how many points are missing:", ""]
    lines += [*with_full_run(runs, rows, budgets), "", "Test loss:", ""]
    lines += [*table(runs, rows, budgets, "loss", ".4f"), ""]
    against = [(RECIPE, None, "the best rival, averages included")]
    if goals.measured(runs):
        ours = (ADVISED, BY_CHANNEL, BY_MODEL)
        against += [(row, TUNED, "the rival at its tuned rate") for row in ours]
    lines += ["Points of accuracy ahead, and by how much the loss is below, paired by seed:", ""]
    lines += compared(runs, against, budgets)
    if goals.measured(runs):
        for row in (ADVISED, BY_CHANNEL):
            lines += ["", f"The goals for “{row}”:", "", *goals.table(runs, row)]
    shown = [row for row in rows if row in (RECIPE, BY_CHANNEL, BY_MODEL) or row[:3] != "TWA"]
    drawing.draw_head(runs, shown, budgets, figure)
    return lines


def with_full_run(runs: Runs, rows: list[str], budgets: list[str]) -> list[str]:
    """The table of accuracies, with the budget at which a row is as good as the full run."""
    first, rule, *rest = table(runs, rows, budgets)
    told = [f"{line} {reached(runs, row)} |" for line, row in zip(rest, rows, strict=True)]
    return [f"{first} full run |", f"{rule} --- |", *told]


def reached(runs: Runs, row: str) -> str:
    """From which budget on the method is as good as the full run, in the mean."""
    _, budgets = split(runs)
    goal = statistics.mean(values(runs, "SGD"))
    means = {b: statistics.mean(v) for b in budgets if (v := values(runs, f"{row} | {b}"))}
    first = next((b for b in means if means[b] >= goal), None)
    return f"from {first}" if first else f"−{goal - max(means.values()):.2f}"


def compared(
    runs: Runs, against: list[tuple[str, str | None, str]], budgets: list[str]
) -> list[str]:
    """Rows of TWA less rivals: (row, the rival or None for the best, what it is called)."""
    rows = []
    for row, other, called in against:
        for key, form in (("accuracy", "+.2f"), ("loss", "+.4f")):
            cells = [
                spread(gains(runs, row, b, key, other and f"{other} | {b}"), form) for b in budgets
            ]
            rows.append((f"{row}, {key}, against {called}", *cells))
    if any(other == TUNED for _, other, _ in against):
        found = [values(runs, f"{TUNED} | {b}", "lr") for b in budgets]
        rows.append(
            ("the tuned rate", *(" ".join({f"{r:g}": 0 for r in rates}) for rates in found))
        )
    return markdown(("", *budgets), rows)


def plain(runs: Runs) -> list[str]:
    """The table of what is measured without training."""
    headings = ("solution", "test accuracy (%)", "test loss")
    return markdown(headings, [(name, *scores(runs, name)) for name in averages(runs)])


def both(runs: Runs, what: str, images: str = "test") -> list[str]:
    """Two tables of the entries called `row | column`: accuracy and loss."""
    kind, (rows, columns) = images.capitalize(), split(runs)
    lines = [f"{kind} accuracy (%) {what}:", "", *table(runs, rows, columns), ""]
    lines += [f"{kind} loss:", ""]
    return lines + table(runs, rows, columns, "loss", ".4f")


def choice(runs: Runs, what: str) -> list[str]:
    """The tables of a part that compares settings, on the validation images."""
    return [started(runs), "", *both(runs, what, "validation")]


def started(runs: Runs) -> str:
    """What the point that TWA starts from has without training."""
    accuracy, loss = scores(runs, START)
    return f"The start, the {START}: {accuracy} %, loss {loss}."


def units(runs: Runs, figure: Path) -> list[str]:
    return both(runs, "after so many epochs more", "validation")


def rates(runs: Runs, figure: Path) -> list[str]:
    rows, factors = split(runs)
    lines = [started(runs), "", "Validation accuracy (%) at so many times the default rate, and"]
    lines += ["the points by which the default is below the best:", ""]
    first, rule, *rest = table(runs, rows, factors)
    told = [f"{line} {best_rate(runs, r)[1]:.2f} |" for line, r in zip(rest, rows, strict=True)]
    return [*lines, f"{first} below the best |", f"{rule} --- |", *told]


def best_rate(runs: Runs, row: str) -> tuple[str, float]:
    """The best factor in the mean of the seeds, and the points by which the default is below it."""
    _, factors = split(runs)
    means = {f: statistics.mean(v) for f in factors if (v := values(runs, f"{row} | {f}"))}
    best = max(means, key=means.get)
    return best, means[best] - means["1"]


def settings(runs: Runs, figure: Path) -> list[str]:
    return choice(runs, "with coefficients of the model, of each layer, of each channel")


def checkpoints(runs: Runs, figure: Path) -> list[str]:
    what = "by checkpoints an epoch and by the epoch that the window begins after"
    drawing.draw_averaging(runs, figure)
    return choice(runs, what)


def second_order(runs: Runs, figure: Path) -> list[str]:
    lines = choice(runs, "for so many epochs' worth of passes")
    long, short = values(runs, "SGD | 10"), [values(runs, f"{m} | 1") for m in ("L-BFGS", "Newton")]
    if not (long and all(short)):
        return lines
    gap = statistics.mean(long) - max(map(statistics.mean, short))
    do = "do not reach" if gap > 0 else "reach"
    return [*lines, "", f"In one epoch they {do} what SGD has after ten: {-gap:+.2f} points."]


def plane(runs: Runs, figure: Path) -> list[str]:
    drawing.draw_plane(runs, figure)
    return ["Training loss; 1,024 images."]


def little(runs: Runs, figure: Path) -> list[str]:
    return [*plain(runs), "", *both(runs, "after training on the column's images alone")]


def cost(runs: Runs, figure: Path) -> list[str]:
    (run, *_) = runs
    steps, sgd = run["process"]["steps_an_epoch"], run["SGD"]["step_ms"]
    columns = {
        "": lambda name, _: name.replace(" | ", ", by "),
        "seconds an epoch": lambda _, e: f"{e['step_ms'] * steps / 1e3:.1f}",
        "of SGD's": lambda _, e: f"{e['step_ms'] / sgd:.2f}",
        "share of a step in the optimizer": lambda _, e: f"{e['optimizer_ms'] / e['step_ms']:.1%}",
        "coefficients": lambda _, e: f"{e['coefficients']:,}" if "coefficients" in e else "",
        "basis MB": lambda _, e: f"{e['basis_bytes'] / 1e6:.1f}" if "basis_bytes" in e else "",
        "build seconds": lambda _, e: f"{e['build_seconds']:.2f}" if "build_seconds" in e else "",
    }
    names = ("SGD", *(name for name in run if name.startswith("TWA")))
    rows = [[cell(name, run[name]) for cell in columns.values()] for name in names]
    peak = run["process"]["peak_bytes"] / 1e9
    end = f"The process, PyTorch and the data set included, peaked at {peak:.2f} GB."
    return [*markdown([*columns], rows), "", end]


# The pages behind RESULTS.md: title, introduction, and sections of a part of the measurements each.
PAGES = {
    "head-stage": (
        "Results: the head stage",
        f"The head's {HEAD} epochs leave {SAVES // APART} checkpoints an epoch, "
        f"{HEAD * SAVES // APART} in all. From there TWA and its rivals spend the same epochs. The "
        "rivals are SGD on all weights from rate 0.05 falling linearly to 0, and SGD with its "
        "whole schedule in as many epochs as head and budget; where the rate is tuned, it is the "
        "best of 0.01, 0.02, 0.05 and 0.1 by loss on 4,000 validation images, tried for each "
        f"budget on the first seed, from the start point of TWA. “{SPREAD}” is TWA as the scripts "
        f"have it; as advised: by model in fewer than {MANY_STEPS} steps, by channel from there "
        "on, which validation images of other seeds chose (below). The other rows of TWA are as it "
        "was: the paper's coordinates, from the mean of the last ten, at a rate from the curvature "
        "of the loss; “the recipe” was AdamW (below one epoch SGD) by channel, from the mean of "
        "the last five, chosen by validation images beside the 12,000.",
        [
            ("head", "By study", "", head),
            (
                "units",
                "What coefficients count in",
                "TWA by channel, in units of the spread along each direction or of the root mean "
                "square of these in a block, each at its own rate (`rate_of`); by model; and SGD "
                "on all weights from the same start, at the rate that was tuned above. Other "
                "seeds, and validation images: by these the unit and its rate were chosen. In "
                "fewer than 50 steps (half an epoch has 47) the coefficients of the model are "
                "enough.",
                units,
            ),
        ],
    ),
    "settings": (
        "Results: which settings are safe",
        "One epoch of TWA with SGD in the paper's coordinates, from the mean of the head's last "
        "ten checkpoints, at a rate from the curvature of the loss (“the default rate”): as TWA "
        "was before its coefficients counted in the spread. One thing is changed at a time, and "
        "measured on 10,000 validation images that the run never saw.",
        [
            (
                "settings",
                "Start, bits, directions, decay, schedule",
                "",
                settings,
            ),
            (
                "checkpoints",
                "How many checkpoints, how often",
                "The window ends with the head. The figure: the averaging coefficients that TWA "
                "ends with, scaled so that windows of different size can be compared.",
                checkpoints,
            ),
            (
                "rates",
                "Rates",
                "Their losses are in the JSON.",
                rates,
            ),
            (
                "second-order",
                "Second-order steps on the coefficients",
                "L-BFGS with a line search on fixed batches, and two Newton steps in the twelve "
                "leading directions, the Hessian from differences of gradients. Every pass counts "
                "as training. Newton's steps, and the rows above with 3, 12 and 24 directions, are "
                "of version 0.1: the commands now measure these in units of the spread.",
                second_order,
            ),
            (
                "plane",
                "The loss around the solutions",
                "The plane through the head's last checkpoint (SGD), the mean of its checkpoints "
                "(SWA) and TWA's solution after one epoch.",
                plane,
            ),
        ],
    ),
    "few-images": (
        "Results: few images, and wrong labels",
        "The head was trained on 12,000 images, of which 40 % have wrong labels in one study "
        "(noisy). Then as many steps as one epoch has, on the training set or on so many images "
        "with right labels that the run never saw, and batch norm re-estimated on these as well, "
        "as if the training data were gone. TWA is as it was (see the head stage).",
        [("little", "By training set", "", little)],
    ),
    "cost": (
        "Results: cost",
        "Sixty checkpoints, batches of 128, one core with nothing beside it; TWA as it was, in the "
        "paper's coordinates with SGD.",
        [("cost", "A step", "", cost)],
    ),
    "safety": (
        "Results: safety, many small runs",
        "Measured by `python studies/safety.py`: windows of 5 to 120 checkpoints, start points "
        "auto, SWA and last, by model, layer and channel, 0.2 to 5 epochs. Loss on held-out "
        "images (298 of Digits, 2,000 of FashionMNIST, of VGG16BN 512) or text (512 windows) that "
        "neither the run nor TWA saw, at the end over that at the start; the last column counts "
        "the runs whose final accuracy is at least that of the best of last, mean of last 5, and "
        "SWA (an image of Digits is 0.34 points). The GPT of 0.86 M weights had 3,000 steps of "
        "1,024 bytes of Python's library, 100 of them an epoch here; that text is the one on which "
        "the defaults for text were found. "
        "As it was: the paper's coordinates, SGD at a measured rate, from the mean of the window. "
        "The runs share checkpoints and images, so these rates are rough. Where training images "
        "are learned by heart, as 600 of Digits are, the sample of them can choose neither start "
        "nor end: give --split there. Remedies tried against it: AdamW's weight decay of 5 towards "
        "the start, a fifth of the images kept out to choose by, half the rate; on FashionMNIST "
        "none of them is needed. Decays of 2 and 10, a larger ε of AdamW, SGD in its place and a "
        "radius of 0.1 were tried on one more run each of two nets: they make the way shorter, and "
        "with the rises go the gains. Noise on the images looked right on one run and was "
        "no better on three seeds; noise on the coefficients helped that run less, and took the "
        "gains on FashionMNIST; with mixup and smoothed labels the start won. VGG16BN had 512 "
        "images of 32×32 for twenty epochs, after which it recognises half of the others. Of "
        "Digits, starts were uniform means alone.",
        [],
    ),
}

# The paper's runs: architecture, data set, epochs of SGD in the head, epochs of TWA.
PAPER = (
    ("VGG16BN", "CIFAR100", 100, 10),
    ("PreResNet164", "CIFAR100", 100, 10),
    ("resnet18", "ImageNet", 60, 2),
)


def papers() -> list[str]:
    """What the paper's runs would cost: counted operations, nothing that was run."""
    note = (
        "Not run here. The commands are in [head-stage.md](../head-stage.md) and "
        "[imagenet.md](../imagenet.md); this is what they take, with operations counted by "
        "PyTorch on the model, and hours for a GPU that sustains 20 TFLOP/s."
    )
    rows = []
    for arch, training, epochs, more in PAPER:
        on_imagenet = training == "ImageNet"
        images, size = (1_281_167, 224) if on_imagenet else (50_000, data.DATASETS[training].size)
        with torch.device("meta"):
            model = (
                models.imagenet.build(arch, 1000, size)
                if on_imagenet
                else models.build(arch, 100, 3, size)
            )
            with FlopCounterMode(display=False) as counter:
                model(torch.empty(2, 3, size, size)).sum().backward()
        operations = counter.get_total_flops() / 2 * images * (epochs + more)
        name = f"{arch} on {training}"
        hours = operations / 20e12 / 3600
        rows.append((name, f"{epochs} + {more}", f"{operations / 1e15:,.0f}", f"{hours:.1f}"))
    headings = ("model", "epochs of SGD + TWA", "training operations (10¹⁵)", "GPU hours")
    return ["", "## The paper's own set-up", "", paragraph(note), "", *markdown(headings, rows)]


EXTRA = {"cost": papers, "safety": lambda: ["", *stages.safety_table()]}
