"""The tables of docs/RESULTS.md: the head stage in four rows, and every claim with its error."""

from __future__ import annotations

import language_report as language
import stages
import tables
from tables import BY_CHANNEL, EPOCHS, HEAD, TUNED, Runs, best, cell, paired, scores

LONGEST = 5  # epochs after the head, in the four rows


def four_rows(runs: Runs) -> list[str]:
    """A mean, the defaults, the baseline at a tuned rate, the full run."""
    spent = str(HEAD + LONGEST)
    rows = [
        ("mean of the head's last 5 checkpoints", str(HEAD), *scores(runs, "mean of the last 5")),
        (BY_CHANNEL, spent, *scores(runs, f"{BY_CHANNEL} | {LONGEST}")),
        (TUNED, spent, *scores(runs, f"{TUNED} | {LONGEST}")),
        ("SGD, the full run", str(EPOCHS), *scores(runs, "SGD")),
    ]
    return tables.markdown(("solution", "epochs", "test accuracy (%)", "test loss"), rows)


def claims(head: dict[str, Runs], text: Runs) -> list[str]:
    """Each stage and budget by test loss: TWA, the best average, the best that trains all weights.

    Args:
        head: the studies of the head stage.
        text: the runs on the documentation of Linux.
    """
    rows = []

    def add(stage: str, how: str, runs: Runs, ours: str, average: str, baseline: str) -> None:
        names = {ours: how, average: average, baseline: baseline.partition(" | ")[0]}
        names[average] = language.titled(average)
        titled = [f"{cell(runs, n, 'loss', '.4f')} ({title})" for n, title in names.items()]
        less, apart = paired(runs, ours, baseline)
        rows.append((stage, *titled, f"{less:+.4f} ± {apart:.4f}"))

    for study, runs in head.items():
        for budget in tables.split(runs)[1]:
            ours, finer = f"{tables.ADVISED} | {budget}", f"{BY_CHANNEL} | {budget}"
            how = "by channel" if runs[0][ours] == runs[0][finer] else "by model"
            rivals = best(runs, tables.averages(runs)), best(runs, tables.trained(runs, budget))
            title = f"[head](results/head-stage.md), {study.partition(' ')[0]}, {budget} epochs"
            add(title, how, runs, ours, *rivals)
    tail, found = "SGD, from the best mean, the best of four rates", stages.tail()
    for rate in stages.TAILS:
        pairs = zip(found[f"swa{rate}.channel"], found[f"swa{rate}.sgd"], strict=True)
        runs = [run | {tail: other["SGD"]} for run, other in pairs]
        average = best(runs, ("SWA", "mean of last 5"))
        title = f"[tail](../swa/README.md) at rate {rate}, one epoch"
        add(title, "by channel", runs, "TWA", average, tail)
    runs = stages.soups()
    soup = best(runs, ("uniform", "greedy"))
    add("[soups](../soup/README.md)", "held-out images", runs, "TWA-v", soup, "best single model")
    for steps in language.BUDGETS:
        rivals = best(text, language.untrained(text)), best(text, language.decays_at(text, steps))
        for way in ("by model", "by channel"):
            title = f"[language model](../lm/README.md), {steps} steps"
            add(title, way, text, f"TWA {way} | {steps}", *rivals)
    headings = ("TWA", "the best average", "the best that trains all weights", "TWA less that")
    return tables.markdown(("stage", *headings), rows)
