"""Kernel sources: the frame around a kernel's body, its parameters, and its estimated work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..runtime import sizes
from ..runtime.plan import Tile
from ..runtime.plan_check import ITEM_BYTES
from ..runtime.sizes import Size
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
        return sizes.mul(self.elements(), ITEM_BYTES[self.dtype])


@dataclass(frozen=True)
class KernelCode:
    """One kernel before it has a name.

    Attributes:
        family: the kernel family (``"loop"``, ``"matmul"``, ...).
        label: words for the name: what it computes.
        source: the C text; the function is called :data:`NAME`.
        symbols: the call's sizes, in the order of ``dim[]``.
        units: number of independent units of work; on a GPU, programs of the grid, in which constants of the tiles may
            stand for themselves.
        flops: arithmetic operations; ``bytes``: compulsory traffic, of whole cache lines where single
            numbers are written.
        parameters: the buffers.
        tiles: of a GPU kernel, the binaries to build, the default one first.
        signature: of a GPU kernel, the type of every argument: ``"*fp32"``, ``"*i64"``, ``"i32"``...
        choice: of a CPU kernel, words for how it is blocked, where there are other ways.
    """

    family: str
    label: str
    source: str
    symbols: tuple[str, ...]
    units: Size
    flops: Size
    bytes: Size
    parameters: tuple[Parameter, ...] = field(default=())
    tiles: tuple[Tile, ...] = ()
    signature: tuple[str, ...] = ()
    choice: str = ""


def elements(shape: Sequence[Size], layout: str) -> Size:
    """Stored elements of a buffer; ``rows`` and ``channels_last`` have no padding."""
    if layout == "channels16":
        return sizes.mul(shape[0], sizes.align(shape[1], LANES), *shape[2:])
    return sizes.product(shape)
