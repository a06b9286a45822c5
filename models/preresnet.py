"""PreResNet: ResNet with pre-activation (He et al., 2016, arXiv:1603.05027), for CIFAR."""

from torch import Tensor, nn
from torch.nn import functional as F

from models.initialisation import he_normal_


class _Block(nn.Module):
    """Convolutions, each after batch norm and ReLU, plus a shortcut.

    They are two of 3x3, or in a bottleneck 1x1, 3x3 and 1x1.
    """

    def __init__(self, in_channels: int, planes: int, stride: int, bottleneck: bool):
        super().__init__()
        shapes = [(in_channels, planes, 3, stride), (planes, planes, 3, 1)]
        if bottleneck:
            shapes = [(in_channels, planes, 1, 1), (planes, planes, 3, stride)]
            shapes.append((planes, 4 * planes, 1, 1))
        self.layers = range(1, len(shapes) + 1)
        for i, (width, out_channels, size, step) in zip(self.layers, shapes, strict=True):
            self.add_module(f"bn{i}", nn.BatchNorm2d(width))
            conv = nn.Conv2d(width, out_channels, size, step, padding=size // 2, bias=False)
            self.add_module(f"conv{i}", conv)
        self.downsample = nn.Sequential()  # the identity where the shape does not change
        if stride != 1 or in_channels != out_channels:
            self.downsample.append(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for i in self.layers:
            out = getattr(self, f"conv{i}")(F.relu(getattr(self, f"bn{i}")(out)))
        return out + self.downsample(x)


class PreResNet(nn.Module):
    """Three stages of 16, 32 and 64 planes, then a global average and one linear layer.

    Args:
        depth: 6n + 2 below 44 (basic blocks), 9n + 2 from there on (bottlenecks); n blocks a stage.
        num_classes: number of logits.
        in_channels: channels of the images.
    """

    def __init__(self, depth: int, num_classes: int, in_channels: int):
        super().__init__()
        bottleneck = depth >= 44
        blocks, expansion = ((depth - 2) // 9, 4) if bottleneck else ((depth - 2) // 6, 1)

        def stage(in_channels: int, planes: int, stride: int) -> nn.Sequential:
            first = _Block(in_channels, planes, stride, bottleneck)
            rest = (_Block(planes * expansion, planes, 1, bottleneck) for _ in range(blocks - 1))
            return nn.Sequential(first, *rest)

        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.layer1 = stage(16, 16, stride=1)
        self.layer2 = stage(16 * expansion, 32, stride=2)
        self.layer3 = stage(32 * expansion, 64, stride=2)
        self.bn = nn.BatchNorm2d(64 * expansion)
        self.fc = nn.Linear(64 * expansion, num_classes)
        he_normal_(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.fc(F.relu(self.bn(x)).mean((2, 3)))
