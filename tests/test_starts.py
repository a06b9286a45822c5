"""The start point, against plain means and plain comparisons."""

import copy
import math

import pytest
import torch
from torch import nn

from training.files import save
from twa import CheckpointError, best_start
from twa.files.checkpoints import average, last_means, load_into


def model_of(weight: float) -> nn.Module:
    model = nn.BatchNorm1d(3)  # with a counter, which has no mean
    with torch.no_grad():
        model.weight.fill_(weight)
    model.num_batches_tracked.fill_(int(weight))
    return model


def window(*weights: float) -> list[dict]:
    return [model_of(weight).state_dict() for weight in weights]


def test_the_means_of_the_last_are_plain_means_and_each_file_is_read_once(tmp_path, monkeypatch):
    torch.manual_seed(0)
    paths = []
    for i in range(7):
        paths.append(tmp_path / f"{i}.pt")
        save({"w": torch.randn(5, 3), "n": torch.tensor(i)}, paths[-1])
    states = [torch.load(path, weights_only=True) for path in paths]
    read = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda path, **how: read.append(path) or load(path, **how))
    like = {"w": torch.empty(5, 3), "n": torch.tensor(0)}
    for count, mean in zip((1, 3, 6), last_means(paths, (1, 3, 6), like), strict=True):
        expected = torch.stack([state["w"] for state in states[-count:]]).double().mean(0)
        torch.testing.assert_close(mean["w"].double(), expected, rtol=1e-6, atol=1e-7)
        assert mean["n"] == 6  # the last one's
    assert read == paths[:0:-1]
    assert torch.equal(average(paths)["w"], next(last_means(paths, [7]))["w"])


def test_the_model_trains_on_after_a_loss_that_evaluates():
    model = nn.Sequential(model_of(0), nn.Dropout())
    model[1].eval()
    checkpoints = [{f"0.{key}": value for key, value in w.items()} for w in window(1, 2)]
    best_start(model, checkpoints, lambda: float(model.eval()[0].weight[0]))
    assert [module.training for module in model.modules()] == [True, True, False]


def test_the_best_start_is_the_mean_with_the_lowest_loss():
    checkpoints = window(9, 1, 5, 2, 8, 4)  # means of the last: 4, 6 (2), 4.75 (4), 4.83 (6)
    model = model_of(0)
    start, losses = best_start(model, checkpoints, lambda: abs(model.weight[0].item() - 5))
    uniform = {count: loss for count, loss in losses.items() if count >= 1}
    assert uniform == pytest.approx({1: 1, 2: 1, 4: 0.25, 6: 1 / 6}, abs=1e-5)
    assert start["num_batches_tracked"] == 4
    # The exponential ones, by an average written out.
    for decay in (1 - 2 / 6, 1 - math.sqrt(2) / 6):
        weights = [decay**age for age in (5, 4, 3, 2, 1, 0)]
        pairs = zip(weights, (9, 1, 5, 2, 8, 4), strict=True)
        mean = sum(weight * value for weight, value in pairs) / sum(weights)
        assert losses.pop(decay) == pytest.approx(abs(mean - 5), abs=1e-5)
        uniform[decay] = abs(mean - 5)
    assert losses.keys() == {1, 2, 4, 6}
    assert abs(start["weight"][0].item() - 5) == pytest.approx(min(uniform.values()), abs=1e-5)


def test_an_exponential_start_wins_where_it_is_the_best():
    checkpoints = window(16, 8, 4, 2)  # means: 2, 3 and 7.5; exponential: 4.27, 5.25
    model = model_of(0)
    start, losses = best_start(model, checkpoints, lambda: abs(model.weight[0].item() - 6))
    expected = average(checkpoints, model, min(losses, key=losses.get))
    assert min(losses, key=losses.get) == 1 - math.sqrt(2) / 4
    assert torch.equal(start["weight"], expected["weight"])


def test_a_loss_that_is_not_finite_is_never_the_best():
    checkpoints = window(1, 2, 3)
    model = model_of(0)
    for bad in (math.nan, math.inf):
        values = iter([bad, 0.5, bad])
        start, losses = best_start(model, checkpoints, lambda values=values: next(values))
        assert losses == {1: math.inf, 2: 0.5, 3: math.inf}
        assert start["weight"][0] == 2.5


def test_one_checkpoint_is_its_own_best_start_and_a_bad_one_is_refused():
    model = model_of(0)
    start, losses = best_start(model, window(3), lambda: 7.0)
    assert losses == {1: 7.0}
    load_into(model, start)
    assert model.weight[0] == 3
    with pytest.raises(CheckpointError, match="weight is missing"):
        best_start(model, [{"bias": torch.zeros(3)}], lambda: 0.0)


def test_a_loss_may_be_a_tensor_with_its_graph():
    model = model_of(0)
    _, losses = best_start(model, window(1, 2), lambda: model.weight.sum())
    assert [(type(loss), loss) for loss in losses.values()] == [(float, 6.0), (float, 4.5)]


def test_a_window_without_a_copy_of_the_models_weights_is_refused():
    """The means that are loaded into the model would change it."""
    model = model_of(0)
    for last in (model.state_dict(), {"state_dict": model.state_dict()}):
        with pytest.raises(ValueError, match=r"checkpoints\[1\] .*own weights.*deepcopy"):
            best_start(model, [*window(1), last], lambda: 0.0)
    best_start(model, [*window(1), copy.deepcopy(model.state_dict())], lambda: 0.0)


def test_an_empty_window_is_said_to_be_one():
    for call in (
        lambda: best_start(model_of(0), [], lambda: 0.0),
        lambda: average([]),
        lambda: average([], model_of(0)),
    ):
        with pytest.raises(ValueError, match="no checkpoints were given"):
            call()
