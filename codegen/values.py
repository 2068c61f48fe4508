"""Values inside a kernel: functions from a logical index to an expression.

Views, broadcasts, slices and permutes are compositions of these functions and cost nothing; a pointwise chain becomes
one tree. A ``mask`` given to :meth:`Value.at` is pushed down to the loads, so that reading outside (padding, windows)
never touches memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..runtime import sizes
from ..runtime.sizes import Size
from .expr import COMPUTE_DTYPE, Builder, Expr

LANES = 16  # channels per block in the channels16 layout
_PANELS = re.compile(r"panels(\d+)x(\d+)")

At = Callable[[tuple[Size, ...], Expr | None], Expr]


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` → ``"float32"``."""
    return str(dtype).removeprefix("torch.")


class Value:
    """A tensor inside a kernel: logical shape, tensor dtype, and the expression of each element (memoised)."""

    def __init__(self, shape: Sequence[Size], dtype: str, at: At, *, buffer: str = "", layout: str = "") -> None:
        self.shape = tuple(shape)
        self.dtype = dtype
        self.buffer = buffer  # parameter name when the value is a buffer read as it lies, else empty
        self.layout = layout
        self._at = at
        self._known: dict[Any, Expr] = {}

    @property
    def compute(self) -> str:
        """The dtype of the value's expressions."""
        return COMPUTE_DTYPE.get(self.dtype, self.dtype)

    def at(self, index: Sequence[Size], mask: Expr | None = None) -> Expr:
        """The expression of one element; where ``mask`` is false nothing is read and the result is unspecified."""
        key = (tuple(index), mask)
        if key not in self._known:
            self._known[key] = self._at(key[0], mask)
        return self._known[key]


class Kernel:
    """What all values of one kernel share: the expression builder and what is known about names."""

    def __init__(self, ranges: Mapping[str, tuple[int, int]]) -> None:
        self.builder = Builder()
        self.ranges: dict[str, tuple[int, int]] = dict(ranges)
        self.extents: dict[str, Size] = {}
        self.storage: dict[str, str] = {}  # buffer parameter → storage dtype
        self.layouts: dict[str, str] = {}  # buffer parameter → layout

    def variable(self, name: str, extent: Size) -> str:
        """Declare a loop variable: 0 <= name < extent."""
        self.extents[name] = extent
        self.ranges[name] = (0, max(sizes.bounds(extent, self.ranges)[1] - 1, 0))
        return name

    def bound_variable(self, base: str, extent: Size, used: frozenset[str]) -> str:
        """A variable for a reduction: ``base`` unless it is used around it or stands for another extent."""
        name = base
        while name in used or self.extents.get(name, extent) != extent:
            name += "r"
        return self.variable(name, extent)

    def dynamic(self, source: Expr, bound: Size, *, wraps: bool = False) -> Size:
        """An index loaded at run time, a fault when outside of ``bound``; if it ``wraps``, -1 is the last element."""
        index = self.builder.dynamic(source, bound, wraps)
        if isinstance(index, str) and index in self.builder.dynamics:
            self.variable(index, bound)
        return index

    def buffer(self, name: str, shape: Sequence[Size], dtype: str, layout: str = "rows") -> Value:
        """A buffer parameter as a value."""
        shape = tuple(shape)
        self.storage[name] = dtype
        self.layouts[name] = layout

        def at(index: tuple[Size, ...], mask: Expr | None) -> Expr:
            return self.builder.load(name, self.offset(shape, layout, index), dtype, mask)

        return Value(shape, dtype, at, buffer=name, layout=layout)

    def constant(self, value: Any, dtype: str, shape: Sequence[Size] = ()) -> Value:
        """A number as a value of any shape."""
        return Value(shape, dtype, lambda index, mask: self.builder.const(value, COMPUTE_DTYPE.get(dtype, dtype)))

    def offset(self, shape: Sequence[Size], layout: str, index: Sequence[Size]) -> Size:
        """Element offset of a logical index in a buffer of this shape and layout."""
        if layout == "channels_last":
            shape, index = channels_last(shape), channels_last(index)
        if layout == "channels16":
            n, c, *space = index
            block, lane = self.split(c, LANES)
            shape = (shape[0], sizes.ceildiv(shape[1], LANES), *shape[2:], LANES)
            index = (n, block, *space, lane)
        if panels := _PANELS.fullmatch(layout):
            width, per = map(int, panels.groups())
            (block, lane), (word, element) = self.split(index[0], width), self.split(index[1], per)
            shape = (sizes.ceildiv(shape[0], width), sizes.ceildiv(shape[1], per), width, per)
            index = (block, word, lane, element)
        result: Size = 0
        stride: Size = 1
        for position, extent in zip(reversed(index), reversed(shape), strict=True):
            result = sizes.add(result, sizes.mul(position, stride))
            stride = sizes.mul(stride, extent)
        return self._rejoin(result)

    def split(self, index: Size, by: Size) -> tuple[Size, Size]:
        """(quotient, remainder), without division where the terms or the variables' extents prove it."""
        if by == 1:
            return index, 0
        quotient: list[Size] = []
        rest: list[Size] = []
        for term in index.args if isinstance(index, sizes.Op) and index.op == "add" else (index,):
            factor = sizes.floordiv(term, by)
            if sizes.mul(factor, by) == term:
                quotient.append(factor)
            elif isinstance(term, int) and isinstance(by, int):  # so that the remainder is not negative
                quotient.append(factor)
                rest.append(term % by)
            else:
                rest.append(term)
        remainder = sizes.add(*rest)
        whole = sizes.add(*quotient)
        if self.below(remainder, by):
            return whole, remainder
        if isinstance(remainder, int) and isinstance(by, int):
            return sizes.add(whole, remainder // by), remainder % by
        return sizes.add(whole, sizes.floordiv(remainder, by)), sizes.mod(remainder, by)

    def below(self, index: Size, limit: Size) -> bool:
        """Whether ``0 <= index < limit`` is provable."""
        known = all(name in self.ranges for name in sizes.symbols_of(index) | sizes.symbols_of(limit))
        if not known:
            return False
        if sizes.bounds(index, self.ranges)[0] < 0:
            return False
        slack = sizes.sub(sizes.add(limit, -1), expand(self._largest(index)))
        return sizes.bounds(slack, self.ranges)[0] >= 0

    def _largest(self, index: Size) -> Size:
        """A bound from above in terms of the call's sizes: what grows with a loop variable at its last value."""
        if isinstance(index, int):
            return index
        if isinstance(index, str):
            return sizes.add(self._largest(self.extents[index]), -1) if index in self.extents else index
        if index.op == "mul" and any(sizes.bounds(factor, self.ranges)[0] < 0 for factor in index.args):
            return sizes.bounds(index, self.ranges)[1]
        if index.op == "mod":
            return sizes.add(self._largest(index.args[1]), -1)
        if index.op == "floordiv":
            return sizes.floordiv(self._largest(index.args[0]), index.args[1])
        if index.op in ("add", "mul", "min", "max"):
            combine = {"add": sizes.add, "mul": sizes.mul, "min": sizes.minimum, "max": sizes.maximum}[index.op]
            return combine(*map(self._largest, index.args))
        return 1

    def inside(self, index: Size, low: Size, high: Size) -> Expr | None:
        """``low <= index < high`` as a mask; ``None`` when it always holds."""
        if low == 0 and self.below(index, high):
            return None
        if isinstance(low, int) and isinstance(high, int) and low % LANES == high % LANES == 0 != high:
            # Whole blocks of channels, as where images are concatenated: the same for all lanes of a block.
            block, lane = self.split(index, LANES)
            if sizes.sub(expand(sizes.add(sizes.mul(block, LANES), lane)), index) == 0:
                index, low, high = block, low // LANES, high // LANES
        return self.builder.inside(index, low, high, self.ranges)

    def _rejoin(self, offset: Size) -> Size:
        """``(p / w) * w + p % w`` → ``p`` wherever a template's flat pixel index was taken apart."""
        if not (isinstance(offset, sizes.Op) and offset.op == "add"):
            return offset
        for term in offset.args:
            if isinstance(term, sizes.Op) and term.op == "mod":
                value, by = term.args
                partner = sizes.mul(sizes.floordiv(value, by), by)
                if partner in offset.args:
                    rest = [arg for arg in offset.args if arg not in (term, partner)]
                    return self._rejoin(sizes.add(value, *rest))
            if isinstance(term, sizes.Op) and term.op == "mul":
                for inner in term.args:
                    if isinstance(inner, sizes.Op) and inner.op == "mod":
                        value, by = inner.args
                        others = list(term.args)
                        others.remove(inner)
                        partner = sizes.mul(sizes.floordiv(value, by), by, *others)
                        if partner in offset.args:
                            rest = [arg for arg in offset.args if arg not in (term, partner)]
                            return self._rejoin(sizes.add(sizes.mul(value, *others), *rest))
        return offset


def panel_layout(width: int, per: int) -> str:
    """The layout of a matrix as panels of so many rows, in words of so many columns: [panels][words][width][per]."""
    return f"panels{width}x{per}"


def channels_last(axes: Sequence[Size]) -> tuple[Size, ...]:
    """A shape or an index in the order of the layout ``channels_last``: [N][H][W][C]."""
    n, c, *space = axes
    return (n, *space, c)


def expand(size: Size) -> Size:
    """Products of sums multiplied out, so that equal polynomials look equal."""
    if not isinstance(size, sizes.Op):
        return size
    args = [expand(arg) for arg in size.args]
    if size.op == "add":
        return sizes.add(*args)
    if size.op == "mul":
        terms: list[Size] = [1]
        for arg in args:
            parts = arg.args if isinstance(arg, sizes.Op) and arg.op == "add" else (arg,)
            terms = [sizes.mul(term, part) for term in terms for part in parts]
        return sizes.add(*terms)
    return sizes.substitute(sizes.Op(size.op, tuple(args)), {})


def broadcast(value: Value, shape: Sequence[Size]) -> Value:
    """The value seen in a larger shape (numpy's rules)."""
    shape = tuple(shape)
    if value.shape == shape:
        return value
    missing = len(shape) - len(value.shape)

    def at(index: tuple[Size, ...], mask: Expr | None) -> Expr:
        own = tuple(
            0 if extent == 1 else position for extent, position in zip(value.shape, index[missing:], strict=True)
        )
        return value.at(own, mask)

    return Value(shape, value.dtype, at)


def reshape(kernel: Kernel, value: Value, shape: Sequence[Size]) -> Value:
    """The value with another shape of the same number of elements."""
    shape = tuple(shape)
    if value.shape == shape:
        return value
    segments = matching_segments(value.shape, shape)

    def at(index: tuple[Size, ...], mask: Expr | None) -> Expr:
        own: list[Size] = []
        for (old_from, old_to), (new_from, new_to) in segments:
            old, new = value.shape[old_from:old_to], shape[new_from:new_to]
            if old == new:
                own.extend(index[new_from:new_to])
                continue
            flat: Size = 0
            for position, extent in zip(index[new_from:new_to], new, strict=True):
                flat = sizes.add(expand(sizes.mul(flat, extent)), 0 if extent == 1 else position)
            positions: list[Size] = []
            for extent in reversed(old[1:]):
                flat, inner = kernel.split(flat, extent)
                positions.append(inner)
            if old:
                positions.append(0 if old[0] == 1 else flat)
            own.extend(reversed(positions))
        return value.at(tuple(own), mask)

    return Value(shape, value.dtype, at)


def matching_segments(old: Sequence[Size], new: Sequence[Size]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Finest split of two shapes into runs of axes with equal products."""
    ends = {expand(sizes.product(old[:count])): count for count in range(len(old), 0, -1)}
    segments: list[tuple[tuple[int, int], tuple[int, int]]] = []
    old_from = new_from = 0
    for new_to in range(1, len(new)):
        old_to = ends.get(expand(sizes.product(new[:new_to])))
        if old_to is not None and old_from < old_to < len(old):
            segments.append(((old_from, old_to), (new_from, new_to)))
            old_from, new_from = old_to, new_to
    segments.append(((old_from, len(old)), (new_from, len(new))))
    return segments
