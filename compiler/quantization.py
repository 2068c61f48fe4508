"""Following quantized weights from the passes to the artifact: what was asked for, what was applied, how far it is off.

Weights are quantized when the artifact is written. A watch notes the error of every layer in that moment, and keeps the
rows on disk where outputs are verified afterwards, so that nothing is quantized twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from ..codegen.outputs import output_names
from ..codegen.storage import recipe_of
from ..passes.annotate_quantization import LAYERS, PRODUCTS, SPEC
from ..passes.graph.edit import insert, insert_constant
from ..passes.graph.match import aten
from ..passes.graph.program import Program
from ..passes.graph.quantization import Layer, Ledger
from ..passes.graph.quantized_ops import DEQUANTIZE, QUANTIZE_WEIGHT
from ..passes.graph.query import calls, remove_unused
from ..passes.graph.regions import body, is_region
from ..passes.verify import compare
from .row_store import RowStore

_CHUNK = 1 << 22  # elements whose error is computed at a time
Stored = tuple[str, str, str, tuple[int, int]]
"""What tells a layer's rows from others: they are the same whatever is computed with them."""


def _stored(layer: Layer) -> Stored:
    return layer.name, layer.kind, str(layer.asked), layer.shape


class Watch:
    """Notes what quantizing the weights of programs gave.

    Args:
        keep: keep the quantized rows, to verify with.
    """

    def __init__(self, keep: bool) -> None:
        self.keep = keep
        self.folder: Path | None = None
        self.errors: dict[Stored, float] = {}
        self._rows: dict[tuple[Stored, ...], torch.Tensor] = {}
        self._store: RowStore | None = None

    def follow(self, programs: Iterable[Program]) -> None:
        """Watch the constants of programs after the passes."""
        for program in programs:
            for node in program.graph.nodes:
                if is_region(node, "constant") and _quantizing(node) is not None:
                    body(node).register_forward_hook(self._note)

    def quantize(self, program: Program) -> None:
        """Quantize what has not been, of a program that is followed: to verify an artifact that was written before."""
        for node in program.graph.nodes:
            quantizing = _quantizing(node) if is_region(node, "constant") else None
            if quantizing is not None and tuple(map(_stored, quantizing.meta[LAYERS])) not in self._rows:
                recipe_of(program, node).load()

    def _note(self, module: fx.GraphModule, operands: tuple[torch.Tensor, ...], rows: torch.Tensor) -> None:
        (node,) = [node for node in module.graph.nodes if node.target is QUANTIZE_WEIGHT]
        layers: tuple[Layer, ...] = node.meta[LAYERS]
        names = tuple(map(_stored, layers))
        if self.keep and names not in self._rows:
            self._store = self._store or RowStore(self.folder)
            self._rows[names] = self._store.put(rows)
        if all(name in self.errors for name in names):
            return
        weight, start = _operand(module, node, operands), 0
        for layer in layers:
            stop = start + layer.shape[0]
            self.errors[_stored(layer)] = relative_error(weight[start:stop], rows[start:stop], layer)
            start = stop

    def release(self) -> None:
        """Give back the memory of rows that have been read."""
        if self._store is not None:
            self._store.release()

    def settled(self, program: Program) -> Program:
        """A program whose quantized weights are the rows that were kept; it is changed in place."""
        for node in list(program.graph.nodes):
            quantizing = _quantizing(node)
            if quantizing is not None:
                constant = self._constant(program, node, quantizing.meta[LAYERS])
                node.replace_all_uses_with(constant)
                remove_unused(node)
        program.module.recompile()
        return program

    def dequantized(self, program: Program) -> Program:
        """A program with annotated weights, as passes leave it before they convert it; it is changed in place.

        Returns:
            The program with what quantization leaves of every annotated weight in its place: what is to be computed,
            without any of the operators that compute it.
        """
        for node in calls(program.graph, (*PRODUCTS, aten.embedding.default)):
            if SPEC not in node.meta:
                continue
            spec, layers = node.meta[SPEC], node.meta[LAYERS]
            position, transposed = PRODUCTS.get(node.target, (0, False))
            weight: Any = node.args[position]
            rows = self._constant(program, node, layers)
            form = (layers[0].shape[1], spec.bits, spec.group, spec.symmetric)
            new = insert(program.graph, node, DEQUANTIZE, (rows, *form), origins=(node,))
            if transposed:
                new = insert(program.graph, node, aten.permute.default, (new, [1, 0]), origins=(node,))
            dtype = weight.meta["val"].dtype
            if dtype != torch.float32:
                new = insert(program.graph, node, aten._to_copy.default, (new,), {"dtype": dtype}, origins=(node,))
            node.update_arg(position, new)
            remove_unused(weight)
        program.module.recompile()
        return program

    def _constant(self, program: Program, node: fx.Node, layers: tuple[Layer, ...]) -> fx.Node:
        names = tuple(map(_stored, layers))
        if names not in self._rows:
            # An embedding and a product that share a weight and store it alike share the rows: one of the two has them.
            names = next(known for known in self._rows if list(map(_weight, known)) == list(map(_weight, names)))
        return insert_constant(program.module, node, f"{node.name}_rows", self._rows[names], origins=(node,))


def _weight(stored: Stored) -> tuple[str, str, tuple[int, int]]:
    name, _, form, shape = stored
    return name, form, shape


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
    form = layer.form
    count = max(1, _CHUNK // max(1, layer.shape[1]))
    off = whole = 0.0
    for part, stored in zip(weight.split(count), rows.split(count), strict=True):
        part = part.float()
        whole += float(part.square().sum(dtype=torch.float64))
        off += float((form.values(stored) - part).square().sum(dtype=torch.float64))
    return (off / whole) ** 0.5 if whole else 0.0


def describe(ledgers: Iterable[Ledger], errors: dict[Stored, float]) -> list[dict[str, Any]]:
    """The table of layers for the manifest, in order, each once."""
    layers = dict.fromkeys(layer for ledger in ledgers for layer in ledger.layers)
    return [_describe(layer, errors.get(_stored(layer))) for layer in layers]


def _describe(layer: Layer, error: float | None) -> dict[str, Any]:
    spec = layer.asked
    found: dict[str, Any] = {
        "layer": layer.name, "kind": layer.kind, "shape": list(layer.shape), "asked": str(spec),
        "applied": None if layer.refusal else str(spec),
    }  # fmt: skip
    if layer.refusal:
        return found | {"why": layer.refusal}
    size = layer.shape[0] * layer.form.row_bytes
    if layer.kind == "linear":
        found["activations"] = spec.activation_name
    return found | {"bytes": size, "error": None if error is None else float(f"{error:.4g}")}


def deviation(program: Program, original: Sequence[Any], quantized: Sequence[Any]) -> dict[str, float]:
    """How far quantization moves each output, max|a - b| / max|a|, by name.

    Args:
        program: whose outputs they are.
        original: the flat outputs with the weights as they were.
        quantized: the same with quantized weights.
    """
    names = names_of_outputs(program)
    pairs = [(a, b) for a, b in zip(original, quantized, strict=True) if isinstance(a, torch.Tensor)]
    errors = compare(*zip(*pairs, strict=True)) if pairs else []
    return {name: float(f"{error:.4g}") for name, error in zip(names, errors, strict=False)}


def names_of_outputs(program: Program) -> list[str]:
    """The names of a program's tensor results, in order."""
    (returned,) = program.graph.output_node().args
    assert isinstance(returned, tuple | list), "a program returns one flat tuple"
    return output_names(program.results, returned[: len(returned) - len(program.states)])
