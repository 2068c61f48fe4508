"""Canonical form of arithmetic with constants: the rules that ``canonicalize`` applies to it.

Before:  rsub(x, c)          div(x, c)      pow(x, 2)    add(c, x)    mul(x, 1)    reciprocal(sqrt(x))
After:   add(neg(x), c)      mul(x, 1/c)    mul(x, x)    add(x, c)    x            rsqrt(x)

A rewrite is kept only if the value's dtype and shape stay what they were.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from .graph.edit import insert
from .graph.query import (
    SMALL,
    arguments,
    aten,
    is_call,
    is_constant,
    remove_unused,
    scalar_of,
    size_in_bytes,
    tensor_of,
)
from .verify import same_type

Rewrite = tuple[fx.Node, str] | None

_TENSOR_FORMS = {
    aten.add.Scalar: aten.add.Tensor,
    aten.sub.Scalar: aten.sub.Tensor,
    aten.mul.Scalar: aten.mul.Tensor,
    aten.div.Scalar: aten.div.Tensor,
}
# Comparisons and powers with a constant without dimensions, and with the number that it is.
_NUMBER_FORMS = {
    getattr(aten, name).Tensor: getattr(aten, name).Scalar for name in ("eq", "ne", "lt", "le", "gt", "ge")
} | {aten.pow.Tensor_Tensor: aten.pow.Tensor_Scalar}
_BITWISE: dict[Any, Any] = {
    aten.__and__.Tensor: aten.bitwise_and.Tensor,
    aten.__or__.Tensor: aten.bitwise_or.Tensor,
    aten.__xor__.Tensor: aten.bitwise_xor.Tensor,
    aten.__and__.Scalar: aten.bitwise_and.Scalar,
    aten.__or__.Scalar: aten.bitwise_or.Scalar,
    aten.__xor__.Scalar: aten.bitwise_xor.Scalar,
}


def rebuilt(node: fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> fx.Node | None:
    """A call in front of ``node``; None (and nothing inserted) if its value would have another type than the node's."""
    new = insert(node.graph, node, target, args, kwargs, origins=(node,))
    if same_type(new.meta["val"], node.meta["val"]):
        return new
    node.graph.erase_node(new)
    return None


def _kept(node: fx.Node, target: Any, args: tuple[Any, ...], text: str, *through: fx.Node) -> Rewrite:
    """The rewrite if it has the type of the node; otherwise ``through``, inserted on the way, goes as well."""
    new = rebuilt(node, target, args)
    if new is None:
        remove_unused(*through)
        return None
    return new, text


def _floating(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.meta["val"].dtype.is_floating_point


def _number(value: Any) -> int | float | None:
    """A number, or one that every element of a constant or filled tensor is, if it has one value; no booleans."""
    number = scalar_of(value)
    tensor = tensor_of(value)
    if is_call(value, aten.full.default):
        number = scalar_of(value.args[1])
    if number is None and tensor is not None and tensor.numel() == 1 and not tensor.is_complex():
        number = tensor.item()
    return None if isinstance(number, bool) else number


def _tensor_form(node: fx.Node) -> Rewrite:
    new = insert(node.graph, node, _TENSOR_FORMS[node.target], node.args, dict(node.kwargs), origins=(node,))  # type: ignore[index]
    return new, "number as second operand"


def _number_form(node: fx.Node) -> Rewrite:
    left, right = node.args[:2]
    number = _number(right)
    if number is None or not isinstance(right, fx.Node):
        return None
    return _kept(node, _NUMBER_FORMS[node.target], (left, number), f"constant is the number {number}")  # type: ignore[index]


def _alpha(node: fx.Node) -> Rewrite:
    left, right, alpha = node.args[0], node.args[1], arguments(node)["alpha"]
    if alpha == 1:
        return None
    number = _number(right)
    if number is not None:
        return _kept(node, node.target, (left, number * alpha), "alpha multiplied in")
    if not isinstance(right, fx.Node):
        return None
    scaled = insert(node.graph, node, aten.mul.Tensor, (right, alpha), origins=(node,))
    return _kept(node, node.target, (left, scaled), "alpha as a product", scaled)


def _order(node: fx.Node) -> Rewrite:
    """Constants second, numbers as numbers."""
    left, right = node.args[:2]
    if arguments(node).get("alpha", 1) != 1:
        return None
    if is_constant(left) and isinstance(right, fx.Node) and not is_constant(right):
        return _kept(node, node.target, (right, left), "constant second")
    number = _number(right)
    if number is not None and isinstance(right, fx.Node):
        return _kept(node, node.target, (left, number), f"constant is the number {number}")
    return None


def _neutral(node: fx.Node) -> Rewrite:
    """``x + 0`` and ``x * 1``, also with whole tensors of them."""
    left, right = node.args[:2]
    element = 1 if node.target is aten.mul.Tensor else 0
    if not isinstance(left, fx.Node) or not same_type(left.meta["val"], node.meta["val"]):
        return None
    tensor = tensor_of(right)
    if tensor is not None:
        if size_in_bytes(right) > SMALL or not bool((tensor == element).all()):  # type: ignore[arg-type]
            return None
    elif isinstance(right, bool | fx.Node) or right != element:
        return None
    return left, f"neutral element {element}"


def _subtract(node: fx.Node) -> Rewrite:
    left, right = node.args[:2]
    if arguments(node)["alpha"] != 1:
        return None
    number = _number(right)
    if number is not None and isinstance(left, fx.Node) and left.meta["val"].dtype not in (torch.uint8, torch.bool):
        return _kept(node, aten.add.Tensor, (left, -number), "adds the negative number")
    minuend = _number(left)
    if minuend is not None and isinstance(right, fx.Node):
        return _minus(node, minuend, right)
    return None


def _reverse_subtract(node: fx.Node) -> Rewrite:
    value, minuend = node.args[:2]
    if arguments(node)["alpha"] != 1:
        return None
    number = _number(minuend)
    if number is None:
        return _kept(node, aten.sub.Tensor, (minuend, value), "as sub") if isinstance(minuend, fx.Node) else None
    assert isinstance(value, fx.Node)
    return _minus(node, number, value)


def _minus(node: fx.Node, number: float, value: fx.Node) -> Rewrite:
    if value.meta["val"].dtype in (torch.uint8, torch.bool):
        return None
    negative = insert(node.graph, node, aten.neg.default, (value,), origins=(node,))
    return _kept(node, aten.add.Tensor, (negative, number), "as the negative plus a number", negative)


def _divide(node: fx.Node) -> Rewrite:
    left, right = node.args[:2]
    if node.target is aten.div.Tensor_mode:
        if arguments(node)["rounding_mode"] is None:
            return _kept(node, aten.div.Tensor, (left, right), "true division")
        return None
    if not _floating(left):
        return None
    number = _number(right)
    if number is not None:
        if number == 0 or not math.isfinite(1 / number):
            return None
        return _kept(node, aten.mul.Tensor, (left, 1 / number), f"times the reciprocal of {number}")
    # In half precision the reciprocal of a tensor would be rounded once more.
    if is_constant(right) and not is_constant(left) and right.meta["val"].dtype in (torch.float32, torch.float64):  # type: ignore[union-attr]
        inverse = insert(node.graph, node, aten.reciprocal.default, (right,), origins=(node,))
        return _kept(node, aten.mul.Tensor, (left, inverse), "times the reciprocal of a constant", inverse)
    dividend = _number(left)
    if dividend is not None and isinstance(right, fx.Node):
        inverse = insert(node.graph, node, aten.reciprocal.default, (right,), origins=(node,))
        return _kept(node, aten.mul.Tensor, (inverse, dividend), "number times a reciprocal", inverse)
    return None


def _power(node: fx.Node) -> Rewrite:
    base, exponent = node.args[:2]
    number = _number(exponent)
    assert isinstance(base, fx.Node)
    if number == 1 and same_type(base.meta["val"], node.meta["val"]):
        return base, "power of 1"
    if number == 2:
        return _kept(node, aten.mul.Tensor, (base, base), "square as a product")
    forms = {0.5: aten.sqrt.default, -0.5: aten.rsqrt.default, -1: aten.reciprocal.default}
    if number in forms and _floating(base):
        return _kept(node, forms[number], (base,), f"power of {number}")
    return None


def _square(node: fx.Node) -> Rewrite:
    return _kept(node, aten.mul.Tensor, (node.args[0], node.args[0]), "square as a product")


def _reciprocal(node: fx.Node) -> Rewrite:
    root = node.args[0]
    if is_call(root, aten.sqrt.default) and _floating(root):
        return _kept(node, aten.rsqrt.default, (root.args[0],), "reciprocal of a root")  # type: ignore[union-attr]
    return None


def _negative(node: fx.Node) -> Rewrite:
    inner = node.args[0]
    return (inner.args[0], "negated twice") if is_call(inner, aten.neg.default) else None  # type: ignore[union-attr, return-value]


def _bitwise(node: fx.Node) -> Rewrite:
    """One form of ``&``, ``|`` and ``^``; True and False that change nothing are gone."""
    left, right = node.args[:2]
    target = _BITWISE.get(node.target, node.target)  # type: ignore[arg-type]
    if target not in (aten.bitwise_xor.Tensor, aten.bitwise_xor.Scalar):
        neutral = target in (aten.bitwise_and.Tensor, aten.bitwise_and.Scalar)
        for value, other in ((left, right), (right, left)):
            truth = scalar_of(other.args[1]) if is_call(other, aten.full.default) else scalar_of(other)  # type: ignore[union-attr]
            plain = isinstance(value, fx.Node) and same_type(value.meta["val"], node.meta["val"])
            if plain and node.meta["val"].dtype == torch.bool and truth is not None and bool(truth) is neutral:
                return value, f"neutral element {bool(truth)}"  # type: ignore[return-value]
    return None if target is node.target else _kept(node, target, (left, right), "as a bitwise operator")


def _clamp(node: fx.Node) -> Rewrite:
    return _kept(node, aten.relu.default, (node.args[0],), "clamp at 0") if _number(node.args[1]) == 0 else None


ARITHMETIC: dict[object, list[Any]] = {
    **{target: [_tensor_form] for target in _TENSOR_FORMS},
    **{target: [_number_form] for target in _NUMBER_FORMS},
    aten.add.Tensor: [_alpha, _order, _neutral],
    aten.mul.Tensor: [_order, _neutral],
    aten.sub.Tensor: [_alpha, _subtract],
    aten.rsub.Scalar: [_reverse_subtract],
    aten.rsub.Tensor: [_reverse_subtract],
    aten.div.Tensor: [_divide],
    aten.div.Tensor_mode: [_divide],
    aten.pow.Tensor_Scalar: [_power],
    aten.pow.Tensor_Tensor: [_number_form],
    aten.square.default: [_square],
    aten.reciprocal.default: [_reciprocal],
    aten.neg.default: [_negative],
    aten.clamp_min.default: [_clamp],
    **{target: [_bitwise] for target in (*_BITWISE, *_BITWISE.values())},
}
