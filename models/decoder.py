"""Decoder language models of the Llama kind: one definition for Llama 2 and 3, Mistral, Qwen2 and Qwen3.

RMSNorm (Zhang & Sennrich 2019), rotary positions (``rotary.py``), grouped-query attention (Ainslie et al. 2023), SwiGLU
(Shazeer 2020); where families differ, :class:`Config` says how. A decoder computes in two ways over the same modules:
``forward`` takes whole sequences; ``step`` takes new tokens of several sequences, and what came before from a paged
cache. ``llama_1b`` has the dimensions of TinyLlama 1.1B.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .initialize import initialize
from .rotary import Rotary, Scaling, rotate

Mix = Callable[[Tensor, Tensor, Tensor], Tensor]  # queries, keys and values [..., heads, head_size] -> like queries


@dataclass(frozen=True)
class Config:
    """Dimensions of a decoder and the choices in which families differ.

    Attributes:
        vocabulary: number of tokens.
        width: of the residual stream.
        layers: number of layers.
        heads: query heads.
        kv_heads: key and value heads, each shared by ``heads / kv_heads`` query heads.
        hidden: width inside the feed-forward layer.
        context: most positions of a sequence.
        head_size: width of one head; 0 stands for ``width / heads``.
        theta: base of the rotary frequencies.
        scaling: how the rotary frequencies are scaled.
        eps: added to the mean square in norms.
        tied: whether the head's weight is the embedding's.
        qk_norm: whether the heads of queries and keys are normalised before they rotate.
        qkv_bias: whether the projections to queries, keys and values have biases.
        out_bias: whether the projection out of attention has one.
        mlp_bias: whether the feed-forward layer has them.
        windows: for each layer how many positions, its own included, a token sees; 0 for all. Empty: all, everywhere.
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    hidden: int
    context: int = 2048
    head_size: int = 0
    theta: float = 10000.0
    scaling: Scaling | None = None
    eps: float = 1e-5
    tied: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    windows: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Fill in what follows from the rest.

        Raises:
            ValueError: dimensions that do not fit each other.
        """
        if self.heads < 1 or self.kv_heads < 1 or self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} query heads cannot share {self.kv_heads} key and value heads evenly")
        if not self.head_size:
            if self.width % self.heads:
                raise ValueError(f"a width of {self.width} does not divide among {self.heads} heads")
            object.__setattr__(self, "head_size", self.width // self.heads)
        if self.head_size % 2:
            raise ValueError(f"heads of width {self.head_size} do not rotate: the width must be even")
        if not self.windows:
            object.__setattr__(self, "windows", (0,) * self.layers)
        if len(self.windows) != self.layers:
            raise ValueError(f"{len(self.windows)} windows are given for {self.layers} layers")


VARIANTS = {
    "llama_tiny": Config(vocabulary=512, width=128, layers=2, heads=8, kv_heads=2, hidden=352, context=256),
    "llama_1b": Config(vocabulary=32000, width=2048, layers=22, heads=32, kv_heads=4, hidden=5632, context=2048),
}


class Attention(nn.Module):
    """Projections around attention; ``mix`` is the attention itself, over whatever holds the other positions."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.head_size = config.head_size
        inner, kv_inner = config.heads * config.head_size, config.kv_heads * config.head_size
        self.q_proj = nn.Linear(config.width, inner, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.width, kv_inner, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.width, kv_inner, bias=config.qkv_bias)
        self.o_proj = nn.Linear(inner, config.width, bias=config.out_bias)
        normed = config.qk_norm
        self.q_norm = nn.RMSNorm(config.head_size, eps=config.eps) if normed else nn.Identity()
        self.k_norm = nn.RMSNorm(config.head_size, eps=config.eps) if normed else nn.Identity()

    def forward(self, x: Tensor, mix: Mix) -> Tensor:
        """``x`` is [..., width], shape in is shape out."""
        q = self.q_norm(self.q_proj(x).unflatten(-1, (-1, self.head_size)))
        k = self.k_norm(self.k_proj(x).unflatten(-1, (-1, self.head_size)))
        v = self.v_proj(x).unflatten(-1, (-1, self.head_size))
        return self.o_proj(mix(q, k, v).flatten(-2))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.hidden, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.width, config.hidden, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.hidden, config.width, bias=config.mlp_bias)

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

    def forward(self, x: Tensor, mix: Mix) -> Tensor:
        """Shape in is shape out."""
        x = x + self.attention(self.input_norm(x), mix)
        return x + self.mlp(self.post_norm(x))


class Decoder(nn.Module):
    """Token ids to logits; position t sees positions up to t."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.rotary = Rotary(config.head_size, config.theta, config.scaling)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=config.eps)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        if config.tied:
            self.head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits [batch, seq, vocabulary] of the next token at every position of whole sequences [batch, seq]."""
        x = self.embedding(input_ids)
        positions = torch.arange(input_ids.shape[1], device=x.device)
        cos, sin = self.rotary(positions, x.dtype)
        grouped = self.config.kv_heads != self.config.heads
        for layer, window in zip(self.layers, self.config.windows, strict=True):
            mask = _window_mask(positions, window) if window else None

            def mix(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = mask) -> Tensor:
                q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
                q, k = rotate(q, cos, sin), rotate(k, cos, sin)
                causal = mask is None
                mixed = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped)
                return mixed.transpose(1, 2)

            x = layer(x, mix)
        return self.head(self.norm(x))

    def step(
        self, tokens: Tensor, positions: Tensor, starts: Tensor, contexts: Tensor, table: Tensor, rows: Tensor,
        keys: Sequence[Tensor], values: Sequence[Tensor],
    ) -> dict[str, Any]:  # fmt: skip
        """New tokens of several sequences, one sequence after another, over a cache of blocks of positions.

        Needs the operators of ``passes/graph/cache_ops.py``, which say how the cache is laid out; whoever calls this
        has imported them. All integers are int32.

        Args:
            tokens: token ids [tokens].
            positions: each token's place in its sequence, [tokens].
            starts: [sequences + 1]; tokens ``starts[s]`` to ``starts[s + 1] - 1`` belong to sequence s, and those
                behind the last start to none.
            contexts: [sequences]; how many positions each sequence has, the new tokens included.
            table: [sequences, width]; the numbers of each sequence's blocks, in order.
            rows: [rows]; which of the tokens want logits.
            keys: for each layer [blocks, kv_heads, head_size, block].
            values: for each layer [blocks, kv_heads, block, head_size].

        Returns:
            ``logits`` float32 [rows, vocabulary], and the caches with the new tokens as ``keys`` and ``values``.
        """
        ops = torch.ops.tilewright
        new_keys, new_values = list(keys), list(values)
        x = self.embedding(tokens)
        cos, sin = (part[:, None] for part in self.rotary(positions, x.dtype))
        scale = self.config.head_size**-0.5
        for index, (layer, window) in enumerate(zip(self.layers, self.config.windows, strict=True)):

            def mix(q: Tensor, k: Tensor, v: Tensor, index: int = index, window: int = window) -> Tensor:
                q, k = rotate(q, cos, sin), rotate(k, cos, sin)
                new_keys[index] = ops.cache_append(new_keys[index], k, positions, starts, table, True)
                new_values[index] = ops.cache_append(new_values[index], v, positions, starts, table, False)
                caches = new_keys[index], new_values[index]
                return ops.paged_attention(q, *caches, positions, starts, contexts, table, scale, window)

            x = layer(x, mix)
        logits = self.head(self.norm(x.index_select(0, rows)))
        return {"logits": logits.to(torch.float32), "keys": new_keys, "values": new_values}


def _window_mask(positions: Tensor, window: int) -> Tensor:
    """[seq, seq], True where a query (row) sees a key: not after it, and fewer than ``window`` positions before."""
    distance = positions[:, None] - positions[None, :]
    return (distance >= 0) & (distance < window)


def build(variant: str, seed: int = 0) -> nn.Module:
    """A seeded decoder in eval mode."""
    return initialize(Decoder(VARIANTS[variant]), seed)


def example(variant: str, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Token ids of two sequences."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(VARIANTS[variant].vocabulary, (2, 24), generator=generator),), {}
