"""Windows and resampling: pooling and interpolation, as reductions and weighted reads of index functions."""

from __future__ import annotations

from typing import Any

from torch import fx

from ...runtime import sizes
from ...runtime.errors import CompileError
from ...runtime.sizes import Size
from ..expr import Expr
from ..registry import Region, lowers, overloads
from ..values import Value

Mask = Expr | None


def _per_axis(value: Any, rank: int, default: int | None = None) -> list[int]:
    if value is None or (isinstance(value, list | tuple) and not value):
        assert default is not None
        return [default] * rank
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values


def _window(
    region: Region, a: Value, rank: int, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int],
    index: tuple[Size, ...], op: str, body_of: Any,
) -> Expr:  # fmt: skip
    """Reduce ``body_of(source index, mask)`` over one window; positions in the padding are masked."""
    lead = len(a.shape) - rank
    used = frozenset().union(*(region.builder.free_size(position) for position in index))
    loops: list[tuple[str, Size]] = []
    own: list[Size] = list(index[:lead])
    masks: list[Mask] = []
    for axis in range(rank):
        name = region.kernel.bound_variable(f"w{axis}", kernel[axis], used)
        loops.append((name, kernel[axis]))
        position = sizes.add(
            sizes.mul(index[lead + axis], stride[axis]), sizes.mul(name, dilation[axis]), -padding[axis]
        )
        own.append(position)
        # With ceil_mode the last window may hang over the end without any padding, so the end is always checked.
        masks.append(region.kernel.inside(position, 0, a.shape[lead + axis]))
    body = body_of(tuple(own), region.builder.all_of(*masks))
    return region.builder.reduce(op, tuple(loops), body, body.dtype)


def _max_pool(rank: int) -> Any:
    def build(
        region: Region, node: fx.Node, a: Value, kernel: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
        ceil_mode: bool = False,
    ) -> Any:  # fmt: skip
        several = isinstance(node.meta["val"], tuple | list)
        sizes_of = [_per_axis(kernel, rank), _per_axis(padding, rank), _per_axis(dilation, rank)]
        window, margin, step = sizes_of
        strides = _per_axis(stride, rank) if stride not in (None, []) else window
        builder = region.builder
        lowest = builder.const(float("-inf") if a.compute.startswith("float") else -(2**31), a.compute)

        def at(index: tuple[Size, ...], mask: Mask) -> Expr:
            def body(own: tuple[Size, ...], inside: Mask) -> Expr:
                value = a.at(own, builder.all_of(mask, inside))
                return value if inside is None else builder.call("where", a.compute, inside, value, lowest)

            return _window(region, a, rank, window, strides, margin, step, index, "max", body)

        shape = region.symbols.shape(node.meta["val"][0] if several else node.meta["val"])
        value = Value(shape, a.dtype, at)
        # The indices of the maxima exist for training; a graph that reads them is refused when it asks for the value.
        return (value, None) if several else value

    return build


for _rank in (1, 2, 3):
    lowers(*overloads(f"max_pool{_rank}d", f"max_pool{_rank}d_with_indices"), role="window")(_max_pool(_rank))


def _avg_pool(rank: int) -> Any:
    def build(
        region: Region, node: fx.Node, a: Value, kernel: Any, stride: Any = None, padding: Any = 0,
        ceil_mode: bool = False, count_include_pad: bool = True, divisor_override: int | None = None,
    ) -> Value:  # fmt: skip
        window, margin = _per_axis(kernel, rank), _per_axis(padding, rank)
        strides = _per_axis(stride, rank) if stride not in (None, []) else window
        builder = region.builder
        lead = len(a.shape) - rank

        def at(index: tuple[Size, ...], mask: Mask) -> Expr:
            zero = builder.const(0, a.compute)

            def body(own: tuple[Size, ...], inside: Mask) -> Expr:
                value = a.at(own, builder.all_of(mask, inside))
                return value if inside is None else builder.call("where", a.compute, inside, value, zero)

            total = _window(region, a, rank, window, strides, margin, [1] * rank, index, "sum", body)
            count: Size = 1
            for axis in range(rank):
                first = sizes.add(sizes.mul(index[lead + axis], strides[axis]), -margin[axis])
                extent = a.shape[lead + axis]
                if count_include_pad:
                    end = sizes.minimum(sizes.add(first, window[axis]), sizes.add(extent, margin[axis]))
                    count = sizes.mul(count, window[axis] if not ceil_mode else sizes.sub(end, first))
                else:
                    end = sizes.minimum(sizes.add(first, window[axis]), extent)
                    begin = sizes.maximum(first, 0) if margin[axis] else first
                    count = sizes.mul(count, sizes.sub(end, begin) if margin[axis] or ceil_mode else window[axis])
            divisor = builder.index(divisor_override or count, a.compute)
            return builder.call("div", a.compute, total, divisor)

        return Value(region.shape(node), a.dtype, at)

    return build


for _rank in (1, 2, 3):
    lowers(*overloads(f"avg_pool{_rank}d"), role="window")(_avg_pool(_rank))


def _adaptive_pool(rank: int, op: str) -> Any:
    def build(region: Region, node: fx.Node, a: Value, output_size: Any) -> Any:
        several = isinstance(node.meta["val"], tuple | list)
        shape = region.symbols.shape(node.meta["val"][0] if several else node.meta["val"])
        lead = len(a.shape) - rank
        builder = region.builder

        def at(index: tuple[Size, ...], mask: Mask) -> Expr:
            used = frozenset().union(*(builder.free_size(position) for position in index))
            loops: list[tuple[str, Size]] = []
            own: list[Size] = list(index[:lead])
            count: Size = 1
            for axis in range(lead, lead + rank):
                extent, wanted = a.shape[axis], shape[axis]
                # Window [floor(i*in/out), ceil((i+1)*in/out)): as torch defines it.
                first = sizes.floordiv(sizes.mul(index[axis], extent), wanted)
                last = sizes.ceildiv(sizes.mul(sizes.add(index[axis], 1), extent), wanted)
                if wanted == 1:
                    first, last = 0, extent
                length = sizes.sub(last, first)
                name = region.kernel.bound_variable(f"i{axis}", length if wanted != 1 else extent, used)
                loops.append((name, length))
                own.append(sizes.add(first, name))
                count = sizes.mul(count, length)
            body = a.at(own, mask)
            total = builder.reduce(op, tuple(loops), body, body.dtype)
            return builder.call("div", a.compute, total, builder.index(count, a.compute)) if op == "sum" else total

        value = Value(shape, a.dtype, at)
        return (value, None) if several else value

    return build


for _rank in (1, 2, 3):
    lowers(*overloads(f"adaptive_avg_pool{_rank}d", f"_adaptive_avg_pool{_rank}d"), role="window")(
        _adaptive_pool(_rank, "sum")
    )
    lowers(*overloads(f"adaptive_max_pool{_rank}d"), role="window")(_adaptive_pool(_rank, "max"))


def _nearest(rank: int, exact: bool) -> Any:
    def build(region: Region, node: fx.Node, a: Value, output_size: Any = None, *scales: Any) -> Value:
        shape = region.shape(node)
        lead = len(a.shape) - rank
        given = _given_scales(scales, rank)

        def at(index: tuple[Size, ...], mask: Mask) -> Expr:
            own = list(index)
            for axis in range(lead, lead + rank):
                own[axis] = _nearest_source(region, own[axis], a.shape[axis], shape[axis], given[axis - lead], exact)
            return a.at(own, mask)

        return Value(shape, a.dtype, at)

    return build


def _given_scales(scales: tuple[Any, ...], rank: int) -> list[float | None]:
    flat: list[float | None] = []
    for scale in scales:
        flat.extend(scale) if isinstance(scale, list | tuple) else flat.append(scale)
    flat = [scale for scale in flat if not isinstance(scale, bool)]
    return flat if len(flat) == rank else [None] * rank


def _nearest_source(
    region: Region, position: Size, source: Size, wanted: Size, scale: float | None, exact: bool
) -> Size:
    """The source index of a nearest-neighbour resize, in integer arithmetic."""
    if scale is not None and float(scale).is_integer() and not exact:
        return region.kernel.split(position, int(scale))[0]
    if scale is not None and float(1 / scale).is_integer() and not exact:
        return sizes.minimum(sizes.mul(position, int(1 / scale)), sizes.add(source, -1))
    if (
        scale is not None
        and scale != 1
        and not (isinstance(source, int) and isinstance(wanted, int) and wanted == source * scale)
    ):
        raise CompileError(
            f"nearest-neighbour resize by the factor {scale} is not supported; give the output's size instead"
        )
    if exact:
        doubled = sizes.mul(sizes.add(sizes.mul(position, 2), 1), source)
        return sizes.minimum(sizes.floordiv(doubled, sizes.mul(wanted, 2)), sizes.add(source, -1))
    if isinstance(source, int) and isinstance(wanted, int) and wanted % source == 0:
        return region.kernel.split(position, wanted // source)[0]
    return sizes.minimum(sizes.floordiv(sizes.mul(position, source), wanted), sizes.add(source, -1))


for _rank in (1, 2, 3):
    lowers(*overloads(f"upsample_nearest{_rank}d", f"upsample_nearest{_rank}d.vec"), role="gather")(
        _nearest(_rank, False)
    )
    lowers(*overloads(f"_upsample_nearest_exact{_rank}d", f"_upsample_nearest_exact{_rank}d.vec"), role="gather")(
        _nearest(_rank, True)
    )


def _linear(rank: int) -> Any:
    def build(region: Region, node: fx.Node, a: Value, output_size: Any, align_corners: bool, *scales: Any) -> Value:
        shape = region.shape(node)
        lead = len(a.shape) - rank
        given = _given_scales(scales, rank)
        builder, compute = region.builder, a.compute

        def corner(position: Size, source: Size, wanted: Size, scale: float | None) -> tuple[Size, Size, Expr]:
            """Lower and upper source index and the upper one's weight."""
            where = builder.index(position, compute)
            if align_corners:
                spans = [builder.index(sizes.add(extent, -1), compute) for extent in (source, wanted)]
                ratio = builder.const(0, compute) if wanted == 1 else builder.call("div", compute, *spans)
                real = builder.call("mul", compute, where, ratio)
            else:
                if scale is not None:
                    ratio = builder.const(1 / scale, compute)
                else:
                    ratio = builder.call("div", compute, builder.index(source, compute), builder.index(wanted, compute))
                half = builder.const(0.5, compute)
                real = builder.call(
                    "sub", compute, builder.call("mul", compute, builder.call("add", compute, where, half), ratio), half
                )
                real = builder.call("maximum", compute, real, builder.const(0, compute))
            floor = builder.cast(real, "int64")
            low = region.kernel.dynamic(floor, source)
            high = sizes.minimum(sizes.add(low, 1), sizes.add(source, -1))
            return low, high, builder.call("sub", compute, real, builder.cast(floor, compute))

        def at(index: tuple[Size, ...], mask: Mask) -> Expr:
            corners = [
                corner(index[lead + axis], a.shape[lead + axis], shape[lead + axis], given[axis])
                for axis in range(rank)
            ]

            def blend(axis: int, chosen: tuple[Size, ...]) -> Expr:
                if axis == rank:
                    return a.at((*index[:lead], *chosen), mask)
                low, high, weight = corners[axis]
                below, above = blend(axis + 1, (*chosen, low)), blend(axis + 1, (*chosen, high))
                rest = builder.call("sub", compute, builder.const(1, compute), weight)
                return builder.call(
                    "add",
                    compute,
                    builder.call("mul", compute, below, rest),
                    builder.call("mul", compute, above, weight),
                )

            return blend(0, ())

        return Value(shape, a.dtype, at)

    return build


lowers(*overloads("upsample_linear1d", "upsample_linear1d.vec"), role="gather")(_linear(1))
lowers(*overloads("upsample_bilinear2d", "upsample_bilinear2d.vec"), role="gather")(_linear(2))
lowers(*overloads("upsample_trilinear3d", "upsample_trilinear3d.vec"), role="gather")(_linear(3))
