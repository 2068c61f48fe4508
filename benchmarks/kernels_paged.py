"""Attention over a paged cache for ``benchmarks.kernels``: decoding in bytes per second, prompts in operations.

Blocks of the sequences lie in the cache in random order. PyTorch attends to the same numbers of positions, which lie
one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from tilewright.codegen.c.paged_attention import paged_units, tokens_of
from tilewright.codegen.templating import Hole, render
from tilewright.passes.graph.cache_ops import BLOCK

DECODING = (  # name, sequences, heads, shared heads, d, positions of each, new tokens of each
    ("1x8192, 32 heads on 8 of 128", 1, 32, 8, 128, 8192, 1),
    ("16x2048, 32 heads on 4 of 64", 16, 32, 4, 64, 2048, 1),
    ("16x2048, 8 heads on 8 of 64", 16, 8, 8, 64, 2048, 1),
)
PROMPTS = (
    ("128 of 128, 32 heads on 4 of 64", 1, 32, 4, 64, 128, 128),
    ("512 of 2048, 32 heads on 8 of 128", 1, 32, 8, 128, 2048, 512),
)


class Paged:
    """One shape: what ``benchmarks.kernels`` measures, for caches of float32 or bfloat16."""

    def __init__(
        self, name: str, sequences: int, heads: int, shared: int, d: int, context: int, new: int, bf16: bool
    ) -> None:
        self.name = f"paged {name}{' bf16' if bf16 else ''}"
        self.dtype = "float32"  # what products are computed in
        self.reads = new == 1  # limited by memory, not by arithmetic
        tokens, width = sequences * new, -(-context // BLOCK)
        self.units = int(paged_units(tokens, sequences, shared, heads // shared))  # type: ignore[arg-type]
        self.flops = 4 * heads * d * sequences * sum(range(context - new + 1, context + 1))
        self.bytes = 2 * sequences * context * shared * d * (2 if bf16 else 4)
        generator = np.random.default_rng(0)
        caches = [generator.standard_normal((sequences * width, shared, BLOCK * d), np.float32) for _ in range(2)]
        if bf16:
            caches = [(cache.view(np.uint32) >> 16).astype(np.uint16) for cache in caches]
        positions = np.tile(np.arange(context - new, context, dtype=np.int32), sequences)
        starts, contexts = np.arange(sequences + 1, dtype=np.int32) * new, np.full(sequences, context, np.int32)
        table = generator.permutation(sequences * width).astype(np.int32)
        query = generator.standard_normal((tokens, heads, d), np.float32)
        caches = [aligned(cache) for cache in caches]
        self.arrays = [query, *caches, positions, starts, contexts, table, np.empty_like(query)]
        element, row = "uint16_t" if bf16 else "float", f"(t * {heads} + h) * {d}"
        self.source = render(
            "paged_attention.c.jinja", name="kernel", SHARED=shared, GROUP=heads // shared, D=d,
            tokens=tokens_of(heads // shared), TOKENS=tokens, SEQUENCES=sequences, WIDTH=width,
            BLOCKS=sequences * width, bf16=bf16, scale=f"{d**-0.5:.9f}f", scaled=False, window=0,
            prelude=f"const float *restrict q = buf[0]; const {element} *restrict keys = buf[1], "
            "*restrict values = buf[2]; const int32_t *restrict positions = buf[3], *restrict starts = buf[4], "
            "*restrict contexts = buf[5], *restrict table = buf[6]; float *restrict o = buf[7];",
            keys="keys", values="values", positions="positions", starts="starts", contexts="contexts", table="table",
            q=[{"first": 0, "count": d,
                "hole": Hole(f"const float *restrict from = q + {row};", "const float element = from[d];")}],
            store=Hole(f"float *restrict to = o + {row};", "to[d] = acc;"),
        )  # fmt: skip
        dtype = torch.bfloat16 if bf16 else torch.float32
        shapes = ((sequences, heads, new, d), (sequences, shared, context, d), (sequences, shared, context, d))
        q, k, v = (torch.randn(shape).to(dtype) for shape in shapes)
        mask = torch.ones(new, context, dtype=torch.bool).tril(context - new) if new > 1 else None
        self.torch_call: Callable[[], object] = lambda: torch.nn.functional.scaled_dot_product_attention(
            q, k, v, mask, enable_gqa=heads != shared
        )


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy that begins where states begin: at a cache line."""
    memory = np.empty(array.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def paged(*, bf16: bool) -> Iterator[Paged]:
    """One token of each sequence, then chunks of prompts."""
    for shape in (*DECODING, *PROMPTS):
        yield Paged(*shape, bf16)
