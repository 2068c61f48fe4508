"""Recognising what a graph computes, whatever detours it takes.

Copies that change no value are looked through; constants are evaluated however they are spelled; arithmetic is compared
as polynomials, so that the order and grouping of factors and terms does not matter. Only :func:`substitute`
and what it calls change a graph.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
from torch import fx

from .edit import faking, same_shape, same_size, tensor_shape, value_of
from .query import is_assertion, is_pure, is_random, is_static, tensor_of

aten = torch.ops.aten

COPIES = frozenset({
    aten.clone.default, aten.alias.default, aten.contiguous.default, aten.detach.default, aten.lift_fresh_copy.default,
    aten.expand.default, aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten._to_copy.default,
    aten.type_as.default, aten.to.dtype, aten.dropout.default, aten.feature_dropout.default, aten.expand_as.default,
    aten.view_as.default, aten.reshape_as.default,
})  # fmt: skip
VIEWS = frozenset({aten.view.default, aten._unsafe_view.default, aten.reshape.default})

ADD = frozenset({aten.add.Tensor, aten.add.Scalar})
SUB = frozenset({aten.sub.Tensor, aten.sub.Scalar})
RSUB = frozenset({aten.rsub.Tensor, aten.rsub.Scalar})
MUL = frozenset({aten.mul.Tensor, aten.mul.Scalar})
DIV = frozenset({aten.div.Tensor, aten.div.Scalar})
POW = frozenset({aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor})

_CONSTANT_ELEMENTS = 16  # a scalar is evaluated from constants of at most this many elements
_CONSTANT_DEPTH = 16

Polynomial = dict[tuple[int, ...], float]
"""Exponents of the variables → coefficient; no zero coefficients."""


def is_op(node: Any, *targets: Any) -> TypeGuard[fx.Node]:
    """Whether a value is a call of one of the operators (given one by one or as sets)."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    return any(node.target in target if isinstance(target, frozenset) else node.target is target for target in targets)


def is_tensor(node: Any) -> TypeGuard[fx.Node]:
    """Whether a value is a node that holds one tensor."""
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)


def dtype_of(node: fx.Node) -> torch.dtype:
    """The dtype of a tensor node."""
    return node.meta["val"].dtype


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """A call's argument, given by position or by name."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def users_of(node: fx.Node) -> list[fx.Node]:
    """The users that compute something, in graph order; checks of metadata do not count."""
    return sorted(user for user in node.users if not is_assertion(user))


def without_copies(node: Any, *, casts: bool = False) -> Any:
    """The node behind copies that keep value, shape and dtype (and, with ``casts``, behind changes of float dtype)."""
    while is_op(node, COPIES) and is_tensor(node.args[0]):
        if is_op(node, aten.dropout.default, aten.feature_dropout.default) and node.args[2]:
            break
        inner = node.args[0]
        same_type = dtype_of(inner) == dtype_of(node)
        cast = casts and dtype_of(inner).is_floating_point and dtype_of(node).is_floating_point
        if not (same_type or cast) or not same_shape(tensor_shape(inner), tensor_shape(node)):
            break
        node = inner
    return node


def scalar(value: Any) -> float | None:
    """The number that a value is: a Python number, or a tensor of one element computed from small constants."""
    if isinstance(value, bool | int | float):
        return float(value)
    if not is_tensor(value):
        return None
    meta = value.meta["val"]
    if not is_static(meta) or meta.numel() != 1 or meta.is_complex():
        return None
    tensor = _evaluate(value, _CONSTANT_DEPTH)
    return None if tensor is None else float(tensor.item())


def _evaluate(node: fx.Node, depth: int) -> torch.Tensor | None:
    value = node.meta.get("val")
    if depth == 0 or not isinstance(value, torch.Tensor) or not is_static(value) or value.numel() > _CONSTANT_ELEMENTS:
        return None
    if node.op == "get_attr":
        return tensor_of(node)
    if not isinstance(node.target, torch._ops.OpOverload) or is_random(node):
        return None
    known: dict[fx.Node, Any] = {}
    for operand in node.all_input_nodes:
        static = operand.meta.get("val")
        known[operand] = static if type(static) is int else _evaluate(operand, depth - 1)
        if known[operand] is None:
            return None
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda used: known[used])
    with torch.no_grad():
        return node.target(*args, **kwargs)


def close(a: float | None, b: float, dtype: torch.dtype = torch.float32) -> bool:
    """Whether a constant written in a graph of this dtype means ``b``: equal to six digits, or to a half type's."""
    half = torch.finfo(dtype).eps if dtype in (torch.float16, torch.bfloat16) else 0.0
    return a is not None and math.isclose(a, b, rel_tol=max(2e-6, half), abs_tol=1e-12)


def scaled(node: Any) -> tuple[Any, float]:
    """A node as (base, factor): multiplications and divisions by constants, and copies, taken off."""
    factor = 1.0
    while True:
        node = without_copies(node)
        if is_op(node, MUL):
            left, right = scalar(node.args[0]), scalar(node.args[1])
            constant, base = (right, node.args[0]) if right is not None else (left, node.args[1])
        elif is_op(node, DIV):
            constant, base = scalar(node.args[1]), node.args[0]
            constant = 1 / constant if constant else None
        elif is_op(node, aten.neg.default):
            constant, base = -1.0, node.args[0]
        else:
            break
        if constant is None or not is_tensor(base) or not same_shape(tensor_shape(base), tensor_shape(node)):
            break
        if dtype_of(base) != dtype_of(node):
            break
        node, factor = base, factor * constant
    return node, factor


def same_value(a: Any, b: Any, depth: int = 6) -> bool:
    """Whether two values are computed alike: the same node, or the same pure operator on the same values."""
    a, b = without_copies(a), without_copies(b)
    if a is b:
        return True
    if isinstance(a, fx.Node) and isinstance(b, fx.Node):
        if a.op != "call_function" or b.op != "call_function" or a.target is not b.target or depth == 0:
            return False
        if is_random(a):
            return False
        return same_value(list(a.args), list(b.args), depth - 1) and same_value(
            dict(a.kwargs), dict(b.kwargs), depth - 1
        )
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(same_value(x, y, depth) for x, y in zip(a, b, strict=True))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same_value(a[key], b[key], depth) for key in a)
    return type(a) is type(b) and not isinstance(a, fx.Node) and bool(a == b)


def polynomial(node: Any, variables: tuple[fx.Node, ...], depth: int = 16) -> Polynomial | None:
    """A value as a polynomial in some nodes with constant coefficients; None where it is none (or a large one)."""
    node = without_copies(node)
    for index, variable in enumerate(variables):
        if node is variable:
            return {tuple(int(index == i) for i in range(len(variables))): 1.0}
    constant = scalar(node)
    if constant is not None:
        return {(0,) * len(variables): constant} if constant else {}
    if depth == 0 or not isinstance(node, fx.Node):
        return None

    def part(value: Any) -> Polynomial | None:
        return polynomial(value, variables, depth - 1)

    if is_op(node, ADD, SUB, RSUB):
        left, right = part(node.args[0]), part(node.args[1])
        alpha = scalar(argument(node, 2, "alpha", 1))
        if left is None or right is None or alpha is None:
            return None
        sign_left, sign_right = (
            (1.0, alpha) if is_op(node, ADD) else (1.0, -alpha) if is_op(node, SUB) else (-alpha, 1.0)
        )
        return _sum(left, sign_left, right, sign_right)
    if is_op(node, MUL):
        left, right = part(node.args[0]), part(node.args[1])
        return None if left is None or right is None else _product(left, right)
    if is_op(node, DIV):
        divisor = scalar(node.args[1])
        left = part(node.args[0])
        return None if left is None or not divisor else {key: value / divisor for key, value in left.items()}
    if is_op(node, aten.neg.default):
        left = part(node.args[0])
        return None if left is None else {key: -value for key, value in left.items()}
    exponent = 2.0 if is_op(node, aten.square.default) else scalar(node.args[1]) if is_op(node, POW) else None
    if exponent in (2.0, 3.0, 4.0):
        left = result = part(node.args[0])
        for _ in range(int(exponent) - 1):
            result = None if left is None or result is None else _product(result, left)
        return result
    return None


def _sum(a: Polynomial, factor_a: float, b: Polynomial, factor_b: float) -> Polynomial:
    total = {key: factor_a * value for key, value in a.items()}
    for key, value in b.items():
        total[key] = total.get(key, 0.0) + factor_b * value
    return {key: value for key, value in total.items() if value}


def _product(a: Polynomial, b: Polynomial) -> Polynomial | None:
    if len(a) * len(b) > 64:
        return None
    total: Polynomial = {}
    for key_a, value_a in a.items():
        for key_b, value_b in b.items():
            key = tuple(map(operator.add, key_a, key_b))
            total[key] = total.get(key, 0.0) + value_a * value_b
    return {key: value for key, value in total.items() if value}


def same_polynomial(a: Polynomial | None, b: Polynomial, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the coefficients agree as :func:`close` says."""
    return a is not None and a.keys() == b.keys() and all(close(a[key], b[key], dtype) for key in b)


def axis_of(node: fx.Node, axis: int) -> int:
    """An axis of a node's value counted from the end: always negative."""
    return axis if axis < 0 else axis - len(tensor_shape(node))


def position_after(nodes: list[fx.Node]) -> fx.Node:
    """The node before which something that uses ``nodes`` may stand at the earliest."""
    after = max(nodes).next
    while after.op == "placeholder":
        after = after.next
    return after


def substitute(old: fx.Node, new: fx.Node) -> None:
    """Let ``new`` stand for ``old``, make the views after it legal, and erase what is not needed any more."""
    old.replace_all_uses_with(new)
    settle_views(new)
    erase_unused(old)


def erase_unused(*nodes: fx.Node) -> None:
    """Erase nodes that only checks use, with those checks, and then the operands that nothing uses any more."""
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node._erased or not is_pure(node) or users_of(node):
            continue
        for check in list(node.users):
            node.graph.erase_node(check)
        operands = node.all_input_nodes
        node.graph.erase_node(node)
        pending.extend(operands)


def settle_views(node: fx.Node) -> None:
    """Make the views after a rewritten value legal for its strides.

    The logical values do not change, but the rewritten value may lie differently in memory than the one it replaces.
    Its dependants get their values recomputed as far as strides differ; a view that cannot be made becomes a reshape.
    """
    pending = users_of(node)
    target: Any
    while pending:
        user = pending.pop(0)
        before, target = user.meta.get("val"), user.target
        if user.op != "call_function" or not isinstance(before, torch.Tensor):
            continue
        with faking(node.graph):
            try:
                after = target(*value_of(user.args), **value_of(dict(user.kwargs)))
            except (RuntimeError, ValueError):
                if not is_op(user, VIEWS):
                    raise
                user.target = target = aten.reshape.default
                after = target(*value_of(user.args), **value_of(dict(user.kwargs)))
        user.meta["val"] = after
        if not same_shape(before.stride(), after.stride()):
            pending.extend(next_user for next_user in users_of(user) if next_user not in pending)


def only_user(node: fx.Node) -> fx.Node | None:
    """The node's single user, if it has just one."""
    users = users_of(node)
    return users[0] if len(users) == 1 else None


def squeezed_sizes(shape: tuple[Any, ...]) -> list[tuple[int, Any]]:
    """The axes that are not of size one, as (axis counted from the end, size)."""
    return [(axis - len(shape), size) for axis, size in enumerate(shape) if not same_size(size, 1)]
