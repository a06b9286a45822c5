"""RandAugment (Cubuk et al., 2020, arXiv:1909.13719) with draws of its own for every image.

`torchvision.transforms.v2.RandAugment` draws once for a whole batch. The operations and their
strengths are torchvision's; here images with the same draw go through one together.
"""

from __future__ import annotations

import math

from torch import Tensor
from torchvision.transforms.v2 import functional as F

STRONGEST = 30


def _shear(images: Tensor, x: float, y: float) -> Tensor:
    degrees = [math.degrees(math.atan(x)), math.degrees(math.atan(y))]
    corner = [0.0, 0.0]
    return F.affine(images, angle=0.0, translate=[0, 0], scale=1.0, shear=degrees, center=corner)


def _translate(images: Tensor, x: float, y: float) -> Tensor:
    pixels = [int(x * images.shape[-1]), int(y * images.shape[-2])]
    return F.affine(images, angle=0.0, translate=pixels, scale=1.0, shear=[0.0, 0.0])


# Each takes images, uint8 [B, 1 or 3, H, W], and a signed strength in [-1, 1].
OPERATIONS = (
    lambda images, s: images,
    lambda images, s: _shear(images, 0.3 * s, 0.0),
    lambda images, s: _shear(images, 0.0, 0.3 * s),
    lambda images, s: _translate(images, 150 / 331 * s, 0.0),
    lambda images, s: _translate(images, 0.0, 150 / 331 * s),
    lambda images, s: F.rotate(images, 30.0 * s),
    lambda images, s: F.adjust_brightness(images, 1 + 0.9 * s),
    lambda images, s: F.adjust_saturation(images, 1 + 0.9 * s),
    lambda images, s: F.adjust_contrast(images, 1 + 0.9 * s),
    lambda images, s: F.adjust_sharpness(images, 1 + 0.9 * s),
    lambda images, s: F.posterize(images, 8 - round(4 * abs(s))),
    lambda images, s: F.solarize(images, 255 * (1 - abs(s))),
    lambda images, s: F.autocontrast(images),
    lambda images, s: F.equalize(images),
)


def rand_augment(images: Tensor, draws: Tensor, magnitude: int) -> Tensor:
    """Lets every image go through the operations that were drawn for it, one after the other.

    Args:
        images: uint8 [B, 1 or 3, H, W].
        draws: integers in [0, 2 · len(OPERATIONS)), [B, operations an image]: twice the number of
            the operation, plus one where its strength is negative.
        magnitude: strength of all operations, 0 to 30.

    Returns:
        uint8 [B, 1 or 3, H, W].
    """
    for draw in draws.T:
        augmented = images.clone()
        for number in draw.unique().tolist():
            chosen = (draw == number).nonzero().squeeze(1).to(images.device)
            sign = -1 if number % 2 else 1
            operation = OPERATIONS[number // 2]
            augmented[chosen] = operation(images[chosen], sign * magnitude / STRONGEST)
        images = augmented
    return images
