"""The recipe: its start point against plain means, its rules, and the best of what came out."""

import copy
import functools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from training.files import save
from twa import CheckpointError, Recipe, best_start, rate_of
from twa.files.checkpoints import average, last_means, load_into
from twa.recipe import start_name


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
    with pytest.raises(ZeroDivisionError):  # also if the loss fails
        best_start(model, checkpoints, lambda: float(model.eval()[0].weight[0]) / 0)
    assert [module.training for module in model.modules()] == [True, True, False]


def test_the_best_start_is_the_mean_with_the_lowest_loss():
    checkpoints = window(9, 1, 5, 2, 8, 4)  # means of the last: 4, 6 (2), 4.75 (4), 4.83 (6)
    model = model_of(0)
    found = best_start(model, checkpoints, lambda: abs(model.weight[0].item() - 5))
    start, losses = found
    assert (start, losses) == (found.state_dict, found.losses)
    assert losses[found.key] == min(losses.values())
    for key, value in model.state_dict().items():  # the model is there, not at the last candidate
        assert torch.equal(value, start[key])
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


# --- the recipe ---


def run(count: int = 6) -> tuple[nn.Module, list[dict], tuple[torch.Tensor, torch.Tensor]]:
    """A small network, noisy checkpoints of its training, and its data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    images, labels = torch.randn(256, 8), torch.randint(3, (256,))
    optimizer, window = torch.optim.SGD(model.parameters(), 0.5, momentum=0.9), []
    for _ in range(count):
        for batch, target in zip(images.split(32), labels.split(32), strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(batch), target).backward()
            optimizer.step()
        window.append(copy.deepcopy(model.state_dict()))
    model.zero_grad()
    return model, window, (images, labels)


def train(model: nn.Module, optimizer, data: tuple[torch.Tensor, torch.Tensor], steps: range):
    images, labels = data
    for step in steps:
        part = slice(step * 32 % 256, step * 32 % 256 + 32)
        F.cross_entropy(model(images[part]), labels[part]).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    "steps, samples, base, arguments, granularity, unit, rate",
    [
        (49, 1000, torch.optim.AdamW, {}, "model", "direction", rate_of(49, 1000)),
        (50, 1000, torch.optim.AdamW, {}, "channel", "block", rate_of(50, 1000, "block")),
        (50, math.inf, torch.optim.Adam, {}, "channel", "direction", rate_of(50)),
        (800, 9000, torch.optim.SGD, {"momentum": 0.9}, "model", "direction", 0.1),
        (800, 9000, torch.optim.AdamW, {"lr": 0.3}, "channel", "block", 0.3),
        (800, 9000, torch.optim.AdamW, {"unit": "direction"}, "channel", "direction", 0.06),
        (800, 9000, functools.partial(torch.optim.SGD), {"lr": 0.3}, "model", "direction", 0.3),
    ],
)
def test_what_the_recipe_chooses(steps, samples, base, arguments, granularity, unit, rate):
    model, window, _ = run()
    recipe = Recipe(model, window, lambda: 0.0, steps=steps, samples=samples)
    optimizer = recipe.optimizer(base, **arguments)
    assert recipe.granularity == granularity
    assert optimizer.subspace.unit == unit
    assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)
    blocks = {"model": 1, "channel": 16 + 1 + 3 + 1}[granularity]
    assert optimizer.averaging_weights().numel() == blocks * len(window)


def test_a_granularity_that_is_asked_for_is_taken_and_others_are_refused():
    model, window, _ = run()
    loss = lambda: 0.0  # noqa: E731
    recipe = Recipe(model, window, loss, steps=800, granularity="layer")
    assert recipe.optimizer().averaging_weights().shape == (2, len(window))
    with pytest.raises(ValueError, match="granularity must be one of auto, model, layer, channel"):
        Recipe(model, window, loss, steps=800, granularity="head")
    with pytest.raises(ValueError, match="must not be negative"):
        Recipe(model, window, loss, steps=-1)


def test_the_start_is_the_best_average_and_can_be_made_again_without_a_search():
    model, window, data = run()
    images, labels = data

    def loss() -> float:
        return F.cross_entropy(model(images), labels).item()

    found = best_start(model, window, loss)
    recipe = Recipe(model, window, loss, steps=10)
    recipe.optimizer()
    assert (recipe.start, recipe.start_losses) == (found.key, found.losses)
    for key in (found.key, 1, 4, 0.5):
        again = Recipe(model, window, lambda: pytest.fail("searched"), steps=10, start=key)
        again.optimizer()
        assert again.start == key and again.start_losses == {}
        expected = average(window, model, key) if key < 1 else average(window[-key:], model)
        for name, value in model.state_dict().items():
            assert torch.equal(value, expected[name])
    assert [start_name(key, 6) for key in (1, 2, 6, 0.75)] == [
        *("last", "mean of last 2", "SWA", "EMA 0.75")
    ]


@pytest.mark.parametrize("best", ["end", "mean of the last half", "start"])
def test_the_best_of_end_late_mean_and_start_is_kept(best):
    model, window, data = run()
    recipe = Recipe(model, window, lambda: 0.0, steps=9, start=1)
    optimizer = recipe.optimizer()
    path = []
    for step in range(9):
        train(model, optimizer, data, range(step, step + 1))
        path.append(optimizer.coefficients.detach().clone())
    points = {
        "end": path[-1],
        "mean of the last half": torch.stack(path[4:]).mean(0),
        "start": torch.zeros(len(path[0])),
    }

    def loss() -> float:
        model.eval()
        near = {name: (optimizer.coefficients - z).norm() < 1e-6 for name, z in points.items()}
        return float(not near[best])

    losses = recipe.finish(loss)
    assert losses == recipe.end_losses == {name: float(name != best) for name in points}
    torch.testing.assert_close(optimizer.coefficients.detach(), points[best])
    assert model.training
    expected = optimizer.subspace.expand(points[best])
    start = torch.cat([value.flatten() for value in window[-1].values()])
    weights = torch.cat([parameter.flatten() for parameter in model.parameters()])
    torch.testing.assert_close(weights, start + expected)


def test_a_loss_that_is_not_finite_loses():
    model, window, data = run()
    recipe = Recipe(model, window, lambda: 0.0, steps=4, start=1)
    optimizer = recipe.optimizer()
    train(model, optimizer, data, range(4))
    values = iter([math.nan, math.inf, 3.0])
    assert recipe.finish(lambda: next(values)) == {
        **{"end": math.inf, "mean of the last half": math.inf, "start": 3.0}
    }
    assert not optimizer.coefficients.any()


def test_the_papers_coordinates_keep_the_last_iterate():
    model, window, data = run()
    recipe = Recipe(model, window, lambda: pytest.fail("compared"), steps=4, start=1)
    optimizer = recipe.optimizer(torch.optim.SGD, extract="Schmidt", lr=0.1)
    train(model, optimizer, data, range(4))
    last = optimizer.coefficients.detach().clone()
    assert recipe.finish() == {}
    assert torch.equal(optimizer.coefficients, last)


def test_a_resumed_recipe_ends_as_an_uninterrupted_one():
    ends = []
    for stop in (None, 3, 7):
        model, window, data = run()
        recipe = Recipe(model, window, lambda: 0.0, steps=10, start=2)
        optimizer = recipe.optimizer()
        train(model, optimizer, data, range(stop or 10))
        if stop:
            state = copy.deepcopy([part.state_dict() for part in (model, optimizer, recipe)])
            model, window, data = run()
            recipe = Recipe(model, window, lambda: 0.0, steps=10, start=2)
            optimizer = recipe.optimizer()
            for part, its in zip((model, optimizer, recipe), state, strict=True):
                part.load_state_dict(its)
            train(model, optimizer, data, range(stop, 10))
        values = iter([1.0, 0.0, 1.0])  # the mean of the last half wins
        recipe.finish(lambda values=values: next(values))
        ends.append(optimizer.coefficients.detach().clone())
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])


def test_what_finish_measured_is_what_it_leaves():
    """Batch norm's statistics too, if the loss re-estimates them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    images, labels = 3 * torch.randn(256, 8), torch.randint(3, (256,))
    optimizer, window = torch.optim.SGD(model.parameters(), 0.1), []
    for _ in range(5):
        for _ in range(8):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
        window.append(copy.deepcopy(model.state_dict()))
    model.zero_grad()

    def loss() -> float:
        torch.optim.swa_utils.update_bn([images], model)
        return F.cross_entropy(model.eval()(images), labels).item()

    recipe = Recipe(model, window, loss, steps=8, start=5)
    train(model, recipe.optimizer(lr=0.3), (images, labels), range(8))
    losses = recipe.finish()
    assert min(losses, key=losses.get) != "start"
    assert F.cross_entropy(model.eval()(images), labels).item() == min(losses.values())


@pytest.mark.parametrize(
    "base, error",
    [
        (torch.optim.RMSprop, "RMSprop needs lr"),
        (torch.optim.LBFGS, "LBFGS needs lr"),
        (functools.partial(torch.optim.AdamW, lr=0.003), None),
    ],
)
def test_a_rate_that_the_recipe_does_not_know_is_not_made_up(base, error):
    model, window, _ = run()
    recipe = Recipe(model, window, lambda: 0.0, steps=800, start=1)
    if error:
        with pytest.raises(ValueError, match=error):
            recipe.optimizer(base)
    else:
        assert recipe.optimizer(base).param_groups[0]["lr"] == 0.003


def test_a_granularity_of_the_optimizer_is_that_of_the_recipe():
    model, window, _ = run()
    recipe = Recipe(model, window, lambda: 0.0, steps=500, samples=50_000, start=1)
    optimizer = recipe.optimizer(granularity="model")
    assert (recipe.granularity, optimizer.subspace.unit) == ("model", "direction")
    assert optimizer.param_groups[0]["lr"] == rate_of(500, 50_000)


@pytest.mark.parametrize("key", [0, -2, 2.5, 100])
def test_a_key_that_is_no_average_is_refused(key):
    model, window, _ = run()
    with pytest.raises(ValueError, match=f"start {key} is neither a decay"):
        Recipe(model, window, lambda: 0.0, steps=5, start=key).optimizer()


def test_finish_needs_an_optimizer():
    model, window, _ = run()
    with pytest.raises(RuntimeError, match="optimizer"):
        Recipe(model, window, lambda: 0.0, steps=5).finish()


def test_averaging_weights_of_a_checkpoint_that_has_changed_are_refused(tmp_path):
    model, window, _ = run()
    paths = [tmp_path / f"{i}.pt" for i in range(len(window))]
    for path, state in zip(paths, window, strict=True):
        save(state, path)
    optimizer = Recipe(model, paths, lambda: 0.0, steps=5, start=1).optimizer()
    assert optimizer.averaging_weights().sum().item() == pytest.approx(1)
    save(window[0], paths[3])
    with pytest.raises(CheckpointError, match=r"3\.pt: has changed since the basis was built"):
        optimizer.averaging_weights()
