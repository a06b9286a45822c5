"""VGG (Simonyan and Zisserman, 2015, arXiv:1409.1556) with a small classifier, for CIFAR."""

from torch import Tensor, nn

from models.initialisation import he_normal_
from utils import UserError

_WIDTHS = (64, 128, 256, 512, 512)  # output channels of the five stages
_CONVOLUTIONS = {16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}  # depth: convolutions in each stage
_MINIMUM_SIZE = 2 ** len(_WIDTHS)  # each stage ends by halving the image


class VGG(nn.Module):
    """Five stages of 3x3 convolutions, then three linear layers.

    Args:
        depth: 16 or 19, the number of layers with weights.
        batch_norm: whether batch norm follows every convolution.
        num_classes: number of logits.
        in_channels: channels of the images.
        image_size: their height and width in pixels.

    Raises:
        UserError: `image_size` is below 32.
    """

    def __init__(
        self, depth: int, batch_norm: bool, num_classes: int, in_channels: int, image_size: int
    ):
        super().__init__()
        if image_size < _MINIMUM_SIZE:
            raise UserError(
                f"VGG{depth}{'BN' if batch_norm else ''} needs images of at least "
                f"{_MINIMUM_SIZE}x{_MINIMUM_SIZE} pixels, and these are {image_size}x{image_size}"
            )
        layers: list[nn.Module] = []
        for width, convolutions in zip(_WIDTHS, _CONVOLUTIONS[depth], strict=True):
            for _ in range(convolutions):
                layers.append(nn.Conv2d(in_channels, width, 3, padding=1))
                if batch_norm:
                    layers.append(nn.BatchNorm2d(width))
                layers.append(nn.ReLU())
                in_channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Dropout(),
            nn.Linear(512, 512),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(512, 512),
            nn.ReLU(),
            nn.Linear(512, num_classes),
        )
        he_normal_(self)

    def forward(self, x: Tensor) -> Tensor:
        # One pixel is left of 32x32; the mean is for larger images.
        return self.classifier(self.features(x).mean((2, 3)))
