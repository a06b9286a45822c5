"""The studies behind docs/RESULTS.md on a small scale, and the pages written from their JSON."""

import json
import shutil
from functools import partial
from pathlib import Path

import common
import head
import network_report
import numpy as np
import pytest
import report
import stages
import tables
import torch
from test_data import idx
from test_scripts import call

from training import data

ROOT = Path(__file__).resolve().parents[1]
CNN = "studies.architectures:cnn"


def test_the_pages_are_those_of_the_measurements(tmp_path):
    pages = [page for page in common.ROOT.rglob("*.md") if "report.py -->" in page.read_text()]
    pages = [page.relative_to(ROOT) for page in pages]
    for page in pages:
        (tmp_path / page).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / page, tmp_path / page)
    report.write(tmp_path)
    for page in pages:
        assert (tmp_path / page).read_text() == (ROOT / page).read_text(), page
    text = "".join(page.read_text() for page in tmp_path.rglob("*.md"))
    for figure in (tmp_path / "studies/figures").iterdir():
        assert (ROOT / "studies/figures" / figure.name).exists()
        assert f"studies/figures/{figure.name})" in text


def test_the_page_of_the_network_is_that_of_the_measurements(tmp_path):
    folder = ROOT / "benchmarks"
    network_report.write_report(json.loads((folder / "network.json").read_text()), tmp_path)
    assert (tmp_path / "network.md").read_text() == (folder / "network.md").read_text()


@pytest.mark.parametrize("folder", ["studies", "benchmarks"])
def test_every_script_has_help(folder):
    for path in (ROOT / folder).glob("*.py"):
        if "__main__" in path.read_text():
            result = call(path.relative_to(ROOT), "--help")
            assert result.status == 0, result.err
            assert result.out.startswith(f"usage: {path.name}")


def test_what_is_between_the_marks_of_a_page_is_replaced_and_nothing_else(tmp_path):
    page, begin = tmp_path / "page.md", "<!-- a: python studies/report.py -->"
    page.write_text(f"before\n{begin}\nold\n<!-- end of a -->\nafter\n")
    tables.replace_block(page, "a", ["new", "lines"])
    assert page.read_text() == f"before\n{begin}\n\nnew\nlines\n\n<!-- end of a -->\nafter\n"
    with pytest.raises(ValueError, match="has no block b"):
        tables.replace_block(page, "b", [])


def test_the_readme_shows_the_four_rows_of_the_results():
    lines = (ROOT / "docs/RESULTS.md").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("| solution | epochs |"))
    four_rows = "\n".join(lines[first : first + 6])
    assert four_rows in (ROOT / "README.md").read_text()


def test_mean_and_deviation():
    assert tables.spread([92.0, 93.0, 94.0], ".2f") == "93.00 ± 1.00"
    assert tables.spread([0.1, 0.3], "+.1f") == "+0.2 ± 0.1"
    assert tables.spread([92.0], ".2f") == "92.00"
    assert tables.spread([], ".2f") == ""


def test_the_report_compares_seeds_that_are_complete(tmp_path):
    def entry(accuracy: float, loss: float) -> dict:
        return {"accuracy": accuracy, "loss": loss}

    seed = {
        "mean of all": entry(80.0, 0.5),
        "SGD | 1": entry(82.0, 0.6),
        f"{tables.TUNED} | 1": entry(81.0, 0.25),
        f"{tables.BY_CHANNEL} | 1": entry(81.5, 0.375),
    }
    (tmp_path / "head.D.A.1.json").write_text(json.dumps(seed))
    (tmp_path / "head.D.A.2.json").write_text(json.dumps({"SGD | 1": entry(0.0, 9.0)}))
    runs = tables.read(tmp_path, "head")["A on D"]
    assert runs == [seed | {f"{tables.ADVISED} | 1": seed[f"{tables.BY_CHANNEL} | 1"]}]
    assert tables.gains(runs, tables.BY_CHANNEL, "1", "accuracy", "SGD | 1") == [-0.5]
    assert tables.gains(runs, tables.BY_CHANNEL, "1", "loss", f"{tables.TUNED} | 1") == [-0.125]
    assert tables.best(runs, tables.trained(runs, "1")) == f"{tables.TUNED} | 1"
    assert tables.averages(runs) == ["mean of all"]

    models = {f"{tables.BY_MODEL} | {b}": entry(81.0, 0.5) for b in ("0.5", "1")}
    assert tables.advised(seed | models) == {  # of 94 steps an epoch
        f"{tables.ADVISED} | 0.5": models[f"{tables.BY_MODEL} | 0.5"],
        f"{tables.ADVISED} | 1": seed[f"{tables.BY_CHANNEL} | 1"],
    }


def test_many_small_runs_are_compared_with_the_full_run_by_seed():
    seeds = {"1": {"TWA": [0.3, 90.0], stages.FULL: [0.4, 91.0]}}
    seeds["2"] = {"TWA": [0.7, 80.0], stages.FULL: [0.5, 82.0]}
    _, _, ours, full = stages.digits_table(seeds)
    assert ours == "| TWA | 0.5000 | 85.00 | +0.0500 ± 0.1500 | 1 of 2 |"
    assert full == f"| {stages.FULL} | 0.4500 | 86.50 |  |  |"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Studies of one SGD run of two epochs on FashionMNIST's format."""
    folder = tmp_path_factory.mktemp("study")
    raw = folder / "datasets/FashionMNIST/raw"
    raw.mkdir(parents=True)
    draw = np.random.default_rng(0).integers
    for name, count in (("train", 512), ("t10k", 64)):
        (raw / f"{name}-images-idx3-ubyte").write_bytes(idx(draw(256, size=(count, 28, 28))))
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(idx(draw(10, size=count)))
    settings = {"EPOCHS": 2, "HEAD": 1, "SAVES": 3, "EVERY": 1, "IMAGES": 384}
    settings |= {"VALIDATION": 32, "RESULTS": folder / "measured", "WORK": folder / "work"}
    settings |= {"BUDGETS": (1, 2), "SQUEEZED": (1,), "TUNED_RATES": (0.1, 0.02)}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setattr(head, name, value)
        yield partial(head.HeadBench, arch=CNN, seed=1, data_dir=folder / "datasets")


def test_what_is_measured_is_not_measured_again(small, capfd):
    bench = small("head")
    head.head(bench)
    path = bench.records.path
    written = json.loads(path.read_text())
    assert written == bench.records
    names = {name.partition(" | ")[0] for name in written}
    assert names >= {tables.BY_MODEL, tables.BY_CHANNEL, tables.TUNED, "SGD", "EMA"}
    assert names >= {"SGD, whole schedule", "last checkpoint"}
    ours = [written[f"{tables.BY_CHANNEL} | {budget}"] for budget in (1, 2)]
    assert [entry["epochs"] for entry in ours] == [2, 3]
    assert ours[0]["lr"] == 0.02
    assert ours[0]["seconds"] > 0
    assert ours[0]["starts"].keys() >= {"1", "2", "3"}
    first = path.stat().st_mtime_ns
    capfd.readouterr()
    head.head(small("head"))
    assert capfd.readouterr().out == ""
    assert path.stat().st_mtime_ns == first


def test_a_method_gives_the_same_result_twice(small):
    bench = small("head")
    for made in (bench.twa, partial(bench.twa, granularity="channel"), bench.tuned):
        first, again = made(1), made(1)
        assert again["loss"] == first["loss"]
        assert again["accuracy"] == first["accuracy"]


def test_the_rate_of_the_baseline_is_chosen_by_validation_images_on_the_first_seed(small):
    bench = small("head")
    head.head(bench)
    entry = bench.records[f"{tables.TUNED} | 1"]
    losses = entry["validation_losses"]
    assert str(entry["lr"]) == min(losses, key=losses.get)
    assert losses.keys() == {*map(str, head.TUNED_RATES)}
    assert small("head", seed=2).tuned(1)["validation_losses"].keys() == {str(entry["lr"])}


def test_units_are_chosen_by_training_images_that_the_run_never_saw(small):
    bench = small("units")
    training, _ = data.load("FashionMNIST", small.keywords["data_dir"], torch.device("cpu"))
    judged = [labels for _, labels in bench.judge]
    assert torch.equal(torch.cat(judged), training.labels[512 - 32 :])
    assert len(bench.train.split) + 32 <= len(training)


def test_ema_weighs_by_powers_of_the_decay(tmp_path):
    paths = [tmp_path / f"{i}.pt" for i in (1, 2, 5)]
    for path in paths:
        torch.save({"w": torch.tensor([float(path.stem)])}, path)
    mean = common.weighted(paths, common.ema(0.5, 3))
    assert mean["w"].item() == 0.25 * 1 + 0.25 * 2 + 0.5 * 5
