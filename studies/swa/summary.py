"""The table of the study: mean ± standard deviation over the seeds, from the runs' own JSON.

    python summary.py

Reads `results/*.json`, which `study.sh` writes, and prints Markdown.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from training.report import spread

# Row of the table: (file of a seed, solution in it).
ROWS = {
    "SGD, rate to 0.01 · lr_init": ("sgd.{seed}", "SGD"),
    "SGD in the tail (last checkpoint), swa_lr {rate}": ("swa{rate}.{seed}", "SGD"),
    "SWA, swa_lr {rate}": ("swa{rate}.{seed}", "SWA"),
    "TWA from the last checkpoint, swa_lr {rate}": ("swa{rate}.{seed}.paper", "TWA"),
    "TWA from the mean, swa_lr {rate}": ("swa{rate}.{seed}.mean", "TWA"),
}


def main():
    folder = Path(__file__).parent / "results"
    seeds = sorted({path.name.split(".")[-2] for path in folder.glob("*[0-9].json")})
    print("| solution | test accuracy (%) | test loss | epochs |")
    print("| --- | --- | --- | --- |")
    rows = [
        (title.replace("{rate}", rate), file.replace("{rate}", rate), solution)
        for rate in ("0.05", "0.1")
        for title, (file, solution) in ROWS.items()
    ]
    for title, file, solution in dict.fromkeys(rows):
        found = defaultdict(list)
        for seed in seeds:
            path = folder / f"{file.format(seed=seed)}.json"
            if path.exists():
                result = json.loads(path.read_text())["results"][solution]
                for key, value in result.items():
                    found[key].append(value)
        if len(found["accuracy"]) > 1:
            accuracy, loss = spread(found["accuracy"], ".2f"), spread(found["loss"], ".4f")
            print(f"| {title} | {accuracy} | {loss} | {found['epochs'][0]:.4g} |")


if __name__ == "__main__":
    main()
