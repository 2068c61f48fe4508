"""What the template families of all dialects share: an anchor operator, what comes before it and what comes after."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import fx

from ..passes.graph.query import arguments
from ..runtime import sizes
from ..runtime.errors import CompileError
from ..runtime.sizes import Size
from .expr import Expr, Load, coefficient
from .interpret import Env, interpret, result_values
from .kernel import Parameter
from .regions import Frame, Task, region_of
from .values import Kernel, Value


class Anchored:
    """A region around one anchor: its frame of parameters, and the values before and after the anchor.

    What depends on placeholders that are ``unread`` may be asked for its shape only: the frame lacks them.
    """

    def __init__(self, task: Task, anchor: fx.Node, frame: Frame, unread: Sequence[fx.Node] = ()) -> None:
        self.task = task
        self.anchor = anchor
        self.frame = frame
        self.kernel = Kernel(task.symbols.ranges)
        self.region = region_of(task, self.kernel)
        self.env: Env = frame.env(self.kernel)
        for node in unread:
            if (storage := task.storage_of(node)) is not None:
                self.env[node] = self.kernel.constant(0, storage.dtype, storage.shape)
        needed = upstream(anchor)
        interpret(self.region, [node for node in task.nested.graph.nodes if node in needed], self.env)

    def operand(self, argument: object) -> Value | None:
        """The value of one of the anchor's operands."""
        return self.env[argument] if isinstance(argument, fx.Node) else None

    def shape(self) -> tuple[Size, ...]:
        """Logical shape of the anchor's result."""
        return self.region.shape(self.anchor)

    def stores(
        self, index: tuple[Size, ...], acc: Callable[[Expr], Expr], dtype: str = "float32"
    ) -> list[tuple[Parameter, Size, Expr]]:
        """(parameter, offset, value) of every result, given the accumulator ``acc`` at an index of the anchor's result.

        Args:
            index: in terms of the template's variables.
            acc: from the raw accumulator to the anchor's value (adds the bias).
            dtype: of the accumulator and the anchor's value.
        """
        builder = self.kernel.builder
        result = acc(builder.scalar("acc", dtype))

        def at(asked: tuple[Size, ...], mask: Expr | None) -> Expr:
            if asked != index:
                raise CompileError(f"the epilogue of {self.anchor} reads the result at another element than it makes")
            return result

        self.env[self.anchor] = Value(self.shape(), dtype, at)
        interpret(self.region, self.task.nested.graph.nodes, self.env)
        stores: list[tuple[Parameter, Size, Expr]] = []
        values = result_values(self.task.nested, self.env)
        for parameter, value in zip(self.frame.results(), values, strict=True):
            offset = self.kernel.offset(parameter.shape, parameter.layout, index)
            stores.append((parameter, offset, builder.cast(value.at(index), parameter.dtype)))
        return stores

    def pointers(self, *names: str) -> dict[str, str]:
        """The buffers of operands that the template reads as they lie in memory, by the operands' names.

        Raises:
            CompileError: an operand has no buffer, because it is known when compiling.
        """
        given = arguments(self.anchor)
        values = {name: self.operand(given[name]) for name in names}
        for name, value in values.items():
            if value is None or not value.buffer or value.layout != "rows":
                raise CompileError(f"{self.anchor}: {name} must be given when the model is called")
        return {name: value.buffer for name, value in values.items() if value is not None}

    def storage_dtypes(self) -> dict[str, str]:
        """Storage dtype of every buffer parameter."""
        return dict(self.kernel.storage) | {item.name: item.dtype for item in self.frame.results()}

    def symbols(self, *more: Size) -> tuple[str, ...]:
        """The call's sizes that the kernel needs: those of its parameters, its operands' shapes and ``more``."""
        ranges = self.task.symbols.ranges
        shapes = [extent for parameter in self.frame.parameters for extent in parameter.shape]
        used = set().union(*map(sizes.symbols_of, [*shapes, *more, *self.shape()]))
        for value in self.env.values():
            if isinstance(value, Value):
                used |= {name for extent in value.shape for name in sizes.symbols_of(extent)}
        return tuple(name for name in ranges if name in used)


def affine_rows(expr: Expr, row: str, column: str) -> tuple[str, Size, Size] | None:
    """(buffer, offset at row 0 and column 0, row stride) of a load that walks rows of contiguous elements."""
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


def upstream(node: fx.Node) -> set[fx.Node]:
    """The nodes that a node depends on."""
    needed: set[fx.Node] = set()
    stack = list(node.all_input_nodes)
    while stack:
        current = stack.pop()
        if current not in needed:
            needed.add(current)
            stack.extend(current.all_input_nodes)
    return needed
