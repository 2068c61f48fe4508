"""Recognising normalisation over trailing axes: the reciprocal root of a mean of squares, and what multiplies it.

    x * rsqrt(mean(x**2) + eps)                          uncentred: root-mean-square norm
    c * rsqrt(mean(c**2) + eps),  c = x - mean(x)        centred: layer norm

Any spelling of the square, the mean, the root and the division matches; the moments may be taken of ``x`` in a wider
dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .edit import insert, same_shape, tensor_shape
from .match import (
    ADD,
    DIV,
    MUL,
    POW,
    SUB,
    VIEWS,
    argument,
    aten,
    close,
    dtype_of,
    is_op,
    is_tensor,
    only_user,
    same_value,
    scalar,
    without_copies,
)


@dataclass(frozen=True)
class Normalised:
    """A product that normalises.

    Attributes:
        result: the product (or quotient).
        x: what it normalises, in the result's dtype or narrower.
        rank: over how many trailing axes.
        eps: what is added to the mean of squares.
        centred: whether the mean was subtracted from ``x`` first.
    """

    result: fx.Node
    x: fx.Node
    rank: int
    eps: float
    centred: bool

    @property
    def sizes(self) -> list[Any]:
        """The sizes of the normalised axes."""
        return list(tensor_shape(self.x)[-self.rank :])


def absorb(norm: Normalised, targets: frozenset[Any], after: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The multiplication by a weight (or addition of a bias) that follows, where the norm can do it in its dtype.

    Returns:
        (the product or sum, the vector), or None.
    """
    found = weighted(after, norm.sizes, targets)
    if found is None:
        return None
    result, operand = found
    dtype = dtype_of(result)
    fits = widens(dtype_of(operand), dtype) and dtype_of(narrowest(norm.x, dtype)) == dtype
    return found if fits or (dtype == dtype_of(norm.result) and widens(dtype_of(operand), dtype)) else None


def normalised(node: fx.Node) -> Normalised | None:
    """What a product or quotient normalises, if it does."""
    if is_op(node, MUL):
        pairs = [(node.args[0], node.args[1]), (node.args[1], node.args[0])]
        candidates = [(x, _radicand(root, -0.5)) for x, root in pairs]
    elif is_op(node, DIV):
        candidates = [(node.args[0], _radicand(node.args[1], 0.5))]
    else:
        return None
    x: Any
    for x, radicand in candidates:
        if radicand is None or not is_tensor(x) or not same_shape(tensor_shape(x), tensor_shape(node)):
            continue
        found = _second_moment(radicand)
        if found is None:
            continue
        deviation, rank, eps, variance = found
        subtracted = _centred(x)
        if variance:  # of x itself, so the product must be of x minus its mean
            if subtracted is None or subtracted[1] != rank or not _alike(subtracted[0], deviation):
                continue
        elif not _alike(x, deviation):
            continue
        if subtracted is not None and subtracted[1] == rank:
            return Normalised(node, without_copies(subtracted[0]), rank, eps, True)
        return Normalised(node, without_copies(x), rank, eps, False)
    return None


def weighted(node: fx.Node, sizes: list[Any], targets: frozenset[Any]) -> tuple[fx.Node, fx.Node] | None:
    """The one use of a value by a multiplication or addition of a vector over the normalised axes.

    Copies and narrowing conversions in between are passed.

    Returns:
        (the product or sum, the vector) or None.
    """
    current = node
    while (user := only_user(current)) is not None:
        if is_op(user, targets) and argument(user, 2, "alpha", 1) == 1:
            others: list[Any] = [arg for arg in user.args[:2] if arg is not current]
            if len(others) != 1 or not is_tensor(others[0]):
                return None
            shape = tensor_shape(others[0])
            if len(shape) < len(sizes) or not same_shape(tensor_shape(user), tensor_shape(node)):
                return None
            ones, own = shape[: len(shape) - len(sizes)], shape[len(shape) - len(sizes) :]
            fits = same_shape(own, sizes) and all(type(size) is int and size == 1 for size in ones)
            return (user, others[0]) if fits and dtype_of(user) == dtype_of(current) else None
        if not is_tensor(user) or not widens(dtype_of(user), dtype_of(current)):
            return None
        if without_copies(user, casts=True) is not without_copies(current, casts=True):
            return None
        current = user
    return None


def vector(value: fx.Node, sizes: list[Any], dtype: torch.dtype, before: fx.Node) -> fx.Node:
    """A weight or bias with exactly the normalised axes, in a dtype."""
    if not same_shape(tensor_shape(value), sizes):
        value = insert(before.graph, before, aten.reshape.default, (value, sizes), origins=(value,))
    return convert(value, dtype, before)


def convert(value: fx.Node, dtype: torch.dtype, before: fx.Node) -> fx.Node:
    """A value in a dtype, without a detour through a wider one."""
    value = narrowest(value, dtype)
    if dtype_of(value) == dtype:
        return value
    return insert(before.graph, before, aten._to_copy.default, (value,), {"dtype": dtype}, origins=(value,))


def narrowest(value: fx.Node, dtype: torch.dtype) -> fx.Node:
    """What a value of another dtype was widened from, as far as the dtype asked for."""
    while is_op(value, aten._to_copy.default) and dtype_of(value) != dtype:
        inner: Any = value.args[0]
        if not is_tensor(inner) or not widens(dtype_of(inner), dtype_of(value)):
            break
        value = inner
    return value


def widens(narrow: torch.dtype, wide: torch.dtype) -> bool:
    """Whether every value of a dtype is one of the other."""
    return torch.promote_types(narrow, wide) == wide


def _radicand(node: Any, exponent: float) -> fx.Node | None:
    """The a of which a node is the power 1/2 or -1/2."""
    node = without_copies(node)
    power: float | None
    if is_op(node, aten.rsqrt.default):
        power, inner = -0.5, node.args[0]
    elif is_op(node, aten.sqrt.default):
        power, inner = 0.5, node.args[0]
    elif is_op(node, POW):
        power, inner = scalar(node.args[1]), node.args[0]
    elif is_op(node, aten.reciprocal.default):
        return _radicand(node.args[0], -exponent)
    elif is_op(node, DIV) and scalar(node.args[0]) == 1.0:
        return _radicand(node.args[1], -exponent)
    elif is_op(node, MUL) and 1.0 in (scalar(node.args[0]), scalar(node.args[1])):
        return _radicand(node.args[0] if scalar(node.args[1]) == 1.0 else node.args[1], exponent)
    else:
        return None
    return without_copies(inner) if power == exponent else None


def _second_moment(radicand: fx.Node) -> tuple[fx.Node, int, float, bool] | None:
    """``mean(d**2) + eps`` as (d, rank, eps, False), ``var(x) + eps`` as (x, rank, eps, True)."""
    eps = 0.0
    if is_op(radicand, ADD) and argument(radicand, 2, "alpha", 1) == 1:
        constants = [(scalar(arg), other) for arg, other in (radicand.args[:2], radicand.args[1::-1])]
        found = [(value, other) for value, other in constants if value is not None]
        if len(found) != 1:
            return None
        eps, radicand = found[0][0], without_copies(found[0][1])
    if eps < 0 or not is_tensor(radicand):
        return None
    variance = _variance(radicand)
    if variance is not None:
        return (*variance, eps, True)
    mean = _mean(radicand)
    if mean is None:
        return None
    square = without_copies(mean[0], casts=True)
    if is_op(square, aten.square.default) or (is_op(square, POW) and scalar(square.args[1]) == 2.0):
        base: Any = square.args[0]
    elif is_op(square, MUL) and same_value(square.args[0], square.args[1]):
        base = square.args[0]
    else:
        return None
    return (base, mean[1], eps, False) if is_tensor(base) else None


def _mean(node: Any) -> tuple[fx.Node, int] | None:
    """A mean over trailing axes that keeps them (with size one), as (of what, how many axes)."""
    node = without_copies(node)
    divisor = None
    if is_op(node, DIV) or is_op(node, MUL):
        divisor = scalar(node.args[1])
        if not divisor:
            return None
        divisor = divisor if is_op(node, DIV) else 1 / divisor
        node = without_copies(node.args[0])
    kept, node = _keeping(node)
    if not is_op(node, aten.mean.dim if divisor is None else aten.sum.dim_IntList):
        return None
    rank = _trailing(node, argument(node, 1, "dim"), kept or argument(node, 2, "keepdim", False))
    reduced: Any = node.args[0]
    if rank is None or argument(node, 3, "dtype") not in (None, dtype_of(reduced)):
        return None
    if divisor is not None:
        sizes = tensor_shape(reduced)[-rank:]
        if not all(isinstance(size, int) for size in sizes) or not close(divisor, math.prod(sizes)):
            return None
    return reduced, rank


def _variance(node: fx.Node) -> tuple[fx.Node, int] | None:
    """A biased variance over trailing axes that keeps them, as (of what, how many axes)."""
    kept, value = _keeping(node)
    keep: Any
    if is_op(value, aten.var.correction) and argument(value, 2, "correction", 1) == 0:
        keep = value.kwargs.get("keepdim", False)
    elif is_op(value, aten.var.dim) and argument(value, 2, "unbiased", True) is False:
        keep = argument(value, 3, "keepdim", False)
    else:
        return None
    rank = _trailing(value, argument(value, 1, "dim"), kept or keep)
    reduced: Any = value.args[0]
    return None if rank is None else (reduced, rank)


def _keeping(node: Any) -> tuple[bool, Any]:
    """Looks through a view that puts a reduced last axis back."""
    if is_op(node, aten.unsqueeze.default) or is_op(node, VIEWS):
        inner: Any = without_copies(node.args[0])
        if is_tensor(inner) and same_shape(tensor_shape(node), (*tensor_shape(inner), 1)):
            return True, inner
    return False, node


def _trailing(node: fx.Node, axes: Any, keep: bool) -> int | None:
    """How many axes a reduction is over, if they are the last ones and stay."""
    reduced: Any = node.args[0]
    dims = len(tensor_shape(reduced))
    if not keep or not axes:
        return None
    chosen = sorted(axis % dims for axis in ([axes] if isinstance(axes, int) else axes))
    return len(chosen) if chosen == list(range(dims - len(chosen), dims)) else None


def _centred(node: Any) -> tuple[fx.Node, int] | None:
    """``x - mean(x)`` as (x, how many axes the mean is over)."""
    node = without_copies(node, casts=True)
    if not is_op(node, SUB) or argument(node, 2, "alpha", 1) != 1:
        return None
    x: Any = node.args[0]
    mean = _mean(node.args[1])
    return (x, mean[1]) if mean is not None and _alike(x, mean[0]) else None


def _alike(a: Any, b: Any) -> bool:
    """Whether two values are the same up to conversions between float dtypes."""
    return same_value(without_copies(a, casts=True), without_copies(b, casts=True))
