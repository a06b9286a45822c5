"""The studies behind docs/RESULTS.md, on a small scale, and the page written from their results."""

import json
import shutil
from functools import partial
from pathlib import Path

import digits
import evidence
import evidence_report
import goals
import numpy as np
import pytest
import study
import tables
import torch
from test_data import idx

from training import data

ROOT = Path(__file__).resolve().parents[1]
CNN = "studies.architectures:cnn"


def test_the_pages_are_those_of_the_measurements(tmp_path):
    for stage in ("swa", "soup"):
        (tmp_path / stage).mkdir()
        shutil.copy(ROOT / stage / "README.md", tmp_path / stage)
    evidence_report.write(tmp_path)
    pages = [*tmp_path.rglob("*.md")]
    assert {page.name for page in pages} >= {"RESULTS.md", "head-stage.md", "README.md"}
    for page in pages:
        assert page.read_text() == (ROOT / page.relative_to(tmp_path)).read_text(), page.name
    text = "".join(page.read_text() for page in pages)
    for figure in (tmp_path / "studies/figures").iterdir():
        assert (ROOT / "studies/figures" / figure.name).exists()
        assert f"studies/figures/{figure.name})" in text


def test_what_is_between_the_marks_of_a_page_is_replaced_and_nothing_else(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<begin>\nold\n<end>\nafter\n")
    tables.between(page, "<begin>", "<end>", ["new", "lines"])
    assert page.read_text() == "before\n<begin>\nnew\nlines\n<end>\nafter\n"


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


def test_the_report_compares_seeds_that_are_complete_with_the_best_rival(tmp_path):
    def entry(accuracy: float, loss: float) -> dict:
        return {"accuracy": accuracy, "loss": loss}

    seed = {
        "mean of all": entry(80.0, 0.5),
        "SGD | 1": entry(82.0, 0.6),
        f"{tables.TUNED} | 1": entry(81.0, 0.25),
        f"{tables.BY_CHANNEL} | 1": entry(81.5, 0.375),
    }
    (tmp_path / "head.FashionMNIST-12k.A.1.json").write_text(json.dumps(seed))
    incomplete = json.dumps({"SGD | 1": entry(0.0, 9.0)})
    (tmp_path / "head.FashionMNIST-12k.A.2.json").write_text(incomplete)
    runs = tables.read(tmp_path)["head"]["A on FashionMNIST-12k"]
    assert runs == [seed | {f"{tables.ADVISED} | 1": seed[f"{tables.BY_CHANNEL} | 1"]}]
    assert tables.gains(runs, tables.BY_CHANNEL, "1") == [-0.5]
    assert tables.gains(runs, tables.BY_CHANNEL, "1", "loss") == [-0.125]

    runs = [seed]
    assert tables.rival(runs, "1", "loss") == f"{tables.TUNED} | 1"
    assert tables.rival(runs, "1", "loss", tuned=False) == "mean of all"
    models = {f"{tables.BY_MODEL} | {b}": entry(81.0, 0.5) for b in ("0.5", "1")}
    advised = tables.advised(seed | models, "A on FashionMNIST-12k")  # of 94 steps an epoch
    assert advised == {
        f"{tables.ADVISED} | 0.5": models[f"{tables.BY_MODEL} | 0.5"],
        f"{tables.ADVISED} | 1": seed[f"{tables.BY_CHANNEL} | 1"],
    }
    half, nowhere, usual = goals.GOALS
    found = goals.verdicts(runs, tables.BY_CHANNEL)
    assert found[half, "accuracy"] == ("ahead at 1", True)
    assert found[usual, "accuracy"] == ("not ahead at 1", False)
    assert found[half, "loss"] == ("ahead at none", False)
    assert found[nowhere, "loss"] == ("behind at none", None)  # one seed gives no verdict


def test_many_small_runs_are_compared_with_the_full_run_by_seed():
    seeds = {"1": {"TWA": [0.3, 90.0], digits.FULL: [0.4, 91.0]}}
    seeds["2"] = {"TWA": [0.7, 80.0], digits.FULL: [0.5, 82.0]}
    _, _, ours, full = digits.table(seeds)
    assert ours == "| TWA | 0.5000 | 85.00 | +0.0500 ± 0.1500 | 1 of 2 |"
    assert full == f"| {digits.FULL} | 0.4500 | 86.50 |  |  |"


def test_the_page_of_the_head_stage_has_the_table_of_the_small_runs():
    rows = digits.table(json.loads(digits.RESULTS.read_text()))
    assert "\n".join(rows) in (digits.ROOT / "docs/head-stage.md").read_text()


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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "DATA", {"tiny": study.Data(384)})
        for module in (study, evidence):
            patch.setattr(module, "EPOCHS", 2)
            patch.setattr(module, "HEAD", 1)
            patch.setattr(module, "SAVES", 3)
        patch.setattr(study, "EVERY", 1)
        patch.setattr(study, "VALIDATION", 32)
        patch.setattr(study, "RESULTS", folder / "measured")
        patch.setattr(study, "WORK", folder / "work")
        patch.setattr(evidence, "BUDGETS", (1, 2))
        patch.setattr(evidence, "SQUEEZED", (1,))
        patch.setattr(evidence, "TUNED_RATES", (0.1, 0.02))
        yield partial(study.Bench, arch=CNN, seed=1, data_dir=folder / "datasets")


def test_what_is_measured_is_not_measured_again(small, capfd):
    bench = small("head", "tiny")
    evidence.head(bench)
    written = json.loads(bench.path.read_text())
    assert written == bench.records
    names = {name.partition(" | ")[0] for name in written}
    assert tables.BY_CHANNEL in evidence.IN_SPREAD
    assert names >= {
        *evidence.METHODS,
        "SGD",
        "SGD, whole schedule",
        "EMA",
        "last checkpoint",
    }
    ours = f"{tables.BY_CHANNEL} | "
    assert [written[f"{ours}{budget}"]["epochs"] for budget in (1, 2)] == [2, 3]
    first = bench.path.stat().st_mtime_ns
    capfd.readouterr()
    evidence.head(small("head", "tiny"))
    assert capfd.readouterr().out == ""
    assert bench.path.stat().st_mtime_ns == first


def test_a_method_gives_the_same_result_twice(small):
    in_spread = {name: study.in_spread(1, **basis) for name, basis in evidence.IN_SPREAD.items()}
    bench = small("head", "tiny")
    for name, method in (evidence.METHODS | in_spread).items():
        bench.measure(f"{name} | 1", partial(bench.trained, method, 1))
        first, again = bench.records[f"{name} | 1"], bench.trained(method, 1)
        assert again["loss"] == first["loss"]
        assert again["train_loss"] == first["train_loss"]


def test_the_rate_of_the_rival_is_chosen_by_validation_images_on_the_first_seed(small):
    bench = small("head", "tiny")
    evidence.head(bench)
    ours = bench.records[f"{tables.BY_CHANNEL} | 1"]
    assert ours["lr"] == 0.02
    assert ours["seconds"] > ours["start_seconds"] > 0
    assert ours["starts"].keys() >= {"1", "2", "3"}
    entry = bench.records[f"{tables.TUNED} | 1"]
    losses = entry["validation_losses"]
    assert str(entry["lr"]) == min(losses, key=losses.get)
    assert losses.keys() == {*map(str, evidence.TUNED_RATES)}
    other = small("head", "tiny", seed=2)
    assert evidence.tuned(other, 1)["validation_losses"].keys() == {str(entry["lr"])}


def test_settings_are_chosen_by_training_images_that_the_run_never_saw(small):
    bench = small("units", "tiny", chooses=True)
    training, _ = data.load("FashionMNIST", small.keywords["data_dir"], torch.device("cpu"))
    judged = [labels for _, labels in bench.judge]
    assert torch.equal(torch.cat(judged), training.labels[512 - 32 :])
    assert len(bench.train.split) + 32 <= len(training)


def test_ema_weighs_by_powers_of_the_decay(tmp_path):
    paths = [tmp_path / f"{i}.pt" for i in (1, 2, 5)]
    for path in paths:
        torch.save({"w": torch.tensor([float(path.stem)])}, path)
    mean = study.weighted(paths, study.ema(0.5, 3))
    assert mean["w"].item() == 0.25 * 1 + 0.25 * 2 + 0.5 * 5
