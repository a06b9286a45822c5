"""The TWA optimizer against plain float64 references, and as the optimizer that loops expect."""

import contextlib
import copy
import functools
import io
import math
import pickle
import re
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR, MultiStepLR
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import models
from training import data
from twa import TWA, CheckpointError, Subspace, best_start, rate_of
from twa.files.checkpoints import average
from twa.reference import gram_schmidt, principal_directions
from twa.storage.columns import Columns

ROOT = Path(__file__).resolve().parents[1]
SGD, AdamW, LBFGS = torch.optim.SGD, torch.optim.AdamW, torch.optim.LBFGS
EXTRACTS = pytest.mark.parametrize("extract", ["PCA", "Schmidt"])


# --- plain weights and gradients ---


def weights_of(model: nn.Module) -> Tensor:
    """All trainable parameters, float64 [D]."""
    return torch.cat([p.detach().double().flatten() for p in model.parameters() if p.requires_grad])


def set_weights(model: nn.Module, flat: Tensor) -> None:
    nn.utils.vector_to_parameters(flat, [p for p in model.parameters() if p.requires_grad])


def rows_of(model: nn.Module, checkpoints: list[dict]) -> Tensor:
    """The checkpoints' trainable parameters, float64 [n, D]."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    return torch.stack([torch.cat([c[n].double().flatten() for n in names]) for c in checkpoints])


def gradient_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The gradient of the loss at the weights that `model` holds, float64 [D]."""
    images, labels = batch
    model.zero_grad()
    F.cross_entropy(model(images.to(next(model.parameters()).dtype)), labels).backward()
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.requires_grad])


# --- a real model: PreResNet20 on Digits, checkpoints of its second epoch ---


@lru_cache
def digits_batches() -> list[tuple[Tensor, Tensor]]:
    train, _ = data.load("Digits", "", torch.device("cpu"))
    return list(data.Loader(train, 32, train=True))


@lru_cache
def digits_run(activation: str) -> tuple[nn.Module, list[dict]]:
    """A model and six checkpoints, five steps of SGD apart."""
    torch.manual_seed(0)
    model = models.build("PreResNet20", 10, 1, 8)
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    batches, checkpoints = digits_batches() * 2, []
    for step, batch in enumerate(batches):
        gradient_of(model, batch)
        optimizer.step()
        if step >= len(batches) - 30 and step % 5 == 0:
            checkpoints.append({k: v.clone() for k, v in model.state_dict().items()})
    return model.eval(), checkpoints


@pytest.fixture
def smooth(monkeypatch):
    """SiLU in the place of ReLU.

    At ReLU's kinks the gradient jumps: two exact trajectories that differ by rounding part there,
    by more than any tolerance that would tell a right update from a wrong one.
    """
    monkeypatch.setattr(F, "relu", lambda x, inplace=False: F.silu(x))
    return "silu"


def assert_follows(weights: Tensor, reference: Tensor, start: Tensor, tolerance: float) -> None:
    """`weights` differ from `reference` by at most `tolerance` of the way it went from `start`."""
    way = (reference - start).norm()
    assert way > 0.01 * start.norm()  # a way that is seen
    assert (weights - reference).norm() <= tolerance * way


# Coefficients and weights of norm 45 are rounded to float32 in each of 50 steps, each time by
# 45 * 6e-8 / sqrt(3) = 1.6e-6 at random, so by 1e-5 in all; the way is longer than 1. The curvature
# of the loss may amplify that a little. A forgotten decay is seen hundreds of times over.
TOLERANCE = 5e-5


def test_sgd_is_sgd_on_the_weights_with_the_projected_gradient(smooth):
    """The paper's update: `g ← PᵀP g`, then momentum and weight decay on w."""
    model, checkpoints = digits_run(smooth)
    arguments = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-3}
    trained, plain = copy.deepcopy(model), copy.deepcopy(model).double()
    optimizer = TWA(trained, checkpoints, SGD, extract="Schmidt", **arguments)
    plain.load_state_dict(average(checkpoints, model))
    basis = gram_schmidt(rows_of(model, checkpoints))
    weights = nn.Parameter(rows_of(model, checkpoints).mean(0))
    reference = SGD([weights], **arguments)
    start = weights.detach().clone()
    for batch in (digits_batches() * 2)[:50]:
        gradient_of(trained, batch)
        optimizer.step()
        set_weights(plain, weights.detach())
        weights.grad = basis.T @ (basis @ gradient_of(plain, batch))
        reference.step()
    assert_follows(weights_of(trained), weights.detach(), start, TOLERANCE)


def test_sgd_takes_the_same_way_as_the_reference_along_the_same_gradients():
    """With ReLU and without feedback: the reference is given the gradients that TWA met."""
    model, checkpoints = digits_run("relu")
    arguments = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-3}
    trained = copy.deepcopy(model)
    optimizer = TWA(trained, checkpoints, SGD, extract="Schmidt", **arguments)
    basis = gram_schmidt(rows_of(model, checkpoints))
    weights = nn.Parameter(rows_of(model, checkpoints).mean(0))
    reference = SGD([weights], **arguments)
    start = weights.detach().clone()
    for batch in (digits_batches() * 2)[:50]:
        weights.grad = basis.T @ (basis @ gradient_of(trained, batch))
        optimizer.step()
        reference.step()
    assert_follows(weights_of(trained), weights.detach(), start, TOLERANCE)


# --- coefficients in the spread of the window ---


def test_alone_it_is_adamw_on_coefficients_in_the_spread_of_the_window(smooth):
    """AdamW at 0.02, from the mean, written out in float64."""
    model, checkpoints = digits_run(smooth)
    trained, plain = copy.deepcopy(model), copy.deepcopy(model).double()
    optimizer = TWA(trained, checkpoints)
    plain.load_state_dict(average(checkpoints, model))
    rows = rows_of(model, checkpoints)
    directions, spread = principal_directions(rows)
    start, z = rows.mean(0), torch.zeros(len(spread)).double()
    mean, square = torch.zeros_like(z), torch.zeros_like(z)
    for step, batch in enumerate((digits_batches() * 2)[:50], start=1):
        gradient_of(trained, batch)
        optimizer.step()
        set_weights(plain, start + (z * spread) @ directions)
        gradient = spread * (directions @ gradient_of(plain, batch))
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        z -= 0.02 * mean / (1 - 0.9**step) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
    assert_follows(weights_of(trained), start + (z * spread) @ directions, start, 1e-3)
    found = optimizer.coefficients.detach().double()
    torch.testing.assert_close(found.abs(), z.abs(), rtol=0, atol=1e-3 * z.abs().max().item())
    assert z.abs().max() > 0.1


@pytest.mark.parametrize("granularity", ["model", "layer", "channel"])
def test_the_gradient_is_the_derivative_of_the_loss_along_the_spread(granularity):
    """Against the difference of the loss at two points, in float64."""
    model, batch = Small(), digits_batches()[0]
    optimizer = TWA(model, small_run(), granularity=granularity)
    loss_of(model, batch).backward()
    optimizer.step()
    gradient, basis = optimizer.coefficients.grad, optimizer.subspace
    plain, start = Small().double(), average(small_run(), Small())
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    picked = torch.arange(0, len(gradient), max(1, len(gradient) // 7))
    for i in picked.tolist():
        losses = []
        for step in (-1e-2, 1e-2):
            moved = basis.expand(torch.eye(len(basis))[i]).double() * step
            plain.load_state_dict(start)
            for name in names:
                parameter = plain.get_parameter(name)
                parameter.data += moved[: parameter.numel()].view(parameter.shape)
                moved = moved[parameter.numel() :]
            losses.append(loss_of(plain, (batch[0].double(), batch[1])))
        difference = (losses[1] - losses[0]).item() / 2e-2
        assert gradient[i].item() == pytest.approx(difference, rel=2e-3, abs=1e-6)


def test_a_unit_of_every_coefficient_is_the_standard_deviation_of_the_checkpoints():
    model, checkpoints = digits_run("relu")
    model = copy.deepcopy(model)
    optimizer = TWA(model, checkpoints, SGD, lr=1.0, start=checkpoints[2])
    directions, spread = principal_directions(rows_of(model, checkpoints))
    for i in range(len(spread)):
        z = torch.eye(len(spread))[i]
        optimizer.set_coefficients(z)
        moved = weights_of(model) - rows_of(model, checkpoints)[2]
        assert moved.norm() == pytest.approx(spread[i].item(), rel=1e-4)
        assert (moved @ directions[i]).abs() == pytest.approx(spread[i].item(), rel=1e-4)


@pytest.mark.parametrize("factor", [0.1, 10])
def test_where_the_window_is_wider_the_same_coefficients_go_further(factor):
    """The gradient is scaled too: what one step of SGD changes grows by the square."""
    start = average(small_run(), Small())
    way = {}
    for scale in (1, factor):
        model, checkpoints = Small(), []
        for state in small_run():
            checkpoints.append(
                {
                    k: start[k] + scale * (v - start[k]) if v.is_floating_point() else v
                    for k, v in state.items()
                }
            )
        optimizer = TWA(model, checkpoints, SGD, lr=0.1, start=start)
        before = weights_of(model)
        loss_of(model, digits_batches()[0]).backward()
        optimizer.step()
        way[scale] = weights_of(model) - before
    difference = way[factor] - factor**2 * way[1]
    assert difference.norm() < 1e-2 * way[factor].norm()


@pytest.mark.parametrize("granularity", ["model", "layer"])
def test_a_step_that_leaves_the_ball_is_cut(granularity):
    """At a rate that is far too large, to a length of `radius` in each block."""
    model, reference = Small(), Small()
    arguments = {"lr": 1e4, "granularity": granularity}
    optimizer = TWA(model, small_run(), SGD, radius=2.0, **arguments)
    free = TWA(reference, small_run(), SGD, radius=math.inf, **arguments)
    for one, other in ((model, optimizer), (reference, free)):
        loss_of(one, digits_batches()[0]).backward()
        other.step()
    per_block = 4  # directions of five checkpoints
    z, far = (o.coefficients.detach().view(-1, per_block) for o in (optimizer, free))
    sizes = far.square().mean(1).sqrt()
    assert (sizes > 2).any()
    expected = far * (2 / sizes).clamp(max=1)[:, None]
    torch.testing.assert_close(z, expected)
    basis = optimizer.subspace
    moved = basis.flatten(basis.parameters) - basis.flatten(free.subspace.parameters)
    expected = basis.expand((expected - far).flatten())
    assert (moved - expected).norm() < 1e-4 * expected.norm()


def test_within_the_ball_a_step_is_not_changed():
    within, without = Small(), Small()
    for model, radius in ((within, 10.0), (without, math.inf)):
        train(model, TWA(model, small_run(), granularity="channel", radius=radius), range(10))
    assert_equal(within.state_dict(), without.state_dict())


@pytest.mark.parametrize("radius", [0, -1.0, math.nan])
def test_a_radius_that_is_none_is_refused(radius):
    with pytest.raises(ValueError, match="radius"):
        TWA(Small(), small_run(), radius=radius)


class Adamish(torch.optim.Adam):
    """A subclass."""


@pytest.mark.parametrize(
    "base", [AdamW, torch.optim.Adam, Adamish, functools.partial(AdamW, betas=(0.9, 0.99))]
)
@pytest.mark.parametrize(
    "arguments, expected",
    [
        ({}, {"lr": 0.02, "weight_decay": 0.0}),
        ({"lr": 0.05}, {"lr": 0.05, "weight_decay": 0.0}),
        ({"weight_decay": 0.1}, {"lr": 0.02, "weight_decay": 0.1}),
    ],
)
def test_adam_and_its_kin_have_defaults_that_suit_coefficients(base, arguments, expected):
    (group,) = TWA(Small(), small_run(), base, **arguments).param_groups
    assert group.items() >= expected.items()


def test_what_a_partial_says_counts():
    (group,) = TWA(Small(), small_run(), functools.partial(AdamW, lr=0.3)).param_groups
    assert (group["lr"], group["weight_decay"]) == (0.3, 0.0)


@pytest.mark.parametrize(
    "base, arguments",
    [
        (SGD, {}),
        (functools.partial(SGD, momentum=0.9), {}),
        (torch.optim.RMSprop, {}),
        (LBFGS, {}),
        (AdamW, {"extract": "Schmidt"}),
    ],
)
def test_any_other_base_needs_a_learning_rate(base, arguments):
    """torch's default, 0.001 for most, is meant for weights."""
    name = getattr(base, "func", base).__name__
    with pytest.raises(ValueError, match=f"{name} needs lr"):
        TWA(Small(), small_run(), base, **arguments)


# --- a small model, for everything else ---


class Small(nn.Module):
    """Convolution, batch norm and a linear layer; one parameter is frozen, one is not used."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3)
        self.bn = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 10)
        self.frozen = nn.Parameter(torch.randn(10), requires_grad=False)
        self.unused = nn.Parameter(torch.randn(4))

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(F.silu(self.bn(self.conv(images))).mean((2, 3))) + self.frozen


@lru_cache
def small_run() -> list[dict]:
    """Five checkpoints; frozen and unused parameters differ between them too."""
    torch.manual_seed(0)
    model, checkpoints = Small(), []
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step, batch in enumerate(digits_batches()[:25], start=1):
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 0:
            with torch.no_grad():
                model.frozen.add_(0.1)
                model.unused.add_(torch.randn(4))
            checkpoints.append({k: v.clone() for k, v in model.state_dict().items()})
    return checkpoints


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def train(model: nn.Module, optimizer: TWA, steps: range, scheduler=None) -> None:
    for step in steps:
        loss_of(model, digits_batches()[step % 20]).backward()
        optimizer.step()
        optimizer.zero_grad()
        if scheduler:
            scheduler.step()


def total_loss(model: nn.Module) -> float:
    with torch.no_grad():
        return sum(loss_of(model, batch).item() for batch in digits_batches()[:20])


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(actual[key], tensor), key


# --- the start point ---

STARTS = {
    "the mean": lambda: (None, average(small_run(), Small())),
    "a checkpoint of the window": lambda: (small_run()[1], small_run()[1]),
    "a checkpoint outside the span": lambda: (outsider := state_of(Small()), outsider),
}


@EXTRACTS
@pytest.mark.parametrize("granularity", ["model", "layer", "channel"])
@pytest.mark.parametrize("start", STARTS)
def test_the_model_is_the_start_point_to_the_bit(start, granularity, extract):
    start, expected = STARTS[start]()
    model = Small()
    arguments = {"lr": 0.0, "momentum": 0.9, "weight_decay": 0.1, "granularity": granularity}
    optimizer = TWA(model, small_run(), SGD, start=start, extract=extract, **arguments)
    assert_equal(model.state_dict(), expected)
    model.eval()  # batch norm keeps its statistics
    train(model, optimizer, range(3))
    assert_equal(model.state_dict(), expected)


def test_the_start_point_may_be_a_path(tmp_path):
    torch.save(small_run()[2], tmp_path / "2.pt")
    model = Small()
    TWA(model, small_run(), SGD, start=tmp_path / "2.pt", lr=0.1)
    assert_equal(model.state_dict(), small_run()[2])


def test_a_start_point_that_does_not_fit_is_refused():
    start = small_run()[0] | {"fc.weight": torch.ones(3, 3)}
    with pytest.raises(CheckpointError, match=r"fc\.weight is"):
        TWA(Small(), small_run(), SGD, start=start, lr=0.1)


# --- as any optimizer: rates, states, gradients, closures ---


class Recording(SGD):
    """SGD that keeps the rates with which it stepped."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.rates = []

    def step(self, closure=None):
        self.rates.append(self.param_groups[0]["lr"])
        return super().step(closure)


@pytest.mark.parametrize(
    "schedule, expected",
    [
        (lambda o: LambdaLR(o, lambda step: 1 / (1 + step)), [0.4, 0.2, 0.4 / 3, 0.1]),
        (lambda o: MultiStepLR(o, [1, 3]), [0.4, 0.04, 0.04, 0.004]),
    ],
    ids=["LambdaLR", "MultiStepLR"],
)
def test_schedules_change_the_rate_of_the_base_optimizer(schedule, expected):
    model = Small()
    optimizer = TWA(model, small_run(), Recording, lr=0.4)
    train(model, optimizer, range(2), scheduler := schedule(optimizer))
    # The connection outlives a resumed state.
    optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer, range(2, 4), scheduler)
    assert optimizer.base.rates == pytest.approx(expected)


def test_a_step_is_as_long_as_the_rate_says():
    model = Small()
    optimizer = TWA(model, small_run(), SGD, lr=0.4)
    MultiStepLR(optimizer, [0], gamma=0.5)  # halves the rate at once
    before = optimizer.coefficients.detach().clone()
    loss_of(model, digits_batches()[0]).backward()
    optimizer.step()
    torch.testing.assert_close(
        optimizer.coefficients.detach(), before - 0.2 * optimizer.coefficients.grad
    )


def through_a_file(state: dict) -> dict:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("carry", [copy.deepcopy, through_a_file], ids=["dict", "file"])
@pytest.mark.parametrize("granularity", ["model", "channel"])
@pytest.mark.parametrize(
    "base, arguments",
    [
        (SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}),
        (SGD, {"extract": "Schmidt", "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}),
        (AdamW, {}),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(base, arguments, granularity, carry):
    def begin():
        torch.manual_seed(1)
        model = Small()
        optimizer = TWA(model, small_run(), base, granularity=granularity, **arguments)
        return model, optimizer, LambdaLR(optimizer, lambda step: 1 - step / 12)

    whole = begin()
    train(*whole[:2], range(12), whole[2])

    first = begin()
    train(*first[:2], range(7), first[2])
    states = [carry(part.state_dict()) for part in first]
    second = begin()
    for part, state in zip(second, states, strict=True):
        part.load_state_dict(state)
    assert_equal(second[0].state_dict(), first[0].state_dict())
    train(*second[:2], range(7, 12), second[2])

    assert_equal(second[0].state_dict(), whole[0].state_dict())
    assert torch.equal(second[1].coefficients, whole[1].coefficients)
    assert not torch.equal(first[1].coefficients, whole[1].coefficients)


def test_the_rate_grows_with_the_steps_within_limits():
    rates = [rate_of(steps) for steps in (0, 1, 25, 100, 400, 625, 10**6)]
    assert rates == pytest.approx([0.02, 0.02, 0.02, 0.04, 0.08, 0.1, 0.1])
    rates = [rate_of(400, samples) for samples in (10, 1000, 4000, 16_000, 10**6)]
    assert rates == pytest.approx([0.02, 0.02, 0.04, 0.08, 0.08])
    rates = [rate_of(steps, unit="block") for steps in (0, 50, 100, 350, 10**6)]
    assert rates == pytest.approx([0.02, 0.02, 0.04, 0.14, 0.14])
    rates = [rate_of(400, samples, "block") for samples in (10, 1000, 4000, 16_000, 10**6)]
    assert rates == pytest.approx([0.02, 0.04, 0.08, 0.14, 0.14])
    for numbers in ((-1,), (100, -1)):
        with pytest.raises(ValueError, match="must not be negative"):
            rate_of(*numbers)


def test_a_state_brings_the_weights_along():
    trained, fresh = Small(), Small()
    optimizer = TWA(trained, small_run(), SGD, lr=0.1)
    train(trained, optimizer, range(3))
    TWA(fresh, small_run(), SGD, lr=0.1).load_state_dict(optimizer.state_dict())
    assert torch.equal(weights_of(fresh), weights_of(trained))


@pytest.mark.parametrize(
    "other",
    [
        {"checkpoints": slice(0, 4)},
        {"checkpoints": [0, 1, 2, 3, 3]},
        {"start": 0},
        {"granularity": "layer"},
        {"kind": {"components": 2}},
        {"kind": {"components": 3}},
        {"target": {"extract": "Schmidt"}, "checkpoints": slice(None, None, -1)},
        {"target": {"extract": "Schmidt"}, "checkpoints": slice(0, 4)},
        {"target": {"extract": "Schmidt"}, "start": 0},
    ],
    ids=[
        "fewer checkpoints",
        "another checkpoint",
        "another start",
        "another granularity",
        "two directions",
        "three directions",
        "Schmidt, another order",
        "Schmidt, fewer checkpoints",
        "Schmidt, another start",
    ],
)
def test_a_state_of_another_window_is_refused_and_changes_nothing(other):
    picked = other.get("checkpoints", slice(None))
    window = small_run()
    window = [window[i] for i in picked] if isinstance(picked, list) else window[picked]
    start = small_run()[other["start"]] if "start" in other else None
    target = other.get("target", {})
    kind = other.get("kind", {}) | {"granularity": other.get("granularity", "model")} | target
    optimizer = TWA(Small(), window, SGD, start=start, lr=0.1, **kind)
    model = Small()
    target = TWA(model, small_run(), SGD, lr=0.2, **target)
    before = state_of(model)
    with pytest.raises(ValueError, match=r"another window.*granularity"):
        target.load_state_dict(optimizer.state_dict())
    assert_equal(model.state_dict(), before)
    assert target.param_groups[0]["lr"] == 0.2


def test_a_state_of_another_window_with_the_same_start_is_refused():
    """Where the start is the first checkpoint, its coefficients are the same in both."""
    first, *others = small_run()
    optimizer = TWA(Small(), [first, *others[::-1]], SGD, start=first, extract="Schmidt", lr=0.1)
    target = TWA(Small(), [first, *others], SGD, start=first, extract="Schmidt", lr=0.1)
    with pytest.raises(ValueError, match="another window"):
        target.load_state_dict(optimizer.state_dict())


def test_the_state_of_another_optimizer_is_refused():
    model = Small()
    target = TWA(model, small_run(), SGD, lr=0.2)
    with pytest.raises(ValueError, match="not the state of a TWA optimizer"):
        target.load_state_dict(SGD(model.parameters(), lr=0.1).state_dict())


def test_start_coefficients_that_were_rounded_elsewhere_are_no_other_window():
    optimizer = TWA(Small(), small_run(), SGD, start=small_run()[0], extract="Schmidt", lr=0.1)
    state = copy.deepcopy(optimizer.state_dict())
    start = state["state"][0]["start_coefficients"]
    assert (start.abs() < 1e-5).any()  # where no relative error is small
    start += 1e-6 * torch.randn(5, generator=torch.Generator().manual_seed(0)) * start.norm()
    optimizer.load_state_dict(state)


def test_a_window_in_another_order_has_the_same_coefficients():
    """Principal directions do not depend on it; α follows the order of the checkpoints."""
    optimizer = TWA(Small(), small_run(), start=small_run()[0])
    model = Small()
    other = TWA(model, small_run()[::-1], start=small_run()[0])
    train(Small(), optimizer, range(0))
    optimizer.set_coefficients(torch.tensor([0.3, -0.2, 0.1, 0.4]))
    other.load_state_dict(optimizer.state_dict())
    alpha = optimizer.averaging_weights()
    torch.testing.assert_close(other.averaging_weights().flip(0), alpha, rtol=0, atol=1e-4)
    rows = rows_of(model, small_run())
    torch.testing.assert_close(alpha @ rows, weights_of(model), rtol=0, atol=1e-5)


def test_a_copy_is_refused():
    optimizer = TWA(Small(), small_run(), SGD, lr=0.1)
    for duplicate in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="state_dict"):
            duplicate(optimizer)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_clears_the_gradients_of_the_model(set_to_none):
    model = Small()
    optimizer = TWA(model, small_run(), SGD, lr=0.1)
    loss_of(model, digits_batches()[0]).backward()
    optimizer.step()
    assert all(p.grad.any() for n, p in model.named_parameters() if n.startswith("fc"))
    optimizer.zero_grad(set_to_none)
    for parameter in (model.fc.weight, model.conv.bias, model.bn.weight):
        if set_to_none:
            assert parameter.grad is None
        else:
            assert not parameter.grad.any()
    assert model.unused.grad is None


def closure_for(model: nn.Module, optimizer: TWA, batch: tuple[Tensor, Tensor]):
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        return loss

    return closure


def test_lbfgs_with_a_closure_lowers_the_loss():
    model = Small().eval()
    arguments = {"lr": 1.0, "max_iter": 10, "line_search_fn": "strong_wolfe"}
    # Without a model, the mean is also that of batch norm's statistics, which suit it in eval mode.
    mean = average(small_run())
    optimizer = TWA(model, small_run(), LBFGS, start=mean, radius=math.inf, **arguments)
    batch = digits_batches()[0]
    start = loss_of(model, batch).item()
    losses = [optimizer.step(closure_for(model, optimizer, batch)).item() for _ in range(3)]
    losses.append(loss_of(model, batch).item())
    assert losses[0] == start
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.95 * start
    # The model is left at the coefficients, not at the last point that the search tried.
    alpha, rows = optimizer.averaging_weights(), rows_of(model, small_run())
    torch.testing.assert_close(alpha @ rows, weights_of(model), rtol=1e-3, atol=1e-4)


def test_sgd_with_a_closure_equals_sgd_without():
    with_closure, without = Small(), Small()
    arguments = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}
    one = TWA(with_closure, small_run(), SGD, **arguments)
    other = TWA(without, small_run(), SGD, **arguments)
    for batch in digits_batches()[:5]:
        expected = loss_of(without, batch)
        other.zero_grad()
        expected.backward()
        assert other.step() is None
        assert one.step(closure_for(with_closure, one, batch)).item() == expected.item()
    assert_equal(with_closure.state_dict(), without.state_dict())


# --- averaging weights ---


def test_averaging_weights_at_the_mean_are_equal():
    optimizer = TWA(Small(), small_run(), SGD, lr=0.1)
    alpha = optimizer.averaging_weights()
    assert alpha.dtype == torch.float64
    torch.testing.assert_close(alpha, torch.full_like(alpha, 1 / 5), rtol=0, atol=1e-4)
    assert alpha.sum().item() == pytest.approx(1, abs=1e-5)


@EXTRACTS
def test_averaging_weights_at_a_checkpoint_are_that_checkpoint_alone(extract):
    optimizer = TWA(Small(), small_run(), SGD, start=small_run()[3], extract=extract, lr=0.1)
    expected = torch.tensor([0.0, 0, 0, 1, 0], dtype=torch.float64)
    torch.testing.assert_close(optimizer.averaging_weights(), expected, rtol=0, atol=1e-4)


@EXTRACTS
@pytest.mark.parametrize("run", ["small", "digits"])
def test_averaging_weights_make_the_weights_of_the_model(run, extract):
    model, checkpoints = (Small(), small_run()) if run == "small" else digits_run("relu")
    model = copy.deepcopy(model)
    optimizer = TWA(model, checkpoints, SGD, extract=extract, lr=0.1, momentum=0.9)
    train(model, optimizer, range(10))
    alpha, rows = optimizer.averaging_weights(), rows_of(model, checkpoints)
    assert (alpha - 1 / len(checkpoints)).abs().max() > 0.05  # they were trained
    # Checkpoints are alike, so that coefficients of size |α| cancel: float32 is relative to these.
    size = alpha.abs() @ rows.norm(dim=1)
    assert (alpha @ rows - weights_of(model)).norm() < 1e-6 * size


@pytest.mark.parametrize("granularity", ["model", "layer", "channel"])
@pytest.mark.parametrize("components", [None, 2])
@pytest.mark.parametrize("unit", ["direction", "block"])
@pytest.mark.parametrize("start", STARTS)
def test_averaging_weights_are_the_nearest_point_of_the_span(start, unit, components, granularity):
    """Before and after training; what the start has outside the span stays in the model."""
    start, first = STARTS[start]()
    model = Small()
    basis = {"components": components, "granularity": granularity, "unit": unit}
    optimizer = TWA(model, small_run(), start=start, **basis)
    rows = rows_of(model, small_run())
    outset = rows_of(model, [first])[0]
    basis = optimizer.subspace
    span = torch.stack([basis.expand(unit) for unit in torch.eye(len(basis))]).double()
    span /= span.norm(dim=1, keepdim=True)
    for steps in (range(0), range(10)):
        train(model, optimizer, steps)
        alpha = optimizer.averaging_weights()
        assert ((alpha.sum(-1) - 1).abs() < 1e-6 * (1 + alpha.abs().sum(-1))).all()
        if granularity == "model":
            combined = alpha @ rows
        else:
            blocks = Columns(model, granularity).blocks
            parts = (part for group in blocks for part in group.split(1))
            combined = torch.cat([alpha[p.first] @ rows[:, p.start : p.stop] for p in parts])
        centred = weights_of(model) - rows.mean(0)
        nearest = rows.mean(0) + span.T @ (span @ centred)
        scale = (outset - rows.mean(0)).norm() + rows.std(0).norm()
        assert (combined - nearest).norm() < 1e-4 * scale
        # Nothing but what lies in the span has moved.
        moved = weights_of(model) - outset
        assert (moved - span.T @ (span @ moved)).norm() < 1e-4 * scale
    assert moved.norm() > 0


@pytest.mark.parametrize(("bits", "rounding"), [(8, 2**-7), (4, 2**-3)])
def test_below_32_bits_the_weights_are_off_by_the_rounding_of_the_basis(bits, rounding):
    model, checkpoints = digits_run("relu")
    model = copy.deepcopy(model)
    optimizer = TWA(model, checkpoints, AdamW, lr=0.05, bits=bits)
    train(model, optimizer, range(10))
    alpha, rows = optimizer.averaging_weights(), rows_of(model, checkpoints)
    assert optimizer.coefficients.abs().max() > 0.1
    assert (alpha @ rows - weights_of(model)).norm() < rounding * rows[0].norm()


def test_a_repeated_checkpoint_has_no_weight():
    first, second = small_run()[:2]
    with pytest.warns(UserWarning, match="were dropped"):
        optimizer = TWA(
            Small(), [first, second, first], SGD, start=second, extract="Schmidt", lr=0.1
        )
    expected = torch.tensor([0.0, 1, 0], dtype=torch.float64)
    torch.testing.assert_close(optimizer.averaging_weights(), expected, rtol=0, atol=1e-4)
    assert optimizer.averaging_weights()[2] == 0


@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_finer_granularity_trains_further_from_the_same_start(granularity):
    losses = {}
    for kind in ("model", granularity):
        model = Small().eval()
        optimizer = TWA(model, small_run(), AdamW, lr=0.1, weight_decay=0, granularity=kind)
        start = total_loss(model)
        train(model, optimizer, range(40))
        losses[kind] = total_loss(model)
        assert losses[kind] < start
    assert losses[granularity] < losses["model"]
    alpha = optimizer.averaging_weights()
    assert alpha.dim() == 2
    assert alpha.shape[1] == 5
    assert alpha.isfinite().all()


# --- parameters that take no part ---


def test_a_parameter_without_gradient_counts_as_zero():
    without, zeros = Small(), Small()
    for model in (without, zeros):
        optimizer = TWA(model, small_run(), SGD, lr=0.1, momentum=0.9)
        for batch in digits_batches()[:3]:
            loss_of(model, batch).backward()
            if model is zeros:
                model.unused.grad = torch.zeros_like(model.unused)
            optimizer.step()
            optimizer.zero_grad()
    assert_equal(without.state_dict(), zeros.state_dict())


def test_a_sparse_gradient_is_that_of_the_dense_one():
    """An embedding's, of which a batch touches a few rows."""
    found = []
    for sparse in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(20, 4, sparse=sparse), nn.Linear(4, 3))
        checkpoints = [
            {k: v + i * torch.ones_like(v) ** i for k, v in model.state_dict().items()}
            for i in range(2)
        ]
        optimizer = TWA(model, checkpoints, SGD, lr=0.1)
        F.cross_entropy(model(torch.tensor([1, 5])), torch.tensor([0, 2])).backward()
        optimizer.step()
        found.append(model.state_dict())
    assert_equal(*found)


def test_what_the_base_does_not_take_is_said_before_the_model_is_changed():
    model = Small()
    before = state_of(model)
    with pytest.raises(TypeError, match="momentum"):
        TWA(model, small_run(), AdamW, lr=0.1, momentum=0.9)
    assert_equal(model.state_dict(), before)


def test_a_checkpointed_model_is_trained_whole():
    """The wrapper that recomputes activations names parameters otherwise than `state_dict`."""
    found = []
    for wrap in (lambda module: module, checkpoint_wrapper):
        torch.manual_seed(0)
        hidden, head = nn.Linear(64, 8), nn.Linear(8, 10)
        model = nn.Sequential(nn.Flatten(), wrap(hidden), nn.Tanh(), head)
        generator = torch.Generator().manual_seed(1)
        checkpoints = [
            {k: v + torch.randn(v.shape, generator=generator) for k, v in state_of(model).items()}
            for _ in range(3)
        ]
        optimizer = TWA(model, checkpoints, SGD, lr=0.1)
        train(model, optimizer, range(3))
        found.append(model.state_dict())
    assert_equal(*found)


def test_parameters_that_cannot_be_trained_are_refused_by_name():
    class Shy(nn.Linear):
        def state_dict(self, *args, prefix="", **kwargs):
            state = super().state_dict(*args, prefix=prefix, **kwargs)
            del state[f"{prefix}bias"]
            return state

    model = nn.Sequential(nn.Linear(3, 3), Shy(3, 2))
    with pytest.raises(ValueError, match=r"does not hold 1\.bias"):
        TWA(model, [copy.deepcopy(model.state_dict())] * 2, SGD, lr=0.1)
    window = [nn.Linear(3, 3).state_dict() for _ in range(2)]
    with pytest.raises(ValueError, match="on meta"):
        TWA(nn.Linear(3, 3, device="meta"), window)


def test_a_start_that_is_none_is_refused_before_the_model_is_changed():
    model = Small()
    before = state_of(model)
    for start in (3, [small_run()[0]], (small_run()[0], {1: 0.5})):
        with pytest.raises(TypeError, match=f"best_start.* not a {type(start).__name__}"):
            TWA(model, small_run(), start=start)
    assert_equal(before, model.state_dict())


def test_the_result_of_best_start_is_a_start():
    model = Small()
    start = best_start(model, small_run(), lambda: total_loss(model))
    TWA(model, small_run(), start=start)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, start.state_dict[name])


@pytest.mark.parametrize("shape", [(), (1,), (3,), (1, 4)])
def test_coefficients_of_another_shape_are_refused(shape):
    model = Small()
    optimizer = TWA(model, small_run())
    before = state_of(model)
    with pytest.raises(ValueError, match=r"shape \[4\], not"):
        optimizer.set_coefficients(torch.ones(shape))
    assert_equal(before, model.state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_that_are_too_coarse_for_the_coefficients_are_warned_of(dtype):
    window = [nn.Linear(3, 3).to(dtype).state_dict() for _ in range(3)]
    with pytest.warns(UserWarning, match=f"{dtype}.*autocast"):
        TWA(nn.Linear(3, 3).to(dtype), window)


@pytest.mark.parametrize("size", [1e-12, 1e-15, 1e-22, 1e-30, 1e-42])
def test_filters_that_weight_decay_took_to_zero_leave_all_numbers_finite(size):
    torch.manual_seed(0)
    window = [nn.Linear(5, 3).state_dict() for _ in range(4)]
    for state in window:
        state["weight"][1] *= size
    model = nn.Linear(5, 3)
    optimizer = TWA(model, window, granularity="channel", start=window[-1])
    alpha = optimizer.averaging_weights()
    whole = torch.tensor([0.0, 0, 0, 1])
    # A spread of no size is not one to train: there the mean is as near as any.
    expected = torch.stack([whole, whole if size > 1e-18 else whole.new_full((4,), 0.25), whole])
    torch.testing.assert_close(alpha[:3].float(), expected, rtol=0, atol=1e-4)
    model(torch.randn(8, 5)).square().mean().backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    again = TWA(nn.Linear(5, 3), window, granularity="channel", start=window[-1])
    again.load_state_dict(optimizer.state_dict())
    assert torch.equal(again.coefficients, optimizer.coefficients)


def test_a_step_without_gradients_does_nothing_as_of_any_optimizer():
    """As where a training step of Lightning returns None."""
    model = Small()
    optimizer = TWA(model, small_run())
    train(model, optimizer, range(2))
    before, weights = copy.deepcopy(optimizer.state_dict()), state_of(model)
    optimizer.zero_grad()
    optimizer.step()
    assert_equal(weights, model.state_dict())
    after = optimizer.state_dict()["state"]
    for key, value in before["state"][0].items():
        assert torch.equal(after[0][key], value), key
    train(model, optimizer, range(1))
    assert not torch.equal(weights["fc.weight"], model.fc.weight)


@contextlib.contextmanager
def coarse_products():
    """TF32 and bfloat16 for products of float32, as training scripts set them; still so after."""
    torch.set_float32_matmul_precision("medium")
    try:
        yield
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("bits", [32, 8])
def test_a_callers_autocast_and_default_type_round_nothing(bits):
    def steps() -> TWA:
        model = Small()
        optimizer = TWA(model, small_run(), SGD, lr=0.1, bits=bits)
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            shape = parameter.shape
            parameter.grad = torch.randn(shape, generator=generator, dtype=torch.float32)
        optimizer.step()
        return optimizer

    expected = steps()
    for context in (torch.autocast("cpu", dtype=torch.bfloat16), coarse_products()):
        with context:
            actual = steps()
            assert torch.equal(actual.coefficients, expected.coefficients)
            assert torch.equal(actual.averaging_weights(), expected.averaging_weights())
    torch.set_default_dtype(torch.float64)
    try:
        basis = Subspace(Small().float(), small_run(), bits=bits)
    finally:
        torch.set_default_dtype(torch.float32)
    assert basis.nbytes == expected.subspace.nbytes
    assert basis.empty().dtype == torch.float32


class Copies(TorchDispatchMode):
    """Measures the largest tensor that is made, in bytes."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        inputs = {t.untyped_storage().data_ptr() for t in tree_leaves(args) if torch.is_tensor(t)}
        for made in tree_leaves(result):
            storage = made.untyped_storage() if torch.is_tensor(made) else None
            # What a file is mapped into takes no memory of its own.
            if storage and storage.resizable() and storage.data_ptr() not in inputs:
                self.largest = max(self.largest, made.nbytes)
        return result


@pytest.mark.parametrize("complete", [False, True], ids=["adapters", "complete checkpoints"])
def test_frozen_weights_are_not_copied(complete, tmp_path):
    """The base model of a LoRA may fill the device once, and not twice."""
    model = nn.Sequential(nn.Linear(1500, 1500), nn.Linear(1500, 4))
    model[0].requires_grad_(False)
    paths = [tmp_path / f"{i}.pt" for i in range(3)]
    for path in paths:
        state = {k: v.clone() for k, v in model.state_dict().items() if complete or k[0] == "1"}
        state["1.weight"] += torch.randn(4, 1500)
        torch.save(state, path)
    with Copies() as copies:
        TWA(model, paths, start=paths[0])
    assert copies.largest < model[0].weight.nbytes / 2  # room for a mask of bools, not for a copy


def test_frozen_parameters_stay_at_the_start():
    model = Small()
    optimizer = TWA(model, small_run(), SGD, start=small_run()[1], lr=0.1)
    train(model, optimizer, range(3))
    assert torch.equal(model.frozen, small_run()[1]["frozen"])
    assert not torch.equal(model.fc.weight, small_run()[1]["fc.weight"])


# --- in the loops that people use: the same loop with weights on which each update is projected ---


class Projected:
    """A plain reference: the projected update on float64 weights, for the gradients that TWA met.

    SGD on the coefficients in units of the spread moves w by `−lr Pᵀ σ² P g`.
    """

    def __init__(self, model: nn.Module, lr: float):
        rows = rows_of(model, small_run())
        self.directions, self.spread = principal_directions(rows)
        self.weights, self.lr = rows.mean(0), lr

    def step(self, gradient: Tensor) -> None:
        along = self.spread**2 * (self.directions @ gradient.double())
        self.weights -= self.lr * (along @ self.directions)

    def assert_equals(self, model: nn.Module) -> None:
        start = rows_of(model, small_run()).mean(0)
        assert_follows(weights_of(model), self.weights, start, 1e-3)


def flat_gradient(model: nn.Module) -> Tensor:
    return torch.cat(
        [
            (torch.zeros_like(p) if p.grad is None else p.grad).flatten()
            for p in model.parameters()
            if p.requires_grad
        ]
    )


@pytest.mark.parametrize("clear", ["optimizer", "model"])
def test_a_grad_scaler_unscales_and_skips_the_step_that_overflows(clear):
    model = Small()
    optimizer = TWA(model, small_run(), SGD, lr=5.0)
    reference = Projected(model, 5.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    for step, batch in enumerate(digits_batches()[:8]):
        (optimizer if clear == "optimizer" else model).zero_grad()
        scaler.scale(loss_of(model, batch)).backward()
        before = weights_of(model)
        if step == 3:
            model.fc.weight.grad[0, 0] = math.inf
        else:
            reference.step(flat_gradient(model) / scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(weights_of(model), before) == (step == 3)
    assert scaler.get_scale() == 512
    reference.assert_equals(model)


@pytest.mark.parametrize("over", ["groups", "model"])
@pytest.mark.parametrize("norm", [1e-9, 0.1])
def test_clipping_clips_the_gradient_of_the_model(over, norm):
    model = Small()
    optimizer = TWA(model, small_run(), SGD, lr=50.0)
    reference = Projected(model, 50.0)
    start = weights_of(model)
    for batch in digits_batches()[:5]:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        gradient = flat_gradient(model)
        assert gradient.norm() > norm
        parameters = optimizer.param_groups[0]["params"] if over == "groups" else model.parameters()
        nn.utils.clip_grad_norm_(parameters, norm)
        reference.step(gradient * norm / gradient.norm())
        optimizer.step()
    if norm == 1e-9:
        assert (weights_of(model) - start).norm() < 1e-6
    else:
        reference.assert_equals(model)


def test_a_rate_may_be_a_tensor_and_a_schedule_may_move_the_momentum():
    model = Small()
    optimizer = TWA(model, small_run(), Recording, lr=torch.tensor(0.4), momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=10)
    seen = []
    for batch in digits_batches()[:4]:
        loss_of(model, batch).backward()
        optimizer.step()
        (inner,) = optimizer.base.param_groups
        seen.append(inner["momentum"])
        assert inner["lr"] is optimizer.param_groups[0]["lr"]
        scheduler.step()
    assert seen[0] == 0.95 and seen[-1] < 0.9


def test_hooks_are_called():
    model, calls = Small(), []
    optimizer = TWA(model, small_run(), SGD, lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.register_state_dict_post_hook(lambda *_: calls.append("state"))
    optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("loaded"))
    train(model, optimizer, range(1))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["before", "after", "state", "loaded"]


class Counting(SGD):
    """A base optimizer that keeps a number in its group, as schedulefree does."""

    def step(self, closure=None):
        self.param_groups[0]["k"] = self.param_groups[0].get("k", 0) + 1
        return super().step(closure)


def test_numbers_that_the_base_keeps_in_its_group_are_in_the_state():
    model = Small()
    optimizer = TWA(model, small_run(), Counting, lr=0.1)
    train(model, optimizer, range(3))
    resumed = TWA(Small(), small_run(), Counting, lr=0.1)
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.base.param_groups[0]["k"] == 3


class Averaging(SGD):
    """A base optimizer that evaluates elsewhere than it trains, and is told so, as schedulefree."""

    def __init__(self, params, **kwargs):
        super().__init__(params, **kwargs)
        self.param_groups[0]["train_mode"] = False

    @torch.no_grad()
    def _tell(self, train: bool):
        if train != self.param_groups[0]["train_mode"]:
            self.param_groups[0]["train_mode"] = train
            self.param_groups[0]["params"][0].mul_(2 if train else 0.5)

    def train(self):
        self._tell(True)

    def eval(self):
        self._tell(False)

    def step(self, closure=None):
        assert self.param_groups[0]["train_mode"]
        return super().step(closure)


def test_the_weights_go_along_where_the_base_evaluates_elsewhere_than_it_trains():
    model = Small()
    optimizer = TWA(model, small_run(), Averaging, lr=0.4)
    start = weights_of(model)
    optimizer.train()
    train(model, optimizer, range(3))
    trained = weights_of(model)
    optimizer.eval()
    assert_follows(weights_of(model), (start + trained) / 2, start, 1e-4)
    optimizer.train()
    assert_follows(weights_of(model), trained, start, 1e-4)
    train(model, optimizer, range(3))  # in the mode for it


def test_a_base_that_knows_no_modes_is_left_alone_by_them():
    model = Small()
    optimizer = TWA(model, small_run())
    train(model, optimizer, range(2))
    before = state_of(model)
    optimizer.eval()  # as transformers does with any optimizer that can be told
    optimizer.train()
    assert_equal(model.state_dict(), before)


def test_the_group_holds_the_trainable_parameters_and_a_second_is_refused():
    model = Small()
    optimizer = TWA(model, small_run(), SGD, lr=0.1)
    expected = [p for p in model.parameters() if p.requires_grad]
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], expected, strict=True))
    with pytest.raises(ValueError, match="one group"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})


ORDERS = {
    "model, TWA, state": lambda load, make, resume: (load(), make(), resume()),
    "TWA, model, state": lambda load, make, resume: (make(), load(), resume()),
    "TWA, state, model": lambda load, make, resume: (make(), resume(), load()),
}


@pytest.mark.parametrize("order", ORDERS)
def test_resumed_in_any_order_the_model_is_as_it_was(order):
    """Batch norm's statistics, and a frozen parameter that somebody else has changed, too."""
    model = Small()
    optimizer = TWA(model, small_run())
    train(model, optimizer, range(5))
    model.frozen.data += 1
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})

    resumed, made = Small(), []
    ORDERS[order](
        lambda: resumed.load_state_dict(saved["model"]),
        lambda: made.append(TWA(resumed, small_run())),
        lambda: made[0].load_state_dict(saved["optimizer"]),
    )
    assert_equal(resumed.state_dict(), model.state_dict())
    for one, other in ((model, optimizer), (resumed, made[0])):
        train(one, other, range(5, 9))
    assert_equal(resumed.state_dict(), model.state_dict())


def test_a_state_from_before_the_first_step_leaves_the_start_point():
    """accelerate hands an optimizer its own state once, to move it to the device."""
    model = Small()
    optimizer = TWA(model, small_run())
    optimizer.load_state_dict(optimizer.state_dict())
    assert_equal(model.state_dict(), average(small_run(), Small()))


def test_a_model_that_was_moved_since_is_refused():
    model = Small()
    optimizer = TWA(model, small_run())
    model.to("meta")
    optimizer.param_groups[0]["params"] = [p for p in model.parameters() if p.requires_grad]
    with pytest.raises(RuntimeError, match="on meta, but was on cpu"):
        optimizer.step()


@pytest.mark.parametrize("part", ["all", "fc"])
def test_a_model_whose_parameters_were_replaced_since_is_refused(part):
    """As `fully_shard` does; without this, it would not train them and say nothing."""
    model = Small()
    optimizer = TWA(model, small_run())
    for module in (model if part == "all" else model.fc).modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach().clone()))
    with pytest.raises(RuntimeError, match="parameters were replaced after TWA was made"):
        train(model, optimizer, range(1))


def test_the_start_may_be_the_model_as_it_stands():
    model = Small()
    before = state_of(model)
    optimizer = TWA(model, small_run(), SGD, lr=0.1, start=model)
    assert_equal(model.state_dict(), before)
    train(model, optimizer, range(2))
    assert not torch.equal(
        weights_of(model),
        torch.cat(
            [before[n].flatten().double() for n, p in model.named_parameters() if p.requires_grad]
        ),
    )


@pytest.mark.parametrize("option", ["flatten_optimizer_state_dict", "full_state_dict"])
@pytest.mark.parametrize("value", [False, True])
def test_its_state_goes_through_distributed_checkpoint(option, value):
    options = StateDictOptions(**{option: value})
    model = Small()
    optimizer = TWA(model, small_run())
    train(model, optimizer, range(5))
    state = get_optimizer_state_dict(model, optimizer, options=options)
    resumed = Small()
    second = TWA(resumed, small_run())
    second.load_state_dict(second.state_dict())  # as accelerate does
    assert not second.state
    resumed.load_state_dict(state_of(model))
    set_optimizer_state_dict(resumed, second, copy.deepcopy(state), options=options)
    assert_equal(resumed.state_dict(), model.state_dict())
    for one, other in ((model, optimizer), (resumed, second)):
        train(one, other, range(5, 9))
    assert_equal(resumed.state_dict(), model.state_dict())


# --- drop-in ---


def test_the_snippets_of_the_readme_run():
    text = (ROOT / "README.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert "Recipe(model, checkpoints" in snippet
    model = Small()
    names = {
        "torch": torch,
        "model": model,
        "checkpoints": small_run(),
        "batches": digits_batches(),
        "train_set": range(1000),
        "criterion": nn.CrossEntropyLoss(),
        "loss": lambda: total_loss(model),
        "steps": len(digits_batches()),
    }
    model.load_state_dict(average(small_run(), Small()))
    start = total_loss(model)
    exec(snippet, names)
    assert isinstance(names["optimizer"], torch.optim.Optimizer)
    assert total_loss(model) < start
    assert all(p.grad is None for p in model.parameters())
    assert names["optimizer"].averaging_weights().shape == (5,)
