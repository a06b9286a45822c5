"""The studies behind docs/RESULTS.md: one part a call, resumable; and the page itself.

    python evidence.py head --data FashionMNIST-12k --arch PreResNet20 --seed 1
    python evidence.py report            docs/RESULTS.md and its figures, from results/*.json

`bash evidence.sh` runs everything. A part trains what it needs with the project's own scripts, into
results/evidence of the repository, and adds what it measures to `results/PART.DATA.ARCH.SEED.json`
beside this file, one entry after the other; an entry that is there is not measured again. Test data
choose nothing: the parts that compare settings (CHOOSING) measure on training images that the run
never saw.
"""

import copy
import json
import statistics
from functools import partial
from pathlib import Path

import evidence_report
import tables
from study import (
    DATA,
    EPOCHS,
    HEAD,
    ROOT,
    SAVES,
    Bench,
    Method,
    ema,
    in_spread,
    sgd,
    weighted,
)

from training import entry, flags
from twa.files.checkpoints import load_into
from twa.subspace import UNITS

BUDGETS = (0.1, 0.2, 0.5, 1, 2, 5)  # epochs after the head
TUNED_RATES = (0.01, 0.02, 0.05, 0.1)  # of the rival whose rate is tuned
SQUEEZED = (1, 5)  # budgets at which SGD with its whole schedule is a rival
CHANNEL = {"granularity": "channel"}


def main():
    parser = flags.Parser("the studies behind RESULTS.md")
    parser.add_argument("part", choices=(*PARTS, "report"))
    parser.add_argument("--data", choices=DATA, default="FashionMNIST-12k", help="training set")
    arch_help = "architecture: a name of this project's, or module:function"
    parser.add_argument("--arch", default="PreResNet20", help=arch_help)
    parser.add_argument("--seed", type=int, default=1, help="of the run and of all that follows")
    parser.add_argument("--data-dir", default=ROOT / "datasets", type=Path, help="of data sets")
    args = parser.parse_args()
    if args.part == "report":
        evidence_report.write(ROOT)
    else:
        chooses = args.part in CHOOSING
        bench = Bench(args.part, args.data, args.arch, args.seed, args.data_dir, chooses)
        if chooses:
            bench.measure("mean of the last 10", lambda: bench.solution(bench.mean(10)))
        PARTS[args.part](bench)


def last(bench: Bench) -> Path:
    return bench.window()[-1]


METHODS = {
    "SGD, decaying, from the last checkpoint": Method(sgd, last),
    "SGD, decaying, from the mean of the last 5": Method(sgd, partial(Bench.mean, count=5)),
    "SGD, decaying, from the mean of the last 10": Method(sgd),
}
IN_SPREAD = {tables.BY_MODEL: {}, tables.BY_CHANNEL: CHANNEL}


def head(bench: Bench) -> None:
    """The head stage: TWA and its rivals at equal budgets, from the same twelve epochs."""
    bench.measure("SGD", partial(curve, bench))
    averages(bench)
    for budget in BUDGETS:
        for name, method in METHODS.items():
            bench.measure(f"{name} | {budget:g}", partial(bench.trained, method, budget))
        for name, basis in IN_SPREAD.items():
            method = in_spread(budget, **basis)
            bench.measure(f"{name} | {budget:g}", partial(bench.trained, method, budget))
        bench.measure(f"{tables.TUNED} | {budget:g}", partial(tuned, bench, budget))
    for budget in SQUEEZED:
        bench.measure(f"SGD, whole schedule | {budget:g}", partial(bench.end, HEAD + budget, 1))


def curve(bench: Bench) -> dict:
    """The entry of the full run: each epoch as the run tested it, and its end."""
    keys = ("epoch", "test_accuracy", "test_loss")
    seconds = statistics.median(m["seconds"] for m in bench.full)
    curve = [{key: m[key] for key in keys} for m in bench.full]
    return bench.end(EPOCHS, SAVES) | {"curve": curve, "epoch_seconds": seconds}


def tuned(bench: Bench, budget: float) -> dict:
    """The entry of SGD from the best mean, at the rate that is best on validation images.

    The first seed tries the rates; the others take what it chose.
    """
    rates = TUNED_RATES
    if bench.seed != 1:
        first = json.loads(bench.path.with_suffix("").with_suffix(".1.json").read_text())
        rates = (first[f"{tables.TUNED} | {budget:g}"]["lr"],)
    losses = {}
    for lr in rates:
        method = Method(partial(sgd, lr=lr), lambda bench: bench.best[0])
        entry = bench.spend(method, budget) | {"lr": lr}
        losses[lr] = bench.validation_loss()
        if losses[lr] == min(losses.values()):
            best, weights = entry, copy.deepcopy(bench.model.state_dict())
    load_into(bench.model, weights)
    return (
        bench.judged()
        | best
        | {"validation_losses": {str(lr): loss for lr, loss in losses.items()}}
    )


def averages(bench: Bench) -> None:
    """The averages of the head's checkpoints, without training."""
    window = bench.window()
    bench.measure("last checkpoint", lambda: bench.solution(window[-1]))
    for count in (5, 10, len(window)):
        name = f"mean of the last {count}" if count < len(window) else "mean of all (SWA)"
        bench.measure(name, lambda count=count: bench.solution(bench.mean(count)))
    bench.measure("EMA", lambda: bench.solution(weighted(window, ema(0.9, len(window)))))


def units(bench: Bench) -> None:
    """What coefficients count in, each at its own rate, beside SGD at the rate that was tuned."""
    tuned_rates = {0.1: 0.02, 0.2: 0.02, 0.5: 0.05, 1: 0.02, 2: 0.05, 5: 0.1}
    for budget, lr in tuned_rates.items():
        rival = Method(partial(sgd, lr=lr), lambda bench: bench.best[0])
        bench.measure(f"SGD on all weights | {budget:g}", partial(bench.trained, rival, budget))
        for unit in UNITS:
            method = in_spread(budget, "channel", unit)
            bench.measure(f"{unit} | {budget:g}", partial(bench.trained, method, budget))
        method = in_spread(budget)
        bench.measure(f"by model | {budget:g}", partial(bench.trained, method, budget))


PARTS = {"head": head, "units": units}
CHOOSING = ("units",)

if __name__ == "__main__":
    entry.run(main)
