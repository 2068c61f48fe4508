"""What the interpreter is asked to run: one kernel over a grid, as both sides of the connection write it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Operand:
    """A pointer argument: ``size`` bytes at ``offset`` in a mapped block; ``dtype`` is one of the plan's."""

    dtype: str
    block: int
    offset: int
    size: int


@dataclass(frozen=True)
class Launch:
    """One kernel over a one-dimensional grid.

    Attributes:
        file: of the kernel's source, relative to the interpreter's folder.
        kernel: the function's name.
        operands: the pointer arguments, which come first.
        sizes: the integer arguments, which follow.
        constants: the ``tl.constexpr`` arguments, by name.
        grid: number of programs.
        size_type: Triton's name for the type of the sizes.
    """

    file: str
    kernel: str
    operands: Sequence[Operand]
    sizes: Sequence[int]
    constants: Mapping[str, int]
    grid: int
    size_type: str = "i64"

    def to_json(self) -> list[Any]:
        """As JSON data."""
        operands = [[item.dtype, item.block, item.offset, item.size] for item in self.operands]
        return [self.file, self.kernel, operands, list(self.sizes), dict(self.constants), self.grid, self.size_type]

    @staticmethod
    def from_json(data: list[Any]) -> Launch:
        """What :meth:`to_json` gave the data of."""
        file, kernel, operands, *rest = data
        return Launch(file, kernel, tuple(Operand(*item) for item in operands), *rest)
