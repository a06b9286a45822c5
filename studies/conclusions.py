"""The conclusions and the two tables of docs/RESULTS.md."""

from __future__ import annotations

import statistics

import head_report
import language_report as language
import stages
from tables import (
    ADVISED,
    BY_CHANNEL,
    EPOCHS,
    HEAD,
    MANY_STEPS,
    TUNED,
    Runs,
    averages,
    best,
    budgets_of,
    bullet,
    cell,
    gains,
    joined,
    markdown,
    mean,
    scores,
    seeds,
    trained,
    values,
)

SHOWN = ("0.5", "2", "5")  # epochs after the head, in the tables
SHOWN_STEPS = (20, 100, 400)  # of language models


def lines(head: dict[str, Runs], text: Runs) -> list[str]:
    """A bullet for each conclusion.

    Args:
        head: the studies of the head stage; the first is shown where there is room for one.
        text: the runs on the documentation of Linux.
    """
    first = next(iter(head.values()))
    paragraphs = [against_tuned(head), against_averages(first), no_epochs_saved(head)]
    paragraphs += [tail(), soups(), language_models(text), safety()]
    return [line for paragraph in paragraphs for line in bullet(paragraph)]


def four_rows(runs: Runs) -> list[str]:
    """A mean, the defaults, the baseline at a tuned rate, the full run."""
    spent = str(HEAD + int(SHOWN[-1]))
    rows = [
        ("mean of the head's last 5 checkpoints", str(HEAD), *scores(runs, "mean of the last 5")),
        (BY_CHANNEL, spent, *scores(runs, f"{BY_CHANNEL} | {SHOWN[-1]}")),
        (TUNED, spent, *scores(runs, f"{TUNED} | {SHOWN[-1]}")),
        ("SGD, the full run", str(EPOCHS), *scores(runs, "SGD")),
    ]
    return markdown(("solution", "epochs", "test accuracy (%)", "test loss"), rows)


def stage_rows(head: Runs, text: Runs) -> list[str]:
    """TWA, the best average and the best baseline that trains all weights, in each stage."""

    def loss(runs: Runs, name: str, title: str = "") -> str:
        row = (title or name).partition(" | ")[0]
        return f"{cell(runs, name, 'loss', '.4f')} ({row})"

    rows = []
    for budget in SHOWN:
        ours, finer = (values(head, f"{row} | {budget}", "loss") for row in (ADVISED, BY_CHANNEL))
        rows.append(
            (
                f"[head](results/head-stage.md), {budget} epochs",
                loss(
                    head, f"{ADVISED} | {budget}", f"by {'channel' if ours == finer else 'model'}"
                ),
                loss(head, best(head, averages(head))),
                loss(head, best(head, trained(head, budget))),
            )
        )
    tail, soups = stages.tail(), stages.soups()
    channel, average = tail["swa0.05.channel"], best(soups, ("uniform", "greedy"))
    rows += [
        (
            "[tail](../swa/README.md), one epoch",
            loss(channel, "TWA", "by channel"),
            loss(channel, best(channel, ("SWA", "mean of last 5"))),
            loss(tail["swa0.05.sgd"], "SGD", "SGD, from the best mean, the best of four rates"),
        ),
        (
            "[soups](../soup/README.md)",
            loss(soups, "TWA-v", "held-out images"),
            loss(soups, average, f"{average} soup"),
            loss(soups, "best single model"),
        ),
    ]
    for steps in SHOWN_STEPS:
        rivals = best(text, language.untrained(text)), best(text, language.decays_at(text, steps))
        cells = [
            loss(text, name, language.titled(name.removesuffix(f" | {steps}"))) for name in rivals
        ]
        ours = loss(text, f"TWA by model | {steps}", "by model")
        rows.append((f"[language model](../lm/README.md), {steps} steps", ours, *cells))
    headings = ("stage", "TWA", "the best average", "the best that trains all weights")
    return markdown(headings, rows)


def against_tuned(head: dict[str, Runs]) -> str:
    by_study = []
    for name, runs in head.items():
        budgets = budgets_of(runs, ADVISED, TUNED)
        loss, accuracy = (
            [statistics.mean(gains(runs, ADVISED, b, key, f"{TUNED} | {b}")) for b in budgets]
            for key in ("loss", "accuracy")
        )
        verdicts = [met for _, met in head_report.goals(runs, ADVISED).values() if met is not None]
        by_study.append(
            f"{name}, {seeds(runs)}: {joined(f'{-gain:+.4f}' for gain in loss)} of loss, "
            f"{joined(f'{gain:+.2f}' for gain in accuracy)} points; {sum(verdicts)} of "
            f"{len(verdicts)} goals met"
        )
    return (
        "**Head stage: untuned, a match for a decay that is tuned.** TWA (by model in fewer than "
        f"{MANY_STEPS} steps, by channel from there on) less SGD on all weights at the best of "
        f"four rates, both from the best mean, at {joined(budgets)} epochs: {'. '.join(by_study)} "
        "([which](results/head-stage.md))."
    )


def against_averages(runs: Runs) -> str:
    ahead = {}
    for key in ("accuracy", "loss"):
        average = best(runs, averages(runs), key)
        budgets = {b: gains(runs, ADVISED, b, key, average) for b in budgets_of(runs, ADVISED)}
        ahead[key] = joined(b for b, gain in budgets.items() if statistics.mean(gain) > 0)
    return (
        "**Ahead of the averages, which cost nothing**: there, this TWA is better in the mean "
        f"than the best of them by loss at {ahead['loss']} epochs, by accuracy at "
        f"{ahead['accuracy']}."
    )


def no_epochs_saved(head: dict[str, Runs]) -> str:
    def reach(row: str) -> str:
        """In how many of the studies the row is as good as the full run, and after how long."""
        first = [head_report.reached(runs, row) for runs in head.values()]
        good = [found.removeprefix("from ") for found in first if found.startswith("from")]
        return f"in {len(good)} of {len(head)}, {joined(dict.fromkeys(good))} epochs after the head"

    below = [
        gain > 0
        for runs in head.values()
        for gain in gains(runs, BY_CHANNEL, SHOWN[-1], "loss", "SGD")
    ]
    return (
        "**It saves no epochs that a decaying rate does not save.** Of the studies of the head, "
        f"the full run's accuracy after {EPOCHS} epochs is reached by plain SGD, decaying "
        f"from the head's last checkpoint, {reach('SGD, decaying, from the last checkpoint')}; "
        f"by TWA by channel {reach(BY_CHANNEL)}, and its loss is then below that of the full run "
        f"in {sum(below)} of {len(below)} runs."
    )


def tail() -> str:
    runs = stages.tail()

    def losses(how: str, name: str) -> str:
        """At both rates of the tail."""
        return " and ".join(f"{mean(runs[f'swa{rate}{how}'], name):.4f}" for rate in stages.TAILS)

    return (
        f"**Tail stage**: SWA ends at a loss of {losses('', 'SWA')}; one epoch of "
        f"TWA more at {losses('.spread', 'TWA')} by model, {losses('.channel', 'TWA')} by "
        f"channel; one of SGD on all weights, at the best of four rates, at "
        f"{losses('.sgd', 'SGD')}. SGD whose rate falls from the first epoch on ends at "
        f"{mean(runs['sgd'], 'SGD'):.4f}, without that epoch."
    )


def soups() -> str:
    runs = stages.soups()
    by_layer, whole = (
        statistics.mean(v["accuracy"] for v in values(runs, name, "validation"))
        for name in ("TWA-v layer", "TWA-v")
    )
    on_test = mean(runs, "TWA-v layer", "accuracy") - mean(runs, "TWA-v", "accuracy")
    return (
        f"**Soups**: TWA-v ends at a loss of {mean(runs, 'TWA-v'):.4f} after "
        f"{mean(runs, 'TWA-v', 'seconds'):.0f} seconds, the greedy soup at "
        f"{mean(runs, 'greedy'):.4f} after {mean(runs, 'greedy', 'seconds'):.0f}; in accuracy "
        f"({cell(runs, 'TWA-v')} and {cell(runs, 'greedy')} %) they differ by less than the noise. "
        f"By layer, {by_layer - whole:+.2f} points on the held-out images are {on_test:+.2f} on "
        "test images."
    )


def language_models(runs: Runs) -> str:
    by_way = []
    for way in ("model", "channel"):
        differences = []
        for steps in language.BUDGETS:
            rival = best(runs, [*language.decays_at(runs, steps), *language.untrained(runs)])
            difference, error = language.paired(runs, f"TWA by {way} | {steps}", rival)
            differences.append(f"{difference:+.4f} ± {error:.4f} at {steps}")
        by_way.append(f"by {way} {joined(differences)} steps")
    return (
        "**Language models: by channel ahead, untuned, of every rival that begins from the same "
        "run, on a text and seeds that were measured once** "
        f"([how](../lm/README.md#what-it-gives)). After a run of {language.STEPS:,} steps, TWA's "
        "loss less that of the best of all averages and decays, tuned ones included (± standard "
        f"error, {seeds(runs)}): {'; '.join(by_way)}. A schedule over the whole run is another "
        f"matter: schedule-free AdamW from the start ends at {mean(runs, language.WHOLE):.4f}, TWA "
        f"by channel with 400 steps more at {mean(runs, 'TWA by channel | 400'):.4f}."
    )


def safety() -> str:
    runs = list(stages.safety().values())
    above = joined(f"{100 * (run['ratio'] - 1):.1f}" for run in runs if run["rose"])
    accurate = 100 * sum(run["accurate"] for run in runs) / len(runs)
    largest = max(runs, key=lambda run: run["ratio"])
    return (
        f"**Safety**: of {len(runs)} small runs at the defaults {sum(run['rose'] for run in runs)} "
        "end with a held-out loss above their start's by more than its standard error "
        f"({above} %; the largest rise, {100 * (largest['ratio'] - 1):.0f} %, is "
        f"{'beyond' if largest['rose'] else 'within'} its own); "
        f"{accurate:.0f} % have at least the accuracy "
        "of the best simple average ([runs](results/safety.md)). Where the training images are "
        "memorised, training loss cannot select the start or the end."
    )
