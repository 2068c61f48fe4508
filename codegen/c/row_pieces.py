"""Rows of an operand that a template reads element by element, cut where that spares conditions.

A rotary embedding pairs the columns of a row's two halves. Read in one loop, every element has to find out in which
half it is; read half by half, no condition is left and the loop is vector code.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...passes.graph.ops import ROTARY_EMBEDDING
from ...runtime import sizes
from ...runtime.sizes import Size
from ..templating import Hole
from ..values import Value
from .anchors import Anchored


@dataclass(frozen=True)
class Piece:
    """A run of a row's elements.

    Attributes:
        first: the row's element that is the run's first.
        count: elements of the run.
        hole: defines the float ``element`` in terms of ``d``, 0 <= d < count.
    """

    first: int
    count: int
    hole: Hole


def row_pieces(work: Anchored, value: Value, index: tuple[Size, ...]) -> list[Piece]:
    """The pieces of the row ``value[index, :]``; declares the variable ``d``.

    Args:
        work: the region, with the variables of ``index`` declared.
        value: of rows of a fixed length.
        index: of the row, in terms of the template's variables.
    """
    length = value.shape[-1]
    assert isinstance(length, int)
    rotates = any(node.target is ROTARY_EMBEDDING for node in work.task.nested.graph.nodes)
    count = length // 2 if rotates and length % 2 == 0 and length > 0 else length
    work.kernel.variable("d", count)
    outer = sorted(set().union(*map(sizes.symbols_of, index)))
    return [
        Piece(first, count, work.read(value, (*index, sizes.add("d", first)), outer, "d", "element"))
        for first in range(0, length, max(count, 1))
    ]
