"""A multilayer perceptron: 128 → 256 → 256 → 10."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .initialize import RELU_GAIN, initialize

WIDTHS = (128, 256, 256, 10)


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in zip(widths[:-1], widths[1:], strict=True))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, widths[0]] to [batch, widths[-1]]."""
        *hidden, last = self.layers
        for layer in hidden:
            x = layer(x).relu()
        return last(x)


def build(variant: str = "mlp", seed: int = 0) -> nn.Module:
    """A seeded model in eval mode."""
    return initialize(MLP(), seed, gain=RELU_GAIN)


def example(variant: str = "mlp", seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Two rows."""
    return (torch.randn(2, WIDTHS[0], generator=torch.Generator().manual_seed(seed)),), {}
