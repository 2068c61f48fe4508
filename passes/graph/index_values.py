"""What can be proven about a tensor from the indices of its elements: enough to see which positions a mask shows.

A tensor's value is described as a function of its own indices, whatever sizes vary:

- :class:`Affine`: an integer (or number) that is a sum of multiples of indices and a constant, such as what ``arange``
  gives;
- :class:`Test`: a truth value: all of some affine expressions are <= 0 (or not all are);
- :class:`Choice`: one of two numbers, by a test.

Axes are counted from the end, so that broadcasting needs no adjustment.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from .edit import same_size, tensor_shape
from .match import ADD, DIV, MUL, RSUB, SUB, VIEWS, argument, aten, axis_of, is_op, is_tensor
from .query import tensor_of

_LARGEST = 1 << 24  # constants of more elements are not looked into


@dataclass(frozen=True)
class Affine:
    """``sum(coefficient * index of axis) + constant``; the terms are sorted and have no zero coefficient."""

    terms: tuple[tuple[int, int], ...] = ()
    constant: Any = 0

    def scaled(self, factor: Any) -> Affine:
        """The product with an integer."""
        terms = tuple((axis, coefficient * factor) for axis, coefficient in self.terms)
        return Affine(terms if factor else (), self.constant * factor)

    def plus(self, other: Affine) -> Affine:
        """The sum."""
        total = dict(self.terms)
        for axis, coefficient in other.terms:
            total[axis] = total.get(axis, 0) + coefficient
        return Affine(_sorted(total), self.constant + other.constant)

    def moved(self, place: Callable[[int], int | None]) -> Affine:
        """With every axis at another place (None: the axis has size one, its index is 0)."""
        total: dict[int, int] = {}
        for axis, coefficient in self.terms:
            if (target := place(axis)) is not None:
                total[target] = total.get(target, 0) + coefficient
        return Affine(_sorted(total), self.constant)

    def never_positive(self) -> bool:
        """Whether it is <= 0 whatever the indices are (none is negative)."""
        known = self.constant.is_nonpositive if isinstance(self.constant, sympy.Basic) else self.constant <= 0
        return bool(known) and all(coefficient < 0 for _, coefficient in self.terms)


@dataclass(frozen=True)
class Test:
    """All of ``conditions`` are <= 0 (no condition: always true); with ``negated``, not all of them are."""

    conditions: frozenset[Affine] = frozenset()
    negated: bool = False

    def inverse(self) -> Test:
        """The opposite; of a single condition as a single condition, since values are integers."""
        if not self.negated and len(self.conditions) == 1:
            (condition,) = self.conditions
            return Test(frozenset({condition.scaled(-1).plus(Affine((), 1))})).settled()
        return Test(self.conditions, not self.negated)

    def settled(self) -> Test:
        """Without conditions that always hold, and not negated where that can be avoided."""
        left = Test(frozenset(one for one in self.conditions if not one.never_positive()), self.negated)
        return Test(left.conditions).inverse() if left.negated and len(left.conditions) == 1 else left

    def both(self, other: Test) -> Test | None:
        """This and the other, where that can be said."""
        if self.negated and not self.conditions:
            return self
        if other.negated and not other.conditions:
            return other
        if self.negated or other.negated:
            return None
        return Test(self.conditions | other.conditions)

    def moved(self, place: Callable[[int], int | None]) -> Test:
        """See :meth:`Affine.moved`."""
        return Test(frozenset(one.moved(place) for one in self.conditions), self.negated).settled()


@dataclass(frozen=True)
class Choice:
    """``yes`` where the test holds, else ``no``."""

    test: Test
    yes: float
    no: float


Value = Affine | Test | Choice

# column index - row index <= 0: a row sees the columns up to its own
CAUSAL = Test(frozenset({Affine(((-2, -1), (-1, 1)), 0)}))
ALWAYS = Test()


def value_at(argument_: Any, known: dict[fx.Node, Value | None] | None = None) -> Value | None:
    """What is known about a value as a function of its indices; None where nothing is.

    Args:
        argument_: a node or a number.
        known: results of earlier calls on the same graph, to be shared between them.
    """
    if isinstance(argument_, bool):
        return ALWAYS if argument_ else ALWAYS.inverse()
    if isinstance(argument_, int | float):
        return Affine((), argument_)
    if isinstance(argument_, torch.SymInt):
        return Affine((), argument_.node.expr)
    if not isinstance(argument_, fx.Node):
        return None
    known = {} if known is None else known
    if argument_ not in known:
        known[argument_] = None  # a graph has no cycles; this only bounds the work
        known[argument_] = _evaluate(argument_, known)
    return known[argument_]


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
    return _converted(_moved(result, lambda axis: None if axis in single else axis), meta.dtype)


def _moved(value: Value, place: Callable[[int], int | None]) -> Value:
    if isinstance(value, Choice):
        return Choice(value.test.moved(place), value.yes, value.no)
    return value.moved(place)


def _converted(value: Value, dtype: torch.dtype) -> Value | None:
    """A value in a dtype."""
    if dtype == torch.bool:
        if isinstance(value, Choice):
            return _truth(value, lambda number: number != 0)
        number = _number(value)
        return value if isinstance(value, Test) else None if number is None else value_at(bool(number))
    if isinstance(value, Test):
        return Choice(value, 1, 0)
    if isinstance(value, Choice):
        return Choice(value.test, _rounded(value.yes, dtype), _rounded(value.no, dtype))
    if (number := _number(value)) is not None:
        return Affine((), _rounded(number, dtype))
    return value if dtype in (torch.int64, torch.int32, torch.float32, torch.float64) else None


def _rounded(number: float, dtype: torch.dtype) -> float:
    """A number as a dtype holds it."""
    if isinstance(number, int) and dtype in (torch.int64, torch.int32):
        return number
    return torch.tensor(float(number), dtype=torch.float64).to(dtype).item()


def _truth(choice: Choice, holds: Callable[[float], bool]) -> Test:
    yes, no = holds(choice.yes), holds(choice.no)
    if yes == no:
        return ALWAYS if yes else ALWAYS.inverse()
    return choice.test if yes else choice.test.inverse()


def _sorted(terms: dict[int, int]) -> tuple[tuple[int, int], ...]:
    return tuple(sorted((axis, coefficient) for axis, coefficient in terms.items() if coefficient))


def _number(value: Value | None) -> float | None:
    """The number that a value is everywhere."""
    if isinstance(value, Affine) and not value.terms and not isinstance(value.constant, sympy.Basic):
        return value.constant
    if isinstance(value, Test) and not value.conditions:
        return float(not value.negated)
    return None


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
    return Affine(_sorted({-1: step}), begin.constant)


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
        return value if _number(value) is not None else None
    places = {old[0]: new[0] for old, new in zip(axes[0], axes[1], strict=True)}
    return _moved(value, places.get)


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
    return None if value is None else _moved(value, places.get)


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
        return value if _number(value) is not None else None
    return _reindexed(value, axis, step, offset)


def _selected(node: fx.Node, look: Look) -> Value | None:
    source, axis, index = node.args
    value = look(source)
    if value is None or not is_tensor(source) or type(index) is not int or index < 0 or type(axis) is not int:
        return None
    gone = axis_of(source, axis)
    fixed = _reindexed(value, gone, 0, index)
    return _moved(fixed, lambda old: old + 1 if old < gone else old)


def _reindexed(value: Value, axis: int, step: int, offset: Any) -> Value:
    """With ``offset + step * index`` for the index of an axis."""

    def one(affine: Affine) -> Affine:
        total = dict(affine.terms)
        coefficient = total.pop(axis, 0)
        total[axis] = coefficient * step
        return Affine(_sorted(total), affine.constant + coefficient * offset)

    def test(given: Test) -> Test:
        return Test(frozenset(map(one, given.conditions)), given.negated).settled()

    if isinstance(value, Choice):
        return Choice(test(value.test), value.yes, value.no)
    return one(value) if isinstance(value, Affine) else test(value)


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
    a, b = _number(left), _number(right)
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
    if isinstance(left, Choice) and (number := _number(right)) is not None:
        return _truth(left, lambda a: bool(getattr(torch, relation)(torch.tensor(float(a)), number)))
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
        value = _truth(value, bool) if is_op(node, aten.logical_not.default) else None
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
        else _number(side)
        for index, side in enumerate((yes, no))
    )
    return None if a is None or b is None else Choice(test, a, b)


def _triangular(node: fx.Node, look: Look) -> Value | None:
    value, diagonal = _number(look(node.args[0])), argument(node, 1, "diagonal", 0)
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
