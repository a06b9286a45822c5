"""The scripts under torchrun: the results of one process, written once, and ranks that die.

A transformer has no batch norm, so that several ranks compute what one does; PreResNet20 has.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from processes import in_child, on_ranks
from torch import nn

import models
from training import data, parallel, settings
from training.loop import evaluate
from twa.files.checkpoints import load_into
from utils import UserError

ROOT = Path(__file__).resolve().parents[1]
SGD, TWA, SWA = "train_sgd_cifar.py", "train_twa.py", "swa/train.py"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
TRANSFORMER = "tests.reduced:for_digits"
BATCH = 120  # divides by 1, 2, 3 and 4

linux = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks into Linux's /proc")


def torchrun(ranks: int, script: str, *args, restarts: int = 0) -> list[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launch += ["--nproc_per_node", str(ranks), "--max-restarts", str(restarts)]
    return [*launch, str(ROOT / script), *map(str, args)]


def succeed(ranks: int, script: str, *args, **how) -> str:
    """What it printed."""
    done = on_ranks(ranks, script, *args, **how)
    assert done.status == 0, done.err
    return done.out


def flags(folder: Path, arch: str) -> list:
    model = ["--model-factory" if ":" in arch else "--arch", arch]
    common = ["--datasets", "Digits", *model, "--batch-size", BATCH, "-p", 1000]
    # Where the two are the same, TWA writes to a folder `twa` below.
    return [*common, "--save-dir", folder, "--log-dir", folder]


def sgd_flags(folder: Path, arch: str = TRANSFORMER) -> list:
    return [*flags(folder, arch), "--epochs", 1, "--lr", 0.01, "--saves-per-epoch", 4]


def twa_flags(folder: Path, arch: str = TRANSFORMER) -> list:
    rate = ["--lr", 0.01, "--schedule", "linear"]
    return [*flags(folder, arch), "--epochs", 2, "--params_start", 1, "--params_end", 5, *rate]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """SGD and TWA in one process."""
    folder = tmp_path_factory.mktemp("alone")
    succeed(0, SGD, *sgd_flags(folder))
    succeed(0, TWA, *twa_flags(folder))
    return folder


@pytest.fixture
def copy(alone, tmp_path) -> Path:
    """The checkpoints of `alone`."""
    for path in (*alone.glob("[0-9].pt"), alone / "run.json", alone / "metrics.jsonl"):
        shutil.copy(path, tmp_path)
    return tmp_path


def difference(actual: Path, expected: Path) -> float:
    """Of two state_dicts, relative to the second."""
    states = (torch.load(path, weights_only=True) for path in (actual, expected))
    flat, reference = (torch.cat([v.flatten() for v in state.values()]) for state in states)
    return float((flat - reference).norm() / reference.norm())


def results(folder: Path, name: str = "twa.json") -> dict:
    return json.loads((folder / name).read_text())["results"]


def lines(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def accuracy_of(arch: str, path: Path) -> float:
    """The test accuracy of a checkpoint, in one process."""
    _, test = data.load("Digits", ".", torch.device("cpu"))
    model = models.build(arch, 10, 1, 8)
    load_into(model, path)
    return evaluate(model, data.Loader(test, 1000, train=False))["accuracy"]


def test_sgd_on_two_ranks_is_sgd_in_one_process(alone, tmp_path):
    launch = torchrun(2, SGD, *sgd_flags(tmp_path))
    done = subprocess.run(launch, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {
        *(f"{i}.pt" for i in range(5)),
        *("state.pt", "log", "run.json", "metrics.jsonl"),
    }
    assert difference(tmp_path / "0.pt", alone / "0.pt") == 0
    assert difference(tmp_path / "4.pt", alone / "4.pt") < 1e-4
    (actual,), (expected,) = (lines(folder, "metrics.jsonl") for folder in (tmp_path, alone))
    for key in ("train_loss", "train_accuracy", "test_loss", "test_accuracy"):
        assert actual[key] == pytest.approx(expected[key], rel=1e-4)
    assert done.stdout == (tmp_path / "log").read_text()  # once, by the first rank


# The last batch has 58 images: shares of 19, 19 and 20, and of 29.
@pytest.mark.parametrize(
    ("ranks", "strategy", "basis", "said"),
    [
        (3, "shard", ["--reshard-after-forward"], "shard on 3 ranks (as asked for)"),
        (3, "replicate", [], "replicate on 3 ranks (as asked for)"),
        (2, "auto", [], "replicate on 2 ranks (model and basis take"),
        (4, "hybrid", [], "hybrid on 4 ranks (as asked for)"),
        pytest.param(
            *(2, "shard", ["--granularity", "layer", "--bits", 8], ""), marks=pytest.mark.slow
        ),
        pytest.param(
            *(3, "replicate", ["--granularity", "layer", "--bits", 4, "-acc", 3], ""),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_twa_on_ranks_is_twa_in_one_process(
    alone, copy, tmp_path_factory, ranks, strategy, basis, said
):
    expected = alone
    if "--bits" in basis:
        expected = tmp_path_factory.mktemp("alone")
        shutil.copytree(copy, expected, dirs_exist_ok=True)
        succeed(0, TWA, *twa_flags(expected), *basis)
    hosts = 2 if strategy == "hybrid" else 1
    printed = succeed(ranks, TWA, *twa_flags(copy), *basis, "--parallel", strategy, hosts=hosts)
    (line,) = [line for line in printed.splitlines() if line.startswith("parallel: ")]
    assert said in line
    assert difference(copy / "twa/twa.pt", expected / "twa/twa.pt") < 1e-4
    for name, values in results(expected / "twa").items():
        for key in ("accuracy", "loss"):
            assert results(copy / "twa")[name][key] == pytest.approx(values[key], rel=1e-4), name
    assert printed == (copy / "twa/log").read_text()
    assert results(copy / "twa")["TWA"]["accuracy"] == accuracy_of(TRANSFORMER, copy / "twa/twa.pt")


@linux
@pytest.mark.parametrize(("before", "after"), [(2, 0), pytest.param(3, 2, marks=pytest.mark.slow)])
def test_a_run_goes_on_with_another_number_of_ranks(alone, copy, before, after):
    arguments = twa_flags(copy)
    with subprocess.Popen(torchrun(before, TWA, *arguments), env=ENVIRONMENT, text=True) as process:
        wait_for(lambda: len(lines(copy / "twa", "twa_metrics.jsonl")) == 1, process)
        os.kill(rank_of(process, 1), signal.SIGKILL)
        assert process.wait(timeout=60) != 0
    assert not (copy / "twa/twa.pt").exists()
    succeed(after, TWA, *arguments, "--resume")
    assert difference(copy / "twa/twa.pt", alone / "twa/twa.pt") < 1e-4
    assert [m["epoch"] for m in lines(copy / "twa", "twa_metrics.jsonl")] == [1, 2]


def test_batch_norm_is_re_estimated_alike_on_any_number_of_ranks(tmp_path):
    succeed(0, SGD, *sgd_flags(tmp_path, "PreResNet20"))
    seen = []
    for ranks in (0, 4):  # of eight batches each gets two
        succeed(ranks, TWA, *twa_flags(tmp_path, "PreResNet20"), "--epochs", 0)
        seen.append(results(tmp_path / "twa"))
    for name, values in seen[0].items():
        for key in ("accuracy", "loss"):
            assert seen[1][name][key] == pytest.approx(values[key], rel=1e-4), name
    assert seen[1]["TWA"]["accuracy"] == accuracy_of("PreResNet20", tmp_path / "twa/twa.pt")


@pytest.mark.slow
def test_what_sgd_and_swa_report_on_two_ranks_is_true_of_what_they_save(tmp_path):
    sgd, swa = tmp_path / "sgd", tmp_path / "swa"
    succeed(2, SGD, *sgd_flags(sgd, "PreResNet20"))
    assert lines(sgd, "metrics.jsonl")[0]["test_accuracy"] == accuracy_of(
        "PreResNet20", sgd / "4.pt"
    )
    succeed(
        *(2, SWA, "--dir", swa, "--dataset", "Digits", "--model", "PreResNet20", "--epochs", 2),
        *("--batch_size", BATCH, "--swa", "--swa_start", 1, "--eval_freq", 1),
    )
    found = results(swa, "swa.json")
    assert found["SGD"]["accuracy"] == accuracy_of("PreResNet20", swa / "checkpoints/2.pt")
    assert found["SWA"]["accuracy"] == accuracy_of("PreResNet20", swa / "checkpoints/swa.pt")
    assert [m["epoch"] for m in lines(swa, "metrics.jsonl")] == [1, 2]


def test_a_batch_that_does_not_divide_is_refused_in_a_line(tmp_path):
    done = on_ranks(2, SGD, *sgd_flags(tmp_path), "--batch-size", 121)
    assert done.status != 0
    message = "error: --batch-size 121: does not divide among 2 ranks; give a multiple of 2"
    assert message in done.err
    assert "UserError" not in done.err
    assert not list(tmp_path.iterdir())


# --- the choice ---


def layout(monkeypatch, *flags: str, ranks: int = 8, on_each: int | None = 4, free: float = 1e9):
    """The layout that so many ranks choose for 10^6 weights and eleven checkpoints."""
    args = settings.parser_of(parallel.Parallel).parse_args([*flags])
    vars(args).update(clip_grad=None, extract="PCA", components=None, bits=32)
    for name, value in (("launched", True), ("world", ranks), ("local_world", on_each)):
        monkeypatch.setattr(parallel.ranks, name, lambda value=value: value)
    monkeypatch.setattr(parallel.ranks, "gather", lambda own: [own or 1, own or 2])
    monkeypatch.setattr(parallel.ranks, "shard", lambda *_: None)
    monkeypatch.setattr(parallel, "init_device_mesh", lambda *_, **__: MagicMock())
    monkeypatch.setattr(parallel.windows, "Window", lambda _: range(11))
    monkeypatch.setattr(parallel, "free_memory", lambda _: free * (on_each or 1))
    return parallel.Layout(args)


def choice(layout: parallel.Layout) -> bool:
    """Whether the model is sharded."""
    return layout.shard(nn.Linear(1000, 1000, bias=False), torch.device("cpu"))


# The basis takes 44 MB, weights and what goes with them 16 MB; of a rank of 4, 15 MB, of 8, 7.5 MB.
@pytest.mark.parametrize(
    ("free", "machines", "strategy"),
    [
        (121e6, 2, "replicate"),
        (119e6, 2, "hybrid"),
        (31e6, 2, "hybrid"),
        (29e6, 2, "shard"),
        (1e6, 2, "shard"),
        (119e6, 1, "shard"),
    ],
)
def test_auto_takes_the_first_strategy_that_fits(monkeypatch, free, machines, strategy):
    chosen = layout(monkeypatch, ranks=4 * machines, free=free)
    assert choice(chosen) == (strategy != "replicate")
    assert chosen.strategy == strategy


@pytest.mark.parametrize(
    ("flags", "world", "message"),
    [
        (["--parallel", "replicate", "--reshard-after-forward"], {}, "--reshard-after-forward is"),
        (["--parallel", "hybrid"], {"ranks": 4}, "takes several machines"),
        (["--parallel", "hybrid"], {"on_each": 1}, "takes several machines with several ranks"),
        (["--parallel", "hybrid"], {"on_each": None}, "do not have equally many ranks"),
    ],
)
def test_impossible_strategies_are_refused(monkeypatch, flags, world, message):
    with pytest.raises(UserError, match=f"^--parallel {flags[1]}: .*{message}"):
        choice(layout(monkeypatch, *flags, **world))


@pytest.mark.parametrize("flags", [["--reshard-after-forward"], ["--clip-grad"]])
def test_auto_shards_where_another_flag_needs_it(monkeypatch, flags):
    clip = "--clip-grad" in flags
    chosen = layout(monkeypatch, *([] if clip else flags), ranks=4)
    chosen._args.clip_grad = 1.0 if clip else None
    assert choice(chosen)
    assert (chosen.strategy, chosen.group) == ("shard", None)


def test_impossible_strategies_end_in_a_line(copy, tmp_path):
    flags = [*twa_flags(copy), "--parallel", "replicate"]
    for count, more, said in (
        (0, [], "error: --parallel replicate: only under torchrun"),
        (2, ["--clip-grad", 1], "error: --parallel replicate: --clip-grad needs"),
    ):
        done = on_ranks(count, TWA, *flags, *more)
        assert done.status == 2
        assert said in done.err
        assert "Traceback" not in done.err
    assert not (copy / "twa").exists()


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("soup/finetune.py", ["--base", "x", "--save-dir"]),
        ("soup/soup.py", ["--checkpoints", "x", "--log-dir"]),
    ],
)
def test_scripts_of_one_process_say_so(script, arguments, tmp_path):
    ranks = {"RANK": "0", "WORLD_SIZE": "2"}
    done = in_child(tmp_path, script, *arguments, tmp_path / "new", environment=ranks)
    assert done.status == 2
    name = Path(script).name
    assert done.err == f"error: {name} runs in one process: start it without torchrun\n"
    assert not (tmp_path / "new").exists()


# --- ranks that die ---


def wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while True:
        assert process.poll() is None, "ended too early"
        assert time.monotonic() < end, "never happened"
        try:
            if condition():
                return
        except FileNotFoundError:
            pass
        time.sleep(0.05)


def rank_of(process: subprocess.Popen, rank: int) -> int:
    """The process id of a rank that torchrun started."""
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        environment = Path(f"/proc/{pid}/environ").read_text().split("\0")
        if f"RANK={rank}" in environment:
            return int(pid)
    raise AssertionError(f"rank {rank} does not run")


@linux
@pytest.mark.parametrize("restarts", [0, 1])
def test_a_rank_that_is_killed_ends_the_job_or_brings_it_back(tmp_path, restarts):
    arguments = [*flags(tmp_path, "PreResNet20"), "--epochs", 5]
    launch = torchrun(2, SGD, *arguments, restarts=restarts)
    with subprocess.Popen(
        launch, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        wait_for(lambda: len(lines(tmp_path, "metrics.jsonl")) == 2, process)
        os.kill(rank_of(process, 1), signal.SIGKILL)
        printed, _ = process.communicate(timeout=240)
    epochs = [m["epoch"] for m in lines(tmp_path, "metrics.jsonl")]
    if restarts:
        assert process.returncode == 0, printed
        assert epochs == list(range(1, 6))
        started = [line.split()[4] for line in printed.splitlines() if " to 5" in line]
        assert started[0] == "0"
        assert int(started[1]) >= 1
    else:
        assert process.returncode != 0
        assert "Signal 9 (SIGKILL)" in printed
        assert epochs == list(range(1, len(epochs) + 1))
        assert len(epochs) < 5
