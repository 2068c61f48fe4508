"""What the template families share: an anchor operator, what comes before and after it, and filling holes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import fx

from ..runtime import sizes
from ..runtime.errors import CompileError
from ..runtime.sizes import Size
from . import dialect_c
from .emit import Emitter, Scope
from .expr import Expr, Load, coefficient
from .interpret import Env, interpret, result_values
from .kernel import NAME, KernelCode, Parameter, prelude
from .regions import Frame, Task, region_of
from .templating import Hole, render
from .values import Kernel, Value


class Anchored:
    """A region around one anchor: its frame of parameters, and the values before and after the anchor."""

    def __init__(self, task: Task, anchor: fx.Node, frame: Frame) -> None:
        self.task = task
        self.anchor = anchor
        self.frame = frame
        self.kernel = Kernel(task.symbols.ranges)
        self.region = region_of(task, self.kernel)
        self.env: Env = frame.env(self.kernel)
        needed = _upstream(anchor)
        interpret(self.region, [node for node in task.nested.graph.nodes if node in needed], self.env)

    def operand(self, argument: object) -> Value | None:
        """The value of one of the anchor's operands."""
        return self.env[argument] if isinstance(argument, fx.Node) else None

    def shape(self) -> tuple[Size, ...]:
        """Logical shape of the anchor's result."""
        return self.region.shape(self.anchor)

    def epilogue(self, index: tuple[Size, ...], outer: Sequence[str], inner: str, acc: Callable[[Expr], Expr]) -> Hole:
        """The stores of the results, given the accumulator at a logical index of the anchor's result.

        Args:
            index: in terms of the template's variables.
            outer: the template's variables outside the vector loop.
            inner: the vector loop's variable.
            acc: from the raw accumulator to the anchor's value (adds the bias).
        """
        builder = self.kernel.builder
        result = acc(builder.scalar("acc", "float32"))

        def at(asked: tuple[Size, ...], mask: Expr | None) -> Expr:
            if asked != index:
                raise CompileError(f"the epilogue of {self.anchor} reads the result at another element than it makes")
            return result

        self.env[self.anchor] = Value(self.shape(), "float32", at)
        interpret(self.region, self.task.nested.graph.nodes, self.env)
        stores: list[tuple[Parameter, Size, Expr]] = []
        values = result_values(self.task.nested, self.env)
        for parameter, value in zip(self.frame.results(), values, strict=True):
            offset = self.kernel.offset(parameter.shape, parameter.layout, index)
            stores.append((parameter, offset, builder.cast(value.at(index), parameter.dtype)))
        outside, inside = self.scopes(outer, inner)
        for parameter, offset, root in stores:
            inside.store(parameter.name, offset, root)
        return Hole("\n".join(outside.lines), "\n".join(inside.lines))

    def read(self, value: Value, index: tuple[Size, ...], outer: Sequence[str], inner: str, name: str) -> Hole:
        """A hole that defines ``const float <name>`` as one element of an operand."""
        outside, inside = self.scopes(outer, inner)
        text = inside.value(self.kernel.builder.cast(value.at(index), "float32"))
        inside.lines.append(f"const float {name} = {text};")
        return Hole("\n".join(outside.lines), "\n".join(inside.lines))

    def scopes(self, outer: Sequence[str], inner: str) -> tuple[Scope, Scope]:
        """Fresh scopes for one hole: its row part and its element part."""
        dtypes = dict(self.kernel.storage)
        dtypes.update({parameter.name: parameter.dtype for parameter in self.frame.results()})
        outside = Scope(Emitter(self.kernel.builder, dtypes), None, outer)
        return outside, outside.child(inner, "acc")

    def code(self, template: str, *, family: str, units: Size, flops: Size, **context: object) -> KernelCode:
        """Render the template into a kernel."""
        ranges = self.task.symbols.ranges
        shapes = [extent for parameter in self.frame.parameters for extent in parameter.shape]
        used = set().union(*map(sizes.symbols_of, [*shapes, units, flops, *self.shape()]))
        used |= {name for name in self._index_symbols() if name in ranges}
        symbols = tuple(name for name in ranges if name in used)
        lines = "\n".join([*prelude(self.frame.parameters, symbols), *(f"(void){name};" for name in symbols)])
        source = '#include "tw_math.h"\n' + render(template, name=NAME, prelude=lines, **context)
        return KernelCode(
            family=family,
            label=self.task.label(),
            source=source,
            symbols=symbols,
            units=units,
            flops=flops,
            bytes=sizes.add(*(parameter.bytes() for parameter in self.frame.parameters)),
            parameters=self.frame.parameters,
        )

    def _index_symbols(self) -> set[str]:
        names: set[str] = set()
        for value in self.env.values():
            if isinstance(value, Value):
                names |= {name for extent in value.shape for name in sizes.symbols_of(extent)}
        return names


def affine_rows(expr: Expr, row: str, column: str) -> tuple[str, Size, Size] | None:
    """(buffer, offset at row 0 and column 0, row stride) of a float32 load that walks rows of contiguous elements."""
    if not isinstance(expr, Load) or expr.mask is not None:
        return None
    if coefficient(expr.offset, column) != 1:
        return None
    stride = coefficient(expr.offset, row)
    if stride is None:
        return None
    return expr.buffer, sizes.substitute(expr.offset, {row: 0, column: 0}), stride


def find_anchor(task: Task, targets: frozenset[object]) -> fx.Node:
    """The region's one anchor."""
    found = [node for node in task.nested.graph.nodes if node.target in targets]
    if len(found) != 1:
        raise CompileError(f"a region needs exactly one anchor, {task.node} has {len(found)}")
    return found[0]


def c_size(size: Size) -> int | str:
    """A size for a template: an int, or C text in parentheses."""
    return size if isinstance(size, int) else f"({dialect_c.size(size)})"


def _upstream(node: fx.Node) -> set[fx.Node]:
    needed: set[fx.Node] = set()
    stack = list(node.all_input_nodes)
    while stack:
        current = stack.pop()
        if current not in needed:
            needed.add(current)
            stack.extend(current.all_input_nodes)
    return needed
