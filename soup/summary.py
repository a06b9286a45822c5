"""The table of the study as Markdown: mean ± standard deviation over the seeds.

python summary.py [results/1.jsonl ...]        all of results/ if left out
"""

import json
import statistics
import sys
from pathlib import Path


def cell(values: list[float], form: str) -> str:
    """`mean ± deviation`, the sample's, which one seed alone does not have."""
    mean = format(statistics.mean(values), form)
    return f"{mean} ± {format(statistics.stdev(values), form)}" if len(values) > 1 else mean


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
            cell([r["validation"]["accuracy"] for r in records], ".2f"),
            cell([r["test"]["accuracy"] for r in records], ".2f"),
            cell([r["test"]["loss"] for r in records], ".4f"),
            cell([r["seconds"] for r in records], ".0f"),
            str(len(records)),
        ]
        print(f"| {' | '.join([name, *cells])} |")


if __name__ == "__main__":
    main()
