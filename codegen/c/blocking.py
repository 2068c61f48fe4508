"""How matrix products are cut into blocks: rows of a unit of work, terms multiplied at once, panels that go together.

A product is panels of 32 columns times blocks of rows; a register tile (``Machine.rows`` x 32 on AVX-512; on AVX2 half
as many rows for float32, half as many columns at once for others, whose panels are so narrow if no target has AVX-512)
runs down ``depth`` words of k. What the three numbers trade:

- **depth**, words of k in one go. Sums leave and enter the registers once per go, so more is better, until the chunk of
  a panel (128 bytes a word) falls out of the second-level cache. Whether it fits the first one does not matter: a tile
  of 12 x 32 takes 8 bytes of it per cycle, a fraction of what the second-level cache delivers.
- **block**, rows of one unit. Where the kernel packs the right operand itself, it packs it once per block, and packed
  rows take stack and cache; otherwise blocks only decide how evenly threads share the work, against the cost of a unit.
- **group**, panels that go together. Rows that have to be packed are packed once per group; otherwise one panel at a
  time is best: what is stored is then little enough to drain while the next tile is multiplied.

Rows that lie a multiple of 4 KB apart are not packed, although the 12 lines of a tile then share a set of the
first-level cache: the template takes 8 rows at a time, which fit it and reach the same rate. With words of several
elements, AVX2 goes down a chunk of a wide panel twice, once for each half of its columns, and there such rows evict
what the second time should find: the chunk then has to fit the first-level cache.

The unit formula (``packing.matmul_units``) and so the plan knows only ``block``, which is the same for all targets.
Depth and group differ by base where that pays, by ``#if`` in the one source. No choice changes a bit of the result:
every sum adds its terms in the order of k with one rounding each, and resumes where it was.

The model estimates what a blocking costs beyond the multiply-adds themselves, in cycles per word of a row with a panel;
its terms are the functions below. (The reasoning is that of T. M. Low et al., "Analytical Modeling Is Enough for
High-Performance BLIS", 2016; the numbers are ours.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ...runtime.sizes import Size
from .machine import MACHINES, Machine, measured
from .packing import PANEL

SCRATCH = 256 << 10
"""Most bytes of stack that a kernel takes: threads that call a model may have stacks of one megabyte."""
BLOCKS = (12, 24, 48, 96, 144, 192)
GROUPS = (1, 2, 4, 8)
THREADS = (1, 2, 4, 8, 16)
"""Numbers of threads that units should be shared out evenly between."""
LINE = 16  # words
ALTERNATIVES = 7
PER_BLOCK = 2
"""Most blockings that are measured beside the model's choice, and of these with the same rows."""
_DEPTHS = (192, 384)  # where the number of terms varies
_TYPICAL = 512  # what a size that varies is taken for

_UNIT = 200.0  # cycles to find the place of a unit, and to begin with it
_TILE = 40.0  # cycles to enter and leave a register tile
_LEFT = {"direct": 0.0, "copied": 0.5, "converted": 1.0, "gathered": 2.0}  # cycles to pack a word of the left operand
_RIGHT = 2.0  # cycles to pack a word of the right operand
_EVICTED = 0.15  # cycles for reading a half of a panel again from the second-level cache where rows share a set
_EXPOSED = 0.25  # share of the time for reading from the third-level cache that prefetching does not hide


@dataclass(frozen=True)
class Problem:
    """A product as far as its blocking depends on it.

    Attributes:
        batch, m, n: entries, rows and columns.
        words: words along k (1 float32, 2 bfloat16 or 4 int8 each).
        left: the left operand's rows are multiplied where they lie (``"direct"``), or packed: copied, converted or
            gathered through an index function.
        packed: whether the right operand is packed when the artifact is written.
        apart: words between rows that are multiplied where they lie; 0 where that is not known.
        panel: columns of a panel.
        kind: the dtype that is multiplied.
    """

    batch: Size
    m: Size
    n: Size
    words: Size
    left: str = "direct"
    packed: bool = True
    apart: Size = 0
    panel: int = PANEL
    kind: str = "float32"

    @property
    def machines(self) -> tuple[Machine, ...]:
        """Those that a blocking is for: where panels are narrow, no target has vectors as wide as half of one."""
        return tuple(machine for machine in MACHINES if 2 * machine.lanes <= self.panel)

    @property
    def crowded(self) -> bool:
        """Whether the rows of a tile share a set of the first-level cache: a multiple of 4 KB apart."""
        return self.left == "direct" and isinstance(self.apart, int) and self.apart > 0 and self.apart % 1024 == 0


@dataclass(frozen=True)
class Cut:
    """What may differ between bases: words of k at once, and panels that go together."""

    depth: int
    group: int


@dataclass(frozen=True)
class Blocking:
    """Rows of a unit, and the cuts by base in the order of :data:`MACHINES`."""

    block: int
    cuts: tuple[Cut, ...]

    @property
    def name(self) -> str:
        """Words for tables: ``96 rows, 8 x 384`` (panels x words), per base where they differ."""
        cuts = dict.fromkeys(f"{cut.group} x {cut.depth}" for cut in self.cuts)
        return f"{self.block} rows, {' or '.join(cuts)}"

    @property
    def context(self) -> dict[str, int]:
        """The numbers by the names that ``matmul.c.jinja`` has for them."""
        narrow, wide = self.cuts
        found = {"block": self.block, "depth": narrow.depth, "group": narrow.group}
        return found | {"wide_depth": wide.depth, "wide_group": wide.group}


def choose(problem: Problem) -> Blocking:
    """The blocking that costs least by the model: its rows over all bases, its cuts for each."""
    return min(blockings(problem), key=lambda one: total(problem, one))


def alternatives(problem: Problem, base: str, caches: Callable[[Machine], Machine] = measured) -> list[Blocking]:
    """What is worth measuring beside the model's choice, the most promising first: at most :data:`ALTERNATIVES`.

    Args:
        problem: the product.
        base: the base instruction set that is measured, or nothing where none is. The cuts for others are the model's.
        caches: from a base's processor to the one at hand.
    """
    place = next((index for index, one in enumerate(MACHINES) if one.base == base), None)
    if place is None:
        return []
    machine, chosen = caches(MACHINES[place]), choose(problem)
    costs: dict[Blocking, float] = {}
    for one in blockings(problem):
        for cut in cuts(problem, one.block):
            blocking = Blocking(one.block, (*one.cuts[:place], cut, *one.cuts[place + 1 :]))
            costs[blocking] = overhead(problem, machine, one.block, cut) + _waiting(problem, one.block)
    several: list[Blocking] = []
    for blocking in sorted(costs, key=lambda blocking: costs[blocking]):
        alike = sum(other.block == blocking.block for other in several)
        if blocking != chosen and alike < PER_BLOCK and len(several) < ALTERNATIVES:
            several.append(blocking)
    return several


def blockings(problem: Problem) -> Iterator[Blocking]:
    """For every number of rows that fits, the best cuts for each base."""
    for block in _rows(problem):
        fitting = cuts(problem, block)
        if fitting:
            best = (min(fitting, key=lambda cut: overhead(problem, machine, block, cut)) for machine in MACHINES)  # noqa: B023
            yield Blocking(block, tuple(best))


def cuts(problem: Problem, block: int) -> list[Cut]:
    """All cuts whose scratch memory fits."""
    panels = -(-problem.n // problem.panel) if isinstance(problem.n, int) else max(GROUPS)
    groups = [group for group in GROUPS if group <= max(1, panels)] if problem.packed else [1]
    found = [Cut(depth, group) for group in groups for depth in _depths(problem)]
    return [cut for cut in found if scratch(problem, block, cut) <= SCRATCH]


def scratch(problem: Problem, block: int, cut: Cut) -> int:
    """Bytes of stack: sums (of one register tile where k is not cut), packed rows, a packed panel."""
    once = isinstance(problem.words, int) and problem.words <= cut.depth
    kept = max(machine.rows for machine in problem.machines) if once else block
    words = cut.group * kept * problem.panel
    words += 0 if problem.left == "direct" else block * cut.depth
    words += 0 if problem.packed else cut.depth * problem.panel
    return 4 * words


def total(problem: Problem, blocking: Blocking) -> float:
    """What a blocking costs over all bases, with what threads wait for each other."""
    pairs = [pair for pair in zip(MACHINES, blocking.cuts, strict=True) if pair[0] in problem.machines]
    costs = [
        1 + overhead(problem, machine, blocking.block, cut) / _multiply(problem, machine) for machine, cut in pairs
    ]
    return sum(costs) / len(costs) * _waiting(problem, blocking.block)


def overhead(problem: Problem, machine: Machine, block: int, cut: Cut) -> float:
    """Cycles beyond the multiply-adds, for each word of a row of a panel."""
    m, words = _number(problem.m), _number(problem.words)
    blocks = -(-m // block)
    rows = m / blocks
    wide = 2 * machine.lanes < problem.panel  # a panel is four vectors: tiles of float32 take all, others half of them
    floats = problem.kind == "float32"
    most = machine.rows // 2 if wide and floats else machine.rows
    tile = rows / math.ceil(rows / most)  # near-equal tiles
    depth = min(cut.depth, words)
    panels = -(-_number(problem.n) // problem.panel)
    evicted = problem.crowded and wide and not floats and 4 * problem.panel * depth > machine.l1
    group = min(cut.group, panels)  # what is equal in cost takes the smallest, which the callers list first
    packed_rows = 0.0 if problem.left == "direct" else rows
    return (
        _UNIT / (rows * words)
        + _LEFT[problem.left] / group
        + (0.0 if problem.packed else _RIGHT * problem.panel / rows)
        + _registers(problem, machine, tile, depth, words)
        + _traffic(problem, machine, tile, packed_rows, depth, group)
        + (_EVICTED if evicted else 0.0)
    )


def _multiply(problem: Problem, machine: Machine) -> float:
    """Cycles for the multiply-adds of one word of a row with a panel."""
    return problem.panel / machine.lanes / machine.ports


def _registers(problem: Problem, machine: Machine, tile: float, depth: int, words: int) -> float:
    """Entering a tile, and sums that are stored, and loaded again where k goes on; short tiles wait for B."""
    vectors = problem.panel / machine.lanes
    entering = _TILE * vectors / 2 / tile
    sums = vectors * (2 - depth / words)
    loads = (vectors + tile) / machine.loads / tile
    starved = max(0.0, loads - _multiply(problem, machine))
    return (entering + sums) / depth + starved


def _traffic(problem: Problem, machine: Machine, tile: float, packed_rows: float, depth: int, group: int) -> float:
    """Reading the group's panels for every tile, where they do not have most of the second-level cache.

    Rows that are not packed may come from beyond it as well, but those are only 4 bytes for every 2 cycles.
    """
    held = 4 * depth * (problem.panel * group + max(tile, packed_rows))
    return 0.0 if held <= machine.l2 * 3 / 4 else _EXPOSED * 4 * problem.panel / machine.l3_rate / tile


def _waiting(problem: Problem, block: int) -> float:
    """How much longer the last thread takes than its share, on average over :data:`THREADS`."""
    units = _number(problem.batch) * -(-_number(problem.m) // block) * -(-_number(problem.n) // problem.panel)
    return sum(-(-units // threads) * threads / max(units, 1) for threads in THREADS) / len(THREADS)


def _rows(problem: Problem) -> Sequence[int]:
    """Numbers of rows to consider: the useful ones up to what there is."""
    if not isinstance(problem.m, int):
        return [block for block in BLOCKS if block >= 48]
    most = max(1, problem.m)
    return [block for block in BLOCKS if block < most] + [most] * (most <= BLOCKS[-1])


def _depths(problem: Problem) -> Sequence[int]:
    """Depths to consider: all of k, or near-equal parts of it that are whole cache lines."""
    if not isinstance(problem.words, int):
        return _DEPTHS
    words = max(1, problem.words)
    parts = range(1, max(2, -(-words // 128) + 1))
    return list(dict.fromkeys(-(-words // part // LINE) * LINE if part > 1 else words for part in parts))


def _number(size: Size) -> int:
    return max(size, 1) if isinstance(size, int) else _TYPICAL
