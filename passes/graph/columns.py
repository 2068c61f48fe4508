"""Columns (entries of the last axis): which of them a node takes from another, and how a node puts parts together.

A selection is ``(root, range)``; the same columns give the same selection whether they were sliced, split, or picked
from a last axis that a view had split in two.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from .edit import same_shape, tensor_shape
from .match import VIEWS, argument, aten, axis_of, is_op, is_tensor, without_copies

Columns = tuple[fx.Node, range]


def columns(node: Any) -> Columns | None:
    """The columns that a node is of the value where selecting began (all of them, for a value not selected from)."""
    node = without_copies(node)
    width = _width(node)
    if width is None:
        return None
    taken = _selection(node)
    if taken is None:
        return node, range(width)
    base, chosen = taken
    inner = columns(base)
    if inner is None:
        return None
    root, available = inner
    return root, available[chosen.start : chosen.stop : chosen.step]


def joined(node: Any) -> tuple[list[fx.Node], bool] | None:
    """The parts that a node puts side by side, and whether their columns alternate."""
    node = without_copies(node)
    if is_op(node, aten.cat.default) and axis_of(node, argument(node, 1, "dim", 0)) == -1:
        return list(node.args[0]), False  # type: ignore[arg-type]
    if not is_op(node, VIEWS):
        return None
    inner: Any = without_copies(node.args[0])
    shape, parts = tensor_shape(inner), _stacked(inner)
    if parts is None or len(shape) < 2 or not same_shape(tensor_shape(node)[:-1], shape[:-2]):
        return None
    axis, members = parts
    return (members, axis == -1) if axis in (-1, -2) else None


def _stacked(node: Any) -> tuple[int, list[fx.Node]] | None:
    """The axis (from the end) along which a node stacks values, and those."""
    if is_op(node, aten.stack.default):
        return axis_of(node, argument(node, 1, "dim", 0)), list(node.args[0])  # type: ignore[arg-type]
    if not is_op(node, aten.cat.default):
        return None
    axis = axis_of(node, argument(node, 1, "dim", 0))
    parts: Any = [without_copies(part) for part in node.args[0]]  # type: ignore[union-attr]
    shape = tensor_shape(node)
    members = []
    for part in parts:
        if not is_op(part, aten.unsqueeze.default, VIEWS):
            return None
        member: Any = part.args[0]
        position = len(shape) + axis
        if not same_shape(tensor_shape(part), (*shape[:position], 1, *shape[position + 1 :])):
            return None
        if not same_shape(tensor_shape(member), (*shape[:position], *shape[position + 1 :])):
            return None
        members.append(member)
    return axis, members


def _width(node: Any) -> int | None:
    shape = tensor_shape(node) if is_tensor(node) else ()
    return shape[-1] if shape and isinstance(shape[-1], int) else None


def _selection(node: fx.Node) -> tuple[Any, range] | None:
    """One step: the columns that a node takes from its operand."""
    if is_op(node, aten.slice.Tensor):
        base: Any = node.args[0]
        width = _width(base)
        bounds = [argument(node, index, name) for index, name in ((2, "start"), (3, "end"), (4, "step"))]
        if width is None or axis_of(base, argument(node, 1, "dim", 0)) != -1:
            return None
        if not all(bound is None or type(bound) is int for bound in bounds):
            return None
        return base, range(*slice(*bounds).indices(width))
    if is_op(node, aten.select.int):
        return _picked(node.args[0], node.args[1], node.args[2])
    if is_op(node, operator.getitem):
        return _split_part(node.args[0], node.args[1])
    return None


def _split_part(source: Any, index: Any) -> tuple[Any, range] | None:
    base = source.args[0] if isinstance(source, fx.Node) and source.args else None
    if not is_tensor(base):
        return None
    if is_op(source, aten.unbind.int):
        return _picked(base, argument(source, 1, "dim", 0), index)
    width = _width(base)
    if width is None or axis_of(base, argument(source, 2, "dim", 0)) != -1:
        return None
    amount: Any = source.args[1]
    if is_op(source, aten.chunk.default):
        amount = -(-width // amount)
    elif not is_op(source, aten.split.Tensor, aten.split_with_sizes.default):
        return None
    sizes = amount if isinstance(amount, list | tuple) else [amount] * (index + 1)
    if not all(type(size) is int for size in sizes):
        return None
    start = sum(sizes[:index])
    return base, range(start, min(start + sizes[index], width))


def _picked(viewed: Any, axis: Any, index: Any) -> tuple[Any, range] | None:
    """Entry ``index`` of one of the two axes that a view made of the last one."""
    viewed = without_copies(viewed)
    if not is_op(viewed, VIEWS):
        return None
    base, shape = viewed.args[0], tensor_shape(viewed)
    width, own = _width(base), _width(viewed)
    if width is None or own is None or not same_shape(shape[:-2], tensor_shape(base)[:-1]):  # type: ignore[arg-type]
        return None
    axis = axis_of(viewed, axis)
    if axis == -1:
        return base, range(index % own, width, own)
    if axis == -2:
        start = index % (width // own) * own
        return base, range(start, start + own)
    return None
