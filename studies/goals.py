"""The goals that were set for TWA in the head stage, and which of them are met."""

from __future__ import annotations

import statistics

from tables import (
    ADVISED,
    BY_CHANNEL,
    TUNED,
    Runs,
    Studies,
    budgets_of,
    error,
    gains,
    listed,
    markdown,
    rival,
)

GOALS = (
    "ahead of the rival at its tuned rate at half of the budgets",
    "nowhere behind it by more than a standard error",
    "up to one epoch, ahead of every average and every rival at its usual rate",
)


def met(studies: Studies) -> dict[str, list[bool]]:
    """Which goals are met, by study."""
    return {
        name: [verdict for _, verdict in verdicts(runs, ADVISED).values() if verdict is not None]
        for name, runs in studies["head"].items()
        if measured(runs)
    }


def measured(runs: Runs) -> list[str]:
    """The budgets at which the defaults and the rival at a tuned rate were measured."""
    return budgets_of(runs, BY_CHANNEL, TUNED)


def verdicts(runs: Runs, row: str) -> dict[tuple[str, str], tuple[str, bool | None]]:
    """Where the goals are met: TWA, untuned, against the tuned rival and the untuned ones.

    Args:
        row: of TWA.

    Returns:
        Of each goal and key, the budgets that decide it, and the verdict; None: not from one seed.
    """
    budgets, found = measured(runs), {}
    for key in ("accuracy", "loss"):
        against = {b: gains(runs, row, b, key, f"{TUNED} | {b}") for b in budgets}
        means = {b: statistics.mean(gain) for b, gain in against.items()}
        several = all(len(gain) > 1 for gain in against.values())
        ahead = [b for b in budgets if means[b] > 0]
        behind = [b for b in budgets if several and means[b] < -error(against[b])]
        short = [b for b in budgets if float(b) <= 1]
        usual = {
            b: statistics.mean(gains(runs, row, b, key, rival(runs, b, key, tuned=False)))
            for b in short
        }
        lost = [b for b in short if usual[b] <= 0]
        found |= {
            (GOALS[0], key): (f"ahead at {listed(ahead)}", 2 * len(ahead) >= len(budgets)),
            (GOALS[1], key): (f"behind at {listed(behind)}", not behind if several else None),
            (GOALS[2], key): (f"not ahead at {listed(lost)}" if lost else "ahead at all", not lost),
        }
    return found


def table(runs: Runs, row: str) -> list[str]:
    said = {True: "met", False: "not met", None: "no verdict from one seed"}
    found, rows = verdicts(runs, row), []
    for goal in GOALS:
        cells = [found[goal, key] for key in ("accuracy", "loss")]
        rows.append((goal, *(f"{where}: {said[verdict]}" for where, verdict in cells)))
    return markdown(("goal", "by accuracy", "by loss"), rows)
