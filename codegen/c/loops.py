"""Loop kernels: any pointwise chain over one iteration space, with views, gathers and reductions inside.

The space is the result's shape in its storage order. Its innermost axis is the vector axis; all others, and chunks of a
long innermost one, are independent units of work. What differs is where reductions stand (see :mod:`.emit`):

- none: neighbouring axes that every access walks contiguously are merged into one, which is then cut into chunks;
- rows: no reduction depends on the vector axis (softmax, the norms): a unit is a row, expressions that several passes
  over the row need are kept on the stack;
- lanes: reductions depend on the vector axis and neighbouring lanes read neighbouring elements (pooling, sums over
  outer axes): accumulators are arrays over the lanes;
- each: reductions depend on the innermost axis but run along memory themselves (mean over height and width): every
  element of the result is a unit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...runtime import sizes
from ...runtime.plan_check import ITEM_BYTES
from ...runtime.sizes import Size
from ..expr import Expr, Load, Reduce, coefficient, offsets, walk
from ..iteration import Axis, Make, flops, merge
from ..kernel import KernelCode, Parameter
from ..regions import Made, Output, Task, loop_region
from ..values import LANES, Kernel
from . import dialect
from .emit import Emitter, Lanes, Scope, plan_row_cache
from .frame import frame
from .stores import Stored, store_elements

CHUNK = 4096  # elements of the innermost axis in one unit of a kernel without reductions
UNIT = 512  # elements of a unit for which more axes than the innermost are taken, where that is short
LANE_CHUNK = 64  # lanes of one unit where reductions depend on a long innermost axis
ROW_STACK = 96 * 1024  # bytes of the stack that kept rows may use


def loop_family(task: Task) -> Sequence[Made]:
    """Everything that is an index function of its operands."""
    region = loop_region(task)
    variants = build_loop(region.make, task.symbols.ranges, task.label())
    return [Made(code, region.frame.storages, guard) for guard, code in variants]


def build_loop(make: Make, ranges: dict[str, tuple[int, int]], label: str) -> list[tuple[Size, KernelCode]]:
    """Generate the variants of a loop kernel: (guard, kernel), the last one with guard 1.

    There are two where a row may or may not fit the stack: short rows keep what several passes need, long ones compute
    it again.

    Args:
        make: builds the region's values in a fresh :class:`Kernel`; called once or twice, since the form of the index
            is chosen after looking at the accesses.
        ranges: bounds of the call's symbols.
        label: words for the kernel's name.
    """
    draft = _Draft(make, ranges, split=0)
    builder, vector = draft.kernel.builder, draft.space.axes[-1].variable
    reductions = [node for node in walk(builder, draft.roots) if isinstance(node, Reduce)]
    if reductions and not any(vector in builder.free(node) for node in reductions):
        return _row_variants(draft, make, ranges, label)
    form: Callable[[_Draft], Body]
    if not reductions:
        form = _pointwise
    elif draft.space.blocked:
        form = _lanes
    else:
        # Cut the innermost axis so that a blocked operand's channels become (block, lane) without a division.
        cut = _Draft(make, ranges, split=LANES if _reads_blocked(draft.parameters) else LANE_CHUNK)
        form = _lanes if _lanes_pay(cut.kernel, cut.roots, cut.space.axes[-1].variable) else _each
        draft = cut if form is _lanes else _Draft(make, ranges, split=0)
    return [(1, _code(draft, form(draft), label))]


def _row_variants(
    draft: _Draft, make: Make, ranges: dict[str, tuple[int, int]], label: str
) -> list[tuple[Size, KernelCode]]:
    """Row kernels: one that keeps rows where they may fit the stack, one that does not where they may not."""
    length, limit = draft.space.axes[-1].extent, _kept_row(draft)
    if limit == 0 or sizes.bounds(length, ranges)[0] > limit:
        return [(1, _code(draft, _rows(draft, keep=0), label))]
    most = min(limit, sizes.bounds(length, ranges)[1])
    kept = _code(draft, _rows(draft, keep=most), label)
    if sizes.bounds(length, ranges)[1] <= limit:
        return [(1, kept)]
    again = _Draft(make, ranges, split=0)
    return [(sizes.compare("le", length, limit), kept), (1, _code(again, _rows(again, keep=0), label))]


def _code(draft: _Draft, body: Body, label: str) -> KernelCode:
    """A finished body as a kernel."""
    kernel, parameters, outputs = draft.kernel, draft.parameters, draft.outputs
    lines, units, roots = body
    ranges = draft.ranges
    used = set().union(*(kernel.builder.free(root) for root in roots), kernel.builder.free_size(units))
    used |= {name for output in outputs for extent in output.parameter.shape for name in sizes.symbols_of(extent)}
    symbols = tuple(name for name in ranges if name in used)
    return KernelCode(
        family="loop",
        label=label,
        source=frame(lines, parameters, symbols),
        symbols=symbols,
        units=units,
        flops=flops(kernel, roots, outputs[0].parameter),
        bytes=sizes.add(*(parameter.bytes() for parameter in parameters)),
        parameters=tuple(parameters),
    )


class _Space:
    """The iteration space of a result: its axes in storage order and the logical index they stand for."""

    def __init__(self, kernel: Kernel, result: Parameter, *, split: int) -> None:
        self.kernel = kernel
        self.result = result
        self.blocked = result.layout == "channels16"
        self.lane_limit: Size | None = None  # number of lanes in this block or chunk where it is not constant
        axes: list[Axis] = []
        index: list[Size] = []
        shape = result.shape or (1,)
        for position, extent in enumerate(shape):
            if self.blocked and position == 1:
                block = self._outer_axis(axes, "b1", sizes.ceildiv(extent, LANES))
                index.append(sizes.add(sizes.mul(block, LANES), "l1"))
            elif position < len(shape) - 1 or self.blocked:
                index.append(self._outer_axis(axes, f"i{position}", extent))
            elif split:
                chunk = self._outer_axis(axes, "c", sizes.ceildiv(extent, split))
                most = max(1, min(split, extent)) if isinstance(extent, int) else split
                axes.append(self._axis("l", most))
                index.append(sizes.add(sizes.mul(chunk, split), "l"))
                if not (isinstance(extent, int) and extent % most == 0):
                    self.lane_limit = sizes.minimum(most, sizes.sub(extent, sizes.mul(chunk, split)))
            else:
                axes.append(self._axis(f"i{position}", extent))
                index.append(f"i{position}")
        if self.blocked:
            axes.append(self._axis("l1", LANES))
            channels = shape[1]
            if not (isinstance(channels, int) and channels % LANES == 0):
                block = "b1" if any(axis.variable == "b1" for axis in axes) else 0
                self.lane_limit = sizes.minimum(LANES, sizes.sub(channels, sizes.mul(block, LANES)))
        self.axes = axes
        self.index = tuple(index) if result.shape else ()

    def _axis(self, name: str, extent: Size) -> Axis:
        return Axis(self.kernel.variable(name, extent), extent)

    def _outer_axis(self, axes: list[Axis], name: str, extent: Size) -> Size:
        """Add an axis that is not the vector axis; one of extent 1 needs no loop, its index is 0."""
        if extent == 1:
            return 0
        axes.append(self._axis(name, extent))
        return name

    def roots(self, outputs: Sequence[Output]) -> list[Expr]:
        """The results' expressions at this space's index."""
        return [self.kernel.builder.cast(output.value.at(self.index), output.parameter.dtype) for output in outputs]

    def offset(self, parameter: Parameter) -> Size:
        """Where an element of a result is stored."""
        return self.kernel.offset(parameter.shape, parameter.layout, self.index) if parameter.shape else 0

    def stores(self, outputs: Sequence[Output], roots: Sequence[Expr]) -> list[Stored]:
        """The results with their expressions and where they are stored."""
        pairs = zip(outputs, roots, strict=True)
        return [(output, root, self.offset(output.parameter)) for output, root in pairs]

    def outer(self) -> list[Axis]:
        """All axes but the vector axis."""
        return self.axes[:-1]


class _Draft:
    """The region's values in a fresh kernel, at the index of one form of the iteration space."""

    def __init__(self, make: Make, ranges: dict[str, tuple[int, int]], *, split: int) -> None:
        self.ranges = ranges
        self.kernel = Kernel(ranges)
        self.parameters, self.outputs = make(self.kernel)
        self.space = _Space(self.kernel, self.outputs[0].parameter, split=split)
        self.roots = self.space.roots(self.outputs)


Body = tuple[list[str], Size, list[Expr]]


def _unit_loop(axes: Sequence[Axis], inner: Sequence[str], declarations: Sequence[str] = ()) -> list[str]:
    """The loop over units, with the axes' variables taken from the unit's number."""
    lines = ["for (int64_t unit = begin; unit < end; unit++) {"]
    if len(axes) == 1:
        lines.append(f"    const int64_t {axes[0].variable} = unit;")
    elif axes:
        lines.append("    int64_t rest = unit;")
        for axis in reversed(axes[1:]):
            extent = dialect.size(axis.extent)
            extent = f"({extent})" if isinstance(axis.extent, sizes.Op) else extent
            lines.append(f"    const int64_t {axis.variable} = rest % {extent};")
            lines.append(f"    rest /= {extent};")
        lines.append(f"    const int64_t {axes[0].variable} = rest;")
    return [*declarations, *lines, *(f"    {line}" for line in inner), "}"]


def _emitter(draft: _Draft, lanes: Lanes | None = None) -> Emitter:
    dtypes = dict(draft.kernel.storage)
    dtypes.update({output.parameter.name: output.parameter.dtype for output in draft.outputs})
    emitter = Emitter(draft.kernel.builder, dtypes, lanes, draft.kernel.ranges)
    emitter.streams = True
    return emitter


def _pointwise(draft: _Draft) -> Body:
    kernel, space, outputs, roots = draft.kernel, draft.space, draft.outputs, draft.roots
    builder = kernel.builder
    stores = [space.offset(output.parameter) for output in outputs]
    axes = list(space.axes)
    limit = space.lane_limit
    if limit is not None and _padding_is_readable(kernel, roots, axes[-1].variable):
        limit = None
    if limit is None:
        axes, roots, stores = merge(kernel, axes, roots, stores)
    vector = axes[-1]
    most = sizes.bounds(vector.extent, kernel.ranges)[1]
    if most >= 2 * CHUNK:
        chunk = kernel.variable("chunk", sizes.ceildiv(vector.extent, CHUNK))
        inner = kernel.variable("e", CHUNK)
        place = sizes.add(sizes.mul(chunk, CHUNK), inner)
        roots = [builder.rewrite(root, {vector.variable: place}) for root in roots]
        stores = [sizes.substitute(store, {vector.variable: place}) for store in stores]
        count = dialect.size(sizes.minimum(CHUNK, sizes.sub(vector.extent, sizes.mul(chunk, CHUNK))))
        axes = [*axes[:-1], Axis(chunk, sizes.ceildiv(vector.extent, CHUNK)), Axis(inner, CHUNK)]
    else:
        count = dialect.size(vector.extent if limit is None else limit)
    nest = _Nest(_emitter(draft), axes, kernel)
    store_elements(nest.inner, axes[-1], count, list(zip(outputs, roots, stores, strict=True)))
    return nest.close(), nest.units, roots


class _Nest:
    """A unit's scope, with loops inside it over the axes that a unit takes besides the innermost one.

    Blocks of 16 channels are too short for a unit: taking its number apart would cost more than its elements.
    """

    def __init__(self, emitter: Emitter, axes: Sequence[Axis], kernel: Kernel) -> None:
        outer = list(axes[:-1])
        elements = sizes.bounds(axes[-1].extent, kernel.ranges)[1]
        self._loops: list[Axis] = []
        while len(outer) > 1 and elements < UNIT:
            self._loops.insert(0, outer.pop())
            elements *= max(1, sizes.bounds(self._loops[0].extent, kernel.ranges)[1])
        self._outer = outer
        self._scopes = [Scope(emitter, None, [axis.variable for axis in outer])]
        for axis in self._loops:
            self._scopes.append(self._scopes[-1].child(axis.variable))

    @property
    def inner(self) -> Scope:
        """The scope around the vector loop."""
        return self._scopes[-1]

    @property
    def units(self) -> Size:
        """The number of units."""
        return sizes.product(axis.extent for axis in self._outer)

    def close(self) -> list[str]:
        """The loop over units, once the innermost scope is complete."""
        for axis, scope, child in reversed(list(zip(self._loops, self._scopes[:-1], self._scopes[1:], strict=True))):
            scope.loop(child, axis.variable, axis.extent)
        return _unit_loop(self._outer, self._scopes[0].lines)


def _kept_row(draft: _Draft) -> int:
    """The longest row whose kept expressions fit the stack; 0 where there is nothing to keep."""
    vector = draft.space.axes[-1]
    cache = plan_row_cache(_emitter(draft), draft.roots, vector.variable, vector.extent)
    per_element = sum(ITEM_BYTES[expr.dtype] for expr in cache.arrays)
    return ROW_STACK // per_element // 64 * 64 if per_element else 0


def _rows(draft: _Draft, *, keep: int) -> Body:
    space, outputs, roots = draft.space, draft.outputs, draft.roots
    vector = space.axes[-1]
    emitter = _emitter(draft)
    declarations = []
    if keep:
        emitter.cache = cache = plan_row_cache(emitter, roots, vector.variable, vector.extent)
        declarations = [
            f"{dialect.TYPES[expr.dtype]} {name}[{keep}] __attribute__((aligned(64)));"
            for expr, name in cache.arrays.items()
        ]
    outer = space.outer()
    unit = Scope(emitter, None, [axis.variable for axis in outer])
    count = dialect.size(space.lane_limit if space.lane_limit is not None else vector.extent)
    store_elements(unit, vector, count, space.stores(outputs, roots))
    return _unit_loop(outer, unit.lines, declarations), sizes.product(axis.extent for axis in outer), roots


def _lanes(draft: _Draft) -> Body:
    kernel, space, outputs, roots = draft.kernel, draft.space, draft.outputs, draft.roots
    vector = space.axes[-1]
    most = sizes.bounds(vector.extent, kernel.ranges)[1]
    count = dialect.size(vector.extent)
    lines: list[str] = []
    if space.lane_limit is not None:
        lines = [f"const int64_t lanes = {dialect.size(space.lane_limit)};"]
        count = "lanes"
    nest = _Nest(_emitter(draft, Lanes(vector.variable, count, most)), space.axes, kernel)
    nest.inner.lines.extend(lines)
    store_elements(nest.inner, vector, count, space.stores(outputs, roots))
    return nest.close(), nest.units, roots


def _each(draft: _Draft) -> Body:
    space, outputs, roots = draft.space, draft.outputs, draft.roots
    axes = space.axes
    emitter = _emitter(draft)
    unit = Scope(emitter, None, [axis.variable for axis in axes])
    for output, root, store in space.stores(outputs, roots):
        unit.store(output.parameter.name, store, root)
    return _unit_loop(axes, unit.lines), sizes.product(axis.extent for axis in axes), roots


def _lanes_pay(kernel: Kernel, roots: list[Expr], lane: str) -> bool:
    """Whether reductions read neighbouring elements in neighbouring lanes."""
    for node in walk(kernel.builder, roots):
        if isinstance(node, Reduce) and lane in kernel.builder.free(node):
            for load in walk(kernel.builder, [node.body]):
                if isinstance(load, Load) and coefficient(load.offset, lane) == 1:
                    return True
    return False


def _reads_blocked(parameters: Sequence[Parameter]) -> bool:
    return any(parameter.layout == "channels16" and not parameter.written for parameter in parameters)


def _padding_is_readable(kernel: Kernel, roots: list[Expr], lane: str) -> bool:
    """Whether every access that moves with the lane is to a blocked buffer, whose padding lanes exist."""
    for node in walk(kernel.builder, roots):
        if isinstance(node, Load) and lane in kernel.builder.free_size(node.offset):
            if (
                kernel.layouts.get(node.buffer) != "channels16"
                or coefficient(node.offset, lane) != 1
                or node.mask is not None
            ):
                return False
        elif lane in set().union(*map(kernel.builder.free_size, offsets(node)), ()) and not isinstance(node, Load):
            return False
    return True
