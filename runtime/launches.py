"""From a GPU plan and the shapes of a call to the kernels to launch: which binaries, over how many programs, on what.

It depends on shapes alone, so it is computed once per combination of shapes and kept; the result is immutable and
names memory by kind, never by address.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from . import sizes
from .binding import CACHED_SHAPES, Shapes, StateSizes, bind_symbols
from .entry import describe_step
from .errors import ShapeError
from .plan import COUNTERS, Plan, Ref, Tile, Variant, place
from .plan_check import nbytes

MOST_PROGRAMS = 2**31 - 1
"""In the first dimension of a grid, on every GPU."""

Chooser = Callable[[int, Variant, Mapping[str, int]], Tile]
"""Picks the tile of a variant from the step's index, the variant and the symbols' values."""


@dataclass(frozen=True, slots=True)
class Operand:
    """A pointer argument: ``bytes`` bytes at ``offset`` in the memory of its kind.

    ``offset`` counts from the start of the arena (``buffer``), of the weight file's data section (``constant``) or of
    the fault words, one int32 per step (``fault``); it is 0 for the kinds whose memories are apart: ``input``,
    ``output``, ``state`` and ``counters``. ``index`` is that of the plan.
    """

    kind: str
    index: int
    offset: int
    bytes: int
    dtype: str


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel over a one-dimensional grid, which may be empty: then there is nothing to launch."""

    step: int
    variant: int
    kernel: str
    tile: Tile
    grid: int
    operands: tuple[Operand, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Launches:
    """A whole call, for one combination of input shapes.

    Attributes:
        values: symbol → value.
        outputs: shape and bytes of every output.
        arena_bytes: scratch memory.
        offsets: of the plan's buffers in the arena.
        items: one launch per step, in order.
    """

    values: Mapping[str, int]
    outputs: tuple[tuple[tuple[int, ...], int], ...]
    arena_bytes: int
    offsets: tuple[int, ...]
    items: tuple[Launch, ...]


def cached_launches(plan: Plan, choose: Chooser) -> Callable[[Shapes, StateSizes], Launches]:
    """The function from input shapes to launches, which remembers those that came last; safe from several threads."""

    @lru_cache(maxsize=CACHED_SHAPES)
    def launches(shapes: Shapes, state_sizes: StateSizes) -> Launches:
        return make_launches(plan, bind_symbols(plan, shapes, state_sizes), choose)

    return launches


def make_launches(plan: Plan, values: Mapping[str, int], choose: Chooser) -> Launches:
    """The launches for one assignment of the symbols.

    Raises:
        ShapeError: a step needs more programs than a grid can have.
    """
    outputs = []
    for port in plan.outputs:
        shape = tuple(sizes.evaluate(size, values) for size in port.shape)
        outputs.append((shape, nbytes(port.dtype, shape)))
    offsets, arena_bytes = place(plan.buffers, values)
    operands = _Operands(plan, values, offsets)
    items = []
    for number, step in enumerate(plan.steps):
        position, variant = next(
            (position, variant)
            for position, variant in enumerate(step.variants)
            if sizes.evaluate(variant.guard, values)
        )
        tile = choose(number, variant, values)
        grid = sizes.evaluate(variant.units, {**values, **tile.values()})
        if grid > MOST_PROGRAMS:
            raise ShapeError(
                f"{describe_step(plan, number)} needs {grid} programs at these sizes, a GPU has {MOST_PROGRAMS} at most"
            )
        items.append(
            Launch(
                step=number,
                variant=position,
                kernel=variant.kernel,
                tile=tile,
                grid=max(grid, 0),
                operands=tuple(map(operands, variant.operands)),
                sizes=tuple(sizes.evaluate(size, values) for size in variant.sizes),
            )
        )
    return Launches(dict(values), tuple(outputs), arena_bytes, tuple(offsets), tuple(items))


class _Operands:
    """References of a plan as operands, each made once."""

    def __init__(self, plan: Plan, values: Mapping[str, int], offsets: list[int]) -> None:
        self._plan = plan
        self._values = values
        self._offsets = offsets
        self._known: dict[Ref, Operand] = {}

    def __call__(self, ref: Ref) -> Operand:
        if ref not in self._known:
            self._known[ref] = self._make(ref)
        return self._known[ref]

    def _make(self, ref: Ref) -> Operand:
        plan, index = self._plan, ref.index
        if ref.kind == "fault":
            return Operand("fault", index, 4 * index, 4, "int32")
        if ref.kind == "counters":
            return Operand("counters", 0, 0, 4 * COUNTERS, "int32")
        if ref.kind == "buffer":
            buffer = plan.buffers[index]
            count = sizes.evaluate(buffer.bytes, self._values)
            return Operand("buffer", index, self._offsets[index], count, buffer.dtype)
        if ref.kind == "constant":
            constant = plan.constants[index]
            return Operand("constant", index, constant.offset, constant.bytes, constant.dtype)
        if ref.kind == "state":
            state = plan.states[index]
            return Operand("state", index, 0, sizes.evaluate(state.bytes, self._values), state.dtype)
        port = (plan.inputs if ref.kind == "input" else plan.outputs)[index]
        count = nbytes(port.dtype, (sizes.evaluate(size, self._values) for size in port.shape))
        return Operand(ref.kind, index, 0, count, port.dtype)
