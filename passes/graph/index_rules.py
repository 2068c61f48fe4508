"""What each operator makes of index values: enough to see which positions a mask shows.

:func:`value_at` gives what is known about a node as a function of its indices (see ``index_values``), through the
operators that masks are made of: counting, comparing, choosing, triangles, looking up, and views.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx

from .edit import same_size, tensor_shape
from .index_values import (
    ALWAYS,
    CAUSAL,
    Affine,
    Choice,
    Test,
    Value,
    mapped,
    moved,
    never_negative,
    number_of,
    rounded,
    sorted_terms,
    truth_of,
)
from .match import ADD, DIV, MUL, RSUB, SUB, VIEWS, argument, aten, axis_of, is_op, is_tensor
from .query import tensor_of

_LARGEST = 1 << 24  # constants of more elements are not looked into


def value_at(item: Any, known: dict[fx.Node, Value | None] | None = None) -> Value | None:
    """What is known about a value as a function of its indices; None where nothing is.

    Args:
        item: a node or a number.
        known: results of earlier calls on the same graph, to be shared between them.
    """
    if isinstance(item, bool):
        return ALWAYS if item else ALWAYS.inverse()
    if isinstance(item, int | float):
        return Affine((), item)
    if isinstance(item, torch.SymInt):
        return Affine((), item.node.expr)
    if not isinstance(item, fx.Node):
        return None
    known = {} if known is None else known
    if item not in known:
        known[item] = None  # a graph has no cycles; this only bounds the work
        known[item] = _evaluate(item, known)
    return known[item]


def _evaluate(node: fx.Node, known: dict[fx.Node, Value | None]) -> Value | None:
    meta = node.meta.get("val")
    if isinstance(meta, int | torch.SymInt):
        return value_at(meta)
    if not isinstance(meta, torch.Tensor):
        return None
    if node.op == "get_attr":
        return _constant(node)
    if node.op != "call_function":
        return None
    rule = _RULES.get(node.target)
    result = rule(node, lambda value: value_at(value, known)) if rule else None
    if result is None:
        return None
    sizes = tensor_shape(node)
    single = {axis - len(sizes) for axis, size in enumerate(sizes) if same_size(size, 1)}
    return _converted(moved(result, lambda axis: None if axis in single else axis), meta.dtype)


def _converted(value: Value, dtype: torch.dtype) -> Value | None:
    """A value in a dtype."""
    if dtype == torch.bool:
        if isinstance(value, Choice):
            return truth_of(value, lambda number: number != 0)
        number = number_of(value)
        return value if isinstance(value, Test) else None if number is None else value_at(bool(number))
    if isinstance(value, Test):
        return Choice(value, 1, 0)
    if isinstance(value, Choice):
        return Choice(value.test, rounded(value.yes, dtype), rounded(value.no, dtype))
    if (number := number_of(value)) is not None:
        return Affine((), rounded(number, dtype))
    return value if dtype in (torch.int64, torch.int32, torch.float32, torch.float64) else None


def _constant(node: fx.Node) -> Value | None:
    """A weight or buffer that is the same everywhere, counts along its last axis, or is lower-triangular."""
    tensor = tensor_of(node)
    if tensor is None or not 0 < tensor.numel() <= _LARGEST or tensor.is_complex():
        return None
    first = tensor.reshape(-1)[0]
    if bool((tensor == first).all()):
        return value_at(first.item())
    while tensor.dim() > 2 and tensor.shape[0] == 1:
        tensor = tensor[0]
    if tensor.dim() == 2 and tensor.shape[0] == 1:
        tensor = tensor[0]
    if tensor.dim() == 1:
        if tensor.dtype not in (torch.int64, torch.int32):
            return None
        step = tensor[1] - tensor[0]
        counted = tensor[0] + step * torch.arange(tensor.numel(), dtype=tensor.dtype)
        return Affine(((-1, int(step)),), int(tensor[0])) if torch.equal(tensor, counted) else None
    if tensor.dim() != 2 or tensor.shape[1] < 2:
        return None
    yes, no = tensor[0, 0], tensor[0, -1]
    shown = torch.arange(tensor.shape[1])[None, :] <= torch.arange(tensor.shape[0])[:, None]
    if not torch.equal(tensor, torch.where(shown, yes, no)):
        return None
    return _converted(Choice(CAUSAL, yes.item(), no.item()), tensor.dtype)


Look = Callable[[Any], Value | None]


def _arange(node: fx.Node, look: Look) -> Value | None:
    bounds: Any = node.args
    start = bounds[0] if len(bounds) > 1 else 0
    step = bounds[2] if len(bounds) > 2 else argument(node, 2, "step", 1)
    begin = look(start)
    if type(step) is not int or not isinstance(begin, Affine) or begin.terms:
        return None
    return Affine(sorted_terms({-1: step}), begin.constant)


def _filled(node: fx.Node, look: Look) -> Value | None:
    name = str(node.target)
    if "full" in name:
        index = 2 if "new_full" in name else 1
        return look(argument(node, index, "fill_value"))
    return look(1 if "ones" in name else 0)


def _copied(node: fx.Node, look: Look) -> Value | None:
    return look(node.args[0])


def _regrouped(node: fx.Node, look: Look) -> Value | None:
    """A view that only adds or drops axes of size one."""
    value, source = look(node.args[0]), node.args[0]
    if value is None or not is_tensor(source):
        return None
    axes = [_long_axes(tensor_shape(one)) for one in (source, node)]
    if len(axes[0]) != len(axes[1]) or not all(same_size(a[1], b[1]) for a, b in zip(axes[0], axes[1], strict=True)):
        return value if number_of(value) is not None else None
    places = {old[0]: new[0] for old, new in zip(axes[0], axes[1], strict=True)}
    return moved(value, places.get)


def _long_axes(shape: tuple[Any, ...]) -> list[tuple[int, Any]]:
    return [(axis - len(shape), size) for axis, size in enumerate(shape) if not same_size(size, 1)]


def _permuted(node: fx.Node, look: Look) -> Value | None:
    value, dims = look(node.args[0]), len(tensor_shape(node))
    order = list(range(dims))
    if is_op(node, aten.permute.default):
        order = [int(axis) % dims for axis in node.args[1]]  # type: ignore[union-attr, arg-type]
    elif dims > 1:
        a, b = (0, 1) if is_op(node, aten.t.default) else (axis_of(node, axis) + dims for axis in node.args[1:3])  # type: ignore[arg-type]
        order[a], order[b] = order[b], order[a]
    places = {old - dims: new - dims for new, old in enumerate(order)}
    return None if value is None else moved(value, places.get)


def _sliced(node: fx.Node, look: Look) -> Value | None:
    value = look(node.args[0])
    axis = axis_of(node, argument(node, 1, "dim", 0))
    start, step = argument(node, 2, "start") or 0, argument(node, 4, "step", 1)
    if value is None or type(step) is not int:
        return None
    first = look(start)
    if not isinstance(first, Affine) or first.terms:
        return None
    offset = first.constant
    known = offset.is_nonnegative if isinstance(offset, sympy.Basic) else offset >= 0
    if not known:
        return value if number_of(value) is not None else None
    return _reindexed(value, axis, step, offset)


def _selected(node: fx.Node, look: Look) -> Value | None:
    source, axis, index = node.args
    value = look(source)
    if value is None or not is_tensor(source) or type(index) is not int or index < 0 or type(axis) is not int:
        return None
    gone = axis_of(source, axis)
    fixed = _reindexed(value, gone, 0, index)
    return moved(fixed, lambda old: old + 1 if old < gone else old)


def _reindexed(value: Value, axis: int, step: int, offset: Any) -> Value:
    """With ``offset + step * index`` for the index of an axis."""

    def one(affine: Affine) -> Affine:
        total = dict(affine.terms)
        coefficient = total.pop(axis, 0)
        total[axis] = coefficient * step
        return Affine(sorted_terms(total), affine.constant + coefficient * offset)

    return mapped(value, one)


def _gathered(node: fx.Node, look: Look) -> Value | None:
    """All axes looked up: the value with the positions' values for its indices."""
    source, positions = node.args
    value = look(source)
    if value is None or not is_tensor(source) or not isinstance(positions, list | tuple):
        return None
    if number_of(value) is not None:
        return value
    looked = [look(position) if is_tensor(position) else None for position in positions]
    found = [one for one in looked if isinstance(one, Affine) and never_negative(one)]
    if len(found) != len(positions) or len(found) != len(tensor_shape(source)):
        return None
    at = {axis - len(found): one for axis, one in enumerate(found)}

    def composed(affine: Affine) -> Affine:
        total = Affine((), affine.constant)
        for axis, coefficient in affine.terms:
            total = total.plus(at[axis].scaled(coefficient))
        return total

    return mapped(value, composed)


def _accumulated(node: fx.Node, look: Look) -> Value | None:
    """Running sums of the same number."""
    number, axis = number_of(look(node.args[0])), axis_of(node, argument(node, 1, "dim"))
    if number is None or number != int(number):
        return None
    return Affine(sorted_terms({axis: int(number)}), int(number))


def _differences(node: fx.Node, look: Look) -> Value | None:
    """Differences along an axis, with one value put before it so that the size stays."""
    value, before = look(node.args[0]), look(argument(node, 3, "prepend"))
    axis = axis_of(node, argument(node, 2, "dim", -1))
    if not isinstance(value, Affine) or not isinstance(before, Affine) or argument(node, 1, "n", 1) != 1:
        return None
    if argument(node, 4, "append") is not None or not same_size(tensor_shape(node)[axis], _size(node.args[0], axis)):
        return None
    step = dict(value.terms).get(axis, 0)
    start = value.moved(lambda one: None if one == axis else one)
    first = start.plus(before.scaled(-1))
    return Affine((), step) if first == Affine((), step) else None


def _size(node: Any, axis: int) -> Any:
    return tensor_shape(node)[axis]


def _arithmetic(node: fx.Node, look: Look) -> Value | None:
    left, right = look(node.args[0]), look(node.args[1])
    alpha = argument(node, 2, "alpha", 1)
    if left is None or right is None or alpha != 1:
        return None
    if is_op(node, RSUB):
        left, right = right, left
    if is_op(node, MUL) and isinstance(left, Test) and isinstance(right, Test):
        return left.both(right)
    left, right = (Choice(one, 1, 0) if isinstance(one, Test) else one for one in (left, right))
    apply: Callable[[Any, Any], Any]
    if is_op(node, ADD):
        apply = lambda a, b: a + b  # noqa: E731
    elif is_op(node, MUL):
        apply = lambda a, b: a * b  # noqa: E731
    elif is_op(node, DIV):
        apply = lambda a, b: a / b if b else float("nan")  # noqa: E731
    else:
        apply = lambda a, b: a - b  # noqa: E731
    a, b = number_of(left), number_of(right)
    if a is not None and b is not None:
        return Affine((), apply(a, b))
    if isinstance(left, Choice) and b is not None:
        return Choice(left.test, apply(left.yes, b), apply(left.no, b))
    if isinstance(right, Choice) and a is not None:
        return Choice(right.test, apply(a, right.yes), apply(a, right.no))
    if isinstance(left, Choice) and isinstance(right, Choice) and left.test == right.test:
        return Choice(left.test, apply(left.yes, right.yes), apply(left.no, right.no))
    if not isinstance(left, Affine) or not isinstance(right, Affine) or is_op(node, DIV):
        return None
    if is_op(node, MUL):
        factor, base = (a, right) if a is not None else (b, left)
        return base.scaled(factor) if type(factor) is int else None
    return left.plus(right if is_op(node, ADD) else right.scaled(-1))


def _negated(node: fx.Node, look: Look) -> Value | None:
    value = look(node.args[0])
    if isinstance(value, Choice):
        return Choice(value.test, -value.yes, -value.no)
    return value.scaled(-1) if isinstance(value, Affine) else None


def _compared(node: fx.Node, look: Look) -> Value | None:
    left, right = look(node.args[0]), look(node.args[1])
    relation = str(node.target).split(".")[1]
    left, right = (Choice(one, 1, 0) if isinstance(one, Test) else one for one in (left, right))
    a, b = number_of(left), number_of(right)
    if a is not None and b is not None:
        return value_at(bool(getattr(operator, relation)(a, b)))
    if isinstance(left, Choice) and (number := number_of(right)) is not None:
        return truth_of(left, lambda a: bool(getattr(operator, relation)(a, number)))
    if not isinstance(left, Affine) or not isinstance(right, Affine) or relation in ("eq", "ne"):
        return None
    values = (*left.terms, *right.terms, (0, left.constant), (0, right.constant))
    if not all(isinstance(number, int | sympy.Integer | sympy.Basic) for _, number in values):
        return None  # not integers: "less than" is not "less than or equal to one less"
    if relation in ("ge", "gt"):
        left, right = right, left
    difference = left.plus(right.scaled(-1)).plus(Affine((), int(relation in ("lt", "gt"))))
    return Test(frozenset({difference})).settled()


def _inverted(node: fx.Node, look: Look) -> Value | None:
    value = look(node.args[0])
    if isinstance(value, Choice):
        value = truth_of(value, bool) if is_op(node, aten.logical_not.default) else None
    return value.inverse() if isinstance(value, Test) else None


def _conjunction(node: fx.Node, look: Look) -> Value | None:
    left, right = look(node.args[0]), look(node.args[1])
    return left.both(right) if isinstance(left, Test) and isinstance(right, Test) else None


def _disjunction(node: fx.Node, look: Look) -> Value | None:
    left, right = look(node.args[0]), look(node.args[1])
    if not isinstance(left, Test) or not isinstance(right, Test):
        return None
    if ALWAYS in (left, right):
        return ALWAYS
    neither = left.inverse().both(right.inverse())
    return None if neither is None else neither.inverse()


def _chosen(node: fx.Node, look: Look) -> Value | None:
    test, yes, no = look(node.args[0]), look(node.args[1]), look(node.args[2])
    return _between(test, yes, no)


def _masked(node: fx.Node, look: Look) -> Value | None:
    return _between(look(node.args[1]), look(node.args[2]), look(node.args[0]))


def _between(test: Value | None, yes: Value | None, no: Value | None) -> Value | None:
    if not isinstance(test, Test):
        return None
    if not test.conditions:
        return no if test.negated else yes
    a, b = (
        (side.yes if (side.test == test) == (index == 0) else side.no)
        if isinstance(side, Choice) and side.test in (test, test.inverse())
        else number_of(side)
        for index, side in enumerate((yes, no))
    )
    return None if a is None or b is None else Choice(test, a, b)


def _triangular(node: fx.Node, look: Look) -> Value | None:
    value, diagonal = number_of(look(node.args[0])), argument(node, 1, "diagonal", 0)
    if value is None or type(diagonal) is not int:
        return None
    (condition,) = CAUSAL.conditions
    below = Test(frozenset({condition.plus(Affine((), -diagonal))}))
    if is_op(node, aten.triu.default):
        below = Test(frozenset({condition.scaled(-1).plus(Affine((), diagonal))}))
    return Choice(below, value, 0)


_RULES: dict[Any, Callable[[fx.Node, Look], Value | None]] = {
    **dict.fromkeys((aten.arange.default, aten.arange.start, aten.arange.start_step), _arange),
    **dict.fromkeys(
        (
            aten.full.default, aten.full_like.default, aten.new_full.default, aten.ones.default, aten.ones_like.default,
            aten.new_ones.default, aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default,
        ),
        _filled,
    ),
    **dict.fromkeys(
        (
            aten.clone.default, aten.alias.default, aten.detach.default, aten.contiguous.default, aten.expand.default,
            aten._to_copy.default, aten.type_as.default, aten.lift_fresh_copy.default, aten.scalar_tensor.default,
        ),
        _copied,
    ),
    **dict.fromkeys((*VIEWS, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims), _regrouped),
    **dict.fromkeys((aten.permute.default, aten.transpose.int, aten.t.default), _permuted),
    aten.slice.Tensor: _sliced,
    aten.index.Tensor: _gathered,
    aten.cumsum.default: _accumulated,
    aten.diff.default: _differences,
    aten.select.int: _selected,
    **dict.fromkeys((*ADD, *SUB, *RSUB, *MUL, *DIV), _arithmetic),
    aten.neg.default: _negated,
    **dict.fromkeys(
        (getattr(relation, kind) for relation in (aten.le, aten.lt, aten.ge, aten.gt, aten.eq, aten.ne)
         for kind in ("Tensor", "Scalar")),
        _compared,
    ),
    **dict.fromkeys((aten.logical_not.default, aten.bitwise_not.default), _inverted),
    **dict.fromkeys((aten.logical_and.default, aten.bitwise_and.Tensor, aten.__and__.Tensor), _conjunction),
    **dict.fromkeys((aten.logical_or.default, aten.bitwise_or.Tensor, aten.__or__.Tensor), _disjunction),
    **dict.fromkeys(
        (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar), _chosen
    ),
    **dict.fromkeys((aten.masked_fill.Scalar, aten.masked_fill.Tensor), _masked),
    **dict.fromkeys((aten.tril.default, aten.triu.default), _triangular),
}  # fmt: skip
