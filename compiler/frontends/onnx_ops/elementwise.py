"""Arithmetic, comparisons and logic, element by element with broadcasting.

A host value of one element stays a Python number next to a tensor (``x * 0.5``), which keeps graphs small and lets
passes see the number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch

from . import host as h
from .host import Host
from .registry import Function, Node, as_tensor, cast_to, operator

_UNARY: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "BitwiseNot": torch.bitwise_not,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "IsNaN": torch.isnan,
    "Log": torch.log,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal,
    "Round": torch.round,  # both round halves to even
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Sqrt": torch.sqrt,
    "Tan": torch.tan,
}


@operator(*_UNARY)
def unary(node: Node, x: torch.Tensor) -> torch.Tensor:
    """Functions of one number."""
    if node.op_type == "BitwiseNot" and x.dtype in (torch.uint16, torch.uint32):
        return torch.bitwise_not(x.to(torch.int64)).to(x.dtype)
    return _UNARY[node.op_type](x)


@operator("Identity", raw=True)
def identity(node: Node, x: Any) -> Any:
    """The value itself, whatever it is."""
    return x


@operator("IsInf")
def is_inf(node: Node, x: torch.Tensor) -> torch.Tensor:
    """Infinities of either sign, or of one."""
    positive, negative = node.get("detect_positive", 1), node.get("detect_negative", 1)
    if positive and negative:
        return torch.isinf(x)
    if positive:
        return x == math.inf
    return x == -math.inf if negative else torch.zeros_like(x, dtype=torch.bool)


def operands(a: Any, b: Any) -> tuple[Any, Any]:
    """Two inputs of a broadcasting function: one-element host values as numbers, where the shape stays right."""
    if isinstance(a, Host) and isinstance(b, Host):
        return a.tensor(), b.tensor()
    return _beside(a, b), _beside(b, a)


def _beside(value: Any, other: Any) -> Any:
    if not isinstance(value, Host):
        return value
    plain = value.size == 1 and value.rank <= other.dim() and value.dtype == other.dtype and value.dtype != torch.bool
    if plain and value.dtype not in (torch.uint16, torch.uint32, torch.uint64):
        return value.item()
    return value.tensor()


def _unsigned(function: Function) -> Function:
    """Compute uint16 and uint32, for which torch has no arithmetic, in int64, which holds all of them."""

    def apply(node: Node, a: Any, b: Any) -> torch.Tensor:
        kind = a.dtype
        if kind not in (torch.uint16, torch.uint32):
            return function(node, a, b)
        result = function(node, as_tensor(a).to(torch.int64), as_tensor(b).to(torch.int64))
        return result if result.dtype == torch.bool else result.to(kind)

    return apply


@operator("Add", "Sub", "Mul", since=7, raw=True)
@_unsigned
def arithmetic(node: Node, a: Any, b: Any) -> torch.Tensor:
    """Sum, difference and product."""
    x, y = operands(a, b)
    if node.op_type == "Add":
        return x + y
    if node.op_type == "Mul":
        return x * y
    return x - y if isinstance(x, torch.Tensor) else torch.rsub(y, x)


@operator("Div", since=7, raw=True)
@_unsigned
def divide(node: Node, a: Any, b: Any) -> torch.Tensor:
    """Quotient; of integers rounded towards zero."""
    x, y = operands(a, b)
    if not isinstance(x, torch.Tensor):
        if x == 1 and y.is_floating_point():
            return torch.reciprocal(y)
        x = torch.full((), x, dtype=y.dtype)
    return x / y if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


@operator("Mod", since=10, raw=True)
@_unsigned
def modulo(node: Node, a: Any, b: Any) -> torch.Tensor:
    """Remainder, of the divisor's sign, or of the dividend's with fmod."""
    x, y = operands(a, b)
    if not isinstance(x, torch.Tensor):
        x = torch.full((), x, dtype=y.dtype)
    return torch.fmod(x, y) if node.get("fmod", 0) else torch.remainder(x, y)


@operator("Pow", since=7, raw=True)
def power(node: Node, a: Any, b: Any) -> torch.Tensor:
    """Power, in the base's type; the exponent may have another."""
    if isinstance(b, Host) and b.size == 1 and isinstance(a, torch.Tensor) and b.rank <= a.dim():
        exponent = b.item()
        if a.is_floating_point() or (isinstance(exponent, int) and exponent >= 0):
            return a**exponent
    x, y = as_tensor(a), as_tensor(b)
    return cast_to(torch.pow(x, y), x.dtype)


_COMPARISONS = {
    "Equal": torch.eq,
    "Less": torch.lt,
    "Greater": torch.gt,
    "LessOrEqual": torch.le,
    "GreaterOrEqual": torch.ge,
}
_MIRRORED = {
    "Equal": "Equal",
    "Less": "Greater",
    "Greater": "Less",
    "LessOrEqual": "GreaterOrEqual",
    "GreaterOrEqual": "LessOrEqual",
}


@operator(*_COMPARISONS, since=7, raw=True)
@_unsigned
def compare(node: Node, a: Any, b: Any) -> torch.Tensor:
    """Relations."""
    x, y = operands(a, b)
    if isinstance(x, torch.Tensor):
        return _COMPARISONS[node.op_type](x, y)
    return _COMPARISONS[_MIRRORED[node.op_type]](y, x)


_LOGIC = {
    "And": torch.logical_and,
    "Or": torch.logical_or,
    "Xor": torch.logical_xor,
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
}


@operator(*_LOGIC, since=7)
def logic(node: Node, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Truth values, and bits of integers."""
    return _LOGIC[node.op_type](a, b)


@operator("BitShift", since=11)
def bit_shift(node: Node, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Shifted left or right; by as many bits as the type has, or more, nothing is left but the sign."""
    bits, signed = h.INTEGERS[a.dtype]
    wide, amount = a.to(torch.int64), b.to(torch.int64)
    beyond = (amount < 0) | (amount >= bits)
    if node.get("direction") == "LEFT":
        return torch.where(beyond, 0, wide << amount.clamp(0, bits - 1)).to(a.dtype)
    if signed:
        return (wide >> torch.where(beyond, bits - 1, amount)).to(a.dtype)
    shifted = wide >> amount.clamp(0, bits - 1)
    if bits == 64:  # int64 holds the bits: the sign must not be copied in from the left
        high = torch.full((), -1, dtype=torch.int64) << (64 - amount).clamp(0, 63)
        shifted = torch.where(amount > 0, shifted & ~high, shifted)
    return torch.where(beyond, 0, shifted).to(a.dtype)


@operator("Min", "Max", since=8, raw=True)
def extremum(node: Node, *values: Any) -> torch.Tensor:
    """Smallest or largest of several; NaN wins."""
    function = torch.minimum if node.op_type == "Min" else torch.maximum

    def pick(a: Any, b: Any) -> torch.Tensor:
        x, y = operands(a, b)
        if not isinstance(x, torch.Tensor):
            x, y = y, x
        if isinstance(y, torch.Tensor):
            if x.dtype in (torch.uint16, torch.uint32):  # which not every torch compares
                return function(x.to(torch.int64), y.to(torch.int64)).to(x.dtype)
            return function(x, y)
        return torch.clamp(x, max=y) if node.op_type == "Min" else torch.clamp(x, min=y)

    return reduce(pick, values) if len(values) > 1 else as_tensor(values[0])


@operator("Sum", "Mean", since=8)
def total(node: Node, *values: torch.Tensor) -> torch.Tensor:
    """Sum or mean of several."""
    result = reduce(torch.add, values)
    return result / len(values) if node.op_type == "Mean" else result


@operator("Where", since=9, raw=True)
def where(node: Node, condition: Any, a: Any, b: Any) -> torch.Tensor:
    """Choice by a truth value."""
    condition = as_tensor(condition)
    if isinstance(a, Host) and isinstance(b, Host):
        a = a.tensor()
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.where(condition, a, b)
    tensor = a if isinstance(a, torch.Tensor) else b
    rank = max(condition.dim(), tensor.dim())

    def plain(value: Any) -> Any:
        if not isinstance(value, Host):
            return value
        one = value.size == 1 and value.rank <= rank and value.dtype == tensor.dtype
        # a number would turn a 0-dim tensor of a narrower float into the default type
        return value.item() if one and tensor.dtype in (torch.float32, torch.int64) else value.tensor()

    return torch.where(condition, plain(a), plain(b))


@operator("Clip", since=6, raw=True)
def clip(node: Node, x: Any, low: Any = None, high: Any = None) -> torch.Tensor:
    """Kept between bounds, which are attributes (opset 6) or inputs (opset 11); the upper one wins."""
    x = as_tensor(x)
    if node.opset < 11:
        low, high = node.get("min"), node.get("max")
        return x if low is None and high is None else torch.clamp(x, low, high)
    bounds = [bound.item() if isinstance(bound, Host) else bound for bound in (low, high)]
    if bounds == [None, None]:
        return x
    numbers = all(bound is None or not isinstance(bound, torch.Tensor) for bound in bounds)
    if numbers and not isinstance(x, Host):
        return torch.clamp(x, bounds[0], bounds[1])
    if low is not None:
        x = torch.maximum(x, as_tensor(low))
    return x if high is None else torch.minimum(x, as_tensor(high))


@operator("CumSum", "CumProd", since=11, host=(1,))
def cumulate(node: Node, x: torch.Tensor, axis: Host) -> torch.Tensor:
    """Running sum or product, from either end, with or without the element itself."""
    dim = int(axis.item())
    function = torch.cumsum if node.op_type == "CumSum" else torch.cumprod
    if node.get("reverse", 0):
        x = torch.flip(x, (dim,))
    if node.get("exclusive", 0):
        neutral = torch.full_like(x.narrow(dim, 0, 1), 0 if node.op_type == "CumSum" else 1)
        x = torch.cat((neutral, x.narrow(dim, 0, x.shape[dim] - 1)), dim)
    result = function(x, dim, dtype=x.dtype)
    return torch.flip(result, (dim,)) if node.get("reverse", 0) else result


@operator("Det", since=11)
def determinant(node: Node, x: torch.Tensor) -> torch.Tensor:
    """Determinants of square matrices."""
    return torch.linalg.det(x)
