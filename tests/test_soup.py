"""The fine-tune stage: held-out data, fine-tuning, soups against a plain computation, bad input."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import models
import train_sgd_cifar
import train_twa
from soup import finetune, soup
from training import data
from training.data import DATASETS, Split
from training.files import save
from training.optimizers import SCHEDULES, schedule_of
from training.run import run_script
from twa.files.checkpoints import average
from twa.storage.memory import Plan
from utils import UserError

ROOT = Path(soup.__file__).parents[1]
DIGITS = ["--datasets", "Digits", "--batch-size", "64", "--device", "cpu"]
HELD_OUT = ["--val-ratio", "20"]


def call(script, *arguments) -> None:
    """A script in this process, as from a command line."""
    before, sys.argv = sys.argv, [script.__name__, *map(str, arguments)]
    try:
        run_script(script.main)
    finally:
        sys.argv = before


def error_of(capsys, script, *arguments) -> str:
    """The line on stderr of a call that ends with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        call(script, *arguments)
    assert end.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A base model, four fine-tuned ones, and all soups of them."""
    folder = tmp_path_factory.mktemp("soup")
    arguments = ["--split", *HELD_OUT, "--epochs", 3, "--arch", "PreResNet20", *DIGITS]
    call(train_sgd_cifar, *arguments, "--save-dir", folder / "base", "--log-dir", folder / "base")
    call(finetune, *finetune_arguments(folder))
    call(soup, *soup_arguments(folder), "--epochs", 2)
    return folder


def finetune_arguments(folder: Path) -> list:
    grid = ["--lr", 0.001, 0.1, "--epochs", 1, 2, "--label-smoothing", 0, 0.1, "--randaugment", 5]
    paths = ["--base", folder / "base/3.pt", "--save-dir", folder / "models"]
    return [*DIGITS, *HELD_OUT, "--models", 4, *grid, *paths]


def soup_arguments(folder: Path) -> list:
    paths = ["--checkpoints", folder / "models/*.pt", "--log-dir", folder / "soup"]
    return [*DIGITS, *HELD_OUT, "--bn-images", 200, *paths]


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- held-out data and the recipe ---


def test_held_out_part_is_fixed_by_the_seed_and_disjoint():
    images = torch.arange(50, dtype=torch.uint8).view(50, 1, 1, 1).expand(50, 3, 32, 32)
    split = Split(images, torch.arange(50), DATASETS["CIFAR10"])
    rest, held_out = split.hold_out(10, seed=1)
    assert len(rest) == 45 and len(held_out) == 5
    assert sorted([*rest.labels.tolist(), *held_out.labels.tolist()]) == list(range(50))
    assert torch.equal(held_out.images[:, 0, 0, 0], held_out.labels.byte())
    assert torch.equal(split.hold_out(10, seed=1)[1].labels, held_out.labels)
    assert not torch.equal(split.hold_out(10, seed=2)[1].labels, held_out.labels)


@pytest.mark.parametrize("percent", [0.1, 99.9])
def test_a_part_without_images_is_refused(percent):
    split = Split(torch.zeros(50, 3, 32, 32).byte(), torch.zeros(50), DATASETS["CIFAR10"])
    with pytest.raises(UserError, match="both parts need some"):
        split.hold_out(percent, seed=1)


def test_warmup_rises_linearly_before_the_schedule():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    scheduler = schedule_of(SCHEDULES["linear"], optimizer, steps=8, warmup=4)
    rates = []
    for _ in range(8):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == [0.5, 1.0, 1.5, 2.0, 2.0, 1.5, 1.0, 0.5]


def test_transformer_recipe_then_twa_on_held_out_data(tmp_path, capsys):
    common = [
        *DIGITS,
        "--model-factory",
        "tests.reduced:for_digits",
        "--split",
        *HELD_OUT,
        "--save-dir",
        tmp_path,
    ]
    common += ["--log-dir", tmp_path]
    recipe = ["--optimizer", "adamw", "--warmup-epochs", 1, "--label-smoothing", 0.1]
    recipe += ["--clip-grad", 1, "--randaugment", 9, "--schedule", "cosine", "--lr", 3e-4]
    call(train_sgd_cifar, *common, *recipe, "--epochs", 2)
    twa = ["--params_end", 3, "--opt", "AdamW", "--schedule", "cosine", "--epochs", 1]
    call(train_twa, *common, *twa)
    assert "held out" not in capsys.readouterr().out
    call(train_twa, *common, *twa, "--randomseed", 2, "--out", tmp_path / "other")
    assert "held out 20 % by seed 1" in capsys.readouterr().out


@pytest.mark.parametrize("script", [train_sgd_cifar, train_twa])
@pytest.mark.parametrize("percent", [0, 100])
def test_a_share_of_nothing_or_everything_is_refused(script, percent, tmp_path, capsys):
    paths = ["--save-dir", tmp_path / "new", "--log-dir", tmp_path / "new"]
    arguments = [*DIGITS, "--arch", "PreResNet20", "--split", "--val-ratio", percent, *paths]
    line = error_of(capsys, script, *arguments)
    assert "--val-ratio" in line and str(percent) in line
    assert not (tmp_path / "new").exists()


# --- fine-tuning ---


def test_fine_tuning_leaves_models_and_their_settings(folder):
    records = lines_of(folder / "models/runs.jsonl")
    assert [record["file"] for record in records] == ["001.pt", "002.pt", "003.pt", "004.pt"]
    for record in records:
        assert 0.001 <= record["settings"]["lr"] <= 0.1
        assert record["settings"]["held_out"] == "20 % by seed 1"
        assert record["validation"]["accuracy"] > 50
    assert len({record["settings"]["lr"] for record in records}) == 4


def test_finished_runs_are_kept_and_damaged_ones_are_run_again(folder, tmp_path):
    shutil.copytree(folder / "models", tmp_path, dirs_exist_ok=True)
    (tmp_path / "002.pt").write_bytes((folder / "models/002.pt").read_bytes()[:1000])
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.pt")}
    call(finetune, *finetune_arguments(folder), "--save-dir", tmp_path)
    for name, time in times.items():
        assert ((tmp_path / name).stat().st_mtime_ns == time) == (name != "002.pt")
    again = torch.load(tmp_path / "002.pt", weights_only=True)
    first = torch.load(folder / "models/002.pt", weights_only=True)
    assert all(torch.equal(again[key], first[key]) for key in first)  # the same run


def test_runs_of_other_settings_are_not_mixed(folder, capsys):
    line = error_of(capsys, finetune, *finetune_arguments(folder), "--wd", 0.5)
    assert "001.pt" in line and "weight_decay" in line and "--save-dir" in line


def test_a_run_that_diverges_is_left_out(folder, tmp_path, capsys):
    paths = ["--base", folder / "base/3.pt", "--save-dir", tmp_path]
    call(finetune, *DIGITS, *HELD_OUT, *paths, "--lr", 1e30, 0.01, "--epochs", 2)
    assert "001.pt diverged" in capsys.readouterr().out
    assert [path.name for path in tmp_path.glob("*.pt")] == ["002.pt"]
    assert [bool(r["validation"]) for r in lines_of(tmp_path / "runs.jsonl")] == [False, True]


def test_more_draws_keep_the_first_ones():
    class Arguments:
        lr, weight_decay, epochs, label_smoothing = [1e-3, 1e-1], [0.0, 1e-4], [1, 2], [0.0]
        randaugment, randomseed, models = [0, 9], 1, 5

    five = finetune.settings_of_runs(Arguments)
    Arguments.models = 9
    assert finetune.settings_of_runs(Arguments)[:5] == five
    Arguments.models = None
    assert len(finetune.settings_of_runs(Arguments)) == 16  # the grid


# --- soups against a plain computation ---


@pytest.mark.parametrize("seed", range(5))
def test_greedy_soup_equals_a_plain_computation(tmp_path, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (40,), generator=generator)
    images = torch.randn(40, 6, generator=generator) + torch.eye(3, 6)[labels]
    weights = torch.randn(8, 3, 6, generator=generator) + 0.5 * torch.eye(3, 6)
    paths = [tmp_path / f"{i}.pt" for i in range(8)]
    for path, weight in zip(paths, weights, strict=True):
        save({"weight": weight}, path)

    def accuracy(weight: torch.Tensor) -> float:
        return ((images @ weight.T).argmax(1) == labels).double().mean().item()

    # Recipe 1 of the paper, word by word.
    order = sorted(range(8), key=lambda i: accuracy(weights[i]), reverse=True)
    ingredients = []
    for i in order:
        with_i = accuracy(weights[[*ingredients, i]].mean(0))
        if not ingredients or with_i >= accuracy(weights[ingredients].mean(0)):
            ingredients.append(i)

    found = soup.greedy_soup(
        paths, [accuracy(w) for w in weights], lambda some: accuracy(average(some)["weight"])
    )
    assert found == [paths[i] for i in ingredients]


def test_soups_are_the_means_of_their_ingredients(folder):
    results = {record["name"]: record for record in lines_of(folder / "soup/results.jsonl")}
    model = models.build("PreResNet20", 10, 1, 8)
    trainable = [name for name, _ in model.named_parameters()]
    for name in ("uniform", "greedy", "TWA-t", "TWA-v"):
        states = [torch.load(path, weights_only=True) for path in results[name]["models"]]
        alpha = results[name].get("averaging_weights")
        shares = [1 / len(states)] * len(states) if alpha is None else alpha.values()
        saved = torch.load(folder / f"soup/{name}.pt", weights_only=True)
        for key in trainable:
            mean = sum(a * state[key].double() for a, state in zip(shares, states, strict=True))
            torch.testing.assert_close(saved[key].double(), mean, rtol=1e-4, atol=1e-5)
    singles = [r["validation"]["accuracy"] for name, r in results.items() if name.endswith(".pt")]
    assert len(singles) == 4
    assert results["best single model"]["validation"]["accuracy"] == max(singles)
    assert results["greedy"]["validation"]["accuracy"] >= max(singles)
    assert results["TWA-v"]["validation"]["loss"] < results["uniform"]["validation"]["loss"]
    assert (folder / "soup/soup.png").stat().st_size > 1000


def test_ensemble_equals_a_plain_computation(folder, tmp_path):
    results = {record["name"]: record for record in lines_of(folder / "soup/results.jsonl")}
    training, test = data.load("Digits", tmp_path, torch.device("cpu"))
    rest, _ = training.hold_out(20, seed=1)
    train = data.Loader(rest, 64, train=True, seed=1)
    (images, labels), *more = data.Loader(test, 10_000, train=False)
    assert not more
    logits = torch.zeros(len(labels), 10)
    for path in results["ensemble"]["models"]:
        model = models.build("PreResNet20", 10, 1, 8)
        model.load_state_dict(torch.load(path, weights_only=True))
        batches = list(train)[:4]  # 200 images, in whole batches of 64
        torch.optim.swa_utils.update_bn(batches, model)
        model.eval()
        with torch.no_grad():
            logits += model(images) / 4
    expected = torch.nn.functional.cross_entropy(logits, labels).item()
    assert results["ensemble"]["test"]["loss"] == pytest.approx(expected, rel=1e-3)


def test_a_second_call_adds_another_kind_and_makes_nothing_again(folder, capsys):
    before = lines_of(folder / "soup/results.jsonl")
    capsys.readouterr()
    call(soup, *soup_arguments(folder), "--epochs", 2, "--granularity", "layer", "--twa", "v")
    told = [line for line in capsys.readouterr().out.splitlines() if ": validation loss" in line]
    assert len(told) == 1 and told[0].startswith("TWA-v layer:")
    after = lines_of(folder / "soup/results.jsonl")
    assert after[:-1] == before and after[-1]["name"] == "TWA-v layer"


def test_twa_by_other_flags_is_refused_and_what_stands_stays(folder, tmp_path, capsys):
    shutil.copytree(folder / "soup", tmp_path / "soup")
    path, twa = tmp_path / "soup/results.jsonl", ["--epochs", 2, "--log-dir", tmp_path / "soup"]
    twa += ["--twa", "v", "--granularity", "channel"]
    call(soup, *soup_arguments(folder), *twa)
    *others, record = lines_of(path)
    record["settings"].pop("unit", None)  # as earlier versions wrote it
    path.write_text("".join(json.dumps(line) + "\n" for line in [*others, record]))
    call(soup, *soup_arguments(folder), *twa)
    assert lines_of(path)[-1] == record  # not made again
    before = {file: file.read_bytes() for file in path.parent.iterdir() if file.is_file()}
    for key, value in {"unit": "block", "lr": 0.5, "epochs": 3, "opt": "Adam"}.items():
        line = error_of(capsys, soup, *soup_arguments(folder), *twa, f"--{key}", value)
        assert str(path) in line and f"TWA-v channel was made with {key} " in line
        assert f"instead of {value};" in line and "--log-dir" in line
    assert {file: file.read_bytes() for file in path.parent.iterdir() if file.is_file()} == before
    call(soup, *soup_arguments(folder), *twa, "--lr", 0.5, "--bn-images", 300)  # other data
    assert lines_of(path)[-1]["settings"]["lr"] == 0.5


def test_the_help_says_the_rate_that_many_steps_have(folder, tmp_path, capsys):
    shutil.copytree(folder / "soup", tmp_path / "soup")
    twa = ["--twa", "v", "--granularity", "channel", "--epochs", 12]  # of 5 steps each
    call(soup, *soup_arguments(folder), *twa, "--log-dir", tmp_path / "soup")
    assert "coefficients, rate 0.02, basis" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        call(soup, "--help")
    told = " ".join(capsys.readouterr().out.split())
    assert "(default: direction)" in told and "(default with PCA: 0.02; for SGD 0.1)" in told


def test_a_solution_is_made_unless_it_is_there_with_the_same_settings(tmp_path):
    calls = []

    def function() -> dict:
        calls.append(len(calls))
        return {part: {"loss": 0.1, "accuracy": 90.0 + calls[-1]} for part in soup.PARTS}

    for settings in ({"lr": 1}, {"lr": 1}, {"lr": 2}):
        solutions = soup.Solutions(tmp_path, evaluator=None)  # as a call of its own
        record = solutions.make("a", settings, function)
        assert record == lines_of(tmp_path / "results.jsonl")[0]
        assert record["settings"] == settings
    assert calls == [0, 1]
    assert record["test"]["accuracy"] == 91.0
    solutions.make("b", settings, function)
    assert [record["name"] for record in lines_of(tmp_path / "results.jsonl")] == ["a", "b"]


def test_models_measured_among_others_are_measured_again(folder, tmp_path):
    """As after a call on some of the models that was stopped before its ensemble."""
    shutil.copytree(folder / "soup", tmp_path / "soup")
    path, arguments = tmp_path / "soup/results.jsonl", soup_arguments(folder)
    before = lines_of(path)
    stale = [{**before[0], "settings": before[0]["settings"] | {"checkpoints": "others"}}]
    path.write_text("".join(json.dumps(record) + "\n" for record in [*stale, *before[1:]]))
    call(soup, *arguments, "--epochs", 2, "--log-dir", tmp_path / "soup")
    assert lines_of(path)[: len(before)] == before


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_run_sh_has_a_folder_for_each_seed(tmp_path, monkeypatch):
    (tmp_path / "twa/soup").mkdir(parents=True)
    for name in ("soup/run.sh", "env.sh"):
        shutil.copy(ROOT / name, tmp_path / "twa" / name)
    (tmp_path / "python").write_text('#!/bin/sh\n[ "$1" = - ] || echo "$@"\n')
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("SEED", raising=False)
    for seed, given in (("1", {}), ("2", {"SEED": "2"})):
        command = ["bash", tmp_path / "twa/soup/run.sh"]
        done = subprocess.run(
            command, env=os.environ | given, capture_output=True, text=True, check=True
        )
        calls = done.stdout.splitlines()
        assert len(calls) == 5
        for line in calls:
            assert f"--randomseed {seed} " in line
            assert f"../results/soup_PreResNet20_Digits/seed{seed}" in line


def test_four_bits(folder):
    call(soup, *soup_arguments(folder), "--epochs", 2, "--bits", 4, "--twa", "v")
    results = {record["name"]: record for record in lines_of(folder / "soup/results.jsonl")}
    losses = [results[name]["validation"]["loss"] for name in ("TWA-v 4 bits", "uniform")]
    assert losses[0] < losses[1]


def test_a_model_of_the_users_own(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(
        "import models\ndef net():\n    return models.build('PreResNet20', 10, 1, 8)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    arguments = [*DIGITS, *HELD_OUT, "--checkpoints", folder / "models/*.pt", "--twa"]
    arguments += ["--log-dir", tmp_path / "soup"]
    call(soup, *arguments, "--model-factory", "mine:net")
    assert (tmp_path / "soup/uniform.pt").exists()
    line = error_of(capsys, soup, *arguments, "--model-factory", "mine:other")
    assert "mine:other" in line
    line = error_of(capsys, soup, *arguments, "--model-factory", "torch.nn:Flatten")
    assert "torch.nn:Flatten" in line and "without parameters" in line
    line = error_of(capsys, soup, *arguments, "--model-factory", "torch.nn:PReLU")
    assert "torch.nn:PReLU" in line and "the data set needs [2, 10]" in line
    assert "MODULE:FUNCTION" in error_of(capsys, soup, *arguments, "--model-factory", "mine.net")


@pytest.mark.parametrize(
    "page, row, checkpoints, sizes",
    [
        ("docs/imagenet.md", "basis of 60+2", 301, [11_689_512, 86_567_656]),
        ("docs/imagenet.md", "basis of 90+1", 150, [11_689_512, 86_567_656]),
        ("soup/README.md", "basis of 72 ViT-B/32", 72, [88_362_216]),
    ],
)
def test_the_memory_that_the_pages_name_is_what_a_basis_takes(page, row, checkpoints, sizes):
    lines = (ROOT / page).read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"| {row}")]
    told = re.findall(r"[\d.]+", line)[-3 * len(sizes) :]
    for (size, bits), figure in zip(itertools.product(sizes, (32, 8, 4)), told, strict=True):
        taken = Plan(n=checkpoints, bits=bits).basis_bytes(size) / 1e9
        digits = len(figure.partition(".")[2])
        assert f"{taken:.{digits}f}" == figure, (size, bits)


# --- bad input ---


def test_an_empty_glob(folder, tmp_path, capsys):
    arguments = [*DIGITS, "--checkpoints", tmp_path / "*.pt", "--log-dir", tmp_path / "soup"]
    line = error_of(capsys, soup, *arguments)
    assert "--checkpoints" in line and str(tmp_path) in line


def test_checkpoints_of_different_architectures(folder, tmp_path, capsys):
    save(models.build("PreResNet20", 10, 1, 8).state_dict(), tmp_path / "1.pt")
    save(models.build("ResNet18", 10, 1, 8).state_dict(), tmp_path / "2.pt")
    arguments = [*DIGITS, "--checkpoints", tmp_path / "*.pt", "--log-dir", tmp_path / "soup"]
    line = error_of(capsys, soup, *arguments)
    assert "2.pt" in line and "another architecture" in line
    assert not (tmp_path / "soup").exists()


def test_a_class_count_that_differs(folder, tmp_path, capsys):
    save(models.build("PreResNet20", 100, 1, 8).state_dict(), tmp_path / "1.pt")
    arguments = [*DIGITS, "--checkpoints", tmp_path / "1.pt", "--log-dir", tmp_path / "soup"]
    line = error_of(capsys, soup, *arguments)
    assert "1.pt" in line and "fc.weight is [100, 64]" in line and "[10, 64]" in line


def test_models_that_were_trained_on_what_is_held_out(folder, tmp_path, capsys):
    arguments = [*soup_arguments(folder), "--randomseed", 2]
    line = error_of(capsys, soup, *arguments)
    assert "001.pt" in line and "--randomseed" in line


def test_soups_among_the_models_that_they_were_made_of(folder, tmp_path, capsys):
    """As a glob finds them where the soups were written beside the models."""
    paths = ["--checkpoints", tmp_path / "*.pt", "--twa"]
    shutil.copytree(folder / "models", tmp_path, dirs_exist_ok=True)
    arguments = [*soup_arguments(folder), *paths, "--log-dir", tmp_path]
    call(soup, *arguments)
    for log_dir in (tmp_path, tmp_path / "other"):
        line = error_of(capsys, soup, *arguments, "--log-dir", log_dir)
        assert "uniform.pt" in line and "--checkpoints" in line
    soups = [tmp_path / name for name in ("greedy.pt", "uniform.pt")]  # without the models
    call(soup, *arguments, "--checkpoints", *soups, "--log-dir", tmp_path / "other")


@pytest.mark.parametrize("name", ["soup/results.jsonl", "models/runs.jsonl"])
def test_a_record_without_what_it_has_to_hold(folder, tmp_path, capsys, name):
    for part in ("soup", "models"):
        shutil.copytree(folder / part, tmp_path / part)
    with open(tmp_path / name, "a") as file:
        file.write("{}\n")
    line = error_of(capsys, soup, *soup_arguments(tmp_path))
    assert str(tmp_path / name) in line and "is damaged" in line and "remove it" in line


def test_pretrained_weights_that_are_not_to_be_had(tmp_path, capsys, monkeypatch):
    def refuse(name, weights, **_):
        if weights:
            raise OSError("no network")
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 224 * 224, 10))

    monkeypatch.setattr(models.imagenet, "get_model", refuse)
    arguments = [
        *DIGITS,
        "--arch",
        "resnet18_224",
        "--pretrained",
        "--save-dir",
        tmp_path / "models",
    ]
    line = error_of(capsys, finetune, *arguments)
    assert "--pretrained" in line and "resnet18" in line
