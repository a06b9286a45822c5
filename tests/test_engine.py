"""The loop that every trainer shares, against plain computations in float64."""

import copy
import math
from typing import ClassVar
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import utils
from training import data, loop, ranks
from training.loop import Totals, Trainer, evaluate, reestimate_bn
from training.optimizers import SCHEDULES, schedule_of, step_of_the_paper
from training.run import random_states, set_random_states

CPU = torch.device("cpu")


def digits(batch_size: int, images: int = 160) -> data.Loader:
    """A training loader of the first `images` digits."""
    split, _ = data.load("Digits", "", CPU)
    split = data.Split(split.images[:images], split.labels[:images], split.spec)
    return data.Loader(split, batch_size, train=True)


def plain_measures(outputs: Tensor, labels: Tensor) -> dict[str, float]:
    """Mean cross-entropy and accuracy in percent, in float64, one sample at a time."""
    losses, hits = [], 0
    for row, label in zip(outputs.double().tolist(), labels.tolist(), strict=True):
        top = max(row)
        losses.append(top + math.log(sum(math.exp(x - top) for x in row)) - row[label])
        hits += row.index(top) == label
    return {"loss": math.fsum(losses) / len(losses), "accuracy": 100 * hits / len(losses)}


# --- totals and evaluation ---


def test_totals_weigh_every_sample_equally_whatever_its_batch():
    generator = torch.Generator().manual_seed(0)
    outputs = 3 * torch.randn(100, 10, generator=generator)
    labels = torch.randint(10, (100,), generator=generator)
    totals = Totals(CPU)
    for first, last in ((0, 64), (64, 96), (96, 97), (97, 100)):
        part = slice(first, last)
        loss = F.cross_entropy(outputs[part], labels[part], reduction="sum")
        totals.add(loss, outputs[part], labels[part])
    assert totals.read() == pytest.approx(plain_measures(outputs, labels), rel=1e-6)
    assert 0 < totals.read()["accuracy"] < 100


def test_totals_of_nothing_are_zero():
    assert Totals(CPU).read() == {"loss": 0.0, "accuracy": 0.0}


def test_evaluate_measures_in_evaluation_mode():
    torch.manual_seed(0)
    _, split = data.load("Digits", "", CPU)
    loader = data.Loader(split, 100, train=False)  # the last batch holds 99
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Dropout(0.5), nn.Linear(64, 10))
    model.train()
    measured = evaluate(model, loader)

    images = torch.cat([images for images, _ in loader]).double()
    plain = copy.deepcopy(model).double().eval()
    assert measured == pytest.approx(plain_measures(plain(images), split.labels), rel=1e-6)


def test_evaluate_in_bfloat16_is_near_float32():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    exact, rounded = evaluate(model, digits(32)), evaluate(model, digits(32), amp=True)
    assert rounded["loss"] != exact["loss"]
    assert rounded["loss"] == pytest.approx(exact["loss"], rel=1e-2)


# --- batch norm ---


def test_reestimated_statistics_are_the_means_over_the_batches_of_epoch_zero():
    torch.manual_seed(0)
    loader = digits(64, images=150)
    model = nn.Sequential(nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5)).eval()
    model[1].running_mean.fill_(7.0)
    model[1].running_var.fill_(70.0)
    loader.set_epoch(3)
    reestimate_bn(model, loader)

    means, variances = [], []
    loader.set_epoch(0)
    for images, _ in loader:
        out = F.conv2d(images.double(), model[0].weight.double(), model[0].bias.double())
        flat = out.transpose(0, 1).flatten(1)
        means.append(flat.mean(1))
        variances.append(flat.var(1))
    assert len(means) == 3
    for statistics, parts in ((model[1].running_mean, means), (model[1].running_var, variances)):
        expected = torch.stack(parts).mean(0).float()
        torch.testing.assert_close(statistics, expected, rtol=1e-5, atol=1e-6)
    assert model[1].num_batches_tracked == 3
    assert model[1].momentum == 0.1  # as it was
    assert not model.training  # as it was


def test_reestimated_statistics_depend_on_the_weights_alone():
    torch.manual_seed(0)
    loader = digits(32)
    model = nn.Sequential(nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5))
    other = copy.deepcopy(model)
    other[1].running_var.fill_(float("inf"))
    reestimate_bn(model, loader)
    loader.set_epoch(5)
    list(loader)
    reestimate_bn(other, loader)
    assert torch.equal(model[1].running_mean, other[1].running_mean)
    assert torch.equal(model[1].running_var, other[1].running_var)


# --- devices ---


class Elsewhere(Tensor):
    """A tensor that says that it is on an accelerator, and counts its copies to the CPU."""

    device = torch.device("cuda", 0)
    events: ClassVar[list[str]] = []

    def to(self, device, non_blocking):
        assert (device, non_blocking) == ("cpu", True)
        self.events.append("copy")
        return self.as_subclass(Tensor)


def test_a_state_comes_to_the_cpu_with_one_wait(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda _: Elsewhere.events.append("wait"))
    there = torch.ones(2).as_subclass(Elsewhere)
    model = linear()
    model.state_dict = lambda: {"weight": there, "buffers": [there, {"count": 3}]}
    state = ranks.state_dict_of(model)
    assert Elsewhere.events == ["copy", "copy", "wait"]
    assert type(state["weight"]) is type(state["buffers"][0]) is Tensor
    assert state["buffers"][1] == {"count": 3}


def test_on_the_cpu_no_accelerator_is_asked_for_its_generator(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch, "get_device_module", None)
    states = random_states(CPU)
    drawn = torch.rand(2)
    set_random_states(states, CPU)
    assert torch.equal(torch.rand(2), drawn)


def test_ranks_meet_with_the_device_that_they_have(monkeypatch):
    """Which a barrier would have to guess."""
    joined, module = {}, MagicMock()
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    store = torch.distributed.HashStore()
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda _: iter([(store, 1, 2)]))
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda name, **how: joined.update(how, name=name)
    )
    device = torch.device("cuda", 1)
    ranks.start(device)
    assert (joined["name"], joined["rank"], joined["device_id"]) == ("nccl", 1, device)
    module.set_device.assert_called_once_with(device)


# --- training ---


def trainer_for(
    model: nn.Module, train: data.Loader, lr: float = 0.1, epochs: int = 2, **arguments
) -> Trainer:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    steps = epochs * math.ceil(len(train) / arguments.get("accumulate", 1))
    scheduler = schedule_of(SCHEDULES["linear"], optimizer, steps)
    lines = []
    trainer = Trainer(model, train, train, optimizer, scheduler, epochs, lines.append, **arguments)
    trainer.lines = lines
    return trainer


def linear(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).to(dtype)


@pytest.mark.parametrize(
    "accumulate, small, images",
    [(2, 16, 160), (5, 8, 160), (2, 16, 176), (4, 16, 80), (100, 16, 160)],
    ids=["whole groups", "five", "last group of one", "last group of one of four", "one group"],
)
def test_accumulated_batches_make_the_step_of_one_large_batch(accumulate, small, images):
    """The mean over equal batches is the mean over all their images, in the last group too."""
    in_parts, at_once = linear(), linear()
    trainer_for(in_parts, digits(small, images), accumulate=accumulate).epoch(1)
    trainer_for(at_once, digits(small * accumulate, images)).epoch(1)
    torch.testing.assert_close(in_parts[1].weight, at_once[1].weight, rtol=1e-5, atol=1e-6)
    assert (in_parts[1].weight - linear()[1].weight).abs().max() > 0.01


def test_an_epoch_is_plain_sgd_with_momentum_and_schedule():
    model = linear()
    train = digits(32, images=150)
    trainer = trainer_for(model, train)
    metrics = [trainer.epoch(epoch) for epoch in (1, 2)]

    plain = linear(torch.float64)
    weight, bias = plain[1].weight, plain[1].bias
    speed = [torch.zeros_like(weight), torch.zeros_like(bias)]
    step, losses = 0, []
    for epoch in (1, 2):
        train.set_epoch(epoch)
        for images, labels in train:
            loss = F.cross_entropy(images.double().flatten(1) @ weight.T + bias, labels)
            gradients = torch.autograd.grad(loss, (weight, bias))
            rate = 0.1 * (1 - step / 10)
            with torch.no_grad():
                for p, v, g in zip((weight, bias), speed, gradients, strict=True):
                    v.mul_(0.9).add_(g)
                    p.sub_(rate * v)
            losses.append((epoch, loss.item() * len(labels)))
            step += 1
    torch.testing.assert_close(model[1].weight.double(), weight.detach(), rtol=1e-4, atol=1e-6)
    for epoch in (1, 2):
        mean = sum(loss for e, loss in losses if e == epoch) / 150
        assert metrics[epoch - 1]["train_loss"] == pytest.approx(mean, rel=1e-4)
    assert [m["rate"] for m in metrics] == pytest.approx([0.1, 0.05])
    assert metrics[1]["epoch"] == 2
    assert metrics[1]["test_loss"] == pytest.approx(evaluate(model, train)["loss"])


def test_after_step_tells_the_iterations_done_and_lines_come_as_often_as_asked():
    trainer = trainer_for(linear(), digits(16, images=112), accumulate=3, print_every=2)
    done = []
    trainer.epoch(1, after_step=done.append)
    assert done == [3, 6, 7]
    assert [line.split("]")[0] for line in trainer.lines] == [
        "epoch 1/2 [2/7",
        "epoch 1/2 [4/7",
        "epoch 1/2 [6/7",
    ]


@pytest.mark.parametrize("print_every", [1, 1000])
def test_divergence_is_said_before_a_step_is_saved(print_every):
    model = linear()
    saved = []
    trainer = trainer_for(model, digits(16), lr=1e38, print_every=print_every)
    with pytest.raises(utils.UserError, match=r"epoch 1/2.*loss is (nan|inf).*--lr"):
        trainer.epoch(1, after_step=lambda i: saved.append((i, model[1].weight.isfinite().all())))
    assert 10 not in [i for i, _ in saved]  # the end of the epoch, where checkpoints are saved


def test_divergence_in_the_last_step_of_an_epoch_is_seen_in_its_test():
    """The training loss of the only step is that of the start."""
    trainer = trainer_for(linear(), digits(160), lr=1e38)
    with pytest.raises(utils.UserError, match=r"epoch 1/2, test: the loss is (nan|inf)"):
        trainer.epoch(1)


@pytest.mark.parametrize(
    "name, points",
    [
        ("step", {0: 1, 99: 1, 100: 0.1, 149: 0.1, 150: 0.01, 199: 0.01}),
        ("constant", {0: 1, 199: 1}),
        ("linear", {0: 1, 50: 0.75, 100: 0.5, 200: 0}),
        ("cosine", {0: 1, 50: (1 + 0.5**0.5) / 2, 100: 0.5, 200: 0}),
    ],
)
def test_schedules(name, points):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3.0)
    scheduler = schedule_of(SCHEDULES[name], optimizer, 200)
    rates = []
    for _ in range(201):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    for step, factor in points.items():
        assert rates[step] == pytest.approx(3.0 * factor, abs=1e-12)


@pytest.mark.parametrize("epochs", [1, 2, 3, 5, 10])
def test_the_papers_step_falls_at_the_epochs_of_its_release(epochs):
    """As torch's `MultiStepLR`, which is stepped once an epoch."""
    ours, theirs = (torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0) for _ in range(2))
    scheduler = schedule_of(step_of_the_paper(epochs), ours, 7 * epochs)
    milestones = [int(0.5 * epochs), int(0.75 * epochs + 0.9)]
    reference = torch.optim.lr_scheduler.MultiStepLR(theirs, milestones)
    for epoch in range(epochs):
        passed = sum(epoch >= milestone for milestone in milestones)
        if milestones[0] > 0:  # torch looks at no milestone before the first step
            assert reference.get_last_lr() == pytest.approx([2.0 * 0.1**passed])
        theirs.step()
        reference.step()
        for _ in range(7):
            assert ours.param_groups[0]["lr"] == pytest.approx(2.0 * 0.1**passed)
            ours.step()
            scheduler.step()


def test_describe():
    assert loop.describe({"loss": 0.12345, "accuracy": 95.117}) == "loss 0.1235 accuracy 95.12 %"
