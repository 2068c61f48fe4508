"""Row kernels: blocks of rows by columns, where a reduction runs along the columns.

A row that fits is one block, read once; what several reductions and the result need of it is computed once. Longer rows
are read in chunks by every reduction, whose accumulators are reduced at the end, and once more by what is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...runtime import sizes
from ...runtime.plan import Tile
from ...runtime.sizes import Size
from ..expr import Expr, Load, Loops, Reduce, coefficient, walk
from ..iteration import Axis, merge, merge_loops
from . import dialect
from .emit import Row, Scope, Var
from .loop_space import Body, Space, flat_index, indented, power, program, take_apart, tile

WHOLE_ROW = 8192  # longest row that is one block
NARROW_ROW = 1024  # longest row that is one block where neighbours in memory are neighbouring rows
LEAST_ROW = 16  # fewest columns of a block that holds a row


@dataclass
class _Rows:
    """A space cut into rows: ``across`` numbers the rows, ``along`` is what is stored in each; empty for one value."""

    space: Space
    loops: Loops
    across: list[Axis]
    along: list[Axis]
    roots: list[Expr]
    stores: list[Size]

    @property
    def shared(self) -> bool:
        """Whether what is stored runs over the same variables as the reduction."""
        return bool(self.along) and {axis.variable for axis in self.along} == {name for name, _ in self.loops}


def rows(space: Space, loops: Loops, wide: bool) -> Body:
    """Blocks of rows by columns, a reduction over ``loops`` along the columns."""
    cut = _cut(space, loops)
    length = sizes.product(extent for _, extent in cut.loops)
    count = sizes.product(axis.extent for axis in cut.across)
    contiguous, strided = _walks(cut)
    whole = space.most(length) <= (NARROW_ROW if strided and not contiguous else WHOLE_ROW)
    row = _row([Axis(*loop) for loop in cut.loops], whole)
    along = cut.along
    variables = {"x": Var("x", ("XBLOCK", "1"), "in_x")}
    if len(cut.across) == 1:
        variables[cut.across[0].variable] = Var("x", ("XBLOCK", "1"), "in_x")
    else:
        variables |= {axis.variable: Var(axis.variable, ("XBLOCK", "1"), "in_x") for axis in cut.across}
    over = list(variables)
    if whole:
        full = length == max(power(space.most(length)), LEAST_ROW)
        variables |= row.bind("r", "" if full else "in_r")
    aliases = {flat_index(cut.across): "x"} if cut.across else {}
    scope = Scope(space.kernel, variables, space.dtypes(), row=row, wide=wide, aliases=aliases)
    stored = [
        (output.parameter.name, store, root)
        for output, root, store in zip(space.outputs, cut.roots, cut.stores, strict=True)
    ]
    if not along or (whole and cut.shared):
        names = [*over, *(axis.variable for axis in along)]
        for name, store, root in stored:
            scope.store(name, store, root, over=names)
    else:
        chunk = scope.open_pass(row if cut.shared else _row(along, whole=False))
        for name, store, root in stored:
            chunk.store(name, store, root, over=[*over, *(axis.variable for axis in along)])
        scope.close_pass(chunk)
    head = [
        f"x = {program(wide)} * XBLOCK + tl.arange(0, XBLOCK)[:, None]",
        f"in_x = x < {dialect.size(count)}",
        *(take_apart("x", cut.across, scope.lines) if len(cut.across) > 1 else []),
    ]
    if whole:
        columns = "tl.arange(0, RBLOCK)[None, :]"
        head.append(f"r = {columns}.to(tl.int64)" if wide else f"r = {columns}")
        head += [] if full else [f"in_r = r < {row.length}"]
    most = max(space.most(length), 1)
    tiles = _row_tiles(space, length, most, max(space.most(count), 1), whole, strided and not contiguous)
    spans = [length, count, *(axis.extent for axis in along)]
    units = sizes.ceildiv(count, "XBLOCK")
    return Body(indented([*head, *scope.lines]), units, tiles, cut.roots, cut.stores, spans, scope.uses_fault)


def _row(axes: Sequence[Axis], whole: bool) -> Row:
    """How the variables of a row follow from a position in it."""
    length = sizes.product(axis.extent for axis in axes)
    texts: dict[str, str] = {}
    inner: Size = 1
    for position in range(len(axes) - 1, -1, -1):
        axis = axes[position]
        text = "@r" if inner == 1 else f"(@r // ({dialect.size(inner)}))"
        if position:
            text = f"({text} % ({dialect.size(axis.extent)}))"
        texts[axis.variable] = text
        inner = sizes.mul(inner, axis.extent)
    loops = tuple((axis.variable, axis.extent) for axis in axes)
    text = dialect.size(length)
    return Row(loops, f"({text})" if isinstance(length, sizes.Op) else text, whole, texts)


def _cut(space: Space, loops: Loops) -> _Rows:
    """Tell the axes that number the rows from those that lie along them, and merge both."""
    kernel, builder = space.kernel, space.kernel.builder
    reductions = [node for node in walk(builder, space.roots) if isinstance(node, Reduce)]
    needs = frozenset().union(*(builder.free(node) for node in reductions if node.loops == loops))
    across = [axis for axis in space.axes if axis.variable in needs]
    along = [axis for axis in space.axes if axis.variable not in needs]
    names = [name for name, _ in loops]
    others = {name for node in reductions if node.loops != loops for name, _ in node.loops}
    taken = others | {axis.variable for axis in across}
    if [axis.extent for axis in along] == [extent for _, extent in loops] and not taken & set(names):
        # Stored along the row: under the names of the reduction, what both need is computed once.
        change: dict[str, Size] = {axis.variable: name for axis, name in zip(along, names, strict=True)}
        along = [Axis(*loop) for loop in loops]
    elif {axis.variable for axis in along} == set(names):
        change = {}
    else:
        # Other axes, which may have the same names: merging the one must not touch the other.
        change = {axis.variable: kernel.variable(f"{axis.variable}s", axis.extent) for axis in along}
        along = [Axis(f"{axis.variable}s", axis.extent) for axis in along]
    known: dict[Expr, Expr] = {}
    roots = [builder.rewrite(root, change, known) for root in space.roots]
    stores = [sizes.substitute(store, change) for store in space.stores]
    cut = _Rows(space, loops, across, along, roots, stores)
    shared = cut.shared
    cut.loops, cut.roots, cut.stores = merge_loops(kernel, loops, roots, stores)
    if shared:
        cut.along = [Axis(*loop) for loop in cut.loops]
    else:
        cut.along, cut.roots, cut.stores = merge(kernel, along, cut.roots, cut.stores)
    cut.across, cut.roots, cut.stores = merge(kernel, across, cut.roots, cut.stores)
    return cut


def _walks(cut: _Rows) -> tuple[bool, bool]:
    """Whether reductions read memory in order along the row, and whether across rows."""
    inner = cut.loops[-1][0]
    outer = cut.across[-1].variable if cut.across else ""
    contiguous = strided = False
    for node in walk(cut.space.kernel.builder, cut.roots):
        if isinstance(node, Reduce) and node.loops == cut.loops:
            for load in walk(cut.space.kernel.builder, [node.body]):
                if isinstance(load, Load):
                    contiguous |= coefficient(load.offset, inner) == 1
                    strided |= bool(outer) and coefficient(load.offset, outer) == 1
    return contiguous, strided


def _row_tiles(space: Space, length: Size, most: int, count: int, whole: bool, strided: bool) -> list[Tile]:
    """Tiles by the longest row, the largest number of rows, and how they lie."""
    if strided:
        columns = max(power(most), LEAST_ROW) if whole else 128
        tiles = []
        for elements in (2048, 4096):
            x = min(max(elements // columns, 8), 64, power(count))
            tiles.append(tile(min(8, max(4, x * columns // 1024)), XBLOCK=x, RBLOCK=columns))
        return list(dict.fromkeys(tiles))
    if not whole:
        return [tile(8, XBLOCK=1, RBLOCK=2048), tile(16, XBLOCK=1, RBLOCK=4096)]
    columns = max(power(most), LEAST_ROW)
    tiles = []
    for elements in (1024, 4096):
        x = max(1, min(elements // columns, power(count)))
        tiles.append(tile(min(16, max(4, power(x * columns // 512))), XBLOCK=x, RBLOCK=columns))
    shorter = columns // 4
    if not isinstance(length, int) and shorter >= 64:
        x = max(1, min(1024 // shorter, power(count)))
        guard = sizes.compare("le", length, shorter)
        tiles.append(tile(min(16, max(4, power(x * shorter // 512))), guard, XBLOCK=x, RBLOCK=shorter))
    return list(dict.fromkeys(tiles))
