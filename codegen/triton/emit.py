"""From expressions to Triton statements.

A :class:`Scope` emits a sequence of assignments to blocks. Every operation becomes one name in the outermost scope that
knows all its variables, so common subexpressions are computed once and what does not vary leaves the loop. A variable
is what its :class:`Var` says: a scalar, or a block that spans some of the kernel's block dimensions; the shape of a
value follows from the variables that it depends on.

Reductions come in two forms. Those over the row of a :class:`Row` run along the second block dimension: at once where
the whole row is one block, else in chunks with a block of accumulators. All others are loops with accumulators.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ...runtime import sizes
from ...runtime.sizes import Size
from ..expr import Call, Const, Dynamic, Expr, Index, Load, Reduce, Scalar
from ..operations import COMPARISONS, FUNCTIONS
from ..values import Kernel
from . import dialect

UNROLLED = 32  # most iterations of a reduction's loops that are unrolled
_NARROW = ("float16", "bfloat16")


@dataclass(frozen=True)
class Var:
    """How a loop variable reads.

    Attributes:
        text: such as ``"m[:, None]"`` or ``"pid_b"``.
        shape: extent of each block dimension, such as ``("BLOCK_M", "1")``; empty for a scalar.
        guard: a mask of the same shape, false where the variable is out of range; empty if it always is in range.
        guard_shape: of the guard of a scalar, where its bound varies by element.
    """

    text: str
    shape: tuple[str, ...] = ()
    guard: str = ""
    guard_shape: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """The row form of a kernel's reductions.

    Attributes:
        loops: the reduction that runs along the row: its variables and their extents, outermost first.
        length: text of the product of the extents.
        whole: whether ``RBLOCK`` holds the whole row. Then the kernel's variables include those of ``loops``.
        variables: how the variables of ``loops`` read, given the name of the block of positions in the row.
        shape: of a block of rows.
    """

    loops: tuple[tuple[str, Size], ...]
    length: str
    whole: bool
    variables: Mapping[str, str]
    shape: tuple[str, str] = ("XBLOCK", "RBLOCK")

    def bind(self, position: str, guard: str) -> dict[str, Var]:
        """The variables of the row at a block of positions of shape [1, RBLOCK]."""
        return {
            name: Var(text.replace("@r", position), ("1", self.shape[1]), guard)
            for name, text in self.variables.items()
        }


@dataclass
class _Shared:
    """What the scopes of one hole share."""

    kernel: Kernel
    dtypes: Mapping[str, str]
    scalars: Mapping[str, tuple[str, tuple[str, ...]]]
    row: Row | None
    prefix: str
    wide: bool
    aliases: Mapping[Size, str]
    count: int = 0
    uses_fault: bool = False


class Scope:
    """A block of statements, the variables it binds and the scope around it."""

    def __init__(
        self,
        kernel: Kernel,
        variables: Mapping[str, Var],
        dtypes: Mapping[str, str],
        *,
        scalars: Mapping[str, tuple[str, tuple[str, ...]]] | None = None,
        row: Row | None = None,
        prefix: str = "t",
        wide: bool = False,
        aliases: Mapping[Size, str] | None = None,
    ) -> None:
        """The outermost scope of a hole.

        Args:
            kernel: whose expressions are emitted.
            variables: what the template has in scope. The call's sizes need no entry.
            dtypes: storage dtype of every buffer parameter.
            scalars: text and shape of the values that the template provides (``expr.Scalar``).
            row: how reductions along a row are done; without, all reductions are loops.
            prefix: of the names that are made; different holes of one kernel take different ones.
            wide: whether indices take 64 bits: the variables of loops then do.
            aliases: names of whole index expressions.
        """
        self._shared = _Shared(kernel, dtypes, scalars or {}, row, prefix, wide, aliases or {})
        self._parent: Scope | None = None
        self.variables = dict(variables)
        self.lines: list[str] = []
        self._names: dict[object, str] = {}

    passed: tuple[Row, str, str, str]  # of a pass over a row: the row, and the names of start, positions and guard

    def _child(self, variables: Mapping[str, Var]) -> Scope:
        child = Scope.__new__(Scope)
        child._shared = self._shared
        child._parent = self
        child.variables = dict(variables)
        child.lines = []
        child._names = {}
        return child

    @property
    def uses_fault(self) -> bool:
        """Whether a statement stores to the ``fault`` argument."""
        return self._shared.uses_fault

    # -- values --------------------------------------------------------------------------------------------------------

    def value(self, expr: Expr) -> str:
        """A name (or literal) of the expression's value in its computation dtype."""
        if isinstance(expr, Const):
            return dialect.constant(expr.value, expr.dtype)
        if isinstance(expr, Scalar):
            return self._shared.scalars[expr.name][0] if expr.name in self._shared.scalars else expr.name
        if isinstance(expr, Index):
            return f"({self.size(expr.value)})"
        known = self._known(expr, expr)
        return known if known is not None else self._home(self._needs(expr))._bind(expr)

    def raw(self, expr: Expr, dtype: str) -> str:
        """The value in a storage dtype, for operands of products: a load of that dtype is not converted twice."""
        if isinstance(expr, Load) and self._shared.dtypes[expr.buffer] == dtype:
            key = ("raw", expr)
            known = self._known(key, expr)
            if known is not None:
                return known
            home = self._home(self._needs(expr))
            return home._assign(key, home._load(expr))
        text = self.value(expr)
        return text if expr.dtype == dtype else dialect.cast(text, dtype)

    def size(self, size: Size) -> str:
        """Text of an index expression."""
        if size in self._shared.aliases:
            return self._shared.aliases[size]
        return dialect.size(size, self._name_text)

    def store(
        self, buffer: str, offset: Size, value: Expr, *, over: Iterable[str] | None = None, also: str = ""
    ) -> None:
        """Append a store.

        Args:
            buffer: parameter.
            offset: of the element.
            value: of the element.
            over: the block variables that the store ranges over; by default all of the outermost scope.
            also: one more mask.
        """
        names = [name for name, var in self._outermost().variables.items() if var.shape] if over is None else list(over)
        shape = self._shape_of(names)
        text, place = self.value(value), self._place(offset, shape)
        if self._shared.dtypes[buffer] == "bool":
            text = f"tl.cast({text}, tl.uint8)"
        mask = self._masks(names, also)
        self.lines.append(f"tl.store({buffer} + {place}, {text}{f', mask={mask}' if mask else ''})")

    # -- names and shapes ----------------------------------------------------------------------------------------------

    def shape(self, expr: Expr) -> tuple[str, ...]:
        """The block shape of a value."""
        return self._shape_of(self._needs(expr))

    def _shape_of(self, names: Iterable[str]) -> tuple[str, ...]:
        shape: tuple[str, ...] = ()
        for name in names:
            shape = merge_shapes(shape, self._shape_of_name(name))
        return shape

    def _shape_of_name(self, name: str) -> tuple[str, ...]:
        var = self._variable(name)
        if var is not None:
            return merge_shapes(var.shape, var.guard_shape)
        return self._shared.scalars[name][1] if name in self._shared.scalars else ()

    def _variable(self, name: str) -> Var | None:
        scope: Scope | None = self
        while scope is not None:
            if name in scope.variables:
                return scope.variables[name]
            scope = scope._parent
        return None

    def _name_text(self, name: str) -> str:
        dynamics = self._shared.kernel.builder.dynamics
        if name in dynamics:
            return self.value(dynamics[name])
        var = self._variable(name)
        return var.text if var is not None else name

    def _needs(self, expr: Expr) -> frozenset[str]:
        return self._shared.kernel.builder.free(expr)

    def _outermost(self) -> Scope:
        scope = self
        while scope._parent is not None:
            scope = scope._parent
        return scope

    def _home(self, needs: frozenset[str]) -> Scope:
        """The scope to bind a value in: the innermost that binds one of its variables, else the outermost."""
        scope = self
        while scope._parent is not None and not (scope.variables.keys() & needs):
            scope = scope._parent
        return scope

    def _known(self, key: object, expr: Expr) -> str | None:
        needs = self._needs(expr)
        scope: Scope | None = self
        while scope is not None:
            if key in scope._names:
                return scope._names[key]
            if scope.variables.keys() & needs:
                return None  # a value of that name further out has another loop's variable
            scope = scope._parent
        return None

    def _fresh(self, prefix: str) -> str:
        self._shared.count += 1
        return f"{prefix}{self._shared.count - 1}"

    def _assign(self, key: object, text: str) -> str:
        name = self._fresh(self._shared.prefix)
        self.lines.append(f"{name} = {text}")
        self._names[key] = name
        return name

    def _masks(self, names: Iterable[str], *more: str) -> str:
        """The guards of the variables and more masks, joined."""
        guards = dict.fromkeys(var.guard for name in sorted(names) if (var := self._variable(name)) is not None)
        return joined((*guards, *more))

    def _place(self, offset: Size, shape: tuple[str, ...]) -> str:
        """An offset as text, of the given block shape at least."""
        own: tuple[str, ...] = ()
        for name in self._shared.kernel.builder.free_size(offset):
            var = self._variable(name)
            own = merge_shapes(own, var.shape if var is not None else self._shape_of_name(name))
        text = self.size(offset)
        if shape and merge_shapes(own, shape) != own:
            return f"({text} + tl.zeros({shape_text(shape)}, tl.int32))"
        return f"({text})"

    # -- statements ----------------------------------------------------------------------------------------------------

    def _bind(self, expr: Expr) -> str:
        if isinstance(expr, Reduce):
            return self._reduce(expr)
        if isinstance(expr, Dynamic):
            return self._dynamic(expr)
        if isinstance(expr, Load):
            storage = self._shared.dtypes[expr.buffer]
            text = self._load(expr)
            if storage in _NARROW:
                text = f"{text}.to(tl.float32)"
            return self._assign(expr, f"{text} != 0" if storage == "bool" else text)
        assert isinstance(expr, Call)
        args = [self._argument(expr, arg) for arg in expr.args]
        return self._assign(expr, dialect.call(expr.op, expr.dtype, [arg.dtype for arg in expr.args], args))

    def _argument(self, expr: Call, arg: Expr) -> str:
        """An operand. Indices may be 32 bits wide: arithmetic on them as values is done in 64."""
        if isinstance(arg, Const) and _is_typed(expr):
            return dialect.typed(arg.value, arg.dtype)
        text = self.value(arg)
        exact = isinstance(arg, Index) and expr.op not in COMPARISONS and expr.op != "cast"
        return f"tl.cast({text}, tl.int64)" if exact else text

    def _load(self, expr: Load) -> str:
        builder = self._shared.kernel.builder
        names = builder.free_size(expr.offset)
        own = "" if expr.mask is None else self.value(expr.mask)
        shape = self._shape_of(names)
        if expr.mask is not None:
            shape = merge_shapes(shape, self.shape(expr.mask))
        mask = self._masks(names, f"({own})" if own else "")
        text = f"{expr.buffer} + {self._place(expr.offset, shape)}"
        if not mask:
            return f"tl.load({text})"
        other = dialect.literal(expr.other if expr.other is not None else 0, expr.dtype)
        if self._shared.dtypes[expr.buffer] == "bool":
            other = str(int(bool(expr.other)))
        return f"tl.load({text}, mask={mask}, other={other})"

    def _dynamic(self, expr: Dynamic) -> str:
        """An index loaded at run time, 0 and a fault where it is outside; from the end where negative, if it wraps."""
        self._shared.uses_fault = True
        source, bound = self.value(expr.source), self.size(expr.bound)
        index = self._assign(("index", expr), f"tl.cast({source}, tl.int64)")
        wrapped = index
        if expr.wraps:
            wrapped = self._assign(("wrapped", expr), f"tl.where({index} < 0, {index} + {bound}, {index})")
        inside = self._assign(("inside", expr), f"({wrapped} >= 0) & ({wrapped} < {bound})")
        mask = self._masks(self._needs(expr), f"({inside} == 0)")
        self.lines.append(f"tl.store(fault + {wrapped} * 0, 1, mask={mask})")
        return self._assign(expr, f"tl.where({inside}, {wrapped}, 0)")

    # -- reductions ----------------------------------------------------------------------------------------------------

    def _reduce(self, expr: Reduce) -> str:
        row = self._shared.row
        if row is not None and expr.loops == row.loops:
            name = self._reduce_row(expr, row) if row.whole else self._reduce_chunks(expr, row)
        else:
            name = self._reduce_loop(expr)
        self._names[expr] = name
        return name

    def _reduce_row(self, expr: Reduce, row: Row) -> str:
        """The whole row is one block."""
        inside = self._masks(name for name, _ in row.loops)
        value = self.value(expr.body)
        neutral = dialect.neutral(expr.op, expr.body.dtype)
        name = self._fresh("r")
        kept = self._fresh(self._shared.prefix)
        wide = f"tl.broadcast_to({value}, {shape_text(row.shape)})"
        self.lines.append(f"{kept} = tl.where({inside}, {wide}, {neutral})" if inside else f"{kept} = {wide}")
        self.lines.append(f"{name} = {self._along(expr, kept, self._position(expr))}")
        return name

    @staticmethod
    def _along(expr: Reduce, block: str, position: str) -> str:
        """A block [XBLOCK, RBLOCK] reduced to [XBLOCK, 1]."""
        if expr.op.startswith("arg"):
            return f"tw.reduce_{expr.op}({block}, {position})"
        return f"tw.reduce_{expr.op}({block})"

    def _position(self, expr: Reduce) -> str:
        """Text of the flat position inside the reduction's loops."""
        flat: Size = 0
        for variable, extent in expr.loops:
            flat = sizes.add(sizes.mul(flat, extent), variable)
        return self.size(flat)

    def _reduce_chunks(self, expr: Reduce, row: Row) -> str:
        """The row in chunks of ``RBLOCK``, with a block of accumulators that is reduced at the end."""
        total = self._fresh("a")
        shape = shape_text(row.shape)
        start, position, guard = self._fresh("start"), self._fresh("p"), self._fresh("in")
        chunk = self._child(row.bind(position, guard))
        neutral = dialect.neutral(expr.op, expr.body.dtype)
        kind = dialect.TYPES[expr.body.dtype]
        value = f"tl.where({guard}, {chunk.value(expr.body)}, {neutral})"
        update = self._update(expr, chunk, total, value, shape)
        self.lines.append(f"{total} = tl.full({shape}, {neutral}, {kind})")
        if expr.op.startswith("arg"):
            self.lines.append(f"{total}_at = tl.full({shape}, {2**62}, tl.int64)")
        chunk.lines += update
        self._chunk_loop(row, chunk, start, position, guard)
        name = self._fresh("r")
        self.lines.append(f"{name} = {self._along(expr, total, f'{total}_at')}")
        return name

    def _chunk_loop(self, row: Row, chunk: Scope, start: str, position: str, guard: str) -> None:
        """Append a finished chunk in the loop over the row."""
        columns = f"{start} + tl.arange(0, {row.shape[1]})[None, :]"
        self.lines.append(f"for {start} in range(0, {row.length}, {row.shape[1]}):")
        self.lines.append(f"    {position} = {f'({columns}).to(tl.int64)' if self._shared.wide else columns}")
        self.lines.append(f"    {guard} = {position} < {row.length}")
        self.lines += [f"    {line}" for line in chunk.lines]

    def open_pass(self, row: Row) -> Scope:
        """A scope for one chunk of a row; what does not vary along the row goes to this one. See :meth:`close_pass`."""
        chunk = self._child({})
        chunk.passed = (row, self._fresh("start"), self._fresh("p"), self._fresh("in"))
        chunk.variables = row.bind(chunk.passed[2], chunk.passed[3])
        return chunk

    def close_pass(self, chunk: Scope) -> None:
        """Append a pass over the row."""
        row, start, position, guard = chunk.passed
        self._chunk_loop(row, chunk, start, position, guard)

    def _reduce_loop(self, expr: Reduce) -> str:
        """Loops over scalars; an extent that varies by element runs to the largest and masks the rest."""
        total = self._fresh("r")
        inner = self
        heads: list[tuple[Scope, str]] = []
        iterations = 1
        for _, extent in expr.loops:
            iterations = iterations * extent if isinstance(extent, int) else UNROLLED + 1
        count = "tl.static_range" if iterations <= UNROLLED else "range"
        for variable, extent in expr.loops:
            name, guard = self._fresh("w"), ""
            text = inner.size(extent)
            names = self._shared.kernel.builder.free_size(extent)
            shape = inner._shape_of(names)
            if shape:
                guard, text = inner._masks(names, f"({name} < {text})"), f"tl.max({text})"
            elif isinstance(extent, int) and count == "range" and self._shared.wide:
                text = dialect.typed(extent, "int64")  # the variable has the type of the bounds
            heads.append((inner, f"for {name} in {count}(0, {text}):"))
            inner = inner._child({variable: Var(name, (), guard, shape)})
        value = inner.value(expr.body)
        bound = (inner._variable(name) for name, _ in expr.loops)
        guards = joined(var.guard for var in bound if var is not None)
        neutral = dialect.neutral(expr.op, expr.body.dtype)
        if guards:
            value = f"tl.where({guards}, {value}, {neutral})"
        block = shape_text(self.shape(expr))
        inner.lines += self._update(expr, inner, total, value, block)
        self.lines.append(f"{total} = tl.full({block}, {neutral}, {dialect.TYPES[expr.body.dtype]})")
        if expr.op.startswith("arg"):
            self.lines.append(f"{total}_at = tl.full({block}, -1, tl.int64)")
        scope = inner
        for outer, head in reversed(heads):
            outer.lines.append(head)
            outer.lines += [f"    {line}" for line in scope.lines]
            scope = outer
        return f"{total}_at" if expr.op.startswith("arg") else total

    @staticmethod
    def _update(expr: Reduce, scope: Scope, total: str, value: str, shape: str) -> Sequence[str]:
        """Statements that take a value into the accumulators."""
        if not expr.op.startswith("arg"):
            return [f"{total} = {dialect.combine(expr.op, total, value)}"]
        now, wins = scope._fresh("v"), scope._fresh("b")
        return [
            f"{now} = tl.broadcast_to({value}, {shape})" if shape != "()" else f"{now} = {value}",
            f"{wins} = {dialect.better(expr.op, now, total)} | (({total}_at < 0) | ({total}_at == {2**62}))",
            f"{total}_at = tl.where({wins}, tl.cast({scope._position(expr)}, tl.int64), {total}_at)",
            f"{total} = tl.where({wins}, {now}, {total})",
        ]


def _is_typed(expr: Call) -> bool:
    """Whether literals among the operands must say what they are: functions look at the dtypes of theirs."""
    if expr.op == "where":
        return all(isinstance(arg, Const) for arg in expr.args[1:])
    is_function = expr.op in FUNCTIONS or (expr.op == "div" and not expr.dtype.startswith("float"))
    return is_function or all(isinstance(arg, Const) for arg in expr.args)


def joined(masks: Iterable[str]) -> str:
    """Masks of which all must hold as one; empty ones do not count.

    ``&`` binds closer than comparisons do, so these get parentheses.
    """
    given = [mask for mask in masks if mask]
    if len(given) < 2:
        return "".join(given)
    return " & ".join(
        f"({mask})" if isinstance(ast.parse(mask, mode="eval").body, ast.Compare) else mask for mask in given
    )


def merge_shapes(a: tuple[str, ...], b: tuple[str, ...]) -> tuple[str, ...]:
    """The shape that two block shapes broadcast to; a scalar's is empty."""
    if not a or not b:
        return a or b
    assert len(a) == len(b), (a, b)
    return tuple(y if x == "1" else x for x, y in zip(a, b, strict=True))


def shape_text(shape: tuple[str, ...]) -> str:
    """A block shape in Triton."""
    return f"({', '.join(shape)}{',' if len(shape) == 1 else ''})"
