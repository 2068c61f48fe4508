"""What is known about a tensor's elements as a function of their indices, whatever sizes vary.

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
        return Affine(sorted_terms(total), self.constant + other.constant)

    def moved(self, place: Callable[[int], int | None]) -> Affine:
        """With every axis at another place (None: the axis has size one, its index is 0)."""
        total: dict[int, int] = {}
        for axis, coefficient in self.terms:
            if (target := place(axis)) is not None:
                total[target] = total.get(target, 0) + coefficient
        return Affine(sorted_terms(total), self.constant)

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


def moved(value: Value, place: Callable[[int], int | None]) -> Value:
    """A value with its axes at other places (None: the axis has size one, its index is 0)."""
    if isinstance(value, Choice):
        return Choice(value.test.moved(place), value.yes, value.no)
    return value.moved(place)


def rounded(number: float, dtype: torch.dtype) -> float:
    """A number as a dtype holds it."""
    if isinstance(number, int) and dtype in (torch.int64, torch.int32):
        return number
    return torch.tensor(float(number), dtype=torch.float64).to(dtype).item()


def truth_of(choice: Choice, holds: Callable[[float], bool]) -> Test:
    """Where the number that is chosen has a property."""
    yes, no = holds(choice.yes), holds(choice.no)
    if yes == no:
        return ALWAYS if yes else ALWAYS.inverse()
    return choice.test if yes else choice.test.inverse()


def sorted_terms(terms: dict[int, int]) -> tuple[tuple[int, int], ...]:
    """Coefficients as :class:`Affine` holds them."""
    return tuple(sorted((axis, coefficient) for axis, coefficient in terms.items() if coefficient))


def number_of(value: Value | None) -> float | None:
    """The number that a value is everywhere."""
    if isinstance(value, Affine) and not value.terms and not isinstance(value.constant, sympy.Basic):
        return value.constant
    if isinstance(value, Test) and not value.conditions:
        return float(not value.negated)
    return None


def never_negative(affine: Affine) -> bool:
    """Whether it is >= 0 whatever the indices are."""
    return affine.scaled(-1).never_positive()


def mapped(value: Value, change: Callable[[Affine], Affine]) -> Value:
    """With every affine expression in it changed."""
    if isinstance(value, Affine):
        return change(value)
    if isinstance(value, Test):
        return Test(frozenset(map(change, value.conditions)), value.negated).settled()
    return Choice(
        Test(frozenset(map(change, value.test.conditions)), value.test.negated).settled(), value.yes, value.no
    )
