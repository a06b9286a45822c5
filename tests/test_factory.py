"""Models of the user's own, made in folders whose modules have the names of ours."""

import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from processes import ROOT, Child, Result

# Each of these names is one of ours, too; what is in it is the user's alone.
SHADOWS = {
    "data.py": "PIXELS = 64",
    "utils.py": "FACTOR = 0.5\ndef scaled(x):\n    return x * FACTOR",
    "twa.py": "def in_training(x):\n    return x",
    "models/__init__.py": "CLASSES = 10",
    "models/net.py": "WIDTH = 7",
    "training/__init__.py": "",
    "training/loop.py": "SLOPE = 2.0",
}
FACTORY = """
from torch import nn

import data
from models import CLASSES
from models.net import WIDTH

class Net(nn.Sequential):
    def forward(self, x):
        from training.loop import SLOPE
        from utils import scaled
        if self.training:  # first imported once the training has begun
            from twa import in_training
            x = in_training(x)
        return scaled(super().forward(x)) * SLOPE

def make():
    hidden = nn.Linear(data.PIXELS, WIDTH)
    return Net(nn.Flatten(), hidden, nn.ReLU(), nn.Linear(WIDTH, CLASSES))
"""
WITHOUT_SHADOWS = """
import models

def make():
    return models.build("PreResNet20", 10, 1, 8)
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    """The user's folder."""
    for name, text in (SHADOWS | {"user_data.py": FACTORY}).items():
        (tmp_path / "user" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "user" / name).write_text(text)
    return tmp_path / "user"


def python(script: Path, *arguments, cwd: Path, path: str = "") -> Result:
    """As `python SCRIPT ARGUMENTS` in the folder `cwd`, with `path` as PYTHONPATH."""
    with tempfile.TemporaryDirectory() as output:
        arguments = (str(script), str(cwd), *map(str, arguments))
        child = Child(Path(output) / "run", run_from, *arguments, environment={"PYTHONPATH": path})
        return child.end()


def run_from(script: str, cwd: str, *arguments: str) -> None:
    """In a process of its own: its module path is what Python would have made it."""
    os.chdir(cwd)
    entries = {entry: Path(entry or ".") for entry in sys.path}
    # The environment that env.sh makes lies in the repository.
    foreign = [
        entry
        for entry, path in entries.items()
        if path.is_relative_to(sys.prefix) or not path.is_relative_to(ROOT)
    ]
    given = [entry for entry in os.environ["PYTHONPATH"].split(os.pathsep) if entry]
    sys.path[:] = [str(Path(script).parent), *given, *foreign]
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def flags(run: Path) -> list:
    return [*("--datasets", "Digits", "--epochs", 1), "--save-dir", run / "checkpoints"]


def trained(done: Result, run: Path) -> dict[str, torch.Tensor]:
    """The weights after the one epoch of a run that succeeded."""
    assert (done.status, done.err) == (0, "")
    return torch.load(run / "checkpoints/1.pt", weights_only=True)


def test_the_users_modules_come_before_ours_of_the_same_names(folder, tmp_path):
    own = ["--model-factory", "user_data:make", "--log-dir", tmp_path]
    done = python(ROOT / "train_sgd_cifar.py", *flags(tmp_path), *own, cwd=folder)
    assert trained(done, tmp_path)["1.weight"].shape == (7, 64)
    # The same by Python itself: nothing of ours is imported before the script begins.
    again = tmp_path / "again"
    own[-1] = again
    command = [sys.executable, ROOT / "train_sgd_cifar.py", *flags(again), *own]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    subprocess.run(list(map(str, command)), cwd=folder, env=environment, check=True)
    for name, weights in torch.load(again / "checkpoints/1.pt", weights_only=True).items():
        assert torch.equal(weights, trained(done, tmp_path)[name])


@pytest.mark.parametrize("elsewhere", [ROOT, ROOT / "swa"])
def test_those_on_pythonpath_do_so_from_anywhere(folder, tmp_path, elsewhere):
    (folder / "models/__init__.py").unlink()
    factory = FACTORY.replace("from models import CLASSES", "CLASSES = 10")
    (folder / "user_data.py").write_text(factory)
    own = ["--model-factory", "user_data:make", "--dir", tmp_path]
    arguments = ["--dataset", "Digits", "--epochs", 1, *own]
    done = python(
        ROOT / "swa/train.py", *arguments, cwd=elsewhere, path=f"{ROOT}{os.pathsep}{folder}"
    )
    assert trained(done, tmp_path)["1.weight"].shape == (7, 64)


def test_ours_are_there_for_a_user_who_has_none_of_these_names(tmp_path):
    (tmp_path / "user_data.py").write_text(WITHOUT_SHADOWS)
    (tmp_path / "models").mkdir()
    (tmp_path / "models/1.pt").touch()  # a folder of checkpoints is no package
    own = ["--model-factory", "user_data:make", "--log-dir", tmp_path]
    done = python(ROOT / "train_sgd_cifar.py", *flags(tmp_path), *own, cwd=tmp_path)
    assert trained(done, tmp_path)["conv1.weight"].shape == (16, 1, 3, 3)


def test_a_factory_that_is_not_there_is_refused(folder, tmp_path):
    own = ["--model-factory", "user_date:make", "--log-dir", tmp_path / "run"]
    done = python(ROOT / "train_sgd_cifar.py", *flags(tmp_path / "run"), *own, cwd=folder)
    assert done.status == 2
    (line,) = done.err.splitlines()
    assert "--model-factory user_date:make" in line and "PYTHONPATH" in line
    assert not (tmp_path / "run").exists()


AFTERWARDS = """
import pickle, sys
import models, utils
from training import image_folders
path = list(sys.path)
for _ in range(2):  # as soups do
    models.build("user_data:make", 10, 1, 8)
assert sys.modules["utils"].FACTOR == 0.5
assert pickle.loads(pickle.dumps(image_folders._Batches)) is image_folders._Batches
assert sys.path == path
"""


def test_afterwards_names_are_the_users_and_what_workers_unpickle_is_ours(folder, tmp_path):
    (tmp_path / "check.py").write_text(AFTERWARDS)
    done = python(tmp_path / "check.py", cwd=folder, path=str(ROOT))
    assert (done.status, done.err) == (0, "")
