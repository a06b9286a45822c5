"""`--wandb` and `--tensorboard`: what arrives there is what the run's own log has."""

import json
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest

import train_sgd_cifar
import train_twa
from training.logs import RunLog

DIGITS = ["--datasets", "Digits", "--arch", "PreResNet20", "--device", "cpu", "--images", "300"]


def call(monkeypatch, script, folder: Path, *arguments) -> None:
    paths = ["--save-dir", folder / "checkpoints", "--log-dir", folder]
    argv = [script.__name__, *DIGITS, *paths, *arguments]
    monkeypatch.setattr(sys, "argv", list(map(str, argv)))
    script.main()


def logged(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_weights_and_biases_get_every_epoch(tmp_path, monkeypatch):
    sent, runs = [], []

    def init(**arguments) -> SimpleNamespace:
        runs.append(arguments)
        return SimpleNamespace(log=sent.append)

    fake = SimpleNamespace(init=init, Histogram=list)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    call(monkeypatch, train_sgd_cifar, tmp_path, "--epochs", 2, "--wandb", "--EXP", "first")
    assert [(run["name"], run["config"]["epochs"]) for run in runs] == [("first", 2)]
    assert sent == logged(tmp_path / "metrics.jsonl")
    sent.clear()
    call(monkeypatch, train_twa, tmp_path, "--params_end", 3, "--epochs", 2, "--wandb")
    alphas = [metrics.pop("alpha") for metrics in sent]
    assert sent == logged(tmp_path / "twa_metrics.jsonl")
    for alpha in alphas:
        assert len(alpha) == 3
        assert sum(alpha) == pytest.approx(1)
    assert alphas[0] != alphas[1]


@pytest.fixture
def events_of():
    """Reads what TensorBoard would show of a folder."""
    reason = "needs tensorboard: pip install -r requirements-examples.txt"
    accumulator = "tensorboard.backend.event_processing.event_accumulator"
    module = pytest.importorskip(accumulator, reason=reason)
    everything = {"histograms": 0, "scalars": 0}
    return lambda folder: module.EventAccumulator(str(folder), everything).Reload()


@pytest.mark.examples
def test_tensorboard_shows_what_the_log_has(tmp_path, monkeypatch, events_of):
    call(monkeypatch, train_sgd_cifar, tmp_path, "--epochs", 3, "--tensorboard")
    call(monkeypatch, train_twa, tmp_path, "--params_end", 4, "--epochs", 2, "--tensorboard")
    for prefix in ("", "twa_"):
        events = events_of(tmp_path / f"{prefix}tensorboard")
        metrics = logged(tmp_path / f"{prefix}metrics.jsonl")
        keys = metrics[0].keys() - {"epoch"}
        assert {"rate", "train_loss", "test_loss"} < keys
        assert set(events.Tags()["scalars"]) == keys
        for key in keys:
            values = {event.step: event.value for event in events.Scalars(key)}
            assert values == pytest.approx({m["epoch"]: m[key] for m in metrics}, rel=1e-6)
    histograms = events.Histograms("alpha")
    assert [event.step for event in histograms] == [1, 2]
    for event in histograms:
        assert event.histogram_value.num == 4
        assert event.histogram_value.sum == pytest.approx(1)


@pytest.mark.examples
def test_a_resumed_run_replaces_the_epochs_that_it_repeats(tmp_path, events_of):
    args = Namespace(wandb=False, tensorboard=True, log_name="log")
    for done, last, loss in ((0, 3, 1.0), (2, 4, 0.5)):
        log = RunLog(args, tmp_path, "", done)
        for epoch in range(done + 1, last + 1):
            log.epoch({"epoch": epoch, "loss": loss, "byte": None})
    events = events_of(tmp_path / "tensorboard")
    shown = [(event.step, event.value) for event in events.Scalars("loss")]
    assert shown == [(1, 1.0), (2, 1.0), (3, 0.5), (4, 0.5)]
    assert events.Tags()["scalars"] == ["loss"]
