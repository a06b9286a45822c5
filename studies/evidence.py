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
import resource
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

import evidence_report
import tables
import torch
from study import (
    DATA,
    EPOCHS,
    HEAD,
    ROOT,
    SAVES,
    Bench,
    Method,
    ema,
    fit,
    in_spread,
    loss_of,
    sgd,
    twa,
    weighted,
)
from torch.nn import functional as F
from torch.nn.utils import vector_to_parameters

from training import entry
from training.loop import autocast
from training.settings import Parser
from twa import TWA, Subspace
from twa.files.checkpoints import Checkpoint, load_into
from twa.subspace import UNITS

BUDGETS = (0.1, 0.2, 0.5, 1, 2, 5)  # epochs after the head
TUNED_RATES = (0.01, 0.02, 0.05, 0.1)  # of the rival whose rate is tuned
SQUEEZED = (1, 5)  # budgets at which SGD with its whole schedule is a rival
IMAGES = (200, 1000, 5000)  # held-out images
CHANNEL = {"granularity": "channel"}
LAYER = {"granularity": "layer"}


def main():
    parser = Parser("the studies behind RESULTS.md")
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
        if chooses and DATA[args.data].images is None:
            parser.error(f"{args.part} needs images to choose by: give --data FashionMNIST-12k")
        bench = Bench(args.part, args.data, args.arch, args.seed, args.data_dir, chooses)
        if chooses:
            bench.measure(tables.START, lambda: bench.solution(bench.mean(10)))
        PARTS[args.part](bench)


def last(bench: Bench) -> Path:
    return bench.window()[-1]


METHODS = {
    "SGD, decaying, from the last checkpoint": Method(sgd, last),
    "SGD, decaying, from the mean of the last 5": Method(sgd, partial(Bench.mean, count=5)),
    "SGD, decaying, from the mean of the last 10": Method(sgd),
    "TWA": Method(twa()),
    "TWA by layer": Method(twa(**LAYER)),
    "TWA by channel": Method(twa(**CHANNEL)),
    tables.RECIPE: Method(twa(torch.optim.AdamW, **CHANNEL), partial(Bench.mean, count=5)),
}
IN_SPREAD = {tables.BY_MODEL: {}, tables.BY_CHANNEL: CHANNEL}
# Below one epoch: Adam's first steps are too long for the few that follow.
BRIEF = {tables.RECIPE: Method(twa(**CHANNEL), partial(Bench.mean, count=5))}


def head(bench: Bench) -> None:
    """The head stage: TWA and its rivals at equal budgets, from the same twelve epochs."""
    bench.measure("SGD", partial(curve, bench))
    averages(bench)
    for budget in BUDGETS:
        for name, method in (METHODS | (BRIEF if budget < 1 else {})).items():
            bench.measure(f"{name} | {budget:g}", partial(bench.trained, method, budget))
    for budget in SQUEEZED:
        bench.measure(f"SGD, whole schedule | {budget:g}", partial(bench.end, HEAD + budget, 1))


def spread(bench: Bench) -> None:
    """The head stage again: TWA in units of the spread, and the rival whose rate is tuned."""
    for budget in BUDGETS:
        for name, basis in IN_SPREAD.items():
            method = in_spread(budget, **basis)
            bench.measure(f"{name} | {budget:g}", partial(bench.trained, method, budget))
        bench.measure(f"{tables.TUNED} | {budget:g}", partial(tuned, bench, budget))


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


def checkpoints(bench: Bench) -> None:
    """How many checkpoints, how often, and from which epoch on; from the mean of two epochs."""
    for saves in (1, 2, 5, 10, 20):
        for first in (0, 4, 8, 10):
            window = partial(Bench.window, first=first, every=SAVES // saves)
            bench.measure(
                f"{saves} an epoch | {first}",
                lambda window=window: (
                    bench.trained(Method(twa(window=window))) | {"count": len(window(bench))}
                ),
            )


def rates(bench: Bench) -> None:
    """How far the default rate of the coefficients is from the best, over three decades."""
    adamw = partial(twa, torch.optim.AdamW)
    kinds = {
        "SGD": twa,
        "SGD by layer": partial(twa, **LAYER),
        "SGD by channel": partial(twa, **CHANNEL),
        "AdamW": adamw,
        "AdamW by channel": partial(adamw, **CHANNEL),
    }
    for factor in (1, 1 / 32, 1 / 10, 1 / 3.2, 3.2, 10, 32):
        for name, make in kinds.items():
            method = Method(make(factor=factor))
            bench.measure(f"{name} | {factor:.3g}", partial(bench.trained, method))


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


def settings(bench: Bench) -> None:
    """One setting changed at a time; one epoch, the rest as in the head stage."""
    for name, basis in {"model": {}, "layer": LAYER, "channel": CHANNEL}.items():

        def measure(setting: str, method: Method, epochs: float = 1, of: str = name) -> None:
            bench.measure(f"{setting} | {of}", partial(bench.trained, method, epochs))

        measure("as in the head stage", Method(twa(**basis)))
        adamw = twa(torch.optim.AdamW, **basis)
        for count in (1, 3, 5, 60):
            start = partial(Bench.mean, count=count)
            measure(f"from the mean of the last {count}", Method(twa(**basis), start))
        for count in (3, 5, 10):
            start = partial(Bench.mean, count=count)
            measure(f"AdamW, from the mean of the last {count}", Method(adamw, start))
        for bits in (8, 4):
            measure(f"{bits} bits", Method(twa(bits=bits, **basis)))
        for components in (3, 12, 24):
            method = Method(twa(extract="PCA", components=components, **basis))
            measure(f"{components} principal directions", method)
        for decay in (0.0, 1e-3, 1e-1):
            measure(f"weight decay {decay:g}", Method(twa(weight_decay=decay, **basis)))
        for schedule in ("constant", "cosine", "step"):
            measure(f"{schedule} rate", Method(twa(**basis), schedule=schedule))


def second_order(bench: Bench) -> None:
    """L-BFGS and Newton's method on the coefficients, against SGD; epochs count every pass."""
    for epochs in (1, 10):
        bench.measure(f"SGD | {epochs}", partial(bench.trained, Method(twa()), epochs))
        bench.measure(f"L-BFGS | {epochs}", partial(lbfgs, bench, epochs))
        bench.measure(f"Newton | {epochs}", partial(newton, bench, epochs))


def full_batch(bench: Bench, optimizer: TWA, batches: int):
    """A closure over the first batches of an epoch, which keeps the graph of one at a time."""
    bench.train.set_epoch(1)
    parts = list(islice(bench.train, batches))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        return sum(loss_of(bench.model, *part, 1 / batches) for part in parts)

    return closure


def lbfgs(bench: Bench, epochs: int) -> dict:
    """L-BFGS for twelve passes, each over as many batches as the budget allows."""
    passes = 12
    load_into(bench.model, bench.mean(10))
    optimizer = TWA(
        *(bench.model, bench.window(), torch.optim.LBFGS),
        **{"start": bench.mean(10), "lr": 1.0, "max_iter": passes, "max_eval": passes},
        **{"line_search_fn": "strong_wolfe", "extract": "Schmidt"},
    )
    bench.model.train()
    closure = full_batch(bench, optimizer, max(1, epochs * len(bench.train) // passes))
    return {"train_loss": float(optimizer.step(closure))} | bench.judged()


class NewtonStep(torch.optim.Optimizer):
    """A step of `-(|H| + damping)⁻¹ g`, H by differences of gradients, one for each coefficient.

    `|H|` has the eigenvectors of H and the magnitudes of its eigenvalues, so that the step descends
    along directions of negative curvature as well.
    """

    def __init__(self, parameters, damping: float = 0.1):
        super().__init__(parameters, {"damping": damping})

    @torch.no_grad()
    def step(self, closure) -> torch.Tensor:
        (group,) = self.param_groups
        (coefficients,) = group["params"]
        length = 0.01  # of the window's spread
        here = coefficients.clone()

        def gradient(at: torch.Tensor) -> torch.Tensor:
            coefficients.copy_(at)
            with torch.enable_grad():
                self.loss = closure()
            return coefficients.grad.double()

        start = gradient(here)
        units = torch.eye(len(here)).to(here)
        hessian = torch.stack([gradient(here + length * u) - start for u in units]) / length
        values, vectors = torch.linalg.eigh((hessian + hessian.T) / 2)
        values = values.abs() + group["damping"] * values.abs().max()
        step = vectors @ ((vectors.T @ start) / values)
        coefficients.copy_(here - step.float())
        return self.loss


def newton(bench: Bench, epochs: int) -> dict:
    """Two Newton steps in the twelve leading directions, each on as much as the budget allows."""
    steps = 2
    load_into(bench.model, bench.mean(10))
    optimizer = TWA(
        *(bench.model, bench.window(), NewtonStep),
        **{"start": bench.mean(10), "components": 12},
    )
    bench.model.train()
    passes = steps * (len(optimizer.subspace) + 1)
    closure = full_batch(bench, optimizer, max(1, epochs * len(bench.train) // passes))
    for _ in range(steps):
        loss = optimizer.step(closure)
    return {"train_loss": float(loss)} | bench.judged()


def little(bench: Bench) -> None:
    """Training on a few held-out images with right labels, as if the training set were gone.

    Batch norm is then re-estimated on these images as well. On the noisy set the labels of the
    training set are wrong in part, those of the held-out images are not.
    """
    averages(bench)
    bench.measure("SGD, full run", partial(bench.end, EPOCHS, SAVES))
    for name, method in METHODS.items():
        bench.measure(f"{name} | training set", partial(bench.trained, method))
    for images in IMAGES:
        some = bench.held_out(images)
        bench.measure(
            f"mean of the last 10 | {images}",
            lambda some=some: bench.solution(bench.mean(10), some),
        )
        for name, method in METHODS.items():
            alone = Method(method.optimizer, method.start, method.schedule, images)
            bench.measure(f"{name} | {images}", partial(bench.trained, alone))


def cost(bench: Bench) -> None:
    """Milliseconds of a step, seconds before the first step, and bytes.

    The median of three rounds, in which the methods take turns, since a machine's speed drifts.
    """
    bases = {
        f"TWA, {bits} bits | {granularity}": {"granularity": granularity, "bits": bits}
        for granularity in ("model", "layer", "channel")
        for bits in (32, 8, 4)
    }
    ways = {"SGD": sgd} | {name: twa(**basis) for name, basis in bases.items()}
    if ways.keys() <= bench.records.keys():
        return
    rounds = [{name: cost_of(bench, make) for name, make in ways.items()} for _ in range(3)]
    for name in ways:
        parts = [each[name] for each in rounds]
        entry = {key: statistics.median(part[key] for part in parts) for key in parts[0]}
        if name in bases:
            started = time.perf_counter()
            subspace = Subspace(bench.model, bench.window(), extract="Schmidt", **bases[name])
            entry["build_seconds"] = time.perf_counter() - started
            entry |= {"basis_bytes": subspace.nbytes, "coefficients": len(subspace)}
        bench.measure(name, lambda entry=entry: entry)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    bench.measure("process", lambda: {"peak_bytes": peak, "steps_an_epoch": len(bench.train)})


def cost_of(bench: Bench, make: Callable) -> dict:
    """The mean cost of twenty steps, after as many for warming up."""
    steps = 20
    load_into(bench.model, bench.mean(10))
    started = time.perf_counter()
    optimizer, clock = make(bench, bench.train), []
    before = time.perf_counter() - started
    optimizer.register_step_pre_hook(lambda *_: clock.append(-time.perf_counter()))
    optimizer.register_step_post_hook(lambda *_: clock.append(time.perf_counter()))
    for _ in range(2):
        clock.clear()
        started = time.perf_counter()
        fit(bench.model, bench.train, optimizer, steps, "constant")
        whole = time.perf_counter() - started
    milliseconds = {"step_ms": 1e3 * whole / steps, "optimizer_ms": 1e3 * sum(clock) / steps}
    return milliseconds | {"setup_seconds": before}


def plane(bench: Bench) -> None:
    """The training loss on the plane through the solutions of SGD, SWA and TWA.

    The mean over 1024 images, batch norm with the statistics of the batch.
    """
    if "plane" in bench.records:
        return
    model, solutions = bench.model, {}

    def weights_of(checkpoint: Checkpoint) -> torch.Tensor:
        load_into(model, checkpoint)
        return torch.cat([p.detach().flatten().double() for p in model.parameters()])

    bench.trained(METHODS["TWA"])
    solutions["TWA"] = weights_of(copy.deepcopy(model.state_dict()))
    solutions["SGD"] = weights_of(last(bench))
    solutions["SWA"] = weights_of(bench.mean(len(bench.window())))
    origin = solutions["SGD"]
    axes, _ = torch.linalg.qr(torch.stack([solutions[s] - origin for s in ("SWA", "TWA")], dim=1))
    points = torch.stack([axes.T @ (w - origin) for w in solutions.values()])
    low, high = points.min(0).values, points.max(0).values
    margin = 0.5 * (high - low).max()
    xs, ys = (torch.linspace(low[i] - margin, high[i] + margin, 21).tolist() for i in (0, 1))

    bench.train.set_epoch(1)
    images, labels = map(torch.cat, zip(*islice(bench.train, 8), strict=True))
    model.train()

    @torch.no_grad()
    def loss_at(x: float, y: float) -> float:
        weights = origin + axes @ torch.tensor([x, y]).double()
        vector_to_parameters(weights.float(), model.parameters())
        with autocast(images.device, True):
            return F.cross_entropy(model(images), labels).item()

    losses = [[loss_at(x, y) for x in xs] for y in ys]
    named = {name: point.tolist() for name, point in zip(solutions, points, strict=True)}
    bench.measure("plane", lambda: {"x": xs, "y": ys, "loss": losses, "points": [named]})


PARTS = {
    part.__name__.replace("_", "-"): part
    for part in (
        *(head, spread, units, rates, settings, checkpoints, second_order, little, cost, plane),
    )
}
CHOOSING = ("units", "rates", "settings", "checkpoints", "second-order")

if __name__ == "__main__":
    entry.run(main)
