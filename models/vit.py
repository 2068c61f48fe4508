"""ViT-B/16 (Dosovitskiy et al. 2020): an image as 14x14 patches and a class token through a pre-norm encoder."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .images import sample_images
from .initialize import initialize

IMAGE, PATCH, WIDTH, LAYERS, HEADS, HIDDEN = 224, 16, 768, 12, 12, 3072
EPS = 1e-6


class Attention(nn.Module):
    """Self-attention with one projection for queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, WIDTH], shape in is shape out."""
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))


class Layer(nn.Module):
    """Pre-norm residual layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, eps=EPS)
        self.attention = Attention()
        self.norm2 = nn.LayerNorm(WIDTH, eps=EPS)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Shape in is shape out."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Tokens(nn.Module):
    """Patch embeddings with the class token in front, plus learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, PATCH, stride=PATCH)
        self.class_token = nn.Parameter(torch.empty(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.empty(1, (IMAGE // PATCH) ** 2 + 1, WIDTH))

    def fill(self, generator: torch.Generator) -> None:
        """Draw the token and the positions."""
        self.class_token.normal_(0.0, 1.0, generator=generator)
        self.positions.normal_(0.0, 0.3, generator=generator)

    def forward(self, image: Tensor) -> Tensor:
        """[batch, 3, IMAGE, IMAGE] to [batch, tokens, WIDTH]."""
        x = self.patches(image).flatten(2).transpose(1, 2)
        return torch.cat((self.class_token.expand(x.shape[0], -1, -1), x), dim=1) + self.positions


class ViT(nn.Module):
    """Images [batch, 3, 224, 224] to logits [batch, classes]."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.tokens = Tokens()
        self.layers = nn.Sequential(*(Layer() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH, eps=EPS)
        self.head = nn.Linear(WIDTH, classes)

    def forward(self, image: Tensor) -> Tensor:
        """Logits, read from the class token."""
        x = self.norm(self.layers(self.tokens(image)))
        return self.head(x[:, 0])


def build(variant: str = "vit_b16", seed: int = 0) -> nn.Module:
    """A seeded model in eval mode."""
    return initialize(ViT(), seed)


def example(variant: str = "vit_b16", seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Two images."""
    return (sample_images(IMAGE, IMAGE, seed=seed),), {}
