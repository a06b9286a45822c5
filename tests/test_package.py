"""The package: what `pip install .` gives another project; and imports that point down."""

import ast
import inspect
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import twa

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "twa")


def test_installed_it_is_imported_from_anywhere(tmp_path):
    pytest.importorskip("setuptools", "77")  # as pyproject.toml requires
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    for name in SOURCES:  # pip builds in place, and would leave build/ in the repository
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", target, source], check=True, capture_output=True)
    installed = {path.name for path in target.iterdir() if path.suffix != ".dist-info"}
    assert installed == {"twa", "bin"}
    command = [sys.executable, target / "bin/twa", "--version"]
    path = {"PYTHONPATH": str(target)}
    done = subprocess.run(command, env=path, check=True, capture_output=True, text=True)
    assert done.stdout == f"twa {twa.__version__}\n"
    assert (target / "twa/py.typed").exists()
    (metadata,) = target.glob("torch_twa-*.dist-info/METADATA")
    assert f"\nVersion: {twa.__version__}\n" in metadata.read_text()
    assert f"## {twa.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()
    text = metadata.read_text()
    for line in (
        "License-Expression: MIT",
        "Requires-Python: >=3.10",
        "Classifier: Typing :: Typed",
    ):
        assert f"\n{line}\n" in text
    assert "file://" not in text and "localhost" not in text
    code = """
import torch, twa
model = torch.nn.Linear(3, 2)
window = [torch.nn.Linear(3, 2).state_dict() for _ in range(3)]
optimizer = twa.TWA(model, window)
before = model.weight.clone()
for _ in range(2):
    model(torch.ones(4, 3)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
assert not torch.equal(model.weight, before)
print(twa.__file__)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(target)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert Path(done.stdout.strip()) == target / "twa/__init__.py"


def test_a_build_of_torch_without_its_distributed_package_is_enough():
    """Some builds lack it: neither the import nor a training imports what they do not have."""
    code = """
import sys, torch
for name in [*sys.modules]:
    if name.startswith("torch.distributed."):
        del sys.modules[name]
for name in ("fsdp", "tensor", "device_mesh", "checkpoint"):
    sys.modules[f"torch.distributed.{name}"] = None  # an import of it fails
import twa
model, loss = torch.nn.Linear(3, 2), lambda: model.weight.sum()
window = [torch.nn.Linear(3, 2).state_dict() for _ in range(3)]
recipe = twa.Recipe(model, window, loss, steps=2)
optimizer = recipe.optimizer(bits=8)
for _ in range(2):
    loss().backward()
    optimizer.step()
recipe.finish()
print(optimizer.averaging_weights().sum().item())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert float(done.stdout) == pytest.approx(1)


def test_the_package_needs_nothing_that_the_scripts_do_not():
    text = (ROOT / "pyproject.toml").read_text()
    needed = re.findall(r'"([^"]+)"', re.search(r"dependencies = \[(.*?)\]", text, re.S)[1])
    assert needed
    assert set(needed) <= set((ROOT / "requirements.txt").read_text().split())


@pytest.mark.parametrize("name", ["TWA", "Recipe", "best_start"])
def test_the_examples_of_the_docstrings_run(name):
    """The indented blocks, with a model, a window and data in place of the reader's."""
    document = inspect.getdoc(getattr(twa, name))
    (example,) = re.findall(r"\n\n((?: {4}\w+.*[(=].*\n(?: {4,}.*\n)*))", document)
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    images, labels = torch.randn(8, 3), torch.randint(2, (8,))
    criterion = torch.nn.CrossEntropyLoss()
    names = {
        **{name: getattr(twa, name) for name in twa.__all__},
        **{"torch": torch, "model": model, "criterion": criterion, "steps": 3},
        **{"loss": lambda: criterion(model(images), labels).item(), "train_set": images},
        "checkpoints": [torch.nn.Linear(3, 2).state_dict() for _ in range(4)],
        **{"loader": [(images, labels)] * 3, "batches": [(images, labels)] * 3},
        "training_loss": lambda model: criterion(model(images), labels).item(),
    }
    exec(textwrap.dedent(example), names)
    assert isinstance(names["optimizer"], twa.TWA)
    trains = name != "best_start"  # whose example does not step
    assert bool(names["optimizer"].coefficients.any()) == trains
    assert trains or names["start"].losses.keys() >= {1, 2, 4}


def test_imports_point_down():
    """Scripts import training and models, these twa and utils, and twa nothing of ours."""
    allowed = {
        "twa": {"twa"},
        "examples": {"twa"},
        "utils.py": {"twa"},
        "models": {"twa", "utils", "models"},
        "training": {"twa", "utils", "models", "training"},
    }
    ours = {
        "twa",
        "utils",
        "models",
        "training",
        "swa",
        "soup",
        "lm",
        "benchmarks",
        "studies",
        "tests",
    }
    ours |= {path.stem for path in ROOT.glob("train_*.py")}
    for place, below in allowed.items():
        files = [ROOT / place] if place.endswith(".py") else sorted((ROOT / place).rglob("*.py"))
        assert files
        for file in files:
            for node in ast.walk(ast.parse(file.read_text())):
                names = []
                if isinstance(node, ast.ImportFrom):
                    names = [node.module]
                elif isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                tops = {name.partition(".")[0] for name in names}
                assert tops & ours <= below, file
