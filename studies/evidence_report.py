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
from study import EPOCHS, HEAD, RESULTS, SAVES
from study import EVERY as APART
from tables import (
    ADVISED,
    BY_CHANNEL,
    BY_MODEL,
    SPREAD,
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
    ours = (ADVISED, BY_CHANNEL, BY_MODEL)
    against = [(row, TUNED, "the rival at its tuned rate") for row in ours]
    lines += ["Points of accuracy ahead, and by how much the loss is below, paired by seed:", ""]
    lines += compared(runs, against, budgets)
    if goals.measured(runs):
        for row in (ADVISED, BY_CHANNEL):
            lines += ["", f"The goals for “{row}”:", "", *goals.table(runs, row)]
    shown = [row for row in rows if row in (BY_CHANNEL, BY_MODEL) or row[:3] != "TWA"]
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


def units(runs: Runs, figure: Path) -> list[str]:
    return both(runs, "after so many epochs more", "validation")


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
        "on, which validation images of other seeds chose (below).",
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
        "The runs share checkpoints and images, so these rates are rough. Where training images "
        "are learned by heart, as 600 of Digits are, the sample of them can choose neither start "
        "nor end: give --split there. VGG16BN had 512 "
        "images of 32×32 for twenty epochs, after which it recognises half of the others. Of "
        "Digits, starts were uniform means alone.",
        [],
    ),
}


EXTRA = {"safety": lambda: ["", *stages.safety_table()]}
