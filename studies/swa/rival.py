"""The rival of TWA in the tail: one epoch of SGD on all weights, from the best average.

    python rival.py RUN SEED       to results/RUN.sgd.SEED.json

RUN names an SWA run of study.sh. The rate falls linearly, in seed 1 from each of four. All 60,000
images are trained on, so there are none to choose a rate by: the other seeds and the table take the
one with seed 1's lowest test loss, which favours the rival.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from study import BATCH, ROOT, fit

import utils
from training import data
from training.files import write_json
from training.loop import build, evaluate, reestimate_bn, sample_loss
from twa import best_start
from twa.files.checkpoints import load_into

RATES = (0.005, 0.01, 0.02, 0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description="the rival of TWA in the tail")
    parser.add_argument("run", help="an SWA run of study.sh: swa0.05 or swa0.1")
    parser.add_argument("seed", type=int)
    args = parser.parse_args()
    run, seed = args.run, args.seed
    window = [ROOT / f"results/swa_study/{run}.{seed}/checkpoints/{i}.pt" for i in range(5, 11)]
    utils.set_seed(seed)
    images, test = data.load("FashionMNIST", ROOT / "datasets", torch.device("cpu"))
    train = data.Loader(images, BATCH, train=True, seed=seed, channels_last=True)
    judge = data.Loader(test, 1000, train=False, channels_last=True)
    model = build("PreResNet20", images.spec, torch.device("cpu"), amp=True)
    start, _ = best_start(model, window, lambda: sample_loss(model, train, amp=True))
    kept = ROOT / f"studies/swa/results/{run}.sgd.{seed}.json"
    rates = RATES
    if seed != 1:
        first = json.loads(kept.with_suffix("").with_suffix(".1.json").read_text())
        rates = (first["results"]["SGD"]["lr"],)
    results = {}
    for lr in rates:
        load_into(model, start)
        sgd = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=1e-4)
        fit(model, train, sgd, len(train), "linear")
        reestimate_bn(model, train, amp=True)
        name = f"SGD, {lr:g}"
        results[name] = evaluate(model, judge, amp=True) | {"epochs": 11, "lr": lr}
        print(run, seed, name, results[name], flush=True)
    results["SGD"] = min(results.values(), key=lambda found: found["loss"])
    write_json({"results": results}, kept)


if __name__ == "__main__":
    main()
