"""torchvision's classifiers, for image folders and, with resized images, for other data sets.

Their `state_dict`s are torchvision's, except for the head, which has the data set's classes. For
image folders also those of `models.clip`.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import sys

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import get_model, list_models

from models import clip, factory
from utils import UserError

_SIZE = 224  # pixels, of the images that pretrained weights were trained on
# For `torchvision_model`: what --arch calls it, and torchvision. On small images the paper's
# `resnet18` is a network of its own.
NAMES = {f"{name}_224": name for name in ("resnet18", "resnet50")}
NAMES |= {name: name for name in ("vit_b_16", "vit_b_32")}

# For `build`: all but those with auxiliary classifiers, whose output is no tensor of logits.
CLASSIFIERS = tuple(list_models(torchvision.models, exclude=("googlenet", "inception_v3")))


def build(name: str, num_classes: int, image_size: int) -> nn.Module:
    """A freshly initialised classifier: of `CLASSIFIERS`, `clip.NAMES` or a `module:function`.

    It maps images, float [B, 3, image_size, image_size], to logits [B, num_classes].

    Raises:
        UserError: there is no classifier of this name, or it takes no images of this size.
    """
    if ":" in name:
        example = torch.zeros(2, 3, image_size, image_size)
        return factory.build(name, example, (2, num_classes))
    if name not in (*CLASSIFIERS, *clip.NAMES):
        known = ", ".join((*CLASSIFIERS, *clip.NAMES))
        raise UserError(f"--arch {name}: does not take image folders; choose from {known}")
    size = {"image_size": image_size} if name.startswith("vit_") else {}
    try:
        if name in clip.NAMES:
            model = clip.build(name, num_classes, image_size)
        else:
            model = get_model(name, weights=None, num_classes=num_classes, **size)
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, image_size, image_size))
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{name}: does not take images of {image_size} pixels ({reason}); "
            "give another --image-size"
        ) from None
    return model


def _to_imagenet(_, inputs: tuple[Tensor]) -> Tensor:
    """Images of one or three channels and any size, as the network takes them."""
    (images,) = inputs
    images = F.interpolate(images, size=(_SIZE, _SIZE), mode="bilinear", antialias=True)
    return images.expand(-1, 3, -1, -1)


def torchvision_model(name: str, num_classes: int) -> nn.Module:
    """A classifier of torchvision by a name of `NAMES`, freshly initialised.

    It maps images, float [B, 1 or 3, H, W], to logits [B, num_classes], and resizes them itself.
    """
    model = get_model(NAMES[name], weights=None, num_classes=num_classes)
    model.register_forward_pre_hook(_to_imagenet)
    return model


def load_pretrained(model: nn.Module, name: str) -> None:
    """Loads torchvision's default weights into the classifier `name`.

    A head with another number of classes than ImageNet's 1000 keeps its weights.

    Raises:
        UserError: the weights cannot be found or downloaded, or are for images of another size.
    """
    bar = sys.stderr if sys.stderr.isatty() else io.StringIO()  # not into logs
    try:
        with contextlib.redirect_stderr(bar):
            pretrained = get_model(NAMES.get(name, name), weights="DEFAULT").state_dict()
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"--pretrained: torchvision's weights of {name} are not in {torch.hub.get_dir()}/"
            f"checkpoints and cannot be downloaded ({reason}); put them there, or leave it out"
        ) from None
    own = model.state_dict()
    head = list(own)[-1].rpartition(".")[0]
    for key, value in own.items():
        if pretrained[key].shape == value.shape:
            own[key] = pretrained[key]
        elif not key.startswith(f"{head}."):
            raise UserError(
                f"--pretrained: torchvision's weights of {name} are for images of {_SIZE} pixels "
                f"({key} differs); leave out --image-size"
            )
    model.load_state_dict(own)
