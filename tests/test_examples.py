"""`examples/`, and TWA in other people's loops: resumed and clipped as any optimizer there."""

import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from twa import TWA

ROOT = Path(__file__).resolve().parents[1]
NEEDS = {
    "plain_loop": (),
    "accelerate_loop": ("accelerate",),
    "huggingface_trainer": ("transformers", "accelerate"),
    "lightning_module": ("lightning",),
    "lora": ("transformers", "peft"),
    "timm_model": ("timm",),
}
OTHERS = {"nbclient", "nbformat", "ipykernel", "tensorboard"}  # of test_notebook, test_trackers
EPOCHS, BATCHES = 4, 3

pytestmark = [pytest.mark.examples, pytest.mark.usefixtures("one_thread")]


def need(*packages: str) -> list:
    reason = "pip install -r requirements-examples.txt"
    return [pytest.importorskip(name, reason=f"needs {name}: {reason}") for name in packages]


def test_every_example_is_tested():
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == NEEDS.keys()


def test_the_packages_are_those_of_the_requirements():
    listed = re.findall(r"^[\w-]+", (ROOT / "requirements-examples.txt").read_text(), re.M)
    assert set(listed) == {package for needed in NEEDS.values() for package in needed} | OTHERS


@pytest.mark.parametrize("name", NEEDS)
def test_an_example_gains_over_its_start_point(name, monkeypatch, tmp_path, capfd):
    need(*NEEDS[name])
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "argv", [name])
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    said = capfd.readouterr().out
    start, end = map(float, re.search(r"held-out loss ([\d.]+) -> ([\d.]+)", said).groups())
    assert end < start
    if name == "huggingface_trainer":
        assert "alpha/0" in said


# --- resumed = uninterrupted, to the bit, with batch norm ---


class Network(nn.Module):
    """Returns a dictionary with the loss, as the Trainer of Hugging Face wants it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)

    def forward(self, x, labels):
        logits = self.body(x) + self.frozen
        return {"loss": cross_entropy(logits, labels), "logits": logits}


def window() -> list[dict]:
    states, generator = [], torch.Generator().manual_seed(1)
    for _ in range(5):
        state = {key: value.clone() for key, value in Network().state_dict().items()}
        for value in state.values():
            if value.is_floating_point():
                value += 0.1 * torch.randn(value.shape, generator=generator).abs()
        states.append(state)
    return states


def dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(BATCHES * 8, 6, generator=generator)
    return TensorDataset(x, torch.randint(3, (len(x),), generator=generator))


def weights(state: dict) -> torch.Tensor:
    return torch.cat([value.double().flatten() for value in state.values()])


def assert_same(actual: nn.Module, expected: nn.Module):
    expected = expected.state_dict()
    assert actual.state_dict().keys() == expected.keys()
    for key, value in actual.state_dict().items():
        assert torch.equal(value, expected[key]), key


def assert_moved(model: nn.Module):
    """The run did something: weights and statistics are not those of the start point."""
    mean = Network()
    TWA(mean, window())
    for key in ("body.0.weight", "body.1.running_mean"):
        assert not torch.allclose(model.state_dict()[key], mean.state_dict()[key], atol=1e-4)


def test_the_trainer_of_hugging_face_resumes_and_takes_the_class(tmp_path):
    (transformers,) = need("transformers", "accelerate")[:1]

    def run(folder: str, **options) -> nn.Module:
        model = Network()
        arguments = transformers.TrainingArguments(
            str(tmp_path / folder),
            per_device_train_batch_size=8,
            num_train_epochs=EPOCHS,
            learning_rate=0.02,
            save_strategy="epoch",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = transformers.Trainer(
            model,
            arguments,
            train_dataset=[{"x": x, "labels": y} for x, y in dataset()],
            optimizer_cls_and_kwargs=(TWA, {"model": model, "checkpoints": window()}),
        )
        trainer.train(**options)
        return model

    expected = run("whole")
    middle = tmp_path / "whole" / f"checkpoint-{2 * BATCHES}"
    assert_same(run("resumed", resume_from_checkpoint=str(middle)), expected)
    assert_moved(expected)


@pytest.fixture
def lightning_run(tmp_path):
    """Runs Lightning's Trainer on a module with TWA, and returns its network."""
    (lightning,) = need("lightning")

    class Module(lightning.LightningModule):
        def __init__(self, twa: dict):
            super().__init__()
            self.network, self.twa = Network(), twa

        def training_step(self, batch, _):
            return self.network(*batch)["loss"]

        def configure_optimizers(self):
            optimizer = TWA(self.network, window(), **self.twa)
            scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, EPOCHS)
            return [optimizer], [scheduler]

    def run(twa: dict, ckpt_path=None, **options) -> nn.Module:
        keep_all = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        module = Module(twa)
        trainer = lightning.Trainer(
            max_epochs=EPOCHS,
            accelerator="cpu",
            callbacks=[keep_all],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **options,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(module, DataLoader(dataset(), 8), ckpt_path=ckpt_path)
        return module.network

    return run


def test_lightning_resumes(lightning_run, tmp_path):
    expected = lightning_run({}, gradient_clip_val=0.5)
    resumed = lightning_run({}, gradient_clip_val=0.5, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert_same(resumed, expected)
    assert_moved(expected)


def test_lightning_clips_the_gradient_of_the_model(lightning_run):
    start = Network()
    TWA(start, window())
    rate = {"base": torch.optim.SGD, "lr": 0.1}
    moved, stopped = (
        (weights(model.body.state_dict()) - weights(start.body.state_dict()))[:48].norm()
        for model in (lightning_run(rate), lightning_run(rate, gradient_clip_val=1e-9))
    )
    assert moved > 1e-3 and stopped < 1e-6


def test_accelerate_resumes(tmp_path):
    (accelerate,) = need("accelerate")

    def prepared():
        accelerator = accelerate.Accelerator(cpu=True)
        model = Network()
        optimizer = TWA(model, window())
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, EPOCHS * BATCHES)
        loader = DataLoader(dataset(), 8)
        return accelerator, *accelerator.prepare(model, optimizer, scheduler, loader)

    def train(accelerator, model, optimizer, scheduler, loader, epochs) -> nn.Module:
        for _ in range(epochs):
            for batch in loader:
                accelerator.backward(model(*batch)["loss"])
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        return model

    whole = prepared()
    train(*whole, epochs=2)
    whole[0].save_state(tmp_path)
    expected = train(*whole, epochs=2)
    resumed = prepared()
    resumed[0].load_state(tmp_path)
    assert_same(train(*resumed, epochs=2), expected)
    assert_moved(expected)


def test_fsdp2_through_accelerate_is_one_process_and_resumes(tmp_path):
    """By `load_state`, and by torch.distributed.checkpoint's states, whole and sharded."""
    need("accelerate")
    script = str(Path(__file__).with_name("fsdp2_ranks.py"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for command in ([sys.executable], launch):
        command = [*command, script, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / f"{ranks}.pt", weights_only=True) for ranks in (1, 2))
    start, end = one["start"], one["uninterrupted"]
    way = weights(end) - weights(start)
    assert way.norm() > 1e-3
    assert (weights(two["uninterrupted"]) - weights(end)).norm() < 1e-4 * way.norm()
    for found in (one, two):
        resumed = found.keys() - {"start", "uninterrupted"}
        assert len(resumed) == 3
        for name in resumed:
            for key, value in found["uninterrupted"].items():
                assert torch.equal(found[name][key], value), (name, key)
