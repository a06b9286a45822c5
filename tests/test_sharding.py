"""TWA on a model that FSDP2 shards among processes (gloo, CPU) against TWA in one process."""

from pathlib import Path

import pytest
import torch
from processes import on_ranks
from ranks import CASES, CHECKPOINTS, ROUNDED, batches, checkpoints, make_model, uneven
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from twa import Subspace
from twa.storage.columns import Columns

TRAINED = sum(p.numel() for p in uneven().parameters()) - 7  # the first bias is frozen
FLOATS = 4  # bytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Holds the checkpoints, and the results of one process with whole models in `whole.pt`."""
    folder = tmp_path_factory.mktemp("ranks")
    execute(0, folder)
    return folder


def execute(count: int, folder: Path) -> None:
    done = on_ranks(count, "tests/ranks.py", folder)
    assert done.status == 0, done.err


@pytest.fixture(scope="module")
def whole(folder) -> dict:
    return torch.load(folder / "whole.pt", weights_only=True)


@pytest.fixture(
    scope="module",
    params=[pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow), 4],
)
def ranks(folder, request) -> list[dict]:
    """The results of each rank."""
    execute(request.param, folder)
    return torch.load(folder / f"{request.param}.pt", weights_only=True)["ranks"]


def flat(state: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([value.double().flatten() for value in state.values()])


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("case", [case for case in CASES if case != ROUNDED])
def test_coefficients_and_weights_after_twenty_steps_are_those_of_one_process(whole, ranks, case):
    expected = whole["ranks"][0][case]
    for actual in (results[case] for results in ranks):
        assert difference(flat(actual["weights"]), flat(expected["weights"])) < 1e-4
        # The way from the start point is short: it shows an error that the weights would hide.
        way = flat(expected["weights"]) - flat(expected["start"])
        assert way.norm() > 1e-4 * flat(expected["start"]).norm()
        limit = 1e-5 if "bits" not in case else 0.05
        assert difference(flat(actual["weights"]) - flat(actual["start"]), way) < limit
        if "bits" not in case or case == "Schmidt, 8 bits":
            limit = 1e-4 if "bits" not in case else 2e-4
            assert difference(actual["coefficients"], expected["coefficients"]) < limit
        if "bits" not in case:
            torch.testing.assert_close(
                actual["averaging weights"], expected["averaging weights"], rtol=1e-4, atol=1e-5
            )


def test_in_the_basis_that_the_ranks_rounded_one_process_goes_the_same_way(ranks):
    """Tiles, and so what 8 bits round to, begin with a shard: small layers show it.

    Here the reference, plain SGD on coefficients in float64, has the ranks' own basis.
    """
    results = [results[ROUNDED] for results in ranks]
    parts = [r["basis"].double().split(r["columns"], dim=1) for r in results]
    basis = torch.cat([torch.cat(shards, dim=1) for shards in zip(*parts, strict=True)], dim=1)
    model = make_model("uneven")
    model.load_state_dict(results[0]["start"])
    trained = [p for p in model.parameters() if p.requires_grad]
    start = parameters_to_vector(trained).detach().double()
    start_coefficients = results[0]["start coefficients"].double()
    coefficients, velocity = start_coefficients.clone(), torch.zeros(len(basis))
    for images, labels in batches():
        gradients = torch.autograd.grad(F.cross_entropy(model(images), labels), trained)
        velocity = 0.9 * velocity + basis @ torch.cat([g.flatten() for g in gradients]).double()
        coefficients -= 0.01 * velocity
        weights = start + basis.T @ (coefficients - start_coefficients)
        vector_to_parameters(weights.float(), trained)
    moved = coefficients - start_coefficients
    assert moved.norm() > 1e-3 * start_coefficients.norm()
    for result in results:
        assert difference(result["coefficients"], coefficients) < 1e-6
        assert difference(result["coefficients"] - result["start coefficients"], moved) < 1e-4


@pytest.mark.parametrize("case", CASES)
def test_all_ranks_hold_the_same_coefficients_to_the_bit(ranks, case):
    for results in ranks:
        assert torch.equal(results[case]["coefficients"], ranks[0][case]["coefficients"])


@pytest.mark.parametrize("case", CASES)
def test_the_start_point_has_the_same_fingerprint_on_any_number_of_ranks(whole, ranks, case):
    for results in ranks:
        assert torch.equal(results[case]["fingerprint"], whole["ranks"][0][case]["fingerprint"])


@pytest.mark.parametrize("case", ["model", "layer", "channel", "3 directions"])
def test_all_ranks_have_the_scale_of_one_process(whole, ranks, case):
    expected = whole["ranks"][0][case]["scale"]
    for results in ranks:
        assert torch.equal(results[case]["scale"], ranks[0][case]["scale"])
        torch.testing.assert_close(results[case]["scale"], expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("case", ["Schmidt", "Schmidt by layer", "Schmidt by channel"])
def test_a_dependent_checkpoint_is_named_on_every_rank_and_told_of_once(folder, ranks, case):
    expected = [str(checkpoints(folder, "uneven")[4])]
    assert [results[case]["dropped"] for results in ranks] == [expected] * len(ranks)
    assert [results[case]["warnings"] for results in ranks] == [1] + [0] * (len(ranks) - 1)


def test_each_rank_holds_its_share_of_the_basis_and_no_more(ranks):
    columns = [sum(results["model"]["columns"]) for results in ranks]
    assert sum(columns) == TRAINED
    for case in ("model", "Schmidt"):
        assert [results[case]["bytes"] for results in ranks] == [
            CHECKPOINTS * held * FLOATS for held in columns
        ]


@pytest.mark.parametrize("case", CASES)
def test_a_step_communicates_once_a_shard_group_and_once_for_all_coefficients(ranks, case):
    fsdp = {"c10d._allgather_base_": 2, "c10d._reduce_scatter_base_": 2} if len(ranks) > 1 else {}
    assert ranks[0][case]["communication"] == {**fsdp, "c10d.allreduce_": 1}


def test_what_is_wrong_on_one_rank_is_said_by_all(folder, ranks):
    said = torch.load(folder / f"{len(ranks)}.pt", weights_only=True)["refusals"]
    assert said["NaN"] == "checkpoints[1]: holds NaN or infinity"
    assert "call fully_shard on the whole model" in said["half"]


def test_channels_that_follow_each_other_are_one_item_in_a_whole_model():
    model = nn.Sequential(nn.Conv2d(3, 4, 2, bias=False), nn.Conv2d(3, 5, 2, bias=False))
    columns = Columns(model, "channel")
    blocks, count = columns.blocks, columns.count
    assert [(b.first, b.start, b.count, b.width) for b in blocks] == [(0, 0, 9, 12)]
    assert count == 9


@pytest.mark.parametrize("wrapper", [nn.DataParallel, torch.compile])
def test_a_wrapped_model_has_the_basis_of_the_model_itself(folder, wrapper):
    model, paths = uneven(), checkpoints(folder, "uneven")
    plain, wrapped = Subspace(model, paths), Subspace(wrapper(model), paths)
    gradients = torch.ones(TRAINED + 7)
    assert torch.equal(wrapped.project(gradients), plain.project(gradients))
