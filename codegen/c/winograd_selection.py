"""Which convolutions of a model are computed by Winograd's algorithm: where it saves most for the bytes that it adds.

A transformed weight is 4 times (tiles of 4 x 4) or 1.78 times (2 x 2) as large as the weight. All constants of a model
together may grow to :data:`GROWTH` times its weights, and what lowering fills panels up with counts. So one decision
is made for all entry points, before lowering: it goes into ``meta["winograd"]`` of regions, where the convolution
family finds it. A weight of which every use is computed so is stored in that form only.

Time is estimated for the sizes of the sample, in cycles of one core with 16 multiply-adds a cycle, which both base
instruction sets have (``machine.py``). The choice is one for all targets, as they share the weights. What counts
besides arithmetic is reading weights, which a model of many layers has in memory at every call: few tiles make little
use of them, each block of tiles reads all of them again, and all of that is only partly hidden. The numbers agree with
measurements on Zen 4 (AVX-512) and Zen 3 (AVX2) within a fifth.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from ...passes.graph.layouts import layout_of
from ...passes.graph.program import Program
from ...passes.graph.regions import body, is_region
from ...runtime import sizes
from ...runtime.errors import CompileError, UnsupportedOperator
from ...runtime.plan_check import ITEM_BYTES
from ...runtime.sizes import Size
from ..geometry import Convolution, Geometry, convolution_of
from ..provenance import origin_of
from ..regions import Task
from ..storage import ConstantTable, Storage, is_constant, recipe_of
from ..symbols import SymbolTable
from ..values import LANES, dtype_name
from . import packing, winograd
from .machine import MACHINES
from .winograd import META, Choice

GROWTH = 1.3
"""How large the constants may be, in units of the model's weights."""
WORTH = 0.9
"""The share of the direct kernel's time that must not be exceeded."""
_LARGER = 0.95  # and of that of smaller tiles, which add fewer bytes

_TRANSFORM_IN = {4: 250, 2: 90}  # cycles per tile and 16 channels
_TRANSFORM_OUT = {4: 300, 2: 80}  # with what the epilogue loses by working on tiles
_PRODUCTS = 0.88  # of the multiply-add limit
_ROWS = 3  # fewer tiles of a block take as long
_DIRECT = 0.92
_SECOND_CACHE = 1 << 18  # weights that stay there while a band of tiles is computed
_STREAMED = min(machine.l3_rate for machine in MACHINES)  # bytes per cycle from the third cache to one core
_STREAMED_EXPOSED = 0.5  # share of that time which computing does not hide
_MEMORY = 0.3  # cycles of one core per byte from memory, which several cores share
_MEMORY_EXPOSED = 0.4
_STEPS = 1000


@dataclass(frozen=True)
class Decision:
    """What was decided for one convolution, and why.

    Attributes:
        entry: name of the entry point.
        node: the region's name.
        module: where it comes from.
        choice: how it is computed; None: directly.
        reason: in words.
    """

    entry: str
    node: str
    module: str
    choice: Choice | None
    reason: str


@dataclass
class _Use:
    """A convolution: its region, and its estimated cycles by the direct kernel and by each tile."""

    program: Program
    node: fx.Node
    refusal: str | None
    direct: float = 0.0
    cycles: dict[int, float] = field(default_factory=dict)
    choices: dict[int, Choice] = field(default_factory=dict)


@dataclass
class _Weight:
    """A constant: bytes as the model has it and as the other kernels store it, and what it is used for."""

    bytes: int
    stored: int = 0
    packed: dict[int, int] = field(default_factory=dict)
    uses: list[_Use] = field(default_factory=list)
    shared: bool = False  # some use needs the direct form
    tile: int = 0

    def extra(self, tile: int) -> int:
        """Bytes that a tile adds to what is stored without one."""
        return 0 if tile == 0 else self.packed[tile] - (0 if self.shared else self.stored)

    def saved(self, tile: int) -> float:
        """Cycles that a tile saves in all uses."""
        return sum(use.direct - use.cycles[tile] for use in self.uses if use.refusal is None) if tile else 0.0

    def worthwhile(self) -> list[int]:
        """The tiles that are faster, the larger of them also than smaller ones."""
        uses = [use for use in self.uses if use.refusal is None]
        found: list[int] = []
        limit = WORTH * sum(use.direct for use in uses)
        for tile in sorted(self.packed):
            if (cycles := sum(use.cycles[tile] for use in uses)) < limit:
                found.append(tile)
                limit = _LARGER * cycles
        return found


def select_winograd(programs: Sequence[Program]) -> list[Decision]:
    """Annotate the regions whose convolutions are to be computed by Winograd's algorithm.

    Args:
        programs: all entry points for CPUs, after the passes; regions' meta is changed.

    Returns:
        A decision for each region of the convolution family, in the order of the programs.
    """
    weights = _weights(programs)
    room = GROWTH * sum(weight.bytes for weight in weights.values()) - sum(item.stored for item in weights.values())
    for weight, tile in _best(list(weights.values()), room):
        weight.tile = tile
    decisions = []
    for weight in weights.values():
        for use in weight.uses:
            choice = use.choices.get(weight.tile)
            use.node.meta.pop(META, None)
            if choice is not None:
                use.node.meta[META] = choice
            origin = origin_of(use.node)
            decisions.append(Decision(use.program.name, use.node.name, origin.module, choice, _reason(weight, use)))
    order = {(program.name, node.name): i for program in programs for i, node in enumerate(program.graph.nodes)}
    names = [program.name for program in programs]
    return sorted(decisions, key=lambda item: (names.index(item.entry), order[item.entry, item.node]))


def show(decisions: Sequence[Decision]) -> str:
    """Decisions as text, a line each."""
    lines = []
    for item in decisions:
        how = f"winograd {item.choice.tile}x{item.choice.tile}" if item.choice else "direct"
        lines.append(f"{item.entry}: {item.module or item.node}: {how}: {item.reason}")
    return "".join(f"{line}\n" for line in lines)


def _best(weights: Sequence[_Weight], room: float) -> list[tuple[_Weight, int]]:
    """The tiles that together save most cycles within ``room`` bytes: a knapsack, in steps of a part of the room."""
    saved = [0.0] * (_STEPS + 1)  # by the steps that are used at most
    taken: list[list[int]] = []
    candidates = [weight for weight in weights if room > 0 and weight.worthwhile()]
    needs = {id(item): {t: _steps(item.extra(t), room) for t in item.worthwhile()} for item in candidates}
    for weight in candidates:
        before, tiles = saved, [0] * (_STEPS + 1)
        saved = list(before)
        for tile, need in needs[id(weight)].items():
            gain = weight.saved(tile)
            for used in range(need, _STEPS + 1):
                if before[used - need] + gain > saved[used]:
                    saved[used], tiles[used] = before[used - need] + gain, tile
        taken.append(tiles)
    best, used = [], _STEPS
    for weight, tiles in zip(reversed(candidates), reversed(taken), strict=True):
        if tile := tiles[used]:
            best.append((weight, tile))
            used -= needs[id(weight)][tile]
    return best


def _steps(extra: int, room: float) -> int:
    """Bytes in steps of the room, rounded up."""
    return max(math.ceil(extra / room * _STEPS), 0)


def _reason(weight: _Weight, use: _Use) -> str:
    if use.refusal is not None:
        return use.refusal
    tile = weight.tile
    if tile:
        times, bytes_ = use.direct / use.cycles[tile], weight.extra(tile) >> 10
        return f"tiles of {tile}x{tile}: about {times:.1f} times as fast, {bytes_} KiB more weights"
    if not weight.worthwhile():
        return "the direct kernel is as fast at the sample's sizes"
    return f"its transformed weights do not fit into {GROWTH:g} times the model's weights"


def _weights(programs: Sequence[Program]) -> dict[object, _Weight]:
    """The constants of all programs by identity."""
    found: dict[object, _Weight] = {}
    for program in programs:
        symbols, sample = SymbolTable(program), _sample(program)
        for node in program.graph.nodes:
            if not is_region(node, "kernel"):
                continue
            task = _task(program, node, symbols)
            convolution = _convolution(task)
            for storage in task.operands:
                if storage is None or storage.recipe is None:
                    continue
                shape = tuple(extent for extent in storage.shape if isinstance(extent, int))
                plain = sizes.evaluate(sizes.product(shape), {}) * ITEM_BYTES[storage.dtype]
                weight = found.setdefault(storage.recipe.identity, _Weight(plain))
                if convolution is None or storage is not convolution.source:
                    weight.stored = max(weight.stored, _filled(shape, ITEM_BYTES[storage.dtype]))
                    weight.shared = True
                    continue
                use = _use(program, node, task, convolution, sample)
                weight.uses.append(use)
                weight.stored = max(weight.stored, _panels(convolution.geometry) * ITEM_BYTES[convolution.dtype])
                if use.refusal is not None:
                    weight.shared = True
                else:
                    weight.packed = {
                        tile: _points(convolution.geometry, tile) * ITEM_BYTES["float32"] for tile in use.choices
                    }
    return found


def _convolution(task: Task) -> Convolution | None:
    """The convolution of a region; None where there is none, or where lowering will say what is wrong with it."""
    if task.node.meta["region"].family != "convolution":
        return None
    try:
        return convolution_of(task)
    except (CompileError, UnsupportedOperator):
        return None


def _task(program: Program, node: fx.Node, symbols: SymbolTable) -> Task:
    """A region with its operands, enough to look at it."""

    def storage(operand: object) -> Storage | None:
        if not isinstance(operand, fx.Node) or not isinstance(value := operand.meta.get("val"), torch.Tensor):
            return None
        if is_constant(operand):
            recipe = recipe_of(program, operand)
            return Storage("constant", recipe.shape, recipe.dtype, recipe=recipe)
        return Storage("buffer", symbols.shape(value), dtype_name(value.dtype), layout_of(operand))

    return Task(node, body(node), [storage(operand) for operand in node.args], [], symbols, ConstantTable())


def _use(program: Program, node: fx.Node, task: Task, found: Convolution, sample: dict[str, int]) -> _Use:
    image = task.storage_of(found.x) if found.x.op == "placeholder" else None
    use = _Use(program, node, winograd.refuse(found, image))
    if use.refusal is None:
        space = [sizes.evaluate(extent, sample) for extent in task.symbols.shape(found.anchor.meta["val"])]
        n = space[0] if len(space) == 4 else 1
        use.direct = direct_cycles(found.geometry, n, *space[-2:])
        for tile in (2, 4):
            use.choices[tile] = choose(found.geometry, tile, n, *space[-2:])
            use.cycles[tile] = winograd_cycles(found.geometry, use.choices[tile], n, *space[-2:])
    return use


def choose(g: Geometry, tile: int, n: int, oh: int, ow: int) -> Choice:
    """Panels are worked on in groups where few tiles would keep few threads busy."""
    blocks = sizes.evaluate(winograd.blocks_of(winograd.tiles_of(n, oh, ow, tile)), {})
    return Choice(tile, 2 if blocks <= 2 and g.outputs >= 8 * packing.PANEL else 1)


def direct_cycles(g: Geometry, n: int, oh: int, ow: int) -> float:
    """Estimated cycles of ``convolution.c.jinja``."""
    vectors = -(-g.outputs // LANES)
    return _with_memory(n * oh * ow * g.depth * vectors / _DIRECT, _panels(g) * 4)


def winograd_cycles(g: Geometry, choice: Choice, n: int, oh: int, ow: int) -> float:
    """Estimated cycles of ``winograd.c.jinja``."""
    tiles = sizes.evaluate(winograd.tiles_of(n, oh, ow, choice.tile), {})
    blocks = sizes.evaluate(winograd.blocks_of(tiles), {})
    vectors, weights = -(-g.outputs // LANES), _points(g, choice.tile) * 4
    rows = max(tiles, _ROWS * min(blocks, tiles))
    products = rows * choice.points * g.channels * vectors / _PRODUCTS
    if weights > _SECOND_CACHE:  # every block streams all of them
        streaming = blocks * weights / _STREAMED
        products = max(products + _STREAMED_EXPOSED * streaming, streaming)
    transforms = _TRANSFORM_IN[choice.tile] * choice.groups * -(-g.channels // LANES)
    transforms += _TRANSFORM_OUT[choice.tile] * vectors
    return _with_memory(products + tiles * transforms, weights)


def _with_memory(cycles: float, weights: int) -> float:
    """Cycles with reading ``weights`` bytes from memory, most of which happens meanwhile."""
    return max(cycles + _MEMORY_EXPOSED * _MEMORY * weights, _MEMORY * weights)


def _panels(g: Geometry) -> int:
    """Elements of a packed weight."""
    if g.depthwise:
        return -(-g.channels // LANES) * LANES * g.taps
    return g.groups * -(-(g.outputs // g.groups) // packing.PANEL) * packing.PANEL * g.depth


def _points(g: Geometry, tile: int) -> int:
    """Elements of a transformed weight."""
    return -(-g.outputs // packing.PANEL) * packing.PANEL * g.channels * (tile + 2) ** 2


def _filled(shape: tuple[int, ...], item: int) -> int:
    """Bytes of another constant at most: matrices may be packed with either axis filled up."""
    if len(shape) < 2:
        return sizes.evaluate(sizes.product(shape), {}) * item
    *rest, rows, columns = shape
    filled = max(
        -(-rows // packing.PANEL) * packing.PANEL * columns, -(-columns // packing.PANEL) * packing.PANEL * rows
    )
    return sizes.evaluate(sizes.product(tuple(rest)), {}) * filled * item


def _sample(program: Program) -> dict[str, int]:
    """The sample's sizes by the names of symbols; the smallest size of what is no axis of an input."""
    symbols = SymbolTable(program)
    values = {name: low for name, (low, _) in symbols.ranges.items()}
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    for node, tensor in zip(placeholders, program.sample, strict=False):
        for extent, actual in zip(symbols.shape(node.meta["val"]), tensor.shape, strict=True):
            values.update(_solve(extent, actual))
    return values


def _solve(extent: Size, actual: int) -> Iterator[tuple[str, int]]:
    """The value of a symbol that is an axis as it is, or times a factor."""
    if isinstance(extent, str):
        yield extent, actual
    elif isinstance(extent, sizes.Op) and extent.op == "mul" and len(extent.args) == 2:
        name, factor = extent.args
        if isinstance(name, str) and isinstance(factor, int):
            yield name, actual // factor
