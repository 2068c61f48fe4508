"""Join projections of one value into a single product, such as queries, keys and values, or gate and up.

Before:  linear(x, w1, b1), linear(x, w2, b2), ...
After:   y = linear(x, cat([w1, w2, ...]), cat([b1, b2, ...]));  slices of y's last axis

A missing bias becomes zeros where another has one. The concatenations have constant operands, so a later pass makes
constants of them. Projections whose weights are to be quantized are joined where they are quantized alike. All
projections depend on ``x`` and constants only, never on each other, so no cycle can arise. Their
order is that of the graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from .annotate_quantization import LAYERS, SPEC
from .base import Pass, Report
from .graph.edit import insert, tensor_shape
from .graph.match import argument, aten, dtype_of, is_op, is_tensor, substitute, users_of, without_copies
from .graph.program import Program
from .graph.query import OPAQUE, calls, is_constant

_PRODUCTS = (aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default)


@dataclass(frozen=True)
class Projection:
    """A product with a constant matrix; ``axis`` is the matrix's output axis."""

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    axis: int

    @property
    def width(self) -> Any:
        """How many columns it gives."""
        return tensor_shape(self.weight)[self.axis]


class FuseProjections(Pass):
    """Join linear operators that share their input."""

    def run(self, program: Program, report: Report) -> None:
        """Group by input, in graph order, and join every group of two or more."""
        groups: dict[tuple[Any, ...], list[Projection]] = {}
        for node in calls(program.graph, _PRODUCTS):
            projection = _projection(node)
            if projection is not None:
                key = (without_copies(projection.x), node.target, node.meta.get(SPEC))
                groups.setdefault(key, []).append(projection)
        for (x, *_), group in groups.items():
            if len(group) > 1:
                _join(x, group, report)


def _projection(node: fx.Node) -> Projection | None:
    """A product as a projection, whatever its weight is."""
    args: Any = node.args
    if is_op(node, aten.linear.default):
        x, weight, bias, axis = args[0], args[1], argument(node, 2, "bias"), 0
    elif is_op(node, aten.addmm.default):
        if argument(node, 3, "beta", 1) != 1 or argument(node, 4, "alpha", 1) != 1:
            return None
        (bias, x, weight), axis = args[:3], 1
    else:
        (x, weight), bias, axis = args[:2], None, 1
    if not is_tensor(weight) or len(tensor_shape(weight)) != 2 or not is_tensor(x):
        return None
    return Projection(node, x, weight, bias, axis)


def _join(x: fx.Node, group: list[Projection], report: Report) -> None:
    alike: dict[Any, list[Projection]] = {}
    for projection in group:
        reason = _refusal(projection)
        if reason:
            report.refuse(projection.node, reason)
        else:
            alike.setdefault(dtype_of(projection.weight), []).append(projection)
    for dtype, members in alike.items():
        if len(members) > 1:
            _fuse(members, report)
        elif len(alike) > 1:
            report.refuse(members[0].node, f"no other projection of {x.name} has weights in {dtype}")


def _refusal(projection: Projection) -> str | None:
    weight, bias = projection.weight, projection.bias
    if not is_constant(weight):
        return f"its weight {weight.name} is {'quantized' if _quantized(weight) else 'not constant'}"
    if bias is not None and not is_constant(bias):
        return f"its bias {bias.name} is not constant"
    for constant in (weight,) if bias is None else (weight, bias):
        other = _other_user(constant, projection.node)
        if other is not None:
            return f"{constant.name} is also used by {other.name}; joined, it would be stored twice"
    if bias is None:
        return None
    if len(tensor_shape(bias)) != 1 or tensor_shape(bias)[0] != projection.width or dtype_of(bias) != dtype_of(weight):
        return f"its bias {bias.name} is no vector of the weight's width and dtype"
    return None


def _quantized(weight: fx.Node) -> bool:
    """Whether a weight is put together from integers by layout operators at most."""
    return str(weight.target).startswith(OPAQUE) or any(map(_quantized, weight.all_input_nodes[:1]))


def _other_user(constant: fx.Node, node: fx.Node) -> fx.Node | None:
    """A user of a constant, or of what it is computed from, besides one."""
    for user in users_of(constant):
        if user is not node:
            return user
    for operand in constant.all_input_nodes:
        other = _other_user(operand, constant)
        if other is not None:
            return other
    return None


def _fuse(members: list[Projection], report: Report) -> None:
    graph, first = members[0].node.graph, members[0].node
    nodes = [member.node for member in members]
    constants = [value for member in members for value in (member.weight, member.bias) if value is not None]
    _hoist(constants, first)
    axis = members[0].axis
    weight = insert(graph, first, aten.cat.default, ([one.weight for one in members], axis), origins=nodes)
    bias = None
    if any(member.bias is not None for member in members):
        biases = [member.bias if member.bias is not None else _zeros(member, first) for member in members]
        bias = insert(graph, first, aten.cat.default, (biases, 0), origins=nodes)
    x = members[0].x
    if is_op(first, aten.addmm.default):
        args: tuple[Any, ...] = (bias, x, weight)
    else:
        args = (x, weight) if bias is None else (x, weight, bias)
    product = insert(graph, first, first.target, args, origins=nodes)
    if SPEC in first.meta:
        product.meta[SPEC] = first.meta[SPEC]
        product.meta[LAYERS] = tuple(layer for node in nodes for layer in node.meta[LAYERS])
    last, start = len(tensor_shape(product)) - 1, 0
    names = ", ".join(node.name for node in nodes)
    for member in members:
        stop = start + member.width
        part = insert(graph, member.node, aten.slice.Tensor, (product, last, start, stop), origins=(member.node,))
        report.change(member.node, f"columns {start} to {stop} of one product of {x.name}: {names}")
        substitute(member.node, part)
        start = stop


def _zeros(member: Projection, before: fx.Node) -> fx.Node:
    dtype = dtype_of(member.weight)
    return insert(before.graph, before, aten.full.default, ([member.width], 0.0), {"dtype": dtype}, origins=(before,))


def _hoist(constants: list[fx.Node], before: fx.Node) -> None:
    """Move constants, and what they are computed from, before a node."""
    needed: set[fx.Node] = set()
    pending = list(constants)
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            pending.extend(node.all_input_nodes)
    for node in sorted(needed):
        if before < node:
            before.prepend(node)
