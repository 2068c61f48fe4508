"""Binding: from the shapes of the inputs to the symbols' values, the outputs' shapes and the size of the arena.

It depends on shapes alone and is the same for every call with these shapes, so it is done once and kept.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache

from . import sizes
from .errors import ShapeError
from .plan import Plan, Symbol
from .plan_check import nbytes
from .ports import describe
from .records import frozen

Shapes = tuple[tuple[int, ...], ...]
StateSizes = tuple[int, ...]
"""The values of a plan's symbols that states have, in the order of its symbols."""
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
) -> Callable[[Shapes, StateSizes], Binding]:
    """The binding function of a plan, which remembers the shapes that came last; safe from several threads."""

    @lru_cache(maxsize=CACHED_SHAPES)
    def bind(shapes: Shapes, state_sizes: StateSizes) -> Binding:
        values = bind_symbols(plan, shapes, state_sizes)
        symbols = (ctypes.c_int64 * max(len(plan.symbols), 1))(*(values[symbol.name] for symbol in plan.symbols))
        outputs = []
        for port in plan.outputs:
            shape = tuple(sizes.evaluate(size, values) for size in port.shape)
            outputs.append((shape, nbytes(port.dtype, shape)))
        return Binding(values, symbols, tuple(outputs), arena_bytes(symbols))

    return bind


def bind_symbols(plan: Plan, shapes: Shapes, state_sizes: StateSizes | None = None) -> dict[str, int]:
    """Symbol values from input shapes, with every check of the plan.

    Args:
        plan: of the entry point.
        shapes: of the inputs.
        state_sizes: what ``state_sizes.py`` has checked; by default those of plain calls.

    Raises:
        ShapeError: a rank, a fixed size, a range, or a relation does not hold; names the input and the axis.
    """
    for port, shape in zip(plan.inputs, shapes, strict=True):
        if len(shape) != len(port.shape):
            raise ShapeError(f"input {port.name!r}: expected {describe(port)}, got shape {list(shape)}")
    of_states = [symbol for symbol in plan.symbols if symbol.state != -1]
    if state_sizes is None:
        state_sizes = tuple(symbol.sample for symbol in of_states)
    values = {symbol.name: size for symbol, size in zip(of_states, state_sizes, strict=True)}
    for symbol in plan.symbols:
        if symbol.state != -1:
            continue
        size = shapes[symbol.input][symbol.axis]
        value, rest = divmod(size - symbol.offset, symbol.factor)
        if rest or not symbol.minimum <= value <= symbol.maximum:
            raise ShapeError(
                f"input {plan.inputs[symbol.input].name!r}, axis {symbol.axis} ({symbol.name}): "
                f"expected {_expected(symbol)}, got {size}"
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
    sources = [f"{symbol.name} comes from {_source(plan, symbol)}" for symbol in plan.symbols if symbol.name in names]
    return f"{message} ({sizes.show(expected)}; {'; '.join(sources)})" if sources else message


def _expected(symbol: Symbol) -> str:
    """The sizes that an axis may have, in words."""
    low, high = (symbol.factor * value + symbol.offset for value in (symbol.minimum, symbol.maximum))
    if symbol.factor == 1:
        return f"{low} to {high}" + (f" ({symbol.name} + {symbol.offset})" if symbol.offset else "")
    if not symbol.offset:
        return f"{low} to {high} in multiples of {symbol.factor}"
    return f"{low} to {high} in steps of {symbol.factor}"


def _source(plan: Plan, symbol: Symbol) -> str:
    if symbol.state != -1:
        return f"the session's state {plan.states[symbol.state].name!r}, axis {symbol.axis}"
    return f"input {plan.inputs[symbol.input].name!r}, axis {symbol.axis}"
