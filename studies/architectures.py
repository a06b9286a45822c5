"""Small architectures for the studies: `--model-factory studies.architectures:vit`.

They take FashionMNIST's images, 28×28 and grey; unlike PreResNet20 they have no batch
norm, so that nothing has to be re-estimated.
"""

from torch import nn
from torchvision.models import VisionTransformer


def vit() -> nn.Module:
    """A vision transformer: 16 patches of 7×7, 4 layers of width 64, 0.14 M weights."""
    model = VisionTransformer(28, 7, 4, 4, 64, 128, num_classes=10)
    model.conv_proj = nn.Conv2d(1, 64, 7, 7)
    return model


def cnn() -> nn.Module:
    """A convolutional network with group norm: three stages, 0.07 M weights."""

    def stage(inputs: int, outputs: int) -> list[nn.Module]:
        layers: list[nn.Module] = []
        for channels in (inputs, outputs):
            layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False)]
            layers += [nn.GroupNorm(4, outputs), nn.ReLU()]
        return [*layers, nn.MaxPool2d(2)]

    return nn.Sequential(
        *(*stage(1, 16), *stage(16, 32), *stage(32, 64)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
    )


def vgg() -> nn.Module:
    """VGG16 with batch norm at half its width and with one linear layer, 3.7 M weights."""
    layers: list[nn.Module] = []
    inputs = 1
    for width, convolutions in zip((32, 64, 128, 256, 256), (2, 2, 3, 3, 3), strict=True):
        for _ in range(convolutions):
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            inputs = width
        layers.append(nn.MaxPool2d(2, ceil_mode=True))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(inputs, 10))
