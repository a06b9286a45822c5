"""The table of the study as Markdown: mean ± standard deviation over the seeds.

python summary.py [results/1.jsonl ...]        all of results/ if left out
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from training.report import spread


def main():
    files = sys.argv[1:] or sorted(Path(__file__).parent.glob("results/*.jsonl"))
    runs = [[json.loads(line) for line in Path(file).read_text().splitlines()] for file in files]
    soups: dict[str, list[dict]] = {}
    for record in (record for run in runs for record in run if "models" in record):
        soups.setdefault(record["name"], []).append(record)

    print("| solution | validation accuracy | test accuracy | test loss | seconds | seeds |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, records in soups.items():
        cells = [
            spread([r["validation"]["accuracy"] for r in records], ".2f"),
            spread([r["test"]["accuracy"] for r in records], ".2f"),
            spread([r["test"]["loss"] for r in records], ".4f"),
            spread([r["seconds"] for r in records], ".0f"),
            str(len(records)),
        ]
        print(f"| {' | '.join([name, *cells])} |")


if __name__ == "__main__":
    main()
