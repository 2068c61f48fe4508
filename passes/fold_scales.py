"""Fold constant factors and terms around a linear map or convolution into its weight and bias.

Before:  linear(x, w, b) * s            After:  linear(x, w * s, b * s)      s a number or one factor per output
Before:  linear(x, w, b) + t            After:  linear(x, w, b + t)          t likewise
Before:  linear(x * a, w, b)            After:  linear(x, w * a, b)          a a number

and the same for convolutions; division counts as a factor. Numbers are also found behind views of the product
(``permute(reshape(linear(x)))* s``). The arithmetic on weights is done in float32 or wider. Expects canonical form.
"""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from .base import Pass, Report
from .graph.edit import same_shape, tensor_shape
from .graph.emit import Emitter, dtype_of, hoist_constant, wide
from .graph.products import PRODUCTS, Product, product_of, rebuild, scale_outputs, unfit
from .graph.program import Program
from .graph.query import aten, calls, is_call, is_constant, only_user, remove_unused, supersede

FACTORS = (aten.mul.Tensor, aten.div.Tensor)
TERMS = (aten.add.Tensor, aten.sub.Tensor)
_VIEWS = (aten.reshape.default, aten.permute.default, aten.unsqueeze.default, aten.squeeze.dim)


class FoldScales(Pass):
    """Fold what comes after every product, then what comes before it."""

    def run(self, program: Program, report: Report) -> None:
        """Walk in graph order: the product that a factor went into is looked at again with the next factor."""
        for node in calls(program.graph, (*FACTORS, *TERMS, *PRODUCTS)):
            if is_call(node, *PRODUCTS):
                _fold_before(node, report)
            else:
                _fold_after(node, report)


def _fold_after(node: fx.Node, report: Report) -> None:
    value, constant = node.args[:2]
    chain = _views(value)
    product = product_of(chain[-1])
    if product is None or not (_is_number(constant) or is_constant(constant)):
        return
    vector = _per_output(constant, product, chain)
    if vector is None:
        report.refuse(node, f"its constant is not one value per output of the {product.noun}")
        return
    if reason := _apart(node, chain, product):
        report.refuse(node, reason)
        return
    first = product.node
    hoist_constant(constant, first)
    emit = Emitter(first, first, node)
    weight, bias = _changed(emit, product, node.target, vector())
    new = rebuild(emit, product, weight, bias)
    name = first.name
    node.replace_all_uses_with(value)  # type: ignore[arg-type]
    remove_unused(node)
    supersede(first, new)
    report.change(node, f"folded into {product.noun} %{name}")


def _views(value: Any) -> list[fx.Node]:
    """The value, and what it is a view of, back to what is no view."""
    chain = [value]
    while is_call(chain[-1], *_VIEWS):
        chain.append(chain[-1].args[0])
    return chain


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _per_output(constant: Any, product: Product, chain: list[fx.Node]) -> Any:
    """A function that makes the constant a number or a vector ``[outputs]``; None if it is neither."""
    if _is_number(constant):
        return lambda: constant
    if len(chain) > 1:
        return None
    shape, rank = tensor_shape(constant), len(tensor_shape(product.node))
    if len(shape) > rank:
        return None
    aligned = (*[1] * (rank - len(shape)), *shape)
    if any(size != 1 for axis, size in enumerate(aligned) if axis != product.axis):
        return None
    if aligned[product.axis] not in (1, product.outputs):
        return None
    return lambda: constant


def _apart(node: fx.Node, chain: list[fx.Node], product: Product) -> str | None:
    """Why a factor or term cannot go into the product."""
    users = [node, *chain]
    for user, used in zip(users, chain, strict=False):
        if only_user(used) is not user:
            return f"{product.noun} has other users"
    if node.kwargs.get("alpha", 1) != 1:
        return "its second operand has a factor of its own"
    if not dtype_of(product.node).is_floating_point or dtype_of(node) != dtype_of(product.node):
        return f"it changes the dtype from {dtype_of(product.node)} to {dtype_of(node)}"
    if not same_shape(tensor_shape(node), tensor_shape(chain[0])):
        return "it changes the shape"
    if node.target in FACTORS and (reason := _shared(product)):
        return reason
    return unfit(product)


def _shared(product: Product) -> str | None:
    """A weight that others use as well would be held twice."""
    return "its weight has other users" if len(product.weight.users) > 1 else None


def _changed(emit: Emitter, product: Product, target: Any, constant: Any) -> tuple[fx.Node, fx.Node | None]:
    """Weight and bias with a factor or term worked in."""
    dtype = dtype_of(product.node)
    if isinstance(constant, fx.Node):
        constant = emit.cast(constant, wide(dtype))
        constant = emit.reshape(constant, [constant.meta["val"].numel()])
        if constant.meta["val"].numel() != product.outputs:
            constant = emit(aten.expand.default, constant, [product.outputs])
    if target in FACTORS:
        if target is aten.div.Tensor:
            constant = emit(aten.reciprocal.default, constant) if isinstance(constant, fx.Node) else 1 / constant
        weight, bias = scale_outputs(emit, product, constant), product.bias
        if bias is not None:
            bias = emit.cast(emit(aten.mul.Tensor, emit.cast(bias, wide(dtype)), constant), dtype_of(bias))
        return weight, bias
    if target is aten.sub.Tensor:
        constant = emit(aten.neg.default, constant) if isinstance(constant, fx.Node) else -constant
    if product.bias is None:
        if not isinstance(constant, fx.Node):
            constant = emit(aten.full.default, [product.outputs], constant, dtype=wide(dtype))
        return product.weight, emit.cast(constant, dtype)
    total = emit(aten.add.Tensor, emit.cast(product.bias, wide(dtype)), constant)
    return product.weight, emit.cast(total, dtype_of(product.bias))


def _fold_before(node: fx.Node, report: Report) -> None:
    """A number times the rows."""
    product = product_of(node)
    assert product is not None
    scaled = node.args[0]
    if not is_call(scaled, *FACTORS) or not _is_number(scaled.args[1]) or scaled.args[1] == 0:  # type: ignore[union-attr]
        return
    assert isinstance(scaled, fx.Node)
    rows, number = scaled.args
    reason = unfit(product) or _shared(product)
    if only_user(scaled) is not node:
        reason = "the scaled value has other users"
    elif dtype_of(rows) != dtype_of(scaled):  # type: ignore[arg-type]
        reason = f"the factor changes the dtype from {dtype_of(rows)} to {dtype_of(scaled)}"  # type: ignore[arg-type]
    if reason:
        report.refuse(node, f"the factor before it stays: {reason}")
        return
    emit = Emitter(node, scaled, node)
    factor = number if scaled.target is aten.mul.Tensor else 1 / number  # type: ignore[operator]
    weight = scale_outputs(emit, product, factor)
    new = rebuild(emit, product, weight, product.bias, rows)  # type: ignore[arg-type]
    supersede(node, new)
    report.change(node, f"the factor {factor} before it is folded into its weight")
