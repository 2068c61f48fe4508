"""Attention masks: what they show, and whether a row may be hidden completely.

The fused operator gives zeros for a row that sees nothing. Written-out softmax gives nan there when positions are
hidden with -inf, and a mean over all positions when they are hidden with the lowest finite number. The functions here
tell when the difference cannot occur.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from .edit import same_size
from .index_values import CAUSAL, Affine, Choice, Test, Value
from .match import ADD, DIV, MUL, RSUB, SUB, VIEWS, argument, aten, dtype_of, is_op, is_tensor, scalar
from .query import tensor_of

# A score this low has weight 0 beside any score that real attention has; in the half types, what finfo says.
NEGLIGIBLE = -1e8

_PASSING = frozenset({
    aten.expand.default, aten.unsqueeze.default, aten.slice.Tensor, aten.select.int, aten.clone.default,
    aten.alias.default, aten.permute.default, aten.transpose.int, aten.contiguous.default, aten.squeeze.dim,
}) | VIEWS  # fmt: skip


def negligible(fill: float, dtype: torch.dtype) -> bool:
    """Whether a position hidden with this score has no weight as soon as another one is shown."""
    return fill <= NEGLIGIBLE or (dtype == torch.float16 and fill <= torch.finfo(dtype).min)


def is_causal(value: Value | None, dtype: torch.dtype) -> bool:
    """Whether a mask (boolean, or added to the scores) shows each row the columns up to its own and no others."""
    if isinstance(value, Choice):
        if value.test == CAUSAL:
            return value.yes == 0 and negligible(value.no, dtype)
        return value.test.inverse() == CAUSAL and value.no == 0 and negligible(value.yes, dtype)
    return value == CAUSAL


def shows_everything(value: Value | None) -> bool:
    """Whether a mask hides nothing: always true, or the same finite number everywhere."""
    if isinstance(value, Affine):
        return not value.terms and isinstance(value.constant, int | float) and math.isfinite(value.constant)
    return value == Test()


def shows_each_row_something(test: Value | None, shape: tuple[Any, ...]) -> bool:
    """Whether every row of a boolean mask has a true column: the first one, or (in a square) its own."""
    if not isinstance(test, Test) or test.negated:
        return False
    if all(_at_column(one, first=True).never_positive() for one in test.conditions):
        return True
    square = len(shape) >= 2 and same_size(shape[-1], shape[-2])
    return square and all(_at_column(one, first=False).never_positive() for one in test.conditions)


def _at_column(condition: Affine, *, first: bool) -> Affine:
    """A condition in the first column, or in the column with the row's number."""
    return condition.moved(lambda axis: axis if axis != -1 else None if first else -2)


def always_finite(node: fx.Node) -> bool:
    """Whether an additive mask is never -inf, judged by how it is computed.

    An integer mask that is converted counts as zeros and ones.
    """
    return _interval(node, 24) is not None


def _interval(node: Any, depth: int) -> tuple[float, float] | None:
    """Finite bounds of a value that stay finite in its dtype."""
    if not is_tensor(node):
        constant = scalar(node)
        return None if constant is None else (constant, constant)
    bounds = _bounds(node, depth) if depth else None
    dtype = dtype_of(node)
    if bounds is None or not dtype.is_floating_point:
        return bounds
    info = torch.finfo(dtype)
    # a bound beyond the largest number by less than rounding is that number
    rounded = [torch.tensor(bound, dtype=torch.float64).to(dtype).item() for bound in bounds]
    return (rounded[0], rounded[1]) if info.min <= rounded[0] and rounded[1] <= info.max else None


def _bounds(node: fx.Node, depth: int) -> tuple[float, float] | None:
    if not dtype_of(node).is_floating_point:
        return 0.0, 1.0
    constant = scalar(node)
    if constant is not None:
        return constant, constant
    if (tensor := tensor_of(node)) is not None:
        return (tensor.min().item(), tensor.max().item()) if tensor.numel() else None
    if node.op != "call_function":
        return None
    args: Any = node.args

    def of(*values: Any) -> list[tuple[float, float]]:
        found = [_interval(value, depth - 1) for value in values]
        return [one for one in found if one is not None] if None not in found else []

    if is_op(node, aten.full.default, aten.full_like.default):
        return next(iter(of(args[1])), None)
    if is_op(node, aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default):
        return 0.0, 0.0
    if is_op(node, aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar):
        chosen = of(args[1], args[2])
    elif is_op(node, aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        chosen = of(args[0], args[2])
    elif is_op(node, _PASSING, aten._to_copy.default):
        chosen = of(args[0])
    elif is_op(node, ADD, SUB, RSUB, MUL, DIV) and argument(node, 2, "alpha", 1) == 1:
        pair = of(*(reversed(args[:2]) if is_op(node, RSUB) else args[:2]))
        return _combined(node, *pair) if pair else None
    else:
        return None
    return (min(low for low, _ in chosen), max(high for _, high in chosen)) if chosen else None


def _combined(node: fx.Node, a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float] | None:
    if is_op(node, ADD):
        return a[0] + b[0], a[1] + b[1]
    if is_op(node, SUB, RSUB):
        return a[0] - b[1], a[1] - b[0]
    if is_op(node, DIV):
        if b[0] <= 0 <= b[1]:
            return None
        corners = [x / y for x in a for y in b]
    else:
        corners = [x * y for x in a for y in b]
    return min(corners), max(corners)
