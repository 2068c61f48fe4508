"""The table of lowerings: one function per operator, registered by target, and the role each plays in fusion."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from ..runtime.sizes import Size
from .expr import Expr
from .numbers import number
from .symbols import SymbolTable
from .values import Kernel, Value, dtype_name

Role = Literal["pointwise", "view", "gather", "reduction", "window", "anchor"]


@dataclass(frozen=True)
class Lowering:
    """How one operator is lowered.

    Attributes:
        role: ``pointwise`` (element for element, broadcasting), ``view`` (moves elements, reads each at most once),
            ``gather`` (indices loaded at run time), ``reduction`` (consumes whole axes of the first operand; what it
            gives has the operand's shape or the reduced one), ``window`` (reads overlapping neighbourhoods), or
            ``anchor`` (has a kernel family of its own, ``family``).
        build: for all but anchors: makes the value from the operands' values.
        family: for anchors, the kernel family.
    """

    role: Role
    build: Callable[..., Any] | None = None
    family: str = ""


_LOWERINGS: dict[Any, Lowering] = {}


class Region:
    """What a lowering function gets besides the operands: the kernel under construction and the node's meta."""

    def __init__(self, kernel: Kernel, symbols: SymbolTable) -> None:
        self.kernel = kernel
        self.builder = kernel.builder
        self.symbols = symbols

    def shape(self, node: fx.Node) -> tuple[Size, ...]:
        """Logical shape of the node's result."""
        return self.symbols.shape(node.meta["val"])

    def dtype(self, node: fx.Node) -> str:
        """Dtype of the node's result."""
        return dtype_name(node.meta["val"].dtype)

    def value(self, argument: Any, dtype: str) -> Value:
        """An operand as a value: numbers and sizes become constants of the dtype."""
        if isinstance(argument, Value):
            return argument
        if isinstance(argument, bool | int | float):
            return self.kernel.constant(argument, dtype)
        if isinstance(argument, torch.SymFloat):
            exact = number(self.builder, self.symbols, argument.node.expr)
            return Value((), dtype, lambda index, mask: self.builder.cast(exact, dtype))
        size = self.symbols.size(argument)
        return Value((), dtype, lambda index, mask: self.builder.index(size, dtype))

    def number(self, argument: Any, dtype: str) -> Expr:
        """A number or a size as an expression of a computation dtype."""
        return self.builder.cast(self.value(argument, dtype).at(()), dtype)

    def pointwise(
        self, shape: tuple[Size, ...], dtype: str, operands: list[Value], combine: Callable[..., Expr], compute: str
    ) -> Value:
        """``combine`` of the operands, each broadcast to the shape and converted to ``compute``."""
        from .values import broadcast

        wide = [broadcast(operand, shape) for operand in operands]

        def at(index: tuple[Size, ...], mask: Expr | None) -> Expr:
            return combine(*(self.builder.cast(operand.at(index, mask), compute) for operand in wide))

        return Value(shape, dtype, at)


def lowers(*targets: Any, role: Role, family: str = "") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a lowering for operators; registering one twice is an error."""

    def register(build: Callable[..., Any]) -> Callable[..., Any]:
        for target in targets:
            add_lowering(target, Lowering(role, build, family))
        return build

    return register


def add_lowering(target: Any, lowering: Lowering) -> None:
    """Put one operator into the table."""
    if target in _LOWERINGS:
        raise ValueError(f"{target} is lowered twice")
    _LOWERINGS[target] = lowering


def find_lowering(target: Any) -> Lowering | None:
    """The lowering of an operator, if there is one."""
    from . import operators  # noqa: F401 - fills the table

    return _LOWERINGS.get(target)


def all_lowerings() -> dict[Any, Lowering]:
    """The whole table."""
    from . import operators  # noqa: F401 - fills the table

    return dict(_LOWERINGS)


def overloads(*names: str) -> list[Any]:
    """``aten`` overloads by dotted name (``"add.Tensor"``), leaving out those that this torch does not have."""
    found = []
    for name in names:
        packet, _, overload = name.partition(".")
        operator = getattr(getattr(torch.ops.aten, packet, None), overload or "default", None)
        if operator is not None:
            found.append(operator)
    return found
