"""The library and the scripts on an accelerator that is pretended: right, resumable, without waits.

See `tests/pretend.py`. Each test runs in a process of its own, as a device cannot be removed.
"""

import copy
import functools
import inspect
import itertools
import json
import math
import signal
from pathlib import Path
from types import SimpleNamespace

import pretend
import pytest
import torch
import torch.distributed as dist
from processes import Child, Ranks, run_script
from test_subspace import make_model, walk
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import SWALR

from training import data, parallel, ranks, text
from training.files import on_cpu, save
from training.loop import Diverged, Totals, Trainer
from training.optimizers import SCHEDULES, schedule_of
from training.ranks import state_dict_of
from training.run import random_states, set_random_states
from twa import TWA, Recipe, Subspace
from twa.files.checkpoints import average
from twa.formats import load
from twa.storage.memory import CHUNK, CHUNK_OF_ACCELERATORS, Plan, free_memory
from utils import UserError, choose_device

pytestmark = pytest.mark.skipif(
    not pretend.POSSIBLE, reason="this version of torch has no devices in Python"
)
THERE, SECOND, CPU = "pretend:0", "pretend:1", torch.device("cpu")
GRANULARITIES, BITS = ("model", "layer", "channel"), (32, 8, 4)


OTHERS_HIDDEN = {"CUDA_VISIBLE_DEVICES": ""}  # torch knows one accelerator
# The pretended device, and the machine's accelerator if it has one.
DEVICES = [THERE]
if torch.accelerator.is_available():
    DEVICES.append(f"{torch.accelerator.current_accelerator()}:0")


def install_and(run, device: str, *args) -> None:
    """Calls `run` in a process that has the device, which it then has until it ends."""
    if device == THERE:
        pretend.install()
    run(*args)


def on_device(test, devices=DEVICES):
    """Runs a test in a process that has the device; it may take `device` and `folder`."""

    @pytest.mark.parametrize("device", devices)
    def outside(device, tmp_path, inside=False):
        if inside:
            values = {"device": device, "folder": tmp_path}
            return test(**{name: values[name] for name in inspect.signature(test).parameters})
        how = {"environment": OTHERS_HIDDEN} if device == THERE else {}
        run = install_and, outside, device, device, tmp_path, True
        done = Child(tmp_path / "child", *run, **how).end()
        assert done.status == 0, done.err

    for name in ("__name__", "__qualname__", "__doc__", "__module__"):
        setattr(outside, name, getattr(test, name))
    return outside


def on_pretended_device(test):
    """As `on_device`, for what is counted or takes two devices."""
    return on_device(test, [THERE])


def start_there(folder: Path, name: str, *args) -> Child:
    run = install_and, run_script, THERE, name, *map(str, args)
    return Child(folder, *run, environment=OTHERS_HIDDEN)


def script(folder: Path, name: str, *args) -> str:
    """What the script printed in a process that has the device."""
    done = start_there(folder, name, *args).end()
    assert done.status == 0, done.err
    return done.out


def close(there: torch.Tensor, here: torch.Tensor, **how) -> None:
    assert there.device.type != "cpu"
    torch.testing.assert_close(there.cpu(), here, **how)


def loss_of(model: nn.Module, batch: int = 0) -> torch.Tensor:
    draws = torch.Generator().manual_seed(batch)
    images, labels = torch.randn(8, 3, 5, 5, generator=draws), torch.arange(8) % 7
    device = next(model.parameters()).device
    return F.cross_entropy(model(images.to(device)), labels.to(device))


def trained(optimizer: TWA, model: nn.Module, batches=range(5)) -> nn.Module:
    for batch in batches:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    return model


def close_models(there: nn.Module, here: nn.Module) -> None:
    for (name, one), other in zip(
        there.state_dict().items(), here.state_dict().values(), strict=True
    ):
        close(one, other, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


# --- the library equals itself on the CPU ---


def equals_the_cpus(extract: str, device: str) -> None:
    here = make_model()
    states = walk(here, 6)
    there = copy.deepcopy(here).to(device)
    base = {} if extract == "PCA" else {"base": torch.optim.SGD, "lr": 1e-3, "momentum": 0.9}
    for granularity, bits in itertools.product(GRANULARITIES, BITS):
        how = base | {"extract": extract, "granularity": granularity, "bits": bits}
        models = [copy.deepcopy(model) for model in (there, here)]
        optimizers = [TWA(model, states, **how) for model in models]
        a, b = (optimizer.subspace for optimizer in optimizers)
        vector, coefficients = torch.randn(b.empty().numel()), torch.randn(len(b))
        tolerance = {"rtol": 1e-3, "atol": 1e-3}
        close(a.project(vector.to(device)), b.project(vector), **tolerance)
        close(a.expand(coefficients.to(device)), b.expand(coefficients), **tolerance)
        for model, optimizer in zip(models, optimizers, strict=True):
            trained(optimizer, model, range(3))
        close_models(*models)
        alphas = [optimizer.averaging_weights() for optimizer in optimizers]
        torch.testing.assert_close(*alphas, **tolerance)


@on_device
def test_principal_directions_and_their_training_equal_the_cpus(device):
    equals_the_cpus("PCA", device)


@on_device
def test_the_papers_basis_and_its_training_equal_the_cpus(device):
    equals_the_cpus("Schmidt", device)


@on_device
def test_a_window_of_files_and_of_tensors_here_and_there(device, folder):
    here = make_model()
    states = walk(here, 4)
    there = copy.deepcopy(here).to(device)
    save(states[0], folder / "0.pt")
    forms = [
        folder / "0.pt",
        states[1],
        *({k: v.to(device) for k, v in s.items()} for s in states[2:]),
    ]
    expected = average(states, here)
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        window = [forms[i] for i in order]
        for model in (there, here):
            mean = average(window, model)
            for name, _ in model.named_parameters():  # buffers are those of the last
                torch.testing.assert_close(mean[name].cpu(), expected[name])
            optimizer = TWA(copy.deepcopy(model), window, start=forms[3])
            alpha = torch.full((4,), 0.0, dtype=torch.float64)
            alpha[order.index(3)] = 1
            torch.testing.assert_close(optimizer.averaging_weights(), alpha, rtol=0, atol=1e-5)


@on_pretended_device
def test_bases_with_a_closure_a_scaler_and_two_devices():
    here = make_model()
    states = walk(here, 5)
    spread = copy.deepcopy(here).to(THERE)
    spread[5].to(SECOND)
    spread[5].register_forward_pre_hook(lambda _, inputs: inputs[0].to(SECOND))
    spread.register_forward_hook(lambda *args: args[2].to(THERE))
    for model in (copy.deepcopy(here).to(THERE), spread):
        here_too = copy.deepcopy(here)
        for one in (model, here_too):
            optimizer = TWA(one, states, torch.optim.LBFGS, lr=0.1, max_iter=4)

            def closure(one=one, optimizer=optimizer):
                optimizer.zero_grad()
                loss = loss_of(one)
                loss.backward()
                return loss

            optimizer.step(closure)
        moved = [p.cpu() for p in model.parameters()]
        for one, other in zip(moved, here_too.parameters(), strict=True):
            torch.testing.assert_close(one, other.detach(), rtol=1e-3, atol=1e-4)
    there = copy.deepcopy(here).to(THERE)
    optimizer, scaler = TWA(there, states), torch.amp.GradScaler("pretend", init_scale=2.0)
    for batch in range(3):
        optimizer.zero_grad()
        scaler.scale(loss_of(there, batch)).backward()
        scaler.step(optimizer)
        scaler.update()
    close_models(there, trained(TWA(here, states), here, range(3)))


@on_device
def test_the_recipe_equals_the_cpus(device):
    here = make_model()
    states = walk(here, 6)
    there = copy.deepcopy(here).to(device)
    recipes = []
    for model in (there, here):
        recipe = Recipe(
            model, states, lambda model=model: float(loss_of(model.eval())), steps=60, samples=900
        )
        trained(recipe.optimizer(), model, range(60))
        recipe.finish()
        recipes.append(recipe)
    ours, its = recipes
    assert (ours.start, ours.granularity) == (its.start, its.granularity)
    assert ours.end_losses == pytest.approx(its.end_losses, rel=1e-2)
    with torch.no_grad():
        torch.testing.assert_close(loss_of(there).cpu(), loss_of(here), rtol=1e-2, atol=1e-3)


@on_pretended_device
def test_a_training_is_resumed_on_another_device(folder):
    here = make_model()
    states = walk(here, 5)
    whole = trained(TWA(here, states), here, range(6))
    for first, second in ((THERE, CPU), (CPU, THERE), (THERE, SECOND)):
        begun, resumed = (copy.deepcopy(make_model()).to(device) for device in (first, second))
        optimizer = TWA(begun, states)
        trained(optimizer, begun, range(3))
        save(state_dict_of(begun), folder / "model.pt")
        save(on_cpu(optimizer.state_dict()), folder / "optimizer.pt")
        later = TWA(resumed, states)
        state = torch.load(folder / "optimizer.pt", weights_only=True)
        later.load_state_dict(state)
        resumed.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
        trained(later, resumed, range(3, 6))
        for one, other in zip(resumed.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(one.cpu(), other, rtol=1e-3, atol=1e-5)


def test_what_was_saved_there_is_opened_where_there_is_no_such_device(tmp_path):
    test_a_model_is_saved(THERE, tmp_path)
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    assert {value.device for value in state.values()} == {CPU}


@on_device
def test_a_model_is_saved(device, folder):
    save(state_dict_of(make_model().to(device)), folder / "model.pt")
    assert load(folder / "model.pt").keys() == make_model().state_dict().keys()


@on_pretended_device
def test_the_generator_that_is_saved_is_that_of_the_chosen_device():
    for device in map(torch.device, (THERE, SECOND)):
        ranks.start(device)
        torch.manual_seed(3)
        torch.rand(5, device=device)
        states = random_states(device)
        drawn, here = torch.rand(3, device=device).cpu(), torch.rand(3)
        assert not torch.equal(drawn, here)
        set_random_states(states, device)
        close(torch.rand(3, device=device), drawn, rtol=0, atol=0)
        assert torch.equal(torch.rand(3), here)


@on_pretended_device
def test_memory_that_the_device_does_not_tell_is_unknown():
    assert free_memory(torch.device(THERE)) is None
    module = torch.get_device_module(torch.device(THERE))
    module.memory_reserved = module.memory_allocated = lambda _: 0

    def unknown(_):
        raise RuntimeError("The device doesn't support querying available memory.")

    module.mem_get_info = unknown
    assert free_memory(torch.device(THERE)) is None
    module.mem_get_info = lambda _: (7, 9)
    assert free_memory(torch.device(THERE)) == 7


@pytest.mark.parametrize("free, chosen", [(None, "replicate"), (10**12, "replicate"), (1, "shard")])
def test_ranks_choose_what_to_hold_also_if_free_memory_is_unknown(monkeypatch, free, chosen):
    args = SimpleNamespace(parallel="auto", extract="PCA", components=None, bits=32)
    args.reshard_after_forward, args.clip_grad = False, None
    monkeypatch.setattr(parallel, "free_memory", lambda _: free)
    monkeypatch.setattr(parallel.windows, "Window", lambda _: range(5))
    monkeypatch.setattr(parallel.ranks, "world", lambda: 2)
    monkeypatch.setattr(parallel.ranks, "local_world", lambda: 2)
    monkeypatch.setattr(parallel.ranks, "launched", lambda: True)
    monkeypatch.setattr(parallel.ranks, "gather", lambda value: [value] * 2)
    monkeypatch.setattr(parallel.ranks, "shard", lambda *_: None)
    monkeypatch.setattr(parallel, "dist", SimpleNamespace(group=SimpleNamespace(WORLD=None)))
    layout = parallel.Layout(args)
    layout.shard(make_model(), CPU)
    assert layout.strategy == chosen
    assert ("not known" in layout.line) == (free is None)


def test_chunks_are_large_on_every_kind_of_accelerator():
    blocks = SimpleNamespace(count=1, width=2**30)
    for kind in ("cuda", "xpu", "meta"):
        plan = Plan(8, device=torch.device(kind))
        assert plan.chunk([blocks]) == CHUNK_OF_ACCELERATORS // 8
    for kind in ("cpu", "mps"):  # which builds on the CPU
        assert Plan(8, device=torch.device(kind)).chunk([blocks]) == CHUNK // 8


@on_pretended_device
def test_a_rank_takes_the_accelerator_of_its_number():
    assert choose_device(None) == torch.device("pretend")
    assert choose_device("pretend:1") == torch.device(SECOND)
    assert choose_device("pretend", 1) == choose_device(None, 1) == torch.device(SECOND)
    assert choose_device("cpu", 1) == CPU
    with pytest.raises(UserError, match=r"--device pretend:0: every rank .* give --device pretend"):
        choose_device("pretend:0", 1)


# --- scripts ---

COMMON = ["--datasets", "Digits", "--batch-size", 100, "--model-factory", "tests.reduced:plain"]
SGD = ["train_sgd_cifar.py", *COMMON, "--epochs", 2, "--saves-per-epoch", 2, "--lr", 0.02]
TWA_RUN = ["train_twa.py", *COMMON, "--epochs", 2, "--params_start", 0, "--params_end", 5]


def flags(folder: Path, device: str, *more) -> list:
    return ["--save-dir", folder, "--log-dir", folder, "--device", device, *more]


def losses(folder: Path) -> dict[str, float]:
    results = json.loads((folder / "twa/twa.json").read_text())["results"]
    return {name: value["loss"] for name, value in results.items()}


def test_scripts_equal_the_cpu_and_are_resumed_on_the_other_device(tmp_path):
    here, there, moved = tmp_path / "here", tmp_path / "there", tmp_path / "moved"
    for run, name in ((SGD, "state.pt"), (TWA_RUN, "twa/twa_state.pt")):
        for folder, device in ((here, "cpu"), (there, "pretend")):
            script(folder, *run, *flags(folder, device))
        child = start_there(moved, *run, *flags(moved, "pretend:1"), "-p", 3)
        child.wait_for("epoch 1/2 [6/9]")
        child.send(signal.SIGTERM)
        assert child.end().status == 143
        assert (moved / name).exists()
        script(moved, *run, *flags(moved, "cpu"), "--resume")
    for name in ("0.pt", "4.pt", "twa/twa.pt"):
        states = [load(folder / name) for folder in (here, there, moved)]
        assert {value.device for state in states for value in state.values()} == {CPU}
    expected = losses(here)
    assert len(expected) > 2
    assert losses(there) == pytest.approx(expected, rel=0.02)
    assert losses(moved) == pytest.approx(expected, rel=0.02)


# --- waits and launches ---


def small_net() -> nn.Module:
    parts = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)]
    return nn.Sequential(*parts)


def digits(device: str, images: int, **how) -> data.Loader:
    split, _ = data.load("Digits", "", torch.device(device))
    return data.Loader(split.part(slice(images)), 20, train=True, **how)


OPTIMIZERS = {
    "SGD": lambda model, _: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    **{
        f"TWA by {granularity}, {bits} bits": functools.partial(
            lambda model, states, **how: TWA(model, states, **how),
            granularity=granularity,
            bits=bits,
        )
        for granularity in ("model", "channel")
        for bits in BITS
    },
}


def waits_of_steps(make, model: nn.Module, batches: int, group=None) -> int:
    """The waits of ten steps in which no line is due, without those of the first."""
    states = walk(model, 4, 0.01)
    model.to(THERE)
    how = {} if group is None else {"process_group": group}
    optimizer = make(model, states, **how)
    scheduler = schedule_of(SCHEDULES["linear"], optimizer, batches)
    loader = digits(THERE, 20 * batches)
    trainer = Trainer(model, loader, loader, optimizer, scheduler, 1, print_every=10**6)
    seen = []
    trainer._train(
        1, "", Totals(torch.device(THERE)), lambda _: seen.append(pretend.counts["waits"])
    )
    return seen[-2] - seen[0]  # The last step prints a line.


@on_pretended_device
def test_a_step_waits_for_nothing():
    for name, make in OPTIMIZERS.items():
        before = dict(pretend.counts)
        waits = waits_of_steps(make, small_net(), 12)
        assert waits == 0, (name, pretend.counts - pretend.Counter(before))


@on_pretended_device
def test_swas_schedule_waits_for_nothing():
    model, seen = small_net().to(THERE), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = SWALR(optimizer, swa_lr=0.05, anneal_epochs=5)
    loader = digits(THERE, 240)
    trainer = Trainer(model, loader, loader, optimizer, scheduler, 1, print_every=10**6)
    where = torch.device(THERE)
    trainer._train(1, "", Totals(where), lambda _: seen.append(pretend.counts["waits"]))
    assert seen[-2] == seen[0]


@on_pretended_device
def test_the_waits_of_an_epoch_do_not_grow_with_its_steps():
    waits = []
    for images in (100, 200, 400):
        model = small_net()
        optimizer = TWA(model.to(THERE), walk(small_net(), 4, 0.01))
        scheduler = schedule_of(SCHEDULES["linear"], optimizer, 40)
        loader, test = digits(THERE, images), digits(THERE, 40)
        trainer = Trainer(model, loader, test, optimizer, scheduler, 2, print_every=10**6)
        trainer.epoch(1)
        before = pretend.counts["waits"]
        trainer.epoch(2)
        waits.append(pretend.counts["waits"] - before)
    assert waits[0] == waits[1] == waits[2] > 0  # its line, and its test


@on_pretended_device
def test_text_and_augmented_images_are_loaded_without_waits():
    spec = text.Spec(text.Vocabulary(), 16)
    tokens = torch.randint(255, (2000,), dtype=torch.uint8).numpy()
    split = text.Split(tokens, 2000, spec)
    loader = text.Loader(split, 4, train=True, device=torch.device(THERE), steps=10)
    seen = [pretend.counts["waits"] for _ in loader]
    assert seen[-1] == seen[0]
    seen = [pretend.counts["waits"] for _ in digits(THERE, 200)]
    assert seen[-1] == seen[0]


@on_pretended_device
def test_the_launches_of_a_write_do_not_grow_with_the_parameters():
    counts = []
    for layers in (2, 20):
        model = nn.Sequential(*(nn.Linear(5, 5) for _ in range(layers)))
        states = walk(model, 3)
        basis = Subspace(model.to(THERE), states)
        start, moved = basis.empty().fill_(1), basis.empty().fill_(2)
        before = pretend.counts["launches"]
        basis.assign(start, moved)
        flat = basis.flatten([p.detach() for p in basis.parameters])
        counts.append(pretend.counts["launches"] - before)
        assert (flat.cpu() == 3).all()
    assert counts[0] == counts[1]


@on_pretended_device
def test_divergence_is_said_with_the_next_line():
    model = small_net().to(THERE)
    model[4].bias.detach().fill_(math.nan)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = schedule_of(SCHEDULES["constant"], optimizer, 40)
    loader = digits(THERE, 200)
    trainer = Trainer(model, loader, loader, optimizer, scheduler, 1, print_every=4)
    with pytest.raises(Diverged, match=r"epoch 1/1, iteration 4: the loss is nan"):
        trainer.epoch(1)


# --- ranks ---


def on_two_ranks(script: str, folder: str) -> None:
    """What each of two ranks does; `script` only stands where `Ranks` has one."""
    pretend.install()
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    try:
        for granularity in ("model", "channel"):
            for bits in (32, 4):
                make = functools.partial(TWA, granularity=granularity, bits=bits)
                model = small_net()
                waits = waits_of_steps(make, model, 12, dist.group.WORLD)
                print(f"{granularity}, {bits} bits: {waits} waits")
                name = f"{granularity} {bits} {dist.get_rank()}.pt"
                torch.save([p.detach().cpu() for p in model.parameters()], Path(folder) / name)
    finally:
        dist.destroy_process_group()


def test_steps_of_two_ranks_wait_for_nothing_and_agree(tmp_path):
    (tmp_path / "ranks").mkdir()
    both = Ranks(tmp_path / "ranks", 2, "tests/none", tmp_path, run=on_two_ranks)
    results = both.end()
    assert both.status == 0, results[0].err
    for result in results:
        assert result.out.count(" 0 waits") == 4, result.out
    for first in tmp_path.glob("* 0.pt"):
        other = torch.load(str(first).replace(" 0.pt", " 1.pt"), weights_only=True)
        assert all(map(torch.equal, torch.load(first, weights_only=True), other))
