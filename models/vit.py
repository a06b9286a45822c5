"""ViT (Dosovitskiy et al., 2021, arXiv:2010.11929) for small images: patches of 4x4 pixels."""

import math

from torch import nn
from torchvision.models import VisionTransformer

from utils import UserError

_PATCH = 4


class ViT(VisionTransformer):
    """torchvision's transformer with 6 layers of width 512, 8 heads, and a hidden width of 512.

    Args:
        num_classes: number of logits.
        in_channels: channels of the images.
        image_size: their height and width in pixels; each patch has a position of its own.

    Raises:
        UserError: `image_size` is no multiple of 4.
    """

    def __init__(self, num_classes: int, in_channels: int, image_size: int):
        if image_size % _PATCH:
            raise UserError(
                f"ViT cuts images into patches of {_PATCH}x{_PATCH} pixels, and "
                f"{image_size}x{image_size} is no multiple of that"
            )
        super().__init__(image_size, _PATCH, 6, 8, 512, 512, num_classes=num_classes)
        # torchvision's takes three channels; the initialisation is the same.
        self.conv_proj = nn.Conv2d(in_channels, self.hidden_dim, _PATCH, _PATCH)
        nn.init.trunc_normal_(self.conv_proj.weight, std=math.sqrt(1 / (in_channels * _PATCH**2)))
        nn.init.zeros_(self.conv_proj.bias)
