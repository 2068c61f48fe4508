"""Modules as all systems of the CPU benchmark take them: tensors in, a flat tuple of tensors out."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .values import flatten


class Flat(nn.Module):
    """A module called by the names of its inputs, or by position, whose results are a flat tuple."""

    def __init__(self, inner: nn.Module, names: tuple[str, ...] | None = None) -> None:
        super().__init__()
        self.inner = inner
        self.names = names

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Any shapes."""
        given: Any = {} if self.names is None else dict(zip(self.names, tensors, strict=True))
        return tuple(flatten(self.inner(**given) if given else self.inner(*tensors)))


class InPrecision(nn.Module):
    """A flat module with its weights and arithmetic in another dtype; floating inputs and outputs stay float32."""

    def __init__(self, inner: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner = copy.deepcopy(inner).to(dtype)
        self.dtype = dtype

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Any shapes."""
        given = (tensor.to(self.dtype) if tensor.is_floating_point() else tensor for tensor in tensors)
        return tuple(value.float() if value.is_floating_point() else value for value in self.inner(*given))
