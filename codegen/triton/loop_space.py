"""What the forms of loop kernels share: the space that a kernel stores, its body, and taking flat indices apart."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ...runtime import sizes
from ...runtime.plan import Tile, TileConstant
from ...runtime.sizes import Size
from ..expr import Expr
from ..iteration import Axis
from ..kernel import Parameter
from ..regions import Output
from ..values import Kernel
from . import dialect


@dataclass
class Space:
    """What a region stores, over the axes of its result in storage order.

    Attributes:
        kernel: whose builder the expressions are of.
        parameters: all buffers.
        outputs: the results.
        axes: those of the result that have more than one element.
        roots: the results' values at the axes' variables.
        stores: the results' offsets there.
    """

    kernel: Kernel
    parameters: Sequence[Parameter]
    outputs: Sequence[Output]
    axes: list[Axis]
    roots: list[Expr]
    stores: list[Size]

    def dtypes(self) -> dict[str, str]:
        """Storage dtype of every buffer."""
        return dict(self.kernel.storage) | {item.parameter.name: item.parameter.dtype for item in self.outputs}

    def most(self, size: Size) -> int:
        """The largest value of a size."""
        return sizes.bounds(size, self.kernel.ranges)[1]


@dataclass(frozen=True)
class Body:
    """A kernel's text, indented, and what goes with it.

    Attributes:
        text: the statements.
        units: programs.
        tiles: the binaries, the default one first.
        roots: what is stored, in the variables of the text.
        stores: where.
        spans: sizes that the text names beside those.
        uses_fault: whether the fault word is an operand.
    """

    text: str
    units: Size
    tiles: Sequence[Tile]
    roots: Sequence[Expr]
    stores: Sequence[Size]
    spans: Sequence[Size]
    uses_fault: bool


def tile(warps: int, guard: Size = 1, **constants: int) -> Tile:
    """A tile named after what it fixes."""
    items = tuple(TileConstant(name, value) for name, value in constants.items())
    name = "x".join(str(value) for value in constants.values())
    return Tile(f"{name}w{warps}", items, warps, stages=1, guard=guard)


def indented(lines: Sequence[str]) -> str:
    """Statements of a function."""
    return "\n".join(f"    {line}" for line in lines)


def take_apart(flat: str, axes: Sequence[Axis], used: Sequence[str]) -> list[str]:
    """Statements that make those variables of the axes that lines use of a flat index."""
    lines = []
    rest = flat
    for position in range(len(axes) - 1, -1, -1):
        axis = axes[position]
        extent = dialect.size(axis.extent)
        extent = f"({extent})" if isinstance(axis.extent, sizes.Op) else extent
        if any(re.search(rf"\b{axis.variable}\b", line) for line in used):
            lines.append(f"{axis.variable} = {rest} % {extent}" if position else f"{axis.variable} = {rest}")
        rest += f" // {extent}"
    return lines


def flat_index(axes: Sequence[Axis]) -> Size:
    """The flat index in terms of the axes' variables."""
    flat: Size = 0
    for axis in axes:
        flat = sizes.add(sizes.mul(flat, axis.extent), axis.variable)
    return flat


def program(wide: bool) -> str:
    """The program's number, of 64 bits where indices are ``wide``."""
    return "tl.program_id(0).to(tl.int64)" if wide else "tl.program_id(0)"


def power(value: int) -> int:
    """The least power of two that is not below."""
    return 1 << max(value - 1, 0).bit_length()
