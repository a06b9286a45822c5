"""Whether `run.sh` tells TWA from the full run on so few images: many seeds, judged by others.

    python studies/digits.py [--seeds 16]

The commands of `bash run.sh` on 600 images of Digits, into results/digits; what the other 298
training images say of each solution goes to `studies/digits.json`, where a seed that is there is
not run again. Prints the table of docs/head-stage.md. Nothing is chosen by test data.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tables import markdown

from training import data
from training.files import write_json
from training.loop import build, evaluate, reestimate_bn
from twa.files.checkpoints import Checkpoint, average, load_into

ROOT = Path(__file__).resolve().parents[1]
RESULTS, WORK = ROOT / "studies/digits.json", ROOT / "results/digits"
IMAGES, EPOCHS, HEAD = 600, 60, 30
FULL = "SGD to its end"
TWA = {
    "TWA by model, 5 epochs": ("--epochs", "5"),
    "TWA by layer, 10 epochs": ("--epochs", "10", "--granularity", "layer"),
    "TWA by channel, 10 epochs": ("--epochs", "10", "--granularity", "channel"),
}


def measured(seed: int) -> dict[str, list[float]]:
    """Loss and accuracy in percent of every solution of a run, by the images that it never saw."""
    folder = WORK / str(seed)
    checkpoints = [folder / f"checkpoints/{i}.pt" for i in range(EPOCHS + 1)]
    common = ["--datasets", "Digits", "--arch", "PreResNet20", "--images", str(IMAGES)]
    common += ["--batch-size", "32", "--seed", str(seed), "-p", "100", "--resume"]
    common += ["--save-dir", str(folder / "checkpoints"), "--log-dir", str(folder)]

    def call(script: str, *further: str) -> None:
        command = [sys.executable, str(ROOT / script), *common, *further]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    call("train_sgd_cifar.py", "--epochs", str(EPOCHS), "--lr", "0.1")
    solutions: dict[str, Checkpoint] = {
        "last checkpoint of the head": checkpoints[HEAD],
        "mean of its last 5": average(checkpoints[HEAD - 4 : HEAD + 1]),
        "SWA": average(checkpoints[: HEAD + 1]),
    }
    for name, settings in TWA.items():
        out = folder / name.replace(" ", "_")
        window = ("--params_start", "0", "--params_end", str(HEAD + 1))
        call("train_twa.py", *window, *settings, "--out", str(out))
        solutions[name] = out / "twa.pt"
    solutions[FULL] = checkpoints[EPOCHS]

    images, _ = data.load("Digits", "", torch.device("cpu"))
    train = data.Loader(images.part(slice(IMAGES)), 32, train=True, seed=seed)
    judge = data.Loader(images.part(slice(IMAGES, None)), 500, train=False)
    model, found = build("PreResNet20", images.spec, torch.device("cpu")), {}
    for name, solution in solutions.items():
        load_into(model, solution)
        reestimate_bn(model, train)
        tested = evaluate(model, judge)
        found[name] = [round(tested["loss"], 5), round(tested["accuracy"], 2)]
    shutil.rmtree(folder)
    return found


def table(records: dict[str, dict[str, list[float]]]) -> list[str]:
    """Means over the seeds, and each solution less the full run, ± standard error."""
    rows = []
    for name in next(iter(records.values())):
        losses, accuracies = zip(*(found[name] for found in records.values()), strict=True)
        less = [found[name][0] - found[FULL][0] for found in records.values()]
        error = statistics.stdev(less) / len(less) ** 0.5 if len(less) > 1 else 0.0
        against = f"{statistics.mean(less):+.4f} ± {error:.4f}" if name != FULL else ""
        below = f"{sum(d < 0 for d in less)} of {len(less)}" if name != FULL else ""
        means = f"{statistics.mean(losses):.4f}", f"{statistics.mean(accuracies):.2f}"
        rows.append((name, *means, against, below))
    heads = ("solution", "loss", "accuracy (%)", "loss, less the full run's", "below it in")
    return markdown(heads, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="run.sh on many seeds, judged by held-out images")
    parser.add_argument("--seeds", type=int, default=16, help="how many, from 1 on")
    args = parser.parse_args()
    records = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for seed in map(str, range(1, args.seeds + 1)):
        if seed not in records:
            records[seed] = measured(int(seed))
            write_json(records, RESULTS)
            print(seed, records[seed], flush=True)
    print("\n".join(table(records)))


if __name__ == "__main__":
    main()
