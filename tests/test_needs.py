"""The tables of what a basis on every rank takes, and the formulas behind them."""

from pathlib import Path

import needs
import pytest
import torch
from torch import nn

from training.parallel import size
from twa import Subspace
from twa.storage.memory import Plan

ROOT = Path(__file__).resolve().parents[1]


def model() -> nn.Module:
    """Some channels have fewer weights than there are directions."""
    return nn.Sequential(nn.Conv2d(1, 6, 2), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(294, 40))


def window(count: int) -> list[dict]:
    torch.manual_seed(0)
    state = {k: v for k, v in model().state_dict().items() if v.is_floating_point()}
    return [{k: v + torch.randn_like(v) for k, v in state.items()} for _ in range(count)]


def test_the_tables_are_those_of_the_documents():
    text = (ROOT / "docs/many-machines.md").read_text()
    for table in (needs.memory(), needs.sums()):
        assert "\n".join(table) in text
    assert "\n".join(needs.sharded()) in (ROOT / "benchmarks/README.md").read_text()


@pytest.mark.parametrize("bits", [32, 8, 4])
@pytest.mark.parametrize(("extract", "components"), [("PCA", 3), ("PCA", None), ("Schmidt", None)])
def test_a_basis_takes_what_the_formula_says(extract, components, bits):
    subspace = Subspace(model(), window(13), extract=extract, components=components, bits=bits)
    weights = sum(p.numel() for p in subspace.parameters)
    computed = Plan(13, extract, components, bits).basis_bytes(weights)
    assert computed == pytest.approx(subspace.nbytes, rel=1e-3)


@pytest.mark.parametrize("granularity", ["model", "layer", "channel"])
@pytest.mark.parametrize("components", [3, None])
def test_a_block_has_as_many_coefficients_as_computed(granularity, components):
    subspace = Subspace(model(), window(13), components=components, granularity=granularity)
    assert len(subspace) == needs.coefficients(model(), granularity, components or 12)


def test_sizes_have_three_digits():
    shown = [size(count) for count in (0, 412, 999, 1000, 60_912_345, 1e12)]
    assert shown == ["0 B", "412 B", "999 B", "1 kB", "60.9 MB", "1 TB"]
