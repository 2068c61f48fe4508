"""Loop and row kernels in Triton: any region that is an index function of its operands.

Where reductions stand decides the form:

- *pointwise* (:mod:`.loop_pointwise`): the result, in storage order, is one axis that is cut into blocks. Reductions
  over windows, and other short ones, are loops with blocks of accumulators;
- *rows* (:mod:`.loop_rows`): blocks of rows by columns, where a reduction runs along the columns. Axes of the result
  that the reduction does not depend on (softmax, the norms) are stored along the columns, too.

One kernel has one reduction that runs along rows, however often it occurs; any other inside it is a loop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...runtime import sizes
from ...runtime.sizes import Size
from ..expr import Expr, Load, Loops, Reduce, coefficient, offsets, walk
from ..iteration import Axis, Make, flops
from ..regions import Made, Task, loop_region
from ..values import Kernel
from .frame import FAULT, Arguments, Extra, index_type, kernel_code
from .loop_pointwise import pointwise
from .loop_rows import rows
from .loop_space import Body, Space

SHORT = 8  # most values of a reduction that is a loop however its operands lie
WINDOW = 32  # most values of a reduction that is a loop where neighbours in the block read neighbours in memory
STEP = 4  # elements between what neighbours read, at most, in such a reduction
MARGIN = 1 << 14  # how far the last block may reach beyond the end


def loop_family(task: Task) -> Sequence[Made]:
    """Everything that is an index function of its operands."""
    region = loop_region(task)
    ranges = task.symbols.ranges
    space = build_space(region.make, ranges)
    work = flops(space.kernel, space.roots, space.outputs[0].parameter)
    loops = row_loops(space, ranges)
    groups = {} if loops is None else _groups(space, loops)
    if groups:
        space = build_space(region.make, ranges, groups)
        loops = row_loops(space, ranges)
    wide = _is_wide(space, ranges, loops)
    body = pointwise(space, wide) if loops is None else rows(space, loops, wide)
    extras = (Extra("fault", FAULT),) if body.uses_fault else ()
    arguments = Arguments(tuple(space.parameters), extras, _symbols(space, body, ranges), "i64" if wide else "i32")
    code = kernel_code(
        body.text,
        arguments,
        family="loop",
        label=task.label(),
        units=body.units,
        flops=work,
        tiles=body.tiles,
    )
    return [Made(code, arguments.storages(region.frame.storages))]


def build_space(make: Make, ranges: dict[str, tuple[int, int]], groups: Mapping[str, int] | None = None) -> Space:
    """The region's values at the index of its result, whose axes are in storage order.

    Args:
        make: builds the values in a fresh kernel.
        ranges: bounds of the call's symbols.
        groups: axes (``"i1"``) that are taken apart into groups of so many elements.
    """
    kernel = Kernel(ranges)
    parameters, outputs = make(kernel)
    result = outputs[0].parameter
    index: list[Size] = []
    axes: list[Axis] = []
    order = list(range(len(result.shape)))
    if result.layout == "channels_last":
        order = [0, *order[2:], 1]
    for position, extent in enumerate(result.shape):
        name, group = f"i{position}", (groups or {}).get(f"i{position}", 0)
        if group:
            outer = kernel.variable(name, sizes.floordiv(extent, group))
            index.append(sizes.add(sizes.mul(outer, group), kernel.variable(f"{name}g", group)))
        else:
            index.append(0 if extent == 1 else kernel.variable(name, extent))
    for position in order:
        name, extent, group = f"i{position}", result.shape[position], (groups or {}).get(f"i{position}", 0)
        axes += [Axis(name, sizes.floordiv(extent, group)), Axis(f"{name}g", group)] if group else [Axis(name, extent)]
    roots = [kernel.builder.cast(output.value.at(index), output.parameter.dtype) for output in outputs]
    stores = [kernel.offset(item.parameter.shape, item.parameter.layout, index) for item in outputs]
    return Space(kernel, parameters, outputs, [axis for axis in axes if axis.extent != 1], roots, stores)


@dataclass(frozen=True)
class _Candidate:
    """A reduction that could run along rows."""

    stored_along: bool  # whether axes of the result do not matter to it
    most: int
    loops: Loops


def row_loops(space: Space, ranges: dict[str, tuple[int, int]]) -> Loops | None:
    """The reduction that runs along rows; ``None`` where all reductions are short loops."""
    builder = space.kernel.builder
    found: dict[Loops, list[Reduce]] = {}
    for node in walk(builder, space.roots):
        if isinstance(node, Reduce) and all(builder.free_size(extent) <= set(ranges) for _, extent in node.loops):
            found.setdefault(node.loops, []).append(node)
    candidates = []
    for loops, nodes in found.items():
        needs = frozenset().union(*map(builder.free, nodes))
        stored_along = any(axis.variable not in needs for axis in space.axes)
        most = sizes.bounds(sizes.product(extent for _, extent in loops), ranges)[1]
        if stored_along or most > (WINDOW if any(_reads_neighbours(space, node) for node in nodes) else SHORT):
            candidates.append(_Candidate(stored_along, most, loops))
    best = max(candidates, key=lambda item: (item.stored_along, item.most), default=None)
    return None if best is None else best.loops


def _groups(space: Space, loops: Loops) -> dict[str, int]:
    """Axes of which the reduction sees only the group that an element is in, and the groups' sizes (group norm).

    Taken apart, the elements of a group lie along the row that is reduced.
    """
    builder = space.kernel.builder
    nodes = [node for node in walk(builder, space.roots) if isinstance(node, Reduce) and node.loops == loops]
    accesses = [offset for node in walk(builder, [node.body for node in nodes]) for offset in offsets(node)]
    groups = {}
    for axis in space.axes:
        seen = {part for access in accesses for part in _parts(access, axis.variable)}
        quotients = {part.args[1] for part in seen if isinstance(part, sizes.Op)}
        if len(quotients) == 1 and axis.variable not in seen and isinstance(axis.extent, int):
            (group,) = quotients
            if isinstance(group, int) and axis.extent % group == 0:
                groups[axis.variable] = group
    return groups


def _parts(size: Size, variable: str) -> list[Size]:
    """Where a variable occurs in an index: as its quotients by something, or as itself."""
    if size == variable:
        return [size]
    if not isinstance(size, sizes.Op):
        return []
    if size.op == "floordiv" and size.args[0] == variable:
        return [size]
    return [part for arg in size.args for part in _parts(arg, variable)]


def _reads_neighbours(space: Space, node: Reduce) -> bool:
    """Whether neighbours along the result's innermost axis read what lies close together."""
    if not space.axes:
        return False
    last = space.axes[-1].variable
    for load in walk(space.kernel.builder, [node.body]):
        if isinstance(load, Load):
            step = coefficient(load.offset, last)
            if isinstance(step, int) and 0 < step <= STEP:
                return True
    return False


def _is_wide(space: Space, ranges: dict[str, tuple[int, int]], loops: Loops | None) -> bool:
    """Whether index arithmetic takes 64 bits."""
    spans = [sizes.product(axis.extent for axis in space.axes)]
    if loops is not None:
        spans.append(sizes.product(extent for _, extent in loops))
    return index_type(space.parameters, ranges, *(sizes.add(span, MARGIN) for span in spans)) == "i64"


def _symbols(space: Space, body: Body, ranges: dict[str, tuple[int, int]]) -> tuple[str, ...]:
    """The call's sizes that the kernel needs."""
    builder = space.kernel.builder

    def used(expr: Expr) -> frozenset[str]:
        return builder.free(expr)

    names = frozenset().union(*map(used, body.roots), *map(builder.free_size, [*body.stores, *body.spans]))
    return tuple(name for name in ranges if name in names)
