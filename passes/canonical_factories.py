"""Canonical form of tensors made of one number: the rule that ``canonicalize`` applies to them.

Before:  zeros([8])         ones_like(x)                    new_full(x, [3], 2)      scalar_tensor(2.0)
After:   full([8], 0)       full([size of x, ...], 1)       full([3], 2)             full([], 2.0)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .graph.edit import insert, tensor_shape
from .graph.query import arguments, aten, is_call, size_at

_NUMBER = {
    aten.zeros.default: 0,
    aten.zeros_like.default: 0,
    aten.new_zeros.default: 0,
    aten.ones.default: 1,
    aten.ones_like.default: 1,
    aten.new_ones.default: 1,
}
_GIVEN = {
    aten.full_like.default: "fill_value",
    aten.new_full.default: "fill_value",
    aten.scalar_tensor.default: "s",
}
_LIKE = (aten.zeros_like.default, aten.ones_like.default, aten.full_like.default)


def _full(node: fx.Node) -> tuple[fx.Node, str]:
    given = arguments(node)
    number = _NUMBER[node.target] if node.target in _NUMBER else given[_GIVEN[node.target]]  # type: ignore[index]
    if node.target in _LIKE:
        source: Any = node.args[0]
        sizes = [size_at(node, source, axis) for axis in range(len(tensor_shape(source)))]
    else:
        sizes = list(given.get("size", ()))
    dtype = {"dtype": node.meta["val"].dtype}
    return insert(node.graph, node, aten.full.default, (sizes, number), dtype, origins=(node,)), "as full"


def _cast(node: fx.Node) -> tuple[fx.Node, str] | None:
    """A cast of a filled tensor is filled with the number in the other dtype."""
    filled = node.args[0]
    if not is_call(filled, aten.full.default):
        return None
    sizes, number = filled.args[:2]  # type: ignore[union-attr]
    source, dtype = filled.meta["val"].dtype, node.meta["val"].dtype  # type: ignore[union-attr]
    if isinstance(number, fx.Node):
        return None
    number = torch.tensor(number, dtype=source).to(dtype).item()
    return insert(node.graph, node, aten.full.default, (sizes, number), {"dtype": dtype}, origins=(node,)), "as full"


FACTORIES: dict[object, list[Any]] = {target: [_full] for target in (*_NUMBER, *_GIVEN)}
FACTORIES[aten._to_copy.default] = [_cast]
