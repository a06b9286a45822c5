"""Image classifiers, and in `models.gpt` language models, by the names of `--arch`.

The names of their modules, and so the keys of a `state_dict`, are those of the paper's release.
"""

from functools import partial

import torch
from torch import nn

from models import factory, gpt, imagenet
from models.preresnet import PreResNet
from models.resnet import ResNet
from models.vgg import VGG
from models.vit import ViT
from models.wide_resnet import WideResNet
from utils import UserError

# For images of one size: called with (num_classes, in_channels, image_size).
_SIZED = {
    "VGG16": partial(VGG, 16, False),
    "VGG16BN": partial(VGG, 16, True),
    "VGG19": partial(VGG, 19, False),
    "VGG19BN": partial(VGG, 19, True),
    "ViT": ViT,
}

# For images of any size: called with (num_classes, in_channels).
_ANY_SIZE = {
    "PreResNet20": partial(PreResNet, 20),
    "PreResNet56": partial(PreResNet, 56),
    "PreResNet110": partial(PreResNet, 110),
    "PreResNet164": partial(PreResNet, 164),
    "resnet18": partial(ResNet, 18),  # the paper's name for it
    "ResNet18": partial(ResNet, 18),
    "ResNet34": partial(ResNet, 34),
    "ResNet50": partial(ResNet, 50),
    "WideResNet16x8": partial(WideResNet, 16, 8),
    "WideResNet28x10": partial(WideResNet, 28, 10),
}

ARCHITECTURES = (*_SIZED, *_ANY_SIZE, *imagenet.NAMES)
LANGUAGE_MODELS = gpt.NAMES


def build(name: str, num_classes: int, in_channels: int = 3, image_size: int = 32) -> nn.Module:
    """A freshly initialised classifier: an architecture's name, or `module:function` of the user's.

    It maps images, float [B, in_channels, image_size, image_size], to logits [B, num_classes].

    Raises:
        UserError: no architecture has this name, it cannot take images of this size, or the user's
            function does not return such a model.
    """
    if ":" in name:
        example = torch.zeros(2, in_channels, image_size, image_size)
        return factory.build(name, example, (2, num_classes))
    if name in _SIZED:
        return _SIZED[name](num_classes, in_channels, image_size)
    if name in _ANY_SIZE:
        return _ANY_SIZE[name](num_classes, in_channels)
    if name in imagenet.NAMES:
        return imagenet.torchvision_model(name, num_classes)
    known = ", ".join(ARCHITECTURES)
    raise UserError(f"--arch {name}: does not take images of this data set; choose from {known}")
