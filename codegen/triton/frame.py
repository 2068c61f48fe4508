"""The frame around a Triton kernel: its arguments and their types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...runtime import sizes
from ...runtime.plan import Tile
from ...runtime.sizes import Size
from ..kernel import NAME, KernelCode, Parameter
from ..storage import Storage
from . import dialect

IMPORTS = "import triton\nimport triton.language as tl\n\nimport tw_math as tw\n"

FAULT = Storage("fault", (1,), "int32", name="fault")
"""The step's fault word: an operand named ``fault`` of kernels that load indices."""

COUNTERS = Storage("counters", (1,), "int32", name="counters")
"""Zeros to count in, as an operand named ``counters``; a kernel leaves them zero."""


@dataclass(frozen=True)
class Extra:
    """An operand between those that are read and the results: ``fault``, ``counters`` or scratch of the step."""

    name: str
    storage: Storage


def index_type(parameters: Sequence[Parameter], ranges: Mapping[str, tuple[int, int]], *more: Size) -> str:
    """``"i32"`` where every element of every buffer, and every size in ``more``, is below 2**31 at all sizes."""
    largest = max((sizes.bounds(size, ranges)[1] for size in (*(p.elements() for p in parameters), *more)), default=0)
    return "i32" if largest < 2**31 else "i64"


@dataclass(frozen=True)
class Arguments:
    """The arguments of a kernel: results, what is read, extras, then sizes, then the constants of its tiles.

    Results come first, so that they have the same places in all variants of a step, whatever extras these need.
    """

    parameters: tuple[Parameter, ...]
    extras: tuple[Extra, ...]
    symbols: tuple[str, ...]
    index: str

    def operands(self) -> list[tuple[str, str]]:
        """(name, dtype) of the pointers in order."""
        read = [(item.name, item.dtype) for item in self.parameters if not item.written]
        written = [(item.name, item.dtype) for item in self.parameters if item.written]
        return [*written, *read, *((extra.name, extra.storage.dtype) for extra in self.extras)]

    def storages(self, storages: Sequence[Storage]) -> tuple[Storage, ...]:
        """The operands' storages in the order of the arguments, from those of the frame's parameters."""
        read = [storage for storage, item in zip(storages, self.parameters, strict=True) if not item.written]
        written = [storage for storage, item in zip(storages, self.parameters, strict=True) if item.written]
        return (*written, *read, *(extra.storage for extra in self.extras))

    def signature(self) -> tuple[str, ...]:
        """The type of every argument but the constants."""
        return (*(dialect.POINTERS[dtype] for _, dtype in self.operands()), *([self.index] * len(self.symbols)))

    def head(self, tiles: Sequence[Tile]) -> str:
        """The ``def`` line with its decorator. All tiles have the same constants."""
        names = [name for name, _ in self.operands()] + list(self.symbols)
        names += [f"{constant.name}: tl.constexpr" for constant in tiles[0].constants]
        return f"@triton.jit\ndef {NAME}({', '.join(names)}):"


def kernel_code(
    text: str,
    arguments: Arguments,
    *,
    family: str,
    label: str,
    units: Size,
    flops: Size,
    tiles: Sequence[Tile],
) -> KernelCode:
    """A finished kernel.

    Args:
        text: the body, indented by four spaces.
        arguments: of the kernel.
        family: the kernel family.
        label: words for its name.
        units: programs of the grid; may name constants of the tiles.
        flops: arithmetic operations.
        tiles: the binaries to build, the default one first.
    """
    return KernelCode(
        family=family,
        label=label,
        source=f"{IMPORTS}\n\n{arguments.head(tiles)}\n{text.rstrip()}\n",
        symbols=arguments.symbols,
        units=units,
        flops=flops,
        bytes=sizes.add(*(parameter.bytes() for parameter in arguments.parameters)),
        parameters=arguments.parameters,
        tiles=tuple(tiles),
        signature=arguments.signature(),
    )
