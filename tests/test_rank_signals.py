"""Signals to the ranks of a run: all stop after the same step, and go on as if none had come."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from processes import Ranks, on_ranks, run_slowly
from test_parallel import ENVIRONMENT, SGD, TWA, difference, torchrun, wait_for

from twa.files.formats import load

COUNT, SEEDS = 2, 20
HEAD = [
    *("--datasets", "Digits", "--model-factory", "tests.reduced:noisy", "--batch-size", 126),
    *("-p", 1, "--resume"),
]
TAIL = ["--epochs", 3, "--params_start", 1, "--params_end", 7, "-acc", 3]
# By the kind of run: script, flags, and what it prints in the middle.
RUNS = {
    "SGD": (SGD, ["--epochs", 3, "--saves-per-epoch", 2, "--lr", 0.02], "epoch 2/3 [3/8]"),
    "replicate": (TWA, [*TAIL, "--parallel", "replicate"], "epoch 2/3 [4/8]"),
    "shard": (TWA, [*TAIL, "--parallel", "shard"], "epoch 2/3 [4/8]"),
}


def command(kind: str, folder: Path, *more) -> list:
    script, flags, _ = RUNS[kind]
    out = [] if kind == "SGD" else ["--out", folder / "twa"]
    return [script, *HEAD, *flags, "--save-dir", folder, "--log-dir", folder, *out, *more]


def state_of(kind: str, folder: Path) -> Path:
    return folder / ("state.pt" if kind == "SGD" else "twa/twa_state.pt")


class Whole:
    """The folders of runs on two ranks that nothing stopped, made when first asked for."""

    def __init__(self, folder: Path):
        self._folder = folder
        self.seconds: dict[str, float] = {}

    def __getitem__(self, kind: str) -> Path:
        folder = self._folder / kind
        if kind not in self.seconds:
            self.prepare(kind, folder)
            started = time.monotonic()
            done = on_ranks(COUNT, *command(kind, folder))
            assert done.status == 0, done.err
            self.seconds[kind] = time.monotonic() - started
        return folder

    def prepare(self, kind: str, folder: Path) -> None:
        """Puts into `folder` what the run starts from."""
        folder.mkdir(parents=True)
        if kind != "SGD":
            shutil.copytree(self["SGD"], folder, dirs_exist_ok=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Whole:
    return Whole(tmp_path_factory.mktemp("whole"))


def metrics(kind: str, folder: Path) -> list[dict]:
    path = folder / ("metrics.jsonl" if kind == "SGD" else "twa/twa_metrics.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in m.items() if key != "seconds"} for m in lines]


def assert_same_to_the_bit(kind: str, folder: Path, expected: Path) -> None:
    names = [f"{i}.pt" for i in range(7)] if kind == "SGD" else ["twa/twa.pt"]
    for name in names:
        actual, reference = (torch.load(f / name, weights_only=True) for f in (folder, expected))
        assert actual.keys() == reference.keys()
        assert all(torch.equal(actual[key], reference[key]) for key in actual), name
    assert metrics(kind, folder) == metrics(kind, expected)


@pytest.mark.parametrize(
    ("kind", "rank", "number"),
    [
        ("replicate", 1, signal.SIGUSR1),
        ("shard", 0, signal.SIGTERM),
        ("SGD", 1, signal.SIGINT),
    ],
)
def test_a_signal_to_one_rank_stops_all_after_the_same_step(whole, tmp_path, kind, rank, number):
    expected, folder = whole[kind], tmp_path / "run"
    whole.prepare(kind, folder)
    ranks = Ranks(tmp_path, COUNT, *command(kind, folder))
    ranks.children[0].wait_for(RUNS[kind][2])
    ranks.children[rank].send(number)
    ended = ranks.end()
    assert [result.status for result in ended] == [128 + number] * COUNT, ended
    # DDP warns of strides.
    said = [[s for s in r.err.splitlines() if s.startswith(("stopped", "Trace"))] for r in ended]
    (line,) = said[0]
    assert said[1] == []
    assert line.startswith(
        f"stopped by {signal.Signals(number).name}; the state is saved, continue"
    )
    assert line.endswith("--resume")

    state = load(state_of(kind, folder))
    assert state["epoch"] == 1
    assert 3 <= state["progress"]["iteration"] <= 8
    done = on_ranks(COUNT, *command(kind, folder))
    assert done.status == 0, done.err
    assert_same_to_the_bit(kind, folder, expected)


@pytest.mark.parametrize("kind", ["SGD", "replicate"])
def test_a_signal_to_one_rank_stops_all_between_two_batches_of_a_measurement(tmp_path, kind):
    """Of SGD in the test of its first epoch, of TWA in that of the averages."""
    folders = {name: tmp_path / name for name in ("whole", "stopped")}
    for folder in folders.values():
        for each in ("SGD", kind) if folder.name == "whole" else ("SGD",) * (kind != "SGD"):
            done = on_ranks(COUNT, *command(each, folder), run=run_slowly)
            assert done.status == 0, done.err
    os.environ["PAUSE"] = "0.1"
    try:
        ranks = Ranks(tmp_path, COUNT, *command(kind, folders["stopped"]), run=run_slowly)
    finally:
        del os.environ["PAUSE"]
    for child in ranks.children:  # a rank that is not there yet would stop alone
        child.wait_for("measures a batch")
    ranks.children[1].send(signal.SIGTERM)
    ended = ranks.end()
    assert [result.status for result in ended] == [143] * COUNT, ended
    assert ended[0].out.count("measures a batch") < 20
    assert len([s for s in ended[0].err.splitlines() if s.startswith("stopped by SIGTERM")]) == 1
    going_on = on_ranks(COUNT, *command(kind, folders["stopped"]), run=run_slowly)
    assert going_on.status == 0, going_on.err
    assert kind != "SGD" or "epoch 1/" not in going_on.out
    assert_same_to_the_bit(kind, folders["stopped"], folders["whole"])


def survive(whole: Whole, tmp_path: Path, kind: str, seed: int) -> list[int]:
    """Sends a rank a signal at a moment, both random, and goes on with the run; the statuses."""
    expected, folder = whole[kind], tmp_path / f"run {seed}"
    draw = random.Random(f"{kind}/{seed}")
    whole.prepare(kind, folder)
    number = draw.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
    started = time.monotonic()
    ranks = Ranks(tmp_path, COUNT, *command(kind, folder))
    time.sleep(draw.uniform(0, whole.seconds[kind]))
    ranks.children[draw.randrange(COUNT)].send(number)
    statuses = [result.status for result in ranks.end()]
    assert -signal.SIGKILL not in statuses  # nothing hangs
    if not any(statuses):  # It had ended: the first run, whose processes start later, took longer.
        whole.seconds[kind] = min(whole.seconds[kind], time.monotonic() - started)
    done = on_ranks(COUNT, *command(kind, folder))
    assert done.status == 0, done.err
    assert_same_to_the_bit(kind, folder, expected)
    return statuses


def test_a_signal_to_any_rank_at_a_random_moment_loses_nothing(whole, tmp_path):
    survive(whole, tmp_path, "replicate", seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
def test_signals_at_twenty_random_moments_lose_nothing(whole, tmp_path, kind):
    statuses = [survive(whole, tmp_path, kind, seed) for seed in range(SEEDS)]
    together = sum(len({*s}) == 1 and s[0] > 128 for s in statuses)
    print(f"{kind}: all ranks stopped together in {together} of {SEEDS}: {statuses}")
    assert together >= 1


def test_a_run_goes_on_in_another_way_with_another_number_of_ranks(tmp_path):
    """Replicated on three ranks, sharded on two, in one process; as in one process throughout."""
    plain = ["--model-factory", "tests.reduced:plain", "--batch-size", 120]
    done = on_ranks(0, *command("SGD", tmp_path / "alone", *plain))
    assert done.status == 0, done.err
    shutil.copytree(tmp_path / "alone", tmp_path / "run")
    alone, run = (
        command("shard", tmp_path / name, *plain, "--parallel") for name in ("alone", "run")
    )
    for way, count, moment in (
        ("replicate", 3, "epoch 1/3 [4/8]"),
        ("shard", 2, "epoch 2/3 [4/8]"),
    ):
        ranks = Ranks(tmp_path, count, *run, way)
        ranks.children[0].wait_for(moment)
        ranks.children[-1].send(signal.SIGTERM)
        ended = ranks.end()
        assert [result.status for result in ended] == [143] * count, ended
    for last in (run, alone):
        done = on_ranks(0, *last, "auto")
        assert done.status == 0, done.err
    assert difference(tmp_path / "run/twa/twa.pt", tmp_path / "alone/twa/twa.pt") < 1e-5
    for actual, expected in zip(
        *(metrics("shard", tmp_path / name) for name in ("run", "alone")), strict=True
    ):
        assert actual == pytest.approx(expected, rel=1e-4)


def test_torchrun_passes_its_signal_on_and_one_line_is_said(whole, tmp_path):
    whole.prepare("replicate", tmp_path / "run")
    launch = torchrun(COUNT, *command("replicate", tmp_path / "run"))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    log = tmp_path / "run/twa/log"
    with subprocess.Popen(launch, env=ENVIRONMENT, text=True, **pipes) as process:
        wait_for(lambda: "epoch 2/3 [1/8]" in log.read_text(), process)
        process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert len([line for line in printed.splitlines() if "stopped by SIGTERM" in line]) == 1
    state = load(state_of("replicate", tmp_path / "run"))
    assert 8 < 8 * state["epoch"] + state["progress"]["iteration"] < 24


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_rank_that_is_asked_to_stop_when_another_is_dead_ends(whole, tmp_path):
    whole.prepare("replicate", tmp_path / "run")
    ranks = Ranks(tmp_path, 3, *command("replicate", tmp_path / "run"))
    ranks.children[0].wait_for("epoch 1/3 [2/8]")
    ranks.children[1].send(signal.SIGSTOP)  # the others wait for it
    ranks.children[0].send(signal.SIGTERM)
    time.sleep(0.2)
    ranks.children[1].send(signal.SIGKILL)
    ranks.children[0].end(30)  # without a second signal
    first, dead, last = ranks.end()
    assert dead.status == -signal.SIGKILL
    assert first.status == 143
    assert last.status not in (0, -signal.SIGKILL)
    assert "stopped by SIGTERM; so were other ranks, or they failed" in first.err
