"""Operators whose indices are data: embedding, gather, indexing, and writes into a part of a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from ...runtime import sizes
from ...runtime.errors import CompileError
from ...runtime.sizes import Size
from ..expr import COMPUTE_DTYPE, Expr
from ..registry import Region, lowers, overloads
from ..values import Value, broadcast

Mask = Expr | None


@lowers(*overloads("embedding"), role="gather")
def _embedding(region: Region, node: fx.Node, table: Value, ids: Value, *args: Any, **kwargs: Any) -> Value:
    rank = len(ids.shape)

    def at(index: tuple[Size, ...], mask: Mask) -> Expr:
        row = region.kernel.dynamic(ids.at(index[:rank], mask), table.shape[0])
        return table.at((row, *index[rank:]), mask)

    return Value(region.shape(node), table.dtype, at)


@lowers(*overloads("index_select"), role="gather")
def _index_select(region: Region, node: fx.Node, a: Value, dim: int, ids: Value) -> Value:
    dim %= len(a.shape)

    def at(index: tuple[Size, ...], mask: Mask) -> Expr:
        own = list(index)
        own[dim] = region.kernel.dynamic(ids.at((index[dim],) if ids.shape else (), mask), a.shape[dim])
        return a.at(own, mask)

    return Value(region.shape(node), a.dtype, at)


@lowers(*overloads("gather"), role="gather")
def _gather(region: Region, node: fx.Node, a: Value, dim: int, ids: Value, **kwargs: Any) -> Value:
    return _along(region, node, a, dim, ids, wraps=False)


@lowers(*overloads("take_along_dim"), role="gather")
def _take_along_dim(region: Region, node: fx.Node, a: Value, ids: Value, dim: int | None = None) -> Value:
    if dim is None:
        raise CompileError("take_along_dim without an axis is not supported: flatten both operands and give axis 0")
    shape = region.shape(node)
    dim %= len(shape)
    return _along(region, node, broadcast(a, (*shape[:dim], a.shape[dim], *shape[dim + 1 :])), dim,
                  broadcast(ids, shape), wraps=True)  # fmt: skip


def _along(region: Region, node: fx.Node, a: Value, dim: int, ids: Value, *, wraps: bool) -> Value:
    dim %= max(len(a.shape), 1)

    def at(index: tuple[Size, ...], mask: Mask) -> Expr:
        own = list(index)
        own[dim] = region.kernel.dynamic(ids.at(index, mask), a.shape[dim], wraps=wraps)
        return a.at(own, mask)

    return Value(region.shape(node), a.dtype, at)


@lowers(*overloads("index.Tensor"), role="gather")
def _index(region: Region, node: fx.Node, a: Value, indices: Sequence[Value | None]) -> Value:
    given = [axis for axis, ids in enumerate(indices) if ids is not None]
    tensors = [ids for ids in indices if ids is not None]
    if any(ids.dtype in ("bool", "uint8") for ids in tensors):
        raise CompileError("indexing with a mask gives a size that depends on the data")
    shape = region.shape(node)
    rank = max((len(ids.shape) for ids in tensors), default=0)
    adjacent = given == list(range(given[0], given[-1] + 1)) if given else True
    first = given[0] if adjacent and given else 0
    common = shape[first : first + rank]
    wide = {axis: broadcast(ids, common) for axis, ids in zip(given, tensors, strict=True)}

    def at(index: tuple[Size, ...], mask: Mask) -> Expr:
        inner = index[first : first + rank]
        rest = iter((*index[:first], *index[first + rank :]))
        own: list[Size] = []
        for axis, extent in enumerate(a.shape):
            if axis in wide:
                own.append(region.kernel.dynamic(wide[axis].at(inner, mask), extent, wraps=True))
            else:
                own.append(next(rest))
        return a.at(own, mask)

    return Value(shape, a.dtype, at)


@lowers(*overloads("one_hot"), role="gather")
def _one_hot(region: Region, node: fx.Node, ids: Value, *args: Any) -> Value:
    builder = region.builder

    def at(index: tuple[Size, ...], mask: Mask) -> Expr:
        hit = builder.call("eq", "bool", ids.at(index[:-1], mask), builder.index(index[-1], ids.dtype))
        return builder.cast(hit, "int64")

    return Value(region.shape(node), "int64", at)


@lowers(*overloads("slice_scatter"), role="pointwise")
def _slice_scatter(
    region: Region, node: fx.Node, a: Value, src: Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Value:
    from .views import _start

    dim %= len(a.shape)
    first = _start(region, start, a.shape[dim])
    if step != 1:
        raise CompileError("slice_scatter with a step other than 1 is not supported")

    def at(index: tuple[Size, ...], mask: Mask) -> Expr:
        own = list(index)
        own[dim] = sizes.sub(own[dim], first)
        inside = region.kernel.inside(own[dim], 0, src.shape[dim])
        value = src.at(own, region.builder.all_of(mask, inside))
        if inside is None:
            return value
        return region.builder.call("where", value.dtype, inside, value, a.at(index, mask))

    return Value(a.shape, a.dtype, at)


@lowers(*overloads("select_scatter"), role="pointwise")
def _select_scatter(region: Region, node: fx.Node, a: Value, src: Value, dim: int, position: int) -> Value:
    dim %= len(a.shape)
    chosen = position if position >= 0 else sizes.add(a.shape[dim], position)

    def at(index: tuple[Size, ...], mask: Mask) -> Expr:
        builder = region.builder
        inside = builder.call("eq", "bool", builder.index(index[dim]), builder.index(chosen))
        value = src.at((*index[:dim], *index[dim + 1 :]), builder.all_of(mask, inside))
        return builder.call("where", value.dtype, inside, value, a.at(index, mask))

    return Value(a.shape, a.dtype, at)


@lowers(*overloads("index_copy"), role="reduction")
def _index_copy(region: Region, node: fx.Node, a: Value, dim: int, ids: Value, src: Value) -> Value:
    """For every row the last position that names it, or the row that was there."""
    dim %= max(len(a.shape), 1)
    builder = region.builder
    count = ids.shape[0] if ids.shape else 1

    def at(index: tuple[Size, ...], mask: Mask) -> Expr:
        used = frozenset().union(*(builder.free_size(position) for position in index))
        name = region.kernel.bound_variable("j", count, used)
        target = region.kernel.dynamic(ids.at((name,) if ids.shape else (), mask), a.shape[dim])
        hit = builder.call("eq", "bool", builder.index(target), builder.index(index[dim]))
        place = builder.call("where", "int64", hit, builder.index(name), builder.const(-1, "int64"))
        last = builder.reduce("max", ((name, count),), place, "int64")
        found = builder.call("ge", "bool", last, builder.const(0, "int64"))
        own = list(index)
        own[dim] = region.kernel.dynamic(builder.call("where", "int64", found, last, builder.const(0, "int64")), count)
        compute = COMPUTE_DTYPE.get(a.dtype, a.dtype)
        return builder.call("where", compute, found, src.at(own, mask), a.at(index, mask))

    return Value(a.shape, a.dtype, at)
