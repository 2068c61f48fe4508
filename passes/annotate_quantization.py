"""Decide which weights are quantized and how; nothing is rewritten yet.

Before:  linear(x, w)
After:   linear(x, w)        meta["quantize"] = how w is to be stored, where the recipe asks for it

Refuses weights that are not constant, are no floating-point matrix, have fewer columns than a group, or are those of a
convolution; numbers that are not finite are an error. A weight that an embedding and a product share is annotated once
for each: each may be stored in its own way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..runtime.errors import CompileError
from .base import Pass, Report
from .graph.edit import tensor_shape
from .graph.match import aten
from .graph.program import Program
from .graph.quantization import Kind, Layer, Ledger, Recipe, WeightSpec
from .graph.query import calls, is_call, is_constant, tensor_of

# Operator → position of its weight, and whether the weight's rows are columns of the result (x @ w).
PRODUCTS: dict[Any, tuple[int, bool]] = {
    aten.linear.default: (1, False),
    aten.addmm.default: (2, True),
    aten.mm.default: (1, True),
    aten.matmul.default: (1, True),
}
_CONVOLUTIONS = (aten.convolution.default, aten.conv1d.default, aten.conv2d.default)
SPEC = "quantize"
LAYERS = "quantized_layers"


class AnnotateQuantization(Pass):
    """Annotate products and embeddings with how their weight is to be stored.

    Args:
        recipe: what was asked for.
        ledger: gets every layer that was asked for and is refused.
    """

    def __init__(self, recipe: Recipe, ledger: Ledger | None = None) -> None:
        self.recipe = recipe
        self.ledger = ledger if ledger is not None else Ledger()

    def run(self, program: Program, report: Report) -> None:
        """Look at every operator with a weight, in graph order.

        Raises:
            CompileError: a weight that is to be quantized has numbers that are not finite.
        """
        for node in calls(program.graph, (*PRODUCTS, *_CONVOLUTIONS, aten.embedding.default)):
            if SPEC in node.meta:
                continue
            kind: Kind = "embedding" if is_call(node, aten.embedding.default) else "linear"
            weight: Any = node.args[0 if kind == "embedding" else PRODUCTS.get(node.target, (1, False))[0]]
            if not is_constant(weight):
                report.refuse(node, f"its weight {weight} is not constant")
                continue
            name = name_of(weight)
            spec = self.recipe.of(name, kind)
            if spec is None:
                continue
            shape = _matrix(node, weight)
            reason = _refusal(node, weight, spec, shape)
            if reason:
                report.refuse(node, f"{name}: {reason}")
                self.ledger.layers.append(Layer(name, kind, spec, shape, reason))
            else:
                _check_finite(weight, name)
                node.meta[SPEC] = spec
                node.meta[LAYERS] = (Layer(name, kind, spec, shape),)
                report.change(node, f"{name}: {spec}, activations {spec.activation_name}")


def name_of(constant: fx.Node) -> str:
    """The dotted name of the weight that a constant is made of (of the first, where there are several)."""
    node = constant
    while node.op != "get_attr" and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return str(node.meta.get("source", node.target))


def _check_finite(weight: fx.Node, name: str) -> None:
    """Look at the numbers that a weight is made of now: it is quantized after the kernels have been compiled."""
    pending = [weight]
    while pending:
        node = pending.pop()
        pending += node.all_input_nodes
        numbers = tensor_of(node)
        if numbers is None or not numbers.is_floating_point() or not numbers.numel():
            continue
        if not all(bool(torch.isfinite(limit)) for limit in torch.aminmax(numbers)):
            raise CompileError(
                f"the weight {name} has numbers that are not finite, which cannot be quantized; mend it, or leave it "
                f'as it is with a recipe file that begins with {{"{name}": "none", ...}}'
            )


def _matrix(node: fx.Node, weight: fx.Node) -> tuple[int, int]:
    """Rows and columns of a weight as it would be stored; (0, 0) where it is no matrix."""
    shape = tensor_shape(weight)
    if len(shape) != 2 or not all(isinstance(extent, int) for extent in shape):
        return 0, 0
    return (shape[1], shape[0]) if PRODUCTS.get(node.target, (0, False))[1] else (shape[0], shape[1])


def _refusal(node: fx.Node, weight: fx.Node, spec: WeightSpec, shape: tuple[int, int]) -> str:
    if node.target in _CONVOLUTIONS:
        return "the weights of convolutions are not quantized"
    if shape == (0, 0):
        return f"the weight {weight.name} is no matrix"
    if not weight.meta["val"].is_floating_point():
        return f"the weight {weight.name} is {weight.meta['val'].dtype}"
    if shape[1] < spec.group:
        return f"it has {shape[1]} columns, fewer than a group of {spec.group}"
    if is_call(node, aten.addmm.default) and (node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("beta", 1) != 1):
        return "the product and what is added to it are multiplied by numbers"
    return ""
