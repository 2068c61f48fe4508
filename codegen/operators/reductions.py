"""Operators that consume whole axes: sums and extrema, softmax, the norms, cumulative sums."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ...runtime import sizes
from ...runtime.errors import CompileError, UnsupportedOperator
from ...runtime.sizes import Size
from ..expr import COMPUTE_DTYPE, Expr
from ..registry import Region, lowers, overloads
from ..values import Value, broadcast, dtype_name, reshape

Mask = Expr | None


def reduce(region: Region, a: Value, axes: Sequence[int], op: str, dtype: str, *, keep: bool = False) -> Value:
    """``op`` over axes of a value, computed in ``dtype``.

    A reduction's variable is named after the axis (``i2``), as the loop variables of the kernel's result are: where
    both run over the same row, equal expressions are then the same object and can be kept instead of computed again.
    """
    builder = region.builder
    rank = len(a.shape)
    axes = sorted(axis % rank for axis in axes) if rank else []
    shape = tuple(1 if axis in axes else extent for axis, extent in enumerate(a.shape))
    if not keep:
        shape = tuple(extent for axis, extent in enumerate(a.shape) if axis not in axes)

    def at(index: tuple[Size, ...], mask: Mask) -> Expr:
        outer = list(index) if keep else _spread(index, axes, rank)
        used = frozenset().union(*(builder.free_size(outer[axis]) for axis in range(rank) if axis not in axes))
        if mask is not None:
            used |= builder.free(mask)
        loops = []
        for axis in axes:
            name = region.kernel.bound_variable(f"i{axis}", a.shape[axis], used)
            loops.append((name, a.shape[axis]))
            outer[axis] = name
        body = builder.cast(a.at(outer, mask), dtype)
        if not loops:
            return body
        return builder.reduce(op, tuple(loops), body, "int64" if op.startswith("arg") else dtype)

    return Value(shape, dtype, at)


def _spread(index: Sequence[Size], axes: Sequence[int], rank: int) -> list[Size]:
    rest = iter(index)
    return [0 if axis in axes else next(rest) for axis in range(rank)]


def _axes(dim: Any, rank: int) -> list[int]:
    if dim is None or (isinstance(dim, list | tuple) and not dim):
        return list(range(rank))
    return [dim] if isinstance(dim, int) else list(dim)


def _simple(op: str) -> Any:
    def build(region: Region, node: fx.Node, a: Value, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Value:
        dtype = region.dtype(node)
        compute = COMPUTE_DTYPE.get(dtype, dtype)
        result = reduce(region, a, _axes(dim, len(a.shape)), op, compute, keep=keepdim)
        return Value(result.shape, dtype, result.at)

    return build


lowers(*overloads("sum", "sum.dim_IntList"), role="reduction")(_simple("sum"))
lowers(*overloads("prod", "prod.dim_int"), role="reduction")(_simple("prod"))
lowers(*overloads("amax", "max"), role="reduction")(_simple("max"))
lowers(*overloads("amin", "min"), role="reduction")(_simple("min"))
lowers(*overloads("any", "any.dim", "any.dims"), role="reduction")(_simple("any"))
lowers(*overloads("all", "all.dim", "all.dims"), role="reduction")(_simple("all"))


@lowers(*overloads("mean", "mean.dim"), role="reduction")
def _mean(region: Region, node: fx.Node, a: Value, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Value:
    dtype = region.dtype(node)
    compute = COMPUTE_DTYPE.get(dtype, dtype)
    axes = _axes(dim, len(a.shape))
    total = reduce(region, a, axes, "sum", compute, keep=keepdim)
    return Value(total.shape, dtype, lambda index, mask: _over(region, total.at(index, mask), _count(a, axes), compute))


def _count(a: Value, axes: Sequence[int]) -> Size:
    return sizes.product(a.shape[axis] for axis in axes)


def _over(region: Region, total: Expr, count: Size, compute: str) -> Expr:
    return region.builder.call("div", compute, total, region.builder.index(count, compute))


@lowers(*overloads("var.correction", "var.dim", "std.correction", "std.dim"), role="reduction")
def _variance(region: Region, node: fx.Node, a: Value, dim: Any = None, *args: Any, **kwargs: Any) -> Value:
    correction = kwargs.get("correction", 1)
    if args and isinstance(args[0], bool):
        correction = int(args[0])
    correction = 1 if correction is None else correction
    keepdim = kwargs.get("keepdim", args[1] if len(args) > 1 else False)
    dtype = region.dtype(node)
    compute = COMPUTE_DTYPE.get(dtype, dtype)
    axes = _axes(dim, len(a.shape))
    spread = _centred_squares(region, a, axes, compute)
    total = reduce(region, spread, axes, "sum", compute, keep=keepdim)
    builder = region.builder

    def at(index: tuple[Size, ...], mask: Mask) -> Expr:
        count = builder.call(
            "sub", compute, builder.index(_count(a, axes), compute), builder.const(correction, compute)
        )
        value = builder.call("div", compute, total.at(index, mask), count)
        return builder.call("sqrt", compute, value) if "std" in str(node.target) else value

    return Value(total.shape, dtype, at)


@lowers(*overloads("linalg_vector_norm", "norm.ScalarOpt_dim", "norm.Scalar"), role="reduction")
def _vector_norm(
    region: Region, node: fx.Node, a: Value, order: Any = 2, dim: Any = None, keepdim: bool = False, **kwargs: Any
) -> Value:
    """``sum(|a|^order)^(1/order)``, the largest or smallest magnitude for infinite orders."""
    dtype = region.dtype(node)
    compute = COMPUTE_DTYPE.get(dtype, dtype)
    builder = region.builder
    order = 2.0 if order is None else float(order)
    if order == 0:
        raise CompileError("the norm of order 0 is not supported; count with (x != 0).sum() instead")
    magnitude = math.isinf(order) or order == 1

    def power(index: tuple[Size, ...], mask: Mask) -> Expr:
        value = builder.cast(a.at(index, mask), compute)
        if order == 2:
            return builder.call("mul", compute, value, value)
        value = builder.call("abs", compute, value)
        return value if magnitude else builder.call("pow", compute, value, builder.const(order, compute))

    op = ("max" if order > 0 else "min") if math.isinf(order) else "sum"
    total = reduce(region, Value(a.shape, compute, power), _axes(dim, len(a.shape)), op, compute, keep=keepdim)

    def at(index: tuple[Size, ...], mask: Mask) -> Expr:
        value = total.at(index, mask)
        if order == 2:
            return builder.call("sqrt", compute, value)
        return value if magnitude else builder.call("pow", compute, value, builder.const(1 / order, compute))

    return Value(total.shape, dtype, at)


def _centred(region: Region, a: Value, axes: Sequence[int], compute: str) -> Value:
    """``a`` minus its mean over axes."""
    total = broadcast(reduce(region, a, axes, "sum", compute, keep=True), a.shape)
    builder = region.builder

    def at(index: tuple[Size, ...], mask: Mask) -> Expr:
        mean = _over(region, total.at(index, mask), _count(a, axes), compute)
        return builder.call("sub", compute, builder.cast(a.at(index, mask), compute), mean)

    return Value(a.shape, compute, at)


def _squared(region: Region, a: Value, compute: str) -> Value:
    def at(index: tuple[Size, ...], mask: Mask) -> Expr:
        value = region.builder.cast(a.at(index, mask), compute)
        return region.builder.call("mul", compute, value, value)

    return Value(a.shape, compute, at)


def _centred_squares(region: Region, a: Value, axes: Sequence[int], compute: str) -> Value:
    return _squared(region, _centred(region, a, axes, compute), compute)


@lowers(*overloads("softmax.int", "_softmax", "_safe_softmax"), role="reduction")
def _softmax(region: Region, node: fx.Node, a: Value, dim: int, *args: Any, **kwargs: Any) -> Value:
    return _normalised_exponentials(region, node, a, dim, logarithm=False)


@lowers(*overloads("log_softmax.int", "_log_softmax"), role="reduction")
def _log_softmax(region: Region, node: fx.Node, a: Value, dim: int, *args: Any, **kwargs: Any) -> Value:
    return _normalised_exponentials(region, node, a, dim, logarithm=True)


def _normalised_exponentials(region: Region, node: fx.Node, a: Value, dim: int, *, logarithm: bool) -> Value:
    dtype = region.dtype(node)
    compute = COMPUTE_DTYPE.get(dtype, dtype)
    builder = region.builder
    safe = "_safe_softmax" in str(node.target)
    if not a.shape:
        return region.kernel.constant(0 if logarithm else 1, dtype, ())
    peak = broadcast(reduce(region, a, [dim], "max", compute, keep=True), a.shape)

    def shifted(index: tuple[Size, ...], mask: Mask) -> Expr:
        return builder.call("sub", compute, builder.cast(a.at(index, mask), compute), peak.at(index, mask))

    exponentials = Value(a.shape, compute, lambda index, mask: builder.call("exp", compute, shifted(index, mask)))
    total = broadcast(reduce(region, exponentials, [dim], "sum", compute, keep=True), a.shape)

    def at(index: tuple[Size, ...], mask: Mask) -> Expr:
        if logarithm:
            return builder.call(
                "sub", compute, shifted(index, mask), builder.call("log", compute, total.at(index, mask))
            )
        # One division per row: the reciprocal is the same for all of its elements.
        scale = builder.call("div", compute, builder.const(1, compute), total.at(index, mask))
        value = builder.call("mul", compute, exponentials.at(index, mask), scale)
        if not safe:
            return value
        empty = builder.call("eq", "bool", peak.at(index, mask), builder.const(float("-inf"), compute))
        return builder.call("where", compute, empty, builder.const(0, compute), value)

    return Value(a.shape, dtype, at)


@lowers(*overloads("logsumexp"), role="reduction")
def _log_sum_exp(region: Region, node: fx.Node, a: Value, dim: Any, keepdim: bool = False) -> Value:
    """``peak + log(sum(exp(a - peak)))``; an infinite peak is left out, so that infinities do not cancel to NaN."""
    dtype = region.dtype(node)
    compute = COMPUTE_DTYPE.get(dtype, dtype)
    builder = region.builder
    axes = [axis % len(a.shape) for axis in _axes(dim, len(a.shape))] if a.shape else []
    highest = reduce(region, a, axes, "max", compute, keep=True)

    def finite(index: tuple[Size, ...], mask: Mask) -> Expr:
        value = highest.at(index, mask)
        infinite = builder.call("eq", "bool", builder.call("abs", compute, value), builder.const(float("inf"), compute))
        return builder.call("where", compute, infinite, builder.const(0, compute), value)

    peak = Value(highest.shape, compute, finite)
    wide = broadcast(peak, a.shape)

    def exponential(index: tuple[Size, ...], mask: Mask) -> Expr:
        shifted = builder.call("sub", compute, builder.cast(a.at(index, mask), compute), wide.at(index, mask))
        return builder.call("exp", compute, shifted)

    total = reduce(region, Value(a.shape, compute, exponential), axes, "sum", compute, keep=True)

    def at(index: tuple[Size, ...], mask: Mask) -> Expr:
        own = index if keepdim else tuple(_spread(index, axes, len(a.shape)))
        logarithm = builder.call("log", compute, total.at(own, mask))
        return builder.call("add", compute, logarithm, peak.at(own, mask))

    return Value(region.shape(node), dtype, at)


@lowers(*overloads("layer_norm", "native_layer_norm"), role="reduction")
def _layer_norm(
    region: Region, node: fx.Node, a: Value, normalized_shape: Sequence[int], weight: Any = None, bias: Any = None,
    eps: float = 1e-5, *args: Any,
) -> Any:  # fmt: skip
    several = isinstance(node.meta["val"], tuple | list)
    result = node.meta["val"][0] if several else node.meta["val"]
    dtype = dtype_name(result.dtype)
    compute = COMPUTE_DTYPE.get(dtype, dtype)
    axes = list(range(len(a.shape) - len(normalized_shape), len(a.shape)))
    value = _normalise(region, a, axes, eps, compute, centre=True)
    scaled = _affine(region, value, weight, bias, a.shape, dtype, compute)
    return (scaled, None, None) if several else scaled


@lowers(*overloads("rms_norm"), role="reduction")
def _rms_norm(
    region: Region,
    node: fx.Node,
    a: Value,
    normalized_shape: Sequence[int],
    weight: Any = None,
    eps: float | None = None,
) -> Value:
    dtype = region.dtype(node)
    compute = COMPUTE_DTYPE.get(dtype, dtype)
    if eps is None:
        eps = torch.finfo(getattr(torch, dtype)).eps
    axes = list(range(len(a.shape) - len(normalized_shape), len(a.shape)))
    value = _normalise(region, a, axes, eps, compute, centre=False)
    return _affine(region, value, weight, None, a.shape, dtype, compute)


def _normalise(region: Region, a: Value, axes: Sequence[int], eps: float, compute: str, *, centre: bool) -> Value:
    """``(a - mean) / sqrt(var + eps)`` over axes, or without the mean for the root-mean-square norm."""
    builder = region.builder
    base = _centred(region, a, axes, compute) if centre else a
    total = broadcast(reduce(region, _squared(region, base, compute), axes, "sum", compute, keep=True), a.shape)

    def at(index: tuple[Size, ...], mask: Mask) -> Expr:
        spread = builder.call(
            "add", compute, _over(region, total.at(index, mask), _count(a, axes), compute), builder.const(eps, compute)
        )
        return builder.call(
            "mul", compute, builder.cast(base.at(index, mask), compute), builder.call("rsqrt", compute, spread)
        )

    return Value(a.shape, compute, at)


def _affine(
    region: Region, a: Value, weight: Any, bias: Any, shape: tuple[Size, ...], dtype: str, compute: str
) -> Value:
    builder = region.builder
    factor = broadcast(weight, shape) if isinstance(weight, Value) else None
    term = broadcast(bias, shape) if isinstance(bias, Value) else None

    def at(index: tuple[Size, ...], mask: Mask) -> Expr:
        value = a.at(index, mask)
        if factor is not None:
            value = builder.call("mul", compute, value, builder.cast(factor.at(index, mask), compute))
        if term is not None:
            value = builder.call("add", compute, value, builder.cast(term.at(index, mask), compute))
        return value

    return Value(shape, dtype, at)


@lowers(*overloads("batch_norm", "_native_batch_norm_legit_no_training"), role="pointwise")
def _batch_norm(
    region: Region, node: fx.Node, a: Value, weight: Any, bias: Any, mean: Any, variance: Any, *rest: Any
) -> Any:
    """Batch norm in inference, where its pass is off or refuses; what depends on the channel alone has its shape."""
    several = isinstance(node.meta["val"], tuple | list)
    if not several and rest[0]:
        raise UnsupportedOperator("it normalises by the statistics of the batch; call module.eval() before compiling")
    if not isinstance(mean, Value) or not isinstance(variance, Value):
        raise UnsupportedOperator("it has no running statistics to normalise by (track_running_stats=False)")
    eps = rest[-1] if several else rest[2]
    builder, compute = region.builder, a.compute
    per_channel = (a.shape[1], *(1,) * (len(a.shape) - 2))
    centre, spread = (broadcast(reshape(region.kernel, item, per_channel), a.shape) for item in (mean, variance))

    def at(index: tuple[Size, ...], mask: Mask) -> Expr:
        shifted = builder.call(
            "sub", compute, builder.cast(a.at(index, mask), compute), builder.cast(centre.at(index, mask), compute)
        )
        squared = builder.call(
            "add", compute, builder.cast(spread.at(index, mask), compute), builder.const(eps, compute)
        )
        return builder.call("mul", compute, shifted, builder.call("rsqrt", compute, squared))

    gain, shift = [reshape(region.kernel, p, per_channel) if isinstance(p, Value) else None for p in (weight, bias)]
    result = _affine(region, Value(a.shape, compute, at), gain, shift, a.shape, a.dtype, compute)
    return (result, None, None) if several else result


@lowers(*overloads("group_norm", "native_group_norm"), role="reduction")
def _group_norm(region: Region, node: fx.Node, a: Value, *args: Any) -> Any:
    several = isinstance(node.meta["val"], tuple | list)
    if several:
        weight, bias, _, _, _, groups, eps = args
    else:
        groups, weight, bias, eps = (*args, *(None, None, 1e-5)[len(args) - 1 :])[:4]
    channels = a.shape[1]
    grouped = reshape(region.kernel, a, (a.shape[0], groups, sizes.floordiv(channels, groups), *a.shape[2:]))
    axes = list(range(2, len(grouped.shape)))
    value = reshape(region.kernel, _normalise(region, grouped, axes, eps, a.compute, centre=True), a.shape)
    tail = (1,) * (len(a.shape) - 2)
    spread = [reshape(region.kernel, p, (channels, *tail)) if isinstance(p, Value) else None for p in (weight, bias)]
    result = _affine(region, value, spread[0], spread[1], a.shape, a.dtype, a.compute)
    return (result, None, None) if several else result


@lowers(*overloads("instance_norm"), role="reduction")
def _instance_norm(
    region: Region, node: fx.Node, a: Value, weight: Any, bias: Any, mean: Any, var: Any, use_input: bool, momentum:
    float, eps: float, cudnn: bool,
) -> Value:  # fmt: skip
    axes = list(range(2, len(a.shape)))
    value = _normalise(region, a, axes, eps, a.compute, centre=True)
    tail = (1,) * (len(a.shape) - 2)
    spread = [reshape(region.kernel, p, (a.shape[1], *tail)) if isinstance(p, Value) else None for p in (weight, bias)]
    return _affine(region, value, spread[0], spread[1], a.shape, a.dtype, a.compute)


def _arg_extremum(op: str) -> Any:
    def build(region: Region, node: fx.Node, a: Value, dim: int | None = None, keepdim: bool = False) -> Value:
        axes = _axes(dim, len(a.shape))
        result = reduce(region, a, axes, op, a.compute, keep=keepdim)
        return Value(result.shape, "int64", lambda index, mask: _as_int64(region, result.at(index, mask)))

    return build


def _as_int64(region: Region, value: Expr) -> Expr:
    return region.builder.cast(value, "int64")


lowers(*overloads("argmax"), role="reduction")(_arg_extremum("argmax"))
lowers(*overloads("argmin"), role="reduction")(_arg_extremum("argmin"))


def _extremum_with_index(op: str) -> Any:
    def build(region: Region, node: fx.Node, a: Value, dim: int, keepdim: bool = False) -> tuple[Value, Value]:
        values = reduce(region, a, [dim], op, a.compute, keep=keepdim)
        places = reduce(region, a, [dim], f"arg{op}", a.compute, keep=keepdim)
        return Value(values.shape, a.dtype, values.at), Value(places.shape, "int64", places.at)

    return build


lowers(*overloads("max.dim"), role="reduction")(_extremum_with_index("max"))
lowers(*overloads("min.dim"), role="reduction")(_extremum_with_index("min"))


@lowers(*overloads("cumsum"), role="reduction")
def _cumsum(region: Region, node: fx.Node, a: Value, dim: int, **kwargs: Any) -> Value:
    # Every element sums its own prefix: quadratic in the axis, but exact in order and parallel; masks and positions
    # are the only cumulative sums that the models have, a row of them is at most a few thousand.
    dtype = region.dtype(node)
    compute = COMPUTE_DTYPE.get(dtype, dtype)
    if not a.shape:
        return a
    axis = dim % len(a.shape)
    builder = region.builder

    def at(index: tuple[Size, ...], mask: Mask) -> Expr:
        extent = sizes.add(index[axis], 1)
        used = builder.free_size(sizes.add(*index)) | (builder.free(mask) if mask is not None else frozenset())
        name = region.kernel.bound_variable(f"p{axis}", a.shape[axis], used)
        own = list(index)
        own[axis] = name
        return builder.reduce("sum", ((name, extent),), builder.cast(a.at(own, mask), compute), compute)

    return Value(a.shape, dtype, at)
