"""BERT-base (Devlin et al. 2018): a post-norm encoder over word, position and segment embeddings, and its pooler."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .initialize import initialize

VOCABULARY, POSITIONS, SEGMENTS, WIDTH, LAYERS, HEADS, HIDDEN = 30522, 512, 2, 768, 12, 12, 3072
EPS = 1e-12


class Embeddings(nn.Module):
    """Norm of the sum of word, position and segment embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.word = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Embedding(POSITIONS, WIDTH)
        self.segment = nn.Embedding(SEGMENTS, WIDTH)
        self.norm = nn.LayerNorm(WIDTH, eps=EPS)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        """[batch, seq] twice to [batch, seq, WIDTH]."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        return self.norm(self.word(input_ids) + self.position(positions) + self.segment(token_type_ids))


class Attention(nn.Module):
    """Self-attention with separate projections; positions where the mask is False are not attended to."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH)
        self.key = nn.Linear(WIDTH, WIDTH)
        self.value = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """``x`` is [batch, seq, WIDTH]; ``mask`` is bool [batch, 1, 1, seq]."""
        batch, length, width = x.shape
        shape = (batch, length, HEADS, width // HEADS)
        q = self.query(x).view(shape).transpose(1, 2)
        k = self.key(x).view(shape).transpose(1, 2)
        v = self.value(x).view(shape).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class Layer(nn.Module):
    """Post-norm residual layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.attention_norm = nn.LayerNorm(WIDTH, eps=EPS)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)
        self.output_norm = nn.LayerNorm(WIDTH, eps=EPS)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Shape in is shape out."""
        x = self.attention_norm(x + self.attention(x, mask))
        return self.output_norm(x + self.down(F.gelu(self.up(x))))


class Bert(nn.Module):
    """Token ids to the last layer's states and the first token's pooled state."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = Embeddings()
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.pooler = nn.Linear(WIDTH, WIDTH)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> dict[str, Tensor]:
        """All inputs are int64 [batch, seq]; the mask is 1 where there is a token and 0 in the padding.

        Returns:
            ``last_hidden_state`` [batch, seq, WIDTH] and ``pooled`` [batch, WIDTH].
        """
        mask = (attention_mask != 0)[:, None, None, :]
        x = self.embeddings(input_ids, token_type_ids)
        for layer in self.layers:
            x = layer(x, mask)
        return {"last_hidden_state": x, "pooled": self.pooler(x[:, 0]).tanh()}


def build(variant: str = "bert_base", seed: int = 0) -> nn.Module:
    """A seeded model in eval mode."""
    return initialize(Bert(), seed)


def example(variant: str = "bert_base", seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Two sequences, the second with padding and both with two segments, as keyword arguments."""
    generator = torch.Generator().manual_seed(seed)
    batch, length = 2, 24
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[1, 17:] = 0
    segments = (torch.arange(length) >= 10).to(torch.int64).repeat(batch, 1)
    ids = torch.randint(VOCABULARY, (batch, length), generator=generator)
    return (), {"input_ids": ids, "attention_mask": mask, "token_type_ids": segments * mask}
