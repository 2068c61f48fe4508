"""Fold inference batch norm into the convolution or linear map before it.

Before:  batch_norm(conv(x, w, b), gamma, beta, mean, var, eps)
After:   conv(x, w * s, (b - mean) * s + beta)                      s = gamma / sqrt(var + eps)

With no such product before it (or one that has other users) it is a multiplication and an addition:

Before:  batch_norm(x, gamma, beta, mean, var, eps)
After:   x * s + (beta - mean * s)

The arithmetic on weights is done in float32 or wider and rounded once to the weight's dtype. Expects canonical form.
Source: Ioffe and Szegedy, "Batch Normalization", arXiv:1502.03167, algorithm 2.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from .base import Pass, Report
from .graph.edit import tensor_shape
from .graph.emit import Emitter, dtype_of, hoist_constant, wide
from .graph.products import Product, product_of, rebuild, scale_outputs, unfit
from .graph.program import Program
from .graph.query import arguments, aten, is_constant, only_user, supersede


class FoldBatchNorm(Pass):
    """Remove batch norms whose statistics are constants."""

    def run(self, program: Program, report: Report) -> None:
        """Look at every batch norm; what is not in canonical inference form is refused."""
        for node in list(program.graph.nodes):
            if node.op != "call_function" or "batch_norm" not in str(node.target):
                continue
            if reason := _not_constant(node):
                report.refuse(node, reason)
                continue
            product = product_of(node.args[0])
            name = node.name
            if product is None or (reason := _apart(node, product)):
                if product is not None:
                    report.refuse(node, f"not folded into %{product.node.name}: {reason}")
                new = _scale_and_shift(node)
                report.change(node, "as a multiplication and an addition with constants")
            else:
                new = _fold(node, product)
                name = product.node.name
                report.change(node, f"folded into {product.noun} %{name}")
            supersede(node, new, name=name)


def _not_constant(node: fx.Node) -> str | None:
    if node.target is not aten.batch_norm.default:
        return f"{node.target} is no inference batch norm in canonical form"
    given = arguments(node)
    if given["training"] or given["running_mean"] is None or given["running_var"] is None:
        return "it uses the statistics of the batch"
    parameters = [given[key] for key in ("weight", "bias", "running_mean", "running_var")]
    if not all(parameter is None or is_constant(parameter) for parameter in parameters):
        return "its weights or statistics are not constants"
    if not dtype_of(node).is_floating_point or dtype_of(node) != dtype_of(given["input"]):
        return f"its dtype is {dtype_of(node)}"
    return None


def _apart(node: fx.Node, product: Product) -> str | None:
    """Why a batch norm cannot go into the product before it."""
    if only_user(product.node) is not node:
        return f"{product.noun} has other users"
    if product.axis != 1:
        return f"it normalises axis 1, the outputs of the {product.noun} are on axis {product.axis}"
    if dtype_of(product.weight) != dtype_of(node):
        return f"the weight is {dtype_of(product.weight)}, the value {dtype_of(node)}"
    return unfit(product)


def _scale(node: fx.Node, emit: Emitter, given: dict[str, Any]) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    """s, the mean and beta as vectors in a wide dtype."""
    precise = wide(dtype_of(node))
    for key in ("weight", "bias", "running_mean", "running_var"):
        hoist_constant(given[key], node)
    variance = emit.cast(given["running_var"], precise)
    scale = emit(aten.rsqrt.default, emit(aten.add.Tensor, variance, given["eps"]))
    if given["weight"] is not None:
        scale = emit(aten.mul.Tensor, scale, emit.cast(given["weight"], precise))
    beta = None if given["bias"] is None else emit.cast(given["bias"], precise)
    return scale, emit.cast(given["running_mean"], precise), beta


def _fold(node: fx.Node, product: Product) -> fx.Node:
    emit = Emitter(node, product.node, node)
    scale, mean, beta = _scale(node, emit, arguments(node))
    weight = scale_outputs(emit, product, scale)
    if product.bias is None:
        offset = emit(aten.neg.default, mean)
    else:
        offset = emit(aten.sub.Tensor, emit.cast(product.bias, wide(dtype_of(node))), mean)
    bias = emit(aten.mul.Tensor, offset, scale)
    if beta is not None:
        bias = emit(aten.add.Tensor, bias, beta)
    return rebuild(emit, product, weight, emit.cast(bias, dtype_of(node)))


def _scale_and_shift(node: fx.Node) -> fx.Node:
    emit = Emitter(node)
    scale, mean, beta = _scale(node, emit, arguments(node))
    shift = emit(aten.mul.Tensor, mean, scale)
    shift = emit(aten.neg.default, shift) if beta is None else emit(aten.sub.Tensor, beta, shift)
    x = node.args[0]
    assert isinstance(x, fx.Node)
    channels = [int(tensor_shape(scale)[0]), *[1] * (len(tensor_shape(x)) - 2)]
    scale, shift = emit.reshape(scale, channels), emit.reshape(shift, channels)
    scale._rename(f"{node.name}_scale")
    shift._rename(f"{node.name}_shift")
    value = emit(aten.mul.Tensor, emit.cast(x, wide(dtype_of(node))), scale)
    value = emit(aten.add.Tensor, value, shift)
    return emit.cast(value, dtype_of(node))
