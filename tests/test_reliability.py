"""Nothing lost, nothing let in: the promises of RELIABILITY.md, each tested by doing the damage."""

import argparse
import contextlib
import json
import math
import os
import random
import runpy
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
import traceback
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from matplotlib import pyplot as plt
from processes import (
    ROOT,
    Child,
    Result,
    in_child,
    small_run,
    start,
    start_server,
    start_slowly,
)
from safetensors.torch import save_file

# Helpers, not tests: how scripts are called, and what is compared.
from test_scripts import (
    SGD,
    SWA,
    TWA,
    assert_equal,
    call,
    names,
    one_line,
    refuse,
    snapshot,
    succeed,
    where,
    without_seconds,
)

import models
import twa
from training import data, report, settings, windows
from training import run as runs
from training.files import save
from training.run import lock, run_script
from training.signals import Signals, Stopped
from twa.files.checkpoints import CheckpointError, load_state_dict
from twa.files.formats import load, verify
from utils import UserError

FINETUNE, SOUP = "soup/finetune.py", "soup/soup.py"

if os.name != "posix":
    pytest.skip("needs POSIX signals and locks", allow_module_level=True)


pytestmark = pytest.mark.usefixtures("one_thread")


# --- runs of every kind ---


class Run:
    """A kind of run: its command line for a folder, what it starts from, what it must end with.

    Args:
        moment: what it prints in the middle.
        results: patterns of the `state_dict`s that are compared.
    """

    def __init__(self, script: str, flags, needs: str | None, moment: str, *results: str):
        self.script, self.flags, self.needs = script, flags, needs
        self.moment, self.results = moment, results

    def command(self, folder: Path) -> list:
        return [self.script, *self.flags(folder)]


def soup_where(folder: Path) -> list:
    return ["--datasets", "Digits", "--arch", "PreResNet20", "--val-ratio", 20, "-p", 1]


RUNS = {
    "SGD": Run(
        SGD,
        lambda run: [*where(run), "--epochs", 3, "--saves-per-epoch", 2, "-p", 1, "--resume"],
        *(None, "epoch 2/3 [3/8]", "checkpoints/[0-9].pt"),
    ),
    "TWA": Run(
        TWA,
        lambda run: [
            *(*where(run), "--params_start", 1, "--params_end", 7, "--epochs", 3, "-p", 1),
            *("-acc", 3, "--opt", "AdamW", "--schedule", "linear", "--resume"),
        ],
        *("SGD", "epoch 2/3 [4/8]", "twa.pt"),
    ),
    "SWA": Run(
        SWA,
        lambda run: [
            *("--dir", run, "--dataset", "Digits", "--model", "PreResNet20", "--epochs", 4),
            *("--swa", "--swa_start", 2, "--eval_freq", 2, "--save_freq", 2, "-p", 1, "--resume"),
        ],
        *(None, "epoch 3/4 [3/8]", "checkpoints/[0-9].pt", "checkpoints/swa.pt"),
    ),
    "fine-tuning": Run(
        FINETUNE,
        lambda run: [
            *(*soup_where(run), "--base", run / "checkpoints/6.pt", "--save-dir", run / "models"),
            *("--models", 3, "--lr", 0.001, 0.1, "--epochs", 1, 2),
        ],
        *("SGD", "002.pt epoch 1", "models/*.pt"),
    ),
    "soup": Run(
        SOUP,
        lambda run: [
            *(*soup_where(run), "--checkpoints", run / "models/*.pt", "--bn-images", 200),
            *("--log-dir", run / "soup", "--epochs", 3),
        ],
        *("fine-tuning", "TWA-v epoch 2", "soup/*.pt"),
    ),
}


def some(*quick: str) -> list:
    """All kinds of runs, those that are not `quick` for --slow alone."""
    return [k if k in quick else pytest.param(k, marks=pytest.mark.slow) for k in RUNS]


class Uninterrupted:
    """What each kind of run leaves, and the seconds it takes; made when first asked for."""

    def __init__(self, folder: Path):
        start_server()
        self._folder = folder
        self.seconds: dict[str, float] = {}

    def prepare(self, kind: str, folder: Path) -> Path:
        """Puts into `folder` what the run starts from."""
        folder.mkdir(exist_ok=True)
        if RUNS[kind].needs:
            shutil.copytree(self[RUNS[kind].needs], folder, dirs_exist_ok=True)
        return folder

    def __getitem__(self, kind: str) -> Path:
        folder = self._folder / kind
        if kind not in self.seconds:
            self.prepare(kind, folder)
            started = time.monotonic()
            succeed(in_child(folder, *RUNS[kind].command(folder)))
            self.seconds[kind] = time.monotonic() - started
        return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Uninterrupted:
    return Uninterrupted(tmp_path_factory.mktemp("whole"))


def assert_same_results(kind: str, actual: Path, expected: Path) -> None:
    """The final weights are the same to the bit."""
    compared = 0
    for pattern in RUNS[kind].results:
        for path in expected.glob(pattern):
            found = load_state_dict(actual / path.relative_to(expected))
            assert_equal(found, load_state_dict(path))
            compared += 1
    assert compared


def assert_readable(folder: Path) -> None:
    """Everything that has a final name is whole."""
    for path in folder.rglob("*"):
        if path.name.startswith("."):
            continue
        if path.suffix == ".pt":
            verify(path)
            load(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".jsonl":
            [json.loads(line) for line in path.read_text().splitlines()]
        elif path.suffix == ".png":
            plt.imread(path)


# --- kill -9 ---


def stop_at(moment: float, number: int, kind: str, folder: Path) -> Result:
    """Starts a run, sends it a signal after `moment` seconds, and waits for its end."""
    child = start(folder, *RUNS[kind].command(folder))
    time.sleep(moment)
    child.send(number)
    return child.end()


def survive(whole: Uninterrupted, tmp_path: Path, kind: str, number: int, count: int) -> list[int]:
    """Stops `count` runs at random moments and goes on with them; their statuses.

    A run that has ended by then is checked too, and another is drawn in its place.
    """
    expected = whole[kind]
    draw = random.Random(f"{kind}/{number}")
    statuses = []
    while len(statuses) < count:
        folder = whole.prepare(kind, tmp_path / "run")
        result = stop_at(draw.uniform(0, whole.seconds[kind]), number, kind, folder)
        statuses += [result.status] if result.status else []
        if result.status > 0:
            assert len(result.err.splitlines()) == 1, result.err
        assert_readable(folder)
        succeed(in_child(folder, *RUNS[kind].command(folder)))
        assert_same_results(kind, folder, expected)
        # What was half-written, and the lock, are cleared away; `folder` itself is the log's.
        assert not [path for path in folder.rglob(".*") if path.parent != folder]
        shutil.rmtree(folder)
    return statuses


@pytest.mark.parametrize("kind", RUNS)
def test_kill_9_at_a_random_moment_loses_nothing(whole, tmp_path, kind):
    statuses = survive(whole, tmp_path, kind, signal.SIGKILL, count=1)
    assert statuses == [-signal.SIGKILL]


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
def test_kill_9_at_twenty_random_moments_loses_nothing(whole, tmp_path, kind):
    statuses = survive(whole, tmp_path, kind, signal.SIGKILL, count=20)
    assert statuses == [-signal.SIGKILL] * 20


# --- signals that ask ---


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        ("SGD", signal.SIGTERM),
        ("SGD", signal.SIGINT),
        ("TWA", signal.SIGTERM),
        ("SWA", signal.SIGUSR1),
    ],
)
def test_a_signal_saves_the_state_in_mid_epoch(whole, tmp_path, kind, number):
    folder = whole.prepare(kind, tmp_path / "run")
    child = start(folder, *RUNS[kind].command(folder))
    child.wait_for(RUNS[kind].moment)
    child.send(number)
    stopped = child.end()
    assert stopped.status == 128 + number
    (line,) = stopped.err.splitlines()
    assert signal.Signals(number).name in line
    assert line.endswith("continue with the same command, which has --resume")

    epoch = int(RUNS[kind].moment.split()[1].split("/")[0])
    state = load(folder / ("twa_state.pt" if kind == "TWA" else "checkpoints/state.pt"))
    assert state["epoch"] == epoch - 1
    assert 0 < state["progress"]["iteration"] <= 8

    succeed(in_child(folder, *RUNS[kind].command(folder)))
    assert_same_results(kind, folder, whole[kind])
    name = "twa_metrics.jsonl" if kind == "TWA" else "metrics.jsonl"
    assert without_seconds(folder / name) == without_seconds(whole[kind] / name)


@pytest.mark.parametrize("kind", ["SGD", "SWA"])
def test_a_signal_in_the_test_stops_there_and_goes_straight_to_it(tmp_path, kind):
    """Of an epoch whose state is not due, with SWA: it is saved then."""
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    succeed(start_slowly(whole, *RUNS[kind].command(whole)).end())
    child = start_slowly(stopped, *RUNS[kind].command(stopped), pause=0.1)
    child.wait_for("measures a batch")
    child.send(signal.SIGTERM)
    ended = child.end()
    assert ended.status == 143
    assert ended.err.endswith("continue with the same command, which has --resume\n")
    assert ended.out.count("measures a batch") < 20  # of 57
    assert "epoch 1/" in ended.out
    going_on = succeed(start_slowly(stopped, *RUNS[kind].command(stopped)).end())
    assert "epoch 1/" not in going_on.out
    assert_same_results(kind, stopped, whole)
    assert without_seconds(stopped / "metrics.jsonl") == without_seconds(whole / "metrics.jsonl")


class Interrupted(BaseException):
    """What no script catches."""


@pytest.mark.parametrize("moment", ["search", "training"])
def test_a_resumed_twa_measures_and_searches_nothing_twice(whole, tmp_path, monkeypatch, moment):
    folder = whole.prepare("TWA", tmp_path / "run")
    command = RUNS["TWA"].command(folder)
    if moment == "training":
        child = start(folder, *command)
        child.wait_for(RUNS["TWA"].moment)
        child.send(signal.SIGKILL)
        child.end()
        monkeypatch.setattr(twa, "best_start", None)
    else:
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(twa, "best_start", MagicMock(side_effect=Interrupted))
            call(*command)
        assert "model" not in load(folder / "twa_state.pt")
    monkeypatch.setattr(windows.Window, "averages", None)
    succeed(call(*command))
    assert_same_results("TWA", folder, whole["TWA"])
    found, expected = (json.loads((f / "twa.json").read_text()) for f in (folder, whole["TWA"]))
    for key in ("results", "sgd", "sample_losses", "start", "averaging_weights"):
        assert without(found[key], "seconds") == without(expected[key], "seconds")


def without(values, name: str):
    """Nested dicts without what is called so."""
    if not isinstance(values, dict):
        return values
    return {key: without(value, name) for key, value in values.items() if key != name}


def test_other_checkpoints_are_measured_anew_and_a_refusal_leaves_no_results(whole, tmp_path):
    folder = whole.prepare("TWA", tmp_path / "run")
    command = RUNS["TWA"].command(folder)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(twa, "best_start", MagicMock(side_effect=Interrupted))
        call(*command)
    before = load(folder / "twa_state.pt")["results"]["averages"]["value"]
    shutil.copy(folder / "checkpoints/2.pt", folder / "checkpoints/6.pt")
    succeed(call(*command))
    results = json.loads((folder / "twa.json").read_text())["results"]
    assert results["last"]["loss"] != before["last"]["loss"]
    (folder / "twa_state.pt").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(twa, "best_start", MagicMock(side_effect=UserError("no start")))
        assert "no start" in one_line(call(*command))
    assert not (folder / "twa_state.pt").exists()


@pytest.mark.parametrize("kind", ["fine-tuning", "soup"])
def test_a_signal_keeps_the_runs_and_soups_that_stand(whole, tmp_path, kind):
    folder = whole.prepare(kind, tmp_path / "run")
    child = start(folder, *RUNS[kind].command(folder))
    child.wait_for(RUNS[kind].moment)
    before = {
        p: p.stat().st_mtime_ns for pattern in RUNS[kind].results for p in folder.glob(pattern)
    }
    child.send(signal.SIGTERM)
    stopped = child.end()
    assert stopped.status == 143
    assert len(stopped.err.splitlines()) == 1
    assert "stopped by SIGTERM; the same command continues" in stopped.err
    assert before
    assert_readable(folder)
    succeed(in_child(folder, *RUNS[kind].command(folder)))
    assert_same_results(kind, folder, whole[kind])
    for path, written in before.items():
        assert path.stat().st_mtime_ns == written, f"{path.name} was made again"


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
def test_sigterm_at_twenty_random_moments_loses_nothing(whole, tmp_path, kind):
    statuses = survive(whole, tmp_path, kind, signal.SIGTERM, count=20)
    # Before the script has begun, the process ends as any process does.
    assert set(statuses) <= {143, -signal.SIGTERM}
    assert statuses.count(143) >= 10
    print(f"{kind}: {statuses.count(143)} of 20 ended with status 143")


def test_a_signal_before_the_training_ends_in_one_line(tmp_path):
    """While the basis is built, for one."""

    def main():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    with pytest.raises(SystemExit) as end, contextlib.redirect_stderr(open(tmp_path / "e", "w")):
        run_script(main)
    assert end.value.code == 143
    assert "the same command continues" in (tmp_path / "e").read_text()


@pytest.mark.parametrize(
    ("arguments", "how"),
    [
        (["--resume"], "which has --resume"),
        (["--resume", "--lr", "1"], "which has --resume"),
        (["--lr", "1"], "ending in --resume"),
        (["--resume", "other.pt"], "ending in --resume"),
    ],
)
def test_the_command_that_goes_on_is_right_wherever_it_was_given(monkeypatch, arguments, how):
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(Stopped) as stopped, Signals(deferred=True) as signals:
        signal.raise_signal(signal.SIGTERM)
        signals.check(lambda: None)
    said = str(stopped.value)
    assert said.endswith(f"continue with the same command, {how}")
    assert "train.py" not in said  # a script may have changed the folder since


def test_handlers_are_put_back():
    before = [signal.getsignal(getattr(signal, name)) for name in Signals.NAMES]
    with pytest.raises(Stopped), Signals(deferred=True) as signals:
        os.kill(os.getpid(), signal.SIGUSR1)
        saved = []
        signals.check(lambda: saved.append(1))
    assert saved == [1]
    with Signals():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert [signal.getsignal(getattr(signal, name)) for name in Signals.NAMES] == before


def twice() -> None:
    with Signals(deferred=True):
        os.kill(os.getpid(), signal.SIGINT)
        print("held")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)


def test_a_second_signal_ends_at_once(tmp_path):
    done = Child(tmp_path / "run", twice).end()
    assert done == Result(-signal.SIGTERM, "held\n", "")


# --- full disks ---


@contextlib.contextmanager
def small_disk(folder: Path):
    """A file system of 16 MiB at `folder`; yields a function that gives it a size in KiB."""

    def mount(*options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("mounting needs root")

    folder.mkdir()
    mount("size=16m")
    try:
        yield lambda size: mount("remount", f"size={size}k")
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def stopped_run(kind: str, whole: Uninterrupted, folder: Path) -> Path:
    """A run that was stopped in its middle."""
    whole.prepare(kind, folder)
    child = start(folder.parent / "output", *RUNS[kind].command(folder))
    child.wait_for(RUNS[kind].moment)
    child.send(signal.SIGTERM)
    assert child.end().status == 143
    return folder


def assert_said_and_untouched(result: Result, folder: Path, before: dict[str, str], words: str):
    line = one_line(result)
    assert str(folder) in line
    assert words in line
    assert "make room" in line
    assert not list(folder.rglob("*.tmp"))
    for name in ("checkpoints/state.pt", "twa_state.pt"):
        if name in before:
            assert snapshot(folder)[name] == before[name]
    assert_readable(folder)


@pytest.mark.parametrize("kind", ["SGD", pytest.param("SWA", marks=pytest.mark.slow)])
def test_a_full_disk_is_said_and_the_state_stands(whole, tmp_path, kind):
    folder = tmp_path / "disk"
    with small_disk(folder) as resize:
        stopped_run(kind, whole, folder)
        before = snapshot(folder)
        used = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) // 1024
        resize(used + 600)  # half a checkpoint
        result = in_child(tmp_path / "output", *RUNS[kind].command(folder))
        assert_said_and_untouched(result, folder, before, "No space left on device")
        resize(64 * 1024)
        succeed(in_child(tmp_path / "output", *RUNS[kind].command(folder)))
        assert_same_results(kind, folder, whole[kind])


def test_a_file_that_may_not_grow_is_said_and_the_state_stands(whole, tmp_path):
    """As on a disk with a quota; needs no root."""
    folder = stopped_run("SGD", whole, tmp_path / "run")
    before = snapshot(folder)
    result = in_child(folder, *RUNS["SGD"].command(folder), largest=500_000)
    assert_said_and_untouched(result, folder, before, "File too large")
    succeed(in_child(folder, *RUNS["SGD"].command(folder)))
    assert_same_results("SGD", folder, whole["SGD"])


@pytest.mark.parametrize("kind", ["fine-tuning", "soup", "TWA"])
def test_what_does_not_fit_leaves_no_file(whole, tmp_path, kind):
    folder = whole.prepare(kind, tmp_path / "run")
    before = snapshot(folder)
    result = in_child(folder, *RUNS[kind].command(folder), largest=500_000)
    assert_said_and_untouched(result, folder, {}, ".pt: cannot be written (File too large)")
    assert not {name for name in snapshot(folder).keys() - before.keys() if name.endswith(".pt")}


def test_logs_on_a_full_disk_end_in_one_line(whole, tmp_path):
    folder = whole.prepare("TWA", tmp_path / "run")
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    (folder / "log").unlink()
    (folder / "log").symlink_to("/dev/full")
    line = one_line(call(*RUNS["TWA"].command(folder)))
    assert line.startswith(f"error: {folder / 'log'}: cannot be written (No space left on device)")


# --- two processes ---


@pytest.mark.parametrize("kind", some("SGD", "TWA", "soup"))
def test_the_second_process_in_a_folder_is_refused(whole, tmp_path, kind):
    folder = whole.prepare(kind, tmp_path / "run")
    child = start(folder, *RUNS[kind].command(folder))
    child.wait_for(RUNS[kind].moment.replace("epoch 2", "epoch 1").replace("epoch 3", "epoch 1"))
    child.send(signal.SIGSTOP)
    try:
        line = one_line(call(*RUNS[kind].command(folder)))
        assert "another process writes there" in line
        if kind == "SGD":
            succeed(call(*RUNS[kind].command(folder), "--evaluate"))
    finally:
        child.send(signal.SIGKILL)
        child.send(signal.SIGCONT)
    assert child.end().status == -signal.SIGKILL
    # What the killed one leaves keeps nobody out.
    succeed(in_child(folder, *RUNS[kind].command(folder)))
    assert_same_results(kind, folder, whole[kind])


def enter_late(folder: Path) -> None:
    """Takes the lock; between opening its file and locking it there is time for others."""
    opens = os.open

    def slow_open(path, *args, **how):
        file = opens(path, *args, **how)
        if str(path).endswith(".lock"):
            os.open = opens
            print("opened")
            while not (folder / "go").exists():
                time.sleep(0.01)
        return file

    os.open = slow_open
    try:
        with lock(folder):
            print("entered")
    except UserError as error:
        print(error)


@pytest.mark.parametrize("another", [True, False])
def test_a_lock_file_that_its_holder_removes_locks_nobody_in(tmp_path, another):
    with lock(tmp_path):
        late = Child(tmp_path / "late", enter_late, tmp_path)
        late.wait_for("opened")
    with lock(tmp_path) if another else contextlib.nullcontext():
        (tmp_path / "go").touch()
        said = late.end().out.splitlines()
    refused = (
        f"{tmp_path}: another process writes there; wait for its end, or give another directory"
    )
    assert said == ["opened", refused if another else "entered"]
    assert not (tmp_path / ".lock").exists()


def test_only_the_temporary_files_of_processes_that_ended_are_removed(tmp_path):
    sleeping = Child(tmp_path / "sleeping", time.sleep, 60)
    ended = Child(tmp_path / "ended", os.getpid)
    ended.end()
    writing = tmp_path / f".log.{sleeping.process.pid}.tmp"
    leftover = tmp_path / f".log.{ended.process.pid}.tmp"
    for path in (writing, leftover):
        path.touch()
    with lock(tmp_path):
        assert writing.exists()
        assert not leftover.exists()
    sleeping.send(signal.SIGKILL)
    sleeping.end()


def test_a_folder_that_was_made_for_a_lock_alone_goes_with_it(tmp_path):
    with lock(tmp_path / "new"):
        assert (tmp_path / "new").exists()
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_written_to_is_refused():
    assert "cannot be" in one_line(call(SGD, *where(Path("/proc/nothing"))))


# --- divergence ---


def test_divergence_is_said_with_step_rate_and_last_state(tmp_path):
    """At the very step, though no line is due for long."""
    flags = [*where(tmp_path), "--epochs", 2, "--lr", 1e20, "-p", 1000, "--device", "cpu"]
    line = one_line(call(SGD, *flags))
    assert "epoch 1/2, iteration 2: the loss is nan at rate 1e+20" in line
    assert f"{tmp_path / 'checkpoints/state.pt'} is intact, as saved before" in line
    assert names(tmp_path / "checkpoints") == {"0.pt", "state.pt"}
    assert load(tmp_path / "checkpoints/state.pt")["epoch"] == 0


def test_weights_that_left_the_finite_numbers_are_not_saved(tmp_path):
    """In a step whose loss was finite yet, and after which a checkpoint is due."""
    flags = [*where(tmp_path), "--epochs", 2, "--lr", 1e10, "--wd", 1e30, "--saves-per-epoch", 8]
    line = one_line(call(SGD, *flags))
    assert "epoch 1/2, iteration 1:" in line
    assert "1.pt is not saved: conv1.weight holds NaN or infinity at rate 1e+10" in line
    assert "state.pt is intact" in line
    assert names(tmp_path / "checkpoints") == {"0.pt", "state.pt"}


def test_a_state_that_left_the_finite_numbers_is_not_saved(tmp_path):
    model = torch.nn.Linear(2, 2)
    with small_run(tmp_path, model) as run:
        run.save()
        before = snapshot(tmp_path)
        with torch.no_grad():
            model.bias[1] = math.inf
        with pytest.raises(CheckpointError, match=r"state.pt is unchanged: bias holds NaN or inf"):
            run.save()
        assert snapshot(tmp_path) == before


# --- damaged files ---


def truncated(percent: int):
    def damage(path: Path) -> None:
        content = path.read_bytes()
        path.unlink()  # whoever has mapped the file keeps it
        path.write_bytes(content[: len(content) * percent // 100])

    return damage


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.unlink()
    path.write_bytes(content)


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE = {
    **{f"truncated at {percent} %": truncated(percent) for percent in range(5, 100, 5)},
    "a flipped byte": flipped,
    "empty": truncated(0),
    "a directory": directory,
}


@pytest.fixture(scope="module")
def finished(whole) -> Path:
    """A folder with something of everything in it."""
    for kind in ("SWA", "TWA", "soup"):
        assert whole[kind]
    return whole["soup"]


# What reads a file, and the file.
READERS = {
    "window": ("TWA", "checkpoints/3.pt", []),
    "start point": ("TWA", "checkpoints/0.pt", ["--train_start", 0]),
    "state": ("SGD", "checkpoints/state.pt", []),
    "base": ("fine-tuning", "checkpoints/6.pt", []),
    "ingredient": ("soup", "models/002.pt", []),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_damaged_file_is_refused_by_its_name(finished, tmp_path, reader):
    kind, name, flags = READERS[reader]
    few = {"truncated at 95 %", "a flipped byte", "empty", "a directory"}
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    for path in (folder / "models").glob("*.json*") if kind == "fine-tuning" else ():
        path.unlink()
    damaged = folder / name
    for damage in DAMAGE if reader in ("window", "state") else few:
        whole_file = damaged.read_bytes()
        DAMAGE[damage](damaged)
        line = refuse(folder, *RUNS[kind].command(folder), *flags)
        assert str(damaged) in line, damage
        shutil.rmtree(damaged) if damaged.is_dir() else damaged.unlink()
        damaged.write_bytes(whole_file)
    call_result = call(*RUNS[kind].command(folder), *flags)
    assert call_result.status == 0, "it was the damage that was refused"


def read_as_nobody(path: Path, reader) -> None:
    """Prints with what `CheckpointError` a user without rights reads; root reads everything."""
    if os.geteuid() == 0:
        reader(path)  # Root may; and what Python imports for it may lie where nobody looks.
        os.setuid(65534)
    try:
        reader(path)
    except CheckpointError as error:
        print(error)


@pytest.mark.parametrize(
    ("name", "reader"), [("2.pt", verify), ("2.pt", load), ("2.safetensors", load)]
)
def test_a_file_without_read_permission_is_refused(tmp_path, name, reader):
    path = tmp_path / name
    state = {"weight": torch.ones(3)}
    save_file(state, path) if path.suffix == ".safetensors" else save(state, path)
    for folder in (tmp_path, *tmp_path.parents):
        if not folder.stat().st_mode & 0o001:  # pytest's own, as many as there are
            folder.chmod(0o755)
    path.chmod(0o644)
    assert Child(tmp_path / "output", read_as_nobody, path, reader).end() == Result(0, "", "")
    path.chmod(0)
    said = Child(tmp_path / "output", read_as_nobody, path, reader).end()
    assert said.status == 0, said.err
    (line,) = said.out.splitlines()
    assert str(path) in line
    assert "Permission denied" in line


@pytest.mark.parametrize(
    "damage", ["truncated at 5 %", "truncated at 95 %", "empty", "a directory"]
)
def test_a_damaged_safetensors_file_is_refused_by_its_name(finished, tmp_path, damage):
    path = tmp_path / "1.safetensors"
    save_file(load_state_dict(finished / "models/001.pt"), path)
    flags = [*soup_where(tmp_path), "--checkpoints", path, "--log-dir", tmp_path / "soup"]
    DAMAGE[damage](path)
    assert str(path) in refuse(tmp_path, SOUP, *flags)


def test_a_state_of_another_format_is_refused_by_its_version(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole["SGD"], folder)
    path = folder / "checkpoints/state.pt"
    for version in (1, 99):
        state = load(path)
        state["format"] = version
        save(state, path)
        line = refuse(folder, *RUNS["SGD"].command(folder))
        assert f"has format {version}, this version reads format {runs.FORMAT}" in line


def test_another_window_is_refused_with_both_shown(whole):
    folder = whole["TWA"]
    line = refuse(folder, *RUNS["TWA"].command(folder), "--params_start", 2)
    assert "params_start 1" in line
    assert "params_start 2" in line
    line = refuse(whole["SWA"], *RUNS["SWA"].command(whole["SWA"]), "--swa_start", 3)
    assert "swa_start 2" in line
    assert "swa_start 3" in line


def test_an_overwritten_run_that_is_killed_while_it_clears_is_not_gone_on_with(whole, tmp_path):
    """The state goes before the checkpoints do."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(whole["SGD"] / "checkpoints", folder)
    gone = []
    unlink = Path.unlink

    def watching(self, missing_ok=False):
        gone.append(self.name)
        unlink(self, missing_ok)

    with small_run(folder, torch.nn.Linear(2, 2)) as run, pytest.MonkeyPatch.context() as patch:
        run.args.overwrite = True
        patch.setattr(Path, "unlink", watching)
        run.start()
    assert gone[0] == "state.pt"
    assert sorted(gone[1:]) == [f"{number}.pt" for number in range(7)]


# --- odd command lines ---

ODD = [
    *("", " ", "-", "--", "nan", "inf", "-inf", "-1", "0", "1", "2", "3", "7", "0.5", "1.5", "100"),
    *("1e-300", "1e30", "1e300", "1e400", "-0.0", "1e-46", "0x10", "1_0", "٣", "2**63"),
    *("9223372036854775808", "99999999999999999999999", "x", "é\u202e", "a b", "a\nb", "%s", "{}"),
    *("None", "True", "cpu", "cuda:99", "meta", "mps", "/", ".", "..", "/dev/null", "/nowhere/x"),
    *("/proc/version", "os:getcwd", "models:", ":build", "nothing:here", "models:build", "a" * 300),
]
# Valid, but without an end: never drawn for these flags.
ENDLESS = ("9223372036854775808", "99999999999999999999999", "100", "1_0", "7")
LONG = {"--epochs", "--models", "--seed"}


def flags_of(script: str) -> list[argparse.Action]:
    """What the parser of a script knows."""

    path = list(sys.path)
    try:
        kind = runpy.run_path(str(ROOT / script), run_name="script")["Settings"]
    finally:
        sys.path[:] = path
    actions = settings.parser_of(kind)._actions
    return [action for action in actions if action.dest != "help"]


def draw_value(draw: random.Random, action: argparse.Action, folder: Path) -> str:
    name = action.option_strings[0]
    if action.choices and draw.random() < 0.8:
        return str(draw.choice(list(action.choices)))
    if action.dest.endswith("dir") and draw.random() < 0.8:
        return str(folder / draw.choice(("checkpoints", "models", "new", "checkpoints/3.pt", ".")))
    if draw.random() < 0.4:
        return draw.choice(("0", "1", "2", "0.5"))
    return draw.choice([odd for odd in ODD if not (name in LONG and odd in ENDLESS)])


def draw_line(draw: random.Random, base: list, actions: list, folder: Path) -> list[str]:
    """The flags of a good run, and after them some of the script's own with odd values."""
    line = [str(part) for part in base]
    if draw.random() < 0.1:
        line = line[draw.randrange(len(line) + 1) :]
    for action in draw.sample(actions, draw.choice((0, 1, 1, 1, 2, 2, 3, 6))):
        line.append(draw.choice(action.option_strings))
        if action.nargs == 0:
            continue
        count = draw.choice((0, 1, 2, 3)) if action.nargs in ("+", "*") else 1
        if action.nargs == "?" or draw.random() < 0.03:
            count = draw.choice((0, 1))
        line += [draw_value(draw, action, folder) for _ in range(count)]
    return line


@pytest.fixture
def tiny(monkeypatch, finished, tmp_path) -> Path:
    """A folder with checkpoints, and data and models so small that a run takes milliseconds."""
    load_data = data.load

    def few(name, data_dir, device):
        if not Path(data_dir).is_dir():
            return load_data("Digits", data_dir, device)
        parts = load_data("Digits", data_dir, device)
        return tuple(data.Split(p.images[:40], p.labels[:40], p.spec) for p in parts)

    def small(name, num_classes, in_channels=3, image_size=32):
        if ":" in name:
            return build(name, num_classes, in_channels, image_size)
        pixels = in_channels * image_size**2
        layers = [torch.nn.Flatten(), torch.nn.BatchNorm1d(pixels), torch.nn.Linear(pixels, 10)]
        if name != "PreResNet20":
            layers.append(torch.nn.Linear(10, 10))
        return torch.nn.Sequential(*layers)

    build = models.build
    monkeypatch.setattr(data, "load", few)
    monkeypatch.setattr(models, "build", small)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: None)  # takes seconds
    for figure in ("figure", "scatter"):
        monkeypatch.setattr(report, figure, lambda *_, **__: None)  # takes half a second
    for package in ("wandb", "tensorboard"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.chdir(tmp_path)  # relative folders are made here
    return tmp_path


def try_lines(tiny: Path, kind: str, count: int, seed: int) -> dict[int, int]:
    """How many of `count` random command lines ended with each status: 0 or 2."""
    draw = random.Random(f"{kind}/{seed}")
    actions = flags_of(RUNS[kind].script)
    folder = tiny / "run"
    base = RUNS[kind].command(folder)[1:]
    ended, wrong = {0: 0, 2: 0}, []
    for i in range(count):
        if i % 50 == 0:
            shutil.rmtree(folder, ignore_errors=True)
            (folder / "models").mkdir(parents=True)
            first = RUNS["SWA" if kind == "SWA" else "SGD"]
            succeed(call(*first.command(folder), "--overwrite"))
            for number in (1, 2):
                shutil.copy(folder / f"checkpoints/{number}.pt", folder / f"models/{number}.pt")
        line = draw_line(draw, base, actions, folder)
        try:
            result = call(RUNS[kind].script, *line)
        except Exception as error:
            wrong.append((line, "".join(traceback.format_exception(error)[-6:])))
            continue
        ended[result.status] = ended.get(result.status, 0) + 1
        lines = len(result.err.splitlines())
        if result.status not in (0, 2) or lines != (result.status == 2):
            wrong.append((line, result))
    assert not wrong, "\n\n".join(f"{shlex.join(line)}\n{what}" for line, what in wrong)
    return ended


@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize("count", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_odd_command_lines_end_with_status_0_or_2(tiny, kind, count):
    ended = try_lines(tiny, kind, count, seed=count)
    assert min(ended.values()) > 0.05 * count  # of both sorts
    print(f"{kind}: {ended[0]} of {count} command lines accepted, {ended[2]} refused")


def test_batches_of_one_image_are_refused_where_batch_norm_needs_more(tmp_path):
    """ResNet18 leaves one pixel of the digits: what random command lines found."""
    flags = where(tmp_path)
    flags[flags.index("PreResNet20")] = "ResNet18"
    line = one_line(call(SGD, *flags, "--epochs", 1, "--batch-size", 1))
    assert "more than one image" in line
    assert "--batch-size" in line


# --- hours ---


def measure(seconds: float, folder: Path) -> None:
    """Prints a line a round of SGD and TWA, six at least: seconds, resident KiB and open files."""
    started, rounds = time.monotonic(), 0
    while time.monotonic() - started < seconds or rounds < 6:
        rounds += 1
        flags = [*where(folder), "--epochs", 2, "--images", 256]
        assert call(SGD, *flags, "--overwrite").status == 0
        assert call(TWA, *flags, "--params_end", 3).status == 0
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * 4
        opened = len(os.listdir("/proc/self/fd"))
        print(time.monotonic() - started, resident, opened)


def slope(seconds: float, folder: Path) -> tuple[float, list[list[float]]]:
    """MiB an hour of resident memory, by least squares in the second half; all lines.

    Before that it rises, until Python collects what refers to itself as often as it comes.
    """
    done = succeed(Child(folder / "run", measure, seconds, folder / "run").end(seconds + 600))
    rounds = [[float(x) for x in line.split()] for line in done.out.splitlines()]
    late = rounds[len(rounds) // 2 :]
    fit = statistics.linear_regression([r[0] / 3600 for r in late], [r[1] / 1024 for r in late])
    return fit.slope, rounds


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="looks into Linux's /proc")
@pytest.mark.parametrize("minutes", [0.1, pytest.param(None, marks=pytest.mark.slow)])
def test_memory_is_flat_and_no_file_stays_open(tmp_path, minutes):
    """The slow one takes RELIABILITY_MINUTES (60)."""
    long = minutes is None
    minutes = float(os.environ.get("RELIABILITY_MINUTES", 60)) if long else minutes
    rate, rounds = slope(60 * minutes, tmp_path)
    print(f"{len(rounds)} rounds in {minutes:g} minutes, {rate:+.2f} MiB an hour,", end=" ")
    print(f"{rounds[0][1] / 1024:.0f} MiB and {rounds[0][2]:.0f} files first,", end=" ")
    print(f"{rounds[-1][1] / 1024:.0f} and {rounds[-1][2]:.0f} last")
    assert rounds[-1][2] <= rounds[0][2]
    late = [r[1] / 1024 for r in rounds[len(rounds) // 2 :]]
    # It may fall: a system that is short of memory takes pages back from who does not use them.
    assert max(late) - late[0] < (50 if long else 20)
    assert rate < 20 or not long
