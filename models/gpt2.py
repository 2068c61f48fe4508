"""GPT-2-style decoders over a whole sequence (Radford et al. 2019): pre-norm, learned positions, tied head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .initialize import initialize


@dataclass(frozen=True)
class Config:
    """Dimensions of a decoder; the feed-forward layer is four times as wide."""

    vocabulary: int
    context: int
    width: int
    layers: int
    heads: int


VARIANTS = {
    "gpt2": Config(vocabulary=50257, context=1024, width=768, layers=12, heads=12),
    "gpt2_tiny": Config(vocabulary=512, context=128, width=128, layers=2, heads=4),
}


class Attention(nn.Module):
    """Causal self-attention with one projection for queries, keys and values."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, seq, width], shape in is shape out."""
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for part in self.qkv(x).split(width, dim=2)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class Layer(nn.Module):
    """Pre-norm residual layer with the tanh form of GELU."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.width)
        self.up = nn.Linear(config.width, 4 * config.width)
        self.down = nn.Linear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """Shape in is shape out."""
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT2(nn.Module):
    """Token ids [batch, seq] to logits [batch, seq, vocabulary]; position t sees positions up to t."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits of the next token at every position."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.tokens(input_ids) + self.positions(positions)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def build(variant: str, seed: int = 0) -> nn.Module:
    """A seeded decoder in eval mode."""
    return initialize(GPT2(VARIANTS[variant]), seed)


def example(variant: str, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Token ids of two sequences."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(VARIANTS[variant].vocabulary, (2, 24), generator=generator),), {}
