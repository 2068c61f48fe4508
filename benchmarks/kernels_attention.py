"""Attention for ``benchmarks.kernels``: prompts beside the multiply-add limit, one query row in bytes per second.

Queries, keys and values of prompts lie as a fused projection leaves them, [batch, row, 3, head, d]; the one row meets
a cache of keys and values, [batch, head, row, d].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from tilewright.codegen.c.attention_blocks import attention_units, blocks
from tilewright.codegen.templating import Hole, render

PROMPTS = (  # name, batch, heads, rows, d, causal
    ("minilm 8x64", 8, 12, 64, 32, False),
    ("bert 1x128", 1, 12, 128, 64, False),
    ("vit 1x197", 1, 12, 197, 64, False),
    ("gpt2 1x128 causal", 1, 12, 128, 64, True),
    ("llama 1x1024 causal", 1, 16, 1024, 128, True),
)
ROWS = (  # name, heads, key heads, keys, d
    ("one row, 8 of 32 heads, 2048 keys of 64", 32, 8, 2048, 64),
    ("one row, 8 of 32 heads, 8192 keys of 128", 32, 8, 8192, 128),
    ("one row, 16 of 16 heads, 4096 keys of 64", 16, 16, 4096, 64),
)


class Attention:
    """One shape: what ``benchmarks.kernels`` measures, for float32 or bfloat16 operands."""

    def __init__(
        self, name: str, batch: int, heads: int, shared: int, queries: int, keys: int, d: int, causal: bool, bf16: bool
    ) -> None:
        self.name = f"attention {name}{' bf16' if bf16 else ''}"
        self.dtype = "bfloat16" if bf16 else "float32"
        self.reads = queries == 1  # limited by memory, not by arithmetic
        sizing, together = blocks(d, d, bf16=bf16), 1 if causal else heads // shared
        self.units = int(attention_units(batch, heads, queries, sizing, together))  # type: ignore[arg-type]
        # With a causal mask, half of the products are of no use.
        self.flops = 4 * batch * heads * queries * keys * d // (2 if causal else 1)
        self.bytes = 2 * batch * shared * keys * d * (2 if bf16 else 4)
        generator = np.random.default_rng(0)
        tensors = []
        if queries == keys:
            joined = generator.standard_normal((batch, queries, 3, heads, d), np.float32)
            tensors = [torch.from_numpy(joined)[:, :, part].transpose(1, 2) for part in range(3)]
            arrays = [joined, joined, joined]
            names = (("q", "i", "h"), ("k", "j", "hk"), ("v", "j", "hk"))
            rows = [
                f"{name} + (((b * {queries} + {i}) * 3 + {part}) * {heads} + {h}) * {d}"
                for part, (name, i, h) in enumerate(names)
            ]
        else:
            shapes = ((batch, heads, queries, d), (batch, shared, keys, d), (batch, shared, keys, d))
            arrays = [generator.standard_normal(shape, np.float32) for shape in shapes]
            tensors = [torch.from_numpy(array) for array in arrays]
            rows = [f"q + ((b * {heads} + h) * {queries} + i) * {d}", f"k + ((b * {shared} + hk) * {keys} + j) * {d}",
                    f"v + ((b * {shared} + hk) * {keys} + j) * {d}"]  # fmt: skip
        if bf16:
            tensors = [tensor.to(torch.bfloat16) for tensor in tensors]
            arrays = [(array.view(np.uint32) >> 16).astype(np.uint16) for array in arrays]
        element = "uint16_t" if bf16 else "float"
        self.arrays = [*arrays, np.empty((batch, heads, queries, d), np.uint16 if bf16 else np.float32)]
        self.source = render(
            "attention.c.jinja", name="kernel", B=batch, HEADS=heads, GROUP=heads // shared, TOGETHER=together,
            SQ=queries, SK=keys, D=d, DV=d, rows=sizing.rows, keys=sizing.keys, bf16=bf16, scaled=False, causal=causal,
            prelude=f"const {element} *restrict q = buf[0], *restrict k = buf[1], *restrict v = buf[2]; "
            f"{element} *restrict o = buf[3];",
            scale=f"{d**-0.5:.9f}f", mask=None,
            q={"address": rows[0]}, k={"address": rows[1]}, v={"address": rows[2]},
            store=Hole(
                f"{element} *restrict to = o + ((b * {queries} + i) * {heads} + h) * {d};",
                "to[d] = tw_f32_to_bf16(acc);" if bf16 else "to[d] = acc;",
            ),
        )  # fmt: skip
        self.torch_call: Callable[[], object] = lambda: torch.nn.functional.scaled_dot_product_attention(
            *tensors, is_causal=causal, enable_gqa=heads != shared
        )


def prompts(*, bf16: bool) -> Iterator[Attention]:
    """As many queries as keys: limited by arithmetic."""
    for name, batch, heads, rows, d, causal in PROMPTS:
        yield Attention(name, batch, heads, heads, rows, rows, d, causal, bf16)


def decoding(*, bf16: bool) -> Iterator[Attention]:
    """One query row: limited by reading keys and values."""
    for name, heads, shared, keys, d in ROWS:
        yield Attention(name, 1, heads, shared, 1, keys, d, False, bf16)
