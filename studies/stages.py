"""The tables of the tail stage, of soups, of safety and of the small runs on Digits."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from tables import Runs, bullet, error, markdown, scores, spread, values

STUDIES = Path(__file__).resolve().parent
TAILS = ("0.05", "0.1")  # rates of the tail
TAIL_ROWS = {  # what each row is called, with the run and the solution in it
    "SGD in the tail (last checkpoint)": (".channel", "last"),
    "SWA": ("", "SWA"),
    "mean of the last 5": (".channel", "mean of last 5"),
    "TWA, the paper's, from the last checkpoint": (".paper", "TWA"),
    "TWA, the paper's, from the mean": (".mean", "TWA"),
    "TWA, its defaults": (".spread", "TWA"),
    "TWA, its defaults, by channel": (".channel", "TWA"),
    "SGD on all weights, as long": (".sgd", "SGD"),
}
SOUPS = {  # the names of soup.py, as the table has them
    "ensemble": "ensemble (twelve times the work for each image)",
    "uniform": "uniform soup",
    "greedy": "greedy soup",
    "TWA-v layer": "TWA-v, a set of coefficients for each layer",
    "TWA-v layer 4 bits": "the same with a basis of 4 bits",
}
FULL = "SGD to its end"  # of the runs on Digits


def tail() -> dict[str, Runs]:
    """SGD, SWA and TWA, from `swa/results/NAME.SEED.json`, by NAME."""
    runs: dict[str, Runs] = {}
    for path in sorted((STUDIES / "swa/results").glob("*.json")):
        name = path.stem.rpartition(".")[0]
        runs.setdefault(name, []).append(json.loads(path.read_text())["results"])
    return runs


def tail_table() -> list[str]:
    runs = tail()
    names = [("SGD, rate to 0.01 · lr_init", "sgd", "SGD")]
    for rate in TAILS:
        for title, (run, solution) in TAIL_ROWS.items():
            names.append((f"{title}, swa_lr {rate}", f"swa{rate}{run}", solution))
    rows = [
        (title, *scores(runs[name], solution), f"{runs[name][0][solution]['epochs']:.4g}")
        for title, name, solution in names
    ]
    return markdown(("solution", "test accuracy (%)", "test loss", "epochs"), rows)


def soups() -> Runs:
    """Soups and what they are made of, from `soup/results/SEED.jsonl`."""
    runs: Runs = []
    for path in sorted((STUDIES / "soup/results").glob("*.jsonl")):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        runs.append({r["name"]: r | r["test"] for r in records if "models" in r})
    return runs


def soup_table() -> list[str]:
    runs, rows = soups(), []
    for name in dict.fromkeys(name for run in runs for name in run):
        validation = [scored["accuracy"] for scored in values(runs, name, "validation")]
        seconds = statistics.mean(values(runs, name, "seconds"))
        cells = (spread(validation, ".2f"), *scores(runs, name), f"{seconds:.0f}")
        rows.append((SOUPS.get(name, name), *cells))
    headings = ("validation accuracy", "test accuracy", "test loss", "seconds")
    return markdown(("solution", *headings), rows)


def safety_table() -> list[str]:
    """How often TWA leaves a model worse than it found it."""
    records = json.loads((STUDIES / "safety.json").read_text())
    cases: dict[str, list[dict]] = {}
    where: dict[str, list[bool]] = {}
    for key, entry in records.items():
        if "held out" not in entry:
            continue
        run, _, setting = key.partition(": ")
        (data, arch, _), held_out, test = run.split(), entry["held out"], entry["test"]
        averages = records[f"{run}: {setting.split()[0]}"].values()
        figures = {
            "ratio": held_out["end"] / held_out["start"],
            "rose": held_out["end"] - held_out["start"] > held_out["error"] > 0,
            "test ratio": test["end"] / test["start"],
            "test rose": test["end"] - test["start"] > test["error"],
            "worst": max(entry["after"]) / held_out["start"],
            "accurate": held_out["accuracy"] >= max(averages) - 1e-4,
        }
        cases.setdefault(f"{data} {arch}", []).append(figures)
        if " auto " in setting:
            name = data if arch != "VGG16BN" else f"{arch}'s few images"
            where.setdefault(name, []).append(figures["accurate"])
    rows = []
    for case, runs in cases.items():
        every = {key: [run[key] for run in runs] for key in runs[0]}
        ratio, accurate = every["ratio"], sum(every["accurate"]) / len(runs)
        cells = (case, str(len(runs)), f"{statistics.median(ratio):.3f}", f"{max(ratio):.3f}")
        cells += (str(sum(r > 1.05 for r in ratio)), str(sum(every["rose"])))
        rows.append((*cells, f"{max(every['worst']):.2f}", f"{100 * accurate:.0f} %"))
    heads = ("SGD run", "runs", "end / start, median", "largest", "above 1.05")
    heads += ("above by more than its error", "worst epoch / start", "accuracy")
    runs = [run for case in cases.values() for run in case]
    every = {key: [run[key] for run in runs] for key in runs[0]}
    over = sum(ratio > 1.05 for ratio in every["test ratio"])
    good = ", ".join(f"{sum(good)} of {len(good)} ({name})" for name, good in where.items())
    bullets = (
        f"{sum(every['rose'])} of the {len(runs)} runs end with a held-out loss above their "
        f"start's by more than its standard error; {100 * sum(every['accurate']) / len(runs):.0f} "
        "% have at least the accuracy of the best simple average.",
        f"Judged by test data in place of held-out ones, {over} of the {len(runs)} runs end above "
        f"1.05 times their start's loss, at most at {max(every['test ratio']):.3f}, and "
        f"{sum(every['test rose'])} above it by more than their error.",
        "From the start that the scripts choose, the accuracy is that of the best average or "
        f"higher in {good}; from SWA and the last checkpoint, which may be far behind it, an "
        "epoch is often not enough.",
    )
    return [*markdown(heads, rows), "", *(line for text in bullets for line in bullet(text))]


def digits_table(records: dict[str, dict[str, list[float]]]) -> list[str]:
    """Means over the seeds, and each solution less the full run, ± standard error."""
    rows = []
    for name in next(iter(records.values())):
        losses, accuracies = zip(*(found[name] for found in records.values()), strict=True)
        less = [found[name][0] - found[FULL][0] for found in records.values()]
        against = f"{statistics.mean(less):+.4f} ± {error(less):.4f}" if name != FULL else ""
        below = f"{sum(d < 0 for d in less)} of {len(less)}" if name != FULL else ""
        means = f"{statistics.mean(losses):.4f}", f"{statistics.mean(accuracies):.2f}"
        rows.append((name, *means, against, below))
    heads = ("solution", "loss", "accuracy (%)", "loss, less the full run's", "below it in")
    return markdown(heads, rows)
