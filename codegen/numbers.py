"""Floating-point numbers that follow from sizes, such as ``seq ** -0.5``, as expressions inside kernels.

They are computed in float64, as Python does, and rounded once to the dtype of the operation that uses them.
"""

from __future__ import annotations

import functools

import sympy

from ..runtime.errors import CompileError
from .expr import Builder, Expr
from .symbols import SymbolTable

_UNARY = frozenset(
    ("sqrt", "exp", "log", "log2", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "floor", "ceil")
)
_DTYPE = "float64"


def number(builder: Builder, symbols: SymbolTable, expr: sympy.Basic) -> Expr:
    """The expression of a symbolic number, in float64.

    Raises:
        CompileError: it contains a function that kernels do not have.
    """
    if isinstance(expr, sympy.Number):
        return builder.const(float(expr), _DTYPE)
    if expr.is_integer:
        return builder.index(symbols.size(expr), _DTYPE)
    name = type(expr).__name__.removeprefix("OpaqueUnaryFn_")
    if name == "ToFloat":
        return number(builder, symbols, expr.args[0])
    args = [number(builder, symbols, part) for part in expr.args]
    if name in ("Add", "Mul", "Max", "Min"):
        op = {"Add": "add", "Mul": "mul", "Max": "maximum", "Min": "minimum"}[name]
        return functools.reduce(lambda a, b: builder.call(op, _DTYPE, a, b), args)
    if name in ("IntTrueDiv", "FloatTrueDiv"):
        return builder.call("div", _DTYPE, *args)
    if name in ("FloatPow", "Pow", "PowByNatural"):
        return builder.call("sqrt", _DTYPE, args[0]) if expr.args[1] == 0.5 else builder.call("pow", _DTYPE, *args)
    if name in _UNARY and len(args) == 1:
        return builder.call(name, _DTYPE, *args)
    raise CompileError(f"cannot compile the number {expr} ({name}), which depends on sizes")
