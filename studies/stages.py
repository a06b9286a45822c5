"""Tail stage, soups and safety: what their own JSON says, and their tables."""

from __future__ import annotations

import json
import statistics

from study import ROOT
from tables import Runs, bullet, markdown, scores, spread, values

TOLD = {"new": "the defaults", "before": "as it was"}  # recipes of the safety study
TAILS = ("0.05", "0.1")  # rates of the tail
SOUPS = {  # the names of soup.py, as the table has them
    "ensemble": "ensemble (twelve times the work for each image)",
    "uniform": "uniform soup",
    "greedy": "greedy soup",
    "TWA-v layer": "TWA-v, a set of coefficients for each layer",
    "TWA-v layer 4 bits": "the same with a basis of 4 bits",
}


def tail() -> dict[str, Runs]:
    """SGD, SWA and TWA, from `swa/results/NAME.SEED.json`, by NAME."""
    runs: dict[str, Runs] = {}
    for path in sorted((ROOT / "studies/swa/results").glob("*.json")):
        name = path.stem.rpartition(".")[0]
        runs.setdefault(name, []).append(json.loads(path.read_text())["results"])
    return runs


def tail_table() -> list[str]:
    runs = tail()
    names = [("SGD, rate to 0.01 · lr_init", "sgd", "SGD")]
    for rate in TAILS:
        names += [
            (f"SGD in the tail (last checkpoint), swa_lr {rate}", f"swa{rate}.channel", "last"),
            (f"SWA, swa_lr {rate}", f"swa{rate}", "SWA"),
            (f"mean of the last 5, swa_lr {rate}", f"swa{rate}.channel", "mean of last 5"),
            (
                f"TWA, the paper's, from the last checkpoint, swa_lr {rate}",
                f"swa{rate}.paper",
                "TWA",
            ),
            (f"TWA, the paper's, from the mean, swa_lr {rate}", f"swa{rate}.mean", "TWA"),
            (f"TWA, its defaults, swa_lr {rate}", f"swa{rate}.spread", "TWA"),
            (f"TWA, its defaults, by channel, swa_lr {rate}", f"swa{rate}.channel", "TWA"),
            (f"SGD on all weights, as long, swa_lr {rate}", f"swa{rate}.sgd", "SGD"),
        ]
    rows = [
        (title, *scores(runs[name], solution), f"{runs[name][0][solution]['epochs']:.4g}")
        for title, name, solution in names
        if name in runs
    ]
    return markdown(("solution", "test accuracy (%)", "test loss", "epochs"), rows)


def soups() -> Runs:
    """Soups and what they are made of, from `soup/results/SEED.jsonl`."""
    runs: Runs = []
    for path in sorted((ROOT / "studies/soup/results").glob("*.jsonl")):
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


def recorded(name: str = "safety") -> dict[str, dict]:
    """The runs at the defaults and as it was; of "safety_remedies" those that were tried."""
    return json.loads((ROOT / f"studies/{name}.json").read_text())


def safety_rows() -> dict[tuple[str, str], list[tuple[float, ...]]]:
    """Figures of each run, by what was run and on which SGD runs.

    They are: the loss at the end over that at the start, whether it is above 1.05, whether the
    loss rose by more than its error, the worst epoch over the start, whether the accuracy is at
    least that of the simple averages.
    """
    records, tried = recorded(), {}
    chosen = {key.rpartition(": ")[0] for key in tried if key.count(": ") == 2}
    rows: dict[tuple[str, str], list[tuple[float, ...]]] = {}
    for key, entry in (records | tried).items():
        run, _, recipe = key.rpartition(": ")
        if "held out" not in entry:
            continue
        start, end, error = (entry["held out"][k] for k in ("start", "end", "error"))
        figures = (
            end / start,
            end > 1.05 * start,
            end - start > error > 0,
            max(entry["after"]) / start,
            as_accurate(records, run, entry),
        )
        case = run.partition(": ")[0]
        if recipe in TOLD:
            rows.setdefault((TOLD[recipe], case.rpartition(" ")[0]), []).append(figures)
        if run in chosen and recipe != "before":
            name = f"remedies: {TOLD.get(recipe, recipe)}"
            rows.setdefault((name, "some on Digits"), []).append(figures)
    return rows


def as_accurate(records: dict[str, dict], run: str, entry: dict) -> bool:
    """Whether a run ends with the accuracy of the best of last, mean of last 5, and SWA."""
    case, _, setting = run.partition(": ")
    averages = records[f"{case}: {setting.split()[0]}"].values()
    return entry["held out"]["accuracy"] >= max(averages) - 1e-4


def safety_table() -> list[str]:
    """Whether TWA leaves a model worse than it found it: defaults, as it was, and remedies."""
    rows = safety_rows()
    names = [*TOLD.values(), *sorted({how for how, _ in rows} - {*TOLD.values()})]
    rank = {name: place for place, name in enumerate(names)}
    table = []
    for (how, case), runs in sorted(rows.items(), key=lambda row: rank[row[0][0]]):
        ratio, over, beyond, worst, accurate = zip(*runs, strict=True)
        table.append(
            (
                *(how, case, str(len(runs)), f"{statistics.median(ratio):.3f}"),
                *(f"{max(ratio):.3f}", str(sum(over)), str(sum(beyond))),
                *(f"{max(worst):.2f}", f"{100 * sum(accurate) / len(runs):.0f} %"),
            )
        )
    heads = ("TWA", "SGD run", "runs", "end / start, median", "largest", "above 1.05")
    heads += ("above by more than its error", "worst epoch / start", "accuracy")
    return [*markdown(heads, table), "", *by_test_data(), *from_auto()]


def by_test_data() -> list[str]:
    """How many of the runs at the defaults end above their start by the other data kept away."""
    runs = [entry["test"] for key, entry in recorded().items() if key.endswith(": new")]
    ratios = [run["end"] / run["start"] for run in runs]
    beyond = sum(run["end"] - run["start"] > run["error"] for run in runs)
    return bullet(
        f"Judged by test data in place of held-out ones, {sum(r > 1.05 for r in ratios)} of the "
        f"{len(runs)} runs at the defaults end above 1.05 times their start's loss, at most at "
        f"{max(ratios):.3f}, and {beyond} above it by more than their error."
    )


def from_auto() -> list[str]:
    """How often the accuracy is that of the best average where the start is the scripts' own."""
    records = recorded()
    found: dict[str, list[bool]] = {}
    for key, entry in records.items():
        run, _, recipe = key.rpartition(": ")
        if recipe == "new" and " auto " in run:
            data, arch = key.split()[:2]
            where = data if arch != "VGG16BN" else f"{arch}'s few images"
            found.setdefault(where, []).append(as_accurate(records, run, entry))
    told = [f"{sum(good)} of {len(good)} ({where})" for where, good in found.items()]
    return bullet(
        "From the start that the scripts choose, the accuracy is that of the best average or "
        f"higher in {', '.join(told)}; from SWA and the last checkpoint, which may be far behind "
        "it, an epoch is often not enough."
    )
