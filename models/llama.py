"""Llama-style decoders over a whole sequence: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Touvron et al. 2023 (architecture), Su et al. 2021 (rotary embedding, eq. 34), Ainslie et al. 2023 (grouped queries),
Shazeer 2020 (SwiGLU). ``llama_1b`` has the dimensions of TinyLlama 1.1B.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .initialize import initialize


@dataclass(frozen=True)
class Config:
    """Dimensions of a decoder; ``tied`` shares the token embedding with the output projection."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    hidden: int
    theta: float = 10000.0
    eps: float = 1e-5
    tied: bool = False

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.width // self.heads


VARIANTS = {
    "llama_tiny": Config(vocabulary=512, width=128, layers=2, heads=8, kv_heads=2, hidden=352),
    "llama_1b": Config(vocabulary=32000, width=2048, layers=22, heads=32, kv_heads=4, hidden=5632),
}


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + half]) of the last axis by the angles whose cosines and sines are given."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Causal attention in which groups of query heads share one key and value head."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_size = config.heads, config.kv_heads, config.head_size
        kv_width = config.kv_heads * config.head_size
        self.q_proj = nn.Linear(config.width, config.width, bias=False)
        self.k_proj = nn.Linear(config.width, kv_width, bias=False)
        self.v_proj = nn.Linear(config.width, kv_width, bias=False)
        self.o_proj = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``x`` is [batch, seq, width]; the angle tables are [seq, head_size]."""
        batch, length, width = x.shape
        q = self.q_proj(x).view(batch, length, self.heads, self.head_size).transpose(1, 2)
        k = self.k_proj(x).view(batch, length, self.kv_heads, self.head_size).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, self.kv_heads, self.head_size).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        grouped = self.kv_heads != self.heads
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, length, width))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.hidden, bias=False)
        self.up_proj = nn.Linear(config.width, config.hidden, bias=False)
        self.down_proj = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Shape in is shape out."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Pre-norm residual layer."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.input_norm = nn.RMSNorm(config.width, eps=config.eps)
        self.attention = Attention(config)
        self.post_norm = nn.RMSNorm(config.width, eps=config.eps)
        self.mlp = SwiGLU(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Shape in is shape out."""
        x = x + self.attention(self.input_norm(x), cos, sin)
        return x + self.mlp(self.post_norm(x))


class Decoder(nn.Module):
    """Token ids [batch, seq] to logits [batch, seq, vocabulary]; position t sees positions up to t."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=config.eps)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        if config.tied:
            self.head.weight = self.embedding.weight
        self.theta, self.head_size = config.theta, config.head_size

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits of the next token at every position."""
        x = self.embedding(input_ids)
        angles = self._angles(input_ids.shape[1], x.device)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.head(self.norm(x))

    def _angles(self, length: int, device: torch.device) -> Tensor:
        """Angles of the rotary embedding, [length, head_size], in float32 whatever the model computes in."""
        pairs = torch.arange(0, self.head_size, 2, device=device, dtype=torch.float32)
        positions = torch.arange(length, device=device, dtype=torch.float32)
        angles = positions[:, None] * self.theta ** (-pairs / self.head_size)
        return torch.cat((angles, angles), dim=-1)


def build(variant: str, seed: int = 0) -> nn.Module:
    """A seeded decoder in eval mode."""
    return initialize(Decoder(VARIANTS[variant]), seed)


def example(variant: str, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Token ids of two sequences."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(VARIANTS[variant].vocabulary, (2, 24), generator=generator),), {}
