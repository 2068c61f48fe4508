"""How the convolution kernels cut their work: the binaries for each shape, chosen by a model of the time they take.

The model is of one kind of GPU only, but the order that it puts tiles in is about the same on all of them: what counts
is how many programs there are, how much of each tile is filling, and how often an element is read from the second-level
cache.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ...runtime.plan import Tile, TileConstant

PROCESSORS = 132
RESIDENT = 512 * 128  # elements of accumulators that the registers of one processor hold
SHARED_MEMORY = 99 * 1024  # of one program, on the smallest of the architectures
CACHE = 64  # bytes that a processor reads from the second-level cache per cycle
LATENCY = 250  # cycles of one step, while nothing else runs on the processor
START = 1500  # cycles before the first and after the last step
JOIN = 2500  # cycles to join the sums of split terms
PRODUCTS = {"half": 2048, "tf32": 1024, "ieee": 128}  # multiply-adds of a processor per cycle

_SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
_LEAST_STEPS = 4  # of a program that takes part of the terms
_MOST_SPLIT = 4 * PROCESSORS  # tiles of a result whose terms are split
_FIXED = 3  # tiles of a kernel for one number of pixels
# (pixels, channels, warps, stages)
_TENSOR = (
    (128, 128, 8, 3), (128, 64, 4, 3), (64, 128, 4, 3), (64, 64, 4, 4), (128, 32, 4, 3), (64, 32, 4, 4), (32, 64, 4, 4),
    (128, 16, 4, 3), (32, 16, 2, 4), (16, 16, 2, 4), (16, 32, 2, 4), (16, 64, 4, 4), (16, 128, 4, 4),
)  # fmt: skip
_EXACT = (
    (64, 64, 8, 3),
    (32, 64, 4, 3),
    (64, 32, 4, 3),
    (64, 16, 4, 3),
    (32, 32, 4, 3),
    (16, 32, 4, 3),
    (16, 16, 2, 3),
)


@dataclass(frozen=True)
class Shape:
    """A convolution at one size, as its tiles see it.

    Attributes:
        pixels: of all results.
        outputs: channels of a group.
        groups: of channels.
        runs: runs of terms that are read together: the taps; 0 where terms are looked up one by one.
        run: terms of each.
        item: bytes of an operand's element.
        unit: what multiplies: ``"half"``, ``"tf32"`` or ``"ieee"``.
    """

    pixels: int
    outputs: int
    groups: int
    runs: int
    run: int
    item: int
    unit: str

    def steps(self, k: int) -> int:
        """Steps of so many terms."""
        return max(self.runs, 1) * -(-self.run // k)


@dataclass(frozen=True)
class _Cut:
    m: int
    n: int
    k: int
    warps: int
    stages: int
    split: int

    @property
    def tile(self) -> Tile:
        constants = {"BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k, "SPLIT_K": self.split}
        name = f"{self.m}x{self.n}x{self.k}" + (f"p{self.split}" if self.split > 1 else "")
        return tile(f"{name}w{self.warps}s{self.stages}", self.warps, self.stages, **constants)

    def count(self, shape: Shape) -> int:
        """Tiles of the result."""
        return -(-shape.pixels // self.m) * -(-shape.outputs // self.n) * shape.groups

    def most(self, shape: Shape) -> int:
        """The most pixels that the tile may be used for: partial sums are of use, and have room, for few only."""
        if self.split == 1:
            return 2**62
        return _MOST_SPLIT // (-(-shape.outputs // self.n) * shape.groups) * self.m


@dataclass(frozen=True)
class Choice:
    """A tile, and the most pixels that it may be used for."""

    tile: Tile
    most: int


def tile(name: str, warps: int, stages: int, **constants: int) -> Tile:
    """A tile with its constants by name."""
    return Tile(name, tuple(TileConstant(key, value) for key, value in constants.items()), warps, stages)


def product_tiles(shape: Shape, least: int) -> tuple[Choice, ...]:
    """The binaries of ``convolution.py.jinja`` or ``convolution_gathered.py.jinja``, the default one first.

    Args:
        shape: at the most pixels that the kernel may meet.
        least: the fewest pixels. Between both, a tile is chosen for every few times as many pixels.
    """
    if least == shape.pixels:
        chosen: list[_Cut] = []
        for cut in _ordered(shape):
            if all((cut.m, cut.n) != (other.m, other.n) for other in chosen):
                chosen.append(cut)
        chosen = chosen[:_FIXED]
    else:
        least = max(least, 1)
        ratio = shape.pixels / least
        points = (least, least * ratio ** (1 / 3), least * ratio ** (2 / 3))
        chosen = [_ordered(replace(shape, pixels=int(point)))[0] for point in (shape.pixels, *points)]
    return tuple(Choice(cut.tile, cut.most(shape)) for cut in dict.fromkeys(chosen))


def _ordered(shape: Shape) -> list[_Cut]:
    """The best first."""
    return sorted(_cuts(shape), key=lambda cut: (_cycles(cut, shape), cut.tile.name))


def _cuts(shape: Shape) -> Iterable[_Cut]:
    k = _block_k(shape)
    steps = shape.steps(k)
    for m, n, warps, stages in _EXACT if shape.unit == "ieee" else _TENSOR:
        if shape.runs == 0 and m >= 128:
            warps = 8  # looking elements up takes registers
        if (m >= 2 * shape.pixels and m > 16) or (n >= 2 * shape.outputs and n > 16):
            continue  # mostly filling
        if (m + n) * k * shape.item * stages > SHARED_MEMORY:
            stages -= 1
        for split in _SPLITS:
            cut = _Cut(m, n, k, warps, stages, split)
            if split == 1 or (steps >= split * _LEAST_STEPS and shape.pixels <= cut.most(shape)):
                yield cut


def _block_k(shape: Shape) -> int:
    """Terms of a step: as many as fill it best, up to 128 bytes of a row. A step costs about as much as 8 terms."""
    most = {"half": 64, "tf32": 32, "ieee": 32}[shape.unit]
    sizes = [size for size in (most, most // 2, 16) if size == 16 or size // 2 < shape.run]
    return min(sizes, key=lambda size: (-(-shape.run // size) * (size + 8), -size))


def _cycles(cut: _Cut, shape: Shape) -> float:
    """About how long a tile's kernel takes."""
    programs = cut.count(shape) * cut.split
    steps = -(-shape.steps(cut.k) // cut.split)
    multiply = cut.m * cut.n * cut.k / PRODUCTS[shape.unit]
    if shape.unit == "ieee":
        multiply *= 1 + 2 / (cut.m * cut.n / (32 * cut.warps)) ** 0.5  # operands from shared memory
    read = (cut.m + cut.n) * cut.k * shape.item / CACHE
    resident = max(
        1, min(RESIDENT // (cut.m * cut.n * 2), 227 * 1024 // ((cut.m + cut.n) * cut.k * shape.item * cut.stages))
    )
    turns = -(-programs // (PROCESSORS * resident))
    busy = -(-programs // PROCESSORS) * steps * max(multiply, read)
    alone = turns * steps * LATENCY
    join = JOIN + cut.split * cut.m * cut.n * 8 / CACHE if cut.split > 1 else 0
    return max(busy, alone) + turns * START + join


def depthwise_tiles(channels: int, taps: int) -> tuple[Tile, ...]:
    """The binaries of ``depthwise.py.jinja``."""
    n = next((size for size in (16, 32, 64) if channels <= size), 64)
    elements = 2048 if taps <= 9 else 1024
    shapes = ((elements // n, n), (elements // n // 2, n), (elements // n // 2, min(2 * n, 128)))
    return tuple(
        tile(f"{m}x{n}w4", 4, 1, BLOCK_M=m, BLOCK_N=n) for m, n in dict.fromkeys(shapes) if n < 2 * channels or n == 16
    )
