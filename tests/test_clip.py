"""CLIP's encoder with a classifier: its size and names, its outputs, and soups of image folders."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_soup import call, error_of
from torch import nn

import models
from models import clip
from soup import soup
from training import image_folders
from training.files import save

TINY = {"patch": 8, "width": 32, "layers": 2, "heads": 2, "features": 16}
CLASSES, SIZE = 3, 32

pytestmark = pytest.mark.usefixtures("one_thread")


def tiny() -> nn.Module:
    return clip.Classifier(CLASSES, SIZE, **TINY)


def make() -> nn.Module:
    """For `--model-factory`."""
    return tiny()


def test_weights_and_names_are_those_of_the_models_of_model_soups():
    with torch.device("meta"):
        model = clip.build("clip-vit-b32", 1000, 224)
    # 113,961,705 are in a file of theirs, 25,599,489 of these in the text encoder:
    text = 49408 * 512 + 77 * 512 + 512 * 512 + 2 * 512 + 1
    assert sum(p.numel() for p in model.parameters()) == 113_961_705 - text
    block = "model.visual.transformer.resblocks.11"
    wanted = {
        *("class_embedding", "positional_embedding", "conv1.weight", "ln_pre.bias", "proj"),
        *("ln_post.weight", "transformer.resblocks.0.ln_1.weight"),
    }
    names = {f"model.visual.{name}" for name in wanted}
    names |= {f"{block}.attn.{name}" for name in ("in_proj_weight", "in_proj_bias")}
    names |= {f"{block}.attn.out_proj.weight", f"{block}.mlp.c_fc.bias", f"{block}.mlp.c_proj.bias"}
    names |= {"classification_head.weight", "classification_head.bias"}
    assert names < model.state_dict().keys() == dict(model.named_parameters()).keys()


def test_images_are_normalised_as_for_clip():
    spec_mean, spec_std = image_folders._MEAN, image_folders._STD
    model, images = tiny(), torch.rand(2, 3, SIZE, SIZE)
    given = []
    model.model.visual.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))

    def normalised(mean, std) -> torch.Tensor:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
        return (images - mean) / std

    model(normalised(spec_mean, spec_std))
    clips = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    torch.testing.assert_close(given[0], normalised(*clips), rtol=1e-4, atol=1e-5)


@pytest.mark.examples
def test_features_equal_those_of_transformers():
    reason = "needs transformers: pip install -r requirements-examples.txt"
    transformers = pytest.importorskip("transformers", reason=reason)
    encoder = clip.Encoder(SIZE, **TINY).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in encoder.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    config = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=128,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=8,
        hidden_act="quick_gelu",
    )
    theirs = transformers.CLIPVisionModelWithProjection(config).eval()
    ours = encoder.state_dict()
    names = {"class_embedding": "embeddings.class_embedding", "ln_pre": "pre_layrnorm"}
    names |= {"conv1": "embeddings.patch_embedding", "ln_post": "post_layernorm"}
    names |= {"positional_embedding": "embeddings.position_embedding.weight"}
    renamed = {"visual_projection.weight": ours.pop("proj").T}
    for key, value in ours.items():
        for old, new in names.items():
            key = key.replace(old, new) if key.startswith(old) else key
        key = key.replace("transformer.resblocks", "encoder.layers").replace("ln_", "layer_norm")
        key = key.replace("c_fc", "fc1").replace("c_proj", "fc2").replace("attn.", "self_attn.")
        if "in_proj_" in key:
            for part, third in zip("qkv", value.chunk(3), strict=True):
                renamed["vision_model." + key.replace("in_proj_", f"{part}_proj.")] = third
        else:
            renamed["vision_model." + key] = value
    missing = theirs.load_state_dict(renamed, strict=False)
    assert not missing.missing_keys and not missing.unexpected_keys
    images = torch.randn(3, 3, SIZE, SIZE, generator=generator)
    with torch.no_grad():
        expected = theirs(pixel_values=images).image_embeds
        torch.testing.assert_close(encoder(images), expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Images of three colours, and three fine-tuned models with a text encoder."""
    root = tmp_path_factory.mktemp("clip")
    draw = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 4)):
        for label in range(CLASSES):
            for i in range(count):
                pixels = draw.integers(0, 120, (40, 40, 3), dtype=np.uint8)
                pixels[..., label] += 100
                file = root / "images" / part / str(label) / f"{i}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(file)
    for i in range(3):
        torch.manual_seed(0)
        state = tiny().state_dict()
        torch.manual_seed(i)
        state = {key: value + 0.05 * torch.randn_like(value) for key, value in state.items()}
        text = {"ln_final.weight": torch.ones(8), "token_embedding.weight": torch.randn(50, 8)}
        text |= {"positional_embedding": torch.randn(7, 8), "logit_scale": torch.ones(())}
        save(state | {f"model.{key}": value for key, value in text.items()}, root / f"{i}.pt")
    return root


def arguments(folder: Path, out: Path) -> list:
    data = ["--datasets", "ImageNet", "--data-dir", folder / "images", "--image-size", SIZE]
    data += ["--workers", 0, "--batch-size", 8, "--val-ratio", 25, "--device", "cpu"]
    return [*data, "--checkpoints", folder / "*.pt", "--log-dir", out, "--epochs", 2]


def test_soups_of_an_image_folder_leave_the_text_encoder_out(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(clip.NAMES, "clip-vit-b32", TINY)
    flags = ["--arch", "clip-vit-b32", "--twa", "v", "--bits", 4]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(soup, *arguments(folder, tmp_path), *flags)
    told = [str(w.message) for w in caught if "ignored in the checkpoints" in str(w.message)]
    assert len(told) == 1 and "model.token_embedding.weight" in told[0]
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    records = {record["name"]: record for record in map(json.loads, lines)}
    losses = [records[name]["validation"]["loss"] for name in ("TWA-v 4 bits", "uniform")]
    assert losses[0] < losses[1]
    states = [torch.load(path, weights_only=True) for path in sorted(folder.glob("*.pt"))]
    made = torch.load(tmp_path / "uniform.pt", weights_only=True)
    assert made.keys() == tiny().state_dict().keys() < states[0].keys()
    for key, value in made.items():
        mean = sum(state[key].double() for state in states) / 3
        torch.testing.assert_close(value.double(), mean, rtol=1e-6, atol=1e-6)


def test_the_ensemble_of_an_image_folder_equals_a_plain_computation(folder, tmp_path):
    call(soup, *arguments(folder, tmp_path), "--model-factory", "tests.test_clip:make", "--twa")
    _, test = image_folders.load(folder / "images", SIZE)
    device = torch.device("cpu")
    loader = image_folders.Loader(test, 100, train=False, device=device, workers=0)
    (images, labels), *more = loader
    assert not more
    logits = torch.zeros(len(labels), CLASSES)
    for path in sorted(folder.glob("*.pt")):
        model, state = tiny(), torch.load(path, weights_only=True)
        model.load_state_dict(state, strict=False)
        with torch.no_grad():
            logits += model.eval()(images) / 3
    expected = nn.functional.cross_entropy(logits, labels).item()
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    (found,) = (r for r in map(json.loads, lines) if r["name"] == "ensemble")
    assert found["test"]["loss"] == pytest.approx(expected, rel=1e-4)


def test_flags_and_models_of_image_folders_are_refused_elsewhere(folder, tmp_path, capsys):
    digits = ["--datasets", "Digits", "--checkpoints", folder / "*.pt", "--log-dir", tmp_path / "a"]
    for flags in (["--image-size", 64], ["--strict-images"]):
        assert "--datasets ImageNet" in error_of(capsys, soup, *digits, *flags)
    assert "clip-vit-b32" in error_of(capsys, soup, *digits, "--arch", "clip-vit-b32")
    with pytest.raises(models.UserError, match="give another --image-size"):
        models.imagenet.build("clip-vit-b32", 3, 16)
