"""Models: sizes, names, initialisation, and the wiring of their blocks."""

import pytest
import torch
from torch import nn

import models
from utils import UserError

PARAMETERS = [
    ("VGG16", 10, 15_245_130),
    ("VGG16BN", 100, 15_299_748),
    ("VGG19BN", 100, 20_612_004),
    ("PreResNet20", 10, 272_282),
    ("PreResNet110", 10, 1_146_842),
    ("PreResNet164", 100, 1_726_388),
    ("ResNet18", 100, 11_220_132),
    ("WideResNet16x8", 10, 10_961_370),
    ("WideResNet28x10", 10, 36_479_194),
]


def build_on_meta(*args, **kwargs) -> nn.Module:
    """The shapes of a model without its weights."""
    with torch.device("meta"):
        return models.build(*args, **kwargs)


def parameter_names(name: str, num_classes: int = 10) -> list[str]:
    return [key for key, _ in build_on_meta(name, num_classes).named_parameters()]


def with_parameters(*layers: str, bias: bool) -> list[str]:
    return [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")[: 1 + bias]]


@pytest.mark.parametrize("name, classes, expected", PARAMETERS)
def test_parameter_counts(name, classes, expected):
    model = build_on_meta(name, classes)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


@pytest.mark.parametrize(
    "name, features",
    [
        ("VGG16", [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]),
        # Each convolution, then its batch norm.
        (
            "VGG16BN",
            [
                n
                for conv in (0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40)
                for n in (conv, conv + 1)
            ],
        ),
        ("VGG19", [0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28, 30, 32, 34]),
    ],
)
def test_vgg_names(name, features):
    layers = [f"features.{n}" for n in features] + [f"classifier.{n}" for n in (1, 4, 6)]
    assert parameter_names(name) == with_parameters(*layers, bias=True)
    classifier = build_on_meta(name, 10).classifier
    assert [i for i, layer in enumerate(classifier) if isinstance(layer, nn.Dropout)] == [0, 3]


@pytest.mark.parametrize(
    "name, blocks, convolutions", [("PreResNet20", 3, 2), ("PreResNet56", 6, 3)]
)
def test_preresnet_names(name, blocks, convolutions):
    expected = with_parameters("conv1", bias=False)
    for stage in (1, 2, 3):
        for block in range(blocks):
            prefix = f"layer{stage}.{block}"
            for n in range(1, convolutions + 1):
                expected += with_parameters(f"{prefix}.bn{n}", bias=True)
                expected += with_parameters(f"{prefix}.conv{n}", bias=False)
            # Bottlenecks widen the first stage already, basic blocks keep its 16 channels.
            if block == 0 and (stage > 1 or convolutions == 3):
                expected += with_parameters(f"{prefix}.downsample.0", bias=False)
    expected += with_parameters("bn", "fc", bias=True)
    assert parameter_names(name) == expected


@pytest.mark.parametrize(
    "name, blocks, convolutions",
    [("ResNet18", (2, 2, 2, 2), 2), ("ResNet34", (3, 4, 6, 3), 2), ("ResNet50", (3, 4, 6, 3), 3)],
)
def test_resnet_names(name, blocks, convolutions):
    expected = with_parameters("conv1.0", bias=False) + with_parameters("conv1.1", bias=True)
    for stage, count in enumerate(blocks, start=2):
        for block in range(count):
            prefix = f"conv{stage}_x.{block}"
            for n in range(convolutions):
                expected += with_parameters(f"{prefix}.residual_function.{3 * n}", bias=False)
                expected += with_parameters(f"{prefix}.residual_function.{3 * n + 1}", bias=True)
            if block == 0 and (stage > 2 or convolutions == 3):
                expected += with_parameters(f"{prefix}.shortcut.0", bias=False)
                expected += with_parameters(f"{prefix}.shortcut.1", bias=True)
    assert parameter_names(name) == expected + with_parameters("fc", bias=True)


@pytest.mark.parametrize("name, units", [("WideResNet16x8", 2), ("WideResNet28x10", 4)])
def test_wide_resnet_names(name, units):
    expected = with_parameters("f.0_convolution", bias=False)
    for stage in (1, 2, 3):
        prefix = f"f.{stage}_block.block"
        expected += with_parameters(f"{prefix}.0.norm_act.0_normalization", bias=True)
        expected += with_parameters(f"{prefix}.0.block.0_convolution", bias=False)
        expected += with_parameters(f"{prefix}.0.block.1_normalization", bias=True)
        expected += with_parameters(f"{prefix}.0.block.4_convolution", bias=False)
        expected += with_parameters(f"{prefix}.0.downsample", bias=False)
        for unit in range(1, units):
            expected += with_parameters(f"{prefix}.{unit}.block.0_normalization", bias=True)
            expected += with_parameters(f"{prefix}.{unit}.block.2_convolution", bias=False)
            expected += with_parameters(f"{prefix}.{unit}.block.3_normalization", bias=True)
            expected += with_parameters(f"{prefix}.{unit}.block.6_convolution", bias=False)
    expected += with_parameters("f.4_normalization", "f.8_classification", bias=True)
    assert parameter_names(name) == expected


@pytest.mark.parametrize("channels, size", [(1, 8), (1, 28), (3, 32), (3, 64)])
@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_every_size_gives_logits_or_one_line(name, channels, size):
    if name.startswith("VGG") and size < 32:
        with pytest.raises(UserError, match=rf"^{name} .*32x32.*{size}x{size}$"):
            build_on_meta(name, 7, channels, size)
        return
    model = build_on_meta(name, 7, channels, size)
    assert model(torch.empty(2, channels, size, size, device="meta")).shape == (2, 7)


def test_unknown_architecture():
    with pytest.raises(UserError, match=r"LeNet.*PreResNet20"):
        models.build("LeNet", 10)


@pytest.mark.parametrize(
    "name, size", [("VGG16BN", 32), ("PreResNet20", 8), ("ResNet18", 8), ("WideResNet16x8", 8)]
)
def test_every_parameter_is_trained(name, size):
    model = models.build(name, 10, 1, size)
    loss = model(torch.randn(2, 1, size, size)).logsumexp(1).sum()
    loss.backward()
    assert torch.isfinite(loss)
    assert [key for key, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", ["VGG16BN", "PreResNet110", "ResNet18", "WideResNet16x8"])
def test_he_initialisation(name):
    torch.manual_seed(0)
    for key, module in models.build(name, 10).named_modules():
        if not isinstance(module, nn.Conv2d):
            continue
        fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
        # The sample deviation of k normal numbers is off by 1 / sqrt(2 k), relatively.
        tolerance = 5 / (2 * module.weight.numel()) ** 0.5
        assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=tolerance), key
        assert module.bias is None or not module.bias.any()


def test_preresnet_shortcut_carries_the_input_before_activation():
    model = models.build("PreResNet20", 10).eval()
    x = torch.randn(2, 16, 8, 8)
    same, halving = model.layer1[0], model.layer2[0]
    nn.init.zeros_(same.conv2.weight)
    nn.init.zeros_(halving.conv2.weight)
    assert torch.equal(same(x), x)
    assert torch.equal(halving(x), halving.downsample[0](x))


def test_wide_resnet_shortcut_carries_the_activated_input_only_where_a_stage_opens():
    model = models.build("WideResNet16x8", 10).eval()
    opening, following = model.f.get_submodule("1_block").block
    nn.init.zeros_(opening.block.get_submodule("4_convolution").weight)
    nn.init.zeros_(following.block.get_submodule("6_convolution").weight)
    x = torch.randn(2, 16, 8, 8)
    activated = opening.norm_act.get_submodule("0_normalization")(x).relu()
    assert torch.equal(opening(x), opening.downsample(activated))
    x = torch.randn(2, 128, 8, 8)
    assert torch.equal(following(x), x)


@pytest.mark.parametrize("size, channels", [(8, 1), (28, 1), (32, 3)])
def test_vit_takes_images_of_any_multiple_of_its_patch(size, channels):
    model = models.build("ViT", 10, channels, size).eval()
    assert model.encoder.pos_embedding.shape == (1, (size // 4) ** 2 + 1, 512)
    with torch.no_grad():
        logits = model(torch.randn(2, channels, size, size))
    assert logits.shape == (2, 10)
    fan_in = channels * 4 * 4
    assert model.conv_proj.weight.std().item() == pytest.approx(fan_in**-0.5, rel=0.1)


def test_vit_refuses_images_that_its_patches_do_not_cover():
    with pytest.raises(UserError, match="30x30"):
        models.build("ViT", 10, 3, 30)


def test_resnet18_is_the_papers_network_on_small_images_and_torchvisions_on_image_folders():
    paper = models.build("resnet18", 100)
    assert sum(p.numel() for p in paper.parameters()) == 11_220_132
    assert paper.state_dict().keys() == models.build("ResNet18", 100).state_dict().keys()
    assert models.imagenet.build("resnet18", 1000, 64).conv1.kernel_size == (7, 7)


def test_torchvision_models_take_small_grey_images_and_pretrained_weights(monkeypatch):
    model = models.build("resnet18_224", 10).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 1, 28, 28)).shape == (1, 10)
    pretrained = models.imagenet.get_model("resnet18")  # 1000 classes, other random weights
    monkeypatch.setattr(models.imagenet, "get_model", lambda name, weights: pretrained)
    head = model.fc.weight.clone()
    models.imagenet.load_pretrained(model, "resnet18_224")
    assert torch.equal(model.fc.weight, head)
    assert torch.equal(model.layer4[1].conv2.weight, pretrained.layer4[1].conv2.weight)
