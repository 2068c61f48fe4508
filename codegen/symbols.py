"""From torch's symbolic sizes (sympy) to size expressions."""

from __future__ import annotations

from typing import Any

import sympy
import torch

from ..passes.graph.program import Program
from ..runtime import sizes
from ..runtime.errors import CompileError
from ..runtime.sizes import Size

PREFIX = "n_"
"""What the names of sizes start with in C, where loops, operands and functions have names that users choose too."""


_LARGEST_DENOMINATOR = 1 << 16


class SymbolTable:
    """The symbols of one program: their names in kernels, ranges, and the translation of sympy expressions."""

    def __init__(self, program: Program) -> None:
        self.names = {symbol: PREFIX + entry.name for symbol, entry in program.symbols.items()}
        self.ranges = {PREFIX + entry.name: (entry.minimum, entry.maximum) for entry in program.symbols.values()}
        self._public: dict[str, Size] = {PREFIX + entry.name: entry.name for entry in program.symbols.values()}

    def public(self, size: Size) -> Size:
        """A size as the plan has it, with the names that users gave."""
        return sizes.substitute(size, self._public)

    def size(self, value: Any) -> Size:
        """An int, SymInt or sympy integer expression as a size.

        Raises:
            CompileError: the expression has a form that sizes cannot have, or an unknown symbol.
        """
        if isinstance(value, torch.SymInt):
            value = value.node.expr
        if isinstance(value, bool):
            return int(value)
        if isinstance(value, int | sympy.Integer):
            return int(value)
        return self._translate(sympy.sympify(value))

    def shape(self, value: torch.Tensor) -> tuple[Size, ...]:
        """The shape of a (fake) tensor."""
        return tuple(self.size(extent) for extent in value.shape)

    def upper(self, size: Size) -> int:
        """The largest value a size can take."""
        return sizes.bounds(size, self.ranges)[1]

    def _translate(self, expr: sympy.Basic) -> Size:
        if expr.is_Integer:
            return int(expr)  # type: ignore[call-overload]
        if isinstance(expr, sympy.Symbol):
            if expr not in self.names:
                raise CompileError(
                    f"the size {expr} depends on the data; only sizes known from input shapes can be compiled"
                )
            return self.names[expr]
        if isinstance(expr, sympy.Add):
            return sizes.add(*map(self._translate, expr.args))
        if isinstance(expr, sympy.Mul):
            return self._product(expr)
        if isinstance(expr, sympy.Pow) and expr.exp.is_Integer and int(expr.exp) > 0:
            return sizes.mul(*[self._translate(expr.base)] * int(expr.exp))
        name = type(expr).__name__
        args = expr.args
        if name in ("FloorDiv", "CleanDiv"):
            return sizes.floordiv(self._translate(args[0]), self._translate(args[1]))
        if name in ("TruncToInt", "FloorToInt", "CeilToInt"):
            numerator, denominator = _fraction(args[0])
            divide = sizes.ceildiv if name == "CeilToInt" else sizes.floordiv
            return divide(self._translate(numerator), self._translate(denominator))
        if name in ("Mod", "PythonMod"):
            return sizes.mod(self._translate(args[0]), self._translate(args[1]))
        if name == "ModularIndexing":
            return sizes.mod(
                sizes.floordiv(self._translate(args[0]), self._translate(args[1])), self._translate(args[2])
            )
        if name == "CeilDiv":
            return sizes.ceildiv(self._translate(args[0]), self._translate(args[1]))
        if name in ("Max", "Or"):  # a relation is 1 where it holds, and else 0
            return sizes.maximum(*map(self._translate, args))
        if name in ("Min", "And"):
            return sizes.minimum(*map(self._translate, args))
        if name == "floor" and isinstance(args[0], sympy.Mul | sympy.Add):
            numerator, denominator = sympy.fraction(sympy.together(args[0]))
            return sizes.floordiv(self._translate(numerator), self._translate(denominator))
        relations = {"Equality": "eq", "Unequality": "ne", "LessThan": "le", "StrictLessThan": "lt"}
        if name in relations:
            return sizes.compare(relations[name], *map(self._translate, args))  # type: ignore[arg-type]
        if name in ("GreaterThan", "StrictGreaterThan"):
            op = "le" if name == "GreaterThan" else "lt"
            return sizes.compare(op, self._translate(args[1]), self._translate(args[0]))  # type: ignore[arg-type]
        raise CompileError(f"cannot compile the size expression {expr} ({name})")

    def _product(self, expr: sympy.Mul) -> Size:
        numerator, denominator = expr.as_numer_denom()
        if denominator != 1:
            return sizes.floordiv(self._translate(numerator), self._translate(denominator))
        return sizes.mul(*map(self._translate, expr.args))


def _fraction(expr: sympy.Basic) -> tuple[sympy.Basic, sympy.Basic]:
    """Numerator and denominator of a real expression that the exporter wrote with floating-point functions.

    Raises:
        CompileError: a number in it is no fraction of small integers.
    """
    name = type(expr).__name__
    if name == "ToFloat":
        return expr.args[0], sympy.Integer(1)
    if name in ("IntTrueDiv", "FloatTrueDiv"):
        (a, b), (c, d) = map(_fraction, expr.args)
        return a * d, b * c
    if isinstance(expr, sympy.Float):
        exact = sympy.Rational(expr)
        if exact.q > _LARGEST_DENOMINATOR:
            raise CompileError(f"a size is computed with {expr}, which is no fraction of small integers")
        return sympy.Integer(exact.p), sympy.Integer(exact.q)
    if isinstance(expr, sympy.Mul):
        numerators, denominators = zip(*map(_fraction, expr.args), strict=True)
        return sympy.Mul(*numerators), sympy.Mul(*denominators)
    if isinstance(expr, sympy.Add):
        return sympy.fraction(sympy.together(sympy.Add(*(a / b for a, b in map(_fraction, expr.args)))))
    return expr, sympy.Integer(1)
