"""What the quantized families of all dialects share: a call's format, its rows as a matrix, its bias.

``quantized_linear`` is ``sum over k of x[m, k] * weight[n, k]``, whose rows ``m`` are all leading axes of ``x``;
``quantized_embedding`` reads row ``indices[m]`` of its table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..passes.graph.quantized_ops import QUANTIZED_EMBEDDING, QUANTIZED_LINEAR
from ..passes.graph.quantized_rows import RowFormat
from ..runtime.sizes import Size
from .anchors import Anchored
from .expr import Expr
from .values import broadcast

TARGETS = frozenset((QUANTIZED_LINEAR, QUANTIZED_EMBEDDING))


def format_of(given: Mapping[str, Any]) -> RowFormat:
    """The format of the weight that a call is given, from the call's arguments by name."""
    return RowFormat(given["columns"], given["bits"], given["group"], given["symmetric"])


def with_bias(work: Anchored, bias: Any, index: tuple[Size, ...]) -> Callable[[Expr], Expr]:
    """From the float32 sum of products to the anchor's value at a logical index of its result.

    Args:
        work: the region.
        bias: its node, or None: the value is the sum.
        index: in terms of the template's variables.
    """
    added = work.operand(bias)
    if added is None:
        return lambda total: total
    builder = work.kernel.builder
    term = builder.cast(broadcast(added, work.shape()).at(index), "float32")
    return lambda total: builder.call("add", "float32", total, term)
