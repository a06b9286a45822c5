"""PreResNet: ResNet with pre-activation (He et al., 2016, arXiv:1603.05027), for CIFAR."""

from torch import Tensor, nn
from torch.nn import functional as F

from models.initialisation import he_normal_


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions, each after batch norm and ReLU, plus a shortcut."""

    expansion = 1

    def __init__(self, in_channels: int, planes: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, planes, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.downsample = _shortcut(in_channels, planes * self.expansion, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(F.relu(self.bn2(out)))
        return out + self.downsample(x)


class _Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, each after batch norm and ReLU, plus a shortcut."""

    expansion = 4

    def __init__(self, in_channels: int, planes: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, planes, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, planes * self.expansion, 1, bias=False)
        self.downsample = _shortcut(in_channels, planes * self.expansion, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(F.relu(self.bn2(out)))
        out = self.conv3(F.relu(self.bn3(out)))
        return out + self.downsample(x)


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """The identity (empty) where the shape does not change, else a 1x1 convolution."""
    if stride == 1 and in_channels == out_channels:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False))


class PreResNet(nn.Module):
    """Three stages of 16, 32 and 64 planes, then a global average and one linear layer.

    Args:
        depth: 6n + 2 below 44 (basic blocks), 9n + 2 from there on (bottlenecks); n blocks a stage.
        num_classes: number of logits.
        in_channels: channels of the images.
    """

    def __init__(self, depth: int, num_classes: int, in_channels: int):
        super().__init__()
        block, layers = (_Bottleneck, 9) if depth >= 44 else (_BasicBlock, 6)
        blocks = (depth - 2) // layers

        def stage(in_channels: int, planes: int, stride: int) -> nn.Sequential:
            first = block(in_channels, planes, stride)
            rest = (block(planes * block.expansion, planes, 1) for _ in range(blocks - 1))
            return nn.Sequential(first, *rest)

        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.layer1 = stage(16, 16, stride=1)
        self.layer2 = stage(16 * block.expansion, 32, stride=2)
        self.layer3 = stage(32 * block.expansion, 64, stride=2)
        self.bn = nn.BatchNorm2d(64 * block.expansion)
        self.fc = nn.Linear(64 * block.expansion, num_classes)
        he_normal_(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.fc(F.relu(self.bn(x)).mean((2, 3)))
