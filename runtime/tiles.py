"""Choosing among the tiles of a GPU kernel at the sizes of a call: what was measured, or else a model of their cost.

The model is a roofline with three roofs, each over what all programs of the grid do together: arithmetic, traffic with
the second-level cache, traffic with memory. A grid seldom fills its last wave, and a program that waits for memory
needs others beside it, or loads in flight, to hide that; both lower the roofs. It compares the tiles of one kernel and
is no prediction of time. (Roofline: Williams, Waterman and Patterson, 2009, doi:10.1145/1498765.1498785. Loads in
flight: Little's law.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from . import sizes
from .binaries import Binary
from .errors import ArtifactError
from .gpus import ARCHITECTURES, KIB, Architecture, Gpu
from .plan import Tile, Variant
from .sizes import Size

START = 1.5e-6
"""Seconds until programs work at full rate, and from their last work to the next kernel."""
LATENCY = 0.8e-6
"""Seconds that a load from memory takes."""
MARGIN = 0.9
"""Of the time of the first tile, what another must stay below to be chosen: the model is no finer than that."""
BYTES_PER_THREAD = 64
"""In flight in a kernel that has no pipeline through shared memory."""


@dataclass(frozen=True)
class Traits:
    """What the model knows of a kernel besides its tiles.

    Attributes:
        item: bytes of an element of its widest floating-point operand.
        tensor: whether it multiplies on tensor cores.
        tf32: whether it does so in TensorFloat-32.
    """

    item: int
    tensor: bool
    tf32: bool = False


def allowed(variant: Variant, values: Mapping[str, int], present: Mapping[str, Binary] | None = None) -> list[Tile]:
    """The tiles whose guards hold and, where binaries are given, that there are binaries of; in order.

    Raises:
        ArtifactError: none is left.
    """
    tiles = [
        tile
        for tile in variant.tiles
        if (present is None or tile.name in present) and sizes.evaluate(tile.guard, values)
    ]
    if not tiles:
        raise ArtifactError(f"kernel {variant.kernel}: no binary of it fits the sizes of this call")
    return tiles


def choose(
    variant: Variant,
    values: Mapping[str, int],
    binaries: Mapping[str, Binary],
    architecture: str,
    gpu: Gpu,
    traits: Traits,
) -> Tile:
    """The tile that should be fastest; the first one, unless another is clearly better.

    Args:
        variant: of a step.
        values: of the symbols.
        binaries: of the variant's kernel, by tile name.
        architecture: that they were compiled for.
        gpu: where they will run.
        traits: of the kernel.

    Raises:
        ArtifactError: no tile can be used at these sizes.
    """
    tiles = allowed(variant, values, binaries)
    if len(tiles) == 1:
        return tiles[0]
    model = CostModel(variant, values, ARCHITECTURES[architecture], gpu, traits)
    fewest = min(model.capacity(tile) for tile in tiles)
    costs = [model.seconds(tile, binaries[tile.name], fewest) for tile in tiles]
    best = min(costs)
    return tiles[0] if costs[0] * MARGIN <= best else tiles[costs.index(best)]


class CostModel:
    """Seconds that a variant takes with each of its tiles, on one GPU at one assignment of the symbols."""

    def __init__(
        self, variant: Variant, values: Mapping[str, int], architecture: Architecture, gpu: Gpu, traits: Traits
    ) -> None:
        self.variant = variant
        self.values = values
        self.architecture = architecture
        self.gpu = gpu
        self.traits = traits
        self.flops = max(sizes.evaluate(variant.flops, values), 0)
        self.bytes = max(sizes.evaluate(variant.bytes, values), 0)
        self._blocks = _unbounded(variant.units)
        self._divisors = divisors(self._blocks)

    def count(self, tile: Tile) -> int:
        """Blocks of the result, one per program where the number of programs has no bound."""
        return max(sizes.evaluate(self._blocks, {**self.values, **tile.values()}), 1)

    def blocks(self, tile: Tile) -> list[int]:
        """How much of each axis of the result one program does."""
        constants = tile.values()
        return [constants[name] for name in self._divisors if name in constants]

    def capacity(self, tile: Tile) -> float:
        """What the programs cover, in elements of the result: the same for all tiles but for what lies past its edges.

        A constant that multiplies the number of programs divides their work (a sum that is split).
        """
        constants = tile.values()
        parts = sizes.symbols_of(self._blocks) & constants.keys() - set(self._divisors)
        return self.count(tile) * math.prod(self.blocks(tile)) / math.prod(max(constants[name], 1) for name in parts)

    def resident(self, tile: Tile, binary: Binary) -> int:
        """Programs that one multiprocessor holds at a time."""
        one = self.architecture
        registers = -(-max(binary.registers, 1) * 32 // 256) * 256 * binary.warps
        shared = binary.shared + binary.static_shared + KIB
        return max(1, min(one.registers // registers, one.shared // shared, one.warps // binary.warps, one.programs))

    def seconds(self, tile: Tile, binary: Binary, fewest: float) -> float:
        """Estimated time.

        Args:
            tile: which one.
            binary: of the tile.
            fewest: the smallest :meth:`capacity` of the tiles to compare; what a tile covers beyond it is wasted.
        """
        gpu, one, traits = self.gpu, self.architecture, self.traits
        count, resident = self.count(tile), self.resident(tile, binary)
        programs = max(sizes.evaluate(self.variant.units, {**self.values, **tile.values()}), 1)
        runs = math.ceil(programs / gpu.multiprocessors)  # programs that the busiest multiprocessor runs
        each = math.ceil(count / programs) * runs  # blocks of the result that these do
        busy = count / each  # multiprocessors' worth
        waves = math.ceil(runs / resident)
        wasted = self.capacity(tile) / fewest
        flops = self.flops * wasted
        rate = one.scalar if not traits.tensor else one.tensor // 2 if traits.tf32 else one.tensor
        arithmetic = flops / (busy * gpu.clock * rate)
        cached = max(self.bytes, flops / 2 * traits.item * sum(1 / block for block in self.blocks(tile)))
        copying = cached / (busy * gpu.clock * one.copies)
        ahead = binary.shared * (tile.stages - 1) / tile.stages  # one stage is worked on, the others are on their way
        flight = min(resident, runs) * max(ahead, 32 * binary.warps * BYTES_PER_THREAD) / wasted
        memory = self.bytes / min(gpu.bandwidth, busy * flight / LATENCY)
        return START + LATENCY * (waves - 1) / resident + max(arithmetic, copying, memory)


def _unbounded(units: Size) -> Size:
    """Units without the bound on the number of programs that a persistent kernel has."""
    if isinstance(units, sizes.Op) and units.op == "min":
        return next((part for part in units.args if divisors(part)), units)
    return units


def divisors(units: Size) -> list[str]:
    """Names that a size divides by, in order: of ``units``, the constants that say how much one program does."""
    if not isinstance(units, sizes.Op):
        return []
    found = [name for part in units.args for name in divisors(part)]
    if units.op == "floordiv" and isinstance(units.args[1], str):
        found.append(units.args[1])
    return list(dict.fromkeys(found))


def traits_of(dtypes: Sequence[str], family: str) -> Traits:
    """The traits of a step's kernel from the dtypes of its operands and the family that it belongs to."""
    widths = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
    floats = [widths[dtype] for dtype in dtypes if dtype in widths]
    narrow = bool(floats) and min(floats) == 2
    return Traits(min(floats, default=4), narrow and family in ("matmul", "convolution", "attention", "quantized"))
