"""CLIP's image encoder (Radford et al., 2021, arXiv:2103.00020) with a linear classifier.

The names of the modules, and so the keys of a `state_dict`, are those of the fine-tuned models of
Model Soups (Wortsman et al., ICML 2022). What these hold of CLIP's text encoder is not here.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn

# By what --arch calls it, as the paper's release does.
NAMES = {"clip-vit-b32": {"patch": 32, "width": 768, "layers": 12, "heads": 12, "features": 512}}

# Of the images that a model gets, as for torchvision's classifiers, and of those of CLIP.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def build(name: str, num_classes: int, image_size: int) -> nn.Module:
    """The classifier of this name in `NAMES`, freshly initialised."""
    return Classifier(num_classes, image_size, **NAMES[name])


class Classifier(nn.Module):
    """CLIP's image features, of length 1, and one linear layer behind them.

    It maps images, float [B, 3, image_size, image_size], normalised as for torchvision's
    classifiers, to logits [B, num_classes].
    """

    def __init__(self, num_classes: int, image_size: int, features: int, **sizes: int):
        super().__init__()
        self.model = nn.ModuleDict({"visual": Encoder(image_size, features=features, **sizes)})
        self.classification_head = nn.Linear(features, num_classes)
        constants = torch.tensor([_MEAN, _STD, _CLIP_MEAN, _CLIP_STD])
        mean, std, clip_mean, clip_std = constants.view(4, 3, 1, 1)
        self.register_buffer("scale", std / clip_std, persistent=False)
        self.register_buffer("shift", (mean - clip_mean) / clip_std, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        features = self.model.visual(images * self.scale + self.shift)
        return self.classification_head(features / features.norm(dim=-1, keepdim=True))


class Encoder(nn.Module):
    """A vision transformer: images, float [B, 3, image_size, image_size], to [B, features]."""

    def __init__(
        self, image_size: int, patch: int, width: int, layers: int, heads: int, features: int
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        positions = (image_size // patch) ** 2 + 1
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(positions, width))
        self.ln_pre = nn.LayerNorm(width)
        blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.transformer = nn.ModuleDict({"resblocks": blocks})
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(width**-0.5 * torch.randn(width, features))

    def forward(self, images: Tensor) -> Tensor:
        patches = self.conv1(images).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(images), 1, -1)
        tokens = torch.cat([first, patches], dim=1) + self.positional_embedding
        tokens = self.transformer.resblocks(self.ln_pre(tokens))
        return self.ln_post(tokens[:, 0]) @ self.proj


class Block(nn.Module):
    """Attention and a perceptron, each behind a layer norm and added to [B, tokens, width]."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1 = nn.LayerNorm(width)
        layers = {"c_fc": nn.Linear(width, 4 * width), "gelu": QuickGELU()}
        layers["c_proj"] = nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        normed = self.ln_1(tokens)
        tokens = tokens + self.attn(normed, normed, normed, need_weights=False)[0]
        return tokens + self.mlp(self.ln_2(tokens))


class QuickGELU(nn.Module):
    """The approximation of GELU that CLIP was trained with."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)
