"""Following quantized weights from the passes to the artifact: what was asked for, what was applied, how far it is off.

Weights are quantized when the artifact is written. A watch notes the error of every layer in that moment, and keeps the
rows where outputs are verified afterwards, so that nothing is quantized twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from ..codegen.outputs import output_names
from ..passes.annotate_quantization import LAYERS
from ..passes.graph.edit import insert_constant
from ..passes.graph.program import Program
from ..passes.graph.quantization import Layer, Ledger
from ..passes.graph.quantized_ops import QUANTIZE_WEIGHT
from ..passes.graph.quantized_rows import RowFormat
from ..passes.graph.query import remove_unused
from ..passes.graph.regions import body, is_region
from ..passes.verify import compare

_CHUNK = 1 << 22  # elements whose error is computed at a time


class Watch:
    """Notes what quantizing the weights of programs gave.

    Args:
        keep: keep the quantized rows, for :meth:`settled`.
    """

    def __init__(self, keep: bool) -> None:
        self.keep = keep
        self.errors: dict[Layer, float] = {}
        self._rows: dict[tuple[Layer, ...], torch.Tensor] = {}

    def follow(self, programs: Iterable[Program]) -> None:
        """Watch the constants of programs after the passes."""
        for program in programs:
            for node in program.graph.nodes:
                if is_region(node, "constant") and _quantizing(node) is not None:
                    body(node).register_forward_hook(self._note)

    def _note(self, module: fx.GraphModule, operands: tuple[torch.Tensor, ...], rows: torch.Tensor) -> None:
        (node,) = [node for node in module.graph.nodes if node.target is QUANTIZE_WEIGHT]
        layers: tuple[Layer, ...] = node.meta[LAYERS]
        if self.keep:
            self._rows[layers] = rows
        if all(layer in self.errors for layer in layers):
            return
        weight, start = _operand(module, node, operands), 0
        for layer in layers:
            stop = start + layer.shape[0]
            self.errors[layer] = relative_error(weight[start:stop], rows[start:stop], layer)
            start = stop

    def settled(self, program: Program) -> Program:
        """A program whose quantized weights are the rows that were kept; it is changed in place."""
        for node in list(program.graph.nodes):
            quantizing = _quantizing(node)
            rows = None if quantizing is None else self._rows.get(quantizing.meta[LAYERS])
            if rows is not None:
                constant = insert_constant(program.module, node, f"{node.name}_rows", rows, origins=(node,))
                node.replace_all_uses_with(constant)
                remove_unused(node)
        program.module.recompile()
        return program


def _quantizing(node: fx.Node) -> fx.Node | None:
    """The call that quantizes a weight, which a node is or has inside."""
    if node.target is QUANTIZE_WEIGHT:
        return node
    if not is_region(node, "constant"):
        return None
    return next((inner for inner in body(node).graph.nodes if inner.target is QUANTIZE_WEIGHT), None)


def _operand(module: fx.GraphModule, node: fx.Node, operands: Sequence[torch.Tensor]) -> torch.Tensor:
    """The floating-point weight that a region's call quantizes."""

    class Before(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            return None if n is node else super().run_node(n)

    interpreter = Before(module, garbage_collect_values=False)
    with torch.no_grad():
        interpreter.run(*operands)
    return interpreter.env[node.args[0]]  # type: ignore[index]


def relative_error(weight: torch.Tensor, rows: torch.Tensor, layer: Layer) -> float:
    """Root mean square of what quantization changed, relative to that of the weight; 0 for a weight of zeros.

    Args:
        weight: ``[N, K]``, floating point.
        rows: its quantized rows.
        layer: how they are quantized.
    """
    spec = layer.asked
    form = RowFormat(layer.shape[1], spec.bits, spec.group, spec.symmetric)
    count = max(1, _CHUNK // max(1, layer.shape[1]))
    off = whole = 0.0
    for part, stored in zip(weight.split(count), rows.split(count), strict=True):
        part = part.float()
        whole += float(part.square().sum(dtype=torch.float64))
        off += float((form.values(stored) - part).square().sum(dtype=torch.float64))
    return (off / whole) ** 0.5 if whole else 0.0


def describe(ledgers: Iterable[Ledger], errors: dict[Layer, float]) -> list[dict[str, Any]]:
    """The table of layers for the manifest, in order, each once."""
    layers = dict.fromkeys(layer for ledger in ledgers for layer in ledger.layers)
    return [_describe(layer, errors.get(layer)) for layer in layers]


def _describe(layer: Layer, error: float | None) -> dict[str, Any]:
    spec = layer.asked
    found: dict[str, Any] = {
        "layer": layer.name, "kind": layer.kind, "shape": list(layer.shape), "asked": str(spec),
        "applied": None if layer.refusal else str(spec),
    }  # fmt: skip
    if layer.refusal:
        return found | {"why": layer.refusal}
    size = layer.shape[0] * RowFormat(layer.shape[1], spec.bits, spec.group, spec.symmetric).row_bytes
    if layer.kind == "linear":
        found["activations"] = spec.activation_name
    return found | {"bytes": size, "error": None if error is None else float(f"{error:.4g}")}


def deviation(original: Program, quantized: Program) -> dict[str, float]:
    """How far quantization moves each output on the sample, max|a - b| / max|a|, by name."""
    (returned,) = original.graph.output_node().args
    assert isinstance(returned, tuple), "a program returns one flat tuple"
    results = returned[: len(returned) - len(original.states)]
    names = output_names(original.results, results)
    before, after = original.run(original.sample), quantized.run(original.sample)
    pairs = [(a, b) for a, b in zip(before, after, strict=True) if isinstance(a, torch.Tensor)]
    errors = compare(*zip(*pairs, strict=True)) if pairs else []
    return {name: float(f"{error:.4g}") for name, error in zip(names, errors, strict=False)}
