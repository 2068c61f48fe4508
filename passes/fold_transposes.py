"""Cancel permutations around pointwise operators; what they would do to constants is done to the constants.

Before:  permute(add(mul(permute(x, p), 2), c), q)          q undoes p
After:   add(mul(x, 2), permute(c, q))

Every path into the pointwise operators between the two must start at such a permutation, at a constant or at a number;
each of them must have no other user (it would be computed twice). The constant's permutation, like that of any constant
that feeds a product, is computed by constant folding. Expects canonical form.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .base import Pass, Report
from .canonical_views import compose, permutation
from .graph.edit import same_shape, tensor_shape
from .graph.emit import Emitter
from .graph.program import Program
from .graph.query import aten, calls, is_call, is_constant, only_user, supersede


class FoldTransposes(Pass):
    """Start at every permutation of a pointwise value and look for those that it undoes."""

    def run(self, program: Program, report: Report) -> None:
        """Walk in graph order; a chain of islands between permutations is folded one after the other."""
        for node in calls(program.graph, (aten.permute.default,)):
            operand = node.args[0]
            if not _is_pointwise(operand):
                continue
            order = permutation(node)
            island: list[fx.Node] = []
            reason = _collect(operand, node, order, island)
            if reason is None and not any(_undone(leaf, order) for one in island for leaf in one.all_input_nodes):
                continue  # pointwise operators on constants only: nothing cancels
            if reason:
                report.refuse(node, reason)
                continue
            moved = _rebuild(node, order, island)
            assert isinstance(operand, fx.Node)
            supersede(node, moved[operand])
            report.change(node, f"cancels with the permutations before {', '.join(f'%{one.name}' for one in island)}")


def _is_pointwise(node: Any) -> bool:
    """Whether a node is a pointwise operator with one value."""
    if not isinstance(node, fx.Node) or not isinstance(node.target, torch._ops.OpOverload):
        return False
    pointwise = torch.Tag.pointwise in node.target.tags or node.target is aten._to_copy.default
    return pointwise and isinstance(node.meta.get("val"), torch.Tensor)


def _undone(node: fx.Node, order: list[int]) -> bool:
    """Whether a node is a permutation that ``order`` undoes."""
    if not is_call(node, aten.permute.default) or len(tensor_shape(node)) != len(order):
        return False
    return compose(order, permutation(node)) == list(range(len(order)))


def _collect(node: Any, user: fx.Node, order: list[int], island: list[fx.Node]) -> str | None:
    """Gather the pointwise operators above a permutation, operands first; why it is no island, or None."""
    if only_user(node) is not user:
        return f"%{node.name} has other users"
    if len(tensor_shape(node)) != len(order):
        return f"%{node.name} is broadcast to more axes"
    for operand in node.all_input_nodes:
        if not isinstance(operand.meta.get("val"), torch.Tensor):
            continue  # a size, which is a number
        if _undone(operand, order) or is_constant(operand) or tensor_shape(operand) == ():
            continue
        if operand in island:
            continue
        if not _is_pointwise(operand):
            return f"%{operand.name} is not permuted"
        if reason := _collect(operand, node, order, island):
            return reason
    island.append(node)
    return None


def _rebuild(node: fx.Node, order: list[int], island: list[fx.Node]) -> dict[fx.Node, fx.Node]:
    """The island on values that are not permuted, in front of ``node``."""
    moved: dict[fx.Node, fx.Node] = {}

    def operand(used: fx.Node) -> fx.Node:
        if used not in moved:
            moved[used] = _unpermuted(used)
        return moved[used]

    def _unpermuted(used: fx.Node) -> fx.Node:
        if not isinstance(used.meta.get("val"), torch.Tensor) or not tensor_shape(used):
            return used
        if _undone(used, order):
            return used.args[0]  # type: ignore[return-value]
        emit = Emitter(node, used)
        shape = [int(size) for size in tensor_shape(used)]
        value = emit.reshape(used, [1] * (len(order) - len(shape)) + shape)
        permuted = tuple(int(value.meta["val"].shape[axis]) for axis in order)
        if same_shape(permuted, tensor_shape(value)) and sum(size != 1 for size in permuted) <= 1:
            return value
        return emit(aten.permute.default, value, order)

    for one in island:
        args, kwargs = fx.map_arg((one.args, one.kwargs), operand)
        moved[one] = Emitter(node, one)(one.target, *args, **kwargs)
    return moved
