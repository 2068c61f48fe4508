"""Binding: from the shapes of the inputs to the symbols' values, the outputs' shapes and the size of the arena.

It depends on shapes alone and is the same for every call with these shapes, so it is done once and kept.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache

from . import sizes
from .arrays import describe
from .errors import ShapeError
from .plan import Plan
from .plan_check import nbytes
from .records import frozen

Shapes = tuple[tuple[int, ...], ...]
CACHED_SHAPES = 256


@frozen
class Binding:
    """What one combination of input shapes means.

    Attributes:
        values: symbol → value.
        symbols: the values as the C functions take them.
        outputs: shape and bytes of every output.
        arena_bytes: scratch memory of a call.
    """

    values: dict[str, int]
    symbols: ctypes.Array[ctypes.c_int64]
    outputs: tuple[tuple[tuple[int, ...], int], ...]
    arena_bytes: int


def cached_binder(
    plan: Plan, arena_bytes: Callable[[ctypes.Array[ctypes.c_int64]], int]
) -> Callable[[Shapes], Binding]:
    """The binding function of a plan, which remembers the shapes that came last; safe from several threads."""

    @lru_cache(maxsize=CACHED_SHAPES)
    def bind(shapes: Shapes) -> Binding:
        values = bind_symbols(plan, shapes)
        symbols = (ctypes.c_int64 * max(len(plan.symbols), 1))(*(values[symbol.name] for symbol in plan.symbols))
        outputs = []
        for port in plan.outputs:
            shape = tuple(sizes.evaluate(size, values) for size in port.shape)
            outputs.append((shape, nbytes(port.dtype, shape)))
        return Binding(values, symbols, tuple(outputs), arena_bytes(symbols))

    return bind


def bind_symbols(plan: Plan, shapes: Shapes) -> dict[str, int]:
    """Symbol values from input shapes, with every check of the plan.

    Raises:
        ShapeError: a rank, a fixed size, a range, or a relation does not hold; names the input and the axis.
    """
    for port, shape in zip(plan.inputs, shapes, strict=True):
        if len(shape) != len(port.shape):
            raise ShapeError(f"input {port.name!r}: expected {describe(port)}, got shape {list(shape)}")
    values: dict[str, int] = {}
    for symbol in plan.symbols:
        size = shapes[symbol.input][symbol.axis]
        value, rest = divmod(size, symbol.factor)
        if rest or not symbol.minimum <= value <= symbol.maximum:
            low, high = symbol.minimum * symbol.factor, symbol.maximum * symbol.factor
            multiple = f" in multiples of {symbol.factor}" if symbol.factor > 1 else ""
            raise ShapeError(
                f"input {plan.inputs[symbol.input].name!r}, axis {symbol.axis} ({symbol.name}): "
                f"expected {low} to {high}{multiple}, got {size}"
            )
        values[symbol.name] = value
    for index, (port, shape) in enumerate(zip(plan.inputs, shapes, strict=True)):
        for axis, (expected, got) in enumerate(zip(port.shape, shape, strict=True)):
            want = sizes.evaluate(expected, values)
            if want != got:
                raise ShapeError(_mismatch(plan, index, axis, want, got))
    for check in plan.checks:
        if not sizes.evaluate(check.condition, values):
            where = ", ".join(f"{name} = {values[name]}" for name in sorted(sizes.symbols_of(check.condition)))
            raise ShapeError(f"{check.message} (here {where})" if where else check.message)
    return values


def _mismatch(plan: Plan, index: int, axis: int, want: int, got: int) -> str:
    port = plan.inputs[index]
    expected = port.shape[axis]
    message = f"input {port.name!r}, axis {axis}: expected {want}, got {got}"
    names = sizes.symbols_of(expected)
    sources = [
        f"{symbol.name} comes from input {plan.inputs[symbol.input].name!r}, axis {symbol.axis}"
        for symbol in plan.symbols
        if symbol.name in names
    ]
    return f"{message} ({sizes.show(expected)}; {'; '.join(sources)})" if sources else message
