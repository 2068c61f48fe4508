"""Finding the softmax that gives attention its weights, through copies, views and guards against rows of only -inf."""

from __future__ import annotations

from typing import Any

from torch import fx

from .edit import same_shape, tensor_shape
from .match import VIEWS, argument, aten, axis_of, is_op, is_tensor, scalar, without_copies

WHERE = frozenset({aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf})
MASKED_FILL = frozenset({aten.masked_fill.Scalar, aten.masked_fill.Tensor})


def softmax_of(node: Any) -> tuple[fx.Node, bool, list[fx.Node]] | None:
    """The softmax over the last axis that gives attention its weights, looked for through views and guards.

    Returns:
        (the softmax, whether a row of only -inf gives zeros instead of nan, all nodes from there on), or None.
    """
    safe, passed = False, []
    while True:
        inner = passed_through(node)
        if inner is not None:
            passed.append(node)
            node = inner
            continue
        guarded = _guarded(node)
        if guarded is not None:
            node, more = guarded
            passed += more
            safe = True
            continue
        break
    if is_op(node, aten._safe_softmax.default):
        safe = True
    elif not is_op(node, aten.softmax.int, aten._softmax.default):
        return None
    if axis_of(node, argument(node, 1, "dim")) != -1:
        return None
    return node, safe, [*passed, node]


def passed_through(node: Any) -> Any:
    """The operand of a copy, a conversion between float dtypes, or a view that regroups batch axes."""
    inner = _one_copy(node)
    if inner is not None:
        return inner
    if is_op(node, VIEWS, aten.unsqueeze.default, aten.squeeze.dim):
        source: Any = node.args[0]
        return source if same_shape(tensor_shape(node)[-2:], tensor_shape(source)[-2:]) else None
    return None


def _one_copy(node: Any) -> Any:
    if without_copies(node, casts=True) is node or not isinstance(node, fx.Node):
        return None
    return node.args[0]


def _guarded(node: Any) -> tuple[fx.Node, list[fx.Node]] | None:
    """Zeros put where softmax gave nan, or where all of its argument was -inf."""
    if is_op(node, aten.nan_to_num.default):
        inner: Any = node.args[0]
        return (inner, [node]) if not scalar(argument(node, 1, "nan") or 0.0) else None
    if is_op(node, WHERE):
        condition, yes, no = node.args
        zero_if, kept, zero = True, no, yes
        if scalar_or_full(yes) != 0.0:
            zero_if, kept, zero = False, yes, no
    elif is_op(node, MASKED_FILL):
        kept, condition, zero = node.args
        zero_if = True
    else:
        return None
    if scalar_or_full(zero) != 0.0 or not is_tensor(kept):
        return None
    passed = [node]
    if is_op(zero, aten.zeros_like.default, aten.full_like.default, aten.new_zeros.default):
        passed.append(zero)
    test = condition
    while is_op(test, aten.logical_not.default, aten.bitwise_not.default, aten.expand.default):
        passed.append(test)
        zero_if = zero_if if is_op(test, aten.expand.default) else not zero_if
        test = test.args[0]
    if not isinstance(test, fx.Node):
        return None
    if is_op(test, aten.isnan.default) and zero_if and _leads_to(test.args[0], kept):
        return kept, [*passed, test]
    if is_op(test, aten.ne.Tensor) and zero_if and test.args[0] is test.args[1] and _leads_to(test.args[0], kept):
        return kept, [*passed, test]
    softmax = kept
    while (inner := _one_copy(softmax)) is not None:
        softmax = inner
    if not is_op(softmax, aten.softmax.int, aten._softmax.default):
        return None
    hidden = _all_hidden(test, softmax.args[0], zero_if)
    return None if hidden is None else (kept, passed + hidden)


def _leads_to(node: Any, kept: fx.Node) -> bool:
    return without_copies(node, casts=True) is without_copies(kept, casts=True)


def _all_hidden(test: fx.Node, scores: Any, wanted: bool) -> list[fx.Node] | None:
    """The nodes that ask whether all (``wanted``), or not any, of a row is -inf."""
    passed = [test]
    if is_op(test, aten.all.dim):
        inner: Any = test.args[0]
        equal = True
    elif is_op(test, aten.any.dim):
        inner, equal = test.args[0], False
    else:
        return None
    if axis_of(scores, argument(test, 1, "dim")) != -1 or not argument(test, 2, "keepdim", False) or equal != wanted:
        return None
    while is_op(inner, aten.logical_not.default, aten.bitwise_not.default):
        passed.append(inner)
        inner, equal = inner.args[0], not equal
    if not is_op(inner, *((aten.eq.Scalar, aten.eq.Tensor) if equal else (aten.ne.Scalar, aten.ne.Tensor))):
        return None
    same = without_copies(inner.args[0], casts=True) is without_copies(scores, casts=True)
    return [*passed, inner] if same and scalar(inner.args[1]) == float("-inf") else None


def scalar_or_full(value: Any) -> float | None:
    """The number that a value holds everywhere."""
    value = without_copies(value)
    while is_op(value, aten.expand.default):
        value = value.args[0]
    if is_op(value, aten.full.default, aten.full_like.default):
        return scalar(value.args[1])
    if is_op(value, aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default):
        return 0.0
    return scalar(value)
