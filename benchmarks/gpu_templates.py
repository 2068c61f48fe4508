"""Small programs, one per kernel template, at sizes that do not fit its blocks, for checks on the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        """What the function gives."""
        return self.function(*args)


def case(name: str) -> tuple[nn.Module, tuple[torch.Tensor, ...], Any]:
    """(module in evaluation mode, float32 inputs, dynamic shapes or ``None``), the same ones every time."""
    torch.manual_seed(0)
    module, inputs, shapes = CASES[name]()
    return module.eval(), tuple(inputs), shapes


def _apply(function: Any, *shapes: tuple[int, ...], dynamic: Any = None) -> Any:
    return lambda: (Apply(function), [torch.randn(shape) for shape in shapes], dynamic)


def _layer(make: Any, *shape: int) -> Any:
    return lambda: (make(), [torch.randn(shape)], None)


def _attention(*shapes: tuple[int, ...], **options: Any) -> Any:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(q, k, v, **options)

    return _apply(attend, *shapes)


def _masked() -> Any:
    allowed = torch.rand(2, 1, 70, 131) < 0.5
    allowed[1, 0, 7] = False  # a row that sees nothing

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(q, k, v, mask)

    q, k, v = (torch.randn(2, 3, length, 40) for length in (70, 131, 131))
    return Apply(attend), [q, k, v, allowed], None


def _embedding() -> Any:
    return nn.Embedding(1000, 77), [torch.randint(0, 1000, (5, 33))], None


CASES: dict[str, Any] = {
    "pointwise": _apply(lambda x, y: functional.gelu(x) * y + torch.tanh(x), (33, 1, 257), (5, 257)),
    "row": _apply(lambda x: functional.softmax(x, -1), (129, 1000)),
    "long_row": _apply(lambda x: functional.layer_norm(x, (40001,)), (3, 40001)),
    "reduction": _apply(lambda x: x.mean((2, 3)), (3, 70, 19, 23)),
    "transpose": _apply(lambda x: x.transpose(1, 2) * 2, (3, 129, 515)),
    "pooling": _layer(lambda: nn.MaxPool2d(3, 2, 1), 2, 37, 29, 31),
    "embedding": _embedding,
    "matmul": _apply(lambda x, w: functional.relu(functional.linear(x, w)), (333, 520), (259, 520)),
    "matmul_batched": _apply(lambda a, b: a @ b, (3, 65, 127), (3, 127, 200)),
    "split_k": _apply(lambda x, w: functional.linear(x, w), (40, 8200), (72, 8200)),
    "matvec": _apply(lambda x, w: functional.linear(x, w), (1, 4100), (1030, 4100)),
    "convolution": _layer(lambda: nn.Conv2d(37, 70, 3, 2, 1), 3, 37, 29, 31),
    "depthwise": _layer(lambda: nn.Conv2d(72, 72, 5, 1, 2, groups=72), 2, 72, 28, 27),
    "grouped_convolution": _layer(lambda: nn.Conv2d(48, 36, 3, 1, 1, groups=3), 2, 48, 19, 21),
    "attention": _attention((2, 3, 197, 64), (2, 3, 197, 64), (2, 3, 197, 64)),
    "attention_causal": _attention((1, 4, 300, 80), (1, 4, 300, 80), (1, 4, 300, 80), is_causal=True),
    "attention_mask": _masked,
    "attention_grouped": _attention((2, 8, 129, 128), (2, 2, 150, 128), (2, 2, 150, 128), enable_gqa=True),
    "attention_decode": _attention((2, 8, 1, 128), (2, 2, 3001, 128), (2, 2, 3001, 128), enable_gqa=True),
}
