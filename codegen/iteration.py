"""What the loop kernels of all dialects share: axes of an iteration space, merging them, and counting work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..runtime import sizes
from ..runtime.sizes import Size
from .expr import Call, Expr, Loops, Reduce, coefficient, offsets, walk
from .kernel import Parameter
from .regions import Output
from .values import Kernel

Make = Callable[[Kernel], tuple[Sequence[Parameter], Sequence[Output]]]
"""Builds a region's values in a fresh kernel; called again for each form of the index that is tried."""


@dataclass(frozen=True)
class Axis:
    """One loop of the iteration space."""

    variable: str
    extent: Size


def merge(
    kernel: Kernel, axes: list[Axis], roots: list[Expr], stores: list[Size]
) -> tuple[list[Axis], list[Expr], list[Size]]:
    """Merge neighbouring axes wherever every access walks them as one.

    Args:
        kernel: whose variables the axes are.
        axes: outermost first.
        roots: expressions at the axes' variables.
        stores: offsets that are written.

    Returns:
        The axes that are left, roots and stores in terms of them.
    """
    builder = kernel.builder
    position = len(axes) - 2
    while position >= 0:
        outer, inner = axes[position], axes[position + 1]
        accesses = [offset for node in walk(builder, roots) for offset in offsets(node)] + list(stores)
        if outer.extent == 1 or all(walks_as_one(access, outer, inner) for access in accesses):
            roots = [builder.rewrite(root, {outer.variable: 0}) for root in roots]
            stores = [sizes.substitute(store, {outer.variable: 0}) for store in stores]
            extent = sizes.mul(outer.extent, inner.extent)
            kernel.variable(inner.variable, extent)
            axes = [*axes[:position], Axis(inner.variable, extent), *axes[position + 2 :]]
        position -= 1
    return axes, roots, stores


def walks_as_one(access: Size, outer: Axis, inner: Axis) -> bool:
    """Whether an access steps from the end of the inner axis to the next of the outer as within the inner axis."""
    if not {outer.variable, inner.variable} & sizes.symbols_of(access):
        return True  # or through a loaded index, which is an access of its own
    step, stride = coefficient(access, inner.variable), coefficient(access, outer.variable)
    return step is not None and stride is not None and sizes.sub(stride, sizes.mul(step, inner.extent)) == 0


def flops(kernel: Kernel, roots: list[Expr], result: Parameter) -> Size:
    """Calls per element of the result, those in reductions times their extents."""
    total: Size = 0
    seen: set[Expr] = set()

    def count(expr: Expr, times: Size) -> None:
        nonlocal total
        for node in walk(kernel.builder, [expr], into_reductions=False):
            if node in seen:
                continue
            seen.add(node)
            if isinstance(node, Call) and node.op != "cast":
                total = sizes.add(total, times)
            elif isinstance(node, Reduce):
                extent = sizes.product(bound for _, bound in node.loops)
                if sizes.symbols_of(extent) <= set(kernel.ranges) - set(kernel.extents):
                    outer = _over_rows(kernel, node, times, result)
                    total = sizes.add(total, sizes.mul(outer, extent))
                    count(node.body, sizes.mul(outer, extent))

    for root in roots:
        count(root, sizes.product(result.shape))
    return total


def _over_rows(kernel: Kernel, node: Reduce, times: Size, result: Parameter) -> Size:
    """How often a reduction runs: once per row when it does not depend on the innermost axis."""
    innermost = f"i{len(result.shape) - 1}"
    if (
        result.layout == "rows"
        and result.shape
        and innermost not in kernel.builder.free(node)
        and times == sizes.product(result.shape)
    ):
        return sizes.product(result.shape[:-1])
    return times


def merge_loops(
    kernel: Kernel, loops: Loops, roots: list[Expr], stores: list[Size]
) -> tuple[Loops, list[Expr], list[Size]]:
    """Merge neighbouring loops of the reductions over ``loops`` wherever every access walks them as one.

    The results may range over the loops' variables, too; then it must be all of them or none.
    """
    builder = kernel.builder
    others = [node for node in walk(builder, roots) if isinstance(node, Reduce) and node.loops != loops]
    names = {name for name, _ in loops}
    if any(names & {name for name, _ in node.loops} for node in others):
        return loops, roots, stores
    position = len(loops) - 2
    while position >= 0:
        outer, inner = Axis(*loops[position]), Axis(*loops[position + 1])
        accesses = [offset for node in walk(builder, roots) for offset in offsets(node)] + list(stores)
        if outer.extent == 1 or all(walks_as_one(access, outer, inner) for access in accesses):
            extent = sizes.mul(outer.extent, inner.extent)
            merged = (*loops[:position], (inner.variable, extent), *loops[position + 2 :])
            known: dict[Expr, Expr] = {}
            roots = [builder.rewrite(root, {outer.variable: 0}, known, {loops: merged}) for root in roots]
            stores = [sizes.substitute(store, {outer.variable: 0}) for store in stores]
            kernel.variable(inner.variable, extent)
            loops = merged
        position -= 1
    return loops, roots, stores
