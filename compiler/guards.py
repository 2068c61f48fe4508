"""What the exporter assumed about sizes, as relations that the runtime can check.

``torch.export`` records assumptions in two forms: text over the inputs' sizes (``L['x'].size()[0] % 8 == 0``) and
``_assert_scalar`` nodes. Both become sympy relations over the program's symbols. Most are implied by the symbols'
ranges, or only say that a size is not 0 or 1 (the exporter traces with sizes of 2 and more, yet its operators hold for
1 as well); these are dropped. The rest is kept: a size that violates one would get a graph made for another.
"""

from __future__ import annotations

import ast
import itertools
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import sympy
from torch.utils._sympy.functions import FloorDiv, Max, Min, Mod

from ..runtime.errors import SourceError

# Above this many assignments of the symbols a guard is kept without having been tried on all of them.
_ENUMERATE = 1 << 16

SizeOf = Callable[[str, int], sympy.Expr]

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: FloorDiv,
    ast.Mod: Mod,
}
_COMPARE: dict[type[ast.cmpop], Any] = {
    ast.Eq: sympy.Eq,
    ast.NotEq: sympy.Ne,
    ast.Lt: sympy.Lt,
    ast.LtE: sympy.Le,
    ast.Gt: sympy.Gt,
    ast.GtE: sympy.Ge,
}
_VALUE: dict[str, Callable[..., int]] = {
    "Add": lambda *xs: sum(xs),
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "Max": max,
    "Min": min,
    "Equality": lambda a, b: int(a == b),
    "Unequality": lambda a, b: int(a != b),
    "LessThan": lambda a, b: int(a <= b),
    "StrictLessThan": lambda a, b: int(a < b),
    "GreaterThan": lambda a, b: int(a >= b),
    "StrictGreaterThan": lambda a, b: int(a > b),
    "Or": lambda *xs: int(any(xs)),
    "And": lambda *xs: int(all(xs)),
}


def parse_guard(code: str, size: SizeOf) -> list[sympy.Basic]:
    """The relations of one guard's text.

    Args:
        code: Python text over ``L[...].size()[i]``, as the exporter writes it.
        size: gives the expression of an input's axis, the input by the text of its path, such as ``L['x']``.

    Raises:
        SourceError: the guard uses something that cannot be checked on sizes.
    """
    try:
        return _relations(ast.parse(code.strip(), mode="eval").body, size)
    except (SyntaxError, KeyError, IndexError, TypeError) as error:
        raise SourceError(
            f"the exported program assumes {code!r}, which cannot be checked at run time ({error}); export it with "
            f"shapes that make the assumption unnecessary"
        ) from None


def essential(guards: Iterable[sympy.Basic], ranges: Mapping[sympy.Symbol, tuple[int, int]]) -> tuple[sympy.Basic, ...]:
    """The guards that exclude something that the ranges and the guards before them allow.

    Raises:
        SourceError: a guard that no size in the ranges satisfies.
    """
    kept: list[sympy.Basic] = []
    for guard in sorted(dict.fromkeys(guards), key=_strength):
        if guard in (True, sympy.true) or _only_zero_or_one(guard):
            continue
        if guard in (False, sympy.false):
            raise SourceError("the exported program assumes sizes that its own dimensions exclude; export it again")
        symbols = sorted(guard.free_symbols, key=str)
        spans = [range(ranges[symbol][0], ranges[symbol][1] + 1) for symbol in symbols]
        count = 1
        for span in spans:
            count *= len(span)
        if count <= _ENUMERATE:
            before = [other for other in kept if other.free_symbols <= set(symbols)]
            allowed = excluded = 0
            for point in itertools.product(*spans):
                values = dict(zip(symbols, point, strict=True))
                if all(holds(other, values) for other in before):
                    allowed += 1
                    excluded += not holds(guard, values)
            if not excluded:
                continue
            if excluded == allowed:
                raise SourceError(f"no size in the declared ranges satisfies what the exporter assumed: {guard}")
        kept.append(guard)
    return tuple(kept)


def holds(guard: sympy.Basic, values: Mapping[sympy.Symbol, int]) -> bool:
    """Whether a relation holds for the symbols' values; a division by zero counts as a violation.

    Raises:
        SourceError: the relation uses a function that sizes cannot be computed with.
    """
    try:
        return bool(_value(guard, values))
    except ZeroDivisionError:
        return False


def _relations(node: ast.expr, size: SizeOf) -> list[sympy.Basic]:
    if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.And):
        return [relation for part in node.values for relation in _relations(part, size)]
    if isinstance(node, ast.BoolOp):  # one holds, as where sizes are equal or one of them is 1
        return [sympy.Or(*(sympy.And(*_relations(part, size)) for part in node.values))]
    if isinstance(node, ast.Compare):
        sides = [_expression(side, size) for side in (node.left, *node.comparators)]
        return [
            _COMPARE[type(op)](left, right) for op, left, right in zip(node.ops, sides[:-1], sides[1:], strict=True)
        ]
    raise KeyError(ast.unparse(node))


def _expression(node: ast.expr, size: SizeOf) -> sympy.Expr:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return sympy.Integer(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_expression(node.operand, size)
    if isinstance(node, ast.BinOp):
        return _BINARY[type(node.op)](_expression(node.left, size), _expression(node.right, size))
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Call) and isinstance(node.slice, ast.Constant):
        call = node.value
        if isinstance(call.func, ast.Attribute) and call.func.attr == "size" and isinstance(node.slice.value, int):
            return size(ast.unparse(call.func.value), node.slice.value)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
        name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
        arguments = [_expression(argument, size) for argument in node.args]
        return {"max": Max, "sym_max": Max, "min": Min, "sym_min": Min}[name](*arguments)
    raise KeyError(ast.unparse(node))


def _value(expr: Any, values: Mapping[sympy.Symbol, int]) -> int:
    if isinstance(expr, sympy.Symbol):
        return values[expr]
    if isinstance(expr, sympy.Integer):
        return int(expr)
    if expr in (sympy.true, sympy.false):
        return int(bool(expr))
    arguments = [_value(argument, values) for argument in expr.args]
    if isinstance(expr, sympy.Mul):
        product = 1
        for factor in arguments:
            product *= factor
        return product
    if isinstance(expr, sympy.Pow) and arguments[1] >= 0:
        return int(arguments[0] ** arguments[1])
    function = _VALUE.get(type(expr).__name__)
    if function is None:
        raise SourceError(f"the program depends on the size {expr}, which cannot be computed at run time")
    return int(function(*arguments))


def _only_zero_or_one(guard: sympy.Basic) -> bool:
    """Whether a guard only says that a size is not 0 or not 1."""
    if not isinstance(guard, sympy.Ne):
        return False
    left, right = guard.args
    if right not in (0, 1):
        left, right = right, left
    return right in (0, 1) and not isinstance(left, Mod)


def _strength(guard: sympy.Basic) -> tuple[int, int, str]:
    """Equalities first, then inequalities, then exclusions; the simpler first, so that it explains the others."""
    order = 0 if isinstance(guard, sympy.Eq) else 2 if isinstance(guard, sympy.Ne) else 1
    text = str(guard)
    return order, len(text), text
