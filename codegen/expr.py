"""Kernel expressions: small trees of scalar operations that a dialect renders.

Nodes are interned: equal trees are the same object, so that common subexpressions are found by identity and walking a
tree costs its number of distinct nodes. Index arithmetic inside loads uses :mod:`..runtime.sizes`, whose symbols are
then loop variables, sizes of the call, and *dynamic indices* (names of expressions loaded at run time, see
:class:`Scalar`).

Data types are those of the computation: float16 and bfloat16 are converted to float32 on load and back on store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..runtime import sizes
from ..runtime.sizes import Size

Loops = tuple[tuple[str, Size], ...]
"""The bound variables of a reduction and their extents, outermost first."""

COMPUTE_DTYPE = {"float16": "float32", "bfloat16": "float32"}


@dataclass(frozen=True, eq=False, slots=True)
class Expr:
    """One node. ``dtype`` is that of the value it computes."""

    dtype: str


@dataclass(frozen=True, eq=False, slots=True)
class Const(Expr):
    """A literal: int, float or bool."""

    value: Any


@dataclass(frozen=True, eq=False, slots=True)
class Index(Expr):
    """An index expression as an int64 value."""

    value: Size


@dataclass(frozen=True, eq=False, slots=True)
class Load(Expr):
    """Element ``offset`` of a buffer, or ``other`` where ``mask`` is given and false (then nothing is read)."""

    buffer: str
    offset: Size
    mask: Expr | None
    other: Any


@dataclass(frozen=True, eq=False, slots=True)
class Call(Expr):
    """An operation of the dialect table."""

    op: str
    args: tuple[Expr, ...]


@dataclass(frozen=True, eq=False, slots=True)
class Scalar(Expr):
    """A named value that the template provides, such as an accumulator."""

    name: str


@dataclass(frozen=True, eq=False, slots=True)
class Dynamic(Expr):
    """An index loaded at run time: ``source`` checked against ``bound``.

    A negative one counts from the end if it ``wraps``, else it is outside. Index expressions refer to it by ``name``.
    """

    name: str
    source: Expr
    bound: Size
    wraps: bool


@dataclass(frozen=True, eq=False, slots=True)
class Reduce(Expr):
    """``op`` over all values of the bound variables: ``((name, extent), ...)``, outermost first.

    ``op`` is ``sum``, ``prod``, ``max``, ``min``, ``any``, ``all``, ``argmax`` or ``argmin`` (flat position, first
    wins).
    """

    op: str
    loops: Loops
    body: Expr


class Builder:
    """Makes interned nodes for one kernel."""

    def __init__(self) -> None:
        self._nodes: dict[Any, Expr] = {}
        self._free: dict[Expr, frozenset[str]] = {}
        self.dynamics: dict[str, Dynamic] = {}

    def _intern(self, key: Any, make: Callable[[], Expr]) -> Any:
        node = self._nodes.get(key)
        if node is None:
            node = self._nodes[key] = make()
        return node

    def const(self, value: Any, dtype: str) -> Expr:
        """A literal."""
        if dtype == "bool":
            value = bool(value)
        elif dtype.startswith("float"):
            value = float(value)
        else:
            value = int(value)
        return self._intern(("const", repr(value), dtype), lambda: Const(dtype, value))

    def index(self, value: Size, dtype: str = "int64") -> Expr:
        """An index as a value."""
        if isinstance(value, int):
            return self.const(value, dtype)
        node = self._intern(("index", value), lambda: Index("int64", value))
        return self.cast(node, dtype)

    def load(self, buffer: str, offset: Size, dtype: str, mask: Expr | None = None, other: Any = 0) -> Expr:
        """A load, converted to the computation's dtype."""
        dtype = COMPUTE_DTYPE.get(dtype, dtype)
        if isinstance(mask, Const):
            if not mask.value:
                return self.const(other, dtype)
            mask = None
        key = ("load", buffer, offset, dtype, mask, repr(other) if mask is not None else None)
        return self._intern(key, lambda: Load(dtype, buffer, offset, mask, other if mask is not None else None))

    def call(self, op: str, dtype: str, *args: Expr) -> Expr:
        """An operation; ``where`` and logical operations with literal operands are folded."""
        folded = self._fold(op, args)
        if folded is not None:
            return folded
        return self._intern(("call", op, dtype, args), lambda: Call(dtype, op, args))

    def cast(self, value: Expr, dtype: str) -> Expr:
        """Conversion as ``Tensor.to`` does it."""
        dtype = COMPUTE_DTYPE.get(dtype, dtype)
        if value.dtype == dtype:
            return value
        if isinstance(value, Const) and not (dtype.startswith(("int", "uint")) and value.dtype.startswith("float")):
            return self.const(value.value, dtype)
        return self.call("cast", dtype, value)

    def scalar(self, name: str, dtype: str) -> Expr:
        """A value that the template provides."""
        return self._intern(("scalar", name, dtype), lambda: Scalar(dtype, name))

    def dynamic(self, source: Expr, bound: Size, wraps: bool) -> Size:
        """An index loaded at run time, for use in index expressions."""
        if isinstance(source, Const):
            value = int(source.value)
            known: Size = sizes.add(bound, value) if value < 0 and wraps else value
            if not isinstance(known, int) or (known >= 0 and (not isinstance(bound, int) or known < bound)):
                return known  # else it is outside, which the kernel is to say
        if isinstance(source, Index) and isinstance(source.value, str | int):
            return source.value
        name = f"g{len(self.dynamics)}"
        node = self._intern(("dynamic", source, bound, wraps), lambda: Dynamic("int64", name, source, bound, wraps))
        self.dynamics[node.name] = node
        return node.name

    def reduce(self, op: str, loops: Loops, body: Expr, dtype: str) -> Expr:
        """A reduction over bound variables."""
        return self._intern(("reduce", op, loops, body, dtype), lambda: Reduce(dtype, op, loops, body))

    def all_of(self, *conditions: Expr | None) -> Expr | None:
        """Conjunction of masks; ``None`` is true."""
        result: Expr | None = None
        for condition in conditions:
            if condition is None or (isinstance(condition, Const) and condition.value):
                continue
            result = condition if result is None else self.call("and", "bool", result, condition)
        return result

    def inside(self, index: Size, low: Size, high: Size, ranges: Mapping[str, tuple[int, int]]) -> Expr | None:
        """``low <= index < high`` as a mask, without the sides that interval bounds already prove."""
        sides = []
        for small, large, strict in ((low, index, "le"), (index, high, "lt")):
            least, most = _bounds(sizes.sub(large, small), ranges)
            need = 0 if strict == "le" else 1
            if least is not None and least >= need:
                continue
            if most is not None and most < need:
                return self.const(False, "bool")
            sides.append(self.call(strict, "bool", self.index(small), self.index(large)))
        return self.all_of(*sides)

    def _fold(self, op: str, args: tuple[Expr, ...]) -> Expr | None:
        if op == "where" and isinstance(args[0], Const):
            return args[1] if args[0].value else args[2]
        if op == "where" and args[1] is args[2]:
            return args[1]
        if op in ("and", "or") and args[0].dtype == "bool":
            neutral = op == "and"
            for this, that in (args, args[::-1]):
                if isinstance(this, Const):
                    return that if this.value == neutral else this
            if args[0] is args[1]:
                return args[0]
        if op == "not" and isinstance(args[0], Const):
            return self.const(not args[0].value, "bool")
        if len(args) == 2 and all(isinstance(arg, Const) and arg.dtype == "int64" for arg in args):
            a, b = (arg.value for arg in args if isinstance(arg, Const))
            fold = {"le": a <= b, "lt": a < b, "ge": a >= b, "gt": a > b, "eq": a == b, "ne": a != b}
            if op in fold:
                return self.const(fold[op], "bool")
        return None

    def free(self, expr: Expr) -> frozenset[str]:
        """Names the value depends on: loop variables, sizes and template scalars; dynamic indices are seen through."""
        known = self._free.get(expr)
        if known is not None:
            return known
        result = frozenset().union(*(self.free(child) for child in children(expr)), *map(self.free_size, offsets(expr)))
        if isinstance(expr, Reduce):
            bound = {name for name, _ in expr.loops}
            result = (result - bound).union(*(self.free_size(extent) for _, extent in expr.loops))
        elif isinstance(expr, Scalar):
            result = frozenset((expr.name,))
        elif isinstance(expr, Dynamic):
            result |= self.free_size(expr.bound)
        self._free[expr] = result
        return result

    def free_size(self, size: Size) -> frozenset[str]:
        """Names an index expression depends on, seeing through dynamic indices."""
        names = sizes.symbols_of(size)
        dynamic = [name for name in names if name in self.dynamics]
        if not dynamic:
            return names
        return (names - set(dynamic)).union(*(self.free(self.dynamics[name]) for name in dynamic))

    def rewrite(
        self,
        expr: Expr,
        values: Mapping[str, Size],
        known: dict[Expr, Expr] | None = None,
        rebound: Mapping[Loops, Loops] | None = None,
    ) -> Expr:
        """The expression with variables replaced in every index.

        Args:
            expr: to rewrite.
            values: what replaces a variable, except where a reduction binds it.
            known: what has been rewritten already.
            rebound: loops of reductions that get other ones; in their bodies every variable is replaced.
        """
        known = {} if known is None else known
        if expr in known:
            return known[expr]
        again = lambda part: self.rewrite(part, values, known, rebound)  # noqa: E731
        change = lambda size: self._rewrite_size(size, values, known, rebound)  # noqa: E731
        result: Expr
        if isinstance(expr, Index):
            result = self.index(change(expr.value))
        elif isinstance(expr, Load):
            mask = None if expr.mask is None else again(expr.mask)
            result = self.load(expr.buffer, change(expr.offset), expr.dtype, mask, expr.other)
        elif isinstance(expr, Call):
            result = self.call(expr.op, expr.dtype, *map(again, expr.args))
        elif isinstance(expr, Reduce) and rebound and expr.loops in rebound:
            result = self.reduce(expr.op, rebound[expr.loops], again(expr.body), expr.dtype)
        elif isinstance(expr, Reduce):
            inner = {name: value for name, value in values.items() if name not in {bound for bound, _ in expr.loops}}
            loops = tuple((name, change(extent)) for name, extent in expr.loops)
            result = self.reduce(expr.op, loops, self.rewrite(expr.body, inner, None, rebound), expr.dtype)
        elif isinstance(expr, Dynamic):
            name = self.dynamic(again(expr.source), change(expr.bound), expr.wraps)
            result = self.dynamics[name] if isinstance(name, str) and name in self.dynamics else self.index(name)
        else:
            result = expr
        known[expr] = result
        return result

    def _rewrite_size(
        self,
        size: Size,
        values: Mapping[str, Size],
        known: dict[Expr, Expr],
        rebound: Mapping[Loops, Loops] | None,
    ) -> Size:
        replaced = dict(values)
        for name in sizes.symbols_of(size):
            if name in self.dynamics:
                new = self.rewrite(self.dynamics[name], values, known, rebound)
                replaced[name] = new.name if isinstance(new, Dynamic) else new.value  # type: ignore[attr-defined]
        return sizes.substitute(size, replaced)


def children(expr: Expr) -> tuple[Expr, ...]:
    """Operand expressions, not following dynamic indices."""
    if isinstance(expr, Call):
        return expr.args
    if isinstance(expr, Load):
        return () if expr.mask is None else (expr.mask,)
    if isinstance(expr, Reduce):
        return (expr.body,)
    if isinstance(expr, Dynamic):
        return (expr.source,)
    return ()


def offsets(expr: Expr) -> tuple[Size, ...]:
    """The index expressions directly inside a node."""
    if isinstance(expr, Load):
        return (expr.offset,)
    if isinstance(expr, Index):
        return (expr.value,)
    return ()


def walk(builder: Builder, roots: list[Expr], *, into_reductions: bool = True) -> Iterator[Expr]:
    """Every distinct node below the roots, through dynamic indices, operands first."""
    seen: set[int] = set()
    stack: list[tuple[Expr, bool]] = [(root, False) for root in reversed(roots)]
    while stack:
        node, done = stack.pop()
        if done:
            yield node
            continue
        if id(node) in seen:
            continue
        seen.add(id(node))
        stack.append((node, True))
        if isinstance(node, Reduce) and not into_reductions:
            continue
        below = list(children(node))
        for offset in offsets(node):
            below.extend(builder.dynamics[name] for name in sizes.symbols_of(offset) if name in builder.dynamics)
        stack.extend((child, False) for child in reversed(below))


def coefficient(size: Size, variable: str) -> Size | None:
    """The factor of a variable in an index that is affine in it; ``None`` when it is not."""
    if variable not in sizes.symbols_of(size):
        return 0
    if size == variable:
        return 1
    if isinstance(size, sizes.Op) and size.op == "add":
        parts = [coefficient(arg, variable) for arg in size.args]
        return None if None in parts else sizes.add(*[part for part in parts if part is not None])
    if isinstance(size, sizes.Op) and size.op == "mul":
        holders = [arg for arg in size.args if variable in sizes.symbols_of(arg)]
        if len(holders) == 1:
            inner = coefficient(holders[0], variable)
            return None if inner is None else sizes.mul(inner, *(arg for arg in size.args if arg is not holders[0]))
    return None


def _bounds(size: Size, ranges: Mapping[str, tuple[int, int]]) -> tuple[int | None, int | None]:
    if any(name not in ranges for name in sizes.symbols_of(size)):
        return None, None
    return sizes.bounds(size, ranges)
