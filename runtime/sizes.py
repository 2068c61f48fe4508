"""Size expressions: small integer trees over named symbols.

Shapes, byte counts, offsets, grids and guards in a plan are these trees, never strings to be evaluated. A tree is an
``int``, a symbol's name (``str``) or an :class:`Op`. The constructors below fold constants and the identities that the
code generator meets; they are no general simplifier. The code generator also uses them for index arithmetic, where the
"symbols" are loop variables.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, Union

OpName = Literal["add", "mul", "floordiv", "mod", "max", "min", "eq", "ne", "le", "lt"]
_OPS: tuple[OpName, ...] = ("add", "mul", "floordiv", "mod", "max", "min", "eq", "ne", "le", "lt")


class Op:
    """One operation, immutable; ``add`` and ``mul`` take two or more operands, all others exactly two.

    Comparisons (``eq``, ``ne``, ``le``, ``lt``) give 1 or 0 and appear in guards only.
    """

    __slots__ = ("args", "op")
    __match_args__ = ("op", "args")
    op: OpName
    args: tuple[Size, ...]

    def __init__(self, op: OpName, args: tuple[Size, ...]) -> None:
        object.__setattr__(self, "op", op)
        object.__setattr__(self, "args", args)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Op) and self.op == other.op and self.args == other.args)

    def __hash__(self) -> int:
        return hash((self.op, self.args))

    def __repr__(self) -> str:
        return f"Op(op={self.op!r}, args={self.args!r})"

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"cannot assign to {name!r} of a size expression")

    def __reduce__(self) -> tuple[type[Op], tuple[OpName, tuple[Size, ...]]]:
        return Op, (self.op, self.args)


Size = Union[int, str, Op]  # noqa: UP007 - the alias is recursive, so it cannot be written with | at run time


def add(*terms: Size) -> Size:
    """Sum, flattened: equal non-constant terms are collected, in a canonical order, and the constant comes last."""
    constant = 0
    factors: dict[Size, int] = {}
    for term in _flatten("add", terms):
        coefficient, rest = _split_coefficient(term)
        if rest is None:
            constant += coefficient
        else:
            factors[rest] = factors.get(rest, 0) + coefficient
    parts: list[Size] = sorted((mul(rest, c) for rest, c in factors.items() if c), key=_order)
    if constant or not parts:
        parts.append(constant)
    return parts[0] if len(parts) == 1 else Op("add", tuple(parts))


def mul(*factors: Size) -> Size:
    """Product, flattened, with the constant factor last."""
    constant = 1
    rest: list[Size] = []
    for factor in _flatten("mul", factors):
        if isinstance(factor, int):
            constant *= factor
        else:
            rest.append(factor)
    if constant == 0:
        return 0
    if not rest:
        return constant
    if constant != 1 and len(rest) == 1 and isinstance(rest[0], Op) and rest[0].op == "add":
        return add(*(mul(term, constant) for term in rest[0].args))
    rest.sort(key=_order)
    if constant != 1:
        rest.append(constant)
    return rest[0] if len(rest) == 1 else Op("mul", tuple(rest))


def sub(a: Size, b: Size) -> Size:
    """Difference, written as a sum."""
    return add(a, mul(b, -1))


def floordiv(a: Size, b: Size) -> Size:
    """Division rounded towards minus infinity; terms that ``b`` divides are taken out when ``b`` is a constant."""
    if b == 1 or a == 0:
        return a
    if a == b:
        return 1
    if isinstance(b, int):
        if isinstance(a, int):
            return int(_APPLY["floordiv"](a, b))
        whole, rest = _divisible(a, b)
        if rest == 0:
            return whole
        if whole != 0:
            return add(whole, floordiv(rest, b))
        if isinstance(a, Op) and a.op == "floordiv" and isinstance(a.args[1], int):
            return floordiv(a.args[0], a.args[1] * b)
    elif isinstance(a, Op) and a.op == "mul" and b in a.args:
        args = list(a.args)
        args.remove(b)
        return mul(*args)
    return Op("floordiv", (a, b))


def mod(a: Size, b: Size) -> Size:
    """Remainder of :func:`floordiv` (never negative for positive ``b``)."""
    if b == 1 or a == 0 or a == b:
        return 0
    if isinstance(b, int):
        if isinstance(a, int):
            return int(_APPLY["mod"](a, b))
        _, rest = _divisible(a, b)
        if isinstance(rest, int):
            return rest % b
        return Op("mod", (rest, b))
    if isinstance(a, Op) and a.op == "mul" and b in a.args:
        return 0
    return Op("mod", (a, b))


def ceildiv(a: Size, b: Size) -> Size:
    """Division rounded up, for non-negative ``a`` and positive ``b``."""
    return floordiv(add(a, b, -1), b)


def align(a: Size, multiple: int) -> Size:
    """``a`` rounded up to a multiple."""
    return a if a == 0 else mul(ceildiv(a, multiple), multiple)


def maximum(*args: Size) -> Size:
    """The largest operand."""
    return _extremum("max", args)


def minimum(*args: Size) -> Size:
    """The smallest operand."""
    return _extremum("min", args)


def compare(op: Literal["eq", "ne", "le", "lt"], a: Size, b: Size) -> Size:
    """1 where the relation holds, else 0; folded when both sides are constants or equal."""
    if isinstance(a, int) and isinstance(b, int):
        return int(_APPLY[op](a, b))
    if a == b:
        return int(op in ("eq", "le"))
    return Op(op, (a, b))


def product(factors: Iterable[Size]) -> Size:
    """Product of any number of factors; 1 of none."""
    return mul(*factors)


def evaluate(size: Size, symbols: Mapping[str, int]) -> int:
    """The value under an assignment of the symbols; a quotient and a remainder by 0 are 0.

    Raises:
        KeyError: a symbol has no value.
    """
    if isinstance(size, int):
        return size
    if isinstance(size, str):
        return symbols[size]
    first, *others = (evaluate(arg, symbols) for arg in size.args)
    apply = _APPLY[size.op]
    for other in others:
        first = apply(first, other)
    return int(first)


def substitute(size: Size, values: Mapping[str, Size]) -> Size:
    """The tree with symbols replaced by other trees, refolded."""
    if isinstance(size, int):
        return size
    if isinstance(size, str):
        return values.get(size, size)
    return _BUILD[size.op](*(substitute(arg, values) for arg in size.args))


def symbols_of(size: Size) -> frozenset[str]:
    """The names of all symbols in the tree."""
    if isinstance(size, int):
        return frozenset()
    if isinstance(size, str):
        return frozenset((size,))
    return frozenset().union(*(symbols_of(arg) for arg in size.args))


def bounds(size: Size, ranges: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
    """Inclusive lower and upper bound by interval arithmetic (exact where each symbol occurs once)."""
    if isinstance(size, int):
        return size, size
    if isinstance(size, str):
        return ranges[size]
    intervals = [bounds(arg, ranges) for arg in size.args]
    low, high = intervals[0]
    for other_low, other_high in intervals[1:]:
        if size.op in ("floordiv", "mod"):
            other_low, other_high = max(other_low, 1), max(other_high, 1)
        if size.op == "add":
            low, high = low + other_low, high + other_high
        elif size.op == "mod":
            whole = low // other_low == high // other_low if other_low == other_high else False
            low, high = (low % other_low, high % other_low) if whole else (0, other_high - 1)
        elif size.op in ("mul", "floordiv", "max", "min"):
            apply = _APPLY[size.op]
            corners = [apply(x, y) for x in (low, high) for y in (other_low, other_high)]
            low, high = min(corners), max(corners)
        else:
            low, high = 0, 1
    return low, high


def to_json(size: Size) -> Any:
    """``5``, ``"batch"`` or ``["mul", "batch", 768]``."""
    return [size.op, *map(to_json, size.args)] if isinstance(size, Op) else size


def from_json(data: Any) -> Size:
    """Inverse of :func:`to_json`.

    Raises:
        ValueError: not a size expression.
    """
    if isinstance(data, int) and not isinstance(data, bool):
        return data
    if isinstance(data, str) and data.isidentifier():
        return data
    if isinstance(data, list) and len(data) >= 3 and data[0] in _OPS:
        if data[0] not in ("add", "mul") and len(data) != 3:
            raise ValueError(f"size operation {data[0]!r} takes two operands, got {len(data) - 1}")
        return Op(data[0], tuple(from_json(arg) for arg in data[1:]))
    raise ValueError(f"not a size expression: {data!r}")


def show(size: Size) -> str:
    """Readable form, such as ``batch*768``; also valid Python and, for non-negative operands, C."""
    if not isinstance(size, Op):
        return str(size)
    if size.op in ("max", "min"):
        return f"{size.op}({', '.join(map(show, size.args))})"
    sign = {
        "add": " + ",
        "mul": "*",
        "floordiv": "//",
        "mod": "%",
        "eq": " == ",
        "ne": " != ",
        "le": " <= ",
        "lt": " < ",
    }
    return sign[size.op].join(
        f"({show(arg)})" if isinstance(arg, Op) and arg.op not in ("max", "min") else show(arg) for arg in size.args
    )


_APPLY: dict[str, Any] = {
    "add": lambda a, b: a + b,
    "mul": lambda a, b: a * b,
    "floordiv": lambda a, b: a // b if b else 0,  # only sizes that a check refuses divide by 0
    "mod": lambda a, b: a % b if b else 0,
    "max": max,
    "min": min,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "le": lambda a, b: a <= b,
    "lt": lambda a, b: a < b,
}
_BUILD: dict[str, Any] = {
    "add": add,
    "mul": mul,
    "floordiv": floordiv,
    "mod": mod,
    "max": maximum,
    "min": minimum,
    **{op: (lambda a, b, op=op: compare(op, a, b)) for op in ("eq", "ne", "le", "lt")},
}


def _order(size: Size) -> tuple[int, str]:
    return (isinstance(size, Op), show(size))


def _flatten(op: OpName, args: Iterable[Size]) -> Iterable[Size]:
    for arg in args:
        if isinstance(arg, Op) and arg.op == op:
            yield from arg.args
        else:
            yield arg


def _split_coefficient(term: Size) -> tuple[int, Size | None]:
    """``c*rest`` as (c, rest); a constant as (c, None)."""
    if isinstance(term, int):
        return term, None
    if isinstance(term, Op) and term.op == "mul" and isinstance(term.args[-1], int):
        rest = term.args[:-1]
        return term.args[-1], rest[0] if len(rest) == 1 else Op("mul", rest)
    return 1, term


def _divisible(a: Size, b: int) -> tuple[Size, Size]:
    """(q, r) with ``a == q*b + r``, taking every term whose constant factor ``b`` divides into ``q``."""
    terms = a.args if isinstance(a, Op) and a.op == "add" else (a,)
    quotient: list[Size] = []
    rest: list[Size] = []
    for term in terms:
        coefficient, base = _split_coefficient(term)
        if coefficient % b == 0:
            quotient.append(coefficient // b if base is None else mul(base, coefficient // b))
        else:
            rest.append(term)
    return (add(*quotient) if quotient else 0), (add(*rest) if rest else 0)


def _extremum(op: Literal["max", "min"], args: tuple[Size, ...]) -> Size:
    pick = max if op == "max" else min
    constants = [arg for arg in args if isinstance(arg, int)]
    rest: list[Size] = list(dict.fromkeys(arg for arg in args if not isinstance(arg, int)))
    if constants:
        rest.append(pick(constants))
    result = rest[0]
    for arg in rest[1:]:
        result = Op(op, (result, arg))
    return result
