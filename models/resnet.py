"""ResNet (He et al., 2016, arXiv:1512.03385) for CIFAR: it starts with a single 3x3 convolution."""

from torch import Tensor, nn
from torch.nn import functional as F

from models.initialisation import he_normal_

# depth: (whether its blocks are bottlenecks, blocks in each of the four stages)
_LAYOUTS = {18: (False, (2, 2, 2, 2)), 34: (False, (3, 4, 6, 3)), 50: (True, (3, 4, 6, 3))}


class _Block(nn.Module):
    """Convolutions and batch norms, plus a shortcut."""

    def __init__(self, in_channels: int, width: int, out_channels: int, stride: int):
        super().__init__()
        shapes = [(in_channels, width, 3, stride), (width, width, 3, 1)]
        if out_channels != width:  # a bottleneck
            shapes = [(in_channels, width, 1, 1), (width, width, 3, stride)]
            shapes.append((width, out_channels, 1, 1))
        layers: list[nn.Module] = []
        for given, made, size, step in shapes:
            layers.append(nn.Conv2d(given, made, size, step, padding=size // 2, bias=False))
            layers += [nn.BatchNorm2d(made), nn.ReLU()]
        self.residual_function = nn.Sequential(*layers[:-1])
        self.shortcut = nn.Sequential()  # the identity where the shape does not change
        if stride != 1 or in_channels != out_channels:
            self.shortcut.append(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.residual_function(x) + self.shortcut(x))


class ResNet(nn.Module):
    """Four stages of 64, 128, 256 and 512 planes, then a global average and one linear layer.

    Args:
        depth: 18, 34 or 50.
        num_classes: number of logits.
        in_channels: channels of the images.
    """

    def __init__(self, depth: int, num_classes: int, in_channels: int):
        super().__init__()
        bottleneck, blocks = _LAYOUTS[depth]
        expansion = 4 if bottleneck else 1

        def stage(in_channels: int, width: int, count: int, stride: int) -> nn.Sequential:
            out_channels = width * expansion
            first = _Block(in_channels, width, out_channels, stride)
            rest = (_Block(out_channels, width, out_channels, 1) for _ in range(count - 1))
            return nn.Sequential(first, *rest)

        self.conv1 = nn.Sequential(
            nn.Conv2d(in_channels, 64, 3, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
        )
        self.conv2_x = stage(64, 64, blocks[0], stride=1)
        self.conv3_x = stage(64 * expansion, 128, blocks[1], stride=2)
        self.conv4_x = stage(128 * expansion, 256, blocks[2], stride=2)
        self.conv5_x = stage(256 * expansion, 512, blocks[3], stride=2)
        self.fc = nn.Linear(512 * expansion, num_classes)
        he_normal_(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv5_x(self.conv4_x(self.conv3_x(self.conv2_x(self.conv1(x)))))
        return self.fc(x.mean((2, 3)))
