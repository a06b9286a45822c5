"""GPT: a decoder-only transformer that predicts the next token, as language models are built now.

RMSNorm before each part (Zhang and Sennrich, 2019), rotary positions (Su et al., 2021), SwiGLU
(Shazeer, 2020), no biases and no dropout.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import factory
from utils import UserError


class GPT(nn.Module):
    """Maps tokens, int64 [B, T], to logits of the token after each, float [B, T, vocabulary].

    Args:
        vocabulary: number of tokens.
        width, layers, heads: of the blocks; a head has width / heads channels.
        tied: whether the output layer shares the weights of the embedding.
    """

    def __init__(self, vocabulary: int, *, width: int, layers: int, heads: int, tied: bool = False):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # Each block adds two outputs to the stream, whose variance must not grow with them.
                residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
                scale = 1 / math.sqrt(2 * layers) if residual else 1
                nn.init.normal_(parameter, std=0.02 * scale)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Block(nn.Module):
    """Attention, then a gated perceptron, each added to the stream [B, T, width]."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention_norm, self.attention = nn.RMSNorm(width), Attention(width, heads)
        self.mlp_norm, self.mlp = nn.RMSNorm(width), SwiGLU(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        def by_head(linear: nn.Linear) -> Tensor:  # [B, heads, T, channels]
            return linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)

        query, key = rotate(by_head(self.query)), rotate(by_head(self.key))
        mixed = F.scaled_dot_product_attention(query, key, by_head(self.value), is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


def rotate(x: Tensor) -> Tensor:
    """Rotary positions: turns channels i and i + C/2 of x [..., T, C] by t · 10000^(-2i/C).

    The product of a query and a key then depends on the distance of their positions alone.
    """
    length, half = x.shape[-2], x.shape[-1] // 2
    speeds = 10_000.0 ** (-torch.arange(half, device=x.device) / half)
    angles = torch.arange(length, device=x.device).outer(speeds)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class SwiGLU(nn.Module):
    """A perceptron with one hidden layer, of 8/3 of the width, gated by SiLU."""

    def __init__(self, width: int):
        super().__init__()
        hidden = math.ceil(width / 3) * 8
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


# Called with the size of the vocabulary; weights without those of the vocabulary.
_MODELS = {
    "gpt": partial(GPT, width=128, layers=4, heads=4),  # 0.8 M; of bytes 0.86 M
    "gpt-3M": partial(GPT, width=256, layers=4, heads=8),
    "gpt-124M": partial(GPT, width=768, layers=12, heads=12, tied=True),  # the size of GPT-2 small
}

NAMES = tuple(_MODELS)


def build(name: str, vocabulary: int, context: int) -> nn.Module:
    """A freshly initialised language model: a name of `NAMES`, or `module:function` of the user's.

    It maps tokens, int64 [B, context], to logits [B, context, vocabulary]. The user's may return
    them as transformers' models do, as `logits` of an object.

    Raises:
        UserError: no language model has this name, or the user's function returns no such model.
    """
    if ":" in name:
        example = torch.zeros((2, context), dtype=torch.int64)
        return factory.build(name, example, (2, context, vocabulary))
    if name in _MODELS:
        return _MODELS[name](vocabulary)
    raise UserError(f"--arch {name}: is no language model; choose from {', '.join(NAMES)}")
