"""From expressions to C statements.

A :class:`Scope` is a block of C that binds some loop variables. Every operation becomes one named constant in the
outermost scope that knows all its variables, so loop-invariant work leaves the loop by construction and common
subexpressions are computed once. Reductions open loops of their own, in one of two forms:

- *scalar*: one accumulator, the reduction's innermost loop is the vector loop;
- *lanes*: where the value depends on the lane variable (the kernel's innermost, contiguous axis), an array with one
  accumulator per lane, and the vector loop runs over the lanes inside the reduction's loops.

The order of a reduction is a property of the code alone: neither the batch nor the number of threads changes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from ...runtime import sizes
from ...runtime.sizes import Size
from ..expr import Builder, Call, Const, Dynamic, Expr, Index, Load, Reduce, Scalar, children, coefficient, walk
from . import dialect

SIMD = "#pragma omp simd"
LONG_SUM = 1 << 15  # terms from which a sum is taken in parts
PART = 1 << 12
STREAMED = 64  # terms from which a sum is taken as several side by side
STREAM_LINES = 12  # statements of a loop up to which its sum is what takes the time


@dataclass(frozen=True)
class Lanes:
    """The vector axis of a kernel in lanes form: variable, number of lanes in this chunk (C), and its upper bound."""

    variable: str
    count: str
    most: int


@dataclass
class RowCache:
    """Expressions over the row variable that several passes over the row need, and the arrays that keep them."""

    variable: str
    arrays: dict[Expr, str] = field(default_factory=dict)
    written: set[Expr] = field(default_factory=set)


class Emitter:
    """State shared by the scopes of one kernel."""

    def __init__(
        self,
        builder: Builder,
        dtypes: dict[str, str],
        lanes: Lanes | None = None,
        ranges: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        self.builder = builder
        self.ranges = ranges or {}
        self.dtypes = dtypes  # storage dtype of each buffer parameter
        self.lanes = lanes
        self.cache: RowCache | None = None
        self.streams = False  # whether the source includes tw_sums.h
        self._count = 0

    def most(self, expr: Reduce) -> int:
        """The largest number of values that a reduction takes in; 0 where it is not known."""
        count = sizes.product(extent for _, extent in expr.loops)
        return sizes.bounds(count, self.ranges)[1] if sizes.symbols_of(count) <= set(self.ranges) else 0

    def fresh(self, prefix: str) -> str:
        """A name that no statement of the kernel uses yet."""
        self._count += 1
        return f"{prefix}{self._count - 1}"


class Scope:
    """One block of statements and the variables it binds."""

    def __init__(self, emitter: Emitter, parent: Scope | None = None, variables: Iterable[str] = ()) -> None:
        self.emitter = emitter
        self.parent = parent
        self.variables = frozenset(variables)
        self.lines: list[str] = []
        self._names: dict[Expr, str] = {}
        self._pending: list[Expr] = []

    def child(self, *variables: str) -> Scope:
        """A nested block; its text is added by :meth:`close`."""
        return Scope(self.emitter, self, variables)

    def close(self, child: Scope, head: str, *, simd: str = "") -> None:
        """Append the child's statements as a loop."""
        if self.emitter.cache is not None:
            self.emitter.cache.written.update(child._pending)
        if simd:
            self.lines.append(simd)
        self.lines.append(f"{head} {{")
        self.lines.extend(f"    {line}" for line in child.lines)
        self.lines.append("}")

    def loop(self, child: Scope, variable: str, extent: Size, *, simd: str = "") -> None:
        """Append the child as a counted loop from 0."""
        self.close(child, count_loop(variable, dialect.size(extent)), simd=simd)

    def value(self, expr: Expr) -> str:
        """C text of the expression's value, emitting what it needs into this scope or the ones around it."""
        if isinstance(expr, Const):
            return dialect.literal(expr.value, expr.dtype)
        if isinstance(expr, Scalar):
            return expr.name
        if isinstance(expr, Index):
            return self.size(expr.value)
        needs = self.emitter.builder.free(expr)
        lane = {self.emitter.lanes.variable} if self.emitter.lanes and isinstance(expr, Reduce) else set()
        scope: Scope | None = self
        while scope is not None:
            if expr in scope._names:
                return scope._names[expr]
            if needs & (scope.variables - lane):
                break  # a value of that name further out has another loop's variable: reductions reuse names of axes
            scope = scope.parent
        home = self._home(needs, skip_lane=isinstance(expr, Reduce))
        if isinstance(expr, Reduce):
            return home._reduce(expr)
        return home._bind(expr)

    def size(self, size: Size) -> str:
        """C text of an index expression, emitting the dynamic indices that it names."""
        for name in sorted(sizes.symbols_of(size)):
            if name in self.emitter.builder.dynamics:
                self.value(self.emitter.builder.dynamics[name])
        return dialect.size(size)

    def store(self, buffer: str, offset: Size, value: Expr) -> None:
        """Append ``buffer[offset] = value`` with the conversion to the buffer's dtype."""
        self._reductions_first(value, ())
        text, place = self.value(value), self.size(offset)
        self.lines.append(f"{buffer}[{place}] = {dialect.to_storage(text, value.dtype, self.emitter.dtypes[buffer])};")

    def assign(self, target: str, value: Expr) -> None:
        """Append ``target = value``, for an array of the computation's dtype."""
        self._reductions_first(value, ())
        text = self.value(value)
        self.lines.append(f"{target} = {text};")

    def _reductions_first(self, expr: Expr, bound: Iterable[str]) -> None:
        """Emit the reductions that an expression needs before the expression: what they keep of a row is then there.

        Those that depend on the variables ``bound`` of loops still to be opened are left to these loops.
        """
        builder = self.emitter.builder
        for node in walk(builder, [expr], into_reductions=False):
            if isinstance(node, Reduce) and not builder.free(node) & frozenset(bound):
                self.value(node)

    def _home(self, needs: frozenset[str], *, skip_lane: bool) -> Scope:
        """The scope to bind a value in: the innermost that binds one of its variables, else the outermost."""
        lane = self.emitter.lanes.variable if self.emitter.lanes and skip_lane else None
        scope = self
        while scope.parent is not None:
            own = scope.variables - {lane}
            if own & needs:
                return scope
            scope = scope.parent
        return scope

    def _bind(self, expr: Expr) -> str:
        """Emit one load, call or dynamic index as a named constant (short comparisons stay inline)."""
        cache = self.emitter.cache
        array = cache.arrays.get(expr) if cache is not None and cache.variable in self.variables else None
        if array is not None and cache is not None and expr in cache.written:
            return f"{array}[{cache.variable}]"
        text = self._text(expr)
        if expr.dtype == "bool" and not isinstance(expr, Dynamic):
            text = f"({text})"
            self._names[expr] = text
            return text
        name = expr.name if isinstance(expr, Dynamic) else self.emitter.fresh("t")
        self.lines.append(f"const {dialect.TYPES[expr.dtype]} {name} = {text};")
        self._names[expr] = name
        if array is not None and cache is not None:
            self.lines.append(f"{array}[{cache.variable}] = {name};")
            self._pending.append(expr)
        return name

    def _text(self, expr: Expr) -> str:
        if isinstance(expr, Load):
            storage = self.emitter.dtypes[expr.buffer]
            text = dialect.from_storage(f"{expr.buffer}[{self.size(expr.offset)}]", storage)
            if expr.mask is not None:
                text = f"{self.value(expr.mask)} ? {text} : {dialect.literal(expr.other, expr.dtype)}"
            return text
        if isinstance(expr, Dynamic):
            check = "tw_index" if expr.wraps else "tw_row_index"
            return f"{check}({self.value(expr.source)}, {self.size(expr.bound)}, fault)"
        assert isinstance(expr, Call)
        return dialect.call(
            expr.op, expr.dtype, [arg.dtype for arg in expr.args], [self.value(arg) for arg in expr.args]
        )

    def _reduce(self, expr: Reduce) -> str:
        lanes = self.emitter.lanes
        if lanes is not None and lanes.variable in self.emitter.builder.free(expr):
            name = self._reduce_lanes(expr, lanes)
        else:
            name = self._reduce_scalar(expr)
        self._names[expr] = name
        return name

    def _reduce_scalar(self, expr: Reduce) -> str:
        self._reductions_first(expr.body, [name for name, _ in expr.loops])
        reduction = dialect.reduction(expr.op, expr.body.dtype, self.emitter.fresh("r"))
        self.lines.extend(reduction.declare)
        if expr.op == "sum" and expr.dtype.startswith("float") and self.emitter.most(expr) > LONG_SUM:
            self._sum_in_parts(expr, reduction.result)
            return reduction.result
        scopes = self._nest(expr)
        inner = scopes[-1]
        value = inner.value(expr.body)
        if self._takes_streams(expr, inner):
            self._sum_in_streams(expr, inner, value, reduction.result)
            return reduction.result
        inner.lines.extend(reduction.update(value, _position(expr)))
        # A vector loop must be innermost in the text, so a body that opened loops of its own stays scalar.
        innermost = not any(line.lstrip().startswith("for ") for line in inner.lines)
        simd = f"{SIMD} {reduction.clause}" if reduction.clause and innermost else ""
        self._close_nest(expr, scopes, simd)
        return reduction.result

    def _takes_streams(self, expr: Reduce, inner: Scope) -> bool:
        """Whether a sum is long, and so cheap that each addition would wait for the one before it."""
        extent = expr.loops[-1][1]
        long = not isinstance(extent, int) or extent >= STREAMED
        plain = len(inner.lines) <= STREAM_LINES and not any("{" in line for line in inner.lines)
        single = expr.op == "sum" and expr.dtype == "float32" and len(expr.loops) == 1
        return self.emitter.streams and single and long and plain

    def _sum_in_streams(self, expr: Reduce, inner: Scope, value: str, total: str) -> None:
        """A sum as several vectors side by side (``tw_sums.h``), of the elements of a row or of terms in pieces."""
        variable, extent = expr.loops[-1][0], dialect.size(expr.loops[-1][1])
        sums, start, term, body = f"{total}_sums", f"{total}_start", f"{total}_term", expr.body
        self.lines.append(f"tw_sums {sums} = {{{{{{0}}}}}};")
        if isinstance(body, Load) and self._is_row(body, variable):
            place = self.size(sizes.substitute(body.offset, {variable: 0}))
            self.lines.append(f"tw_add_row(&{sums}, {body.buffer} + {place}, {extent});")
        else:
            lines = [f"const int64_t {variable} = {start} + {term};", *inner.lines, f"{total}_terms[{term}] = {value};"]
            inner.lines = [
                f"const int64_t {total}_count = tw_min_i64(TW_TERMS, {extent} - {start});",
                f"float {total}_terms[TW_TERMS] TW_ALIGNED;",
                SIMD,
                f"{count_loop(term, f'{total}_count')} {{",
                *(f"    {line}" for line in lines),
                "}",
                f"tw_add_row(&{sums}, {total}_terms, {total}_count);",
            ]
            self.close(inner, f"for (int64_t {start} = 0; {start} < {extent}; {start} += TW_TERMS)")
        self.lines.append(f"{total} = tw_total(&{sums});")

    def _is_row(self, load: Load, variable: str) -> bool:
        """Whether a load walks float32 numbers that lie side by side."""
        plain = load.mask is None and self.emitter.dtypes[load.buffer] == "float32"
        return plain and coefficient(load.offset, variable) == 1

    def _sum_in_parts(self, expr: Reduce, total: str) -> None:
        """A long sum as a sum of shorter ones, so that the total does not swallow the digits of its terms."""
        variable, extent = expr.loops[-1][0], dialect.size(expr.loops[-1][1])
        scopes = self._nest(expr)[:-1]
        chunk = scopes[-1].child()
        inner = chunk.child(variable)
        part = dialect.reduction("sum", expr.body.dtype, self.emitter.fresh("s"))
        chunk.lines.extend(part.declare)
        inner.lines.extend(part.update(inner.value(expr.body), _position(expr)))
        innermost = not any(line.lstrip().startswith("for ") for line in inner.lines)
        start = f"{variable}_from"
        end = f"tw_min_i64({extent}, {start} + {PART})"
        head = f"for (int64_t {variable} = {start}; {variable} < {end}; {variable}++)"
        chunk.close(inner, head, simd=f"{SIMD} {part.clause}" if innermost else "")
        chunk.lines.append(f"{total} += {part.result};")
        scopes[-1].close(chunk, f"for (int64_t {start} = 0; {start} < {extent}; {start} += {PART})")
        for depth in range(len(scopes) - 2, -1, -1):
            scopes[depth].loop(scopes[depth + 1], *expr.loops[depth])

    def _reduce_lanes(self, expr: Reduce, lanes: Lanes) -> str:
        reduction = dialect.reduction(
            expr.op, expr.body.dtype, self.emitter.fresh("r"), lanes=(lanes.variable, lanes.most)
        )
        self.lines.extend(reduction.declare)
        start = self.child(lanes.variable)
        start.lines.extend(reduction.initialise)
        self.close(start, count_loop(lanes.variable, lanes.count), simd=SIMD)
        expr, inside = self._as_far_as_the_last_lane(expr, lanes)
        scopes = self._nest(expr)
        inner = scopes[-1].child(lanes.variable)
        value = inner.value(expr.body)
        inner.lines.extend(reduction.update(f"({inside} ? {value} : 0)" if inside else value, _position(expr)))
        scopes[-1].close(inner, count_loop(lanes.variable, lanes.count), simd=SIMD)
        self._close_nest(expr, scopes, "")
        return reduction.result

    @staticmethod
    def _as_far_as_the_last_lane(expr: Reduce, lanes: Lanes) -> tuple[Reduce, str]:
        """A reduction whose bounds vary by lane (a cumulative sum) with the last lane's, and a lane's own condition."""
        varying = [(name, extent) for name, extent in expr.loops if lanes.variable in sizes.symbols_of(extent)]
        if not varying:
            return expr, ""
        assert expr.op == "sum", "only sums have bounds that vary"
        last = {lanes.variable: sizes.add(int(lanes.count) if lanes.count.isdecimal() else lanes.count, -1)}
        loops = tuple((name, sizes.substitute(extent, last)) for name, extent in expr.loops)
        inside = " && ".join(f"{name} < {dialect.size(extent)}" for name, extent in varying)
        return replace(expr, loops=loops), inside

    def _nest(self, expr: Reduce) -> list[Scope]:
        scopes = [self]
        for variable, _ in expr.loops:
            scopes.append(scopes[-1].child(variable))
        return scopes

    def _close_nest(self, expr: Reduce, scopes: list[Scope], simd: str) -> None:
        for depth in range(len(expr.loops) - 1, -1, -1):
            variable, extent = expr.loops[depth]
            scopes[depth].loop(scopes[depth + 1], variable, extent, simd=simd if depth == len(expr.loops) - 1 else "")


def _position(expr: Reduce) -> str:
    """C text of the flat position inside the reduction's loops."""
    flat: Size = 0
    for variable, extent in expr.loops:
        flat = sizes.add(sizes.mul(flat, extent), variable)
    return dialect.size(flat)


def count_loop(variable: str, extent: str) -> str:
    """Head of a counted loop."""
    return f"for (int64_t {variable} = 0; {variable} < {extent}; {variable}++)"


def plan_row_cache(emitter: Emitter, roots: list[Expr], variable: str, extent: Size) -> RowCache:
    """Choose what several passes over a row should share: expressions that cost more than a load."""
    builder = emitter.builder
    passes: list[list[Expr]] = [roots]
    seen: set[Expr] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if isinstance(node, Reduce) and node.loops == ((variable, extent),):
            passes.append([node.body])
        stack.extend(children(node))
    counts: dict[Expr, int] = {}
    parents: dict[Expr, list[Expr]] = {}
    for tops in passes:
        local: dict[Expr, None] = {}  # in order of discovery: names must not depend on hashes
        stack = list(tops)
        while stack:
            node = stack.pop()
            if node in local or isinstance(node, Reduce) or variable not in builder.free(node):
                continue
            local[node] = None
            for child in children(node):
                parents.setdefault(child, []).append(node)
                stack.append(child)
        for node in local:
            counts[node] = counts.get(node, 0) + 1
    cache = RowCache(variable)
    for node, count in counts.items():
        if (
            count < 2
            or node.dtype == "bool"
            or isinstance(node, Dynamic | Index)
            or _weight(builder, node, variable) < 2
        ):
            continue
        if any(counts.get(parent, 0) >= count and parent.dtype != "bool" for parent in parents.get(node, ())):
            continue
        cache.arrays[node] = f"row{len(cache.arrays)}"
    return cache


def _weight(builder: Builder, expr: Expr, variable: str) -> int:
    """Rough cost of recomputing: a direct load 1, cheap arithmetic 1, transcendental functions and gathers more."""
    total = 0
    stack, seen = [expr], set()
    while stack:
        node = stack.pop()
        if node in seen or isinstance(node, Reduce) or variable not in builder.free(node):
            continue
        seen.add(node)
        if isinstance(node, Call):
            total += 8 if node.op in dialect.EXPENSIVE else 1
        elif isinstance(node, Load):
            total += 1 if not any(name in builder.dynamics for name in sizes.symbols_of(node.offset)) else 4
        stack.extend(children(node))
    return total
