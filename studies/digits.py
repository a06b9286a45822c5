"""Whether `run.sh` tells TWA from the full run on so few images: many seeds, judged by others.

    python studies/digits.py [--seeds 16]

The commands of `bash run.sh` on 600 images of Digits, into results/digits; what the other 298
training images say of each solution goes to `studies/digits.json`, where a seed that is there is
not run again. Test data choose nothing.
"""

import shutil
from functools import partial

from common import CPU, ROOT, Bench, Records, call_script, data, images
from stages import FULL

from training.run import run_script
from training.settings import Parser
from twa.files.checkpoints import Checkpoint, average, load_into

RESULTS, WORK = ROOT / "studies/digits.json", ROOT / "results/digits"
IMAGES, EPOCHS, HEAD = 600, 60, 30

TWA = {
    "TWA by model, 5 epochs": ("--epochs", 5, "--granularity", "model"),
    "TWA by layer, 10 epochs": ("--epochs", 10, "--granularity", "layer"),
    "TWA by channel, 10 epochs": ("--epochs", 10, "--granularity", "channel"),
}


def measured(seed: int) -> dict[str, list[float]]:
    """Loss and accuracy in percent of every solution of a run, by the images that it never saw."""
    folder = WORK / str(seed)
    checkpoints = [folder / f"checkpoints/{i}.pt" for i in range(EPOCHS + 1)]
    flags = ("--datasets", "Digits", "--arch", "PreResNet20", "--images", IMAGES)
    flags += ("--batch-size", 32, "--seed", seed, "-p", 100, "--resume")
    flags += ("--save-dir", folder / "checkpoints", "--log-dir", folder)
    call_script("train_sgd_cifar.py", *flags, "--epochs", EPOCHS, "--lr", 0.1)
    solutions: dict[str, Checkpoint] = {
        "last checkpoint of the head": checkpoints[HEAD],
        "mean of its last 5": average(checkpoints[HEAD - 4 : HEAD + 1]),
        "SWA": average(checkpoints[: HEAD + 1]),
    }
    for name, settings in TWA.items():
        out = folder / name.replace(" ", "_")
        window = ("--params_start", 0, "--params_end", HEAD + 1, "--out", out)
        call_script("train_twa.py", *flags, *window, *settings)
        solutions[name] = out / "twa.pt"
    solutions[FULL] = checkpoints[EPOCHS]
    training, _ = data.load("Digits", "", CPU)
    train = images(training.part(slice(IMAGES)), 32, train=True, seed=seed, amp=False)
    judge = images(training.part(slice(IMAGES, None)), 500, train=False, amp=False)
    bench, found = Bench("PreResNet20", train, seed, amp=False), {}
    for name, solution in solutions.items():
        load_into(bench.model, solution)
        tested = bench.measured(judge)
        found[name] = [tested["loss"], round(tested["accuracy"], 2)]
    shutil.rmtree(folder)
    return found


def main() -> None:
    parser = Parser(__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=16, help="how many, from 1 on")
    records = Records(RESULTS)
    for seed in range(1, parser.parse_args().seeds + 1):
        records.measure(str(seed), partial(measured, seed))


if __name__ == "__main__":
    run_script(main)
