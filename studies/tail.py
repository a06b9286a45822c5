"""The baseline of TWA in the tail: one epoch of SGD on all weights, from the best average.

    python studies/tail.py RUN SEED       to swa/results/RUN.sgd.SEED.json

RUN names an SWA run of swa/study.sh. The rate falls linearly, in seed 1 from each of four. All
60,000 images are trained on, so none is left to choose a rate by: the other seeds and the table
take the one with seed 1's lowest test loss, which favours the baseline.
"""

from common import CPU, ROOT, Bench, Records, data, images, sgd

from training.run import run_script
from training.settings import Parser
from twa.checkpoints import load_into

RATES = (0.005, 0.01, 0.02, 0.05)


def main() -> None:
    parser = Parser(__doc__.partition("\n")[0])
    parser.add_argument("run", help="an SWA run of swa/study.sh: swa0.05 or swa0.1")
    parser.add_argument("seed", type=int)
    run, seed = vars(parser.parse_args()).values()
    folder = ROOT / f"results/swa_study/{run}.{seed}/checkpoints"
    training, test = data.load("FashionMNIST", ROOT / "datasets", CPU)
    bench = Bench("PreResNet20", images(training, 128, train=True, seed=seed), seed)
    start, _, _ = bench.start(*(folder / f"{i}.pt" for i in range(5, 11)))
    path = ROOT / f"studies/swa/results/{run}.sgd.{seed}.json"
    first, results = Records(path.with_name(f"{run}.sgd.1.json")), {}
    for lr in RATES if seed == 1 else (first["results"]["SGD"]["lr"],):
        load_into(bench.model, start)
        bench.fit(sgd(bench.model, lr), len(bench.train))
        tested = bench.measured(images(test, 1000, train=False))
        results[f"SGD, {lr:g}"] = tested | {"epochs": 11, "lr": lr}
    results["SGD"] = min(results.values(), key=lambda found: found["loss"])
    Records(path).measure("results", lambda: results)


if __name__ == "__main__":
    run_script(main)
