"""The rotary position embedding (``tilewright::rotary_embedding``)."""

from __future__ import annotations

from torch import fx

from ...passes.graph.ops import ROTARY_EMBEDDING
from ...runtime import sizes
from ...runtime.sizes import Size
from ..expr import Expr
from ..registry import Region, lowers
from ..values import Value, broadcast


@lowers(ROTARY_EMBEDDING, role="gather")
def _rotary(region: Region, node: fx.Node, x: Value, cos: Value, sin: Value, interleaved: bool = False) -> Value:
    """``x * cos + partner * sin``: a pair's first column has minus the second as partner, its second the first."""
    builder, kernel = region.builder, region.kernel
    shape, dtype = region.shape(node), region.dtype(node)
    columns = x.shape[-1]
    half = sizes.floordiv(columns, 2)
    per_pair = cos.shape[-1] != columns
    angles = [broadcast(value, (*shape[:-1], value.shape[-1])) for value in (cos, sin)]
    compute = Value(shape, dtype, x.at).compute

    def at(index: tuple[Size, ...], mask: Expr | None) -> Expr:
        *lead, column = index
        if interleaved:
            pair, second = kernel.split(column, 2)
            is_first = builder.call("eq", "bool", builder.index(second), builder.const(0, "int64"))
            other_of_first, other_of_second = sizes.add(column, 1), sizes.add(column, -1)
        else:
            is_first = builder.inside(column, 0, half, kernel.ranges) or builder.const(True, "bool")
            other_of_first, other_of_second = sizes.add(column, half), sizes.sub(column, half)
            pair = kernel.split(column, half)[1] if per_pair else column
        is_second = builder.call("not", "bool", is_first)
        place = pair if per_pair else column
        value = builder.cast(x.at(index, mask), compute)
        after = builder.cast(x.at((*lead, other_of_first), builder.all_of(mask, is_first)), compute)
        before = builder.cast(x.at((*lead, other_of_second), builder.all_of(mask, is_second)), compute)
        partner = builder.call("where", compute, is_first, builder.call("neg", compute, after), before)
        cosine, sine = (builder.cast(angle.at((*lead, place), mask), compute) for angle in angles)
        return builder.call(
            "add", compute, builder.call("mul", compute, value, cosine), builder.call("mul", compute, partner, sine)
        )

    return Value(shape, dtype, at)
