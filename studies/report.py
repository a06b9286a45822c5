"""Writes the tables, figures and conclusions of every page from the JSON beside this file.

    python studies/report.py

The pages are Markdown; what lies between the marks `<!-- NAME: python studies/report.py -->` and
`<!-- end of NAME -->` is written here.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import conclusions
import head_report
import language_report
import stages
from tables import read, replace_block

STUDIES = Path(__file__).resolve().parent
TEXTS = {"linux": "lm/README.md", "python": "docs/results/language.md"}


def blocks(root: Path) -> dict[tuple[str, str], list[str]]:
    """The lines of every block, by page and name; draws the figures below `root`."""
    head, units = (read(STUDIES / "results", part) for part in ("head", "units"))
    figures = root / "studies/figures"
    texts = {text: language_report.read(STUDIES / "lm" / text) for text in TEXTS}
    first, page = next(iter(head.values())), "docs/results/head-stage.md"
    small = json.loads((STUDIES / "digits.json").read_text())
    found = {
        ("docs/RESULTS.md", "head stage"): conclusions.four_rows(first),
        ("docs/RESULTS.md", "claims"): conclusions.claims(head, texts["linux"]),
        (page, "head"): head_report.sections(head, figures, root / page),
        (page, "units"): head_report.units(units),
        ("docs/results/safety.md", "safety"): stages.safety_table(),
        ("docs/head-stage.md", "digits"): stages.digits_table(small),
        ("swa/README.md", "tail"): stages.tail_table(),
        ("soup/README.md", "soups"): stages.soup_table(),
    }
    for text, page in TEXTS.items():
        figure = figures / f"lm.{text}.loss.png"
        found[page, text] = language_report.sections(texts[text], figure, root / page)
    return found


def write(root: Path) -> None:
    """Writes the blocks of the pages below `root`."""
    (root / "studies/figures").mkdir(parents=True, exist_ok=True)
    for (page, name), lines in blocks(root).items():
        replace_block(root / page, name, lines)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    write(STUDIES.parent)
