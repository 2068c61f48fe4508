"""Pointwise kernels, whose reductions are loops: blocks of one flat axis, or tiles of two axes that change places."""

from __future__ import annotations

from collections.abc import Sequence

from ...runtime import sizes
from ...runtime.plan import Tile
from ...runtime.sizes import Size
from ..expr import Expr, Load, Reduce, coefficient, walk
from ..iteration import Axis, merge
from . import dialect
from .emit import Scope, Var
from .loop_space import Body, Space, flat_index, indented, program, take_apart, tile

SMALL = 1 << 18  # elements up to which smaller blocks keep more of a GPU busy
LEAST_TILE = 8  # fewest elements along both axes of a tile that is read in one order and written in the other


def pointwise(space: Space, wide: bool) -> Body:
    """Blocks of one flat axis, or tiles where memory is read along another axis than it is written."""
    axes, roots, stores = merge(space.kernel, space.axes, space.roots, space.stores)
    other = _read_along(space, axes, roots)
    if other is not None:
        return _tiled(space, axes, other, roots, stores, wide)
    total = sizes.product(axis.extent for axis in axes)
    shape = ("BLOCK",)
    variables = {"x": Var("x", shape, "inside")}
    if len(axes) == 1:
        variables[axes[0].variable] = Var("x", shape, "inside")
    else:
        variables |= {axis.variable: Var(axis.variable, shape, "inside") for axis in axes}
    scope = Scope(space.kernel, variables, space.dtypes(), wide=wide, aliases={flat_index(axes): "x"} if axes else {})
    for output, root, store in zip(space.outputs, roots, stores, strict=True):
        scope.store(output.parameter.name, store, root)
    lines = [
        f"x = {program(wide)} * BLOCK + tl.arange(0, BLOCK)",
        f"inside = x < {dialect.size(total)}",
        *(take_apart("x", axes, scope.lines) if len(axes) > 1 else []),
        *scope.lines,
    ]
    tiles = _pointwise_tiles(space.most(total), any(isinstance(n, Reduce) for n in walk(space.kernel.builder, roots)))
    return Body(indented(lines), sizes.ceildiv(total, "BLOCK"), tiles, roots, stores, [total], scope.uses_fault)


def _pointwise_tiles(most: int, loops: bool) -> list[Tile]:
    if loops:
        return [tile(4, BLOCK=256), tile(4, BLOCK=512), tile(4, BLOCK=128)]
    tiles = [tile(4, BLOCK=1024), tile(4, BLOCK=512), tile(4, BLOCK=256), tile(8, BLOCK=2048)]
    return [tiles[1], tiles[2], tiles[0]] if most <= SMALL else [tiles[0], tiles[1], tiles[3]]


def _read_along(space: Space, axes: Sequence[Axis], roots: Sequence[Expr]) -> Axis | None:
    """The axis along which something lies in memory that is not read along the innermost one."""
    builder = space.kernel.builder
    nodes = list(walk(builder, list(roots)))
    if len(axes) < 2 or space.most(axes[-1].extent) < LEAST_TILE or any(isinstance(node, Reduce) for node in nodes):
        return None
    for node in nodes:
        if isinstance(node, Load) and coefficient(node.offset, axes[-1].variable) not in (0, 1, None):
            for axis in axes[:-1]:
                if coefficient(node.offset, axis.variable) == 1 and space.most(axis.extent) >= LEAST_TILE:
                    return axis
    return None


def _tiled(space: Space, axes: Sequence[Axis], read: Axis, roots: list[Expr], stores: list[Size], wide: bool) -> Body:
    """Tiles of an axis that is read along (rows) by the one that is written along (columns)."""
    written = axes[-1]
    outer = [axis for axis in axes[:-1] if axis is not read]
    variables = {
        read.variable: Var("x", ("XBLOCK", "1"), "in_x"),
        written.variable: Var("y", ("1", "YBLOCK"), "in_y"),
    }
    variables |= {axis.variable: Var(axis.variable) for axis in outer}
    scope = Scope(space.kernel, variables, space.dtypes(), wide=wide)
    for output, root, store in zip(space.outputs, roots, stores, strict=True):
        scope.store(output.parameter.name, store, root)
    tiles_x, tiles_y = sizes.ceildiv(read.extent, "XBLOCK"), sizes.ceildiv(written.extent, "YBLOCK")
    lines = [
        f"tiles_y = tl.cdiv({dialect.size(written.extent)}, YBLOCK)",
        f"tiles_x = tl.cdiv({dialect.size(read.extent)}, XBLOCK)",
        f"pid = {program(wide)}",
        "x = pid // tiles_y % tiles_x * XBLOCK + tl.arange(0, XBLOCK)[:, None]",
        f"in_x = x < {dialect.size(read.extent)}",
        "y = pid % tiles_y * YBLOCK + tl.arange(0, YBLOCK)[None, :]",
        f"in_y = y < {dialect.size(written.extent)}",
        *take_apart("pid // tiles_y // tiles_x", outer, scope.lines),
        *scope.lines,
    ]
    units = sizes.mul(sizes.product(axis.extent for axis in outer), tiles_x, tiles_y)
    tiles = [tile(4, XBLOCK=32, YBLOCK=32), tile(8, XBLOCK=64, YBLOCK=64), tile(4, XBLOCK=64, YBLOCK=16)]
    spans = [axis.extent for axis in axes]
    return Body(indented(lines), units, tiles, roots, stores, spans, scope.uses_fault)
