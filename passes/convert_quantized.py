"""Put quantized operators in the places of annotated ones; their weights are quantized when the artifact is written.

Before:  linear(x, w, b)                                       annotated
After:   quantized_linear(x, quantize_weight(w, ...), b, ...)
         embedding(w, indices)  becomes  quantized_embedding(indices, quantize_weight(w, ...), ...)

From here on the program computes something else, on purpose: passes after this one are verified against what it leaves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .annotate_quantization import LAYERS, PRODUCTS, SPEC
from .base import Pass, Report
from .graph.edit import insert, tensor_shape
from .graph.match import argument, aten
from .graph.program import Program
from .graph.quantization import Layer, Ledger, WeightSpec
from .graph.quantized_ops import QUANTIZE_WEIGHT, QUANTIZED_EMBEDDING, QUANTIZED_LINEAR
from .graph.query import calls, is_call, supersede


class ConvertQuantized(Pass):
    """Replace annotated operators.

    Args:
        ledger: gets every layer that is converted.
    """

    approximate = True

    def __init__(self, ledger: Ledger | None = None) -> None:
        self.ledger = ledger if ledger is not None else Ledger()

    def run(self, program: Program, report: Report) -> None:
        """Convert in graph order."""
        for node in calls(program.graph, (*PRODUCTS, aten.embedding.default)):
            if SPEC in node.meta:
                spec, layers = node.meta[SPEC], node.meta[LAYERS]
                self.ledger.layers += layers
                report.change(node, f"{spec}: {', '.join(layer.name for layer in layers)}")
                (_convert_embedding if is_call(node, aten.embedding.default) else _convert)(node, spec, layers)


def _convert(node: fx.Node, spec: WeightSpec, layers: tuple[Layer, ...]) -> None:
    position, transposed = PRODUCTS[node.target]
    args: Any = node.args
    weight, bias, added = args[position], None, None
    if is_call(node, aten.linear.default):
        x, bias = args[0], argument(node, 2, "bias")
    elif is_call(node, aten.addmm.default):
        added, x = args[0], args[1]
        if _is_bias(added, weight):
            bias, added = added, None
    else:
        x = args[0]
    rows = _quantized(node, weight, spec, layers, transposed)
    columns = layers[0].shape[1]
    form = (columns, spec.bits, spec.group, spec.symmetric, spec.activations)
    new = insert(node.graph, node, QUANTIZED_LINEAR, (x, rows, bias, *form), origins=(node,))
    if added is not None:
        new = insert(node.graph, node, aten.add.Tensor, (new, added), origins=(node,))
    supersede(node, new)


def _convert_embedding(node: fx.Node, spec: WeightSpec, layers: tuple[Layer, ...]) -> None:
    args: Any = node.args
    rows = _quantized(node, args[0], spec, layers, False)
    form = (layers[0].shape[1], spec.bits, spec.group, spec.symmetric)
    new = insert(node.graph, node, QUANTIZED_EMBEDDING, (args[1], rows, *form), origins=(node,))
    dtype = node.meta["val"].dtype
    if dtype != torch.float32:
        new = insert(node.graph, node, aten._to_copy.default, (new,), {"dtype": dtype}, origins=(node,))
    supersede(node, new)


def _quantized(
    node: fx.Node, weight: fx.Node, spec: WeightSpec, layers: tuple[Layer, ...], transposed: bool
) -> fx.Node:
    """The rows of a weight: constant, computed with the artifact; they know whose they are."""
    if transposed:
        weight = insert(node.graph, node, aten.permute.default, (weight, [1, 0]), origins=(weight,))
    args = (weight, spec.bits, spec.group, spec.symmetric, spec.search)
    rows = insert(node.graph, node, QUANTIZE_WEIGHT, args, origins=(weight,))
    rows.meta[LAYERS] = layers
    return rows


def _is_bias(value: fx.Node, matrix: fx.Node) -> bool:
    shape = tensor_shape(value)
    return len(shape) == 1 and bool(shape[0] == tensor_shape(matrix)[1])
