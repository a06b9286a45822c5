"""Small models: torchvision's vision transformer, and one with batch norm and dropout."""

from torch import nn
from torchvision.models import vision_transformer

SIZES = {"num_layers": 2, "num_heads": 2, "hidden_dim": 48, "mlp_dim": 96}


class Reduced(vision_transformer.VisionTransformer):
    def __init__(self, **sizes):
        super().__init__(**sizes | SIZES)


def for_digits() -> Reduced:
    """For `--model-factory`: patches of 4×4 of the 8×8 pixels, as `--arch ViT` has them."""
    model = Reduced(image_size=8, patch_size=4, num_classes=10)
    model.conv_proj = nn.Conv2d(1, model.hidden_dim, 4, 4)
    nn.init.normal_(model.heads.head.weight, std=0.1)
    return model


def noisy() -> nn.Module:
    """For `--model-factory`: a small network with statistics and draws that are each rank's own."""
    features = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2)
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(288, 10))


def plain() -> nn.Module:
    """The same without these: ranks compute what one process does."""
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
