"""Kernel sources: the frame around a kernel's body, its parameters, and its estimated work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..runtime import sizes
from ..runtime.sizes import Size
from . import dialect_c
from .values import LANES

NAME = "@kernel@"  # stands for the function's name until it is known that no equal kernel exists


@dataclass(frozen=True)
class Parameter:
    """A buffer of a kernel: its name in the source, what it holds, and whether it is written."""

    name: str
    shape: tuple[Size, ...]
    dtype: str
    layout: str = "rows"
    written: bool = False

    def elements(self) -> Size:
        """Number of elements stored, with the padding of the layout."""
        return elements(self.shape, self.layout)

    def bytes(self) -> Size:
        """Bytes stored."""
        return sizes.mul(self.elements(), dialect_c.BYTES[self.dtype])


@dataclass(frozen=True)
class KernelCode:
    """One kernel before it has a name.

    Attributes:
        family: the kernel family (``"loop"``, ``"matmul"``, ...).
        label: words for the name: what it computes.
        source: the C text; the function is called :data:`NAME`.
        symbols: the call's sizes, in the order of ``dim[]``.
        units: number of independent units of work.
        flops: arithmetic operations; ``bytes``: compulsory traffic.
    """

    family: str
    label: str
    source: str
    symbols: tuple[str, ...]
    units: Size
    flops: Size
    bytes: Size
    parameters: tuple[Parameter, ...] = field(default=())


def elements(shape: Sequence[Size], layout: str) -> Size:
    """Stored elements of a buffer."""
    if layout == "channels16":
        return sizes.mul(shape[0], sizes.align(shape[1], LANES), *shape[2:])
    return sizes.product(shape)


def prelude(parameters: Sequence[Parameter], symbols: Sequence[str]) -> list[str]:
    """Declarations that unpack ``buf[]`` and ``dim[]`` into named pointers and sizes."""
    lines = []
    for position, parameter in enumerate(parameters):
        const = "" if parameter.written else "const "
        kind = dialect_c.STORAGE[parameter.dtype]
        lines.append(f"{const}{kind} *restrict {parameter.name} = buf[{position}];")
    lines.extend(f"const int64_t {name} = dim[{position}];" for position, name in enumerate(symbols))
    return lines


def frame(body: Sequence[str], parameters: Sequence[Parameter], symbols: Sequence[str]) -> str:
    """The whole source file of a kernel that needs no template."""
    lines = [
        '#include "tw_math.h"',
        "",
        f"void {NAME}(void *const *restrict buf, const int64_t *restrict dim, int64_t begin, int64_t end,",
        "    int32_t *restrict fault) {",
        *(f"    {line}" for line in prelude(parameters, symbols)),
        "    (void)dim;",
        "    (void)fault;",
        *(f"    {line}" for line in body),
        "}",
        "",
    ]
    return "\n".join(lines)
