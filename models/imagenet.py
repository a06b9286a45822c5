"""torchvision's classifiers for ImageNet, made to take the images of any other data set.

Their `state_dict`s are torchvision's but for the head, which has the data set's classes.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import get_model

from utils import UserError

NAMES = ("resnet18", "resnet50", "vit_b_16", "vit_b_32")
_SIZE = 224  # pixels, what the pretrained weights were trained on


def _to_imagenet(_, inputs: tuple[Tensor]) -> Tensor:
    """Images of one or three channels and any size as the network knows them."""
    (images,) = inputs
    images = F.interpolate(images, size=(_SIZE, _SIZE), mode="bilinear", antialias=True)
    return images.expand(-1, 3, -1, -1)


def torchvision_model(name: str, num_classes: int) -> nn.Module:
    """A classifier of torchvision, freshly initialised.

    It maps images, float [B, 1 or 3, H, W], to logits [B, num_classes], and resizes them itself.
    """
    model = get_model(name, weights=None, num_classes=num_classes)
    model.register_forward_pre_hook(_to_imagenet)
    return model


def load_pretrained(model: nn.Module, name: str) -> None:
    """Puts torchvision's default weights into `torchvision_model(name, …)`; its head stays.

    Raises:
        UserError: the weights are not there and cannot be downloaded.
    """
    try:
        pretrained = get_model(name, weights="DEFAULT").state_dict()
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"--pretrained: torchvision's weights of {name} are not to be had ({reason})"
        ) from None
    head = [key for key, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    own = {k: v for k, v in model.state_dict().items() if k.startswith(f"{head}.")}
    model.load_state_dict(pretrained | own)
