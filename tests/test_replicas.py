"""TWA with `process_group`, a whole model on each rank (gloo, CPU), against one process."""

import socket

import pytest
import torch
from processes import on_ranks
from ranks import PAPER, batches, make_model
from replica_ranks import CASES
from test_sharding import difference, flat
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

EXTRAS = 4  # floats that are summed with the n of the coefficients: weight, loss, stop, overflow

few = pytest.mark.slow  # not without --slow


@pytest.fixture(
    scope="module", params=[pytest.param(1, marks=few), pytest.param(2, marks=few), 3, 4]
)
def ranks(tmp_path_factory, request) -> list[dict]:
    """The results of each rank."""
    folder = tmp_path_factory.mktemp("replicas")
    done = on_ranks(request.param, "tests/replica_ranks.py", folder)
    assert done.status == 0, done.err
    return torch.load(folder / f"replicas.{request.param}.pt", weights_only=True)


def reference(case: str, result: dict) -> torch.Tensor:
    """The coefficients after the steps of one process: in float64, on whole batches.

    The basis is the ranks' own, so that the rounding of 8 and 4 bits is in both.
    """
    model = make_model("uneven").double()
    model.load_state_dict(result["start"])
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    start = {name: result["start"][name].double() for name in names}
    sizes = [value.numel() for value in start.values()]
    origin = result["origin"].double()
    coefficients = nn.Parameter(origin.clone())
    settings = {"lr": 0.02, "weight_decay": 0.0}
    base = torch.optim.AdamW
    if "Schmidt" in case:
        base = PAPER["base"]
        settings = {key: PAPER[key] for key in ("lr", "momentum")}
    optimizer = base([coefficients], **settings)
    for images, labels in batches():
        moves = ((coefficients - origin) @ result["basis"].double()).split(sizes)
        weights = {
            name: value + move.view_as(value)
            for (name, value), move in zip(start.items(), moves, strict=True)
        }
        optimizer.zero_grad()
        F.cross_entropy(functional_call(model, weights, images.double()), labels).backward()
        optimizer.step()
    return coefficients.detach()


@pytest.mark.parametrize("case", CASES)
def test_uneven_shares_give_the_coefficients_of_one_process(ranks, case):
    expected = reference(case, ranks[0][case])
    assert (expected - ranks[0][case]["origin"]).norm() > 1e-3  # they have moved
    assert difference(ranks[0][case]["coefficients"], expected) < 1e-6


@pytest.mark.parametrize("case", CASES)
def test_coefficients_and_weights_are_the_same_on_all_ranks_to_the_bit(ranks, case):
    for results in ranks:
        assert torch.equal(results[case]["coefficients"], ranks[0][case]["coefficients"])
        assert torch.equal(flat(results[case]["weights"]), flat(ranks[0][case]["weights"]))
        assert torch.equal(results[case]["basis"], ranks[0][case]["basis"])


def test_the_weights_are_the_same_to_the_bit_after_200_steps_and_after_one_was_rounded(ranks):
    for results in ranks:
        for own, first in zip(results["long"]["weights"], ranks[0]["long"]["weights"], strict=True):
            assert torch.equal(flat(own), flat(first))


@pytest.mark.parametrize("case", CASES)
def test_a_step_sends_one_sum_of_n_floats_and_nothing_else(ranks, case):
    n = len(ranks[0][case]["coefficients"])
    sum_of_all = [("allreduce_", n + EXTRAS, [*range(len(ranks))])]
    assert ranks[0][case]["traffic"] == (sum_of_all if len(ranks) > 1 else [])


def test_all_ranks_skip_the_step_that_overflows_on_one(ranks):
    skipped, without = ranks[0]["with_scaler"]["coefficients"]
    assert difference(skipped, without) < 1e-6
    for rank, results in enumerate(ranks):
        assert torch.equal(results["with_scaler"]["coefficients"][0], skipped)
        last = rank == len(ranks) - 1  # It alone lowers its scale.
        assert results["with_scaler"]["scale"] == 2.0 ** (8 + rank - last)


def test_an_optimizer_that_decides_by_the_loss_has_that_of_all_ranks(ranks):
    together, alone = ranks[0]["with_closure"]["coefficients"]
    assert together.norm() > 1e-2
    assert difference(together, alone) < 1e-4
    for results in ranks:
        assert torch.equal(results["with_closure"]["coefficients"][0], together)
        mean, expected = results["with_closure"]["losses"]
        assert float(mean) == pytest.approx(float(expected), rel=1e-6)


def test_a_run_goes_on_together_alone_or_sharded(ranks):
    for results in ranks:
        ends = results["resumed"]
        assert torch.equal(ends["together"], ranks[0]["resumed"]["together"])
        assert difference(ends["alone"], ends["together"]) < 1e-5
        assert difference(ends["sharded"], ends["together"]) < 1e-5


def test_a_rank_that_asks_to_stop_is_heard_by_all_after_the_same_step(ranks):
    for results in ranks:
        assert results["asked_to_stop"] == [False, False, True, False, False]


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("checkpoint", "checkpoint uneven.2.pt"),
        ("start", "start point"),
        ("number", "number of checkpoints"),
        ("basis", "basis"),
        ("rate", "lr"),
    ],
)
def test_a_rank_that_differs_is_named_with_its_host_and_what_differs(ranks, what, said):
    if len(ranks) == 1:
        pytest.skip("there is no other rank")
    host = socket.gethostname()
    for results in ranks:
        expected = f"rank {len(ranks) - 1} ({host}) has another {said} than rank 0 ({host})"
        assert results["refusals"][what] == expected


def test_coefficients_that_differ_later_are_found(ranks):
    if len(ranks) == 1:
        pytest.skip("there is no other rank")
    for results in ranks:
        rounded, changed = results["long"]["said"]
        assert rounded == "nothing was said"
        assert changed.startswith(f"rank {len(ranks) - 1} (")
        assert ") has another vector of coefficients than rank 0 (" in changed


def test_a_mesh_of_two_dimensions_is_refused(ranks):
    if len(ranks) == 1:
        pytest.skip("there is no other rank")
    assert "mesh['shard']" in ranks[0]["refusals"]["mesh"]


@pytest.mark.parametrize("case", ["model", "channel"])
def test_two_hosts_that_shard_the_model_send_each_other_n_floats(ranks, case):
    if len(ranks) != 4:
        pytest.skip("two hosts of two ranks")
    expected = reference(case, ranks[0][case])
    for rank, results in enumerate(ranks):
        result = results[f"hybrid, {case}"]
        assert difference(result["coefficients"], expected) < 1e-6
        assert torch.equal(result["coefficients"], ranks[0][f"hybrid, {case}"]["coefficients"])
        assert torch.equal(flat(result["weights"]), flat(ranks[0][f"hybrid, {case}"]["weights"]))
        assert result["stopping"] == [step == 2 for step in range(len(batches()))]
        host, partner = [rank // 2 * 2, rank // 2 * 2 + 1], [rank % 2, rank % 2 + 2]
        across = [(name, size) for name, size, group in result["traffic"] if group == partner]
        assert across == [("allreduce_", len(expected) + EXTRAS)]
        assert all(group in (host, partner) for *_, group in result["traffic"])
