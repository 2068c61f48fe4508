"""Linear maps and convolutions in canonical form, seen alike: rows, weight, bias, and scaling the weight per output.

``aten.linear(x, w[out, in], b)`` has its outputs on the last axis; ``aten.convolution`` on axis 1, with its weight
``[out, in/groups, ...]``, or ``[in, out/groups, ...]`` when it is transposed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from .edit import tensor_shape
from .emit import Emitter, dtype_of, hoist_constant, wide
from .query import aten, is_call, is_constant

PRODUCTS = (aten.linear.default, aten.convolution.default)


@dataclass(frozen=True)
class Product:
    """A linear map or convolution: its node and operands."""

    node: fx.Node
    weight: fx.Node
    bias: fx.Node | None

    @property
    def axis(self) -> int:
        """The axis of the outputs in its value."""
        return 1 if self.node.target is aten.convolution.default else len(tensor_shape(self.node)) - 1

    @property
    def outputs(self) -> int:
        """The number of outputs."""
        count = tensor_shape(self.node)[self.axis]
        assert isinstance(count, int), "a constant weight has fixed sizes"
        return count

    @property
    def noun(self) -> str:
        """What it is called in a report."""
        return "convolution" if self.node.target is aten.convolution.default else "linear"


def product_of(node: Any) -> Product | None:
    """The product that a node is, if it is one."""
    if not is_call(node, *PRODUCTS):
        return None
    weight = node.args[1]
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    return Product(node, weight, bias)


def unfit(product: Product) -> str | None:
    """Why its weights cannot be changed; None when they can."""
    if not is_constant(product.weight):
        return "its weight is not a constant"
    if product.bias is not None and not is_constant(product.bias):
        return "its bias is not a constant"
    if not dtype_of(product.weight).is_floating_point:
        return f"its weight is {dtype_of(product.weight)}, not floating point"
    return None


def scale_outputs(emit: Emitter, product: Product, scale: Any) -> fx.Node:
    """The weight times a factor per output (a vector ``[outputs]`` or a number), in its dtype, computed wide."""
    weight, dtype = product.weight, dtype_of(product.weight)
    shape = [int(size) for size in tensor_shape(weight)]
    value = emit.cast(weight, wide(dtype))
    if not isinstance(scale, fx.Node):
        return emit.cast(emit(aten.mul.Tensor, value, scale), dtype)
    scale = emit.cast(scale, wide(dtype))
    rest = [1] * (len(shape) - 2)
    if is_call(product.node, aten.convolution.default) and product.node.args[6]:
        groups: Any = product.node.args[8]
        value = emit.reshape(value, [groups, shape[0] // groups, *shape[1:]])
        scale = emit.reshape(scale, [groups, 1, shape[1], *rest])
        value = emit.reshape(emit(aten.mul.Tensor, value, scale), shape)
    else:
        value = emit(aten.mul.Tensor, value, emit.reshape(scale, [shape[0], 1, *rest]))
    return emit.cast(value, dtype)


def rebuild(
    emit: Emitter, product: Product, weight: fx.Node, bias: fx.Node | None, x: fx.Node | None = None
) -> fx.Node:
    """The product with another weight and bias (and other rows), at the emitter's place."""
    for constant, part in ((weight, "weight"), (bias, "bias")):
        hoist_constant(constant, emit.before)
        if constant is not None and constant.op == "call_function":
            constant._rename(f"{product.node.name}_{part}")
    rows = product.node.args[0] if x is None else x
    return emit(product.node.target, rows, weight, bias, *product.node.args[3:])
