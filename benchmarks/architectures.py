"""Small architectures for the studies: `--model-factory benchmarks.architectures:vit`.

They take FashionMNIST's images, 28×28 and grey; unlike PreResNet20 they have no batch norm.
"""

from torch import nn
from torchvision.models import VisionTransformer


def vit() -> nn.Module:
    """A vision transformer: 16 patches of 7×7, 4 layers of width 64, 0.14 M weights."""
    model = VisionTransformer(28, 7, 4, 4, 64, 128, num_classes=10)
    model.conv_proj = nn.Conv2d(1, 64, 7, 7)
    return model


def cnn() -> nn.Module:
    """A convolutional network without normalisation: three stages, 0.07 M weights."""

    def stage(inputs: int, outputs: int) -> list[nn.Module]:
        convolutions = (nn.Conv2d(i, outputs, 3, padding=1) for i in (inputs, outputs))
        return [layer for c in convolutions for layer in (c, nn.ReLU())] + [nn.MaxPool2d(2)]

    model = nn.Sequential(
        *(*stage(1, 16), *stage(16, 32), *stage(32, 64)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
    )
    for module in model:
        if isinstance(module, nn.Conv2d):  # Without normalisation the signal must keep its size.
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return model
