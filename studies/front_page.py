"""The text of docs/RESULTS.md: conclusions, two tables, and where the rest is."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import language_report as language
import stages
from goals import measured, met
from study import EPOCHS, HEAD, ROOT
from tables import (
    ADVISED,
    BY_CHANNEL,
    SPREAD,
    TUNED,
    Runs,
    Studies,
    averages,
    best,
    budgets_of,
    bullet,
    gains,
    listed,
    markdown,
    mean,
    paragraph,
    scores,
    seeds,
    split,
    told,
    trained,
    values,
)

from training.coefficients import MANY_STEPS

SHOWN = ("0.5", "2", "5")  # epochs after the head, in the tables
SHOWN_STEPS = (20, 100, 400)  # of language models


def text(studies: Studies) -> str:
    """The page."""
    name, runs = shown(studies)
    lines = ["# Results", "", paragraph(INTRODUCTION), "", "## Conclusions", ""]
    for conclusion in CONCLUSIONS:
        lines += bullet(conclusion(studies))
    lines += ["", f"The head stage in four rows ({name}, {seeds(runs)}):", "", *four_rows(runs)]
    lines += ["", "Every stage in a row, by test loss:", "", *stage_rows(runs)]
    lines += ["", "## Language models", "", paragraph(LANGUAGE), "", FIGURE]
    lines += ["", "## Many machines", "", paragraph(MACHINES), "", NETWORK]
    lines += ["", "## By study", "", STUDIES, "", "## How it was measured", "", paragraph(METHOD)]
    return "\n".join(lines) + "\n"


def shown(studies: Studies) -> tuple[str, Runs]:
    """The study of the defaults in the head stage with the most seeds."""
    with_defaults = {
        name: runs for name, runs in studies["head"].items() if {*SHOWN} <= {*measured(runs)}
    }
    name = max(
        with_defaults, key=lambda name: len(values(with_defaults[name], f"{BY_CHANNEL} | 2"))
    )
    return name, with_defaults[name]


def four_rows(runs: Runs) -> list[str]:
    """A mean, the defaults, the rival at a tuned rate, the full run."""
    spent = str(HEAD + int(SHOWN[-1]))
    rows = [
        ("mean of the head's last 5 checkpoints", str(HEAD), *scores(runs, "mean of the last 5")),
        (BY_CHANNEL, spent, *scores(runs, f"{BY_CHANNEL} | {SHOWN[-1]}")),
        (TUNED, spent, *scores(runs, f"{TUNED} | {SHOWN[-1]}")),
        ("SGD, the full run", str(EPOCHS), *scores(runs, "SGD")),
    ]
    return markdown(("solution", "epochs", "test accuracy (%)", "test loss"), rows)


def stage_rows(runs: Runs) -> list[str]:
    """TWA, the best average and the best rival that trains all weights, in each stage."""

    def cell(of: Runs, name: str, called: str = "") -> str:
        row = (called or name).partition(" | ")[0]
        return f"{told(of, name, 'loss', '.4f')} ({row})"

    rows = []
    for budget in SHOWN:
        mean_of = best(runs, averages(runs))
        rival = best(runs, trained(runs, budget))
        ours, finer = (values(runs, f"{row} | {budget}", "loss") for row in (ADVISED, BY_CHANNEL))
        how = "by channel" if ours == finer else "by model"
        ours = cell(runs, f"{ADVISED} | {budget}", how)
        stage = f"[head](results/head-stage.md), {budget} epochs"
        rows.append((stage, ours, cell(runs, mean_of), cell(runs, rival)))
    tail = stages.tail()
    by_channel = tail["swa0.05.channel"]
    rows.append(
        (
            "[tail](../swa/README.md), one epoch",
            cell(by_channel, "TWA", "by channel"),
            cell(by_channel, best(by_channel, ("SWA", "mean of last 5"))),
            cell(tail["swa0.05.sgd"], "SGD", "SGD, from the best mean, the best of four rates"),
        )
    )
    soups = stages.soups()
    average = best(soups, ("uniform", "greedy"))
    rows.append(
        (
            "[soups](../soup/README.md)",
            cell(soups, "TWA-v", "held-out images"),
            cell(soups, average, f"{average} soup"),
            cell(soups, "best single model"),
        )
    )
    runs = language.read(ROOT / "studies/lm/linux")
    for steps in SHOWN_STEPS:
        ours, decays = f"TWA by model | {steps}", decays_at(runs, steps)
        if decays and values(runs, ours, "loss"):
            stage = f"[language model](../lm/README.md), {steps} steps"
            average, rival = best(runs, language.untrained(runs)), best(runs, decays)
            titles = [language.titled(n.removesuffix(f" | {steps}")) for n in (average, rival)]
            cells = [cell(runs, n, t) for n, t in zip((average, rival), titles, strict=True)]
            rows.append((stage, cell(runs, ours, "by model"), *cells))
    headings = ("stage", "TWA", "the best average", "the best that trains all weights")
    return markdown(headings, rows)


def decays_at(runs: Runs, steps: int) -> list[str]:
    """The decays that were measured with so many steps; tuned ones as validation text chose."""
    names = language.names_at(runs, steps)
    wanted = (names[title] for title in (*language.UNTUNED, *language.TUNED))
    return [name for name in wanted if name and values(runs, name, "loss")]


# --- the conclusions, each a sentence or two ---


def head_against_tuned(studies: Studies) -> str:
    by_study = []
    for name, verdicts in met(studies).items():
        runs = studies["head"][name]
        budgets = budgets_of(runs, ADVISED, TUNED)
        loss, accuracy = (
            [statistics.mean(gains(runs, ADVISED, b, key, f"{TUNED} | {b}")) for b in budgets]
            for key in ("loss", "accuracy")
        )
        by_study.append(
            f"{name}, {seeds(runs)}: {listed(f'{-gain:+.4f}' for gain in loss)} of loss, "
            f"{listed(f'{gain:+.2f}' for gain in accuracy)} points; {sum(verdicts)} of "
            f"{len(verdicts)} goals met"
        )
    return (
        "**Head stage: untuned, a match for a decay that is tuned.** TWA (by model in fewer than "
        f"{MANY_STEPS} steps, by channel from there on) less SGD on all weights at the best of "
        f"four rates, both from the best mean, at {listed(budgets)} epochs: {'. '.join(by_study)} "
        "([which](results/head-stage.md))."
    )


def head_against_averages(studies: Studies) -> str:
    _, runs = shown(studies)
    ahead = {}
    for key in ("accuracy", "loss"):
        average = best(runs, averages(runs), key)
        ahead[key] = [
            b
            for b in budgets_of(runs, ADVISED)
            if statistics.mean(gains(runs, ADVISED, b, key, average)) > 0
        ]
    return (
        "**Ahead of the averages, which cost nothing**: there, this TWA is better in the mean "
        f"than the best of them by loss at {listed(ahead['loss'])} epochs, by accuracy at "
        f"{listed(ahead['accuracy'])}."
    )


def no_epochs_saved(studies: Studies) -> str:
    def reach(row: str) -> str:
        """In how many of the studies that have the row it is as good as the full run, and when."""
        there, first = 0, []
        for runs in studies["head"].values():
            budgets = budgets_of(runs, row)
            there += bool(budgets)
            goal = mean(runs, "SGD", "accuracy")
            good = [b for b in budgets if mean(runs, f"{row} | {b}", "accuracy") >= goal]
            first += good[:1]
        when = f", {listed(dict.fromkeys(first))} epochs after the head" if first else ""
        return f"in {len(first)} of {there}{when}"

    below = [
        gain > 0
        for runs in studies["head"].values()
        if BY_CHANNEL in split(runs)[0]
        for gain in gains(runs, BY_CHANNEL, SHOWN[-1], "loss", "SGD")
    ]
    return (
        "**It saves no epochs that a decaying rate does not save.** Of the studies of the head, "
        f"the full run's accuracy after {EPOCHS} epochs is reached by plain SGD, decaying "
        f"from the head's last checkpoint, {reach('SGD, decaying, from the last checkpoint')}; "
        f"by TWA by channel {reach(BY_CHANNEL)}, and its loss is then below that of the full run "
        f"in {sum(below)} of {len(below)} runs."
    )


def tail(studies: Studies) -> str:
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


def soups(studies: Studies) -> str:
    runs = stages.soups()
    by_layer, whole = (
        statistics.mean(v["accuracy"] for v in values(runs, name, "validation"))
        for name in ("TWA-v layer", "TWA-v")
    )
    return (
        f"**Soups**: TWA-v ends at a loss of {mean(runs, 'TWA-v'):.4f} after "
        f"{mean(runs, 'TWA-v', 'seconds'):.0f} seconds, the greedy soup at "
        f"{mean(runs, 'greedy'):.4f} after {mean(runs, 'greedy', 'seconds'):.0f}; in accuracy "
        f"({told(runs, 'TWA-v')} and {told(runs, 'greedy')} %) they are not told apart. By layer, "
        f"{by_layer - whole:+.2f} points on the held-out images are "
        f"{mean(runs, 'TWA-v layer', 'accuracy') - mean(runs, 'TWA-v', 'accuracy'):+.2f} on test "
        "images."
    )


def language_models(studies: Studies) -> str:
    runs = language.read(ROOT / "studies/lm/linux")
    by_way = []
    for way in ("model", "channel"):
        differences = []
        for steps in language.BUDGETS:
            ours, decays = f"TWA by {way} | {steps}", decays_at(runs, steps)
            if decays and values(runs, ours, "loss"):
                rival = best(runs, [*decays, *language.untrained(runs)])
                difference, error = language.paired(runs, ours, rival)
                differences.append(f"{difference:+.4f} ± {error:.4f} at {steps}")
        by_way.append(f"by {way} {listed(differences)} steps")
    return (
        "**Language models: by channel ahead, untuned, of every rival that begins from the same "
        "run, on a text and seeds that were measured once** "
        f"([how](../lm/README.md#what-it-gives)). After a run of {language.STEPS:,} steps, TWA's "
        "loss less that of the best of all averages and decays, tuned ones included (± standard "
        f"error, {seeds(runs)}): {'; '.join(by_way)}. A schedule over the whole run is another "
        f"matter: schedule-free AdamW from the start ends at {mean(runs, language.WHOLE):.4f}, TWA "
        f"by channel with 400 steps more at {mean(runs, 'TWA by channel | 400'):.4f}."
    )


def safety(studies: Studies) -> str:
    runs = [
        figures
        for (how, _), found in stages.safety_rows().items()
        for figures in found
        if how == stages.TOLD["new"]
    ]
    ratio, _, beyond, _, accurate = zip(*runs, strict=True)
    above = [100 * (r - 1) for r, rose in zip(ratio, beyond, strict=True) if rose]
    largest, rose = max(zip(ratio, beyond, strict=True))
    return (
        f"**Safety**: of {len(runs)} small runs at the defaults {len(above)} end with a held-out "
        "loss above their start's by more than its standard error "
        f"({listed(f'{rise:.1f}' for rise in above)} %; the largest rise, "
        f"{100 * (largest - 1):.0f} %, is {'beyond' if rose else 'within'} its own); "
        f"{100 * sum(accurate) / len(runs):.0f} % have at least the accuracy of the best simple "
        "average ([runs](results/safety.md)). Where training images are learned by heart, no "
        "sample of them can choose."
    )


CONCLUSIONS: tuple[Callable[[Studies], str], ...] = (
    head_against_tuned,
    head_against_averages,
    no_epochs_saved,
    tail,
    soups,
    language_models,
    safety,
)
INTRODUCTION = (
    "Does Trainable Weight Averaging save epochs, does it beat the simple averages, and which "
    "settings are safe? Mean ± standard deviation over the seeds; test data chose nothing, but "
    "for what the [head stage](head-stage.md) and the [first runs on text](results/language.md) "
    "say. "
    "`bash studies/evidence.sh` makes the runs; `python studies/evidence.py report` writes this "
    "page and those behind it from the JSON in `studies/`."
)
LANGUAGE = (
    "A GPT of 0.86 M weights on the documentation of Linux; tables, rivals and what was not "
    "measured: [lm/README.md](../lm/README.md); on the source of Python's standard library: "
    "[the runs on which the defaults were found](results/language.md)."
)
FIGURE = "![Test loss over the steps that follow the run](../studies/figures/lm.linux.loss.png)"
MACHINES = (
    "Two hosts on wires of five speeds: replicated TWA sends 1.0 kB a step, DDP 1.09 MB of "
    "PreResNet20 and 14.8 MB of a net of 3.7 M weights. In as many steps TWA by channel ends 0.01 "
    "and 0.13 points below SGD on all weights; with twice as many, 0.44 and 0.53 points above. The "
    "accuracy at which SGD ends it then has, of the larger net, after 46 seconds at 100 Mbit/s "
    "and 85 at 10, DDP after 268 and 2,550; of PreResNet20 sooner at 10 Mbit/s, later from 100 on. "
    "What else was measured: [many machines](many-machines.md#two-hosts-on-a-slow-wire); larger "
    "models: [benchmarks](../benchmarks/README.md#many-ranks)."
)
NETWORK = "![Accuracy and loss against seconds](../benchmarks/figures/network.png)"
STUDIES = """\
- [Head stage](results/head-stage.md): two studies, six budgets, all rivals, the goals.
- [Tail stage](../swa/README.md#what-it-gives-fashionmnist): SWA, and TWA on top of it.
- [Soups](../soup/README.md#fashionmnist-three-seeds): twelve fine-tuned models.
- [Language models](../lm/README.md#what-it-gives): decays, averages and TWA.
- [Safety](results/safety.md): many small runs, and how often the end is worse than the start."""
METHOD = (
    f"Two CPU cores, bf16 autocast, batches of 128. The full run is SGD for {EPOCHS} epochs at "
    "rate 0.1, a tenth of it from the middle on and a hundredth from three quarters on. The *head* "
    f"is its first {HEAD} epochs, all at rate 0.1. “{SPREAD}” is what `train_twa.py` "
    "does: principal directions, AdamW at a rate that grows with the steps from 0.02 to 0.14, "
    f"falling linearly to 0, by channel from {MANY_STEPS} steps on in units of the "
    "block's spread, from the best mean of the last checkpoints; "
    "of start, end and the mean of the last half of training the best is kept, by loss on 1,024 "
    "training images, the last of an epoch (in the study of language, made before, the first, by "
    "which the start was chosen and where it has an advantage). The training set is "
    "the first 12,000 images of FashionMNIST (12k). The cnn of `studies/architectures.py` has no "
    "batch norm; where there is one, it is re-estimated for every solution. "
    "“Epochs” count what is trained on; comparing start points and ends takes forward passes "
    "beside them, on 2,048 images for each of twelve points: about two thirds of the work of an "
    "epoch on 12,000 images."
)
