"""Scripts in processes of their own: as real as others, and seconds sooner.

They are forked from one process that has imported everything.
"""

import contextlib
import functools
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from train_sgd_cifar import Settings
from training import data
from training.loop import Trainer
from training.run import Run

ROOT = Path(__file__).resolve().parents[1]
FORKS = multiprocessing.get_context("forkserver") if os.name == "posix" else multiprocessing


@dataclass
class Result:
    status: int
    out: str
    err: str


@functools.cache
def start_server() -> None:
    """Starts what processes are forked from, with the folders that it imports from."""
    FORKS.set_forkserver_preload(["train_twa", "soup.soup", "sklearn.model_selection", "processes"])
    with pytest.MonkeyPatch.context() as patch:  # some versions of Python do not tell it sys.path
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        patch.setenv("OMP_NUM_THREADS", "1")
        first = FORKS.Process(target=os.getpid)
        first.start()
        first.join()  # once everything is imported: runs are timed


def work(out: str, err: str, environment: dict, largest: int | None, function, *args) -> None:
    """What a child does: `function`, with its output in files."""
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    os.environ.update(environment)
    torch.set_num_threads(1)
    if largest:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    function(*args)


def run_script(script: str, *args: str) -> None:
    sys.argv = [str(ROOT / script), *args]
    runpy.run_path(sys.argv[0], run_name="__main__")


def run_reduced(script: str, *args: str) -> None:
    """As `run_script`, with torchvision's vision transformers made small."""
    from reduced import Reduced, vision_transformer

    vision_transformer.VisionTransformer = Reduced
    run_script(script, *args)


def run_slowly(script: str, *args: str) -> None:
    """As `run_script`; what is measured comes in 57 batches, each of which prints a line.

    With $PAUSE there are so many seconds between two of them.
    """
    batches = data.Loader.batches

    def paused(self, start: int = 0):
        if self.train:
            return batches(self, start)
        self.batch_size = 16

        def slowly():
            for batch in batches(self, start):
                print("measures a batch", flush=True)
                time.sleep(float(os.environ.get("PAUSE", 0)))
                yield batch

        return slowly()

    data.Loader.batches = paused
    run_script(script, *args)


@contextlib.contextmanager
def small_run(folder: Path, model: torch.nn.Module, resume: str | None = None, **flags):
    """A run of `model` on ten digits, in `folder`, before it starts."""
    args = Settings(resume=resume, save_dir=str(folder), log_dir=str(folder), **flags)
    split, _ = data.load("Digits", "", torch.device("cpu"))
    loader = data.Loader(split.part(slice(10)), 5, train=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    with Run(args, folder, "--save-dir") as run:
        cpu = torch.device("cpu")
        task = SimpleNamespace(device=cpu, train=loader, test=loader, training=loader.split)
        run.set_task(task, model)
        run.restore(Trainer(model, loader, loader, optimizer, scheduler, epochs=2))
        yield run


class Child:
    """A function that runs in a process of its own, with its output in files beside `folder`.

    Args:
        environment: variables of the process beside those of this one.
        largest: of the files that it may write, in bytes.
    """

    def __init__(
        self,
        folder: Path,
        function: Callable,
        *args,
        environment: dict[str, str] | None = None,
        largest: int | None = None,
    ):
        start_server()
        self.out, self.err = (folder.parent / f"{folder.name}.{end}" for end in ("out", "err"))
        self.out.write_text("")
        self.err.write_text("")
        how = (str(self.out), str(self.err), environment or {}, largest)
        self.process = FORKS.Process(target=work, args=(*how, function, *args))
        self.process.start()

    def wait_for(self, words: str) -> None:
        """Until it has printed them."""
        end = time.monotonic() + 60
        while words not in self.out.read_text():
            assert self.process.is_alive(), self.err.read_text()
            assert time.monotonic() < end, f"never printed: {words}"
            time.sleep(0.002)

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def end(self, seconds: float = 120) -> Result:
        """Waits for its end; the status of one that a signal killed is negative."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, "does not end"
        return Result(self.process.exitcode, self.out.read_text(), self.err.read_text())


def start(folder: Path, script: str, *args, **how) -> Child:
    return Child(folder, run_script, script, *map(str, args), **how)


def in_child(folder: Path, script: str, *args, **how) -> Result:
    return start(folder, script, *args, **how).end()


def start_slowly(folder: Path, script: str, *args, pause: float = 0.0) -> Child:
    """A child that measures slowly; see `run_slowly`."""
    return Child(folder, run_slowly, script, *map(str, args), environment={"PAUSE": str(pause)})


class Ranks:
    """A script on so many ranks, which meet as those of `torchrun` do; on 0, without any.

    Scripts run on the CPU, as a machine may have fewer accelerators than ranks.

    Args:
        folder: the outputs of the ranks go there.
        run: what a rank does with `script` and `args`.
        hosts: so many machines, each with its part of the ranks.

    Attributes:
        status: of the first that failed.
    """

    def __init__(
        self, folder: Path, count: int, script: str, *args, run: Callable = run_script, hosts=1
    ):
        if not script.startswith("tests/"):
            args = (*args, "--device", "cpu")
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        local = count // hosts
        variables = {
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(local),
            "GROUP_WORLD_SIZE": str(hosts),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
        }
        self.children, self.status = [], 0
        for rank in range(max(count, 1)):
            number = {"RANK": str(rank), "LOCAL_RANK": str(rank % local if count else 0)}
            how = {"environment": variables | number if count else {}}
            self.children.append(Child(folder / str(rank), run, script, *map(str, args), **how))

    def end(self) -> list[Result]:
        """Waits for the end of all. As `torchrun` does, it ends the others when one has failed."""
        running = {child.process.sentinel: child for child in self.children}
        failed = False
        while running:
            ended = wait(list(running), timeout=30 if failed else 300)
            if not ended:
                for child in running.values():
                    child.process.kill()
                assert failed, "does not end"
            for sentinel in ended:
                child = running.pop(sentinel)
                child.process.join()
                if child.process.exitcode and not failed:
                    self.status, failed = child.process.exitcode, True
                    wait(list(running), timeout=0.1)  # torchrun looks ten times a second
                    for other in running.values():
                        other.send(signal.SIGTERM)
        return [child.end() for child in self.children]


def on_ranks(count: int, script: str, *args, **how) -> Result:
    """A script on ranks; see `Ranks`.

    Returns:
        The status of the first that failed, and what all printed, one after the other.
    """
    with tempfile.TemporaryDirectory() as folder:
        ranks = Ranks(Path(folder), count, script, *args, **how)
        results = ranks.end()
    return Result(
        ranks.status, *("".join(getattr(r, name) for r in results) for name in ("out", "err"))
    )
