"""What `twa average` writes, loaded by transformers, PEFT and Lightning themselves."""

import copy

import pytest
import torch
from test_average import run
from test_examples import need
from torch import nn

pytestmark = pytest.mark.examples


def moved(module: nn.Module, seed: int) -> nn.Module:
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draws).to(parameter.dtype))
    return module


def assert_mean(found: nn.Module, models: list[nn.Module]) -> None:
    states = [model.state_dict() for model in models]
    for name, value in found.state_dict().items():
        expected = sum(state[name].double() for state in states) / len(states)
        assert torch.equal(value, expected.to(value.dtype)), name


@pytest.mark.parametrize("shard", ["5GB", "8KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_loads_a_folder_with_tied_weights_and_shards(tmp_path, capsys, shard, dtype):
    (transformers,) = need("transformers")
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=99, n_positions=8)
    models = [moved(transformers.GPT2LMHeadModel(config).to(dtype), seed) for seed in range(3)]
    for step, model in enumerate(models):
        model.save_pretrained(tmp_path / f"checkpoint-{step}", max_shard_size=shard)
    shards = len(list((tmp_path / "checkpoint-0").glob("*.safetensors")))
    assert (shards == 1) == (shard == "5GB")
    assert run(capsys, tmp_path, "-o", tmp_path / "out", "--last", 3)[0] == 0
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert found.dtype == dtype
    assert_mean(found, models)
    assert found.lm_head.weight is found.transformer.wte.weight


def test_peft_loads_a_folder_of_an_adapter(tmp_path, capsys):
    transformers, peft = need("transformers", "peft")
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=99, n_positions=8)
    base = transformers.GPT2LMHeadModel(config)
    lora = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    models = []
    for step in range(2):
        model = peft.get_peft_model(copy.deepcopy(base), lora)
        for name, parameter in model.named_parameters():
            if "lora" in name:
                nn.init.normal_(parameter)
        model.save_pretrained(tmp_path / f"checkpoint-{step}")
        models.append(model)
    assert run(capsys, tmp_path, "-o", tmp_path / "out", "--last", 2)[0] == 0
    found = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out")
    assert_mean(found, models)


def test_lightning_loads_a_checkpoint(tmp_path, capsys):
    (lightning,) = need("lightning")

    class Module(lightning.LightningModule):
        def __init__(self, width: int):
            super().__init__()
            self.save_hyperparameters()
            self.layer = nn.Linear(width, 3)

        def training_step(self, batch, _):
            return self.layer(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.1)

    saving = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path / "run", save_top_k=-1)
    trainer = lightning.Trainer(
        max_epochs=3, callbacks=[saving], logger=False, accelerator="cpu", enable_progress_bar=False
    )
    trainer.fit(Module(4), torch.utils.data.DataLoader(torch.randn(8, 4), batch_size=4))
    paths = sorted((tmp_path / "run").iterdir())
    assert len(paths) == 3
    assert run(capsys, tmp_path / "run", "-o", tmp_path / "out.ckpt", "--last", 3)[0] == 0
    assert_mean(
        Module.load_from_checkpoint(tmp_path / "out.ckpt"),
        [Module.load_from_checkpoint(path) for path in paths],
    )
