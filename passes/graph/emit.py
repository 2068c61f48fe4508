"""Emitting several nodes in one place, above all the arithmetic by which passes change weights.

Weights change through nodes, not through tensors: constant folding computes small results and makes regions of large
ones, which are computed one at a time when the artifact is written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .edit import insert
from .query import aten, is_constant, is_size


class Emitter:
    """Inserts calls in front of one node, with the provenance of the nodes that a rewrite replaces."""

    def __init__(self, before: fx.Node, *origins: fx.Node) -> None:
        self.before = before
        self.origins = origins or (before,)

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call of an operator; its value is computed from its operands' fake values."""
        return insert(self.before.graph, self.before, target, args, kwargs, origins=self.origins)

    def cast(self, value: fx.Node, dtype: torch.dtype) -> fx.Node:
        """The value in a dtype; itself if it has it."""
        return value if dtype_of(value) == dtype else self(aten._to_copy.default, value, dtype=dtype)

    def reshape(self, value: fx.Node, sizes: list[int]) -> fx.Node:
        """The value in a shape without varying sizes; itself if it has it."""
        return value if list(value.meta["val"].shape) == sizes else self(aten.reshape.default, value, sizes)


def dtype_of(node: fx.Node) -> torch.dtype:
    """The dtype of a tensor node."""
    return node.meta["val"].dtype


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which weights of a dtype are changed: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def hoist_constant(value: Any, before: fx.Node) -> None:
    """Move a constant, with what it is computed from, in front of a node, unless it is there already."""
    if not isinstance(value, fx.Node) or value < before:
        return
    assert is_constant(value) and not is_size(value), value
    for operand in value.all_input_nodes:
        hoist_constant(operand, before)
    before.prepend(value)
