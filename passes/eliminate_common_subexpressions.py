"""Compute equal values once.

Before:  a = f(x, 2); b = f(x, 2); return g(a, b)
After:   a = f(x, 2); return g(a, a)

Equal are: calls of a pure operator with equal arguments; constants that are the same memory (storage, offset, shape,
strides, dtype), as tied weights are, or small ones that folding made with the same content; sizes with the same
expression, wherever they were asked for; constant regions with the same body on the same constants. Calls that draw
random numbers are never equal.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .base import Pass, Report
from .graph.edit import replace
from .graph.program import Program
from .graph.query import SMALL, is_pure, is_random, tensor_of
from .graph.regions import body, is_region


class EliminateCommonSubexpressions(Pass):
    """Let later equal values be the first one, in one walk: operands are already the first of their kind."""

    def run(self, program: Program, report: Report) -> None:
        """Walk in graph order, so that what is equal through equal operands is found in the same walk."""
        first: dict[Any, fx.Node] = {}
        for node in list(program.graph.nodes):
            key = _key(node)
            if key is None:
                continue
            earlier = first.setdefault(key, node)
            if earlier is not node:
                report.change(node, f"equals %{earlier.name}")
                replace(node, earlier)


def _key(node: fx.Node) -> Any:
    """What two equal values have in common; None for a value that equals no other."""
    value = node.meta.get("val")
    if node.op != "placeholder" and isinstance(value, torch.SymInt):
        return "size", value.node.expr
    if node.op == "get_attr":
        tensor = tensor_of(node)
        if tensor is None or tensor.is_sparse:
            return None
        place = (tensor.untyped_storage()._cdata, tensor.storage_offset())
        if node.meta.get("source") == node.target and tensor.numel() * tensor.element_size() <= SMALL:
            content = tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            return "content", tuple(tensor.shape), tensor.dtype, content
        return "constant", place, tuple(tensor.shape), tensor.stride(), tensor.dtype
    if is_region(node, "constant"):
        return "region", _structure(body(node)), tuple(node.args)
    if node.op == "call_function" and is_pure(node) and not is_random(node):
        return "call", node.target, _frozen(node.args), _frozen(node.kwargs)
    return None


def _structure(module: fx.GraphModule) -> tuple[Any, ...]:
    """A body whatever its nodes are named: each node's operator and arguments, operands by their place."""
    places = {node: place for place, node in enumerate(module.graph.nodes)}
    return tuple(
        (
            node.op,
            None if node.op == "placeholder" else node.target,
            _frozen(node.args, places),
            _frozen(node.kwargs, places),
        )
        for node in module.graph.nodes
    )


def _frozen(value: Any, places: dict[fx.Node, int] | None = None) -> Any:
    """A hashable stand-in for arguments; numbers keep their type, since 1, 1.0 and True differ to an operator."""
    if isinstance(value, tuple | list):
        return "list", tuple(_frozen(item, places) for item in value)
    if isinstance(value, dict):
        return "dict", tuple((key, _frozen(item, places)) for key, item in sorted(value.items()))
    if isinstance(value, slice):
        return "slice", _frozen((value.start, value.stop, value.step), places)
    if isinstance(value, float):
        return float, value.hex()
    if isinstance(value, fx.Node):
        return places[value] if places else value
    return type(value), value
