"""The symbols of a program: from the exporter's numbered ones to the names and ranges that users gave.

``torch.export`` calls its symbols ``s17`` after a hash. Here each becomes a sympy symbol with the user's name, in the
same ShapeEnv, so that every shape in every graph and dump reads ``batch`` and two compilations give the same text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from ..passes.graph.program import SymbolRange
from ..runtime.errors import UsageError
from .shapes import Axis, Fixed, ShapeSpec, Symbolic

_UNBOUNDED = 2**31


def name_symbols(
    env: ShapeEnv | None,
    values: Mapping[str, torch.Tensor],
    constraints: Mapping[sympy.Expr, Any],
    spec: ShapeSpec | None,
    strict: bool,
) -> dict[sympy.Symbol, SymbolRange]:
    """Rename the symbols of the inputs' shapes and give each its range.

    Args:
        env: where the symbols live; None if no input is a tensor.
        values: input name → fake tensor.
        constraints: the exported program's ranges.
        spec: what the user declared, by input name.
        strict: whether a declared range must lie inside the exporter's.

    Raises:
        UsageError: an axis declared dynamic that is fixed, ranges that do not fit, or no upper bound.
    """
    spec = spec or ShapeSpec()
    found: dict[sympy.Symbol, list[tuple[str, int, int]]] = {}  # symbol → the (name, low, high) declared for it
    first: dict[sympy.Symbol, str] = {}
    for name, value in values.items():
        axes = spec.inputs.get(name)
        if axes is not None and len(axes) != len(value.shape):
            raise UsageError(f"input {name!r} has {len(value.shape)} axes, but {len(axes)} dimensions were given")
        for index, size in enumerate(value.shape):
            expr = size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)
            place = f"axis {index} of input {name!r}"
            for symbol in sorted(expr.free_symbols, key=str):
                found.setdefault(symbol, [])
                first.setdefault(symbol, f"{_plain(name)}_dim{index}")
            if axes is not None:
                axis = axes[index]
                bounds = (axis.size, axis.size) if isinstance(axis, Fixed) else spec.ranges[axis.symbol]
                _declare(expr, axis, bounds, place, found)
    result: dict[sympy.Symbol, SymbolRange] = {}
    taken: dict[str, sympy.Symbol] = {}
    for symbol, declarations in found.items():
        low, high = _exported_range(symbol, constraints, env)
        # The exporter traces with sizes of 2 and more, so a lower bound of 2 means that it knows none.
        assumed_low, low = (1, 0) if low == 2 else (low, low)
        user_low = max((item[1] for item in declarations), default=None)
        user_high = min((item[2] for item in declarations), default=None)
        name = next((item[0] for item in declarations if item[0]), "") or _unused(first[symbol], taken)
        if user_low is not None and user_high is not None:
            if strict and (user_low < low or user_high > high):
                bound = f"{low}.." + (str(high) if high < _UNBOUNDED else "")
                raise UsageError(
                    f"{name!r} is declared as {user_low}..{user_high}, but the program was exported for {bound}; "
                    f"declare a range inside it, or export again with a wider one"
                )
            low, high = max(low, user_low), min(high, user_high)
        else:
            low = assumed_low
        if high >= _UNBOUNDED:
            axis_of = first[symbol].rsplit("_dim", 1)
            raise UsageError(
                f"axis {axis_of[1]} of input {axis_of[0]!r} has no upper bound: memory is planned with it; give its "
                f"range, as in --shape {axis_of[0]}={_template(values, axis_of[0], int(axis_of[1]))}"
            )
        if low > high:
            raise UsageError(f"no size fits every range that was declared for {name!r}: {low}..{high} is empty")
        assert env is not None
        renamed = _rename(env, symbol, name)
        if renamed in result:
            low, high = max(low, result[renamed].minimum), min(high, result[renamed].maximum)
        result[renamed] = SymbolRange(name, low, high)
        taken[name] = symbol
    return result


def _declare(
    expr: sympy.Expr,
    axis: Axis,
    bounds: tuple[int, int],
    place: str,
    found: dict[sympy.Symbol, list[tuple[str, int, int]]],
) -> None:
    """Turn what was declared of an axis into a name and a range of the symbol that the axis depends on."""
    if expr.is_Integer:
        if isinstance(axis, Symbolic):
            raise UsageError(
                f"{place} is declared dynamic, but it is fixed at {expr} in the program; write {expr}, or export it "
                f"with a dynamic axis"
            )
        if axis.size != expr:
            raise UsageError(f"{place} is declared as {axis.size}, but it is fixed at {expr} in the program")
        return
    symbols = sorted(expr.free_symbols, key=str)
    if len(symbols) != 1:
        return  # a sum of several dimensions follows from these
    symbol = symbols[0]
    offset = int(expr.subs(symbol, 0))
    factor = int(expr.subs(symbol, 1)) - offset
    if expr - (factor * symbol + offset) != 0 or factor <= 0:
        return
    if isinstance(axis, Fixed):
        value, rest = divmod(axis.size - offset, factor)
        if rest:
            raise UsageError(f"{place} is declared as {axis.size}, but the program takes {factor}*n + {offset} there")
        found[symbol].append(("", value, value))
    elif (factor, offset) == (axis.factor, axis.offset):
        found[symbol].append((axis.symbol, *bounds))
    else:
        step = f"{factor}*{axis.symbol}:..." if offset == 0 else f"{factor}*n + {offset}"
        raise UsageError(f"{place} is declared as {axis}, but the program takes sizes of the form {step} there")


def _exported_range(
    symbol: sympy.Symbol, constraints: Mapping[sympy.Expr, Any], env: ShapeEnv | None
) -> tuple[int, int]:
    """The bounds that the exporter kept."""
    bounds = constraints.get(symbol)
    if bounds is None and env is not None:
        bounds = env.var_to_range.get(symbol)
    if bounds is None:
        return 2, _UNBOUNDED
    low = int(bounds.lower) if bounds.lower.is_Integer else 0
    high = int(bounds.upper) if bounds.upper.is_Integer else _UNBOUNDED
    return low, min(high, _UNBOUNDED)


def _rename(env: ShapeEnv, symbol: sympy.Symbol, name: str) -> sympy.Symbol:
    """Let ``env`` read ``symbol`` as one with another name, the same range and the same example size."""
    if symbol.name == name:
        return symbol
    renamed = sympy.Symbol(name, integer=True, positive=symbol.is_positive, nonnegative=symbol.is_nonnegative)
    hints = env.backed_var_to_val if hasattr(env, "backed_var_to_val") else env.var_to_val
    if renamed in env.var_to_range:
        if hints[renamed] != hints[symbol]:
            raise UsageError(
                f"{name!r} names two dimensions whose example sizes differ ({hints[renamed]} and {hints[symbol]}); use "
                f"two names"
            )
        env.var_to_range[renamed] = env.var_to_range[renamed] & env.var_to_range[symbol]
    else:
        env.var_to_range[renamed] = env.var_to_range[symbol]
        hints[renamed] = hints[symbol]
        env.var_to_sources[renamed] = env.var_to_sources.get(symbol, [])
    # The replaced symbol's own range must not be narrower, or the env would keep both.
    env.var_to_range[symbol] = env.var_to_range[renamed]
    env._set_replacement(symbol, renamed, "named by the user")
    assert env.replacements.get(symbol) == renamed, f"{symbol} was not renamed to {name}"
    return renamed


def _plain(name: str) -> str:
    return re.sub(r"\W", "_", name, flags=re.ASCII)


def _unused(name: str, taken: Mapping[str, Any]) -> str:
    candidate, count = name, 1
    while candidate in taken:
        candidate = f"{name}_{count}"
        count += 1
    return candidate


def _template(values: Mapping[str, torch.Tensor], name: str, axis: int) -> str:
    """Dimensions to copy into ``--shape`` for an input whose dynamic axes have no range."""
    value = next((value for key, value in values.items() if _plain(key) == name), None)
    if value is None:
        return "..."
    known = ["batch", "seq"]
    return ",".join(
        (f"{known[index] if index < 2 else f'dim{index}'}:1..64" if isinstance(size, torch.SymInt) else str(size))
        for index, size in enumerate(value.shape)
    )
