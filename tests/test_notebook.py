"""`soup/twa_soup.ipynb`: what is stored in it, and a run of it from a fresh copy of the project."""

import json
import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "soup/twa_soup.ipynb"
ROW = re.compile(r"^(\S.*?) +(\d+) +([\d.]+) % +([\d.]+) % +([\d.]+)$", re.M)


def code_cells(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def outputs(notebook: dict) -> list[dict]:
    return [output for cell in code_cells(notebook) for output in cell["outputs"]]


def printed(notebook: dict) -> str:
    texts = [output["text"] for output in outputs(notebook) if "text" in output]
    return "".join(text if isinstance(text, str) else "".join(text) for text in texts)


def rows(notebook: dict) -> dict[str, tuple[str, ...]]:
    """The notebook's table: name to models, validation and test accuracy, test loss, as printed."""
    return {name: tuple(values) for name, *values in ROW.findall(printed(notebook))}


@pytest.fixture(scope="module")
def stored() -> dict:
    return json.loads(NOTEBOOK.read_text())


def test_the_stored_outputs_are_of_one_run_and_know_no_machine(stored):
    assert NOTEBOOK.stat().st_size < 1_000_000
    cells = code_cells(stored)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert {output["output_type"] for output in outputs(stored)} == {
        *("stream", "display_data", "execute_result")
    }
    assert all(output.get("name", "stdout") == "stdout" for output in outputs(stored))
    assert sum("image/png" in output.get("data", {}) for output in outputs(stored)) == 4
    assert not re.search(r"(?<![\w.])/\w+/\w|[A-Z]:\\|warning", printed(stored), re.I)


def test_the_stored_table_is_that_of_the_document(stored):
    document = (ROOT / "soup/README.md").read_text()
    names = {
        "best single model": "best single model",
        "uniform": "uniform soup",
        "greedy": "greedy soup, of 3 models",
        "TWA-v": "TWA-v",
        "TWA-v layer": "TWA-v, a set of coefficients for each layer",
    }
    assert rows(stored).keys() == names.keys()
    for name, (_, *values) in rows(stored).items():
        assert f"| {names[name]} | {' | '.join(values)} |" in document


@pytest.mark.examples
def test_it_runs_from_a_fresh_copy_and_agrees_with_soup_py(tmp_path, stored):
    """With fewer epochs and models than stored."""
    reason = "pip install -r requirements-examples.txt"
    nbclient = pytest.importorskip("nbclient", reason=reason)
    nbformat = pytest.importorskip("nbformat", reason=reason)
    pytest.importorskip("ipykernel", reason=reason)
    for name in ("soup", "training", "models", "twa"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    for name in ("utils.py", "train_sgd_cifar.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    notebook = nbformat.read(NOTEBOOK, 4)
    settings = code_cells(notebook)[0]
    for name, value in (("MODELS", 4), ("BASE_EPOCHS", 3), ("TWA_EPOCHS", 2)):
        settings["source"], count = re.subn(
            rf"^{name} = \d+", f"{name} = {value}", settings["source"], flags=re.M
        )
        assert count == 1
    where = {"metadata": {"path": str(tmp_path / "soup")}}
    nbclient.NotebookClient(notebook, timeout=600, resources=where).execute()
    assert sum("image/png" in output.get("data", {}) for output in outputs(notebook)) == 4
    lines = (tmp_path / "results/notebook_Digits/soup/results.jsonl").read_text().splitlines()
    records = {record["name"]: record for record in map(json.loads, lines)}
    found = rows(notebook)
    assert {"best single model", "uniform", "greedy", "TWA-v", "TWA-v layer"} == found.keys()
    for name, (count, validation, test, loss) in found.items():
        record = records[name]
        assert int(count) == len(record["models"])
        assert validation == f"{record['validation']['accuracy']:.2f}"
        assert test == f"{record['test']['accuracy']:.2f}"
        assert float(loss) == pytest.approx(record["test"]["loss"], abs=1e-3)
