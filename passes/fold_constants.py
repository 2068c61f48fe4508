"""Compute at compile time what depends on constants only.

Before:  add(x, mul(w, 2))                       w a weight
After:   add(x, c)                               c computed now, where it is small
         add(x, constant(w) { mul(w, 2) })       a region computed when the artifact is written, where it is large

Large values are not computed here: each becomes one region with everything that leads to it from the weights, so that
the compiler never holds a second copy of the weights. Values whose size varies are no constants. Neither are values
that are large although what they are made of is small (an expanded row, a mask made of two ranges): lowering computes
those where they are used, which costs less than reading them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .base import Pass, Report
from .graph.edit import insert_constant
from .graph.program import Program
from .graph.quantized_ops import QUANTIZE_WEIGHT
from .graph.query import SMALL, is_foldable, remove_unused, size_in_bytes, tensor_of
from .graph.regions import Region, body, is_region, outline

# A large value may be at most this many times the size of the weights it is made of.
_GROWTH = 2


class FoldConstants(Pass):
    """Evaluate small constants and outline large ones.

    Args:
        outline: False leaves large ones as they are, for passes that add to weights before the run that outlines.
    """

    def __init__(self, *, outline: bool = True) -> None:
        self.outline = outline

    def run(self, program: Program, report: Report) -> None:
        """Evaluate in graph order, then outline what is still computed from constants and used by something else."""
        module = program.module
        constants = _constants(program.graph)
        values: dict[fx.Node, Any] = {}
        placed: list[tuple[fx.Node, fx.Node]] = []
        for node in list(program.graph.nodes):
            if node.op == "get_attr":
                values[node] = tensor_of(node)
            if node.op != "call_function" or node not in constants or not _is_small(node):
                continue
            if any(operand not in values for operand in node.all_input_nodes):
                continue
            values[node] = _evaluate(node, values)
            if isinstance(values[node], torch.Tensor) and any(not _folds(user, constants) for user in node.users):
                new = insert_constant(module, node, node.name, _own(values[node]), origins=(node,))
                placed.append((node, new))
                report.change(node, "computed")
                node.replace_all_uses_with(new, delete_user_cb=lambda user: not _folds(user, constants))
        for node in reversed(list(values)):
            if node.op == "call_function":
                remove_unused(node)
        for node, new in placed:
            if node._erased:
                new.name = node.name
        if self.outline:
            self._outline(module, report)

    def _outline(self, module: fx.GraphModule, report: Report) -> None:
        constants = _constants(module.graph)
        for node in list(module.graph.nodes):
            if node.op != "call_function" or node not in constants or not isinstance(node.meta["val"], torch.Tensor):
                continue
            if all(user in constants for user in node.users):
                continue
            region = _outlined(module, node)
            constants[region] = constants[node]
            report.change(region, f"computed when the artifact is written: {size_in_bytes(region)} bytes")


def _constants(graph: fx.Graph) -> dict[fx.Node, int]:
    """Every constant with the bytes of the weights that it is made of."""
    found: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if node.op == "get_attr" or is_region(node, "constant"):
            if isinstance(node.meta.get("val"), torch.Tensor):
                found[node] = size_in_bytes(node)
        elif node.op == "call_function" and is_foldable(node):
            operands = node.all_input_nodes
            if not all(operand in found for operand in operands):
                continue
            made_of = sum(found[operand] for operand in operands)
            if size_in_bytes(node) <= max(SMALL, _GROWTH * made_of):
                found[node] = made_of
    return found


def _folds(user: fx.Node, constants: dict[fx.Node, int]) -> bool:
    """Whether a user is itself computed here, so that it needs no constant to read."""
    return user in constants and user.op == "call_function" and _is_small(user)


def _is_small(node: fx.Node) -> bool:
    """Whether a value is computed here. Weights are quantized when the artifact is written, where errors are noted."""
    return size_in_bytes(node) <= SMALL and node.target is not QUANTIZE_WEIGHT


def _evaluate(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
    assert callable(node.target)
    with torch.no_grad():
        return node.target(*args, **kwargs)


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with memory of its own: a slice must not keep all of a weight."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _outlined(module: fx.GraphModule, node: fx.Node) -> fx.Node:
    """A region with all that leads from the weights to ``node``; what others use too is in each of their regions."""
    graph = module.graph
    wanted: set[fx.Node] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if current not in wanted and current.op != "get_attr":
            wanted.add(current)
            pending.extend(current.all_input_nodes)
    members: list[fx.Node] = []
    copies: dict[fx.Node, fx.Node] = {}
    with graph.inserting_before(node):
        for one in [one for one in graph.nodes if one in wanted]:
            copies[one] = _copy(graph, one, copies, members)
    node.replace_all_uses_with(copies[node])
    region = outline(module, members, Region("constant"), f"constant_{node.name}")
    remove_unused(node)
    return region


def _copy(graph: fx.Graph, node: fx.Node, copies: dict[fx.Node, fx.Node], members: list[fx.Node]) -> fx.Node:
    """A copy of a call, or of the body of an earlier constant region, at the insertion point."""
    if node.op == "call_function":
        copy = graph.node_copy(node, lambda used: copies.get(used, used))
        copy.meta = dict(node.meta)
        members.append(copy)
        return copy
    inner: dict[fx.Node, fx.Node] = {}
    operands = iter(node.all_input_nodes)
    for one in body(node).graph.nodes:
        if one.op == "placeholder":
            operand = next(operands)
            inner[one] = copies.get(operand, operand)
        elif one.op == "output":
            (result,) = one.all_input_nodes
            return inner[result]
        else:
            inner[one] = _copy(graph, one, inner, members)
    raise AssertionError("a region has an output")
