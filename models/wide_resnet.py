"""WideResNet (Zagoruyko and Komodakis, 2016, arXiv:1605.07146) without dropout."""

from collections import OrderedDict

from torch import Tensor, nn

from models.initialisation import he_normal_

# The numbers in the names of the modules leave out the dropout layers of the paper's release.


class _DownsampleUnit(nn.Module):
    """The first unit of a stage: both of its paths start from the activated input."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.norm_act = _sequential(
            {"0_normalization": nn.BatchNorm2d(in_channels), "1_activation": nn.ReLU()}
        )
        self.block = _sequential(
            {
                "0_convolution": _conv3x3(in_channels, out_channels, stride),
                "1_normalization": nn.BatchNorm2d(out_channels),
                "2_activation": nn.ReLU(),
                "4_convolution": _conv3x3(out_channels, out_channels),
            }
        )
        self.downsample = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm_act(x)
        return self.block(x) + self.downsample(x)


class _BasicUnit(nn.Module):
    """Any other unit: the shape does not change, and the shortcut is the identity."""

    def __init__(self, channels: int):
        super().__init__()
        self.block = _sequential(
            {
                "0_normalization": nn.BatchNorm2d(channels),
                "1_activation": nn.ReLU(),
                "2_convolution": _conv3x3(channels, channels),
                "3_normalization": nn.BatchNorm2d(channels),
                "4_activation": nn.ReLU(),
                "6_convolution": _conv3x3(channels, channels),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


def _sequential(modules: dict[str, nn.Module]) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))


def _conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)


class _Stage(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int, units: int):
        super().__init__()
        self.block = nn.Sequential(
            _DownsampleUnit(in_channels, out_channels, stride),
            *(_BasicUnit(out_channels) for _ in range(units - 1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


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
        units = (depth - 4) // 6
        self.f = _sequential(
            {
                "0_convolution": _conv3x3(in_channels, 16),
                "1_block": _Stage(16, 16 * width, 1, units),
                "2_block": _Stage(16 * width, 32 * width, 2, units),
                "3_block": _Stage(32 * width, 64 * width, 2, units),
                "4_normalization": nn.BatchNorm2d(64 * width),
                "5_activation": nn.ReLU(),
                "6_pooling": nn.AdaptiveAvgPool2d(1),
                "7_flattening": nn.Flatten(),
                "8_classification": nn.Linear(64 * width, num_classes),
            }
        )
        he_normal_(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x)
