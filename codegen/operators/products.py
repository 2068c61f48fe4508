"""Matrix products as plain reductions, for dtypes that the matmul template does not compute in (float64, integers)."""

from __future__ import annotations

from typing import Any

from torch import fx

from ...runtime.sizes import Size
from ..expr import COMPUTE_DTYPE, Expr
from ..registry import Region, lowers, overloads
from ..values import Value, broadcast

Mask = Expr | None


@lowers(*overloads("linear"), role="anchor", family="matmul")
def _linear(region: Region, node: fx.Node, a: Value, weight: Value, bias: Value | None = None) -> Value:
    if len(weight.shape) == 1:
        total = _product(region, node, a, weight)
    else:
        turned = Value(weight.shape[::-1], weight.dtype, lambda index, mask: weight.at(index[::-1], mask))
        total = _product(region, node, a, turned)
    return total if bias is None else _added(region, node, total, bias, 1, 1)


@lowers(*overloads("mm", "bmm", "matmul", "_int_mm"), role="anchor", family="matmul")
def _matmul(region: Region, node: fx.Node, a: Value, b: Value) -> Value:
    return _product(region, node, a, b)


@lowers(*overloads("addmm", "baddbmm"), role="anchor", family="matmul")
def _addmm(region: Region, node: fx.Node, term: Value, a: Value, b: Value, beta: Any = 1, alpha: Any = 1) -> Value:
    return _added(region, node, _product(region, node, a, b), term, beta, alpha)


def _product(region: Region, node: fx.Node, a: Value, b: Value) -> Value:
    """The sum over the last axis of ``a`` and the one before last (or only) axis of ``b``, with broadcast batches."""
    shape, dtype = region.shape(node), region.dtype(node)
    compute = COMPUTE_DTYPE.get(dtype, dtype)
    builder = region.builder
    has_rows, has_columns = len(a.shape) > 1, len(b.shape) > 1
    batch = shape[: len(shape) - has_rows - has_columns]
    inner = a.shape[-1]
    left = broadcast(a, (*batch, a.shape[-2], inner)) if has_rows else a
    right = broadcast(b, (*batch, inner, b.shape[-1])) if has_columns and len(b.shape) > 2 else b

    def at(index: tuple[Size, ...], mask: Mask) -> Expr:
        used = frozenset().union(*(builder.free_size(position) for position in index))
        k = region.kernel.bound_variable("k", inner, used)
        lead, rest = index[: len(batch)], list(index[len(batch) :])
        row = (*lead, rest.pop(0), k) if has_rows else (k,)
        column = (k, rest.pop(0)) if has_columns else (k,)
        if len(right.shape) > 2:
            column = (*lead, *column)
        terms = (builder.cast(value.at(place, mask), compute) for value, place in ((left, row), (right, column)))
        return builder.reduce("sum", ((k, inner),), builder.call("mul", compute, *terms), compute)

    return Value(shape, dtype, at)


def _added(region: Region, node: fx.Node, total: Value, term: Value, beta: Any, alpha: Any) -> Value:
    """``beta * term + alpha * total``; a ``term`` times 0 is not read, as PyTorch has it."""
    compute = COMPUTE_DTYPE.get(total.dtype, total.dtype)
    builder = region.builder
    wide = broadcast(term, total.shape)

    def scaled(value: Expr, factor: Any) -> Expr:
        return value if factor == 1 else builder.call("mul", compute, value, builder.const(factor, compute))

    def at(index: tuple[Size, ...], mask: Mask) -> Expr:
        product = scaled(total.at(index, mask), alpha)
        if beta == 0:
            return product
        return builder.call("add", compute, product, scaled(builder.cast(wide.at(index, mask), compute), beta))

    return Value(total.shape, total.dtype, at)
