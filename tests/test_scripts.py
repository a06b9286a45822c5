"""The scripts as a user calls them: what they leave behind, resume, refuse and report."""

import argparse
import contextlib
import hashlib
import importlib.util
import io
import json
import math
import os
import random
import runpy
import shutil
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from matplotlib import pyplot as plt
from processes import ROOT, Result

import models
import utils
from training import coefficients, data, logs, settings, windows
from training.files import save
from training.loop import evaluate, reestimate_bn, sample_loss
from twa import Recipe
from twa.files.checkpoints import average, load_into, load_state_dict

SGD, TWA, SWA = "train_sgd_cifar.py", "train_twa.py", "swa/train.py"

# Children compute as this process does, so that results can be compared to the bit.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


pytestmark = pytest.mark.usefixtures("one_thread")


# --- calling scripts ---


def process(script: str, *args, cwd: Path) -> Result:
    """Runs a script in a process of its own, from the folder `cwd`."""
    command = [sys.executable, "-u", str(ROOT / script), *map(str, args)]
    done = subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True)
    return Result(done.returncode, done.stdout, done.stderr)


def call(script: str, *args) -> Result:
    """Runs a script within this process: as `process`, without the seconds that imports take."""
    out, err = io.StringIO(), io.StringIO()
    argv, path = sys.argv, list(sys.path)
    sys.argv = [str(ROOT / script), *map(str, args)]
    status = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        status = end.code or 0
    finally:
        sys.argv, sys.path[:] = argv, path
    return Result(status, out.getvalue(), err.getvalue())


def succeed(result: Result) -> Result:
    assert result.status == 0, result.err
    return result


def one_line(result: Result) -> str:
    """The one line on stderr with which a script refuses, with exit status 2."""
    assert result.status == 2, result
    lines = result.err.splitlines()
    assert len(lines) == 1, result.err
    assert "Traceback" not in result.err
    return lines[0]


def snapshot(folder: Path) -> dict[str, str]:
    """Every file below `folder`, hidden ones too, with the hash of its content.

    But for the bytecode that Python writes beside a module of the user's.
    """
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.parent.name != "__pycache__"
    }


def refuse(folder: Path, script: str, *args) -> str:
    """As `one_line`; nothing in `folder` is changed."""
    before = snapshot(folder)
    line = one_line(call(script, *args))
    assert snapshot(folder) == before
    return line


def where(run: Path) -> list:
    """The flags of a run of the head stage on Digits that writes into `run`."""
    digits = ("--datasets", "Digits", "--arch", "PreResNet20", "--batch-size", 128)
    return [*digits, "--save-dir", run / "checkpoints", "--log-dir", run]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_seconds(path: Path) -> list[dict]:
    return [{k: v for k, v in m.items() if k != "seconds"} for m in read_lines(path)]


def assert_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The same tensors to the bit."""
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(actual[key], tensor), key


def assert_same_checkpoints(run: Path, expected: Path, numbers) -> None:
    for number in numbers:
        name = f"checkpoints/{number}.pt"
        assert_equal(load_state_dict(run / name), load_state_dict(expected / name))


def preresnet() -> torch.nn.Module:
    return models.build("PreResNet20", 10, 1, 8)


def loaders(batch_size: int = 128) -> tuple[data.Loader, data.Loader]:
    """As the scripts make them with their default seed."""
    train, test = data.load("Digits", "", torch.device("cpu"))
    return (
        data.Loader(train, batch_size, train=True, seed=1),
        data.Loader(test, 1000, train=False),
    )


class Killed(BaseException):
    """What stops a run in the middle of an epoch."""


@contextlib.contextmanager
def killed_in(epoch: int):
    """Stops whatever trains within the block after two batches of this epoch."""
    batches = data.Loader.batches

    def stopping(self, start: int = 0):
        for number, batch in enumerate(batches(self, start)):
            if self.train and self.epoch == epoch and number == 2:
                raise Killed
            yield batch

    data.Loader.batches = stopping
    try:
        with pytest.raises(Killed):
            yield
    finally:
        data.Loader.batches = batches


# --- the paper's two command lines ---


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> Path:
    """The folder in which the paper's command lines ran, with Digits and few epochs."""
    cwd = tmp_path_factory.mktemp("head")
    sgd = (
        "--datasets Digits --arch=PreResNet20 --epochs=4 --lr 0.1 --save-dir=DST/checkpoints "
        "--log-dir=DST -p 100"
    )
    twa = (
        "--epochs 2 --datasets Digits --opt SGD --extract Schmidt --schedule step --lr 2 "
        "--params_start 0 --params_end 5 --train_start -1 --wd 0.00001 --batch-size 128 "
        "--arch=PreResNet20 --save-dir=DST/checkpoints --log-dir=DST"
    )
    for script, arguments in ((SGD, sgd), (TWA, twa)):
        result = succeed(process(script, *arguments.split(), cwd=cwd))
        assert result.err == ""
        (cwd / f"{script}.out").write_text(result.out)
    return cwd


@pytest.fixture
def run(head, tmp_path) -> Path:
    """A copy of what the SGD run left, for a test to work in."""
    folder = tmp_path / "run"
    shutil.copytree(head / "DST", folder)
    for path in (*folder.glob("twa*"), *folder.glob("checkpoints/twa*")):
        path.unlink()
    return folder


def test_the_papers_command_lines_leave_these_files_and_no_others(head):
    checkpoints = {f"{n}.pt" for n in range(5)} | {"state.pt"}
    assert names(head / "DST" / "checkpoints") == checkpoints
    assert names(head / "DST") == {
        *("checkpoints", "log", "metrics.jsonl", "run.json"),
        *("twa.json", "twa.png", "twa_metrics.jsonl", "twa_run.json", "twa.pt", "twa_state.pt"),
        "twa_weights.safetensors",
    }


def test_checkpoint_zero_is_the_initialisation_by_the_seed(head):
    utils.set_seed(1)
    initial = preresnet().state_dict()
    assert_equal(load_state_dict(head / "DST/checkpoints/0.pt"), initial)
    first = load_state_dict(head / "DST/checkpoints/1.pt")
    assert not torch.equal(first["conv1.weight"], initial["conv1.weight"])


def test_metrics_hold_one_object_an_epoch_that_its_checkpoint_bears_out(head):
    metrics = read_lines(head / "DST/metrics.jsonl")
    assert [m["epoch"] for m in metrics] == [1, 2, 3, 4]
    # `step` divides by 10 at half and at three quarters of the epochs.
    assert [m["rate"] for m in metrics] == pytest.approx([0.1, 0.1, 0.01, 0.001])
    model = preresnet()
    for m in metrics:
        load_into(model, head / f"DST/checkpoints/{m['epoch']}.pt")
        tested = evaluate(model, loaders()[1])
        assert tested == {"loss": m["test_loss"], "accuracy": m["test_accuracy"]}
        assert 0 < m["train_loss"] < 3
        assert 0 < m["train_accuracy"] < 100
        assert m["seconds"] > 0


@pytest.mark.parametrize("name, lr", [("run.json", 0.1), ("twa_run.json", 2.0)])
def test_the_description_of_a_run_holds_arguments_versions_and_commit(head, name, lr):
    description = json.loads((head / "DST" / name).read_text())
    assert description["arguments"]["lr"] == lr
    assert description["arguments"]["arch"] == "PreResNet20"
    assert description["arguments"]["randomseed"] == 1
    assert description["versions"]["torch"] == torch.__version__.split("+")[0]
    assert description["versions"]["python"] == sys.version.split()[0]
    try:
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        commit = git.stdout.strip() if git.returncode == 0 else None
    except OSError:
        commit = None
    if commit is None:
        assert description["commit"] is None
    else:
        assert description["commit"].removesuffix("-dirty") == commit


def test_a_run_without_git_knows_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert logs.provenance()["commit"] is None


def test_the_log_is_what_was_printed(head):
    printed = (head / f"{SGD}.out").read_text() + (head / f"{TWA}.out").read_text()
    assert (head / "DST/log").read_text() == printed
    for name in ("last", "mean of last 5", "SWA", "TWA"):
        assert f"\n{name} " in printed


def test_twa_json_has_the_promised_structure(head):
    summary = json.loads((head / "DST/twa.json").read_text())
    assert list(summary["results"]) == ["last", "mean of last 5", "SWA", "TWA"]
    for result in summary["results"].values():
        assert 0 <= result["accuracy"] <= 100
        assert result["loss"] > 0
    assert list(summary["averaging_weights"]) == [f"{n}.pt" for n in range(5)]
    assert summary["epochs"] == 2
    assert summary["seconds"] > 0
    # A window of five: these two are the same average.
    assert summary["results"]["mean of last 5"] == summary["results"]["SWA"]


def test_twa_pt_is_an_ordinary_state_dict_with_the_reported_result(head):
    summary = json.loads((head / "DST/twa.json").read_text())
    model = preresnet()
    model.load_state_dict(torch.load(head / "DST/twa.pt", weights_only=True))
    tested = evaluate(model, loaders()[1])
    assert tested["accuracy"] == summary["results"]["TWA"]["accuracy"]
    assert tested["loss"] == summary["results"]["TWA"]["loss"]
    assert tested["loss"] != summary["results"]["SWA"]["loss"]


def test_the_reported_averaging_weights_make_twa_pt(head):
    alpha = json.loads((head / "DST/twa.json").read_text())["averaging_weights"]
    folder = head / "DST/checkpoints"
    weights = load_state_dict(head / "DST/twa.pt")
    checkpoints = {name: load_state_dict(folder / name) for name in alpha}
    for key, _ in preresnet().named_parameters():
        parts = [a * checkpoints[name][key].double() for name, a in alpha.items()]
        # Large terms of opposite sign cancel; float32 is relative to their size.
        size = sum(part.abs().max().item() for part in parts)
        torch.testing.assert_close(sum(parts), weights[key].double(), rtol=0, atol=1e-5 * size)


def test_the_averages_that_twa_is_compared_with_are_what_their_names_say(head):
    results = json.loads((head / "DST/twa.json").read_text())["results"]
    folder = head / "DST/checkpoints"
    model, (train, test) = preresnet(), loaders()
    for name, checkpoint in (
        ("last", folder / "4.pt"),
        ("SWA", average([folder / f"{n}.pt" for n in range(5)])),
    ):
        load_into(model, checkpoint)
        reestimate_bn(model, train)
        tested = evaluate(model, test)
        assert results[name]["accuracy"] == tested["accuracy"]
        assert results[name]["loss"] == pytest.approx(tested["loss"], rel=1e-5)


def assert_picture(path: Path) -> None:
    """An image of some size with more than one colour."""
    pixels = plt.imread(path)
    assert min(pixels.shape[:2]) >= 400
    assert pixels.std() > 0.05


def test_twa_png_is_a_picture(head):
    assert_picture(head / "DST/twa.png")


# --- other flags of the head stage ---


def test_saves_per_epoch_are_evenly_spaced_and_do_not_change_the_training(head, tmp_path):
    arguments = ("--epochs", 4, "--lr", 0.1, "--saves-per-epoch", 3)
    succeed(call(SGD, *where(tmp_path), *arguments))
    assert names(tmp_path / "checkpoints") == {f"{n}.pt" for n in range(13)} | {"state.pt"}
    for epoch in range(5):
        assert_equal(
            load_state_dict(tmp_path / f"checkpoints/{3 * epoch}.pt"),
            load_state_dict(head / f"DST/checkpoints/{epoch}.pt"),
        )
    # Eight iterations an epoch: saved after 3, 6 and 8 of them.
    steps = [
        int(load_state_dict(tmp_path / f"checkpoints/{n}.pt")["bn.num_batches_tracked"])
        for n in range(7)
    ]
    assert steps == [0, 3, 6, 8, 11, 14, 16]


def test_evaluate_prints_the_test_accuracy_and_writes_nothing(run):
    before = snapshot(run)
    result = succeed(call(SGD, *where(run), "--epochs", 4, "--resume", "--evaluate"))
    assert f"accuracy {read_lines(run / 'metrics.jsonl')[-1]['test_accuracy']:.2f} %" in result.out
    window = ("--params_end", 5)
    table = succeed(call(TWA, *where(run), *window, "--evaluate")).out
    assert [line.split("  ")[0] for line in table.splitlines()[1:]] == [
        "last",
        "mean of last 5",
        "SWA",
    ]
    assert snapshot(run) == before


@pytest.mark.parametrize(
    "flags",
    [
        ("--opt", "SGD"),
        ("--opt", "AdamW", "--schedule", "cosine"),
        ("--opt", "SGD", "--granularity", "layer", "--train_start", 4),
        ("--opt", "SGD", "--start-average", 2, "-acc", 3, "--schedule", "linear"),
        ("--opt", "Adam", "--components", 2, "--warmup-epochs", 1, "--clip-grad", 1),
    ],
    ids=["SGD", "AdamW", "layer", "accumulate", "Adam"],
)
def test_the_default_rate_trains(run, flags):
    succeed(call(TWA, *where(run), "--params_start", 1, "--params_end", 5, "--epochs", 3, *flags))
    summary = json.loads((run / "twa.json").read_text())
    start = summary["results"][summary["start"]]
    assert summary["results"]["TWA"]["loss"] < start["loss"]
    losses = [m["train_loss"] for m in read_lines(run / "twa_metrics.jsonl")]
    assert losses[-1] < losses[0]
    assert summary["lr"] == (0.1 if "SGD" in flags else 0.02)


@pytest.mark.parametrize(
    ("words", "samples", "rate", "unit"),
    [
        ("", math.inf, 0.0566, "direction"),
        ("", 8000, 0.08, "block"),
        ("--opt Adam --granularity model", 8000, 0.0566, "direction"),
        ("--opt SGD --granularity layer", 8000, 0.1, "direction"),
        ("--lr 0.3", 8000, 0.3, "block"),
        ("--granularity layer", math.inf, 0.0566, "direction"),
        ("--granularity layer", 8000, 0.08, "block"),
        ("--granularity channel --opt Adam", 8000, 0.08, "block"),
        ("--granularity channel --unit direction", 8000, 0.0566, "direction"),
        ("--unit block", 8000, 0.08, "block"),
        ("--extract Schmidt --granularity layer --lr 0.3", 8000, 0.3, "direction"),
    ],
)
def test_rate_and_unit_that_are_left_out_are_those_for_steps_and_samples(
    words, samples, rate, unit
):
    parser = settings.parser_of(coefficients.Coefficients)
    args = coefficients.Coefficients(**vars(parser.parse_args(words.split())))
    window = [torch.nn.Linear(3, 2).state_dict() for _ in range(3)]
    how = {"steps": 200, "samples": samples, "start": 1}
    recipe = coefficients.recipe_of(args, torch.nn.Linear(3, 2), window, lambda: 0.0, **how)
    optimizer = coefficients.optimizer_of(args, recipe)
    assert optimizer.subspace.unit == unit
    actual = optimizer.defaults["lr"]
    assert actual == optimizer.base.param_groups[0]["lr"] == pytest.approx(rate, rel=1e-3)


@pytest.mark.parametrize("epochs, granularity", [(2, "model"), (7, "channel")])
def test_the_package_alone_gives_the_weights_of_the_script(run, epochs, granularity):
    """The README's table by `twa` and torch, here on Digits: 16 and 56 steps."""
    succeed(call(TWA, *where(run), "--params_end", 5, "--epochs", epochs, "--device", "cpu"))

    model, (train, _), steps = preresnet(), loaders(), epochs * 8
    checkpoints = [run / f"checkpoints/{i}.pt" for i in range(5)]

    def loss() -> float:
        train.set_epoch(0)  # whose draws no training uses
        torch.optim.swa_utils.update_bn(list(train), model)
        return evaluate(model.eval(), train)["loss"]

    recipe = Recipe(model, checkpoints, loss, steps=steps, samples=len(train.split))
    optimizer = recipe.optimizer()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for epoch in range(1, epochs + 1):
        train.set_epoch(epoch)
        model.train()
        for images, labels in train:
            losses = torch.nn.functional.cross_entropy(model(images), labels, reduction="sum")
            (losses * (1 / len(labels))).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    recipe.finish(loss)

    assert recipe.granularity == granularity
    written = torch.load(run / "twa.pt", weights_only=True)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, written[name])


def test_one_checkpoint_has_a_direction_in_the_papers_coordinates_alone(run):
    window = ["--params_start", 4, "--params_end", 5, "--epochs", 1]
    line = refuse(run, TWA, *where(run), *window)
    assert "two checkpoints" in line
    succeed(call(TWA, *where(run), *window, "--extract", "Schmidt", "--opt", "SGD", "--lr", 0.01))
    assert json.loads((run / "twa.json").read_text())["averaging_weights"].keys() == {"4.pt"}


def test_a_copy_of_a_checkpoint_counts_once_and_the_log_says_so(run):
    shutil.copy(run / "checkpoints/3.pt", run / "checkpoints/4.pt")
    result = succeed(call(TWA, *where(run), "--params_end", 5, "--epochs", 0))
    (note,) = [line for line in result.out.splitlines() if "counts once" in line]
    assert note.startswith("note: ") and note.endswith("4.pt is " + str(run / "checkpoints/3.pt"))
    assert result.err == ""
    weights = json.loads((run / "twa.json").read_text())["averaging_weights"]
    assert weights.keys() == {"0.pt", "1.pt", "2.pt", "3.pt"}


@pytest.mark.parametrize("name", ["60+2", "1", "epoch2"])
def test_results_may_lie_in_a_folder_beside_the_checkpoints(run, name):
    out = run / "checkpoints" / name
    for _ in range(2):  # the second time it holds what the first has written
        succeed(call(TWA, *where(run), "--params_end", 5, "--epochs", 0, "--out", out))
    assert (out / "twa.pt").exists()


def test_a_start_within_the_window_is_verified_once(run, monkeypatch):
    verified = []
    monkeypatch.setattr(windows, "verify", lambda path: verified.append(path.name))
    succeed(call(TWA, *where(run), "--params_end", 5, "--train_start", 3, "--epochs", 0))
    assert verified == ["0.pt", "1.pt", "2.pt", "3.pt", "4.pt"]


def test_zero_epochs_of_twa_report_the_start_point(run):
    succeed(call(TWA, *where(run), "--params_end", 5, "--train_start", 3, "--epochs", 0))
    results = json.loads((run / "twa.json").read_text())["results"]
    for key in ("accuracy", "loss"):
        assert results["TWA"][key] == results["checkpoint 3"][key]


def test_the_end_of_the_sgd_run_has_batch_norm_of_its_own_as_every_solution(run, tmp_path):
    flags = ("--params_end", 3, "--epochs", 0)
    out = succeed(call(TWA, *where(run), *flags, "--out", tmp_path / "a")).out
    end = json.loads((tmp_path / "a/twa.json").read_text())["sgd"]
    model, (train, test) = preresnet(), loaders()
    load_into(model, run / "checkpoints/4.pt")
    as_tested = evaluate(model, test)
    train.set_epoch(0)
    torch.optim.swa_utils.update_bn(list(train), model)
    assert end["loss"] == pytest.approx(evaluate(model, test)["loss"], rel=1e-4)
    assert end["loss"] != pytest.approx(as_tested["loss"], rel=1e-3)
    assert end["epochs"] == 4
    row = f"SGD to its end {end['loss']:.4f} {end['accuracy']:.2f} %"
    assert row in " ".join(out.split())
    # Where the checkpoint is gone, it is told as the run tested it.
    (run / "checkpoints/4.pt").unlink()
    succeed(call(TWA, *where(run), *flags, "--out", tmp_path / "b"))
    assert json.loads((tmp_path / "b/twa.json").read_text())["sgd"]["loss"] == as_tested["loss"]


def test_the_schedule_ends_with_the_epochs_also_where_batches_are_accumulated(run):
    """Eight batches by threes make three steps an epoch, nine in all."""
    flags = ("--params_end", 5, "--epochs", 3, "--schedule", "linear", "--lr", 0.3, "-acc", 3)
    succeed(call(TWA, *where(run), *flags))
    rates = [m["rate"] for m in read_lines(run / "twa_metrics.jsonl")]
    assert rates == pytest.approx([0.3, 0.2, 0.1])


def test_step_divides_the_rate_by_ten_at_the_epochs_of_the_papers_release(head):
    """Of two epochs at int(0.5 · 2) = 1 and at int(0.75 · 2 + 0.9) = 2, past the end."""
    rates = [m["rate"] for m in read_lines(head / "DST/twa_metrics.jsonl")]
    assert rates == pytest.approx([2, 0.2])


def test_the_start_is_the_best_of_simple_averages_by_training_loss(run, tmp_path):
    succeed(call(TWA, *where(run), "--params_end", 5, "--epochs", 0, "--out", tmp_path))
    summary = json.loads((tmp_path / "twa.json").read_text())
    compared = summary["sample_losses"]["start"]
    model, (train, _) = preresnet(), loaders()
    for name, count in (("last", 1), ("mean of last 2", 2), ("mean of last 4", 4), ("SWA", 5)):
        load_into(model, average([run / f"checkpoints/{n}.pt" for n in range(5 - count, 5)]))
        train.set_epoch(0)
        batches = [next(iter(train))] if len(train) == 1 else list(train)
        torch.optim.swa_utils.update_bn(batches, model)
        expected = evaluate(model, batches)["loss"]
        assert compared[name] == pytest.approx(expected, rel=1e-4), name
    assert summary["start"] == min(compared, key=compared.get)
    # No step was taken: what is handed over is the start.
    results = summary["results"]
    assert results["TWA"]["loss"] == results[summary["start"]]["loss"]


def test_end_points_are_compared_on_other_images_than_start_points():
    train, _ = loaders(batch_size=300)  # 898 images: batches of 300, 300 and 298
    train.sample = 300
    model = preresnet()
    train.set_epoch(0)
    batches = list(train)
    for last, images in ((False, batches[0]), (True, batches[-1])):
        found = sample_loss(model, train, last=last)
        torch.optim.swa_utils.update_bn(batches[:1], model)
        assert found == pytest.approx(evaluate(model, [images])["loss"], rel=1e-5)


def test_twa_compares_start_points_on_the_first_images_and_the_end_on_the_last(
    run, tmp_path, monkeypatch
):
    monkeypatch.setattr(data.Loader, "sample", 128)
    succeed(call(TWA, *where(run), "--params_end", 5, "--epochs", 0, "--out", tmp_path))
    told = json.loads((tmp_path / "twa.json").read_text())
    model, (train, _) = preresnet(), loaders()
    load_into(model, tmp_path / "twa.pt")
    losses = [sample_loss(model, train, last=last) for last in (False, True)]
    assert losses[0] != pytest.approx(losses[1], rel=0.05)
    compared = told["sample_losses"]
    found = [compared["start"][told["start"]], compared["end"]["start"]]
    assert found == pytest.approx(losses, rel=1e-4)


def test_the_start_is_handed_over_where_training_makes_it_worse(run, tmp_path):
    flags = ["--params_end", 5, "--epochs", 1, "--schedule", "constant", "--opt", "SGD"]
    flags += ["--lr", 1e4, "--out", tmp_path]
    log = succeed(call(TWA, *where(run), *flags)).out
    summary = json.loads((tmp_path / "twa.json").read_text())
    losses = summary["sample_losses"]["end"]
    assert losses["start"] < min(losses["end"], losses["mean of the last half"])
    assert summary["results"]["TWA"]["loss"] == summary["results"][summary["start"]]["loss"]
    assert "end: loss on a sample of training data: start" in log
    # The paper's method reports its end, whatever that is.
    paper = ["--params_end", 5, "--epochs", 1, "--opt", "SGD", "--extract", "Schmidt", "--lr", 30]
    succeed(call(TWA, *where(run), *paper, "--out", tmp_path / "paper"))
    summary = json.loads((tmp_path / "paper/twa.json").read_text())
    assert summary["sample_losses"]["end"] == {}
    assert summary["results"]["TWA"]["loss"] > summary["results"][summary["start"]]["loss"]


# --- resuming ---


def test_a_resumed_run_draws_what_the_run_would_have_drawn(tmp_path):
    """As dropout does, from each of the generators."""

    def draws() -> list:
        numbers = [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn()]
        return [*numbers, *torch.rand(2).tolist()]

    utils.set_seed(5)
    draws()  # of an odd number of normal ones, so that a generator holds one back
    model = torch.nn.Linear(2, 2)
    with processes.small_run(tmp_path, model, epochs=9) as run:
        run.done = 3
        run.save()
        expected = draws()
        assert draws() != expected
    with processes.small_run(tmp_path, model, resume="", epochs=9) as run:
        assert run.done == 3
        assert draws() == expected


def kill_in(folder: Path, moment: str, *args) -> None:
    """Starts an SGD run and kills it (-9) when `moment` is printed."""
    child = processes.start(folder, SGD, *args)
    child.wait_for(moment)
    child.send(signal.SIGKILL)
    assert child.end().status == -signal.SIGKILL


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_sgd_killed_twice_ends_with_the_weights_of_an_uninterrupted_run(head, tmp_path):
    """In its first epoch, before any has ended, and in the middle of its third."""
    arguments = [*where(tmp_path), "--epochs", 4, "--lr", 0.1, "--resume"]
    kill_in(tmp_path, "epoch 1/4 [3/8]", *arguments, "-p", 1)
    assert "1.pt" not in names(tmp_path / "checkpoints")
    kill_in(tmp_path, "epoch 3/4 [4/8]", *arguments, "-p", 1)
    assert "2.pt" in names(tmp_path / "checkpoints")
    assert "3.pt" not in names(tmp_path / "checkpoints")
    succeed(call(SGD, *arguments))
    assert_same_checkpoints(tmp_path, head / "DST", range(5))
    metrics = without_seconds(tmp_path / "metrics.jsonl")
    assert metrics == without_seconds(head / "DST/metrics.jsonl")


def test_sgd_resumes_in_the_middle_of_saves_and_from_a_named_state(head, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    flags = ("--epochs", 4, "--lr", 0.1)
    with killed_in(3):
        call(SGD, *where(first), *flags)
    state = first / "checkpoints/state.pt"
    before = snapshot(first)
    succeed(call(SGD, *where(second), *flags, "--resume", state))
    assert_same_checkpoints(second, head / "DST", (3, 4))
    assert snapshot(first) == before


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_twa_stopped_in_mid_epoch_ends_with_the_weights_of_an_uninterrupted_run(run, optimizer):
    flags = ["--params_start", 1, "--params_end", 5, "--epochs", 3, "--opt", optimizer, "-acc", 3]
    flags += ["--images", 512]
    other = run.with_name("other")
    shutil.copytree(run, other)
    succeed(call(TWA, *where(other), *flags))
    with killed_in(3):
        call(TWA, *where(run), *flags)
    assert not (run / "twa.pt").exists()
    assert len(read_lines(run / "twa_metrics.jsonl")) == 2
    succeed(call(TWA, *where(run), *flags, "--resume"))
    assert_equal(load_state_dict(run / "twa.pt"), load_state_dict(other / "twa.pt"))
    metrics = without_seconds(run / "twa_metrics.jsonl")
    assert metrics == without_seconds(other / "twa_metrics.jsonl")
    resumed, whole = (json.loads((f / "twa.json").read_text()) for f in (run, other))
    assert resumed["averaging_weights"] == whole["averaging_weights"]
    assert resumed["lr"] == whole["lr"]


def test_a_finished_run_that_is_resumed_does_nothing_more(head, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(head / "DST", run)
    before = snapshot(run)
    twa = ["--epochs", 2, "--params_end", 5, "--train_start", -1, "--wd", 1e-5, "--lr", 2]
    twa += ["--opt", "SGD", "--extract", "Schmidt", "--schedule", "step"]
    for script, flags in ((SGD, ["--epochs", 4]), (TWA, twa)):
        succeed(call(script, *where(run), *flags, "--resume"))
    after = snapshot(run)
    numbered = [f"checkpoints/{n}.pt" for n in range(5)]
    kept = (*numbered, "metrics.jsonl", "twa_metrics.jsonl")
    for name in (*kept, "checkpoints/state.pt", "twa_state.pt"):
        assert after[name] == before[name], name
    assert after.keys() == before.keys()
    assert_equal(
        load_state_dict(run / "twa.pt"),
        load_state_dict(head / "DST/twa.pt"),
    )
    old, new = (json.loads((f / "twa.json").read_text()) for f in (head / "DST", run))
    assert new["averaging_weights"] == old["averaging_weights"]
    for name in old["results"]:
        assert new["results"][name]["loss"] == old["results"][name]["loss"]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--epochs", 5], "epochs 4"),
        (["--epochs", 4, "--arch", "ResNet18"], "arch PreResNet20"),
        (["--epochs", 4, "--saves-per-epoch", 2], "saves_per_epoch 1"),
        (["--epochs", 4, "--warmup-epochs", 1], "warmup_epochs 0"),
        (["--epochs", 4, "--label-smoothing", 0.1], "label_smoothing 0"),
        (["--epochs", 4, "--clip-grad", 1], "clip_grad None"),
        (["--epochs", 4, "--randaugment", 3], "randaugment 0"),
        (["--epochs", 4, "--amp"], "amp False"),
    ],
    ids=lambda value: value.partition(" ")[0] if isinstance(value, str) else "",
)
def test_a_state_of_other_settings_is_refused_and_can_be_tested(run, flags, words):
    line = refuse(run, SGD, *where(run), "--resume", *flags)
    assert "state.pt" in line
    assert words in line
    assert "another --save-dir" in line
    if "--arch" not in flags:
        succeed(call(SGD, *where(run), "--resume", *flags, "--evaluate"))


def test_where_nothing_is_saved_nothing_is_evaluated_for_it(tmp_path):
    line = refuse(tmp_path, SGD, *where(tmp_path / "run"), "--resume", "--evaluate")
    assert f"there is no {tmp_path / 'run/checkpoints/state.pt'} to evaluate" in line
    assert "accuracy" in succeed(call(SGD, *where(tmp_path / "run"), "--evaluate")).out


def test_twa_refuses_the_state_of_another_window(run):
    flags = ["--params_end", 5, "--epochs", 1, "--images", 256]
    succeed(call(TWA, *where(run), "--params_start", 1, *flags))
    line = refuse(run, TWA, *where(run), "--params_start", 2, *flags, "--resume")
    assert "twa_state.pt" in line
    # The same numbers, but other checkpoints behind them.
    shutil.copy(run / "checkpoints/0.pt", run / "checkpoints/3.pt")
    line = refuse(run, TWA, *where(run), "--params_start", 1, *flags, "--resume")
    assert "twa_state.pt" in line
    assert "window" in line


def test_two_settings_of_twa_run_side_by_side_and_replace_nothing(run, tmp_path):
    flags = [*where(run), "--params_end", 5, "--epochs", 1, "--images", 256]
    before = snapshot(run)
    for lr in (0.1, 0.2):
        succeed(call(TWA, *flags, "--lr", lr, "--out", tmp_path / f"{lr}"))
    assert snapshot(run) == before  # neither the checkpoints nor the log of their run
    first, second = (json.loads((tmp_path / lr / "twa.json").read_text()) for lr in ("0.1", "0.2"))
    assert first["results"]["SWA"] == second["results"]["SWA"]
    assert first["results"]["TWA"]["loss"] != second["results"]["TWA"]["loss"]
    for resume in ([], ["--resume"]):
        line = refuse(tmp_path, TWA, *flags, "--lr", 0.3, "--out", tmp_path / "0.1", *resume)
        assert "lr 0.1" in line
        assert "another --out" in line
    kept = load_state_dict(tmp_path / "0.1/twa.pt")
    succeed(call(TWA, *flags, "--lr", 0.1, "--out", tmp_path / "0.1"))  # the same once more
    assert_equal(load_state_dict(tmp_path / "0.1/twa.pt"), kept)


def test_epochs_of_other_images_than_the_checkpoints_run_had_are_noted(run):
    flags = [*where(run), "--params_end", 5, "--epochs", 0, "--images", 256]
    note = "note: --images is 256 here and left out in the checkpoints' run"
    assert note in succeed(call(TWA, *flags)).out
    description = json.loads((run / "run.json").read_text())
    description["arguments"]["images"] = 256
    (run / "run.json").write_text(json.dumps(description))
    assert "note:" not in succeed(call(TWA, *flags)).out


def test_twa_does_not_write_among_the_checkpoints(run):
    flags = ["--datasets", "Digits", "--arch", "PreResNet20", "--params_end", 5, "--epochs", 0]
    flags += ["--images", 256]
    flags += ["--save-dir", run / "checkpoints"]
    line = refuse(run, TWA, *flags, "--out", run / "checkpoints")
    assert "--out" in line
    before = names(run / "checkpoints")
    succeed(call(TWA, *flags, "--log-dir", run / "checkpoints"))
    assert names(run / "checkpoints") == before | {"twa"}
    assert (run / "checkpoints/twa/twa.pt").exists()


def test_the_table_has_a_dash_where_the_run_that_left_the_checkpoints_is_not_known(run, tmp_path):
    flags = [*where(run), "--params_end", 5, "--epochs", 1, "--images", 256]
    flags[flags.index("--log-dir") + 1] = tmp_path / "elsewhere"
    table = succeed(call(TWA, *flags)).out
    for name in ("last", "SWA", "TWA"):
        (row,) = (line for line in table.splitlines() if line.startswith(f"{name} "))
        assert row.split()[-2:] == ["–", "–"]
    results = json.loads((tmp_path / "elsewhere/twa.json").read_text())["results"]
    assert results["TWA"]["epochs"] is None and results["TWA"]["seconds"] is None
    assert results["TWA"]["accuracy"] > 10
    assert_picture(tmp_path / "elsewhere/twa.png")
    # The run is known, but not how long its last epochs took.
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text().splitlines()[0] + "\n")
    succeed(call(TWA, *where(run), "--params_end", 5, "--epochs", 1, "--images", 256))
    results = json.loads((run / "twa.json").read_text())["results"]
    assert results["TWA"]["epochs"] == 5 and results["TWA"]["seconds"] is None


def test_a_checkpoint_or_a_missing_file_is_no_state_to_resume(run):
    for name, words in (("4.pt", "not a resumable state"), ("none.pt", "no such")):
        path = run / "checkpoints" / name
        line = refuse(run, SGD, *where(run), "--epochs", 4, "--resume", path)
        assert str(path) in line
        assert words in line


def test_checkpoints_of_an_earlier_run_are_replaced_only_on_request(run):
    flags = [*where(run), "--epochs", 1]
    line = refuse(run, SGD, *flags)
    assert str(run / "checkpoints") in line
    assert "--resume" in line
    assert "--overwrite" in line
    # Its state is gone: there is nothing to resume, and the checkpoints stay all the same.
    (run / "checkpoints/state.pt").unlink()
    assert str(run / "checkpoints") in refuse(run, SGD, *flags, "--resume")
    succeed(call(SGD, *flags, "--overwrite"))
    assert names(run / "checkpoints") == {"0.pt", "1.pt", "state.pt"}
    assert len(read_lines(run / "metrics.jsonl")) == 1


def test_the_log_of_a_run_with_other_checkpoints_is_replaced_only_on_request(run, tmp_path):
    flags = [*where(run), "--epochs", 1]
    flags[flags.index("--save-dir") + 1] = tmp_path / "other"
    for more in ([], ["--resume"]):  # there is nothing yet to go on from
        line = refuse(run, SGD, *flags, *more)
        assert str(run / "run.json") in line
        assert "DST/checkpoints" in line
        assert "--overwrite" in line
    assert not (tmp_path / "other").exists()
    succeed(call(SGD, *flags, "--overwrite"))
    assert len(read_lines(run / "metrics.jsonl")) == 1
    assert len(names(run / "checkpoints")) == 6  # the other run's stand


# --- bad input: one line, exit status 2, and nothing is touched ---


def test_refusals_in_processes_of_their_own(run):
    """What `call` cannot see: warnings on stderr, and the true exit status."""
    write_pickled_code(run / "checkpoints/2.pt", run / "proof")
    before = snapshot(run)
    window = ["--params_start", 0, "--params_end", 5]
    commands = ((TWA, *where(run), *window), (SGD, *where(run), "--arch", "LeNet"))
    lines = [one_line(process(*command, cwd=run)) for command in commands]
    assert "2.pt" in lines[0]
    assert "LeNet" in lines[1]
    assert snapshot(run) == before  # nor was the code run: there is no proof


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--arch", "LeNet"], "LeNet"),
        (["--arch", "VGG16BN"], "VGG16BN"),  # needs larger images
        (["--datasets", "MNIST"], "MNIST"),
        (["--device", "nonsense"], "--device nonsense"),
        (["--lr", "nan"], "--lr"),
        (["--lr", "inf"], "--lr"),
        (["--lr", "-0.1"], "--lr"),
        (["--lr", "fast"], "--lr"),
        (["--epochs", "-1"], "--epochs"),
        (["--epochs", "1.5"], "--epochs"),
        (["--epochs", "1", "--warmup-epochs", "2"], "--warmup-epochs 2 is more than --epochs 1"),
        (["--batch-size", "0"], "--batch-size"),
        (["--momentum", "2"], "--momentum"),
        (["--print-freq", "0"], "--print-freq"),
        (["--pretrained"], "--pretrained"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
@pytest.mark.parametrize("script", [SGD, TWA])
def test_odd_values_are_refused(run, script, flags, words):
    window = ["--params_end", 5] if script == TWA else []
    assert words in refuse(run, script, *where(run), *window, *flags)


@pytest.mark.parametrize("script", [SGD, TWA, "lm/train.py"])
def test_help_tells_the_defaults_that_there_are(script):
    told = " ".join(succeed(call(script, "--help")).out.split())
    assert "seed of all randomness (default: 1)" in told
    assert "(default: the accelerator, else cpu)" in told
    assert "None" not in told


FACTORIES = """
from torch import nn

class Logits(nn.Linear):
    def __init__(self, of):
        super().__init__(64, 10)
        self.of = of

    def forward(self, x):
        return self.of(super().forward(x.flatten(1)))

def unknown_name():
    return undefined

def frozen():
    return Logits(lambda y: y).requires_grad_(False)

def a_dict():
    return Logits(lambda y: {"logits": y})

def out_of_range():
    return Logits(lambda y: [y][3])
"""


@pytest.mark.parametrize(
    "function, words",
    [
        ("unknown_name", "NameError"),
        ("frozen", "without parameters"),
        ("a_dict", "a dict"),
        ("out_of_range", "IndexError"),
    ],
)
def test_a_model_of_the_users_that_does_not_work_is_refused(run, function, words, monkeypatch):
    (run / "own_models.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(run)
    monkeypatch.delitem(sys.modules, "own_models", raising=False)
    flags = [word for word in where(run) if word not in ("--arch", "PreResNet20")]
    line = refuse(run, SGD, *flags, "--epochs", 1, "--model-factory", f"own_models:{function}")
    assert f"own_models:{function}" in line
    assert words in line


def test_a_compiler_that_is_missing_is_named(run, monkeypatch):
    class InductorError(RuntimeError):  # PyTorch's own is made in another way in each version
        __module__ = "torch._inductor.exc"

    def compile_model(model):
        raise InductorError("No working C++ compiler found\n\nSet TORCHDYNAMO_VERBOSE=1 for more")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_model)
    line = refuse(run, SGD, *where(run), "--epochs", 1, "--compile", "--overwrite")
    assert "--compile: " in line
    assert "No working C++ compiler found" in line


@pytest.mark.parametrize(
    "name, content",
    [
        ("run.json", b"{'epoch}\n"),
        ("run.json", b'{"arguments": "\xff"}'),
        ("run.json", b"[]"),
        ("metrics.jsonl", b"{'epoch}\n"),
        ("metrics.jsonl", b"{}\n"),
        ("metrics.jsonl", b'{"epoch": 1}\n'),
    ],
)
def test_a_damaged_description_of_the_run_is_refused(run, name, content):
    (run / name).write_bytes(content)
    line = refuse(run, TWA, *where(run), "--params_end", 5, "--epochs", 1)
    assert str(run / name) in line
    assert "damaged" in line


def test_too_many_saves_are_refused_before_anything_is_replaced(run):
    flags = ("--epochs", 1, "--saves-per-epoch", 9, "--overwrite")
    assert "8 iterations" in refuse(run, SGD, *where(run), *flags)


@pytest.mark.parametrize("script", [SGD, TWA, SWA])
@pytest.mark.parametrize("package", ["wandb", "tensorboard"])
def test_a_tracker_without_its_package_is_refused_before_anything_is_written(
    run, script, package, monkeypatch
):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    flags = [*where(run), "--params_end", 5] if script == TWA else where(run)
    if script == SWA:
        flags = swa_flags(run)
    line = refuse(run, script, *flags, "--epochs", 1, f"--{package}")
    assert f"--{package}" in line
    assert f"pip install {package}" in line
    if script != TWA:
        refuse(run, script, *flags, "--epochs", 1, f"--{package}", "--overwrite")


@pytest.mark.parametrize("start, end", [(3, 3), (4, 2), (0, 0)])
def test_an_empty_or_reversed_window_is_refused(run, start, end):
    line = refuse(run, TWA, *where(run), "--params_start", start, "--params_end", end)
    assert "window" in line
    assert f"[{start}, {end})" in line


def test_a_window_past_the_last_checkpoint_is_refused_with_what_is_there(run):
    line = refuse(run, TWA, *where(run), "--params_start", 3, "--params_end", 7)
    assert "5.pt is missing" in line
    assert "0 to 4" in line


def test_a_missing_checkpoint_within_the_window_is_refused(run):
    (run / "checkpoints/2.pt").unlink()
    line = refuse(run, TWA, *where(run), "--params_end", 5)
    assert "2.pt is missing" in line


def test_a_missing_folder_or_start_point_is_refused(run):
    flags = where(run)
    flags[flags.index("--save-dir") + 1] = run / "nowhere"
    assert "nowhere" in refuse(run, TWA, *flags, "--params_end", 5)
    line = refuse(run, TWA, *where(run), "--params_end", 5, "--train_start", 7)
    assert str(run / "checkpoints/7.pt") in line


def test_a_start_average_larger_than_the_window_is_refused(run):
    line = refuse(run, TWA, *where(run), "--params_end", 5, "--start-average", 6)
    assert "--start-average" in line
    assert "5 checkpoints" in line


class Trap:
    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def write_pickled_code(path: Path, proof: Path = Path("proof")) -> None:
    torch.save({"conv1.weight": Trap(str(proof))}, path)


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def poison(value: float):
    def write(path: Path) -> None:
        state = load_state_dict(path)
        state["layer2.0.conv1.weight"] = state["layer2.0.conv1.weight"].clone()
        state["layer2.0.conv1.weight"][0, 0, 0, 0] = value
        save(state, path)  # which leaves the old file to those that have mapped it: this process

    return write


DAMAGE = {
    "truncated": (truncate, "cannot be read"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read"),
    "another architecture": (
        lambda path: torch.save(models.build("PreResNet20", 10, 3).state_dict(), path),
        "conv1.weight is [16, 3, 3, 3] there and [16, 1, 3, 3] in the model",
    ),
    "NaN": (poison(math.nan), "layer2.0.conv1.weight holds NaN"),
    "infinity": (poison(math.inf), "layer2.0.conv1.weight holds NaN or infinity"),
    "pickled code": (write_pickled_code, "pickled code"),
    "a list": (lambda path: torch.save([1, 2], path), "not a state_dict"),
}


@pytest.mark.parametrize(
    "kind, number",
    # What is seen only beside the model or the others is looked for at each place.
    [
        *((kind, 2) for kind in DAMAGE),
        *((k, n) for k in ("NaN", "another architecture") for n in (0, 4)),
    ],
)
def test_a_bad_checkpoint_is_refused_by_its_name_wherever_it_stands(run, kind, number):
    damage, words = DAMAGE[kind]
    path = run / f"checkpoints/{number}.pt"
    damage(path)
    line = refuse(run, TWA, *where(run), "--params_end", 5)
    assert str(path) in line
    assert words in line


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_bad_start_point_outside_the_window_is_refused_by_its_name(run, kind):
    damage, words = DAMAGE[kind]
    path = run / "checkpoints/0.pt"
    damage(path)
    window = ("--params_start", 1, "--params_end", 5, "--train_start", 0)
    line = refuse(run, TWA, *where(run), *window)
    assert str(path) in line
    assert words in line


def test_divergence_ends_in_one_line_and_leaves_the_last_state(run):
    # A state whose next epoch must diverge.
    path = run / "checkpoints/state.pt"
    state = torch.load(path, weights_only=True)
    state["epoch"] = state["progress"]["epoch"] = 3
    state["optimizer"]["param_groups"][0]["lr"] = 1e30
    state["scheduler"]["base_lrs"] = [1e34]
    torch.save(state, path)
    before = {name: content for name, content in snapshot(run).items() if name.endswith(".pt")}
    line = one_line(call(SGD, *where(run), "--epochs", 4, "--resume"))
    assert "epoch 4/4" in line
    assert "lower --lr" in line
    after = {name: content for name, content in snapshot(run).items() if name.endswith(".pt")}
    assert after == before
    assert [m["epoch"] for m in read_lines(run / "metrics.jsonl")] == [1, 2, 3]


def test_an_absurd_rate_ends_in_one_line_and_leaves_no_bad_checkpoint(run, tmp_path):
    new = tmp_path / "new"
    assert "--lr" in one_line(call(SGD, *where(new), "--epochs", 2, "--lr", 1e30))
    assert names(new / "checkpoints") == {"0.pt", "state.pt"}
    before = snapshot(run)
    flags = ["--params_end", 5, "--epochs", 2, "--lr", 1e30, "--out", tmp_path / "twa"]
    paper = ["--extract", "Schmidt", "--opt", "SGD"]
    assert "--lr" in one_line(call(TWA, *where(run), *flags, *paper))
    assert snapshot(run) == before
    assert {name for name in names(tmp_path / "twa") if name.endswith(".pt")} == {"twa_state.pt"}


# --- SWA ---


def swa_flags(folder: Path) -> list:
    return ["--dir", folder, "--dataset", "Digits", "--model", "PreResNet20"]


TAIL = ["--epochs", 6, "--swa", "--swa_start", 4, "--swa_lr", 0.05, "--eval_freq", 5]


@pytest.fixture(scope="module")
def tail(tmp_path_factory) -> Path:
    """The folder of a run with SWA over epochs 4 to 6."""
    folder = tmp_path_factory.mktemp("tail") / "run"
    result = succeed(processes.in_child(folder, SWA, *swa_flags(folder), *TAIL))
    assert result.err == ""
    return folder


@pytest.fixture
def tail_copy(tail, tmp_path) -> Path:
    shutil.copytree(tail, tmp_path / "tail")
    return tmp_path / "tail"


def test_swa_leaves_these_files_and_no_others(tail):
    checkpoints = {f"{n}.pt" for n in range(7)} | {"state.pt", "swa.pt"}
    assert names(tail / "checkpoints") == checkpoints
    files = {"checkpoints", "log", "metrics.jsonl", "run.json", "swa.json", "swa.png"}
    assert names(tail) == files
    assert_picture(tail / "swa.png")


def test_swa_writes_a_row_an_epoch(tail):
    metrics = read_lines(tail / "metrics.jsonl")
    assert [m["epoch"] for m in metrics] == [1, 2, 3, 4, 5, 6]
    for m in metrics:
        assert list(m) == [
            *("epoch", "rate", "train_loss", "train_accuracy", "test_loss", "test_accuracy"),
            *("SWA_loss", "SWA_accuracy", "seconds"),
        ]
    # Every fifth epoch from the start on, and at the end.
    assert [m["epoch"] for m in metrics if m["SWA_loss"] is not None] == [5, 6]


def test_the_average_is_the_mean_of_the_checkpoints_of_the_tail(tail):
    mean = average([tail / f"checkpoints/{n}.pt" for n in (4, 5, 6)])
    averaged = load_state_dict(tail / "checkpoints/swa.pt")
    for key, _ in preresnet().named_parameters():
        # A running mean in float32 is rounded at each of three updates.
        torch.testing.assert_close(averaged[key], mean[key], rtol=1e-6, atol=1e-6)
    assert not torch.equal(
        mean["fc.weight"], load_state_dict(tail / "checkpoints/6.pt")["fc.weight"]
    )


def test_the_swa_solution_that_twa_reports_is_that_of_the_swa_run(tail_copy):
    window = ("--params_start", 4, "--params_end", 7, "--start", "SWA", "--epochs", 1, "--lr", 0)
    succeed(call(TWA, *where(tail_copy), *window))
    swa = json.loads((tail_copy / "swa.json").read_text())["results"]["SWA"]
    results = json.loads((tail_copy / "twa.json").read_text())["results"]
    assert results["SWA"]["accuracy"] == swa["accuracy"]
    # Rounding of the weights, through twenty layers.
    assert results["SWA"]["loss"] == pytest.approx(swa["loss"], rel=1e-4)
    # And TWA with a rate of zero stays there.
    assert results["TWA"]["loss"] == results["SWA"]["loss"]
    model = preresnet()
    load_into(model, tail_copy / "checkpoints/swa.pt")
    assert evaluate(model, loaders()[1])["loss"] == pytest.approx(swa["loss"], rel=1e-6)


def test_swa_refuses_the_state_of_another_rate_by_its_own_flag(tail_copy):
    line = refuse(tail_copy, SWA, *swa_flags(tail_copy), *TAIL, "--swa_lr", 0.1, "--resume")
    assert "swa_lr 0.05" in line
    assert "another --dir" in line


def test_swa_c_epochs_averages_every_second_epoch(tmp_path):
    flags = ["--epochs", 5, "--swa", "--swa_start", 2, "--swa_c_epochs", 2, "--batch_size", 300]
    succeed(call(SWA, *swa_flags(tmp_path), *flags))
    mean = average([tmp_path / f"checkpoints/{n}.pt" for n in (2, 4)])
    averaged = load_state_dict(tmp_path / "checkpoints/swa.pt")
    for key, _ in preresnet().named_parameters():
        torch.testing.assert_close(averaged[key], mean[key], rtol=1e-6, atol=1e-6)


def test_without_swa_the_run_is_plain_sgd(tmp_path):
    succeed(call(SWA, *swa_flags(tmp_path), "--epochs", 2, "--batch_size", 300))
    assert names(tmp_path / "checkpoints") == {"0.pt", "1.pt", "2.pt", "state.pt"}
    results = json.loads((tmp_path / "swa.json").read_text())["results"]
    assert list(results) == ["SGD"]
    model, (train, test) = preresnet(), loaders(300)
    load_into(model, tmp_path / "checkpoints/2.pt")
    train.set_epoch(0)
    torch.optim.swa_utils.update_bn(list(train), model)
    assert results["SGD"]["loss"] == pytest.approx(evaluate(model, test)["loss"], rel=1e-4)
    assert "SWA_loss" not in read_lines(tmp_path / "metrics.jsonl")[0]


@pytest.mark.parametrize(
    "swa, swa_start, epochs, steps",
    [
        (True, 161, 300, 7),
        (True, 4, 6, 8),
        (True, 21, 40, 29),
        (False, 161, 40, 29),
    ],
)
def test_swa_schedule_follows_its_formula(swa, swa_start, epochs, steps):
    spec = importlib.util.spec_from_file_location("swa_train", ROOT / SWA)
    script = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(script)
    sys.path[:] = path
    args = argparse.Namespace(swa=swa, swa_start=swa_start, epochs=epochs, lr_init=0.1, swa_lr=0.05)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], args.lr_init)
    scheduler = script.swa_schedule(optimizer, args, steps)
    head = (swa_start if swa else epochs) * steps
    last = 0.05 if swa else 0.001
    # Corners lie on whole steps: at most half a step (the upper) or one (the lower) beside.
    tolerance = (0.1 - last) / (0.4 * head) + 1e-12
    for step in range(epochs * steps):
        done = step / head
        fallen = min(max((done - 0.5) / 0.4, 0.0), 1.0)
        rate = optimizer.param_groups[0]["lr"]
        assert rate == pytest.approx(0.1 + fallen * (last - 0.1), abs=tolerance), step
        optimizer.step()
        scheduler.step()
    assert rate == pytest.approx(last)


def test_the_run_takes_its_rates_from_the_schedule(tail):
    rates = [m["rate"] for m in read_lines(tail / "metrics.jsonl")]
    assert rates[:3] == pytest.approx([0.1, 0.1, 0.1], abs=0.001)
    assert rates[3] == pytest.approx(0.1 - 0.05 * 0.25 / 0.4, abs=0.001)
    assert rates[4:] == pytest.approx([0.05, 0.05])


def test_swa_stopped_in_mid_epoch_ends_with_the_weights_of_an_uninterrupted_run(tail, tmp_path):
    """The state is saved every other epoch: it is older than the newest checkpoint."""
    flags = [*swa_flags(tmp_path), *TAIL, "--save_freq", 4]
    with killed_in(6):
        call(SWA, *flags)
    assert "5.pt" in names(tmp_path / "checkpoints")
    assert "swa.pt" not in names(tmp_path / "checkpoints")
    succeed(call(SWA, *flags, "--resume"))
    assert_same_checkpoints(tmp_path, tail, [*range(7), "swa"])
    metrics = without_seconds(tmp_path / "metrics.jsonl")
    assert metrics == without_seconds(tail / "metrics.jsonl")


def test_swa_stopped_in_its_first_epoch_can_be_resumed(tail, tmp_path):
    with killed_in(1):
        call(SWA, *swa_flags(tmp_path), *TAIL)
    with killed_in(2):
        call(SWA, *swa_flags(tmp_path), *TAIL, "--resume")
    assert_same_checkpoints(tmp_path, tail, (0, 1))


def test_a_finished_swa_run_that_is_resumed_does_nothing_more(tail_copy):
    before = snapshot(tail_copy)
    succeed(call(SWA, *swa_flags(tail_copy), *TAIL, "--resume", "--num_workers", 1))
    after = snapshot(tail_copy)
    assert after.keys() == before.keys()
    for name in (*(f"checkpoints/{n}.pt" for n in range(7)), "metrics.jsonl", "swa.json"):
        assert after[name] == before[name], name


def test_swa_replaces_an_earlier_run_only_on_request(tail_copy):
    line = refuse(tail_copy, SWA, *swa_flags(tail_copy), *TAIL)
    assert "--resume" in line
    assert "--overwrite" in line
    succeed(call(SWA, *swa_flags(tail_copy), "--epochs", 1, "--overwrite"))
    assert {"2.pt", "6.pt"}.isdisjoint(names(tail_copy / "checkpoints"))


def test_a_folder_of_another_model_is_refused(tail_copy):
    flags = swa_flags(tail_copy)
    flags[-1] = "ResNet18"
    line = refuse(tail_copy, SWA, *flags, *TAIL, "--resume")
    assert "PreResNet20" in line
    assert "ResNet18" in line
    flags = where(tail_copy)
    flags[flags.index("PreResNet20")] = "ResNet18"
    line = refuse(tail_copy, TWA, *flags, "--params_start", 4, "--params_end", 7)
    assert ".pt: of another architecture" in line


def test_a_window_past_the_last_epoch_of_the_tail_is_refused_with_what_is_there(tail_copy):
    line = refuse(tail_copy, TWA, *where(tail_copy), "--params_start", 4, "--params_end", 12)
    assert "7.pt is missing" in line
    assert "0 to 6" in line


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--swa", "--swa_start", 7], "--swa_start 7"),
        (["--swa_lr", "nan"], "--swa_lr"),
        (["--swa_start", 0], "--swa_start"),
        (["--epochs", 0], "--epochs"),
        (["--batch_size", 0], "--batch_size"),
        (["--dataset", "MNIST"], "MNIST"),
        (["--model", "LeNet"], "LeNet"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else None,
)
def test_odd_values_are_refused_by_swa(tail_copy, flags, words):
    line = refuse(tail_copy, SWA, *swa_flags(tail_copy), "--epochs", 6, *flags, "--overwrite")
    assert words in line


# --- the result ---


THIS_PYTHON = f'exec "{sys.executable}" "$@"'


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory) -> Path:
    """What `bash run.sh` leaves in a fresh copy of the tree, with the settings that stand there."""
    copy = tmp_path_factory.mktemp("copy") / "twa"
    ignored = shutil.ignore_patterns(".*", "results", "datasets", "save_temp", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=ignored)
    bash(copy / "run.sh", THIS_PYTHON)
    return copy / "results/PreResNet20_Digits/seed1"


def bash(script: Path, python: str, *args: str) -> None:
    """Runs a shell script with a `python` on the PATH that is this line of a shell."""
    path = script.parents[1] / "bin"
    path.mkdir(exist_ok=True)
    (path / "python").write_text(f"#!/bin/sh\n{python}\n")
    (path / "python").chmod(0o755)
    done = subprocess.run(
        ["bash", script, *args],
        env=ENVIRONMENT | {"PATH": f"{path}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_run_sh_goes_on_with_what_stands(digits_run):
    before = [(digits_run / f"{name}metrics.jsonl").read_text() for name in ("", "twa_")]
    bash(digits_run.parents[2] / "run.sh", THIS_PYTHON)
    after = [(digits_run / f"{name}metrics.jsonl").read_text() for name in ("", "twa_")]
    assert after == before  # the seconds too: nothing was trained again


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("name", ["run.sh", "swa/run.sh", "swa/run_twa.sh", "soup/run.sh"])
def test_a_folder_of_data_may_have_a_space_in_its_name(tmp_path, name):
    script = tmp_path / "twa" / name
    script.parent.mkdir(parents=True)
    shutil.copy(ROOT / name, script)
    shutil.copy(ROOT / "env.sh", tmp_path / "twa")
    calls = tmp_path / "calls"
    # The first call is that of env.sh, which feeds a program to it.
    python = f'[ "$1" = - ] || printf "%s\\n" "$@" >> "{calls}"'
    bash(script, python, "Digits", "PreResNet20", "/some where")
    arguments = calls.read_text().splitlines()
    assert arguments.count("/some where") == sum(word.endswith(".py") for word in arguments) > 0


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_quality_twa_on_the_first_half_is_near_the_full_run_and_above_its_median(digits_run):
    """The claim of the head stage, on Digits, by the real run: most of a minute."""
    summary = json.loads((digits_run / "twa.json").read_text())
    description = json.loads((digits_run / "twa_run.json").read_text())["arguments"]
    metrics = read_lines(digits_run / "metrics.jsonl")
    epochs = len(metrics)
    assert description["params_start"] == 0
    assert description["params_end"] - 1 == epochs // 2  # a checkpoint an epoch
    assert summary["epochs"] == 5
    twa = summary["results"]["TWA"]["accuracy"]
    window = [m["test_accuracy"] for m in metrics[: epochs // 2]]
    assert twa >= metrics[-1]["test_accuracy"] - 0.5
    assert twa > statistics.median(window)
