"""The forms of loop kernels: from an iteration space to the statements of a kernel and its tiles."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ...runtime import sizes
from ...runtime.plan import Tile, TileConstant
from ...runtime.sizes import Size
from ..expr import Expr, Load, Loops, Reduce, coefficient, walk
from ..iteration import Axis, merge, merge_loops
from ..kernel import Parameter
from ..regions import Output
from ..values import Kernel
from . import dialect
from .emit import Row, Scope, Var

WHOLE_ROW = 8192  # longest row that is one block
NARROW_ROW = 64  # longest row that is one block where neighbours in memory are neighbouring rows
LEAST_ROW = 16  # fewest columns of a block that holds a row
SMALL = 1 << 18  # elements up to which smaller blocks keep more of a GPU busy


@dataclass
class Space:
    """What a region stores, over the axes of its result in storage order.

    Attributes:
        kernel: whose builder the expressions are of.
        parameters: all buffers.
        outputs: the results.
        axes: those of the result that have more than one element.
        roots: the results' values at the axes' variables.
        stores: the results' offsets there.
    """

    kernel: Kernel
    parameters: Sequence[Parameter]
    outputs: Sequence[Output]
    axes: list[Axis]
    roots: list[Expr]
    stores: list[Size]

    def dtypes(self) -> dict[str, str]:
        """Storage dtype of every buffer."""
        return dict(self.kernel.storage) | {item.parameter.name: item.parameter.dtype for item in self.outputs}

    def most(self, size: Size) -> int:
        """The largest value of a size."""
        return sizes.bounds(size, self.kernel.ranges)[1]


@dataclass(frozen=True)
class Body:
    """A kernel's text, indented, and what goes with it.

    Attributes:
        text: the statements.
        units: programs.
        tiles: the binaries, the default one first.
        roots: what is stored, in the variables of the text.
        stores: where.
        spans: sizes that the text names beside those.
        uses_fault: whether the fault word is an operand.
    """

    text: str
    units: Size
    tiles: Sequence[Tile]
    roots: Sequence[Expr]
    stores: Sequence[Size]
    spans: Sequence[Size]
    uses_fault: bool


def _tile(warps: int, guard: Size = 1, **constants: int) -> Tile:
    """A tile named after what it fixes."""
    items = tuple(TileConstant(name, value) for name, value in constants.items())
    name = "x".join(str(value) for value in constants.values())
    return Tile(f"{name}w{warps}", items, warps, stages=1, guard=guard)


def _text(lines: Sequence[str]) -> str:
    return "\n".join(f"    {line}" for line in lines)


def _take_apart(flat: str, axes: Sequence[Axis], used: Sequence[str]) -> list[str]:
    """Statements that make those variables of the axes that lines use of a flat index."""
    lines = []
    rest = flat
    for position in range(len(axes) - 1, -1, -1):
        axis = axes[position]
        extent = dialect.size(axis.extent)
        extent = f"({extent})" if isinstance(axis.extent, sizes.Op) else extent
        if any(re.search(rf"\b{axis.variable}\b", line) for line in used):
            lines.append(f"{axis.variable} = {rest} % {extent}" if position else f"{axis.variable} = {rest}")
        rest += f" // {extent}"
    return lines


def _flat(axes: Sequence[Axis]) -> Size:
    """The flat index in terms of the axes' variables."""
    flat: Size = 0
    for axis in axes:
        flat = sizes.add(sizes.mul(flat, axis.extent), axis.variable)
    return flat


def _program(wide: bool) -> str:
    return "tl.program_id(0).to(tl.int64)" if wide else "tl.program_id(0)"


# -- pointwise ---------------------------------------------------------------------------------------------------------


def pointwise(space: Space, wide: bool) -> Body:
    """Blocks of one flat axis."""
    axes, roots, stores = merge(space.kernel, space.axes, space.roots, space.stores)
    total = sizes.product(axis.extent for axis in axes)
    shape = ("BLOCK",)
    variables = {"x": Var("x", shape, "inside")}
    if len(axes) == 1:
        variables[axes[0].variable] = Var("x", shape, "inside")
    else:
        variables |= {axis.variable: Var(axis.variable, shape, "inside") for axis in axes}
    scope = Scope(space.kernel, variables, space.dtypes(), wide=wide, aliases={_flat(axes): "x"} if axes else {})
    for output, root, store in zip(space.outputs, roots, stores, strict=True):
        scope.store(output.parameter.name, store, root)
    lines = [
        f"x = {_program(wide)} * BLOCK + tl.arange(0, BLOCK)",
        f"inside = x < {dialect.size(total)}",
        *(_take_apart("x", axes, scope.lines) if len(axes) > 1 else []),
        *scope.lines,
    ]
    tiles = _pointwise_tiles(space.most(total), any(isinstance(n, Reduce) for n in walk(space.kernel.builder, roots)))
    return Body(_text(lines), sizes.ceildiv(total, "BLOCK"), tiles, roots, stores, [total], scope.uses_fault)


def _pointwise_tiles(most: int, loops: bool) -> list[Tile]:
    if loops:
        return [_tile(4, BLOCK=256), _tile(4, BLOCK=512), _tile(4, BLOCK=128)]
    tiles = [_tile(4, BLOCK=1024), _tile(4, BLOCK=512), _tile(4, BLOCK=256), _tile(8, BLOCK=2048)]
    return [tiles[1], tiles[2], tiles[0]] if most <= SMALL else [tiles[0], tiles[1], tiles[3]]


# -- rows --------------------------------------------------------------------------------------------------------------


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
        full = length == max(_power(space.most(length)), LEAST_ROW)
        variables |= row.bind("r", "" if full else "in_r")
    scope = Scope(space.kernel, variables, space.dtypes(), row=row, wide=wide)
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
        f"x = {_program(wide)} * XBLOCK + tl.arange(0, XBLOCK)[:, None]",
        f"in_x = x < {dialect.size(count)}",
        *(_take_apart("x", cut.across, scope.lines) if len(cut.across) > 1 else []),
    ]
    if whole:
        columns = "tl.arange(0, RBLOCK)[None, :]"
        head.append(f"r = {columns}.to(tl.int64)" if wide else f"r = {columns}")
        head += [] if full else [f"in_r = r < {row.length}"]
    most = max(space.most(length), 1)
    tiles = _row_tiles(space, length, most, max(space.most(count), 1), whole, strided and not contiguous)
    spans = [length, count, *(axis.extent for axis in along)]
    units = sizes.ceildiv(count, "XBLOCK")
    return Body(_text([*head, *scope.lines]), units, tiles, cut.roots, cut.stores, spans, scope.uses_fault)


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


def _power(value: int) -> int:
    return 1 << max(value - 1, 0).bit_length()


def _row_tiles(space: Space, length: Size, most: int, count: int, whole: bool, strided: bool) -> list[Tile]:
    """Tiles by the longest row, the largest number of rows, and how they lie."""
    if strided:
        columns = max(_power(most), LEAST_ROW) if whole else 32
        wide = min(64, max(_power(count), 8))
        tiles = [_tile(4, XBLOCK=wide, RBLOCK=columns)]
        if wide > 16:
            tiles.append(_tile(4, XBLOCK=16, RBLOCK=columns if whole else 64))
        return tiles
    if not whole:
        return [_tile(8, XBLOCK=1, RBLOCK=2048), _tile(16, XBLOCK=1, RBLOCK=4096)]
    columns = max(_power(most), LEAST_ROW)
    tiles = []
    for elements in (1024, 4096):
        x = max(1, min(elements // columns, _power(count)))
        tiles.append(_tile(min(16, max(4, _power(x * columns // 512))), XBLOCK=x, RBLOCK=columns))
    shorter = columns // 4
    if not isinstance(length, int) and shorter >= 64:
        x = max(1, min(1024 // shorter, _power(count)))
        guard = sizes.compare("le", length, shorter)
        tiles.append(_tile(min(16, max(4, _power(x * shorter // 512))), guard, XBLOCK=x, RBLOCK=shorter))
    return list(dict.fromkeys(tiles))
