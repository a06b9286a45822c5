"""WideResNet (Zagoruyko and Komodakis, 2016, arXiv:1605.07146) without dropout.

The numbers in the names of the modules skip the dropout layers of the paper's release.
"""

from collections import OrderedDict

from torch import Tensor, nn

from models.initialisation import he_normal_


class _FirstUnit(nn.Module):
    """The first unit of a stage: both of its paths start from the activated input."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.norm_act = _named(("0_normalization", nn.BatchNorm2d(in_channels)), _relu(1))
        self.block = _named(
            ("0_convolution", _conv3x3(in_channels, out_channels, stride)),
            ("1_normalization", nn.BatchNorm2d(out_channels)),
            _relu(2),
            ("4_convolution", _conv3x3(out_channels, out_channels)),
        )
        self.downsample = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm_act(x)
        return self.block(x) + self.downsample(x)


class _Unit(nn.Module):
    """Any other unit: the shape does not change, and the shortcut is the identity."""

    def __init__(self, channels: int):
        super().__init__()
        self.block = _named(
            ("0_normalization", nn.BatchNorm2d(channels)),
            _relu(1),
            ("2_convolution", _conv3x3(channels, channels)),
            ("3_normalization", nn.BatchNorm2d(channels)),
            _relu(4),
            ("6_convolution", _conv3x3(channels, channels)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


def _named(*modules: tuple[str, nn.Module]) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))


def _relu(number: int) -> tuple[str, nn.Module]:
    return f"{number}_activation", nn.ReLU()


def _conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)


class WideResNet(nn.Module):
    """Three stages of 16k, 32k and 64k channels, then a global average and one linear layer.

    A stage has n units. The paper's release adds a unit to each stage, so that its checkpoints do
    not load.

    Args:
        depth: 6n + 4.
        width: the factor k.
        num_classes: number of logits.
        in_channels: channels of the images.
    """

    def __init__(self, depth: int, width: int, num_classes: int, in_channels: int):
        super().__init__()

        def stage(number: int, in_channels: int, stride: int) -> tuple[str, nn.Module]:
            channels, others = 8 * width * 2**number, (depth - 4) // 6 - 1
            units = [_FirstUnit(in_channels, channels, stride)]
            units += [_Unit(channels) for _ in range(others)]
            return f"{number}_block", _named(("block", nn.Sequential(*units)))

        self.f = _named(
            ("0_convolution", _conv3x3(in_channels, 16)),
            stage(1, 16, 1),
            stage(2, 16 * width, 2),
            stage(3, 32 * width, 2),
            ("4_normalization", nn.BatchNorm2d(64 * width)),
            _relu(5),
            ("6_pooling", nn.AdaptiveAvgPool2d(1)),
            ("7_flattening", nn.Flatten()),
            ("8_classification", nn.Linear(64 * width, num_classes)),
        )
        he_normal_(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x)
