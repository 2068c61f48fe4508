"""Operators that only move elements: every result element is one operand element, a constant, or nothing read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ...runtime import sizes
from ...runtime.errors import CompileError
from ...runtime.sizes import Size
from ..expr import Expr
from ..registry import Region, lowers, overloads
from ..values import Value, broadcast, reshape

Mask = Expr | None


@lowers(
    *overloads(
        "view", "reshape", "_unsafe_view", "_reshape_copy", "view_copy", "flatten.using_ints", "unflatten.int",
        "squeeze", "squeeze.dim", "squeeze.dims", "unsqueeze", "view_as", "reshape_as",
    ),
    role="view",
)  # fmt: skip
def _reshape(region: Region, node: fx.Node, a: Value, *args: Any) -> Value:
    return reshape(region.kernel, a, region.shape(node))


@lowers(*overloads("expand", "expand_copy", "expand_as", "broadcast_to"), role="view")
def _expand(region: Region, node: fx.Node, a: Value, *args: Any, **kwargs: Any) -> Value:
    return broadcast(a, region.shape(node))


@lowers(*overloads("permute", "permute_copy"), role="view")
def _permute(region: Region, node: fx.Node, a: Value, dims: Sequence[int]) -> Value:
    rank = len(a.shape)
    order = [dim % rank for dim in dims]
    back = [order.index(axis) for axis in range(rank)]
    return Value(region.shape(node), a.dtype, lambda index, mask: a.at([index[axis] for axis in back], mask))


@lowers(*overloads("transpose.int", "swapaxes", "transpose_copy.int"), role="view")
def _transpose(region: Region, node: fx.Node, a: Value, first: int, second: int) -> Value:
    order = list(range(len(a.shape)))
    if order:
        order[first], order[second] = order[second], order[first]
    return _permute(region, node, a, order)


@lowers(*overloads("t", "numpy_T", "mT", "adjoint"), role="view")
def _t(region: Region, node: fx.Node, a: Value) -> Value:
    order = list(range(len(a.shape)))
    if len(order) >= 2:
        order[-1], order[-2] = order[-2], order[-1]
    return _permute(region, node, a, order)


@lowers(*overloads("movedim.int"), role="view")
def _movedim(region: Region, node: fx.Node, a: Value, source: int, destination: int) -> Value:
    order = list(range(len(a.shape)))
    axis = order.pop(source)
    order.insert(destination % len(a.shape), axis)
    return _permute(region, node, a, order)


def _start(region: Region, start: Any, extent: Size) -> Size:
    """A slice's first index: negative counts from the end, and both ends are clamped as Python does."""
    if start is None:
        return 0
    start = region.symbols.size(start)
    if isinstance(start, int):
        if start < 0:
            return sizes.maximum(sizes.add(extent, start), 0)
        low, _ = sizes.bounds(extent, region.symbols.ranges)
        return start if start <= low else sizes.minimum(start, extent)
    low, _ = sizes.bounds(start, region.symbols.ranges)
    if low < 0:
        raise CompileError(f"a slice starts at {sizes.show(start)}, whose sign is not known")
    # The exporter only emits a symbolic start that it has proved to lie inside.
    return start


@lowers(*overloads("slice.Tensor", "slice_copy.Tensor"), role="view")
def _slice(
    region: Region, node: fx.Node, a: Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Value:
    dim %= len(a.shape)
    first = _start(region, start, a.shape[dim])

    def at(index: tuple[Size, ...], mask: Mask) -> Expr:
        own = list(index)
        own[dim] = sizes.add(first, sizes.mul(own[dim], step))
        return a.at(own, mask)

    return Value(region.shape(node), a.dtype, at)


@lowers(*overloads("narrow", "narrow_copy"), role="view")
def _narrow(region: Region, node: fx.Node, a: Value, dim: int, start: Any, length: Any) -> Value:
    return _slice(region, node, a, dim, start)


@lowers(*overloads("select.int", "select_copy.int"), role="view")
def _select(region: Region, node: fx.Node, a: Value, dim: int, position: Any) -> Value:
    dim %= len(a.shape)
    position = region.symbols.size(position)
    if isinstance(position, int) and position < 0:
        position = sizes.add(a.shape[dim], position)
    return Value(region.shape(node), a.dtype, lambda index, mask: a.at((*index[:dim], position, *index[dim:]), mask))


def _pieces(region: Region, node: fx.Node, a: Value, dim: int) -> tuple[Value, ...]:
    """The operand cut along an axis into pieces of the shapes that the node's results have."""
    dim %= len(a.shape)
    pieces = []
    offset: Size = 0
    for piece in node.meta["val"]:
        shape = region.symbols.shape(piece)
        pieces.append(_shifted(a, shape, dim, offset))
        offset = sizes.add(offset, shape[dim])
    return tuple(pieces)


def _shifted(a: Value, shape: tuple[Size, ...], dim: int, offset: Size) -> Value:
    def at(index: tuple[Size, ...], mask: Mask) -> Expr:
        own = list(index)
        own[dim] = sizes.add(own[dim], offset)
        return a.at(own, mask)

    return Value(shape, a.dtype, at)


@lowers(*overloads("split.Tensor", "split_with_sizes", "chunk", "split.sizes", "tensor_split.sections"), role="view")
def _split(region: Region, node: fx.Node, a: Value, lengths: Any, dim: int = 0) -> tuple[Value, ...]:
    return _pieces(region, node, a, dim)


@lowers(*overloads("unbind.int"), role="view")
def _unbind(region: Region, node: fx.Node, a: Value, dim: int = 0) -> tuple[Value, ...]:
    dim %= len(a.shape)
    shape = tuple(extent for axis, extent in enumerate(a.shape) if axis != dim)

    def piece(position: int) -> Value:
        return Value(shape, a.dtype, lambda index, mask: a.at((*index[:dim], position, *index[dim:]), mask))

    return tuple(piece(position) for position in range(len(node.meta["val"])))


@lowers(*overloads("flip"), role="view")
def _flip(region: Region, node: fx.Node, a: Value, dims: Sequence[int]) -> Value:
    axes = {dim % len(a.shape) for dim in dims}

    def at(index: tuple[Size, ...], mask: Mask) -> Expr:
        own = [
            sizes.sub(sizes.add(extent, -1), position) if axis in axes else position
            for axis, (position, extent) in enumerate(zip(index, a.shape, strict=True))
        ]
        return a.at(own, mask)

    return Value(a.shape, a.dtype, at)


@lowers(*overloads("repeat", "tile"), role="view")
def _repeat(region: Region, node: fx.Node, a: Value, repeats: Sequence[Any]) -> Value:
    shape = region.shape(node)
    missing = len(shape) - len(a.shape)

    def at(index: tuple[Size, ...], mask: Mask) -> Expr:
        own = [
            0 if extent == 1 else region.kernel.split(position, extent)[1]
            for position, extent in zip(index[missing:], a.shape, strict=True)
        ]
        return a.at(own, mask)

    return Value(shape, a.dtype, at)


@lowers(*overloads("repeat_interleave.self_int"), role="view")
def _repeat_interleave(
    region: Region, node: fx.Node, a: Value, repeats: Any, dim: int | None = None, **kwargs: Any
) -> Value:
    if dim is None:
        a, dim = reshape(region.kernel, a, (sizes.product(a.shape),)), 0
    dim %= len(a.shape)
    count = region.symbols.size(repeats)

    def at(index: tuple[Size, ...], mask: Mask) -> Expr:
        own = list(index)
        own[dim] = region.kernel.split(own[dim], count)[0]
        return a.at(own, mask)

    return Value(region.shape(node), a.dtype, at)


@lowers(*overloads("cat", "concat", "concatenate"), role="view")
def _cat(region: Region, node: fx.Node, tensors: Sequence[Value], dim: int = 0) -> Value:
    shape, dtype = region.shape(node), region.dtype(node)
    parts = [part for part in tensors if part.shape != (0,)]
    dim %= len(shape)
    starts: list[Size] = [0]
    for part in parts:
        starts.append(sizes.add(starts[-1], part.shape[dim]))
    builder = region.builder
    compute = Value(shape, dtype, _nothing).compute

    def at(index: tuple[Size, ...], mask: Mask) -> Expr:
        result: Expr | None = None
        for part, start in reversed(list(zip(parts, starts, strict=False))):
            inside = region.kernel.inside(sizes.sub(index[dim], start), 0, part.shape[dim])
            own = list(index)
            own[dim] = sizes.sub(own[dim], start)
            value = builder.cast(part.at(own, builder.all_of(mask, inside)), compute)
            if result is None:
                result = value
            else:
                before_end = region.kernel.inside(index[dim], 0, sizes.add(start, part.shape[dim]))
                result = value if before_end is None else builder.call("where", compute, before_end, value, result)
        assert result is not None
        return result

    return Value(shape, dtype, at)


def _nothing(index: tuple[Size, ...], mask: Mask) -> Expr:
    raise AssertionError("never read")


@lowers(*overloads("stack"), role="view")
def _stack(region: Region, node: fx.Node, tensors: Sequence[Value], dim: int = 0) -> Value:
    dim %= len(region.shape(node))

    def raised(part: Value) -> Value:
        shape = (*part.shape[:dim], 1, *part.shape[dim:])
        return Value(shape, part.dtype, lambda index, mask: part.at((*index[:dim], *index[dim + 1 :]), mask))

    return _cat(region, node, [raised(part) for part in tensors], dim)


@lowers(*overloads("constant_pad_nd", "pad"), role="view")
def _pad(region: Region, node: fx.Node, a: Value, pad: Sequence[Any], *rest: Any) -> Value:
    fill: Any = rest[0] if rest else 0
    if node.target in overloads("pad"):
        mode = rest[0] if rest else "constant"
        if mode != "constant":
            return _mode_pad(mode)(region, node, a, pad)
        fill = rest[1] if len(rest) > 1 and rest[1] is not None else 0
    rank = len(a.shape)
    before: list[Size] = [0] * rank
    for position in range(len(pad) // 2):
        before[rank - 1 - position] = region.symbols.size(pad[2 * position])
    builder = region.builder

    def at(index: tuple[Size, ...], mask: Mask) -> Expr:
        own = [sizes.sub(position, lead) for position, lead in zip(index, before, strict=True)]
        inside = builder.all_of(
            *(region.kernel.inside(position, 0, extent) for position, extent in zip(own, a.shape, strict=True))
        )
        value = a.at(own, builder.all_of(mask, inside))
        if inside is None:
            return value
        return builder.call("where", value.dtype, inside, value, region.number(fill, value.dtype))

    return Value(region.shape(node), a.dtype, at)


def _outside(mode: str, position: Size, extent: Size) -> Size:
    """Where a padding mode reads for an index that may lie outside."""
    last = sizes.add(extent, -1)
    if mode == "replicate":
        return sizes.minimum(sizes.maximum(position, 0), last)
    if mode == "reflect":
        below = sizes.maximum(position, sizes.mul(position, -1))
        return sizes.minimum(below, sizes.sub(sizes.mul(last, 2), below))
    return sizes.mod(sizes.add(position, extent), extent)


def _mode_pad(mode: str) -> Any:
    """reflection_pad and replication_pad of any rank."""

    def build(region: Region, node: fx.Node, a: Value, pad: Sequence[Any]) -> Value:
        rank = len(a.shape)
        before: list[Size] = [0] * rank
        for position in range(len(pad) // 2):
            before[rank - 1 - position] = region.symbols.size(pad[2 * position])
        padded = range(rank - len(pad) // 2, rank)

        def at(index: tuple[Size, ...], mask: Mask) -> Expr:
            own = list(index)
            for axis in padded:
                own[axis] = _outside(mode, sizes.sub(own[axis], before[axis]), a.shape[axis])
            return a.at(own, mask)

        return Value(region.shape(node), a.dtype, at)

    return build


lowers(*overloads(*(f"reflection_pad{rank}d" for rank in (1, 2, 3))), role="view")(_mode_pad("reflect"))
lowers(*overloads(*(f"replication_pad{rank}d" for rank in (1, 2, 3))), role="view")(_mode_pad("replicate"))


def _triangle(keep_lower: bool) -> Any:
    def build(region: Region, node: fx.Node, a: Value, diagonal: int = 0) -> Value:
        builder = region.builder

        def at(index: tuple[Size, ...], mask: Mask) -> Expr:
            row, column = builder.index(sizes.add(index[-2], diagonal)), builder.index(index[-1])
            keep = builder.call("le", "bool", column, row) if keep_lower else builder.call("ge", "bool", column, row)
            value = a.at(index, mask)
            return builder.call("where", value.dtype, keep, value, builder.const(0, value.dtype))

        return Value(a.shape, a.dtype, at)

    return build


lowers(*overloads("tril"), role="view")(_triangle(True))
lowers(*overloads("triu"), role="view")(_triangle(False))


@lowers(*overloads("pixel_shuffle"), role="view")
def _pixel_shuffle(region: Region, node: fx.Node, a: Value, factor: int) -> Value:
    def at(index: tuple[Size, ...], mask: Mask) -> Expr:
        *lead, channel, row, column = index
        row, inner_row = region.kernel.split(row, factor)
        column, inner_column = region.kernel.split(column, factor)
        source = sizes.add(sizes.mul(channel, factor * factor), sizes.mul(inner_row, factor), inner_column)
        return a.at((*lead, source, row, column), mask)

    return Value(region.shape(node), a.dtype, at)


@lowers(*overloads("channel_shuffle"), role="view")
def _channel_shuffle(region: Region, node: fx.Node, a: Value, groups: int) -> Value:
    def at(index: tuple[Size, ...], mask: Mask) -> Expr:
        batch, channel, *rest = index
        within, group = region.kernel.split(channel, groups)
        return a.at((batch, sizes.add(sizes.mul(group, sizes.floordiv(a.shape[1], groups)), within), *rest), mask)

    return Value(region.shape(node), a.dtype, at)


@lowers(*overloads("roll"), role="view")
def _roll(region: Region, node: fx.Node, a: Value, shifts: Sequence[int], dims: Sequence[int] = ()) -> Value:
    if not dims:
        flat = reshape(region.kernel, a, (sizes.product(a.shape),))
        rolled = _rolled(region, flat, {0: shifts[0]})
        return reshape(region.kernel, rolled, a.shape)
    return _rolled(region, a, {dim % len(a.shape): shift for dim, shift in zip(dims, shifts, strict=True)})


def _rolled(region: Region, a: Value, shifts: dict[int, int]) -> Value:
    def at(index: tuple[Size, ...], mask: Mask) -> Expr:
        own = list(index)
        for axis, shift in shifts.items():
            extent = a.shape[axis]
            amount = sizes.mod(-shift, extent) if isinstance(extent, int) else sizes.sub(extent, shift)
            own[axis] = sizes.mod(sizes.add(own[axis], amount), extent)
        return a.at(own, mask)

    return Value(a.shape, a.dtype, at)


@lowers(torch.ops.aten.diagonal.default, role="view")
def _diagonal(region: Region, node: fx.Node, a: Value, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Value:
    rank = len(a.shape)
    dim1, dim2 = dim1 % rank, dim2 % rank

    def at(index: tuple[Size, ...], mask: Mask) -> Expr:
        *lead, position = index
        rest = iter(lead)
        own: list[Size] = []
        for axis in range(rank):
            if axis == dim1:
                own.append(sizes.add(position, max(-offset, 0)))
            elif axis == dim2:
                own.append(sizes.add(position, max(offset, 0)))
            else:
                own.append(next(rest))
        return a.at(own, mask)

    return Value(region.shape(node), a.dtype, at)
