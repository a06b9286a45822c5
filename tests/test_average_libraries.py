"""What `twa average` writes, loaded by transformers, PEFT and Lightning themselves."""

import copy

import pytest
import torch
from test_average import refused, run
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


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"c_fc": 5}, "alpha_pattern": {"h.0.attn.c_attn": 7}},
        {"bias": "lora_only", "modules_to_save": ["ln_f"]},
    ],
)
def test_the_mean_of_adapters_is_that_of_their_products(tmp_path, capsys, how):
    """By PEFT's own merge; the adapters have different ranks and scalings."""
    transformers, peft = need("transformers", "peft")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=99, n_positions=8)
    base, merged = transformers.GPT2LMHeadModel(config), []
    for step, (rank, alpha) in enumerate([(2, 4), (3, 16), (2, 1)]):
        settings = {"r": rank, "lora_alpha": alpha, "target_modules": ["c_attn", "c_fc", "wte"]}
        lora = peft.LoraConfig(**settings | how, fan_in_fan_out=True)
        model = peft.get_peft_model(copy.deepcopy(base), lora)
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(tmp_path / f"checkpoint-{step}")
        merged.append(model.merge_and_unload())
    assert run(capsys, tmp_path, "-o", tmp_path / "out", "--last", 3)[0] == 0
    found = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out").merge_and_unload()
    states = [model.state_dict() for model in merged]
    for name, value in found.state_dict().items():
        expected = sum(state[name].double() for state in states) / 3
        torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-5, msg=name)


def test_adapters_of_a_smaller_rank_and_of_other_kinds(tmp_path, capsys):
    transformers, peft = need("transformers", "peft")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=99, n_positions=8)
    base = transformers.GPT2LMHeadModel(config)
    products = []
    for step in range(3):
        lora = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
        model = peft.get_peft_model(copy.deepcopy(base), lora)
        for name, parameter in model.named_parameters():
            if "lora" in name:
                nn.init.normal_(parameter)
        model.save_pretrained(tmp_path / f"checkpoint-{step}")
        layer = model.base_model.model.transformer.h[0].attn.c_attn
        products.append(layer.get_delta_weight("default").detach().double())
    exact = sum(products) / 3
    status, out, _ = run(capsys, tmp_path, "-o", tmp_path / "out", "--last", 3, "--rank", 3)
    assert status == 0
    found = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out")
    layer = found.base_model.model.transformer.h[0].attn.c_attn
    u, s, v = torch.linalg.svd(exact)
    best = (u[:, :3] * s[:3]) @ v[:3]
    delta = layer.get_delta_weight("default").detach().double()
    torch.testing.assert_close(delta, best, rtol=1e-4, atol=1e-5)
    error = 100 * float((exact - best).norm() / exact.norm())
    assert f"rank 3 leaves out {error:.2f} %" in out
    dora = peft.LoraConfig(r=2, target_modules=["c_attn"], use_dora=True, fan_in_fan_out=True)
    paths = [tmp_path / "dora/0", tmp_path / "dora/1"]
    for path in paths:
        peft.get_peft_model(copy.deepcopy(base), dora).save_pretrained(path)
    assert "is an adapter of DoRA" in refused(capsys, *paths, "-o", tmp_path / "new")


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
