"""What fusion knows about operators: data that code generation describes and the driver hands to the pass."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Anchor:
    """An operator with a kernel family of its own; a region holds at most one.

    Attributes:
        family: the kernel family.
        data: positions of the operands that are read element by element; view chains on them belong to the region.
        epilogue: whether pointwise operators of the result's shape may follow inside the region.
        tail: whether a permutation or transpose of the result, then a reshape, may end the region (the kernel stores in
            that order).
        inlines: positions among ``data`` of operands whose elements the kernel may compute while it reads them: it
            reads each once. Pointwise operators and rotary embeddings then belong to the region.
        again: whether every thread's part of a call reads them anew. Only what is cheap as a whole is computed then.
        updates: the operand whose memory the result takes, for operators that change a state in place.
    """

    family: str
    data: tuple[int, ...]
    epilogue: bool = True
    tail: bool = False
    inlines: tuple[int, ...] = ()
    again: bool = False
    updates: int | None = None


@dataclass(frozen=True)
class Roles:
    """What kernels can be made of.

    Attributes:
        pointwise, view, gather, reduction, window: operators by role (``codegen/registry.py`` says what each means).
        anchors: operators with a kernel family of their own.
        image_layout: how convolutions want their images (``passes/graph/layouts.py``).
        lanes: channels of a block; a convolution of fewer reads its image however it lies.
    """

    pointwise: frozenset[Any] = frozenset()
    view: frozenset[Any] = frozenset()
    gather: frozenset[Any] = frozenset()
    reduction: frozenset[Any] = frozenset()
    window: frozenset[Any] = frozenset()
    anchors: dict[Any, Anchor] = field(default_factory=dict)
    image_layout: str = "channels16"
    lanes: int = 16

    def known(self, target: Any) -> bool:
        """Whether kernels can be made of the operator at all."""
        return target in self.anchors or any(
            target in group for group in (self.pointwise, self.view, self.gather, self.reduction, self.window)
        )
